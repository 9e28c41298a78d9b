"""What is drawn within a panel: curves with bands, layers, marks below the axis, ticks."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastprune.figures.axes import X_AXES, Y_AXES, Drawing, Panel, shown_x
from fastprune.figures.results import CurvePoint
from fastprune.figures.style import DEAD, DIVERGED, FIRST_LAYER, MARKED, layer_color, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = Mapping[str, list[CurvePoint]]


_STRIP = 0.035  # of the axis' top, for each line of marks below it
_MARKS = 40  # side by side at most: more would overlap


def draw_panel(ax: "Axes", panel: Panel, curves: Curves, names: Sequence[str], drawing: Drawing, floor: float) -> str:
    """Draws the series of a panel; returns the label of its x axis. floor: where the strip of marks ends, below 0."""
    shown = [point for series in curves.values() for point in series]
    factor, label = shown_x(panel, [point.x for point in shown])
    for order, name in enumerate(names):
        if name not in curves:
            continue
        points = curves[name]
        if drawing.layers:
            _draw_layer(ax, points, panel, order, len(names), factor)
            # A run diverges in all layers at once: one line of marks for that, one for layers pruned whole.
            levels = {"diverged": floor / 3, "dead": 2 * floor / 3}
            colors: dict[str, Any] = {"diverged": "0.2", "dead": layer_color(order, len(names))}
        else:
            style = style_of(name, names)
            _draw_series(ax, points, panel, style, order, factor)
            # Each series has its marks at its own height: several often diverge at the same density.
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
    """Lower and upper end of a y axis, as shown. lines: of marks below it, where there are any."""
    axis = Y_AXES[y]
    tops = [min(axis.high, point.mean + (point.std or 0.0)) for point in points if point.mean is not None]
    top = max([axis.factor * value for value in (*tops, chance or 0.0)] + [1.0])
    marked = any(point.diverged or point.dead for point in points)
    return -(_STRIP * (lines + 1) if marked else 0.03) * top, 1.05 * top


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The first of `places` and of the others those that are at least so far from the one before."""
    kept: list[float] = []
    for place in places:
        if not kept or place - kept[-1] >= least:
            kept.append(place)
    return kept


def _draw_series(
    ax: "Axes", points: list[CurvePoint], panel: Panel, style: dict[str, Any], order: int, factor: float
) -> None:
    """Mean and band, or bars, of one standard deviation."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    if panel.x == "latency":  # measured, it need not fall from point to point: a band would cross itself
        ax.vlines(x, lower, upper, color=style["color"], alpha=0.5, linewidth=1.0, zorder=2 + 0.01 * order)
    else:
        ax.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0, zorder=2 + 0.01 * order)
    every = max(1, round(len(x) / MARKED))
    # Where two lines coincide, markers at different rounds show both.
    marked = (order % every, every)
    ax.plot(x, mean, zorder=3 + 0.01 * order, markevery=marked, markeredgecolor="white", markeredgewidth=0.4, **style)


def _draw_layer(ax: "Axes", points: list[CurvePoint], panel: Panel, order: int, count: int, factor: float) -> None:
    """A thin line; the first layer thick and above the others, with its band."""
    x, mean, lower, upper = _numbers(points, panel, factor)
    if order > 0:
        ax.plot(x, mean, color=layer_color(order, count), linewidth=0.8, zorder=2 + order / count)
        return
    ax.fill_between(x, lower, upper, color=FIRST_LAYER["color"], alpha=0.2, linewidth=0, zorder=3)
    ax.plot(x, mean, zorder=3.5, **FIRST_LAYER)


def _numbers(points: list[CurvePoint], panel: Panel, factor: float) -> tuple[list[float], ...]:
    """x, mean, and mean less and plus the deviation, as shown. NaN is a gap: diverged, or a single run.

    The band ends where no value can be: below 0 are the marks.
    """
    axis, gap = Y_AXES[panel.y], math.nan
    mean = [gap if point.mean is None else axis.factor * point.mean for point in points]
    lower, upper = [], []
    for point in points:
        known = point.mean is not None and point.std is not None
        lower.append(axis.factor * max(axis.low, point.mean - point.std) if known else gap)  # type: ignore[operator]
        upper.append(axis.factor * min(axis.high, point.mean + point.std) if known else gap)  # type: ignore[operator]
    return [factor * point.x for point in points], mean, lower, upper


def _draw_chance(ax: "Axes", chance: float, panel: Panel, points: list[CurvePoint]) -> None:
    """Dotted line, with its label at the end where the curves are farther away."""
    ax.axhline(100 * chance, color="0.35", linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
    places = sorted(point.x for point in points) or [1.0]
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


def _draw_marks(ax: "Axes", panel: Panel, factor: float) -> None:
    """Thin vertical lines; the first one says what they are."""
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


def _linear_axis(ax: "Axes", panel: Panel, values: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max([*values, *panel.marks, 1e-9])
    ax.set_xlim(-0.03 * end, 1.03 * end)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=panel.x == "epoch"))


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
