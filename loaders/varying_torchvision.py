"""The portable reader of images that vary in size: files decoded each time, in torch's DataLoader."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastprune.errors import InputError
from fastprune.loaders.samples import read_image
from fastprune.loaders.varying_folder import ImageFolder
from fastprune.loaders.varying_resample import make, normalisation
from fastprune.loaders.varying_view import CUT, Draw, View, fill_cuts

AT_ONCE = 16  # images decoded before they are cropped: drawing a box alone costs as much as drawing these together
Item = tuple[int, Draw | None]
"""Stored position and draw: a box depends on the image's size too, so it is drawn where the image is decoded."""


class SplitImages(Dataset[torch.Tensor]):
    """One split of an image folder. DataLoader asks for a whole batch at a time."""

    def __init__(self, folder: ImageFolder, split: str, view: View) -> None:
        self._root, self._files, self._view = folder.root, folder.files[split], view
        self._constants = normalisation(view.mean, view.std)

    def __getitems__(self, items: list[Item]) -> torch.Tensor:
        """float32 [B, 3, S, S], channels-last."""
        size = self._view.output(items[0][1])
        batch = torch.empty((len(items), 3, size, size), memory_format=torch.channels_last)
        for start in range(0, len(items), AT_ONCE):
            self._fill(items[start : start + AT_ONCE], batch[start : start + AT_ONCE])
        return batch

    def _fill(self, items: list[Item], batch: torch.Tensor) -> None:
        samples = np.array([position for position, _ in items])
        images = [self._pixels(position) for position in samples.tolist()]
        cuts = np.zeros(len(items), CUT)
        cuts["height"], cuts["width"] = np.array([image.shape[:2] for image in images]).T
        fill_cuts(cuts, samples, items[0][1], self._view)
        out = batch.permute(0, 2, 3, 1).numpy().reshape(len(items), batch.shape[2], -1)
        for i, image in enumerate(images):
            make(image.reshape(len(image), -1), cuts, i, *self._constants, out[i])

    def _pixels(self, position: int) -> np.ndarray:
        path = self._root / self._files[position]
        try:
            return read_image(path)
        except Exception as error:  # decoders of broken files raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"cannot read {path} ({reason}): replace it or remove it") from None


class ImageFiles:
    """Reader of an image folder through torch's DataLoader with `workers` processes."""

    def __init__(self, folder: ImageFolder, view: View, workers: int) -> None:
        self._images = {split: SplitImages(folder, split, view) for split in folder.files}
        self._workers = workers
        # Compiled here, once: worker processes inherit it.
        cuts = np.zeros(1, CUT)
        cuts["height"] = cuts["width"] = 1
        fill_cuts(cuts, np.zeros(1, np.int64), None, view)
        out = np.empty((view.val_crop, 3 * view.val_crop), np.float32)
        make(np.zeros((1, 3), np.uint8), cuts, 0, *normalisation(view.mean, view.std), out)

    def images(
        self, split: str, samples: np.ndarray, batch_size: int, draw: Draw | None
    ) -> Generator[torch.Tensor, None, None]:
        batches = DataLoader(
            self._images[split],
            batch_size=batch_size,
            sampler=[(position, draw) for position in samples.tolist()],
            num_workers=self._workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # otherwise each epoch draws from torch's global one
        )
        try:
            yield from batches
        except InputError as error:  # from a worker process it comes with a traceback in its message
            raise InputError(str(error).splitlines()[-1].removeprefix("fastprune.errors.InputError: ")) from None


def _as_it_is(batch: Any) -> Any:
    return batch
