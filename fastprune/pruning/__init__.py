"""Which weights go: masks by parameter, criteria, allocations, and channels (structured)."""

from fastprune.pruning.allocation import prune, prune_to_ratios
from fastprune.pruning.criteria import magnitude_scores, random_scores
from fastprune.pruning.masks import Mask, MaskedConv2d, MaskedLinear, attach, masks_of, plain_state_dict

__all__ = [
    "Mask",
    "MaskedConv2d",
    "MaskedLinear",
    "attach",
    "magnitude_scores",
    "masks_of",
    "plain_state_dict",
    "prune",
    "prune_to_ratios",
    "random_scores",
]
