"""Convolutions over kept weights against torch's in float64, for all geometries; and the memory that they touch."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.kernels.lanes import blocks_of, from_lanes, to_lanes
from fastprune.sparse import conv
from fastprune.sparse.conv import Geometry, Lists, Plane, Product, SparseConv, tile_vectors, tiling

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

pytestmark = pytest.mark.xdist_group("lanes")  # compiled once, in one process

LIMIT = 4e-6
"""Allowed error, of the maximum."""

MARGIN = 4096
GUARD = 7.0


@dataclass(frozen=True)
class Case:
    """A convolution: batch, channels in and out, map, kernel, stride, padding, and a mask's kind or density."""

    batch: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    mask: str | float = 0.4
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        return Geometry.of((self.inputs, *self.size), self.outputs, self.kernel, self.stride, self.padding)

    def __str__(self) -> str:
        k, s, p = ("x".join(map(str, pair)) for pair in (self.kernel, self.stride, self.padding))
        return f"{self.batch} of {self.inputs}x{self.size[0]}x{self.size[1]} kernel {k} stride {s} pad {p} {self.mask}"


def mask_of(case: Case, g: torch.Generator) -> Tensor:
    """bool [O, I, KH, KW]."""
    shape = (case.outputs, case.inputs, *case.kernel)
    if isinstance(case.mask, float):
        return torch.rand(shape, generator=g) < case.mask
    mask = torch.rand(shape, generator=g) < 0.5
    if case.mask == "one weight":
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[torch.randint(mask.numel(), (1,), generator=g)] = True
    elif case.mask == "empty rows":
        mask[::2] = False
    elif case.mask == "empty columns":
        mask[:, ::2] = False
    elif case.mask == "one tap":
        mask[:, :, :-1] = False
        mask[:, :, :, :-1] = False
    return mask


class Guarded:
    """A plane of images, filled, whose border is 0, within memory that is `around`."""

    def __init__(self, plane: Plane, blocks: int, images: Tensor | None, fill: float = 0.0, around: float = np.nan):
        shape = plane.shape(blocks)
        self.plane, self.around = plane, around
        self.memory = torch.full((int(np.prod(shape)) + 2 * MARGIN,), around)
        self.maps = self.memory[MARGIN:-MARGIN].view(shape)
        self.maps.fill_(0.0)
        b = plane.border
        self.inner = self.maps[:, :, b : b + plane.height, b : b + plane.width]
        self.inner.fill_(fill)
        if images is not None:
            to_lanes(images, self.inner)

    @property
    def address(self) -> int:
        return self.maps.data_ptr()

    def check_outside(self) -> None:
        """Border and surroundings are as they were."""
        maps = self.maps.clone()
        b = self.plane.border
        maps[:, :, b : b + self.plane.height, b : b + self.plane.width] = 0
        assert not maps.any(), "the border was written"
        outside = torch.cat([self.memory[:MARGIN], self.memory[-MARGIN:]])
        assert torch.equal(outside.isnan(), torch.full_like(outside, self.around).isnan())


def ordered(values: Tensor, lists: Lists) -> Tensor:
    return values if lists.index is None else values[torch.from_numpy(lists.index).long()]


def parts_of(product: Product, number: int) -> list[tuple[int, int]]:
    bounds = product.lists.split(number)
    assert (bounds[0], bounds[-1]) == (0, product.lists.rows)
    assert bounds == sorted(bounds)
    return list(pairwise(bounds))


class Computed:
    """All three passes of a case, and what torch gives in float64. add: dx is added to ones. borders: more of them."""

    def __init__(self, case: Case, parts: int = 1, add: bool = False, borders: int = 0) -> None:
        g = torch.Generator().manual_seed(case.seed)
        geometry, blocks = case.geometry, blocks_of(case.batch)
        self.geometry = geometry
        mask = mask_of(case, g)
        self.weight = torch.randn(mask.shape, generator=g) * mask
        self.images = torch.randn(case.batch, *geometry.inputs, generator=g)
        self.gradient = torch.randn(case.batch, *geometry.outputs, generator=g)
        keep = mask.permute(0, 2, 3, 1).contiguous()
        values = self.weight.permute(0, 2, 3, 1)[keep].contiguous()
        planes = [
            Plane(*geometry.inputs, geometry.border + borders), Plane(*geometry.outputs, borders),
            Plane(*geometry.outputs, geometry.gradient_border + borders), Plane(*geometry.inputs, borders),
        ]  # fmt: skip
        self.conv = SparseConv(keep.numpy(), geometry, *planes)
        x = Guarded(planes[0], blocks, self.images)
        y = Guarded(planes[1], blocks, None, np.nan)
        dy = Guarded(planes[2], blocks, self.gradient)
        dx = Guarded(planes[3], blocks, None, 1.0 if add else np.nan)

        ahead = self.conv.ahead
        v = ordered(values, ahead.lists)
        for part in parts_of(ahead, parts):
            ahead.multiply(x.address, y.address, v.data_ptr(), blocks, part)
        for product in self.conv.back:
            v = ordered(values, product.lists)
            for part in parts_of(product, parts):
                product.multiply(dy.address, dx.address, v.data_ptr(), blocks, part, add)
        sums = torch.full((ahead.lists.entries + 3,), GUARD)
        sums[: ahead.lists.entries] = 0
        weight_pass = self.conv.weight_pass
        assert weight_pass is not None
        for part in parts_of(weight_pass, parts):
            weight_pass.correlate(x.address, dy.address, sums.data_ptr(), blocks, part)
        assert sums[ahead.lists.entries :].tolist() == [GUARD] * 3
        sums = sums[: ahead.lists.entries]
        if ahead.lists.index is None:
            dw = sums.clone()
        else:
            dw = torch.zeros(self.conv.kept).index_add_(0, torch.from_numpy(ahead.lists.index).long(), sums)
        for guarded in (x, y, dy, dx):
            guarded.check_outside()
        self.results = [from_lanes(y.inner, case.batch), from_lanes(dx.inner, case.batch), dw]
        self._keep, self._add, self._case = keep, add, case

    def exact(self, of: Callable[[Tensor], Tensor] = Tensor.double) -> list[Tensor]:
        x, w, g = (of(t.double()).requires_grad_() for t in (self.images, self.weight, self.gradient))
        y = F.conv2d(x, w, stride=self._case.stride, padding=self._case.padding)
        dx, dw = torch.autograd.grad(y, (x, w), g)
        return [y.detach(), dx + float(self._add), dw.permute(0, 2, 3, 1)[self._keep]]

    def check(self) -> None:
        every = zip(("output", "dx", "dw"), self.results, self.exact(), self.exact(Tensor.abs), strict=True)
        for name, got, exact, terms in every:
            assert got.shape == exact.shape, name
            if got.numel():
                error = (got.double() - exact).abs().max().item()
                # Of few sums all may be small by cancellation, and no larger one be there to measure errors by.
                few = torch.finfo(torch.float32).eps * terms.max().item() if got.numel() < 10 else 0.0
                assert error <= max(LIMIT * exact.abs().max().item(), few), (name, error)


# On AVX-512, the tiles of these have 4 x 4 positions, or one where maps are unrolled: few kernels to compile.
CASES = [
    Case(17, 5, 7, (4, 4)),
    Case(5, 16, 8, (8, 8), mask=1.0),
    Case(1, 3, 4, (8, 4), (3, 1), padding=(1, 0)),
    Case(33, 4, 6, (8, 8), (1, 1), padding=(0, 0)),
    Case(16, 3, 8, (4, 8), (7, 7), padding=(3, 3), mask=0.8),
    Case(17, 6, 5, (8, 8), stride=(2, 2)),
    Case(16, 6, 5, (8, 8), (1, 1), (2, 2), (0, 0)),
    Case(16, 3, 5, (8, 8), (7, 7), (2, 2), (3, 3)),
    Case(5, 6, 5, (8, 4), stride=(2, 1)),
    Case(33, 7, 6, (2, 2)),
    Case(100, 9, 8, (1, 1)),
    Case(16, 9, 8, (1, 1), (1, 1), padding=(0, 0)),
    Case(17, 5, 4, (1, 3), (3, 3)),
    Case(16, 5, 6, (4, 4), stride=(2, 2)),
    Case(33, 5, 6, (3, 3), stride=(2, 2)),
    *[Case(17, 6, 9, (4, 4), mask=kind) for kind in (0.0, "one weight", "empty rows", "empty columns", "one tap")],
    *[Case(17, 6, 9, (2, 2), mask=kind) for kind in (0.0, "one weight", "empty rows", "empty columns", 1.0)],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_three_passes_are_torchs(case):
    Computed(case).check()


ADDED = [Case(17, 5, 7, (4, 4)), Case(17, 6, 5, (8, 8), stride=(2, 2)), Case(33, 7, 6, (2, 2))]


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_the_gradient_of_the_input_is_added(case):
    Computed(case, add=True).check()


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_parts_give_the_same_bits(case):
    one = Computed(case).results
    for parts in (2, 3, 50):
        for got, expected in zip(Computed(case, parts).results, one, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_planes_may_have_wider_borders(case):
    """Another operation that reads the value may need them."""
    wide = Computed(case, borders=2)
    for got, expected in zip(wide.results, Computed(case).results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_blocks_of_columns(case, monkeypatch):
    """Small layers have one; with little room a row is summed in several."""
    monkeypatch.setattr(conv, "_TILE_BYTES", 1)
    monkeypatch.setattr(conv, "_ENTRIES", 3)
    computed = Computed(case)
    assert len(computed.conv.ahead.lists.start) > 1
    assert any(len(p.lists.start) > 1 for p in computed.conv.back)
    computed.check()
    for got, expected in zip(Computed(case, 3).results, computed.results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("case", [Case(17, 5, 7, (4, 4)), Case(17, 6, 5, (2, 2))], ids=str)
def test_bias_residual_and_relu(case):
    computed = Computed(case)
    geometry, blocks = computed.geometry, blocks_of(case.batch)
    g = torch.Generator().manual_seed(9)
    bias, residual = torch.randn(case.outputs, generator=g), torch.randn(case.batch, *geometry.outputs, generator=g)
    keep = computed._keep
    x = Guarded(Plane(*geometry.inputs, geometry.border), blocks, computed.images)
    y, other = (Guarded(Plane(*geometry.outputs), blocks, images, np.nan) for images in (None, residual))
    product = computed.conv.ahead
    v = ordered(computed.weight.permute(0, 2, 3, 1)[keep].contiguous(), product.lists)
    rows = np.repeat(bias.numpy(), product.lists.rows // case.outputs)
    for part in parts_of(product, 3):
        product.multiply(
            x.address, y.address, v.data_ptr(), blocks, part, bias=rows, residual=other.address, positive=True
        )
    exact = F.conv2d(computed.images.double(), computed.weight.double(), bias.double(), case.stride, case.padding)
    exact = (exact + residual.double()).relu()
    assert (from_lanes(y.inner, case.batch).double() - exact).abs().max() <= LIMIT * exact.abs().max()
    y.check_outside()


def cases(sizes, batches, kernels, paddings, strides):
    """Any case that has an output."""

    @st.composite
    def drawn(draw):
        kernel, size = draw(st.sampled_from(kernels)), draw(st.tuples(sizes, sizes))
        # torch refuses a kernel larger than the padded map.
        padding = tuple(max(draw(paddings), -((n - k) // 2)) for n, k in zip(size, kernel, strict=True))
        mask = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0, "one weight", "empty rows", "empty columns"]))
        return Case(
            draw(st.sampled_from(batches)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), size, kernel,
            draw(st.sampled_from(strides)), padding, mask, draw(st.integers(0, 2**31)),
        )  # fmt: skip

    return drawn()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    case=cases(st.sampled_from([1, 2]), [1, 5, 16, 17], [(1, 1), (3, 3), (3, 1), (7, 7)], st.just(0), [(1, 1), (2, 2)]),
    add=st.booleans(),
    parts=st.integers(1, 3),
)
def test_small_maps(case, add, parts):
    Computed(case, parts, add).check()


@pytest.mark.slow
@pytest.mark.timeout(1500)  # each new tile compiles for seconds
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    case=cases(
        st.integers(1, 10), [1, 5, 16, 17, 33, 100], [(1, 1), (3, 3), (3, 1), (7, 7)], st.integers(0, 3),
        [(1, 1), (2, 2), (2, 1)],
    ),
    add=st.booleans(),
    parts=st.integers(1, 3),
)  # fmt: skip
def test_any_convolution(case, add, parts):
    Computed(case, parts, add).check()


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(5, 8, 8, (56, 56), mask=0.1), Case(16, 3, 8, (64, 64), (7, 7), (2, 2), (3, 3))])
def test_large_maps(case):
    Computed(case, 2).check()


# Lists


def test_lists_of_a_small_mask():
    """Two filters on two channels of 5 x 5 maps, by hand."""
    keep = np.zeros((2, 3, 3, 2), bool)
    keep[0, 0, 0, 1] = keep[0, 1, 1, 0] = keep[1, 2, 1, 0] = True
    geometry = Geometry.of((2, 5, 5), 2, (3, 3), (1, 1), (1, 1))
    x, y = Plane(2, 5, 5, 1), Plane(2, 5, 5)
    lists = conv.forward(keep, geometry, x, y).lists
    row, channel = 7 * 64, 49 * 64
    assert lists.start.tolist() == [[0, 2, 3]]
    assert lists.offsets.tolist() == [channel - row - 64, 0, *[row] * 4]
    assert lists.index is None
    (back,) = conv.backward(keep, geometry, Plane(2, 5, 5, 1), Plane(2, 5, 5))
    assert back.lists.start.tolist() == [[0, 2, 3]]
    assert back.lists.offsets.tolist() == [0, channel - row, *[row + 64] * 4]
    assert back.lists.index.tolist() == [1, 2, 0]


def test_a_map_of_one_position_needs_no_border_and_only_its_tap():
    geometry = Geometry.of((4, 1, 1), 3, (3, 3), (1, 1), (1, 1))
    assert (geometry.unrolled, geometry.border, geometry.gradient_border) == (True, 0, 0)
    found = SparseConv(np.ones((3, 3, 3, 4), bool), geometry, Plane(4, 1, 1), Plane(3, 1, 1), Plane(3, 1, 1))
    assert found.ahead.lists.entries == 12
    assert found.back == []


def test_unrolled_maps_leave_out_what_falls_outside():
    """16 of the 36 pairs of a position and a tap on 2 x 2 maps."""
    geometry = Geometry.of((1, 2, 2), 1, (3, 3), (1, 1), (1, 1))
    found = SparseConv(np.ones((1, 3, 3, 1), bool), geometry, *[Plane(1, 2, 2)] * 4)
    assert (found.ahead.lists.entries, found.entries) == (16, 32)


def test_a_stride_has_a_list_for_each_parity_with_its_taps_alone():
    geometry = Geometry.of((1, 8, 8), 1, (3, 3), (2, 2), (1, 1))
    back = conv.backward(np.ones((1, 3, 3, 1), bool), geometry, Plane(1, 4, 4, 1), Plane(1, 8, 8))
    assert [p.lists.entries for p in back] == [1, 2, 2, 4]


@pytest.mark.parametrize("vectors", [6, 16])
def test_tilings_cover_each_position_once(vectors):
    for height in range(1, 20):
        for width in range(1, 20):
            seen = np.zeros((height, width), int)
            for rows, columns, at in tiling(height, width, vectors).pieces:
                assert rows * columns <= vectors
                for r, c in at:
                    assert (r + rows <= height) & (c + columns <= width)
                    seen[r : r + rows, c : c + columns] += 1
            assert (seen == 1).all(), (height, width)


def test_few_tiles_are_compiled_for_any_number_of_blocks():
    geometry = Geometry.of((1, 1, 1), 1, (1, 1), (1, 1), (0, 0))
    product = SparseConv(np.ones((1, 1, 1, 1), bool), geometry, Plane(1, 1, 1), Plane(1, 1, 1)).ahead
    depths = set()
    for blocks in range(1, 70):
        pieces = product.pieces(blocks)
        depths |= {len(x_tile[0]) for x_tile, *_ in pieces}
        covered = [at // 64 + i for x_tile, _, x_at, _ in pieces for at in x_at for i in range(len(x_tile[0]))]
        assert sorted(covered) == list(range(blocks))
    assert depths == {d for d in (1, 2, 4, 8, 16) if d <= tile_vectors()}


@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_parts_have_about_equal_work(parts):
    keep = np.zeros((40, 1, 1, 64), bool)
    keep[:4] = True  # four filters do most of it
    product = conv.forward(keep, Geometry.of((64, 8, 8), 40, (1, 1), (1, 1), (0, 0)), Plane(64, 8, 8), Plane(40, 8, 8))
    bounds = product.lists.split(parts)
    work = [int(keep[a:b].sum()) + 4 * (b - a) for a, b in pairwise(bounds)]
    assert len(work) == parts
    assert sum(work) == 4 * 64 + 160
    assert max(work) <= sum(work) / parts + 68 + 1


def test_the_entries_read_beyond_the_last_lie_inside():
    """With a padding beyond the kernel no tap reads at its own position, whose offset is 0."""
    case = Case(5, 1, 1, (3, 3), (1, 1), padding=(2, 2), mask=1.0)
    lists = conv.forward(np.ones((1, 1, 1, 1), bool), case.geometry, Plane(1, 3, 3, 2), Plane(1, 7, 7)).lists
    assert lists.offsets.tolist() == [-2 * (7 + 1) * 64] * 4
    empty = conv.forward(np.zeros((1, 1, 1, 1), bool), case.geometry, Plane(1, 3, 3, 2), Plane(1, 7, 7)).lists
    assert (empty.entries, empty.offsets.tolist()) == (0, [0, 0, 0])


def test_offsets_that_do_not_fit_are_refused():
    plane = Plane(200, 500, 500, 1)  # 3.2 GB for sixteen images
    keep = np.zeros((1, 3, 3, 200), bool)
    with pytest.raises(AssertionError, match="offsets are int32"):
        conv.forward(keep, Geometry.of((200, 500, 500), 1, (3, 3), (1, 1), (1, 1)), plane, Plane(1, 500, 500))


AVX2 = """
from tests.sparse.test_conv import CASES, Computed
from tests.sparse.test_tape import check_networks_of_avx2
from fastprune.sparse.conv import tile_vectors
assert tile_vectors() == 6
for case in CASES[:1] + CASES[5:6] + CASES[9:10]:
    Computed(case, 2).check()
check_networks_of_avx2()
"""


@pytest.mark.slow
def test_machines_without_avx512():
    features = "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+popcnt,+movbe,+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+cx16"
    variables = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AVX2], env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
