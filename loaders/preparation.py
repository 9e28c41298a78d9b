"""Turn a scanned folder or generated images into a prepared folder: train.beton, val.beton, manifest.json.

Worker processes decode each image once. This process writes the results in stored order, verifies the files and moves
them into place.
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
    rotation_line,
    unreadable_line,
)

UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Inspection:
    """Result of decoding a whole data set.

    fingerprint: see `fingerprint`.  height, width: pixels, or 0 if images differ in size.  mean, std: per channel of
    the train split, as fractions of full scale.
    """

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
    """Prepare the images of `source` in the folder `out`; return the manifest.

    source: Tiny ImageNet, MiniPlaces or an image folder with images of one size.  workers: processes that decode, by
    default one per available processor.  beton: False writes the manifest only.  show: progress and remarks on stderr.
    A second call on an unchanged source only returns the manifest.  InputError if images cannot be read or differ in
    size, if `out` cannot be written, or if it holds another data set.
    """
    workers = workers or len(os.sched_getaffinity(0))
    out = Path(out)
    layout = scan(source)
    if show and (remark := layout.remark()):
        print(remark, file=sys.stderr)
    with writing(out):
        listing = layout.listing()
        old = load_manifest(out) if (out / FILE_NAME).exists() else None
        # A manifest whose files were removed is no reason to fail: they are written again, from the same images.
        complete = old is not None and is_complete(old, out, beton)
        if old is not None and complete and old.listing == listing:
            return old
        with unfinished(out) as part:
            keep = "pixels" if beton and not complete else "nothing"
            found = read_data_set(folder_samples(layout), part, keep, list_folder=out, workers=workers, show=show)
            manifest = describe(layout, found, listing)
            # A source inside `out` is named relative to it, so that both can be moved together.
            if layout.root.is_relative_to(out.resolve()):
                manifest = replace(manifest, source=str(layout.root.relative_to(out.resolve())))
            if old is not None and old.fingerprint != manifest.fingerprint:
                raise InputError(
                    f"{out} already holds other images ({old.name} from {old.source}): choose another --out"
                )
            # Same pixels under new times or names (copied, unpacked again): the .beton files stay valid.
            if old is not None and complete:
                manifest = replace(old, source=manifest.source, listing=listing)
                save_manifest(manifest, out)
                return manifest
            return publish(part, out, manifest)


def describe(layout: Layout, found: Inspection, listing: str) -> Manifest:
    """The manifest of an inspected folder. It names no .beton files yet."""
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
    """Decode all images of `data` and write those of each split to SPLIT.beton in the folder `part`.

    keep: "pixels" for images of one size; "files" for JPEG files unchanged, of any size; "nothing" writes no file and
    requires one size.  show: progress, and a line on EXIF rotations, on stderr.  InputError if images cannot be decoded
    (several are listed in a file in `list_folder`), if they differ in size and must not, or if the disk has too little
    free space.
    """
    digests: dict[str, list[bytes]] = {split: [] for split in data}
    sizes: dict[str, list[tuple[int, int]]] = {split: [] for split in data}
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    unreadable: list[tuple[str, str]] = []
    rotated: list[str] = []
    first: tuple[str, tuple[int, int]] | None = None
    total = sum(map(len, data.values()))
    with ExitStack() as stack:
        bar = stack.enter_context(images_bar("reading images", total, show))
        writers: dict[str, BetonWriter] = {}
        for split, start, chunk in stack.enter_context(closing(read_chunks(data, keep, workers))):
            digests[split] += chunk.digests
            sizes[split] += chunk.sizes
            unreadable += chunk.unreadable
            rotated += chunk.rotated
            # Normalisation constants come from the training images alone.
            if split == "train":
                sums += chunk.sums
                squares += chunk.squares
            if first is None and chunk.sizes:
                first = data[split].name(start), chunk.sizes[0]
                if keep != "nothing":
                    # As soon as one image is known, and before anything is written.
                    _check_room(part, data, keep, chunk.sizes[0])
                    for name, samples in data.items():
                        writers[name] = stack.enter_context(BetonWriter(part / f"{name}.beton", samples.labels))
            # After the first unreadable image nothing more is written, but decoding goes on: the user gets the complete
            # list from one call.
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
    if show and rotated:
        print(rotation_line(rotated, total), file=sys.stderr)
    assert first is not None
    pixels = sum(height * width for height, width in sizes["train"])
    # Python integers do not overflow, and the result is the same on every machine.
    mean = [int(s) / (pixels * 255) for s in sums]
    variance = [int(q) / (pixels * 255**2) - m * m for q, m in zip(squares, mean, strict=True)]
    # A constant channel would give a division by zero; 1/255 is one step of a byte.
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
    # Decoded pixels, not file contents or names: a data set keeps its identity when it is renamed or stored losslessly
    # in another format. The size is included because equal bytes can have different shapes.
    total = hashlib.sha256()
    for split in SPLITS:
        for label, pixels, (height, width) in zip(labels[split], digests[split], sizes[split], strict=True):
            total.update(f"{split} {label} {height} {width} {pixels.hex()}\n".encode())
    return total.hexdigest()


def publish(part: Path, out: Path, manifest: Manifest) -> Manifest:
    """Move the .beton files from `part` into the folder `out`, then write the manifest; return it."""
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
    # The manifest last: a folder without one is not a data set, so a killed call leaves nothing that looks complete.
    flush(out)
    save_manifest(manifest, out)
    return manifest


def is_complete(manifest: Manifest, folder: Path, beton: bool) -> bool:
    """Whether the folder holds every file it needs.

    beton: whether .beton files are needed.  InputError if a file named by the manifest is truncated or another one.
    """
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
    """A temporary folder inside `folder`, removed on exit. The caller holds `folder` with `writing`."""
    # Inside the target, so that a move is a rename. A killed call may have left one; the lock makes it safe to remove.
    part = folder / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it against other processes; waits until it is free.

    Created folders that are empty on exit are removed.  InputError if writing inside the block fails.
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
            # The previous holder has removed the file, so this lock excludes no other process: try again.
            os.close(handle)
            handle = -1
        yield
    finally:
        if handle >= 0:
            # Explicitly: closing does not unlock while a process forked meanwhile still holds the descriptor.
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)
        # By name, because an interrupt can come after the file was created and before its handle was returned.
        _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    """Remove a lock file that no process holds."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(handle, path):
                path.unlink()
        finally:
            os.close(handle)


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _check_room(part: Path, data: Mapping[str, Samples], keep: str, size: tuple[int, int]) -> None:
    """InputError if the disk has too little free space. keep: see `read_data_set`. size: of the first image."""
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
    """InputError if an image differs in size from the first; the message names both."""
    name, (height, width) = first
    for i, size in enumerate(sizes, start):
        if size != (height, width):
            raise InputError(
                f"images of varying size cannot be batched: {name} has {height}x{width} pixels, {samples.name(i)} has "
                f"{size[0]}x{size[1]}; make them equal with scripts/prepare.py --source DIR --out DIR --resize N"
            )
