"""The description of a data set, stored as JSON: it suffices to plan a figure without reading an image.

Standard library only.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import write_atomically

VERSION = 1  # of the file format
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A data set of RGB images in two splits.

    fingerprint: SHA-256 (hex) over the ordered labels and decoded pixels, train before val; for generated data, over
    the generator's version and parameters; empty if no image has been read.
    train_per_class, val_per_class: number of images of each class.
    height, width: of every image, in pixels; 0 if images may differ in size.
    mean, std: per channel, as fractions of full scale, over the train split; 0 and 1 if no image has been read.
    train_file, val_file, train_bytes, val_bytes: names and sizes (bytes) of the .beton files beside the manifest, or
    None.
    source: the image folder that the data was prepared from, or None; a relative path is relative to the manifest.
    listing: SHA-256 (hex) over names, labels, sizes and modification times of that folder's files, or None.
    synthetic: the parameters of generated data, or None.
    """

    # Of these only the fingerprint enters the keys of runs: where and how the data is stored does not change a result.

    name: str
    fingerprint: str
    classes: tuple[str, ...]
    train_per_class: tuple[int, ...]
    val_per_class: tuple[int, ...]
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_file: str | None = None
    train_bytes: int | None = None
    val_file: str | None = None
    val_bytes: int | None = None
    source: str | None = None
    listing: str | None = None
    synthetic: Mapping[str, int] | None = None

    @property
    def one_size(self) -> bool:
        """Whether all images have one size. Images that differ in size are cropped when they are read."""
        return self.height > 0

    @property
    def train_count(self) -> int:
        return sum(self.train_per_class)

    @property
    def val_count(self) -> int:
        return sum(self.val_per_class)

    def count(self, split: str) -> int:
        """Number of images in `split`, "train" or "val"."""
        return {"train": self.train_count, "val": self.val_count}[split]

    def file(self, split: str) -> tuple[str | None, int | None]:
        """Name and size in bytes of the split's .beton file, or (None, None)."""
        return {"train": (self.train_file, self.train_bytes), "val": (self.val_file, self.val_bytes)}[split]


@dataclass(frozen=True)
class Subset:
    """A part of a data set: the first `classes` classes, and the first images of each in stored order. None: all."""

    classes: int | None = None
    train_per_class: int | None = None
    val_per_class: int | None = None

    def per_class(self, split: str) -> int | None:
        return {"train": self.train_per_class, "val": self.val_per_class}[split]

    def count(self, manifest: Manifest, split: str) -> int:
        """Number of images of `split` in this subset of `manifest`. InputError if the subset does not fit it."""
        self.check(manifest)
        # A class with fewer images contributes all of them: a data set need not be balanced.
        most = self.per_class(split)
        held = manifest.train_per_class if split == "train" else manifest.val_per_class
        return sum(n if most is None else min(n, most) for n in held[: self.classes])

    def check(self, manifest: Manifest) -> None:
        """InputError if the subset does not fit `manifest`."""
        if self.classes is not None and not 1 <= self.classes <= len(manifest.classes):
            there = len(manifest.classes)
            raise InputError(f"{self.classes} classes requested, {manifest.name} has {there}: lower --classes")
        for most in (self.train_per_class, self.val_per_class):
            if most is not None and most < 1:
                raise InputError(f"{most} images per class requested, expected at least 1")


def save_manifest(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Write manifest.json into `folder`, atomically."""
    # A folder with a manifest counts as a finished data set, so half a manifest must never be visible.
    content = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1) + "\n"
    write_atomically(Path(folder, FILE_NAME), lambda path: path.write_text(content, encoding="utf-8"))


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder. InputError if it is missing, damaged or of another version."""
    path = Path(folder, FILE_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {FILE_NAME} in {folder}: run scripts/prepare.py to create it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({_one_line(error)}): prepare the data in another folder") from None
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != VERSION:
        raise InputError(
            f"{path} is of version {version}, this fastprune reads {VERSION}: prepare the data in another folder"
        )
    try:
        return _checked(content)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({_one_line(error)}): prepare the data in another folder") from None


def _checked(content: dict[str, Any]) -> Manifest:
    """The manifest in parsed JSON. KeyError, TypeError or ValueError if a field is missing or invalid."""
    # A file may be edited by hand or come from elsewhere, and its names become paths: check each field once, here.
    names = {field.name for field in fields(Manifest)}
    if content.keys() != names:
        raise ValueError(f"fields missing or unknown: {', '.join(sorted(names ^ content.keys()))}")
    for name in ("classes", "train_per_class", "val_per_class", "mean", "std"):
        content[name] = tuple(content[name])
    manifest = Manifest(**content)
    number = len(manifest.classes)
    rules = {
        "name": isinstance(manifest.name, str),
        "fingerprint": isinstance(manifest.fingerprint, str) and len(bytes.fromhex(manifest.fingerprint)) == 32,
        "classes": number > 0
        and len(set(manifest.classes)) == number
        and all(isinstance(c, str) for c in manifest.classes),
        "train_per_class": _counts(manifest.train_per_class, number),
        "val_per_class": _counts(manifest.val_per_class, number),
        "height": _counts((manifest.height, manifest.width), 2) and (manifest.height > 0) == (manifest.width > 0),
        "mean": len(manifest.mean) == 3 and all(math.isfinite(x) for x in manifest.mean),
        "std": len(manifest.std) == 3 and all(math.isfinite(x) and x > 0 for x in manifest.std),
        "train_file": _file(manifest.train_file, manifest.train_bytes),
        "val_file": _file(manifest.val_file, manifest.val_bytes),
    }
    for name, holds in rules.items():
        if not holds:
            raise ValueError(f"field {name}")
    return manifest


def _counts(values: tuple[int, ...], number: int) -> bool:
    return len(values) == number and all(type(n) is int and n >= 0 for n in values)


def _file(name: str | None, size: int | None) -> bool:
    # A base name only: a path could point outside the prepared folder.
    if name is None or size is None:
        return name is None and size is None
    return name == os.path.basename(name) and name not in ("", ".", "..") and type(size) is int and size > 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
