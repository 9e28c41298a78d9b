"""Generated images, kept in memory as bytes and cropped from there."""

from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.kernels.crop import crop_flip_normalize
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.synthetic import SyntheticData


class MemoryReader:
    """Reader of whole splits in memory, uint8 [n, H, W, 3]."""

    def __init__(self, manifest: Manifest, arrays: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self._manifest = manifest
        self._images = {split: torch.from_numpy(images) for split, (images, _) in arrays.items()}
        self.labels = {split: labels for split, (_, labels) in arrays.items()}

    def images(
        self, split: str, samples: np.ndarray, crops: np.ndarray, flips: np.ndarray, batch_size: int
    ) -> Generator[torch.Tensor, None, None]:
        for start in range(0, len(samples), batch_size):
            part = slice(start, start + batch_size)
            yield normalised(self._images[split], samples[part], crops[part], flips[part], self._manifest)


def normalised(
    images: torch.Tensor, index: np.ndarray, crops: np.ndarray, flips: np.ndarray, manifest: Manifest
) -> torch.Tensor:
    """A new batch float32 [B, 3, H, W] out of whole `images`, uint8 [N, H, W, 3]."""
    shape = (len(index), 3, manifest.height, manifest.width)
    out = torch.empty(shape, memory_format=torch.channels_last)
    chosen, boxes, flip = (torch.from_numpy(np.ascontiguousarray(a)) for a in (index, crops, flips))
    return crop_flip_normalize(images, chosen, boxes, flip, manifest.mean, manifest.std, out)


def open_reader(manifest: Manifest, folder: Path | None, workers: int) -> MemoryReader:
    """Generate the images. InputError where they are of another version of the generator."""
    assert manifest.synthetic is not None
    data = SyntheticData(**manifest.synthetic)
    if data.fingerprint != manifest.fingerprint:
        raise InputError("the generated images are of another version of fastprune: run them again from the start")
    return MemoryReader(manifest, {split: data.arrays(split) for split in ("train", "val")})
