"""Takes a store elsewhere as one tar, and merges the nodes of another store, or of such a tar, into this one.

Nothing that comes from elsewhere is trusted: a tar is unpacked by tarfile's "data" filter, each node is verified before
it is adopted, and nothing that is read is run.
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from fastprune.console import progress_bar
from fastprune.errors import InputError
from fastprune.files import SUMS, flush, read_sums, sums_text, write_atomically
from fastprune.store.lease import Leases
from fastprune.store.listing import Found, existing_store, is_published, node_folder, node_folders, read_node
from fastprune.store.needs import RECORD_NAME, Needs, named, read_needs
from fastprune.store.run_store import FORMAT, RunStore, gain
from fastprune.store.verify import check_node, line

_STATES = ("state-", "momentum-")

_PROVENANCE = {"node.json", "times.csv", SUMS}
"""Files that differ between machines that compute the same. The result in node.json does not."""


class CorruptError(Exception):
    """A node of the own store is not as it was written: one line, with what to do."""


def export(root: Path, target: Path, figures: list[str], *, states: bool = True) -> tuple[int, int]:
    """Writes a tar of the published nodes, or of those that the `figures` named need; returns how many, of how many.

    The same content gives the same bytes. states: with weights and momentum. CorruptError if a file is not as it was
    written, and InputError if a figure is not recorded; then there is no file, or still the one there was.
    """
    needs = named(read_needs(root), figures) if figures else read_needs(root)
    if figures:
        keys = sorted(frozenset().union(*(n.nodes for n in needs)))
        present = [node_folder(root, key) for key in keys if is_published(root, key)]
    else:
        present = list(node_folders(root))
        keys = [folder.name for folder in present]
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file")
    if not target.resolve().parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}")

    def write(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            _add(archive, "store.json", json.dumps({"format": FORMAT}).encode() + b"\n")
            for record in sorted({n.path for n in needs}):
                _add(archive, f"figures/{record.name}", record.read_bytes())
            with progress_bar("export", len(present), " nodes", present) as bar:
                for folder in bar:
                    _add_node(archive, folder, states)

    write_atomically(target, write)
    return len(present), len(keys)


def _add_node(archive: tarfile.TarFile, folder: Path, states: bool) -> None:
    within = f"nodes/{folder.name[:2]}/{folder.name}"
    try:
        sums = read_sums(folder)
        if not states:
            sums = {name: d for name, d in sums.items() if not name.startswith(_STATES)}
        if "node.json" not in sums:
            raise ValueError(f"node.json is not in {SUMS}")
        _add(archive, f"{within}/{SUMS}", sums_text(sums).encode())
        for name, expected in sorted(sums.items()):
            with (folder / name).open("rb") as file:
                reader = _Hashing(file)
                _add_stream(archive, f"{within}/{name}", os.fstat(file.fileno()).st_size, reader)
            if reader.sum.hexdigest() != expected:
                raise ValueError(f"{name}: its checksum is not that in {SUMS}")
    except FileNotFoundError as error:
        raise CorruptError(f"{folder}: {Path(error.filename).name} is missing; see verify") from None
    except ValueError as error:
        raise CorruptError(f"{folder}: {line(error)}; see verify") from None


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sum = file, hashlib.sha256()

    def read(self, count: int) -> bytes:
        part = self._file.read(count)
        self.sum.update(part)
        return part


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    _add_stream(archive, name, len(content), io.BytesIO(content))


def _add_stream(archive: tarfile.TarFile, name: str, size: int, content: Any) -> None:
    info = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: the same everywhere
    info.size = size
    archive.addfile(info, content)


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """The folder of a store, or of a tar that export wrote, unpacked into a temporary folder (see TMPDIR).

    InputError for what is neither, or of another format.
    """
    if source.is_dir():
        existing_store(source)
        yield source
        return
    if not source.is_file():
        raise InputError(f"{source}: neither a folder nor a file")
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"{source}: to unpack it safely takes Python 3.11.4 or newer")
    with tempfile.TemporaryDirectory(prefix="fastprune-") as folder:
        try:
            with source.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                archive.extractall(folder, filter="data")
                file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
                if any(file.read()):  # tarfile takes one that was cut between two files for complete
                    raise ValueError("it has no end")
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{source}: not a complete tar that export wrote ({line(error)})") from error
        try:
            existing_store(Path(folder))
        except InputError as error:
            why = str(error).partition(";")[0].replace(folder, "in it")
            raise InputError(f"{source}: {why}") from None
        yield Path(folder)


@dataclass
class Merged:
    """What became of the nodes of another store, by key. conflicts, corrupt, busy: a line each; a conflict is another
    result for the same node, and ours is kept. records: how many figures are newly recorded."""

    new: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    gained: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    records: int = 0


def merge(root: Path, source: Path) -> Merged:
    """Adopts the nodes of a store's folder, or of a tar that export wrote, that this store lacks; the first published
    wins. Each is verified before, and what is corrupt is left out."""
    merged = Merged()
    with opened(source) as folder:
        if root.exists() and root.samefile(folder):
            raise InputError(f"{source} is this very store")
        store = RunStore(root)
        with Leases(root / "leases") as leases:
            nodes = list(node_folders(folder))
            with progress_bar("merge", len(nodes), " nodes", nodes) as bar:
                for theirs in bar:
                    mine, holder = leases.acquire(theirs.name)
                    if not mine:
                        merged.busy.append(f"{theirs.name}, which {holder or 'a process'} computes; merge again later")
                        continue
                    try:
                        _merge_node(store, theirs, merged)
                    finally:
                        leases.release(theirs.name)
        for record in sorted((folder / "figures").glob("*.json")):
            _merge_record(store, record, merged)
    return merged


def _merge_node(store: RunStore, theirs: Path, merged: Merged) -> None:
    key, ours = theirs.name, node_folder(store.root, theirs.name)
    corrupt = {} if theirs.is_symlink() else check_node(theirs, key)[1]
    if theirs.is_symlink() or corrupt:
        why = "; ".join(f"{name}: {why}" for name, why in sorted(corrupt.items())) or "a link"
        merged.corrupt.append(f"{key}: {why}")
        return
    if not is_published(store.root, key):
        aside = store.aside(key)
        try:
            for name in (*read_sums(theirs), SUMS):
                shutil.copyfile(theirs / name, aside / name)
                flush(aside / name)
            if store.adopt(aside, ours):
                merged.new.append(key)
                return
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _compare(theirs, ours, merged)


def _compare(theirs: Path, ours: Path, merged: Merged) -> None:
    """Ours stays as it is, but for files that it lacks."""
    their_node, our_node = read_node(theirs), read_node(ours)
    try:
        if not isinstance(our_node, Found) or not isinstance(their_node, Found):
            raise ValueError("node.json cannot be read")
        our_sums, their_sums = read_sums(ours), read_sums(theirs)
    except (OSError, ValueError) as error:
        merged.corrupt.append(f"{ours.name}: ours ({line(error)}; see verify)")
        return
    both = their_sums.keys() & our_sums.keys() - _PROVENANCE
    differ = sorted(name for name in both if their_sums[name] != our_sums[name])
    if not differ and their_node.result != our_node.result:
        differ = ["node.json"]
    if differ:
        by = f"ours by {_by(our_node)}, theirs by {_by(their_node)}"
        merged.conflicts.append(f"{ours.name}: {', '.join(differ)} differs ({by}); ours is kept")
        return
    missing = sorted(their_sums.keys() - our_sums.keys() - _PROVENANCE)
    if missing:
        gain(ours, our_sums, {name: partial(shutil.copyfile, theirs / name) for name in missing})
        merged.gained.append(ours.name)
    else:
        merged.same.append(ours.name)


def _by(node: Found) -> str:
    """What computed a node."""
    made = node.provenance
    versions = made.get("versions")
    torch = f", torch {versions['torch']}" if isinstance(versions, dict) and "torch" in versions else ""
    return f"{made.get('host', 'an unknown host')} on {made.get('device', 'an unknown device')}{torch}"


def _merge_record(store: RunStore, record: Path, merged: Merged) -> None:
    path = store.root / "figures" / record.name
    if path.exists() or not RECORD_NAME.fullmatch(record.name):
        return
    content = record.read_bytes()
    try:
        Needs.of(path, json.loads(content))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        merged.corrupt.append(f"{record.name}: no record of a figure")
        return
    write_atomically(path, lambda p: p.write_bytes(content))
    merged.records += 1
