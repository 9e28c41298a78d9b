"""Where the images of a data set come from: memory, .beton files, image files. What each reader is to the rest.

A reader fetches what a Table names, crops and mirrors as it says, and normalises; nothing random is decided by it. Only
where images differ in size it crops them itself, as a Crop says.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fastprune.errors import InputError


class Table(NamedTuple):
    """What an epoch reads, in order: stored positions int64 [n], boxes int32 [n, 4] (see augment.py), mirrored or not
    bool [n]. Where images differ in size, boxes are of what the reader has cropped, and seeds, uint64 [n], are for the
    reader's own crops; else they are None.
    """

    samples: np.ndarray
    crop_boxes: np.ndarray
    flips: np.ndarray
    seeds: np.ndarray | None = None


@dataclass(frozen=True)
class Crop:
    """What becomes of images that differ in size: random resized crops to train on, and to validate on the middle of an
    image whose shorter side is resized. Sizes in pixels; mean, std: per channel, as fractions of full scale.
    """

    train_crop: int
    val_resize: int
    val_crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.train_crop, self.val_resize, self.val_crop) < 1:
            raise InputError(f"images cannot be cropped to less than 1 pixel: {self}")
        if self.val_crop > self.val_resize:
            raise InputError(f"--val-crop-size {self.val_crop} is larger than --val-resize-size {self.val_resize}")

    def size(self, split: str) -> int:
        """Height and width of the images of a batch."""
        return self.train_crop if split == "train" else self.val_crop


class Reader(Protocol):
    """Fetches images of one data set. labels: of each split, int64 [n], in stored order.  device: of its batches."""

    @property
    def labels(self) -> Mapping[str, np.ndarray]: ...

    @property
    def device(self) -> torch.device: ...

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        """Batches of the samples that `table` names, normalised: new tensors `dtype` [B, 3, H, W], channels-last, the
        last perhaps smaller.
        """
