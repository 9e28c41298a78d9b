"""Allocations: how many weights each layer loses. From scores and a mask to a smaller mask."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from fastprune.kernels import keep_top, segment_counts
from fastprune.pruning.masks import Mask
from fastprune.specs import ALLOCATIONS, n_to_prune


def prune(scores: Tensor, mask: Mask, fraction: float, allocation: str = "global") -> Mask:
    """A new mask, nested in `mask`, that prunes exactly round(fraction x kept) more weights, the lowest scores first.

    scores: non-negative floating [n] in the mask's storage order, on its device. allocation: "global" ranks all layers
    together, "local" prunes round(fraction x kept) weights of each layer. Ties are broken by logical position.
    ValueError for a fraction outside [0, 1] or an unknown allocation.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 1]")
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: choose one of {', '.join(ALLOCATIONS)}")
    # A count, not a threshold: under ties `score <= threshold` prunes another number of weights. Position breaks the
    # ties, so every rank and every device gets the same mask.
    if allocation == "global":
        n_prune: int | list[int] = n_to_prune(mask.kept, fraction)
    else:
        n_prune = [n_to_prune(kept, fraction) for kept in _kept(mask)]
    return Mask(keep_top(scores, mask.keep, n_prune, mask.segments), mask.segments)


def prune_to_ratios(scores: Tensor, mask: Mask, ratios: Mapping[str, float]) -> Mask:
    """A new mask, nested in `mask`, with the layerwise pruning ratios `ratios`, the lowest scores of each layer first.

    ratios: by layer name, in the mask's order, the fraction in [0, 1] of all weights of the layer that is pruned
    afterwards. `counts_of_ratios` rounds them to whole weights. ValueError if the layers are not the mask's, or if
    `mask` already prunes more of a layer than its ratio.
    """
    if list(ratios) != [s.name for s in mask.segments]:
        raise ValueError("the ratios are for other layers than the mask's: give one for each layer, in its order")
    wanted = counts_of_ratios(list(ratios.values()), [s.numel for s in mask.segments])
    n_prune = []
    for s, count, kept in zip(mask.segments, wanted, _kept(mask), strict=True):
        n_prune.append(count - (s.numel - kept))
        if n_prune[-1] < 0:
            raise ValueError(
                f"{s.name} has {s.numel - kept} weights pruned already, more than the {count} of its ratio: "
                "raise the ratio, or start from a denser mask"
            )
    return Mask(keep_top(scores, mask.keep, n_prune, mask.segments), mask.segments)


def counts_of_ratios(ratios: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Number of weights to prune in each layer: the ratios (in [0, 1]) times the layer sizes, rounded to whole numbers.

    The counts add up to round(sum of ratio x size), by the largest-remainder method (Hamilton's): each count is the
    integer part, and the layers with the largest remainders get one more. Ties: the earlier layer. ValueError for a
    ratio outside [0, 1].
    """
    # Fractions, because a rounding error in the remainders or in their sum would move a weight to another layer.
    exact = [Fraction(ratio) * size for ratio, size in zip(ratios, sizes, strict=True)]
    if any(not 0 <= quota <= size for quota, size in zip(exact, sizes, strict=True)):
        raise ValueError(f"ratios are {', '.join(map(str, ratios))}: expected fractions in [0, 1]")
    # A ratio count / size is inexact in binary. Within 1e-6 of a whole number that number is meant, so that the ratios
    # of an existing mask give its counts back.
    exact = [Fraction(near) if abs(q - (near := round(q))) < Fraction(1, 10**6) else q for q in exact]
    counts = [int(quota) for quota in exact]
    short = round(sum(exact)) - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[:short]:
        counts[i] += 1
    return counts


def _kept(mask: Mask) -> list[int]:
    """Number of kept weights of each layer."""
    counts: list[int] = segment_counts(mask.keep, mask.segments).tolist()
    return counts
