"""Every operation against its meaning in reference.py (float64 where it rounds) and against masks made by hand."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.kernels import (
    Segment,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    masked_weight,
    pack_bits,
    reference,
    segment_counts,
    unpack_bits,
)
from fastprune.kernels.segments import check_segments, logical_positions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = [0, 1, 7, 63, 64, 65, 2000]


def random_mask(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_cast(n, dtype):
    weight, mask = torch.randn(n, generator=torch.Generator().manual_seed(1)), random_mask(n)
    weight[::5] = float("nan")
    weight[1::7] = -0.0
    out = torch.full((n,), float("nan"), dtype=dtype)
    assert masked_cast(weight, mask, out) is out
    expected = reference.masked_cast(weight, mask, dtype)
    out, expected = out.nan_to_num(7.0), expected.nan_to_num(7.0)
    if INTERPRETED and dtype == torch.bfloat16:  # the interpreter truncates: one ulp, there only
        assert ((out.float() - expected.float()).abs() <= torch.finfo(dtype).eps * expected.float().abs()).all()
    else:
        assert torch.equal(out, expected)
    pruned = out[~mask]
    assert torch.equal(pruned, torch.zeros_like(pruned))
    assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_masked_sgd_against_float64(n, nesterov):
    g = torch.Generator().manual_seed(n)
    weight, grad, buffer = (torch.randn(n, generator=g) for _ in range(3))
    mask = random_mask(n)
    hyper = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    exact = reference.masked_sgd(weight.double(), grad.double(), buffer.double(), mask, **hyper)
    plain = reference.masked_sgd(weight, grad, buffer, mask, **hyper)
    copy = torch.full((n,), float("nan"), dtype=torch.float16)
    masked_sgd_(weight, grad.clone(), buffer, mask, copy, **hyper)
    for got, exact_one, plain_one in zip((weight, buffer), exact, plain, strict=True):
        if n:
            error, allowed = ((t.double() - exact_one).abs().max() for t in (got, plain_one))
            assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact_one.abs().max()
        assert not got[~mask].any()
        assert not torch.signbit(got[~mask]).any()
    assert torch.equal(copy, weight.half())


@pytest.mark.skipif(INTERPRETED, reason="Triton may fuse a multiplication and an addition otherwise than torch")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("n", [1000, 64 * 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_sgd_is_torchs_to_the_bit(nesterov, n, dtype):
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(n, generator=g, dtype=dtype))
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": nesterov}
    theirs = torch.optim.SGD([p], **hyper, foreach=False)
    weight, buffer = p.detach().clone(), torch.zeros(n, dtype=dtype)
    for _ in range(5):
        grad = torch.randn(n, generator=g, dtype=dtype)
        p.grad = grad.clone()
        theirs.step()
        masked_sgd_(weight, grad, buffer, None, **hyper)
        assert torch.equal(weight, p.detach())


def test_sgd_learning_rate_may_be_a_tensor():
    weight, grad = torch.ones(4), torch.full((4,), 2.0)
    masked_sgd_(weight, grad, torch.zeros(4), None, lr=torch.tensor(0.25))
    assert weight.tolist() == [0.5] * 4


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True, True])], ids=["dense", "masked"])
def test_a_scaled_gradient_is_unscaled_and_an_infinite_one_changes_nothing(mask):
    def step(grad, **scaling):
        weight, buffer, copy = torch.arange(4.0), torch.ones(4), torch.zeros(4, dtype=torch.float16)
        masked_sgd_(weight, grad, buffer, mask, copy, lr=0.5, momentum=0.9, weight_decay=0.1, **scaling)
        return torch.cat([weight, buffer, copy.float()])

    scale, grad = torch.tensor(1024.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(step(grad * 1024, grad_scale=scale, found_inf=torch.zeros(())), step(grad.clone()))
    skipped = step(grad * torch.inf, grad_scale=scale, found_inf=torch.ones(()))
    assert skipped.tolist() == [0.0, 1.0, 2.0, 3.0, *[1.0] * 4, *[0.0] * 4]


def test_pruned_inf_and_nan_gradients_do_not_reach_the_weight():
    weight, buffer = torch.zeros(3), torch.zeros(3)
    grad = torch.tensor([float("inf"), float("nan"), 1.0])
    masked_sgd_(weight, grad, buffer, torch.tensor([False, False, True]), lr=1.0, momentum=0.9, weight_decay=0.1)
    assert weight.tolist() == [0.0, 0.0, -1.0]
    assert buffer.tolist() == [0.0, 0.0, 1.0]


def test_keep_top_by_hand_with_ties():
    score = torch.tensor([3.0, 1.0, 1.0, 0.5, 1.0, 9.0])
    every = torch.ones(6, dtype=torch.bool)
    assert keep_top(score, every, 2).tolist() == [True, False, True, False, True, True]
    assert keep_top(score, every, 3).tolist() == [True, False, False, False, True, True]
    assert keep_top(score, every, 0).tolist() == [True] * 6
    assert keep_top(score, every, 6).tolist() == [False] * 6
    prior = torch.tensor([True, False, True, True, True, True])
    assert keep_top(score, prior, 2).tolist() == [True, False, False, False, True, True]


def test_keep_top_ties_go_by_logical_position():
    # One conv of shape (1, 2, 1, 2): logical order (i, w) = 00 01 10 11, stored as (w, i) = 00 10 01 11.
    segment = Segment("conv", (1, 2, 1, 2), 0, 0)
    ties = torch.ones(4)
    every = torch.ones(4, dtype=torch.bool)
    kept = keep_top(ties, every, 2, [segment])
    assert segment.view(kept).flatten().tolist() == [False, False, True, True]
    assert kept.tolist() == [False, True, False, True]


def test_keep_top_ranks_nan_and_inf_highest():
    score = torch.tensor([float("nan"), 2.0, float("inf"), 1.0])
    kept = keep_top(score, torch.ones(4, dtype=torch.bool), 2)
    assert kept.tolist() == [True, False, True, False]


def test_local_pruning_takes_so_many_from_each_segment():
    segments = [Segment("a", (1, 3, 1, 1), 0, 0), Segment("b", (2, 2), 64, 3)]
    score = torch.full((68,), float("nan"))
    mask = torch.zeros(68, dtype=torch.bool)
    for s, values in zip(segments, ([5.0, 4.0, 6.0], [1.0, 1.0, 2.0, 3.0]), strict=True):
        score[s.span], mask[s.span] = torch.tensor(values), True
    kept = keep_top(score, mask, [1, 2], segments)
    assert kept[:3].tolist() == [True, False, True]
    assert kept[64:].tolist() == [False, False, True, True]
    assert segment_counts(kept, segments).tolist() == [2, 2]


@st.composite
def problems(draw):
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), max_size=4)
    )
    segments, offset, position = [], 0, 0
    for i, shape in enumerate(shapes):
        offset += draw(st.integers(0, 5))
        segments.append(Segment(f"s{i}", shape, offset, position))
        offset += segments[-1].numel
        position += segments[-1].numel
    mask = np.zeros(offset, dtype=bool)
    for s in segments:
        mask[s.span] = draw(st.lists(st.booleans(), min_size=s.numel, max_size=s.numel))
    values = st.sampled_from([0.0, 0.5, 1.0, 1e-40, float("inf"), float("nan")])
    score = np.array(draw(st.lists(values, min_size=offset, max_size=offset)), dtype=np.float32)
    return torch.from_numpy(score), torch.from_numpy(mask), segments, draw(st.floats(0, 1))


@settings(max_examples=25 if INTERPRETED else 150, deadline=None)
@given(problems())
def test_keep_top_is_its_reference(problem):
    score, mask, segments, fraction = problem
    if segments:
        n = round(fraction * int(mask.sum()))
        new = keep_top(score, mask, n, segments)
        assert torch.equal(new, reference.keep_top(score, mask, n, segments))
        assert int(new.sum()) == int(mask.sum()) - n
        assert not (new & ~mask).any()
        each = [round(fraction * int(mask[s.span].sum())) for s in segments]
        local = keep_top(score, mask, each, segments)
        assert torch.equal(local, reference.keep_top(score, mask, each, segments))
    n = round(fraction * int(mask.sum()))
    assert torch.equal(keep_top(score, mask, n), reference.keep_top(score, mask, n))
    if n:
        assert kth_smallest_magnitude(score, mask, n) == reference.kth_smallest_magnitude(score, mask, n)


@settings(max_examples=15 if INTERPRETED else 60, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_round_trip(bits):
    tensor = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(tensor)
    assert torch.equal(packed, reference.pack_bits(tensor))
    assert torch.equal(unpack_bits(packed, len(bits)), tensor)
    assert torch.equal(reference.unpack_bits(packed, len(bits)), tensor)


def test_first_element_is_the_lowest_bit():
    assert pack_bits(torch.tensor([True, False, False, True, *[False] * 5, True])).tolist() == [9, 2]


def test_logical_positions_follow_the_view():
    segments = [Segment("a", (3, 2, 2, 2), 4, 0), Segment("b", (5,), 40, 24)]
    stored = torch.arange(64)
    for s in segments:
        view = s.view(stored).flatten().numpy()
        assert logical_positions(segments, view).tolist() == list(range(s.position, s.position + s.numel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.001])
def test_the_threshold_of_many_weights(dtype, density):
    """Enough elements for the CPU's bracket, and skewed, so that a sample can mislead it."""
    if INTERPRETED and dtype == torch.float64:
        pytest.skip("float64 scores are for a CPU")
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(300_000, generator=g).pow(5).to(dtype)
    mask = torch.rand(300_000, generator=g) < density
    kept = int(mask.sum())
    for k in {1, kept // 5, kept // 2, kept}:
        expected = reference.kth_smallest_magnitude(weight, mask, k)
        assert kth_smallest_magnitude(weight, mask, k, block=1 << 16) == expected
    scores = weight.abs()
    new = keep_top(scores, mask, kept // 5, block=1 << 16)
    assert torch.equal(new, reference.keep_top(scores, mask, kept // 5))


def test_a_sample_that_misleads_is_found_out():
    """Large values exactly where the CPU's sample looks."""
    n = 1 << 18
    weight = torch.rand(n, generator=torch.Generator().manual_seed(0))
    weight[:: (n // (4 << 14)) | 1] += 100
    mask = torch.ones(n, dtype=torch.bool)
    for k in (1, 1000, n // 2, n - 1, n):
        assert kth_smallest_magnitude(weight, mask, k, block=1 << 16) == weight.sort().values[k - 1]


@pytest.mark.parametrize("all_the_same", [0.0, -0.0, 1.5, float("inf"), float("nan")])
def test_all_tied_prunes_the_first_by_logical_position(all_the_same):
    segments = [Segment("a", (4, 3, 3, 3), 0, 0), Segment("b", (5, 7), 128, 108)]
    mask = torch.zeros(163, dtype=torch.bool)
    for s in segments:
        mask[s.span] = True
    score = torch.full((163,), all_the_same)
    for n in (0, 1, 50, 120, 143):
        new = keep_top(score, mask, n, segments, block=64)
        logical = torch.cat([s.view(new).flatten() for s in segments])
        assert logical.tolist() == [False] * n + [True] * (143 - n)


@pytest.mark.parametrize("block", [1, 2, 64, 4096])
def test_the_block_size_changes_nothing(block):
    g = torch.Generator().manual_seed(1)
    score, mask = torch.rand(500, generator=g), torch.rand(500, generator=g) < 0.7
    if not (INTERPRETED and block < 64):  # slow: a program an element
        assert torch.equal(keep_top(score, mask, 100, block=block), reference.keep_top(score, mask, 100))
    bits = pack_bits(mask, block=block)
    assert torch.equal(unpack_bits(bits, 500, block=block), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masked_weight_has_a_masked_gradient(dtype):
    weight = torch.randn(3, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    mask = torch.empty_like(weight, dtype=torch.bool).copy_(torch.rand(3, 4, 3, 3) < 0.5)
    out = masked_weight(weight, mask, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, torch.where(mask, weight, 0.0).to(dtype))
    grad = torch.randn(3, 4, 3, 3).to(dtype)
    out.backward(grad)
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.where(mask, grad.float(), 0.0))


BAD = {
    "prune more than is left": lambda f, m: keep_top(f, m, 5),
    "prune a negative number": lambda f, m: keep_top(f, m, -1),
    "one number per segment without segments": lambda f, m: keep_top(f, m, [1]),
    "mask of another dtype": lambda f, m: keep_top(f, m.float(), 1),
    "mask of another length": lambda f, m: keep_top(f, m[:3], 1),
    "two-dimensional": lambda f, m: keep_top(f.view(2, 2), m.view(2, 2), 1),
    "not contiguous": lambda f, m: masked_cast(torch.zeros(8)[::2], m, f),
    "k of 0": lambda f, m: kth_smallest_magnitude(f, m, 0),
    "k too large": lambda f, m: kth_smallest_magnitude(f, m, 5),
    "rate of two": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=torch.ones(2)),
    "a scale without found_inf": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=1.0, grad_scale=torch.ones(())),
    "copy of another dtype": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, torch.zeros(4), lr=1.0),
    "too many numbers": lambda f, m: keep_top(f, m, [1, 1], [Segment("a", (4,), 0, 0)]),
    "gradient is the weight": lambda f, m: masked_sgd_(f, f, torch.zeros(4), m, lr=1.0),
    "integer weight": lambda f, m: masked_sgd_(m.long(), m.long(), m.long(), m, lr=1.0),
    "nesterov without momentum": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=1.0, nesterov=True),
    "too few bytes": lambda f, m: unpack_bits(torch.zeros(1, dtype=torch.uint8), 9),
    "bits of another dtype": lambda f, m: pack_bits(f),
    "segment beyond the buffer": lambda f, m: segment_counts(m, [Segment("a", (5,), 0, 0)]),
    "segments overlap": lambda f, m: check_segments([Segment("a", (2,), 0, 0), Segment("b", (2,), 1, 2)], 4),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    with pytest.raises(ValueError, match=r"\S"):
        BAD[what](torch.arange(4.0), torch.ones(4, dtype=torch.bool))
