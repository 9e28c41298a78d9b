"""Whole splits in memory as bytes, on a CPU or a GPU, cropped from there.

Filled once: by the generator, from .beton files (which needs no FFCV), or from image files. A copy of a .beton file is
bound by memory, so threads read it, straight to where the images stay; decoding takes processes.
"""

import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.kernels.crop import crop_flip_normalize
from fastprune.loaders.beton import Beton, manifest_files
from fastprune.loaders.choice import pixel_bytes, unchanged_source
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.readers import Crop, Table
from fastprune.loaders.samples import Samples, folder_samples, images_bar, read_chunks
from fastprune.loaders.synthetic import SyntheticData

AT_ONCE = 1 << 24  # bytes that a thread reads at once
MOST_WORKERS = 8  # where the caller names no number

Done = Callable[[int], object]
"""Called with a number of images that have arrived."""


class MemoryReader:
    """Reader of whole splits, uint8 [n, H, W, 3], all on one device, where the batches are made too.

    The table of an epoch is uploaded once, before its first batch. From then on a GPU waits for nothing that the host
    does, nor the other way round.
    """

    def __init__(
        self, manifest: Manifest, images: Mapping[str, torch.Tensor], labels: Mapping[str, np.ndarray]
    ) -> None:
        """images: of each split, contiguous.  labels: of each split, int64 [n]."""
        self._manifest, self._images = manifest, images
        self.labels = labels
        self.device = images["train"].device

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        index, crops, flips = (on_device(column, self.device) for column in table[:3])
        size = (self._manifest.height, self._manifest.width)
        for start in range(0, len(index), batch_size):
            part = slice(start, start + batch_size)
            yield normalised(self._images[split], index[part], crops[part], flips[part], size, self._manifest, dtype)


def normalised(
    images: torch.Tensor,
    index: torch.Tensor,
    crops: torch.Tensor,
    flips: torch.Tensor,
    size: tuple[int, int],
    constants: Manifest | Crop,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A new batch `dtype` [B, 3, *size] of whole `images`, uint8 [N, H, W, 3], on their device.

    index: int64 [B].  crops: int32 [B, 4].  flips: bool [B].  constants: mean and std.
    """
    shape = (len(index), 3, *size)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return crop_flip_normalize(images, index, crops, flips, constants.mean, constants.std, out)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on the device: on a CPU their own memory if they are contiguous, on a GPU a copy that is not awaited."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def open_generated(manifest: Manifest, device: torch.device) -> MemoryReader:
    """Generate the images. InputError where they are of another version of the generator."""
    assert manifest.synthetic is not None
    data = SyntheticData(**manifest.synthetic)
    if data.fingerprint != manifest.fingerprint:
        raise InputError("the generated images are of another version of fastprune: run them again from the start")
    arrays = {split: data.arrays(split) for split in ("train", "val")}
    images = {split: torch.from_numpy(pixels).to(device) for split, (pixels, _) in arrays.items()}
    return MemoryReader(manifest, images, {split: labels for split, (_, labels) in arrays.items()})


def open_resident(
    manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool
) -> MemoryReader:
    """Fill memory on `device`. InputError where files are truncated, foreign, changed or unreadable, or do not fit.

    workers: threads or processes, 0 for one a core up to MOST_WORKERS.  show: progress on stderr.
    """
    workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    if folder is None:
        return open_generated(manifest, device)
    fill: Callable[..., None]
    if manifest.train_file is not None:
        files = manifest_files(manifest, folder)
        labels = {split: file.labels for split, file in files.items()}
        fill = partial(fill_from_betons, files=files)
    else:
        samples = folder_samples(unchanged_source(manifest, folder))
        labels = {split: np.array(part.labels, np.int64) for split, part in samples.items()}
        fill = partial(fill_from_samples, data=samples)
    images = {split: empty_images(manifest, split, device) for split in labels}
    with images_bar(f"images to {device}", sum(map(len, images.values())), show) as bar:
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
            step = max(1, AT_ONCE // int(file.sizes[0]))
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
    shape = images["train"].shape[1:]
    with closing(read_chunks(data, "pixels", workers)) as chunks:
        for split, start, chunk in chunks:
            if chunk.unreadable:
                name, reason = chunk.unreadable[0]
                raise InputError(f"cannot read {name} ({reason}): prepare the data again")
            for i, image in enumerate(chunk.stored, start):
                if (image.height, image.width) != shape[:2]:
                    raise InputError(f"{data[split].name(i)} has another size than before: prepare the data again")
            pixels = np.concatenate([image.content for image in chunk.stored])
            images[split][start : start + len(chunk.stored)] = torch.from_numpy(pixels).view(-1, *shape)
            done(len(chunk.stored))


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
    pointers = file.images["pointer"][start : start + len(goal)].astype(np.int64)
    length = int(file.sizes[0])
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
