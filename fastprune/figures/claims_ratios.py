"""Layerwise pruning ratios compared. The rule, fixed before any run:

Rows are those of A4 (a series for each layer: its LPR by epoch) and A5 (a series for each LR_find: the distance by
epoch). A layer's movement is the maximum less the minimum over epochs of its LPR. Points are percentage points of LPR.
A seed counts if none of its runs that are compared diverged and all have the same epochs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fastprune.figures.claims import Kind, Measured
from fastprune.figures.results import Row

HARDLY_POINTS = 5.0
"""What a layer's ratio may move and still be said to move hardly."""

Curves = dict[str, dict[int, float]]
"""By series the value at each epoch, of one seed."""


@dataclass(frozen=True)
class MoreMovement:
    """In `panel` the layers but `first` move more, on average, than in panel `than`."""

    panel: str
    than: str
    first: str
    kind: Kind = "better"
    unit: str = "ratio points"

    @property
    def text(self) -> str:
        return f"{self.panel:<5}others move more than in {self.than}"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        return _measure(
            rows,
            {self.panel: (self.first,), self.than: (self.first,)},
            lambda of: _others(of[self.panel], self.first) - _others(of[self.than], self.first),
            every=True,
        )


@dataclass(frozen=True)
class Hardly:
    """In `panel` the layers but `first` move less, on average, than HARDLY_POINTS."""

    panel: str
    first: str
    bound: float = HARDLY_POINTS
    kind: Kind = "better"
    unit: str = "ratio points"

    @property
    def text(self) -> str:
        return f"{self.panel:<5}others move < {self.bound:g}"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        def difference(of: dict[str, Curves]) -> float:
            return self.bound / 100 - _others(of[self.panel], self.first)

        return _measure(rows, {self.panel: (self.first,)}, difference, every=True)


@dataclass(frozen=True)
class FirstAgainstOthers:
    """In `panel` the layer `first` moves more than the others do on average."""

    panel: str
    first: str
    kind: Kind = "better"
    unit: str = "ratio points"

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.first} moves more than others"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        def difference(of: dict[str, Curves]) -> float:
            return _movement(of[self.panel][self.first]) - _others(of[self.panel], self.first)

        return _measure(rows, {self.panel: (self.first,)}, difference, every=True)


@dataclass(frozen=True)
class SmallerStart:
    """The distance of series `left` is smaller than that of `right` at the first epoch there is."""

    panel: str
    left: str
    right: str
    kind: Kind = "better"
    unit: str = "ratio points"

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.left} starts below {self.right}"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        def difference(of: dict[str, Curves]) -> float:
            left, right = of[self.panel][self.left], of[self.panel][self.right]
            return right[min(right)] - left[min(left)]

        return _measure(rows, {self.panel: (self.left, self.right)}, difference)


@dataclass(frozen=True)
class Flattens:
    """The distance of `series` falls faster, on average, from the first epoch to `at` than from there to the last."""

    panel: str
    series: str
    at: int
    kind: Kind = "better"
    unit: str = "ratio points an epoch"

    @property
    def text(self) -> str:
        return f"{self.panel:<5}{self.series} flattens at {self.at}"

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        epochs = {row.round for row in rows if (row.panel, row.series) == (self.panel, self.series)}
        if epochs and not min(epochs) < self.at < max(epochs):
            return Measured(why_not=f"epoch {self.at} is not within the run")

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
) -> Measured:
    """Applies `difference` to each seed's curves. needed: by panel the series that must be there; of a panel only those
    are read, unless `every` one is."""
    used = [r for r in rows if r.panel in needed and (every or r.series in needed[r.panel])]
    names = {panel: {row.series for row in used if row.panel == panel} for panel in needed}
    for panel, series in needed.items():
        for name in series:
            if name not in names[panel]:
                return Measured(why_not=f"no results of {name} in panel {panel}")
    curves: dict[int, dict[str, Curves]] = {}
    for row in used:
        curve = curves.setdefault(row.seed, {}).setdefault(row.panel, {}).setdefault(row.series, {})
        if row.round in curve:
            raise ValueError(f"two results for panel {row.panel}, series {row.series}, epoch {row.round}")
        if row.y is not None:
            curve[row.round] = row.y
    epochs = {row.round for row in used}
    whole = [
        seed
        for seed, panels in sorted(curves.items())
        if all(panels.get(p, {}).get(name, {}).keys() == epochs for p in needed for name in names[p])
    ]
    return Measured(
        {seed: 100 * difference(curves[seed]) for seed in whole},
        rounds=tuple(sorted(epochs)) if whole else (),
        diverged=len({(row.seed, row.lr_find) for row in used if row.diverged}),
        dead=len({(row.seed, row.lr_find) for row in used if row.dead}),
        left_out=tuple(sorted(curves.keys() - set(whole))),
        why_not="" if whole else "no seed has all epochs: runs diverged or are missing",
    )


def _movement(curve: Mapping[int, float]) -> float:
    return max(curve.values()) - min(curve.values())


def _others(curves: Curves, first: str) -> float:
    return fmean(_movement(curve) for name, curve in curves.items() if name != first)
