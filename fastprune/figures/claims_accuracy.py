"""Two accuracy curves compared. The rule, fixed before any run:

1. Rounds in the stated range count, if both series have them. A seed counts if it has every such round in both series.
2. A diverged run counts as chance accuracy.
3. A round is dropped when the mean over seeds of *both* series is at most `CHANCE_MARGIN` above chance.
4. Per seed, left minus right is averaged over the remaining rounds, each with the same weight.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from fastprune.figures.claims import SIGNS, Kind, Measured, check_kind
from fastprune.figures.results import Row

CHANCE_MARGIN = 0.01  # accuracy, as a fraction
# Counts are rounded to whole weights: a density may miss 0.8**round by a little, far less than the step to the next.
SLACK = 0.01
STEP = 0.8


@dataclass(frozen=True)
class Comparison:
    """Accuracy of series `left` against `right`, over a range of densities or of rounds.

    `densities` and `rounds` are (low, high), ends included; give one of them. Low density 0: wherever the run ends.
    At round 0 all series of an eval panel are one and the same dense network: a comparison of masks leaves it out.
    """

    panel: str
    kind: Kind
    left: str
    right: str
    densities: tuple[float, float] | None = None
    rounds: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.left == self.right:
            raise ValueError(f"a comparison of {self.left!r} with itself")
        if (self.densities is None) == (self.rounds is None):
            raise ValueError("a comparison needs either densities or rounds")
        if self.densities is not None and not 0 <= self.densities[0] <= self.densities[1] <= 1:
            raise ValueError(f"densities {self.densities} are not (low, high) within [0, 1]")
        if self.rounds is not None and not 0 <= self.rounds[0] <= self.rounds[1]:
            raise ValueError(f"rounds {self.rounds} are not (low, high) from 0")

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.left} {SIGNS[self.kind]} {self.right}"

    @property
    def unit(self) -> str:
        return "accuracy points"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        left, right = (points_of(rows, self.panel, name) for name in (self.left, self.right))
        for name, points in ((self.left, left), (self.right, right)):
            if not points:
                return Measured(why_not=f"no results of {name} in panel {self.panel}")
        common = self._common_rounds(left, right)
        chosen = [number for number, density in sorted(common.items()) if self._in_range(number, density)]
        if not chosen:
            return Measured(why_not="the run has no round in the stated range")
        everyone = sorted({seed for seed, _ in left} | {seed for seed, _ in right})
        seeds = [seed for seed in everyone if all((seed, n) in left and (seed, n) in right for n in chosen)]
        if not seeds:
            return Measured(why_not="no seed has all rounds of both series")
        used = [points[seed, number] for points in (left, right) for seed in seeds for number in chosen]

        def accuracy(points: dict[tuple[int, int], Row], seed: int, number: int) -> float:
            y = points[seed, number].y
            return chance if y is None else y

        def at_chance(points: dict[tuple[int, int], Row], number: int) -> bool:
            return fmean(accuracy(points, seed, number) for seed in seeds) <= chance + CHANCE_MARGIN

        dropped = tuple(number for number in chosen if at_chance(left, number) and at_chance(right, number))
        kept = tuple(number for number in chosen if number not in dropped)
        differences = {
            seed: 100 * fmean(accuracy(left, seed, number) - accuracy(right, seed, number) for number in kept)
            for seed in (seeds if kept else [])
        }
        return Measured(
            differences,
            kept,
            dropped,
            diverged=sum(row.diverged for row in used),
            dead=sum(row.dead > 0 for row in used),
            left_out=tuple(seed for seed in everyone if seed not in seeds),
            whole=self._covered(common),
            why_not="" if kept else "every round in the stated range is at chance level",
        )

    def _common_rounds(self, left: dict[tuple[int, int], Row], right: dict[tuple[int, int], Row]) -> dict[int, float]:
        """Density of each round that both series have. ValueError where their densities differ."""
        common: dict[int, list[float]] = {}
        for number in {number for _, number in left} & {number for _, number in right}:
            common[number] = [points[key].x for points in (left, right) for key in points if key[1] == number]
            if self.densities is not None and max(common[number]) > (1 + SLACK) * min(common[number]):
                raise ValueError(f"round {number} has densities from {min(common[number])} to {max(common[number])}")
        return {number: fmean(densities) for number, densities in common.items()}

    def _in_range(self, number: int, density: float) -> bool:
        if self.rounds is not None:
            return self.rounds[0] <= number <= self.rounds[1]
        assert self.densities is not None
        low, high = self.densities
        return low * (1 - SLACK) <= density <= high * (1 + SLACK)

    def _covered(self, common: dict[int, float]) -> bool:
        """Whether the run reaches the sparse end of the stated range, to less than one 20 % step."""
        if self.rounds is not None:
            return max(common) >= self.rounds[1]
        assert self.densities is not None
        low = self.densities[0]
        return low == 0 or min(common.values()) * STEP <= low * (1 + SLACK)


def points_of(rows: Iterable[Row], panel: str, series: str) -> dict[tuple[int, int], Row]:
    """The rows of a series by (seed, round). ValueError for two results at one place."""
    points: dict[tuple[int, int], Row] = {}
    for row in rows:
        if (row.panel, row.series) == (panel, series):
            if (row.seed, row.round) in points:
                raise ValueError(f"two results for panel {panel}, series {series}, seed {row.seed}, round {row.round}")
            points[row.seed, row.round] = row
    return points
