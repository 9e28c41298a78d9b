"""Triton: masks at one bit a weight, and survivors per layer, each in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pack(bits, packed, n, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = (tl.load(bits + place, mask=place < n, other=0) != 0).to(tl.int32)
    value = tl.sum(bit << tl.arange(0, 8)[None, :], 1)
    tl.store(packed + byte, value.to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def _unpack(packed, bits, n, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(packed + byte, mask=byte * 8 < n, other=0).to(tl.int32)
    place = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = (value[:, None] >> tl.arange(0, 8)[None, :]) & 1
    tl.store(bits + place, bit.to(tl.int8), mask=place < n)


@triton.jit
def _count(mask, tiles, counts, BLOCK: tl.constexpr):
    tile = tiles + 4 * tl.program_id(0)
    i = tl.arange(0, BLOCK)
    kept = (tl.load(mask + tl.load(tile) + i, mask=i < tl.load(tile + 1), other=0) != 0).to(tl.int32)
    tl.atomic_add(counts + tl.load(tile + 2), tl.sum(kept).to(tl.int64), sem="relaxed")


def pack(bits: Tensor, block: int) -> Tensor:
    """See ops.pack_bits."""
    packed = torch.empty((bits.numel() + 7) // 8, dtype=torch.uint8, device=bits.device)
    if bits.numel():
        _pack[(triton.cdiv(packed.numel(), block),)](bits, packed, bits.numel(), BLOCK=block, num_warps=8)
    return packed


def unpack(packed: Tensor, n: int, block: int) -> Tensor:
    """See ops.unpack_bits."""
    bits = torch.empty(n, dtype=torch.bool, device=packed.device)
    if n:
        _unpack[(triton.cdiv(packed.numel(), block),)](packed, bits, n, BLOCK=block, num_warps=8)
    return bits


def count(mask: Tensor, tiles: Tensor, number: int, block: int) -> Tensor:
    """Survivors of each of `number` segments, int64; tiles as select.py lays them out."""
    counts = torch.zeros(number, dtype=torch.int64, device=mask.device)
    if len(tiles):
        _count[(len(tiles),)](mask, tiles, counts, BLOCK=block, num_warps=8)
    return counts
