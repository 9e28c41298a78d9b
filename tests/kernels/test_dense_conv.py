"""dense_product as a convolution, against sums in float64: awkward sizes, classes, and what it may not touch."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from fastprune.kernels.dense_conv import GROUP, dense_product
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.sparse_conv import tile
from tests.kernels.inputs import INF, NAN, bits

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="no Triton here"),
    pytest.mark.xdist_group("lanes"),  # compiled once, in one process
]

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

GUARD = 1234.5
"""What memory holds that a kernel may not write. NaN is what it may not read."""
MARGIN = 256
"""Vectors before and after what a kernel may touch."""


class Maps:
    """Maps [A, C, H, W, 16] with a border, in memory with margins. Steps are in bytes."""

    def __init__(self, shape: tuple[int, ...], border: tuple[int, int], edge: float, outside: float) -> None:
        blocks, channels, height, width = shape
        h, w = height + 2 * border[0], width + 2 * border[1]
        self.memory = torch.full((MARGIN + blocks * channels * h * w + MARGIN, 16), outside)
        whole = self.memory[MARGIN:-MARGIN].view(blocks, channels, h, w, 16)
        self.inside = whole.fill_(edge)[:, :, border[0] : border[0] + height, border[1] : border[1] + width]
        self.block, self.channel, self.row = channels * h * w * 64, h * w * 64, w * 64

    @property
    def address(self) -> int:
        """Of the first position inside the border."""
        return self.inside.data_ptr()

    def differs_only_in(self, part: Tensor, before: Tensor) -> bool:
        """part: a view of `inside`. before: a copy of the memory."""
        at = torch.arange(self.memory.numel()).as_strided(part.shape, part.stride(), part.storage_offset()).flatten()
        now = self.memory.clone()
        now.view(-1)[at] = before.view(-1)[at]
        return torch.equal(bits(now), bits(before))


def conv_in_float64(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """[A, O, H, W, 16] of x [A, C, H, W, 16] and weight [O, C, KH, KW]; a weight of 0 reads nothing."""
    (kh, kw), (sh, sw), (ph, pw) = weight.shape[2:], stride, padding
    blocks, channels, height, width, _ = x.shape
    h, w = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    y = torch.zeros(blocks, len(weight), h, w, 16, dtype=torch.float64)
    for c, i, j in product(range(channels), range(kh), range(kw)):
        (kept,) = weight[:, c, i, j].nonzero(as_tuple=True)
        factors = weight[kept, c, i, j].double()[:, None]
        for r, s in product(range(h), range(w)):
            row, column = r * sh + i - ph, s * sw + j - pw
            if len(kept) and 0 <= row < height and 0 <= column < width:
                y[:, kept, r, s] += factors * x[:, c, row, column].double()[:, None]
    return y


def assert_rounded(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """magnitude: the sum of the terms' magnitudes. Each of the additions, and a product that does not fuse with one,
    rounds by 2^-24 of a partial sum. Where `exact` is not finite, both are the same."""
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), exact.isnan())
    infinite = exact.isinf()
    assert torch.equal(got[infinite].double(), exact[infinite])
    there = exact.isfinite()
    assert ((got.double() - exact).abs() <= 2 * terms * 2.0**-24 * magnitude)[there].all()


@dataclass
class Conv:
    """Of maps whose border is what the kernel's taps may read: zeros, or nothing where each position is a class."""

    size: tuple[int, int] = (5, 4)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    channels: int = 3
    groups: int = 2
    blocks: int = 2
    unrolled: bool = False
    shape: tuple[int, int, int] = (1, 2, 2)
    seed: int = 0

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        outputs, (kh, kw) = GROUP * self.groups, self.kernel
        sizes = zip(self.size, self.padding, self.kernel, self.stride, strict=True)
        self.out = [(n + 2 * p - k) // s + 1 for n, p, k, s in sizes]
        self.x = Maps((self.blocks, self.channels, *self.size), (0, 0) if self.unrolled else self.padding, 0.0, NAN)
        self.x.inside.copy_(torch.randn(self.x.inside.shape, generator=g))
        self.y_shape = (self.blocks, outputs, *self.out)
        self.weight = torch.randn(outputs, self.channels, kh, kw, generator=g)
        self.bias = torch.randn(outputs, generator=g)
        self.residual = Maps(self.y_shape, (1, 2), NAN, NAN)
        self.residual.inside.copy_(torch.randn(self.residual.inside.shape, generator=g))
        # All groups of a class have the same taps; in an order that means nothing.
        taps = list(product(range(self.channels), range(kh), range(kw)))
        self.taps = [taps[k] for k in torch.randperm(len(taps), generator=g)]

    def entries(self, position: tuple[int, int]) -> list[tuple[int, int, int]]:
        """The taps that a class computes."""
        if not self.unrolled:
            return self.taps
        found = []
        top, left = (p * s - q for p, s, q in zip(position, self.stride, self.padding, strict=True))
        for c, i, j in self.taps:
            row, column = top + i, left + j
            if 0 <= row < self.size[0] and 0 <= column < self.size[1]:
                found.append((c, i, j))
        return found

    def tiles(self) -> list[tuple[int, ...]]:
        """First block, row and column of each tile; the last overlaps the one before it where it does not fit."""
        sizes = (self.blocks, 1, 1) if self.unrolled else (self.blocks, *self.out)
        firsts = (sorted({min(i, n - t) for i in range(0, n, t)}) for n, t in zip(sizes, self.shape, strict=True))
        return list(product(*firsts))

    def run(self, y: Maps, part: tuple[int, int] | None = None, residual: int = 0, positive: bool = False) -> None:
        x, (top, left) = self.x, self.padding
        positions = list(np.ndindex(*self.out)) if self.unrolled else [(0, 0)]
        start, offsets, values, row_at, bias = [0], [], [], [], []
        for r, c in positions:
            here = self.entries((r, c))
            at = r * self.stride[0] * x.row + c * self.stride[1] * 64
            offsets += [at + k * x.channel + (i - top) * x.row + (j - left) * 64 for k, i, j in here]
            start.append(len(offsets))
            for group in range(0, len(self.weight), GROUP):
                values += [self.weight[group : group + GROUP, k, i, j] for k, i, j in here]
                row_at.append(group * y.channel + r * y.row + c * 64)
                bias.append(self.bias[group : group + GROUP])
        of_tiles = np.array(self.tiles())
        # An address needs a number to point to; what is beyond the entries is not read.
        packed, places = torch.cat([*values, torch.full((GROUP,), NAN)]), np.array([*offsets, 2**30], np.int32)
        step = self.stride[1]
        dense_product(
            tile(*self.shape, step), tile(*self.shape), x.address, y.address, x.block, self.stride[0] * x.row, y.block,
            y.row, of_tiles @ [x.block, self.stride[0] * x.row, 64 * step], of_tiles @ [y.block, y.row, 64],
            np.array(row_at), y.channel, *(part or (0, len(row_at))), self.groups, np.array(start),
            places.ctypes.data, packed.data_ptr(), torch.stack(bias).numpy(), residual,
            positive,
        )  # fmt: skip

    def check(self, residual: bool = False, positive: bool = False) -> Tensor:
        """Runs, compares, and returns the outputs."""
        y = Maps(self.y_shape, (1, 2), GUARD, GUARD)
        before = y.memory.clone()
        self.run(y, None, self.residual.address if residual else 0, positive)
        self.compare(y.inside, residual, positive)
        assert y.differs_only_in(y.inside, before)
        return y.inside

    def compare(self, got: Tensor, residual: bool, positive: bool) -> None:
        exact = conv_in_float64(self.x.inside, self.weight, self.stride, self.padding)
        size = conv_in_float64(self.x.inside.abs(), self.weight.abs(), self.stride, self.padding)
        added = self.bias.double()[:, None, None, None]
        exact, size = exact + added, size + added.abs()
        if residual:
            exact, size = exact + self.residual.inside, size + self.residual.inside.abs()
        assert_rounded(got, exact.clamp(min=0) if positive else exact, size, len(self.taps) + 2)


ends = pytest.mark.parametrize(
    ("residual", "positive"), list(product([False, True], repeat=2)), ids=["alone", "relu", "residual", "both"]
)
each = pytest.mark.parametrize("unrolled", [False, True], ids=["map", "unrolled"])


def conv(unrolled: bool, **more) -> Conv:
    return Conv(unrolled=True, shape=(2, 1, 1), **more) if unrolled else Conv(**more)


@each
@ends
def test_bias_residual_and_relu(unrolled, residual, positive):
    conv(unrolled).check(residual, positive)


@each
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_kernels_strides_and_padding(kernel, stride, padding, unrolled):
    p = conv(unrolled, size=(7, 6), kernel=kernel, stride=stride, padding=padding, channels=2, groups=1)
    p.check()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 3)], ids=str)
def test_small_maps(size, blocks):
    """Unrolled, a position computes only taps inside the map; a map of one position is a matrix product."""
    for kernel in (1, 3):
        p = {"size": size, "kernel": (kernel, kernel), "padding": (kernel // 2,) * 2, "blocks": blocks}
        Conv(**p, unrolled=True, shape=(min(blocks, 2), 1, 1)).check(residual=True)
        Conv(**p, shape=(min(blocks, 2), 1, 1)).check()


def test_positions_without_a_tap_are_the_bias():
    p = conv(True, size=(1, 1), kernel=(1, 1))
    got = p.check()
    outer = torch.ones(3, 3, dtype=torch.bool)
    outer[1, 1] = False
    assert torch.equal(got[:, :, outer], p.bias[:, None, None].expand(2, 8, 8, 16))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_convolution(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    size, kernel, padding, stride = pair(1, 5), pair(1, 3), pair(0, 2), pair(1, 2)
    hypothesis.assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    numbers = [data.draw(st.integers(1, most)) for most in (4, 3, 3)]
    unrolled, residual, positive = (data.draw(st.booleans()) for _ in range(3))
    p = Conv(size, kernel, stride, padding, *numbers, unrolled, (1, 1, 1), data.draw(st.integers(0, 2**20)))
    if unrolled:
        p.shape = (min(p.blocks, 2), 1, 1)
    elif min(p.out) > 1:
        p.shape = (1, 2, 2)
    p.check(residual, positive)


@each
def test_groups_in_parts_give_the_same_bits(unrolled):
    p = conv(unrolled, groups=3)
    whole, parts = (Maps(p.y_shape, (1, 2), GUARD, GUARD) for _ in range(2))
    p.run(whole)
    count = 3 * (int(np.prod(p.out)) if unrolled else 1)
    for first, last in ((count - 1, count), (0, 1), (1, 1), (1, count - 1)):
        before = parts.memory.clone()
        p.run(parts, (first, last))
        if unrolled:
            group, (r, c) = first % 3, np.unravel_index(first // 3, p.out)
            mine = parts.inside[:, GROUP * group : GROUP * group + GROUP, r, c]
        else:
            mine = parts.inside[:, GROUP * first : GROUP * last]
        if last - first == 1 or not unrolled:
            assert parts.differs_only_in(mine, before)
        if last == first:
            assert torch.equal(bits(parts.memory), bits(before))
    assert torch.equal(bits(parts.memory), bits(whole.memory))


@each
def test_a_result_may_take_the_place_of_what_is_added(unrolled):
    p = conv(unrolled, size=(4, 4))  # no tiles that overlap
    y = Maps(p.y_shape, (1, 2), GUARD, GUARD)
    y.inside.copy_(p.residual.inside)
    p.run(y, None, y.address, positive=True)
    p.compare(y.inside, residual=True, positive=True)


@each
@pytest.mark.parametrize("positive", [False, True], ids=["as is", "relu"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_reaches_what_reads_it(value, positive, unrolled):
    p = conv(unrolled)
    clean = p.check(positive=positive).clone()
    p.x.inside[1, 2, 3, 1, 7] = value
    got = p.check(positive=positive)
    window = (slice(1, 2), slice(None), slice(2, 5), slice(0, 3), slice(7, 8))
    finite = got[window].isfinite()
    # ReLU makes 0 of -inf, and not of NaN.
    assert not got[window][finite].any()
    assert finite.any() == (positive and value == value)
    got[window] = clean[window]
    assert torch.equal(bits(got), bits(clean))


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_bias_and_residual_that_are_not_finite_reach_their_channel(value):
    p = conv(False)
    p.weight[1, 2, 1, 1] = p.bias[3] = p.residual.inside[0, 6, 4, 3, 15] = value
    got = p.check(residual=True)
    hit = torch.zeros(got.shape, dtype=torch.bool)
    hit[:, [1, 3]] = True
    hit[0, 6, 4, 3, 15] = True
    assert torch.equal(~got.isfinite(), hit)
