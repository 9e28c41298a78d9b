"""The output of a figure: results.csv, figure.png, figure.pdf, summary.json, and the summary on the terminal."""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from fastprune.console import duration
from fastprune.errors import InputError
from fastprune.figures import FIGURES, load
from fastprune.figures.axes import X_AXES, Y_AXES, Drawing, DrawnPanel
from fastprune.figures.claims import Verdict
from fastprune.figures.drawing import draw
from fastprune.figures.results import Row, curve, depth_key, natural_key, read_csv, series_of, write_csv, write_output

_SHOWN = ("fastprune", "python", "torch", "triton")
"""Versions that the terminal shows; summary.json has all of them."""

_MACHINERY = "This run shows that the machinery works. It is not the paper's result. To compute that, run:"


def summarize(
    rows: Sequence[Row],
    drawing: Drawing,
    verdicts: Iterable[Verdict],
    *,
    figure: str,
    preset: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    cost: Mapping[str, Any],
    environment: Mapping[str, Any],
    real_command: str | None = None,
) -> dict[str, Any]:
    """The content of summary.json.

    cost: the terminal shows nodes, cached and epochs of it, which are the figure's own, and images_per_s and wall_s of
    its "command", which are those of all figures that one command computes. environment: the terminal shows device,
    threads, compute (way -> trainings, where there are several ways) and versions (name -> version) of it.
    real_command: the command that computes the paper's result; None where this run does. NaN and infinity become null.
    TypeError for values that JSON cannot hold.
    """
    summary = {
        "figure": figure,
        "preset": preset,
        "settings": settings,
        "data": data,
        "claims": [asdict(verdict) for verdict in verdicts],
        "panels": {panel: _panel(rows, panel, drawing.chance) for panel in sorted({row.panel for row in rows})},
        # By node: a run that several panels show is one run.
        "diverged": len({row.node or row for row in rows if row.diverged}),
        "dead": len({row.node or row for row in rows if row.dead}),
        "cost": cost,
        "environment": environment,
        "drawing": asdict(drawing),
        "real_command": real_command,
    }
    plain: dict[str, Any] = _plain(summary)
    return plain


def write_all(folder: Path, rows: Sequence[Row], drawing: Drawing, summary: Mapping[str, Any]) -> list[Path]:
    """Writes results.csv, figure.png, figure.pdf and summary.json into `folder`, each atomically; returns their paths.

    InputError where `folder` cannot be written.
    """
    # Numbers before pictures: if drawing fails, results.csv is there for --redraw.
    results, described = folder / "results.csv", folder / "summary.json"
    write_csv(results, rows)
    pictures = draw(rows, drawing, folder)
    content = json.dumps(_plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    write_output(described, f"{content}\n".encode())
    return [results, *pictures, described]


def draw_again(folder: Path) -> list[Path]:
    """Draws again from results.csv in `folder`; returns the paths of the pictures.

    Titles, chance level and note come from summary.json, else from the rows alone. InputError for missing, foreign or
    corrupt files.
    """
    rows = read_csv(folder / "results.csv")
    drawing = _read_drawing(folder / "summary.json") or _bare_drawing(rows)
    return list(draw(rows, drawing, folder))


def recorded_drawing(summary: Mapping[str, Any]) -> Drawing:
    """The drawing that a summary records. KeyError, TypeError, AttributeError or ValueError if it does not."""
    recorded = summary["drawing"]
    panels = {letter: DrawnPanel(**panel) for letter, panel in recorded["panels"].items()}
    return Drawing(**{field.name: recorded[field.name] for field in fields(Drawing)} | {"panels": panels})


def _read_drawing(path: Path) -> Drawing | None:
    try:
        return recorded_drawing(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or foreign: remove it to draw from results.csv alone") from error


def _bare_drawing(rows: Sequence[Row]) -> Drawing:
    """A drawing from the rows and the name of their figure: titles only where the rows name a single rate."""
    names = sorted({row.figure for row in rows})
    figure = load(names[0]) if names and names[0] in FIGURES else None
    # The run may have had other rates than the protocol, so only the axes are taken from the figure.
    known = {panel.id: panel for panel in figure.panels_of(figure.protocol)} if figure else {}
    shown = sorted({row.panel for row in rows if not row.panel.startswith("find")}) or ["find"]
    axes = {panel: (known[panel].x, known[panel].y) if panel in known else () for panel in shown}
    panels = {panel: DrawnPanel(_rate(rows, panel), *axes[panel]) for panel in shown}
    return Drawing(f"Figure {', '.join(names)}".strip(), panels, layers=figure is not None and figure.layers)


def _rate(rows: Sequence[Row], panel: str) -> str:
    """Title of a panel: the learning rate that all of its rows share; empty where there is none."""
    for name in ("lr_eval", "lr_find"):
        rates = {getattr(row, name) for row in rows if row.panel == panel}
        if len(rates) == 1 and (rate := rates.pop()) is not None:
            return f"{name.replace('lr', 'LR')} = {rate:g}"
    return ""


def terminal_summary(summary: Mapping[str, Any], folder: Path | None = None) -> str:
    """`summary` as text of at most 100 columns: accuracies, claims, cost, and the paths of the files."""
    blocks = [f"Figure {summary['figure']}, preset {summary['preset']}: {summary['drawing']['title']}"]
    for letter in summary["drawing"]["panels"]:
        blocks.append(panel_table(letter, summary["panels"].get(letter, []), summary["drawing"]))
    if summary["diverged"]:
        counted = "is left out" if summary["drawing"]["chance"] is None else "counts as chance"
        blocks.append(f"! marks diverged runs ({summary['diverged']} in all); a diverged run {counted}")
    if summary["dead"]:
        blocks.append(f"* marks runs in which a layer is pruned whole ({summary['dead']} in all)")
    if summary["claims"]:
        blocks.append(_claims(summary["claims"], summary["preset"]))
    blocks.append(_cost(summary["cost"], summary["environment"]))
    if folder is not None:
        blocks.append(f"Files   {folder}/: figure.png, figure.pdf, results.csv, summary.json")
    # After a failure the user needs the errors that follow, not the next command.
    if summary["real_command"] and not summary["cost"].get("failed"):
        blocks.append(f"{_MACHINERY}\n  {summary['real_command']}")
    return "\n\n".join(block for block in blocks if block)


def _panel(rows: Sequence[Row], panel: str, chance: float | None) -> list[dict[str, Any]]:
    """Per round: x, and by series the mean and standard deviation over seeds, in the units of the rows."""
    table: dict[int, dict[str, Any]] = {}
    for name in series_of(rows, [panel]):
        for point in curve(rows, panel, name, chance):
            entry = table.setdefault(point.round, {"round": point.round, "x": point.x, "series": {}})
            entry["series"][name] = {
                "x": point.x,
                "mean": point.mean,
                "std": point.std,
                "x_std": point.x_std,
                "runs": point.runs,
                "diverged": point.diverged,
                "dead": point.dead,
            }
    return [entry for _, entry in sorted(table.items())]


def _claims(claims: Sequence[Mapping[str, Any]], preset: str) -> str:
    if preset == "smoke":
        return f"Claims  {len(claims)}, undecided: preset smoke only shows the machinery; differences: summary.json"
    parts = [part for claim in claims for part in claim["parts"]]
    units = list(dict.fromkeys(part["unit"] for part in parts))
    lines = [f"Claims: left minus right in {' or '.join(units)}, 95 % interval over seeds"]
    width = max(len(part["text"]) for part in parts)
    # A reason that all parts share (too few seeds, preset smoke) is printed once, below them.
    common = {part["why"] for part in parts}
    if len(common) > 1 or any(_plain_to_see(why) for why in common):
        common = set()
    for claim in claims:
        lines.append(_fill(claim["text"], f"  {claim['verdict']:<11}"))
        for part in claim["parts"]:
            lines += _part(part, f"{'':13}{part['text']:<{width}}  ", part["why"] not in common)
    return "\n".join([*lines, *(f"  Why: {why}" for why in common)])


def _part(part: Mapping[str, Any], head: str, explain: bool) -> list[str]:
    lines = []
    if part["effect"] is not None:
        interval = "" if part["interval"] is None else "[{:+.2f}, {:+.2f}]".format(*part["interval"])
        place = "round" if part["unit"] == "accuracy points" else "epoch"
        counts = [count_of(len(part["differences"]), "seed"), count_of(len(part["rounds"]), place)]
        counts += [f"{len(part['dropped'])} at chance"] if part["dropped"] else []
        counts += [f"{part['diverged']} diverged"] if part["diverged"] else []
        counts += [f"{part['dead']} with a dead layer"] if part["dead"] else []
        lines.append(f"{head}{part['effect']:+7.2f} {interval:<19} {part['verdict']:<11}{', '.join(counts)}".rstrip())
    if part["effect"] is None:
        lines.append(_fill(part["why"], head))
    elif explain and not _plain_to_see(part["why"]):
        lines.append(_fill(part["why"], " " * len(head)))
    return lines


def _plain_to_see(why: str) -> bool:
    """Whether the interval, which is printed on the same line, already shows the reason."""
    return why.startswith("the interval") and ";" not in why


def _fill(text: str, head: str) -> str:
    """`text` after `head`, wrapped, with the further lines indented to the width of `head`."""
    return textwrap.fill(text, COLUMNS, initial_indent=head, subsequent_indent=" " * min(len(head), COLUMNS // 2))


def _cost(cost: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    parts = []
    if cost.get("nodes") is not None:
        parts.append(f"{cost['nodes']:,} nodes" + (f" ({cost['cached']:,} cached)" if cost.get("cached") else ""))
    if cost.get("epochs") is not None:
        parts.append(f"{cost['epochs']:,} epochs")
    command, whole = cost.get("command") or {}, []
    if command.get("images_per_s") is not None:
        whole.append(f"{command['images_per_s']:,.0f} images/s")
    if command.get("node_s") is not None:
        whole.append(f"{duration(command['node_s'])} of all runs together")
    if command.get("wall_s") is not None:
        whole.append(duration(command["wall_s"]))
    if whole and len(command.get("figures", ())) > 1:
        whole[-1] += f" for {', '.join(command['figures'])}"
    where = [str(environment["device"])] if environment.get("device") else []
    if environment.get("threads") is not None:
        where.append(f"{count_of(environment['threads'], 'thread')} a process")
    ways = environment.get("compute") or {}
    if len(ways) > 1:
        where.append(f"trainings: {', '.join(f'{count:,} {way}' for way, count in ways.items())}")
    versions = environment.get("versions") or {}
    where += [f"{name} {versions[name]}" for name in _SHOWN if name in versions]
    return "\n".join(
        _fill(", ".join(items), head)
        for head, items in (("Cost    ", parts), ("Command ", whole), ("On      ", where))
        if items
    )


def _plain(value: Any) -> Any:
    """`value` as plain JSON types. TypeError for any other type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    # JSON has no NaN; float() also turns numpy's float64 into a plain one.
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"summary.json cannot hold {value!r}")


COLUMNS = 100  # of the terminal

_SHOWN_ROUNDS = 6

Rounds = Sequence[Mapping[str, Any]]


def panel_table(letter: str, rounds: Rounds, drawing: Mapping[str, Any]) -> str:
    """The table of one panel, at most 100 columns wide. rounds, drawing: as in summary.json."""
    panel = drawing["panels"][letter]
    title = f"{letter}  {panel['title']}".rstrip()
    if not rounds:
        return f"{title}\n  no results"
    labels: Mapping[str, str] = drawing["series"]
    if drawing["layers"]:
        # The drawing lists no series for layers: their names come with the results.
        rounds, labels = _of_layers(rounds)
    present = sorted({name for entry in rounds for name in entry["series"]}, key=natural_key)
    names = [name for name in labels if name in present] + [name for name in present if name not in labels]
    # Evenly spaced rounds, the first and the last included: thirty would fill the screen.
    last = len(rounds) - 1
    picked = sorted({round(index * last / (_SHOWN_ROUNDS - 1)) for index in range(_SHOWN_ROUNDS)})
    by = f" by {drawing['legend_title']}" if drawing["legend_title"] else ""
    lines = [f"{title}: {Y_AXES[panel['y']].short}{by}"]
    # Parameters, FLOPs and latency of a round differ between series, so each cell has its own x beside the value.
    own = panel["x"] in ("parameters", "flops", "latency")
    if own:
        lines[0] += f", at {X_AXES[panel['x']].short}"
    head = "round" if own else X_AXES[panel["x"]].short
    found = {(index, name): rounds[index]["series"].get(name) for index in picked for name in names}
    # Marks take the same room in all cells, so that numbers stay aligned.
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
    """Column names in as few blocks of equal length as fit the terminal. widths: name -> width of the column."""
    names = list(widths)
    # 16 columns are taken by the indent and the first column, the round.
    for parts in range(1, len(names)):
        length = -(-len(names) // parts)
        tried = [names[start : start + length] for start in range(0, len(names), length)]
        if all(sum(widths[name] for name in block) <= COLUMNS - 16 for block in tried):
            return tried
    return [[name] for name in names]


def _of_layers(rounds: Rounds) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """`rounds` reduced to the first layer, the mean of the others, and the other that moves most; and their labels."""
    # These are what A4's claims compare; ResNet-50 has 53 conv layers, too many for a table.
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
    """Mean, deviation and marks of one cell. own: whether x follows. marked: width of the widest marks, so that numbers
    align."""
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
    """A number and its noun, in the plural unless it is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
