"""Stacked bars of what a round costs: ours beside theirs, the parts told apart by lightness and hatch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Part: colour and hatch. Lightness alternates, so that neighbours differ in grey as well.
_STYLES = {
    "steps": ("#0b4f8a", ""),
    "evaluation": ("#a6cbe3", "///"),
    "loading": ("#e69f00", "..."),
    "pruning": ("#d4201f", "xxx"),
    "rewinding": ("#2f7d5b", "\\\\\\"),
    "storing": ("#cbb8e6", "---"),
    "compilation": ("#dddddd", "ooo"),
    "other": ("#ffffff", ""),
}
PARTS = tuple(_STYLES)
_LARGE = ("steps", "evaluation", "compilation")
_SMALL = tuple(part for part in PARTS if part not in _LARGE)
_RC = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.5, "pdf.fonttype": 42}


def draw(rows: Sequence[Mapping[str, Any]], names: tuple[str, str], title: str, path: Path) -> None:
    """Writes `path`.png and `path`.pdf. rows: with who (one of the two names), round, seconds by part."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rounds = sorted({row["round"] for row in rows})
    with style.context(["default", _RC]):
        figure = Figure(figsize=(max(6.4, 0.32 * len(rounds)), 6.4), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for ax, parts, what in (
            (axes[0], PARTS, "a whole round"),
            (axes[1], _SMALL, "without steps, evaluation and compilation"),
        ):
            _bars(ax, rows, names, parts)
            ax.set_ylabel("Time (s)")
            ax.set_title(what, loc="left", fontsize=8.5)
            ax.margins(y=0.06)
            ax.set_ylim(bottom=0)
        axes[1].set_xlabel(f"Round (left bar {names[0]}, right bar {names[1]})")
        axes[1].set_xticks(rounds)
        figure.suptitle(title, fontsize=9)
        patches = [Patch(facecolor=c, hatch=h, edgecolor="black", linewidth=0.5) for c, h in _STYLES.values()]
        figure.legend(
            patches, PARTS, loc="outside lower center", ncols=4, frameon=False, handlelength=2.6, handleheight=1.4
        )
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".pdf"))


def _bars(ax: "Axes", rows: Sequence[Mapping[str, Any]], names: tuple[str, str], parts: Sequence[str]) -> None:
    width = 0.38
    for row in rows:
        x = row["round"] + (-0.5 if row["who"] == names[0] else 0.5) * (width + 0.03)
        bottom = 0.0
        for part in parts:
            color, hatch = _STYLES[part]
            height = max(0.0, row["seconds"][part])
            ax.bar(x, height, width, bottom, color=color, hatch=hatch, edgecolor="black", linewidth=0.5)
            bottom += height
