"""Products of a dense matrix with tiles of images: convolutions that keep most weights, in the layout of lanes.py.

Tiles are those of sparse_conv.py, but rows come in groups that read from the same places: the vectors of an entry are
loaded once and multiplied by the weights of all rows of a group, so that there are fewer loads than multiply-adds.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import (
    LANES,
    VECTOR,
    broadcast,
    lanes,
    multiply_add,
    offset_at,
    pointer,
)
from fastprune.kernels.sparse_conv import add_scaled, addresses_of, finish, store_tile

GROUP = 4
"""Rows of a group."""


def _rows(shape: Any) -> Any:
    """numba's type of a tile's content for each row of a group."""
    blocks, rows, columns, _ = (part.count for part in shape.types)
    return types.UniTuple(types.UniTuple(lanes, blocks * rows * columns), GROUP)


@intrinsic
def zero_group(context, shape):
    content = _rows(shape)

    def code(_, b, sig, args):
        zero = cgutils.pack_array(b, [ir.Constant(VECTOR, [0.0] * LANES)] * content.dtype.count)
        return cgutils.pack_array(b, [zero] * GROUP)

    return content(shape), code


@intrinsic
def add_entry(context, shape, content, weights, base, block, row):
    """content + the tile at `base` times each of the GROUP float32 at `weights`."""

    def code(_, b, sig, args):
        _, content, weights, *place = args
        tile = [b.load(p, align=4) for p in addresses_of(b, shape, *place)]
        new = []
        for g, values in enumerate(cgutils.unpack_tuple(b, content)):
            at = pointer(b, b.add(weights, ir.Constant(ir.IntType(64), 4 * g)), ir.FloatType())
            weight = broadcast(b, b.load(at, align=4))
            sums = zip(tile, cgutils.unpack_tuple(b, values), strict=True)
            new.append(cgutils.pack_array(b, [multiply_add(b, weight, x, value) for x, value in sums]))
        return cgutils.pack_array(b, new)

    i = types.int64
    return content(shape, content, i, i, i, i), code


@compiled
def _write(y_tile, content, y, place, y_block, y_row, bias, residual, positive):
    if residual:
        content = add_scaled(y_tile, content, np.float32(1), residual + place, y_block, y_row)
    store_tile(y_tile, finish(y_tile, content, bias, positive), y + place, y_block, y_row)


@compiled
def dense_product(
    x_tile, y_tile, x, y, x_block, x_row, y_block, y_row, x_at, y_at, row_at, step, first, last, per_class, start,
    offsets, values, bias, residual, positive,
):  # fmt: skip
    """y = relu(matrix x x + bias + residual) for all tiles and groups first to last (excluded) of GROUP rows.

    As in sparse_conv.spmm where not said. row_at: int64 [groups], byte offset of a group's first row in y. step: bytes
    between its rows. per_class: groups of a class; all of a class have the same entries. start: int64 [classes + 1],
    the first entry of each class. values: address of float32 [groups, entries of the class, GROUP]. bias: float32
    [groups, GROUP].
    """
    for t in range(x_at.shape[0]):
        for o in range(first, last):
            kind = o // per_class
            j, end = start[kind], start[kind + 1]
            weights = values + 4 * GROUP * (start[kind] * per_class + (o - kind * per_class) * (end - j))
            base = x + x_at[t]
            content = zero_group(y_tile)
            while j < end:
                content = add_entry(x_tile, content, weights, base + offset_at(offsets + 4 * j), x_block, x_row)
                weights += 4 * GROUP
                j += 1
            # Indices that the compiler knows: others would put the tuple into memory.
            place = y_at[t] + row_at[o]
            _write(y_tile, content[0], y, place, y_block, y_row, bias[o, 0], residual, positive)
            _write(y_tile, content[1], y, place + step, y_block, y_row, bias[o, 1], residual, positive)
            _write(y_tile, content[2], y, place + 2 * step, y_block, y_row, bias[o, 2], residual, positive)
            _write(y_tile, content[3], y, place + 3 * step, y_block, y_row, bias[o, 3], residual, positive)
