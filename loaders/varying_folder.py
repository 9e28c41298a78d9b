"""An image folder as ImageNet has it: which images there are, in which order, with which label.

    train/<class>/**/*.JPEG     val/<class>/**/*.JPEG

Ordered as torchvision's ImageFolder orders it, but hidden files and folders are left out. No image is opened here.
Standard library only.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastprune.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageFolder:
    """A scanned folder. classes: sorted; files of a split: paths below `root`, ordered; labels: indices into classes.

    listing: SHA-256 (hex) over names, labels, sizes and times: unchanged means that no image has to be read again.
    file_bytes: of each split, the sizes of all its files together.
    """

    root: Path
    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[int, ...]]
    listing: str
    file_bytes: dict[str, int]


def scan_images(folder: str | os.PathLike[str]) -> ImageFolder:
    """Read the folder. InputError names the first thing that is wrong there."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder" if root.exists() else f"no such data folder: {root}")
    if missing := [split for split in SPLITS if not (root / split).is_dir()]:
        raise InputError(f"{root} has no folder {missing[0]}: expected train/<class>/ and val/<class>/ with images")
    root = root.resolve()
    try:
        return _scan(root)
    except OSError as error:
        raise InputError(f"cannot read the data folder {root}: {error.filename}: {error.strerror}") from None


def _scan(root: Path) -> ImageFolder:
    classes = _folders(root / "train")
    if not classes:
        raise InputError(f"no class folders in {root / 'train'}: expected train/<class>/ with images")
    _same_classes(root, classes)
    listing = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    files: dict[str, tuple[str, ...]] = {}
    labels: dict[str, tuple[int, ...]] = {}
    total: dict[str, int] = {}
    for split in SPLITS:
        names: list[str] = []
        numbers: list[int] = []
        total[split] = 0
        for label, name in enumerate(classes):
            before = len(names)
            for path in _images(root / split / name):
                status = os.stat(path)
                names.append(os.path.relpath(path, root))
                total[split] += status.st_size
                line = f"{names[-1]}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
                listing.update(line.encode("utf-8", "surrogateescape"))
            if len(names) == before:
                raise InputError(f"no images in {root / split / name}: remove the class or unpack the data set again")
            numbers += [label] * (len(names) - before)
        files[split], labels[split] = tuple(names), tuple(numbers)
    return ImageFolder(root, classes, files, labels, listing.hexdigest(), total)


def _folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def _same_classes(root: Path, classes: tuple[str, ...]) -> None:
    held = _folders(root / "val")
    if not held:
        raise InputError(f"no class folders in {root / 'val'}: expected val/<class>/ with images, as in train")
    if odd := sorted(set(classes) ^ set(held)):
        where, other = ("train", "val") if odd[0] in classes else ("val", "train")
        raise InputError(
            f"{root / where} and {root / other} disagree on {len(odd)} classes, first {odd[0]} (in {where} only)"
        )


def _images(folder: Path) -> Iterator[str]:
    """Image files below a class folder, in torchvision's order: folders sorted by path, then files by name."""
    found = []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.append((path, names))
    for path, names in sorted(found):
        for name in sorted(names):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield os.path.join(path, name)


def _fail(error: OSError) -> None:
    raise error
