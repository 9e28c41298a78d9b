"""The numbers behind a figure: one row a trained network, in results.csv.

The file is written in a fixed order with exact floats, so a run that was interrupted and resumed leaves the same bytes.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from fastprune.errors import InputError
from fastprune.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One network of one seed, as a point (x, y) of a series in a panel.

    What x and y are says the panel (axes.py): in figures over density, x is the fraction of conv weights remaining and
    y the top-1 accuracy as a fraction. `round` is the prune round, 0 the dense network; over epochs it is the epoch, in
    structured pruning the index of the sparsity. y is None exactly when training diverged. A learning rate is None
    where the series has none (the random baseline has no `lr_find`). `dead` is the number of layers whose weights are
    all pruned. `node` is the key of the run in the store.
    Raises ValueError for values that no run can have, NaN and infinity among them.
    """

    figure: str
    panel: str
    series: str
    seed: int
    round: int
    x: float
    y: float | None
    lr_find: float | None
    lr_eval: float | None
    diverged: bool
    dead: int
    node: str

    def __post_init__(self) -> None:
        for name in ("figure", "panel", "series", "node"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.isprintable() or (not text and name != "node"):
                raise ValueError(f"{name} {text!r} is not a printable name")
        for name in ("seed", "round", "dead"):
            number = getattr(self, name)
            if type(number) is not int or number < 0:
                raise ValueError(f"{name} {number!r} is not a whole number >= 0")
        for name in ("x", "y", "lr_find", "lr_eval"):
            number = getattr(self, name)
            if number is None and name != "x":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{name} {number!r} is not a finite number")
        if type(self.diverged) is not bool or self.diverged != (self.y is None):
            raise ValueError(f"y {self.y!r} and diverged {self.diverged!r} disagree: y is None exactly when diverged")


COLUMNS = tuple(field.name for field in fields(Row))


def natural_key(name: str) -> tuple[bool, float, str]:
    """Sort key that puts numbers first, by value, then words: "0.05", "0.2", "110", "random"."""
    try:
        value = float(name)
    except ValueError:
        value = math.nan
    return (False, value, name) if math.isfinite(value) else (True, 0.0, name)


def depth_key(layer: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts a ResNet's layers in the order of the network: "conv1", "layer1.0.conv1", ..., a block's
    shortcut after its convs."""
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in layer.split("."))


def _order(row: Row) -> tuple[object, ...]:
    return (row.figure, row.panel, natural_key(row.series), row.seed, row.round, float(row.x))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` to `path` at one stroke. The same rows, in any order, give the same bytes.

    Raises ValueError for two rows at the same point, InputError when `path` cannot be written.
    """
    ordered = sorted(rows, key=_order)
    for first, second in pairwise(ordered):
        if _order(first) == _order(second):
            raise ValueError(f"two results for the same point: {first} and {second}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in ordered:
        writer.writerow([_to_text(name, value) for name, value in zip(COLUMNS, astuple(row), strict=True)])
    write_atomic(path, text.getvalue().encode())


def _to_text(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in ("x", "y", "lr_find", "lr_eval"):
        return repr(float(value))  # type: ignore[arg-type]
    return str(int(value)) if isinstance(value, bool) else str(value)


def read_csv(path: Path) -> list[Row]:
    """Rows of a file that `write_csv` left. Raises InputError for a missing, foreign or damaged file."""
    hint = "run the figure again to write a new one"
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: it is not text; {hint}") from error
    # An editor on another system may have turned the line ends.
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0] != ",".join(COLUMNS):
        raise InputError(f"{path} is not a results.csv of fastprune: its first line is not the expected one; {hint}")
    if lines.pop():
        raise InputError(f"{path} is damaged: it ends within a line; {hint}")
    rows, seen = [], set()
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = _parse(line)
        except (ValueError, csv.Error) as error:
            raise InputError(f"{path} is damaged in line {number}: {' '.join(str(error).split())}; {hint}") from error
        if _order(row) in seen:
            raise InputError(f"{path} is damaged: line {number} repeats an earlier point; {hint}")
        seen.add(_order(row))
        rows.append(row)
    return rows


def _parse(line: str) -> Row:
    values = next(csv.reader([line], strict=True), [])
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} columns instead of {len(COLUMNS)}")
    figure, panel, series, seed, round_, x, y, lr_find, lr_eval, diverged, dead, node = values
    if diverged not in ("0", "1"):
        raise ValueError(f"diverged {diverged!r} is neither 0 nor 1")
    return Row(
        figure,
        panel,
        series,
        int(seed),
        int(round_),
        float(x),
        float(y) if y else None,
        float(lr_find) if lr_find else None,
        float(lr_eval) if lr_eval else None,
        diverged == "1",
        int(dead),
        node,
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, never meets half a file. Makes missing folders.

    Raises InputError, one line, when the folder is read-only, full or no folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: p.write_bytes(content))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another folder or free some space") from error


@dataclass(frozen=True)
class CurvePoint:
    """A series at one round, over seeds. Values are as in the rows.

    `mean` is None when no run counts, `std` (sample standard deviation) when fewer than two do. dead: runs with a layer
    that is pruned whole.
    """

    round: int
    x: float
    mean: float | None
    std: float | None
    runs: int
    diverged: int
    dead: int


def curve(rows: Iterable[Row], panel: str, series: str, chance: float | None) -> list[CurvePoint]:
    """The points of one series by round. A diverged run counts as `chance`; without a `chance` it is left out."""
    rounds: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row.panel == panel and row.series == series:
            rounds[row.round].append(row)
    points = []
    for number, group in sorted(rounds.items()):
        values = [chance if row.y is None else row.y for row in sorted(group, key=lambda row: row.seed)]
        known = [value for value in values if value is not None]
        points.append(
            CurvePoint(
                round=number,
                x=fmean(row.x for row in group),
                mean=fmean(known) if known else None,
                std=stdev(known) if len(known) > 1 else None,
                runs=len(group),
                diverged=sum(row.diverged for row in group),
                dead=sum(row.dead > 0 for row in group),
            )
        )
    return points


def series_of(rows: Iterable[Row], panels: Iterable[str] | None = None) -> list[str]:
    """Names of the series in `panels` (all of them by default), numbers first, by value."""
    wanted = None if panels is None else set(panels)
    return sorted({row.series for row in rows if wanted is None or row.panel in wanted}, key=natural_key)
