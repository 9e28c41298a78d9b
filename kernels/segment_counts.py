"""Kept weights of each layer, in one pass over the mask."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import check_block, check_tensor, on_its_device, tl, triton, uses_triton
from fastprune.kernels.segments import Segment, check_segments, tiling


@on_its_device
def segment_counts(mask: Tensor, segments: Sequence[Segment], *, block: int = 4096) -> Tensor:
    """Kept elements of each segment: int64 [len(segments)] on the mask's device. ValueError on a foreign layout."""
    check_tensor("mask", mask, mask, (torch.bool,))
    check_segments(segments, mask.numel())
    if uses_triton(mask):
        check_block(block)
        # Without padding: what lies between segments may hold anything, and is not counted.
        tiles = tiling(tuple(segments), mask.numel(), block, True, mask.device, padded=False).tiles
        counts = torch.zeros(len(segments), dtype=torch.int64, device=mask.device)
        if len(tiles):
            _segment_counts_kernel[(len(tiles),)](mask, tiles, counts, BLOCK=block, num_warps=8)
        return counts
    return torch.tensor([count_kept(mask[s.span]) for s in segments], dtype=torch.int64)


def segment_counts_reference(mask: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Kept elements of each segment, int64."""
    return torch.stack([mask[s.span].sum() for s in segments])


def count_kept(mask: Tensor) -> int:
    """Kept elements of a mask on a CPU."""
    return int(np.count_nonzero(mask.numpy()))  # a hundred times faster than mask.sum() here


@triton.jit
def _segment_counts_kernel(mask, tiles, counts, BLOCK: tl.constexpr):
    tile = tiles + 4 * tl.program_id(0)
    i = tl.arange(0, BLOCK)
    kept = (tl.load(mask + tl.load(tile) + i, mask=i < tl.load(tile + 1), other=0) != 0).to(tl.int32)
    # Integers: the order in which programs add does not change the sum.
    tl.atomic_add(counts + tl.load(tile + 2), tl.sum(kept).to(tl.int64), sem="relaxed")
