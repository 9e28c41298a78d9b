"""Copy a data set into an image folder of PNG files that all have one size."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from fastprune.errors import InputError
from fastprune.loaders.choice import source_folder
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.manifest import FILE_NAME, load_manifest
from fastprune.loaders.preparation import writing
from fastprune.loaders.samples import (
    has_rotation,
    images_bar,
    in_processes,
    reason,
    rotation_line,
    to_rgb,
    unreadable_line,
)

MARKER = "resized.json"
"""In a finished folder: a digest of the source files, and the size."""
VERSION = 1  # of the pixels that `resized` gives
_CHUNK = 50


def resize_images(
    source: str | os.PathLike[str], out: Path, size: int, *, workers: int | None = None, show: bool = True
) -> Path:
    """Write each image of `source` (see `scan`) at size x size pixels (see `resized`) into `out`/NAME-size; return it.

    NAME is the name of the data set.  The copies are train/<class>/*.png and val/<class>/*.png; labels and the order of
    the images within a class are those of the source.  A finished copy of the same files is reused, an unfinished one
    is written again.  workers: processes, by default one per available processor.  show: progress, and a line on EXIF
    rotations, on stderr.  InputError if images cannot be read (several are listed in a file in `out`), or if `out`
    holds another data set or the same in another size.
    """
    layout = scan(source)
    target = out / f"{layout.name}-{size}"
    made_of = hashlib.sha256(f"{layout.listing()} {size} {VERSION}".encode()).hexdigest()
    workers = workers or len(os.sched_getaffinity(0))
    with writing(out):
        _check_free(out, target)
        if target.exists():
            if _made_of(target) == made_of:
                return target
            raise InputError(f"{target} holds other images, or the same before they changed: choose another --out")
        part = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(part, ignore_errors=True)
        # Renamed when it is complete, so that a killed call leaves no folder that looks finished.
        try:
            _write(layout, part, size, workers, show)
            (part / MARKER).write_text(json.dumps({"made_of": made_of, "size": size}) + "\n", encoding="utf-8")
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def resized(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side of `image` to `size` pixels and crop the centre: size x size.

    Bilinear with antialiasing (Pillow's BILINEAR).  An image of that size keeps its pixels.
    """
    # One resampling of the central square, whose corner may lie between pixels: resizing first would compute pixels
    # that the crop then discards.
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def resize_chunk(pairs: Sequence[tuple[str, str]], size: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Resize the image file of each pair (source path, path of the copy). Runs in a worker process.

    Returns path and reason of each image that cannot be read, and the paths of images with an EXIF rotation.
    """
    unreadable, rotated = [], []
    for path, copy in pairs:
        try:
            with Image.open(path) as image:
                small = resized(to_rgb(image), size)
                if has_rotation(image):
                    rotated.append(path)
        except Exception as error:  # decoders of broken files raise nearly anything
            unreadable.append((path, reason(error)))
            continue
        # Lossless, so that the copy adds no second JPEG loss. Level 1: speed counts more than size here.
        small.save(copy, compress_level=1)
    return unreadable, rotated


def _check_free(out: Path, target: Path) -> None:
    """InputError if `out` is a prepared data set whose source is not `target`."""
    if not (out / FILE_NAME).exists():
        return
    manifest = load_manifest(out)
    source = source_folder(manifest, out)
    if source is None or source.resolve() != target.resolve():
        raise InputError(
            f"{out} already holds {manifest.name}, {manifest.height}x{manifest.width}: "
            "choose another --out, or remove it"
        )


def _write(layout: Layout, part: Path, size: int, workers: int, show: bool) -> None:
    names = _class_folders(layout.classes)
    pairs: list[tuple[str, str]] = []
    for split, files in layout.files.items():
        for name in names:
            (part / split / name).mkdir(parents=True)
        for number, (name, label) in enumerate(zip(files, layout.labels[split], strict=True)):
            # Numbered, so that sorting by name gives the order of the source.
            copy = part / split / names[label] / f"{number:08d}.png"
            pairs.append((str(layout.root / name), str(copy)))
    unreadable: list[tuple[str, str]] = []
    rotated: list[str] = []
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    jobs = ((chunk, size) for chunk in chunks)
    with (
        images_bar("resizing", len(pairs), show) as bar,
        closing(in_processes(resize_chunk, jobs, workers)) as reports,
    ):
        for chunk, (failed, turned) in zip(chunks, reports, strict=True):
            unreadable += failed
            rotated += turned
            bar.update(len(chunk))
    if unreadable:
        raise InputError(unreadable_line(unreadable, len(pairs), part.parent))
    if show and rotated:
        print(rotation_line(rotated, len(pairs)), file=sys.stderr)


def _class_folders(classes: Sequence[str]) -> list[str]:
    """Folder names whose sorted order is the order of the labels."""
    if list(classes) == sorted(classes) and not any("/" in name for name in classes):
        return list(classes)
    return [f"{label:05d} {name.replace('/', ' ')}" for label, name in enumerate(classes)]


def _made_of(folder: Path) -> str | None:
    """The digest in the folder's marker, or None if there is no readable marker."""
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
