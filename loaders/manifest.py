"""What a data set is, on one page of JSON: enough to plan a figure without reading an image. Standard library only."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import write_atomically

VERSION = 1
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A data set of RGB images in two splits.

    fingerprint: SHA-256 (hex) over the ordered labels and decoded pixels, train before val; it is the data's identity
    in every key. Generated data: over the generator's version and parameters. Empty where no image has been read.
    train_per_class, val_per_class: images of each class.  height, width: pixels, of every image; 0 where images may
    differ in size.  mean, std: per channel, as fractions of full scale, over the pixels of the train split; 0 and 1
    where no image has been read.
    train_file, val_file, train_bytes, val_bytes: the .beton files beside the manifest and their sizes, or None.
    source: the image folder they were made from, or None; relative paths are relative to the manifest.
    listing: SHA-256 (hex) over names, sizes and times of that folder's files when it was read.
    synthetic: the parameters of generated data, or None.
    """

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
        """Whether all images have one size. Others are cropped as they are read."""
        return self.height > 0

    @property
    def train_count(self) -> int:
        return sum(self.train_per_class)

    @property
    def val_count(self) -> int:
        return sum(self.val_per_class)

    def count(self, split: str) -> int:
        """Images in "train" or "val"."""
        return {"train": self.train_count, "val": self.val_count}[split]

    def file(self, split: str) -> tuple[str | None, int | None]:
        """Name and size in bytes of the split's .beton file, or None twice."""
        return {"train": (self.train_file, self.train_bytes), "val": (self.val_file, self.val_bytes)}[split]


@dataclass(frozen=True)
class Subset:
    """A part of a data set: the first `classes` classes, and of each the first images in stored order. None is all."""

    classes: int | None = None
    train_per_class: int | None = None
    val_per_class: int | None = None

    def per_class(self, split: str) -> int | None:
        return {"train": self.train_per_class, "val": self.val_per_class}[split]

    def count(self, manifest: Manifest, split: str) -> int:
        """Images of `split` in this subset of `manifest`. InputError where it asks for what is not there."""
        self.check(manifest)
        most = self.per_class(split)
        held = manifest.train_per_class if split == "train" else manifest.val_per_class
        return sum(n if most is None else min(n, most) for n in held[: self.classes])

    def check(self, manifest: Manifest) -> None:
        if self.classes is not None and not 1 <= self.classes <= len(manifest.classes):
            raise InputError(f"{self.classes} classes asked for, {manifest.name} has {len(manifest.classes)}")
        for most in (self.train_per_class, self.val_per_class):
            if most is not None and most < 1:
                raise InputError(f"{most} images a class asked for: at least 1 is needed")


def save_manifest(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Write manifest.json into `folder`, all or nothing: a folder that has one is a finished data set."""
    content = json.dumps({"version": VERSION, **asdict(manifest)}, indent=1) + "\n"
    write_atomically(Path(folder, FILE_NAME), lambda path: path.write_text(content, encoding="utf-8"))


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder. InputError where there is none, or one that this version cannot read."""
    path = Path(folder, FILE_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {FILE_NAME} in {folder}: scripts/prepare_data.py makes one") from None
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
    if name is None or size is None:
        return name is None and size is None
    return name == os.path.basename(name) and name not in ("", ".", "..") and type(size) is int and size > 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
