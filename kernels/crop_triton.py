"""Triton: crop (bilinear), flip and normalise a batch out of uint8 images, written channels-last.

The floor is the bytes: at most 3 of the source and 3 values of the output a pixel. A program makes some rows of one
image, all three channels side by side as they lie in memory, so that stores are contiguous; where a pixel comes from is
worked out for each row and each column, not for each pixel. The four source values of a bilinear one come out of the
cache.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _place(at, size, out):
    """(at + 1/2) size / out - 1/2, not below 0: whole part, the pixel after it, and the rest, in exact integers."""
    twice = tl.maximum((2 * at + 1) * size - out, 0)
    first = twice // (2 * out)
    rest = tl.div_rn((twice - first * (2 * out)).to(tl.float32), (2 * out).to(tl.float32))
    return first, tl.minimum(first + 1, size - 1), rest


@triton.jit
def _crop(
    images, index, boxes, flip, table, norm, out, H, W, h: tl.constexpr, w: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    y, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = (y < h)[:, None] & (column < 3 * w)[None, :]
    x, channel = column // 3, column % 3
    x = tl.where(tl.load(flip + b) != 0, w - 1 - x, x)
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    tall, wide = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
    source = images + (tl.load(index + b) * H + top) * W * 3 + left * 3
    target = out + (b * h * w * 3) + y[:, None] * (3 * w) + column[None, :]
    if (tall == h) & (wide == w):
        # A copy: torchvision's value of each byte, to the last bit.
        pixel = tl.load(source + (y * W)[:, None] * 3 + (3 * x + channel)[None, :], mask=there, other=0)
        value = tl.load(table + 3 * pixel.to(tl.int32) + channel[None, :], mask=there, other=0.0)
        tl.store(target, value.to(out.dtype.element_ty), mask=there)
    else:
        y0, y1, part_y = _place(y, tall, tl.full([], h, tl.int32))
        x0, x1, part_x = _place(x, wide, tl.full([], w, tl.int32))
        above, below = (y0 * W)[:, None] * 3, (y1 * W)[:, None] * 3
        begin, end = (3 * x0 + channel)[None, :], (3 * x1 + channel)[None, :]
        a = tl.load(source + above + begin, mask=there, other=0).to(tl.float32)
        a += part_x[None, :] * (tl.load(source + above + end, mask=there, other=0).to(tl.float32) - a)
        c = tl.load(source + below + begin, mask=there, other=0).to(tl.float32)
        c += part_x[None, :] * (tl.load(source + below + end, mask=there, other=0).to(tl.float32) - c)
        gain, shift = tl.load(norm + channel), tl.load(norm + 3 + channel)
        value = (a + part_y[:, None] * (c - a)) * gain[None, :] + shift[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=there)


def crop(
    images: Tensor, index: Tensor, boxes: Tensor, flip: Tensor, table: Tensor, norm: Tensor, out: Tensor, block: int
) -> None:
    """Fills `out`, `block` values a program. table: float32 [256, 3], every byte normalised. norm: float32 [6], gain
    and shift of each channel. See crop.crop_flip_normalize.
    """
    batch, _, h, w = out.shape
    if out.numel():
        _, H, W, _ = images.shape
        columns = triton.next_power_of_2(3 * w)
        rows = min(max(1, block // columns), triton.next_power_of_2(h))
        warps = min(max(rows * columns // 256, 1), 8)
        grid = (batch, triton.cdiv(h, rows))
        _crop[grid](
            images, index, boxes, flip, table, norm, out, H, W, h, w, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
