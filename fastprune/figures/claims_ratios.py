"""Layerwise pruning ratios compared. The rule, fixed before any run:

1. Rows are those of A4 (a series for each layer: its LPR by epoch) and A5 (a series for each LR_find: the distance by
   epoch). Points are percentage points of LPR.
2. A seed counts if none of its runs that are compared diverged and all have the same epochs. Nothing stands in for a
   run that diverged.
3. A layer's movement is the maximum less the minimum over epochs of its LPR; the others' is the mean of the movements
   of all layers but the first. It is compared with the others' in another panel (`MoreMovement`), with the fixed bound
   `HARDLY_POINTS` (`Hardly`), and with the first layer's (`FirstAgainstOthers`).
4. Distances at the start are those at the first epoch there is (`SmallerStart`). A line flattens at an epoch if its
   mean fall an epoch from the first epoch to that one is more than from there to the last (`Flattens`).

The classes differ only in what they subtract per seed; all are of kind "better".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from fastprune.figures.claims import Kind, Measured
from fastprune.figures.results import Row

HARDLY_POINTS = 5.0
"""What a layer's ratio may move and still be said to move hardly."""

Curves = dict[str, dict[int, float]]
"""By series the value at each epoch, of one seed."""


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

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
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

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
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

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
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

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
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

    def measure(self, rows: Sequence[Row], chance: float) -> Measured:
        epochs = {row.round for row in rows if (row.panel, row.series) == (self.panel, self.series)}
        if epochs and not min(epochs) < self.at < max(epochs):
            return Measured(why_not=f"epoch {self.at} is not within the run")
        if epochs and self.at not in epochs:
            return Measured(why_not=f"no results of {self.series} at epoch {self.at}")

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
    """Applies `difference`, a fraction, to each seed's curves by panel. needed: by panel the series that must be there.
    Of a panel only those are read, unless `every` one is; then there must be others."""
    used = [r for r in rows if r.panel in needed and (every or r.series in needed[r.panel])]
    names = {panel: {row.series for row in used if row.panel == panel} for panel in needed}
    for panel, series in needed.items():
        for name in series:
            if name not in names[panel]:
                return Measured(why_not=f"no results of {name} in panel {panel}")
        if every and names[panel] == set(series):
            return Measured(why_not=f"no layer but {', '.join(series)} in panel {panel}")
    curves: dict[int, dict[str, Curves]] = {}
    for row in used:
        curve = curves.setdefault(row.seed, {}).setdefault(row.panel, {}).setdefault(row.series, {})
        if row.round in curve:
            place = f"panel {row.panel}, series {row.series}, seed {row.seed}, epoch {row.round}"
            raise ValueError(f"two results for {place}")
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
