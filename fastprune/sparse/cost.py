"""What a training step costs on one core, dense and sparse: the rule that chooses between the two.

A model, not a timing: the same mask, shapes and instruction set give the same choice on every machine of a kind, and a
run that is repeated computes as before. All constants stand in `CONSTANTS`; bench/bench_sparse.py measures them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastprune.kernels.lanes import BYTES
from fastprune.sparse.conv import Geometry, channels_in_block, tile_bytes, tile_vectors, tiling
from fastprune.sparse.program import Conv, Island, Linear, Norm, Program, islands


@dataclass(frozen=True)
class Constants:
    """Of one core, in nanoseconds.

    dense: for 1,000 multiply-adds of a dense conv in each of its passes. dense_value: for an element of a map in batch
    norm and what belongs to it, both ways. In the sparse engine, value: as dense_value; vector: for a fused
    multiply-add of sixteen images; entry: for an entry of a list in a tile, beside its vectors; row: for a row of a
    tile in a block of channels, loading and storing it; converted: for an element of a value that torch reads or gives,
    both ways.
    """

    dense: float
    dense_value: float
    value: float
    vector: float
    entry: float
    row: float
    converted: float


CONSTANTS = {
    16: Constants(dense=13.8, dense_value=8.0, value=2.5, vector=0.36, entry=0.3, row=40.0, converted=4.0),
    6: Constants(dense=16.5, dense_value=9.0, value=3.0, vector=0.5, entry=0.3, row=30.0, converted=4.0),
}
"""By the number of vectors in a tile, which stands for the instruction set: AVX-512, and AVX2. `converted` was measured
with AVX2 alone, and is on the side of dense."""

SECONDS_TO_START = 30.0
"""What a training must save at least: a process compiles for up to 20 s when it first computes sparsely."""


def estimate(program: Program, keep: Mapping[str, np.ndarray], images: int) -> tuple[float, float]:
    """(sparse, dense): milliseconds of a training step with a batch of `images`, from masks bool [O, KH, KW, I]."""
    k, blocks = CONSTANTS[tile_vectors()], -(-images // 16)
    sparse = dense = 0.0
    for op in islands(program):
        if isinstance(op, Conv | Linear) and op.weight in keep:
            mask = keep[op.weight]
            kept = int(np.count_nonzero(mask))
            g = Geometry.of_op(op)
            passes = 3 if op.x != program.input else 2
            positions = g.outputs[1] * g.outputs[2]
            dense += passes * k.dense * mask.size * positions * images / 1000
            # Entries of a kept weight: on unrolled maps the pairs of positions that it joins, on average.
            share = sum(1 for _ in g.pairs()) / (g.kernel[0] * g.kernel[1]) if g.unrolled else 1.0
            entries, rows, size, tiles = kept * share, mask.shape[0], positions, 1
            if g.unrolled:
                # Tiles are as many blocks of images as registers hold, one position each.
                rows, size, tiles = rows * positions, 1, -(-blocks // tile_vectors())
                read, share = g.inputs[1] * g.inputs[2] * BYTES, share / positions
            else:
                cover = tiling(*g.outputs[1:], tile_vectors())
                tiles = sum(len(at) for _, _, at in cover.pieces) * blocks
                read = tile_bytes(cover, g.kernel, g.stride)
            columns = -(-mask.shape[3] // channels_in_block(kept, mask.shape[0], mask.shape[3], read, share))
            sparse += passes * entries * (size * blocks * k.vector + tiles * k.entry)
            sparse += passes * rows * tiles * columns * k.row
        elif isinstance(op, Norm):
            values = int(np.prod(op.x.shape)) * images
            sparse += values * k.value
            dense += values * k.dense_value
        elif isinstance(op, Island):
            # What it computes costs both the same.
            sparse += sum(int(np.prod(v.shape)) for v in (*op.reads, *op.gives)) * images * k.converted
    return sparse / 1e6, dense / 1e6
