"""What a caption claims, and whether the results bear it out.

The rule, fixed before any run. A claim is one comparison, or several that must all be true. A comparison gives for each
seed a difference, left minus right, in points. The 95 % t-interval of these differences over seeds decides:

- "better": above 0 holds, below 0 fails.
- "similar": within +-1 point, ends included, holds; wholly outside fails.
- "not worse": from -1 point up holds; wholly below fails.

Everything else is undecided. Fewer than three seeds, results that stop before the end of the stated range, and a preset
that only shows the machinery are always undecided; the effect is reported all the same.

What is compared: accuracies in claims_accuracy.py, layerwise ratios in claims_ratios.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal, Protocol

from fastprune.figures.results import Row

SIMILAR_POINTS = 1.0
MIN_SEEDS = 3

Outcome = Literal["holds", "fails", "undecided"]
Kind = Literal["better", "similar", "not worse"]
SIGNS: dict[str, str] = {"better": ">", "similar": "~", "not worse": ">="}


@dataclass(frozen=True)
class Measured:
    """What a comparison found: by seed the difference in points, or why there is none.

    rounds, dropped: used, and left out as being at chance. diverged, dead: runs among the compared that diverged, or in
    which a layer is pruned whole. left_out: seeds that lack results. whole: whether all of the stated range is there.
    why_not: the reason, exactly where there are no differences.
    """

    differences: Mapping[int, float] = field(default_factory=dict)
    rounds: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    diverged: int = 0
    dead: int = 0
    left_out: tuple[int, ...] = ()
    whole: bool = True
    why_not: str = ""


class Comparing(Protocol):
    """One comparison: a frozen dataclass of plain values."""

    @property
    def panel(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def text(self) -> str:
        """What is compared, in a few signs."""

    @property
    def unit(self) -> str:
        """What the points are of."""

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        """Reads the rows. `chance`: the accuracy of guessing, a fraction."""


def check_kind(kind: str) -> None:
    """ValueError for a kind that the rule does not know."""
    if kind not in SIGNS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(map(repr, SIGNS))}")


@dataclass(frozen=True)
class Claim:
    """A sentence of a caption and the comparisons that must all be true for it."""

    id: str
    text: str
    comparisons: tuple[Any, ...]  # Comparing; Any, because asdict() has to see dataclasses

    def __post_init__(self) -> None:
        if not self.comparisons:
            raise ValueError(f"claim {self.id!r} compares nothing")


@dataclass(frozen=True)
class Part:
    """How one comparison came out. `effect` is left minus right in points of `unit`, `interval` its 95 % t-interval."""

    comparison: Any
    text: str
    unit: str
    verdict: Outcome
    effect: float | None
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]
    rounds: tuple[int, ...]
    dropped: tuple[int, ...]
    diverged: int
    dead: int
    why: str

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
    parts = tuple(_judge_part(comparison, rows, chance, decisive) for comparison in claim.comparisons)
    outcomes = [part.verdict for part in parts]
    outcome: Outcome = "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"
    decider = min((part for part in parts if part.verdict == outcome), key=lambda part: part.margin)
    return Verdict(claim.id, claim.text, outcome, decider.effect, decider.interval, decider.why, parts)


def _judge_part(comparison: Comparing, rows: Sequence[Row], chance: float, decisive: bool) -> Part:
    measured = comparison.measure(rows, chance)
    # Nine digits: 0.51 - 0.50 is to be one point, not 1.0000000000000009.
    values = list(measured.differences.values())
    effect = round(fmean(values), 9) if values else None
    interval = None
    if len(values) > 1:
        low, high = t_interval(values)
        interval = (round(low, 9), round(high, 9))
    verdict, why = _decide(comparison.kind, interval)
    if effect is None:
        verdict, why = "undecided", measured.why_not
    elif not decisive:
        verdict, why = "undecided", "this preset shows the machinery only and never decides"
    elif len(values) < MIN_SEEDS:
        verdict, why = "undecided", f"needs {MIN_SEEDS} complete seeds, has {len(values)}"
    elif not measured.whole:
        verdict, why = "undecided", "the run stops before the end of the stated range"
    if effect is not None and measured.left_out:
        why += f"; incomplete and left out: seed {', '.join(map(str, measured.left_out))}"
    return Part(
        comparison,
        comparison.text,
        comparison.unit,
        verdict,
        effect,
        interval,
        tuple(measured.differences),
        measured.rounds,
        measured.dropped,
        measured.diverged,
        measured.dead,
        why,
    )


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
