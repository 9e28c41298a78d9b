"""The public operations: arguments are checked, then the device decides. Triton on a GPU; numba or torch on a CPU.

Under TRITON_INTERPRET=1 the Triton code itself runs on a CPU, slowly: that is how it is tested without a GPU.
"""

import os
from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels import reference, select_cpu, sgd_cpu
from fastprune.kernels.device import on_its_device
from fastprune.kernels.segments import Segment, check_segments

# Elements (of packed bits: bytes) that one program handles, where the caller does not say. Triton itself is imported
# only where it runs: not every machine has it.
ELEMENTWISE_BLOCK, SELECT_BLOCK, BITS_BLOCK = 1024, 4096, 1024
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FULL = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run Triton code."""
    return tensor.is_cuda or _INTERPRETED


@on_its_device
def masked_cast(weight: Tensor, mask: Tensor, out: Tensor, *, block: int = ELEMENTWISE_BLOCK) -> Tensor:
    """Writes where(mask, weight, +0) into `out`, in out's dtype, and returns it.

    weight: floating [n], mask: bool [n], out: floating [n], the weight itself or memory apart from it. A pruned
    NaN or inf becomes +0, a kept one stays. block: elements a program. ValueError on mismatch.
    """
    _check("weight", weight, weight, _FULL + _HALF)
    _check("mask", mask, weight, (torch.bool,))
    _check("out", out, weight, _FULL + _HALF)
    if uses_triton(weight):
        from fastprune.kernels import elementwise

        _check_block(block)
        elementwise.masked_cast(weight, mask, out, block)
        return out
    _zero_pruned(out.copy_(weight), mask)
    return out


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
    block: int = ELEMENTWISE_BLOCK,
) -> None:
    """One SGD step as torch.optim.SGD takes it, masked, in one launch.

    weight, momentum_buffer: float32 [n] (float64 on a CPU), mutated, exactly +0 afterwards where mask (bool [n]) is
    False, whatever the gradient is there. grad: like weight; its values afterwards are undefined. low_precision_copy:
    bf16 or fp16 [n], overwritten with the new weight. lr: a number, or a float tensor of one element on the same device
    (for a captured graph). A momentum buffer of zeros gives PyTorch's first step. grad_scale, found_inf: float32 of one
    element each, both or none, as a GradScaler hands them to fused optimisers: the gradient is divided by the scale,
    and where found_inf is not 0 nothing is changed. block: elements a program. ValueError on mismatch, or where buffers
    are the same memory.
    """
    triton = uses_triton(weight)
    _check("weight", weight, weight, _FULL[:1] if triton else _FULL)
    _check("grad", grad, weight, (weight.dtype,))
    _check("momentum_buffer", momentum_buffer, weight, (weight.dtype,))
    if mask is not None:
        _check("mask", mask, weight, (torch.bool,))
    if low_precision_copy is not None:
        _check("low_precision_copy", low_precision_copy, weight, _HALF)
    if (grad_scale is None) != (found_inf is None):
        raise ValueError("grad_scale and found_inf come together")
    for name, one, dtypes in (
        ("lr", lr, _FULL),
        ("grad_scale", grad_scale, _FULL[:1]),
        ("found_inf", found_inf, _FULL[:1]),
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
    if triton:
        from fastprune.kernels import elementwise

        _check_block(block)
        hyper = (lr, grad_scale, found_inf, momentum, weight_decay, nesterov)
        elementwise.masked_sgd(weight, grad, momentum_buffer, mask, low_precision_copy, *hyper, block)
        return
    if found_inf is not None and grad_scale is not None:
        if found_inf.item():
            return
        grad.mul_(grad_scale.double().reciprocal().to(grad.dtype))
    sgd_cpu.step(weight, grad, momentum_buffer, float(lr), momentum, weight_decay, nesterov)
    if mask is not None:
        _zero_pruned(weight, mask)
        _zero_pruned(momentum_buffer, mask)
    if low_precision_copy is not None:
        low_precision_copy.copy_(weight)


@on_its_device
def kth_smallest_magnitude(weight: Tensor, mask: Tensor, k: int, *, block: int = SELECT_BLOCK) -> Tensor:
    """The k-th smallest |weight| (k from 1) among the elements that the mask keeps; NaN counts as +inf.

    weight: floating [n] (no float64 on a GPU), mask: bool [n]. Returns a tensor [] on the same device: the value in
    float32 (float64 for float64), exactly. ValueError unless 1 <= k <= n; on a CPU also if fewer than k are kept, while
    on a GPU, which that check would wait for, the result then has no meaning.
    """
    triton = uses_triton(weight)
    _check("weight", weight, weight, _FULL[:1] + _HALF if triton else _FULL + _HALF)
    _check("mask", mask, weight, (torch.bool,))
    if not 1 <= k <= weight.numel():
        raise ValueError(f"k is {k}, but there are {weight.numel()} elements")
    if triton:
        from fastprune.kernels import select

        _check_block(block)
        return select.kth(weight, mask, k, block)
    kept = _kept(mask)
    if k > kept:
        raise ValueError(f"k is {k}, but the mask keeps {kept} elements")
    values = _full(weight)
    keys, top = select_cpu.keys_of(values)
    key = select_cpu.kth_key(keys, mask.numpy(), k, kept, top)
    return torch.from_numpy(np.array([key], keys.dtype).view(values.dtype))[0]


@on_its_device
def keep_top(
    score: Tensor,
    mask: Tensor,
    n_prune: int | Sequence[int],
    segments: Sequence[Segment] | None = None,
    *,
    block: int = SELECT_BLOCK,
) -> Tensor:
    """A new mask that keeps what `mask` keeps, less exactly n_prune elements with the lowest scores.

    score: non-negative floating [n] (NaN counts as +inf; no float64 on a GPU), mask: bool [n], False outside segments.
    n_prune: a number for all segments together (global pruning), or one for each segment (local). Ties go by position,
    the lowest first: the logical position where segments are given, else the index. Returns a fresh bool [n]; a GPU is
    waited for once, to check the counts. ValueError if more would be pruned than is left.
    """
    triton = uses_triton(score)
    _check("score", score, score, _FULL[:1] + _HALF if triton else _FULL + _HALF)
    _check("mask", mask, score, (torch.bool,))
    local = isinstance(n_prune, Sequence)
    if segments is not None:
        check_segments(segments, mask.numel())
    elif local:
        raise ValueError("n_prune as a sequence needs segments, one number for each")
    parts = tuple([Segment("", (mask.numel(),), 0, 0)] if segments is None else segments)
    wanted = list(n_prune) if isinstance(n_prune, Sequence) else [index(n_prune)]
    if local and len(wanted) != len(parts):
        raise ValueError(f"{len(wanted)} numbers for {len(parts)} segments")
    kept = segment_counts(mask, parts).tolist() if local or triton else [_kept(mask)]
    for number, left in zip(wanted, kept if local else [sum(kept)], strict=True):
        if not 0 <= number <= left:
            raise ValueError(f"cannot prune {number} of the {left} elements that are left")
    if triton:
        from fastprune.kernels import select

        _check_block(block)
        return select.keep_top(score, mask, wanted, parts, local, block)
    new = mask.clone()
    keys, top = select_cpu.keys_of(_full(score))
    spans = [s.span for s in parts] if local else [slice(0, mask.numel())]
    for span, number, left in zip(spans, wanted, kept, strict=True):
        select_cpu.keep_above(keys[span], new.numpy()[span], number, left, top, segments, span.start)
    return new


@on_its_device
def segment_counts(mask: Tensor, segments: Sequence[Segment], *, block: int = SELECT_BLOCK) -> Tensor:
    """Kept elements of each segment: int64 [len(segments)] on the mask's device. ValueError on a foreign layout."""
    _check("mask", mask, mask, (torch.bool,))
    check_segments(segments, mask.numel())
    if uses_triton(mask):
        from fastprune.kernels import bits, select

        _check_block(block)
        where = select.layout(tuple(segments), mask.numel(), block, True, mask.device, padded=False)
        return bits.count(mask, where.tiles, len(segments), block)
    return torch.tensor([_kept(mask[s.span]) for s in segments], dtype=torch.int64)


@on_its_device
def pack_bits(flags: Tensor, *, block: int = BITS_BLOCK) -> Tensor:
    """bool [n] to uint8 [ceil(n / 8)], the first element in the lowest bit, unused bits zero."""
    _check("flags", flags, flags, (torch.bool,))
    if uses_triton(flags):
        from fastprune.kernels import bits

        _check_block(block)
        return bits.pack(flags, block)
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


@on_its_device
def unpack_bits(packed: Tensor, n: int, *, block: int = BITS_BLOCK) -> Tensor:
    """uint8 [ceil(n / 8)] to bool [n], the inverse of pack_bits. ValueError if the sizes do not fit."""
    _check("packed", packed, packed, (torch.uint8,))
    if packed.numel() != (n + 7) // 8:
        raise ValueError(f"{n} bits need {(n + 7) // 8} bytes, got {packed.numel()}")
    if uses_triton(packed):
        from fastprune.kernels import bits

        _check_block(block)
        return bits.unpack(packed, n, block)
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little").view(np.bool_))


def masked_weight(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """where(mask, weight, +0) in `dtype`, differentiable: the gradient is masked, and has the weight's dtype.

    weight: floating, mask: bool, of one shape. What a masked layer computes with. In eager mode on a GPU it is one
    launch forward and one backward; a compiler gets plain torch, which it fuses into what reads it.
    """
    if torch.compiler.is_compiling() or not uses_triton(weight) or weight.stride() != mask.stride():
        return reference.masked_cast(weight, mask, dtype)
    return _MaskedCast.apply(weight, mask, dtype)


class _MaskedCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(mask)
        ctx.dtype = weight.dtype
        return _cast_like(weight, mask, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (mask,) = ctx.saved_tensors
        return _cast_like(torch.empty_like(mask, dtype=grad.dtype).copy_(grad), mask, ctx.dtype), None, None


def _cast_like(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """masked_cast of tensors of any one dense layout."""
    out = torch.empty_like(weight, dtype=dtype)
    flat = [t.as_strided((t.numel(),), (1,)) for t in (weight, mask, out)]
    masked_cast(flat[0].detach(), flat[1], flat[2])
    return out


def _zero_pruned(values: Tensor, mask: Tensor) -> None:
    """+0 where pruned, as bits: what is there may be NaN. Several times faster than masked_fill_ on a CPU."""
    kind = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[values.element_size()]
    select_cpu.zero_pruned(values.detach().view(kind).numpy(), mask.numpy())


def _check(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}")
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} ({tuple(tensor.shape)} on {tensor.device}) does not match {tuple(like.shape)} on {like.device}"
        )


def _check_block(block: int) -> None:
    if block < 1 or block & (block - 1):
        raise ValueError(f"block is {block}, expected a power of two")


def _kept(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))  # a hundred times faster than mask.sum() here


def _full(values: Tensor) -> np.ndarray:
    """As float32 or float64, which hold every bf16 and fp16 exactly."""
    return values.detach().to(torch.float32 if values.dtype in _HALF else values.dtype).numpy()
