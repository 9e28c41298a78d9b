"""Atomic writes, SHA256SUMS of a folder (as `sha256sum` writes and checks it), safetensors files with a checksum, and
what kind of file a path names.

torch is imported only where a tensor is read or written.
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
from zipfile import BadZipFile, ZipFile

from fastprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUMS = "SHA256SUMS"

SEAL = "fastprune"
"""The metadata entry of a safetensors file that holds its checksum and facts."""
# One entry for both, because safetensors writes several entries in random order.

# Stands in place of the checksum while it is computed, since a file cannot contain its own SHA-256.
UNSET = "0" * 64

_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library: a damaged length must not fill the memory

_BITS = {
    **{"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8, "C64": 64},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
}

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")


def write_atomically(path: Path, write: Callable[[Path], Any], aside: Path | None = None) -> None:
    """Creates or replaces `path` atomically: `write` writes a temporary file, which is flushed and renamed to `path`.

    aside: the temporary file, for a path with a single writer: the next call overwrites what a killed one left. By
    default a unique name beside `path`.
    """
    if aside is None:
        # Random rather than the process id, which is not unique among machines that share the disk.
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    flush(path.parent)  # the new name is an entry of the folder: without this a power cut could lose it


def flush(path: Path) -> None:
    """Waits until the content of a file, or the entries of a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do not support fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Creates or replaces SHA256SUMS in `folder`, atomically. sums: file name -> SHA-256."""
    lines = sums_text(sums)
    write_atomically(folder / SUMS, lambda p: p.write_text(lines))


def sums_text(sums: Mapping[str, str]) -> str:
    """The content of SHA256SUMS, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256. OSError if there is no SHA256SUMS, ValueError if it is corrupt."""
    sums = {}
    for line in (folder / SUMS).read_text("ascii").splitlines():
        # The pattern allows no slash: a store from elsewhere must not name files outside its folder.
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise ValueError(f"{SUMS} has the line {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder. Files that another process removes meanwhile are not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def check_sealed(file: IO[bytes]) -> Any:
    """Verifies the checksum of a file that `write_tensors` wrote; returns its facts. Reads `file` to its end.

    ValueError for a changed bit or a file that is not safetensors; KeyError or TypeError for a safetensors
    file that `write_tensors` did not write.
    """
    # In parts of 1 MiB and without torch, so that `store.py verify` starts at once and needs little memory.

    start = file.read(8)
    size = int.from_bytes(start, "little")
    header = file.read(size) if len(start) == 8 and 2 <= size <= _HEADER_LIMIT else b""
    if len(header) < 2:
        raise ValueError("not a safetensors file")
    try:
        found = json.loads(header)
        about = json.loads(found["__metadata__"][SEAL])
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    expected = about["sha256"]
    if not isinstance(expected, str) or re.fullmatch("[0-9a-f]{64}", expected) is None:
        raise TypeError("its checksum is not 64 hex digits")
    at = header.find(expected.encode())
    if at < 0:
        raise ValueError("its header does not contain its checksum")
    content = hashlib.sha256(start + header[:at] + UNSET.encode() + header[at + len(UNSET) :])
    length = 0
    while part := file.read(1 << 20):
        content.update(part)
        length += len(part)
    if content.hexdigest() != expected:
        raise ValueError("its content does not have the checksum that it names")
    # The checksum proves that nothing changed, not that the offsets are sound: anyone can compute a checksum.
    _check_layout({name: tensor for name, tensor in found.items() if name != "__metadata__"}, length)
    return about["facts"]


def _check_layout(tensors: dict[str, Any], length: int) -> None:
    """ValueError unless the tensors fill the `length` bytes after the header without gap or overlap."""
    end = 0
    for begin, stop, bits, shape in sorted(
        (*t["data_offsets"], _BITS[t["dtype"]], t["shape"]) for t in tensors.values()
    ):
        if begin != end or 8 * (stop - begin) != bits * math.prod(shape):
            raise ValueError("its header has wrong tensor offsets")
        end = stop
    if end != length:
        raise ValueError("its tensors do not end at the end of the file")


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", facts: Any = None) -> None:
    """Writes contiguous CPU tensors to a safetensors file. Its metadata hold, as JSON, `facts` and a SHA-256.

    The SHA-256 is that of the file in which 64 zeros stand in its place. Not atomic: see `write_atomically`.
    """
    from safetensors.torch import save  # here: torch takes seconds to import

    # save() and write_bytes() rather than save_file(): a full disk is then an OSError.
    content = save(dict(tensors), {SEAL: json.dumps({"sha256": UNSET, "facts": facts})})
    at = content.index(UNSET.encode())
    path.write_bytes(content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(UNSET) :])


def read_tensors(path: Path, expected: str = "a safetensors file of fastprune's") -> "tuple[dict[str, Tensor], Any]":
    """(tensors, facts) of a file that `write_tensors` wrote. InputError for any other file, and for a changed bit.

    expected: the kind of file, for the message.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        facts = check_sealed(io.BytesIO(content))
        return load(content), facts
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: a safetensors file, but not one of fastprune's") from None
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        check_kind(path, expected, MASK, COMPILED, TENSORS)
        raise InputError(f"{path}: missing, corrupt or foreign ({error})") from error


# What messages call the files that users confuse.
MASK = "a mask of fastprune"
COMPILED = "a compiled network of fastprune"
TENSORS = "a safetensors file"
SAVED = "a file of torch.save"

_BEGINNINGS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF file",
    b"\x93NUMPY": "an array of numpy",
    b"\x1f\x8b": "a gzip archive",
}


def file_kind(path: Path) -> str | None:
    """What a file is, by its beginning; None if that is not known, or it cannot be read. No more of it is checked."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            for beginning, kind in _BEGINNINGS.items():
                if start.startswith(beginning):
                    return kind
            if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
                return "a WebP image"
            if start[:2] == b"PK":
                with ZipFile(file) as archive:
                    saved = any(name.endswith("/data.pkl") for name in archive.namelist())
                return SAVED if saved else "a zip archive"
            size = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" or not 2 <= size <= _HEADER_LIMIT:
                return None
            file.seek(8)
            about = json.loads(file.read(size)).get("__metadata__", {}).get(SEAL)
            facts = None if about is None else json.loads(about)["facts"]
    except (OSError, BadZipFile, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if isinstance(facts, dict):
        return MASK if "mask" in facts else COMPILED if "ops" in facts else TENSORS
    return TENSORS


def check_kind(path: Path, expected: str, *accepted: str) -> None:
    """InputError for a file of a kind that is known and not among `accepted`. expected: in words."""
    kind = file_kind(path)
    if kind is not None and kind not in accepted:
        raise InputError(f"{path} is {kind}, expected {expected}")
