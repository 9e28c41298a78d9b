"""Crop, mirror and normalise a batch: against its floor and against what a user would write.

    make bench

On the CPU, with one thread: batches of 512 random images, crops as torchvision's RandomResizedCrop draws them. The
floor is a copy of as many bytes: every pixel of the batch read as uint8 and written in the type of the output.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fastprune.kernels import crop_flip_normalize
from fastprune.loaders.augment import boxes, epoch_order

BATCH = 512
IMAGES = 4 * BATCH  # so that a batch is not found in the cache
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)
CROP, FLOOR = "crop_flip_normalize", "floor: uint8 batch to float, one read and write"
GRID, DRAWN = "grid_sample of the batch", "crop_flip_normalize, boxes drawn as well"
TENSORS, PIL = "torchvision v2 a sample, on tensors", "torchvision v2 a sample, on PIL images"


def stored(size: int) -> tuple[Tensor, Tensor]:
    """A data set, uint8 [IMAGES, size, size, 3], and which of it makes the batch, int64 [BATCH]."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(rng.permutation(IMAGES)[:BATCH])


def drawn(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(boxes, flip) of the batch."""
    box, flip = boxes(0, 0, index.numpy(), size, size)
    return torch.from_numpy(box), torch.from_numpy(flip)


def crop(images: Tensor, index: Tensor, box: Tensor, flip: Tensor, out: Tensor) -> Tensor:
    return crop_flip_normalize(images, index, box, flip, MEAN, STD, out)


def grid_sample(images: Tensor, index: Tensor, box: Tensor, flip: Tensor, dtype: torch.dtype) -> Tensor:
    """The same batch but for the pixels at a box's edges, which here blend with what lies outside the box."""
    batch = images[index].permute(0, 3, 1, 2).float().div_(255.0)
    top, left, tall, wide = (box / images.shape[1]).unbind(1)  # in units of the image, which is square
    zero = torch.zeros_like(top)
    across = torch.stack([torch.where(flip, -wide, wide), zero, 2 * left + wide - 1], 1)
    theta = torch.stack([across, torch.stack([zero, tall, 2 * top + tall - 1], 1)], 1)
    grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
    result = F.grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return v2.functional.normalize(result, list(MEAN), list(STD), inplace=True).to(dtype)


@lru_cache(maxsize=1)  # the ways of one batch share its memory
def ways(size: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    images, index = stored(size)
    box, flip = drawn(index, size)
    out = torch.empty((BATCH, 3, size, size), dtype=dtype, memory_format=torch.channels_last)
    batch = images[index].permute(0, 3, 1, 2)
    tensors = list(batch)
    pictures = [v2.functional.to_pil_image(image) for image in tensors]
    usual = v2.Compose(
        [
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    folder = v2.Compose(
        [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor(), *usual.transforms[2:]]
    )
    return {
        CROP: lambda: crop(images, index, box, flip, out),
        DRAWN: lambda: crop(images, index, *drawn(index, size), out),
        FLOOR: lambda: out.copy_(batch),
        GRID: lambda: grid_sample(images, index, box, flip, dtype),
        TENSORS: lambda: torch.stack([usual(image) for image in tensors]).to(dtype),
        PIL: lambda: torch.stack([folder(picture) for picture in pictures]).to(dtype),
    }


@pytest.mark.parametrize("what", [CROP, DRAWN, FLOOR, GRID, TENSORS, PIL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [64, 128])
def test_speed(measure: Any, size: int, dtype: torch.dtype, what: str) -> None:
    moved = BATCH * 3 * size**2 * (1 + dtype.itemsize) if what in (CROP, FLOOR) else None
    function = ways(size, dtype)[what]
    name = str(dtype).removeprefix("torch.")
    measure(f"crop to {size}x{size}, {name}", what, function, ours=what == CROP, bytes=moved, images=BATCH)


def test_speed_of_an_epochs_table(measure: Any) -> None:
    """Aim: 0.05 s for 100,000 images."""
    what = "order, boxes and flips of 100,000 images"
    measure("table of an epoch", what, lambda: boxes(0, 0, epoch_order(0, 0, 100_000), 64, 64), ours=True, images=10**5)


def test_grid_sample_makes_the_same_images() -> None:
    """What is compared does the same work. A box is enlarged at most 4.1 times: its edges reach three pixels inside."""
    images, index = stored(64)
    box, flip = drawn(index, 64)
    out = torch.empty((BATCH, 3, 64, 64), memory_format=torch.channels_last)
    theirs = grid_sample(images, index, box, flip, torch.float32)
    inside = (..., slice(3, -3), slice(3, -3))
    assert (crop(images, index, box, flip, out)[inside] - theirs[inside]).abs().max() < 1e-3
