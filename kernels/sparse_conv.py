"""Products of a sparse matrix with tiles of images, kept in registers: what sparse convolutions consist of.

A convolution with a mask is, for a tile of output positions, a matrix with one row for each output channel and one
entry for each kept weight; an entry says from where, relative to the tile, its input vectors come. `spmm` multiplies by
such a matrix: forward, and, with the transposed lists, the gradient of the input. `sddmm` gives the gradient of the
entries: a dot product of two tiles for each.

A tile is A blocks of sixteen images x R rows x C columns: A * R * C vectors of sixteen images, all in registers while a
row's entries are walked. One entry costs one broadcast and A * R * C fused multiply-adds whose other operand is in
memory, and no store. It follows SkimCaffe (Park et al., 2017), which keeps output rows of one image in registers, and
SparseProp (Nikdan et al., 2023), which has images innermost, but stores the output after each entry.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import (
    BYTES,
    LANES,
    VECTOR,
    broadcast,
    lanes,
    multiply_add,
    number_at,
    offset_at,
    pointer,
    sum_of_four,
)

Tile = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def tile(blocks: int, rows: int, columns: int, step: int = 1) -> Tile:
    """A tile of blocks x rows x columns vectors, whose columns lie `step` vectors apart."""
    # numba compiles a function anew for tuples of another length: the tile's shape is a type, known to the compiler.
    return (0,) * blocks, (0,) * rows, (0,) * columns, (0,) * step


def addresses_of(b: Any, shape: Any, base: Any, block: Any, row: Any) -> Any:
    """LLVM code: pointers to the vectors of a tile, block by block, row by row."""
    blocks, rows, columns, step = (part.count for part in shape.types)
    for i in range(blocks):
        for r in range(rows):
            at = base
            # Constants times a loop's invariants: LLVM computes these sums once, outside the loop over entries.
            if i or r:
                at = b.add(
                    at, b.add(b.mul(block, ir.Constant(ir.IntType(64), i)), b.mul(row, ir.Constant(ir.IntType(64), r)))
                )
            for c in range(columns):
                yield pointer(b, b.add(at, ir.Constant(ir.IntType(64), BYTES * step * c)), VECTOR)


def _vectors(shape: Any) -> Any:
    """numba's type of a tile's content."""
    blocks, rows, columns, _ = (part.count for part in shape.types)
    return types.UniTuple(lanes, blocks * rows * columns)


@intrinsic
def zero_tile(context, shape):
    """A tile of zeros."""
    content = _vectors(shape)

    def code(_, b, sig, args):
        return cgutils.pack_array(b, [ir.Constant(VECTOR, [0.0] * LANES)] * content.count)

    return content(shape), code


@intrinsic
def load_tile(context, shape, base, block, row):
    """The tile at `base`. block, row: bytes between its blocks of images and its rows."""

    def code(_, b, sig, args):
        return cgutils.pack_array(b, [b.load(p, align=4) for p in addresses_of(b, shape, *args[1:])])

    return _vectors(shape)(shape, types.int64, types.int64, types.int64), code


@intrinsic
def store_tile(context, shape, content, base, block, row):
    """Writes a tile to `base`."""

    def code(target, b, sig, args):
        for value, p in zip(cgutils.unpack_tuple(b, args[1]), addresses_of(b, shape, *args[2:]), strict=True):
            b.store(value, p, align=4)
        return target.get_dummy_value()

    return types.void(shape, content, types.int64, types.int64, types.int64), code


@intrinsic
def add_scaled(context, shape, content, factor, base, block, row):
    """content + factor * the tile at `base`."""

    def code(_, b, sig, args):
        factor = broadcast(b, args[2])
        tiles = zip(cgutils.unpack_tuple(b, args[1]), addresses_of(b, shape, *args[3:]), strict=True)
        return cgutils.pack_array(b, [multiply_add(b, factor, b.load(p, align=4), value) for value, p in tiles])

    return content(shape, content, types.float32, types.int64, types.int64, types.int64), code


@intrinsic
def finish(context, shape, content, bias, positive):
    """relu(content + bias) if `positive`, else content + bias. NaN stays NaN."""

    def code(_, b, sig, args):
        bias, zero = broadcast(b, args[2]), ir.Constant(VECTOR, [0.0] * LANES)
        values = []
        for value in cgutils.unpack_tuple(b, args[1]):
            value = b.fadd(value, bias)
            negative = b.and_(broadcast(b, args[3]), b.fcmp_ordered("<", value, zero))
            values.append(b.select(negative, zero, value))
        return cgutils.pack_array(b, values)

    return content(shape, content, types.float32, types.boolean), code


@intrinsic
def _add_four_dots(context, shape, content, base, block, row, offsets, into, count):
    """Adds to each of the first `count` (1 to 4) float32 at `into` the dot product of `content` with the tile at `base`
    plus the int32 offset at the same place of `offsets`. Four of both are read."""
    # Two sums for each product: with four entries that makes eight independent chains, which hide the latency.
    chains = 2

    def code(target, b, sig, args):
        _, content, base, block, row, offsets, into, count = args
        values = cgutils.unpack_tuple(b, content)
        sums = []
        for k in range(4):
            at = b.add(offsets, ir.Constant(ir.IntType(64), 4 * k))
            offset = b.sext(b.load(pointer(b, at, ir.IntType(32)), align=4), ir.IntType(64))
            sums.append((b.add(base, offset), [None] * chains))
        places = [list(addresses_of(b, shape, start, block, row)) for start, _ in sums]
        for i, value in enumerate(values):
            for (_, parts), place in zip(sums, places, strict=True):
                other, j = b.load(place[i], align=4), i % chains
                parts[j] = b.fmul(value, other) if parts[j] is None else multiply_add(b, value, other, parts[j])
        dots = [b.fadd(*parts) if parts[1] is not None else parts[0] for _, parts in sums]
        four, wide, bits = (ir.VectorType(kind, 4) for kind in (ir.FloatType(), ir.IntType(64), ir.IntType(1)))
        inside = b.icmp_signed("<", ir.Constant(wide, [0, 1, 2, 3]), broadcast(b, count, 4))
        place = pointer(b, into, four)
        new = b.fadd(b.load(place, align=4), sum_of_four(b, dots))
        # Results beyond the row's end belong to the next row, which another thread may be writing.
        write = cgutils.get_or_insert_function(
            b.module,
            ir.FunctionType(ir.VoidType(), [four, four.as_pointer(), ir.IntType(32), bits]),
            "llvm.masked.store.v4f32.p0",
        )
        b.call(write, [new, place, ir.Constant(ir.IntType(32), 4), inside])
        return target.get_dummy_value()

    i = types.int64
    return types.void(shape, content, i, i, i, i, i, i), code


@compiled
def spmm(
    x_tile, y_tile, x, y, x_block, x_row, y_block, y_row, x_at, y_at, row_at, first, last, start, offsets, values, add,
    bias, residual, positive,
):  # fmt: skip
    """y = matrix x x for all tiles, rows first to last (excluded); y += with `add`.

    x_tile, y_tile: `tile`s of equal size. x, y: addresses. x_block, x_row, y_block, y_row: bytes between image blocks
    and between rows of positions. x_at, y_at: int64 [tiles], byte offsets of the tiles. row_at: int64 [rows], byte
    offset of each row in y. start: int64 [blocks of columns, rows + 1], first entry of each row in each block.
    offsets: address of int32 [entries], bytes from a tile's place in x. values: address of float32 [entries].
    bias: None, or float32 [rows], then y = product + bias, + what lies at the address `residual` in the layout of y
    (0: nothing), and max(y, 0) if `positive`.
    """
    for t in range(x_at.shape[0]):
        base = x + x_at[t]
        for k in range(start.shape[0]):
            for o in range(first, last):
                j, end = start[k, o], start[k, o + 1]
                ends = bias is not None and k == start.shape[0] - 1
                if j == end and not ends and (k > 0 or add):
                    continue
                place = y + y_at[t] + row_at[o]
                content = zero_tile(y_tile) if k == 0 and not add else load_tile(y_tile, place, y_block, y_row)
                while j < end:
                    content = add_scaled(
                        x_tile, content, number_at(values + 4 * j), base + offset_at(offsets + 4 * j), x_block, x_row
                    )
                    j += 1
                if bias is not None and ends:
                    if residual:
                        content = add_scaled(
                            y_tile, content, np.float32(1), residual + y_at[t] + row_at[o], y_block, y_row
                        )
                    content = finish(y_tile, content, bias[o], positive)
                store_tile(y_tile, content, place, y_block, y_row)


@compiled
def sddmm(
    x_tile, g_tile, x, g, x_block, x_row, g_block, g_row, x_at, g_at, row_at, first, last, start, offsets, gradients
):  # fmt: skip
    """Adds to the gradient of each entry the dot product of its input tile and its row's tile of `g`, over all tiles.

    As in `spmm`, with g (in the layout of y) read. gradients: address of float32 [entries + 3], of which the entries of
    rows first to last are added to; offsets: int32 [entries + 3], of which the last three are any valid offsets.
    """
    for t in range(x_at.shape[0]):
        base = x + x_at[t]
        for k in range(start.shape[0]):
            for o in range(first, last):
                j, end = start[k, o], start[k, o + 1]
                if j == end:
                    continue
                content = load_tile(g_tile, g + g_at[t] + row_at[o], g_block, g_row)
                while j < end:
                    _add_four_dots(
                        x_tile, content, base, x_block, x_row, offsets + 4 * j, gradients + 4 * j, min(end - j, 4)
                    )
                    j += 4


@compiled
def gather(values, index, out, start, first, last):
    """out[i] = values[index[i]] for the entries i of rows first to last: float32, int32."""
    for k in range(start.shape[0]):
        for i in range(start[k, first], start[k, last]):
            out[i] = values[index[i]]


@compiled
def scatter_add(values, index, out, start, first, last):
    """out[index[i]] += values[i] for the entries i of rows first to last, in order: float32, int32."""
    for k in range(start.shape[0]):
        for i in range(start[k, first], start[k, last]):
            out[index[i]] += values[i]


@compiled
def clear(values, start, first, last):
    """values[i] = 0 for the entries i of rows first to last: float32."""
    for k in range(start.shape[0]):
        values[start[k, first] : start[k, last]] = 0
