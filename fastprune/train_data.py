"""The images that train.py trains on: a prepared data set at its own size, or a folder of images of any size."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.loaders import DataSource, SyntheticData, VaryingSource, locate, open_data, open_varying
from fastprune.loaders.layout import recognised
from fastprune.loaders.manifest import FILE_NAME
from fastprune.train_request import TrainRequest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for images whose own are not known
_STORE = Path("runs")


class Epochs:
    """Training batches whose epoch also seeds torch's generators, from (seed, epoch, rank): what a model draws itself
    (dropout, stochastic depth) does not depend on where a run was resumed."""

    def __init__(self, batches: Any, seed: int, rank: int) -> None:
        self._batches, self._seed, self._rank = batches, seed, rank

    def set_epoch(self, epoch: int) -> None:
        self._batches.set_epoch(epoch)
        words = np.random.SeedSequence([self._seed, epoch, self._rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


@dataclass(frozen=True)
class Images:
    """Opened data. size: height and width of training images.  about: one line.  resized: whether by the crop flags."""

    source: DataSource | VaryingSource
    classes: int
    size: tuple[int, int]
    about: str
    resized: bool

    def train(self, seed: int, batch_size: int, shard: tuple[int, int], dtype: torch.dtype) -> Epochs:
        """Training batches of one rank. dtype: wanted; images that are resized come as float32."""
        if isinstance(self.source, VaryingSource):
            batches: Any = self.source.train(seed=seed, batch_size=batch_size, shard=shard)
        else:
            batches = self.source.train(seed=seed, batch_size=batch_size, shard=shard, dtype=dtype)
        return Epochs(batches, seed, shard[0])

    def val(self, batch_size: int, shard: tuple[int, int], dtype: torch.dtype) -> Any:
        """Validation batches of one rank."""
        if isinstance(self.source, VaryingSource):
            return self.source.val(batch_size=batch_size, shard=shard)
        return self.source.val(batch_size=batch_size, shard=shard, dtype=dtype)


def open_images(request: TrainRequest, device: torch.device, *, show: bool, sharing: int = 1) -> Images:
    """Finds, prepares where needed, and opens the data. InputError where it is not usable.

    show: progress on stderr.  sharing: processes that share the processors.
    """
    if request.data == "":
        raise InputError("--data-path is empty: give a folder of images, or 'synthetic'")
    workers = request.workers
    if workers is None:
        workers = min(16, max(1, len(os.sched_getaffinity(0)) // sharing))
    if request.data == "synthetic":
        return _fixed(request, SyntheticData(), device, workers, show)
    folder = _prepared_folder(Path(request.data))
    if (folder / FILE_NAME).exists() or recognised(folder) is not None:
        return _fixed(request, str(folder), device, workers, show)
    return _varying(request, folder, workers)


def _prepared_folder(path: Path) -> Path:
    """The folder that a .beton file stands for, with its manifest; any other path is its own."""
    if path.suffix != ".beton":
        return path
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if not (path.parent / FILE_NAME).exists():
        raise InputError(f"{path} has no {FILE_NAME} beside it: give a folder that scripts/prepare_data.py made")
    return path.parent


def _fixed(request: TrainRequest, data: str | SyntheticData, device: torch.device, workers: int, show: bool) -> Images:
    manifest, folder = locate(data, request.store or _STORE, loader=request.loader, show=show)
    height, width = manifest.height, manifest.width
    for flag, asked in (
        ("--train-crop-size", request.train_crop),
        ("--val-resize-size", request.val_resize),
        ("--val-crop-size", request.val_crop),
    ):
        if asked is not None and (asked, asked) != (height, width):
            raise InputError(
                f"{flag} {asked} does not fit {manifest.name}, whose images are used at their own {height} x {width} "
                "pixels: leave the flag out, or give a folder with train/<class>/ and val/<class>/"
            )
    source = open_data(manifest, folder, loader=request.loader, device=device, workers=workers, show=show)
    about = (
        f"{manifest.name}: {manifest.train_count} training and {manifest.val_count} validation images in "
        f"{len(manifest.classes)} classes, {height} x {width}, normalised by their own mean {_three(manifest.mean)} "
        f"and std {_three(manifest.std)}, loader {source.loader}"
    )
    return Images(source, len(manifest.classes), (height, width), about, resized=False)


def _varying(request: TrainRequest, folder: Path, workers: int) -> Images:
    crop, resize, val_crop = request.train_crop or 224, request.val_resize or 256, request.val_crop or 224
    if val_crop > resize:
        raise InputError(f"--val-crop-size {val_crop} is larger than --val-resize-size {resize}")
    source = open_varying(
        folder,
        train_crop=crop,
        val_resize=resize,
        val_crop=val_crop,
        mean=MEAN,
        std=STD,
        loader=request.loader,
        workers=workers,
        threads=max(1, workers),
        cache=None if request.store is None else request.store / "data",
    )
    about = (
        f"{folder}: {source.count('train')} training and {source.count('val')} validation images in "
        f"{len(source.classes)} classes, cropped to {crop} x {crop} (validation: resized to {resize}, cropped to "
        f"{val_crop}), normalised by ImageNet's mean {_three(MEAN)} and std {_three(STD)}, loader {source.loader}"
    )
    return Images(source, len(source.classes), (crop, crop), about, resized=True)


def _three(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{v:.3f}' for v in values)})"
