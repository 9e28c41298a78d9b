"""Verifies a store: compares each file with its checksum and reads its content. Deletes corrupt nodes on request; the
next run computes them again. Executes no content."""

import csv
import os
import re
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprune.console import progress_bar
from fastprune.files import SUMS, check_sealed, digest, read_sums
from fastprune.specs import key_of
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.store.listing import KEY, node_folder, read_json
from fastprune.store.run_store import check_about

_NUMBER = "[0-9]{1,9}"

FILE_NAME = re.compile(
    "node[.]json|SHA256SUMS|(metrics|times|layers|ratios-[0-9][0-9.e-]{0,31})[.]csv|channels[.]json|"
    f"(mask|(state|momentum)-{_NUMBER})[.]safetensors"
)
"""The names that a node's file may have. A name from another store becomes part of a path here."""

_PARTIAL_NAME = re.compile(rf"([0-9a-f]{{32}})[.](checkpoint|(state|momentum)-{_NUMBER})[.]safetensors")

_LARGE = 1 << 20  # bytes: SHA-256 of a file of this size takes longer than handing it to a thread

UNLISTED = f"not in {SUMS}"

_WRONG = f"its checksum is not that in {SUMS}"

_NEEDED = {"train": {"metrics.csv"}, "prune": {"mask.safetensors", "layers.csv"}, "channels": {"channels.json"}}


@dataclass
class Checked:
    """The result of a verification.

    corrupt: why, by path. nodes: keys of corrupt nodes. stray: paths below nodes/ where no node is. partials: corrupt
    files of unfinished runs.
    """

    node_count: int = 0
    file_count: int = 0
    corrupt: dict[Path, str] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    stray: list[Path] = field(default_factory=list)
    partials: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.node_count:,} nodes, {self.file_count:,} files, {len(self.corrupt):,} corrupt"


def check_store(root: Path) -> Checked:
    """Reads all files of all nodes and of unfinished runs, with a progress bar on stderr."""
    found = Checked()
    folders, stray = _folders(root)
    for path in stray:
        found.corrupt[path] = "not a node: a node's folder is nodes/XX/KEY"
        found.stray.append(path)
    # A name with a dot is a file that a run is writing at present, or a leftover for gc.
    partials = sorted(p for p in (root / "partial").glob("*") if not p.name.startswith("."))
    suspects = []
    with progress_bar("verify", len(folders), " nodes", _look_at(folders)) as bar:
        for folder, (count, corrupt) in bar:
            found.node_count += 1
            found.file_count += count
            if corrupt:
                suspects.append(folder)
    # Verify holds no lease, so that it may run beside a run: a suspect may have been gaining a file, or been removed.
    for folder in suspects:
        corrupt = _look(folder)[1] if folder.exists() else {}
        if (root / "leases" / folder.name).exists():  # its holder lists a new file only after it has appeared
            corrupt = {name: why for name, why in corrupt.items() if why != UNLISTED}
        if corrupt:
            found.corrupt |= {folder / name: why for name, why in corrupt.items()}
            found.nodes.add(folder.name)
    for path in partials:
        found.file_count += 1
        if (why := _partial(path)) is not None and path.exists():
            found.corrupt[path] = why
            found.partials.append(path)
    return found


def _folders(root: Path) -> tuple[list[Path], list[Path]]:
    """(folders at the place of a node, all other paths below nodes/)."""
    folders: list[Path] = []
    stray: list[Path] = []
    for short in sorted(_entries(root / "nodes"), key=lambda e: e.name):
        if not short.is_dir(follow_symlinks=False) or re.fullmatch("[0-9a-f]{2}", short.name) is None:
            stray.append(Path(short.path))
            continue
        for entry in sorted(_entries(Path(short.path)), key=lambda e: e.name):
            fits = entry.is_dir(follow_symlinks=False) and KEY.fullmatch(entry.name) and entry.name[:2] == short.name
            (folders if fits else stray).append(Path(entry.path))
    return folders, stray


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)


def _look_at(folders: list[Path]) -> Iterator[tuple[Path, tuple[int, dict[str, str]]]]:
    """check_node of each folder, in any order."""
    # Hashing a large file releases Python's lock, so threads run side by side; for small ones they would wait for it.
    large = [f for f in folders if any(_bytes(entry) > _LARGE for entry in _entries(f))]
    for folder in folders if not large else sorted({*folders} - {*large}):
        yield folder, _look(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from zip(large, pool.map(_look, large), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def _bytes(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # a temporary file that was renamed meanwhile
        return 0


def _look(folder: Path) -> tuple[int, dict[str, str]]:
    return check_node(folder, folder.name)


def check_node(folder: Path, key: str) -> tuple[int, dict[str, str]]:
    """(number of files, why by name of a corrupt file). key: of the node that `folder` should hold."""
    entries = {entry.name for entry in _entries(folder) if not entry.name.startswith(".")}
    corrupt: dict[str, str] = {}
    try:
        sums = read_sums(folder)
    except FileNotFoundError:
        return len(entries), {SUMS: "missing"}
    except (OSError, ValueError) as error:
        return len(entries), {SUMS: line(error)}
    for name in sorted((entries | sums.keys()) - {SUMS}):
        if name not in sums:
            corrupt[name] = UNLISTED
        elif name not in entries:
            corrupt[name] = "missing"
        elif (why := _file(folder / name, sums[name], key)) is not None:
            corrupt[name] = why
    if "node.json" not in sums:
        corrupt.setdefault("node.json", UNLISTED)
    elif "node.json" not in corrupt:
        needed = _NEEDED.get(read_json(folder / "node.json")["kind"], set())
        corrupt |= dict.fromkeys(needed - sums.keys(), UNLISTED)
    return len(entries), corrupt


def _file(path: Path, expected: str, key: str) -> str | None:
    """Why a node's file is corrupt, or None."""
    try:
        # A link or a pipe from another store could name any file of this machine, or block the reader.
        if not stat.S_ISREG(path.lstat().st_mode):
            return "not a regular file"
        if digest(path) != expected:
            return _WRONG
        if FILE_NAME.fullmatch(path.name) is None:
            return "not a name of a node's file"
        # A right checksum proves no right content: in another store both may be made up.
        check_content(path)
        if path.name == "node.json":
            _check_key(read_json(path), key)
    except (KeyError, TypeError, AttributeError):
        return "not written by fastprune"
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        return line(error)
    return None


def _check_key(about: Any, key: str) -> None:
    check_about(about, key)
    kind, spec = about["kind"], about["spec"]
    # key_of hashes kind and semantics beside the spec's fields: fields of these names would replace them.
    if {"kind", "semantics"} & spec.keys() or key_of(kind, about["semantics"], spec) != key:
        raise ValueError("its key is not the hash of its spec")


def check_content(path: Path) -> None:
    """Reads a file in the format of its name. ValueError, csv.Error, KeyError, TypeError or AttributeError if its
    content is not of that format."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            check_sealed(file)
    elif path.suffix == ".json":
        if not isinstance(read_json(path), dict):
            raise ValueError("it is not a JSON object")
    elif path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as text:
            rows = csv.reader(text, strict=True)
            # layers.csv has a row a layer; the others have a row an epoch, and figures rely on there being no gap.
            head, epochs, of_epochs = next(rows, []), [], path.name != "layers.csv"
            if of_epochs and (head[:1] != ["epoch"] or (path.name == "metrics.csv" and "val_accuracy" not in head)):
                raise ValueError(f"it has the columns {', '.join(head)[:80]}")
            for row in rows:
                if len(row) != len(head):
                    raise ValueError(f"line {rows.line_num} has {len(row)} fields, the first has {len(head)}")
                if of_epochs:
                    numbers = list(map(float, row))
                    epochs.append(numbers[0])
            if of_epochs and not _follow(epochs):
                raise ValueError("its epochs are not consecutive")


def _follow(epochs: list[float]) -> bool:
    """Whether the epochs are consecutive whole numbers, at least one."""
    return bool(epochs) and epochs[0].is_integer() and epochs == [epochs[0] + i for i in range(len(epochs))]


def _partial(path: Path) -> str | None:
    """Why a file of an unfinished run is corrupt, or None. Its checksum is within it."""
    if _PARTIAL_NAME.fullmatch(path.name) is None:
        return "not a name of an unfinished run's file"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return "not a regular file"
        check_content(path)
    except (KeyError, TypeError, AttributeError):
        return "not written by fastprune"
    except (OSError, ValueError, RecursionError) as error:
        return line(error)
    return None


def line(error: Exception) -> str:
    """An error in one line, without the path, which the caller prints."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def remedy(root: Path, path: Path, why: str) -> str:
    """The action to advise for a corrupt file."""
    # Deleting one listed file would leave the node corrupt; an unlisted one is no part of it.
    inside = path.relative_to(root).parts
    if inside[0] == "nodes" and len(inside) == 4 and why != UNLISTED:
        return f"delete the folder {path.parent} to recompute the node"
    return f"delete {path}"


def delete_corrupt(store: RunStore, found: Checked) -> list[str]:
    """Deletes corrupt nodes, corrupt files of unfinished runs and strays; returns a line for each. Leaves alone what
    belongs to a node that a process computes."""
    said = []
    by_key: dict[str, list[Path]] = {key: [] for key in sorted(found.nodes)}
    for path in found.partials:
        by_key.setdefault(path.name[:32], []).append(path)
    with Leases(store.root / "leases") as leases:
        for key, partials in by_key.items():
            keyed = KEY.fullmatch(key) is not None
            mine, holder = leases.acquire(key) if keyed else (True, None)
            if not mine:
                said.append(f"left alone: {key} is being computed by {holder or 'a process'}")
                continue
            if key in found.nodes:
                said += _delete_node(store, node_folder(store.root, key))
            said += [_delete(path) for path in partials]
            if keyed:
                leases.release(key)
    return said + [_delete(path) for path in found.stray]


def _delete_node(store: RunStore, folder: Path) -> list[str]:
    """Deletes a node's folder, or only its unlisted files if nothing else is wrong."""
    # Checked again under the lease: since it was found, another process may have replaced the node.
    corrupt = check_node(folder, folder.name)[1] if folder.exists() else {}
    if not corrupt:
        return []
    if set(corrupt.values()) == {UNLISTED} and "node.json" not in corrupt:
        return [_delete(folder / name) for name in corrupt]
    store.remove(folder)
    return [f"deleted {folder}"]


def _delete(path: Path) -> str:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return f"deleted {path}"
