"""fastprune: iterative magnitude pruning as fast as the hardware allows.

Names are imported on first use.
"""

# Importing the package must not import torch, which takes seconds: `--plan` and `--help` do without it.

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "fastprune.errors",
    "FlatParams": "fastprune.training.flat",
    "Mask": "fastprune.pruning.masks",
    "MaskedConv2d": "fastprune.pruning.masks",
    "attach": "fastprune.pruning.masks",
    "masks_of": "fastprune.pruning.masks",
    "plain_state_dict": "fastprune.pruning.masks",
    "MaskedSGD": "fastprune.training.optim",
    "keep_pruned": "fastprune.training.optim",
    "prune": "fastprune.pruning.allocation",
    "Trainer": "fastprune.training.trainer",
    "RunStore": "fastprune.store",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
