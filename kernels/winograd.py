"""The dense first convolution of an image network, in the layout of lanes.py: Winograd's algorithm at stride 2.

A kernel of 5 to 8 taps a side at stride 2 is the sum of four of up to 4 taps a side at stride 1, one for each parity of
the input's rows and columns (Lavin and Gray, 2016, for the algorithm). Tiles of 4 x 4 outputs then take 49 products for
each parity and input channel instead of 16 x 49: a quarter. All that an output channel needs is added before its
transform. ReLU and a max pooling of 3 x 3 at stride 2 follow at once, while a band of four rows is in the cache.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.polynomial import polynomial

from fastprune.kernels.dense_conv import GROUP, add_entry, zero_group
from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import BYTES, LANES, VECTOR, lanes, load, multiply_add, splat, store, where_positive
from fastprune.kernels.sparse_conv import store_tile, tile

OUTPUTS, TAPS = 4, 4
POINTS = OUTPUTS + TAPS - 1

# Polynomials are evaluated at 0 and at both signs of these multiples of _UNIT: opposite points share their work, and
# constants of A and B are exact in float32. Found by a search over fractions, first for small norms of the transforms'
# rows, then for a small error. For 64 channels that is 1.1e-6 to 2.1e-6 of the maximum; with the usual 0, +-1, +-1/2,
# -2 and infinity it was 2.9e-6 to 6.8e-6. How points make the error: Barabasz et al. (2020). That others than small
# whole numbers and their inverses can be better: Alam et al. (2022).
_UNIT = 5 / 8
_MULTIPLES = (1, 2, 5)
_AT = np.array([0, *(sign * _UNIT * n for n in _MULTIPLES for sign in (1, -1))])


def _weights_transform() -> np.ndarray:
    """G of outputs = A ((G taps) * (B inputs)), by Cook and Toom, float64 [7, 4]."""
    apart = np.subtract.outer(_AT, _AT) + np.eye(POINTS)
    return np.vander(_AT, TAPS, increasing=True) / apart.prod(1, keepdims=True)


def _inputs_transform() -> tuple[np.ndarray, np.ndarray]:
    """(_JOIN, _HALVES), float64 [7, 7]: B = _JOIN _HALVES. A row of B is the polynomial that is 0 at all other points.

    For the points +-a that is x (x +- a) r(x^2): a sum and a difference of x^2 r(x^2) and a x r(x^2), which are halves.
    """
    join, halves = np.eye(POINTS), np.zeros((POINTS, POINTS))
    halves[0] = polynomial.polyfromroots(_AT[1:])
    for i in range(1, POINTS, 2):
        others = polynomial.polyfromroots(np.delete(_AT, [0, i, i + 1]))
        halves[i, 2:], halves[i + 1, 1:-1] = others, others
        join[i : i + 2, i : i + 2] = [1, _AT[i]], [1, -_AT[i]]
    return join, halves


def _outputs_transform() -> tuple[np.ndarray, np.ndarray]:
    """(_POWERS, _SUMS), float64 [4, 7] and [7, 7]: A = diag(_UNIT^k) _POWERS _SUMS, with powers of whole numbers."""
    sums, powers = np.eye(POINTS), np.zeros((OUTPUTS, POINTS))
    powers[0, 0] = 1
    for i, n in zip(range(1, POINTS, 2), _MULTIPLES, strict=True):
        sums[i : i + 2, i : i + 2] = [1, 1], [1, -1]
        for k in range(OUTPUTS):
            powers[k, i + k % 2] = n**k
    return powers, sums


G = _weights_transform()
_JOIN, _HALVES = _inputs_transform()
_POWERS, _SUMS = _outputs_transform()
# What is left of A in both directions, by the sum of the output's row and column.
_SCALES = tuple(np.float32(_UNIT**k) for k in range(2 * OUTPUTS - 1))


def _combination(matrix: np.ndarray) -> Any:
    """An intrinsic: the products of a constant matrix with a tuple of Lanes, without what is zero."""

    @intrinsic
    def combine(context, values):
        result = types.UniTuple(lanes, len(matrix))

        def code(_, b, sig, args):
            values = cgutils.unpack_tuple(b, args[0])
            return cgutils.pack_array(b, [total(b, row, values) for row in matrix])

        return result(values), code

    def total(b, row, values):
        found = None
        # Those with factor 1 first: the others then fuse with an addition.
        for i in sorted(np.flatnonzero(row), key=lambda i: row[i] != 1):
            factor = ir.Constant(VECTOR, [float(row[i])] * LANES)
            if found is None:
                found = values[i] if row[i] == 1 else b.fmul(values[i], factor)
            elif abs(row[i]) == 1:
                found = (b.fadd if row[i] == 1 else b.fsub)(found, values[i])
            else:
                found = multiply_add(b, values[i], factor, found)
        return found

    return combine


_halves, _join = _combination(_HALVES), _combination(_JOIN)
_sums, _powers = _combination(_SUMS), _combination(_POWERS)


@intrinsic
def _most(context, one, other):
    """The maximum of values that are +0, positive or NaN: NaN if one is."""

    def code(_, b, sig, args):
        # As unsigned integers such numbers have the same order, and NaN is above them.
        whole = ir.VectorType(ir.IntType(32), LANES)
        x, y = (b.bitcast(value, whole) for value in args)
        return b.bitcast(b.select(b.icmp_unsigned(">", x, y), x, y), VECTOR)

    return lanes(lanes, lanes), code


def transformed_weights(weight: np.ndarray) -> np.ndarray:
    """Weights of `stem`, float32 [O / GROUP, 49, 4 I, GROUP]. weight: float32 [O, I, KH, KW] of at most 8 x 8 taps."""
    o, i, kh, kw = weight.shape
    taps = np.zeros((o, i, 2 * TAPS, 2 * TAPS))
    taps[:, :, :kh, :kw] = weight
    parities = taps.reshape(o, i, TAPS, 2, TAPS, 2).transpose(0, 1, 3, 5, 2, 4).reshape(o, 4 * i, TAPS, TAPS)
    found = np.einsum("ua,okab,vb->okuv", G, parities, G).reshape(o // GROUP, GROUP, 4 * i, POINTS**2)
    return np.ascontiguousarray(found.transpose(0, 3, 2, 1), np.float32)


@compiled
def _column(at, step):
    return (
        load(at), load(at + step), load(at + 2 * step), load(at + 3 * step), load(at + 4 * step), load(at + 5 * step),
        load(at + 6 * step),
    )  # fmt: skip


@compiled
def _put(values, at, step):
    for i in range(len(values)):
        store(values[i], at + i * step)


@compiled
def _transform_inputs(x, x_channel, x_row, channels, tiles, scratch, v, v_entry):
    """Of a band of tiles. x: where the first tile's window begins. v: [49, 4 * channels, tiles] vectors, v_entry bytes
    between entries."""
    for c in range(channels):
        for parity in range(4):
            entry = 4 * c + parity
            first = x + c * x_channel + parity // 2 * x_row + parity % 2 * BYTES
            for t in range(tiles):
                for j in range(POINTS):
                    values = _column(first + (8 * t + 2 * j) * BYTES, 2 * x_row)
                    _put(_join(_halves(values)), scratch + j * BYTES, POINTS * BYTES)
                for i in range(POINTS):
                    values = _join(_halves(_column(scratch + i * POINTS * BYTES, BYTES)))
                    at = v + ((i * POINTS * 4 * channels) + entry) * v_entry + t * BYTES
                    _put(values, at, 4 * channels * v_entry)


@compiled
def _products(four, apart, weights, v, v_entry, entries, m):
    """Of four tiles and a group. m: [GROUP, 4 tiles, 49] vectors."""
    for point in range(POINTS * POINTS):
        content = zero_group(four)
        for _ in range(entries):
            content = add_entry(four, content, weights, v, 0, 0)
            weights += 4 * GROUP
            v += v_entry
        at = m + point * BYTES
        step = 4 * POINTS * POINTS * BYTES
        store_tile(apart, content[0], at, 0, 0)
        store_tile(apart, content[1], at + step, 0, 0)
        store_tile(apart, content[2], at + 2 * step, 0, 0)
        store_tile(apart, content[3], at + 3 * step, 0, 0)


@compiled
def _outputs(m, scratch, bias, positive, out, out_row):
    """The 4 x 4 outputs of a tile. m: 49 vectors."""
    add = splat(bias)
    for j in range(POINTS):
        _put(_powers(_sums(_column(m + j * BYTES, POINTS * BYTES))), scratch + j * BYTES, POINTS * BYTES)
    for i in range(OUTPUTS):
        values = _powers(_sums(_column(scratch + i * POINTS * BYTES, BYTES)))
        for j in range(OUTPUTS):
            value = values[j] * splat(_SCALES[i + j]) + add
            store(where_positive(value, value) if positive else value, out + i * out_row + j * BYTES)


@compiled
def _pooled_row(source, source_row, out, count):
    for i in range(count):
        at = source + 2 * i * BYTES
        best = _most(_most(load(at), load(at + BYTES)), load(at + 2 * BYTES))
        at += source_row
        best = _most(best, _most(_most(load(at), load(at + BYTES)), load(at + 2 * BYTES)))
        at += source_row
        best = _most(best, _most(_most(load(at), load(at + BYTES)), load(at + 2 * BYTES)))
        store(best, out + i * BYTES)


@compiled
def stem(
    four, apart, x, x_steps, channels, weights, bias, positive, pooled, bands, tiles, blocks, v, m, rows, carry, y,
    y_steps, first, last,
):  # fmt: skip
    """y = conv(x) + bias, ReLU if `positive`, then with `pooled` max pooling of 3 x 3, stride 2, padding 1.

    Groups first to last (excluded) of output channels; the conv has 4 * bands x 4 * tiles outputs. four, apart: what
    `tiles_of_stem` gives. x: address of the first input of the first output, in the border as a rule; reads 14 rows and
    columns for a tile. x_steps, y_steps: bytes between blocks, channels and rows. weights: of `transformed_weights`.
    bias: float32 [O]. Scratch, in vectors: v [49, 4 * channels, tiles up to a multiple of 4], finite; m
    [(4 * GROUP + 1) * 49]; rows [GROUP, 5, 4 * tiles + 1] and carry [O, 4 * tiles + 1], both used with `pooled`, which
    needs `positive`.
    """
    v_entry = (tiles + 3) // 4 * 4 * BYTES
    entries = 4 * channels
    scratch = m + 4 * GROUP * POINTS * POINTS * BYTES
    row = (4 * tiles + 1) * BYTES
    zero = splat(np.float32(0))
    for a in range(blocks):
        if pooled:
            for i in range(GROUP * first * (4 * tiles + 1), GROUP * last * (4 * tiles + 1)):
                store(zero, carry + i * BYTES)
        for band in range(bands):
            start = x + a * x_steps[0] + 8 * band * x_steps[2]
            _transform_inputs(start, x_steps[1], x_steps[2], channels, tiles, scratch, v, v_entry)
            for group in range(first, last):
                for q in range(0, tiles, 4):
                    of_group = weights + group * POINTS * POINTS * entries * GROUP * 4
                    _products(four, apart, of_group, v + q * BYTES, v_entry, entries, m)
                    for g in range(GROUP):
                        o = GROUP * group + g
                        for t in range(q, min(q + 4, tiles)):
                            if pooled:
                                out, out_row = rows + (5 * g + 1) * row + (4 * t + 1) * BYTES, row
                            else:
                                out = y + a * y_steps[0] + o * y_steps[1] + 4 * (band * y_steps[2] + t * BYTES)
                                out_row = y_steps[2]
                            _outputs(
                                m + (4 * g + t - q) * POINTS * POINTS * BYTES, scratch, bias[o], positive, out, out_row
                            )
                if pooled:
                    for g in range(GROUP):
                        o = GROUP * group + g
                        top, kept = rows + 5 * g * row, carry + o * row
                        for i in range(4 * tiles + 1):
                            store(load(kept + i * BYTES), top + i * BYTES)
                            store(load(top + 4 * row + i * BYTES) if i else zero, kept + i * BYTES)
                        for r in range(1, 5):
                            store(zero, top + r * row)
                        for r in range(2):
                            out = y + a * y_steps[0] + o * y_steps[1] + (2 * band + r) * y_steps[2]
                            _pooled_row(top + 2 * r * row, row, out, 2 * tiles)


def tiles_of_stem() -> tuple[Any, Any]:
    """The first two arguments of `stem`."""
    return tile(1, 1, 4), tile(1, 1, 4, POINTS * POINTS)
