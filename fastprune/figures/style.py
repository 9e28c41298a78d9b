"""How lines look, and the legend that explains them."""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import zip_longest
from typing import Any

from fastprune.figures.axes import Drawing

RANDOM = "random"
# Colours that the colour-blind tell apart, of different lightness; with markers and dashes also readable in grey.
# Red is kept for the random baseline. Lists of different length: many series still differ in one of them.
_COLORS = ("#0b4f8a", "#e69f00", "#009e8e", "#b35fa8", "#56b4e9", "#5a5a5a")
_MARKERS = {"o": 4.0, "s": 3.7, "^": 4.8, "v": 4.8, "p": 4.6, "h": 4.4, "<": 4.8}  # sizes that look alike
_DASHES = ("-", (0, (6, 1.5)), (0, (2.2, 1.1)), (0, (6, 1.3, 1.3, 1.3)), (0, (1, 1)))
_RANDOM_STYLE = {"color": "#d4201f", "marker": "D", "markersize": 3.6, "linestyle": (0, (4, 1.2, 1, 1.2, 1, 1.2))}
MARKED = 12  # markers on a line, about: more would hide its dashes
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
    "pdf.fonttype": 42,
}
_HANDLE = 0.60  # inches of a legend's entry, with the gaps about it
_LEGEND_CHARACTERS = 16  # an inch holds
FIRST_LAYER: dict[str, Any] = {"color": "#d4201f", "linewidth": 2.2}
# A run can be both: the cross then stands within the circle.
DIVERGED: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 3.2, "markeredgewidth": 0.9}
DEAD: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 4.3,
    "fillstyle": "none",
    "markeredgewidth": 0.7,
}


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and dashes of the series `name` of all `names`."""
    if name == RANDOM:
        return _RANDOM_STYLE
    index = [other for other in names if other != RANDOM].index(name)
    marker, size = list(_MARKERS.items())[index % len(_MARKERS)]
    color, dashes = _COLORS[index % len(_COLORS)], _DASHES[index % len(_DASHES)]
    return {"color": color, "marker": marker, "markersize": size, "linestyle": dashes}


def layer_color(index: int, count: int) -> Any:
    """The colour of a network's layer: dark for the first, light for the last."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.92 * index / max(1, count - 1))


def legend(
    names: Sequence[str], panels: Iterable[Collection[str]], drawing: Drawing, *, diverged: bool, dead: bool
) -> list[list[Any]]:
    """Entries for the series `names`, in blocks that share panels (the series of each), then for the marks below the
    axis. A network's layers have one for the first; the colour bar explains the others."""
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
    """`names` in groups, such that no panel has series of two groups."""
    groups = [[name] for name in names]
    for there in panels:
        joined = [group for group in groups if any(name in there for name in group)]
        others = [group for group in groups if group not in joined]
        groups = [*others, sorted((name for group in joined for name in group), key=names.index)]
    return sorted((group for group in groups if group), key=lambda group: names.index(group[0]))


def arranged(blocks: Sequence[Sequence[Any]], width: float) -> list[list[Any]]:
    """The lines of a legend `width` inches wide: one, or for each block lines of its own, about equally long."""
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
    """Inches that the columns of a legend take, estimated."""
    longest = (
        max(len(re.sub(r"\\mathrm|[\\${}_]", "", handle.get_label())) for handle in column if handle is not None)
        for column in zip_longest(*lines)
    )
    return sum(_HANDLE + length / _LEGEND_CHARACTERS for length in longest)


def pretty(text: str) -> str:
    """LR_find and LR_eval as the paper sets them; any other dollar sign is a dollar sign."""
    return re.sub(r"LR_(find|eval)\b", r"$\\mathrm{LR}_{\\mathrm{\1}}$", text.replace("$", r"\$"))
