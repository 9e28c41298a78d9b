"""What a finished figure leaves: results.csv, the pictures, summary.json, and the lines on the terminal."""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.figures import FIGURES, load
from fastprune.figures.axes import Drawing, Panel
from fastprune.figures.claims import Verdict
from fastprune.figures.draw import draw
from fastprune.figures.results import Row, curve, read_csv, series_of, write_atomic, write_csv
from fastprune.figures.tables import COLUMNS, count_of, panel_table

_SHOWN = ("fastprune", "python", "torch", "triton")
"""Of the versions, those that the terminal gets; summary.json has all."""
_MACHINERY = "This shows that the machinery works. It is not the paper's result; that takes the real run:"


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

    `cost`: `nodes`, `cached`, `epochs`, `images_per_s`, `wall_s` are shown on the terminal, in this order, others only
    kept; so are `device`, `threads` and `versions` (name -> version) of `environment`. `real_command` is given when the
    run shows the machinery only. Numbers that are not finite become null. Raises TypeError for what JSON cannot hold.
    """
    summary = {
        "figure": figure,
        "preset": preset,
        "settings": settings,
        "data": data,
        "claims": [asdict(verdict) for verdict in verdicts],
        "panels": {panel: _panel(rows, panel, drawing.chance) for panel in sorted({row.panel for row in rows})},
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
    """Write results.csv, figure.png, figure.pdf and summary.json into `folder`, each at one stroke; return their paths.

    Raises InputError when `folder` cannot be written.
    """
    results, described = folder / "results.csv", folder / "summary.json"
    write_csv(results, rows)
    pictures = draw(rows, drawing, folder)
    content = json.dumps(_plain(summary), indent=2, allow_nan=False, ensure_ascii=False)
    write_atomic(described, f"{content}\n".encode())
    return [results, *pictures, described]


def redraw(folder: Path, drawing: Drawing | None = None) -> list[Path]:
    """Draw again from results.csv in `folder`; return the paths of the pictures.

    Titles, chance level and note are those of summary.json; without that file those of `drawing`; without that, bare
    ones. Raises InputError for missing, foreign or damaged files.
    """
    rows = read_csv(folder / "results.csv")
    drawing = _recorded_drawing(folder / "summary.json") or drawing or _bare_drawing(rows)
    return list(draw(rows, drawing, folder))


def _recorded_drawing(path: Path) -> Drawing | None:
    try:
        recorded = json.loads(path.read_bytes())["drawing"]
        panels = {letter: Panel(**panel) for letter, panel in recorded["panels"].items()}
        return Drawing(**{field.name: recorded[field.name] for field in fields(Drawing)} | {"panels": panels})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or foreign; remove it to draw from results.csv alone") from error


def _bare_drawing(rows: Sequence[Row]) -> Drawing:
    """What can be told from the rows and from which figure they are of: no rate that is not in them."""
    names = sorted({row.figure for row in rows})
    module = load(names[0]) if names and names[0] in FIGURES else None
    known: Mapping[str, Panel] = module.panels(module.PROTOCOL) if module else {}
    shown = sorted({row.panel for row in rows if not row.panel.startswith("find")}) or ["find"]
    axes = {panel: known.get(panel, Panel("")) for panel in shown}
    panels = {panel: Panel(_rate(rows, panel), axes[panel].x, axes[panel].y) for panel in shown}
    return Drawing(f"Figure {', '.join(names)}".strip(), panels, layers=getattr(module, "LAYERS", False))


def _rate(rows: Sequence[Row], panel: str) -> str:
    """The one rate that all rows of a panel share."""
    for name in ("lr_eval", "lr_find"):
        rates = {getattr(row, name) for row in rows if row.panel == panel}
        if len(rates) == 1 and (rate := rates.pop()) is not None:
            return f"{name.replace('lr', 'LR')} = {rate:g}"
    return ""


def terminal_summary(summary: Mapping[str, Any], folder: Path | None = None) -> str:
    """The run in plain text of at most 100 columns: accuracies, claims, cost, and where the files are."""
    blocks = [f"Figure {summary['figure']}, preset {summary['preset']}: {summary['drawing']['title']}"]
    for letter in summary["drawing"]["panels"]:
        blocks.append(panel_table(letter, summary["panels"].get(letter, []), summary["drawing"]))
    if summary["diverged"]:
        counted = "is left out" if summary["drawing"]["chance"] is None else "counts as chance"
        blocks.append(f"! marks diverged runs ({summary['diverged']} in all); a diverged run {counted}")
    if summary["dead"]:
        blocks.append(f"* marks runs in which a layer is pruned whole ({summary['dead']} in all)")
    if summary["claims"]:
        blocks.append(_claims(summary["claims"]))
    blocks.append(_cost(summary["cost"], summary["environment"]))
    if folder is not None:
        blocks.append(f"Files   {folder}/: figure.png, figure.pdf, results.csv, summary.json")
    if summary["real_command"] and not summary["cost"].get("failed"):
        blocks.append(f"{_MACHINERY}\n  {summary['real_command']}")
    return "\n\n".join(block for block in blocks if block)


def _panel(rows: Sequence[Row], panel: str, chance: float | None) -> list[dict[str, Any]]:
    """Per round: place on the x axis and, by series, mean and standard deviation over seeds, as in the rows."""
    table: dict[int, dict[str, Any]] = {}
    for name in series_of(rows, [panel]):
        for point in curve(rows, panel, name, chance):
            entry = table.setdefault(point.round, {"round": point.round, "x": point.x, "series": {}})
            entry["series"][name] = {
                "x": point.x,
                "mean": point.mean,
                "std": point.std,
                "runs": point.runs,
                "diverged": point.diverged,
                "dead": point.dead,
            }
    return [entry for _, entry in sorted(table.items())]


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    parts = [part for claim in claims for part in claim["parts"]]
    units = list(dict.fromkeys(part["unit"] for part in parts))
    lines = [f"Claims: left minus right in {' or '.join(units)}, 95 % interval over seeds"]
    width = max(len(part["text"]) for part in parts)
    # What holds of every part is said once.
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
        counts = [count_of(len(part["seeds"]), "seed"), count_of(len(part["rounds"]), place)]
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
    """Whether the interval, printed beside it, says as much."""
    return why.startswith("the interval") and ";" not in why


def _fill(text: str, head: str) -> str:
    """`text` after `head`, its further lines below its first."""
    return textwrap.fill(text, COLUMNS, initial_indent=head, subsequent_indent=" " * min(len(head), COLUMNS // 2))


def _cost(cost: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    parts = []
    if cost.get("nodes") is not None:
        parts.append(f"{cost['nodes']:,} nodes" + (f" ({cost['cached']:,} cached)" if cost.get("cached") else ""))
    if cost.get("epochs") is not None:
        parts.append(f"{cost['epochs']:,} epochs")
    if cost.get("images_per_s") is not None:
        parts.append(f"{cost['images_per_s']:,.0f} images/s")
    if cost.get("wall_s") is not None:
        parts.append(_time(cost["wall_s"]))
    where = [str(environment["device"])] if environment.get("device") else []
    if environment.get("threads") is not None:
        where.append(f"{count_of(environment['threads'], 'thread')} a process")
    versions = environment.get("versions") or {}
    where += [f"{name} {versions[name]}" for name in _SHOWN if name in versions]
    return "\n".join(
        _fill(", ".join(items), head) for head, items in (("Cost    ", parts), ("On      ", where)) if items
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _plain(value: Any) -> Any:
    """`value` as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"{value!r} has no place in summary.json")
