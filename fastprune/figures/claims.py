"""The claims of a caption, and the rule that judges them from results.

The rule was fixed before any run. A claim is one comparison, or several that must all be true. A comparison gives one
difference per seed, left minus right, in points. The 95 % t-interval of these paired differences over seeds decides:

- "better": above 0 holds, below 0 fails.
- "similar": within +-1 point, ends included, holds; wholly outside fails.
- "not worse": from -1 point up holds; wholly below fails.

Everything else is undecided. Always undecided are: fewer than three seeds, results that stop before the end of the
stated range, and a preset that only shows the machinery. The effect is reported in each case.

Accuracies (`Accuracy`):

1. A round counts if it is in the stated range and both series have it. A seed counts if it has all of these rounds in
   both series.
2. A diverged run counts as chance accuracy.
3. A round is dropped when the mean over seeds of *both* series is at most `CHANCE_MARGIN` above chance.
4. Per seed, left minus right is averaged over the remaining rounds, with equal weights.

Layerwise pruning ratios (the other comparisons, all of kind "better"):

1. Rows are those of A4 (one series per layer: its LPR by epoch) and A5 (one series per LR_find: the distance by epoch).
   Points are percentage points of LPR.
2. A seed counts if none of the runs compared diverged and all have the same epochs. A diverged run has no substitute
   value.
3. The movement of a layer is the maximum minus the minimum of its LPR over epochs. The movement of "the others" is the
   mean over all layers except the first. It is compared with that of another panel (`MoreMovement`), with the fixed
   bound `HARDLY_POINTS` (`Hardly`), and with that of the first layer (`FirstAgainstOthers`).
4. The distance at the start is that at the first epoch in the results (`SmallerStart`). A line flattens at an epoch if
   it falls faster per epoch, on average, before that epoch than after it (`Flattens`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal, Protocol

from fastprune.figures.results import Row

# Changing any of these after results were seen would be choosing the verdict.
# "Very similar" has no number in the captions. Over seeds, accuracy deviates by 0.5 to 1 point (bench/NOTES.md).
SIMILAR_POINTS = 1.0
# With two seeds the t-interval reaches 12.7 standard errors to each side of the mean, too wide to decide anything.
MIN_SEEDS = 3
# A fraction. Two networks that both guess differ by noise only, which would dilute the mean over rounds.
CHANCE_MARGIN = 0.01
# Each round prunes a whole number of weights, so a density misses 0.8**round by a little: far less than one step.
SLACK = 0.01
STEP = 0.8
HARDLY_POINTS = 5.0
"""Movement of LPR, in percentage points, below which a layer "hardly" moves. The caption gives no number."""

Outcome = Literal["holds", "fails", "undecided"]
Kind = Literal["better", "similar", "not worse"]
SIGNS: dict[str, str] = {"better": ">", "similar": "~", "not worse": ">="}
Curves = dict[str, dict[int, float]]
"""Series -> epoch -> value, of one seed and panel."""


class Comparison(Protocol):
    """One comparison: a frozen dataclass of plain values, so that summary.json can record it."""

    @property
    def panel(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def unit(self) -> str:
        """The unit of the differences, for example "accuracy points"."""

    @property
    def text(self) -> str:
        """What is compared, in a few characters, for the terminal's table."""

    def measure(self, rows: Sequence[Row], chance: float) -> "Finding":
        """The differences per seed, without a verdict. chance: the accuracy of guessing, a fraction."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one comparison.

    differences: seed -> left minus right, in points; empty where there are none, for the reason in `why`. rounds: those
    used. dropped: those left out because both series are at chance level. diverged, dead: how many of the runs compared
    diverged, or have a layer that is pruned whole. left_out: seeds that lack results. complete: whether the results
    reach the end of the stated range. effect: the mean difference. interval: its 95 % t-interval.
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
        """The seeds that count."""
        return tuple(self.differences)

    @property
    def margin(self) -> float:
        """Points by which the interval clears the bound of its kind; negative where it does not."""
        if self.interval is None:
            return -float("inf")
        low, high = self.interval
        if self.comparison.kind == "similar":
            return SIMILAR_POINTS - max(abs(low), abs(high))
        return low if self.comparison.kind == "better" else low + SIMILAR_POINTS


@dataclass(frozen=True)
class Claim:
    """A sentence of a caption, and the comparisons that must all be true for it to hold."""

    id: str
    text: str
    comparisons: Sequence[Comparison]

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise ValueError(f"claim {self.id!r} has no comparisons: give at least one")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a claim. effect, interval, why: those of the part that decided; of several, the one with the least
    margin."""

    id: str
    text: str
    verdict: Outcome
    effect: float | None
    interval: tuple[float, float] | None
    why: str
    parts: tuple[Finding, ...]


def judge(claim: Claim, rows: Iterable[Row], *, chance: float, decisive: bool) -> Verdict:
    """The verdict on `claim` by the rule above. chance: the accuracy of guessing, a fraction.

    decisive: False for a preset that only shows the machinery. A claim fails if one part fails, holds if all parts
    hold, and is undecided otherwise. ValueError for two results at one (panel, series, seed, round).
    """
    if not 0 < chance < 1:
        raise ValueError(f"chance {chance!r} is not a fraction between 0 and 1")
    rows = list(rows)
    parts = tuple(_judge_part(comparison, rows, chance, decisive) for comparison in claim.comparisons)
    outcomes = [part.verdict for part in parts]
    outcome: Outcome = "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"
    # A conjunction is as strong as its weakest part.
    decider = min((part for part in parts if part.verdict == outcome), key=lambda part: part.margin)
    return Verdict(claim.id, claim.text, outcome, decider.effect, decider.interval, decider.why, parts)


def _judge_part(comparison: Comparison, rows: Sequence[Row], chance: float, decisive: bool) -> Finding:
    found = comparison.measure(rows, chance)
    # Nine digits: 0.51 - 0.50 must be one point, not 1.0000000000000009, which would miss the bound of "similar".
    values = list(found.differences.values())
    effect = round(fmean(values), 9) if values else None
    interval = None
    if len(values) > 1:
        low, high = t_interval(values)
        interval = (round(low, 9), round(high, 9))
    verdict, why = _decide(comparison.kind, interval)
    # The order decides which reason is reported where several apply: the most basic one first.
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
    """95 % confidence interval of the mean (Student's t, n - 1 degrees of freedom) of at least two values."""
    from scipy import stats  # here, so that planning needs no scipy

    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _decide(kind: Kind, interval: tuple[float, float] | None) -> tuple[Outcome, str]:
    if interval is None:
        return "undecided", "one seed gives no interval"
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
    # "similar": the whole interval must lie within. That it contains 0 shows no similarity, only too few seeds.
    bound = f"+-{SIMILAR_POINTS:g} point"
    if max(abs(low), abs(high)) <= SIMILAR_POINTS:
        return "holds", f"the interval lies within {bound}"
    if low > SIMILAR_POINTS or high < -SIMILAR_POINTS:
        return "fails", f"the interval lies outside {bound}"
    return "undecided", f"the interval crosses {bound}"


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of series `left` against `right`, over a range of densities or of rounds.

    densities, rounds: (low, high), ends included; exactly one of them is given. A low density of 0 means: to the end of
    the run. A comparison of masks leaves out round 0, where all series of an eval panel are the same dense network.
    """

    # ValueError, not InputError: a wrong comparison is a mistake in a figure's module, not in a user's input.

    panel: str
    kind: Kind
    left: str
    right: str
    densities: tuple[float, float] | None = None
    rounds: tuple[int, int] | None = None
    unit: ClassVar[str] = "accuracy points"

    def __post_init__(self) -> None:
        if self.kind not in SIGNS:
            raise ValueError(f"unknown kind {self.kind!r}: choose one of {', '.join(map(repr, SIGNS))}")
        if self.left == self.right:
            raise ValueError(f"{self.left!r} is compared with itself")
        if (self.densities is None) == (self.rounds is None):
            raise ValueError("give exactly one of densities and rounds")
        if self.densities is not None and not 0 <= self.densities[0] <= self.densities[1] <= 1:
            raise ValueError(f"densities {self.densities}: expected (low, high) within [0, 1]")
        if self.rounds is not None and not 0 <= self.rounds[0] <= self.rounds[1]:
            raise ValueError(f"rounds {self.rounds}: expected (low, high), not below 0")

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
            return Finding(why="no round in the stated range has results of both")
        every = sorted({seed for seed, _ in left} | {seed for seed, _ in right})
        # Paired by seed: left and right share data order and initial weights, whose effect the difference removes.
        seeds = [seed for seed in every if all((seed, n) in left and (seed, n) in right for n in chosen)]
        if not seeds:
            return Finding(why="no seed has all rounds of both series")
        used = [points[seed, number] for points in (left, right) for seed in seeds for number in chosen]

        def accuracy(points: dict[tuple[int, int], Row], seed: int, number: int) -> float:
            y = points[seed, number].y
            # Leaving diverged runs out would favour a rate that diverges half the time.
            return chance if y is None else y

        def at_chance(points: dict[tuple[int, int], Row], number: int) -> bool:
            return fmean(accuracy(points, seed, number) for seed in seeds) <= chance + CHANCE_MARGIN

        # Both at chance: where only one series is, its collapse is the result.
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
        """Round -> density, for rounds that both series have. ValueError where the densities of a round differ."""
        common: dict[int, list[float]] = {}
        for number in {number for _, number in left} & {number for _, number in right}:
            # A range of densities picks the same rounds for both series only if they prune at the same pace.
            common[number] = [points[key].x for points in (left, right) for key in points if key[1] == number]
            if self.densities is not None and max(common[number]) > (1 + SLACK) * min(common[number]):
                raise ValueError(
                    f"round {number} has densities from {min(common[number])} to {max(common[number])}: expected one"
                )
        return {number: fmean(densities) for number, densities in common.items()}

    def _in_range(self, number: int, density: float) -> bool:
        if self.rounds is not None:
            return self.rounds[0] <= number <= self.rounds[1]
        assert self.densities is not None
        low, high = self.densities
        return low * (1 - SLACK) <= density <= high * (1 + SLACK)

    def _covered(self, common: dict[int, float]) -> bool:
        """Whether the rounds reach the sparse end of the stated range: the next 20 % step would leave it."""
        if self.rounds is not None:
            return max(common) >= self.rounds[1]
        assert self.densities is not None
        low = self.densities[0]
        return low == 0 or min(common.values()) * STEP <= low * (1 + SLACK)


def points_of(rows: Iterable[Row], panel: str, series: str) -> dict[tuple[int, int], Row]:
    """(seed, round) -> row, of one series. ValueError for two rows at one (seed, round)."""
    points: dict[tuple[int, int], Row] = {}
    for row in rows:
        if (row.panel, row.series) == (panel, series):
            if (row.seed, row.round) in points:
                raise ValueError(f"two results for panel {panel}, series {series}, seed {row.seed}, round {row.round}")
            points[row.seed, row.round] = row
    return points


@dataclass(frozen=True)
class _OfRatios:
    """What all comparisons of layerwise pruning ratios have in common."""

    # Fields, although no figure sets them: asdict() writes fields to summary.json.
    kind: Kind = field(default="better", init=False)
    unit: str = field(default="ratio points", init=False)


@dataclass(frozen=True)
class MoreMovement(_OfRatios):
    """In `panel`, the layers except `first` move more, on average, than in panel `than`."""

    panel: str
    than: str
    first: str

    def __post_init__(self) -> None:
        if self.panel == self.than:
            raise ValueError(f"panel {self.panel!r} is compared with itself")

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
    """In `panel`, the layers except `first` move less, on average, than HARDLY_POINTS."""

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
    """In `panel`, the layer `first` moves more than the mean of the others."""

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
    """The distance of series `left` is smaller than that of `right` at the first epoch in the results."""

    panel: str
    left: str
    right: str

    def __post_init__(self) -> None:
        if self.left == self.right:
            raise ValueError(f"{self.left!r} is compared with itself")

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
    """The distance of `series` falls faster per epoch, on average, up to the epoch `at` than from there to the last.

    Undecided unless `at` is strictly between the two.
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
            return Finding(why=f"epoch {self.at} is not inside the run")
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
    """Applies `difference` to the curves of each seed; it takes panel -> curves and returns a fraction.

    needed: panel -> the series that must exist. Only these are read, unless `every`: then all series of the panel are,
    and there must be others than the needed ones. ValueError for two results at one (panel, series, seed, epoch).
    """
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
            # A diverged run has no value here, so its seed lacks an epoch and is left out below.
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
    """Maximum minus minimum over epochs."""
    return max(curve.values()) - min(curve.values())


def _others(curves: Curves, first: str) -> float:
    """Mean movement of all layers except `first`."""
    # A4's caption excepts the first layer, which moves much more than the others and would dominate their mean.
    return fmean(_movement(curve) for name, curve in curves.items() if name != first)
