"""Sixteen float32 as one value of numba: vector code that is written out, not hoped for.

LLVM keeps a `Lanes` in registers (one zmm, two ymm), and `a * b + c` is one fused multiply-add. No flag allows it to
assume that there is no NaN or to reorder sums: results depend neither on the vector length of the machine nor on the
number of threads.

`to_lanes` and `from_lanes` convert images to the layout that these vectors walk and back: [N/16][C][H+2p][W+2p][16],
sixteen images innermost, a border of zeros stored.
"""

import operator
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model
from torch import Tensor

from fastprune.kernels.dispatch import compiled

LANES = 16
BYTES = 64
"""Bytes of a Lanes."""

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(_F32, LANES)
# Multiply and add may fuse. Nothing else may change: no reassociation, no assumption that there is no NaN.
_FUSE = ("contract",)


class Lanes(types.Type):
    """numba's type of sixteen float32."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def pointer(b: Any, address: Any, kind: Any) -> Any:
    """LLVM code: the int64 `address` as a pointer to `kind`."""
    return b.inttoptr(address, kind.as_pointer())


def broadcast(b: Any, number: Any, count: int = LANES) -> Any:
    """LLVM code: a vector of `count` times `number`, of any type."""
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    one = b.insert_element(nothing, number, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, count), [0] * count))


def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """LLVM code: x * y + z, fused."""
    return b.fadd(b.fmul(x, y, flags=_FUSE), z, flags=_FUSE)


def sum_of_four(b: Any, vectors: Any) -> Any:
    """LLVM code: the sums of the lanes of four vectors, as <4 x float>, each in a fixed order."""

    def shuffled(x: Any, y: Any, index: list[int]) -> Any:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(index)), index))

    def halves(x: Any, y: Any) -> Any:  # [sums of x's halves, sums of y's halves]
        low, high = list(range(8)), list(range(8, 16))
        return b.fadd(
            shuffled(x, y, low + [16 + i for i in low]), shuffled(x, y, high + [16 + i for i in high]), flags=_FUSE
        )

    ab, cd = halves(vectors[0], vectors[1]), halves(vectors[2], vectors[3])
    first, second = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    v = b.fadd(shuffled(ab, cd, first + [16 + i for i in first]), shuffled(ab, cd, second + [16 + i for i in second]))
    v = b.fadd(v, shuffled(v, v, [i ^ 2 for i in range(16)]))
    v = b.fadd(v, shuffled(v, v, [i ^ 1 for i in range(16)]))
    return shuffled(v, v, [0, 4, 8, 12])


def _operator(function: Any, instruction: str) -> None:
    """Defines `function` for two Lanes."""

    @infer_global(function)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(lanes, lanes, lanes) if args == (lanes, lanes) else None

    @lower_builtin(function, Lanes, Lanes)
    def _code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        return getattr(b, instruction)(*args, flags=_FUSE)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


@intrinsic
def load(context, address):
    """The sixteen float32 at `address`."""

    def code(_, b, sig, args):
        return b.load(pointer(b, args[0], VECTOR), align=4)

    return lanes(types.int64), code


@intrinsic
def store(context, value, address):
    """Writes sixteen float32 to `address`."""

    def code(target, b, sig, args):
        b.store(args[0], pointer(b, args[1], VECTOR), align=4)
        return target.get_dummy_value()

    return types.void(lanes, types.int64), code


@intrinsic
def number_at(context, address):
    """The float32 at `address`."""

    def code(_, b, sig, args):
        return b.load(pointer(b, args[0], _F32), align=4)

    return types.float32(types.int64), code


@intrinsic
def set_number(context, value, address):
    """Writes one float32 to `address`."""

    def code(target, b, sig, args):
        b.store(args[0], pointer(b, args[1], _F32), align=4)
        return target.get_dummy_value()

    return types.void(types.float32, types.int64), code


@intrinsic
def offset_at(context, address):
    """The int32 at `address`, as int64."""

    def code(_, b, sig, args):
        return b.sext(b.load(pointer(b, args[0], _I32), align=4), _I64)

    return types.int64(types.int64), code


@intrinsic
def splat(context, number):
    """Sixteen times `number`, a float32."""

    def code(_, b, sig, args):
        return broadcast(b, args[0])

    return lanes(types.float32), code


@intrinsic
def total(context, value):
    """The sum of the lanes, float32, in a fixed order."""

    def code(_, b, sig, args):
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        return b.extract_element(sum_of_four(b, [args[0], zero, zero, zero]), ir.Constant(_I32, 0))

    return types.float32(lanes), code


@intrinsic
def relu(context, value):
    """max(value, 0) lane by lane; NaN stays NaN."""

    def code(_, b, sig, args):
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        return b.select(b.fcmp_ordered("<", args[0], zero), zero, args[0])

    return lanes(lanes), code


@intrinsic
def where_positive(context, sign, value):
    """`value` in lanes where `sign` > 0 or, as in torch, NaN, else +0."""

    def code(_, b, sig, args):
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        return b.select(b.fcmp_unordered(">", args[0], zero), args[1], zero)

    return lanes(lanes, lanes), code


@intrinsic
def where_equal(context, one, other, value):
    """`value` in lanes where `one` == `other`, else +0."""

    def code(_, b, sig, args):
        return b.select(b.fcmp_ordered("==", args[0], args[1]), args[2], ir.Constant(VECTOR, [0.0] * LANES))

    return lanes(lanes, lanes, lanes), code


@intrinsic
def larger(context, best, found, candidate, place):
    """One step of max pooling: (maximum, place of it) of (best, found) and (candidate, place), lane by lane.

    As in torch, the first of equal numbers stays, and a NaN replaces what was before.
    """
    pair = types.UniTuple(lanes, 2)

    def code(target, b, sig, args):
        best, found, candidate, place = args
        wins = b.or_(b.fcmp_ordered(">", candidate, best), b.fcmp_unordered("uno", candidate, candidate))
        new = [b.select(wins, candidate, best), b.select(wins, place, found)]
        return target.make_tuple(b, pair, new)

    return pair(lanes, lanes, lanes, lanes), code


@intrinsic
def first_lanes(context, count):
    """1 in the first `count` lanes, 0 in the others. count: int64 in [0, 16]."""

    def code(_, b, sig, args):
        each = ir.Constant(ir.VectorType(_I64, LANES), list(range(LANES)))
        inside = b.icmp_signed("<", each, broadcast(b, args[0]))
        return b.select(inside, ir.Constant(VECTOR, [1.0] * LANES), ir.Constant(VECTOR, [0.0] * LANES))

    return lanes(types.int64), code


@intrinsic
def chosen(context, mask, value):
    """`value` in lanes where `mask` is not 0, else +0: a select, so that a NaN elsewhere does not pass."""

    def code(_, b, sig, args):
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        return b.select(b.fcmp_unordered("!=", args[0], zero), args[1], zero)

    return lanes(lanes, lanes), code


@intrinsic
def transposed(context, source, step):
    """Sixteen float32 from addresses source, source + step, ... (bytes) as one Lanes."""

    def code(_, b, sig, args):
        value = ir.Constant(VECTOR, ir.Undefined)
        for i in range(LANES):
            at = b.add(args[0], b.mul(args[1], ir.Constant(_I64, i)))
            value = b.insert_element(value, b.load(pointer(b, at, _F32), align=4), ir.Constant(_I32, i))
        return value

    return lanes(types.int64, types.int64), code


@intrinsic
def transpose_block(context, source, source_step, out, out_step):
    """Sixteen vectors from addresses source, source + source_step, ... (bytes), as the columns of a matrix, are written
    as its rows to out, out + out_step, ..."""

    def code(target, b, sig, args):
        vectors = [
            b.load(pointer(b, b.add(args[0], b.mul(args[1], ir.Constant(_I64, i))), VECTOR), align=4)
            for i in range(LANES)
        ]
        # In four stages, each of which swaps the halves, quarters ... of sixteen vectors that are off the diagonal.
        for s in (8, 4, 2, 1):
            low = ir.Constant(ir.VectorType(_I32, LANES), [n if not n & s else LANES + n - s for n in range(LANES)])
            high = ir.Constant(ir.VectorType(_I32, LANES), [n + s if not n & s else LANES + n for n in range(LANES)])
            for i in range(LANES):
                if not i & s:
                    one, other = vectors[i], vectors[i + s]
                    vectors[i] = b.shuffle_vector(one, other, low)
                    vectors[i + s] = b.shuffle_vector(one, other, high)
        for i, vector in enumerate(vectors):
            at = b.add(args[2], b.mul(args[3], ir.Constant(_I64, i)))
            b.store(vector, pointer(b, at, VECTOR), align=4)
        return target.get_dummy_value()

    return types.void(*[types.int64] * 4), code


def address(array: Tensor | np.ndarray) -> int:
    """The address of the first element of a tensor or an array."""
    return array.data_ptr() if isinstance(array, Tensor) else array.ctypes.data


def blocks_of(images: int) -> int:
    """Number of blocks of sixteen images."""
    return -(-images // LANES)


def to_lanes(images: Tensor, out: Tensor) -> None:
    """Writes images float32 [B, C, H, W], of any strides, into the interior of out, float32 [A, C, H+2p, W+2p, 16].

    A = ceil(B / 16); lanes beyond B become +0; the border is not written.
    """
    images = images.resolve_neg()  # torch may leave a minus for later
    batch, channels, height, width = images.shape
    border = (out.shape[2] - height) // 2
    size = images.element_size()
    n, c, h, w = (stride * size for stride in images.stride())
    inner = out[:, :, border : border + height, border : border + width]
    steps = [stride * 4 for stride in inner.stride()[:4]]
    _to_lanes(address(images), batch, channels, height, width, n, c, h, w, address(inner), *steps)


def from_lanes(value: Tensor, images: int) -> Tensor:
    """The first `images` images of value, float32 [A, C, H, W, 16], as [images, C, H, W], channels-last, new memory."""
    _, c, h, w, _ = value.shape
    # The memory of a channels-last tensor, also for shapes whose strides torch would choose otherwise.
    found = torch.empty(images, h, w, c)
    _from_lanes(address(value), *(stride * 4 for stride in value.stride()[:4]), images, c, h, w, address(found))
    return found.permute(0, 3, 1, 2)


# Of images with channels innermost, blocks of sixteen images and channels are transposed in registers.


@compiled
def _to_lanes(source, batch, channels, height, width, n, c, h, w, out, block, channel, row, column):
    whole = channels - channels % 16 if c == 4 else 0
    for a in range((batch + 15) // 16):
        count = min(batch - 16 * a, 16)
        blocked = whole if count == 16 else 0
        for k in range(0, blocked, 16):
            for r in range(height):
                start = source + 16 * a * n + k * c + r * h
                into = out + a * block + k * channel + r * row
                for x in range(width):
                    transpose_block(start + x * w, n, into + x * column, channel)
        for k in range(blocked, channels):
            for r in range(height):
                start = source + 16 * a * n + k * c + r * h
                into = out + a * block + k * channel + r * row
                for x in range(width):
                    if count == 16:
                        store(transposed(start + x * w, n), into + x * column)
                        continue
                    store(splat(np.float32(0)), into + x * column)
                    for i in range(count):
                        set_number(number_at(start + i * n + x * w), into + x * column + 4 * i)


@compiled
def _from_lanes(source, block, channel, row, column, images, channels, height, width, out):
    pixel = 4 * channels
    image = pixel * height * width
    for a in range((images + 15) // 16):
        count = min(images - 16 * a, 16)
        blocked = channels - channels % 16 if count == 16 else 0
        for k in range(0, blocked, 16):
            for r in range(height):
                start = source + a * block + k * channel + r * row
                into = out + 16 * a * image + r * width * pixel + 4 * k
                for x in range(width):
                    transpose_block(start + x * column, channel, into + x * pixel, image)
        for k in range(blocked, channels):
            for r in range(height):
                start = source + a * block + k * channel + r * row
                into = out + 16 * a * image + r * width * pixel + 4 * k
                for x in range(width):
                    for i in range(count):
                        set_number(number_at(start + x * column + 4 * i), into + i * image + x * pixel)
