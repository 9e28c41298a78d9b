"""The images that a figure trains on: where they are, how many its settings use, which loader reads them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastprune.errors import InputError
from fastprune.loaders.catalog import peek, unread
from fastprune.loaders.layout import DISTRIBUTED, scan
from fastprune.loaders.manifest import Manifest, Subset
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import DataSpec
from fastprune.study.settings import Settings

if TYPE_CHECKING:
    from fastprune.loaders import LoaderChoice

TITLES = {name: title for name, (title, *_) in DISTRIBUTED.items()} | {"synthetic": "generated images"}
"""Name of a data set -> its title."""
UNKNOWN = "unknown"
"""Start of the fingerprint of a data set whose pixels no process has read yet."""


def data_flag(settings: Settings) -> str:
    """The flag that names the folder of a figure's images."""
    return "--miniplaces" if settings.dataset == "miniplaces" else "--data"


@dataclass(frozen=True)
class DataRequest:
    """settings: which part of a data set is used. folder: "synthetic", or None where none was given, which is enough to
    plan. user: what trains on it, for messages."""

    settings: Settings
    folder: str | None
    user: str

    def source(self) -> str | SyntheticData:
        """For the loaders: a folder, or a description of as many generated images as the settings use.

        InputError where none was given.
        """
        flag, title = data_flag(self.settings), TITLES[self.settings.dataset]
        if self.folder == "":
            raise InputError(f"{flag} is empty: give the folder of {title}, or 'synthetic'")
        if self.folder is None:
            raise InputError(f"{self.user} trains on {title}: give its folder with {flag} DIR")
        if self.folder != "synthetic":
            return self.folder
        s = self.settings
        return SyntheticData(s.classes or 10, s.train_per_class or 500, s.val_per_class or 50, size=s.image_size)

    def planned(self, store: Path) -> DataSpec:
        """The data that a plan assumes, without reading an image. InputError as of `data_spec`, and for missing data.

        Counts come from the manifest if the data are prepared, else from the folder's file names, else from the data
        set as distributed. The fingerprint is unknown unless there is a manifest.
        """
        manifest = None if self.folder is None else peek(self.source(), store)
        if manifest is None:
            # The fingerprint needs every pixel. A made-up one matches no node in the store, and the plan says so.
            held = _as_distributed(self.settings.dataset) if self.folder is None else unread(scan(str(self.source())))
            manifest = replace(held, fingerprint=f"{UNKNOWN} {held.name}")
        return data_spec(manifest, self.settings)

    def find(self, store: Path, loader: str, device: str, copies: int) -> "tuple[Manifest, Path | None, LoaderChoice]":
        """Manifest and folder of the data set, which is prepared if it is not yet, and the loader that will read it.

        copies: how many workers share a device, each with images of its own.
        """
        # Here, because these import torch, which a plan does without.
        from fastprune.loaders import choose_loader, find_or_prepare

        manifest, folder = find_or_prepare(self.source(), store, loader=loader)
        return manifest, folder, choose_loader(manifest, folder, loader, device=device, copies=copies)


def _as_distributed(dataset: str) -> Manifest:
    """What is known of a data set without its folder."""
    _, number, train, val = DISTRIBUTED[dataset]
    return Manifest(
        name=dataset,
        fingerprint="",
        classes=tuple(map(str, range(number))),
        train_per_class=(train,) * number,
        val_per_class=(val,) * number,
        height=0,
        width=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def data_spec(manifest: Manifest, settings: Settings) -> DataSpec:
    """The part of a data set that the settings use. InputError for fewer than two classes, more than it has, or fewer
    images than a batch."""
    part = Subset(settings.classes, settings.train_per_class, settings.val_per_class)
    train, val = (part.count(manifest, split) for split in ("train", "val"))
    # The last partial batch is dropped, so an epoch would have no step.
    if settings.batch_size > train:
        raise InputError(
            f"a batch of {settings.batch_size} is more than the {train} training images: lower --batch-size"
        )
    classes = settings.classes or len(manifest.classes)
    if classes < 2:
        raise InputError(f"{manifest.name} has {classes} class, at least 2 are needed: choose another data set")
    return DataSpec(
        manifest.name, manifest.fingerprint, classes, settings.train_per_class, settings.val_per_class, train, val
    )
