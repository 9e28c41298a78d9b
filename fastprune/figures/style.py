"""How all pictures look: colours, markers, dashes, fonts and sizes; those of figures, and those of bench/.

Every two colours of series are at least COLOR_DISTANCE apart in CIELAB (1976), also as readers see them who lack one
of the three kinds of cones, by the simulation of Machado, Oliveira and Fernandes (2009): tests/figures/test_colors.py.
"""

# No import of matplotlib here: `--plan` imports what draws, too, and must start at once.

from collections.abc import Sequence
from typing import Any

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
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,  # TrueType: text in the PDF stays text; many publishers reject the default, Type 3
}
"""Settings for matplotlib.style.context(["default", RC])."""

SMALL = 6.5  # points, of notes and of labels within a panel

GREY = "0.35"  # of lines and words that are no data

LETTER: dict[str, Any] = {"loc": "left", "fontweight": "bold", "fontsize": 10}  # of a panel

RANDOM = "random"

COLOR_DISTANCE = 20.0
"""Between 20 and 25 two thin lines on white are told apart without effort."""

# Red is reserved for the random baseline, as in the paper's A2. The lightness differs, so that the colours can be read
# in grey, too. The numbers of colours, markers and dashes differ, so that two of many series never agree in all three.
COLORS = ("#2f4fa3", "#f5a800", "#1fb58f", "#8d4f7b", "#93b1e6", "#3b3128")
RED = "#e0202c"

_MARKERS = {"o": 4.0, "s": 3.7, "^": 4.8, "v": 4.8, "p": 4.6, "h": 4.4, "<": 4.8}  # sizes that look equal to the eye

_DASHES = ("-", (0, (6, 1.5)), (0, (2.2, 1.1)), (0, (6, 1.3, 1.3, 1.3)), (0, (1, 1)))

_RANDOM_STYLE = {"color": RED, "marker": "D", "markersize": 3.6, "linestyle": (0, (4, 1.2, 1, 1.2, 1, 1.2))}

MARKED = 12  # about so many markers on a line: more would hide its dashes

MARKER_EDGE: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.4}

BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}  # one standard deviation around a line

BARS: dict[str, Any] = {"alpha": 0.5, "linewidth": 1.0}  # the same, of a point

REFERENCE: dict[str, Any] = {"color": GREY, "linewidth": 0.7, "linestyle": (0, (1, 2)), "zorder": 1}  # chance, decays

FIRST_LAYER: dict[str, Any] = {"color": RED, "linewidth": 2.2}

OTHER_LAYERS: dict[str, Any] = {"linewidth": 0.8}

STRIP = "0.94"  # behind the marks of single runs

# A run can be diverged and dead: its cross then stands inside the circle.
MARKS: dict[str, dict[str, Any]] = {
    "diverged": {"linestyle": "none", "marker": "x", "markersize": 3.2, "markeredgewidth": 0.9},
    "dead": {"linestyle": "none", "marker": "o", "markersize": 4.3, "fillstyle": "none", "markeredgewidth": 0.7},
}


def style_of(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and dashes of the series `name`, by its place in `names`."""
    if name == RANDOM:
        return _RANDOM_STYLE
    index = [other for other in names if other != RANDOM].index(name)
    marker, size = list(_MARKERS.items())[index % len(_MARKERS)]
    color, dashes = COLORS[index % len(COLORS)], _DASHES[index % len(_DASHES)]
    return {"color": color, "marker": marker, "markersize": size, "linestyle": dashes}


def layer_color(index: int, count: int) -> Any:
    """The colour of layer `index` of `count`, from dark for the first to light for the last."""
    from matplotlib import colormaps

    # The last 8 % of viridis is a yellow that is hard to see on white.
    return colormaps["viridis"](0.92 * index / max(1, count - 1))
