"""An opened data set, and the batches of an epoch: one order, one set of boxes and flips, whichever loader reads.

Readers (ffcv_reader.py, torchvision_reader.py, memory_reader.py) only fetch and crop; what is random is decided here.
"""

import importlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.augment import boxes, epoch_order
from fastprune.loaders.choice import choose_loader
from fastprune.loaders.manifest import Manifest, Subset

ALL = Subset()
_READERS = {"synthetic": "memory_reader", "ffcv": "ffcv_reader", "torchvision": "torchvision_reader"}


class Reader(Protocol):
    """Fetches images of one data set. labels: of each split, int64 [n], in stored order."""

    labels: dict[str, np.ndarray]

    def images(
        self, split: str, samples: np.ndarray, crops: np.ndarray, flips: np.ndarray, batch_size: int
    ) -> Generator[torch.Tensor, None, None]:
        """Batches of `samples` (int64 [n], stored positions), cropped to `crops` (int32 [n, 4]), mirrored where `flips`
        (bool [n]), normalised: new float32 tensors [B, 3, H, W], channels-last, the last perhaps smaller.
        """


class Batches:
    """The batches of one epoch after another. Iterating yields images float32 [B, 3, H, W] (channels-last, normalised,
    new memory) and labels int64 [B], both on the CPU.

    For training, `set_epoch` chooses the epoch, 0 at first; an epoch can be read any number of times and is always the
    same. The last partial batch is dropped. For validation the order is the stored one and nothing is dropped.
    """

    def __init__(
        self, reader: Reader, manifest: Manifest, split: str, samples: np.ndarray, batch_size: int, seed: int | None
    ) -> None:
        """samples: stored positions, int64 [n].  seed: of order and augmentation; None keeps both off."""
        self._reader, self._split, self._samples, self._seed = reader, split, samples, seed
        self._size = (manifest.height, manifest.width)
        self.batch_size = batch_size
        self.epoch = 0

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        whole, rest = divmod(len(self._samples), self.batch_size)
        return whole + (1 if rest and self._seed is None else 0)

    @property
    def images(self) -> int:
        """Number of images in an epoch, those in a dropped batch not counted."""
        return min(len(self) * self.batch_size, len(self._samples))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples, crops, flips = self.table()
        labels = torch.from_numpy(self._reader.labels[self._split][samples])
        with closing(self._reader.images(self._split, samples, crops, flips, self.batch_size)) as batches:
            for start, images in zip(range(0, len(samples), self.batch_size), batches, strict=True):
                yield images, labels[start : start + self.batch_size]

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What this epoch reads: stored positions int64 [n], crops int32 [n, 4], flips bool [n], in order."""
        count = self.images
        if self._seed is None:
            whole = np.array([[0, 0, *self._size]], np.int32)
            return self._samples, np.repeat(whole, count, axis=0), np.zeros(count, bool)
        samples = self._samples[epoch_order(self._seed, self.epoch, len(self._samples))[:count]]
        return samples, *boxes(self._seed, self.epoch, samples, *self._size)


class DataSource:
    """An opened data set. Meant to be kept: a process opens it once and takes the batches of all its runs from it."""

    def __init__(self, manifest: Manifest, loader: str, reader: Reader) -> None:
        self.manifest, self.loader = manifest, loader
        self._reader = reader

    def train(self, *, seed: int, batch_size: int, subset: Subset = ALL) -> Batches:
        """Batches in random order with random crops and flips, all functions of (seed, epoch, stored position)."""
        return self._batches("train", batch_size, subset, seed)

    def val(self, *, batch_size: int, subset: Subset = ALL) -> Batches:
        """Batches in stored order, only normalised."""
        return self._batches("val", batch_size, subset, None)

    def _batches(self, split: str, batch_size: int, subset: Subset, seed: int | None) -> Batches:
        count = subset.count(self.manifest, split)
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}, expected at least 1")
        if seed is not None and batch_size > count:
            raise InputError(f"batch size {batch_size} is larger than the {count} training images: no full batch")
        samples = select(self._reader.labels[split], subset.classes, subset.per_class(split))
        return Batches(self._reader, self.manifest, split, samples, batch_size, seed)


def open_data(manifest: Manifest, folder: Path | None, *, loader: str = "auto", workers: int = 0) -> DataSource:
    """Open what `locate` found. InputError where the loader cannot read it, or a file is truncated or foreign.

    workers: processes of the torchvision loader, 0 for none; they change no batch.
    """
    name = choose_loader(manifest, folder, loader).name
    # Imported by name, for each needs libraries that the others do not.
    module = importlib.import_module(f"fastprune.loaders.{_READERS[name]}")
    return DataSource(manifest, name, module.open_reader(manifest, folder, workers))


def select(labels: np.ndarray, classes: int | None, per_class: int | None) -> np.ndarray:
    """Stored positions, int64 [n], of the first `per_class` samples of each of the first `classes` classes."""
    kept = np.arange(len(labels)) if classes is None else np.flatnonzero(labels < classes)
    if per_class is None:
        return kept
    by_class = kept[np.argsort(labels[kept], kind="stable")]
    begins = np.searchsorted(labels[by_class], labels[by_class], side="left")
    return np.sort(by_class[np.arange(len(by_class)) - begins < per_class])
