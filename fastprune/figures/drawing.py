"""figure.png and figure.pdf, drawn from the rows of a figure.

The same rows give the same bytes with the same version of matplotlib. Its global state is left unchanged.
"""

# Only the functions that draw import matplotlib: `--plan` imports this module, too, and must start at once.

import io
import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.figures.axes import X_AXES, Y_AXES, Drawing, DrawnPanel, check_rows, shown_x
from fastprune.figures.results import CurvePoint, Row, curve, depth_key, series_of, write_output
from fastprune.figures.style import (
    BAND,
    BARS,
    FIRST_LAYER,
    GREY,
    LETTER,
    MARKED,
    MARKER_EDGE,
    MARKS,
    OTHER_LAYERS,
    RC,
    REFERENCE,
    SMALL,
    STRIP,
    layer_color,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths are in inches. A figure grows with its title, legend and note, so that panels have one size in all figures.
_WIDTH = {1: 4.9, 2: 7.0, 3: 9.4}  # of a figure, by its columns of panels

_PANEL_HEIGHT = 2.45

_LEFT, _RIGHT, _BOTTOM, _ROW_GAP, _COLUMN_GAP = 0.62, 0.14, 0.60, 0.66, 0.22

_CHANCE = 0.30  # to the right of the panels, for the word

_STRIP_GAP, _STRIP_LINE = 0.07, 0.076  # between a panel and its strip of marks, and for each of its lines

_TITLE_LINE, _LEGEND_LINE, _NOTE_LINE = 0.18, 0.19, 0.115

# Characters that fit into an inch, estimated on the safe side: matplotlib does not wrap text by itself.
_TITLE_CHARACTERS, _NOTE_CHARACTERS = 12, 19.5

_BAR = 2.6  # inches for the colour bar of a network's layers, with its label


Curves = Mapping[str, list[CurvePoint]]
"""Of one panel, by series."""


def draw(rows: Sequence[Row], drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Draws mean and sample standard deviation over seeds; writes figure.png and figure.pdf and returns their paths.

    Every round is a point of its line; of many rounds only some have a marker. A diverged run counts as chance
    accuracy (is left out where `drawing.chance` is None). A strip below the panel has a cross for each round with a
    diverged run, and a circle for each with a run in which a layer is pruned whole; a figure without such runs has
    none. InputError for rows out of the bounds of their panel's axes, and where `folder` cannot be written.
    """
    from matplotlib import style

    check_rows(rows, drawing.panels)
    png, pdf = folder / "figure.png", folder / "figure.pdf"
    # "default" first: a user's matplotlibrc must not change the picture.
    with style.context(["default", RC]):
        figure = _figure(rows, drawing)
        write_output(png, _render(figure, "png", metadata={"Software": None}))
        # None omits the field: a date would make two drawings of the same rows differ.
        write_output(pdf, _render(figure, "pdf", metadata={"CreationDate": None, "Title": drawing.title}))
    return png, pdf


def figure_svg(rows: Sequence[Row], drawing: Drawing) -> str:
    """The same drawing as an SVG document, whose text stays text. Raises as `draw`."""
    from matplotlib import style

    check_rows(rows, drawing.panels)
    # Names of its parts are hashes with a salt, which is random by default: equal rows must give equal bytes.
    with style.context(["default", RC, {"svg.fonttype": "none", "svg.hashsalt": drawing.title}]):
        return _render(_figure(rows, drawing), "svg", transparent=True, metadata={"Date": None}).decode()


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
    points = _points(curves)
    diverged, dead = any(point.diverged for point in points), any(point.dead for point in points)

    count = len(drawing.panels)
    # Four panels stand as two by two, as A1 does in the paper.
    columns = count if count < 4 else 2 if count == 4 else 3
    lines = math.ceil(count / columns)
    width = _WIDTH[columns]
    title = textwrap.wrap(drawing.title, int(_TITLE_CHARACTERS * width))
    room = width - (_BAR if drawing.layers else 0.0)
    entries = arranged(legend(present, curves.values(), drawing, diverged=diverged, dead=dead), room)
    legend_lines = len(entries) + bool(drawing.legend_title and entries)
    ends = {panel.y: _limits(curves, panel.y, drawing) for panel in drawing.panels.values()}
    note = textwrap.wrap(_note(rows, drawing, curves, ends, diverged), int(_NOTE_CHARACTERS * (width - _LEFT)))
    above_legend = 0.10 + _TITLE_LINE * len(title)
    headed = count > 1 or any(panel.title for panel in drawing.panels.values())
    top = above_legend + _LEGEND_LINE * legend_lines + (0.34 if headed else 0.14)
    # Panels of one size, with strips of one height below them.
    marks = _marked(curves, names, drawing)
    strip = _STRIP_GAP + _strip_height(marks) if marks else 0.0
    row_gap = _ROW_GAP + strip
    bottom = _BOTTOM + strip + _NOTE_LINE * len(note)
    height = top + lines * _PANEL_HEIGHT + (lines - 1) * row_gap + bottom
    right = _RIGHT if drawing.chance is None else _CHANCE + 0.12
    # Panels that share the y axis label it once; others need room for labels of their own.
    gap = _COLUMN_GAP if len({panel.y for panel in drawing.panels.values()}) == 1 else _LEFT
    panel_width = (width - _LEFT - right - (columns - 1) * gap) / columns

    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        lines,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - right / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": gap / panel_width,
            "hspace": row_gap / _PANEL_HEIGHT,
        },
    )
    _draw_panels(axes, curves, names, drawing, columns, ends, marks)
    figure.suptitle(pretty("\n".join(title)), y=1 - 0.10 / height, va="top")
    if entries:
        figure.legend(
            # matplotlib fills a legend column by column; blanks keep each line of ours in one row.
            handles=[handle or _blank() for column in zip_longest(*entries) for handle in column],
            loc="upper center",
            bbox_to_anchor=(0.5 * room / width, 1 - above_legend / height),
            ncols=max(map(len, entries)),
            title=pretty(drawing.legend_title) or None,
            handlelength=3.2,
            columnspacing=1.5,
            handletextpad=0.6,
        )
    if drawing.layers and present:
        _draw_bar(figure, 1 - (_BAR - 0.1) / width, 1 - (above_legend + 0.20) / height, 1.1 / width, 0.07 / height)
    look: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "parse_math": False}
    figure.text(_LEFT / width, 0.08 / height, "\n".join(note), va="bottom", **look)
    return figure


def _curves(rows: Sequence[Row], panel: str, names: Sequence[str], chance: float | None) -> dict[str, list[CurvePoint]]:
    there = series_of(rows, [panel])
    return {name: curve(rows, panel, name, chance) for name in names if name in there}


def _points(curves: Mapping[str, Curves]) -> list[CurvePoint]:
    return [point for by_name in curves.values() for series in by_name.values() for point in series]


def _draw_panels(
    axes: Any,
    curves: Mapping[str, Curves],
    names: Sequence[str],
    drawing: Drawing,
    columns: int,
    ends: Mapping[str, tuple[float, float]],
    marks: Sequence[str],
) -> None:
    """ends: of the y axes, by quantity. marks: the lines of the strip below each panel."""
    from matplotlib.ticker import MaxNLocator

    count = len(drawing.panels)
    alike = len({panel.x for panel in drawing.panels.values()}) == 1
    beside = ""
    for index, (letter, panel) in enumerate(drawing.panels.items()):
        ax = axes.flat[index]
        floor, ceiling = ends[panel.y]
        label = draw_panel(ax, panel, curves[letter], names, drawing)
        if marks:
            _draw_strip(ax, panel, curves[letter], names, drawing.layers, marks)
        if drawing.chance is not None and panel.y == "accuracy":
            _draw_chance(ax, drawing.chance, named=index % columns == columns - 1 or index == count - 1)
        if count > 1:
            short = letter if len(letter) == 1 else chr(ord("a") + index)
            ax.set_title(short, **LETTER)
        ax.set_title(pretty(panel.title))
        if index + columns >= count or not alike:
            ax.set_xlabel(label)
        ax.set_ylim(floor, ceiling)
        ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(0, ceiling)
        ax.set_yticks([tick for tick in ticks if 0 <= tick <= min(ceiling, 100)])
        # A panel whose left neighbour has the same y axis repeats neither label nor numbers.
        if index % columns == 0 or panel.y != beside:
            ax.set_ylabel(Y_AXES[panel.y].label)
        else:
            ax.tick_params(labelleft=False)
        beside = panel.y
    for ax in axes.flat[count:]:
        ax.remove()


def _limits(curves: Mapping[str, Curves], y: str, drawing: Drawing) -> tuple[float, float]:
    """Ends of the y axis, the same for all panels of the figure that show `y`, so that they can be compared by eye."""
    points = _points({letter: curves[letter] for letter, panel in drawing.panels.items() if panel.y == y})
    return limits(points, y, drawing.chance if y == "accuracy" else None)


def _blank() -> Any:
    """An invisible entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=" ")


def _draw_bar(figure: "Figure", left: float, bottom: float, width: float, height: float) -> None:
    """The colour bar of a network's layers, from the second to the last."""
    ax = figure.add_axes((left, bottom, width, height))
    steps = 64
    for step in range(steps):
        ax.axvspan(step / steps, (step + 1) / steps, color=layer_color(step, steps), linewidth=0)
    ax.set_xlim(0, 1)
    ax.set_axis_off()
    for place, text, side in ((-0.04, "second", "right"), (1.04, "last layer", "left")):
        ax.text(place, 0.5, text, transform=ax.transAxes, ha=side, va="center", fontsize=8)


def _note(
    rows: Sequence[Row],
    drawing: Drawing,
    curves: Mapping[str, Curves],
    ends: Mapping[str, tuple[float, float]],
    diverged: bool,
) -> str:
    seeds = len({row.seed for row in rows if row.panel in drawing.panels})
    parts = ["One seed."] if seeds == 1 else []
    if seeds > 1:
        parts.append(f"Mean of {seeds} seeds; {_spread(drawing, curves, ends)}.")
    if diverged:
        parts.append("A diverged run " + ("is left out." if drawing.chance is None else "counts as chance."))
    return " ".join([*parts, drawing.note]).strip()


def _spread(
    drawing: Drawing,
    curves: Mapping[str, Curves],
    ends: Mapping[str, tuple[float, float]],
) -> str:
    """What shows the deviation over seeds, in words: nothing that cannot be seen is named."""
    seen, bars = False, False
    width = (FIRST_LAYER if drawing.layers else RC)["linewidth" if drawing.layers else "lines.linewidth"]
    for letter, panel in drawing.panels.items():
        bars |= panel.x == "latency"
        floor, ceiling = ends[panel.y]
        inch = _PANEL_HEIGHT / (ceiling - floor) * Y_AXES[panel.y].factor
        shown = list(curves[letter].values())[: 1 if drawing.layers else None]
        # A line covers the middle of its band.
        seen |= any(2 * 72 * inch * (point.std or 0.0) > 1.5 * width for series in shown for point in series)
    if not seen:
        text = "one standard deviation is less than the width of a line"
    else:
        text = f"shaded: one standard deviation{' of the first layer' if drawing.layers else ''} to either side"
    return text + ("; over latency, bars show those of accuracy and of latency" if bars else "")


_MOST = 40  # marks side by side: more would overlap


def draw_panel(ax: "Axes", panel: DrawnPanel, curves: Curves, names: Sequence[str], drawing: Drawing) -> str:
    """Draws the series of one panel on `ax`; returns the label of its x axis."""
    shown = [point for series in curves.values() for point in series]
    factor, label = shown_x(panel, [point.x for point in shown])
    for order, name in enumerate(names):
        if name not in curves:
            continue
        if drawing.layers:
            _draw_layer(ax, curves[name], panel, order, len(names), factor)
        else:
            _draw_series(ax, curves[name], panel, style_of(name, names), order, factor)
    if X_AXES[panel.x].log:
        _density_axis(ax, [point.x for point in shown])
    elif panel.early:
        _early_axis(ax, max([factor * point.x for point in shown], default=1.0))
    else:
        _linear_axis(ax, panel, [factor * point.x for point in shown])
    _draw_marks(ax, panel, factor)
    if not shown:
        ax.text(0.5, 0.75, "no results", transform=ax.transAxes, ha="center", color="0.5")
    return label


def _marked(curves: Mapping[str, Curves], names: Sequence[str], drawing: Drawing) -> list[str]:
    """The lines of the strip below each panel: series with marks. Of layers the kinds of marks, since a run diverges in
    all of its layers at once."""
    if drawing.layers:
        return [kind for kind in MARKS if any(getattr(point, kind) for point in _points(curves))]
    there = {name: [point for shown in curves.values() for point in shown.get(name, [])] for name in names}
    return [name for name, points in there.items() if any(point.diverged or point.dead for point in points)]


def _strip_height(marks: Sequence[str]) -> float:
    """In inches."""
    return _STRIP_LINE * (len(marks) + 0.4)


def _draw_strip(
    ax: "Axes", panel: DrawnPanel, curves: Curves, names: Sequence[str], layers: bool, marks: Sequence[str]
) -> None:
    """The marks of diverged and dead runs, on a strip between the x axis and its numbers. marks: its lines."""
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory

    # Outside the axes: every place on the y axis means a value, those below 0 as well.
    def below(inches: float) -> float:
        return -inches / _PANEL_HEIGHT

    height = _strip_height(marks)
    corner = (0.0, below(_STRIP_GAP + height))
    ax.add_artist(Rectangle(corner, 1, -below(height), transform=ax.transAxes, color=STRIP, linewidth=0, clip_on=False))
    ax.tick_params(axis="x", which="both", pad=72 * (_STRIP_GAP + height))
    across = blended_transform_factory(ax.transData, ax.transAxes)
    factor, _ = shown_x(panel, [point.x for points in curves.values() for point in points])
    for name, points in curves.items():
        for kind, look in MARKS.items():
            at = [factor * point.x for point in points if getattr(point, kind)]
            if not at:
                continue
            if panel.x == "epoch":
                at = _apart(at, factor * points[-1].x, panel.early)
            color = style_of(name, names)["color"]
            if layers:
                color = GREY if kind == "diverged" else layer_color(names.index(name), len(names))
            y = below(_STRIP_GAP + _STRIP_LINE * (marks.index(kind if layers else name) + 0.7))
            ax.plot(at, [y] * len(at), color=color, transform=across, clip_on=False, zorder=4, **look)


def limits(points: Sequence[CurvePoint], y: str, chance: float | None) -> tuple[float, float]:
    """Lower and upper end of a y axis in shown units."""
    axis = Y_AXES[y]
    tops = [min(axis.high, point.mean + (point.std or 0.0)) for point in points if point.mean is not None]
    # At least 1, since an axis from 0 to 0 has no height.
    top = max([axis.factor * value for value in (*tops, chance or 0.0)] + [1.0])
    return -0.03 * top, 1.05 * top


def _apart(places: Sequence[float], end: float, early: bool) -> list[float]:
    """Rising `places` of an axis from 0 to `end`, without those that would overlap the last one kept."""

    def position(x: float) -> float:
        return x if not early or x <= 1 else 1 + math.log10(x)

    kept: list[float] = []
    for place in places:
        if not kept or position(place) - position(kept[-1]) >= position(end) / _MOST:
            kept.append(place)
    return kept


def _draw_series(
    ax: "Axes", points: list[CurvePoint], panel: DrawnPanel, style: dict[str, Any], order: int, factor: float
) -> None:
    """The line of means, with a band or bars of one standard deviation."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    look = {"color": style["color"], "zorder": 2 + 0.01 * order}
    if panel.x == "latency":  # measured, so not monotonic in the sparsity: a band would cross itself
        ax.vlines(x, lower, upper, **look, **BARS)
        wide = [factor * (point.x_std or 0.0) for point in points]
        left, right = ([place + sign * w for place, w in zip(x, wide, strict=True)] for sign in (-1, 1))
        ax.hlines(mean, left, right, **look, **BARS)
    else:
        ax.fill_between(x, lower, upper, **look, **BAND)
    every = max(1, round(len(x) / MARKED))
    # Markers of different series are at different rounds, so that two lines that coincide are both seen.
    marked = (order % every, every)
    ax.plot(x, mean, zorder=3 + 0.01 * order, markevery=marked, **MARKER_EDGE, **style)


def _draw_layer(ax: "Axes", points: list[CurvePoint], panel: DrawnPanel, order: int, count: int, factor: float) -> None:
    """A thin line without a band. The first layer is thick, above the others, and has a band."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    if order > 0:
        ax.plot(x, mean, color=layer_color(order, count), zorder=2 + order / count, **OTHER_LAYERS)
        return
    ax.fill_between(x, lower, upper, color=FIRST_LAYER["color"], zorder=3, **BAND)
    ax.plot(x, mean, zorder=3.5, **FIRST_LAYER)


def _numbers(points: list[CurvePoint], panel: DrawnPanel, factor: float) -> tuple[list[float], ...]:
    """x, mean, and mean minus and plus one deviation, in shown units.

    NaN, a gap in the picture, stands for no mean (all runs diverged) and for no deviation (one run).
    """
    # The band ends at the bounds of the value: an accuracy below 0 is impossible.
    axis, gap = Y_AXES[panel.y], math.nan
    mean = [gap if point.mean is None else axis.factor * point.mean for point in points]
    lower, upper = [], []
    for point in points:
        known = point.mean is not None and point.std is not None
        lower.append(axis.factor * max(axis.low, point.mean - point.std) if known else gap)  # type: ignore[operator]
        upper.append(axis.factor * min(axis.high, point.mean + point.std) if known else gap)  # type: ignore[operator]
    return [factor * point.x for point in points], mean, lower, upper


def _draw_chance(ax: "Axes", chance: float, *, named: bool) -> None:
    """A dotted line at chance accuracy. named: with its name to the right of the panel, where no curve is."""
    ax.axhline(100 * chance, **REFERENCE)
    if named:
        ax.annotate(
            "chance",
            (1, 100 * chance),
            xycoords=("axes fraction", "data"),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=GREY,
        )


def _draw_marks(ax: "Axes", panel: DrawnPanel, factor: float) -> None:
    """Thin vertical lines at the panel's marks. Only the first one is labelled."""
    for index, place in enumerate(panel.marks):
        ax.axvline(factor * place, **REFERENCE)
        if index == 0 and panel.marks_label:
            ax.annotate(
                panel.marks_label,
                (factor * place, 0.99),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=SMALL,
                color=GREY,
            )


def _linear_axis(ax: "Axes", panel: DrawnPanel, values: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max([*values, *panel.marks, 1e-9])
    ax.set_xlim(-0.03 * end, 1.03 * end)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=panel.x == "epoch"))


def _early_axis(ax: "Axes", end: float) -> None:
    """An axis of epochs that is linear up to 1 and logarithmic from there on."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ax.set_xscale("symlog", linthresh=1.0, linscale=0.9)
    ax.set_xlim(-0.08, end * max(end, 2.0) ** 0.03)
    ticks = [0, *(digit * 10**power for power in range(6) for digit in (1, 2, 5))]
    ticks = [tick for tick in ticks if tick <= end]
    # Of a short run the end, too, where no tick is near.
    ticks += [round(end)] if end > 1.6 * ticks[-1] else []
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, labels=[str(tick) for tick in ticks])


def _density_axis(ax: "Axes", densities: list[float]) -> None:
    """A logarithmic x axis from 1 down to the lowest density, with ticks that suit its length."""
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
    # Over less than a decade the major ticks are the rounds themselves, and minor ones would only confuse.
    ax.xaxis.set_minor_locator(FixedLocator([] if few else [tick for tick in minor if tick >= end]))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _ticks(densities: list[float]) -> list[float]:
    """Tick positions for falling densities: 1, 0.3, 0.1, ...; over less than a decade, the densities of the rounds."""
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


_HANDLE = 0.60  # inches that a legend's entry takes beside its text

_LEGEND_CHARACTERS = 16  # that fit into an inch of a legend


def legend(
    names: Sequence[str], panels: Iterable[Collection[str]], drawing: Drawing, *, diverged: bool, dead: bool
) -> list[list[Any]]:
    """Entries of the legend in blocks: series that share panels, then the marks below the panels.

    names: series that have results. panels: the series in each panel. Layers have one entry, for the first; the colour
    bar explains the others.
    """
    from matplotlib.lines import Line2D

    blocks = []
    if drawing.layers:
        blocks = [[Line2D([], [], label=f"first layer ({names[0]})", **FIRST_LAYER)]] if names else []
    else:
        order = [*drawing.series, *(name for name in names if name not in drawing.series)]
        for block in _sharing([name for name in order if name in names], panels):
            looks = {name: MARKER_EDGE | style_of(name, order) for name in block}
            blocks.append([Line2D([], [], label=pretty(drawing.series.get(n, n)), **looks[n]) for n in block])
    marks = (("diverged", "diverged", diverged), ("dead", "a layer is pruned whole", dead))
    blocks.append([Line2D([], [], color=GREY, label=label, **MARKS[kind]) for kind, label, there in marks if there])
    return [block for block in blocks if block]


def _sharing(names: Sequence[str], panels: Iterable[Collection[str]]) -> list[list[str]]:
    """`names` in the smallest groups such that no panel has series of two groups (connected components)."""
    groups = [[name] for name in names]
    for there in panels:
        joined = [group for group in groups if any(name in there for name in group)]
        others = [group for group in groups if group not in joined]
        groups = [*others, sorted((name for group in joined for name in group), key=names.index)]
    return sorted((group for group in groups if group), key=lambda group: names.index(group[0]))


def arranged(blocks: Sequence[Sequence[Any]], width: float) -> list[list[Any]]:
    """The lines of a legend `width` inches wide: one line, else one or more lines of similar length per block."""
    together = [handle for block in blocks for handle in block]
    if _width([together]) <= width:
        return [together] if together else []
    lines: list[list[Any]] = []
    for count in range(max(map(len, blocks)), 0, -1):
        lines = []
        for block in blocks:
            length = -(-len(block) // -(-len(block) // count))
            lines += [list(block[start : start + length]) for start in range(0, len(block), length)]
        if _width(lines) <= width:
            break
    return lines


def _width(lines: Sequence[Sequence[Any]]) -> float:
    """Estimated width of a legend's columns in inches."""
    longest = (
        max(len(re.sub(r"\\mathrm|[\\${}_]", "", handle.get_label())) for handle in column if handle is not None)
        for column in zip_longest(*lines)
    )
    return sum(_HANDLE + length / _LEGEND_CHARACTERS for length in longest)


def pretty(text: str) -> str:
    """`text` as mathtext, with LR_find and LR_eval typeset as in the paper; other dollar signs are escaped."""
    return re.sub(r"LR_(find|eval)\b", r"$\\mathrm{LR}_{\\mathrm{\1}}$", text.replace("$", r"\$"))
