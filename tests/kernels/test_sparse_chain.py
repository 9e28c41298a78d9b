"""chain against sums in float64: convolutions over kept weights, alone and in a row, and what they may touch."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.sparse_chain import COLUMNS, chain
from fastprune.kernels.sparse_conv import tile
from tests.kernels.inputs import INF, NAN, bits
from tests.kernels.test_dense_conv import GUARD, Maps, assert_rounded, conv_in_float64

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="no Triton here"),
    pytest.mark.xdist_group("lanes"),  # compiled once, in one process
]

hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

Pair = tuple[int, int]
BORDER = (2, 2)
"""Of all maps, in use too: what is added lies at the same offsets as the result."""


@dataclass
class Link:
    """A convolution from x to y. The entries are in blocks of `together` input channels."""

    x: Maps
    y: Maps
    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    together: int = 2
    residual: Maps | None = None
    positive: bool = True

    def __post_init__(self) -> None:
        outputs, channels, kh, kw = self.weight.shape
        self.bias = torch.linspace(-1, 1, outputs)
        start: list[int] = []
        offsets: list[int] = []
        values: list[float] = []
        for first in range(0, channels, self.together):
            for o in range(outputs):
                start.append(len(values))
                inputs = range(first, min(first + self.together, channels))
                for c, i, j in product(inputs, range(kh), range(kw)):
                    if self.weight[o, c, i, j] != 0:
                        row, column = i - self.padding[0], j - self.padding[1]
                        offsets.append(c * self.x.channel + row * self.x.row + column * 64)
                        values.append(self.weight[o, c, i, j].item())
            start.append(len(values))
        self.rows, self.blocks = outputs, len(start) // (outputs + 1)
        # An address needs a number to point to; what is beyond the entries is not read.
        self.start, self.offsets = np.array(start), np.array([*offsets, 2**30], np.int32)
        self.values = np.array([*values, NAN], np.float32)

    def line(self) -> list[int]:
        x, y = self.x, self.y
        return [
            x.address, y.address, self.residual.address if self.residual else 0, x.block, self.stride[0] * x.row,
            y.block, y.row, y.channel, self.rows, self.start.ctypes.data, self.blocks, self.offsets.ctypes.data,
            self.values.ctypes.data, self.bias.data_ptr(), self.positive + 2 * (self.stride[1] > 1),
        ]  # fmt: skip

    def exact(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """(outputs, the sum of the magnitudes of their terms), float64. added: what lay in `residual` before."""
        bias = self.bias.double()[:, None, None, None]
        y = conv_in_float64(x, self.weight, self.stride, self.padding) + bias
        size = conv_in_float64(x.abs(), self.weight.abs(), self.stride, self.padding) + bias.abs()
        if added is not None:
            y, size = y + added, size + added.abs()
        return y.clamp(min=0) if self.positive else y, size

    def check(self, x: Tensor | None = None, added: Tensor | None = None) -> None:
        """Of outputs from inputs x: those in memory, if None is given."""
        exact, size = self.exact(self.x.inside if x is None else x, added)
        assert_rounded(self.y.inside, exact, size, self.weight[0].numel() + 2)


def maps(blocks: int, channels: int, size: Pair, seed: int | None = None) -> Maps:
    """Random numbers in a border of zeros; or, without a seed, to be written."""
    found = Maps((blocks, channels, *size), BORDER, 0.0, GUARD if seed is None else NAN)
    if seed is None:
        found.inside.fill_(NAN)
        return found
    found.inside.copy_(torch.randn(found.inside.shape, generator=torch.Generator().manual_seed(seed)))
    return found


def weights(outputs: int, channels: int, kernel: Pair, density: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = (outputs, channels, *kernel)
    return torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density)


def pieces(y: Maps, columns: int = 2) -> list[tuple[tuple[int, int, int], list[tuple[int, int, int]]]]:
    """Tiles of 2 x `columns` positions, and then fewer where the map ends: sizes, and first positions of each."""
    blocks, _, height, width, _ = y.inside.shape
    found: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for a, r, c in product(range(blocks), range(0, height, 2), range(0, width, columns)):
        found.setdefault((1, min(2, height - r), min(columns, width - c)), []).append((a, r, c))
    return list(found.items())


def run(links: list[Link], tiles: Pair | None = None, rows: Pair = (0, -1), shapes: list | None = None) -> None:
    """tiles: some of each of `shapes`, which are `pieces` where not given. rows: some of each link."""
    table = np.array([link.line() for link in links], np.int64)
    assert table.shape[1] == COLUMNS
    step = max(link.stride[1] for link in links)
    for (a, r, c), at in shapes or pieces(links[0].y):
        x_at, y_at = (
            np.stack([np.array(at) @ [m.block, s[0] * m.row, 64 * s[1]] for m, s in places])
            for places in ([(k.x, k.stride) for k in links], [(k.y, (1, 1)) for k in links])
        )
        chain(tile(a, r, c, step), tile(a, r, c), table, x_at, y_at, *(tiles or (0, len(at))), *rows)


def sizes(x: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(x, kernel, stride, padding, strict=True))
    return h, w


def single(
    size: Pair = (5, 4), kernel: Pair = (3, 3), stride: Pair = (1, 1), padding: Pair = (1, 1), density: float = 0.3,
    channels: int = 5, outputs: int = 6, blocks: int = 2, together: int = 2, added: bool = False, positive: bool = True,
    seed: int = 0,
) -> Link:  # fmt: skip
    y = maps(blocks, outputs, sizes(size, kernel, stride, padding))
    residual = maps(blocks, outputs, (y.inside.shape[2], y.inside.shape[3]), seed + 2) if added else None
    weight = weights(outputs, channels, kernel, density, seed)
    return Link(maps(blocks, channels, size, seed + 1), y, weight, stride, padding, together, residual, positive)


def run_and_check(link: Link) -> Tensor:
    """The outputs; nothing else is written."""
    before = link.y.memory.clone()
    run([link])
    assert link.y.differs_only_in(link.y.inside, before)
    link.check(added=link.residual.inside if link.residual else None)
    return link.y.inside


@pytest.mark.parametrize("positive", [False, True], ids=["as is", "relu"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_blocks_of_channels(together, added, positive):
    """Of the first block comes what is added, and of the last bias and ReLU, whatever rows have entries there."""
    link = single(together=together, density=0.1, added=added, positive=positive)
    assert link.blocks == -(-5 // together)
    run_and_check(link)


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_kernels_strides_and_padding(kernel, stride, padding):
    run_and_check(single((7, 6), kernel, stride, padding, channels=3, outputs=3))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 3), (5, 1)], ids=str)
def test_small_maps(size, blocks):
    run_and_check(single(size, blocks=blocks, added=True))


def test_deep_tiles():
    """Several blocks of images in one tile, as small maps have."""
    link = single((2, 1), blocks=4)
    run([link], shapes=[((2, 2, 1), [(0, 0, 0), (2, 0, 0)])])
    link.check()


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("together", [2, 5])
def test_all_pruned(together, added):
    link = single(density=0, together=together, added=added)
    assert not link.start.any()
    got = run_and_check(link)
    expected = (link.residual.inside if added else 0) + link.bias[:, None, None, None]
    assert torch.equal(got, expected.clamp(min=0).expand(got.shape))


@pytest.mark.parametrize("kept", [(0, 0), (5, 4), (3, 2)], ids=["first", "last", "middle"])
def test_one_weight_is_kept(kept):
    link = single(density=0)
    weight = link.weight.clone()
    weight[(*kept, 1, 2)] = 2
    run_and_check(Link(link.x, link.y, weight, padding=(1, 1)))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_convolution(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    size, kernel, stride, padding = pair(1, 5), pair(1, 3), pair(1, 2), pair(0, 2)
    hypothesis.assume(min(sizes(size, kernel, stride, padding)) > 0)
    density = data.draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    numbers = [data.draw(st.integers(1, most)) for most in (6, 5, 3, 6)]
    added, positive = (data.draw(st.booleans()) for _ in range(2))
    seed = data.draw(st.integers(0, 2**20))
    run_and_check(single(size, kernel, stride, padding, density, *numbers, added, positive, seed))


def three_links(stride: int, kept: tuple[float, float, float] = (0.3, 0.5, 0.4)) -> list[Link]:
    """3 x 3, then 1 x 1, then 1 x 1 whose result takes the place of what is added. Maps of 5 x 3 outputs."""
    size = (5, 3) if stride == 1 else (10, 6)
    x, out = maps(2, 4, size, 1), (5, 3)
    first, second, third = maps(2, 6, out), maps(2, 3, out), maps(2, 7, out)
    third.inside.copy_(torch.randn(third.inside.shape, generator=torch.Generator().manual_seed(9)))
    return [
        Link(x, first, weights(6, 4, (3, 3), kept[0], 2), (stride, stride), (1, 1)),
        Link(first, second, weights(3, 6, (1, 1), kept[1], 3), positive=False),
        Link(second, third, weights(7, 3, (1, 1), kept[2], 4), residual=third),
    ]


EACH_LINK = [(0.3, 0.5, 0.4), (0.0, 0.5, 0.4), (0.3, 0.0, 0.4), (0.3, 0.5, 0.0), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("kept", EACH_LINK, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_one_after_another(stride, kept):
    links, alone = three_links(stride, kept), three_links(stride, kept)
    before, added = [link.y.memory.clone() for link in links], links[2].y.inside.clone()
    run(links)
    for link in alone:
        run([link])
    for i, (link, other) in enumerate(zip(links, alone, strict=True)):
        link.check(added=added if i == 2 else None)
        assert link.y.differs_only_in(link.y.inside, before[i])
        assert torch.equal(bits(link.y.memory), bits(other.y.memory))


def test_two_links_may_read_the_same():
    """The second branch of a block: both from x, with different strides between columns of what they read."""
    x, out = maps(2, 4, (9, 5), 1), (5, 3)
    first, second = maps(2, 6, out), maps(2, 3, out)
    links = [
        Link(x, first, weights(6, 4, (3, 3), 0.3), (2, 2), (1, 1)),
        Link(first, second, weights(3, 6, (1, 1), 0.5)),
        Link(x, maps(2, 5, out), weights(5, 4, (1, 1), 0.5), (2, 2)),
    ]
    run(links)
    for link in links:
        link.check()


def test_rows_in_parts_give_the_same_bits():
    whole, parts = (single((4, 4), added=True) for _ in range(2))
    run([whole])
    for first, last in ((4, 6), (0, 1), (1, 1), (1, 4)):
        before = parts.y.memory.clone()
        run([parts], rows=(first, last))
        assert parts.y.differs_only_in(parts.y.inside[:, first:last], before)
    assert torch.equal(bits(parts.y.memory), bits(whole.y.memory))


def test_tiles_in_parts_give_the_same_bits():
    whole, parts = three_links(1), three_links(1)
    run(whole)
    ((_, full), (_, half), (_, low), (_, corner)) = shapes = pieces(parts[0].y)
    assert [len(at) for at in (full, half, low, corner)] == [4, 4, 2, 2]
    for shape, at in shapes:
        for first, last in ((1, len(at)), (0, 0), (0, 1)):
            before = [link.y.memory.clone() for link in parts]
            run(parts, (first, last), shapes=[(shape, at)])
            for link, copy in zip(parts, before, strict=True):
                if last - first == 1:
                    (a, r, c), (_, h, w) = at[first], shape
                    assert link.y.differs_only_in(link.y.inside[a : a + 1, :, r : r + h, c : c + w], copy)
                elif last == first:
                    assert torch.equal(bits(link.y.memory), bits(copy))
    for link, other in zip(parts, whole, strict=True):
        assert torch.equal(bits(link.y.memory), bits(other.y.memory))


@pytest.mark.parametrize("positive", [False, True], ids=["as is", "relu"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
def test_what_is_not_finite_reaches_what_reads_it(value, positive):
    link = single(positive=positive, density=0.5)
    link.weight[4] = 0
    link = Link(link.x, link.y, link.weight, padding=(1, 1), positive=positive)
    clean = run_and_check(link).clone()
    link.x.inside[1, 3, 2, 2, 7] = value
    got = run_and_check(link).clone()
    assert not got[1, :, 1:4, 1:4, 7].isfinite().all()
    # Taps that are pruned do not read it, and ReLU makes 0 of -inf, but not of NaN.
    assert torch.equal(bits(got[:, 4]), bits(clean[:, 4]))
    got[1, :, 1:4, 1:4, 7] = clean[1, :, 1:4, 1:4, 7]
    assert torch.equal(bits(got), bits(clean))


def test_nan_reaches_the_end_of_a_chain():
    links = three_links(1, (1.0, 1.0, 1.0))
    links[0].x.inside[0, 0, 4, 0, 3] = NAN
    run(links)
    hit = torch.zeros(links[2].y.inside.shape, dtype=torch.bool)
    hit[0, :, 3:, :2, 3] = True
    assert torch.equal(links[2].y.inside.isnan(), hit)


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_bias_and_residual_that_are_not_finite_reach_their_channel(value):
    link = single(added=True)
    link.weight[1, 2, 1, 1] = link.bias[3] = link.residual.inside[0, 5, 4, 3, 15] = value
    new = Link(link.x, link.y, link.weight, padding=(1, 1), residual=link.residual, positive=False)
    new.bias = link.bias
    got = run_and_check(new)
    hit = torch.zeros(got.shape, dtype=torch.bool)
    hit[:, [1, 3]] = True
    hit[0, 5, 4, 3, 15] = True
    assert torch.equal(~got.isfinite(), hit)
