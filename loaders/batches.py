"""An opened data set and its batches: order, crops and flips of an epoch are the same for every loader.

`catalog` finds or prepares a folder, `open_data` returns a DataSource, a DataSource returns Batches. Batches draw the
table of each epoch, and a reader (`readers/`) turns that table into images.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.kernels.crop import FLOAT_TYPES
from fastprune.loaders.augment import crop_boxes, epoch_order, flips, sample_seeds
from fastprune.loaders.choice import LoaderChoice, choose_loader
from fastprune.loaders.manifest import Manifest, Subset
from fastprune.loaders.readers import Crop, Reader, Table
from fastprune.loaders.readers.memory import on_device, open_generated, open_resident
from fastprune.loaders.transforms import Augment

ALL = Subset()


class Batches:
    """The batches of one split, epoch after epoch.

    Iterating yields images `dtype` [B, 3, H, W] (channels-last, normalised, new memory) and labels int64 [B], both on
    `device`: that of the resident loader's images, the CPU for every other loader. On a GPU no operation in an epoch
    waits for the device.

    Training: `set_epoch` selects the epoch, initially 0; repeated reads of an epoch give the same batches. The last
    partial batch is dropped. Validation: stored order, and no sample is dropped.

    Distributed: a rank reads its share only. Of each global training batch (world_size * batch_size) that is the rows
    from rank * batch_size on; of the validation samples every world_size-th, from `rank` on.

    If images differ in size, the reader crops them according to `crop`, and only order and flips are drawn here.

    repeats: above 1, repeated augmentation as by the RASampler of torchvision's reference script: each image that is
    read comes so often in turn, each time with a crop of its own, so that ranks see it at once; an epoch is one share
    of the images, rounded down to whole 256.
    """

    def __init__(
        self,
        reader: Reader,
        manifest: Manifest,
        split: str,
        samples: np.ndarray,
        batch_size: int,
        seed: int | None,
        *,
        crop: Crop | None = None,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        repeats: int = 1,
        seeds: bool = False,
    ) -> None:
        """samples: stored positions for all ranks, int64 [n].  seed: of order and augmentation; None disables both.
        seeds: whether the reader draws, too."""
        self._reader, self._split, self._seed, self._dtype, self._crop = reader, split, seed, dtype, crop
        self._rank, self._world_size = rank, world_size
        self._repeats, self._seeds = repeats, seeds or crop is not None
        self._samples = samples if seed is not None else samples[rank::world_size]
        self._size = (manifest.height, manifest.width) if crop is None else (crop.size(split),) * 2
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
        samples = len(self._samples) if self._repeats == 1 else len(self._samples) // 256 * 256
        return samples // self._world_size // self.batch_size

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
            # The launches are asynchronous: while the device computes this epoch, the host draws the next table.
            self._drawn = epoch + 1, self._draw(epoch + 1)

    def table(self) -> Table:
        """The table of the current epoch. Cached: the caller must not write to it."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, self._draw(self.epoch)
        return self._drawn[1]

    def _draw(self, epoch: int) -> Table:
        if self._seed is None:
            return Table(self._samples, self._uncropped(), np.zeros(self.images, bool))
        order = epoch_order(self._seed, epoch, len(self._samples))
        if self._repeats > 1:
            # Every world_size-th of the repeated order: neighbours there are one image, and go to different ranks.
            turn = np.arange(self.images) * self._world_size + self._rank
            samples = self._samples[order[turn // self._repeats]]
            # Positions beyond those of images, so that each turn has draws of its own.
            drawn_for = samples + turn % self._repeats * len(self._reader.labels[self._split])
        else:
            order = order[: self.images * self._world_size]
            # Rows of the global batch: all ranks together train on what one process with the global batch would.
            mine = order.reshape(-1, self._world_size, self.batch_size)[:, self._rank].reshape(-1)
            samples = drawn_for = self._samples[mine]
        seeds = sample_seeds(self._seed, epoch, drawn_for) if self._seeds else None
        if self._crop is None:
            return Table(samples, *crop_boxes(self._seed, epoch, drawn_for, *self._size), seeds)
        return Table(samples, self._uncropped(), flips(self._seed, epoch, drawn_for), seeds)

    def _uncropped(self) -> np.ndarray:
        return np.repeat(np.array([[0, 0, *self._size]], np.int32), self.images, axis=0)


class DataSource:
    """An opened data set, from which a process takes the batches of all its runs.

    loader: its name.  why: the reason for the choice.  device: of the batches.
    """

    # Kept for the life of a worker: opening again would compile FFCV's pipeline or fill the memory again.

    def __init__(
        self,
        manifest: Manifest,
        choice: LoaderChoice,
        reader: Reader,
        crop: Crop | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.manifest, (self.loader, self.why), self._augment = manifest, choice, augment
        self.device = reader.device
        self._reader, self._crop = reader, crop

    @property
    def resumes(self) -> bool:
        """Whether a resumed run sees the same batches. Crops by FFCV's own decoders cannot be seeded."""
        return self._crop is None or self.loader != "ffcv"

    def train(
        self,
        *,
        seed: int,
        batch_size: int,
        subset: Subset = ALL,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        repeats: int = 1,
    ) -> Batches:
        """Training batches: random order, crops and flips, all functions of (seed, epoch, stored position).

        batch_size: per rank.  rank, world_size, repeats: see Batches.  dtype: of the images, float32, bfloat16 or
        float16.
        """
        return self._batches("train", batch_size, subset, seed, rank, world_size, dtype, repeats)

    def val(
        self,
        *,
        batch_size: int,
        subset: Subset = ALL,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Batches:
        """Validation batches in stored order: normalised, and centre-cropped if images differ in size.

        Arguments as for `train`.
        """
        return self._batches("val", batch_size, subset, None, rank, world_size, dtype)

    def _batches(
        self,
        split: str,
        batch_size: int,
        subset: Subset,
        seed: int | None,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        repeats: int = 1,
    ) -> Batches:
        count = subset.count(self.manifest, split)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} ranks: ranks count from 0")
        if dtype not in FLOAT_TYPES:
            raise ValueError(f"images as {dtype}, expected one of {FLOAT_TYPES}")
        if batch_size < 1:
            raise InputError(f"batch size is {batch_size}, expected at least 1")
        if seed is not None and batch_size * world_size > count:
            each = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise InputError(
                f"batch size {batch_size}{each} is larger than the {count} training images: no full batch; lower it "
                "(--batch-size)"
            )
        if repeats > 1 and count // 256 * 256 < batch_size * world_size:
            raise InputError(
                f"--ra-sampler reads whole 256 of the {count} training images, less than a batch of {batch_size} on "
                f"each of {world_size} ranks: leave it out"
            )
        samples = select(self._reader.labels[split], subset.classes, subset.per_class(split))
        return Batches(
            self._reader,
            self.manifest,
            split,
            samples,
            batch_size,
            seed,
            crop=self._crop,
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            repeats=repeats,
            seeds=self._augment is not None,
        )


def open_data(
    manifest: Manifest,
    folder: Path | None,
    *,
    loader: str = "auto",
    crop: Crop | None = None,
    augment: Augment | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    show: bool = False,
) -> DataSource:
    """Open the data set that `find_or_prepare` returned.

    crop: required if images differ in size, else None.  augment: requires the torchvision loader.  device: that of the
    training; the resident loader holds the images there, and "auto" depends on it.  workers: processes of the
    torchvision loader (0: decode in this process), of the resident loader while it fills its memory (0: automatic), or
    threads of FFCV's decoders; no batch depends on it.  show: progress on stderr.  InputError if the loader cannot read
    the data, or a file is truncated or not that of the manifest.
    """
    choice = choose_loader(manifest, folder, loader, device=str(device))
    if manifest.one_size != (crop is None):
        raise ValueError("crop is required if images differ in size, and must be None otherwise")
    if augment is not None and choice.name != "torchvision":
        raise ValueError(f"loader {choice.name} knows no {', '.join(augment.asked)}")
    reader = _open_reader(choice, manifest, folder, crop, augment, torch.device(device), workers, show)
    return DataSource(manifest, choice, reader, crop, augment)


def _open_reader(
    choice: LoaderChoice,
    manifest: Manifest,
    folder: Path | None,
    crop: Crop | None,
    augment: Augment | None,
    device: torch.device,
    workers: int,
    show: bool,
) -> Reader:
    # FFCV and torchvision are imported on use: either works without the other.
    if choice.name == "ffcv":
        from fastprune.loaders.readers.ffcv import open_ffcv

        return open_ffcv(manifest, folder, crop, workers)
    if choice.name == "torchvision":
        from fastprune.loaders.readers.torchvision import open_torchvision

        return open_torchvision(manifest, folder, crop, workers, augment)
    if choice.name == "resident":
        return open_resident(manifest, folder, device, workers, show)
    return open_generated(manifest, torch.device("cpu"))


def select(labels: np.ndarray, classes: int | None, per_class: int | None) -> np.ndarray:
    """Stored positions, int64 [n], of the first `per_class` samples of each of the first `classes` classes."""
    kept = np.arange(len(labels)) if classes is None else np.flatnonzero(labels < classes)
    if per_class is None:
        return kept
    # Stable, so that the first images of a class are the first in stored order.
    by_class = kept[np.argsort(labels[kept], kind="stable")]
    begins = np.searchsorted(labels[by_class], labels[by_class], side="left")
    return np.sort(by_class[np.arange(len(by_class)) - begins < per_class])
