"""The quantities that axes show, and the description of a drawing, without matplotlib."""

# Apart from drawing.py, because summary.json records a Drawing and the terminal's tables read the same axes.

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fastprune.errors import InputError
from fastprune.figures.figure import Panel
from fastprune.figures.results import Row


@dataclass(frozen=True)
class Axis:
    """A quantity on an axis.

    label: in the picture, with the unit. short: in the terminal's tables. factor: a row's value times this is shown.
    low, high: bounds of a row's value, ends included. log: logarithmic, and falling from left to right.
    """

    label: str
    short: str
    factor: float = 1.0
    low: float = 0.0
    high: float = math.inf
    log: bool = False


X_AXES = {
    # Densities fall, as in the paper: pruning proceeds from left to right. A log scale cannot show 0.
    "density": Axis("Weights remaining (fraction, log scale)", "weights left", low=1e-12, high=1.0, log=True),
    "epoch": Axis("Epoch at which the network is pruned", "epoch"),
    "filters": Axis("Filters removed (%)", "filters gone", factor=100.0, high=1.0),
    "parameters": Axis("Parameters", "parameters"),
    "flops": Axis("FLOPs an image", "FLOPs"),
    # Relative, because milliseconds of two machines cannot stand on one axis.
    "latency": Axis("Latency (% of the dense network's)", "% of the dense network's latency", factor=100.0),
}
Y_AXES = {
    "accuracy": Axis("Top-1 accuracy (%)", "top-1 accuracy in %", factor=100.0, high=1.0),
    "ratio": Axis("Layerwise pruning ratio (%)", "layerwise pruning ratio in %", factor=100.0, high=1.0),
    "distance": Axis("Distance of the ratios (points)", "distance of the ratios in points", factor=100.0, high=1.0),
}
_MAGNITUDES = ((1e9, "G", "billions"), (1e6, "M", "millions"), (1e3, "k", "thousands"))


@dataclass(frozen=True)
class DrawnPanel:
    """How one panel is drawn.

    x, y: names in X_AXES and Y_AXES. marks: x values at which a thin vertical line is drawn; marks_label explains it.
    """

    title: str
    x: str = "density"
    y: str = "accuracy"
    marks: tuple[float, ...] = ()
    marks_label: str = ""

    def __post_init__(self) -> None:
        if self.x not in X_AXES or self.y not in Y_AXES:
            raise ValueError(f"unknown axes {self.x!r} and {self.y!r}: see X_AXES and Y_AXES")
        # summary.json gives a list back; equality and hash need a tuple.
        object.__setattr__(self, "marks", tuple(self.marks))

    @property
    def early(self) -> bool:
        """Whether the first epochs get most of the x axis: layerwise ratios move most while training begins."""
        return self.x == "epoch" and self.y == "ratio"

    @classmethod
    def of(cls, panel: Panel) -> "DrawnPanel":
        """The drawing of a figure's panel: all of it except settings and runs."""
        return cls(panel.title, panel.x, panel.y, panel.marks, panel.marks_label)


@dataclass(frozen=True)
class Drawing:
    """How the rows of a figure are drawn. LR_find and LR_eval in any text are typeset as in the paper.

    panels: id -> panel, in reading order; others are not drawn. series: name -> label, in the order of the legend; a
    series that is not listed follows under its own name. chance: the accuracy of guessing, a fraction; None: no line
    is drawn, and diverged runs are left out. note: a line below the figure. layers: the series are the layers of one
    network, which a colour bar explains.
    """

    # A series takes its colour from its place in `series`, so that it keeps it where others have no results yet.

    title: str
    panels: Mapping[str, DrawnPanel]
    series: Mapping[str, str] = field(default_factory=dict)
    legend_title: str = ""
    chance: float | None = None
    note: str = ""
    layers: bool = False

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("no panels: a drawing needs at least one")
        if self.chance is not None and not 0 < self.chance < 1:
            raise ValueError(f"chance {self.chance!r}: expected a fraction between 0 and 1")


def check_rows(rows: Iterable[Row], panels: Mapping[str, DrawnPanel]) -> None:
    """InputError for a row with a value outside the bounds of its panel's axes."""
    for row in rows:
        # Find panels are in results.csv only, not in `panels`; they have the default axes, accuracy over density.
        panel = panels.get(row.panel, DrawnPanel(""))
        x, y = X_AXES[panel.x], Y_AXES[panel.y]
        if not x.low <= row.x <= x.high or (row.y is not None and not y.low <= row.y <= y.high):
            point = f"panel {row.panel}, series {row.series}, seed {row.seed}, round {row.round}"
            raise InputError(
                f"results.csv has x {row.x!r}, y {row.y!r} ({point}), out of bounds for {panel.x} and {panel.y}; "
                "run the figure again to write a new one"
            )


def shown_x(panel: DrawnPanel, values: Sequence[float]) -> tuple[float, str]:
    """Factor and label of a panel's x axis, by the size of its values: parameters in millions, FLOPs in GFLOPs."""
    axis = X_AXES[panel.x]
    if panel.early:
        return axis.factor, "Epoch of pruning (log scale from 1 on)"
    if panel.x in ("parameters", "flops"):
        for size, prefix, word in _MAGNITUDES:
            if max(values, default=0.0) >= size:
                unit = word if panel.x == "parameters" else f"{prefix}FLOPs an image"
                return 1 / size, f"Parameters ({unit})" if panel.x == "parameters" else unit
    return axis.factor, axis.label
