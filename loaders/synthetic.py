"""Generated images: the same bytes on every machine, learnable by a small network but not trivial.

A class is a pair of colours and the number of times that they alternate horizontally and vertically. Colours, zoom and
phase vary between the images of a class, and noise is added to each pixel.
"""

import hashlib
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastprune.errors import InputError
from fastprune.loaders.manifest import Manifest

if TYPE_CHECKING:
    import numpy as np

VERSION = 1  # of the pixels; enters the fingerprint, because a change of the generator gives another data set
# Chosen so that accuracy neither stays at chance nor saturates: a ResNet-18 of a quarter of the width reaches 66 %
# after 3 epochs of 2,000 images.
WAVES, SPREAD, JITTER, NOISE = 4, 0.7, 0.35, 0.4
SPLITS = ("train", "val")
_CLASS, _IMAGE, _PIXEL = 0, 1, 2  # purpose of a Philox counter: equal counters would give equal draws


@dataclass(frozen=True)
class SyntheticData:
    """Parameters of a generated data set: images of `size` x `size` pixels, ordered by class in both splits.

    InputError if a parameter is out of range.
    """

    classes: int = 10
    train_per_class: int = 200
    val_per_class: int = 50
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            # The upper bound keeps a seed within one 32-bit word of the Philox key.
            lowest = 0 if name == "seed" else 1
            if type(value) is not int or not lowest <= value < 1 << 31:
                raise InputError(f"synthetic data: {name} is {value}, expected a whole number of at least {lowest}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the generator's version and the parameters. Generates no image."""
        parameters = " ".join(f"{name}={value}" for name, value in asdict(self).items())
        return hashlib.sha256(f"fastprune synthetic {VERSION} {parameters}".encode()).hexdigest()

    def manifest(self) -> Manifest:
        # Padded with zeros: an image folder numbers its classes by sorted name.
        width = len(str(self.classes - 1))
        return Manifest(
            name="synthetic",
            fingerprint=self.fingerprint,
            classes=tuple(f"synthetic{label:0{width}}" for label in range(self.classes)),
            train_per_class=(self.train_per_class,) * self.classes,
            val_per_class=(self.val_per_class,) * self.classes,
            height=self.size,
            width=self.size,
            # Nominal, not measured: a manifest must not cost generating the images.
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            synthetic=asdict(self),
        )

    def arrays(self, split: str) -> "tuple[np.ndarray, np.ndarray]":
        """Images uint8 [n, size, size, 3] and labels int64 [n] of a split. Cached: callers must not write to them."""
        return _arrays(self, split)

    def write_folder(self, folder: str | os.PathLike[str], extension: str = "JPEG") -> None:
        """Write the images in Tiny ImageNet's layout, in stored order. extension: JPEG, or png (lossless)."""
        from PIL import Image

        root, classes = Path(folder), self.manifest().classes
        annotations = []
        for split in SPLITS:
            for number, (pixels, label) in enumerate(zip(*self.arrays(split), strict=True)):
                if split == "train":
                    path = root / "train" / classes[label] / "images" / f"{classes[label]}_{number:07}.{extension}"
                else:
                    path = root / "val" / "images" / f"val_{number:07}.{extension}"
                    annotations.append(f"{path.name}\t{classes[label]}\t0\t0\t{self.size - 1}\t{self.size - 1}\n")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        (root / "val" / "val_annotations.txt").write_text("".join(annotations), encoding="utf-8")
        (root / "wnids.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


@lru_cache(maxsize=4)
def _arrays(data: SyntheticData, split: str) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np

    each = data.train_per_class if split == "train" else data.val_per_class
    labels = np.repeat(np.arange(data.classes), each)
    images = np.empty((len(labels), data.size, data.size, 3), np.uint8)
    step = max(1, (1 << 18) // data.size**2)  # bounds the memory of the float64 intermediates
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        images[part] = _generate(data, SPLITS.index(split), np.arange(len(labels))[part], labels[part])
    return images, labels


def _generate(data: SyntheticData, split: int, sample: "np.ndarray", labels: "np.ndarray") -> "np.ndarray":
    """Pixels uint8 [n, size, size, 3] of samples int64 [n] with labels int64 [n]."""
    # Only Philox words and float64 additions, multiplications and floors: IEEE 754 rounds them alike on every
    # processor, while a sine may differ in its last bit.
    import numpy as np

    from fastprune.loaders.augment import philox4x32

    def uniform(low: "np.ndarray", purpose: int, which: int, high: "np.ndarray | int" = 0) -> "np.ndarray":
        """Four uniform numbers for each counter, float64 [..., 4] in [0, 1)."""
        words = philox4x32(low, high, which, 2 * purpose + split, data.seed, VERSION)
        return np.stack(words, axis=-1) * 2.0**-32

    def fold(phase: "np.ndarray") -> "np.ndarray":
        """Triangle wave of period 1 between 0 and 1."""
        return np.abs(2.0 * (phase - np.floor(phase)) - 1.0)

    def kind(which: int) -> "np.ndarray":
        """The constants of each sample's class: the same in both splits."""
        words = philox4x32(np.arange(data.classes), 0, which, 2 * _CLASS, data.seed, VERSION)
        return (np.stack(words, axis=-1) * 2.0**-32)[labels]

    each, count = uniform(sample, _IMAGE, 0), 1.0 + np.floor(WAVES * kind(2))
    # A crop or a flip changes zoom and phase, which vary anyway, so it keeps the class.
    zoom = 0.7 + 0.6 * each[:, 2]
    axis = (0.5 + np.arange(data.size)) / data.size
    across = fold((zoom * count[:, 0])[:, None] * axis + each[:, :1])[:, None, :]
    down = fold((zoom * count[:, 1])[:, None] * axis + each[:, 1:2])[:, :, None]
    mix = (0.5 * (across + down))[..., None]
    one, other = (
        0.5 + SPREAD * (kind(which)[:, :3] - 0.5) + JITTER * (uniform(sample, _IMAGE, 1 + which)[:, :3] - 0.5)
        for which in (0, 1)
    )
    one, other = one[:, None, None, :], other[:, None, None, :]
    pixel = np.arange(data.size**2).reshape(1, data.size, data.size)
    noise = uniform(pixel, _PIXEL, 0, high=sample[:, None, None])[..., :3] - 0.5
    value = one + mix * (other - one) + NOISE * noise
    return np.clip(np.floor(256.0 * value), 0.0, 255.0).astype(np.uint8)
