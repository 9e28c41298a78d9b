"""Scan a folder of images: paths, order and labels, without opening an image. Standard library only.

    Tiny ImageNet:  train/<wnid>/images/*.JPEG     val/images/*.JPEG     val/val_annotations.txt     [wnids.txt]
    MiniPlaces:     images/train/**/*.jpg          images/val/*.jpg      train.txt, val.txt, categories.txt
    any other:      train/<class>/**/*.jpg         val/<class>/**/*.jpg

The first two are the layouts in which their authors distribute them. A line of MiniPlaces' train.txt is
"train/a/abbey/00000001.jpg 0", of categories.txt "/a/abbey 0".
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastprune.errors import InputError

TINY_IMAGENET, MINIPLACES = "tiny-imagenet-200", "miniplaces"
ANNOTATIONS = "val/val_annotations.txt"
CATEGORIES = "categories.txt"
SPLITS = ("train", "val")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's ImageFolder's


class Distributed(NamedTuple):
    """A data set as its authors distribute it. classes: their number. train, val: images per class."""

    title: str
    classes: int
    train: int
    val: int


DISTRIBUTED = {
    TINY_IMAGENET: Distributed("Tiny ImageNet", 200, 500, 50),
    MINIPLACES: Distributed("MiniPlaces", 100, 1000, 100),
}


@dataclass(frozen=True)
class Layout:
    """A scanned folder.

    name: a key of DISTRIBUTED, or the folder's own name.  classes: as numbered by MiniPlaces, else sorted.  files: of
    each split, paths relative to `root`, in order.  labels: of each split, indices into classes.

    train is ordered by class and then by path, as by torchvision's ImageFolder.  val of Tiny ImageNet and MiniPlaces is
    ordered by path, that of other folders as train is.  Hidden files and folders are skipped.  Links to files and
    folders are followed.
    """

    # The order is part of a data set's identity: fingerprints, data order and subsets depend on it. It must not depend
    # on the file system, so it comes from sorted names.

    name: str
    root: Path
    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[int, ...]]

    def per_class(self, split: str) -> tuple[int, ...]:
        """Number of images of each class in `split`."""
        count = Counter(self.labels[split])
        return tuple(count[label] for label in range(len(self.classes)))

    def listing(self) -> str:
        """SHA-256 (hex) over names, labels, file sizes and modification times.

        If it is unchanged, no image has to be read again.  InputError if a file is gone, or is a link to nowhere.
        """
        # Names on Linux are bytes: surrogateescape also encodes those that are not UTF-8.
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        with _readable(self.root):
            for split, files in self.files.items():
                for name, label in zip(files, self.labels[split], strict=True):
                    status = os.stat(self.root / name)
                    line = f"{split}\0{name}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
                    digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def remark(self) -> str | None:
        """One line of warning if the counts are not those of the data set as distributed, else None."""
        if self.name not in DISTRIBUTED:
            return None
        title, number, train, val = DISTRIBUTED[self.name]
        held = {split: self.per_class(split) for split in self.files}
        if held == {"train": (train,) * number, "val": (val,) * number}:
            return None
        spans = ", ".join(f"{_span(counts)} {split}" for split, counts in held.items())
        return (
            f"{self.root} holds {len(self.classes)} classes with {spans} images each, not the {number} classes with "
            f"{train} and {val} of {title} as distributed: continuing with the images found"
        )


def recognised(folder: str | os.PathLike[str]) -> str | None:
    """The data set (a key of DISTRIBUTED) that the folder, or `tiny-imagenet-200` inside it, holds as distributed.

    None for anything else, including other image folders.  InputError if the folder cannot be listed.
    """
    with _readable(Path(folder)):
        return _find(Path(folder))[0]


def scan(folder: str | os.PathLike[str]) -> Layout:
    """Scan the folder, or `tiny-imagenet-200` inside it. InputError names the first problem."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder" if folder.exists() else f"no such data folder: {folder}")
    with _readable(folder):
        if not any(folder.iterdir()):
            raise InputError(f"the data folder {folder} is empty")
        name, root = _find(folder)
        if name == TINY_IMAGENET:
            return _scan_tiny_imagenet(root)
        if name == MINIPLACES:
            return _scan_miniplaces(root)
        if (root / "train").is_dir() and not _is_images_of_miniplaces(root):
            return _scan_classes(root)
    if above := _data_set_above(folder):
        raise InputError(f"{folder} is a part of a data set: give the whole, {above}")
    raise InputError(
        f"{folder} holds neither Tiny ImageNet (train/<wnid>/images and val/val_annotations.txt), nor MiniPlaces "
        "(images/train, images/val, train.txt and val.txt), nor train/<class>/ and val/<class>/ with images"
    )


def _data_set_above(folder: Path) -> Path | None:
    """The folder of the data set of which `folder` is a split, a class or all images, None if it is none."""
    for inside in (folder, folder / "..", folder / ".." / ".."):
        split = folder.resolve().relative_to(inside.resolve()).parts[:1]
        if _is_images_of_miniplaces(inside):
            whole = inside / ".."
        elif split and split[0] in SPLITS and all((inside / name).is_dir() for name in SPLITS):
            whole = inside
        else:
            continue
        plain = Path(os.path.normpath(whole))
        return plain if plain.resolve() == whole.resolve() else whole.resolve()
    return None


def _is_images_of_miniplaces(folder: Path) -> bool:
    # Another data set may be in a folder of that name, beside a list: its val has folders of classes.
    val = folder / "val"
    listed = folder.resolve().name == "images" and (folder / ".." / "train.txt").is_file()
    return listed and val.is_dir() and not _folders(val)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """InputError if a folder cannot be listed, or a file in it not be found."""
    try:
        yield
    except OSError as error:
        what = error.filename or folder
        raise InputError(f"cannot read the data folder {folder}: {what}: {error.strerror}") from None


def _find(folder: Path) -> tuple[str | None, Path]:
    """Name of the data set as `recognised` gives it, None for other folders, and its resolved root."""
    for root in (folder, folder / TINY_IMAGENET):
        if (root / "train").is_dir() and (root / "val").is_dir():
            return (TINY_IMAGENET if _is_tiny_imagenet(root) else None), root.resolve()
    return (MINIPLACES if (folder / "images" / "train").is_dir() else None), folder.resolve()


def _is_tiny_imagenet(root: Path) -> bool:
    """Whether val has Tiny ImageNet's layout: all images in one folder, labels in a file (which may be missing)."""
    # Many scripts sort val into class folders; the result is an ordinary image folder and is read as one. A missing
    # annotation file still counts as Tiny ImageNet, so that the message names the file and not the layout.
    held = _folders(root / "val")
    if (root / ANNOTATIONS).exists():
        return "images" in held or not held
    return held == ("images",) and not (root / "train" / "images").is_dir()


def _folders(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _span(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


# Any folder


def _scan_classes(root: Path) -> Layout:
    classes = {split: _classes(root, split) for split in SPLITS}
    if odd := sorted(set(classes["train"]) ^ set(classes["val"])):
        where, other = SPLITS if odd[0] in classes["train"] else SPLITS[::-1]
        raise InputError(
            f"{root / where} and {root / other} disagree on {len(odd)} classes, first {odd[0]} (in {where} only)"
        )
    files: dict[str, tuple[str, ...]] = {}
    labels: dict[str, tuple[int, ...]] = {}
    for split in SPLITS:
        names: list[list[str]] = []
        for name in classes[split]:
            held = list(_files_below(root / split / name))
            names.append([path for path in held if _is_image(os.path.basename(path))])
            if not names[-1]:
                raise InputError(_no_images(root / split / name, held))
        files[split] = tuple(os.path.relpath(path, root) for held in names for path in held)
        labels[split] = tuple(label for label, held in enumerate(names) for _ in held)
    return Layout(root.name or "images", root, classes["train"], files, labels)


def _classes(root: Path, split: str) -> tuple[str, ...]:
    if not (root / split).is_dir():
        raise InputError(f"{root} has no folder {split}: expected train/<class>/ and val/<class>/ with images")
    if not (classes := _folders(root / split)):
        raise InputError(f"no class folders in {root / split}: expected {split}/<class>/ with images")
    return classes


def _files_below(folder: Path) -> Iterator[str]:
    """Files below a class folder, in torchvision's order: folders sorted by path, then files by name."""
    # os.walk ignores folders that cannot be listed unless it is given onerror: their images would silently be missing.
    found = []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _check_no_loop(folder, Path(path, name))
        found.append((path, names))
    for path, names in sorted(found):
        yield from (os.path.join(path, name) for name in sorted(names))


def _fail(error: OSError) -> None:
    raise error


def _check_no_loop(folder: Path, path: Path) -> None:
    """InputError if `path`, below `folder`, is a link to a folder through which the walk has come, or to one above."""
    # os.walk would follow the loop until the system refuses, 40 times, and find each image as often.
    if path.is_symlink():
        target = path.resolve()
        if any(above.resolve().is_relative_to(target) for above in path.parents if above.is_relative_to(folder)):
            raise InputError(f"{path} is a link to {target}, which contains it: remove the link")


def _no_images(folder: Path, held: Iterable[str]) -> str:
    """Message for a folder without images. held: paths of its files."""
    names = (name for name in map(os.path.basename, held) if not name.startswith("."))
    count = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in names)
    if not count:
        return f"no images in {folder}: unpack the data set again, or remove the folder"
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))
    accepted = ", ".join(EXTENSIONS)
    return f"no images in {folder}, only other files ({found}): convert them, images are read from {accepted}"


# Tiny ImageNet


def _scan_tiny_imagenet(root: Path) -> Layout:
    classes = _folders(root / "train")
    if not classes:
        raise InputError(f"no class folders in {root / 'train'}: expected train/<wnid>/images")
    _compare_wnids(root, classes)
    files: list[str] = []
    labels: list[int] = []
    for label, wnid in enumerate(classes):
        below = f"train/{wnid}/images"
        names = _images(root / below)
        files += [f"{below}/{name}" for name in names]
        labels += [label] * len(names)
    val = _annotated(root, classes)
    return Layout(
        name=TINY_IMAGENET,
        root=root,
        classes=classes,
        files={"train": tuple(files), "val": tuple(f"val/images/{name}" for name in val)},
        labels={"train": tuple(labels), "val": tuple(val.values())},
    )


def _compare_wnids(root: Path, classes: tuple[str, ...]) -> None:
    """InputError if wnids.txt is present and its classes are not the class folders."""
    wnids = root / "wnids.txt"
    if wnids.is_file():
        named = set(wnids.read_text(encoding="utf-8").split())
        if odd := sorted(named ^ set(classes)):
            where = "wnids.txt only" if odd[0] in named else "train only"
            raise InputError(f"{wnids} and {root / 'train'} disagree on {len(odd)} classes, first {odd[0]} ({where})")


def _images(folder: Path) -> list[str]:
    """Names of the image files in `folder`, sorted. InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"missing folder {folder}: is the data set unpacked completely?")
    if names := sorted(filter(_is_image, os.listdir(folder))):
        return names
    raise InputError(_no_images(folder, (entry.name for entry in os.scandir(folder) if entry.is_file())))


def _annotated(root: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Label of every image in val/images, ordered by name.

    Columns after the class (a bounding box) are ignored.  InputError if images and annotations do not match.
    """
    path = root / ANNOTATIONS
    if not path.exists():
        raise InputError(f"missing {path}: without it the images of val have no labels")
    present = _images(root / "val" / "images")
    index = {wnid: label for label, wnid in enumerate(classes)}
    labels: dict[str, int] = {}
    for number, line in _lines(path):
        name, tab, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not tab:
            raise InputError(f"{path}, line {number}: expected a file name, a tab and a class")
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
    return {name: labels[name] for name in present}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and content of every line that is not empty. InputError if the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


# MiniPlaces


def _scan_miniplaces(root: Path) -> Layout:
    """Scan MiniPlaces. Labels come from its lists; other files (images/test, objects/) are ignored."""
    # Sorted here, which is also the order of the distributed lists: a user may have shuffled or regenerated them.
    for name in (*(f"{split}.txt" for split in SPLITS), CATEGORIES):
        if not (root / name).exists():
            raise InputError(
                f"missing {root / name}: put train.txt, val.txt and {CATEGORIES} of MiniPlaces' development kit "
                f"(out of its data/) beside {root / 'images'}"
            )
    classes = _categories(root / CATEGORIES)
    labels = {split: _listed(root, split, len(classes)) for split in SPLITS}
    if missing := sorted(set(range(len(classes))) - set(labels["train"].values())):
        raise InputError(
            f"{root / 'train.txt'} has no image of {len(missing)} of the {len(classes)} classes in {CATEGORIES}, first "
            f"class {missing[0]}"
        )
    train = sorted(labels["train"], key=lambda name: (labels["train"][name], name))
    names = {"train": train, "val": sorted(labels["val"])}
    return Layout(
        name=MINIPLACES,
        root=root,
        classes=classes,
        files={split: tuple(f"images/{name}" for name in names[split]) for split in SPLITS},
        labels={split: tuple(labels[split][name] for name in names[split]) for split in SPLITS},
    )


def _categories(path: Path) -> tuple[str, ...]:
    """Names of the classes by label, without the leading slash."""
    names: dict[int, str] = {}
    for line, word, label in _entries(path, "/a/abbey"):
        name = word.strip("/")
        if label in names or name in names.values() or not name:
            raise InputError(f"{path}, line {line}: class {label} or its name {word!r} is listed twice, or is empty")
        names[label] = name
    if not names:
        raise InputError(f"{path} names no classes: unpack the development kit again")
    if missing := sorted(set(range(len(names))) - names.keys()):
        raise InputError(f"{path} names {len(names)} classes, but not class {missing[0]}: expected 0, 1, 2 and so on")
    return tuple(names[label] for label in range(len(names)))


def _listed(root: Path, split: str, classes: int) -> dict[str, int]:
    """Label of every image in the list of `split`, by its path below images/."""
    path, images = root / f"{split}.txt", root / "images"
    labels: dict[str, int] = {}
    for line, name, label in _entries(path, f"{split}/.../00000001.jpg"):
        # A path that leaves the folder (".." or "\0") is rejected before any file is touched.
        parts = name.split("/")
        if parts[0] != split or len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts) or "\0" in name:
            raise InputError(f"{path}, line {line}: {name!r} is no path below {split}/")
        if name in labels:
            raise InputError(f"{path}, line {line}: {name} is listed twice")
        if label >= classes:
            raise InputError(
                f"{path}, line {line}: {name} is of class {label}, but the classes in {CATEGORIES} are 0 to "
                f"{classes - 1}"
            )
        labels[name] = label
    if not labels:
        raise InputError(f"{path} names no images")
    if missing := _missing(images, labels):
        raise InputError(f"{path} names {len(missing)} images that are not in {images}, first {min(missing)}")
    return labels


def _entries(path: Path, example: str) -> Iterator[tuple[int, str, int]]:
    """Line number (from 1), name and class of every line that is not empty."""
    for number, line in _lines(path):
        columns = line.split()
        if len(columns) != 2:
            raise InputError(f"{path}, line {number}: expected a name and a class, as in {example + ' 0'!r}")
        if not re.fullmatch("[0-9]{1,6}", columns[1]):
            raise InputError(f"{path}, line {number}: class {columns[1]!r} is no whole number (0, 1, 2 and so on)")
        yield number, columns[0], int(columns[1])


def _missing(images: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not files below `images`."""
    # One listing per folder instead of one stat per image.
    held: dict[str, set[str]] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        if folder not in held:
            path = images / folder
            held[folder] = {e.name for e in os.scandir(path) if e.is_file()} if path.is_dir() else set()
    return [name for name in names if name.rpartition("/")[2] not in held[name.rpartition("/")[0]]]
