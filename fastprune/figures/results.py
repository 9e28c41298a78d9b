"""results.csv: the numbers behind a figure, one row per trained network; and curves over seeds.

Rows are written in a fixed order with exact floats, so that an interrupted and resumed run leaves the same bytes.
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

    x, y: quantities that the panel names (axes.py). Over density, x is the fraction of conv weights remaining and y the
    top-1 accuracy, a fraction. y is None exactly where training diverged. round: the prune round, 0 for the dense
    network; over epochs, the epoch; in structured pruning, the index of the sparsity. lr_find, lr_eval: None where the
    series has none, such as lr_find of the random baseline. dead: the number of layers whose weights are all pruned.
    node: the key of the run in the store. ValueError for values that no run can have, NaN and infinity included.
    """

    # Checked when it is made, because rows also come from a file that a user may have edited.

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
                raise ValueError(f"{name} {number!r} is not an integer >= 0")
        for name in ("x", "y", "lr_find", "lr_eval"):
            number = getattr(self, name)
            if number is None and name != "x":
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{name} {number!r} is not a finite number")
        # An accuracy that is missing for another reason must not look like a divergence.
        if type(self.diverged) is not bool or self.diverged != (self.y is None):
            raise ValueError(f"y {self.y!r} and diverged {self.diverged!r} disagree: y is None exactly when diverged")


COLUMNS = tuple(field.name for field in fields(Row))


def natural_key(name: str) -> tuple[bool, float, str]:
    """Sort key: numbers by value, then words, as in "0.05", "0.2", "110", "random"."""
    try:
        value = float(name)
    except ValueError:
        value = math.nan
    return (False, value, name) if math.isfinite(value) else (True, 0.0, name)


def depth_key(layer: str) -> tuple[tuple[int, str], ...]:
    """Sort key: the layers of a torchvision ResNet in forward order, a block's shortcut after its convs."""
    # Works on names alone, so that --redraw needs no model: "conv1" < "downsample", and "fc" is never pruned.
    return tuple((int(part), "") if part.isdecimal() else (0, part) for part in layer.split("."))


def _order(row: Row) -> tuple[object, ...]:
    return (row.figure, row.panel, natural_key(row.series), row.seed, row.round, float(row.x))


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes `rows` to `path` atomically. The same rows, in any order, give the same bytes.

    ValueError for two rows at the same point, InputError where `path` cannot be written.
    """
    # Workers finish in any order; the file must not depend on it.
    ordered = sorted(rows, key=_order)
    for first, second in pairwise(ordered):
        if _order(first) == _order(second):
            raise ValueError(f"two results for the same point: {first} and {second}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in ordered:
        writer.writerow([_to_text(name, value) for name, value in zip(COLUMNS, astuple(row), strict=True)])
    write_output(path, text.getvalue().encode())


def _to_text(name: str, value: object) -> str:
    if value is None:
        return ""
    if name in ("x", "y", "lr_find", "lr_eval"):
        # repr gives the shortest text that reads back as the same float64.
        return repr(float(value))  # type: ignore[arg-type]
    return str(int(value)) if isinstance(value, bool) else str(value)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that `write_csv` wrote. InputError for a missing, foreign or damaged file."""
    hint = "run the figure again to write a new one"
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: it is not text; {hint}") from error
    # A spreadsheet or an editor on Windows may have changed the line ends.
    lines = text.replace("\r\n", "\n").split("\n")
    if lines[0] != ",".join(COLUMNS):
        raise InputError(f"{path} is not a results.csv of fastprune: its first line is not the expected one; {hint}")
    # write_csv ends every line, so a file that does not end with one was cut.
    if lines.pop():
        raise InputError(f"{path} is damaged: its last line is incomplete; {hint}")
    rows, seen = [], set()
    # Line by line, so that an error can name the line; no field of ours contains a line break.
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


def write_output(path: Path, content: bytes) -> None:
    """Writes `content` to `path` atomically: no reader and no crash sees part of a file. Creates missing folders.

    InputError where the folder is read-only, full or not a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda p: p.write_bytes(content))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path}: {reason}; choose another folder or free some space") from error


@dataclass(frozen=True)
class CurvePoint:
    """One series at one round, over seeds, in the units of the rows.

    mean: None where no run counts. std, x_std: the sample standard deviations of y and of x; None for fewer than two
    runs. diverged, dead: the numbers of runs that diverged, and in which a layer is pruned whole.
    """

    round: int
    x: float
    mean: float | None
    std: float | None
    runs: int
    diverged: int
    dead: int
    x_std: float | None = None


def curve(rows: Iterable[Row], panel: str, series: str, chance: float | None) -> list[CurvePoint]:
    """The points of one series, by round. A diverged run counts as `chance`; it is left out where that is None."""
    rounds: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row.panel == panel and row.series == series:
            rounds[row.round].append(row)
    points = []
    for number, group in sorted(rounds.items()):
        # Sorted, because float sums depend on their order, and equal rows must draw equal pictures.
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
                x_std=stdev(sorted(row.x for row in group)) if len(group) > 1 else None,
            )
        )
    return points


def series_of(rows: Iterable[Row], panels: Iterable[str] | None = None) -> list[str]:
    """Names of the series in `panels` (None: in all), in natural order."""
    wanted = None if panels is None else set(panels)
    return sorted({row.series for row in rows if wanted is None or row.panel in wanted}, key=natural_key)
