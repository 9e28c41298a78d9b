"""Random order, crops and flips: all randomness of the data, as pure functions of (seed, epoch, sample). Numpy only.

Drawn from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011).
"""

# Counter-based, because there is no state: a batch depends neither on the loader, nor on workers, nor on the epoch at
# which a run was resumed, and (seed 0, epoch 1) shares nothing with (seed 1, epoch 0).

import numpy as np

SCALE = (0.08, 1.0)  # fraction of the image's area; with RATIO and ATTEMPTS torchvision's RandomResizedCrop defaults
RATIO = (3 / 4, 4 / 3)  # width / height
ATTEMPTS = 10

# Purpose of a counter, so that no two draws share one; attempt k of a box is _BOX + k.
_ORDER, _FLIP, _BOX = 0, 1, 2
_SEED = _BOX + ATTEMPTS
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox4x32(
    c0: np.ndarray | int,
    c1: np.ndarray | int,
    c2: np.ndarray | int,
    c3: np.ndarray | int,
    k0: int,
    k1: int,
) -> Words:
    """Philox with ten rounds of the counters c0..c3 (which broadcast) under the key k0, k1: four uint32 arrays.

    Counters and keys are unsigned 32-bit words.  The result matches Random123's known answers.
    """
    # uint64 arrays hold a full 32 x 32-bit product, of which Philox uses both halves.
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in (c0, c1, c2, c3))
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b = (second >> _HALF) ^ b ^ np.uint64(k0), second & _LOW
        c, d = (first >> _HALF) ^ d ^ np.uint64(k1), first & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    a, b, c, d = np.broadcast_arrays(a, b, c, d)
    return a.astype(np.uint32), b.astype(np.uint32), c.astype(np.uint32), d.astype(np.uint32)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits `n` samples: a permutation, int64 [n]."""
    # Sorting one 64-bit word per sample gives the same order with every version of numpy, which its own shuffle does
    # not promise.
    high, low, _, _ = _words(seed, epoch, np.arange(n), _ORDER)
    return np.argsort((high.astype(np.uint64) << _HALF) | low, kind="stable")


def crop_boxes(
    seed: int, epoch: int, sample: np.ndarray, height: np.ndarray | int, width: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Random resized crops: boxes int32 [n, 4] = top, left, height, width in pixels, and flip bool [n] (p = 0.5).

    sample: int64 [n], positions in the stored data set.  height, width: of the whole images, ints or int arrays [n].
    The distribution is that of torchvision's `RandomResizedCrop.get_params`, with its ten attempts and its fallback,
    in float64.
    """
    # `exp` may differ in its last bit on another machine: it moves an edge by one pixel in about one box of 10**13.
    sample = np.asarray(sample, dtype=np.int64)
    height = np.broadcast_to(np.asarray(height, dtype=np.int64), sample.shape)
    width = np.broadcast_to(np.asarray(width, dtype=np.int64), sample.shape)
    result = _fallback(height, width)
    rest = np.arange(len(sample))
    # Only for samples that no earlier attempt fitted: counters make the draws independent of each other.
    for attempt in range(ATTEMPTS):
        box, fits = _attempt(_words(seed, epoch, sample[rest], _BOX + attempt), height[rest], width[rest])
        result[rest[fits]] = box[fits]
        rest = rest[~fits]
        if not len(rest):
            break
    return result, flips(seed, epoch, sample)


def flips(seed: int, epoch: int, sample: np.ndarray) -> np.ndarray:
    """Which of the samples (int64 [n]) are flipped horizontally: bool [n] (p = 0.5)."""
    coin, _, _, _ = _words(seed, epoch, sample, _FLIP)
    return coin < np.uint32(1 << 31)


def sample_seeds(seed: int, epoch: int, sample: np.ndarray) -> np.ndarray:
    """A seed for each sample (int64 [n]), uint64 [n], for transforms that have a generator of their own."""
    high, low, _, _ = _words(seed, epoch, sample, _SEED)
    return (high.astype(np.uint64) << _HALF) | low


def _words(seed: int, epoch: int, sample: np.ndarray, purpose: int) -> Words:
    """Four uniform uint32 [n] for each sample. ValueError if seed or epoch is out of range."""
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 32):
        raise ValueError(f"seed {seed} is not in [0, 2**64) or epoch {epoch} not in [0, 2**32)")
    position = sample.astype(np.uint64)
    return philox4x32(position & _LOW, position >> _HALF, epoch, purpose, seed & 0xFFFFFFFF, seed >> 32)


def _attempt(words: Words, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One attempt in images of `height` and `width`: boxes int32 [n, 4], and whether each fits, bool [n]."""
    area, ratio, down, right = words
    target = height * width * _between(area, *SCALE)
    # Uniform in the logarithm, as torchvision draws it: a ratio and its inverse are equally likely.
    aspect = np.exp(_between(ratio, *np.log(RATIO)))
    box_w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    box_h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (box_w > 0) & (box_w <= width) & (box_h > 0) & (box_h <= height)
    top, left = _below(down, height - box_h + 1), _below(right, width - box_w + 1)
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int32), fits


def _fallback(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The largest centred box of an allowed ratio, int32 [n, 4], used if no attempt fits."""
    ratio = width / height
    box_h = np.where(ratio < RATIO[0], np.rint(width / RATIO[0]), height).astype(np.int64)
    box_w = np.where(ratio > RATIO[1], np.rint(height * RATIO[1]), width).astype(np.int64)
    return np.stack([(height - box_h) // 2, (width - box_w) // 2, box_h, box_w], axis=1).astype(np.int32)


def _between(word: np.ndarray, low: float, high: float) -> np.ndarray:
    """A uniform word as float64 in [low, high), in steps of 2**-32 of the range."""
    return low + (high - low) * (word * 2.0**-32)


def _below(word: np.ndarray, number: np.ndarray) -> np.ndarray:
    """A uniform word as int64 in [0, number)."""
    # A product and a shift (Lemire): no division, and a bias below number / 2**32.
    return (word.astype(np.int64) * number) >> 32
