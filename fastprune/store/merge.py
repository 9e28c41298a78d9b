"""Exports a store as one tar; merges the nodes of another store, or of such a tar, into a store.

A source is not trusted: tarfile's "data" filter unpacks a tar, each node is verified before it is adopted, and no
content is executed.
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
from fastprune.store.listing import Found, computed, existing_store, is_published, node_folder, node_folders, read_node
from fastprune.store.needs import RECORD_NAME, Needs, named, read_needs
from fastprune.store.run_store import FORMAT, RunStore, gain
from fastprune.store.verify import check_node, line

_STATES = ("state-", "momentum-")

_PROVENANCE = {"node.json", "times.csv", SUMS}
"""Files that may differ between machines that compute the same node. The result in node.json may not."""


class CorruptError(Exception):
    """A node of the exported store does not match its checksums: one line, with what to do."""


def export(root: Path, target: Path, figures: list[str], *, states: bool = True) -> tuple[int, int]:
    """Writes a tar of all published nodes, or of those that `figures` need; returns (nodes written, nodes needed).

    The same content gives the same bytes. states: include weights and momentum. CorruptError if a file does not match
    its checksum, InputError if a figure is not recorded or `target` cannot be a file; `target` is not changed then.
    """
    needs = named(read_needs(root), figures) if figures else read_needs(root)
    if figures:
        keys = sorted(frozenset().union(*(n.nodes for n in needs)))
        present = [node_folder(root, key) for key in keys if is_published(root, key)]
    else:
        present = list(node_folders(root))
        keys = [folder.name for folder in present]
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file")
    if not target.resolve().parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; create it first")

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
        if not states:  # the tar's list of checksums must not name files that it lacks
            sums = {name: d for name, d in sums.items() if not name.startswith(_STATES)}
        if "node.json" not in sums:
            raise ValueError(f"node.json is not in {SUMS}")
        _add(archive, f"{within}/{SUMS}", sums_text(sums).encode())
        for name, expected in sorted(sums.items()):
            with (folder / name).open("rb") as file:
                reader = _Hashing(file)  # states are large: they are read once, for the tar and the checksum
                _add_stream(archive, f"{within}/{name}", os.fstat(file.fileno()).st_size, reader)
            if reader.sum.hexdigest() != expected:
                raise ValueError(f"{name}: its checksum is not that in {SUMS}")
    except FileNotFoundError as error:
        raise CorruptError(f"{folder}: {Path(error.filename).name} is missing; see verify") from None
    except ValueError as error:
        raise CorruptError(f"{folder}: {line(error)}; see verify") from None


class _Hashing:
    """A file whose SHA-256 is computed while it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sum = file, hashlib.sha256()

    def read(self, count: int) -> bytes:
        part = self._file.read(count)
        self.sum.update(part)
        return part


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    _add_stream(archive, name, len(content), io.BytesIO(content))


def _add_stream(archive: tarfile.TarFile, name: str, size: int, content: Any) -> None:
    info = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: the same bytes on each machine
    info.size = size
    archive.addfile(info, content)


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """The folder of a store; a tar that export wrote is unpacked into a temporary folder (see TMPDIR), removed at exit.

    InputError if `source` is neither, or of another format.
    """
    if source.is_dir():
        existing_store(source)
        yield source
        return
    if not source.is_file():
        raise InputError(f"{source}: no such folder or file; name a store's folder or a tar that export wrote")
    if not hasattr(tarfile, "data_filter"):  # without it a member's name may lead out of the folder
        raise InputError(f"{source}: unpacking it safely requires Python 3.11.4 or newer")
    with tempfile.TemporaryDirectory(prefix="fastprune-") as folder:
        try:
            with source.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                archive.extractall(folder, filter="data")
                file.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
                # tarfile accepts a tar that was cut between two members; a complete one ends with two empty blocks.
                if any(file.read()):
                    raise ValueError("its end is missing")
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{source}: not a complete tar that export wrote ({line(error)})") from error
        try:
            existing_store(Path(folder))
        except InputError as error:
            why = str(error).partition(";")[0].replace(folder, "its root folder")
            raise InputError(f"{source}: {why}") from None
        yield Path(folder)


@dataclass
class Merged:
    """What merge did with each node of the source: keys, and for conflicts, corrupt and busy a line each.

    new: adopted. gained: this store's node got files that it lacked. conflicts: nodes with different results; ours is
    kept. busy: nodes that a process computes, left out. records: number of figures newly recorded.
    """

    new: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    gained: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    records: int = 0


def merge(root: Path, source: Path) -> Merged:
    """Adopts nodes that this store lacks from a store's folder or from a tar that export wrote.

    Verifies each node first, and leaves out corrupt ones. A published node of this store stays; it only gains files.
    """
    merged = Merged()
    with opened(source) as folder:
        if root.exists() and root.samefile(folder):
            raise InputError(f"{source} is the store itself; name another one")
        store = RunStore(root)
        with Leases(root / "leases") as leases:
            nodes = list(node_folders(folder))
            with progress_bar("merge", len(nodes), " nodes", nodes) as bar:
                for theirs in bar:
                    # A process that computes the node will publish its own, perhaps hours later: merge does not wait.
                    mine, holder = leases.acquire(theirs.name)
                    if not mine:
                        merged.busy.append(
                            f"{theirs.name} is being computed by {holder or 'a process'}; merge again later"
                        )
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
    # A link could point at any folder of this machine, whose files would be copied into the store.
    corrupt = {} if theirs.is_symlink() else check_node(theirs, key)[1]
    if theirs.is_symlink() or corrupt:
        why = "; ".join(f"{name}: {why}" for name, why in sorted(corrupt.items())) or "a link"
        merged.corrupt.append(f"{key}: {why}")
        return
    if not is_published(store.root, key):
        # A copy, even on the same disk: a hard link would share later damage between the two stores.
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
    """Reports a conflict, or adds to our node the files that it lacks and theirs has."""
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
    # node.json as a whole holds provenance, so its checksum tells nothing: only its results are compared.
    if not differ and their_node.result != our_node.result:
        differ = ["node.json"]
    if differ:
        by = f"ours by {_by(our_node)}, theirs by {_by(their_node)}"
        for what in ("compute", "gpu_options"):
            here, there = computed(our_node.provenance, what), computed(their_node.provenance, what)
            if here and there and here != there:
                by += f"; computed {here} here, {there} there: numbers differ by rounding"
        merged.conflicts.append(f"{ours.name}: {', '.join(differ)} differs ({by}); ours is kept")
        return
    missing = sorted(their_sums.keys() - our_sums.keys() - _PROVENANCE)
    if missing:
        gain(ours, our_sums, {name: partial(shutil.copyfile, theirs / name) for name in missing})
        merged.gained.append(ours.name)
    else:
        merged.same.append(ours.name)


def _by(node: Found) -> str:
    """The machine, device and torch version that computed a node."""
    # Nothing checks the fields of provenance: a foreign node may lack any.
    made = node.provenance
    versions = made.get("versions")
    torch = f", torch {versions['torch']}" if isinstance(versions, dict) and "torch" in versions else ""
    return f"{made.get('host', 'an unknown host')} on {made.get('device', 'an unknown device')}{torch}"


def _merge_record(store: RunStore, record: Path, merged: Merged) -> None:
    # A record's name ends with a hash of its nodes: one of the same name needs the same ones.
    path = store.root / "figures" / record.name
    if path.exists() or not RECORD_NAME.fullmatch(record.name):
        return
    content = record.read_bytes()
    try:
        Needs.of(path, json.loads(content))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        merged.corrupt.append(f"{record.name}: not a record of a figure")
        return
    write_atomically(path, lambda p: p.write_bytes(content))
    merged.records += 1
