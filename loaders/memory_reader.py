"""Whole splits in memory as bytes, on a CPU or a GPU, cropped from there; generated images, kept that way."""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.kernels.crop import crop_flip_normalize
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.synthetic import SyntheticData


class Table(NamedTuple):
    """What is read, in order: stored positions int64 [n], boxes int32 [n, 4] (see augment.py), mirrored or not [n]."""

    samples: np.ndarray
    crops: np.ndarray
    flips: np.ndarray


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
        self.labels = dict(labels)
        self.device = images["train"].device

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        index, crops, flips = (on_device(column, self.device) for column in table)
        for start in range(0, len(index), batch_size):
            part = slice(start, start + batch_size)
            yield normalised(self._images[split], index[part], crops[part], flips[part], self._manifest, dtype)


def normalised(
    images: torch.Tensor,
    index: torch.Tensor,
    crops: torch.Tensor,
    flips: torch.Tensor,
    manifest: Manifest,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A new batch `dtype` [B, 3, H, W] of whole `images`, uint8 [N, H, W, 3], on their device.

    index: int64 [B].  crops: int32 [B, 4].  flips: bool [B].
    """
    shape = (len(index), 3, manifest.height, manifest.width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    return crop_flip_normalize(images, index, crops, flips, manifest.mean, manifest.std, out)


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on the device: on a CPU their own memory if they are contiguous, on a GPU a copy that nobody awaits."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def generated(manifest: Manifest) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of both splits. InputError where they are of another version of the generator."""
    assert manifest.synthetic is not None
    data = SyntheticData(**manifest.synthetic)
    if data.fingerprint != manifest.fingerprint:
        raise InputError("the generated images are of another version of fastprune: run them again from the start")
    return {split: data.arrays(split) for split in ("train", "val")}


def open_reader(
    manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool
) -> MemoryReader:
    """Generate the images. InputError where they are of another version of the generator."""
    arrays = generated(manifest)
    images = {split: torch.from_numpy(pixels) for split, (pixels, _) in arrays.items()}
    return MemoryReader(manifest, images, {split: labels for split, (_, labels) in arrays.items()})
