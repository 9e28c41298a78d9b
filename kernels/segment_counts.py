"""Count the kept weights of each layer, in one pass over the mask."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import check_block, check_tensor, on_its_device, tl, triton, uses_triton
from fastprune.kernels.segments import Segment, check_segments, tiling


@on_its_device
def segment_counts(mask: Tensor, segments: Sequence[Segment], *, block: int = 4096) -> Tensor:
    """Number of kept elements of each segment, int64 [len(segments)] on the mask's device.

    mask: bool [n].  block: elements per program.  ValueError if the segments do not fit the mask.
    """
    check_tensor("mask", mask, mask, (torch.bool,))
    check_segments(segments, mask.numel())
    if uses_triton(mask):
        check_block(block)
        # Without padding: the elements between segments are undefined and must not be counted.
        tiles = tiling(tuple(segments), mask.numel(), block, True, mask.device, padded=False).tiles
        counts = torch.zeros(len(segments), dtype=torch.int64, device=mask.device)
        if len(tiles):
            _segment_counts_kernel[(len(tiles),)](mask, tiles, counts, BLOCK=block, num_warps=8)
        return counts
    return torch.tensor([count_kept(mask[s.span]) for s in segments], dtype=torch.int64)


def segment_counts_reference(mask: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Number of kept elements of each segment, int64 [len(segments)]."""
    return torch.stack([mask[s.span].sum() for s in segments])


def count_kept(mask: Tensor) -> int:
    """Number of kept elements of a mask on a CPU."""
    # A hundred times faster than mask.sum() here.
    return int(np.count_nonzero(mask.numpy()))


@triton.jit
def _segment_counts_kernel(mask, tiles, counts, BLOCK: tl.constexpr):
    tile = tiles + 4 * tl.program_id(0)
    i = tl.arange(0, BLOCK)
    kept = (tl.load(mask + tl.load(tile) + i, mask=i < tl.load(tile + 1), other=0) != 0).to(tl.int32)
    # Integer atomics: the order in which programs add does not change the sum.
    tl.atomic_add(counts + tl.load(tile + 2), tl.sum(kept).to(tl.int64), sem="relaxed")
