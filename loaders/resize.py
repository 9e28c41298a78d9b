"""A copy of a data set in which all images have one size, as an image folder of PNG files."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastprune.errors import InputError
from fastprune.loaders.child import ChildError, Send
from fastprune.loaders.inspection import from_children, progress_bar
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.publish import writing

MARKER = "resized.json"
"""In the finished folder: which images it was made of, and their size."""
_CHUNK = 50


@dataclass(frozen=True)
class _Job:
    """Image files and where their copies go."""

    pairs: Sequence[tuple[str, str]]
    size: int


def resize_images(
    source: str | os.PathLike[str], out: Path, size: int, *, workers: int | None = None, show: bool = True
) -> Path:
    """Writes each image of `source` (as `scan` reads it) at size x size into the folder `out`/NAME-size, where NAME is
    that of the data set; returns that folder.

    The shorter side is brought to `size` by Pillow's antialiased bilinear filter, and the middle is cut out. The copies
    lie in train/<class>/ and val/<class>/; classes keep their order. Finished copies of the same images are left
    alone. InputError for images that cannot be read, and where the folder holds something else.
    """
    layout = scan(source)
    target = out / f"{layout.name}-{size}"
    made_of = hashlib.sha256(f"{layout.listing()} {size}".encode()).hexdigest()
    workers = workers or len(os.sched_getaffinity(0))
    with writing(out):
        if target.exists():
            if _marked(target) == made_of:
                return target
            raise InputError(f"{target} holds other images: choose another --out")
        part = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(part, ignore_errors=True)
        try:
            try:
                _write(layout, part, size, workers, show)
            except ChildError as error:
                raise InputError(f"cannot write to {out}: {error}; choose another folder") from None
            (part / MARKER).write_text(json.dumps({"made_of": made_of, "size": size}) + "\n")
            os.replace(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _write(layout: Layout, part: Path, size: int, workers: int, show: bool) -> None:
    names = _class_folders(layout.classes)
    pairs = []
    for split, files in layout.files.items():
        for name in names:
            (part / split / name).mkdir(parents=True)
        for number, (name, label) in enumerate(zip(files, layout.labels[split], strict=True)):
            copy = part / split / names[label] / f"{number:08d}.png"  # in the order of the original
            pairs.append((str(layout.root / name), str(copy)))
    with progress_bar(len(pairs), "resizing", show) as bar:
        for done, trouble in from_children(resize_share, workers, _Job(pairs, size)):
            if trouble:
                raise InputError(trouble)
            bar.update(done)


def _class_folders(classes: Sequence[str]) -> list[str]:
    """Names of folders that sort as the classes are numbered."""
    if list(classes) == sorted(classes) and not any("/" in name for name in classes):
        return list(classes)
    return [f"{label:05d} {name.replace('/', ' ')}" for label, name in enumerate(classes)]


def resize_share(job: _Job, rank: int, workers: int, send: Send) -> None:
    """What a child does: every workers-th chunk, beginning with `rank`. Sends (how many, what is wrong)."""
    for start in range(rank * _CHUNK, len(job.pairs), workers * _CHUNK):
        chunk = job.pairs[start : start + _CHUNK]
        for path, copy in chunk:
            try:
                with Image.open(path) as image:
                    small = resized(image.convert("RGB"), job.size)
            except Exception as error:  # decoders of broken files raise nearly anything
                send((0, f"cannot read {path} ({' '.join(str(error).split())})"))
                return
            small.save(copy, compress_level=1)
        send((len(chunk), ""))


def resized(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the image, size x size."""
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _marked(folder: Path) -> str | None:
    try:
        found = json.loads((folder / MARKER).read_text())
        return str(found["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
