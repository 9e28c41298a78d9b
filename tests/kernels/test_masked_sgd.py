"""masked_sgd_ against its reference in float64, and against torch.optim.SGD to the bit on a CPU."""

from itertools import product

import pytest
import torch

from fastprune.kernels import Segment, masked_sgd_
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.masked_sgd import (
    masked_sgd_reference,
    masked_sgd_scattered_,
    masked_sgd_scattered_reference,
    sgd_tiles,
)
from tests.kernels.inputs import (
    FAR,
    FINITE,
    FLOATS,
    INF,
    KEPT,
    SHORT,
    SMALL,
    VALUES,
    assert_as_exact,
    assert_same_bits,
    bits,
    captured,
    chunks,
    drawn,
    equal_bits,
    far_drawn,
    mask_of,
    random_mask,
    require_gpu_memory,
    values,
)

# Numbers that float32 holds exactly: others would differ between float32 and float64 before anything is computed.
HYPER = {"lr": 0.25, "momentum": float(torch.tensor(0.9)), "weight_decay": float(torch.tensor(1e-2))}


@pytest.mark.parametrize("kept", [*KEPT, "no mask"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_step(n, kept, nesterov, device):
    """Denormals beside each other, where the smallest step is an ulp; large values; and what is not finite. With a mask
    the rate is on the device, beside a gradient that is scaled.
    """
    mask = None if kept == "no mask" else mask_of(n, kept)
    mask_there = None if mask is None else mask.to(device)
    hyper = HYPER | {"nesterov": nesterov}
    for copy, (special, scale) in product([None, *SHORT], [(SMALL, 1e-40), (FINITE, 1.0), (VALUES, 1.0)]):
        before = [values(n, special, n + i) for i in range(3)]
        for t in before:
            t[1::2] *= scale
        exact = masked_sgd_reference(*(t.double() for t in before), mask, **hyper)
        plain = masked_sgd_reference(*before, mask, **hyper)
        weight, grad, buffer = (t.to(device, copy=True) for t in before)
        short = None if copy is None else torch.empty(n, dtype=copy, device=device)
        options = dict(hyper)
        if kept == "mixed":
            rate, factor, zero = (torch.tensor(v, device=device) for v in (hyper["lr"], 1024.0, 0.0))
            grad *= factor
            options |= {"lr": rate, "grad_scale": factor, "found_inf": zero}
        masked_sgd_(weight, grad, buffer, mask_there, short, **options)
        for got, plain_one, exact_one in zip((weight.cpu(), buffer.cpu()), plain, exact, strict=True):
            finite = plain_one.isfinite()
            assert_same_bits(got[~finite], plain_one[~finite])
            if finite.any():
                assert_as_exact(got[finite], plain_one[finite], exact_one[finite])
            if mask is not None:
                assert not bits(got[~mask]).any()
        if short is not None:
            assert_same_bits(short, weight.cpu().to(copy), rounded=True)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("n_weights", [1000, 64 * 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_step_is_torchs_to_the_bit(nesterov, n_weights, dtype, device):
    if INTERPRETED or device.type != "cpu":
        pytest.skip("Triton may fuse a multiplication and an addition otherwise than torch")
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(n_weights, generator=g, dtype=dtype))
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": nesterov}
    theirs = torch.optim.SGD([p], **hyper, foreach=False)
    weight, buffer = p.detach().clone(), torch.zeros(n_weights, dtype=dtype)
    for _ in range(5):
        grad = torch.randn(n_weights, generator=g, dtype=dtype)
        p.grad = grad.clone()
        theirs.step()
        masked_sgd_(weight, grad, buffer, None, **hyper)
        assert torch.equal(weight, p.detach())


def test_step_by_hand(device):
    weight, grad = torch.ones(4, device=device), torch.full((4,), 2.0, device=device)
    masked_sgd_(weight, grad, torch.zeros(4, device=device), None, lr=torch.tensor(0.25, device=device))
    assert weight.tolist() == [0.5] * 4


@pytest.mark.parametrize("mask", [None, [True, False, True, True]], ids=["dense", "masked"])
def test_a_scaled_gradient_is_unscaled_and_an_infinite_one_changes_nothing(mask, device):
    def step(grad, **scaling):
        weight, buffer = torch.arange(4.0, device=device), torch.ones(4, device=device)
        copy = torch.zeros(4, dtype=torch.float16, device=device)
        where = None if mask is None else torch.tensor(mask, device=device)
        masked_sgd_(weight, grad, buffer, where, copy, lr=0.5, momentum=0.9, weight_decay=0.1, **scaling)
        return torch.cat([weight, buffer, copy.float()])

    scale, grad = torch.tensor(1024.0, device=device), torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    scaled = step(grad * 1024, grad_scale=scale, found_inf=torch.zeros((), device=device))
    assert torch.equal(scaled, step(grad.clone()))
    skipped = step(grad * torch.inf, grad_scale=scale, found_inf=torch.ones((), device=device))
    assert skipped.tolist() == [0.0, 1.0, 2.0, 3.0, *[1.0] * 4, *[0.0] * 4]


def test_a_skipped_step_leaves_every_bit(n, device):
    weight, grad, buffer = (values(n, VALUES, i).to(device) for i in range(3))
    copy, mask = values(n, VALUES, 3).to(device, torch.float16), random_mask(n, 0.6).to(device)
    before = [t.clone() for t in (weight, buffer, copy)]
    one = torch.ones((), device=device)
    masked_sgd_(weight, grad, buffer, mask, copy, lr=one, momentum=0.9, grad_scale=one, found_inf=one)
    for got, old in zip((weight, buffer, copy), before, strict=True):
        assert_same_bits(got, old)


def test_pruned_inf_and_nan_gradients_do_not_reach_the_weight(device):
    weight, buffer = torch.zeros(3, device=device), torch.zeros(3, device=device)
    grad = torch.tensor([float("inf"), float("nan"), 1.0], device=device)
    mask = torch.tensor([False, False, True], device=device)
    masked_sgd_(weight, grad, buffer, mask, lr=1.0, momentum=0.9, weight_decay=0.1)
    assert weight.tolist() == [0.0, 0.0, -1.0]
    assert buffer.tolist() == [0.0, 0.0, 1.0]


def test_one_graph_takes_steps_at_other_rates(device):
    """One step, captured on a GPU and replayed with another rate on the device, against steps that are not."""
    n = 2000
    start = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mask = random_mask(n, 0.6)
    weight, buffer, source = (t.to(device, copy=True) for t in start)
    eager_weight, eager_buffer = weight.clone(), buffer.clone()
    mask_there, lr, grad = mask.to(device), torch.tensor(0.0, device=device), torch.empty(n, device=device)
    copy = torch.empty(n, dtype=torch.bfloat16, device=device)
    hyper = {"momentum": HYPER["momentum"], "weight_decay": HYPER["weight_decay"]}

    def step(weight, buffer, rate):
        grad.copy_(source)  # the step may leave anything there
        masked_sgd_(weight, grad, buffer, mask_there, copy, lr=rate, **hyper)

    replay = captured(lambda: step(weight, buffer, lr), device)
    weight.copy_(start[0])
    buffer.copy_(start[1])
    exact = plain = start[0], start[1]
    for rate in (0.5, 0.125, 0.75):
        step(eager_weight, eager_buffer, torch.tensor(rate, device=device))
        lr.fill_(rate)
        replay()
        known = hyper | {"lr": rate, "nesterov": False}
        exact = masked_sgd_reference(*(t.double() for t in (exact[0], start[2], exact[1])), mask, **known)
        plain = masked_sgd_reference(plain[0], start[2], plain[1], mask, **known)
    for got, eager, plain_one, exact_one in zip(
        (weight, buffer), (eager_weight, eager_buffer), plain, exact, strict=True
    ):
        assert_same_bits(got, eager)
        assert_as_exact(got, plain_one, exact_one)
    assert_same_bits(copy, weight.cpu().to(copy.dtype), rounded=True)


BAD = {
    "rate of two": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=torch.ones(2)),
    "a scale without found_inf": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=1.0, grad_scale=torch.ones(())),
    "copy of another dtype": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, torch.zeros(4), lr=1.0),
    "gradient is the weight": lambda f, m: masked_sgd_(f, f, torch.zeros(4), m, lr=1.0),
    "integer weight": lambda f, m: masked_sgd_(m.long(), m.long(), m.long(), m, lr=1.0),
    "nesterov without momentum": lambda f, m: masked_sgd_(f, f + 1, f + 2, m, lr=1.0, nesterov=True),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    with pytest.raises(ValueError, match=r"\S"):
        BAD[what](torch.arange(4.0), torch.ones(4, dtype=torch.bool))


def test_step_beyond_2_to_31_elements(device):
    """Numbers that float32 and bf16 hold exactly, so that the whole result is known to the bit."""
    require_gpu_memory(36, device)
    weight, grad, buffer = (far_drawn(seed, torch.float32, device) for seed in (1, 2, 3))
    mask, copy = far_drawn(4, torch.bool, device), torch.empty(FAR, dtype=torch.bfloat16, device=device)
    masked_sgd_(weight, grad, buffer, mask, copy, lr=0.5, momentum=0.5)
    for part in chunks():
        before = [drawn(seed, part, torch.float32, device) for seed in (1, 2, 3)]
        expected = masked_sgd_reference(*before, mask[part], lr=0.5, momentum=0.5, weight_decay=0.0, nesterov=False)
        assert equal_bits(weight[part], expected[0])
        assert equal_bits(buffer[part], expected[1])
        assert equal_bits(copy[part], expected[0].to(copy.dtype))


# Gradients where autograd left them


def scattered_case(shapes, dtype, seed=0, gap=3):
    """Segments of these shapes with gaps between them, their gradients, and weight, momentum and mask [n]."""
    g = torch.Generator().manual_seed(seed)
    segments, offset, position = [], gap, 0
    for i, shape in enumerate(shapes):
        segments.append(Segment(f"s{i}", shape, offset, position))
        offset, position = offset + segments[-1].numel + gap, position + segments[-1].numel
    weight, buffer = (torch.randn(offset, generator=g) for _ in range(2))
    grads = [segment.view(torch.randn(offset, generator=g)).to(dtype) for segment in segments]
    # In the order of the weight, in memory of their own: `to` keeps both, but for float32.
    grads = [torch.empty_like(grad).copy_(grad) for grad in grads]
    return segments, grads, weight, buffer, torch.rand(offset, generator=g) < 0.6


ODD = [(5, 3, 3, 3), (1,), (7, 9), (), (4, 1, 3, 3), (6, 5, 1, 1), (1, 8, 2, 2), (0,), (1037,)]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("how", ["no mask", "mask", "scaled"])
def test_scattered_gradients_give_the_step_of_flat_ones_to_the_bit(how, dtype, nesterov, device):
    segments, grads, *before, mask = scattered_case(ODD, dtype)
    hyper, between = HYPER | {"nesterov": nesterov}, torch.ones_like(mask)
    flat = torch.zeros_like(before[0])
    for segment, grad in zip(segments, grads, strict=True):
        segment.view(flat).copy_(grad)
        between[segment.span] = False
    exact = masked_sgd_scattered_reference(
        before[0].double(), grads, before[1].double(), None if how == "no mask" else mask, segments, **hyper
    )
    if how == "scaled":
        rate, scale, zero = (torch.tensor(v, device=device) for v in (hyper["lr"], 4.0, 0.0))
        grads, flat = [grad * 4 for grad in grads], flat * 4
        hyper |= {"lr": rate, "grad_scale": scale, "found_inf": zero}
    keep = None if how == "no mask" else mask.to(device)
    copies = [torch.full_like(mask, 7, dtype=torch.float16, device=device) for _ in range(2)]
    weight, buffer = (t.to(device, copy=True) for t in before)
    expected_weight, expected_buffer = (t.to(device, copy=True) for t in before)
    there = [g.to(device) for g in grads]
    masked_sgd_scattered_(weight, there, buffer, keep, sgd_tiles(segments, weight, block=256), copies[0], **hyper)
    masked_sgd_(expected_weight, flat.to(device), expected_buffer, keep, copies[1], **hyper)
    for got, expected, old in zip((weight, buffer), (expected_weight, expected_buffer), before, strict=True):
        assert_same_bits(got.cpu()[~between], expected.cpu()[~between])
        assert_same_bits(got.cpu()[between], old[between])
    assert_same_bits(copies[0].cpu()[~between], copies[1].cpu()[~between])
    assert (copies[0].cpu()[between] == 7).all()
    for got, reference in zip((weight, buffer), exact, strict=True):
        error, ulp = (
            (got.cpu().double() - reference).abs().max(),
            torch.finfo(torch.float32).eps * reference.abs().max(),
        )
        assert error <= 4 * ulp  # four roundings, none of more than half an ulp of the largest value


@pytest.mark.parametrize("sizes", [[1] * 130, [40, *[3] * 63, 5], [601]], ids=["130 layers", "65 layers", "301 tiles"])
def test_any_number_of_layers_and_tiles(sizes, device):
    """More layers than one launch takes, and tiles of two elements."""
    segments, grads, weight, buffer, mask = scattered_case([(size,) for size in sizes], torch.bfloat16, gap=0)
    before, flat = [weight.clone(), buffer.clone()], torch.cat([grad.float() for grad in grads])
    there = [t.to(device, copy=True) for t in (weight, buffer, mask)]
    tiles = sgd_tiles(segments, there[0], block=2)
    assert len(tiles) == -(-len(sizes) // 64)
    masked_sgd_scattered_(there[0], [g.to(device) for g in grads], there[1], there[2], tiles, **HYPER)
    expected = [t.to(device, copy=True) for t in before]
    masked_sgd_(expected[0], flat.to(device), expected[1], there[2], **HYPER)
    for got, other in zip(there, expected, strict=False):
        assert_same_bits(got, other)


def test_a_skipped_scattered_step_leaves_every_bit(device):
    segments, grads, weight, buffer, mask = scattered_case(ODD, torch.float16)
    copy = torch.full_like(weight, 3, dtype=torch.float16)
    there = [t.to(device, copy=True) for t in (weight, buffer, copy)]
    one = torch.ones((), device=device)
    masked_sgd_scattered_(
        there[0], [(g * INF).to(device) for g in grads], there[1], mask.to(device), sgd_tiles(segments, there[0]),
        there[2], lr=one, momentum=0.9, grad_scale=one, found_inf=one,
    )  # fmt: skip
    for got, old in zip(there, (weight, buffer, copy), strict=True):
        assert_same_bits(got, old)


def test_a_graph_reads_gradients_at_the_addresses_of_its_capture(device):
    """The gradients of the capture are written anew before each replay, as a captured backward pass does."""
    segments, grads, weight, buffer, mask = scattered_case(ODD, torch.bfloat16)
    weight, buffer, mask = (t.to(device) for t in (weight, buffer, mask))
    grads, expected = [g.to(device) for g in grads], [weight.clone(), buffer.clone()]
    flat, tiles = torch.zeros_like(weight), sgd_tiles(segments, weight)
    replay = captured(lambda: masked_sgd_scattered_(weight, grads, buffer, mask, tiles, **HYPER), device)
    weight.copy_(expected[0])
    buffer.copy_(expected[1])
    for scale in (1.0, -0.5):
        for segment, grad in zip(segments, grads, strict=True):
            grad.mul_(scale)
            segment.view(flat).copy_(grad)
        replay()
        masked_sgd_(expected[0], flat, expected[1], mask, **HYPER)
    for segment in segments:
        for got, other in zip((weight, buffer), expected, strict=True):
            assert_same_bits(got[segment.span], other[segment.span])


MISFITS = {
    "too few": lambda grads: grads[1:],
    "two dtypes": lambda grads: [grads[0].half(), *grads[1:]],
    "another dtype": lambda grads: [g.double() for g in grads],
    "another shape": lambda grads: [grads[0], grads[1][:-1]],
    "another order": lambda grads: [grads[0].contiguous(), grads[1]],
    "an odd address": lambda grads: [grads[0], torch.zeros(8)[1:]],
}


@pytest.mark.parametrize("what", MISFITS)
def test_gradients_that_do_not_lie_as_their_weights_are_value_errors(what):
    segments, grads, weight, buffer, mask = scattered_case([(2, 3, 2, 2), (7,)], torch.float32)
    before, tiles = weight.clone(), sgd_tiles(segments, weight)
    with pytest.raises(ValueError, match="gradient"):
        masked_sgd_scattered_(weight, MISFITS[what](grads), buffer, mask, tiles, lr=1.0)
    assert torch.equal(weight, before)
