"""Allocations: where weights go. From scores and a mask to a smaller mask: how many of each layer."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from fastprune.kernels import keep_top, segment_counts
from fastprune.pruning.masks import Mask
from fastprune.specs import ALLOCATIONS, n_to_prune


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
