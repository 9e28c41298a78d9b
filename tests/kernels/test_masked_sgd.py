"""masked_sgd_ against its reference in float64, and against torch.optim.SGD to the bit on a CPU."""

from itertools import product

import pytest
import torch

from fastprune.kernels import masked_sgd_
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.masked_sgd import masked_sgd_reference
from tests.kernels.inputs import (
    FAR,
    FINITE,
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
