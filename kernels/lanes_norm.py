"""Batch norm, ReLU, residual sum and max pooling in the layout of lanes.py, a channel at a time.

All passes over a channel follow one another, so that the second and the third find it in the cache: memory sees one
read of each input and one write of each output. Sums are taken in float32 over a row and over the rows of a plane,
sixteen images side by side, and in float64 over planes. The variance is the mean of squared differences from the mean:
it stays exact where the mean is large against the deviation.

Addresses are int64; a `steps` is three int64, bytes between blocks of images, channels and rows.
"""

import numpy as np

from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import (
    BYTES,
    chosen,
    first_lanes,
    larger,
    load,
    relu,
    splat,
    store,
    total,
    where_equal,
    where_positive,
)


@compiled
def _moments(y, block, row, height, width, blocks, images):
    """(mean, mean squared difference from it) of a channel over all images, float64."""
    count = images * height * width
    rest = first_lanes(images - 16 * (blocks - 1))
    sum_ = 0.0
    for a in range(blocks):
        s = splat(np.float32(0))
        for r in range(height):
            for i in range(width):
                s = s + load(y + a * block + r * row + i * BYTES)
        sum_ += np.float64(total(chosen(rest, s) if a == blocks - 1 else s))
    # A sum of float32 is not exact. That of the small differences from it is, nearly: it corrects both results.
    centre, off, squares = splat(np.float32(sum_ / count)), 0.0, 0.0
    for a in range(blocks):
        s, t = splat(np.float32(0)), splat(np.float32(0))
        for r in range(height):
            of_row, squared = splat(np.float32(0)), splat(np.float32(0))
            for i in range(width):
                d = load(y + a * block + r * row + i * BYTES) - centre
                of_row = of_row + d
                squared = squared + d * d
            s, t = s + of_row, t + squared
        off += np.float64(total(chosen(rest, s) if a == blocks - 1 else s))
        squares += np.float64(total(chosen(rest, t) if a == blocks - 1 else t))
    off /= count
    return np.float64(np.float32(sum_ / count)) + off, max(squares / count - off * off, 0.0)


@compiled
def _normalise(y, y_row, z, z_row, residual, residual_row, height, width, centre, scale, shift, positive, images):
    """A plane: z = (y - centre) * scale + shift [+ residual], then max(z, 0) if `positive`; 0 beyond `images` lanes."""
    middle, factor, add, some = splat(centre), splat(scale), splat(shift), first_lanes(min(images, 16))
    for r in range(height):
        for i in range(width):
            v = (load(y + r * y_row + i * BYTES) - middle) * factor + add
            if residual:
                v = v + load(residual + r * residual_row + i * BYTES)
            if positive:
                v = relu(v)
            # Lanes without an image would grow from layer to layer: the statistics are not theirs. inf x 0 is NaN.
            store(v if images >= 16 else chosen(some, v), z + r * z_row + i * BYTES)


@compiled
def _affine(mean, inverse, weight, bias):
    """(centre, scale, shift) as float32 with (y - centre) * scale + shift = (y - mean) * inverse * weight + bias."""
    centre, scale = np.float32(mean), np.float64(weight) * inverse
    return centre, np.float32(scale), np.float32(np.float64(bias) + (np.float64(centre) - mean) * scale)


@compiled
def norm_forward(
    y, y_steps, z, z_steps, residual, residual_steps, height, width, blocks, images, weight, bias, eps, mean, variance,
    of_batch, positive, first, last,
):  # fmt: skip
    """z = relu(batch_norm(y) + residual) for channels first to last.

    weight, bias: float32 [C]. mean, variance: float64 [C], with `of_batch` written (the biased variance), else read.
    residual: an address, or 0. positive: whether there is a ReLU.
    """
    for c in range(first, last):
        source = y + c * y_steps[1]
        if of_batch:
            mean[c], variance[c] = _moments(source, y_steps[0], y_steps[2], height, width, blocks, images)
        centre, scale, shift = _affine(mean[c], 1 / np.sqrt(variance[c] + eps), weight[c], bias[c])
        for a in range(blocks):
            add = residual + a * residual_steps[0] + c * residual_steps[1] if residual else 0
            _normalise(
                source + a * y_steps[0], y_steps[2], z + a * z_steps[0] + c * z_steps[1], z_steps[2], add,
                residual_steps[2], height, width, centre, scale, shift, positive, images - 16 * a,
            )  # fmt: skip


@compiled
def _back_through_norm(
    y, y_block, y_row, g, g_block, g_row, dy, dy_block, dy_row, height, width, blocks, images, mean, inverse, weight,
    sum_g, sum_gy,
):  # fmt: skip
    """The gradient dy of a channel, from that of its normalised values. sum_gy: of g * (y - float32(mean)).

    Returns the gradients of weight and bias.
    """
    count = np.float64(images * height * width)
    centre = np.float32(mean)
    off = mean - np.float64(centre)
    sum_gy -= off * sum_g
    a = np.float64(weight) * inverse
    b = -a * inverse * inverse * sum_gy / count
    c = -a * sum_g / count - b * off
    scale, slope, shift, middle = splat(np.float32(a)), splat(np.float32(b)), splat(np.float32(c)), splat(centre)
    rest = first_lanes(images - 16 * (blocks - 1))
    for k in range(blocks):
        whole = k < blocks - 1 or images % 16 == 0
        for r in range(height):
            for i in range(width):
                v = load(y + k * y_block + r * y_row + i * BYTES) - middle
                v = load(g + k * g_block + r * g_row + i * BYTES) * scale + (v * slope + shift)
                # Lanes without an image must be 0: they enter the sums of the gradients of weights.
                store(v if whole else chosen(rest, v), dy + k * dy_block + r * dy_row + i * BYTES)
    return np.float32(sum_gy * inverse), np.float32(sum_g)


@compiled
def norm_backward(
    y, y_steps, z, z_steps, g, g_steps, dy, dy_steps, height, width, blocks, images, weight, eps, mean, variance,
    positive, weight_gradient, bias_gradient, first, last,
):  # fmt: skip
    """dy, and the gradients of weight and bias (float32 [C]), for channels first to last.

    g: the gradient of z, 0 in lanes without an image; with `positive` it is set to 0 where z is not positive, in place.
    """
    for c in range(first, last):
        inverse, centre = 1 / np.sqrt(variance[c] + eps), splat(np.float32(mean[c]))
        sum_g, sum_gy = 0.0, 0.0
        for a in range(blocks):
            s, t = splat(np.float32(0)), splat(np.float32(0))
            for r in range(height):
                y_at = y + a * y_steps[0] + c * y_steps[1] + r * y_steps[2]
                z_at = z + a * z_steps[0] + c * z_steps[1] + r * z_steps[2]
                g_at = g + a * g_steps[0] + c * g_steps[1] + r * g_steps[2]
                of_row, product = splat(np.float32(0)), splat(np.float32(0))
                for i in range(width):
                    v = load(g_at + i * BYTES)
                    if positive:
                        v = where_positive(load(z_at + i * BYTES), v)
                        store(v, g_at + i * BYTES)
                    of_row = of_row + v
                    product = product + v * (load(y_at + i * BYTES) - centre)
                s, t = s + of_row, t + product
            sum_g += np.float64(total(s))
            sum_gy += np.float64(total(t))
        weight_gradient[c], bias_gradient[c] = _back_through_norm(
            y + c * y_steps[1], y_steps[0], y_steps[2], g + c * g_steps[1], g_steps[0], g_steps[2],
            dy + c * dy_steps[1], dy_steps[0], dy_steps[2], height, width, blocks, images, mean[c], inverse, weight[c],
            sum_g, sum_gy,
        )  # fmt: skip


@compiled
def _pool(source, source_row, out, out_row, places, window):
    """Max pooling of a plane whose border is -inf. places: the tap of each maximum, as a float; 0 if not wanted.

    window: int64 [height and width of the output, kernel, stride].
    """
    height, width, kh, kw, sh, sw = window
    for r in range(height):
        for i in range(width):
            best, found = splat(np.float32(-np.inf)), splat(np.float32(0))
            for k in range(kh):
                for j in range(kw):
                    at = source + (r * sh + k) * source_row + (i * sw + j) * BYTES
                    best, found = larger(best, found, load(at), splat(np.float32(k * kw + j)))
            store(best, out + r * out_row + i * BYTES)
            if places:
                store(found, places + (r * width + i) * BYTES)


@compiled
def _unpool(g, g_row, z, z_row, places, into, into_row, window):
    """Adds each gradient of a pooled plane to the position of its maximum; with z, only where z is positive."""
    height, width, kh, kw, sh, sw = window
    for r in range(height):
        for i in range(width):
            v, found = load(g + r * g_row + i * BYTES), load(places + (r * width + i) * BYTES)
            if z:
                v = where_positive(load(z + r * z_row + i * BYTES), v)
            for k in range(kh):
                for j in range(kw):
                    at = into + (r * sh + k) * into_row + (i * sw + j) * BYTES
                    store(load(at) + where_equal(found, splat(np.float32(k * kw + j)), v), at)


@compiled
def _fill(out, count, number):
    value = splat(np.float32(number))
    for i in range(count):
        store(value, out + i * BYTES)


@compiled
def norm_pool_forward(
    y, y_steps, z, z_steps, places, height, width, blocks, images, weight, bias, eps, mean, variance, of_batch, window,
    padding, scratch, first, last,
):  # fmt: skip
    """z = max_pool(relu(batch_norm(y))) for channels first to last, without storing what is pooled.

    As `norm_forward`. padding: int64 [2]. places: address of [A, C, positions of z, 16], the tap of each maximum, or 0.
    scratch: address of (height + 2 padding) x (width + 2 padding) vectors.
    """
    top, left = padding
    row = (width + 2 * left) * BYTES
    _fill(scratch, (height + 2 * top) * (width + 2 * left), -np.inf)
    inner = scratch + top * row + left * BYTES
    size = window[0] * window[1] * BYTES
    for c in range(first, last):
        source = y + c * y_steps[1]
        if of_batch:
            mean[c], variance[c] = _moments(source, y_steps[0], y_steps[2], height, width, blocks, images)
        centre, scale, shift = _affine(mean[c], 1 / np.sqrt(variance[c] + eps), weight[c], bias[c])
        for a in range(blocks):
            _normalise(
                source + a * y_steps[0], y_steps[2], inner, row, 0, 0, height, width, centre, scale, shift, True,
                images - 16 * a,
            )  # fmt: skip
            where = places + (a * weight.shape[0] + c) * size if places else 0
            _pool(scratch, row, z + a * z_steps[0] + c * z_steps[1], z_steps[2], where, window)


@compiled
def norm_pool_backward(
    y, y_steps, z, z_steps, places, g, g_steps, dy, dy_steps, height, width, blocks, images, weight, eps, mean,
    variance, weight_gradient, bias_gradient, window, padding, scratch, first, last,
):  # fmt: skip
    """dy, and the gradients of weight and bias, from g, the gradient of the pooled z.

    As `norm_backward`. scratch: address of blocks x (height + 2 padding) x (width + 2 padding) vectors.
    """
    top, left = padding
    row = (width + 2 * left) * BYTES
    plane = (height + 2 * top) * row
    inner = scratch + top * row + left * BYTES
    size = window[0] * window[1] * BYTES
    for c in range(first, last):
        inverse, centre = 1 / np.sqrt(variance[c] + eps), splat(np.float32(mean[c]))
        sum_g, sum_gy = 0.0, 0.0
        _fill(scratch, blocks * plane // BYTES, 0.0)
        for a in range(blocks):
            where = places + (a * weight.shape[0] + c) * size
            # A maximum of 0 is a value that the ReLU cut off: no gradient passes.
            _unpool(
                g + a * g_steps[0] + c * g_steps[1], g_steps[2], z + a * z_steps[0] + c * z_steps[1], z_steps[2],
                where, scratch + a * plane, row, window,
            )  # fmt: skip
            s, t = splat(np.float32(0)), splat(np.float32(0))
            for r in range(height):
                y_at, g_at = y + a * y_steps[0] + c * y_steps[1] + r * y_steps[2], inner + a * plane + r * row
                of_row, product = splat(np.float32(0)), splat(np.float32(0))
                for i in range(width):
                    v = load(g_at + i * BYTES)
                    of_row = of_row + v
                    product = product + v * (load(y_at + i * BYTES) - centre)
                s, t = s + of_row, t + product
            sum_g += np.float64(total(s))
            sum_gy += np.float64(total(t))
        weight_gradient[c], bias_gradient[c] = _back_through_norm(
            y + c * y_steps[1], y_steps[0], y_steps[2], inner, plane, row, dy + c * dy_steps[1], dy_steps[0],
            dy_steps[2], height, width, blocks, images, mean[c], inverse, weight[c], sum_g, sum_gy,
        )  # fmt: skip


@compiled
def pool_forward(
    x, x_steps, z, z_steps, places, height, width, blocks, channels, window, padding, scratch, first, last
):
    """z = max_pool(x) for channels first to last. As `norm_pool_forward`; channels: their number."""
    top, left = padding
    row = (width + 2 * left) * BYTES
    _fill(scratch, (height + 2 * top) * (width + 2 * left), -np.inf)
    inner = scratch + top * row + left * BYTES
    for c in range(first, last):
        for a in range(blocks):
            for r in range(height):
                for i in range(width):
                    source = x + a * x_steps[0] + c * x_steps[1] + r * x_steps[2] + i * BYTES
                    store(load(source), inner + r * row + i * BYTES)
            where = places + (a * channels + c) * window[0] * window[1] * BYTES if places else 0
            _pool(scratch, row, z + a * z_steps[0] + c * z_steps[1], z_steps[2], where, window)


@compiled
def pool_backward(
    g, g_steps, places, dx, dx_steps, height, width, blocks, channels, window, padding, scratch, add, first, last
):  # fmt: skip
    """dx, or dx += with `add`, from the gradient g of the pooled values, for channels first to last."""
    top, left = padding
    row = (width + 2 * left) * BYTES
    inner = scratch + top * row + left * BYTES
    for c in range(first, last):
        for a in range(blocks):
            _fill(scratch, (height + 2 * top) * (width + 2 * left), 0.0)
            where = places + (a * channels + c) * window[0] * window[1] * BYTES
            _unpool(g + a * g_steps[0] + c * g_steps[1], g_steps[2], 0, 0, where, scratch, row, window)
            for r in range(height):
                for i in range(width):
                    into = dx + a * dx_steps[0] + c * dx_steps[1] + r * dx_steps[2] + i * BYTES
                    v = load(inner + r * row + i * BYTES)
                    store(load(into) + v if add else v, into)


@compiled
def relu_backward(z, z_steps, g, g_steps, dx, dx_steps, height, width, blocks, add, first, last):
    """dx, or dx += with `add`: g where z is positive, else 0."""
    for c in range(first, last):
        for a in range(blocks):
            for r in range(height):
                for i in range(width):
                    v = where_positive(
                        load(z + a * z_steps[0] + c * z_steps[1] + r * z_steps[2] + i * BYTES),
                        load(g + a * g_steps[0] + c * g_steps[1] + r * g_steps[2] + i * BYTES),
                    )
                    into = dx + a * dx_steps[0] + c * dx_steps[1] + r * dx_steps[2] + i * BYTES
                    store(load(into) + v if add else v, into)


@compiled
def add_planes(x, x_steps, other, other_steps, z, z_steps, height, width, blocks, positive, first, last):
    """z = x + other (an address, or 0 for x alone), then max(z, 0) if `positive`."""
    for c in range(first, last):
        for a in range(blocks):
            for r in range(height):
                for i in range(width):
                    v = load(x + a * x_steps[0] + c * x_steps[1] + r * x_steps[2] + i * BYTES)
                    if other:
                        v = v + load(other + a * other_steps[0] + c * other_steps[1] + r * other_steps[2] + i * BYTES)
                    store(relu(v) if positive else v, z + a * z_steps[0] + c * z_steps[1] + r * z_steps[2] + i * BYTES)


@compiled
def mean_forward(x, x_steps, z, height, width, blocks, channels, first, last):
    """z [A, C, 16] = the mean over all positions, for channels first to last."""
    factor = splat(np.float32(1.0 / (height * width)))
    for c in range(first, last):
        for a in range(blocks):
            s = splat(np.float32(0))
            for r in range(height):
                for i in range(width):
                    s = s + load(x + a * x_steps[0] + c * x_steps[1] + r * x_steps[2] + i * BYTES)
            store(s * factor, z + (a * channels + c) * BYTES)


@compiled
def mean_backward(g, dx, dx_steps, height, width, blocks, channels, add, first, last):
    """dx, or dx += with `add`, from g [A, C, 16]."""
    factor = splat(np.float32(1.0 / (height * width)))
    for c in range(first, last):
        for a in range(blocks):
            v = load(g + (a * channels + c) * BYTES) * factor
            for r in range(height):
                for i in range(width):
                    into = dx + a * dx_steps[0] + c * dx_steps[1] + r * dx_steps[2] + i * BYTES
                    store(load(into) + v if add else v, into)
