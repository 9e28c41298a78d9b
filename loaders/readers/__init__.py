"""The interface of readers: memory, .beton files (FFCV) and image files (torchvision) implement it.

A reader fetches the samples of a Table, crops, flips and normalises them. It draws nothing at random, except the crops
of images that differ in size.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fastprune.errors import InputError


class Table(NamedTuple):
    """The samples of an epoch, in order.

    samples: stored positions, int64 [n].  crop_boxes: int32 [n, 4], see augment.py.  flips: horizontal, bool [n].
    seeds: of the reader's own crops, uint64 [n], if images differ in size, else None.
    """

    # One table per epoch, drawn ahead of the reader: that is why a batch depends neither on the loader nor on its
    # workers. Images that differ in size are cropped by the decoders of FFCV and torchvision; there crop_boxes covers
    # the whole of the reader's output.

    samples: np.ndarray
    crop_boxes: np.ndarray
    flips: np.ndarray
    seeds: np.ndarray | None = None


@dataclass(frozen=True)
class Crop:
    """Crops of images that differ in size: random resized crops for train, resize and centre crop for val.

    train_crop, val_crop: side of the output in pixels.  val_resize: shorter side before the centre crop in pixels.
    mean, std: per channel, as fractions of full scale.  InputError if the sizes do not fit together.
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
        """Height and width of the images of a batch, in pixels (they are square)."""
        return self.train_crop if split == "train" else self.val_crop


class Reader(Protocol):
    """Reads the images of one data set.

    labels: of each split, int64 [n], in stored order.  device: of the batches.
    """

    @property
    def labels(self) -> Mapping[str, np.ndarray]: ...

    @property
    def device(self) -> torch.device: ...

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        """Yield normalised batches of the samples in `table`: new tensors `dtype` [B, 3, H, W], channels-last.

        The last batch may be smaller than `batch_size`.
        """
