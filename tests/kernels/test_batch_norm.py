"""Batch norm with residual and ReLU, and the stem with pooling: results, gradients and running statistics."""

import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastprune.kernels import batch_norm, batch_norm_pool
from fastprune.kernels.batch_norm import _counters, batch_norm_reference
from fastprune.kernels.batch_norm_pool import batch_norm_pool_reference
from fastprune.kernels.dispatch import INTERPRETED
from tests.kernels.inputs import INF, NAN

# A machine with a GPU may lack it.
hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

NAMES = ["y", "running_mean", "running_var", "dx", "dweight", "dbias", "dresidual"]
SHAPES = [(4, 8, 5, 5), (3, 72, 3, 1), (70, 64, 2, 2), (130, 3, 1, 1), (1, 1, 1, 9), (1, 65, 1, 2)]
CASES = list(product([False, True], [False, True], [1, 2]))
IN_A_BLOCK = [CASES[2], CASES[7]]  # the first and the second batch norm of a basic block


@pytest.fixture(autouse=True)
def counters(monkeypatch):
    """The counters that a test's launches used; each is zero after it."""
    used = []

    def noted(x, tiles):
        used.append(_counters(x, tiles))
        return used[-1]

    monkeypatch.setattr(sys.modules["fastprune.kernels.batch_norm"], "_counters", noted)
    yield used
    assert all(not counter.any() for counter in used)


@pytest.fixture
def on_triton(device):
    """Skips where torch's own operations run: they are less exact, and round between batch norm, sum and ReLU."""
    if not (INTERPRETED or device.type == "cuda"):
        pytest.skip("no Triton: TRITON_INTERPRET=1, or --device cuda")


def inputs(shape, dtype=torch.float32, mean=0.0, seed=0, pooled=False):
    """x, residual and the gradients of two branches; weight, bias and running statistics."""
    g = torch.Generator().manual_seed(seed)
    out = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2) if pooled else shape
    maps = [torch.randn(s, generator=g) for s in (shape, shape, out, out)]
    maps[0] += mean
    C = shape[1]
    channels = [torch.randn(C, generator=g), *(torch.randn(C, generator=g) for _ in range(2)), torch.rand(C)]
    return [t.to(dtype, memory_format=torch.channels_last) for t in maps], channels


def results(operation, maps, channels, residual=False, relu=True, branches=1, device="cpu"):
    """By name what `operation` gives and changes, for the sum of its results times the given gradients; on the CPU."""
    x, other, *dys = (t.to(device, copy=True) for t in maps)
    weight, bias, running_mean, running_var = (t.to(device, copy=True) for t in channels)
    leaves = [t.requires_grad_() for t in (x, weight, bias, *[other] * residual)]
    running = running_mean, running_var
    if operation in (batch_norm_pool, batch_norm_pool_reference):
        ys = (operation(x, weight, bias, *running, 0.1, 1e-5),)
    else:
        arguments = x, weight, bias, *running, other if residual else None, 0.1, 1e-5, relu
        ys = operation(*arguments, *[2] * (branches == 2 and operation is not batch_norm_reference))
        ys = ys if isinstance(ys, tuple) else (ys,) * branches
    assert all(y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last) for y in ys)
    torch.autograd.backward(ys, dys[:branches])
    found = [ys[0].detach(), *running, *(t.grad for t in leaves)]
    return {name: t.cpu() for name, t in zip(NAMES, found, strict=False)}


def rounded_mean(exact, maps, channels):
    """By name, what a mean rounded to float32 may change: to first order, the most of any channel.

    The rounding is d = 2^-24 |mean|, and every x - mean is off by it. So y is off by d rstd |weight|, dweight by
    d rstd |dbias|, and dx, which is rstd weight (g - dbias / n - (x - mean) rstd dweight / n), by its last term's two
    factors: d rstd |weight| (rstd |dweight| + |x - mean| rstd^2 |dbias|) / n. Few rows that are alike make it large.
    """
    x, weight = maps[0].double(), channels[0].double().abs()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    n, rstd = x.numel() // x.shape[1], (var + 1e-5).rsqrt()
    d, far = 2**-24 * mean.abs(), (x - mean[:, None, None]).abs().amax((0, 2, 3))
    dweight, dbias = (exact[name].abs() for name in ("dweight", "dbias"))
    dx = d * rstd * weight * (rstd * dweight + far * rstd.square() * dbias) / n
    return {name: t.max() for name, t in {"y": d * rstd * weight, "dweight": d * rstd * dbias, "dx": dx}.items()}


def assert_as_exact(got, reference, maps, channels, **options):
    """For float32: error against float64 at most twice that of the reference in float32, 4e-6 of the largest, and what
    the rounding of the mean explains."""
    exact = results(reference, [t.double() for t in maps], [t.double() for t in channels], **options)
    plain = results(reference, maps, channels, **options)
    of_mean = rounded_mean(exact, maps, channels)
    assert [*got] == [*exact]
    for name in got:
        error, allowed = ((t[name].double() - exact[name]).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 4e-6 * exact[name].abs().max() + of_mean.get(name, 0), (name, options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_reference(shape, device, on_triton, counters):
    maps, channels = inputs(shape)
    for residual, relu, branches in CASES if shape == SHAPES[0] else IN_A_BLOCK:
        options = {"residual": residual, "relu": relu, "branches": branches}
        got = results(batch_norm, maps, channels, device=device, **options)
        assert_as_exact(got, batch_norm_reference, maps, channels, **options)
    assert counters


def test_several_tiles_in_each_of_several_programs(device, on_triton, monkeypatch):
    """Also: the same bits twice, as sums do not depend on which program is the last."""
    monkeypatch.setattr(sys.modules["fastprune.kernels.batch_norm"], "_PROGRAMS", 6)
    maps, channels = inputs((9, 40, 8, 8), mean=100.0)
    options = {"residual": True, "relu": True, "branches": 2}
    got = results(batch_norm, maps, channels, device=device, **options)
    assert_as_exact(got, batch_norm_reference, maps, channels, **options)
    again = results(batch_norm, maps, channels, device=device, **options)
    assert all(torch.equal(got[name], again[name]) for name in got)


def test_statistics_of_a_large_mean(device, on_triton):
    """Sums of squares would lose all digits: 1e4 deviations squared are 1e8."""
    maps, channels = inputs((33, 8, 7, 7), mean=1e4)
    got = results(batch_norm, maps, channels, device=device)
    var, mean = torch.var_mean(maps[0].double(), (0, 2, 3))
    before = [t.double() for t in channels[2:]]
    # float32 holds 0.1 and 0.9 to 6e-8, and the sum of the two products.
    torch.testing.assert_close(got["running_mean"].double(), 0.9 * before[0] + 0.1 * mean, rtol=4e-7, atol=0)
    torch.testing.assert_close(got["running_var"].double(), 0.9 * before[1] + 0.1 * var, rtol=4e-7, atol=0)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))


@hypothesis.settings(
    max_examples=8 if INTERPRETED else 30,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(shape=shapes, case=st.sampled_from([*CASES, None]), mean=st.sampled_from([0.0, 100.0]))
# Here the rounding of the mean is most of dx's error.
@hypothesis.example(shape=(1, 11, 1, 3), case=(False, False, 1), mean=100.0)
def test_of_any_shape(shape, case, mean, device, on_triton):
    hypothesis.assume(shape[0] * shape[2] * shape[3] > 2)
    operation, reference = batch_norm_pool, batch_norm_pool_reference
    options = {}
    if case:
        operation, reference = batch_norm, batch_norm_reference
        options = dict(zip(["residual", "relu", "branches"], case, strict=True))
    maps, channels = inputs(shape, mean=mean, seed=sum(shape), pooled=not case)
    assert_as_exact(results(operation, maps, channels, device=device, **options), reference, maps, channels, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bf16(case, device, on_triton):
    maps, channels = inputs((5, 24, 6, 6), torch.bfloat16)
    options = dict(zip(["residual", "relu", "branches"], case, strict=True))
    got = results(batch_norm, maps, channels, device=device, **options)
    exact = results(batch_norm_reference, [t.double() for t in maps], [t.double() for t in channels], **options)
    # A rounding errs by 2^-8, interpreted, where it truncates, by 2^-7. A result is rounded once; dx is a sum of three
    # such terms, of about its size.
    for name in ("y", "dx", *["dresidual"] * case[0]):
        error = (got[name].double() - exact[name]).abs().max()
        assert error <= (6 if name == "dx" else 2) * 2**-7 * exact[name].abs().max(), name
    # What is summed is rounded, not the sums: |g| and |g x| of all rows at most.
    total = sum(dy.double().abs().sum((0, 2, 3)) for dy in maps[2:])
    largest = ((maps[0].double() - maps[0].double().mean((0, 2, 3), True)).abs().amax((0, 2, 3))) * 2
    assert ((got["dbias"] - exact["dbias"]).abs() <= 2**-6 * total).all()
    assert ((got["dweight"] - exact["dweight"]).abs() <= 2**-6 * total * largest).all()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-6, atol=1e-6)


def test_agrees_with_torch(device):
    maps, channels = inputs((6, 16, 4, 4))

    def theirs(x, weight, bias, mean, var, residual, momentum, eps, relu):
        return F.relu(F.batch_norm(x, mean, var, weight, bias, True, momentum, eps) + residual)

    got = results(batch_norm, maps, channels, residual=True, device=device)
    expected = results(theirs, maps, channels, residual=True)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("value", [0.0, 3.1, -1e6])
def test_equal_values_have_no_variance(value, device, on_triton):
    maps, channels = inputs((3, 5, 3, 3))
    maps[0].fill_(value)
    got = results(batch_norm, maps, channels, relu=False, device=device)
    assert torch.equal(got["y"], channels[1][:, None, None].expand_as(got["y"]))
    torch.testing.assert_close(got["running_var"], 0.9 * channels[3])


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_is_not_finite_spreads_over_its_channel(value, device):
    maps, channels = inputs((3, 5, 4, 4))
    maps[0][1, 2, 3, 1] = value
    for operation in (batch_norm, batch_norm_pool):
        if operation is batch_norm_pool:
            maps[2] = maps[2][:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
        got = results(operation, maps, channels, device=device)
        for name in ("y", "dx"):
            assert got[name][:, 2].isnan().all()
            assert got[name][:, [0, 1, 3, 4]].isfinite().all()
        finite = [True, True, False, True, True]
        assert got["running_mean"].isfinite().tolist() == finite
        assert got["running_var"].isfinite().tolist() == finite


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (3, 3, 5, 7), (1, 72, 2, 1), (40, 1, 9, 8)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_pool_is_its_reference(shape, ties, device, on_triton):
    """With ties the first of a window gets its gradient; rounded to few values, most windows have some."""
    maps, channels = inputs(shape, pooled=True)
    if ties:
        maps[0].mul_(1.5).round_()
        channels[0][0], channels[1][0] = 0.0, 1.0  # every window is one tie, with a gradient
    got = results(batch_norm_pool, maps, channels, device=device)
    assert_as_exact(got, batch_norm_pool_reference, maps, channels)


def test_pool_bf16(device, on_triton):
    maps, channels = inputs((3, 16, 6, 6), torch.bfloat16, pooled=True)
    got = results(batch_norm_pool, maps, channels, device=device)
    exact = results(batch_norm_pool_reference, [t.double() for t in maps], [t.double() for t in channels])
    assert (got["y"].double() - exact["y"]).abs().max() <= 2**-6 * exact["y"].abs().max()
    assert (got["dx"].double() - exact["dx"]).abs().max() <= 6 * 2**-7 * exact["dx"].abs().max()


def test_pool_by_hand(device):
    """Two windows side by side share the column between them."""
    x = torch.tensor([[0.0, 1.0, 5.0, 5.0], [0.0, 9.0, 0.0, 0.0]]).view(1, 1, 2, 4)
    one, zero = torch.ones(1), torch.zeros(1)
    maps = [x, x, torch.tensor([[[[2.0, 3.0]]]])]
    maps = [t.contiguous(memory_format=torch.channels_last) for t in maps]
    exact = results(batch_norm_pool_reference, [t.double() for t in maps], [t.double() for t in (one, zero, one, one)])
    got = results(batch_norm_pool, maps, [one, zero, one, one], device=device)
    normalised = (9.0 - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(got["y"], normalised.expand(1, 1, 1, 2))
    assert got["dbias"].item() == 5.0
    torch.testing.assert_close(got["dx"].double(), exact["dx"], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*TRITON_DEFAULT_FP_FUSION")
def test_compiled_whole_graph_has_the_eager_bits(device, on_triton):
    """backend aot_eager: fakes, functionalization, a joint graph, mutated statistics; three layers use one counter."""

    def network(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu, branches=1):
        norm = weight, bias, running_mean, running_var
        y, shortcut = batch_norm(x, *norm, residual, momentum, eps, relu, 2)
        y = batch_norm(y * 0.5, *norm, shortcut, momentum, eps, relu)
        return batch_norm_pool(y, *norm, momentum, eps)

    maps, channels = inputs((2, 8, 4, 4), pooled=True)
    eager = results(network, maps, channels, residual=True, device=device)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    got = results(compiled, maps, channels, residual=True, device=device)
    for name in eager:
        assert torch.equal(got[name], eager[name]), name


def test_counters_that_a_capture_makes_are_its_own(monkeypatch):
    """Its graph sets them to zero. Another graph that used them would find what is there when it is replayed."""
    module = sys.modules["fastprune.kernels.batch_norm"]
    monkeypatch.setattr(module, "_COUNTERS", {})
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    x = SimpleNamespace(device=torch.device("cpu"), is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _counters(x, 3) is not _counters(x, 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = _counters(x, 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _counters(x, 3) is kept
    stream.cuda_stream = 8
    assert _counters(x, 3) is not kept


def call(*change, branches=1):
    """batch_norm of [2, 4, 3, 3] with some arguments changed: pairs of a position and a value."""
    maps, channels = inputs((2, 4, 3, 3))
    arguments = [maps[0], *channels, maps[1], 0.1, 1e-5, True, branches]
    for position, value in change:
        arguments[position] = value(arguments[position]) if callable(value) else value
    batch_norm(*arguments)


ONE = torch.ones(1)
BAD = {
    "x is float64": lambda: call((0, lambda t: t.double())),
    "x is not channels-last": lambda: call((0, lambda t: t.contiguous())),
    "x has three dimensions": lambda: call((0, lambda t: t[0])),
    "one position a channel": lambda: call((0, lambda t: t[:1, :, :1, :1].clone()), (5, None)),
    "residual of another dtype": lambda: call((5, lambda t: t.bfloat16())),
    "residual of another size": lambda: call((5, lambda t: t[:1])),
    "residual is not channels-last": lambda: call((5, lambda t: t.contiguous())),
    "weight of another size": lambda: call((1, lambda t: t[:3])),
    "bias in bf16": lambda: call((2, lambda t: t.bfloat16())),
    "running_var with gaps": lambda: call((4, lambda t: torch.ones(8)[::2])),
    "three branches": lambda: call(branches=3),
    "pool of float64": lambda: batch_norm_pool(torch.zeros(2, 1, 2, 2).double(), ONE, ONE, ONE, ONE, 0.1, 1e-5),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    with pytest.raises(ValueError, match=r"\S"):
        BAD[what]()
