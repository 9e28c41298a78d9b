"""Lists a store: reads its nodes by key, from their node.json alone, and describes each in one line or one record."""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.console import duration, printable
from fastprune.errors import InputError
from fastprune.files import SUMS, digest, read_sums, tree_bytes
from fastprune.store.lease import read_holder
from fastprune.store.run_store import check_about, check_format

KEY = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Found:
    """A published node. about: its node.json, checked for the fields that every node has. size: bytes on disk."""

    key: str
    folder: Path
    about: dict[str, Any]
    size: int

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    @property
    def spec(self) -> dict[str, Any]:
        return self.about["spec"]

    @property
    def result(self) -> dict[str, Any]:
        return self.about["result"]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.about["provenance"]


@dataclass(frozen=True)
class Corrupt:
    """A node that cannot be read, and why."""

    key: str
    folder: Path
    why: str


def existing_store(root: Path) -> None:
    """InputError unless there is a store of this format at `root`."""
    check_format(root)
    if not (root / "store.json").is_file():
        if any(root.glob("*/summary.json")):
            raise InputError(
                f"{root} holds results, which --out names, and no store: give the folder of their runs as --store DIR"
            )
        raise InputError(f"no store at {root}; name its folder with --store DIR")


def node_folders(root: Path) -> Iterator[Path]:
    """The folders of all nodes, by key, published or not."""
    nodes = root / "nodes"
    for short in sorted(os.listdir(nodes)) if nodes.is_dir() else ():
        if (nodes / short).is_dir():
            yield from (nodes / short / key for key in sorted(os.listdir(nodes / short)) if KEY.fullmatch(key))


def node_folder(root: Path, key: str) -> Path:
    return root / "nodes" / key[:2] / key


def is_published(root: Path, key: str) -> bool:
    return (node_folder(root, key) / "node.json").exists()


def read_json(path: Path) -> Any:
    """The parsed file. OSError if it cannot be read, ValueError if it is not JSON or is nested too deeply."""
    try:
        return json.loads(path.read_bytes())  # bytes: text that is not UTF-8 is a ValueError, too
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_node(folder: Path) -> Found | Corrupt:
    """A node as its node.json describes it, or why that cannot be read. Checks no checksum."""
    # A store may hold terabytes, and ls reads every node: hashing files is left to verify.
    try:
        about = read_json(folder / "node.json")
        check_about(about, folder.name)
        size = tree_bytes(folder)
    except FileNotFoundError as error:
        return Corrupt(folder.name, folder, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError) as error:
        return Corrupt(folder.name, folder, f"node.json: {' '.join(str(error).split())}")
    return Found(folder.name, folder, about, size)


def read_all(root: Path) -> Iterator[Found | Corrupt]:
    """All nodes, by key."""
    return map(read_node, node_folders(root))


def keys_in(spec: Any) -> set[str]:
    """All keys in a spec: of parents, and of initial weights, which are never stored."""
    # By the form of a key, not by field: a new kind of node needs no change here.
    keys, left = set(), [spec]
    while left:
        part = left.pop()
        if isinstance(part, str) and KEY.fullmatch(part):
            keys.add(part)
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list):
            left += part
    return keys


_COLUMNS = ("key", "kind", "what", "result", "cost", "device", "size", "date")


class Listing:
    """All nodes of a store, with what a node's record takes from other nodes: round, density, criterion of its mask."""

    def __init__(self, root: Path) -> None:
        self.nodes = list(read_all(root))
        self.by_key = {n.key: n for n in self.nodes if isinstance(n, Found)}

    def record(self, node: Found | Corrupt) -> dict[str, Any]:
        """A node as plain values: seconds, bytes, Unix time. {"key", "corrupt": why} if it cannot be read."""
        if isinstance(node, Corrupt):
            return {"key": node.key, "corrupt": node.why}
        try:
            what = {"train": self._train, "prune": self._prune, "channels": self._channels}[node.kind](node)
            made = node.provenance
            how = {name: _number(made.get(name)) for name in ("wall_seconds", "images_per_second", "at")}
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
            # A damaged or foreign node is one line of ls; the others must still be listed.
            return {"key": node.key, "corrupt": "node.json: fields are missing or have the wrong type"}
        return {
            "key": node.key,
            "kind": node.kind,
            **what,
            "seconds": how["wall_seconds"],
            "images_per_second": how["images_per_second"],
            "device": str(made.get("device", "")),
            "bytes": node.size,
            "at": how["at"],
        }

    def _train(self, node: Found) -> dict[str, Any]:
        spec, result = node.spec, node.result
        rewound = isinstance(spec["start"], dict)
        round, density, removed = self._mask(spec["mask"])
        return {
            "network": str(node.about["about"]["network"]),
            "data": str(node.about["about"]["data"]),
            "classes": spec["data"]["classes"],
            "lr": float(spec["schedule"]["lr"]),
            "seed": spec["seed"],
            "begin": spec["start"]["epoch"] if rewound else 0,
            "stop": spec["stop"],
            "round": round,
            "density": density,
            "filters_removed": removed,
            "mask_of": self._source(spec["mask"]),
            "epochs": result["epochs"],
            "diverged": bool(result["diverged"]),
            "accuracy": _number(result["accuracy"]),
        }

    def _mask(self, key: str | None) -> tuple[int | None, float | None, float | None]:
        """(round, density, fraction of filters removed) of a training, None for what its mask does not tell."""
        if key is None:
            return 0, 1.0, None
        # A mask may be missing: an unneeded one is removed by gc, and merge takes nodes without their parents.
        try:
            mask = self.by_key[key]
            if mask.kind == "channels":
                return None, None, float(mask.spec["fraction"])
            return int(mask.result["round"]), float(mask.result["density"]), None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None, None, None

    def _source(self, key: str | None) -> str | None:
        """The criterion of a prune step, or for magnitude the learning rate of the run that was pruned; None if the
        nodes that tell it are missing."""
        if key is None or (prune := self.by_key.get(key)) is None or prune.kind != "prune":
            return None
        spec = prune.spec
        # Figures compare masks found at different learning rates: for magnitude the rate tells more than the name.
        if spec["criterion"] != "magnitude" or not isinstance(spec["source"], dict):
            return _criterion(spec["criterion"])
        run = self.by_key.get(spec["source"]["node"])
        if run is None:
            return None
        epoch = spec["source"]["epoch"]
        early = "" if epoch == run.spec["stop"] else f" after epoch {epoch}"
        return f"lr {float(run.spec['schedule']['lr']):g}{early}"

    def _prune(self, node: Found) -> dict[str, Any]:
        spec, result = node.spec, node.result
        allocation = spec["allocation"]
        return {
            "round": result["round"],
            "criterion": _criterion(spec["criterion"]),
            "allocation": allocation if isinstance(allocation, str) else f"as {allocation['mask'][:8]}",
            "fraction": float(spec["fraction"]),
            "seed": spec["seed"],
            "mask_of": self._source(node.key),
            "density": float(result["density"]),
        }

    def _channels(self, node: Found) -> dict[str, Any]:
        return {"fraction": float(node.spec["fraction"]), "removed": _number(node.result.get("removed_fraction"))}


def _criterion(spec: Any) -> str:
    """The name of a built-in criterion; name and version of a user's."""
    return spec if isinstance(spec, str) else f"{spec['name']} v{spec['version']}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def table(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table with a head; a line that says why for each corrupt node, below."""
    records = list(records)
    # printable: the text of a merged node comes from elsewhere, and may hold control sequences of a terminal.
    rows = [_COLUMNS, *(tuple(map(printable, _row(r))) for r in records if "corrupt" not in r)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for r in records:
        if "corrupt" in r:
            yield f"{r['key'][:8]}  CORRUPT: {printable(r['corrupt'])} (see verify)"


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    if r["kind"] == "train":
        mask = f"round {r['round']}" if r["round"] is not None else "mask unknown"
        if r["filters_removed"] is not None:
            mask = f"{r['filters_removed']:.0%} of filters removed"
        what = f"{r['network']}, {r['data']} ({r['classes']} classes), lr {r['lr']:g}, seed {r['seed']}, "
        found = "" if r["mask_of"] is None else f" by {r['mask_of']}"
        what += f"epochs {r['begin']}-{r['stop']}, {mask}{found}"
        result = "diverged" if r["diverged"] else "" if r["accuracy"] is None else f"{100 * r['accuracy']:.2f} %"
        if r["density"] is not None:
            result += f", density {r['density']:.3g}"
    elif r["kind"] == "prune":
        found = "" if r["mask_of"] in (None, r["criterion"]) else f" of {r['mask_of']}"
        what = f"round {r['round']}, {r['criterion']}{found}, {r['allocation']}, "
        what += f"fraction {r['fraction']:g}, seed {r['seed']}"
        result = f"density {r['density']:.3g}"
    else:
        what = f"{r['fraction']:.0%} of filters"
        result = "" if r["removed"] is None else f"{r['removed']:.0%} removed"
    rate = "" if r["images_per_second"] is None else f", {r['images_per_second']:,.0f} images/s"
    cost = "" if r["seconds"] is None else duration(r["seconds"]) + rate
    return (r["key"][:8], r["kind"], what, result, cost, r["device"], size(r["bytes"]), date(r["at"]))


def computed(made: dict[str, Any], what: str = "compute") -> str:
    """How a training was computed: "sparse", or "dense and sparse" if its parts differ; "" if that is not recorded.

    made: its provenance. what: the entry of it, "compute" or "gpu_options".
    """
    # Nothing checks the fields of provenance: a foreign node may hold anything.
    parts = made.get("parts")
    entries = [made, *(parts if isinstance(parts, list) else [])]
    ways = [entry.get(what) for entry in entries if isinstance(entry, dict)]
    return " and ".join(sorted({way for way in ways if isinstance(way, str)}))


def totals(records: list[dict[str, Any]], disk: int) -> str:
    """One line: nodes by kind, bytes, computing time. disk: bytes of all files in the store."""
    complete = [r for r in records if "corrupt" not in r]
    counts = {kind: sum(r["kind"] == kind for r in complete) for kind in ("train", "prune", "channels")}
    seconds = sum(r["seconds"] or 0.0 for r in complete)
    said = f"{counts['train']:,} trainings, {counts['prune']:,} prunes"
    if counts["channels"]:
        said += f", {counts['channels']:,} channel selections"
    if len(complete) < len(records):
        said += f", {len(records) - len(complete):,} corrupt"
    return f"{said}; {size(disk)} on disk; {duration(seconds)} of computing time"


def going_on(root: Path) -> list[str]:
    """One line for each lease with its process, each checkpoint of an unfinished run, and each log of a failed node."""
    said = []
    for path in sorted((root / "leases").iterdir()):
        if KEY.fullmatch(path.name):
            holder = read_holder(path)
            by = "a process" if holder is None else f"{holder}, {_since(holder.since)}"
            # On another machine a dead holder cannot be told from a living one: the line only gives its age.
            by += ", which died" if holder is not None and holder.has_died else ""
            said.append(f"lease {path.name[:8]}: {by}")
    for path in sorted((root / "partial").glob("*.checkpoint.safetensors")):
        found = _stat(path)
        if found is not None:
            said.append(f"unfinished {path.name[:8]}: checkpoint of {size(found.st_size)}, {_since(found.st_mtime)}")
    for path in sorted((root / "logs").glob("*.log")):
        later = ", published since" if is_published(root, path.stem) else ""
        said.append(f"failed {path.stem[:8]}: {_first_line(path)}: {path}{later}")
    return said


def _first_line(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.readline(200).strip()
    except OSError as error:
        return error.strerror or ""


def size(count: float) -> str:
    """Bytes, in units of 1000, with two or three digits."""
    # 999.5 rounds to 1000, and 99.95 to 100.0: each limit is where rounding would add a digit.
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def date(at: float | None) -> str:
    """Unix time as local date and time; "" for None, "?" for no valid time."""
    # Another machine's node.json may hold any number.
    try:
        return "" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    except (OverflowError, OSError, ValueError):
        return "?"


def _since(at: float) -> str:
    return f"since {date(at)}"


def _stat(path: Path) -> os.stat_result | None:
    """None if the file is gone: ls holds no lease, and runs publish and remove files while it reads."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def find_node(root: Path, prefix: str) -> Found | Corrupt:
    """The published node whose key, alone, begins with `prefix`. InputError if there is none, or several."""
    existing_store(root)
    return _only(_starting(root, prefix), prefix)


def _starting(root: Path, prefix: str) -> list[Path]:
    return [folder for folder in node_folders(root) if folder.name.startswith(prefix.lower())]


def _only(found: list[Path], prefix: str) -> Found | Corrupt:
    if len(found) != 1:
        several = f": {', '.join(f.name[:12] for f in found[:4])}{', ...' if len(found) > 4 else ''}" if found else ""
        count = f"{len(found):,} nodes have" if found else "no node has"
        raise InputError(f"{count} a key that begins with {prefix!r}{several}; see ls")
    return read_node(found[0])


def show(root: Path, prefix: str) -> tuple[list[str], bool]:
    """(lines on a node, or on the leftovers of an unpublished one; whether its files match their checksums).

    prefix: the beginning of its key and of no other. InputError if no key or several begin with it.
    """
    found = _starting(root, prefix)
    if not found and (unpublished := _unpublished(root, prefix.lower())) is not None:
        return unpublished, True
    node = _only(found, prefix)
    if isinstance(node, Corrupt):
        return [
            f"{node.folder}: {node.why}; delete this folder to recompute the node",
            "",
            "files",
            *_files(node)[0],
        ], False
    said = [f"{node.kind} {node.key}", str(node.folder), ""]
    for part in ("about", "spec", "result", "provenance"):
        said += [part, *_tree(node.about[part]), ""]
    at = node.provenance.get("at")
    if isinstance(at, int | float):
        said[-1:] = [f"  made on {date(at)}", ""]
    files, complete = _files(node)
    return [*said, "files", *files, "", *_neighbours(root, node)], complete


def _unpublished(root: Path, prefix: str) -> list[str] | None:
    """Lines on a node that failed or is not finished: its lease, checkpoints and log; None if no such node has this
    prefix."""
    names = [name for folder in ("leases", "partial", "logs") for name in os.listdir(root / folder)]
    keys = {name[:32] for name in names if KEY.fullmatch(name[:32]) and name.startswith(prefix)}
    if len(keys) != 1:
        return None
    key = keys.pop()
    said = [f"{key}: not published", *(line for line in going_on(root) if line.split()[1].startswith(key[:8]))]
    for path in sorted((root / "partial").glob(f"{key}.*")):
        said.append(f"  {path}")
    # The log of an exception may quote text of a user's module or data: printable removes control sequences.
    log = root / "logs" / f"{key}.log"
    if log.exists():
        said += ["", *(f"  {printable(line)}" for line in log.read_text(errors="replace").splitlines())]
    return said


def _tree(content: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield indent + printable(name)
            yield from _tree(value, indent + "  ")
        else:
            yield indent + printable(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")


def _files(node: Found | Corrupt) -> tuple[list[str], bool]:
    """(one line for each file, whether all files match their checksums)."""
    said, complete = [], True
    try:
        sums = read_sums(node.folder)
    except (OSError, ValueError) as error:
        sums, complete = {}, False
        said.append(f"  {SUMS}: {error.strerror if isinstance(error, OSError) else error}")
    for name in sorted({*sums, *os.listdir(node.folder)} - {SUMS}):
        path = node.folder / name
        try:
            state = f"not in {SUMS}" if name not in sums else "ok" if digest(path) == sums[name] else "CORRUPT"
            said.append(f"  {name}  {size(path.stat().st_size)}  {state}")
        except OSError as error:
            state = "missing"
            said.append(f"  {name}  {error.strerror}")
        complete &= state == "ok"
    return said, complete


def _neighbours(root: Path, node: Found) -> Iterator[str]:
    """Lines on a node's published parents and children."""
    # No file names a node's children, as published nodes never change: all other nodes are searched for its key.
    parents, text = keys_in(node.spec), node.key.encode()
    for title, keys in (
        ("depends on", sorted(k for k in parents if is_published(root, k))),
        ("needed by", [f.name for f in node_folders(root) if f != node.folder and _names(f, text, node.key)]),
    ):
        yield title
        for key in keys:
            other = read_node(node_folder(root, key))
            yield f"  {key} {other.kind if isinstance(other, Found) else 'corrupt'}"
        if not keys:
            yield "  nothing"


def _names(folder: Path, text: bytes, key: str) -> bool:
    try:
        if text not in (folder / "node.json").read_bytes():  # rules out most nodes without parsing them
            return False
    except OSError:
        return False
    other = read_node(folder)
    return isinstance(other, Found) and key in keys_in(other.spec)
