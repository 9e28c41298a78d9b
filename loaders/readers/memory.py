"""The resident reader: whole splits as uint8 in the memory of a CPU or a GPU, cropped there.

The memory is filled once: by the generator, from .beton files (without FFCV), or from image files.
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

AT_ONCE = 1 << 24  # bytes per job of a reading thread
MOST_WORKERS = 8  # limit of the default number of threads or processes

Done = Callable[[int], object]
"""Called with the number of images that have just been read."""


class MemoryReader:
    """Reader of whole splits, uint8 [n, H, W, 3], on one device, on which the batches are computed, too."""

    def __init__(
        self, manifest: Manifest, images: Mapping[str, torch.Tensor], labels: Mapping[str, np.ndarray]
    ) -> None:
        """images: of each split, uint8 [n, H, W, 3], contiguous.  labels: of each split, int64 [n]."""
        self._manifest, self._images = manifest, images
        self.labels = labels
        self.device = images["train"].device

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        # The table of the epoch is uploaded once, before its first batch. After that neither the host nor the GPU waits
        # for the other.
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
    """Crop, flip and normalise into a new batch `dtype` [B, 3, *size], channels-last, on the device of `images`.

    images: uint8 [N, H, W, 3].  index: which of them, int64 [B].  crops: boxes, int32 [B, 4].  flips: bool [B].
    constants: gives mean and std.
    """
    shape = (len(index), 3, *size)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return crop_flip_normalize(images, index, crops, flips, constants.mean, constants.std, out)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` as a tensor: on a CPU a view if they are contiguous, on a GPU an asynchronous copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    # Only a copy from pinned memory is asynchronous.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def open_generated(manifest: Manifest, device: torch.device) -> MemoryReader:
    """Generate the images of a synthetic manifest. InputError if it is of another version of the generator."""
    assert manifest.synthetic is not None
    data = SyntheticData(**manifest.synthetic)
    if data.fingerprint != manifest.fingerprint:
        raise InputError("the generated images are of another version of fastprune: prepare the data again")
    arrays = {split: data.arrays(split) for split in ("train", "val")}
    images = {split: torch.from_numpy(pixels).to(device) for split, (pixels, _) in arrays.items()}
    return MemoryReader(manifest, images, {split: labels for split, (_, labels) in arrays.items()})


def open_resident(
    manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool
) -> MemoryReader:
    """Read both splits into the memory of `device`.

    workers: threads (.beton files) or processes (image files); 0 means one per core, at most MOST_WORKERS.  show:
    progress on stderr.  InputError if files are truncated, changed or unreadable, or do not fit into memory.
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

    InputError if a file cannot be read, or is shorter than its tables say.
    """
    # Threads, because reading releases the interpreter's lock and is limited by memory bandwidth; each reads directly
    # into the destination.
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

    InputError if an image cannot be decoded or has changed its size.
    """
    shape = images["train"].shape[1:]
    with closing(read_chunks(data, "pixels", workers)) as chunks:
        for split, start, chunk in chunks:
            if chunk.unreadable:
                name, reason = chunk.unreadable[0]
                raise InputError(f"cannot read {name} ({reason}): prepare the data again")
            for i, image in enumerate(chunk.stored, start):
                if (image.height, image.width) != shape[:2]:
                    raise InputError(f"{data[split].name(i)} has changed its size: prepare the data again")
            pixels = np.concatenate([image.content for image in chunk.stored])
            images[split][start : start + len(chunk.stored)] = torch.from_numpy(pixels).view(-1, *shape)
            done(len(chunk.stored))


def empty_images(manifest: Manifest, split: str, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a split, uint8 [n, H, W, 3]. InputError if the device has too little free."""
    shape = (manifest.count(split), manifest.height, manifest.width, 3)
    try:
        if device.type == "cpu":
            # numpy reports a failed allocation as MemoryError, torch as a plain RuntimeError.
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
    """Read n images from position `start` on into `goal`, uint8 [n, H, W, 3]; returns n."""
    host = goal if goal.device.type == "cpu" else torch.empty_like(goal, device="cpu", pin_memory=True)
    pointers = file.images["pointer"][start : start + len(goal)].astype(np.int64)
    length = int(file.sizes[0])
    memory = host.numpy().reshape(-1).data
    # Images that are contiguous in the file take one read together: usually a page.
    breaks = np.flatnonzero(np.diff(pointers) != length) + 1
    for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pointers)], strict=True):
        _read(handle, int(pointers[first]), memory[first * length : last * length], file.path)
    if host is not goal:
        goal.copy_(host)
    return len(goal)


def _read(handle: int, offset: int, memory: memoryview, path: Path) -> None:
    """Fill `memory` with the content of the file from `offset` on. InputError if it ends before."""
    # Not a memory map: access beyond the end of a file that was truncated meanwhile kills the process (SIGBUS).
    while len(memory):
        try:
            count = os.preadv(handle, [memory], offset)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; prepare the data again") from None
        if not count:
            raise InputError(f"{path} is truncated: remove it and prepare the data again")
        offset, memory = offset + count, memory[count:]
