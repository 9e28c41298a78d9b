"""What a caption claims, and whether the results bear it out.

The rule, fixed before any run. A claim is one comparison, or several that must all be true. A comparison gives for each
seed a difference, left minus right, in points. The 95 % t-interval of these differences over seeds decides:

- "better": above 0 holds, below 0 fails.
- "similar": within +-1 point, ends included, holds; wholly outside fails.
- "not worse": from -1 point up holds; wholly below fails.

Everything else is undecided. Fewer than three seeds, results that stop before the end of the stated range, and a preset
that only shows the machinery are always undecided; the effect is reported all the same.

Accuracies (`Accuracy`):

1. Rounds in the stated range count, if both series have them. A seed counts if it has every such round in both series.
2. A diverged run counts as chance accuracy.
3. A round is dropped when the mean over seeds of *both* series is at most `CHANCE_MARGIN` above chance.
4. Per seed, left minus right is averaged over the remaining rounds, each with the same weight.

Layerwise pruning ratios (the other comparisons, all of kind "better"):

1. Rows are those of A4 (a series for each layer: its LPR by epoch) and A5 (a series for each LR_find: the distance by
   epoch). Points are percentage points of LPR.
2. A seed counts if none of its runs that are compared diverged and all have the same epochs. Nothing stands in for a
   run that diverged.
3. A layer's movement is the maximum less the minimum over epochs of its LPR; the others' is the mean of the movements
   of all layers but the first. It is compared with the others' in another panel (`MoreMovement`), with the fixed bound
   `HARDLY_POINTS` (`Hardly`), and with the first layer's (`FirstAgainstOthers`).
4. Distances at the start are those at the first epoch there is (`SmallerStart`). A line flattens at an epoch if its
   mean fall an epoch from the first epoch to that one is more than from there to the last (`Flattens`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal, Protocol

from fastprune.figures.results import Row

SIMILAR_POINTS = 1.0
MIN_SEEDS = 3
CHANCE_MARGIN = 0.01  # accuracy, as a fraction
# Counts are rounded to whole weights: a density may miss 0.8**round by a little, far less than the step to the next.
SLACK = 0.01
STEP = 0.8
HARDLY_POINTS = 5.0
"""What a layer's ratio may move and still be said to move hardly."""

Outcome = Literal["holds", "fails", "undecided"]
Kind = Literal["better", "similar", "not worse"]
SIGNS: dict[str, str] = {"better": ">", "similar": "~", "not worse": ">="}
Curves = dict[str, dict[int, float]]
"""By series the value at each epoch, of one seed."""


class Comparison(Protocol):
    """One comparison: a frozen dataclass of plain values."""

    @property
    def panel(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def unit(self) -> str:
        """What the points are of."""

    @property
    def text(self) -> str:
        """What is compared, in a few signs."""

    def measure(self, rows: Sequence[Row], chance: float) -> "Finding":
        """Reads the rows; gives no verdict yet. chance: the accuracy of guessing, a fraction."""


@dataclass(frozen=True)
class Finding:
    """How one comparison came out.

    differences: by seed, left minus right in points; empty where `why` says why there are none. rounds, dropped: used,
    and left out as being at chance. diverged, dead: runs among the compared that diverged, or in which a layer is
    pruned whole. left_out: seeds that lack results. complete: whether all of the stated range is there. effect: the
    mean difference; interval: its 95 % t-interval.
    """

    differences: Mapping[int, float] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    diverged: int = 0
    dead: int = 0
    left_out: tuple[int, ...] = ()
    complete: bool = True
    why: str = ""
    verdict: Outcome = "undecided"
    effect: float | None = None
    interval: tuple[float, float] | None = None
    comparison: Any = None  # a Comparison; Any, because asdict() has to see dataclasses
    text: str = ""
    unit: str = ""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that count."""
        return tuple(self.differences)

    @property
    def margin(self) -> float:
        """Points by which the interval clears what the comparison says; negative when it does not."""
        if self.interval is None:
            return -float("inf")
        low, high = self.interval
        if self.comparison.kind == "similar":
            return SIMILAR_POINTS - max(abs(low), abs(high))
        return low if self.comparison.kind == "better" else low + SIMILAR_POINTS


@dataclass(frozen=True)
class Claim:
    """A sentence of a caption and the comparisons that must all be true for it."""

    id: str
    text: str
    comparisons: Sequence[Comparison]

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise ValueError(f"claim {self.id!r} compares nothing")


@dataclass(frozen=True)
class Verdict:
    """How a claim came out. `effect` and `interval` are those of the part that decided (of several, the weakest)."""

    id: str
    text: str
    verdict: Outcome
    effect: float | None
    interval: tuple[float, float] | None
    why: str
    parts: tuple[Finding, ...]


def judge(claim: Claim, rows: Iterable[Row], *, chance: float, decisive: bool) -> Verdict:
    """Judge `claim` by the rule above. `chance` is the accuracy of guessing, as a fraction.

    `decisive` is False for presets that show the machinery only. A conjunction fails if one part fails, holds if all
    hold, and is undecided otherwise. Raises ValueError for two results at one (panel, series, seed, round).
    """
    if not 0 < chance < 1:
        raise ValueError(f"chance {chance!r} is not a fraction between 0 and 1")
    rows = list(rows)
    parts = tuple(_judge_part(comparison, rows, chance, decisive) for comparison in claim.comparisons)
    outcomes = [part.verdict for part in parts]
    outcome: Outcome = "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"
    decider = min((part for part in parts if part.verdict == outcome), key=lambda part: part.margin)
    return Verdict(claim.id, claim.text, outcome, decider.effect, decider.interval, decider.why, parts)


def _judge_part(comparison: Comparison, rows: Sequence[Row], chance: float, decisive: bool) -> Finding:
    found = comparison.measure(rows, chance)
    # Nine digits: 0.51 - 0.50 is to be one point, not 1.0000000000000009.
    values = list(found.differences.values())
    effect = round(fmean(values), 9) if values else None
    interval = None
    if len(values) > 1:
        low, high = t_interval(values)
        interval = (round(low, 9), round(high, 9))
    verdict, why = _decide(comparison.kind, interval)
    if effect is None:
        verdict, why = "undecided", found.why
    elif not decisive:
        verdict, why = "undecided", "this preset shows the machinery only and never decides"
    elif len(values) < MIN_SEEDS:
        verdict, why = "undecided", f"needs {MIN_SEEDS} complete seeds, has {len(values)}"
    elif not found.complete:
        verdict, why = "undecided", "the run stops before the end of the stated range"
    if effect is not None and found.left_out:
        why += f"; incomplete and left out: seed {', '.join(map(str, found.left_out))}"
    about: dict[str, Any] = {"comparison": comparison, "text": comparison.text, "unit": comparison.unit}
    return replace(found, verdict=verdict, effect=effect, interval=interval, why=why, **about)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % t-interval of the mean of at least two values; a single point where they are all equal."""
    from scipy import stats  # here, so that planning needs no scipy

    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _decide(kind: Kind, interval: tuple[float, float] | None) -> tuple[Outcome, str]:
    if interval is None:
        return "undecided", "one seed has no interval"
    low, high = interval
    if kind == "better":
        if low > 0:
            return "holds", "the interval lies above 0"
        if high < 0:
            return "fails", "the interval lies below 0"
        return "undecided", "the interval contains 0"
    if kind == "not worse":
        bound = f"-{SIMILAR_POINTS:g} point"
        if low >= -SIMILAR_POINTS:
            return "holds", f"the interval lies above {bound}"
        if high < -SIMILAR_POINTS:
            return "fails", f"the interval lies below {bound}"
        return "undecided", f"the interval contains {bound}"
    bound = f"+-{SIMILAR_POINTS:g} point"
    if max(abs(low), abs(high)) <= SIMILAR_POINTS:
        return "holds", f"the interval lies within {bound}"
    if low > SIMILAR_POINTS or high < -SIMILAR_POINTS:
        return "fails", f"the interval lies outside {bound}"
    return "undecided", f"the interval crosses {bound}"


@dataclass(frozen=True)
class Accuracy:
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
    unit: ClassVar[str] = "accuracy points"

    def __post_init__(self) -> None:
        if self.kind not in SIGNS:
            raise ValueError(f"kind {self.kind!r} is none of {', '.join(map(repr, SIGNS))}")
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

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        left, right = (points_of(rows, self.panel, name) for name in (self.left, self.right))
        for name, points in ((self.left, left), (self.right, right)):
            if not points:
                return Finding(why=f"no results of {name} in panel {self.panel}")
        common = self._common_rounds(left, right)
        chosen = [number for number, density in sorted(common.items()) if self._in_range(number, density)]
        if not chosen:
            return Finding(why="the run has no round in the stated range")
        every = sorted({seed for seed, _ in left} | {seed for seed, _ in right})
        seeds = [seed for seed in every if all((seed, n) in left and (seed, n) in right for n in chosen)]
        if not seeds:
            return Finding(why="no seed has all rounds of both series")
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
        return Finding(
            differences,
            kept,
            dropped,
            diverged=sum(row.diverged for row in used),
            dead=sum(row.dead > 0 for row in used),
            left_out=tuple(seed for seed in every if seed not in seeds),
            complete=self._covered(common),
            why="" if kept else "every round in the stated range is at chance level",
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


@dataclass(frozen=True)
class _OfRatios:
    """What no figure chooses; a field all the same, so that summary.json tells it."""

    kind: Kind = field(default="better", init=False)
    unit: str = field(default="ratio points", init=False)


@dataclass(frozen=True)
class MoreMovement(_OfRatios):
    """In `panel` the layers but `first` move more, on average, than in panel `than`."""

    panel: str
    than: str
    first: str

    def __post_init__(self) -> None:
        if self.panel == self.than:
            raise ValueError(f"a comparison of panel {self.panel!r} with itself")

    @property
    def text(self) -> str:
        return f"{self.panel:<5}others move more than in {self.than}"

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        return _measure(
            rows,
            {self.panel: (self.first,), self.than: (self.first,)},
            lambda of: _others(of[self.panel], self.first) - _others(of[self.than], self.first),
            every=True,
        )


@dataclass(frozen=True)
class Hardly(_OfRatios):
    """In `panel` the layers but `first` move less, on average, than HARDLY_POINTS."""

    panel: str
    first: str
    bound: float = field(default=HARDLY_POINTS, init=False)

    @property
    def text(self) -> str:
        return f"{self.panel:<5}others move < {self.bound:g}"

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        def difference(of: dict[str, Curves]) -> float:
            return self.bound / 100 - _others(of[self.panel], self.first)

        return _measure(rows, {self.panel: (self.first,)}, difference, every=True)


@dataclass(frozen=True)
class FirstAgainstOthers(_OfRatios):
    """In `panel` the layer `first` moves more than the others do on average."""

    panel: str
    first: str

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.first} moves more than others"

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        def difference(of: dict[str, Curves]) -> float:
            return _movement(of[self.panel][self.first]) - _others(of[self.panel], self.first)

        return _measure(rows, {self.panel: (self.first,)}, difference, every=True)


@dataclass(frozen=True)
class SmallerStart(_OfRatios):
    """The distance of series `left` is smaller than that of `right` at the first epoch there is."""

    panel: str
    left: str
    right: str

    def __post_init__(self) -> None:
        if self.left == self.right:
            raise ValueError(f"a comparison of {self.left!r} with itself")

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.left} starts below {self.right}"

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        def difference(of: dict[str, Curves]) -> float:
            left, right = of[self.panel][self.left], of[self.panel][self.right]
            return right[min(right)] - left[min(left)]

        return _measure(rows, {self.panel: (self.left, self.right)}, difference)


@dataclass(frozen=True)
class Flattens(_OfRatios):
    """The distance of `series` falls faster, on average, from the first epoch to `at` than from there to the last.

    Undecided where `at` is not strictly between the two.
    """

    panel: str
    series: str
    at: int
    unit: str = field(default="ratio points an epoch", init=False)

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.series} flattens at {self.at}"

    def measure(self, rows: Sequence[Row], chance: float) -> Finding:
        epochs = {row.round for row in rows if (row.panel, row.series) == (self.panel, self.series)}
        if epochs and not min(epochs) < self.at < max(epochs):
            return Finding(why=f"epoch {self.at} is not within the run")
        if epochs and self.at not in epochs:
            return Finding(why=f"no results of {self.series} at epoch {self.at}")

        def difference(of: dict[str, Curves]) -> float:
            curve = of[self.panel][self.series]
            first, last = min(curve), max(curve)
            before = (curve[first] - curve[self.at]) / (self.at - first)
            return before - (curve[self.at] - curve[last]) / (last - self.at)

        return _measure(rows, {self.panel: (self.series,)}, difference)


def _measure(
    rows: Sequence[Row],
    needed: Mapping[str, Sequence[str]],
    difference: Callable[[dict[str, Curves]], float],
    *,
    every: bool = False,
) -> Finding:
    """Applies `difference`, a fraction, to each seed's curves by panel. needed: by panel the series that must be there.
    Of a panel only those are read, unless `every` one is; then there must be others."""
    used = [r for r in rows if r.panel in needed and (every or r.series in needed[r.panel])]
    names = {panel: {row.series for row in used if row.panel == panel} for panel in needed}
    for panel, series in needed.items():
        for name in series:
            if name not in names[panel]:
                return Finding(why=f"no results of {name} in panel {panel}")
        if every and names[panel] == set(series):
            return Finding(why=f"no layer but {', '.join(series)} in panel {panel}")
    curves: dict[int, dict[str, Curves]] = {}
    for row in used:
        curve = curves.setdefault(row.seed, {}).setdefault(row.panel, {}).setdefault(row.series, {})
        if row.round in curve:
            place = f"panel {row.panel}, series {row.series}, seed {row.seed}, epoch {row.round}"
            raise ValueError(f"two results for {place}")
        if row.y is not None:
            curve[row.round] = row.y
    epochs = {row.round for row in used}
    complete = [
        seed
        for seed, panels in sorted(curves.items())
        if all(panels.get(p, {}).get(name, {}).keys() == epochs for p in needed for name in names[p])
    ]
    return Finding(
        {seed: 100 * difference(curves[seed]) for seed in complete},
        rounds=tuple(sorted(epochs)) if complete else (),
        diverged=len({(row.seed, row.lr_find) for row in used if row.diverged}),
        dead=len({(row.seed, row.lr_find) for row in used if row.dead}),
        left_out=tuple(sorted(curves.keys() - set(complete))),
        why="" if complete else "no seed has all epochs: runs diverged or are missing",
    )


def _movement(curve: Mapping[int, float]) -> float:
    return max(curve.values()) - min(curve.values())


def _others(curves: Curves, first: str) -> float:
    return fmean(_movement(curve) for name, curve in curves.items() if name != first)
