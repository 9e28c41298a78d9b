"""The public operations: arguments checked, then the path that the device asks for.

On a CPU they run torch's in-place ops or numpy; elsewhere, in this version, the plain torch meaning.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels import reference
from fastprune.kernels.segments import Segment, check_segments, logical_positions


def _check_flat(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}")
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} ({tuple(tensor.shape)} on {tensor.device}) does not match {tuple(like.shape)} on {like.device}"
        )


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def masked_cast(weight: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Writes where(mask, weight, +0) into `out`, in out's dtype, and returns it.

    weight: floating [n], mask: bool [n], out: floating [n], not overlapping weight unless it is weight. A pruned NaN or
    inf becomes +0, a kept one stays. ValueError on mismatch.
    """
    _check_flat("weight", weight, weight, _FLOATS)
    _check_flat("mask", mask, weight, (torch.bool,))
    _check_flat("out", out, weight, _FLOATS)
    if out.data_ptr() == weight.data_ptr():
        return out.masked_fill_(~mask, 0.0)
    return out.copy_(weight).masked_fill_(~mask, 0.0)


def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    low_precision_copy: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One SGD step as torch.optim.SGD takes it, masked.

    weight, momentum_buffer: float32 [n], mutated, exactly +0 afterwards where mask (bool [n]) is False. grad: float32
    [n], read; its values afterwards are undefined. low_precision_copy: bf16 or fp16 [n], overwritten with the new
    weight. A momentum buffer of zeros gives PyTorch's first step. ValueError on mismatch.
    """
    _check_flat("weight", weight, weight, (torch.float32, torch.float64))
    _check_flat("grad", grad, weight, (weight.dtype,))
    _check_flat("momentum_buffer", momentum_buffer, weight, (weight.dtype,))
    if mask is not None:
        _check_flat("mask", mask, weight, (torch.bool,))
    if nesterov and momentum <= 0:
        raise ValueError("Nesterov momentum needs momentum > 0")
    if len({weight.data_ptr(), grad.data_ptr(), momentum_buffer.data_ptr()}) < 3 and weight.numel():
        raise ValueError("weight, grad and momentum_buffer must not be the same memory")
    if weight_decay:
        grad.add_(weight, alpha=weight_decay)
    momentum_buffer.mul_(momentum).add_(grad)
    step = grad.add_(momentum_buffer, alpha=momentum) if nesterov else momentum_buffer
    if isinstance(lr, Tensor):
        weight.sub_(lr * step)
    else:
        weight.add_(step, alpha=-lr)
    if mask is not None:
        pruned = ~mask
        weight.masked_fill_(pruned, 0.0)
        momentum_buffer.masked_fill_(pruned, 0.0)
    if low_precision_copy is not None:
        _check_flat("low_precision_copy", low_precision_copy, weight, (torch.bfloat16, torch.float16))
        low_precision_copy.copy_(weight)


def kth_smallest_magnitude(weight: Tensor, mask: Tensor, k: int) -> float:
    """The k-th smallest |weight| (k from 1) among the elements that the mask keeps; NaN counts as +inf.

    weight: floating [n], mask: bool [n]. ValueError if fewer than k elements are kept.
    """
    _check_flat("weight", weight, weight, _FLOATS)
    _check_flat("mask", mask, weight, (torch.bool,))
    kept = int(mask.sum())
    if not 1 <= k <= kept:
        raise ValueError(f"k is {k}, but the mask keeps {kept} elements")
    if weight.device.type != "cpu":
        return float(reference.kth_smallest_magnitude(weight, mask, k))
    magnitude = weight[mask].abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    values = magnitude.float().numpy() if magnitude.dtype in (torch.bfloat16, torch.float16) else magnitude.numpy()
    return float(np.partition(values, k - 1)[k - 1])


def keep_top(
    score: Tensor, mask: Tensor, n_prune: int | Sequence[int], segments: Sequence[Segment] | None = None
) -> Tensor:
    """A new mask that keeps what `mask` keeps, less exactly n_prune elements with the lowest scores.

    score: non-negative floating [n] (NaN counts as +inf), mask: bool [n]. n_prune: a number for all segments together
    (global pruning), or one for each segment (local). Ties go by position, the lowest first: the logical position where
    segments are given, else the index. Returns a fresh bool [n]. ValueError if more would be pruned than is left.
    """
    _check_flat("score", score, score, _FLOATS)
    _check_flat("mask", mask, score, (torch.bool,))
    if segments is not None:
        check_segments(segments, mask.numel())
    if isinstance(n_prune, int):
        parts: list[tuple[slice, int]] = [(slice(0, mask.numel()), n_prune)]
    elif segments is None or len(n_prune) != len(segments):
        raise ValueError("n_prune as a sequence needs segments, one number for each")
    else:
        parts = [(s.span, int(n)) for s, n in zip(segments, n_prune, strict=True)]
    device = mask.device
    scores = score.detach().to("cpu", torch.float32 if score.dtype in _FLOATS[2:] else score.dtype).numpy()
    new = mask.cpu().numpy().copy()
    for span, count in parts:
        kept = np.flatnonzero(new[span]) + span.start
        if not 0 <= count <= kept.size:
            raise ValueError(f"cannot prune {count} of the {kept.size} elements that are left")
        if count:
            new[_lowest(scores[kept], kept, count, segments)] = False
    return torch.from_numpy(new).to(device)


def _lowest(scores: np.ndarray, index: np.ndarray, count: int, segments: Sequence[Segment] | None) -> np.ndarray:
    """Indices of the `count` lowest scores: all below the count-th, then the tied ones by position."""
    scores = np.where(np.isnan(scores), np.inf, scores)
    threshold = np.partition(scores, count - 1)[count - 1]
    below, tied = index[scores < threshold], index[scores == threshold]
    wanted = count - below.size
    if wanted < tied.size:
        positions = tied if segments is None else logical_positions(segments, tied)
        tied = tied[np.argsort(positions, kind="stable")[:wanted]]
    return np.concatenate([below, tied])


def segment_counts(mask: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Kept elements of each segment: int64 [len(segments)] on the mask's device. ValueError on a foreign layout."""
    _check_flat("mask", mask, mask, (torch.bool,))
    check_segments(segments, mask.numel())
    if not segments:
        return torch.zeros(0, dtype=torch.int64, device=mask.device)
    return reference.segment_counts(mask, segments)


def pack_bits(bits: Tensor) -> Tensor:
    """bool [n] to uint8 [ceil(n / 8)], the first element in the lowest bit, unused bits zero."""
    _check_flat("bits", bits, bits, (torch.bool,))
    if bits.device.type != "cpu":
        return reference.pack_bits(bits)
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] to bool [n], the inverse of pack_bits. ValueError if the sizes do not fit."""
    _check_flat("packed", packed, packed, (torch.uint8,))
    if packed.numel() != (n + 7) // 8:
        raise ValueError(f"{n} bits need {(n + 7) // 8} bytes, got {packed.numel()}")
    if packed.device.type != "cpu":
        return reference.unpack_bits(packed, n)
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little").astype(bool))
