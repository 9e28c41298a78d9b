"""The optimiser step of masked weights: torch.optim.SGD's update, mask and low-precision copy in one pass."""

# Each element is read once and written once, so the lower bound on a GPU is bytes over copy bandwidth: 23 bytes per
# weight with a bf16 copy (weight, gradient, momentum and mask in; weight, momentum and copy out); 21 with a bf16
# gradient that is read where it lies.

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

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
from fastprune.kernels.segments import Segment, check_segments, tiling


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
    check_tensor("grad", grad, weight, (weight.dtype,))
    _check(weight, momentum_buffer, mask, low_precision_copy, lr, momentum, nesterov, grad_scale, found_inf)
    if len({weight.data_ptr(), grad.data_ptr(), momentum_buffer.data_ptr()}) < 3 and weight.numel():
        raise ValueError("weight, grad and momentum_buffer must not be the same memory")
    if uses_triton(weight):
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


class SgdTiles(NamedTuple):
    """The work of one launch of masked_sgd_scattered_, of `sgd_tiles`.

    tiles: int64 [n, 4] on the weight's device: start in the buffer, length, segment, start in the segment.  aligned:
    all of these are multiples of 16.  block: elements per program.
    """

    segments: tuple[Segment, ...]
    tiles: Tensor
    aligned: bool
    block: int


def sgd_tiles(segments: Sequence[Segment], weight: Tensor, *, block: int = 1024) -> list[SgdTiles]:
    """The launches of `masked_sgd_scattered_` on a weight [n] of these segments, each of which has up to 64.

    It copies to the device, so not within the capture of a CUDA graph. ValueError if the segments do not fit.
    """
    check_block(block)
    check_segments(segments, weight.numel())
    result = []
    for first in range(0, len(segments), _AT_ONCE):
        some = tuple(segments[first : first + _AT_ONCE])
        # Without padding: behind a gradient's last element lies other memory.
        found = tiling(some, weight.numel(), block, False, weight.device, padded=False)
        start, length, segment, _ = found.tiles.unbind(1)
        tiles = torch.stack([start, length, segment, start - found.table[segment, 0]], 1)
        result.append(SgdTiles(some, tiles, found.aligned, block))
    return result


@on_its_device
def masked_sgd_scattered_(
    weight: Tensor,
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    mask: Tensor | None,
    tiles: Sequence[SgdTiles],
    low_precision_copy: Tensor | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As masked_sgd_, to the bit, with each segment's gradient where autograd left it. What lies between segments stays
    as it is.

    grads: one for each segment, all float32, bf16 or fp16, each `lies_as` the segment's view of the weight.  tiles:
    `sgd_tiles(segments, weight)`; on a GPU one launch each.  A CUDA graph reads `tiles` in each replay: they must live
    as long as it does. The gradients need not outlive this call, as for any operation.  ValueError as of masked_sgd_,
    and for gradients that do not fit.
    """
    _check(weight, momentum_buffer, mask, low_precision_copy, lr, momentum, nesterov, grad_scale, found_inf)
    segments = [segment for launch in tiles for segment in launch.segments]
    check_segments(segments, weight.numel())
    if len(grads) != len(segments):
        raise ValueError(f"{len(grads)} gradients for {len(segments)} segments")
    for segment, grad in zip(segments, grads, strict=True):
        if grad.dtype != grads[0].dtype or grad.dtype not in (weight.dtype, *HALF):
            raise ValueError(f"the gradient of {segment.name} is {grad.dtype}, of {segments[0].name} {grads[0].dtype}")
        if not lies_as(grad, segment.view(weight)):
            raise ValueError(
                f"the gradient of {segment.name}, {tuple(grad.shape)} of strides {grad.stride()} on {grad.device}, "
                f"does not lie as its weight, at an address that is a multiple of 16"
            )
    if uses_triton(weight):
        hyper = (lr, grad_scale, found_inf, momentum, weight_decay, nesterov)
        _masked_sgd_scattered_triton(weight, grads, momentum_buffer, mask, tiles, low_precision_copy, *hyper)
        return
    flat = gather(grads, segments, torch.empty_like(weight))
    for span in (segment.span for segment in segments):
        masked_sgd_(
            weight[span], flat[span], momentum_buffer[span], None if mask is None else mask[span],
            None if low_precision_copy is None else low_precision_copy[span], lr=lr, momentum=momentum,
            weight_decay=weight_decay, nesterov=nesterov, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip


def lies_as(grad: Tensor, weight: Tensor) -> bool:
    """Whether a gradient has the shape, device and order in memory of its weight, at a multiple of 16 bytes."""
    if grad.shape != weight.shape or grad.device != weight.device or grad.data_ptr() % 16:
        return False
    # Along an axis of one element a stride says nothing.
    strides = zip(grad.shape, grad.stride(), weight.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


def gather(grads: Sequence[Tensor], segments: Sequence[Segment], into: Tensor) -> Tensor:
    """Copies the gradients into their segments of a flat buffer [n], and returns it."""
    if grads:
        torch._foreach_copy_([segment.view(into) for segment in segments], list(grads))
    return into


def _check(
    weight: Tensor,
    momentum_buffer: Tensor,
    mask: Tensor | None,
    low_precision_copy: Tensor | None,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    check_tensor("weight", weight, weight, FULL[:1] if uses_triton(weight) else FULL)
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


def masked_sgd_scattered_reference(
    weight: Tensor,
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    mask: Tensor | None,
    segments: Sequence[Segment],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor]:
    """New (weight, momentum_buffer): masked_sgd_reference's of each segment, what they were between segments."""
    new = weight.clone(), momentum_buffer.clone()
    for segment, grad in zip(segments, grads, strict=True):
        old = (segment.view(weight), grad.to(weight.dtype), segment.view(momentum_buffer))
        keep = None if mask is None else segment.view(mask)
        found = masked_sgd_reference(*old, keep, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
        for into, values in zip(new, found, strict=True):
            segment.view(into).copy_(values)
    return new


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
    g = tl.load(grad + i, mask=valid, other=0.0)
    _update(
        weight, g, buffer, mask, copy, lr, grad_scale, i, valid, momentum, weight_decay,
        HAS_MASK, HAS_COPY, LR_ON_DEVICE, SCALED, NESTEROV,
    )  # fmt: skip


@triton.jit
def _update(
    weight,
    g,
    buffer,
    mask,
    copy,
    lr,
    grad_scale,
    i,
    valid,
    momentum,
    weight_decay,
    HAS_MASK: tl.constexpr,
    HAS_COPY: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    SCALED: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """The elements at `i` that are valid, by their gradients `g`, float32."""
    rate = tl.load(lr).to(tl.float32) if LR_ON_DEVICE else lr
    w = tl.load(weight + i, mask=valid, other=0.0)
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


# The table of the gradients' addresses is the arguments of the launch, not memory. A captured launch holds a copy of
# its arguments, so a replay reads nothing from the host, and there is no table on the device that could be written too
# late or be freed: an address is right in a replay for the reason that any kernel's is. Each program compares until it
# has found its own, so more than 64 layers take another launch.
_AT_ONCE = 64


@triton.jit
def _masked_sgd_scattered_kernel(
    weight,
    grads,
    buffer,
    mask,
    copy,
    tiles,
    lr,
    grad_scale,
    found_inf,
    momentum,
    weight_decay,
    COUNT: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    tile = tiles + 4 * tl.program_id(0).to(tl.int64)
    start, length, within = tl.load(tile), tl.load(tile + 1), tl.load(tile + 3)
    segment = tl.load(tile + 2).to(tl.int32)
    # Indices from a table carry no alignment; this hint gives 16-byte accesses instead of 4-byte ones.
    if ALIGNED:
        start, length, within = tl.multiple_of(start, 16), tl.multiple_of(length, 16), tl.multiple_of(within, 16)
    # By eights the compilers make a jump table; one comparison after the other each waits for its argument.
    grad = grads[0]
    for first in tl.static_range(0, COUNT, 8):
        if (segment >= first) & (segment < first + 8):
            for k in tl.static_range(first, first + 8 if first + 8 < COUNT else COUNT):
                if segment == k:
                    grad = grads[k]
    grad = tl.multiple_of(grad, 16)
    i = tl.arange(0, BLOCK)
    valid = i < length.to(tl.int32)
    g = tl.load(grad + within + i, mask=valid, other=0.0).to(tl.float32)
    _update(
        weight, g, buffer, mask, copy, lr, grad_scale, start + i, valid, momentum, weight_decay,
        HAS_MASK, HAS_COPY, LR_ON_DEVICE, SCALED, NESTEROV,
    )  # fmt: skip


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


def _masked_sgd_scattered_triton(
    weight: Tensor,
    grads: Sequence[Tensor],
    momentum_buffer: Tensor,
    mask: Tensor | None,
    tiles: Sequence[SgdTiles],
    low_precision_copy: Tensor | None,
    lr: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    rest = iter(grads)
    for launch in tiles:
        some = tuple(islice(rest, len(launch.segments)))
        if not len(launch.tiles):
            continue
        _, warps = grid_and_warps(len(launch.tiles), launch.block, each=4)
        _masked_sgd_scattered_kernel[(len(launch.tiles),)](
            weight,
            some,
            momentum_buffer,
            weight if mask is None else mask,
            weight if low_precision_copy is None else low_precision_copy,
            launch.tiles,
            lr,
            weight if grad_scale is None else grad_scale,
            weight if found_inf is None else found_inf,
            momentum,
            weight_decay,
            COUNT=len(some),
            ALIGNED=launch.aligned,
            HAS_MASK=mask is not None,
            HAS_COPY=low_precision_copy is not None,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            SCALED=found_inf is not None,
            NESTEROV=nesterov,
            BLOCK=launch.block,
            num_warps=warps,
        )
