"""The files of a store that comes from elsewhere, as a tar or a folder, one after another. Nothing in it is trusted:
only regular files with names that a store has are read, as streams of the size they declare, never unpacked."""

import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastprune.errors import InputError
from fastprune.store.check import FILE_NAME
from fastprune.store.needs import RECORD_NAME

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
