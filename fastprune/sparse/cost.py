"""What a training step costs on one core, dense and sparse: the rule that chooses between the two.

A model, not a timing: the same mask, shapes and instruction set give the same choice on every machine of a kind, and a
run that is repeated computes as before. All constants stand in `CONSTANTS`; bench/bench_sparse.py measures them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastprune.sparse.conv import Geometry, tile_vectors, tiling
from fastprune.sparse.program import Conv, Linear, Norm, Program


@dataclass(frozen=True)
class Constants:
    """Of one core, in nanoseconds.

    dense: for 1,000 multiply-adds of a dense conv, forward and both gradients. vector: for one fused multiply-add of
    sixteen images, with its share of loads, forward and gradient of the input; weight_vector: of the gradient of
    weights. entry: for an entry of a list and a tile, beside its vectors; row: for a row and a tile, loading and
    storing it. value: for an element of a map in batch norm and what belongs to it, both ways; dense_value: in torch.
    """

    dense: float
    vector: float
    weight_vector: float
    entry: float
    row: float
    value: float
    dense_value: float


CONSTANTS = {
    16: Constants(dense=10.0, vector=0.30, weight_vector=0.42, entry=1.0, row=12.0, value=0.6, dense_value=1.2),
    6: Constants(dense=20.0, vector=0.60, weight_vector=0.8, entry=1.0, row=12.0, value=0.6, dense_value=1.2),
}
"""By the number of vectors in a tile, which stands for the instruction set: AVX-512, and AVX2."""

SECONDS_TO_START = 30.0
"""What a training must save at least: a process compiles for up to 20 s when it first computes sparsely."""


def estimate(program: Program, keep: Mapping[str, np.ndarray], images: int) -> tuple[float, float]:
    """(sparse, dense): milliseconds of a training step with a batch of `images`, from masks bool [O, KH, KW, I]."""
    k, blocks = CONSTANTS[tile_vectors()], -(-images // 16)
    sparse = dense = 0.0
    for op in program.ops:
        if isinstance(op, Conv | Linear) and op.weight in keep:
            mask = keep[op.weight]
            kept = int(np.count_nonzero(mask))
            shape: tuple[int, int, int] = (*op.x.shape, 1, 1)[:3]  # type: ignore[assignment]
            if isinstance(op, Conv):
                g = Geometry.of(shape, op.y.shape[0], op.kernel, op.stride, op.padding)
            else:
                g = Geometry.of(shape, op.y.shape[0], (1, 1), (1, 1), (0, 0))
            passes = 3 if op.x != program.input else 2
            positions = g.outputs[1] * g.outputs[2]
            dense += passes * k.dense * mask.size * positions * images / 1000
            tiles, size = 1, 1
            if not g.unrolled:
                cover = tiling(*g.outputs[1:], tile_vectors())
                tiles, size = sum(len(at) for _, _, at in cover.pieces), positions
            entries = kept * _share(g)
            vectors = entries * size * blocks
            per_entry = entries * tiles * max(1, blocks // max(1, tile_vectors() // size))
            rows = mask.shape[0] * (positions if g.unrolled else tiles) * blocks
            sparse += (passes - 1) * vectors * k.vector + vectors * k.weight_vector
            sparse += passes * (per_entry * k.entry + rows * k.row)
        elif isinstance(op, Norm):
            values = int(np.prod(op.x.shape)) * images
            sparse += values * k.value
            dense += values * k.dense_value
    return sparse / 1e6, dense / 1e6


def _share(g: Geometry) -> float:
    """Entries of a kept weight: 1, or on unrolled maps the pairs of positions that it joins, on average."""
    if not g.unrolled:
        return 1.0
    pairs = 0
    for axis in range(2):
        n, m, s, k, p = g.inputs[1 + axis], g.outputs[1 + axis], g.stride[axis], g.kernel[axis], g.padding[axis]
        count = sum(0 <= o * s + i - p < n for o in range(m) for i in range(k))
        pairs = count if axis == 0 else pairs * count
    return pairs / (g.kernel[0] * g.kernel[1])
