"""The files of a store that comes from elsewhere, as a tar or a folder, one after another. Nothing in it is trusted:
only regular files with names that a store has are read, as streams of the size they declare, never unpacked."""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastprune.console import progress_bar
from fastprune.errors import InputError
from fastprune.files import SUMS, flush, read_sums, sums_text, tree_bytes, write_atomically
from fastprune.store import FORMAT, RunStore, gain
from fastprune.store.lease import Leases
from fastprune.store.needs import RECORD_NAME, Needs, named, read_needs
from fastprune.store.read import is_published, node_folder, node_folders, read_json
from fastprune.store.verify import FILE_NAME, check_node, line

if TYPE_CHECKING:
    from tqdm import tqdm

BLOCK = tarfile.BLOCKSIZE

TEXT_LIMIT = 1 << 26
"""Bytes that a file may have which is not tensors: these are parsed in memory."""

_NODE = re.compile(rf"nodes/([0-9a-f]{{2}})/(\1[0-9a-f]{{30}})/({FILE_NAME.pattern})")


class Content:
    """A stream of exactly `size` bytes of a longer one."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        self._file, self._left, self._name = file, size, name

    def read(self, count: int = -1) -> bytes:
        """InputError where the file ends before its size."""
        count = self._left if count < 0 else min(count, self._left)
        part = self._file.read(count)
        if len(part) < count:
            raise InputError(f"{self._name} ends before its size: truncated, or changed while it was read")
        self._left -= len(part)
        return part


@dataclass(frozen=True)
class Member:
    """A file. key: of the node that it belongs to, or None. file: its name within that, or within figures/."""

    name: str
    key: str | None
    file: str
    size: int
    content: Content


def members(source: Path) -> Iterator[Member]:
    """store.json, records of figures, then the files of nodes, each node's together.

    InputError, which says where, for anything that a store does not hold.
    """
    return _of_folder(source) if source.is_dir() else _of_tar(source)


def _member(source: Path, name: str, size: int, file: IO[bytes]) -> Member:
    shown = f"{source}: {name[:120]!r}"
    content = Content(file, size, shown)
    node = _NODE.fullmatch(name)
    if node is not None:
        member = Member(name, node[2], node[3], size, content)
    elif name == "store.json":
        member = Member(name, None, name, size, content)
    elif name.startswith("figures/") and RECORD_NAME.fullmatch(name.removeprefix("figures/")):
        member = Member(name, None, name.removeprefix("figures/"), size, content)
    else:
        raise InputError(f"{shown} is no file of a store")
    if size > TEXT_LIMIT and not name.endswith(".safetensors"):
        raise InputError(f"{shown} has {size:,} bytes, more than any such file of a store")
    return member


def _of_tar(source: Path) -> Iterator[Member]:
    with source.open("rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{source}: neither a file nor a folder")
        end = os.fstat(file.fileno()).st_size
        seen: set[str] = set()
        while True:
            block = file.read(BLOCK)
            try:
                # One header at a time: tarfile would read extended headers, of whatever size, before we can look.
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                return
            except tarfile.HeaderError as error:
                what = "truncated" if len(block) < BLOCK and seen else f"no tar that export wrote ({error})"
                raise InputError(f"{source}: {what}") from None
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                raise InputError(f"{source}: {info.name[:120]!r} is no regular file")
            begin = file.tell()
            if not 0 <= info.size <= end - begin:
                raise InputError(f"{source}: {info.name[:120]!r} declares {info.size:,} bytes: truncated, or not true")
            if info.name in seen:
                raise InputError(f"{source}: {info.name[:120]!r} is there twice")
            seen.add(info.name)
            yield _member(source, info.name, info.size, file)
            file.seek(begin + -(-info.size // BLOCK) * BLOCK)


def _of_folder(source: Path) -> Iterator[Member]:
    names = ["store.json", *(f"figures/{name}" for name in _listed(source / "figures"))]
    for name in names:
        yield from _of_file(source, name)
    for short in _listed(source / "nodes"):
        for key in _listed(source / "nodes" / short):
            for file in _listed(source / "nodes" / short / key):
                yield from _of_file(source, f"nodes/{short}/{key}/{file}")


def _listed(folder: Path) -> list[str]:
    """Without what somebody is just writing. A link to a folder is none."""
    if folder.is_symlink():
        raise InputError(f"{folder} is a link: a store has none")
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise InputError(f"{folder} is no folder") from None


def _of_file(source: Path, name: str) -> Iterator[Member]:
    try:
        handle = os.open(source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # nor wait for a pipe's writer
    except FileNotFoundError:
        raise InputError(f"{source / name} is missing") from None
    except OSError as error:
        raise InputError(f"{source / name}: {error.strerror}") from error
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{source / name} is no regular file")
        yield _member(source, name, found.st_size, file)


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
