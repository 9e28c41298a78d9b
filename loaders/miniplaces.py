"""MiniPlaces as it is distributed: which images there are, in which order, with which label.

    images/train/<letter>/<category>[/<subcategory>]/00000001.jpg     images/val/00000001.jpg
    train.txt, val.txt: a line an image, "train/a/abbey/00000001.jpg 0"     [categories.txt: "/a/abbey 0"]

One archive holds images/, the lists come with the development kit: `list_folders` says where they may lie. Copies with
train/ and val/ beside the lists, without images/, are read too. Labels are those of the lists, and what they do not
name is not read; images/test has no labels. Standard library only.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastprune.errors import InputError

NAME = "miniplaces"
SPLITS = ("train", "val")


class Contents(NamedTuple):
    """classes: by label; files of a split: paths below the root, ordered; labels: indices into classes."""

    classes: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[int, ...]]


class Entry(NamedTuple):
    """What a line of a list says of an image, and which line."""

    label: int
    line: int


def find_root(folder: Path) -> Path | None:
    """`folder`, or `data` inside it, whichever holds images/train; None where neither does."""
    for root in (folder, folder / "data"):
        if (root / "images" / "train").is_dir():
            return root.resolve()
    return None


def has_lists(root: Path) -> bool:
    """Whether train/ and val/ in `root` itself go with lists: images of val are not sorted into classes. OSError where
    val/ cannot be listed.
    """
    with os.scandir(root / "val") as entries:
        if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
            return False
    return any((folder / f"{split}.txt").is_file() for folder in list_folders(root) for split in SPLITS)


def list_folders(root: Path) -> tuple[Path, ...]:
    """Where the lists may be, the first first: beside images/; in the development kit unpacked there; in the kit's own
    data/, unpacked or cloned there; and in the kit beside `root`.
    """
    kit = Path("development_kit", "data")
    return (root, root / kit, root / "data", root.parent / kit)


def read_lists(root: Path) -> Contents:
    """Train by class and then by path, val by path, whatever the order of the lines (the distributed lists have this
    very order). InputError names the first thing that is wrong with the lists, or an image they name that is missing.
    """
    folder = _list_folder(root)
    images = "images/" if (root / "images" / "train").is_dir() else ""
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    named = _categories(folder / "categories.txt")
    entries = {split: _entries(path, split) for split, path in paths.items()}
    number = len(named) if named else 1 + max(entry.label for entry in entries["train"].values())
    _check_labels(paths, entries, number, f"{folder / 'categories.txt' if named else paths['train']}")
    for split in SPLITS:
        _check_present(root / images, entries[split], paths[split])
    train = sorted(entries["train"], key=lambda name: (entries["train"][name].label, name))
    names = {"train": train, "val": sorted(entries["val"])}
    return Contents(
        classes=named or _folder_names(train, entries["train"], paths["train"]),
        files={split: tuple(f"{images}{name}" for name in names[split]) for split in SPLITS},
        labels={split: tuple(entries[split][name].label for name in names[split]) for split in SPLITS},
    )


def _list_folder(root: Path) -> Path:
    for folder in list_folders(root):
        held = [split for split in SPLITS if (folder / f"{split}.txt").is_file()]
        if len(held) == 1:
            other = SPLITS[1 - SPLITS.index(held[0])]
            raise InputError(f"missing {folder / other}.txt: {folder} holds only the {held[0]} list of MiniPlaces")
        if held:
            return folder
    raise InputError(
        f"no train.txt and val.txt for the images in {root / 'images'}: put the lists of the development kit (its "
        f"data/*.txt) into {root} or {root / 'development_kit' / 'data'}"
    )


def _entries(path: Path, split: str) -> dict[str, Entry]:
    """Label of every listed image, by its path below images/."""
    entries: dict[str, Entry] = {}
    for line, name, label in _lines(path, f"{split}/.../00000001.jpg"):
        parts = name.split("/")
        if parts[0] != split or len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts) or "\0" in name:
            raise InputError(f"{path}, line {line}: {name!r} is no path below {split}/")
        if name in entries:
            raise InputError(f"{path}, line {line}: {name} is listed twice, first in line {entries[name].line}")
        entries[name] = Entry(label, line)
    if not entries:
        raise InputError(f"{path} names no images")
    return entries


def _categories(path: Path) -> tuple[str, ...]:
    """Names of the classes by label, without the slash they begin with; empty where there is no such file."""
    if not path.exists():
        return ()
    names: dict[int, str] = {}
    seen = {""}
    for line, word, label in _lines(path, "/a/abbey"):
        name = word.strip("/")
        if label in names or name in seen:
            raise InputError(f"{path}, line {line}: class {label} or its name {word!r} is there twice, or is empty")
        names[label] = name
        seen.add(name)
    if not names:
        raise InputError(f"{path} names no classes: remove it, or unpack the development kit again")
    if missing := _missing(names):
        raise InputError(f"{path} names {len(names)} classes, but not class {missing[0]}: expected 0, 1, 2 and so on")
    return tuple(names[label] for label in range(len(names)))


def _lines(path: Path, example: str) -> Iterator[tuple[int, str, int]]:
    """Line number, name and class of every line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, start=1):
        columns = line.split()
        if columns and len(columns) != 2:
            raise InputError(f"{path}, line {number}: expected a name and a class, as in {example + ' 0'!r}")
        if columns:
            if not re.fullmatch("[0-9]{1,6}", columns[1]):
                raise InputError(f"{path}, line {number}: class {columns[1]!r} is no whole number (0, 1, 2 and so on)")
            yield number, columns[0], int(columns[1])


def _check_labels(paths: dict[str, Path], entries: dict[str, dict[str, Entry]], number: int, source: str) -> None:
    for split, listed in entries.items():
        for name, entry in listed.items():
            if entry.label >= number:
                known = f"the classes of {source} are 0 to {number - 1}"
                raise InputError(f"{paths[split]}, line {entry.line}: {name} is of class {entry.label}, but {known}")
    if missing := _missing({entry.label for entry in entries["train"].values()}, number):
        raise InputError(
            f"{paths['train']} has no image of {len(missing)} of {number} classes ({source}), first class {missing[0]}"
        )


def _missing(labels: Iterable[int], number: int | None = None) -> list[int]:
    """Which of 0 to `number` - 1 are not there; by default as many as there are labels."""
    held = set(labels)
    return sorted(set(range(len(held) if number is None else number)) - held)


def _check_present(images: Path, names: Iterable[str], path: Path) -> None:
    held: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in held:
            held[folder] = _files(images / folder)
        if file not in held[folder]:
            missing.append(name)
    if missing:
        raise InputError(f"{path} names {len(missing)} images that are not in {images}, first {min(missing)}")


def _files(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None


def _folder_names(train: Iterable[str], entries: dict[str, Entry], path: Path) -> tuple[str, ...]:
    """Name of each class by the folder of its first image: "a/abbey", as categories.txt would have it."""
    names: dict[int, str] = {}
    for name in train:
        names.setdefault(entries[name].label, "/".join(name.split("/")[1:-1]))
    if "" in names.values() or len(set(names.values())) < len(names):
        raise InputError(f"the folders in {path} do not tell the classes apart: put categories.txt beside it")
    return tuple(names[label] for label in sorted(names))
