"""A copy of a data set in which all images have one size, as an image folder of PNG files."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from fastprune.errors import InputError
from fastprune.loaders.choice import source_folder
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.manifest import FILE_NAME, load_manifest
from fastprune.loaders.preparation import writing
from fastprune.loaders.samples import images_bar, in_processes, reason, unreadable_line

MARKER = "resized.json"
"""In the finished folder: which images it was made of, and their size."""
VERSION = 1  # of what `resized` does
_CHUNK = 50


def resize_images(
    source: str | os.PathLike[str], out: Path, size: int, *, workers: int | None = None, show: bool = True
) -> Path:
    """Writes each image of `source` (as `scan` reads it) at size x size, see `resized`, into `out`/NAME-size, where
    NAME is that of the data set; returns that folder.

    The copies lie in train/<class>/ and val/<class>/. Classes keep their order, and so their labels; the images of a
    class keep theirs. Finished copies of the same files are left alone; unfinished ones are made anew.  workers:
    processes, by default as many as there are processors.  show: progress on stderr.  InputError for images that cannot
    be read (all of them named, in a file in `out` if there are several), and where `out` holds another data set or the
    same in another size.
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
        try:
            _write(layout, part, size, workers, show)
            (part / MARKER).write_text(json.dumps({"made_of": made_of, "size": size}) + "\n", encoding="utf-8")
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def resized(image: Image.Image, size: int) -> Image.Image:
    """The image scaled so that its shorter side is `size`, and of that the middle, size x size.

    One call of Pillow's `resize` on the middle square, whose corner may lie between pixels, with its BILINEAR filter: a
    triangle that widens by the factor of reduction, which torchvision calls bilinear with antialiasing. An image that
    is of that size is not changed.
    """
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def resize_chunk(pairs: Sequence[tuple[str, str]], size: int) -> list[tuple[str, str]]:
    """What a process does: of each pair, an image file and where its copy goes. Returns name and reason of those that
    cannot be read.
    """
    unreadable = []
    for path, copy in pairs:
        try:
            with Image.open(path) as image:
                small = resized(image.convert("RGB"), size)
        except Exception as error:  # decoders of broken files raise nearly anything
            unreadable.append((path, reason(error)))
            continue
        small.save(copy, compress_level=1)
    return unreadable


def _check_free(out: Path, target: Path) -> None:
    """InputError where `out` is a finished data set that was not made of `target`."""
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
            copy = part / split / names[label] / f"{number:08d}.png"  # in the order of the original
            pairs.append((str(layout.root / name), str(copy)))
    unreadable: list[tuple[str, str]] = []
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    jobs = ((chunk, size) for chunk in chunks)
    with (
        images_bar("resizing", len(pairs), show) as bar,
        closing(in_processes(resize_chunk, jobs, workers)) as reports,
    ):
        for chunk, failed in zip(chunks, reports, strict=True):
            unreadable += failed
            bar.update(len(chunk))
    if unreadable:
        raise InputError(unreadable_line(unreadable, len(pairs), part.parent))


def _class_folders(classes: Sequence[str]) -> list[str]:
    """Names of folders that sort as the classes are numbered."""
    if list(classes) == sorted(classes) and not any("/" in name for name in classes):
        return list(classes)
    return [f"{label:05d} {name.replace('/', ' ')}" for label, name in enumerate(classes)]


def _made_of(folder: Path) -> str | None:
    """What its marker says; None without one that can be read."""
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
