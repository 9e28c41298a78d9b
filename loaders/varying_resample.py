"""Crop, resize with antialiasing, mirror and normalise one image in one pass, in compiled code.

The meaning is torchvision's `normalize(hflip(resize(crop(image / 255), antialias=True)))` on float tensors: a triangle
as wide as an output pixel, never narrower than an input pixel, sampled at pixel centres and normalised to sum 1.
"""

import numpy as np

from fastprune.kernels.dispatch import compiled


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Gain and shift, float32 [3], that turn grey levels from 0 to 255 into normalised values."""
    centre, scale = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1.0 / (255.0 * scale)).astype(np.float32), (-centre / scale).astype(np.float32)


def _taps(size: int, full: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of output pixels begin..begin+count of `full`: first input pixel int64 [count], weights float32 [count, taps].

    Weights that would lie outside the `size` input pixels are zero, and so are those past a pixel's last.
    """
    scale = size / full
    support = max(scale, 1.0)
    most = min(int(np.ceil(2.0 * support)), size)
    first = np.empty(count, np.int64)
    weights = np.zeros((count, most), np.float32)
    for i in range(count):
        centre = scale * (begin + i + 0.5)
        low = max(int(centre - support + 0.5), 0)
        number = min(int(centre + support + 0.5) - low, size - low, most)
        total = 0.0
        for j in range(number):
            total += max(1.0 - abs((low + j - centre + 0.5) / support), 0.0)
        # Shifted back from the edge, so that all of `most` input pixels exist.
        first[i] = min(low, size - most)
        for j in range(number):
            weight = max(1.0 - abs((low + j - centre + 0.5) / support), 0.0)
            weights[i, low - first[i] + j] = weight / total
    return first, weights


def _resample(
    flat: np.ndarray,
    top: int,
    left: int,
    tall: int,
    wide: int,
    full_h: int,
    full_w: int,
    window_h: int,
    window_w: int,
    flip: bool,
    gain: np.ndarray,
    shift: np.ndarray,
    out: np.ndarray,
) -> None:
    height, width = out.shape[0], out.shape[1] // 3
    rows, row_weights = taps(tall, full_h, window_h, height)
    columns, weights = taps(wide, full_w, window_w, width)
    begin = columns[0]
    end = columns[width - 1] + weights.shape[1]
    row = 3 * (end - begin)
    line = np.empty(row, np.float32)
    edge = 3 * (left + begin)
    # Unsigned, because numba tests every signed index for being negative.
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    number = weights.shape[1]
    for y in range(height):
        # Down first: whole rows in contiguous memory, and only as many as there are output rows.
        for j in range(row_weights.shape[1]):
            weight = row_weights[y, j]
            if j == 0:
                source = flat[top + rows[y], edge : edge + row]
                for i in range(row):
                    line[i] = weight * np.float32(source[i])
            elif weight != 0.0:
                source = flat[top + rows[y] + j, edge : edge + row]
                for i in range(row):
                    line[i] += weight * np.float32(source[i])
        target = out[y]
        for x in range(width):
            red, green, blue = np.float32(0), np.float32(0), np.float32(0)
            place = np.uint64(3 * (columns[x] - begin))
            for j in range(number):
                weight = weights[x, j]
                red += weight * line[place]
                green += weight * line[place + one]
                blue += weight * line[place + two]
                place += three
            goal = np.uint64(3 * (width - 1 - x if flip else x))
            target[goal] = red * gain[0] + shift[0]
            target[goal + one] = green * gain[1] + shift[1]
            target[goal + two] = blue * gain[2] + shift[2]


def _make(pixels: np.ndarray, cuts: np.ndarray, i: int, gain: np.ndarray, shift: np.ndarray, out: np.ndarray) -> None:
    """Fill `out`, float32 [H, 3 W], with what cuts[i] says of `pixels`, uint8 [h, 3 w], times gain plus shift.

    cuts: structured, see varying_view.CUT.  gain, shift: float32 [3], see `normalisation`.
    """
    cut = cuts[i]
    resample(
        pixels,
        cut["top"], cut["left"], cut["tall"], cut["wide"], cut["full_height"], cut["full_width"],
        cut["window_top"], cut["window_left"], cut["flip"], gain, shift, out,
    )  # fmt: skip


taps = compiled(_taps)
resample = compiled(_resample)
make = compiled(_make)
