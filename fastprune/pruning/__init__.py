"""Which weights go: masks by parameter, criteria, allocations, schedules, the Pruner, and channels (structured)."""

from fastprune.pruning import criteria, schedules
from fastprune.pruning.allocation import prune, prune_to_ratios
from fastprune.pruning.coverage import coverage
from fastprune.pruning.layers import MaskedConv2d, MaskedLinear, mask_layers
from fastprune.pruning.masks import Mask
from fastprune.pruning.pruner import Pruner

__all__ = [
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "Pruner",
    "coverage",
    "criteria",
    "mask_layers",
    "prune",
    "prune_to_ratios",
    "schedules",
]
