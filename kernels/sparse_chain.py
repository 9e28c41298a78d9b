"""Several sparse products, one tile after another: a tile's results are read again while they are in the cache.

A convolution of one tap at stride 1 needs of its input the same tile as of its output. It can follow the convolution
before it tile by tile, instead of when all tiles are done; what it reads is then in the second-level cache.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import number_at, offset_at, pointer
from fastprune.kernels.sparse_conv import add_scaled, finish, load_tile, store_tile, zero_tile

COLUMNS = 15
"""Of the table that `chain` takes."""


@intrinsic
def _whole_at(context, address):
    """The int64 at `address`."""

    def code(_, b, sig, args):
        return b.load(pointer(b, args[0], ir.IntType(64)), align=8)

    return types.int64(types.int64), code


@compiled
def _rows(
    x_tile, y_tile, base, place, residual, x_block, x_row, y_block, y_row, channel, first, last, rows, start, blocks,
    offsets, values, bias, positive,
):  # fmt: skip
    """One tile of spmm, with a bias. place, residual: addresses of the tile of the first row; channel: to the next."""
    # What is added comes first, so that the result may take its place.
    for k in range(blocks):
        starts = start + 8 * k * (rows + 1)
        for o in range(first, last):
            j, end = _whole_at(starts + 8 * o), _whole_at(starts + 8 * o + 8)
            ends = k == blocks - 1
            if j == end and not ends and k > 0:
                continue
            at = place + o * channel
            if k > 0:
                content = load_tile(y_tile, at, y_block, y_row)
            elif residual:
                content = load_tile(y_tile, residual + o * channel, y_block, y_row)
            else:
                content = zero_tile(y_tile)
            while j < end:
                content = add_scaled(
                    x_tile, content, number_at(values + 4 * j), base + offset_at(offsets + 4 * j), x_block, x_row
                )
                j += 1
            if ends:
                content = finish(y_tile, content, number_at(bias + 4 * o), positive)
            store_tile(y_tile, content, at, y_block, y_row)


@compiled
def chain(x_tile, y_tile, table, x_at, y_at, first_tile, last_tile, first, last):
    """relu(product + bias + residual) of each line of the table, for tiles first_tile to last_tile (excluded).

    Rows first to last (excluded); all for last = -1, and a chain of several lines needs all. table: int64 [lines,
    COLUMNS], of each: addresses of x and y and of the residual (or 0), bytes between blocks of images and rows of
    positions in x and in y, bytes between channels of y, number of rows, address of `start` int64 [blocks, rows + 1],
    blocks, addresses of offsets, values and bias, 1 for a ReLU, 2 more where inputs lie as x_tile says, else as y_tile.
    x_at, y_at: int64 [lines, tiles], byte offsets. y may be the residual. Otherwise as sparse_conv.spmm.
    """
    for t in range(first_tile, last_tile):
        for i in range(table.shape[0]):
            x, y, residual = table[i, 0], table[i, 1], table[i, 2]
            x_block, x_row, y_block, y_row, channel = table[i, 3], table[i, 4], table[i, 5], table[i, 6], table[i, 7]
            rows, start, blocks, offsets = table[i, 8], table[i, 9], table[i, 10], table[i, 11]
            values, bias, kind = table[i, 12], table[i, 13], table[i, 14]
            end = rows if last < 0 else last
            add = residual + y_at[i, t] if residual else 0
            if kind & 2:
                _rows(
                    x_tile, y_tile, x + x_at[i, t], y + y_at[i, t], add, x_block, x_row, y_block, y_row, channel, first,
                    end, rows, start, blocks, offsets, values, bias, kind & 1 == 1,
                )  # fmt: skip
            else:
                _rows(
                    y_tile, y_tile, x + x_at[i, t], y + y_at[i, t], add, x_block, x_row, y_block, y_row, channel, first,
                    end, rows, start, blocks, offsets, values, bias, kind & 1 == 1,
                )  # fmt: skip
