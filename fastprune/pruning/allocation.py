"""Allocations: how many weights each layer loses. From scores and a mask to a smaller mask."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from fastprune.errors import kind_of
from fastprune.kernels import keep_top, segment_counts
from fastprune.pruning.masks import Mask
from fastprune.specs import ALLOCATIONS, n_to_prune


def prune(scores: Tensor, mask: Mask, fraction: float, allocation: str = "global") -> Mask:
    """A new mask, nested in `mask`, that prunes exactly round(fraction x kept) more weights, the lowest scores first.

    scores: non-negative floating [n] in the mask's storage order, on its device. allocation: "global" ranks all layers
    together, "local" prunes round(fraction x kept) weights of each layer. Ties are broken by logical position.
    ValueError for a fraction outside [0, 1] or an unknown allocation.
    """
    check_share("fraction", fraction, "a number in [0, 1]")
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
    if any(not 0 <= ratio <= 1 for ratio in ratios):  # NaN, too
        raise ValueError(f"ratios are {', '.join(map(str, ratios))}: expected fractions in [0, 1]")
    # Fractions, because a rounding error in the remainders or in their sum would move a weight to another layer.
    exact = [Fraction(ratio) * size for ratio, size in zip(ratios, sizes, strict=True)]
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


# For a Pruner

Allocation = str | Mapping[str, float]
"""What `Pruner.prune` takes: "global", "uniform", "erk", "N:M", or sparsities in [0, 1] by parameter name."""

_ALLOCATIONS = "choose global, uniform, erk, N:M such as 2:4, or give ratios by parameter name"

Shapes = Mapping[str, tuple[int, ...]]


def amount_to_prune(
    allocation: Allocation, shapes: Shapes, kept: Sequence[int], fraction: float | None, to: float | None, n: int | None
) -> int | None:
    """The number of weights to prune in all, from the one amount that is given; None for given ratios.

    kept: of each layer. ValueError unless exactly one amount is given (none with ratios), and for one out of range;
    TypeError for one that is no number.
    """
    if not isinstance(allocation, (str, Mapping)):
        raise ValueError(f"unknown allocation {allocation!r}: {_ALLOCATIONS}")
    given = sum(amount is not None for amount in (fraction, to, n))
    if any(isinstance(amount, bool) for amount in (fraction, to, n)):
        raise ValueError("an amount is a number, not a bool")
    if not isinstance(allocation, str):
        if given:
            raise ValueError("ratios by layer say themselves how much is pruned: give no amount")
        return None
    if given != 1:
        raise ValueError("give one amount: a fraction of the weights left, to= a sparsity, or n= a number of weights")
    left, total = sum(kept), sum(prod(shape) for shape in shapes.values())
    if fraction is not None:
        check_share("fraction", fraction, "a number in [0, 1]")
        return n_to_prune(left, float(fraction))
    if to is not None:
        check_share("to", to, "a sparsity in [0, 1]")
        wanted = n_to_prune(total, float(to)) - (total - left)
        if wanted < 0:
            raise ValueError(f"to is {to}, but {1 - left / total:.6g} of the weights are pruned already")
        return wanted
    assert n is not None
    _check_number("n", n)
    if not 0 <= n <= left or n != int(n):
        meant = f"; for a share of them, fraction={n}" if 0 < n < 1 else ""
        raise ValueError(f"n is {n}, expected a whole number from 0 to the {left} weights that are left{meant}")
    return int(n)


def check_share(name: str, value: float, expected: str) -> None:
    """TypeError unless `value` is a number, ValueError unless it is in [0, 1]. name, expected: for the message."""
    _check_number(name, value)
    if not 0 <= value <= 1:  # NaN, too
        meant = f": did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ValueError(f"{name} is {value}, expected {expected}{meant}")


def _check_number(name: str, value: object) -> None:
    # Whatever has a float's value: numpy's scalars and tensors of one element, too.
    if not hasattr(value, "__float__"):
        raise TypeError(
            f"{name} is {kind_of(value)}, expected a number such as {name}={'1000' if name == 'n' else '0.2'}"
        )


def counts_to_prune(allocation: Allocation, amount: int | None, shapes: Shapes, kept: Sequence[int]) -> int | list[int]:
    """How many weights to prune: one number over all layers ("global"), or one of each layer, of that sum.

    amount: of `amount_to_prune`. "uniform" prunes the same share of what each layer has left. "erk" keeps of each layer
    in proportion to the sum of its dimensions (Erdos-Renyi-Kernel: Mocanu et al., 2018; Evci et al., 2020), but no more
    than it has left. ValueError for an unknown allocation or layer, and for a ratio that a layer already exceeds.
    """
    if not isinstance(allocation, str):
        return _counts_of_some(allocation, shapes, kept)
    assert amount is not None
    if allocation == "global":
        return amount
    if allocation == "uniform":
        return _shared_out(amount, [Fraction(n) for n in kept], list(kept))
    if allocation == "erk":
        keep = _shared_out(sum(kept) - amount, [Fraction(sum(shape)) for shape in shapes.values()], list(kept))
        return [n - stays for n, stays in zip(kept, keep, strict=True)]
    raise ValueError(f"unknown allocation {allocation!r}: {_ALLOCATIONS}")


def _counts_of_some(ratios: Mapping[str, float], shapes: Shapes, kept: Sequence[int]) -> list[int]:
    if unknown := [name for name in ratios if name not in shapes]:
        raise ValueError(f"{unknown[0]} is none of the layers: {', '.join(list(shapes)[:4])}, ...")
    sizes = [prod(shape) for shape in shapes.values()]
    named = [i for i, name in enumerate(shapes) if name in ratios]
    given = [float(ratios[name]) for name in shapes if name in ratios]  # of numpy or torch, perhaps
    wanted = counts_of_ratios(given, [sizes[i] for i in named])
    counts = [0] * len(sizes)
    for i, count in zip(named, wanted, strict=True):
        counts[i] = count - (sizes[i] - kept[i])
        if counts[i] < 0:
            name = list(shapes)[i]
            raise ValueError(f"{name} has {1 - kept[i] / sizes[i]:.6g} pruned already, more than its {ratios[name]}")
    return counts


def _shared_out(amount: int, shares: Sequence[Fraction], limits: Sequence[int]) -> list[int]:
    """`amount` as whole numbers in proportion to `shares`, none above its limit; the rest goes to the others.

    The largest remainders get one more; ties: the earlier one. amount: at most the sum of the limits.
    """
    full: set[int] = {i for i, limit in enumerate(limits) if limit == 0}
    while True:
        rest = amount - sum(limits[i] for i in full)
        free = [i for i in range(len(limits)) if i not in full]
        scale = Fraction(rest, 1) / (sum((shares[i] for i in free), Fraction(0)) or 1)
        over = {i for i in free if shares[i] * scale > limits[i]}
        if not over:
            break
        full |= over
    exact = [Fraction(limits[i]) if i in full else shares[i] * scale for i in range(len(limits))]
    counts = [int(quota) for quota in exact]
    by_remainder = sorted((i for i in free if counts[i] < limits[i]), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: amount - sum(counts)]:
        counts[i] += 1
    return counts


def nm_masks(
    allocation: Allocation,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None,
    dims: Mapping[str, int],
) -> dict[str, Tensor] | None:
    """New masks that keep at most N of each M consecutive weights along the input dimension; None for no "N:M".

    dims: that dimension by name: the second (of a linear layer the last, which torch's semi-structured tensors
    compress), of a transposed conv the first. Of those that the mask keeps the highest scores stay (None: magnitudes),
    of tied ones the last. ValueError for a layer whose input dimension is no multiple of M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", allocation) if isinstance(allocation, str) else None
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    if not 0 < n <= m:
        raise ValueError(f"allocation is {allocation}: N of M needs 0 < N <= M")
    new = {}
    for name, weight in weights.items():
        dim = dims[name]
        size = weight.shape[dim] if weight.dim() > 1 else 0
        if size % m or not weight.dim() > 1:
            raise ValueError(f"{name} has {size} inputs, no multiple of {m}: exclude it from the Pruner")
        score = weight.detach().abs() if scores is None else scores[name]
        lowest = -torch.inf
        grouped = score.masked_fill(~masks[name], lowest).movedim(dim, -1)
        rank = grouped.reshape(-1, m).argsort(dim=1, stable=True).argsort(dim=1)
        keep = (rank >= m - n).view(grouped.shape).movedim(-1, dim)
        new[name] = keep & masks[name]
    return new
