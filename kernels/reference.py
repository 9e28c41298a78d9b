"""What each kernel means, in plain torch on any device and in any floating dtype. Written to be read, not to be fast.

A change that makes a kernel faster may not touch this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune.kernels.segments import Segment


def masked_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """where(mask, weight, +0) in `dtype`: a select, so a pruned NaN or inf is +0 as well."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)).to(dtype)


def masked_sgd(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor]:
    """New (weight, momentum_buffer) of torch.optim.SGD's update; both are +0 where the mask prunes."""
    step = grad + weight_decay * weight
    buffer = momentum * momentum_buffer + step
    step = step + momentum * buffer if nesterov else buffer
    weight = weight - lr * step
    if mask is not None:
        weight, buffer = masked_cast(weight, mask, weight.dtype), masked_cast(buffer, mask, buffer.dtype)
    return weight, buffer


def kth_smallest_magnitude(weight: Tensor, mask: Tensor, k: int) -> Tensor:
    """The k-th smallest |weight| (k from 1) among the kept ones; NaN counts as the largest."""
    return weight[mask].abs().nan_to_num(nan=torch.inf, posinf=torch.inf).sort().values[k - 1]


def keep_top(
    score: Tensor, mask: Tensor, n_prune: int | Sequence[int], segments: Sequence[Segment] | None = None
) -> Tensor:
    """The mask less its n_prune lowest scores (a sequence: that many in each segment); ties go by logical position."""
    if segments is None:
        order = score.masked_fill(score.isnan(), torch.inf)[mask].argsort(stable=True)
        new = mask.clone()
        new[mask.nonzero().flatten()[order[: int(n_prune)]]] = False  # type: ignore[arg-type]
        return new
    groups = [list(segments)] if isinstance(n_prune, int) else [[s] for s in segments]
    counts = [n_prune] if isinstance(n_prune, int) else list(n_prune)
    new = mask.clone()
    for group, count in zip(groups, counts, strict=True):
        logical_mask = torch.cat([s.view(mask).reshape(-1) for s in group])
        logical_score = torch.cat([s.view(score).reshape(-1) for s in group])
        kept = keep_top(logical_score, logical_mask, count)
        for s, part in zip(group, kept.split([s.numel for s in group]), strict=True):
            s.view(new).copy_(part.view(s.shape))
    return new


def segment_counts(mask: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Kept elements of each segment, int64."""
    return torch.stack([mask[s.span].sum() for s in segments])


def pack_bits(bits: Tensor) -> Tensor:
    """bool [n] to uint8 [ceil(n / 8)], first element in the lowest bit; the last byte is filled with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] to bool [n]: the inverse of pack_bits."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & places).ne(0).view(-1)[:n]
