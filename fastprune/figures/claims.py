"""What a caption claims, and whether the results bear it out.

The rule, fixed before any run. A claim is one comparison of two series in a panel, or several that must all be true.
For each comparison:

1. Rounds in the stated range count, if both series have them. A seed counts if it has every such round in both series.
2. A diverged run counts as chance accuracy.
3. A round is dropped when the mean over seeds of *both* series is at most `CHANCE_MARGIN` above chance.
4. Per seed, left minus right is averaged over the remaining rounds, each with the same weight.
5. The 95 % t-interval of these differences over seeds decides. "better": above 0 holds, below 0 fails. "similar":
   within +-1 point, ends included, holds; wholly outside fails. Everything else is undecided.

Fewer than three seeds, a run that stops before the sparse end of the stated range, and a preset that only shows the
machinery are always undecided; the effect is reported all the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal

from fastprune.figures.results import Row

CHANCE_MARGIN = 0.01  # accuracy, as a fraction
SIMILAR_POINTS = 1.0  # accuracy points
MIN_SEEDS = 3
# Counts are rounded to whole weights: a density may miss 0.8**round by a little, far less than the step to the next.
SLACK = 0.01
STEP = 0.8

Outcome = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Comparison:
    """`left` is better than `right`, or the two are similar, over a range of densities or of rounds.

    `densities` and `rounds` are (low, high), ends included; give one of them. Low density 0: wherever the run ends.
    At round 0 all series of an eval panel are one and the same dense network: a comparison of masks leaves it out.
    """

    panel: str
    kind: Literal["better", "similar"]
    left: str
    right: str
    densities: tuple[float, float] | None = None
    rounds: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("better", "similar"):
            raise ValueError(f"kind {self.kind!r} is neither 'better' nor 'similar'")
        if self.left == self.right:
            raise ValueError(f"a comparison of {self.left!r} with itself")
        if (self.densities is None) == (self.rounds is None):
            raise ValueError("a comparison needs either densities or rounds")
        if self.densities is not None and not 0 <= self.densities[0] <= self.densities[1] <= 1:
            raise ValueError(f"densities {self.densities} are not (low, high) within [0, 1]")
        if self.rounds is not None and not 0 <= self.rounds[0] <= self.rounds[1]:
            raise ValueError(f"rounds {self.rounds} are not (low, high) from 0")


@dataclass(frozen=True)
class Claim:
    """A sentence of a caption and the comparisons that must all be true for it."""

    id: str
    text: str
    comparisons: tuple[Comparison, ...]

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise ValueError(f"claim {self.id!r} compares nothing")


@dataclass(frozen=True)
class Part:
    """How one comparison came out. `effect` is left minus right in accuracy points, `interval` its 95 % t-interval."""

    comparison: Comparison
    verdict: Outcome
    effect: float | None
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]
    rounds: tuple[int, ...]
    dropped: tuple[int, ...]
    diverged: int
    why: str

    @property
    def margin(self) -> float:
        """Points by which the interval clears what the comparison says; negative when it does not."""
        if self.interval is None:
            return -float("inf")
        low, high = self.interval
        return low if self.comparison.kind == "better" else SIMILAR_POINTS - max(abs(low), abs(high))


@dataclass(frozen=True)
class Verdict:
    """How a claim came out. `effect` and `interval` are those of the part that decided (of several, the weakest)."""

    id: str
    text: str
    verdict: Outcome
    effect: float | None
    interval: tuple[float, float] | None
    why: str
    parts: tuple[Part, ...]


def judge(claim: Claim, rows: Iterable[Row], *, chance: float, decisive: bool) -> Verdict:
    """Judge `claim` by the rule above. `chance` is the accuracy of guessing, as a fraction.

    `decisive` is False for presets that show the machinery only. A conjunction fails if one part fails, holds if all
    hold, and is undecided otherwise. Raises ValueError for two results at one (panel, series, seed, round).
    """
    if not 0 < chance < 1:
        raise ValueError(f"chance {chance!r} is not a fraction between 0 and 1")
    rows = list(rows)
    parts = tuple(_compare(comparison, rows, chance, decisive) for comparison in claim.comparisons)
    outcomes = [part.verdict for part in parts]
    outcome: Outcome = "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"
    decider = min((part for part in parts if part.verdict == outcome), key=lambda part: part.margin)
    return Verdict(claim.id, claim.text, outcome, decider.effect, decider.interval, decider.why, parts)


def t_interval(values: list[float]) -> tuple[float, float]:
    """95 % t-interval of the mean of at least two values; a single point where they are all equal."""
    from scipy import stats  # here, so that planning needs no scipy

    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _compare(comparison: Comparison, rows: list[Row], chance: float, decisive: bool) -> Part:
    left, right = (_points(rows, comparison.panel, name) for name in (comparison.left, comparison.right))
    for name, points in ((comparison.left, left), (comparison.right, right)):
        if not points:
            return _undecided(comparison, f"no results of {name} in panel {comparison.panel}")
    common = _common_rounds(left, right)
    chosen = [number for number, density in sorted(common.items()) if _in_range(comparison, number, density)]
    if not chosen:
        return _undecided(comparison, "the run has no round in the stated range")
    everyone = sorted({seed for seed, _ in left} | {seed for seed, _ in right})
    seeds = [seed for seed in everyone if all((seed, n) in left and (seed, n) in right for n in chosen)]
    if not seeds:
        return _undecided(comparison, "no seed has all rounds of both series")

    used = [points[seed, number] for points in (left, right) for seed in seeds for number in chosen]
    diverged = sum(row.diverged for row in used)

    def accuracy(points: dict[tuple[int, int], Row], seed: int, number: int) -> float:
        y = points[seed, number].y
        return chance if y is None else y

    def at_chance(points: dict[tuple[int, int], Row], number: int) -> bool:
        return fmean(accuracy(points, seed, number) for seed in seeds) <= chance + CHANCE_MARGIN

    dropped = tuple(number for number in chosen if at_chance(left, number) and at_chance(right, number))
    kept = tuple(number for number in chosen if number not in dropped)
    if not kept:
        why = "every round in the stated range is at chance level"
        return _undecided(comparison, why, seeds=tuple(seeds), dropped=dropped, diverged=diverged)
    differences = [
        100 * fmean(accuracy(left, seed, number) - accuracy(right, seed, number) for number in kept) for seed in seeds
    ]
    # Nine digits: 0.51 - 0.50 is to be one point, not 1.0000000000000009.
    effect = round(fmean(differences), 9)
    interval = None
    if len(seeds) > 1:
        low, high = t_interval(differences)
        interval = (round(low, 9), round(high, 9))

    verdict, why = _decide(comparison.kind, interval)
    if not decisive:
        verdict, why = "undecided", "this preset shows the machinery only and never decides"
    elif len(seeds) < MIN_SEEDS:
        verdict, why = "undecided", f"needs {MIN_SEEDS} complete seeds, has {len(seeds)}"
    elif not _covers(comparison, common):
        verdict, why = "undecided", "the run stops before the end of the stated range"
    left_out = [seed for seed in everyone if seed not in seeds]
    if left_out:
        why += f"; incomplete and left out: seed {', '.join(map(str, left_out))}"
    return Part(comparison, verdict, effect, interval, tuple(seeds), kept, dropped, diverged, why)


def _decide(kind: str, interval: tuple[float, float] | None) -> tuple[Outcome, str]:
    if interval is None:
        return "undecided", "one seed has no interval"
    low, high = interval
    if kind == "better":
        if low > 0:
            return "holds", "the interval lies above 0"
        if high < 0:
            return "fails", "the interval lies below 0"
        return "undecided", "the interval contains 0"
    bound = f"+-{SIMILAR_POINTS:g} point"
    if max(abs(low), abs(high)) <= SIMILAR_POINTS:
        return "holds", f"the interval lies within {bound}"
    if low > SIMILAR_POINTS or high < -SIMILAR_POINTS:
        return "fails", f"the interval lies outside {bound}"
    return "undecided", f"the interval crosses {bound}"


def _points(rows: list[Row], panel: str, series: str) -> dict[tuple[int, int], Row]:
    points: dict[tuple[int, int], Row] = {}
    for row in rows:
        if (row.panel, row.series) == (panel, series):
            if (row.seed, row.round) in points:
                raise ValueError(f"two results for panel {panel}, series {series}, seed {row.seed}, round {row.round}")
            points[row.seed, row.round] = row
    return points


def _common_rounds(left: dict[tuple[int, int], Row], right: dict[tuple[int, int], Row]) -> dict[int, float]:
    """Density of each round that both series have. Raises ValueError where their densities differ."""
    common: dict[int, list[float]] = {}
    for number in {number for _, number in left} & {number for _, number in right}:
        common[number] = [points[key].x for points in (left, right) for key in points if key[1] == number]
        if max(common[number]) > (1 + SLACK) * min(common[number]):
            raise ValueError(f"round {number} has densities from {min(common[number])} to {max(common[number])}")
    return {number: fmean(densities) for number, densities in common.items()}


def _in_range(comparison: Comparison, number: int, density: float) -> bool:
    if comparison.rounds is not None:
        return comparison.rounds[0] <= number <= comparison.rounds[1]
    assert comparison.densities is not None
    low, high = comparison.densities
    return low * (1 - SLACK) <= density <= high * (1 + SLACK)


def _covers(comparison: Comparison, common: dict[int, float]) -> bool:
    """Whether the run reaches the sparse end of the stated range, to less than one 20 % step."""
    if comparison.rounds is not None:
        return max(common) >= comparison.rounds[1]
    assert comparison.densities is not None
    low = comparison.densities[0]
    return low == 0 or min(common.values()) * STEP <= low * (1 + SLACK)


def _undecided(
    comparison: Comparison,
    why: str,
    *,
    seeds: tuple[int, ...] = (),
    dropped: tuple[int, ...] = (),
    diverged: int = 0,
) -> Part:
    return Part(comparison, "undecided", None, None, seeds, (), dropped, diverged, why)
