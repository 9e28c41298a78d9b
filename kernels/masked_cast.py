"""Weights in the precision that a layer computes with, pruned ones exactly +0: one pass over a flat buffer.

Masking is a select, not a product: a product gives -0 and turns a pruned inf or NaN into NaN. Each element is read once
and written once, so the floor on a GPU is bytes over copy bandwidth: 7 bytes a weight for a cast to bf16.
"""

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
    """Writes where(mask, weight, +0) into `out`, in out's dtype, and returns it.

    weight: floating [n], mask: bool [n], out: floating [n], the weight itself or memory apart from it. A pruned
    NaN or inf becomes +0, a kept one stays. block: elements a program. ValueError on mismatch.
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
    """where(mask, weight, +0) in `dtype`, differentiable: the gradient is masked, and has the weight's dtype.

    weight: floating, mask: bool, of one shape. What a masked layer computes with. In eager mode on a GPU it is one
    launch forward and one backward; a compiler gets plain torch, which it fuses into what reads it.
    """
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
        # The gradient's layout is the next operation's choice; the mask's is the weight's.
        like_mask = torch.empty_like(mask, dtype=grad.dtype).copy_(grad)
        return _masked_cast_any_layout(like_mask, mask, ctx.dtype), None, None


def _masked_cast_any_layout(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """masked_cast of dense tensors of equal strides, as the flat memory that they are; a new tensor."""
    out = torch.empty_like(weight, dtype=dtype)
    flat = [t.as_strided((t.numel(),), (1,)) for t in (weight, mask, out)]
    masked_cast(flat[0].detach(), flat[1], flat[2])
    return out


# CPU: torch casts, numba masks


def zero_pruned(values: Tensor, mask: Tensor) -> None:
    """Writes +0 into `values`, floating [n] on a CPU, where the mask (bool [n]) is False."""
    # As bits, because what is there may be NaN; several times faster than masked_fill_.
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
    # Loaded where pruned too, and then not selected: a load under a mask that is itself loaded waits for it and is
    # made element by element.
    keep = tl.load(mask + i, mask=valid, other=0) != 0
    value = tl.load(weight + i, mask=valid, other=0.0)
    tl.store(out + i, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=valid)


def _masked_cast_triton(weight: Tensor, mask: Tensor, out: Tensor, block: int) -> None:
    n = weight.numel()
    if n:
        grid, warps = grid_and_warps(n, block, each=8)  # 16 bytes of bf16 a store
        _masked_cast_kernel[grid](weight, mask, out, n, BLOCK=block, num_warps=warps)
