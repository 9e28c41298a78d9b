"""The portable reader: torch's DataLoader decodes image files in every epoch, torchvision's functions crop them.

It is the reference that the other readers are compared with.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from fastprune.errors import InputError
from fastprune.loaders.choice import unchanged_source
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.readers import Crop, Table
from fastprune.loaders.readers.memory import normalised, on_device
from fastprune.loaders.samples import FolderSamples, folder_samples, open_rgb, reason
from fastprune.loaders.transforms import Augment

Item = tuple[int, tuple[int, int, int, int], bool, int]
"""Stored position, box, flip and seed of one sample."""
# Every random choice is part of the request, so a batch does not depend on the number of worker processes.


class OneSizeImages(Dataset[torch.Tensor]):
    """One split of a folder with images of one size, indexed by Items; gives float32 [3, H, W], normalised."""

    def __init__(self, samples: FolderSamples, manifest: Manifest, augment: Augment | None) -> None:
        """augment: of training images, None for a bilinear crop and a flip."""
        self._samples, self._manifest, self._augment = samples, manifest, augment
        self._after = augment.after_crop(manifest.mean, manifest.std) if augment else None

    def __getitem__(self, item: Item) -> torch.Tensor:
        position, (top, left, box_h, box_w), flip, seed = item
        size = [self._manifest.height, self._manifest.width]
        try:
            pixels = self._samples.image(position)
        except Exception as error:  # decoders of broken files raise nearly anything
            raise InputError(f"cannot read {self._samples.name(position)} ({error}): prepare the data again") from None
        if list(pixels.shape[:2]) != size:
            raise InputError(f"{self._samples.name(position)} has changed its size: prepare the data again")
        if self._augment is not None and self._after is not None:
            # As a picture: the policies are defined on those.
            picture = F.resized_crop(Image.fromarray(pixels), top, left, box_h, box_w, size, self._augment.mode)
            with _seeded(seed):
                return self._after(F.hflip(picture) if flip else picture)
        image = F.convert_image_dtype(torch.from_numpy(pixels).permute(2, 0, 1), torch.float32)
        # A box is never larger than the output here, so it is never reduced: antialiasing would change nothing but
        # time.
        image = F.resized_crop(image, top, left, box_h, box_w, size, antialias=False)
        image = F.hflip(image) if flip else image
        return F.normalize(image, list(self._manifest.mean), list(self._manifest.std))


class AnySizeImages(Dataset[torch.Tensor]):
    """One split of any image folder, indexed by Items, cropped as in torchvision's reference script.

    Gives uint8 [S, S, 3]: flip and normalisation follow per batch. With `augment`, training images are float32 [3, S,
    S], flipped and normalised.
    """

    def __init__(self, samples: FolderSamples, split: str, crop: Crop, augment: Augment | None) -> None:
        self._samples, self._crop, self._train = samples, crop, split == "train"
        mode = (augment or Augment()).mode
        self._random = RandomResizedCrop(crop.train_crop, interpolation=mode)
        self._resize, self._centre = Resize(crop.val_resize, mode), CenterCrop(crop.val_crop)
        self._after = augment.after_crop(crop.mean, crop.std) if augment and self._train else None

    def __getitem__(self, item: Item) -> torch.Tensor:
        position, _, flip, seed = item
        name = self._samples.name(position)
        try:
            image = open_rgb(name)
        except Exception as error:  # decoders of broken files raise nearly anything
            raise InputError(f"cannot read {name} ({reason(error)}): replace it or remove it") from None
        if self._train:
            with _seeded(seed):
                image = self._random(image)
                if self._after is not None:
                    return self._after(F.hflip(image) if flip else image)
        else:
            image = self._centre(self._resize(image))
        return torch.from_numpy(np.array(image))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it torch's global generator, from which transforms draw, begins at `seed`; it is restored after."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class FolderReader:
    """Reader of an image folder through torch's DataLoader with `workers` processes.

    crop: for images that differ in size, else None.  augment: None for bilinear crops and flips alone.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        manifest: Manifest,
        samples: dict[str, FolderSamples],
        crop: Crop | None,
        workers: int,
        augment: Augment | None = None,
    ) -> None:
        self._images: dict[str, Dataset[torch.Tensor]] = {
            split: OneSizeImages(part, manifest, augment if split == "train" else None)
            if crop is None
            else AnySizeImages(part, split, crop, augment)
            for split, part in samples.items()
        }
        self._crop, self._workers, self._augmented = crop, workers, augment is not None
        self.labels: dict[str, np.ndarray] = {split: np.array(part.labels, np.int64) for split, part in samples.items()}

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        seeds = np.zeros(len(table.samples), np.uint64) if table.seeds is None else table.seeds
        items = list(zip(*(column.tolist() for column in (*table[:3], seeds)), strict=True))
        batches = DataLoader(
            self._images[split],
            batch_size=batch_size,
            sampler=items,
            num_workers=self._workers,
            generator=torch.Generator(),  # the default draws a seed from torch's global generator in each epoch
        )
        try:
            for start, batch in zip(range(0, len(items), batch_size), batches, strict=True):
                if self._crop is None or (self._augmented and split == "train"):
                    yield batch.to(dtype, memory_format=torch.channels_last)
                    continue
                every, size = torch.arange(len(batch)), self._crop.size(split)
                boxes, flips = (on_device(c[start : start + batch_size], self.device) for c in table[1:3])
                yield normalised(batch, every, boxes, flips, (size, size), self._crop, dtype)
        except InputError as error:
            # The DataLoader raises an error of a worker process again with its traceback as the message.
            raise InputError(str(error).splitlines()[-1].removeprefix("fastprune.errors.InputError: ")) from None


def open_torchvision(
    manifest: Manifest, folder: Path | None, crop: Crop | None, workers: int, augment: Augment | None = None
) -> FolderReader:
    """Scan the image folder and return its reader. InputError if its files have changed since they were prepared."""
    return FolderReader(manifest, folder_samples(unchanged_source(manifest, folder)), crop, workers, augment)
