"""Triton: crop (bilinear), flip and normalise a batch out of uint8 images, written channels-last.

The floor is the bytes: at most 3 of the source and 3 values of the output a pixel. What decides is the number of
instructions, so where a pixel comes from is worked out for each row and each column, not for each pixel, the three
channels share their addresses, and nothing is masked where the rows and columns of a program fit the image. The four
source values of a bilinear one come out of the cache.
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
    y, x = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if h % ROWS == 0 and w == COLUMNS:
        there: tl.constexpr = None
    else:
        there = (y < h)[:, None] & (x < w)[None, :]
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    tall, wide = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
    source = images + ((tl.load(index + b) * H + top) * W + left) * 3
    goal = tl.where(tl.load(flip + b) != 0, w - 1 - x, x)
    target = out + b * (h * w * 3) + (y * w)[:, None] * 3 + goal[None, :] * 3
    if (tall == h) & (wide == w):
        # A copy: torchvision's value of each byte, to the last bit.
        pixel = source + (y * W)[:, None] * 3 + x[None, :] * 3
        for c in tl.static_range(3):
            value = tl.load(table + 3 * tl.load(pixel + c, mask=there).to(tl.int32) + c, mask=there)
            tl.store(target + c, value.to(out.dtype.element_ty), mask=there)
    else:
        y0, y1, part_y = _place(y, tall, tl.full([], h, tl.int32))
        x0, x1, part_x = _place(x, wide, tl.full([], w, tl.int32))
        above, below = source + (y0 * W)[:, None] * 3, source + (y1 * W)[:, None] * 3
        begin, end = x0[None, :] * 3, x1[None, :] * 3
        for c in tl.static_range(3):
            upper = tl.load(above + begin + c, mask=there).to(tl.float32)
            upper += part_x[None, :] * (tl.load(above + end + c, mask=there).to(tl.float32) - upper)
            lower = tl.load(below + begin + c, mask=there).to(tl.float32)
            lower += part_x[None, :] * (tl.load(below + end + c, mask=there).to(tl.float32) - lower)
            value = (upper + part_y[:, None] * (lower - upper)) * tl.load(norm + c) + tl.load(norm + 3 + c)
            tl.store(target + c, value.to(out.dtype.element_ty), mask=there)


def crop(
    images: Tensor, index: Tensor, boxes: Tensor, flip: Tensor, table: Tensor, norm: Tensor, out: Tensor, block: int
) -> None:
    """Fills `out`, `block` pixels a program. table: float32 [256, 3], every byte normalised. norm: float32 [6], gain
    and shift of each channel. See crop.crop_flip_normalize.
    """
    batch, _, h, w = out.shape
    if out.numel():
        _, H, W, _ = images.shape
        columns = triton.next_power_of_2(w)
        rows = min(max(1, block // columns), triton.next_power_of_2(h))
        warps = min(max(rows * columns // 256, 1), 8)  # eight pixels a thread
        grid = (batch, triton.cdiv(h, rows))
        _crop[grid](
            images, index, boxes, flip, table, norm, out, H, W, h, w, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
