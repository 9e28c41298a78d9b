"""Curves of accuracy over the fraction of weights remaining, as figure.png and figure.pdf.

Drawn from rows alone and without dates, so the same rows give the same bytes with one version of matplotlib, which is
imported only when something is drawn. Nothing of matplotlib's global state is set.
"""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.figures.results import CurvePoint, Row, check_curves, curve, series_of, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM = "random"
# Colours that the colour-blind tell apart, of different lightness; with markers and dashes also readable in grey.
# Red is kept for the random baseline. Lists of different length: many series still differ in one of them.
_COLORS = ("#0b4f8a", "#e69f00", "#009e8e", "#b35fa8", "#56b4e9", "#5a5a5a")
_MARKERS = {"o": 4.0, "s": 3.7, "^": 4.8, "v": 4.8, "p": 4.6, "h": 4.4, "<": 4.8}  # sizes that look alike
_DASHES = ("-", (0, (6, 1.5)), (0, (2.2, 1.1)), (0, (6, 1.3, 1.3, 1.3)), (0, (1, 1)))
_RANDOM_STYLE = {"color": "#d4201f", "marker": "D", "markersize": 3.6, "linestyle": (0, (4, 1.2, 1, 1.2, 1, 1.2))}
_MARKED = 12  # markers on a line, about: more would hide its dashes
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
    "legend.title_fontsize": 8,
    "lines.linewidth": 1.3,
    "pdf.fonttype": 42,
}
# Inches.
_WIDTH = {1: 4.6, 2: 7.0, 3: 9.4}  # by columns
_PANEL_HEIGHT = 2.45
_LEFT, _RIGHT, _BOTTOM, _ROW_GAP, _COLUMN_GAP = 0.62, 0.14, 0.60, 0.66, 0.22
_TITLE_LINE, _LEGEND_LINE, _NOTE_LINE = 0.18, 0.19, 0.115
_HANDLE = 0.60  # of a legend's entry, with the gaps about it
# Characters an inch holds, with something to spare.
_TITLE_CHARACTERS, _LEGEND_CHARACTERS, _NOTE_CHARACTERS = 12, 16, 19.5


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
        if not self.panels:
            raise ValueError("a figure without panels")
        if self.chance is not None and not 0 < self.chance < 1:
            raise ValueError(f"chance {self.chance!r} is not a fraction between 0 and 1")


def density_curves(rows: Sequence[Row], drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Draw mean and sample standard deviation over seeds; write figure.png and figure.pdf and return their paths.

    Every round is a point of its line; with many rounds only some carry a marker.

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

    present = series_of(rows, drawing.panels)
    names = [*drawing.series, *(name for name in present if name not in drawing.series)]
    curves = {panel: {name: curve(rows, panel, name, drawing.chance) for name in present} for panel in drawing.panels}
    points = [point for by_name in curves.values() for series in by_name.values() for point in series]
    diverged = any(point.diverged for point in points)

    count = len(drawing.panels)
    columns = count if count < 4 else 2 if count == 4 else 3
    lines = math.ceil(count / columns)
    width = _WIDTH[columns]
    title = textwrap.wrap(drawing.title, int(_TITLE_CHARACTERS * width))
    handles = _legend(names, present, drawing, diverged)
    # The legend's title stands before its entries, or above them where they take several lines.
    per_line = _per_line(handles, width)
    above = per_line < len(handles) and bool(drawing.legend_title)
    if above:
        handles = handles[1:]
        per_line = _per_line(handles, width)
    legend_lines = math.ceil(len(handles) / per_line) + above
    note = textwrap.wrap(_note(rows, drawing, diverged), int(_NOTE_CHARACTERS * (width - _LEFT)))
    above_legend = 0.10 + _TITLE_LINE * len(title)
    top = above_legend + _LEGEND_LINE * legend_lines + 0.34
    bottom = _BOTTOM + _NOTE_LINE * len(note)
    height = top + lines * _PANEL_HEIGHT + (lines - 1) * _ROW_GAP + bottom
    panel_width = (width - _LEFT - _RIGHT - (columns - 1) * _COLUMN_GAP) / columns

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        lines,
        columns,
        sharey=True,
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - _RIGHT / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": _COLUMN_GAP / panel_width,
            "hspace": _ROW_GAP / _PANEL_HEIGHT,
        },
    )
    floor, ceiling = _accuracy_limits(points, drawing.chance)
    for index, (panel, panel_title) in enumerate(drawing.panels.items()):
        ax = axes.flat[index]
        _draw_panel(ax, curves[panel], names, drawing.chance, floor)
        if count > 1:
            letter = panel if len(panel) == 1 else chr(ord("a") + index)
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=10)
        ax.set_title(_pretty(panel_title))
        if index + columns >= count:
            ax.set_xlabel("Weights remaining (fraction, log scale)")
        if index % columns == 0:
            ax.set_ylabel("Top-1 accuracy (%)")
    for ax in axes.flat[count:]:
        ax.remove()
    # A shared axis: set once, it is set in every panel.
    axes[0, 0].set_ylim(floor, ceiling)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(0, ceiling)
    axes[0, 0].set_yticks([tick for tick in ticks if 0 <= tick <= min(ceiling, 100)])

    figure.suptitle(_pretty("\n".join(title)), y=1 - 0.10 / height, va="top", fontsize=10)
    if handles:
        figure.legend(
            # Columns are filled first: reordered, the entries read line by line.
            handles=[handle for column in range(per_line) for handle in handles[column::per_line]],
            loc="upper center",
            bbox_to_anchor=(0.5, 1 - above_legend / height),
            ncols=per_line,
            title=_pretty(drawing.legend_title) if above else None,
            frameon=False,
            handlelength=3.2,
            columnspacing=1.5,
            handletextpad=0.6,
        )
    figure.text(_LEFT / width, 0.08 / height, "\n".join(note), fontsize=6.5, color="0.4", va="bottom", parse_math=False)
    return figure


def _draw_panel(
    ax: "Axes", curves: Mapping[str, list[CurvePoint]], names: Sequence[str], chance: float | None, floor: float
) -> None:
    for order, name in enumerate(names):
        if name in curves:
            # Each series marks its diverged runs at its own height: several often diverge at the same density.
            level = floor * (order + 1) / (len(names) + 1)
            _draw_series(ax, curves[name], style_of(name, names), order, level)
    shown = [point for series in curves.values() for point in series]
    _density_axis(ax, [point.x for point in shown])
    if chance is not None:
        _draw_chance(ax, chance, shown)
    if not shown:
        ax.text(0.5, 0.75, "no results", transform=ax.transAxes, ha="center", color="0.5")


def _draw_series(ax: "Axes", points: list[CurvePoint], style: dict[str, Any], order: int, level: float) -> None:
    """Mean, band and, at height `level`, a cross for each round with a diverged run."""
    known = [(point.x, 100 * point.mean, point.std) for point in points if point.mean is not None]
    x, mean = [density for density, _, _ in known], [percent for _, percent, _ in known]
    # NaN is a gap in the band: a single run has no deviation.
    spread = [math.nan if std is None else 100 * std for _, _, std in known]
    lower = [value - std for value, std in zip(mean, spread, strict=True)]
    upper = [value + std for value, std in zip(mean, spread, strict=True)]
    ax.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0, zorder=2 + 0.01 * order)
    every = max(1, round(len(x) / _MARKED))
    # Where two lines coincide, markers at different rounds show both.
    marked = (order % every, every)
    ax.plot(x, mean, zorder=3 + 0.01 * order, markevery=marked, markeredgecolor="white", markeredgewidth=0.4, **style)
    gone = [point.x for point in points if point.diverged]
    ax.plot(gone, [level] * len(gone), linestyle="none", marker="x", markersize=3.6, color=style["color"], zorder=4)


def _draw_chance(ax: "Axes", chance: float, points: list[CurvePoint]) -> None:
    """Dotted line, with its label at the end where the curves are farther away."""
    ax.axhline(100 * chance, color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    middle = math.sqrt(min((point.x for point in points), default=1.0))
    distance = {"left": math.inf, "right": math.inf}
    for point in points:
        if point.mean is not None:
            side = "left" if point.x >= middle else "right"
            distance[side] = min(distance[side], abs(point.mean - chance))
    side = "left" if distance["left"] >= distance["right"] else "right"
    ax.annotate(
        "chance",
        (0.01 if side == "left" else 0.99, 100 * chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 1.5),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=6.5,
        color="0.35",
    )


def _density_axis(ax: "Axes", densities: list[float]) -> None:
    """Log axis from 1 down to the sparsest density, with ticks that suit how far that is."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    low = min(densities, default=1.0)
    ticks = _ticks(sorted({1.0, *densities}, reverse=True))
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


def _accuracy_limits(points: list[CurvePoint], chance: float | None) -> tuple[float, float]:
    tops = [100 * (point.mean + (point.std or 0.0)) for point in points if point.mean is not None]
    top = max([*tops, 100 * (chance or 0.0), 1.0])
    diverged = any(point.diverged for point in points)
    return (-0.12 if diverged else -0.03) * top, 1.05 * top


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and dashes of the series `name` of all `names`."""
    if name == RANDOM:
        return _RANDOM_STYLE
    index = [other for other in names if other != RANDOM].index(name)
    marker, size = list(_MARKERS.items())[index % len(_MARKERS)]
    color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
    return {"color": color, "marker": marker, "markersize": size, "linestyle": dashes}


def _legend(names: list[str], present: list[str], drawing: Drawing, diverged: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    if drawing.legend_title and present:
        handles.append(Line2D([], [], linestyle="none", label=_pretty(drawing.legend_title)))
    for name in names:
        if name in present:
            label = _pretty(drawing.series.get(name, name))
            handles.append(Line2D([], [], label=label, markeredgecolor="white", **style_of(name, names)))
    if diverged:
        handles.append(Line2D([], [], linestyle="none", marker="x", markersize=3.6, color="0.2", label="diverged"))
    return handles


def _per_line(handles: Sequence[Any], width: float) -> int:
    """How many entries of the legend stand side by side in `width` inches; at least one."""
    labels = [re.sub(r"\\mathrm|[\\${}_]", "", handle.get_label()) for handle in handles]
    for count in range(len(labels), 1, -1):
        longest = (max(map(len, labels[column::count])) for column in range(count))
        if sum(_HANDLE + length / _LEGEND_CHARACTERS for length in longest) <= width:
            return count
    return 1


def _note(rows: Sequence[Row], drawing: Drawing, diverged: bool) -> str:
    seeds = len({row.seed for row in rows if row.panel in drawing.panels})
    parts = ["One seed."] if seeds == 1 else []
    if seeds > 1:
        parts.append(f"Mean of {seeds} seeds; shaded: one standard deviation.")
    if diverged:
        parts.append("A diverged run " + ("is left out." if drawing.chance is None else "counts as chance."))
    return " ".join([*parts, drawing.note]).strip()


def _pretty(text: str) -> str:
    """LR_find and LR_eval as the paper sets them; any other dollar sign is a dollar sign."""
    return re.sub(r"LR_(find|eval)\b", r"$\\mathrm{LR}_{\\mathrm{\1}}$", text.replace("$", r"\$"))
