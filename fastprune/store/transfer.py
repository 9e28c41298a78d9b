"""Nodes to a tar file, and from one or from another store. The first published wins; a conflict is reported."""

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastprune.command import progress_bar
from fastprune.errors import InputError
from fastprune.files import SUMS, flush, read_sums, sums_text, tree_bytes, write_atomically
from fastprune.store import FORMAT, RunStore, gain
from fastprune.store.archive import Content, Member, members
from fastprune.store.check import check_node, line
from fastprune.store.lease import Leases
from fastprune.store.needs import Needs, named, read_needs
from fastprune.store.read import is_published, node_folder, node_folders, read_json

if TYPE_CHECKING:
    from tqdm import tqdm

_OURS = {"node.json", "times.csv", SUMS}
"""Files that differ between machines that compute the same. Of node.json the result does not."""


class DamagedError(Exception):
    """A node of the own store is not as it was written: one line, with what to do."""


@dataclass
class Imported:
    """Keys. conflicts: lines, one a file that differs. busy: what somebody works on. figures: how many records."""

    new: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    gained: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    figures: int = 0


def export(root: Path, target: Path, figures: list[str], *, states: bool = True) -> tuple[int, int]:
    """Writes a tar of the published nodes, or of those that the `figures` named need; returns how many, of how many.

    The same content gives the same bytes. states: with weights and momentum. DamagedError if a file is not as it was
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


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    _add_stream(archive, name, len(content), io.BytesIO(content))


def _add_stream(archive: tarfile.TarFile, name: str, size: int, content: Any) -> None:
    info = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644: the same everywhere
    info.size = size
    archive.addfile(info, content)


def _add_node(archive: tarfile.TarFile, folder: Path, states: bool) -> None:
    within = f"nodes/{folder.name[:2]}/{folder.name}"
    try:
        sums = read_sums(folder)
        if not states:
            sums = {name: d for name, d in sums.items() if not name.startswith(("state-", "momentum-"))}
        if "node.json" not in sums:
            raise ValueError(f"node.json is not in {SUMS}")
        _add(archive, f"{within}/{SUMS}", sums_text(sums).encode())
        for name, expected in sorted(sums.items()):
            with (folder / name).open("rb") as file:
                hashing = _Hashing(file)
                _add_stream(archive, f"{within}/{name}", (folder / name).stat().st_size, hashing)
            if hashing.sum.hexdigest() != expected:
                raise ValueError(f"{name}: its checksum is not that in {SUMS}")
    except FileNotFoundError as error:
        raise DamagedError(f"{folder}: {Path(error.filename).name} is missing; see verify") from None
    except ValueError as error:
        raise DamagedError(f"{folder}: {line(error)}; see verify") from None


class _Hashing:
    """A stream and the SHA-256 of what was read of it."""

    def __init__(self, file: IO[bytes] | Content) -> None:
        self._file, self.sum = file, hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        part = self._file.read(count)
        self.sum.update(part)
        return part


def import_from(root: Path, source: Path) -> Imported:
    """Takes over nodes from a tar that export wrote, or from another store's folder.

    InputError for a source that is not in order, or a disk that is full: nodes before that stay, and it says how many.
    """
    if source.exists() and root.exists() and source.samefile(root):
        raise InputError(f"{source} is this very store")
    found = members(source)
    _check_source(source, next(found, None))
    store, imported = RunStore(root), Imported()
    size = tree_bytes(source / "nodes") if source.is_dir() else source.stat().st_size
    try:
        with Leases(root / "leases") as leases, progress_bar("import", size, "B") as bar:
            importing = _Import(store, leases, source, imported)
            for key, files in itertools.groupby(_counted(found, bar), lambda m: m.key):
                if key is None:
                    importing.records(files)
                else:
                    importing.node(key, files)
    except (InputError, OSError) as error:
        done = len(imported.new) + len(imported.gained)
        what = str(error)
        if isinstance(error, OSError):
            what = f"{error.filename or root}: {error.strerror or error}"
        raise InputError(f"{what}; {done:,} nodes were imported before it") from error
    return imported


def _counted(found: Iterator[Member], bar: "tqdm[Any]") -> Iterator[Member]:
    for member in found:
        yield member
        bar.update(member.size)


def _check_source(source: Path, first: Member | None) -> None:
    if first is None or first.name != "store.json":
        raise InputError(f"{source}: does not begin with a store.json: no archive that export wrote")
    try:
        found = json.loads(first.content.read())["format"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{source}: its store.json is none of a store") from None
    if found != FORMAT:
        raise InputError(f"{source}: written in format {str(found)[:20]}, this version reads format {FORMAT}")


class _Import:
    def __init__(self, store: RunStore, leases: Leases, source: Path, imported: Imported) -> None:
        self.store, self.leases, self.source, self.imported = store, leases, source, imported
        self.seen: set[str] = set()

    def records(self, files: Iterable[Member]) -> None:
        for member in files:
            path = self.store.root / "figures" / member.file
            content = member.content.read()
            try:
                if member.name == "store.json":
                    raise ValueError
                Needs.of(path, json.loads(content))
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
                raise InputError(f"{self.source}: {member.name} is no record of a figure") from None
            if not path.exists():
                write_atomically(path, partial(_write, content=content))
                self.imported.figures += 1

    def node(self, key: str, files: Iterable[Member]) -> None:
        if key in self.seen:
            raise InputError(f"{self.source}: the files of node {key} are not together")
        self.seen.add(key)
        mine, holder = self.leases.acquire(key)
        if not mine:
            self.imported.busy.append(f"{key}: {holder or 'somebody'} works on it; import again when that is done")
            return
        try:
            self.store.root.joinpath("nodes").mkdir(exist_ok=True)
            final = node_folder(self.store.root, key)
            with _removed_after(self.store.aside(key)) as folder:
                if is_published(self.store.root, key):
                    self._compare(key, files, folder, final)
                else:
                    self._assemble(key, files, folder, {})
                    self.store.adopt(folder, final)
                    self.imported.new.append(key)
        finally:
            self.leases.release(key)

    def _assemble(self, key: str, files: Iterable[Member], folder: Path, ours: dict[str, str]) -> dict[str, str]:
        """Puts the node together and checks it; returns its checksums. Tensors that are listed in `ours` are read, but
        not written."""
        known = {}
        for member in files:
            content = _Hashing(member.content)
            if member.file in ours and member.file.endswith(".safetensors"):
                while content.read(1 << 20):
                    pass
                known[member.file] = content.sum.hexdigest()
                continue
            with (folder / member.file).open("xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            if not ours:  # else what is gained is copied, and flushed then
                flush(folder / member.file)
        for name, why in sorted(check_node(folder, key, known)[1].items()):
            raise InputError(f"{self.source}: nodes/{key[:2]}/{key}/{name}: {why}")
        return read_sums(folder)

    def _compare(self, key: str, files: Iterable[Member], folder: Path, final: Path) -> None:
        """Ours stays as it is, but for files that it lacks."""
        try:
            ours = read_sums(final)
        except (OSError, ValueError) as error:
            self.imported.conflicts.append(f"{key} {SUMS}: ours is damaged ({line(error)}); see verify")
            return
        theirs = self._assemble(key, files, folder, ours)
        differ = [name for name in sorted(theirs.keys() & ours.keys() - _OURS) if theirs[name] != ours[name]]
        if not differ and _result(folder) != _result(final):
            differ = ["node.json"]
        self.imported.conflicts += [f"{key} {name}: differs; ours is kept" for name in differ]
        missing = theirs.keys() - ours.keys() - _OURS
        if differ:
            return
        if missing:
            gain(final, ours, {name: partial(shutil.copyfile, folder / name) for name in sorted(missing)})
            self.imported.gained.append(key)
        else:
            self.imported.same.append(key)


def _result(folder: Path) -> Any:
    """What came out, without what was timed."""
    result: dict[str, Any] = read_json(folder / "node.json")["result"]
    return {name: value for name, value in result.items() if not name.startswith("latency")}


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@contextmanager
def _removed_after(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
