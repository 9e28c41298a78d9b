"""The optimiser step of masked weights: torch.optim.SGD's update, mask and low-precision copy in one pass."""

# Each element is read once and written once, so the lower bound on a GPU is bytes over copy bandwidth: 23 bytes per
# weight with a bf16 copy (weight, gradient, momentum and mask in; weight, momentum and copy out).

import torch
from torch import Tensor

from fastprune.kernels.dispatch import (
    FULL,
    HALF,
    check_block,
    check_tensor,
    grid_and_warps,
    on_its_device,
    tl,
    triton,
    uses_triton,
)
from fastprune.kernels.masked_cast import masked_cast_reference, zero_pruned


@on_its_device
def masked_sgd_(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    low_precision_copy: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    block: int = 1024,
) -> None:
    """One step of torch.optim.SGD on masked weights, in one launch on a GPU.

    weight, momentum_buffer: float32 [n] (float32 or float64 on a CPU), mutated; exactly +0 afterwards where mask (bool
    [n]) is False, whatever the gradient. A momentum buffer of zeros gives torch's first step.  grad: like weight, not
    changed.  low_precision_copy: bf16 or fp16 [n], overwritten with the new weight.  lr: a number, or a float tensor of
    one element on the same device (for a captured graph).  grad_scale, found_inf: float32 of one element each, both or
    neither, as GradScaler passes them to fused optimisers: the gradient is divided by the scale, and nothing changes if
    found_inf is not 0.  block: elements per program.  ValueError if dtypes, sizes or devices do not match, or if two
    buffers share memory.
    """
    on_triton = uses_triton(weight)
    check_tensor("weight", weight, weight, FULL[:1] if on_triton else FULL)
    check_tensor("grad", grad, weight, (weight.dtype,))
    check_tensor("momentum_buffer", momentum_buffer, weight, (weight.dtype,))
    if mask is not None:
        check_tensor("mask", mask, weight, (torch.bool,))
    if low_precision_copy is not None:
        check_tensor("low_precision_copy", low_precision_copy, weight, HALF)
    if (grad_scale is None) != (found_inf is None):
        raise ValueError("grad_scale and found_inf must be given together")
    for name, one, dtypes in (
        ("lr", lr, FULL),
        ("grad_scale", grad_scale, FULL[:1]),
        ("found_inf", found_inf, FULL[:1]),
    ):
        if isinstance(one, Tensor) and (one.numel() != 1 or one.device != weight.device or one.dtype not in dtypes):
            raise ValueError(
                f"{name} must be one {' or '.join(map(str, dtypes))} on {weight.device}, got {one.dtype} of shape "
                f"{tuple(one.shape)} on {one.device}"
            )
    if nesterov and momentum <= 0:
        raise ValueError("Nesterov momentum needs momentum > 0")
    if len({weight.data_ptr(), grad.data_ptr(), momentum_buffer.data_ptr()}) < 3 and weight.numel():
        raise ValueError("weight, grad and momentum_buffer must not be the same memory")
    if on_triton:
        check_block(block)
        hyper = (lr, grad_scale, found_inf, momentum, weight_decay, nesterov)
        _masked_sgd_triton(weight, grad, momentum_buffer, mask, low_precision_copy, *hyper, block)
        return
    if found_inf is not None and grad_scale is not None:
        if found_inf.item():
            return
        grad = grad * grad_scale.double().reciprocal().to(grad.dtype)
    _sgd_cpu(weight, grad, momentum_buffer, float(lr), momentum, weight_decay, nesterov)
    if mask is not None:
        zero_pruned(weight, mask)
        zero_pruned(momentum_buffer, mask)
    if low_precision_copy is not None:
        low_precision_copy.copy_(weight)


def masked_sgd_reference(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor]:
    """New (weight, momentum_buffer) after torch.optim.SGD's update; both are +0 where the mask is False."""
    step = grad + weight_decay * weight
    buffer = momentum * momentum_buffer + step
    step = step + momentum * buffer if nesterov else buffer
    weight = weight - lr * step
    if mask is not None:
        weight = masked_cast_reference(weight, mask, weight.dtype)
        buffer = masked_cast_reference(buffer, mask, buffer.dtype)
    return weight, buffer


# CPU: torch's own operations


def _sgd_cpu(
    weight: Tensor, grad: Tensor, buffer: Tensor, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    """torch.optim.SGD's update, bitwise equal to its default implementation. Mutates weight and buffer."""
    if momentum and weight.numel() % 64 == 0 and torch.get_num_threads() == 1:
        # torch's fused pass takes less than half the time. Elements that do not fill a vector it rounds differently, so
        # it is not used for such sizes, nor with several threads, which split the buffer at any element.
        torch._fused_sgd_(
            [weight], [grad], [buffer], weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip
        return
    sgd_by_torch(weight, grad, buffer, lr, momentum, weight_decay, nesterov)


def sgd_by_torch(
    weight: Tensor, grad: Tensor, buffer: Tensor, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    """The operations of torch.optim.SGD's default implementation, in its order, for tensors of any dtype and device.

    Mutates weight and buffer.
    """
    if weight_decay:
        grad = grad.add(weight, alpha=weight_decay)
    buffer.mul_(momentum).add_(grad)
    update = grad.add(buffer, alpha=momentum) if nesterov else buffer
    weight.add_(update, alpha=-lr)


# GPU: Triton


@triton.jit
def _masked_sgd_kernel(
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
    valid = i < n
    rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else lr
    w = tl.load(weight + i, mask=valid, other=0.0)
    g = tl.load(grad + i, mask=valid, other=0.0)
    b = tl.load(buffer + i, mask=valid, other=0.0)
    if SCALED:
        g *= tl.div_rn(1.0, tl.load(grad_scale))
    g += weight_decay * w
    b = momentum * b + g
    step = g + momentum * b if NESTEROV else b
    w -= rate * step
    if HAS_MASK:
        keep = tl.load(mask + i, mask=valid, other=0) != 0
        w = tl.where(keep, w, 0.0)
        b = tl.where(keep, b, 0.0)
    tl.store(weight + i, w, mask=valid)
    tl.store(buffer + i, b, mask=valid)
    if HAS_COPY:
        tl.store(copy + i, w.to(copy.dtype.element_ty), mask=valid)


def _masked_sgd_triton(
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
    n = weight.numel()
    if n:
        # 16 bytes of fp32 per access. With eight elements per thread the compiler moves the mask through shared memory.
        grid, warps = grid_and_warps(n, block, each=4)
        # The kernel does not read an unused pointer, but a launch needs a valid one: the weight.
        _masked_sgd_kernel[grid](
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
