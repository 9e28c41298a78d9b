"""The results of a panel as a table for the terminal: some of its rounds, all of its series."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fastprune.figures.axes import X_AXES, Y_AXES
from fastprune.figures.results import depth_key, natural_key

COLUMNS = 100  # of the terminal
_SHOWN_ROUNDS = 6
Rounds = Sequence[Mapping[str, Any]]


def panel_table(letter: str, rounds: Rounds, drawing: Mapping[str, Any]) -> str:
    """`rounds`: as summary.json has them for the panel; drawing: as there. At most 100 columns wide."""
    panel = drawing["panels"][letter]
    title = f"{letter}  {panel['title']}".rstrip()
    if not rounds:
        return f"{title}\n  no results"
    labels: Mapping[str, str] = drawing["series"]
    if drawing["layers"]:
        rounds, labels = _of_layers(rounds)
    present = sorted({name for entry in rounds for name in entry["series"]}, key=natural_key)
    names = [name for name in labels if name in present] + [name for name in present if name not in labels]
    last = len(rounds) - 1
    picked = sorted({round(index * last / (_SHOWN_ROUNDS - 1)) for index in range(_SHOWN_ROUNDS)})
    by = f" by {drawing['legend_title']}" if drawing["legend_title"] else ""
    lines = [f"{title}: {Y_AXES[panel['y']].short}{by}"]
    # Of sizes and times each series has its own at a round: they stand beside the value.
    own = panel["x"] in ("parameters", "flops", "latency")
    if own:
        lines[0] += f", at {X_AXES[panel['x']].short}"
    head = "round" if own else X_AXES[panel["x"]].short
    found = {(index, name): rounds[index]["series"].get(name) for index in picked for name in names}
    marked = max([1, *(len(_marks(cell)) for cell in found.values())])
    cells = {at: _cell(cell, panel["y"], panel["x"], marked, own=own) for at, cell in found.items()}
    widths = {n: max(14, len(labels.get(n, n)) + 2, *(len(cells[i, n]) + 2 for i in picked)) for n in names}
    for block in _blocks(widths):
        lines.append(f"  {head:<14}" + "".join(f"{labels.get(name, name):>{widths[name]}}" for name in block))
        for index in picked:
            entry = rounds[index]
            place = str(entry["round"]) if own else _place(entry["x"], panel["x"])
            lines.append(f"  {place:<14}" + "".join(f"{cells[index, name]:>{widths[name]}}" for name in block))
    return "\n".join(line.rstrip() for line in lines)


def _blocks(widths: Mapping[str, int]) -> list[list[str]]:
    """The columns, in as few and equal parts as the terminal needs; `widths`: of the columns."""
    names = list(widths)
    for parts in range(1, len(names)):
        length = -(-len(names) // parts)
        tried = [names[start : start + length] for start in range(0, len(names), length)]
        if all(sum(widths[name] for name in block) <= COLUMNS - 16 for block in tried):
            return tried
    return [[name] for name in names]


def _of_layers(rounds: Rounds) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The first layer, the mean of the others, and the one of them that moves most."""
    layers = sorted({name for entry in rounds for name in entry["series"]}, key=depth_key)

    def values(name: str) -> list[float]:
        found = (entry["series"].get(name, {}).get("mean") for entry in rounds)
        return [value for value in found if value is not None]

    first, *others = layers
    moves = {name: max(known) - min(known) for name in others if (known := values(name))}
    labels = {first: f"{first} (first)"}
    most = max(moves, key=moves.__getitem__) if moves else None
    if most is not None:
        labels |= {"others": f"mean of {len(others)} others", most: f"{most} (moves most)"}
    reduced = []
    for entry in rounds:
        cells = {name: entry["series"][name] for name in (first, most) if name in entry["series"]}
        known = [c["mean"] for n, c in entry["series"].items() if n != first and c["mean"] is not None]
        if known:
            cells["others"] = {"mean": fmean(known), "std": None, "diverged": 0, "dead": 0}
        reduced.append({**entry, "series": cells})
    return reduced, labels


def _marks(cell: Mapping[str, Any] | None) -> str:
    return "" if cell is None else ("!" if cell["diverged"] else "") + ("*" if cell["dead"] else "")


def _cell(cell: Mapping[str, Any] | None, axis: str, x_axis: str, marked: int, *, own: bool) -> str:
    """Mean and deviation, marks, and in figures over sizes the place on the x axis. marked: room for marks."""
    if cell is None:
        return "-" + " " * marked * (not own)
    marks = _marks(cell)
    text = "diverged"
    if cell["mean"] is not None:
        factor = Y_AXES[axis].factor
        spread = f" +- {factor * cell['std']:.1f}" if cell["std"] is not None else ""
        text = f"{factor * cell['mean']:.1f}{spread}"
    return f"{text}{marks} at {_amount(X_AXES[x_axis].factor * cell['x'])}" if own else f"{text}{marks:<{marked}}"


def _place(x: float, axis: str) -> str:
    if axis == "density":
        return "1 (dense)" if x == 1 else f"{x:.3g}"
    if axis == "filters":
        return f"{100 * x:.3g} %"
    return f"{x:g}"


def _amount(x: float) -> str:
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{prefix}"
    return f"{x:.3g}"


def count_of(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
