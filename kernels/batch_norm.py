"""Training-mode batch norm, residual sum and ReLU over channels-last activations: two launches forward, two backward.

Statistics need every value before the first result, so two passes each way are the floor. One launch a line:

| operation | reads | writes |
| --- | --- | --- |
| statistics | x | |
| normalise | x, residual | y |
| sums of gradients | dy of each branch, x, and y with ReLU after a residual | g, see below |
| gradient of x | g or dy, x | dx |

g is the gradient of what ReLU takes, summed over branches: with two branches, or with ReLU after a residual, the first
pass backward writes it, which saves the second one up to two reads, and it is the residual's gradient. Without a
residual ReLU's mask is computed from x, which both passes read anyway. In activation maps, forward and backward: 3 and
5 with ReLU or alone (a block's first, a downsampling's), 4 and 8 with residual, ReLU and two branches (a block's
second). bench/NOTES.md has a ResNet-18's sum.
"""

# Sums are the same to the bit in each run: every program writes its partial sums, and the last one to finish combines
# them in a fixed order. Which one that is, an integer counter says: the only atomic operation here.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.kernels.dispatch import arrived_last, on_its_device, tl, triton, uses_triton

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    branches: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """relu(batch_norm(x) + residual) in training mode, in x's dtype [B, C, H, W], channels-last; differentiable once.

    x: float32, bf16 or fp16 [B, C, H, W], channels-last, of more than one position B x H x W.  weight, bias: float32
    [C].  running_mean, running_var: float32 [C], mutated as torch's batch_norm does: new = (1 - momentum) old +
    momentum batch, of the unbiased variance.  residual: like x, or None.  relu: whether ReLU follows.  branches: 2
    gives a tuple of the result and an alias of it, for two consumers. Their gradients are then summed in registers, and
    not by a pass of its own.

    Everything is computed in float32 and rounded once. NaN and inf spread over their channel.  Traceable by
    torch.compile(fullgraph=True).  On a CPU: torch's own operations.  On a GPU calls share memory by stream: a CUDA
    graph that was captured on a stream must not be replayed at the same time as another that was captured on the same
    one. ValueError for other dtypes, sizes and layouts.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var, residual)
    if branches not in (1, 2):
        raise ValueError(f"branches is {branches}, expected 1 or 2")
    if not uses_triton(x):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        y = y if residual is None else y + residual
        y = F.relu(y) if relu else y
        return (y, y) if branches == 2 else y
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, residual, momentum, eps, relu, branches)


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """relu(batch_norm(x) + residual), in x's dtype, computed in weight's; differentiable. Mutates running_mean
    and running_var.

    Arguments as of `batch_norm`, in any floating dtype and layout; not checked.
    """
    wide = x.to(weight.dtype)
    mean = wide.mean((0, 2, 3))
    centred = wide - mean[:, None, None]
    var = centred.square().mean((0, 2, 3))
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        running_var.copy_((1 - momentum) * running_var + momentum * var * (count / (count - 1)))
    y = centred / (var + eps).sqrt()[:, None, None] * weight[:, None, None] + bias[:, None, None]
    y = y if residual is None else y + residual
    return (y.relu() if relu else y).to(x.dtype)


def check_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, residual: Tensor | None = None
) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise ValueError(f"x is {x.dtype}, expected one of {FLOAT_TYPES}")
    for name, t in (("x", x), ("residual", x if residual is None else residual)):
        if t.ndim != 4 or not t.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} must be [B, C, H, W] and channels-last, got {tuple(t.shape)} of {t.stride()}")
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{name} ({t.dtype} {tuple(t.shape)} on {t.device}) does not match x ({x.dtype} {tuple(x.shape)} on "
                f"{x.device})"
            )
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, t in channels.items():
        if t.dtype != torch.float32 or t.shape != x.shape[1:2] or not t.is_contiguous() or t.device != x.device:
            raise ValueError(
                f"{name} must be float32 [{x.shape[1]}], contiguous, on {x.device}; got {t.dtype} {tuple(t.shape)} of "
                f"{t.stride()} on {t.device}"
            )
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"batch norm in training needs more than one position a channel, got {tuple(x.shape)}")


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, residual, momentum, eps, relu, branches):
        mean, rstd = batch_statistics(x, running_mean, running_var, momentum, eps)
        y = _normalise(x, residual, mean, rstd, weight, bias, relu)
        # y is kept as the next layer's input anyway; without a residual ReLU's mask is computed from x.
        ctx.save_for_backward(x, y if relu and residual is not None else None, mean, rstd, weight, bias)
        ctx.relu, ctx.has_residual = relu, residual is not None
        return (y, y.view_as(y)) if branches == 2 else y

    @staticmethod
    def backward(ctx, *dys):
        x, y, mean, rstd, weight, bias = ctx.saved_tensors
        dys = [dy.contiguous(memory_format=torch.channels_last) for dy in dys]
        first, second = dys if len(dys) == 2 else (dys[0], None)
        from_x = ctx.relu and y is None
        # What the second pass or the residual needs beyond dy itself is written by the first.
        keep = second is not None or y is not None
        dweight, dbias, *kept = gradient_sums(first, second, x, y, mean, rstd, weight, bias, from_x, keep)
        g = kept[0] if keep else first
        dx = _input_gradient(g, x, mean, rstd, weight, bias, dweight, dbias, from_x and not keep)
        return dx, dweight, dbias, None, None, g if ctx.has_residual else None, None, None, None, None


# The operations that a compiler sees, each of them one launch
#
# They are opaque to it: custom_op, not triton_op. A counter is zero before and after each launch of a reduction. Here
# it belongs to the operation, is chosen by the stream that the launch goes to, and no graph knows of it. As an argument
# of a triton_op, which it must be there, it is mutated by every layer, forward and backward: AOTAutograd of torch 2.15
# fails on that ("was invalid, but is output"); with one counter for each direction it traces, to a chain of copies
# through all layers that the compiler must prove needless, as each would be a launch more. And an interpreted triton_op
# cannot be traced, as tracing runs its kernel.


_COUNTERS: dict[tuple[torch.device, int, int], Tensor] = {}


def _counters(x: Tensor, tiles: int) -> Tensor:
    """int32 [tiles], zero between launches. One for each stream: launches on one follow one another."""
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0, tiles
    if (found := _COUNTERS.get(key)) is None:
        found = torch.zeros(tiles, dtype=torch.int32, device=x.device)
        # Made within a capture it is memory of the graph, set to zero by each replay of that graph alone.
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            _COUNTERS[key] = found
    return found


@torch.library.custom_op("fastprune::batch_statistics", mutates_args=("running_mean", "running_var"))
@on_its_device
def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(variance + eps)) of each channel, float32 [C]; mutates the running statistics."""
    n, C = x.numel() // x.shape[1], x.shape[1]
    mean, rstd = torch.empty_like(running_mean), torch.empty_like(running_var)
    grid, shape = _reduction(n, C)
    partial = torch.empty(2 * grid[0] * C, dtype=torch.float32, device=x.device)
    _statistics_kernel[grid](
        x, running_mean, running_var, mean, rstd, partial, _counters(x, grid[1]), n, momentum, eps, **shape
    )  # fmt: skip
    return mean, rstd


@batch_statistics.register_fake
def _(x, running_mean, running_var, momentum, eps):
    return torch.empty_like(running_mean), torch.empty_like(running_var)


@torch.library.custom_op("fastprune::batch_normalise", mutates_args=())
@on_its_device
def _normalise(
    x: Tensor, residual: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, relu: bool
) -> Tensor:
    """The result of batch_norm, from its statistics."""
    n, C = x.numel() // x.shape[1], x.shape[1]
    y = torch.empty_like(x)
    grid, shape = _elementwise(n, C)
    _normalise_kernel[grid](
        x, x if residual is None else residual, y, mean, rstd, weight, bias, n,
        RESIDUAL=residual is not None, RELU=relu, **shape,
    )  # fmt: skip
    return y


@_normalise.register_fake
def _(x, residual, mean, rstd, weight, bias, relu):
    return torch.empty_like(x)


@torch.library.custom_op("fastprune::batch_gradient_sums", mutates_args=())
@on_its_device
def gradient_sums(
    dy: Tensor,
    second: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool,
    keep: bool,
) -> list[Tensor]:
    """[dweight, dbias], float32 [C], and with `keep` g: dy + second, zero where ReLU was, in x's dtype.

    ReLU's mask is computed from y if given, else from x if `relu`.
    """
    n, C = x.numel() // x.shape[1], x.shape[1]
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    kept = [torch.empty_like(x)] if keep else []
    grid, shape = _reduction(n, C)
    partial = torch.empty(2 * grid[0] * C, dtype=torch.float32, device=x.device)
    _gradient_sums_kernel[grid](
        dy, dy if second is None else second, x, x if y is None else y, kept[0] if keep else x, mean, rstd, weight,
        bias, dweight, dbias, partial, _counters(x, grid[1]), n, TWO=second is not None,
        FROM_X=relu and y is None, FROM_Y=y is not None, KEEP=keep, **shape,
    )  # fmt: skip
    return [dweight, dbias, *kept]


@gradient_sums.register_fake
def _(dy, second, x, y, mean, rstd, weight, bias, relu, keep):
    return [torch.empty_like(weight), torch.empty_like(weight), *([torch.empty_like(x)] if keep else [])]


@torch.library.custom_op("fastprune::batch_input_gradient", mutates_args=())
@on_its_device
def _input_gradient(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    relu: bool,
) -> Tensor:
    """The gradient of x. relu: whether g is still to be masked, by ReLU's mask from x."""
    n, C = x.numel() // x.shape[1], x.shape[1]
    dx = torch.empty_like(x)
    grid, shape = _elementwise(n, C)
    _input_gradient_kernel[grid](g, x, dx, mean, rstd, weight, bias, dweight, dbias, n, FROM_X=relu, **shape)
    return dx


@_input_gradient.register_fake
def _(g, x, mean, rstd, weight, bias, dweight, dbias, relu):
    return torch.empty_like(x)


# Triton
#
# An activation map is rows of C values, one for each position. A thread of a tile has two runs of 16 bytes of bf16 of
# each input. Reductions take up to 32 columns, 64 bytes of bf16 a row: so there are several tiles side by side, each
# with a last program of its own, which combines at most 128 x 32 x 2 partial sums from the L2 cache.

_ELEMENTS, _WARPS = 4096, 8
_PROGRAMS = 256  # about two on each multiprocessor, as many as registers allow: all of them at once


def _elementwise(n: int, C: int, widest: int = 128) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and shape of tiles of [n, C]. EVEN: they cover it exactly, and their accesses need no masks."""
    columns = min(triton.next_power_of_2(C), widest)
    rows = _ELEMENTS // columns
    even = n % rows == 0 and C % columns == 0
    shape = {"C": C, "EVEN": even, "ROWS": rows, "COLUMNS": columns, "num_warps": _WARPS}
    return (triton.cdiv(n, rows), triton.cdiv(C, columns)), shape


def _reduction(n: int, C: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and shape of a reduction: programs that share the tiles of some columns, at most one for each row of a
    tile."""
    (tiles, across), shape = _elementwise(n, C, widest=32)
    return (max(1, min(tiles, shape["ROWS"], _PROGRAMS // across)), across), shape


@triton.jit
def load_wide(at, valid, EVEN: tl.constexpr = False):
    """float32; 0 where not valid. EVEN: all are."""
    if EVEN:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def store_narrow(at, value, valid, EVEN: tl.constexpr = False):
    """Rounds to the memory's dtype."""
    if EVEN:
        tl.store(at, value.to(at.dtype.element_ty))
    else:
        tl.store(at, value.to(at.dtype.element_ty), mask=valid)


@triton.jit
def channel(values, column, inside):
    """A row of one value for each column."""
    return tl.load(values + column, mask=inside, other=0.0)[None, :]


@triton.jit
def relu_gradient(grad, result):
    """As torch's: a result of NaN passes its gradient on."""
    return tl.where(result.to(tl.float32) <= 0, 0.0, grad)


@triton.jit
def _merge(count, centre, squares):
    """Mean and sum of squared differences from it [1, COLUMNS] of groups, one in a row of [ROWS, COLUMNS]."""
    middle = (tl.sum(centre * count, 0) / tl.sum(count, 0))[None, :]
    off = tl.where(count > 0, centre - middle, 0.0)
    return middle, tl.sum(squares + off * off * count, 0)[None, :]


@triton.jit
def _statistics_kernel(
    x, running_mean, running_var, mean, rstd, partial, counter, N, momentum, eps, C: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p, programs, tile_column = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inside, at = column < C, (row * C)[:, None] + column[None, :]
    tiles = tl.cdiv(N, ROWS)
    # Values are taken relative to the first of their channel, so that a large mean costs no digits. Then Welford's mean
    # and sum of squared differences for each element of a tile, over all tiles of this program, so that a first value
    # far from the others costs none either; nothing is exchanged between threads until the end.
    first = channel(x, column, inside).to(tl.float32)
    centre, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    count, step = tl.zeros([ROWS], tl.float32), tl.full([], 0.0, tl.float32)
    for k in tl.range(0, tl.cdiv(tiles - p, programs), num_stages=3):
        tile = p + k * programs
        valid = ((tile * ROWS + row) < N)[:, None] & inside[None, :]
        value = load_wide(x + tile.to(tl.int64) * (ROWS * C) + at, valid, EVEN)
        step += 1.0
        off = (value - first) - centre
        if EVEN:
            count += 1.0
        else:
            off = tl.where(valid, off, 0.0)
            count += tl.where(tile * ROWS + row < N, 1.0, 0.0)
        centre += off * tl.div_rn(1.0, step)
        # The product is that of the differences from the mean before and after; the latter is this for an element that
        # is not there, too.
        squares += off * (off - off * tl.div_rn(1.0, step))
    centre, squares = _merge(count[:, None], centre, squares)
    there = partial + p * C + column[None, :]
    tl.store(there, centre, mask=inside[None, :])
    tl.store(there + programs * C, squares, mask=inside[None, :])
    if arrived_last(counter + tile_column, programs):
        centre, squares = _combined_statistics(partial, column, programs, row, N, C, ROWS)
        old_mean = tl.load(running_mean + column[None, :], mask=inside[None, :], other=0.0)
        old_var = tl.load(running_var + column[None, :], mask=inside[None, :], other=0.0)
        new_mean = (1 - momentum) * old_mean + momentum * (first + centre)
        new_var = (1 - momentum) * old_var + momentum * (squares / (N - 1))
        scale = tl.div_rn(1.0, tl.sqrt_rn(squares / N + eps))
        tl.store(mean + column[None, :], first + centre, mask=inside[None, :])
        tl.store(rstd + column[None, :], scale, mask=inside[None, :])
        tl.store(running_mean + column[None, :], new_mean, mask=inside[None, :])
        tl.store(running_var + column[None, :], new_var, mask=inside[None, :])


@triton.jit
def _combined_statistics(partial, column, programs, row, N, C: tl.constexpr, ROWS: tl.constexpr):
    """Of all programs' rows, from what they stored."""
    valid = (row < programs)[:, None] & (column < C)[None, :]
    there = partial + (row * C)[:, None] + column[None, :]
    # The rows that each program had: those of its tiles, less what the last tile lacks.
    tiles = tl.cdiv(N, ROWS)
    rows = (tiles - row + programs - 1) // programs * ROWS
    rows -= tl.where((tiles - 1) % programs == row, tiles * ROWS - N, 0)
    count = tl.where(row < programs, rows, 0).to(tl.float32)
    return _merge(count[:, None], load_wide(there, valid), load_wide(there + programs * C, valid))


@triton.jit
def _normalise_kernel(
    x, residual, y, mean, rstd, weight, bias, N, C: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    valid = ((tile * ROWS + row) < N)[:, None] & inside[None, :]
    # 64-bit positions of tiles: an activation map may hold more than 2^31 elements.
    start, at = tile.to(tl.int64) * (ROWS * C), (row * C)[:, None] + column[None, :]
    scale = channel(rstd, column, inside) * channel(weight, column, inside)
    result = (load_wide(x + start + at, valid, EVEN) - channel(mean, column, inside)) * scale + channel(
        bias, column, inside
    )
    if RESIDUAL:
        result += load_wide(residual + start + at, valid, EVEN)
    if RELU:
        result = tl.where(result < 0, 0.0, result)  # NaN stays
    store_narrow(y + start + at, result, valid, EVEN)


@triton.jit
def _gradient_sums_kernel(
    dy, second, x, y, g, mean, rstd, weight, bias, dweight, dbias, partial, counter, N, C: tl.constexpr,
    TWO: tl.constexpr, FROM_X: tl.constexpr, FROM_Y: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    p, programs, tile_column = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile_column * COLUMNS + tl.arange(0, COLUMNS)
    inside, at = column < C, (row * C)[:, None] + column[None, :]
    centre, scale = channel(mean, column, inside), channel(rstd, column, inside)
    factor, shift = scale * channel(weight, column, inside), channel(bias, column, inside)
    # Sums of g and of g (x - mean) for each element of a tile, over all tiles of this program.
    plain, product = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.range(0, tl.cdiv(tl.cdiv(N, ROWS) - p, programs), num_stages=3):
        tile = p + k * programs
        start, valid = tile.to(tl.int64) * (ROWS * C), ((tile * ROWS + row) < N)[:, None] & inside[None, :]
        grad, off = load_wide(dy + start + at, valid, EVEN), load_wide(x + start + at, valid, EVEN) - centre
        if TWO:
            grad += load_wide(second + start + at, valid, EVEN)
        if FROM_X:
            grad = relu_gradient(grad, (off * factor + shift).to(x.dtype.element_ty))
        if FROM_Y:
            grad = relu_gradient(grad, load_wide(y + start + at, valid, EVEN))
        if KEEP:
            # The sums are those of what the second pass reads.
            grad = grad.to(g.dtype.element_ty).to(tl.float32)
            store_narrow(g + start + at, grad, valid, EVEN)
        plain += grad
        product += grad * off
    there = partial + p * C + column
    tl.store(there, tl.sum(plain, 0), mask=inside)
    tl.store(there + programs * C, tl.sum(product, 0), mask=inside)
    if arrived_last(counter + tile_column, programs):
        sums, products = _combined_sums(partial, column, programs, row, C)
        tl.store(dbias + column, sums, mask=inside)
        tl.store(dweight + column, products * tl.load(rstd + column, mask=inside, other=0.0), mask=inside)


@triton.jit
def _combined_sums(partial, column, programs, row, C: tl.constexpr):
    """The sums of all programs' partial sums of both kinds, [COLUMNS] each."""
    valid = (row < programs)[:, None] & (column < C)[None, :]
    there = partial + (row * C)[:, None] + column[None, :]
    return tl.sum(load_wide(there, valid), 0), tl.sum(load_wide(there + programs * C, valid), 0)


@triton.jit
def _input_gradient_kernel(
    g, x, dx, mean, rstd, weight, bias, dweight, dbias, N, C: tl.constexpr, FROM_X: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row, column = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    valid = ((tile * ROWS + row) < N)[:, None] & inside[None, :]
    start, at = tile.to(tl.int64) * (ROWS * C), (row * C)[:, None] + column[None, :]
    scale = channel(rstd, column, inside)
    factor = scale * channel(weight, column, inside)
    grad, off = (
        load_wide(g + start + at, valid, EVEN),
        load_wide(x + start + at, valid, EVEN) - channel(mean, column, inside),
    )
    if FROM_X:
        grad = relu_gradient(grad, (off * factor + channel(bias, column, inside)).to(x.dtype.element_ty))
    middle, slope = channel(dbias, column, inside) / N, channel(dweight, column, inside) * scale / N
    result = factor * (grad - middle - off * slope)
    store_narrow(dx + start + at, result, valid, EVEN)
