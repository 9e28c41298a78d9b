"""Convs of small maps as GEMMs on a CPU, where oneDNN's convs are slow.

On a map of 2x2 positions, 20 of the 36 taps of a 3x3 kernel fall into the padding. Here they are not computed at all:
for each output position and each row of the kernel, the taps inside the map are one run of inputs and one run of
weights, contiguous if both are channels-last. So a conv is a few GEMMs of column ranges of three matrices,
x [N, H*W*C], weight [O, KH*KW*C] and y [N, OH*OW*O], and so are its gradients. Nothing is unfolded or copied.

And convs that oneDNN gets wrong: without AVX-512 it writes past its buffer for the weight gradient of a strided 1x1
conv of fewer than 8 channels (https://github.com/uxlfoundation/oneDNN/issues/6035), as the shortcuts of a narrow
ResNet are.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# Measured with oneDNN 3.13, forward and backward together (bench/NOTES.md). On maps of 3x3 a conv of 3x3 gains 1.1 to
# 1.7 x, on 2x2 up to 2.5 x, on one position up to 6 x; on 4x4 oneDNN is about as fast as these GEMMs.
_MAX_POSITIONS = 9
# Multiply-adds of one tap, for each output position: with less, calling GEMMs (10 us each) costs what they gain.
_MIN_WORK = 2**16
# With fewer (images have 3) a run of taps is too short for a GEMM.
_MIN_CHANNELS = 16
# Fewer are less than a vector of AVX2, which oneDNN 3.13's driver of strided 1x1 convs does not allow for.
_ONEDNN_CHANNELS = 8

_NO_PADDING = (0, (0,), (0, 0), [0], [0, 0], "valid")

Ints = int | Sequence[int]
Pair = tuple[int, int]
Key = int | tuple[int, ...]
Run = tuple[int, int, int, int]
"""Taps that lie side by side: (output position, position of the first input, first tap, number of taps)."""


def lowered(gemms: bool = True) -> AbstractContextManager["Lowering"]:
    """Within it, in this thread, F.conv2d (and so nn.Conv2d) computes the convs that `pays` names as GEMMs, and those
    that `overruns` names without a stride, of the positions of x that count. gemms: False for the latter alone.

    They are convs of float32 on a CPU that torch would compute channels-last. All other calls pass unchanged, and so do
    convs under autocast, torch.compile and the transforms of torch.func. Results and gradients have torch's strides and
    differ from torch's by rounding; torch.set_float32_matmul_precision holds. A second derivative of a conv that became
    GEMMs is a RuntimeError.
    """
    return Lowering(gemms)


def pays(
    x_shape: Sequence[int], weight_shape: Sequence[int], stride: Ints, padding: Ints | str, dilation: Ints, groups: int
) -> bool:
    """Whether GEMMs are faster for a conv with these arguments of F.conv2d; False for arguments that do not fit.

    A rule on shapes alone: the rounding of a run must not depend on a timing.
    """
    return _plan(tuple(x_shape), tuple(weight_shape), _key(stride), _key(padding), _key(dilation), groups) is not None


def overruns(weight_shape: Sequence[int], stride: Ints, padding: Ints | str, groups: int) -> bool:
    """Whether oneDNN may write past its memory for the weight gradient of such a conv, channels-last on AVX2."""
    narrow = len(weight_shape) == 4 and weight_shape[1] < _ONEDNN_CHANNELS and tuple(weight_shape[2:]) == (1, 1)
    down, across = _pair(_key(stride))
    return narrow and groups == 1 and padding in _NO_PADDING and down * across > 1 and min(down, across) > 0


class Lowering(TorchFunctionMode):
    """What `lowered` enters. convs: how many it has computed in another way than torch.

    Torch calls it for each function within: 40 us for a conv with batch norm and ReLU, on a CPU with cold caches. A
    small network that has no conv to lower is faster without it, which its first batch tells.
    """

    def __init__(self, gemms: bool) -> None:
        super().__init__()
        self.gemms, self.convs = gemms, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `types` are those of tensors with a __torch_function__ of their own, which gets the call then.
        if func is torch.conv2d and not types and not torch.compiler.is_compiling():
            func = self._conv2d
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> Tensor:
        """F.conv2d, by GEMMs where they pay, and without a stride where it overruns."""
        plan = None
        if self.gemms:
            plan = _plan(input.shape, weight.shape, _key(stride), _key(padding), _key(dilation), groups)
        fits = input.dim() == 4 and input.shape[1:2] == weight.shape[1:2]
        strided = fits and overruns(weight.shape, stride, padding, groups)
        if (
            (plan is not None or strided)
            and all(_is_float32_of_cpu(t) for t in (input, weight, bias) if t is not None)
            and (bias is None or bias.shape == weight.shape[:1])
            and (_is_channels_last(input) or _is_channels_last(weight))
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
        ):
            self.convs += 1
            if plan is not None:
                return _Gemms.apply(input, weight, bias, plan)
            input, stride = _Strided.apply(input, _pair(_key(stride))), 1
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _Plan(NamedTuple):
    """How a conv becomes GEMMs."""

    out: Pair
    """height and width of y"""
    rows: int
    """of x and y as matrices: the images, or their positions if the kernel is 1x1 and skips none"""
    runs: tuple[Run, ...]


class _Strided(torch.autograd.Function):
    """x[:, :, ::down, ::across], channels-last, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: Pair) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        N, C, H, W = ctx.shape
        dx = _nchw(grad.new_zeros(N, H, W, C))
        dx[:, :, :: ctx.stride[0], :: ctx.stride[1]] = grad
        return dx, None


class _Gemms(torch.autograd.Function):
    """A conv, channels-last, once differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        ctx.save_for_backward(x, weight)  # as torch's conv does: there is no other matrix
        ctx.plan = plan
        # No view of other memory is returned: autograd refuses to write one in place, as ReLU(inplace=True) does.
        shape = (len(x), len(weight), *plan.out)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        out.copy_(x.new_zeros(()) if bias is None else bias.view(-1, 1, 1))
        for y_, x_, w_ in _products(plan, _nhwc(out), _nhwc(x), _nhwc(weight)):
            y_.addmm_(x_, w_.t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = (_nhwc(t) for t in ctx.saved_tensors)
        dy, dx, dw, db = _nhwc(grad), None, None, None
        if ctx.needs_input_grad[0]:
            dx = x.new_zeros(x.shape)
            for y_, x_, w_ in _products(ctx.plan, dy, dx, weight):
                x_.addmm_(y_, w_)
            dx = _nchw(dx)
        if ctx.needs_input_grad[1]:
            dw = weight.new_zeros(weight.shape)
            for y_, x_, w_ in _products(ctx.plan, dy, x, dw):
                w_.addmm_(y_.t(), x_)
            dw = _nchw(dw)
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 1, 2))
        return dx, dw, db, None


def _products(plan: _Plan, y: Tensor, x: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views y_ [M, O], x_ [M, K], w_ [O, K] of contiguous y [N, OH, OW, O], x [N, H, W, C], weight [O, KH, KW, C].

    The conv is the sum of x_ @ w_.T into y_ over all of them.
    """
    C_out, C = len(weight), x.shape[-1]
    y, x, weight = y.view(plan.rows, -1), x.view(plan.rows, -1), weight.view(C_out, -1)
    for position, first, tap, taps in plan.runs:
        yield (
            y.narrow(1, position * C_out, C_out),
            x.narrow(1, first * C, taps * C),
            weight.narrow(1, tap * C, taps * C),
        )


@lru_cache(1024)
def _plan(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: Key,
    padding: Key | str,
    dilation: Key,
    groups: int,
) -> _Plan | None:
    """The plan of a conv that pays, or None. Cached, because a step asks it for each conv."""
    if len(x_shape) != 4 or len(weight_shape) != 4 or x_shape[1] != weight_shape[1] or groups != 1:
        return None
    (N, C, *size), (C_out, _, *kernel) = x_shape, weight_shape
    stride, dilation = _pair(stride), _pair(dilation)
    if padding == "same" and stride == (1, 1):
        pads = [k - 1 for k in kernel]
    elif padding == "valid":
        pads = [0, 0]
    elif isinstance(padding, str):
        return None
    else:
        pads = [2 * p for p in _pair(padding)]
    if dilation != (1, 1) or min(*stride, *size, *kernel) < 1 or min(pads) < 0:
        return None
    axes = list(zip(size, kernel, stride, pads, strict=True))
    out = height, width = _pair(tuple((m + p - k) // s + 1 for m, k, s, p in axes))
    if min(out) < 1 or height * width > _MAX_POSITIONS:
        return None
    if C < _MIN_CHANNELS or N * C * C_out < _MIN_WORK * height * width:
        return None
    if kernel == [1, 1] and stride == (1, 1) and list(out) == size:
        return _Plan(out, N * height * width, ((0, 0, 0, 1),))
    down, across = (_runs(*axis) for axis in axes)
    runs = (
        (i * width + j, (y + row) * size[1] + x, (k + row) * kernel[1] + m, taps)
        for i, y, k, rows in down
        for row in range(rows)
        for j, x, m, taps in across
    )
    return _Plan(out, N, tuple(runs))


def _runs(size: int, kernel: int, stride: int, pads: int) -> list[Run]:
    """The taps inside the map along one axis of it, for each output that has some."""
    # torch, too, puts the smaller half of an odd padding ("same") first.
    starts = range(-(pads // 2), size + pads - pads // 2 - kernel + 1, stride)
    runs = ((i, max(a, 0), max(-a, 0), min(a + kernel, size) - max(a, 0)) for i, a in enumerate(starts))
    return [run for run in runs if run[3] > 0]


def _key(value: Any) -> Any:
    """`value` as a key of the cache: a list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _pair(value: Key) -> Pair:
    """(height, width) of one number or two, as F.conv2d takes them; (-1, -1), which no conv takes, of more."""
    numbers = value if isinstance(value, tuple) else (value,)
    return (numbers[0], numbers[-1]) if len(numbers) in (1, 2) else (-1, -1)


def _is_float32_of_cpu(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided


def _is_channels_last(t: Tensor) -> bool:
    """Whether torch computes with `t` [N, C, H, W] channels-last, for C > 1: c10's is_channels_last_strides_2d."""
    # is_contiguous(memory_format=) is true, too, of 1x1 kernels and maps that torch takes for contiguous.
    _, C, H, W = t.shape
    n, c, h, w = t.stride()
    return 0 < c <= c * C <= w <= w * W <= h <= h * H <= n


def _nhwc(t: Tensor) -> Tensor:
    """t [N, C, H, W] as contiguous [N, H, W, C]: a view if it is channels-last."""
    return t.permute(0, 2, 3, 1).contiguous()


def _nchw(t: Tensor) -> Tensor:
    """The opposite: channels-last [N, C, H, W], a view."""
    return t.permute(0, 3, 1, 2)
