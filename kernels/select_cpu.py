"""The k-th lowest score and the mask that prunes it, on a CPU: one pass to find the threshold, one to write the mask.

Non-negative floats order as their bits do, so a score is an unsigned key; NaN is clamped to +inf. A sample of the keys
brackets the threshold; one pass then counts what lies below the bracket and keeps what lies inside, and only that is
partitioned. Where the sample misleads, a partition of all keys decides: the result is exact either way.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastprune.kernels.jit import compiled
from fastprune.kernels.segments import Segment, logical_positions

_SAMPLE = 1 << 14


def keys_of(scores: np.ndarray) -> tuple[np.ndarray, int]:
    """(unsigned view of contiguous float32 or float64 scores, the key of +inf)."""
    kind = np.uint32 if scores.dtype == np.float32 else np.uint64
    return scores.view(kind), int(np.array(np.inf, scores.dtype).view(kind))


def kth_key(keys: np.ndarray, mask: np.ndarray, k: int, kept: int, top: int) -> int:
    """The k-th lowest (from 1) of the keys that the mask keeps (bool, `kept` of them), the sign bit cleared first.

    keys: uint32 or uint64 [n]; keys above `top` count as `top`.
    """
    low, high = _bracket(keys, mask, k, kept, top)
    kind = keys.dtype.type
    room = np.empty(kept + 1, keys.dtype)
    below, inside = compiled(_gather)(keys, mask, kind(low), kind(high), _magnitude(keys), kind(top), room)
    if not below < k <= below + inside:
        below, inside = compiled(_gather)(keys, mask, kind(0), kind(top), _magnitude(keys), kind(top), room)
    return int(np.partition(room[:inside], k - below - 1)[k - below - 1])


def keep_above(
    keys: np.ndarray, mask: np.ndarray, count: int, kept: int, top: int, segments: Sequence[Segment] | None, start: int
) -> None:
    """Clears in `mask` (in place) the `count` lowest keys that it keeps; ties by position, the lowest first.

    start: index of keys[0] and mask[0] in the buffer that `segments` describe.
    """
    if not count:
        return
    threshold = keys.dtype.type(kth_key(keys, mask, count, kept, top))
    least, above = np.empty_like(mask), np.empty_like(mask)
    compiled(_compare)(keys, mask, threshold, _magnitude(keys), keys.dtype.type(top), least, above)
    at_least = np.count_nonzero(least)
    wanted = count - (kept - at_least)
    if wanted == at_least - np.count_nonzero(above):
        mask[:] = above
        return
    mask[:] = least
    index = np.flatnonzero(least & ~above)
    if segments is not None:
        index = index[np.argsort(logical_positions(segments, index + start), kind="stable")]
    mask[index[:wanted]] = False


def _magnitude(keys: np.ndarray) -> np.unsignedinteger[Any]:
    """All bits but the sign."""
    return keys.dtype.type(np.iinfo(keys.dtype).max >> 1)


def _bracket(keys: np.ndarray, mask: np.ndarray, k: int, kept: int, top: int) -> tuple[int, int]:
    """Keys that very likely lie below and above the k-th: six standard deviations of a sample's rank away."""
    if kept < 4 * _SAMPLE:
        return 0, top
    # Evenly spaced with an odd stride, so that no layout of layers or channels lines up with it.
    stride = (max(1, keys.size // (4 * _SAMPLE))) | 1
    kind = keys.dtype.type
    sample = np.minimum(keys[::stride][mask[::stride]] & _magnitude(keys), kind(top))
    if sample.size < 64:
        return 0, top
    sample.sort()
    place = k / kept * sample.size
    slack = 6 * np.sqrt(place * (1 - k / kept)) + 8
    first, last = int(place - slack), int(place + slack)
    return int(sample[first]) if first >= 0 else 0, int(sample[last]) if last < sample.size else top


def _gather(keys, mask, low, high, magnitude, top, room):
    """Counts kept keys below `low`; writes those in [low, high] to `room` (one longer than needed) and counts them."""
    below, inside = 0, 0
    for i in range(keys.size):
        key = min(keys[i] & magnitude, top)
        # Without a branch: which key is kept cannot be predicted.
        room[inside] = key
        below += mask[i] & (key < low)
        inside += mask[i] & (key >= low) & (key <= high)
    return below, inside


def _compare(keys, mask, threshold, magnitude, top, least, above):
    """What the mask keeps of the keys from the threshold on, and above it. Counts nothing, so it vectorises."""
    for i in range(keys.size):
        key = min(keys[i] & magnitude, top)
        least[i] = mask[i] & (key >= threshold)
        above[i] = mask[i] & (key > threshold)


def zero_pruned(values: np.ndarray, mask: np.ndarray) -> None:
    """Writes zero bits where the mask (bool [n]) is False; values: unsigned [n], mutated."""
    compiled(_zero_pruned)(values, mask, values.dtype.type(0))


def _zero_pruned(values, mask, zero):
    for i in range(values.size):
        values[i] = values[i] if mask[i] else zero
