"""The pictures of a figure: figure.png and figure.pdf.

Drawn from rows alone and without dates, so the same rows give the same bytes with one version of matplotlib, which is
imported only when something is drawn. Nothing of matplotlib's global state is set.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.figures.axes import Y_AXES, Drawing, check_rows
from fastprune.figures.panels import draw_panel, limits
from fastprune.figures.results import CurvePoint, Row, curve, depth_key, series_of, write_atomic
from fastprune.figures.style import RC, arranged, layer_color, legend, pretty

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches.
_WIDTH = {1: 4.9, 2: 7.0, 3: 9.4}  # by columns
_PANEL_HEIGHT = 2.45
_LEFT, _RIGHT, _BOTTOM, _ROW_GAP, _COLUMN_GAP = 0.62, 0.14, 0.60, 0.66, 0.22
_TITLE_LINE, _LEGEND_LINE, _NOTE_LINE = 0.18, 0.19, 0.115
# Characters an inch holds, with something to spare.
_TITLE_CHARACTERS, _NOTE_CHARACTERS = 12, 19.5
_BAR = 2.6  # inches for the colour bar of a network's layers, with its label


def draw(rows: Sequence[Row], drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Draw mean and sample standard deviation over seeds; write figure.png and figure.pdf and return their paths.

    Every round is a point of its line; with many rounds only some carry a marker. A diverged run counts as chance
    accuracy (without `chance`: not at all) and shows as a cross below the axis, a layer that is pruned whole as a
    circle. Raises InputError for rows that do not fit their panel's axes, and when `folder` cannot be written.
    """
    from matplotlib import style

    check_rows(rows, drawing.panels)
    png, pdf = folder / "figure.png", folder / "figure.pdf"
    with style.context(["default", RC]):
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

    present = series_of(rows, drawing.panels)
    if drawing.layers:
        present.sort(key=depth_key)
    names = [*drawing.series, *(name for name in present if name not in drawing.series)]
    curves = {panel: _curves(rows, panel, present, drawing.chance) for panel in drawing.panels}
    points = [point for by_name in curves.values() for series in by_name.values() for point in series]
    diverged, dead = any(point.diverged for point in points), any(point.dead for point in points)

    count = len(drawing.panels)
    columns = count if count < 4 else 2 if count == 4 else 3
    lines = math.ceil(count / columns)
    width = _WIDTH[columns]
    title = textwrap.wrap(drawing.title, int(_TITLE_CHARACTERS * width))
    room = width - (_BAR if drawing.layers else 0.0)
    entries = arranged(legend(present, curves.values(), drawing, diverged=diverged, dead=dead), room)
    legend_lines = len(entries) + bool(drawing.legend_title and entries)
    note = textwrap.wrap(_note(rows, drawing, diverged), int(_NOTE_CHARACTERS * (width - _LEFT)))
    above_legend = 0.10 + _TITLE_LINE * len(title)
    headed = count > 1 or any(panel.title for panel in drawing.panels.values())
    top = above_legend + _LEGEND_LINE * legend_lines + (0.34 if headed else 0.14)
    bottom = _BOTTOM + _NOTE_LINE * len(note)
    height = top + lines * _PANEL_HEIGHT + (lines - 1) * _ROW_GAP + bottom
    gap = _COLUMN_GAP if len({panel.y for panel in drawing.panels.values()}) == 1 else _LEFT
    panel_width = (width - _LEFT - _RIGHT - (columns - 1) * gap) / columns

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        lines,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - _RIGHT / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": gap / panel_width,
            "hspace": _ROW_GAP / _PANEL_HEIGHT,
        },
    )
    _draw_panels(axes, curves, names, drawing, columns)
    figure.suptitle(pretty("\n".join(title)), y=1 - 0.10 / height, va="top", fontsize=10)
    if entries:
        figure.legend(
            # Columns are filled first, so all are equally long.
            handles=[handle or _blank() for column in zip_longest(*entries) for handle in column],
            loc="upper center",
            bbox_to_anchor=(0.5 * room / width, 1 - above_legend / height),
            ncols=max(map(len, entries)),
            title=pretty(drawing.legend_title) or None,
            frameon=False,
            handlelength=3.2,
            columnspacing=1.5,
            handletextpad=0.6,
        )
    if drawing.layers and present:
        _draw_bar(figure, 1 - (_BAR - 0.1) / width, 1 - (above_legend + 0.20) / height, 1.1 / width, 0.07 / height)
    figure.text(_LEFT / width, 0.08 / height, "\n".join(note), fontsize=6.5, color="0.4", va="bottom", parse_math=False)
    return figure


def _curves(rows: Sequence[Row], panel: str, names: Sequence[str], chance: float | None) -> dict[str, list[CurvePoint]]:
    there = series_of(rows, [panel])
    return {name: curve(rows, panel, name, chance) for name in names if name in there}


def _draw_panels(
    axes: Any,
    curves: Mapping[str, Mapping[str, list[CurvePoint]]],
    names: Sequence[str],
    drawing: Drawing,
    columns: int,
) -> None:
    from matplotlib.ticker import MaxNLocator

    count = len(drawing.panels)
    alike = len({panel.x for panel in drawing.panels.values()}) == 1
    ends = {panel.y: _limits(curves, panel.y, drawing) for panel in drawing.panels.values()}
    beside = ""
    for index, (letter, panel) in enumerate(drawing.panels.items()):
        ax = axes.flat[index]
        floor, ceiling = ends[panel.y]
        label = draw_panel(ax, panel, curves[letter], names, drawing, floor)
        if count > 1:
            short = letter if len(letter) == 1 else chr(ord("a") + index)
            ax.set_title(short, loc="left", fontweight="bold", fontsize=10)
        ax.set_title(pretty(panel.title))
        if index + columns >= count or not alike:
            ax.set_xlabel(label)
        ax.set_ylim(floor, ceiling)
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(0, ceiling)
        ax.set_yticks([tick for tick in ticks if 0 <= tick <= min(ceiling, 100)])
        # What the panel to the left says need not be said again.
        if index % columns == 0 or panel.y != beside:
            ax.set_ylabel(Y_AXES[panel.y].label)
        else:
            ax.tick_params(labelleft=False)
        beside = panel.y
    for ax in axes.flat[count:]:
        ax.remove()


def _limits(curves: Mapping[str, Mapping[str, list[CurvePoint]]], y: str, drawing: Drawing) -> tuple[float, float]:
    """Ends of the y axis that all panels over `y` have."""
    shown = [curves[letter] for letter, panel in drawing.panels.items() if panel.y == y]
    points = [point for series in shown for curve in series.values() for point in curve]
    lines = 2 if drawing.layers else max(map(len, shown))
    return limits(points, y, lines, drawing.chance if y == "accuracy" else None)


def _blank() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=" ")


def _draw_bar(figure: "Figure", left: float, bottom: float, width: float, height: float) -> None:
    """The colours of a network's layers."""
    ax = figure.add_axes((left, bottom, width, height))
    steps = 64
    for step in range(steps):
        ax.axvspan(step / steps, (step + 1) / steps, color=layer_color(step, steps), linewidth=0)
    ax.set_xlim(0, 1)
    ax.set_axis_off()
    for place, text, side in ((-0.04, "second", "right"), (1.04, "last layer", "left")):
        ax.text(place, 0.5, text, transform=ax.transAxes, ha=side, va="center", fontsize=8)


def _note(rows: Sequence[Row], drawing: Drawing, diverged: bool) -> str:
    seeds = len({row.seed for row in rows if row.panel in drawing.panels})
    parts = ["One seed."] if seeds == 1 else []
    if seeds > 1:
        of = " of the first layer" if drawing.layers else ""
        how = "shaded, over latency barred" if any(p.x == "latency" for p in drawing.panels.values()) else "shaded"
        parts.append(f"Mean of {seeds} seeds; {how}: one standard deviation{of}.")
    if diverged:
        parts.append("A diverged run " + ("is left out." if drawing.chance is None else "counts as chance."))
    return " ".join([*parts, drawing.note]).strip()
