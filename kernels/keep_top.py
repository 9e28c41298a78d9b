"""Exact selection: the k-th lowest score, and the mask that prunes exactly k weights, globally or in each layer.

Non-negative floats order as their bits do, so scores are compared as integer keys. The sign bit is cleared as a score
is read: magnitudes need no pass of their own. NaN counts as +inf. A sample of the keys brackets the k-th. One pass over
all keys counts those below the bracket and gathers those inside it, a few percent, and only these are searched. If the
bracket misses the k-th, all keys are gathered: the result is exact in either case.
"""

# `score <= threshold` would prune the wrong number under ties. Ties are pruned by logical position, so that the mask
# does not depend on how layers are stored. float64 scores (random pruning) are selected on a CPU only: Triton's keys
# have 32 bits, and a rounded score would prune other weights.

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import (
    FULL,
    HALF,
    check_block,
    check_tensor,
    compiled,
    on_its_device,
    tl,
    triton,
    uses_triton,
)
from fastprune.kernels.segment_counts import count_kept, segment_counts
from fastprune.kernels.segments import Segment, Tiling, check_segments, logical_positions, tiling


@on_its_device
def kth_smallest_magnitude(weight: Tensor, mask: Tensor, k: int, *, block: int = 4096) -> Tensor:
    """The k-th smallest |weight| (k from 1) among the elements that the mask keeps; NaN counts as +inf.

    weight: floating [n] (float64 on a CPU only).  mask: bool [n].  block: elements per program.  Returns the exact
    value as a tensor [] on the same device, in float32 (float64 for float64).  ValueError unless 1 <= k <= n, and on a
    CPU if the mask keeps fewer than k; on a GPU the result is then undefined.
    """
    on_triton = _check_scores("weight", weight, mask)
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k is {k}, but there are {weight.numel()} elements")
    if on_triton:
        check_block(block)
        n = weight.numel()
        where = tiling((Segment("", (n,), 0, 0),), n, block, False, weight.device)
        return _threshold_triton(weight, mask, [k], where, block).key.view(torch.float32)[0]
    # On a CPU only: on a GPU the host would have to wait for the count.
    kept = count_kept(mask)
    if k > kept:
        raise ValueError(f"k is {k}, but the mask keeps {kept} elements")
    keys, top = _keys_of(weight)
    key = _find([_Part(keys, mask.numpy(), mask.numpy(), 0, None)], k, kept, top).key
    return torch.from_numpy(np.array([key], keys.dtype).view(f"f{keys.itemsize}"))[0]


@on_its_device
def keep_top(
    score: Tensor,
    mask: Tensor,
    n_prune: int | Sequence[int],
    segments: Sequence[Segment] | None = None,
    *,
    block: int = 4096,
) -> Tensor:
    """A new mask, bool [n]: `mask` without exactly n_prune of its kept elements, those with the lowest |score|.

    score: floating [n] (NaN counts as +inf; float64 on a CPU only).  mask: bool [n], False outside segments.  n_prune:
    a number for all segments together (global pruning), or one for each segment (local).  block: elements per program.
    Of tied elements those with the lowest position are pruned first: the logical position if segments are given, else
    the index.  On a GPU the host waits once, to check the counts.  ValueError if n_prune exceeds the number of kept
    elements.
    """
    on_triton = _check_scores("score", score, mask)
    local = isinstance(n_prune, Sequence)
    if segments is not None:
        check_segments(segments, mask.numel())
    elif local:
        raise ValueError("n_prune as a sequence requires segments, one number for each")
    parts = tuple([Segment("", (mask.numel(),), 0, 0)] if segments is None else segments)
    wanted = list(n_prune) if isinstance(n_prune, Sequence) else [index(n_prune)]
    if local and len(wanted) != len(parts):
        raise ValueError(f"n_prune has {len(wanted)} numbers for {len(parts)} segments")
    kept = segment_counts(mask, parts).tolist() if local or on_triton else [count_kept(mask)]
    _check_counts(wanted, kept if local else [sum(kept)])
    if on_triton:
        check_block(block)
        return _keep_top_triton(score, mask, wanted, parts, local, block)
    new, keys, top = torch.empty_like(mask), *_keys_of(score)
    where = None if segments is None else partial(logical_positions, segments)
    if not local:
        _clear_lowest([_Part(keys, mask.numpy(), new.numpy(), 0, where)], wanted[0], kept[0], top)
        return new
    new.zero_()  # what lies between the segments
    for s, number, left in zip(parts, wanted, kept, strict=True):
        part = _Part(keys[s.span], mask.numpy()[s.span], new.numpy()[s.span], s.offset, where)
        _clear_lowest([part], number, left, top)
    return new


def keep_top_each(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    n_prune: int | Sequence[int],
    segments: Sequence[Segment],
    *,
    signed: bool = False,
) -> list[Tensor]:
    """`keep_top` of weights that each have memory of their own: new masks, bool [numel] each.

    scores, masks: one for each segment, in its storage order, of its numel; all scores of one dtype and device.
    segments: their offsets are not used.  signed: rank by the scores themselves, not by their magnitude; they may not
    be NaN.  On a GPU the tensors are copied into one buffer, and signed scores are sorted by torch.
    """
    local = isinstance(n_prune, Sequence)
    wanted = list(n_prune) if isinstance(n_prune, Sequence) else [index(n_prune)]
    if not len(scores) == len(masks) == len(segments) == (len(wanted) if local else len(scores)):
        raise ValueError(
            f"{len(scores)} scores, {len(masks)} masks and {len(wanted)} counts for {len(segments)} segments"
        )
    if not scores:
        if any(wanted):
            raise ValueError(f"cannot prune {wanted[0]} of no elements")
        return []
    for s, score, mask in zip(segments, scores, masks, strict=True):
        if score.numel() != s.numel:
            raise ValueError(f"{s.name} has {score.numel()} scores for {s.numel} weights")
        _check_scores(s.name, score, mask)
        if (score.dtype, score.device) != (scores[0].dtype, scores[0].device):
            raise ValueError(
                f"{s.name} has {score.dtype} on {score.device}, others {scores[0].dtype} on {scores[0].device}"
            )
    if uses_triton(scores[0]) and scores[0].dtype != torch.float64:
        return _keep_top_joined(scores, masks, wanted if local else wanted[0], segments, signed)
    kept = [count_kept(mask) for mask in masks]
    _check_counts(wanted, kept if local else [sum(kept)])
    new = [torch.empty_like(mask) for mask in masks]
    found = [_signed_keys_of(score) if signed else _keys_of(score) for score in scores]
    parts = [
        _Part(keys, mask.numpy(), made.numpy(), s.offset, s.logical, signed)
        for s, mask, made, (keys, _) in zip(segments, masks, new, found, strict=True)
    ]
    groups = [[part] for part in parts] if local else [parts]
    for group, number, left in zip(groups, wanted, kept if local else [sum(kept)], strict=True):
        _clear_lowest(group, number, left, found[0][1])
    return new


def _keep_top_joined(
    scores: Sequence[Tensor],
    masks: Sequence[Tensor],
    n_prune: int | Sequence[int],
    segments: Sequence[Segment],
    signed: bool,
) -> list[Tensor]:
    """keep_top_each in one buffer."""
    joined, offset = [], 0
    for s in segments:
        joined.append(replace(s, offset=offset))
        offset += -(-s.numel // 16) * 16  # tiles that start at multiples of 16 are read with wide loads
    score = torch.zeros(offset, dtype=scores[0].dtype, device=scores[0].device)
    mask = torch.zeros(offset, dtype=torch.bool, device=scores[0].device)
    torch._foreach_copy_([score[s.span] for s in joined], list(scores))
    torch._foreach_copy_([mask[s.span] for s in joined], list(masks))
    if not signed:
        new = keep_top(score, mask, n_prune, joined)
    else:
        kept = segment_counts(mask, joined).tolist()
        _check_counts(*(([n_prune], [sum(kept)]) if isinstance(n_prune, int) else (n_prune, kept)))
        new = keep_top_reference(score, mask, n_prune, joined, True)
    return [new[s.span] for s in joined]


def _check_counts(wanted: Sequence[int], kept: Sequence[int]) -> None:
    for number, left in zip(wanted, kept, strict=True):
        if not 0 <= number <= left:
            raise ValueError(f"cannot prune {number} of the {left} elements that the mask keeps")


def _check_scores(name: str, score: Tensor, mask: Tensor) -> bool:
    """Whether Triton selects. ValueError if the tensors do not match, or for float64 on a GPU."""
    check_tensor(name, score, score, FULL + HALF)
    check_tensor("mask", mask, score, (torch.bool,))
    if score.dtype == torch.float64:
        if score.device.type != "cpu":
            raise ValueError(f"{name} is float64 on {score.device}, where keys have 32 bits: choose on the CPU")
        return False
    return uses_triton(score)


def kth_smallest_magnitude_reference(weight: Tensor, mask: Tensor, k: int) -> Tensor:
    """The k-th smallest |weight| (k from 1) among the kept elements; NaN counts as +inf."""
    return weight[mask].abs().nan_to_num(nan=torch.inf, posinf=torch.inf).sort().values[k - 1]


def keep_top_reference(
    score: Tensor,
    mask: Tensor,
    n_prune: int | Sequence[int],
    segments: Sequence[Segment] | None = None,
    signed: bool = False,
) -> Tensor:
    """`mask` without its n_prune lowest |score| (a sequence: so many in each segment); ties by logical position.

    signed: the lowest scores instead.
    """
    if segments is None:
        score = score if signed else score.abs()
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
        kept = keep_top_reference(logical_score, logical_mask, count, signed=signed)
        for s, part in zip(group, kept.split([s.numel for s in group]), strict=True):
            s.view(new).copy_(part.view(s.shape))
    return new


# CPU: numba counts and gathers, numpy partitions the gathered keys

_CPU_SAMPLE = 1 << 14


def _keys_of(scores: Tensor) -> tuple[np.ndarray, int]:
    """(Scores, contiguous floating [n], as unsigned keys of 32 bits, or 64 for float64; the key of +inf)."""
    # float32 represents every bf16 and fp16 exactly, so two widths of keys suffice.
    values = scores.detach().to(torch.float32 if scores.dtype in HALF else scores.dtype).numpy()
    kind = np.uint32 if values.dtype == np.float32 else np.uint64
    return values.view(kind), int(np.array(np.inf, values.dtype).view(kind))


def _signed_keys_of(scores: Tensor) -> tuple[np.ndarray, int]:
    """(Scores, contiguous floating [n] without NaN, as unsigned keys in their order, a copy; the key of +inf)."""
    # Adding 0 makes -0 a +0, which it ties with. A negative number has its bits inverted, a positive one its sign set.
    values = (scores.detach().to(torch.float32 if scores.dtype in HALF else scores.dtype) + 0.0).numpy()
    kind = np.uint32 if values.dtype == np.float32 else np.uint64
    keys: Any = values.view(kind)
    sign: Any = kind(1 << (8 * values.itemsize - 1))
    np.bitwise_xor(keys, np.where(keys & sign, ~kind(0), sign), out=keys)
    return keys, int(np.array(np.inf, values.dtype).view(kind) | sign)


class _Part(NamedTuple):
    """Weights in one piece of memory.

    keys: uint32 or uint64 [n].  mask: bool [n].  new: bool [n], to be written.  start: index of the first weight in the
    buffer that `logical` knows.  logical: from indices in that buffer to logical positions, int64 to int64; None: the
    index is the position.  signed: whether the highest bit of a key belongs to its order.
    """

    keys: np.ndarray
    mask: np.ndarray
    new: np.ndarray
    start: int
    logical: Callable[[np.ndarray], np.ndarray] | None
    signed: bool = False

    @property
    def bits(self) -> np.unsignedinteger[Any]:
        """The bits of a key that count: without those of a magnitude's sign."""
        return self.keys.dtype.type(np.iinfo(self.keys.dtype).max >> (0 if self.signed else 1))

    def positions(self, chosen: np.ndarray) -> np.ndarray:
        return chosen + self.start if self.logical is None else self.logical(chosen + self.start)


class _Found(NamedTuple):
    """key: the one that was searched.  ties: for each part int64, the indices of the kept keys that equal it."""

    key: int
    ties: list[np.ndarray]


def _find(parts: Sequence[_Part], k: int, kept: int, top: int) -> _Found:
    """The k-th lowest (from 1) of the `kept` keys that the masks keep; keys above `top` count as `top`."""
    # Of these only what is gathered is ever touched.
    keys, places = np.empty(kept, parts[0].keys.dtype), np.empty(kept, np.int64)
    low, high = _bracket_cpu(parts, k, kept, top)
    below, ends = _gather(parts, low, high, top, keys, places)
    # The bracket missed the k-th, rarely: gather all.
    if not below < k <= below + ends[-1]:
        below, ends = _gather(parts, 0, top, top, keys, places)
    gathered = keys[: ends[-1]]
    key = np.partition(gathered, k - below - 1)[k - below - 1]
    starts = [0, *ends[:-1]]
    return _Found(int(key), [places[i:j][gathered[i:j] == key] for i, j in zip(starts, ends, strict=True)])


def _gather(
    parts: Sequence[_Part], low: int, high: int, top: int, keys: np.ndarray, places: np.ndarray
) -> tuple[int, list[int]]:
    """(number of keys below `low`, the end of each part's keys in `keys`)."""
    below, ends = 0, [0]
    kind = keys.dtype.type
    for part in parts:
        bounds = kind(low), kind(high), part.bits, kind(top)
        less, there = compiled(_gather_loop)(part.keys, part.mask, *bounds, keys[ends[-1] :], places[ends[-1] :])
        below += less
        ends.append(ends[-1] + there)
    return below, ends[1:]


def _clear_lowest(parts: Sequence[_Part], count: int, kept: int, top: int) -> None:
    """Write to each `new` the mask without the `count` lowest of the `kept` keys that all masks keep; of tied keys the
    lowest positions go first."""
    if not count:
        for part in parts:
            part.new[:] = part.mask
        return
    threshold, ties = _find(parts, count, kept, top)
    kind = parts[0].keys.dtype.type
    for part in parts:
        compiled(_above_loop)(part.keys, part.mask, kind(threshold), part.bits, kind(top), part.new)
    stay = kept - count - sum(np.count_nonzero(part.new) for part in parts)
    if not stay:  # all tied elements are pruned, so their positions do not matter
        return
    positions = [part.positions(tied) for part, tied in zip(parts, ties, strict=True)]
    every = np.concatenate(positions)
    first = np.partition(every, len(every) - stay)[len(every) - stay]
    for part, tied, where in zip(parts, ties, positions, strict=True):
        part.new[tied[where >= first]] = True


def _bracket_cpu(parts: Sequence[_Part], k: int, kept: int, top: int) -> tuple[int, int]:
    """Keys that very likely lie below and above the k-th: six standard deviations of its rank in a sample away."""
    if kept < 4 * _CPU_SAMPLE:
        return 0, top
    # Evenly spaced with an odd stride, so that samples do not fall on the same channels again and again.
    stride = (max(1, sum(part.keys.size for part in parts) // (4 * _CPU_SAMPLE))) | 1
    kind = parts[0].keys.dtype.type
    taken = [np.minimum(p.keys[::stride][p.mask[::stride]] & p.bits, kind(top)) for p in parts]
    sample = np.concatenate(taken)
    if sample.size < 64:
        return 0, top
    sample.sort()
    place = k / kept * sample.size
    slack = 6 * np.sqrt(place * (1 - k / kept)) + 8
    first, last = int(place - slack), int(place + slack)
    return int(sample[first]) if first >= 0 else 0, int(sample[last]) if last < sample.size else top


def _gather_loop(keys, mask, low, high, bits, top, found, places):
    """Number of kept keys below `low`, and number in [low, high]; writes the latter keys and their indices.

    bits: those of a key that count.  found: like keys, places: int64; of at least that number.
    """
    # Two loops that vectorise, over a piece that stays in the cache, and one over words of eight flags: few keys lie
    # inside, so nearly all words are zero, which the processor predicts.
    flags = np.empty(4096, np.bool_)
    words = flags.view(np.uint64)
    below: Any = 0
    inside = 0
    for start in range(0, keys.size, flags.size):
        some, kept = keys[start : start + flags.size], mask[start : start + flags.size]
        less: Any = np.int32(0)
        for i in range(some.size):
            less += np.int32(kept[i] & (min(some[i] & bits, top) < low))
        for i in range(some.size):
            key = min(some[i] & bits, top)
            flags[i] = kept[i] & (key >= low) & (key <= high)
        below += less
        flags[some.size :] = False
        for word in range(words.size):
            if words[word]:
                for i in range(8 * word, 8 * word + 8):
                    if flags[i]:
                        found[inside] = min(some[i] & bits, top)
                        places[inside] = start + i
                        inside += 1
    return below, inside


def _above_loop(keys, mask, threshold, bits, top, above):
    """Write to `above` which kept keys are above the threshold."""
    # Without counting, so that the loop vectorises; counting the bytes afterwards costs almost nothing.
    for i in range(keys.size):
        above[i] = mask[i] & (min(keys[i] & bits, top) > threshold)


# GPU: Triton, without the host in between
#
# The gathered keys are searched eight bits at a time. A histogram of all keys instead, with 2,048 bins, costs hundreds
# of instructions per weight, many times the one read that is the lower bound; of the gathered keys, with 256 bins, it
# costs almost nothing. Counts are added with integer atomics and the gathered keys are a set, so the order in which
# programs run does not change the result.

_SAMPLE = tl.constexpr(8192)
_BINS = tl.constexpr(256)
_DIGITS = tl.constexpr(4)
_INFINITY = tl.constexpr(0x7F800000)
_PROGRAMS = 528  # that search the gathered keys: four on each of the 132 multiprocessors of an H200

# State of a group, int64: the bracket, how many keys lie below and inside it (twice: the second pair is for the pass
# that gathers all keys), the threshold, how many keys equal it, and how many of those are pruned.
_LOW, _HIGH, _BELOW, _INSIDE, _, _, _THRESHOLD, _EQUAL, _LEFT, _FIELDS = (tl.constexpr(i) for i in range(10))


@triton.jit
def _load_key(score, i, valid):
    value = tl.load(score + i, mask=valid, other=0.0).to(tl.float32)
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
    """First element, number of elements, segment and group of this program's tile."""
    at = tiles + 4 * tl.program_id(0)
    start, length = tl.load(at), tl.load(at + 1)
    # Indices from a table carry no alignment; this hint gives 16-byte loads instead of 4-byte ones.
    if ALIGNED:
        start, length = tl.multiple_of(start, 16), tl.multiple_of(length, 16)
    return start, length.to(tl.int32), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _bracket_kernel(score, mask, ranges, wanted, state):
    """One program per group: two keys that very likely enclose the wanted one, by its rank in a sample."""
    group = tl.program_id(0).to(tl.int64)
    start, size, rank = tl.load(ranges + 2 * group), tl.load(ranges + 2 * group + 1), tl.load(wanted + group)
    if rank == 0:
        return
    # An odd stride, so that samples do not fall on the same channels again and again.
    stride = (size // _SAMPLE) | 1
    i = tl.arange(0, _SAMPLE).to(tl.int64) * stride
    valid = i < size
    valid &= tl.load(mask + start + i, mask=valid, other=0) != 0
    key = tl.where(valid, _load_key(score + start, i, valid), 0x7FFFFFFF)
    place = rank.to(tl.float32) / stride.to(tl.float32)
    slack = 6.0 * tl.sqrt(place) + 8.0
    first, last = (place - slack).to(tl.int32), (place + slack).to(tl.int32) + 1
    low, high = first * 0, first * 0
    for i in range(31):
        # Binary search, bit by bit, for the largest keys with fewer than `first`, and `last`, samples below: both
        # counts share one sum, 16 bits each.
        a, b = low | (1 << (30 - i)), high | (1 << (30 - i))
        both = tl.sum((key < a).to(tl.int32) + ((key < b).to(tl.int32) << 16))
        low = tl.where((both & 0xFFFF) < first, a, low)
        high = tl.where((both >> 16) < last, b, high)
    known = state + group * _FIELDS
    tl.store(known + _LOW, low.to(tl.int64))
    tl.store(known + _HIGH, tl.where(last <= tl.sum(valid.to(tl.int32)), high, _INFINITY).to(tl.int64))


@triton.jit
def _found(known, rank):
    """Which of the two passes gathered the rank: 0 or 2, the offset from _BELOW and _INSIDE."""
    below = tl.load(known + _BELOW)
    return tl.where((below < rank) & (rank <= below + tl.load(known + _INSIDE)), 0, 2)


@triton.jit
def _gather_kernel(
    score, mask, tiles, ranges, wanted, state, candidates, ALL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Count kept keys below the bracket and write those inside it to the group's part of `candidates`.

    ALL: the second pass, which gathers every kept key if the first one missed the wanted key.
    """
    start, length, _, group = _tile(tiles, ALIGNED)
    known = state + group * _FIELDS
    rank = tl.load(wanted + group)
    if rank == 0:
        return
    if ALL:  # noqa: SIM102, for the compiler the first is a constant
        if _found(known, rank) == 0:
            return
    i = tl.arange(0, BLOCK)
    valid = i < length
    kept = tl.load(mask + start + i, mask=valid, other=0) != 0
    # A pruned element gets a key above every bracket.
    key = tl.where(kept, _load_key(score + start, i, valid), 0x7FFFFFFF)
    low, high = tl.load(known + _LOW).to(tl.int32), tl.load(known + _HIGH).to(tl.int32)
    if ALL:
        low, high = low * 0, high * 0 + _INFINITY
    below = tl.sum((key < low).to(tl.int32))
    inside = ((key >= low) & (key <= high)).to(tl.int32)
    upto = tl.cumsum(inside, 0)
    number = tl.sum(inside)
    slot = tl.atomic_add(known + _INSIDE + 2 * ALL, number.to(tl.int64), sem="relaxed")
    tl.atomic_add(known + _BELOW + 2 * ALL, below.to(tl.int64), sem="relaxed")
    tl.store(candidates + (tl.load(ranges + 2 * group) + slot - 1) + upto, key, mask=inside != 0)


@triton.jit
def _walk(counts, rank, DONE: tl.constexpr):
    """From the histograms of DONE digits: their value, the rank among the keys that share them, and how many do."""
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
def _digits(digit, valid, BLOCK: tl.constexpr):
    """Histogram of `digit` where `valid`."""
    # tl.histogram counts every element: invalid ones go to bin 0 and are subtracted.
    count = tl.histogram(tl.where(valid, digit, 0), _BINS)
    return count - tl.where(tl.arange(0, _BINS) == 0, BLOCK - tl.sum(valid.to(tl.int32)), 0)


@triton.jit
def _search_kernel(candidates, ranges, wanted, state, counts, D: tl.constexpr, BLOCK: tl.constexpr):
    """Histogram of the D-th digit, from the highest, of the gathered keys that share the digits before it."""
    group = tl.program_id(0).to(tl.int64)
    known, counts = state + group * _FIELDS, counts + group * _DIGITS * _BINS
    rank = tl.load(wanted + group)
    if rank == 0:
        return
    attempt = _found(known, rank)
    low = tl.where(attempt == 0, tl.load(known + _LOW), 0).to(tl.int32)
    number = tl.load(known + _INSIDE + attempt)
    prefix, _, _ = _walk(counts, rank - tl.load(known + _BELOW + attempt), D)
    gathered = candidates + tl.load(ranges + 2 * group)
    count = tl.zeros([_BINS], tl.int32)
    at = tl.program_id(1).to(tl.int64) * BLOCK
    while at < number:
        i = at + tl.arange(0, BLOCK)
        valid = i < number
        key = tl.load(gathered + i, mask=valid, other=0) - low
        if D > 0:
            valid &= (key >> (8 * (_DIGITS - D))) == prefix.to(tl.int32)
        count += _digits((key >> (8 * (_DIGITS - 1 - D))) & 255, valid, BLOCK)
        at += tl.num_programs(1).to(tl.int64) * BLOCK
    tl.atomic_add(counts + D * _BINS + tl.arange(0, _BINS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _settle_kernel(wanted, state, counts, out):
    """One program per group: store the threshold, how many keys equal it and are pruned; its bits to `out`."""
    group = tl.program_id(0).to(tl.int64)
    known, rank = state + group * _FIELDS, tl.load(wanted + group)
    if rank == 0:
        return
    attempt = _found(known, rank)
    prefix, left, equal = _walk(counts + group * _DIGITS * _BINS, rank - tl.load(known + _BELOW + attempt), _DIGITS)
    threshold = tl.where(attempt == 0, tl.load(known + _LOW), 0) + prefix
    tl.store(known + _THRESHOLD, threshold)
    tl.store(known + _EQUAL, equal)
    tl.store(known + _LEFT, left)
    tl.store(out + group, threshold.to(tl.int32))


@triton.jit
def _ties_kernel(
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
    """Histogram of the D-th digit of the positions of tied elements; returns early if all of them are pruned."""
    start, length, segment, group = _tile(tiles, ALIGNED)
    known, counts = state + group * _FIELDS, counts + group * DIGITS * _BINS
    left = tl.load(known + _LEFT)
    if left == tl.load(known + _EQUAL):
        return
    i = tl.arange(0, BLOCK)
    valid = i < length
    valid &= tl.load(mask + start + i, mask=valid, other=0) != 0
    valid &= _load_key(score + start, i, valid) == tl.load(known + _THRESHOLD).to(tl.int32)
    place = _position(start + i, table, segment)
    if D > 0:
        prefix, _, _ = _walk(counts, left, D)
        valid &= (place >> (8 * (DIGITS - D))) == prefix
    count = _digits(((place >> (8 * (DIGITS - 1 - D))) & 255).to(tl.int32), valid, BLOCK)
    tl.atomic_add(counts + D * _BINS + tl.arange(0, _BINS), count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def _write_kernel(
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
    valid = i < length
    keep = valid & (tl.load(mask + start + i, mask=valid, other=0) != 0)
    if tl.load(wanted + group) > 0:
        known = state + group * _FIELDS
        key = _load_key(score + start, i, valid)
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
    tl.store(new + start + i, keep.to(tl.int8), mask=valid)


def _warps(block: int) -> int:
    """Number of warps that gives a thread sixteen elements."""
    return min(max(block // 512, 1), 16)


class _Threshold(NamedTuple):
    """wanted: int64 [groups]. state: int64 [groups, fields]. key: int32 [groups], the threshold's bits."""

    wanted: Tensor
    state: Tensor
    key: Tensor


def _threshold_triton(score: Tensor, mask: Tensor, wanted: Sequence[int], where: Tiling, block: int) -> _Threshold:
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
    candidates = torch.empty(score.numel(), dtype=torch.int32, device=device)
    _, _, ranges, aligned = where
    _bracket_kernel[(groups,)](score, mask, ranges, ranks, state, num_warps=16)
    grid, shape = (len(where.tiles),), {"ALIGNED": aligned, "BLOCK": block, "num_warps": _warps(block)}
    for everything in (False, True):
        _gather_kernel[grid](score, mask, where.tiles, ranges, ranks, state, candidates, ALL=everything, **shape)
    programs = max(1, min(_PROGRAMS // groups, triton.cdiv(score.numel(), groups * 8 * block)))
    for digit in range(_DIGITS.value):
        _search_kernel[(groups, programs)](
            candidates, ranges, ranks, state, counts, D=digit, BLOCK=block, num_warps=_warps(block)
        )
    _settle_kernel[(groups,)](ranks, state, counts, key)
    return _Threshold(ranks, state, key)


def _keep_top_triton(
    score: Tensor, mask: Tensor, wanted: Sequence[int], segments: tuple[Segment, ...], local: bool, block: int
) -> Tensor:
    """The new mask. wanted: one number for all segments, or with `local` one for each."""
    # Zeros, because no tile covers the memory outside segments, which must stay False.
    new = torch.zeros_like(mask)
    where = tiling(segments, score.numel(), block, local, score.device)
    if not len(where.tiles):
        return new
    ranks, state, _ = _threshold_triton(score, mask, wanted, where, block)
    grid, shape = (len(where.tiles),), {"ALIGNED": where.aligned, "BLOCK": block, "num_warps": _warps(block)}
    positions = max(s.position + s.numel for s in segments)
    digits = max(1, -(-(positions - 1).bit_length() // 8))
    counts = torch.zeros(len(wanted) * digits * _BINS.value, dtype=torch.int64, device=score.device)
    for digit in range(digits):
        _ties_kernel[grid](score, mask, where.tiles, where.table, state, counts, D=digit, DIGITS=digits, **shape)
    _write_kernel[grid](score, mask, new, where.tiles, where.table, ranks, state, counts, DIGITS=digits, **shape)
    return new
