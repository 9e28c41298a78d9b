"""Decoded images with labels, one by one: what a data set is read from and written with. All of it can be pickled."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fastprune.loaders.layout import Layout


class Samples(Protocol):
    """Images of one split in stored order."""

    @property
    def labels(self) -> Sequence[int]:
        """Class of every image."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What to call image `i` in a message."""

    def image(self, i: int) -> np.ndarray:
        """Image `i`, uint8 [H, W, 3]. Any exception means that it cannot be read."""


@dataclass(frozen=True)
class FolderSamples:
    """Image files below `root`."""

    root: Path
    files: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return str(self.root / self.files[i])

    def image(self, i: int) -> np.ndarray:
        return read_image(self.root / self.files[i])


@dataclass(frozen=True)
class ArraySamples:
    """Images that are in memory, uint8 [n, H, W, 3]."""

    images: np.ndarray
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i}"

    def image(self, i: int) -> np.ndarray:
        return self.images[i]


def folder_samples(layout: Layout) -> dict[str, FolderSamples]:
    return {split: FolderSamples(layout.root, files, layout.labels[split]) for split, files in layout.files.items()}


def read_image(path: str | Path) -> np.ndarray:
    """Decode a file to RGB, uint8 [H, W, 3]; grey images (Tiny ImageNet has some) become RGB."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of an image's bytes."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
