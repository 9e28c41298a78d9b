"""Images that vary in size, as in ImageNet: random resized crops to train on, resized and centred ones to validate on.

    source = open_varying(folder, train_crop=224, val_resize=256, val_crop=224, mean=mean, std=std)
    batches = source.train(seed=0, batch_size=256)
    batches.set_epoch(3)
    for images, labels in batches: ...

Order, boxes and flips are those of augment.py; readers fetch and decode; one compiled loop crops and resizes. The
meaning is torchvision's: resized_crop to train, resize and center_crop to validate, on float tensors with antialiasing,
then normalize.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.augment import epoch_order
from fastprune.loaders.choice import ffcv_is_there, need_ffcv
from fastprune.loaders.varying_cache import is_cached
from fastprune.loaders.varying_folder import ImageFolder, scan_images
from fastprune.loaders.varying_view import Draw, View

LOADERS = ("auto", "ffcv", "torchvision")


class Reader(Protocol):
    """Fetches images of one folder."""

    def images(
        self, split: str, samples: np.ndarray, batch_size: int, draw: Draw | None
    ) -> Generator[torch.Tensor, None, None]:
        """Batches of `samples` (int64 [n], stored positions), new float32 tensors [B, 3, S, S], channels-last, the last
        perhaps smaller: with `draw` cropped at random for training, without it the validation view.
        """


class VaryingBatches:
    """The batches of one epoch after another. Iterating yields images float32 [B, 3, S, S] (channels-last, normalised,
    new memory) and labels int64 [B], both on the CPU.

    For training, `set_epoch` chooses the epoch, 0 at first; an epoch can be read any number of times and is always the
    same. Of each batch of all ranks together, rank r takes the r-th part; a last batch that is not full is dropped. For
    validation the order is the stored one, of which rank r takes every ranks-th image; nothing is dropped.
    """

    def __init__(
        self, reader: Reader, split: str, labels: np.ndarray, batch_size: int, shard: tuple[int, int], seed: int | None
    ) -> None:
        """labels: of the whole split.  shard: rank and ranks.  seed: None for the validation view."""
        self._reader, self._split, self._labels = reader, split, labels
        self._rank, self._ranks = shard
        self._seed = seed
        self.batch_size = batch_size
        self.epoch = 0

    def __len__(self) -> int:
        """Number of batches in an epoch of this rank."""
        if self._seed is None:
            return -(-self.images // self.batch_size)
        return len(self._labels) // (self.batch_size * self._ranks)

    @property
    def images(self) -> int:
        """Number of this rank's images in an epoch, those in a dropped batch not counted."""
        if self._seed is None:
            return len(range(self._rank, len(self._labels), self._ranks))
        return len(self) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def samples(self) -> np.ndarray:
        """Stored positions that this rank reads in this epoch, int64 [n], in order."""
        if self._seed is None:
            return np.arange(self._rank, len(self._labels), self._ranks)
        order = epoch_order(self._seed, self.epoch, len(self._labels))
        parts = order[: self.images * self._ranks].reshape(-1, self._ranks, self.batch_size)
        return np.ascontiguousarray(parts[:, self._rank]).reshape(-1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples = self.samples()
        draw = None if self._seed is None else (self._seed, self.epoch)
        labels = torch.from_numpy(self._labels[samples])
        with closing(self._reader.images(self._split, samples, self.batch_size, draw)) as batches:
            for start, images in zip(range(0, len(samples), self.batch_size), batches, strict=True):
                yield images, labels[start : start + self.batch_size].clone()


class VaryingSource:
    """An opened image folder. Meant to be kept: a process opens it once and takes all its batches from it."""

    def __init__(self, folder: ImageFolder, loader: str, reader: Reader) -> None:
        self.classes, self.loader = folder.classes, loader
        self._reader = reader
        self._labels = {split: np.array(labels, np.int64) for split, labels in folder.labels.items()}

    def count(self, split: str) -> int:
        """Images in "train" or "val"."""
        return len(self._labels[split])

    def train(self, seed: int = 0, batch_size: int = 256, shard: tuple[int, int] = (0, 1)) -> VaryingBatches:
        """Batches in random order with random crops and flips, all functions of (seed, epoch, stored position).

        batch_size: of one rank.  shard: (rank, ranks).
        """
        _check(batch_size, shard)
        if batch_size * shard[1] > self.count("train"):
            raise InputError(
                f"batch size {batch_size} on {shard[1]} ranks is larger than the {self.count('train')} training "
                "images: no full batch"
            )
        return VaryingBatches(self._reader, "train", self._labels["train"], batch_size, shard, seed)

    def val(self, batch_size: int = 256, shard: tuple[int, int] = (0, 1)) -> VaryingBatches:
        """Batches in stored order, resized and cropped at the centre."""
        _check(batch_size, shard)
        return VaryingBatches(self._reader, "val", self._labels["val"], batch_size, shard, None)


def open_varying(
    folder: Path,
    *,
    train_crop: int,
    val_resize: int,
    val_crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    loader: str = "auto",
    workers: int = 0,
    threads: int = 1,
    cache: Path | None = None,
) -> VaryingSource:
    """Open an image folder, DIR/train/<class>/* and DIR/val/<class>/*. InputError where it is not one.

    mean, std: per channel, as fractions of full scale.  loader: "torchvision" reads the images themselves; "ffcv" reads
    .beton files, written on first use below `cache` (by default .fastprune beside the folder); "auto" is ffcv where
    that is installed and either `cache` is given or the files are there.  workers: processes of torchvision, or the
    threads that write .beton files (0: one a processor).  threads: of ffcv.  Neither changes a batch.
    """
    view = View(train_crop, val_resize, val_crop, _three("mean", mean), _three("std", std))
    if loader not in LOADERS:
        raise InputError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    if workers < 0 or threads < 1:
        raise InputError(f"{workers} workers and {threads} threads asked for: at least 0 and 1 are needed")
    if loader == "ffcv":
        need_ffcv()
    images = scan_images(folder)
    if loader == "auto":
        ffcv = ffcv_is_there() and (cache is not None or is_cached(images, cache))
        loader = "ffcv" if ffcv else "torchvision"
    if loader == "ffcv":
        from fastprune.loaders.varying_ffcv import open_betons

        return VaryingSource(images, loader, open_betons(images, view, cache, workers, threads))
    from fastprune.loaders.varying_torchvision import ImageFiles

    return VaryingSource(images, loader, ImageFiles(images, view, workers))


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise InputError(f"{name} is {tuple(values)}, expected a number for each of three channels")
    first, second, third = map(float, values)
    return first, second, third


def _check(batch_size: int, shard: tuple[int, int]) -> None:
    rank, ranks = shard
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}, expected at least 1")
    if not 0 <= rank < ranks:
        raise InputError(f"shard {rank} of {ranks} asked for: ranks count from 0")
