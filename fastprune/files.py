"""Files that appear complete or not at all; checksums of a folder, as `sha256sum` writes and checks them; safetensors
files with a checksum within. Imports no torch before a tensor is read or written.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUMS = "SHA256SUMS"

SEAL = "fastprune"
"""The metadata entry of a safetensors file that holds its checksum and facts."""

UNSET = "0" * 64

_HEADER_LIMIT = 100_000_000  # that of safetensors

_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
}

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


def write_atomically(path: Path, write: Callable[[Path], Any], aside: Path | None = None) -> None:
    """Creates or replaces `path`: written aside by `write`, flushed to disk, renamed; then its name is flushed, too.

    aside: where a single writer writes it, so that the next one writes over what a killed one left.
    """
    if aside is None:
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # unique also among machines that share the disk
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's entries, are on the disk, where it takes such wishes for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Creates or replaces SHA256SUMS: by file name the digest."""
    lines = sums_text(sums)
    write_atomically(folder / SUMS, lambda p: p.write_text(lines))


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


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


def check_sealed(file: IO[bytes]) -> Any:
    """Reads a safetensors file of ours to its end; returns its facts (see tensors.py). Runs nothing that is in it.

    ValueError where a bit has changed, or it is no safetensors file; KeyError or TypeError for one that is not ours.
    """
    start = file.read(8)
    size = int.from_bytes(start, "little")
    header = file.read(size) if len(start) == 8 and 2 <= size <= _HEADER_LIMIT else b""
    if len(header) < 2:
        raise ValueError("no safetensors file")
    try:
        found = json.loads(header)
        about = json.loads(found["__metadata__"][SEAL])
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    expected = about["sha256"]
    if not isinstance(expected, str) or re.fullmatch("[0-9a-f]{64}", expected) is None:
        raise TypeError("its checksum is no checksum")
    at = header.find(expected.encode())
    if at < 0:
        raise ValueError("its checksum is not where it was written")
    content = hashlib.sha256(start + header[:at] + UNSET.encode() + header[at + len(UNSET) :])
    length = 0
    while part := file.read(1 << 20):
        content.update(part)
        length += len(part)
    if content.hexdigest() != expected:
        raise ValueError("its content does not have the checksum that it names")
    _check_layout({name: tensor for name, tensor in found.items() if name != "__metadata__"}, length)
    return about["facts"]


def _check_layout(tensors: dict[str, Any], length: int) -> None:
    """ValueError unless the tensors follow one another, and end with the file."""
    end = 0
    for begin, stop, bits, shape in sorted(
        (*t["data_offsets"], _BITS[t["dtype"]], t["shape"]) for t in tensors.values()
    ):
        if begin != end or 8 * (stop - begin) != bits * math.prod(shape):
            raise ValueError("its tensors do not lie where its header says")
        end = stop
    if end != length:
        raise ValueError("its tensors do not end with the file")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", facts: Any = None) -> None:
    """Writes contiguous CPU tensors, and in the file's metadata, as JSON, `facts` and the SHA-256 of the file with 64
    zeros in that place.

    Python writes the bytes, so that a full disk is an OSError; one metadata entry, because safetensors orders several
    at random.
    """
    from safetensors.torch import save  # here: torch takes seconds to import

    content = save(dict(tensors), {SEAL: json.dumps({"sha256": UNSET, "facts": facts})})
    at = content.index(UNSET.encode())
    path.write_bytes(content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(UNSET) :])


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], Any]":
    """(tensors, facts) of what write_tensors wrote. InputError for anything else, and where a bit has changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        facts = check_sealed(io.BytesIO(content))
        return load(content), facts
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: a safetensors file, but none of fastprune's") from None
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: missing, damaged or foreign ({error})") from error
