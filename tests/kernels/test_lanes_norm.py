"""Batch norm, pooling and ReLU in the layout of sixteen images: against torch's in float64, NaN and inf as torch's."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.kernels import lanes_norm as kernels
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.lanes import blocks_of, from_lanes, to_lanes
from tests.kernels.inputs import INF, NAN, assert_same_bits, bits

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="no Triton here"),
    pytest.mark.xdist_group("lanes"),  # compiled once, in one process
]

LIMIT = 4e-6
"""Allowed error, of the maximum."""

EPS = 1e-5


class Plane:
    """Images in lanes with a border, all `fill` but what `images` give; lanes beyond the batch are `beyond`."""

    def __init__(self, shape, border: int = 0, images: Tensor | None = None, fill: float = NAN, beyond: float = 0.0):
        self.batch, channels, height, width = shape
        blocks = blocks_of(self.batch)
        self.maps = torch.full((blocks, channels, height + 2 * border, width + 2 * border, 16), fill)
        self.inner = self.maps[:, :, border : border + height, border : border + width]
        if images is not None:
            to_lanes(images, self.inner)
            if self.batch % 16:
                self.inner[-1, ..., self.batch % 16 :] = beyond
        self.at, self.steps = self.inner.data_ptr(), tuple(4 * s for s in self.inner.stride()[:3])
        self.border = border

    @property
    def images(self) -> Tensor:
        return from_lanes(self.inner, self.batch)

    @property
    def beyond(self) -> Tensor:
        return from_lanes(self.inner, 16 * len(self.inner))[self.batch :]

    def check_border(self) -> None:
        maps = self.maps.clone()
        if self.border:
            b = self.border
            maps[:, :, b:-b, b:-b] = NAN
            assert maps.isnan().all()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Pool:
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding)

    def window(self, x: Tensor) -> np.ndarray:
        return np.array([*self(x).shape[2:], *self.kernel, *self.stride])

    def scratch(self, x: Tensor, blocks: int = 1) -> Tensor:
        h, w = (n + 2 * p for n, p in zip(x.shape[2:], self.padding, strict=True))
        return torch.empty(blocks, h, w, 16)


POOLS = {
    "3 stride 2": Pool((3, 3), (2, 2), (1, 1)),
    "2": Pool((2, 2), (2, 2), (0, 0)),
    "3x2 overlapping": Pool((3, 2), (1, 1), (1, 0)),
}


class Normed:
    """norm_forward and norm_backward, or the two with pooling, of images y; channels in two parts."""

    def __init__(
        self, y: Tensor, residual: Tensor | None = None, relu: bool = False, pool: Pool | None = None,
        running: tuple[Tensor, Tensor] | None = None, beyond: float = 1e3,
    ) -> None:  # fmt: skip
        c = y.shape[1]
        self.y, self.residual, self.relu, self.pool, self.running = y, residual, relu or bool(pool), pool, running
        self.weight, self.bias = random(c, seed=1) + 1, random(c, seed=2)
        self.weight[::3] *= -1
        self.mean, self.variance = np.full(c, np.nan), np.full(c, np.nan)
        if running is not None:
            self.mean[:], self.variance[:] = (t.numpy() for t in running)
        self._y = Plane(y.shape, 1, y, beyond=beyond)
        z_shape = y.shape if pool is None else pool(y).shape
        self._z = Plane(z_shape, 2)
        self._places = torch.empty(blocks_of(len(y)), *z_shape[1:], 16)
        affine = self.weight.numpy(), self.bias.numpy(), EPS, self.mean, self.variance, running is None
        self._sizes = *y.shape[2:], blocks_of(len(y)), len(y)
        for part in ((0, c // 2), (c // 2, c)):
            if pool is not None:
                scratch = pool.scratch(y)
                kernels.norm_pool_forward(
                    self._y.at, self._y.steps, self._z.at, self._z.steps, self._places.data_ptr(), *self._sizes,
                    *affine, pool.window(y), pool.padding, scratch.data_ptr(), *part,
                )  # fmt: skip
                continue
            other = None if residual is None else Plane(y.shape, 3, residual, beyond=beyond)
            where, steps = (0, (0, 0, 0)) if other is None else (other.at, other.steps)
            kernels.norm_forward(
                self._y.at, self._y.steps, self._z.at, self._z.steps, where, steps, *self._sizes, *affine, self.relu,
                *part,
            )  # fmt: skip
        self.z = self._z.images
        self._z.check_border()

    def backward(self, gradient: Tensor) -> list[Tensor]:
        """Gradients of y, weight, bias and, as it is written in place, of the residual."""
        y, z, g, dy = self._y, self._z, Plane(self.z.shape, 1, gradient), Plane(self.y.shape, 1)
        into = [torch.empty(len(self.weight)) for _ in range(2)]
        saved = self.weight.numpy(), EPS, self.mean, self.variance
        for part in ((0, 1), (1, len(self.weight))):
            if self.pool is not None:
                scratch = self.pool.scratch(self.y, len(y.maps))
                kernels.norm_pool_backward(
                    y.at, y.steps, z.at, z.steps, self._places.data_ptr(), g.at, g.steps, dy.at, dy.steps, *self._sizes,
                    *saved, *(t.numpy() for t in into), self.pool.window(self.y), self.pool.padding,
                    scratch.data_ptr(), *part,
                )  # fmt: skip
            else:
                kernels.norm_backward(
                    y.at, y.steps, z.at, z.steps, g.at, g.steps, dy.at, dy.steps, *self._sizes, *saved, self.relu,
                    *(t.numpy() for t in into), *part,
                )  # fmt: skip
        dy.check_border()
        assert_same_bits(dy.beyond, torch.zeros_like(dy.beyond))
        return [dy.images, *into, g.images]

    def exact(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.double().requires_grad_() for t in (self.y, self.weight, self.bias)]
        y, weight, bias = leaves
        mean, var = (None, None) if self.running is None else self.running
        z = F.batch_norm(y, mean, var, weight, bias, mean is None, 0.0, EPS)
        if self.residual is not None:
            leaves.append(self.residual.double().requires_grad_())
            z = z + leaves[-1]
        z = z.relu() if self.relu else z
        z = z if self.pool is None else self.pool(z)
        return z.detach(), list(torch.autograd.grad(z, leaves, gradient.double()))

    def check(self) -> None:
        gradient = random(*self.z.shape, seed=3)
        exact, gradients = self.exact(gradient)
        close(self.z, exact)
        for got, expected in zip(self.backward(gradient), gradients, strict=False):
            close(got, expected)


def close(got: Tensor, exact: Tensor, limit: float = LIMIT) -> None:
    assert got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= limit * exact.abs().max()


SHAPES = [(5, 3, 4, 6), (16, 2, 3, 3), (33, 3, 2, 5), (17, 4, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["no relu", "relu"])
def test_batch_norm(shape, residual, relu):
    Normed(random(*shape) * 2 + 0.3, random(*shape, seed=8) if residual else None, relu).check()


def test_batch_norm_of_two_numbers_a_channel():
    """Nothing of them is left but a sign, and of the gradient what does not cancel."""
    normed = Normed(random(2, 4, 1, 1) * 2 + 0.3)
    gradient = random(2, 4, 1, 1, seed=3)
    exact, gradients = normed.exact(gradient)
    close(normed.z, exact)
    each = (normed.weight / torch.from_numpy(normed.variance).sqrt()).abs().max() * gradient.abs().max()
    assert (normed.backward(gradient)[0].double() - gradients[0]).abs().max() <= LIMIT * each


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (17, 2, 7, 5)], ids=str)
def test_batch_norm_with_pooling(shape, pool):
    Normed(random(*shape), pool=POOLS[pool]).check()


@pytest.mark.parametrize("ratio", [100.0, -100.0])
@pytest.mark.parametrize("shape", [(17, 2, 1, 1), (33, 3, 4, 4), (64, 2, 112, 112)], ids=str)
def test_a_mean_far_larger_than_the_deviation(shape, ratio):
    """A float32 sum of 12,544 numbers is off by up to 1e-4 deviations."""
    normed = Normed(random(*shape) * 0.333 + 0.333 * ratio)
    normed.check()
    exact = normed.y.double()
    assert np.allclose(normed.mean, exact.mean((0, 2, 3)), rtol=1e-9, atol=0)
    assert np.allclose(normed.variance, exact.var((0, 2, 3), unbiased=False), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 33.3, -1e4])
def test_constant_channels(value):
    """Of inverse deviation 316: any error of the mean is seen."""
    normed = Normed(torch.full((17, 3, 40, 40), value))
    assert normed.variance.tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    exact, (_, _, bias) = normed.exact(gradient := random(*normed.z.shape, seed=3))
    assert (normed.z.double() - exact).abs().max() <= 1e-6
    _, weight_gradient, bias_gradient, _ = normed.backward(gradient)
    close(bias_gradient, bias)
    assert weight_gradient.abs().max() < 1e-3


def test_lanes_without_an_image_count_nowhere():
    y, residual = random(17, 3, 4, 4), random(17, 3, 4, 4, seed=8)
    gradient = random(*y.shape, seed=3)
    results = []
    for beyond in (0.0, NAN, 1e30):
        normed = Normed(y, residual, True, beyond=beyond)
        assert_same_bits(normed._z.beyond, torch.zeros_like(normed._z.beyond))
        if not np.isnan(beyond):
            results.append([normed.z, *normed.backward(gradient)])
        assert torch.equal(bits(normed.z), bits(results[0][0]))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    pooled = Normed(y, pool=POOLS["2"], beyond=NAN)
    assert_same_bits(pooled._z.beyond, torch.zeros_like(pooled._z.beyond))


@pytest.mark.parametrize("pool", [None, POOLS["3 stride 2"]], ids=["alone", "pool"])
def test_running_statistics_in_evaluation(pool):
    y, running = random(17, 3, 4, 6), (random(3, seed=4).double(), random(3, seed=5).double().square() + 0.1)
    normed = Normed(y, relu=True, pool=pool, running=running)
    close(normed.z, normed.exact(random(*normed.z.shape))[0])
    assert (normed.mean.tolist(), normed.variance.tolist()) == tuple(t.tolist() for t in running)


@pytest.mark.parametrize("pool", [None, POOLS["2"]], ids=["alone", "pool"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_and_inf_make_a_channel_nan_as_in_torch(value, pool):
    y = random(17, 3, 4, 4)
    y[16, 1, 2, 3] = value
    normed = Normed(y, relu=True, pool=pool)
    gradient = random(*normed.z.shape, seed=3)
    assert normed.z[:, 1].isnan().all()
    assert normed.z[:, ::2].isfinite().all()
    dy, dweight, dbias, _ = normed.backward(gradient)
    assert dy[:, 1].isnan().all()
    assert dweight.isfinite().tolist() == [True, False, True]
    exact = normed.exact(gradient)[1]
    assert dbias.isfinite().tolist() == exact[2].isfinite().tolist()


# Pooling, ReLU, sums and means by themselves


def pooled(x: Tensor, pool: Pool, gradient: Tensor | None = None, dx: float | None = None) -> tuple[Tensor, Tensor]:
    """z, and the gradient of x, added to `dx` if that is given; channels in two parts."""
    _, c, h, w = x.shape
    blocks = blocks_of(len(x))
    source, z = Plane(x.shape, 1, x), Plane(pool(x).shape, 1)
    places = torch.empty(blocks, c, *pool(x).shape[2:], 16)
    gradient = random(*pool(x).shape, seed=3) if gradient is None else gradient
    g, back = Plane(gradient.shape, 2, gradient), Plane(x.shape, 1, None if dx is None else torch.full(x.shape, dx))
    scratch = pool.scratch(x)
    for part in ((0, 1), (1, c)):
        sizes = h, w, blocks, c, pool.window(x), pool.padding, scratch.data_ptr()
        kernels.pool_forward(source.at, source.steps, z.at, z.steps, places.data_ptr(), *sizes, *part)
        kernels.pool_backward(
            g.at, g.steps, places.data_ptr(), back.at, back.steps, *sizes, dx is not None, *part
        )  # fmt: skip
    z.check_border()
    back.check_border()
    return z.images, back.images


def torchs_pool(x: Tensor, pool: Pool, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    z = pool(x)
    return z.detach(), torch.autograd.grad(z, x, gradient)[0]


@pytest.mark.parametrize("add", [None, 2.0], ids=["write", "add"])
@pytest.mark.parametrize("kind", ["random", "ties", "nan and inf"])
@pytest.mark.parametrize("pool", POOLS)
def test_max_pooling_is_torchs_ties_included(pool, kind, add):
    x = random(17, 3, 7, 6)
    if kind == "ties":
        x = x.round()
    elif kind == "nan and inf":
        x.view(-1)[::13], x.view(-1)[::29], x.view(-1)[5::31] = NAN, INF, -INF
    # Whole numbers: windows overlap, and their sums are exact in any order.
    gradient = (random(*POOLS[pool](x).shape, seed=3) * 8).round()
    z, dx = pooled(x, POOLS[pool], gradient, add)
    expected, exact = torchs_pool(x, POOLS[pool], gradient)
    assert_same_bits(z, expected)
    assert torch.equal(dx, exact + (add or 0.0))


def test_of_tied_maxima_the_first_gets_the_gradient():
    z, dx = pooled(torch.ones(1, 2, 4, 4), POOLS["2"], torch.full((1, 2, 2, 2), 3.0))
    assert z.tolist() == [[[[1.0] * 2] * 2] * 2]
    assert dx[0, 1].tolist() == [[3.0, 0, 3.0, 0], [0] * 4, [3.0, 0, 3.0, 0], [0] * 4]


def test_of_zeros_that_a_relu_made_none_gets_the_gradient():
    """Batch norm, ReLU and pooling in one: a window of negative values."""
    y = torch.tensor([-1.0, 1.0]).repeat_interleave(8).view(1, 1, 4, 4).repeat(16, 1, 1, 1)
    normed = Normed(y, pool=POOLS["2"])
    normed.check()


@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
def test_relu_backward(add):
    z, g = random(17, 3, 4, 2).relu(), random(17, 3, 4, 2, seed=1)
    z[0, 0, 0], g[1, 1, 1] = NAN, NAN
    planes = Plane(z.shape, 1, z), Plane(z.shape, 2, g), Plane(z.shape, 0, torch.full(z.shape, 2.0) if add else None)
    steps = [item for p in planes for item in (p.at, p.steps)]
    for part in ((0, 2), (2, 3)):
        kernels.relu_backward(*steps, 4, 2, 2, add, *part)
    exact = torch.ops.aten.threshold_backward(g, z, 0.0)
    assert_same_bits(planes[2].images, exact + 2.0 if add else exact)


@pytest.mark.parametrize("other", [False, True], ids=["copy", "sum"])
@pytest.mark.parametrize("positive", [False, True], ids=["as is", "relu"])
def test_sums_of_planes(other, positive):
    x, y = random(17, 3, 4, 2), random(17, 3, 4, 2, seed=1)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = NAN, INF
    a, b, z = Plane(x.shape, 1, x), Plane(x.shape, 2, y), Plane(x.shape, 3)
    for part in ((0, 2), (2, 3)):
        kernels.add_planes(
            a.at, a.steps, b.at if other else 0, b.steps, z.at, z.steps, 4, 2, 2, positive, *part
        )  # fmt: skip
    exact = x + y if other else x
    assert_same_bits(z.images, exact.relu() if positive else exact)
    z.check_border()


@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)], ids=str)
def test_means(size, add):
    x, g = random(17, 3, *size) + 1, random(17, 3, 1, 1, seed=1)
    a, z, gradient = Plane(x.shape, 1, x), Plane((17, 3, 1, 1)), Plane((17, 3, 1, 1), 0, g)
    dx = Plane(x.shape, 1, torch.full(x.shape, 2.0) if add else None)
    for part in ((0, 2), (2, 3)):
        kernels.mean_forward(a.at, a.steps, z.at, *size, 2, 3, *part)
        kernels.mean_backward(gradient.at, dx.at, dx.steps, *size, 2, 3, add, *part)
    close(z.images, x.double().mean((2, 3), keepdim=True), 1e-6)
    close(dx.images, g.double().expand_as(x) / (size[0] * size[1]) + 2.0 * add, 1e-6)
    a.check_border()
