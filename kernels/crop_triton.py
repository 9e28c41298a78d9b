"""Triton: crop (bilinear), flip and normalise a batch out of uint8 images, written channels-last.

One program makes a run of pixels of one image, all three channels. The floor is the bytes: at most 3 of the source
and 3 values of the output a pixel; the four source pixels of a bilinear value come out of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _line(images, row, x0, x1, part, there):
    begin = tl.load(images + (row + x0) * 3, mask=there, other=0).to(tl.float32)
    end = tl.load(images + (row + x1) * 3, mask=there, other=0).to(tl.float32)
    return begin + part * (end - begin)


@triton.jit
def _place(at, size, out):
    """(at + 1/2) size / out - 1/2, not below 0: whole part, the pixel after it, and the rest, in exact integers."""
    twice = tl.maximum((2 * at + 1) * size - out, 0)
    first = twice // (2 * out)
    rest = tl.div_rn((twice - first * (2 * out)).to(tl.float32), (2 * out).to(tl.float32))
    return first, tl.minimum(first + 1, size - 1), rest


@triton.jit
def _crop(images, index, boxes, flip, norm, out, H, W, h, w, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < h * w
    y, x = i // w, i % w
    x = tl.where(tl.load(flip + b) != 0, w - 1 - x, x)
    top, left = tl.load(boxes + 4 * b), tl.load(boxes + 4 * b + 1)
    tall, wide = tl.load(boxes + 4 * b + 2), tl.load(boxes + 4 * b + 3)
    y0, y1, part_y = _place(y, tall, h)
    x0, x1, part_x = _place(x, wide, w)
    image = tl.load(index + b) * H * W
    above, below = image + (top + y0).to(tl.int64) * W + left, image + (top + y1).to(tl.int64) * W + left
    target = out + (b * h * w + i) * 3
    for c in tl.static_range(3):
        upper = _line(images + c, above, x0, x1, part_x, there)
        lower = _line(images + c, below, x0, x1, part_x, there)
        value = upper + part_y * (lower - upper)
        # In torchvision's order and correctly rounded, so that a pixel that is only copied comes out the same.
        value = tl.div_rn(tl.div_rn(value, 255.0) - tl.load(norm + c), tl.load(norm + 3 + c))
        tl.store(target + c, value.to(out.dtype.element_ty), mask=there)


def crop(images: Tensor, index: Tensor, boxes: Tensor, flip: Tensor, norm: Tensor, out: Tensor, block: int) -> None:
    """Fills `out`; norm is float32 [6], mean then deviation of each channel. See crop.crop_flip_normalize."""
    batch, _, h, w = out.shape
    if out.numel():
        _, H, W, _ = images.shape
        grid = (batch, triton.cdiv(h * w, block))
        _crop[grid](images, index, boxes, flip, norm, out, H, W, h, w, BLOCK=block, num_warps=4)
