"""The stem of ImageNet networks: batch norm, ReLU and max pooling 3x3 in one pass.

The normalised map, four times as large as the pooled one, is never written. In units of the latter (x is 4), with one
launch for each line:

| operation | reads | writes |
| --- | --- | --- |
| statistics | x: 4 | |
| normalise and pool | x: 4 | y, the value of x that each window chose, its place in the window (int8): 2.5 |
| sums of gradients | dy, the chosen values: 2 | |
| gradient of x | dy, places, x: 5.5 | dx: 4 |

22 in all. Recomputing what each window chose instead takes nine values and their comparisons for each window, four
windows for four pixels, in both passes backward: about 150 instructions a value pooled, more time than the 1.5 units
that are written and the 2 that are read again here; and the sums then read x, 4, instead of the chosen values, 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.kernels.batch_norm import (
    batch_norm_reference,
    batch_statistics,
    channel,
    check_batch_norm,
    gradient_sums,
    load_wide,
    store_narrow,
)
from fastprune.kernels.dispatch import on_its_device, tl, triton, uses_triton


def batch_norm_pool(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> Tensor:
    """max_pool2d(relu(batch_norm(x)), 3, stride=2, padding=1) in training mode, in x's dtype; differentiable once.

    Arguments, mutation and errors as of `batch_norm`. Returns [B, C, ceil(H / 2), ceil(W / 2)], channels-last. A
    window's gradient goes to its first largest value, before rounding, as torch's does; no two programs write to one
    place.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var)
    if not uses_triton(x):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        return F.max_pool2d(F.relu(y), 3, stride=2, padding=1)
    return _BatchNormPool.apply(x, weight, bias, running_mean, running_var, momentum, eps)


def batch_norm_pool_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> Tensor:
    """max_pool2d(relu(batch_norm(x))), 3x3, stride 2, padding 1, as of `batch_norm_reference`; differentiable."""
    y = batch_norm_reference(x, weight, bias, running_mean, running_var, None, momentum, eps, relu=True)
    return F.max_pool2d(y, 3, stride=2, padding=1)


class _BatchNormPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        mean, rstd = batch_statistics(x, running_mean, running_var, momentum, eps)
        y, chosen, place = _normalise_and_pool(x, mean, rstd, weight, bias)
        ctx.save_for_backward(x, chosen, place, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, chosen, place, mean, rstd, weight, bias = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        # Only chosen values have a gradient: the sums over them are those over all of x.
        dweight, dbias = gradient_sums(dy, None, chosen, None, mean, rstd, weight, bias, True, False)
        dx = _pool_input_gradient(dy, place, x, mean, rstd, weight, dweight, dbias)
        return dx, dweight, dbias, None, None, None, None


# The operations that a compiler sees, each of them one launch


def _pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Fresh memory of one value for each window."""
    B, C, H, W = x.shape
    shape = B, C, (H + 1) // 2, (W + 1) // 2
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _grid(windows: int, C: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and shape of tiles of 2,048 elements, one row for each window: twice as many take all registers."""
    columns = min(triton.next_power_of_2(C), 64)
    rows = 2048 // columns
    return (triton.cdiv(windows, rows), triton.cdiv(C, columns)), {"ROWS": rows, "COLUMNS": columns, "num_warps": 8}


@torch.library.custom_op("fastprune::batch_normalise_and_pool", mutates_args=())
@on_its_device
def _normalise_and_pool(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, chosen, place) of each window: the result, the value of x that it comes from, and where in the window that
    is, int8: 3 * row + column, or 9 if ReLU lets no gradient pass."""
    y, chosen, place = (_pooled(x, dtype) for dtype in (x.dtype, x.dtype, torch.int8))
    _, C, H, W = x.shape
    windows = y.numel() // C
    grid, shape = _grid(windows, C)
    _normalise_and_pool_kernel[grid](x, y, chosen, place, mean, rstd, weight, bias, windows, C=C, H=H, W=W, **shape)
    return y, chosen, place


@_normalise_and_pool.register_fake
def _(x, mean, rstd, weight, bias):
    return _pooled(x, x.dtype), _pooled(x, x.dtype), _pooled(x, torch.int8)


@torch.library.custom_op("fastprune::batch_pool_input_gradient", mutates_args=())
@on_its_device
def _pool_input_gradient(
    dy: Tensor,
    place: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> Tensor:
    """The gradient of x."""
    dx = torch.empty_like(x)
    _, C, H, W = x.shape
    windows = dy.numel() // C
    grid, shape = _grid(windows, C)
    _pool_input_gradient_kernel[grid](
        dy, place, x, dx, mean, rstd, weight, dweight, dbias, windows, x.numel() // C, C=C, H=H, W=W, **shape
    )
    return dx


@_pool_input_gradient.register_fake
def _(dy, place, x, mean, rstd, weight, dweight, dbias):
    return torch.empty_like(x)


# Triton
#
# A program has some windows, row by row of the pooled map, and some channels. Positions are divided once for a row of
# the tile. Backward, a window has the two by two pixels at its centre, right and below: no other program writes those,
# and they take part in this window and in its three neighbours to the right and below.


@triton.jit
def _normalise_and_pool_kernel(
    x, y, chosen, place, mean, rstd, weight, bias, windows, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    window, inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS), column < C
    b, h, w = _position(window, H, W)
    scale = channel(rstd, column, inside) * channel(weight, column, inside)
    # The result rises or falls with x, so the largest result is that of the largest or the smallest x: exactly, where a
    # comparison of results would see ties among rounded ones. It is constant if scale is 0.
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    best_x, best_place = tl.zeros([ROWS, COLUMNS], tl.float32), tl.full([ROWS, COLUMNS], 9, tl.int32)
    base = x + ((b.to(tl.int64) * H + (2 * h - 1)) * W + (2 * w - 1))[:, None] * C + column[None, :]
    for i in tl.static_range(9):
        at_h, at_w = 2 * h - 1 + i // 3, 2 * w - 1 + i % 3
        there = (window < windows) & (at_h >= 0) & (at_h < H) & (at_w >= 0) & (at_w < W)
        valid = there[:, None] & inside[None, :]
        value = load_wide(base + ((i // 3) * W + i % 3) * C, valid)
        key = value * sign
        better = valid & (key > best)
        best, best_x = tl.where(better, key, best), tl.where(better, value, best_x)
        best_place = tl.where(better, i, best_place)
    result = (best_x - channel(mean, column, inside)) * scale + channel(bias, column, inside)
    result = tl.where(result < 0, 0.0, result)  # NaN stays
    best_place = tl.where(result.to(y.dtype.element_ty).to(tl.float32) <= 0, 9, best_place)
    at, valid = window.to(tl.int64)[:, None] * C + column[None, :], (window < windows)[:, None] & inside[None, :]
    store_narrow(y + at, result, valid)
    store_narrow(chosen + at, best_x, valid)
    store_narrow(place + at, best_place, valid)


@triton.jit
def _position(window, H: tl.constexpr, W: tl.constexpr):
    """Image, row and column of windows in the pooled map of maps of H x W."""
    h: tl.constexpr = (H + 1) // 2
    w: tl.constexpr = (W + 1) // 2
    return window // (h * w), window // w % h, window % w


@triton.jit
def _pool_input_gradient_kernel(
    dy, place, x, dx, mean, rstd, weight, dweight, dbias, windows, N, C: tl.constexpr, H: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    window, inside = tl.program_id(0) * ROWS + tl.arange(0, ROWS), (column < C)[None, :]
    b, h, w = _position(window, H, W)
    # This window and its neighbours below and to the right: their gradients, and the places that they chose.
    here, low, right = window < windows, h + 1 < (H + 1) // 2, w + 1 < (W + 1) // 2
    at, down = window.to(tl.int64)[:, None] * C + column[None, :], (W + 1) // 2 * C
    d00, k00 = _gradient(dy, place, at, here[:, None] & inside)
    d01, k01 = _gradient(dy, place, at + C, (here & right)[:, None] & inside)
    d10, k10 = _gradient(dy, place, at + down, (here & low)[:, None] & inside)
    d11, k11 = _gradient(dy, place, at + (down + C), (here & low & right)[:, None] & inside)
    g00 = tl.where(k00 == 4, d00, 0.0)
    g01 = tl.where(k00 == 5, d00, 0.0) + tl.where(k01 == 3, d01, 0.0)
    g10 = tl.where(k00 == 7, d00, 0.0) + tl.where(k10 == 1, d10, 0.0)
    g11 = tl.where(k00 == 8, d00, 0.0) + tl.where(k01 == 6, d01, 0.0)
    g11 += tl.where(k10 == 2, d10, 0.0) + tl.where(k11 == 0, d11, 0.0)

    column_inside = column < C
    scale, centre = channel(rstd, column, column_inside), channel(mean, column, column_inside)
    factor = scale * channel(weight, column, column_inside)
    middle, slope = channel(dbias, column, column_inside) / N, channel(dweight, column, column_inside) * scale / N
    pixel = ((b.to(tl.int64) * H + 2 * h) * W + 2 * w)[:, None] * C + column[None, :]
    odd_h, odd_w = here & (2 * h + 1 < H), here & (2 * w + 1 < W)
    _finish(x, dx, pixel, here[:, None] & inside, g00, centre, factor, middle, slope)
    _finish(x, dx, pixel + C, odd_w[:, None] & inside, g01, centre, factor, middle, slope)
    _finish(x, dx, pixel + W * C, odd_h[:, None] & inside, g10, centre, factor, middle, slope)
    _finish(x, dx, pixel + (W + 1) * C, (odd_h & odd_w)[:, None] & inside, g11, centre, factor, middle, slope)


@triton.jit
def _gradient(dy, place, at, valid):
    """The gradient of a window, float32, and the place that it chose, 9 where there is none."""
    return load_wide(dy + at, valid), tl.load(place + at, mask=valid, other=9).to(tl.int32)


@triton.jit
def _finish(x, dx, at, valid, grad, centre, factor, middle, slope):
    """dx of some pixels from the gradients of their results: as in _input_gradient_kernel."""
    result = factor * (grad - middle - (load_wide(x + at, valid) - centre) * slope)
    store_narrow(dx + at, result, valid)
