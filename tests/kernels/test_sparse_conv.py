"""spmm and sddmm against sums in float64, and what they may not touch: other rows, other memory."""

import re
import sys
from dataclasses import dataclass

import numba
import numpy as np
import pytest
import torch

from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.sparse_conv import clear, gather, scatter_add, sddmm, spmm, tile
from fastprune.sparse.conv import tile_vectors
from tests.kernels.inputs import INF, NAN, bits

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="no Triton here"),
    pytest.mark.xdist_group("lanes"),  # compiled once, in one process
]

COUNTS = [0, 1, 2, 3, 4, 5, 0, 9]
"""Entries of the rows, in each block of columns."""

# (blocks, rows, columns), step between columns of x and of y: the first two are common shapes, which other tests use.
TILES = {"map": ((1, 4, 4), 1, 1), "unrolled": ((2, 1, 1), 1, 1), "strided": ((1, 3, 2), 2, 3)}
MARGIN = 4096
"""Floats before and after what a kernel may touch."""


@dataclass
class Problem:
    """A matrix of len(COUNTS) rows, two blocks of columns and two tiles; x and y lie in memory that is all NaN."""

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        (self.a, self.r, self.c), x_step, y_step = TILES[self.name]
        self.rows = len(COUNTS)
        # x: 6 channels of planes that hold two tiles one below the other, and the taps around them.
        h, w = 2 * self.r + 2, self.c * x_step + 2
        self.x = torch.full((MARGIN + self.a * 6 * h * w * 16 + MARGIN,), NAN)
        self.x_maps = self.x[MARGIN:-MARGIN].view(self.a, 6, h, w, 16)
        self.x_maps.copy_(torch.randn(self.x_maps.shape, generator=g))
        self.y_shape = (self.a, self.rows, 2 * self.r + 2, self.c * y_step + 3, 16)
        s = [64 * n for n in (6 * h * w, h * w, w, 1)]
        t = [64 * n for n in (int(np.prod(self.y_shape[1:4])), self.y_shape[2] * self.y_shape[3], self.y_shape[3], 1)]
        self.x_tile, self.y_tile = tile(self.a, self.r, self.c, x_step), tile(self.a, self.r, self.c, y_step)
        self.x_steps, self.y_steps = (s[0], s[2]), (t[0], t[2])
        self.x_at = np.array([0, self.r * s[2]])
        self.y_at = np.array([t[2] + t[3], (1 + self.r) * t[2] + t[3]])  # not at the edge of y
        self.row_at = np.arange(self.rows) * t[1]
        ends = np.cumsum(COUNTS * 2)
        self.start = np.concatenate([[0], ends])[np.array([range(self.rows + 1), range(self.rows, 2 * self.rows + 1)])]
        self.entries = int(ends[-1])
        taps = [(c, i, j) for c in range(6) for i in range(3) for j in range(3)]
        self.taps = [taps[k] for k in torch.randint(len(taps), (self.entries,), generator=g)]
        places = [c * s[1] + i * s[2] + j * s[3] for c, i, j in self.taps]
        self.offsets = np.array([*places, *places[-1:] * 3], np.int32)
        self.values = torch.randn(self.entries, generator=g)
        self.x_step, self.y_step = x_step, y_step

    def y(self, fill: float = NAN) -> tuple[torch.Tensor, torch.Tensor]:
        """(memory with margins, the maps in it)."""
        memory = torch.full((MARGIN + int(np.prod(self.y_shape)) + MARGIN,), fill)
        return memory, memory[MARGIN:-MARGIN].view(self.y_shape)

    def tiles_of_y(self, maps: torch.Tensor) -> torch.Tensor:
        """[tiles, rows, A, R, C, 16], a copy."""
        columns = slice(1, 1 + self.c * self.y_step, self.y_step)
        parts = [maps[:, :, 1 + t * self.r : 1 + (t + 1) * self.r, columns] for t in range(2)]
        return torch.stack(parts).transpose(1, 2).clone()

    def inputs(self, entry: int) -> torch.Tensor:
        """What an entry reads, [tiles, A, R, C, 16], float64."""
        c, i, j = self.taps[entry]
        columns = slice(j, j + self.c * self.x_step, self.x_step)
        return torch.stack(
            [self.x_maps[:, c, i + t * self.r : i + (t + 1) * self.r, columns] for t in range(2)]
        ).double()

    def row_entries(self, row: int) -> list[int]:
        return [j for k in range(2) for j in range(self.start[k, row], self.start[k, row + 1])]

    def spmm(self, memory, part=None, add=False, bias=None, residual=0, positive=False) -> None:
        first, last = part or (0, self.rows)
        spmm(
            self.x_tile, self.y_tile, self.x_maps.data_ptr(), memory.data_ptr() + 4 * MARGIN, *self.x_steps,
            *self.y_steps, self.x_at, self.y_at, self.row_at, first, last, self.start, self.offsets.ctypes.data,
            self.values.data_ptr(), add, bias, residual, positive,
        )  # fmt: skip

    def sddmm(self, g, gradients, part=None) -> None:
        first, last = part or (0, self.rows)
        sddmm(
            self.x_tile, self.y_tile, self.x_maps.data_ptr(), g.data_ptr() + 4 * MARGIN, *self.x_steps, *self.y_steps,
            self.x_at, self.y_at, self.row_at, first, last, self.start, self.offsets.ctypes.data, gradients.data_ptr(),
        )  # fmt: skip

    def product(self) -> torch.Tensor:
        rows = torch.zeros(2, self.rows, self.a, self.r, self.c, 16, dtype=torch.float64)
        for o in range(self.rows):
            for j in self.row_entries(o):
                rows[:, o] += self.values[j].double() * self.inputs(j)
        return rows


each = pytest.mark.parametrize("name", TILES)


def assert_close(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Fused sums of at most 18 terms of size 4: each rounds by 2^-24 of a partial sum."""
    assert ((got.double() - exact).abs().max() / exact.abs().max()) < 2e-6


@each
def test_a_product_writes_its_tiles_and_nothing_else(name):
    p = Problem(name)
    memory, maps = p.y()
    p.spmm(memory)
    assert_close(p.tiles_of_y(maps), p.product())
    tiles = p.tiles_of_y(torch.arange(maps.numel()).view(maps.shape)).flatten().long()
    maps.view(-1)[tiles] = NAN
    assert memory.isnan().all()


@each
def test_a_product_is_added(name):
    p = Problem(name)
    memory, maps = p.y(3.0)
    p.spmm(memory, add=True)
    assert_close(p.tiles_of_y(maps), p.product() + 3.0)


@each
def test_rows_in_parts_give_the_same_bits(name):
    p = Problem(name)
    (whole, _), (parts, _) = p.y(), p.y()
    p.spmm(whole)
    for part in ((5, 8), (0, 1), (1, 1), (1, 5)):
        p.spmm(parts, part)
    assert torch.equal(bits(whole), bits(parts))
    g, _ = p.y(0.0)
    g[MARGIN:-MARGIN] = torch.randn(len(g) - 2 * MARGIN, generator=torch.Generator().manual_seed(3))
    one, other = (torch.zeros(p.entries + 3) for _ in range(2))
    p.sddmm(g, one)
    for part in ((5, 8), (0, 1), (1, 1), (1, 5)):
        p.sddmm(g, other, part)
    assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("positive", [False, True], ids=["as is", "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", ["map", "unrolled"])
def test_bias_residual_and_relu_end_a_product(name, with_residual, positive):
    p = Problem(name)
    (memory, maps), (extra, extra_maps) = p.y(), p.y()
    extra_maps.copy_(torch.randn(extra_maps.shape, generator=torch.Generator().manual_seed(4)))
    bias = np.linspace(-2, 2, p.rows, dtype=np.float32)
    address = extra.data_ptr() + 4 * MARGIN if with_residual else 0
    p.spmm(memory, bias=bias, residual=address, positive=positive)
    exact = p.product() + torch.from_numpy(bias).double()[None, :, None, None, None, None]
    exact = exact + p.tiles_of_y(extra_maps).double() if with_residual else exact
    exact = exact.relu() if positive else exact
    assert_close(p.tiles_of_y(maps), exact)


def test_nan_and_inf_reach_what_reads_them_and_nothing_else():
    p = Problem("map")
    for lane, value in enumerate((NAN, INF, -INF)):
        p.x_maps[0, :, :, :, lane] = value
    memory, maps = p.y()
    p.spmm(memory, bias=np.zeros(p.rows, np.float32), positive=True)
    rows = p.tiles_of_y(maps)
    kept = [o for o in range(p.rows) if p.row_entries(o)]
    assert rows[:, kept, ..., 0].isnan().all()
    for lane in (1, 2):  # inf where all weights of a row agree in sign, else NaN, which max(y, 0) leaves
        assert not rows[:, kept, ..., lane].isfinite().logical_and(rows[:, kept, ..., lane] != 0).any()
    assert rows[..., 3:].isfinite().all()
    assert not rows[:, [o for o in range(p.rows) if o not in kept]].any()


@each
def test_gradients_of_entries(name):
    p = Problem(name)
    memory, maps = p.y()
    maps.copy_(torch.randn(maps.shape, generator=torch.Generator().manual_seed(5)))
    gradients = torch.full((p.entries + 3,), 2.0)
    p.sddmm(memory, gradients)
    tiles = p.tiles_of_y(maps).double()
    rows = {j: o for o in range(p.rows) for j in p.row_entries(o)}
    exact = torch.tensor([2.0 + (p.inputs(j) * tiles[:, rows[j]]).sum().item() for j in range(p.entries)])
    assert_close(gradients[: p.entries], exact.double())
    assert gradients[p.entries :].tolist() == [2.0] * 3


@each
@pytest.mark.parametrize("row", range(len(COUNTS)), ids=[f"{n} entries, row {o}" for o, n in enumerate(COUNTS)])
def test_a_row_leaves_the_gradients_of_others_alone(name, row):
    """Another thread writes them at the same time. A NaN with a payload shows any write, even of the same number."""
    p = Problem(name)
    memory, maps = p.y()
    maps.fill_(1.0)
    gradients = torch.ones(p.entries + 3)
    raw = gradients.view(torch.int32)
    mine = p.row_entries(row)
    others = [j for j in range(p.entries + 3) if j not in mine]
    raw[others] = 0x7FA12345  # signalling: arithmetic would change it
    p.sddmm(memory, gradients, (row, row + 1))
    assert (raw[others] == 0x7FA12345).all()
    assert gradients[mine].isfinite().all()


def test_the_inner_loop_is_sixteen_fused_multiply_adds_from_memory(monkeypatch):
    if tile_vectors() != 16:
        pytest.skip("a machine without AVX-512 has other tiles")
    fresh = numba.njit(spmm.py_func, nogil=True)  # of what came from a cache on disk there is no code to read
    monkeypatch.setattr(sys.modules[__name__], "spmm", fresh)
    p = Problem("map")
    memory, _ = p.y()
    p.spmm(memory)
    (code,) = fresh.inspect_asm().values()
    # Pieces between labels and jumps, those with 16 products: an entry.
    pieces = [piece for piece in re.split(r"\n\S+:\n|\tj\w+\t", code) if len(re.findall(r"\tvfmadd", piece)) == 16]
    assert pieces
    for piece in pieces:
        assert len(re.findall(r"\tvfmadd\w+ps\t[^\n]*\(%r\w+[^\n]*%zmm", piece)) == 16
        assert not re.search(r"\tvmov\w+\t%zmm", piece)  # nothing is spilled


def test_entries_of_some_rows_are_gathered_and_scattered():
    """Rows 0 and 1 of three rows in two blocks of columns: entries 0, 1 and 3."""
    start, index = np.array([[0, 1, 2, 3], [3, 3, 4, 5]]), np.array([4, 0, 1, 4, 3], np.int32)
    out = np.full(5, np.nan, np.float32)
    gather(np.arange(5, dtype=np.float32), index, out, start, 0, 2)
    np.testing.assert_array_equal(out, [4, 0, np.nan, 4, np.nan])
    sums = np.zeros(5, np.float32)
    scatter_add(np.array([1, 2, np.nan, 4, np.nan, np.nan], np.float32), index, sums, start, 0, 2)
    assert sums.tolist() == [2, 0, 0, 0, 5]
    clear(out, start, 0, 2)
    np.testing.assert_array_equal(out, [0, 0, np.nan, 0, np.nan])
    for first in range(4):
        clear(out[:0], start, first, first)  # no rows
