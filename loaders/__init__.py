"""Loaders of labelled image batches: prepared data sets (FFCV), image folders (torchvision), generated images.

    manifest, folder = find_or_prepare("path/to/tiny-imagenet-200", "runs")
    source = open_data(manifest, folder)
    batches = source.train(seed=0, batch_size=512)
    batches.set_epoch(3)
    for images, labels in batches: ...

This package depends neither on models nor on pruning. Names are imported on first use.
"""

from importlib import import_module
from typing import Any

# Name to module, imported lazily: reading a manifest (`--plan`) needs neither numpy nor torch.
_HOME = {
    "Manifest": "manifest",
    "Subset": "manifest",
    "load_manifest": "manifest",
    "save_manifest": "manifest",
    "SyntheticData": "synthetic",
    "peek": "catalog",
    "find_or_prepare": "catalog",
    "prepare": "preparation",
    "check_beton": "beton",
    "philox4x32": "augment",
    "epoch_order": "augment",
    "crop_boxes": "augment",
    "Batches": "batches",
    "DataSource": "batches",
    "open_data": "batches",
    "Crop": "readers",
    "LoaderChoice": "choice",
    "choose_loader": "choice",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
