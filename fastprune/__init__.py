"""fastprune: prune any model, and train pruned ones as fast as the hardware allows.

Names are imported on first use.
"""

# Importing the package must not import torch, which takes seconds: `--plan` and `--help` do without it.

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastprune import sparse
    from fastprune.errors import InputError
    from fastprune.pruning import criteria, schedules
    from fastprune.pruning.channels import remove_channels
    from fastprune.pruning.exchange import to_torch_prune
    from fastprune.pruning.layers import MaskedConv2d, MaskedLinear, mask_layers
    from fastprune.pruning.masks import Mask
    from fastprune.pruning.pruner import Pruner
    from fastprune.store import RunStore
    from fastprune.training.optim import MaskedSGD
    from fastprune.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedSGD",
    "Pruner",
    "RunStore",
    "Trainer",
    "__version__",
    "criteria",
    "mask_layers",
    "remove_channels",
    "schedules",
    "sparse",
    "to_torch_prune",
]

_HOME = {
    "InputError": "fastprune.errors",
    "Mask": "fastprune.pruning.masks",
    "MaskedConv2d": "fastprune.pruning.layers",
    "MaskedLinear": "fastprune.pruning.layers",
    "MaskedSGD": "fastprune.training.optim",
    "Pruner": "fastprune.pruning.pruner",
    "RunStore": "fastprune.store",
    "Trainer": "fastprune.training.trainer",
    "criteria": "fastprune.pruning",
    "mask_layers": "fastprune.pruning.layers",
    "remove_channels": "fastprune.pruning.channels",
    "schedules": "fastprune.pruning",
    "sparse": "fastprune.sparse",
    "to_torch_prune": "fastprune.pruning.exchange",
}


# Hidden from type checkers, for which any name would exist: they read the imports above.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'fastprune' has no attribute {name!r}")
        module = import_module(_HOME[name])
        return module if module.__name__ == f"fastprune.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
