"""Folders of images: which there are, in which order, with which label.

    Tiny ImageNet:  train/<wnid>/images/*.JPEG     val/images/*.JPEG     val/val_annotations.txt     [wnids.txt]
    MiniPlaces:     [images/]train/, [images/]val/     train.txt, val.txt     [categories.txt]     (see miniplaces.py)
    any other:      train/<class>/**/*.jpg         val/<class>/**/*.jpg                        (see varying_folder.py)

No image is opened here. Standard library only.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastprune.errors import InputError
from fastprune.loaders import miniplaces
from fastprune.loaders.varying_folder import EXTENSIONS, scan_images

FOLDER_NAME = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"


class Distributed(NamedTuple):
    """A data set as its authors give it. train, val: images of each class."""

    title: str
    classes: int
    train: int
    val: int


DISTRIBUTED = {
    FOLDER_NAME: Distributed("Tiny ImageNet", 200, 500, 50),
    miniplaces.NAME: Distributed("MiniPlaces", 100, 1000, 100),
}


@dataclass(frozen=True)
class Layout:
    """A scanned folder. name: of the data set, a key of DISTRIBUTED or the folder's own; classes: of MiniPlaces as
    numbered, else sorted; files of a split: paths below `root`, ordered; labels: indices into classes.

    Train is ordered as torchvision's ImageFolder orders it, by class and then by name; so is val of other folders, that
    of Tiny ImageNet and MiniPlaces by name.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[int, ...]]

    def per_class(self, split: str) -> tuple[int, ...]:
        """Number of images of each class."""
        count = Counter(self.labels[split])
        return tuple(count[label] for label in range(len(self.classes)))

    def listing(self) -> str:
        """SHA-256 (hex) over names, labels, sizes and times: unchanged means that no image has to be read again."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for split, files in self.files.items():
            for name, label in zip(files, self.labels[split], strict=True):
                status = os.stat(self.root / name)
                line = f"{split}\0{name}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
                digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def remark(self) -> str | None:
        """One line where the counts are not those of the data set as distributed (which is allowed), else None."""
        if self.name not in DISTRIBUTED:
            return None
        title, number, train, val = DISTRIBUTED[self.name]
        held = {split: self.per_class(split) for split in self.files}
        if held == {"train": (train,) * number, "val": (val,) * number}:
            return None
        spans = ", ".join(f"{_span(counts)} {split}" for split, counts in held.items())
        return (
            f"{self.root} holds {len(self.classes)} classes with {spans} images each, not the {number} classes with "
            f"{train} and {val} of {title} as distributed: going on with what is there"
        )


def recognised(folder: str | os.PathLike[str]) -> str | None:
    """Which data set as distributed the folder, or `tiny-imagenet-200` or `data` inside it, holds: a key of
    DISTRIBUTED. None for anything else, an ordinary image folder among them. InputError where it cannot be listed.
    """
    return _find(Path(folder))[0]


def scan(folder: str | os.PathLike[str]) -> Layout:
    """Read the folder, or the `tiny-imagenet-200` or the `data` (of MiniPlaces) inside it. InputError names the first
    thing that is wrong there.
    """
    folder = Path(folder)
    _check_folder(folder)
    name, root = _find(folder)
    if name == FOLDER_NAME:
        return _scan_tiny(root)
    if name == miniplaces.NAME:
        listed = miniplaces.read_lists(root)
        return Layout(name, root, listed.classes, listed.files, listed.labels)
    if not (root / "train").is_dir():
        raise InputError(
            f"{folder} holds neither Tiny ImageNet (train/<wnid>/images and val/val_annotations.txt), nor MiniPlaces "
            "(images/train, images/val, train.txt and val.txt), nor train/<class>/ and val/<class>/ with images"
        )
    found = scan_images(root)
    return Layout(root.name or "images", found.root, found.classes, found.files, found.labels)


def _find(folder: Path) -> tuple[str | None, Path]:
    """The data set's name as `recognised` has it, and its resolved root; for an ordinary image folder None and that."""
    try:
        for root in (folder, folder / FOLDER_NAME):
            if (root / "train").is_dir() and (root / "val").is_dir():
                if _is_tiny(root):
                    return FOLDER_NAME, root.resolve()
                return (miniplaces.NAME if miniplaces.has_lists(root) else None), root.resolve()
        if found := miniplaces.find_root(folder):
            return miniplaces.NAME, found
    except OSError as error:
        raise InputError(f"cannot read the data folder {folder}: {error.filename}: {error.strerror}") from None
    return None, folder.resolve()


def _is_tiny(root: Path) -> bool:
    """Whether val is as Tiny ImageNet's: all images in one folder, labels in a file (or lost). Once it is sorted into
    classes, as many tools want it, the whole is an ordinary image folder.
    """
    held = [entry.name for entry in os.scandir(root / "val") if _visible_folder(entry)]
    if (root / ANNOTATIONS).exists():
        return "images" in held or not held
    return held == ["images"] and not (root / "train" / "images").is_dir()


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise InputError(f"no such data folder: {folder}")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    try:
        if not any(folder.iterdir()):
            raise InputError(f"the data folder {folder} is empty")
    except OSError as error:
        raise InputError(f"cannot read the data folder {folder}: {error.strerror}") from None


def _scan_tiny(root: Path) -> Layout:
    classes = _classes(root)
    files: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(classes):
        below = f"train/{wnid}/images"
        names = _images(root / below)
        if not names:
            raise InputError(f"no images in {root / below}: remove the class or unpack the data set again")
        files += [f"{below}/{name}" for name in names]
        labels += [label] * len(names)
    val = _val_labels(root, classes)
    return Layout(
        name=FOLDER_NAME,
        root=root,
        classes=classes,
        files={"train": tuple(files), "val": tuple(f"val/images/{name}" for name in val)},
        labels={"train": tuple(labels), "val": tuple(val.values())},
    )


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in os.scandir(root / "train") if _visible_folder(entry)))
    if not classes:
        raise InputError(f"no class folders in {root / 'train'}: expected train/<wnid>/images")
    wnids = root / "wnids.txt"
    if wnids.is_file():
        named = set(wnids.read_text(encoding="utf-8").split())
        if odd := sorted(named ^ set(classes)):
            where = "wnids.txt only" if odd[0] in named else "train only"
            raise InputError(f"{wnids} and {root / 'train'} disagree on {len(odd)} classes, first {odd[0]} ({where})")
    return classes


def _visible_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _images(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError(f"missing folder {folder}: is the data set unpacked completely?")
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith("."))


def _val_labels(root: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Label of every image in val/images, in the order of their names."""
    path = root / ANNOTATIONS
    present = _images(root / "val" / "images")
    index = {wnid: label for label, wnid in enumerate(classes)}
    labels: dict[str, int] = {}
    for number, name, wnid in _annotations(path):
        if wnid not in index:
            raise InputError(f"{path}, line {number}: class {wnid} has no folder in {root / 'train'}")
        if name in labels:
            raise InputError(f"{path}, line {number}: {name} is annotated twice")
        labels[name] = index[wnid]
    if missing := sorted(labels.keys() - set(present)):
        raise InputError(
            f"{path} names {len(missing)} images that are not in {root / 'val/images'}, first {missing[0]}"
        )
    if unlabelled := sorted(set(present) - labels.keys()):
        raise InputError(f"{len(unlabelled)} images in {root / 'val/images'} are not in {path}, first {unlabelled[0]}")
    if not labels:
        raise InputError(f"no images in {root / 'val/images'}")
    return {name: labels[name] for name in present}


def _annotations(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, file name and class of every line; what follows (a bounding box) is not used."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"missing {path}: without it the images of val have no labels") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t")
        if len(columns) >= 2:
            yield number, columns[0], columns[1]
        elif line.strip():
            raise InputError(f"{path}, line {number}: expected a file name, a tab and a class")


def _span(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"
