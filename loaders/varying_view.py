"""What is made of images that vary in size: of each a box, resized, and of that a window, perhaps mirrored."""

from dataclasses import dataclass

import numpy as np

from fastprune.errors import InputError
from fastprune.loaders.augment import boxes

Draw = tuple[int, int]
"""Seed and epoch: with an image's position and size, all that its box and flip depend on."""

_NUMBERS = "height width top left tall wide full_height full_width window_top window_left".split()
CUT = [*((name, "<i8") for name in _NUMBERS), ("flip", "?")]
"""One image: its size, the box in it, the size that the box gets, the window's corner in that; whether mirrored."""


@dataclass(frozen=True)
class View:
    """Sizes in pixels; mean and std per channel, as fractions of full scale."""

    train_crop: int
    val_resize: int
    val_crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("train_crop", "val_resize", "val_crop"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1 pixel")
        if self.val_crop > self.val_resize:
            raise InputError(f"val_crop {self.val_crop} is larger than val_resize {self.val_resize}")
        if not min(self.std) > 0:
            raise InputError(f"std is {self.std}, expected three positive numbers")

    def output(self, draw: Draw | None) -> int:
        """Height and width of the images of a batch."""
        return self.val_crop if draw is None else self.train_crop


def fill_cuts(cuts: np.ndarray, samples: np.ndarray, draw: Draw | None, view: View) -> None:
    """Fill `cuts`, structured [n] with at least the fields of CUT, of which height and width are set already.

    samples: stored positions, int64 [n].  draw: None for the validation view.
    """
    if draw is not None:
        box, cuts["flip"] = boxes(*draw, samples, cuts["height"], cuts["width"])
        cuts["top"], cuts["left"], cuts["tall"], cuts["wide"] = box.T
        cuts["full_height"] = cuts["full_width"] = view.train_crop
        cuts["window_top"] = cuts["window_left"] = 0
        return
    cuts["top"] = cuts["left"] = cuts["flip"] = 0
    cuts["tall"], cuts["wide"] = cuts["height"], cuts["width"]
    short = np.minimum(cuts["height"], cuts["width"])
    for side, corner in (("height", "window_top"), ("width", "window_left")):
        # As torchvision rounds: the long side down, the window's corner to the nearest, halves to even.
        cuts[f"full_{side}"] = view.val_resize * cuts[side] / short
        cuts[corner] = np.rint((cuts[f"full_{side}"] - view.val_crop) / 2.0)
