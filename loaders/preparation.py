"""Turn a scanned folder or generated images into a prepared folder: train.beton, val.beton, manifest.json.

Each image is decoded once, by all processors; one process writes what they send, in stored order, checks it and moves
it into place, the manifest last. A folder without a manifest is not a data set, and a killed call leaves none.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastprune.errors import InputError
from fastprune.files import flush
from fastprune.loaders.beton import BetonWriter, check_beton
from fastprune.loaders.layout import SPLITS, Layout, scan
from fastprune.loaders.manifest import FILE_NAME, Manifest, load_manifest, save_manifest
from fastprune.loaders.samples import (
    FolderSamples,
    Samples,
    folder_samples,
    images_bar,
    read_chunks,
    unreadable_line,
)

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Inspection:
    """What decoding a data set tells. height, width: pixels, or 0 where images differ in size."""

    fingerprint: str
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    beton: bool = True,
    show: bool = True,
) -> Manifest:
    """Prepare the folder `source`, Tiny ImageNet, MiniPlaces or an image folder of one size, in `out`, and return its
    manifest.

    workers: processes that decode, by default as many as there are processors.  beton: without it only the manifest is
    written.  show: progress and remarks on stderr.  A second call on the same source does nothing.  InputError for
    anything wrong with the images or with `out`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    out = Path(out)
    layout = scan(source)
    if show and (remark := layout.remark()):
        print(remark, file=sys.stderr)
    with writing(out):
        listing = layout.listing()
        old = load_manifest(out) if (out / FILE_NAME).exists() else None
        complete = old is not None and is_complete(old, out, beton)
        if old is not None and complete and old.listing == listing:
            return old
        with unfinished(out) as part:
            keep = "pixels" if beton and not complete else "nothing"
            found = read_data_set(folder_samples(layout), part, keep, list_folder=out, workers=workers, show=show)
            manifest = describe(layout, found, listing)
            if layout.root.is_relative_to(out.resolve()):  # the two move together
                manifest = replace(manifest, source=str(layout.root.relative_to(out.resolve())))
            if old is not None and old.fingerprint != manifest.fingerprint:
                raise InputError(
                    f"{out} already holds other images ({old.name} from {old.source}): choose another --out"
                )
            if old is not None and complete:
                manifest = replace(old, source=manifest.source, listing=listing)
                save_manifest(manifest, out)
                return manifest
            return publish(part, out, manifest)


def describe(layout: Layout, found: Inspection, listing: str) -> Manifest:
    """The manifest of an inspected folder, still without files."""
    return Manifest(
        name=layout.name,
        fingerprint=found.fingerprint,
        classes=layout.classes,
        train_per_class=layout.per_class("train"),
        val_per_class=layout.per_class("val"),
        height=found.height,
        width=found.width,
        mean=found.mean,
        std=found.std,
        source=str(layout.root),
        listing=listing,
    )


def read_data_set(
    data: Mapping[str, Samples], part: Path, keep: str, *, list_folder: Path, workers: int, show: bool
) -> Inspection:
    """Decode all images of the splits of `data`, and write those of each split to SPLIT.beton in the folder `part`.

    keep: "pixels", for images of one size; "files" for JPEG files as they are, of any size; "nothing" writes no file,
    and expects one size.  InputError where images cannot be decoded (all of them named, in a file in `list_folder` if
    there are several) or differ in size, which ends it at once, or where the disk has too little room.
    """
    digests: dict[str, list[bytes]] = {split: [] for split in data}
    sizes: dict[str, list[tuple[int, int]]] = {split: [] for split in data}
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    unreadable: list[tuple[str, str]] = []
    first: tuple[str, tuple[int, int]] | None = None
    total = sum(map(len, data.values()))
    with ExitStack() as stack:
        bar = stack.enter_context(images_bar("reading images", total, show))
        writers: dict[str, BetonWriter] = {}
        for split, start, chunk in stack.enter_context(closing(read_chunks(data, keep, workers))):
            digests[split] += chunk.digests
            sizes[split] += chunk.sizes
            unreadable += chunk.unreadable
            if split == "train":
                sums += chunk.sums
                squares += chunk.squares
            if first is None and chunk.sizes:
                first = data[split].name(start), chunk.sizes[0]
                if keep != "nothing":
                    _check_room(part, data, keep, chunk.sizes[0])
                    for name, samples in data.items():
                        writers[name] = stack.enter_context(BetonWriter(part / f"{name}.beton", samples.labels))
            if not unreadable:
                if keep != "files" and first is not None:
                    _check_size(first, data[split], start, chunk.sizes)
                for image in chunk.stored:
                    writers[split].add(image)
            bar.update(len(chunk.sizes) + len(chunk.unreadable))
        if unreadable:
            raise InputError(unreadable_line(unreadable, total, list_folder))
        for writer in writers.values():
            writer.finish()
    assert first is not None
    pixels = sum(height * width for height, width in sizes["train"])
    mean = [int(s) / (pixels * 255) for s in sums]
    variance = [int(q) / (pixels * 255**2) - m * m for q, m in zip(squares, mean, strict=True)]
    # A channel without contrast would divide by zero; 1/255 is the smallest step there is.
    std = [max(math.sqrt(max(v, 0.0)), 1 / 255) for v in variance]
    height, width = first[1] if keep != "files" else (0, 0)
    return Inspection(
        fingerprint({split: data[split].labels for split in data}, digests, sizes),
        height,
        width,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
    )


def fingerprint(
    labels: Mapping[str, Sequence[int]],
    digests: Mapping[str, Sequence[bytes]],
    sizes: Mapping[str, Sequence[tuple[int, int]]],
) -> str:
    """SHA-256 (hex) over split, label, size and pixel digest of every image in order, train before val."""
    total = hashlib.sha256()
    for split in SPLITS:
        for label, pixels, (height, width) in zip(labels[split], digests[split], sizes[split], strict=True):
            total.update(f"{split} {label} {height} {width} {pixels.hex()}\n".encode())
    return total.hexdigest()


def publish(part: Path, out: Path, manifest: Manifest) -> Manifest:
    """Move what `read_data_set` wrote in `part` into the folder `out`, and then the manifest, which is returned."""
    sizes = {split: path.stat().st_size for split in SPLITS if (path := part / f"{split}.beton").exists()}
    if sizes:
        manifest = replace(
            manifest,
            train_file="train.beton",
            train_bytes=sizes["train"],
            val_file="val.beton",
            val_bytes=sizes["val"],
        )
    for split in sizes:
        os.replace(part / f"{split}.beton", out / f"{split}.beton")
    flush(out)
    save_manifest(manifest, out)
    return manifest


def is_complete(manifest: Manifest, folder: Path, beton: bool) -> bool:
    """Whether the folder holds all that it should. InputError where a file of the manifest is truncated or foreign."""
    for split in SPLITS:
        name, _ = manifest.file(split)
        if name is None or not (folder / name).exists():
            if beton:
                return False
        else:
            check_beton(folder / name, manifest, split)
    return True


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, which the caller holds by `writing`, for what is not finished; it goes at the end, and
    what a killed call left goes at the beginning.
    """
    part = folder / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create `folder` and hold it against other processes; waits for them. What it created and left empty is removed.

    InputError where the disk does not take what is written inside.
    """
    created: list[Path] = []
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # not empty: it stays
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = -1
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that writes to {path.parent}", file=sys.stderr)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is(handle, path):
                break
            os.close(handle)  # the holder before has removed the file, so this lock keeps no process out
            handle = -1
        yield
    finally:
        if handle >= 0:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing does not: another process may have been forked meanwhile
            os.close(handle)
        # By name, since an interrupt may have come between the creation and its return.
        _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    """Removes a lock file that no process holds."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, path):
                path.unlink()
        finally:
            os.close(handle)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _check_room(part: Path, data: Mapping[str, Samples], keep: str, size: tuple[int, int]) -> None:
    """InputError where the disk has no room for the files. keep: see `read_data_set`; size: of the first image."""
    if keep == "files":
        folders = [samples for samples in data.values() if isinstance(samples, FolderSamples)]
        needed = sum(os.stat(samples.name(i)).st_size for samples in folders for i in range(len(samples)))
    else:
        needed = sum(map(len, data.values())) * size[0] * size[1] * 3
    free = shutil.disk_usage(part).free
    if free < needed:
        raise InputError(
            f"{part.parent} has {free / 1e6:,.0f} MB free, the .beton files take {needed / 1e6:,.0f} MB: "
            "make room or choose another folder"
        )


def _check_size(
    first: tuple[str, tuple[int, int]], samples: Samples, start: int, sizes: Sequence[tuple[int, int]]
) -> None:
    """InputError names two images that differ in size."""
    name, (height, width) = first
    for i, size in enumerate(sizes, start):
        if size != (height, width):
            raise InputError(
                f"images of varying size cannot be batched: {name} has {height}x{width} pixels, {samples.name(i)} has "
                f"{size[0]}x{size[1]}; make them equal with scripts/prepare_data.py --source DIR --out DIR --resize N"
            )
