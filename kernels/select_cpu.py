"""The k-th lowest score and the mask that prunes it, on a CPU: one pass to find the threshold, one to write the mask.

Non-negative floats order as their bits do, so a score is an unsigned key; NaN is clamped to +inf. A sample of the keys
brackets the threshold; one pass then counts what lies below the bracket and keeps what lies inside, and only that is
partitioned. Where the sample misleads, a partition of all keys decides: the result is exact either way.
"""

from collections.abc import Sequence

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
    room = np.empty(kept, keys.dtype)
    below, inside = compiled(_gather)(keys, mask, kind(low), kind(high), kind(top), room)
    if not below < k <= below + inside:
        below, inside = compiled(_gather)(keys, mask, kind(0), kind(top), kind(top), room)
    return int(np.partition(room[:inside], k - below - 1)[k - below - 1])


def keep_above(
    keys: np.ndarray, mask: np.ndarray, count: int, kept: int, top: int, segments: Sequence[Segment] | None, start: int
) -> None:
    """Clears in `mask` (in place) the `count` lowest keys that it keeps; ties by position, the lowest first.

    start: index of keys[0] and mask[0] in the buffer that `segments` describe.
    """
    if not count:
        return
    threshold = kth_key(keys, mask, count, kept, top)
    tied, cleared = compiled(_clear_below)(keys, mask, keys.dtype.type(threshold), keys.dtype.type(top))
    wanted = count - cleared
    if wanted == tied:
        compiled(_clear_equal)(keys, mask, keys.dtype.type(threshold), keys.dtype.type(top))
        return
    magnitude = np.minimum(keys & keys.dtype.type(_magnitude(keys)), keys.dtype.type(top))
    index = np.flatnonzero(mask & (magnitude == threshold))
    if segments is not None:
        index = index[np.argsort(logical_positions(segments, index + start), kind="stable")]
    mask[index[:wanted]] = False


def _magnitude(keys: np.ndarray) -> int:
    return int(np.iinfo(keys.dtype).max >> 1)


def _bracket(keys: np.ndarray, mask: np.ndarray, k: int, kept: int, top: int) -> tuple[int, int]:
    """Keys that very likely lie below and above the k-th: six standard deviations of a sample's rank away."""
    if kept < 4 * _SAMPLE:
        return 0, top
    # Evenly spaced with an odd stride, so that no layout of layers or channels lines up with it.
    stride = (max(1, keys.size // (4 * _SAMPLE))) | 1
    kind = keys.dtype.type
    sample = np.minimum(keys[::stride][mask[::stride]] & kind(_magnitude(keys)), kind(top))
    if sample.size < 64:
        return 0, top
    sample.sort()
    place = k / kept * sample.size
    slack = 6 * np.sqrt(place * (1 - k / kept)) + 8
    first, last = int(place - slack), int(place + slack)
    return int(sample[first]) if first >= 0 else 0, int(sample[last]) if last < sample.size else top


def _gather(keys, mask, low, high, top, room):
    """Counts kept keys below `low`; writes those in [low, high] to `room` and counts them."""
    sign = keys.dtype.type(1) << keys.dtype.type(8 * keys.itemsize - 1)
    below, inside = 0, 0
    for i in range(keys.size):
        key = min(keys[i] & ~sign, top)
        if mask[i]:
            if key < low:
                below += 1
            elif key <= high:
                room[inside] = key
                inside += 1
    return below, inside


def _clear_below(keys, mask, threshold, top):
    """Clears kept keys below the threshold; returns (how many equal it, how many were cleared)."""
    sign = keys.dtype.type(1) << keys.dtype.type(8 * keys.itemsize - 1)
    tied, cleared = 0, 0
    for i in range(keys.size):
        key = min(keys[i] & ~sign, top)
        kept = mask[i]
        lower = kept and key < threshold
        mask[i] = kept and not lower
        cleared += lower
        tied += kept and key == threshold
    return tied, cleared


def _clear_equal(keys, mask, threshold, top):
    sign = keys.dtype.type(1) << keys.dtype.type(8 * keys.itemsize - 1)
    for i in range(keys.size):
        if min(keys[i] & ~sign, top) == threshold:
            mask[i] = False
