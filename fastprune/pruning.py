"""From weights to a smaller mask: score (which), fraction (how many), allocation (where)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels import keep_top
from fastprune.masks import Mask
from fastprune.specs import n_to_prune


def magnitude_scores(weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """|weight| in the mask's storage order; weights by parameter name in logical shape, float32."""
    scores = torch.zeros(mask.keep.shape)
    for s in mask.segments:
        s.view(scores).copy_(weights[s.name].abs())
    return scores


def random_scores(mask: Mask, seed: int, round: int) -> Tensor:
    """Independent uniform float64 in [0, 1) for each weight, drawn by logical position from (seed, round) alone.

    Philox's raw stream, whose values numpy fixes for good, unlike those of its distributions.
    """
    raw = np.random.Philox(key=np.array([seed, round], dtype=np.uint64)).random_raw(mask.total)
    drawn = torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    scores = torch.zeros(mask.keep.shape, dtype=torch.float64)
    for s in mask.segments:
        s.view(scores).copy_(drawn[s.position : s.position + s.numel].view(s.shape))
    return scores


def prune(scores: Tensor, mask: Mask, fraction: float) -> Mask:
    """The mask without round(fraction x remaining) of its weights, the lowest scores over all layers first.

    Ties go by logical position, so the result is the same everywhere; the new mask is nested in the old one.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 1]")
    return Mask(keep_top(scores, mask.keep, n_to_prune(mask.kept, fraction), mask.segments), mask.segments)
