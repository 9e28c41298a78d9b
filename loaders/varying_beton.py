"""The .beton files of images that vary in size: the bytes of the JPEG files as they are, and pixels of what is no JPEG.

They are ordinary files of FFCV's (its own decoders read them too), but written here, in one pass and in stored order:
FFCV's writer would compress every image again.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastprune.errors import InputError
from fastprune.loaders.beton import ALLOCATION, FFCV_FORMAT, FIELD, FIELDS, HEADER, MIN_PAGE, RAW, SAMPLE
from fastprune.loaders.samples import read_image
from fastprune.loaders.varying_jpeg import decode_jpeg

JPEG = 0
PAGE = 4 * MIN_PAGE  # FFCV's default; an image larger than that spans pages
LARGEST = (1 << 16) - 1  # pixels a side that the format can tell


class Record(NamedTuple):
    """An image as it is stored: the bytes of a JPEG file or pixels, uint8 [bytes]."""

    mode: int
    height: int
    width: int
    content: np.ndarray


@dataclass(frozen=True)
class Table:
    """Where everything is in a whole file. images: structured [n], see beton.IMAGE; sizes: stored bytes, int64 [n];
    labels: int64 [n].
    """

    path: Path
    images: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


def read_record(path: Path) -> Record:
    """Read and decode a file. InputError where it is no image, or one that cannot be stored."""
    try:
        content = np.fromfile(path, np.uint8)
        pixels = decode_jpeg(content)
        if pixels is not None:
            return Record(JPEG, pixels.shape[0], pixels.shape[1], content)
        pixels = read_image(path)
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} ({reason})") from None
    if max(pixels.shape) > LARGEST:
        raise InputError(f"{path} (more than {LARGEST} pixels a side)")
    return Record(RAW, pixels.shape[0], pixels.shape[1], pixels.reshape(-1))


def write_varying(
    path: Path, files: Sequence[Path], labels: Sequence[int], threads: int, done: Callable[[int], Any]
) -> None:
    """Write the images to a .beton file, decoding each of them once in `threads` threads. done: told of each image.

    InputError where images cannot be read, after all of them have been tried.
    """
    header, samples = np.zeros((), HEADER), np.zeros(len(files), SAMPLE)
    allocations = np.zeros(len(files), ALLOCATION)
    samples["label"], samples["index"] = labels, np.arange(len(files))
    allocations["sample"] = samples["index"]
    unreadable: list[str] = []
    end = _aligned(HEADER.itemsize + len(FIELDS) * FIELD.itemsize + samples.nbytes)
    with open(path, "wb") as file:
        for i, record in enumerate(_in_order(read_record, files, threads)):
            done(1)
            if isinstance(record, InputError):
                unreadable.append(str(record))
                continue
            size = record.content.size
            if end % PAGE and end % PAGE + size > PAGE:
                end = _aligned(end)
            samples["image"][i] = (record.mode, record.width, record.height, end)
            allocations["pointer"][i], allocations["size"][i] = end, size
            if not unreadable:
                file.seek(end)
                file.write(record.content.data)
            end += size
        if unreadable:
            raise InputError(
                f"cannot read {len(unreadable)} of {len(files)} images, first {unreadable[0]}: replace or remove them"
            )
        end = _aligned(end)
        header["version"], header["fields"], header["page"] = FFCV_FORMAT, len(FIELDS), PAGE
        header["samples"], header["allocations"] = len(files), end
        file.seek(end)
        file.write(allocations.tobytes())
        file.seek(0)
        file.write(header.tobytes() + _fields().tobytes() + samples.tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_table(path: Path) -> Table:
    """The tables of a .beton file. InputError where it is foreign, truncated or damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = np.frombuffer(_exactly(file, HEADER.itemsize, path), HEADER)[0]
            count, begin = int(header["samples"]), int(header["allocations"])
            fields = file.tell(), len(FIELDS) * FIELD.itemsize
            if header["version"] != FFCV_FORMAT or begin + count * ALLOCATION.itemsize != size:
                raise _bad(path, f"is truncated or no .beton file of FFCV's format 2 ({size} bytes)")
            if _exactly(file, fields[1], path) != _fields().tobytes():
                raise _bad(path, "is not a .beton file of fastprune")
            samples = np.frombuffer(_exactly(file, count * SAMPLE.itemsize, path), SAMPLE)
            file.seek(begin)
            allocations = np.frombuffer(_exactly(file, count * ALLOCATION.itemsize, path), ALLOCATION)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; remove its folder and run again") from None
    images, sizes = samples["image"], allocations["size"].astype(np.int64)
    pixels = images["height"].astype(np.int64) * images["width"] * 3
    whole = (pixels > 0) & (images["mode"] <= RAW) & (sizes > 0) & ((images["mode"] != RAW) | (sizes == pixels))
    inside = (sizes <= begin) & (images["pointer"] <= begin - np.minimum(sizes, begin))
    ordered = (samples["index"] == np.arange(count)) & (images["pointer"] == allocations["pointer"])
    if not (count and (whole & inside & ordered).all()):
        raise _bad(path, "is damaged")
    return Table(path, images.copy(), sizes, samples["label"].astype(np.int64))


def _bad(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}: remove its folder and run again")


def _exactly(file: Any, count: int, path: Path) -> bytes:
    content: bytes = file.read(count)
    if len(content) < count:
        raise _bad(path, "is truncated or no .beton file")
    return content


def _fields() -> np.ndarray:
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, number) in zip(fields, FIELDS, strict=True):
        field["type"] = number
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return fields


def _aligned(position: int) -> int:
    return -(-position // PAGE) * PAGE


def _in_order(read: Callable[[Path], Record], files: Sequence[Path], threads: int) -> Iterator[Record | InputError]:
    """What `read` gives for each file or the InputError it raises, in order; only a few are held at a time."""
    waiting: deque[Future[Record]] = deque()

    def first() -> Record | InputError:
        future = waiting.popleft()
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, InputError):
            return error
        raise error

    with ThreadPoolExecutor(threads) as pool:
        try:
            for path in files:
                if len(waiting) >= 4 * threads:
                    yield first()
                waiting.append(pool.submit(read, path))
            while waiting:
                yield first()
        finally:
            for future in waiting:
                future.cancel()
