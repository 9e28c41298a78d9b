"""From weights to a smaller mask: score (which), fraction (how many), allocation (where)."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels import keep_top, segment_counts
from fastprune.masks import Mask
from fastprune.specs import ALLOCATIONS, n_to_prune


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


def prune(scores: Tensor, mask: Mask, fraction: float, allocation: str = "global") -> Mask:
    """The mask without round(fraction x remaining) of its weights, the lowest scores first; nested in the old one.

    allocation: "global" takes the lowest over all layers together, "local" round(fraction x remaining) of each layer.
    Ties go by logical position, so the result is the same everywhere.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 1]")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: choose one of {', '.join(ALLOCATIONS)}")
    if allocation == "global":
        gone: int | list[int] = n_to_prune(mask.kept, fraction)
    else:
        gone = [n_to_prune(left, fraction) for left in _kept(mask)]
    return Mask(keep_top(scores, mask.keep, gone, mask.segments), mask.segments)


def prune_to_ratios(scores: Tensor, mask: Mask, ratios: Mapping[str, float]) -> Mask:
    """The mask nested in `mask` that prunes of each layer the fraction `ratios` says (by layer name, of all its
    weights), the lowest scores of the layer first.

    Counts are whole and their total exact: see `counts_of_ratios`. ValueError for other layers than the mask's, and
    where the old mask has already pruned more of a layer.
    """
    if list(ratios) != [s.name for s in mask.segments]:
        raise ValueError("the ratios are those of a network with other layers")
    wanted = counts_of_ratios(list(ratios.values()), [s.numel for s in mask.segments])
    gone = []
    for s, count, left in zip(mask.segments, wanted, _kept(mask), strict=True):
        gone.append(count - (s.numel - left))
        if gone[-1] < 0:
            raise ValueError(f"{s.name} has {s.numel - left} weights pruned already, the ratios ask for {count}")
    return Mask(keep_top(scores, mask.keep, gone, mask.segments), mask.segments)


def counts_of_ratios(ratios: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """How many weights of layers of `sizes` go at `ratios` (in [0, 1]): round(sum of ratio x size) in all.

    Whole parts first, then one more where the remainder is largest (ties: the earlier layer).
    """
    exact = [Fraction(ratio) * size for ratio, size in zip(ratios, sizes, strict=True)]
    if any(not 0 <= quota <= size for quota, size in zip(exact, sizes, strict=True)):
        raise ValueError("ratios are fractions in [0, 1]")
    # A ratio that is a count over a size is not exact in binary: what is that close to a whole number is meant as one.
    exact = [Fraction(near) if abs(q - (near := round(q))) < Fraction(1, 10**6) else q for q in exact]
    counts = [int(quota) for quota in exact]
    short = round(sum(exact)) - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[:short]:
        counts[i] += 1
    return counts


def _kept(mask: Mask) -> list[int]:
    counts: list[int] = segment_counts(mask.keep, mask.segments).tolist()
    return counts
