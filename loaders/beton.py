"""Write and validate FFCV's .beton files without FFCV.

Layout, after ffcv/types.py and ffcv/fields: header, fields, sample table, pages of content, allocation table.
"""

# FFCV's writer waits forever if one of its processes dies. Its reader trusts every pointer: on a truncated file it
# fails with "negative dimensions" or reads past the end. So files are written here, and validated before FFCV opens
# them.

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np

from fastprune.errors import InputError
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.samples import RAW, Stored, digest

FFCV_FORMAT = 2
# Bytes, the smallest page that FFCV accepts. An image lies within one page, or begins one if it is larger.
PAGE = 1 << 21

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("allocations", "<u8")], align=True
)
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_BYTES = np.dtype([("pointer", "<u8"), ("size", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
# Type of a field in a row of the sample table, by FFCV's type number: float, int, image, bytes, array, JSON, tensor.
# All are known, so that files with further fields, which FFCV's users have, can be read.
KINDS = (np.dtype("<f8"), np.dtype("<i8"), IMAGE, _BYTES, np.dtype("<u8"), _BYTES, np.dtype("<u8"))
INT, RGB_IMAGE = 1, 2
FIELDS = {"image": RGB_IMAGE, "label": INT, "index": INT}
"""Names and types of the fields that BetonWriter writes."""


@dataclass(frozen=True)
class Beton:
    """The tables of a complete file.

    images: IMAGE [n].  labels: int64 [n].  sizes: stored bytes of each image, int64 [n].  fields: names, in order.
    """

    path: Path
    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    fields: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def raw_size(self) -> tuple[int, int] | None:
        """Height and width in pixels if all images are raw and of one size, else None."""
        first = self.images[0]
        alike = (self.images["height"] == first["height"]) & (self.images["width"] == first["width"])
        raw = alike & (self.images["mode"] == RAW)
        return (int(first["height"]), int(first["width"])) if raw.all() else None


class BetonWriter:
    """Context manager that writes images to a new file with the fields image, label and index.

    `add` takes the images in the order of `labels`. `finish` writes the tables, flushes the file to the disk, reads it
    back and compares it with the input. OSError if writing fails or the comparison differs.
    """

    def __init__(self, path: Path, labels: Sequence[int]) -> None:
        self._path = path
        self._samples = np.zeros(len(labels), sample_type(FIELDS.values()))
        self._samples["f1"], self._samples["f2"] = labels, np.arange(len(labels))
        self._sizes = np.zeros(len(labels), np.int64)
        self._digests: list[bytes] = []
        self._end = _aligned(HEADER.itemsize + len(FIELDS) * FIELD.itemsize + self._samples.nbytes)
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115, closed by __exit__

    def add(self, image: Stored) -> None:
        # FFCV reads by pages: an image that does not fit into the rest of this one begins the next.
        if self._end % PAGE + image.content.size > PAGE:
            self._end = _aligned(self._end)
        i = len(self._digests)
        self._samples["f0"][i] = (image.mode, image.width, image.height, self._end)
        self._sizes[i] = image.content.size
        self._digests.append(digest(image.content))
        self._file.seek(self._end)
        self._file.write(image.content.data)
        self._end += image.content.size

    def finish(self) -> None:
        assert len(self._digests) == len(self._samples), "an image is missing"
        header, end = np.zeros((), HEADER), _aligned(self._end)
        header["version"], header["fields"], header["page"] = FFCV_FORMAT, len(FIELDS), PAGE
        header["samples"], header["allocations"] = len(self._samples), end
        allocations = np.zeros(len(self._samples), ALLOCATION)
        allocations["sample"] = self._samples["f2"]
        allocations["pointer"], allocations["size"] = self._samples["f0"]["pointer"], self._sizes
        self._file.seek(end)
        self._file.write(allocations.tobytes())
        # The header last: a file whose writing was interrupted begins with zeros and is rejected.
        self._file.seek(0)
        self._file.write(header.tobytes() + _field_table().tobytes() + self._samples.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._verify()

    def _verify(self) -> None:
        # A full or failing disk can lose data without an error.
        beton = read_beton(self._path)
        content = np.memmap(self._path, np.uint8, mode="r")
        if not np.array_equal(beton.labels, self._samples["f1"]):
            raise OSError(f"{self._path} holds other labels than were written: is the disk full or failing?")
        for i, (pointer, size) in enumerate(zip(beton.images["pointer"].tolist(), beton.sizes.tolist(), strict=True)):
            if digest(content[pointer : pointer + size]) != self._digests[i]:
                raise OSError(f"image {i} in {self._path} is not what was written: is the disk full or failing?")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_beton(path: str | os.PathLike[str]) -> Beton:
    """The tables of any .beton file with an RGB image and an integer label.

    InputError if the file cannot be read, is not such a file, or is truncated or damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _read(file, size, path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; prepare the data again") from None


def check_beton(path: str | os.PathLike[str], manifest: Manifest, split: str) -> Beton:
    """The tables of the manifest's file of `split`. InputError if the file is truncated or another one."""
    beton = read_beton(path)
    _, expected_bytes = manifest.file(split)
    counts = manifest.train_per_class if split == "train" else manifest.val_per_class
    known = beton.labels.min() >= 0 and beton.labels.max() < len(counts)
    if (
        (expected_bytes is not None and expected_bytes != beton.path.stat().st_size)
        or (manifest.one_size and beton.raw_size != (manifest.height, manifest.width))
        or not known
        or tuple(np.bincount(beton.labels, minlength=len(counts)).tolist()) != counts
    ):
        raise _bad(beton.path, "is not the file that its manifest describes")
    return beton


def manifest_files(manifest: Manifest, folder: Path) -> dict[str, Beton]:
    """The tables of both files of a prepared folder. InputError if one is not the file that the manifest describes."""
    files = {}
    for split in ("train", "val"):
        name, _ = manifest.file(split)
        if name is None:
            raise InputError(f"the manifest in {folder} names no {split} file: prepare the data again")
        files[split] = check_beton(folder / name, manifest, split)
    return files


def sample_type(kinds: Iterable[int]) -> np.dtype:
    """The dtype of a row of FFCV's sample table: fields f0, f1 and so on of these types."""
    return np.dtype([(f"f{i}", KINDS[kind]) for i, kind in enumerate(kinds)], align=True)


def _bad(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}: remove it and prepare the data again")


def _read(file: IO[bytes], size: int, path: Path) -> Beton:
    start = file.read(HEADER.itemsize)
    if len(start) < HEADER.itemsize:
        raise _bad(path, "is truncated or not a .beton file")
    header = np.frombuffer(start, HEADER)[0]
    if header["version"] != FFCV_FORMAT or not 0 < header["fields"] < 100:
        raise _bad(path, "is not a .beton file of FFCV's format 2")
    fields = np.frombuffer(_exactly(file, int(header["fields"]) * FIELD.itemsize, path), FIELD)
    names = tuple(bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields)
    kinds = dict(zip(names, fields["type"].tolist(), strict=True))
    if (kinds.get("image"), kinds.get("label")) != (RGB_IMAGE, INT) or max(kinds.values()) >= len(KINDS):
        raise _bad(path, f"has the fields {', '.join(names)}, not an RGB image and an integer label so named")
    # Compared with the file size before the table is read: a damaged count must not allocate memory.
    row, count, end = sample_type(list(kinds.values())), int(header["samples"]), int(header["allocations"])
    if not 0 < count <= size or file.tell() + count * row.itemsize > end or end > size:
        raise _bad(path, f"is truncated or damaged ({size} bytes)")
    samples = np.frombuffer(_exactly(file, count * row.itemsize, path), row)
    content = file.tell()
    file.seek(end)
    allocations = np.frombuffer(file.read(), np.uint8)
    # Other fields may have content of their own, so there are at least as many allocations as images.
    if len(allocations) % ALLOCATION.itemsize or len(allocations) < count * ALLOCATION.itemsize:
        raise _bad(path, f"is truncated or damaged ({size} bytes)")
    # A copy: the field's view would keep the whole sample table in memory.
    images = samples[f"f{names.index('image')}"].copy()
    labels = samples[f"f{names.index('label')}"].astype(np.int64)
    sizes = _stored_bytes(images, allocations.view(ALLOCATION))
    pixels = images["height"].astype(np.int64) * images["width"] * 3
    sound = (pixels > 0) & (images["mode"] <= RAW) & (sizes > 0) & ((images["mode"] != RAW) | (sizes == pixels))
    # Pointers are uint64: pointer + size could wrap around, so the size is subtracted from the end.
    inside = (images["pointer"] >= content) & (images["pointer"] <= end - np.minimum(sizes, end))
    if not (sound & inside).all():
        raise _bad(path, "is damaged")
    return Beton(path, images, labels, sizes, names)


def _stored_bytes(images: np.ndarray, allocations: np.ndarray) -> np.ndarray:
    """Stored bytes of each image, int64 [n]; 0 if nothing is allocated at its pointer."""
    order = np.argsort(allocations["pointer"], kind="stable")
    pointers = allocations["pointer"][order]
    found = np.minimum(np.searchsorted(pointers, images["pointer"]), len(pointers) - 1)
    return np.where(pointers[found] == images["pointer"], allocations["size"][order][found], 0).astype(np.int64)


def _exactly(file: IO[bytes], count: int, path: Path) -> bytes:
    """The next `count` bytes. InputError if the file ends before."""
    content = file.read(count)
    if len(content) < count:
        raise _bad(path, "is truncated or not a .beton file")
    return content


def _field_table() -> np.ndarray:
    table = np.zeros(len(FIELDS), FIELD)
    for field, (name, kind) in zip(table, FIELDS.items(), strict=True):
        field["type"] = kind
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return table


def _aligned(position: int) -> int:
    return -(-position // PAGE) * PAGE
