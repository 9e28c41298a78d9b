"""What can stand on an axis, and how a figure's rows are shown. Nothing of matplotlib."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fastprune.errors import InputError
from fastprune.figures.figure import Panel
from fastprune.figures.results import Row


@dataclass(frozen=True)
class Axis:
    """label: with its unit. factor: from a row's value to what is shown. low, high: what a value can be.

    log: falling from left to right, on a logarithmic scale. short: of the terminal's tables.
    """

    label: str
    short: str
    factor: float = 1.0
    low: float = 0.0
    high: float = math.inf
    log: bool = False


X_AXES = {
    "density": Axis("Weights remaining (fraction, log scale)", "weights left", low=1e-12, high=1.0, log=True),
    "epoch": Axis("Epoch at which the network is pruned", "epoch"),
    "filters": Axis("Filters removed (%)", "filters gone", factor=100.0, high=1.0),
    "parameters": Axis("Parameters", "parameters"),
    "flops": Axis("FLOPs an image", "FLOPs"),
    "latency": Axis("Latency (% of the whole network's)", "% of the whole network's latency", factor=100.0),
}
Y_AXES = {
    "accuracy": Axis("Top-1 accuracy (%)", "top-1 accuracy in %", factor=100.0, high=1.0),
    "ratio": Axis("Layerwise pruning ratio (%)", "layerwise pruning ratio in %", factor=100.0, high=1.0),
    "distance": Axis("Distance of the ratios (points)", "distance of the ratios in points", factor=100.0, high=1.0),
}
_MAGNITUDES = ((1e9, "G", "billions"), (1e6, "M", "millions"), (1e3, "k", "thousands"))


@dataclass(frozen=True)
class DrawnPanel:
    """x, y: names in X_AXES and Y_AXES. marks: places on the x axis with a thin line, explained by `marks_label`."""

    title: str
    x: str = "density"
    y: str = "accuracy"
    marks: tuple[float, ...] = ()
    marks_label: str = ""

    def __post_init__(self) -> None:
        if self.x not in X_AXES or self.y not in Y_AXES:
            raise ValueError(f"no axes {self.x!r} and {self.y!r}")
        object.__setattr__(self, "marks", tuple(self.marks))

    @classmethod
    def of(cls, panel: Panel) -> "DrawnPanel":
        """How a figure's panel is drawn."""
        return cls(panel.title, panel.x, panel.y, panel.marks, panel.marks_label)


@dataclass(frozen=True)
class Drawing:
    """How the rows of a figure are shown. `LR_find` and `LR_eval` in any text are set as in the paper.

    `panels`: by id, in reading order; panels that are not named are not drawn. `series`: id -> label, in order; a
    series keeps its colour when others are missing, and one that is not named follows under its own name. `chance`: the
    accuracy of guessing, a fraction. `note`: a line below the figure. `layers`: the series are a network's layers,
    shown by a colour bar.
    """

    title: str
    panels: Mapping[str, DrawnPanel]
    series: Mapping[str, str] = field(default_factory=dict)
    legend_title: str = ""
    chance: float | None = None
    note: str = ""
    layers: bool = False

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("a figure without panels")
        if self.chance is not None and not 0 < self.chance < 1:
            raise ValueError(f"chance {self.chance!r} is not a fraction between 0 and 1")


def check_rows(rows: Iterable[Row], panels: Mapping[str, DrawnPanel]) -> None:
    """InputError for a row whose values cannot stand on the axes of its panel (find runs: accuracy over density)."""
    for row in rows:
        panel = panels.get(row.panel, DrawnPanel(""))
        x, y = X_AXES[panel.x], Y_AXES[panel.y]
        if not x.low <= row.x <= x.high or (row.y is not None and not y.low <= row.y <= y.high):
            point = f"panel {row.panel}, series {row.series}, seed {row.seed}, round {row.round}"
            raise InputError(
                f"results hold x {row.x!r}, y {row.y!r} ({point}), which are no {panel.x} and {panel.y}; "
                "run the figure again to write new ones"
            )


def shown_x(panel: DrawnPanel, values: Sequence[float]) -> tuple[float, str]:
    """The factor and the label that suit the values on a panel's x axis: parameters in millions, FLOPs in GFLOPs."""
    axis = X_AXES[panel.x]
    if panel.x in ("parameters", "flops"):
        for size, prefix, word in _MAGNITUDES:
            if max(values, default=0.0) >= size:
                unit = word if panel.x == "parameters" else f"{prefix}FLOPs an image"
                return 1 / size, f"Parameters ({unit})" if panel.x == "parameters" else unit
    return axis.factor, axis.label
