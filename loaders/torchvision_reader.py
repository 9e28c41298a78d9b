"""The portable reader: image files, decoded each time, cropped by torchvision's own functions."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as F
from torch.utils.data import DataLoader, Dataset

from fastprune.errors import InputError
from fastprune.loaders.choice import unchanged_source
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.memory_reader import Table
from fastprune.loaders.samples import FolderSamples, folder_samples

Item = tuple[int, Sequence[int], bool]
"""Stored position, box and flip: whatever is random travels with the request, so a worker process decides nothing."""


class FolderImages(Dataset[torch.Tensor]):
    """One split of an image folder, indexed by Items; float32 [3, H, W]."""

    def __init__(self, samples: FolderSamples, manifest: Manifest) -> None:
        self._samples, self._manifest = samples, manifest

    def __getitem__(self, item: Item) -> torch.Tensor:
        position, (top, left, height, width), flip = item
        size = [self._manifest.height, self._manifest.width]
        try:
            pixels = self._samples.image(position)
        except Exception as error:  # decoders of broken files raise nearly anything
            raise InputError(f"cannot read {self._samples.name(position)} ({error}): prepare the data again") from None
        if list(pixels.shape[:2]) != size:
            raise InputError(f"{self._samples.name(position)} has another size than before: prepare the data again")
        image = F.convert_image_dtype(torch.from_numpy(pixels).permute(2, 0, 1), torch.float32)
        # A box is never larger than the image, so there is nothing to smooth.
        image = F.resized_crop(image, top, left, height, width, size, antialias=False)
        image = F.hflip(image) if flip else image
        return F.normalize(image, list(self._manifest.mean), list(self._manifest.std))


class FolderReader:
    """Reader of an image folder through torch's DataLoader with `workers` processes."""

    device = torch.device("cpu")

    def __init__(self, manifest: Manifest, samples: dict[str, FolderSamples], workers: int) -> None:
        self._images = {split: FolderImages(part, manifest) for split, part in samples.items()}
        self._workers = workers
        self.labels = {split: np.array(part.labels, np.int64) for split, part in samples.items()}

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        items = list(zip(*(column.tolist() for column in table), strict=True))
        batches = DataLoader(
            self._images[split],
            batch_size=batch_size,
            sampler=items,
            num_workers=self._workers,
            generator=torch.Generator(),  # otherwise each epoch draws from torch's global one
        )
        try:
            for batch in batches:
                yield batch.to(dtype, memory_format=torch.channels_last)
        except InputError as error:  # from a worker process it comes with a traceback in its message
            raise InputError(str(error).splitlines()[-1].removeprefix("fastprune.errors.InputError: ")) from None


def open_reader(
    manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool
) -> FolderReader:
    """Scan the image folder. InputError where it is not what was prepared."""
    return FolderReader(manifest, folder_samples(unchanged_source(manifest, folder)), workers)
