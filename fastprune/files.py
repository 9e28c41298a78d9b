"""Files that appear whole or not at all, and the checksums of a folder, as `sha256sum` writes and checks them."""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Creates or replaces `path`: written aside by `write`, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # unique also among machines that share the disk
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Creates or replaces SHA256SUMS: by file name the digest."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    write_atomically(folder / SUMS, lambda p: p.write_text(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """By file name the digest. OSError if there is no SHA256SUMS, ValueError if it is damaged."""
    sums = {}
    for line in (folder / SUMS).read_text("ascii").splitlines():
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{SUMS} has the line {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
