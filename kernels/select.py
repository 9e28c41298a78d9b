"""Triton: the exact k-th lowest score, and the mask that prunes so many, over all layers or in each.

Radix selection without a host in between. Non-negative floats order as their 31 bits do; a count of the highest digit
tells in which bin the k-th lies, then the next digit is counted among those in that bin. Counts are added with integer
atomics, so the result does not depend on the order in which programs run. Ties are settled by the same selection over
logical positions, which reads nothing where all tied elements go anyway.

A tile never crosses a segment. A group is what shares one count: all segments together, or each by itself.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.kernels.segments import Segment

_BITS = tl.constexpr(11)
_BINS = tl.constexpr(2048)
_INFINITY = tl.constexpr(0x7F800000)
SCORE_SHIFTS = (20, 9, 0)
"""Lowest bit of each digit of a score's 31 bits: 11, 11 and 9 of them."""
POSITION_SHIFTS = (33, 22, 11, 0)
"""The same of a position: 44 bits."""

# What is known of a group, int64: the digits of the threshold so far and the rank that is left among them, how many
# share them, the same for the position of the last tied element that goes, and the number asked for.
_PREFIX, _RANK, _EQUAL, _PLACE, _PLACE_RANK, _WANTED, _FIELDS = (tl.constexpr(i) for i in range(7))


@triton.jit
def _key(score, i, there):
    value = tl.load(score + i, mask=there, other=0.0).to(tl.float32)
    return tl.minimum(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _INFINITY)


@triton.jit
def _position(i, table, segment):
    local = i - tl.load(table + 4 * segment)
    channels, pixels = tl.load(table + 4 * segment + 2), tl.load(table + 4 * segment + 3)
    rest = local // channels
    channel = local - rest * channels
    out = rest // pixels
    return tl.load(table + 4 * segment + 1) + (out * channels + channel) * pixels + (rest - out * pixels)


@triton.jit
def _count(score, mask, tiles, table, state, counts, SHIFT: tl.constexpr, TIES: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    start, end = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    group = tl.load(tiles + 4 * tile + 3)
    known = state + group * _FIELDS
    # Nothing to settle where all tied elements go.
    if TIES and tl.load(known + _RANK) == tl.load(known + _EQUAL):
        return
    i = start + tl.arange(0, BLOCK).to(tl.int64)
    there = i < end
    there &= tl.load(mask + i, mask=there, other=0) != 0
    if TIES:
        there &= _key(score, i, there) == tl.load(known + _PREFIX).to(tl.int32)
        place = _position(i, table, tl.load(tiles + 4 * tile + 2))
        there &= (place >> (SHIFT + _BITS)) == tl.load(known + _PLACE)
        digit = ((place >> SHIFT) & (_BINS - 1)).to(tl.int32)
    else:
        key = _key(score, i, there)
        if SHIFT < 20:
            # The lowest digit has 9 bits; the others 11, of which the highest starts at bit 20.
            ABOVE: tl.constexpr = 20 if SHIFT == 9 else 9
            there &= (key >> ABOVE) == tl.load(known + _PREFIX).to(tl.int32)
            digit = (key >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
        else:
            digit = key >> SHIFT
    # What is not there is counted in bin 0, and taken off again.
    bins = tl.arange(0, _BINS)
    count = tl.histogram(tl.where(there, digit, 0), _BINS)
    count -= tl.where(bins == 0, BLOCK - tl.sum(there.to(tl.int32)), 0)
    tl.atomic_add(counts + group * _BINS + bins, count, mask=count > 0)


@triton.jit
def _choose(state, counts, WIDTH: tl.constexpr, TIES: tl.constexpr):
    """One program a group: the bin in which the rank falls; clears the counts for the next digit."""
    group = tl.program_id(0).to(tl.int64)
    known = state + group * _FIELDS
    bins = tl.arange(0, _BINS)
    count = tl.load(counts + group * _BINS + bins).to(tl.int64)
    tl.store(counts + group * _BINS + bins, tl.zeros([_BINS], tl.int32))
    PREFIX: tl.constexpr = _PLACE if TIES else _PREFIX
    RANK: tl.constexpr = _PLACE_RANK if TIES else _RANK
    rank = tl.load(known + RANK)
    upto = tl.cumsum(count, 0)
    # Bins that end before the rank; beyond the last one only if fewer are kept than were asked for.
    chosen = tl.minimum(tl.sum((upto < rank).to(tl.int32)), _BINS - 1)
    inside = tl.sum(tl.where(bins == chosen, count, 0))
    before = tl.sum(tl.where(bins == chosen, upto, 0)) - inside
    tl.store(known + PREFIX, (tl.load(known + PREFIX) << WIDTH) | chosen)
    tl.store(known + RANK, rank - before)
    if not TIES:
        tl.store(known + _EQUAL, inside)
        tl.store(known + _PLACE_RANK, rank - before)


@triton.jit
def _write(score, mask, new, tiles, table, state, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    start, end = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    known = state + tl.load(tiles + 4 * tile + 3) * _FIELDS
    i = start + tl.arange(0, BLOCK).to(tl.int64)
    there = i < end
    keep = there & (tl.load(mask + i, mask=there, other=0) != 0)
    if tl.load(known + _WANTED) > 0:
        key = _key(score, i, keep)
        threshold = tl.load(known + _PREFIX).to(tl.int32)
        gone = key < threshold
        tied = keep & (key == threshold)
        if tl.sum(tied.to(tl.int32)) > 0:
            if tl.load(known + _RANK) == tl.load(known + _EQUAL):
                gone |= tied
            else:
                place = _position(i, table, tl.load(tiles + 4 * tile + 2))
                gone |= tied & (place <= tl.load(known + _PLACE))
        keep &= gone == 0
    tl.store(new + i, keep.to(tl.int8), mask=there)


@lru_cache(maxsize=32)
def layout(segments: tuple[Segment, ...], block: int, local: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """tiles int64 [n, 4]: start, end, segment, group; table int64 [segments, 4]: offset, position, channels, pixels."""
    tiles, table = [], []
    for number, s in enumerate(segments):
        channels, pixels = (s.shape[1], s.shape[2] * s.shape[3]) if len(s.shape) == 4 else (1, 1)
        table.append((s.offset, s.position, max(channels, 1), max(pixels, 1)))
        for start in range(s.offset, s.offset + s.numel, block):
            tiles.append((start, min(start + block, s.offset + s.numel), number, number if local else 0))
    return tuple(torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(device) for rows in (tiles, table))  # type: ignore


def _select(score: Tensor, mask: Tensor, tiles: Tensor, table: Tensor, state: Tensor, ties: bool, block: int) -> None:
    grid, groups = (len(tiles),), len(state)
    counts = torch.zeros(groups, _BINS.value, dtype=torch.int32, device=score.device)
    above = 31
    for shift in SCORE_SHIFTS:
        _count[grid](score, mask, tiles, table, state, counts, SHIFT=shift, TIES=False, BLOCK=block, num_warps=8)
        _choose[(groups,)](state, counts, WIDTH=above - shift, TIES=False)
        above = shift
    for shift in POSITION_SHIFTS if ties else ():
        _count[grid](score, mask, tiles, table, state, counts, SHIFT=shift, TIES=True, BLOCK=block, num_warps=8)
        _choose[(groups,)](state, counts, WIDTH=_BITS.value, TIES=True)


def _state(wanted: Sequence[int], device: torch.device) -> Tensor:
    if len(wanted) == 1:  # made on the device, so that it can be captured in a graph
        state = torch.zeros(1, _FIELDS.value, dtype=torch.int64, device=device)
        state[:, _RANK.value].fill_(wanted[0])
        state[:, _WANTED.value].fill_(wanted[0])
        return state
    rows = torch.zeros(len(wanted), _FIELDS.value, dtype=torch.int64)
    rows[:, _RANK.value] = rows[:, _WANTED.value] = torch.tensor(wanted, dtype=torch.int64)
    return rows.to(device)


def kth(score: Tensor, mask: Tensor, k: int, block: int) -> Tensor:
    """The k-th smallest magnitude, float32 [] on the device; see ops.kth_smallest_magnitude."""
    tiles, table = layout((Segment("", (score.numel(),), 0, 0),), block, False, score.device)
    state = _state([k], score.device)
    _select(score, mask, tiles, table, state, False, block)
    return state[0, _PREFIX.value].to(torch.int32).view(torch.float32)


def keep_top(
    score: Tensor, mask: Tensor, wanted: Sequence[int], segments: tuple[Segment, ...], local: bool, block: int
) -> Tensor:
    """The new mask; see ops.keep_top. wanted: one number for all, or with `local` one for each segment."""
    new = torch.zeros_like(mask)
    tiles, table = layout(segments, block, local, score.device)
    if len(tiles):
        state = _state(wanted, score.device)
        _select(score, mask, tiles, table, state, True, block)
        _write[(len(tiles),)](score, mask, new, tiles, table, state, BLOCK=block, num_warps=8)
    return new
