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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths are in inches. A figure grows with its title, legend and note, so that panels have one size in all figures.
_WIDTH = {1: 4.9, 2: 7.0, 3: 9.4}  # of a figure, by its columns of panels

_PANEL_HEIGHT = 2.45

_LEFT, _RIGHT, _BOTTOM, _ROW_GAP, _COLUMN_GAP = 0.62, 0.14, 0.60, 0.66, 0.22

_TITLE_LINE, _LEGEND_LINE, _NOTE_LINE = 0.18, 0.19, 0.115

# Characters that fit into an inch, estimated on the safe side: matplotlib does not wrap text by itself.
_TITLE_CHARACTERS, _NOTE_CHARACTERS = 12, 19.5

_BAR = 2.6  # inches for the colour bar of a network's layers, with its label


def draw(rows: Sequence[Row], drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Draws mean and sample standard deviation over seeds; writes figure.png and figure.pdf and returns their paths.

    Every round is a point of its line; of many rounds only some have a marker. A diverged run counts as chance
    accuracy (is left out where `drawing.chance` is None) and is marked by a cross below the axis. A circle marks a run
    in which a layer is pruned whole. InputError for rows out of the bounds of their panel's axes, and where `folder`
    cannot be written.
    """
    from matplotlib import style

    check_rows(rows, drawing.panels)
    png, pdf = folder / "figure.png", folder / "figure.pdf"
    # "default" first: a user's matplotlibrc must not change the picture.
    with style.context(["default", RC]):
        figure = _figure(rows, drawing)
        write_output(png, _render(figure, "png", dpi=220, metadata={"Software": None}))
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
    points = [point for by_name in curves.values() for series in by_name.values() for point in series]
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
    note = textwrap.wrap(_note(rows, drawing, diverged), int(_NOTE_CHARACTERS * (width - _LEFT)))
    above_legend = 0.10 + _TITLE_LINE * len(title)
    headed = count > 1 or any(panel.title for panel in drawing.panels.values())
    top = above_legend + _LEGEND_LINE * legend_lines + (0.34 if headed else 0.14)
    bottom = _BOTTOM + _NOTE_LINE * len(note)
    height = top + lines * _PANEL_HEIGHT + (lines - 1) * _ROW_GAP + bottom
    # Panels that share the y axis label it once; others need room for labels of their own.
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
            # matplotlib fills a legend column by column; blanks keep each line of ours in one row.
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
        # A panel whose left neighbour has the same y axis repeats neither label nor numbers.
        if index % columns == 0 or panel.y != beside:
            ax.set_ylabel(Y_AXES[panel.y].label)
        else:
            ax.tick_params(labelleft=False)
        beside = panel.y
    for ax in axes.flat[count:]:
        ax.remove()


def _limits(curves: Mapping[str, Mapping[str, list[CurvePoint]]], y: str, drawing: Drawing) -> tuple[float, float]:
    """Ends of the y axis, the same for all panels of the figure that show `y`, so that they can be compared by eye."""
    shown = [curves[letter] for letter, panel in drawing.panels.items() if panel.y == y]
    points = [point for series in shown for curve in series.values() for point in curve]
    lines = 2 if drawing.layers else max(map(len, shown))
    return limits(points, y, lines, drawing.chance if y == "accuracy" else None)


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


Curves = Mapping[str, list[CurvePoint]]

_STRIP = 0.035  # height of one line of marks below the axis, as a fraction of the axis' upper end

_MARKS = 40  # at most so many marks side by side: more would overlap


def draw_panel(
    ax: "Axes", panel: DrawnPanel, curves: Curves, names: Sequence[str], drawing: Drawing, floor: float
) -> str:
    """Draws the series of one panel on `ax`; returns the label of its x axis. floor: the lower end of the y axis, below
    0; between it and 0 are the marks of diverged and dead runs."""
    shown = [point for series in curves.values() for point in series]
    factor, label = shown_x(panel, [point.x for point in shown])
    for order, name in enumerate(names):
        if name not in curves:
            continue
        points = curves[name]
        if drawing.layers:
            _draw_layer(ax, points, panel, order, len(names), factor)
            # A run diverges in all of its layers at once, so one line of marks is enough; a second is for dead layers.
            levels = {"diverged": floor / 3, "dead": 2 * floor / 3}
            colors: dict[str, Any] = {"diverged": "0.2", "dead": layer_color(order, len(names))}
        else:
            style = style_of(name, names)
            _draw_series(ax, points, panel, style, order, factor)
            # Several series often diverge at the same density, so each has its marks at a height of its own.
            here = [other for other in names if other in curves]
            levels = dict.fromkeys(("diverged", "dead"), floor * (here.index(name) + 1) / (len(here) + 1))
            colors = dict.fromkeys(levels, style["color"])
        for counted, look in (("diverged", DIVERGED), ("dead", DEAD)):
            at = [factor * point.x for point in points if getattr(point, counted)]
            if panel.x == "epoch":
                at = _apart(at, factor * (points[-1].x - points[0].x) / _MARKS)
            ax.plot(at, [levels[counted]] * len(at), color=colors[counted], zorder=4, **look)
    if X_AXES[panel.x].log:
        _density_axis(ax, [point.x for point in shown])
    else:
        _linear_axis(ax, panel, [factor * point.x for point in shown])
    _draw_marks(ax, panel, factor)
    if drawing.chance is not None and panel.y == "accuracy":
        _draw_chance(ax, drawing.chance, panel, shown)
    if not shown:
        ax.text(0.5, 0.75, "no results", transform=ax.transAxes, ha="center", color="0.5")
    return label


def limits(points: Sequence[CurvePoint], y: str, lines: int, chance: float | None) -> tuple[float, float]:
    """Lower and upper end of a y axis in shown units. lines: lines of marks below 0, where there are any marks."""
    axis = Y_AXES[y]
    tops = [min(axis.high, point.mean + (point.std or 0.0)) for point in points if point.mean is not None]
    # At least 1, since an axis from 0 to 0 has no height.
    top = max([axis.factor * value for value in (*tops, chance or 0.0)] + [1.0])
    marked = any(point.diverged or point.dead for point in points)
    return -(_STRIP * (lines + 1) if marked else 0.03) * top, 1.05 * top


def _apart(places: Sequence[float], least: float) -> list[float]:
    """Rising `places`, without those that are nearer than `least` to the last one kept."""
    kept: list[float] = []
    for place in places:
        if not kept or place - kept[-1] >= least:
            kept.append(place)
    return kept


def _draw_series(
    ax: "Axes", points: list[CurvePoint], panel: DrawnPanel, style: dict[str, Any], order: int, factor: float
) -> None:
    """The line of means, with a band or bars of one standard deviation."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    if panel.x == "latency":  # measured, so not monotonic in the sparsity: a band would cross itself
        ax.vlines(x, lower, upper, color=style["color"], alpha=0.5, linewidth=1.0, zorder=2 + 0.01 * order)
    else:
        ax.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0, zorder=2 + 0.01 * order)
    every = max(1, round(len(x) / MARKED))
    # Markers of different series are at different rounds, so that two lines that coincide are both seen.
    marked = (order % every, every)
    ax.plot(x, mean, zorder=3 + 0.01 * order, markevery=marked, markeredgecolor="white", markeredgewidth=0.4, **style)


def _draw_layer(ax: "Axes", points: list[CurvePoint], panel: DrawnPanel, order: int, count: int, factor: float) -> None:
    """A thin line without a band. The first layer is thick, above the others, and has a band."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    if order > 0:
        ax.plot(x, mean, color=layer_color(order, count), linewidth=0.8, zorder=2 + order / count)
        return
    ax.fill_between(x, lower, upper, color=FIRST_LAYER["color"], alpha=0.2, linewidth=0, zorder=3)
    ax.plot(x, mean, zorder=3.5, **FIRST_LAYER)


def _numbers(points: list[CurvePoint], panel: DrawnPanel, factor: float) -> tuple[list[float], ...]:
    """x, mean, and mean minus and plus one deviation, in shown units.

    NaN, a gap in the picture, stands for no mean (all runs diverged) and for no deviation (one run).
    """
    # The band ends at the bounds of the value: an accuracy below 0 is impossible, and the marks are there.
    axis, gap = Y_AXES[panel.y], math.nan
    mean = [gap if point.mean is None else axis.factor * point.mean for point in points]
    lower, upper = [], []
    for point in points:
        known = point.mean is not None and point.std is not None
        lower.append(axis.factor * max(axis.low, point.mean - point.std) if known else gap)  # type: ignore[operator]
        upper.append(axis.factor * min(axis.high, point.mean + point.std) if known else gap)  # type: ignore[operator]
    return [factor * point.x for point in points], mean, lower, upper


def _draw_chance(ax: "Axes", chance: float, panel: DrawnPanel, points: list[CurvePoint]) -> None:
    """A dotted line at chance accuracy, labelled at the end that is farther from the curves."""
    ax.axhline(100 * chance, color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    places = sorted(point.x for point in points) or [1.0]
    # On the log axis the middle is the geometric mean of the ends, and the larger densities are on the left.
    middle = math.sqrt(places[0]) if X_AXES[panel.x].log else (places[0] + places[-1]) / 2
    distance = {"left": math.inf, "right": math.inf}
    for point in points:
        if point.mean is not None:
            side = "left" if (point.x >= middle) == X_AXES[panel.x].log else "right"
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


def _draw_marks(ax: "Axes", panel: DrawnPanel, factor: float) -> None:
    """Thin vertical lines at the panel's marks. Only the first one is labelled."""
    for index, place in enumerate(panel.marks):
        ax.axvline(factor * place, color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        if index == 0 and panel.marks_label:
            ax.annotate(
                panel.marks_label,
                (factor * place, 0.99),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 0),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=6.5,
                color="0.35",
            )


def _linear_axis(ax: "Axes", panel: DrawnPanel, values: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max([*values, *panel.marks, 1e-9])
    ax.set_xlim(-0.03 * end, 1.03 * end)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=panel.x == "epoch"))


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


RANDOM = "random"

# Colour-blind readers can tell these colours apart, and their lightness differs, so that they can be read in grey, too.
# Red is reserved for the random baseline, as in the paper's A2. The numbers of colours, markers and dashes differ, so
# that two of many series never agree in all three.
_COLORS = ("#0b4f8a", "#e69f00", "#009e8e", "#b35fa8", "#56b4e9", "#5a5a5a")

_MARKERS = {"o": 4.0, "s": 3.7, "^": 4.8, "v": 4.8, "p": 4.6, "h": 4.4, "<": 4.8}  # sizes that look equal to the eye

_DASHES = ("-", (0, (6, 1.5)), (0, (2.2, 1.1)), (0, (6, 1.3, 1.3, 1.3)), (0, (1, 1)))

_RANDOM_STYLE = {"color": "#d4201f", "marker": "D", "markersize": 3.6, "linestyle": (0, (4, 1.2, 1, 1.2, 1, 1.2))}

MARKED = 12  # about so many markers on a line: more would hide its dashes

RC: dict[str, Any] = {
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
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text; many publishers reject the default, Type 3
}

_HANDLE = 0.60  # inches that a legend's entry takes beside its text

_LEGEND_CHARACTERS = 16  # that fit into an inch of a legend

FIRST_LAYER: dict[str, Any] = {"color": "#d4201f", "linewidth": 2.2}

# A run can be diverged and dead: its cross then stands inside the circle.
DIVERGED: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 3.2, "markeredgewidth": 0.9}

DEAD: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 4.3,
    "fillstyle": "none",
    "markeredgewidth": 0.7,
}


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and dashes of the series `name`, by its place in `names`."""
    if name == RANDOM:
        return _RANDOM_STYLE
    index = [other for other in names if other != RANDOM].index(name)
    marker, size = list(_MARKERS.items())[index % len(_MARKERS)]
    color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
    return {"color": color, "marker": marker, "markersize": size, "linestyle": dashes}


def layer_color(index: int, count: int) -> Any:
    """The colour of layer `index` of `count`, from dark for the first to light for the last."""
    from matplotlib import colormaps

    # The last 8 % of viridis is a yellow that is hard to see on white.
    return colormaps["viridis"](0.92 * index / max(1, count - 1))


def legend(
    names: Sequence[str], panels: Iterable[Collection[str]], drawing: Drawing, *, diverged: bool, dead: bool
) -> list[list[Any]]:
    """Entries of the legend in blocks: series that share panels, then the marks below the axis.

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
            looks = {name: {"markeredgecolor": "white", **style_of(name, order)} for name in block}
            blocks.append([Line2D([], [], label=pretty(drawing.series.get(n, n)), **looks[n]) for n in block])
    marks = (("diverged", DIVERGED, diverged), ("a layer is pruned whole", DEAD, dead))
    blocks.append([Line2D([], [], color="0.2", label=label, **look) for label, look, there in marks if there])
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
