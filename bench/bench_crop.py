"""Benchmark of random-resized crop, flip and normalisation of a batch, against its floor and common alternatives.

    make bench ARGS="bench/bench_crop.py [--device cuda]"

Batches hold 512 random images; boxes follow torchvision's RandomResizedCrop.
"""

from typing import Any

import pytest
import torch

from bench.rows import CROPS, DTYPES, SIDES, TABLE, Crops, Group, Row, crop_group


@pytest.mark.parametrize("row", CROPS, ids=lambda row: row.what)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", SIDES)
def test_speed(measure: Any, side: int, dtype: torch.dtype, row: Row) -> None:
    measure(row, crop_group, side, dtype)


def table_group(device: torch.device) -> Group:
    return TABLE


def test_speed_of_an_epochs_table(measure: Any) -> None:
    """Order, boxes and flips of an epoch. Target: 0.05 s for 100,000 images."""
    # Drawn on the host before each epoch, so the device idles for this long.
    measure(TABLE.rows[0], table_group)


def test_grid_sample_makes_the_same_images(device: torch.device) -> None:
    """The compared rows do the same work: equal to 1e-3 (normalised units) but for a border of three pixels."""
    c = Crops(64, torch.float32, device, small=False)
    # grid_sample blends with pixels outside the box. A box is enlarged at most 4.1 times: that reaches three pixels.
    inside = (..., slice(3, -3), slice(3, -3))
    assert (c.crop(c.box, c.flip)[inside] - c.grid_sample()[inside]).abs().max() < 1e-3
