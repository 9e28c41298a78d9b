"""Mask weights and cast them to the precision that a layer computes in, in one pass over a flat buffer.

Pruned weights become exactly +0.
"""

# Masking is a select, not a product: a product gives -0 and turns a pruned inf or NaN into NaN. Each element is read
# once and written once, so the lower bound on a GPU is bytes over copy bandwidth: 7 bytes per weight for a cast to
# bf16.

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import (
    FULL,
    HALF,
    check_block,
    check_tensor,
    compiled,
    grid_and_warps,
    on_its_device,
    tl,
    triton,
    uses_triton,
)


@on_its_device
def masked_cast(weight: Tensor, mask: Tensor, out: Tensor, *, block: int = 1024) -> Tensor:
    """Write where(mask, weight, +0) into `out`, in its dtype, and return it.

    weight: floating [n].  mask: bool [n].  out: floating [n], overwritten; `weight` itself, or memory that does not
    overlap it.  block: elements per program.  A pruned NaN or inf becomes +0, a kept one stays.  ValueError if dtypes,
    sizes or devices do not match.
    """
    check_tensor("weight", weight, weight, FULL + HALF)
    check_tensor("mask", mask, weight, (torch.bool,))
    check_tensor("out", out, weight, FULL + HALF)
    if uses_triton(weight):
        check_block(block)
        _masked_cast_triton(weight, mask, out, block)
        return out
    zero_pruned(out.copy_(weight), mask)
    return out


def masked_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """where(mask, weight, +0) in `dtype`, differentiable. The gradient is masked and has the weight's dtype.

    weight: floating, mask: bool, of the same shape.
    """
    # Eager on a GPU: one launch forward, one backward. A compiler gets plain torch, which it fuses into the consumer of
    # the weight.
    if torch.compiler.is_compiling() or not uses_triton(weight) or weight.stride() != mask.stride():
        return masked_cast_reference(weight, mask, dtype)
    return _MaskedWeight.apply(weight, mask, dtype)


def masked_cast_reference(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """where(mask, weight, +0) in `dtype`: a select, so a pruned NaN or inf is +0 as well."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)).to(dtype)


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = weight.dtype
        return _masked_cast_any_layout(weight, mask, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        # The gradient's memory layout is that of the next operation's output, which may differ from the mask's.
        like_mask = torch.empty_like(mask, dtype=grad.dtype).copy_(grad)
        return _masked_cast_any_layout(like_mask, mask, ctx.dtype), None, None


def _masked_cast_any_layout(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """masked_cast of dense tensors with equal strides, applied to their flat memory; returns a new tensor."""
    out = torch.empty_like(weight, dtype=dtype)
    flat = [t.as_strided((t.numel(),), (1,)) for t in (weight, mask, out)]
    masked_cast(flat[0].detach(), flat[1], flat[2])
    return out


# CPU: torch casts, numba masks


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Write +0 into `values`, floating [n] on a CPU, wherever the mask, bool [n], is False."""
    # On the bits: a kept NaN keeps its payload, and numba has no half-precision types. Several times faster than
    # masked_fill_.
    kind = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[values.element_size()]
    bits = values.detach().view(kind).numpy()
    compiled(_zero_pruned_loop)(bits, mask.numpy(), bits.dtype.type(0))


def _zero_pruned_loop(bits: np.ndarray, mask: np.ndarray, zero: np.unsignedinteger) -> None:
    for i in range(bits.size):
        bits[i] = bits[i] if mask[i] else zero


# GPU: Triton


@triton.jit
def _masked_cast_kernel(weight, mask, out, n, BLOCK: tl.constexpr):
    # 64-bit positions: a buffer may hold more than 2^31 elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < n
    # Pruned weights are loaded, too, and not selected: a load that depends on a loaded mask waits for it and is done
    # element by element.
    keep = tl.load(mask + i, mask=valid, other=0) != 0
    value = tl.load(weight + i, mask=valid, other=0.0)
    tl.store(out + i, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=valid)


def _masked_cast_triton(weight: Tensor, mask: Tensor, out: Tensor, block: int) -> None:
    n = weight.numel()
    if n:
        grid, warps = grid_and_warps(n, block, each=8)  # 16 bytes of bf16 per store
        _masked_cast_kernel[grid](weight, mask, out, n, BLOCK=block, num_warps=warps)
