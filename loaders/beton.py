"""Look into a .beton file without FFCV: is it one of ours, and whole?

FFCV itself fails on a truncated file with "negative dimensions" or reads past its end, and trusts every pointer in it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastprune.errors import InputError
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.samples import digest

FFCV_FORMAT = 2
MIN_PAGE = 1 << 21  # bytes; FFCV's smallest, and each of its workers leaves one partly empty
FIELDS = (("image", 2), ("label", 1), ("index", 1))  # names and FFCV's type numbers: RGBImageField, IntField, IntField

# The layout of the file, from ffcv/types.py and ffcv/fields/rgb_image.py.
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
RAW = 1


@dataclass(frozen=True)
class Beton:
    """The tables of a whole file. labels: int64 [n]; pointers: uint64 [n], where each image's pixels begin."""

    path: Path
    height: int
    width: int
    labels: np.ndarray
    pointers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def check_beton(path: str | os.PathLike[str], manifest: Manifest | None = None, split: str = "train") -> Beton:
    """Read the tables of a .beton file. InputError where it is foreign, truncated, or not the manifest's `split`."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            beton = _read(file.read(_table_end(file.read(HEADER.itemsize), size, path)), size, path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; prepare the data again") from None
    if manifest is not None:
        _compare(beton, size, manifest, split)
    return beton


def estimated_bytes(count: int, height: int, width: int, workers: int) -> int:
    """How large a file gets, from above."""
    page = page_bytes(height, width)
    pages = -(-count // (page // (height * width * 3))) + workers
    return (pages + 1) * page + HEADER.itemsize + count * (SAMPLE.itemsize + ALLOCATION.itemsize)


def page_bytes(height: int, width: int) -> int:
    """FFCV's page for images of this size, a power of two."""
    return max(MIN_PAGE, 1 << (height * width * 3 - 1).bit_length())


def verify_pixels(beton: Beton, labels: Sequence[int], digests: Sequence[bytes]) -> None:
    """Compare every label and pixel with what was meant to be written. OSError where they differ."""
    if list(labels) != beton.labels.tolist():
        raise OSError(f"{beton.path} holds other labels than were written: is the disk full or failing?")
    content = np.memmap(beton.path, np.uint8, mode="r")
    length = beton.height * beton.width * 3
    for i, (pointer, expected) in enumerate(zip(beton.pointers.tolist(), digests, strict=True)):
        if digest(content[pointer : pointer + length]) != expected:
            raise OSError(f"image {i} in {beton.path} is not what was written: is the disk full or failing?")


def _bad(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}: remove it and prepare the data again")


def _table_end(start: bytes, size: int, path: Path) -> int:
    """Check the header; how many bytes after it the fields and the table of samples take."""
    if len(start) < HEADER.itemsize:
        raise _bad(path, "is truncated or no .beton file")
    header = np.frombuffer(start, HEADER)[0]
    if header["version"] != FFCV_FORMAT or not 0 < header["fields"] < 100:
        raise _bad(path, "is no .beton file of FFCV's format 2")
    if header["fields"] != len(FIELDS):
        raise _bad(path, f"is not a .beton file of fastprune ({header['fields']} fields, expected {len(FIELDS)})")
    samples, allocations = int(header["samples"]), int(header["allocations"])
    tables = len(FIELDS) * FIELD.itemsize + samples * SAMPLE.itemsize
    whole = samples > 0 and HEADER.itemsize + tables <= allocations
    if not whole or allocations + samples * ALLOCATION.itemsize != size:
        raise _bad(path, f"is truncated or damaged ({size} bytes)")
    return tables


def _read(tables: bytes, size: int, path: Path) -> Beton:
    split = len(FIELDS) * FIELD.itemsize
    fields = np.frombuffer(tables[:split], FIELD)
    found = tuple((bytes(f["name"]).rstrip(b"\0").decode("ascii", "replace"), int(f["type"])) for f in fields)
    if found != FIELDS:
        names = ", ".join(name for name, _ in FIELDS)
        raise _bad(path, f"is not a .beton file of fastprune (its fields are not {names})")
    samples = np.frombuffer(tables[split:], SAMPLE)
    images = samples["image"]
    height, width = int(images["height"][0]), int(images["width"][0])
    alike = (images["height"] == height) & (images["width"] == width) & (images["mode"] == RAW)
    last = size - len(samples) * ALLOCATION.itemsize - height * width * 3
    inside = (images["pointer"] >= HEADER.itemsize + len(tables)) & (images["pointer"] <= max(last, 0))
    ordered = samples["index"] == np.arange(len(samples))
    if height * width == 0 or not (alike & inside & ordered).all():
        raise _bad(path, "is damaged, or not raw images of one size in stored order")
    return Beton(path, height, width, samples["label"].astype(np.int64), images["pointer"].astype(np.uint64))


def _compare(beton: Beton, size: int, manifest: Manifest, split: str) -> None:
    _, expected_size = manifest.file(split)
    counts = manifest.train_per_class if split == "train" else manifest.val_per_class
    fits = beton.labels.min() >= 0 and beton.labels.max() < len(counts)
    if (
        (expected_size is not None and expected_size != size)
        or (beton.height, beton.width) != (manifest.height, manifest.width)
        or not fits
        or tuple(np.bincount(beton.labels, minlength=len(counts)).tolist()) != counts
    ):
        raise _bad(beton.path, "is not the file that its manifest describes")
