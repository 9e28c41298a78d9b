"""fastprune: iterative magnitude pruning as fast as the hardware allows.

Importing the package imports no torch: the names below are loaded when they are first used, so that planning a figure
starts at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "fastprune.errors",
    "FlatParams": "fastprune.flat",
    "Mask": "fastprune.masks",
    "MaskedConv2d": "fastprune.masks",
    "attach": "fastprune.masks",
    "masks_of": "fastprune.masks",
    "plain_state_dict": "fastprune.masks",
    "MaskedSGD": "fastprune.optim",
    "keep_pruned": "fastprune.optim",
    "prune": "fastprune.pruning",
    "Trainer": "fastprune.train",
    "RunStore": "fastprune.store",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
