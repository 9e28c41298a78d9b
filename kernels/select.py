"""Triton: the exact k-th lowest score, and the mask that prunes so many, over all layers or in each.

Non-negative floats order as their 31 bits do: a key. A sample of the keys brackets the k-th; one pass over everything
counts what lies below the bracket and gathers what lies inside, a few percent; only that is searched, eight bits at a
time, then ties by their positions. Where the sample misleads, everything is gathered: exact either way, and no host in
between. Counting everything in a histogram instead costs `tl.histogram` hundreds of instructions a weight at 2,048
bins, many times the one read that is the floor; over what was gathered, with 256 bins, it is nothing.

Counts are added with integer atomics and what is gathered is a set: no order of programs changes the result. A tile
never crosses a segment. A group is what shares one count: all segments together, or each by itself.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.kernels.segments import Segment

_SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(256)
_DIGITS = tl.constexpr(4)
_INFINITY = tl.constexpr(0x7F800000)
_PROGRAMS = 528  # that search what was gathered: four on each multiprocessor of a large GPU

# What is known of a group, int64: the bracket, how many lie below it and inside it (twice: the second time everything
# was gathered), the threshold, how many share it and how many of those go.
_LOW, _HIGH, _BELOW, _INSIDE, _, _, _THRESHOLD, _EQUAL, _LEFT, _FIELDS = (tl.constexpr(i) for i in range(10))


@triton.jit
def _key(score, i, there):
    value = tl.load(score + i, mask=there, other=0.0).to(tl.float32)
    return tl.minimum(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _INFINITY)


@triton.jit
def _position(i, table, segment):
    """Logical positions of stored elements of a segment."""
    known = table + 4 * segment
    channels, pixels = tl.load(known + 2), tl.load(known + 3)
    local = i - tl.load(known)
    rest = local // channels
    out = rest // pixels
    return tl.load(known + 1) + (out * channels + local - rest * channels) * pixels + (rest - out * pixels)


@triton.jit
def _tile(tiles, ALIGNED: tl.constexpr):
    """First element, number of elements, segment, group."""
    at = tiles + 4 * tl.program_id(0)
    start, length = tl.load(at), tl.load(at + 1)
    if ALIGNED:  # then loads are wide
        start, length = tl.multiple_of(start, 16), tl.multiple_of(length, 16)
    return start, length.to(tl.int32), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _bracket(score, mask, ranges, wanted, state):
    """One program a group: two keys between which the wanted one lies, six standard deviations of a sample apart."""
    group = tl.program_id(0).to(tl.int64)
    start, size, rank = tl.load(ranges + 2 * group), tl.load(ranges + 2 * group + 1), tl.load(wanted + group)
    if rank == 0:
        return
    # An odd stride: no layout of layers or channels lines up with it.
    stride = (size // _SAMPLE) | 1
    i = tl.arange(0, _SAMPLE).to(tl.int64) * stride
    there = i < size
    there &= tl.load(mask + start + i, mask=there, other=0) != 0
    key = tl.where(there, _key(score + start, i, there), 0x7FFFFFFF)
    place = rank.to(tl.float32) / stride.to(tl.float32)
    slack = 6.0 * tl.sqrt(place) + 8.0
    first, last = (place - slack).to(tl.int32), (place + slack).to(tl.int32) + 1
    low, high = first * 0, first * 0
    for i in range(31):
        # The largest key that fewer than `first` of the sample, or `last`, lie below: both counts in one sum.
        a, b = low | (1 << (30 - i)), high | (1 << (30 - i))
        both = tl.sum((key < a).to(tl.int32) + ((key < b).to(tl.int32) << 16))
        low = tl.where((both & 0xFFFF) < first, a, low)
        high = tl.where((both >> 16) < last, b, high)
    known = state + group * _FIELDS
    tl.store(known + _LOW, low.to(tl.int64))
    tl.store(known + _HIGH, tl.where(last <= tl.sum(there.to(tl.int32)), high, _INFINITY).to(tl.int64))


@triton.jit
def _found(known, rank):
    """Which of the two gatherings holds the rank: 0 or 2, to be added to _BELOW and _INSIDE."""
    below = tl.load(known + _BELOW)
    return tl.where((below < rank) & (rank <= below + tl.load(known + _INSIDE)), 0, 2)


@triton.jit
def _gather(
    score, mask, tiles, ranges, wanted, state, room, AGAIN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts kept keys below the bracket and writes those inside it to `room`, from the group's first element on."""
    start, length, _, group = _tile(tiles, ALIGNED)
    known = state + group * _FIELDS
    rank = tl.load(wanted + group)
    if rank == 0:
        return
    if AGAIN:  # noqa: SIM102, for the compiler the first is a constant
        if _found(known, rank) == 0:
            return
    i = tl.arange(0, BLOCK)
    there = i < length
    kept = tl.load(mask + start + i, mask=there, other=0) != 0
    # Above every bracket where nothing is kept.
    key = tl.where(kept, _key(score + start, i, there), 0x7FFFFFFF)
    low, high = tl.load(known + _LOW).to(tl.int32), tl.load(known + _HIGH).to(tl.int32)
    if AGAIN:
        low, high = low * 0, high * 0 + _INFINITY
    below = tl.sum((key < low).to(tl.int32))
    inside = ((key >= low) & (key <= high)).to(tl.int32)
    upto = tl.cumsum(inside, 0)
    number = tl.sum(inside)
    slot = tl.atomic_add(known + _INSIDE + 2 * AGAIN, number.to(tl.int64), sem="relaxed")
    tl.atomic_add(known + _BELOW + 2 * AGAIN, below.to(tl.int64), sem="relaxed")
    tl.store(room + (tl.load(ranges + 2 * group) + slot - 1) + upto, key, mask=inside != 0)


@triton.jit
def _walk(counts, rank, DONE: tl.constexpr):
    """The digits counted so far: their value, the rank that is left among those who share them, and how many do."""
    bins = tl.arange(0, _BINS)
    prefix, equal = rank * 0, rank * 0
    for d in tl.static_range(DONE):
        count = tl.load(counts + d * _BINS + bins)
        upto = tl.cumsum(count, 0)
        # Bins that end before the rank; beyond the last one only if fewer are kept than were asked for.
        chosen = tl.minimum(tl.sum((upto < rank).to(tl.int32)), _BINS - 1)
        equal = tl.sum(tl.where(bins == chosen, count, 0))
        rank -= tl.sum(tl.where(bins == chosen, upto, 0)) - equal
        prefix = (prefix << 8) | chosen
    return prefix, rank, equal


@triton.jit
def _digits(digit, there, BLOCK: tl.constexpr):
    """Histogram of `digit` where `there`."""
    # What is not there is counted in bin 0, and taken off again.
    count = tl.histogram(tl.where(there, digit, 0), _BINS)
    return count - tl.where(tl.arange(0, _BINS) == 0, BLOCK - tl.sum(there.to(tl.int32)), 0)


@triton.jit
def _search(room, ranges, wanted, state, counts, D: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the D-th digit, from the highest, of what was gathered and shares the digits before it."""
    group = tl.program_id(0).to(tl.int64)
    known, counts = state + group * _FIELDS, counts + group * _DIGITS * _BINS
    rank = tl.load(wanted + group)
    if rank == 0:
        return
    try_ = _found(known, rank)
    low = tl.where(try_ == 0, tl.load(known + _LOW), 0).to(tl.int32)
    number = tl.load(known + _INSIDE + try_)
    prefix, _, _ = _walk(counts, rank - tl.load(known + _BELOW + try_), D)
    gathered = room + tl.load(ranges + 2 * group)
    count = tl.zeros([_BINS], tl.int32)
    at = tl.program_id(1).to(tl.int64) * BLOCK
    while at < number:
        i = at + tl.arange(0, BLOCK)
        there = i < number
        key = tl.load(gathered + i, mask=there, other=0) - low
        if D > 0:
            there &= (key >> (8 * (_DIGITS - D))) == prefix.to(tl.int32)
        count += _digits((key >> (8 * (_DIGITS - 1 - D))) & 255, there, BLOCK)
        at += tl.num_programs(1).to(tl.int64) * BLOCK
    tl.atomic_add(counts + D * _BINS + tl.arange(0, _BINS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _settle(wanted, state, counts, out):
    """One program a group: the threshold, how many share it and how many of those go; its bits to `out`."""
    group = tl.program_id(0).to(tl.int64)
    known, rank = state + group * _FIELDS, tl.load(wanted + group)
    if rank == 0:
        return
    try_ = _found(known, rank)
    prefix, left, equal = _walk(counts + group * _DIGITS * _BINS, rank - tl.load(known + _BELOW + try_), _DIGITS)
    threshold = tl.where(try_ == 0, tl.load(known + _LOW), 0) + prefix
    tl.store(known + _THRESHOLD, threshold)
    tl.store(known + _EQUAL, equal)
    tl.store(known + _LEFT, left)
    tl.store(out + group, threshold.to(tl.int32))


@triton.jit
def _ties(
    score,
    mask,
    tiles,
    table,
    state,
    counts,
    D: tl.constexpr,
    DIGITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the D-th digit of the positions of tied elements; nothing to do where all of them go anyway."""
    start, length, segment, group = _tile(tiles, ALIGNED)
    known, counts = state + group * _FIELDS, counts + group * DIGITS * _BINS
    left = tl.load(known + _LEFT)
    if left == tl.load(known + _EQUAL):
        return
    i = tl.arange(0, BLOCK)
    there = i < length
    there &= tl.load(mask + start + i, mask=there, other=0) != 0
    there &= _key(score + start, i, there) == tl.load(known + _THRESHOLD).to(tl.int32)
    place = _position(start + i, table, segment)
    if D > 0:
        prefix, _, _ = _walk(counts, left, D)
        there &= (place >> (8 * (DIGITS - D))) == prefix
    count = _digits(((place >> (8 * (DIGITS - 1 - D))) & 255).to(tl.int32), there, BLOCK)
    tl.atomic_add(counts + D * _BINS + tl.arange(0, _BINS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _write(
    score,
    mask,
    new,
    tiles,
    table,
    wanted,
    state,
    counts,
    DIGITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, length, segment, group = _tile(tiles, ALIGNED)
    i = tl.arange(0, BLOCK)
    there = i < length
    keep = there & (tl.load(mask + start + i, mask=there, other=0) != 0)
    if tl.load(wanted + group) > 0:
        known = state + group * _FIELDS
        key = _key(score + start, i, there)
        threshold = tl.load(known + _THRESHOLD).to(tl.int32)
        gone = key < threshold
        tied = keep & (key == threshold)
        if tl.sum(tied.to(tl.int32)) > 0:
            left = tl.load(known + _LEFT)
            if left == tl.load(known + _EQUAL):
                gone |= tied
            else:
                last, _, _ = _walk(counts + group * DIGITS * _BINS, left, DIGITS)
                gone |= tied & (_position(start + i, table, segment) <= last)
        keep &= gone == 0
    tl.store(new + start + i, keep.to(tl.int8), mask=there)


class Layout(NamedTuple):
    """Where programs work, int64 on the device.

    tiles [n, 4]: start, length, segment, group. table [segments, 4]: offset, position, channels, pixels. ranges
    [groups, 2]: first element and size in the buffer. aligned: tiles start and end at multiples of 16.
    """

    tiles: Tensor
    table: Tensor
    ranges: Tensor
    aligned: bool


@lru_cache(maxsize=32)
def layout(
    segments: tuple[Segment, ...], n: int, block: int, local: bool, device: torch.device, padded: bool = True
) -> Layout:
    """For a buffer of n elements. padded: a segment's last tile may take in the padding behind it, never kept."""
    tiles, table, ranges = [], [], [] if local else [(0, n)]
    ends = [*(s.offset for s in segments[1:]), n]
    for number, (s, room) in enumerate(zip(segments, ends, strict=True)):
        channels, pixels = (s.shape[1], s.shape[2] * s.shape[3]) if len(s.shape) == 4 else (1, 1)
        table.append((s.offset, s.position, max(channels, 1), max(pixels, 1)))
        end = s.offset + s.numel
        end = min(-(-end // 16) * 16, room) if padded else end
        if local:
            ranges.append((s.offset, end - s.offset))
        for start in range(s.offset, end, block):
            tiles.append((start, min(block, end - start), number, number if local else 0))
    aligned = all(start % 16 == 0 == length % 16 for start, length, _, _ in tiles)
    a, b, c = (
        torch.tensor(rows, dtype=torch.int64).view(-1, width).to(device)
        for rows, width in ((tiles, 4), (table, 4), (ranges, 2))
    )
    return Layout(a, b, c, aligned)


class _Threshold(NamedTuple):
    """wanted: int64 [groups]. state: int64 [groups, fields]. key: int32 [groups], the threshold's bits."""

    wanted: Tensor
    state: Tensor
    key: Tensor


def _threshold(score: Tensor, mask: Tensor, wanted: Sequence[int], where: Layout, block: int) -> _Threshold:
    groups, device = len(wanted), score.device
    # One number is written by the device itself, so that a graph can capture it.
    ranks = (
        torch.full((1,), wanted[0], dtype=torch.int64, device=device)
        if groups == 1
        else torch.tensor(list(wanted), dtype=torch.int64).to(device)
    )
    fields, bins = _FIELDS.value, _DIGITS.value * _BINS.value
    zeros = torch.zeros(groups * (fields + bins), dtype=torch.int64, device=device)
    state, counts = zeros.split([groups * fields, groups * bins])
    key = torch.zeros(groups, dtype=torch.int32, device=device)
    room = torch.empty(score.numel(), dtype=torch.int32, device=device)
    _, _, ranges, aligned = where
    _bracket[(groups,)](score, mask, ranges, ranks, state, num_warps=16)
    grid, shape = (len(where.tiles),), {"ALIGNED": aligned, "BLOCK": block, "num_warps": warps(block)}
    for again in (False, True):
        _gather[grid](score, mask, where.tiles, ranges, ranks, state, room, AGAIN=again, **shape)
    programs = max(1, min(_PROGRAMS // groups, triton.cdiv(score.numel(), groups * 8 * block)))
    for digit in range(_DIGITS.value):
        _search[(groups, programs)](room, ranges, ranks, state, counts, D=digit, BLOCK=block, num_warps=warps(block))
    _settle[(groups,)](ranks, state, counts, key)
    return _Threshold(ranks, state, key)


def warps(block: int) -> int:
    """So that a thread has sixteen elements."""
    return min(max(block // 512, 1), 16)


def kth(score: Tensor, mask: Tensor, k: int, block: int) -> Tensor:
    """The k-th smallest magnitude, float32 [] on the device; see ops.kth_smallest_magnitude."""
    n = score.numel()
    where = layout((Segment("", (n,), 0, 0),), n, block, False, score.device)
    return _threshold(score, mask, [k], where, block).key.view(torch.float32)[0]


def keep_top(
    score: Tensor, mask: Tensor, wanted: Sequence[int], segments: tuple[Segment, ...], local: bool, block: int
) -> Tensor:
    """The new mask; see ops.keep_top. wanted: one number for all, or with `local` one for each segment."""
    new = torch.zeros_like(mask)
    where = layout(segments, score.numel(), block, local, score.device)
    if not len(where.tiles):
        return new
    ranks, state, _ = _threshold(score, mask, wanted, where, block)
    grid, shape = (len(where.tiles),), {"ALIGNED": where.aligned, "BLOCK": block, "num_warps": warps(block)}
    positions = max(s.position + s.numel for s in segments)
    digits = max(1, -(-(positions - 1).bit_length() // 8))
    counts = torch.zeros(len(wanted) * digits * _BINS.value, dtype=torch.int64, device=score.device)
    for digit in range(digits):
        _ties[grid](score, mask, where.tiles, where.table, state, counts, D=digit, DIGITS=digits, **shape)
    _write[grid](score, mask, new, where.tiles, where.table, ranks, state, counts, DIGITS=digits, **shape)
    return new
