"""Cross-entropy with label smoothing: its gradient by the logits, and the sums of an epoch, in one launch on a GPU.

Torch takes about thirty launches for the same: the loss, its backward pass, top-1, top-5 and their sums.
"""

# The gradient needs the loss of no other row, so it is computed with the loss, while the logits are in registers: each
# is read once, and its gradient written once. What is left of the bytes is nothing; the floor is one launch.

import torch
from torch import Tensor

from fastprune.kernels.dispatch import HALF, arrived_last, on_its_device, tl, triton, uses_triton

IGNORED = -100
"""The label of what does not count, as in torch's cross_entropy."""

MOST_CLASSES = 1 << 14
"""A row of logits is kept in registers; more would not fit."""

_DTYPES = (torch.float32, *HALF)


@on_its_device
def cross_entropy_(
    sums: Tensor,
    arrived: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    gradient: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Adds a batch to `sums`, and writes the gradient of its mean loss by the logits into `gradient`.

    sums: float64 [4], mutated: the sum of the rows' losses in nats, rows whose class is predicted, rows, rows whose
    class is among the first five. Of equal logits the first class goes first; NaN goes before all numbers, and of
    several the first is predicted.  arrived: int32 [1], zero before and after; calls that may run at the same time need
    one each.  logits: float32, bf16 or fp16 [B, classes], rows contiguous, at most MOST_CLASSES.  labels: int64 [B];
    rows of label IGNORED count for nothing and have a gradient of zero, and the loss and the gradient of a row whose
    label is no class are NaN.  smoothing: in [0, 1], as torch's label_smoothing.  gradient: of the logits' shape and
    dtype, contiguous, overwritten; None: not computed.  scale: float32 of one element, a factor on the gradient before
    it is rounded (a GradScaler's).  The result is the same to the bit in each run.  ValueError for other arguments.
    """
    _check(sums, arrived, logits, labels, smoothing, gradient, scale)
    if uses_triton(logits):
        _cross_entropy_triton(sums, arrived, logits, labels, smoothing, gradient, scale)
        return
    found, by_logits = cross_entropy_reference(logits.float(), labels, smoothing)
    sums += found
    if gradient is not None:
        gradient.copy_(by_logits if scale is None else by_logits * scale)


def cross_entropy_reference(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """(what is added to the sums, float64 [4]; the gradient of the mean loss, as the logits)."""
    classes = logits.shape[1]
    counts, known = labels != IGNORED, (labels >= 0) & (labels < classes)
    own = labels.where(known, 0)[:, None]
    log_p = logits.log_softmax(1)
    loss = -log_p.gather(1, own)[:, 0]
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing / classes * log_p.sum(1)
    wanted = torch.full_like(log_p, smoothing / classes).scatter_add_(
        1, own, torch.full_like(log_p[:, :1], 1 - smoothing)
    )
    gradient = (log_p.exp() - wanted) / counts.sum()
    logit, position = logits.gather(1, own), torch.arange(classes, device=logits.device)
    before = ~(logits <= logit) | ((logits == logit) & (position < own))
    hits = [logits.argmax(1) == labels, counts, (before.sum(1) < 5) & known]
    sums = [loss.where(known, torch.nan)[counts].double().sum(), *(hit[counts].sum().double() for hit in hits)]
    return torch.stack(sums), gradient.where(known[:, None], torch.nan).where(counts[:, None], 0)


def _check(
    sums: Tensor,
    arrived: Tensor,
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    gradient: Tensor | None,
    scale: Tensor | None,
) -> None:
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not 1 <= logits.shape[1] <= MOST_CLASSES:
        raise ValueError(
            f"logits must be float32, bf16 or fp16 [B, up to {MOST_CLASSES} classes], got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"rows of logits must be contiguous, got strides {logits.stride()}")
    rows = logits.shape[:1]
    for name, tensor, dtype, shapes in (
        ("labels", labels, torch.int64, [rows]),
        ("sums", sums, torch.float64, [(4,)]),
        ("arrived", arrived, torch.int32, [(1,)]),
        ("gradient", gradient, logits.dtype, [logits.shape]),
        ("scale", scale, torch.float32, [(), (1,)]),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape not in shapes or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {tuple(shapes[0])} on {logits.device}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}, expected a number from 0 to 1")


# GPU: Triton

_IGNORED = tl.constexpr(IGNORED)
_CHUNK = tl.constexpr(1024)


@triton.jit
def _cross_entropy_kernel(
    logits,
    labels,
    gradient,
    scale,
    partial,
    arrived,
    sums,
    programs,
    rows,
    classes,
    stride,
    smoothing,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    label = tl.load(labels + row, mask=row < rows, other=_IGNORED)
    counts, known = label != _IGNORED, (label >= 0) & (label < classes)
    valid = (row < rows)[:, None] & (column < classes)
    x = tl.load(logits + row[:, None] * stride + column, mask=valid, other=float("-inf")).to(tl.float32)
    own = column == label[:, None]
    # Of a label that is no class NaN: it shows, where a loss of some other class would not.
    logit = tl.where(known, tl.sum(tl.where(own, x, 0.0), 1), float("nan"))

    # A maximum of NaN alone is no number either, of which numpy would warn.
    top = tl.max(tl.where(x == x, x, float("-inf")), 1)
    shifted = x - top[:, None]
    weight = tl.exp(shifted)
    total = tl.sum(weight, 1)
    log_total = tl.log(total)
    loss = log_total - (logit - top)
    if SMOOTHS:
        every = tl.sum(tl.where(valid, log_total[:, None] - shifted, 0.0), 1)
        loss = (1 - smoothing) * loss + smoothing / classes * every

    if GRADIENT:
        # Each program counts all labels: some kilobytes, from the cache, in place of another launch before this one.
        number = tl.zeros([_CHUNK], tl.int32)
        begin = 0
        while begin < rows:
            i = begin + tl.arange(0, _CHUNK)
            number += (tl.load(labels + i, mask=i < rows, other=_IGNORED) != _IGNORED).to(tl.int32)
            begin += _CHUNK
        factor = 1.0 / tl.maximum(tl.sum(number), 1).to(tl.float32)
        if SCALED:
            factor *= tl.load(scale)
        wanted = tl.where(own, 1.0, 0.0)
        if SMOOTHS:
            wanted = tl.where(own, 1.0 - smoothing, 0.0) + smoothing / classes
        found = (weight / total[:, None] - wanted) * factor
        found = tl.where(counts[:, None], tl.where(known[:, None], found, float("nan")), 0.0)
        place = gradient + row[:, None] * classes + column
        tl.store(place, found.to(gradient.dtype.element_ty), mask=valid)

    # How many classes go before the label's: all for a NaN.
    later = (x <= logit[:, None]) & ((x != logit[:, None]) | (column >= label[:, None]))
    rank = tl.sum((valid & (later == 0)).to(tl.int32), 1)
    nans = tl.sum((valid & (x != x) & (column < label[:, None])).to(tl.int32), 1)
    first = tl.where(logit == logit, rank, nans) == 0
    at = partial + 4 * tl.program_id(0).to(tl.int64)
    tl.store(at, tl.sum(tl.where(counts, loss, 0.0).to(tl.float64)))
    tl.store(at + 1, tl.sum((known & first).to(tl.int32)).to(tl.float64))
    tl.store(at + 2, tl.sum(counts.to(tl.int32)).to(tl.float64))
    tl.store(at + 3, tl.sum((known & (rank < 5)).to(tl.int32)).to(tl.float64))

    # The last program adds up what all have written, always in the order of the rows.
    if arrived_last(arrived, programs):
        four = tl.arange(0, 4)
        added = tl.zeros([_CHUNK // 4, 4], tl.float64)
        begin = 0
        while begin < programs:
            i = begin + tl.arange(0, _CHUNK // 4)[:, None]
            added += tl.load(partial + 4 * i + four[None, :], mask=i < programs, other=0.0)
            begin += _CHUNK // 4
        tl.store(sums + four, tl.load(sums + four) + tl.sum(added, 0))


def _cross_entropy_triton(
    sums: Tensor,
    arrived: Tensor,
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    gradient: Tensor | None,
    scale: Tensor | None,
) -> None:
    rows, classes = logits.shape
    if not rows:
        return
    columns = triton.next_power_of_2(classes)
    # About a thousand logits a program; fewer, for the sake of more programs, where classes are few.
    each = min(max(1024 // columns, 1), 16)
    programs = triton.cdiv(rows, each)
    partial = torch.empty(programs, 4, dtype=torch.float64, device=logits.device)
    # The kernel does not read an unused pointer, but a launch needs a valid one: the logits.
    _cross_entropy_kernel[(programs,)](
        logits,
        labels,
        logits if gradient is None else gradient,
        logits if scale is None else scale,
        partial,
        arrived,
        sums,
        programs,
        rows,
        classes,
        logits.stride(0),
        float(smoothing),
        GRADIENT=gradient is not None,
        SCALED=scale is not None,
        SMOOTHS=smoothing != 0,
        ROWS=each,
        COLUMNS=columns,
        num_warps=min(max(each * columns // 256, 1), 16),
    )
