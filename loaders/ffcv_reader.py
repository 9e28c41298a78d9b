"""Whole images out of .beton files through FFCV, cropped as soon as they come.

FFCV's own crops and flips are unseeded, its random order mixes seed and epoch badly, its batches are views that it
overwrites, and when its thread fails the caller waits for ever: so it is asked for whole images in a given order, and
everything else happens here.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.beton import Beton, check_beton
from fastprune.loaders.ffcv_use import end_threads, importing_ffcv, next_batch, open_loader
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.memory_reader import Table, normalised, on_device


class FfcvReader:
    """Reader of train.beton and val.beton: one FFCV loader a split, compiled once (half a second), for every epoch,
    order and batch size.
    """

    device = torch.device("cpu")

    def __init__(self, manifest: Manifest, files: dict[str, Beton]) -> None:
        self._manifest, self._files = manifest, files
        self._loaders: dict[str, Any] = {}
        self.labels = {split: file.labels for split, file in files.items()}

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        every, crops, flips = (on_device(c, self.device) for c in (np.arange(batch_size), *table[1:]))
        with whole_images(self._loader(split), table.samples, batch_size) as batches:
            for start, whole in zip(range(0, len(table.samples), batch_size), batches, strict=True):
                part = slice(start, start + len(whole))
                images = torch.from_numpy(whole)
                yield normalised(images, every[: len(whole)], crops[part], flips[part], self._manifest, dtype)

    def _loader(self, split: str) -> Any:
        if split not in self._loaders:
            self._loaders[split] = _open_loader(self._files[split].path)
        return self._loaders[split]


def open_reader(manifest: Manifest, folder: Path | None, device: torch.device, workers: int, show: bool) -> FfcvReader:
    """Check both files. InputError where one is missing, truncated, foreign, or not the manifest's."""
    assert folder is not None
    return FfcvReader(manifest, checked_files(manifest, folder))


def checked_files(manifest: Manifest, folder: Path) -> dict[str, Beton]:
    """The tables of both files, without FFCV. InputError where one is not what the manifest describes."""
    files = {}
    for split in ("train", "val"):
        name, _ = manifest.file(split)
        if name is None:
            raise InputError(f"the manifest in {folder} names no {split} file: prepare the data again")
        files[split] = check_beton(folder / name, manifest, split)
    return files


def _open_loader(path: Path) -> Any:
    with importing_ffcv():
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader
    return open_loader(Loader, path, SimpleRGBImageDecoder())


@contextmanager
def whole_images(loader: Any, samples: np.ndarray, batch_size: int) -> Iterator[Iterator[np.ndarray]]:
    """FFCV's thread over `samples`, as batches uint8 [B, H, W, 3] that are valid until the next one is asked for.

    loader: as `open_loader` made it; its batch size is changed.  samples: int64 [n].  However it is left, the thread is
    ended.
    """
    from ffcv.loader.epoch_iterator import EpochIterator

    threads = torch.get_num_threads()
    loader.batch_size = batch_size
    thread = EpochIterator(loader, samples)

    def batches() -> Iterator[np.ndarray]:
        for number in range(-(-len(samples) // batch_size)):
            (images,) = next_batch(thread)
            if number == 0:
                torch.set_num_threads(threads)  # the thread has set it to 1 before its first batch
            yield images

    try:
        yield batches()
    finally:
        end_threads([thread])
