"""Turn a scanned folder or generated images into a prepared folder: train.beton, val.beton, manifest.json.

The files are written and checked in a hidden folder inside the target and moved out of it one by one, the manifest
last: a folder without a manifest is not a data set, and a killed call leaves none.
"""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastprune.errors import InputError
from fastprune.loaders.beton import check_beton, estimated_bytes, verify_pixels
from fastprune.loaders.choice import need_ffcv
from fastprune.loaders.inspection import Inspection, inspect
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.manifest import FILE_NAME, Manifest, load_manifest, save_manifest
from fastprune.loaders.samples import Samples, folder_samples
from fastprune.loaders.writer import write_betons

UNFINISHED = ".unfinished"


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

    workers: processes that decode and write, by default as many as there are processors.  beton: without it only the
    manifest is written.  show: progress and remarks on stderr.  A second call on the same source does nothing.
    InputError for anything wrong with the images or with `out`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    out = Path(out)
    layout = scan(source)
    if beton:
        need_ffcv()
    if show and (remark := layout.remark()):
        print(remark, file=sys.stderr)
    with writing(out):
        listing = layout.listing()
        old = load_manifest(out) if (out / FILE_NAME).exists() else None
        if old is not None and old.listing == listing and is_whole(old, out, beton):
            return old
        found = inspect(folder_samples(layout), workers=workers, list_folder=out, show=show)
        manifest = describe(layout, found, listing)
        if layout.root.is_relative_to(out.resolve()):  # the two move together
            manifest = replace(manifest, source=str(layout.root.relative_to(out.resolve())))
        if old is not None and old.fingerprint != manifest.fingerprint:
            raise InputError(f"{out} already holds other images ({old.name} from {old.source}): choose another --out")
        if old is not None and is_whole(old, out, beton):
            manifest = replace(old, source=manifest.source, listing=listing)
            save_manifest(manifest, out)
            return manifest
        return publish(out, manifest, folder_samples(layout), found.digests, beton=beton, workers=workers, show=show)


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


def publish(
    out: Path,
    manifest: Manifest,
    data: Mapping[str, Samples],
    digests: Mapping[str, Sequence[bytes]],
    *,
    beton: bool,
    workers: int,
    show: bool,
) -> Manifest:
    """Write the files of `manifest` into the folder `out`, which the caller holds by `writing`; returns it, complete.

    digests: of the pixels that the files are to hold; what was written is read back and compared.
    """
    part = out / UNFINISHED
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        if beton:
            manifest = _write_files(part, manifest, data, digests, workers, show)
        save_manifest(manifest, part)
        names = [name for split in data if (name := manifest.file(split)[0])]
        for name in (*names, FILE_NAME):
            os.replace(part / name, out / name)
        _sync(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def is_whole(manifest: Manifest, folder: Path, beton: bool) -> bool:
    """Whether the folder holds all that it should. InputError where a file of the manifest is truncated or foreign."""
    for split in ("train", "val"):
        name, _ = manifest.file(split)
        if name is None or not (folder / name).exists():
            if beton:
                return False
        else:
            check_beton(folder / name, manifest, split)
    return True


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
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes to {path.parent}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        if _is(handle, path):
            break
        os.close(handle)  # whoever held it has removed the file, so this lock keeps nobody out
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_files(
    part: Path,
    manifest: Manifest,
    data: Mapping[str, Samples],
    digests: Mapping[str, Sequence[bytes]],
    workers: int,
    show: bool,
) -> Manifest:
    height, width = manifest.height, manifest.width
    needed = sum(estimated_bytes(len(samples), height, width, workers) for samples in data.values())
    free = shutil.disk_usage(part).free
    if free < needed:
        raise InputError(
            f"{part.parent} has {free / 1e6:,.0f} MB free, the .beton files take {needed / 1e6:,.0f} MB: "
            "make room or choose another folder"
        )
    paths = {split: part / f"{split}.beton" for split in data}
    write_betons({paths[s]: data[s] for s in data}, height=height, width=width, workers=workers, show=show)
    for split, samples in data.items():
        verify_pixels(check_beton(paths[split]), samples.labels, digests[split])
        _sync(paths[split])
    return replace(
        manifest,
        train_file="train.beton",
        train_bytes=paths["train"].stat().st_size,
        val_file="val.beton",
        val_bytes=paths["val"].stat().st_size,
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
