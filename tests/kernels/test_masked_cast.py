"""masked_cast and masked_weight are their reference to the bit, special values included."""

import pytest
import torch

from fastprune.kernels import masked_cast, masked_weight
from fastprune.kernels.masked_cast import masked_cast_reference
from tests.kernels.inputs import (
    FLOATS,
    VALUES,
    assert_same_bits,
    chunks,
    equal_bits,
    far_drawn,
    kept,
    mask_of,
    random_mask,
    require_gpu_memory,
    values,
)


@kept
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_cast(n, kept, source, device):
    """A pruned NaN, inf or -0 is +0, and a kept one stays; into other memory and in place."""
    weight, mask = values(n, VALUES, n, source), mask_of(n, kept)
    there, mask_there = weight.to(device, copy=True), mask.to(device)
    for target in FLOATS:
        out = torch.empty(n, dtype=target, device=device)
        assert masked_cast(there, mask_there, out) is out
        assert_same_bits(out, masked_cast_reference(weight, mask, target), rounded=source != target)
    masked_cast(there, mask_there, there)
    assert_same_bits(there, masked_cast_reference(weight, mask, source))


@kept
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_weight_and_its_gradient(n, kept, dtype, device):
    weight, mask, grad = values(n, VALUES, n), mask_of(n, kept), values(n, VALUES, n + 1, dtype)
    there = weight.to(device, copy=True).requires_grad_()
    out = masked_weight(there, mask.to(device), dtype)
    assert_same_bits(out.detach(), masked_cast_reference(weight, mask, dtype), rounded=True)
    out.backward(grad.to(device))
    assert there.grad.dtype == torch.float32
    assert_same_bits(there.grad, masked_cast_reference(grad, mask, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mask_form", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("grad_form", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (64, 3, 7, 7)], ids=str)
def test_masked_weight_of_a_conv(shape, mask_form, grad_form, dtype, device):
    """In channels-last order, beside a mask and under a gradient of that order or another."""
    n = torch.Size(shape).numel()
    weight, mask, grad = values(n, [1.0, -0.0], 1), random_mask(n, 0.5), values(n, [0.5, -0.0], 2, dtype)
    weight, mask, grad = (t.view(shape) for t in (weight, mask, grad))
    there = weight.to(device, memory_format=torch.channels_last).requires_grad_()
    out = masked_weight(there, mask.to(device, memory_format=mask_form), dtype)
    assert_same_bits(out.detach(), masked_cast_reference(weight, mask, dtype), rounded=True)
    out.backward(grad.to(device, memory_format=grad_form))
    assert_same_bits(there.grad, masked_cast_reference(grad, mask, torch.float32))


def test_a_strided_weight_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        masked_cast(torch.zeros(8)[::2], torch.ones(4, dtype=torch.bool), torch.zeros(4))


def test_cast_beyond_2_to_31_elements(device):
    require_gpu_memory(14, device)
    weight, mask = far_drawn(1, torch.bfloat16, device), far_drawn(2, torch.bool, device)
    out = masked_cast(weight, mask, torch.empty_like(weight))
    for part in chunks():
        assert equal_bits(out[part], masked_cast_reference(weight[part], mask[part], out.dtype))
