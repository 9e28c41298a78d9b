"""An opened data set, and the batches of an epoch: one order, one set of boxes and flips, whichever loader reads.

Readers (memory_reader.py, ffcv_reader.py, torchvision_reader.py) only fetch and crop; what is random is decided here.
"""

import importlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.kernels.crop import FLOAT_TYPES
from fastprune.loaders.augment import boxes, epoch_order
from fastprune.loaders.choice import choose_loader
from fastprune.loaders.manifest import Manifest, Subset
from fastprune.loaders.memory_reader import Table, on_device

ALL = Subset()
_READERS = {
    "resident": "resident_reader",
    "synthetic": "memory_reader",
    "ffcv": "ffcv_reader",
    "torchvision": "torchvision_reader",
}


class Reader(Protocol):
    """Fetches images of one data set. labels: of each split, int64 [n], in stored order.  device: of its batches."""

    labels: dict[str, np.ndarray]
    device: torch.device

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        """Batches of the samples that `table` names, cropped and mirrored as it says, normalised: new tensors `dtype`
        [B, 3, H, W], channels-last, the last perhaps smaller.
        """


class Batches:
    """The batches of one epoch after another. Iterating yields images [B, 3, H, W] (float32 or the `dtype` asked for,
    channels-last, normalised, new memory) and labels int64 [B], both on `device`: where the resident loader holds its
    images, the CPU for every other loader. On a GPU nothing in an epoch waits for the device.

    For training, `set_epoch` chooses the epoch, 0 at first; an epoch can be read any number of times and is always the
    same. The last partial batch is dropped. For validation the order is the stored one and nothing is dropped.

    One of several ranks reads its shard only: of each global training batch (`batch_size` on each rank) the rows from
    rank * batch_size on, so that all ranks together see what one process with the global batch sees; of the validation
    samples every ranks-th, from `rank` on.
    """

    def __init__(
        self,
        reader: Reader,
        manifest: Manifest,
        split: str,
        samples: np.ndarray,
        batch_size: int,
        seed: int | None,
        shard: tuple[int, int] = (0, 1),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """samples: stored positions of all ranks, int64 [n].  seed: of order and augmentation; None keeps both off.
        shard: rank and number of ranks.
        """
        self._reader, self._split, self._seed, self._dtype = reader, split, seed, dtype
        self._rank, self._ranks = shard
        self._samples = samples if seed is not None else samples[self._rank :: self._ranks]
        self._size = (manifest.height, manifest.width)
        self._drawn: tuple[int, Table] | None = None
        self.batch_size = batch_size
        self.epoch = 0

    @property
    def device(self) -> torch.device:
        return self._reader.device

    def __len__(self) -> int:
        """Number of batches in an epoch, on this rank."""
        if self._seed is None:
            return -(-len(self._samples) // self.batch_size)
        return len(self._samples) // (self.batch_size * self._ranks)

    @property
    def images(self) -> int:
        """Number of images in an epoch on this rank, those in a dropped batch not counted."""
        return len(self._samples) if self._seed is None else len(self) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, table = self.epoch, self.table()
        labels = on_device(self._reader.labels[self._split][table.samples], self.device)
        with closing(self._reader.images(self._split, table, self.batch_size, self._dtype)) as batches:
            for start, images in zip(range(0, len(labels), self.batch_size), batches, strict=True):
                yield images, labels[start : start + self.batch_size]
        if self.device.type != "cpu" and self._seed is not None:
            # The device is still busy with this epoch: what the next one reads costs nothing now.
            self._drawn = epoch + 1, self._draw(epoch + 1)

    def table(self) -> Table:
        """What this epoch reads; not to be written to."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, self._draw(self.epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> Table:
        if self._seed is None:
            whole = np.array([[0, 0, *self._size]], np.int32)
            return Table(self._samples, np.repeat(whole, self.images, axis=0), np.zeros(self.images, bool))
        order = epoch_order(self._seed, epoch, len(self._samples))[: self.images * self._ranks]
        mine = order.reshape(-1, self._ranks, self.batch_size)[:, self._rank].reshape(-1)
        samples = self._samples[mine]
        return Table(samples, *boxes(self._seed, epoch, samples, *self._size))


class DataSource:
    """An opened data set. Meant to be kept: a process opens it once and takes the batches of all its runs from it.

    device: where batches come to lie.
    """

    def __init__(self, manifest: Manifest, loader: str, reader: Reader) -> None:
        self.manifest, self.loader = manifest, loader
        self.device = reader.device
        self._reader = reader

    def train(
        self,
        *,
        seed: int,
        batch_size: int,
        subset: Subset = ALL,
        shard: tuple[int, int] = (0, 1),
        dtype: torch.dtype = torch.float32,
    ) -> Batches:
        """Batches in random order with random crops and flips, all functions of (seed, epoch, stored position).

        batch_size: of each rank.  shard: (rank, ranks), see Batches.  dtype: of the images, float32, bfloat16 or
        float16.
        """
        return self._batches("train", batch_size, subset, seed, shard, dtype)

    def val(
        self,
        *,
        batch_size: int,
        subset: Subset = ALL,
        shard: tuple[int, int] = (0, 1),
        dtype: torch.dtype = torch.float32,
    ) -> Batches:
        """Batches in stored order, only normalised. Arguments as for `train`."""
        return self._batches("val", batch_size, subset, None, shard, dtype)

    def _batches(
        self, split: str, batch_size: int, subset: Subset, seed: int | None, shard: tuple[int, int], dtype: torch.dtype
    ) -> Batches:
        count, (rank, ranks) = subset.count(self.manifest, split), shard
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks} ranks: ranks count from 0")
        if dtype not in FLOAT_TYPES:
            raise ValueError(f"images as {dtype}, expected one of {FLOAT_TYPES}")
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}, expected at least 1")
        if seed is not None and batch_size * ranks > count:
            each = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise InputError(f"batch size {batch_size}{each} is larger than the {count} training images: no full batch")
        samples = select(self._reader.labels[split], subset.classes, subset.per_class(split))
        return Batches(self._reader, self.manifest, split, samples, batch_size, seed, shard, dtype)


def open_data(
    manifest: Manifest,
    folder: Path | None,
    *,
    loader: str = "auto",
    device: str | torch.device = "cpu",
    workers: int = 0,
    show: bool = False,
) -> DataSource:
    """Open what `locate` found. InputError where the loader cannot read it, or a file is truncated or foreign.

    device: where the images are wanted; the resident loader holds them there, "auto" chooses by it. workers: processes
    of the torchvision loader, 0 for none, or of the resident one while it fills its memory, 0 for as many as are
    useful; they change no batch. show: progress of that on stderr.
    """
    name = choose_loader(manifest, folder, loader, device=str(device)).name
    # Imported by name, for each needs libraries that the others do not.
    module = importlib.import_module(f"fastprune.loaders.{_READERS[name]}")
    return DataSource(manifest, name, module.open_reader(manifest, folder, torch.device(device), workers, show))


def select(labels: np.ndarray, classes: int | None, per_class: int | None) -> np.ndarray:
    """Stored positions, int64 [n], of the first `per_class` samples of each of the first `classes` classes."""
    kept = np.arange(len(labels)) if classes is None else np.flatnonzero(labels < classes)
    if per_class is None:
        return kept
    by_class = kept[np.argsort(labels[kept], kind="stable")]
    begins = np.searchsorted(labels[by_class], labels[by_class], side="left")
    return np.sort(by_class[np.arange(len(by_class)) - begins < per_class])
