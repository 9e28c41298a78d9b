"""Both splits as bytes on the device, filled once: from .beton files (without FFCV), image files or the generator.

A copy of a .beton file is bound by memory, so threads read it, straight to where the images stay; decoding is bound by
the interpreter's lock, so processes do that.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.beton import Beton
from fastprune.loaders.choice import pixel_bytes, unchanged_source
from fastprune.loaders.decoding import decode_share
from fastprune.loaders.ffcv_reader import checked_files
from fastprune.loaders.inspection import from_children, progress_bar
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.memory_reader import MemoryReader, generated
from fastprune.loaders.samples import Samples, folder_samples

AT_ONCE = 1 << 24  # bytes that a thread reads at once
MOST_WORKERS = 8  # where the caller names no number

Done = Callable[[int], object]
"""Called with a number of images that have arrived."""


def open_reader(
    manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool
) -> MemoryReader:
    """Fill memory on `device`. InputError where files are truncated, foreign, changed or unreadable, or do not fit.

    workers: threads or processes, 0 for one a core up to MOST_WORKERS.  show: progress on stderr.
    """
    workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    labels: Mapping[str, np.ndarray]
    if folder is None:
        arrays = generated(manifest)
        labels = {split: labels for split, (_, labels) in arrays.items()}
        images = {split: torch.from_numpy(pixels).to(device) for split, (pixels, _) in arrays.items()}
        return MemoryReader(manifest, images, labels)
    if manifest.train_file is not None:
        files = checked_files(manifest, folder)
        labels = {split: file.labels for split, file in files.items()}
        fill = partial(fill_from_betons, files=files)
    else:
        samples = folder_samples(unchanged_source(manifest, folder))
        labels = {split: np.array(part.labels, np.int64) for split, part in samples.items()}
        fill = partial(fill_from_samples, data=samples)
    images = {split: empty_images(manifest, split, device) for split in labels}
    with progress_bar(sum(map(len, images.values())), f"images to {device}", show) as bar:
        fill(images, workers=workers, done=bar.update)
    return MemoryReader(manifest, images, labels)


def fill_from_betons(images: Mapping[str, torch.Tensor], files: Mapping[str, Beton], workers: int, done: Done) -> None:
    """Overwrite `images`, of each split uint8 [n, H, W, 3], with the pixels of its file, in `workers` threads.

    InputError where a file has become shorter than its tables say, or cannot be read.
    """
    pool = ThreadPoolExecutor(workers)
    handles: list[int] = []
    try:
        jobs = []
        for split, file in files.items():
            handles.append(_open(file.path))
            step = max(1, AT_ONCE // (file.height * file.width * 3))
            for start in range(0, len(file), step):
                goal = images[split][start : start + step]
                jobs.append(pool.submit(_copy, handles[-1], file, start, goal))
        for job in as_completed(jobs):
            done(job.result())
    finally:
        pool.shutdown(cancel_futures=True)
        for handle in handles:
            os.close(handle)


def fill_from_samples(
    images: Mapping[str, torch.Tensor], data: Mapping[str, Samples], workers: int, done: Done
) -> None:
    """Overwrite `images`, of each split uint8 [n, H, W, 3], with decoded `data`, in `workers` processes.

    InputError where an image cannot be decoded or has another size.
    """
    _, height, width, _ = images["train"].shape
    with closing(from_children(decode_share, workers, data, height, width)) as parts:
        for part in parts:
            if part.trouble:
                raise InputError(f"{part.trouble}: prepare the data again")
            images[part.split][part.start : part.start + len(part.pixels)] = torch.from_numpy(part.pixels)
            done(len(part.pixels))


def empty_images(manifest: Manifest, split: str, device: torch.device) -> torch.Tensor:
    """Memory for a split, uint8 [n, H, W, 3], of undefined content. InputError where there is too little memory."""
    shape = (manifest.count(split), manifest.height, manifest.width, 3)
    try:
        if device.type == "cpu":
            return torch.from_numpy(np.empty(shape, np.uint8))
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except (MemoryError, torch.OutOfMemoryError):
        needed = pixel_bytes(manifest) / 1e9
        raise InputError(
            f"the images take {needed:.2f} GB, which {device} does not have free: use another loader"
        ) from None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; prepare the data again") from None


def _copy(handle: int, file: Beton, start: int, goal: torch.Tensor) -> int:
    """Read the images from `start` on into `goal`, uint8 [n, H, W, 3]; returns n."""
    host = goal if goal.device.type == "cpu" else torch.empty_like(goal, device="cpu", pin_memory=True)
    pointers = file.pointers[start : start + len(goal)].astype(np.int64)
    length = file.height * file.width * 3
    memory = host.numpy().reshape(-1).data
    # Images that follow one another in the file are read as one: whole pages, except at their ends.
    breaks = np.flatnonzero(np.diff(pointers) != length) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pointers)], strict=True):
        _read(handle, int(pointers[first]), memory[first * length : last * length], file.path)
    if host is not goal:
        goal.copy_(host)
    return len(goal)


def _read(handle: int, offset: int, memory: memoryview, path: Path) -> None:
    """Fill `memory` from `offset` on. A mapped file would kill the process where it has become shorter."""
    while len(memory):
        try:
            count = os.preadv(handle, [memory], offset)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; prepare the data again") from None
        if not count:
            raise InputError(f"{path} is truncated: remove it and prepare the data again")
        offset, memory = offset + count, memory[count:]
