"""What one call of reproduce.py asks for, and the data that it means."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastprune.errors import InputError
from fastprune.loaders.layout import DISTRIBUTED, scan
from fastprune.loaders.manifest import Manifest, Subset
from fastprune.loaders.places import known
from fastprune.loaders.synthetic import SyntheticData
from fastprune.settings import Settings
from fastprune.specs import DataSpec, n_to_prune

if TYPE_CHECKING:
    from fastprune.loaders import LoaderChoice

UNKNOWN = "unknown"
"""The fingerprint of images that nobody has read yet."""

TITLES = {name: title for name, (title, *_) in DISTRIBUTED.items()} | {"synthetic": "generated images"}
"""Data set -> what a person calls it."""


@dataclass(frozen=True)
class FigureRequest:
    """A figure that is asked for, its settings resolved. `out` is the figure's folder.

    data: a folder, "synthetic", or None where none was given: enough to plan.
    """

    name: str
    preset: str
    settings: Settings
    data: str | None
    out: Path


@dataclass(frozen=True)
class Request:
    """One call of reproduce.py. rate: images/s to plan with, where not the measured ones. clusters: numbers of GPUs to
    plan for. ray: run on a cluster, at
    ray_address, with `gpus` GPUs a run (None: one where there are GPUs). command: for the record."""

    figures: tuple[FigureRequest, ...]
    store: Path
    loader: str = "auto"
    device: str | None = None
    workers: int | None = None
    checkpoint_seconds: float = 60.0
    checkpoint_epochs: int | None = None
    rate: float | None = None
    clusters: tuple[int, ...] = ()
    ray: bool = False
    ray_address: str | None = None
    gpus: float | None = None
    command: str = ""


def asked_for(figure: FigureRequest) -> str | SyntheticData:
    """What the loaders are asked for: a folder, or as many generated images as the settings use."""
    flag, title = data_flag(figure.settings), TITLES[figure.settings.dataset]
    if figure.data == "":
        raise InputError(f"{flag} is empty: give the folder of {title}, or 'synthetic'")
    if figure.data is None:
        raise InputError(
            f"figure {figure.name} at preset {figure.preset} trains on {title}: say where it is with {flag} DIR"
        )
    if figure.data != "synthetic":
        return figure.data
    s = figure.settings
    return SyntheticData(s.classes or 10, s.train_per_class or 500, s.val_per_class or 50, size=s.image_size)


def data_flag(settings: Settings) -> str:
    """The flag that says where the figure's images are."""
    return "--miniplaces" if settings.dataset == "miniplaces" else "--data"


def planned_data(figure: FigureRequest, store: Path) -> DataSpec:
    """The data a plan counts with, told without reading an image: from the folder, or where none is given from the
    data set as it is distributed."""
    s = figure.settings
    manifest = None if figure.data is None else known(asked_for(figure), store)
    if manifest is not None:
        return data_spec(manifest, s)
    limits = {"train": s.train_per_class, "val": s.val_per_class}
    if figure.data is None:
        _, number, *each = DISTRIBUTED[s.dataset]
        name, held = s.dataset, {split: (count,) * number for split, count in zip(limits, each, strict=True)}
    else:
        layout = scan(str(asked_for(figure)))
        name, held = layout.name, {split: layout.per_class(split) for split in limits}
    counts = {
        split: sum(n if most is None else min(n, most) for n in held[split][: s.classes])
        for split, most in limits.items()
    }
    classes = s.classes or len(held["train"])
    return DataSpec(
        name, f"{UNKNOWN} {name}", classes, s.train_per_class, s.val_per_class, counts["train"], counts["val"]
    )


def find_data(
    request: Request, figure: FigureRequest, device: str, copies: int
) -> "tuple[Manifest, Path | None, LoaderChoice]":
    """The data set, prepared where it was not, and the loader that will read it; `copies` workers share a device."""
    from fastprune.loaders import choose_loader, locate

    manifest, folder = locate(asked_for(figure), request.store, loader=request.loader)
    return manifest, folder, choose_loader(manifest, folder, request.loader, device=device, copies=copies)


def data_spec(manifest: Manifest, settings: Settings) -> DataSpec:
    """The part of a data set that the settings use. InputError if it has too few classes or images."""
    part = Subset(settings.classes, settings.train_per_class, settings.val_per_class)
    train, val = (part.count(manifest, split) for split in ("train", "val"))
    if settings.batch_size > train:
        raise InputError(f"--batch-size is {settings.batch_size}, but there are only {train} training images")
    classes = settings.classes or len(manifest.classes)
    if classes < 2:
        raise InputError(f"{manifest.name} has one class: there is nothing to learn")
    return DataSpec(
        manifest.name, manifest.fingerprint, classes, settings.train_per_class, settings.val_per_class, train, val
    )


def check_rounds(settings: Settings, data: DataSpec) -> None:
    """InputError where a round would prune nothing, or all that is left."""
    import torch

    from fastprune.flat import prunable
    from fastprune.models import build

    with torch.device("meta"):
        left = sum(weight.numel() for _, weight in prunable(build(settings.network(data))))
    for round in range(1, settings.rounds + 1):
        gone = n_to_prune(left, settings.fraction)
        if not 0 < gone < left:
            what = "nothing" if gone == 0 else "all"
            raise InputError(
                f"round {round} of {settings.rounds} would prune {what} of {left} weights: change --fraction"
            )
        left -= gone
