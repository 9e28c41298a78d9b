"""Triton: the masked optimiser step and the masked cast, each one launch over a flat buffer of all layers.

Every element is read once and written once, so bytes over copy bandwidth is the floor: 23 bytes a weight for the step
with a bf16 copy (weight, gradient, momentum and mask in; weight, momentum and copy out), 7 for a cast to bf16.
"""

import triton
import triton.language as tl
from torch import Tensor


def launch(n: int, block: int, each: int) -> tuple[tuple[int], int]:
    """Grid of one program a block, and the warps in which a thread has `each` elements."""
    return (triton.cdiv(n, block),), min(max(block // (32 * each), 1), 16)


@triton.jit
def _masked_cast(weight, mask, out, n, BLOCK: tl.constexpr):
    # 64-bit positions: a buffer may hold more than 2^31 elements.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    # Loaded where pruned too, and then not selected: a load under a mask that is itself loaded waits for it and is
    # made element by element.
    keep = tl.load(mask + i, mask=there, other=0) != 0
    value = tl.load(weight + i, mask=there, other=0.0)
    tl.store(out + i, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=there)


@triton.jit
def _masked_sgd(
    weight,
    grad,
    buffer,
    mask,
    copy,
    lr,
    grad_scale,
    found_inf,
    n,
    momentum,
    weight_decay,
    HAS_MASK: tl.constexpr,
    HAS_COPY: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    SCALED: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if SCALED:  # noqa: SIM102, for the compiler the first is a constant
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < n
    rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else lr
    w = tl.load(weight + i, mask=there, other=0.0)
    g = tl.load(grad + i, mask=there, other=0.0)
    b = tl.load(buffer + i, mask=there, other=0.0)
    if SCALED:
        g *= tl.div_rn(1.0, tl.load(grad_scale))
    g += weight_decay * w
    b = momentum * b + g
    step = g + momentum * b if NESTEROV else b
    w -= rate * step
    if HAS_MASK:
        keep = tl.load(mask + i, mask=there, other=0) != 0
        w = tl.where(keep, w, 0.0)
        b = tl.where(keep, b, 0.0)
    tl.store(weight + i, w, mask=there)
    tl.store(buffer + i, b, mask=there)
    if HAS_COPY:
        tl.store(copy + i, w.to(copy.dtype.element_ty), mask=there)


def masked_cast(weight: Tensor, mask: Tensor, out: Tensor, block: int) -> None:
    """Fills `out`; see ops.masked_cast."""
    n = weight.numel()
    if n:
        grid, warps = launch(n, block, each=8)  # 16 bytes of bf16 a store
        _masked_cast[grid](weight, mask, out, n, BLOCK=block, num_warps=warps)


def masked_sgd(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    low_precision_copy: Tensor | None,
    lr: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    block: int,
) -> None:
    """Mutates weight, momentum_buffer and low_precision_copy; see ops.masked_sgd_."""
    n = weight.numel()
    if n:
        # 16 bytes of fp32 an access; with eight elements the compiler shuffles the mask through shared memory.
        grid, warps = launch(n, block, each=4)
        # A pointer that is not used still needs a value: the weight stands in.
        _masked_sgd[grid](
            weight,
            grad,
            momentum_buffer,
            weight if mask is None else mask,
            weight if low_precision_copy is None else low_precision_copy,
            lr,
            weight if grad_scale is None else grad_scale,
            weight if found_inf is None else found_inf,
            n,
            momentum,
            weight_decay,
            HAS_MASK=mask is not None,
            HAS_COPY=low_precision_copy is not None,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            SCALED=found_inf is not None,
            NESTEROV=nesterov,
            BLOCK=block,
            num_warps=warps,
        )
