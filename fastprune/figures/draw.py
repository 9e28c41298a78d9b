"""Curves of accuracy over the fraction of weights remaining, as figure.png and figure.pdf.

Drawn from rows alone and without dates, so the same rows give the same bytes with one version of matplotlib, which is
imported only when something is drawn. Nothing of matplotlib's global state is set.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.figures.results import Point, Row, check_curves, curve, series_of, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM = "random"
# Colours that the colour-blind tell apart, of different lightness; with markers and dashes also readable in grey.
# Red is kept for the random baseline.
_STYLES = (
    ("#0b4f8a", "o", "-"),
    ("#e69f00", "s", (0, (5, 1.5))),
    ("#009e8e", "^", (0, (3, 1.2, 1, 1.2))),
    ("#b35fa8", "v", (0, (1.5, 1))),
    ("#56b4e9", "P", (0, (8, 2))),
    ("#5a5a5a", "X", (0, (6, 1.2, 1, 1.2, 1, 1.2))),
)
_RANDOM_STYLE = ("#d4201f", "D", (0, (2.5, 1.5)))
_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "xtick.minor.size": 1.8,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.6,
    "pdf.fonttype": 42,
}
# Inches.
_WIDTH = {1: 4.4, 2: 7.0, 3: 9.4, 4: 7.0}
_PANEL_HEIGHT = 2.45
_LEFT, _RIGHT, _BOTTOM, _ROW_GAP, _COLUMN_GAP = 0.62, 0.14, 0.78, 0.72, 0.22


@dataclass(frozen=True)
class Drawing:
    """How the rows of a figure are shown. `LR_find` and `LR_eval` in any text are set as in the paper.

    `panels`: id -> title, in reading order; panels that are not named are not drawn. `series`: id -> label, in order; a
    series keeps its colour when others are missing, and one that is not named follows under its own name. `chance`: the
    accuracy of guessing, a fraction. `note`: a line below the figure.
    """

    title: str
    panels: Mapping[str, str]
    series: Mapping[str, str] = field(default_factory=dict)
    legend_title: str = ""
    chance: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.panels) <= 4:
            raise ValueError(f"{len(self.panels)} panels: a figure has 1 to 4")
        if self.chance is not None and not 0 < self.chance < 1:
            raise ValueError(f"chance {self.chance!r} is not a fraction between 0 and 1")


def density_curves(rows: Sequence[Row], drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Draw mean and sample standard deviation over seeds; write figure.png and figure.pdf and return their paths.

    A diverged run counts as chance accuracy (without `chance`: not at all) and shows as a cross below the axis.
    Raises InputError for rows that are no accuracies over densities, and when `folder` cannot be written.
    """
    from matplotlib import style

    check_curves(rows)
    png, pdf = folder / "figure.png", folder / "figure.pdf"
    with style.context(["default", _RC]):
        figure = _figure(rows, drawing)
        write_atomic(png, _render(figure, "png", dpi=220, metadata={"Software": None}))
        # None leaves the field out: a date would make two drawings of the same rows differ.
        write_atomic(pdf, _render(figure, "pdf", metadata={"CreationDate": None, "Title": drawing.title}))
    return png, pdf


def _render(figure: "Figure", kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _figure(rows: Sequence[Row], drawing: Drawing) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(drawing.series)
    present = series_of(rows, drawing.panels)
    names += [name for name in present if name not in names]
    curves = {
        panel: {name: curve(rows, panel, name, drawing.chance) for name in present if name} for panel in drawing.panels
    }
    points = [point for by_name in curves.values() for series in by_name.values() for point in series]
    count = len(drawing.panels)
    columns = count if count < 4 else 2
    lines = math.ceil(count / columns)

    handles = _legend(names, present, drawing, any(point.diverged for point in points))
    per_line = max(1, min(len(handles), int(_WIDTH[count] / 1.1)))
    top = 0.62 + 0.19 * math.ceil(len(handles) / per_line)
    width = _WIDTH[count]
    height = top + lines * _PANEL_HEIGHT + (lines - 1) * _ROW_GAP + _BOTTOM
    figure = Figure(figsize=(width, height))
    panel_width = (width - _LEFT - _RIGHT - (columns - 1) * _COLUMN_GAP) / columns
    axes = figure.subplots(
        lines,
        columns,
        sharey=True,
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - _RIGHT / width,
            "bottom": _BOTTOM / height,
            "top": 1 - top / height,
            "wspace": _COLUMN_GAP / panel_width,
            "hspace": _ROW_GAP / _PANEL_HEIGHT,
        },
    )
    bottom, ceiling = _accuracy_limits(points, drawing.chance)
    for index, (panel, title) in enumerate(drawing.panels.items()):
        ax = axes.flat[index]
        for order, name in enumerate(names):
            if name in curves[panel]:
                _draw_series(ax, curves[panel][name], _style(name, names), order, len(names), bottom)
        _density_axis(ax, [point.x for series in curves[panel].values() for point in series] or [1.0])
        if drawing.chance is not None:
            _draw_chance(ax, 100 * drawing.chance)
        letter = panel if len(panel) == 1 else "abcd"[index]
        if count > 1:
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=10)
        ax.set_title(_pretty(title))
        if not curves[panel] or not any(curves[panel].values()):
            ax.text(0.5, 0.5, "no results", transform=ax.transAxes, ha="center", color="0.5")
        if index // columns == lines - 1:
            ax.set_xlabel("Weights remaining (fraction, log scale)")
        if index % columns == 0:
            ax.set_ylabel("Top-1 accuracy (%)")
    axes[0, 0].set_ylim(bottom, ceiling)
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ticks = [tick for tick in axes[0, 0].get_yticks() if 0 <= tick <= min(ceiling, 100)]
    axes[0, 0].set_yticks(ticks)

    figure.suptitle(_pretty(drawing.title), x=0.5, y=1 - 0.10 / height, va="top", fontsize=10)
    if handles:
        figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 1 - 0.28 / height),
            ncols=per_line,
            frameon=False,
            handlelength=2.6,
            columnspacing=1.5,
            handletextpad=0.5,
        )
    _footer(figure, rows, drawing, height, width)
    return figure


def _draw_series(
    ax: "Axes", points: list[Point], style: dict[str, Any], order: int, series: int, bottom: float
) -> None:
    known = [point for point in points if point.mean is not None]
    x = [point.x for point in known]
    y = [100 * point.mean for point in known if point.mean is not None]
    spread = [math.nan if point.std is None else 100 * point.std for point in known]
    ax.fill_between(
        x,
        [mean - std for mean, std in zip(y, spread, strict=True)],
        [mean + std for mean, std in zip(y, spread, strict=True)],
        where=[math.isfinite(std) for std in spread],
        color=style["color"],
        alpha=0.18,
        linewidth=0,
        zorder=2 + 0.01 * order,
    )
    ax.plot(x, y, zorder=3 + 0.01 * order, markeredgecolor="white", markeredgewidth=0.4, **style)
    gone = [point.x for point in points if point.diverged]
    # A row of its own for each series: several often diverge at the same density.
    level = bottom * (order + 1) / (series + 1)
    ax.plot(gone, [level] * len(gone), linestyle="none", marker="x", markersize=3.6, color=style["color"], zorder=4)


def _draw_chance(ax: "Axes", chance: float) -> None:
    ax.axhline(chance, color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    ax.annotate(
        "chance",
        (0.995, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 1.5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=6.5,
        color="0.35",
        zorder=1,
    )


def _density_axis(ax: "Axes", densities: list[float]) -> None:
    """Log axis from 1 down to the sparsest density, with ticks that suit how far that is."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    low = min(densities)
    ticks = _ticks(sorted(set(densities), reverse=True))
    end = min(low, ticks[-1])
    pad = (1 / end) ** 0.03 if end < 1 else 1.2
    ax.set_xscale("log")
    ax.set_xlim(pad, end / pad)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.set_xticks(ticks, labels=[f"{tick:.2g}" if tick < 1 else "1" for tick in ticks])
    decades = range(math.floor(math.log10(end)) - 1, 0)
    minor = [digit * 10.0**power for power in decades for digit in range(1, 10)]
    few = end > 0.1
    ax.xaxis.set_minor_locator(FixedLocator([] if few else [tick for tick in minor if tick >= end]))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _ticks(densities: list[float]) -> list[float]:
    """Tick positions for densities in falling order: 1, 0.3, 0.1, ... or, over less than a decade, the rounds."""
    low = densities[-1]
    if low > 0.1:
        ticks = [1.0]
        for density in densities:
            # Labels closer than this overlap in the narrowest panel.
            if ticks[-1] / density > (1 / low) ** 0.13:
                ticks.append(density)
        return ticks
    ticks, power = [1.0], 1
    while ticks[-1] > low * 1.3:
        ticks += [tick for tick in (3 * 10.0**-power, 10.0**-power) if tick > low / 1.3]
        power += 1
        if power > 12:
            break
    return ticks


def _accuracy_limits(points: list[Point], chance: float | None) -> tuple[float, float]:
    tops = [100 * (point.mean + (point.std or 0.0)) for point in points if point.mean is not None]
    top = max([*tops, 100 * (chance or 0.0), 1.0])
    diverged = any(point.diverged for point in points)
    return (-0.12 if diverged else -0.03) * top, 1.05 * top


def _style(name: str, names: list[str]) -> dict[str, Any]:
    if name == RANDOM:
        color, marker, dashes = _RANDOM_STYLE
    else:
        others = [other for other in names if other != RANDOM]
        color, marker, dashes = _STYLES[others.index(name) % len(_STYLES)]
    return {"color": color, "marker": marker, "linestyle": dashes}


def _legend(names: list[str], present: list[str], drawing: Drawing, diverged: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    if drawing.legend_title and present:
        handles.append(Line2D([], [], linestyle="none", label=_pretty(drawing.legend_title)))
    for name in names:
        if name in present:
            label = _pretty(drawing.series.get(name, name))
            handles.append(Line2D([], [], label=label, markeredgecolor="white", **_style(name, names)))
    if diverged:
        handles.append(Line2D([], [], linestyle="none", marker="x", color="0.2", label="diverged"))
    return handles


def _footer(figure: "Figure", rows: Sequence[Row], drawing: Drawing, height: float, width: float) -> None:
    seeds = len({row.seed for row in rows if row.panel in drawing.panels})
    if seeds > 1:
        shown = f"Mean of {seeds} seeds; shaded: one standard deviation."
    else:
        shown = "One seed." if seeds else ""
    text = " ".join(part for part in (shown, drawing.note) if part)
    figure.text(_LEFT / width, 0.10 / height, text, fontsize=6.5, color="0.4", ha="left", va="bottom", parse_math=False)


def _pretty(text: str) -> str:
    """LR_find and LR_eval as the paper sets them; any other dollar sign is a dollar sign."""
    return re.sub(r"LR_(find|eval)\b", r"$\\mathrm{LR}_{\\mathrm{\1}}$", text.replace("$", r"\$"))
