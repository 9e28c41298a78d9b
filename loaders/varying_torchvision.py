"""The portable reader of images that vary in size: files decoded each time, cropped by torchvision's own functions."""

from collections.abc import Generator

import numpy as np
import torch
import torchvision.transforms.functional as F
from torch.utils.data import DataLoader, Dataset

from fastprune.errors import InputError
from fastprune.loaders.augment import boxes
from fastprune.loaders.samples import read_image
from fastprune.loaders.varying import Draw, View
from fastprune.loaders.varying_folder import ImageFolder

Item = tuple[int, Draw | None]
"""Stored position and draw: a box depends on the image's size too, so it is drawn where the image is decoded."""


class SplitImages(Dataset[torch.Tensor]):
    """One split of an image folder, indexed by Items; float32 [3, S, S]."""

    def __init__(self, folder: ImageFolder, split: str, view: View) -> None:
        self._root, self._files, self._view = folder.root, folder.files[split], view

    def __getitem__(self, item: Item) -> torch.Tensor:
        position, draw = item
        path = self._root / self._files[position]
        try:
            pixels = read_image(path)
        except Exception as error:  # decoders of broken files raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot read {path} ({reason}): replace it or remove it") from None
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        return train_view(image, position, draw, self._view) if draw else val_view(image, self._view)


def train_view(image: torch.Tensor, position: int, draw: Draw, view: View) -> torch.Tensor:
    """The random crop of `image`, uint8 [3, H, W], for an epoch: float32 [3, S, S]."""
    (box,), (flip,) = boxes(*draw, np.array([position]), *image.shape[1:])
    # Cropped before it becomes float, which torchvision would do the other way round: the same pixels, less work.
    part = F.convert_image_dtype(F.crop(image, *box.tolist()), torch.float32)
    part = F.resize(part, [view.train_crop, view.train_crop], antialias=True)
    return F.normalize(F.hflip(part) if flip else part, list(view.mean), list(view.std))


def val_view(image: torch.Tensor, view: View) -> torch.Tensor:
    """`image`, uint8 [3, H, W], resized and cropped at the centre: float32 [3, S, S]."""
    whole = F.resize(F.convert_image_dtype(image, torch.float32), [view.val_resize], antialias=True)
    return F.normalize(F.center_crop(whole, [view.val_crop, view.val_crop]), list(view.mean), list(view.std))


class ImageFiles:
    """Reader of an image folder through torch's DataLoader with `workers` processes."""

    def __init__(self, folder: ImageFolder, view: View, workers: int) -> None:
        self._images = {split: SplitImages(folder, split, view) for split in folder.files}
        self._workers = workers

    def images(
        self, split: str, samples: np.ndarray, batch_size: int, draw: Draw | None
    ) -> Generator[torch.Tensor, None, None]:
        batches = DataLoader(
            self._images[split],
            batch_size=batch_size,
            sampler=[(position, draw) for position in samples.tolist()],
            num_workers=self._workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # otherwise each epoch draws from torch's global one
        )
        try:
            yield from batches
        except InputError as error:  # from a worker process it comes with a traceback in its message
            raise InputError(str(error).splitlines()[-1].removeprefix("fastprune.errors.InputError: ")) from None


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(images).contiguous(memory_format=torch.channels_last)
