"""Criteria: why a weight goes. Each gives scores in a mask's storage order, the lowest of which go first."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastprune.pruning.masks import Mask


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
