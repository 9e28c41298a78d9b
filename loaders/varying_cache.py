"""Where the .beton files of an image folder are kept: found if they are there and whole, else written.

    <cache>/<listing>/train.beton  val.beton  varying.json

The folder is named by the listing, the hash over names, labels, sizes and times of the image files; varying.json says
the same in full, and is moved into place last. When the images change, new files are written beside the old.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.loaders.inspection import progress_bar
from fastprune.loaders.publish import UNFINISHED, writing
from fastprune.loaders.varying_beton import Table, read_table, write_varying
from fastprune.loaders.varying_folder import SPLITS, ImageFolder

VERSION = 1
FILE_NAME = "varying.json"


def cache_folder(images: ImageFolder, cache: Path | None) -> Path:
    """Where the files of these images are, or would be."""
    return (images.root.parent / ".fastprune" if cache is None else Path(cache)) / images.listing[:16]


def is_cached(images: ImageFolder, cache: Path | None) -> bool:
    """Whether they have been written. Whether they are whole is seen when they are opened."""
    return (cache_folder(images, cache) / FILE_NAME).exists()


def cached_tables(images: ImageFolder, cache: Path | None, threads: int) -> dict[str, Table]:
    """The checked tables of both files, which are written first where they are missing, with `threads` threads.

    InputError where a file is truncated, foreign or damaged, an image cannot be read, or the disk takes no more.
    """
    folder = cache_folder(images, cache)
    if not is_cached(images, cache):
        with writing(folder):
            if not is_cached(images, cache):  # another process may have been faster
                _write(images, folder, threads)
    return _open(images, folder)


def _open(images: ImageFolder, folder: Path) -> dict[str, Table]:
    path = folder / FILE_NAME
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): remove its folder and run again") from None
    expected = {"version": VERSION, "listing": images.listing}
    if not isinstance(content, dict) or {name: content.get(name) for name in expected} != expected:
        raise InputError(f"{path} is of another version or of other images: remove its folder and run again")
    tables = {}
    for split in SPLITS:
        tables[split] = read_table(folder / f"{split}.beton")
        if tables[split].labels.tolist() != list(images.labels[split]):
            raise InputError(f"{tables[split].path} holds other images than {path} says: remove its folder")
    return tables


def _write(images: ImageFolder, folder: Path, threads: int) -> None:
    needed, free = sum(images.file_bytes.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {free / 1e6:,.0f} MB free, the .beton files take at least {needed / 1e6:,.0f} MB: "
            "make room or choose another folder"
        )
    part = folder / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with progress_bar(sum(map(len, images.files.values())), "writing .beton files", show=True) as bar:
            for split in SPLITS:
                files = [images.root / name for name in images.files[split]]
                write_varying(part / f"{split}.beton", files, images.labels[split], threads, bar.update)
        content = {"version": VERSION, "listing": images.listing, "source": str(images.root)}
        counts = {split: len(images.files[split]) for split in SPLITS}
        (part / FILE_NAME).write_text(json.dumps({**content, **counts}, indent=1) + "\n", encoding="utf-8")
        for name in (*(f"{split}.beton" for split in SPLITS), FILE_NAME):
            os.replace(part / name, folder / name)
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    finally:
        shutil.rmtree(part, ignore_errors=True)
