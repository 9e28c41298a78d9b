"""Crop, flip and normalise a batch of uint8 images in one pass over the pixels.

Equal to torchvision's `normalize(hflip(resized_crop(image / 255, *box, size)))` on float tensors, without an
intermediate float image: one numba loop on a CPU, one Triton kernel on a GPU. Boxes and flips are arguments, drawn by
`fastprune.loaders.augment`.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import compiled, on_its_device, tl, triton, uses_triton

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@on_its_device
def crop_flip_normalize(
    images: Tensor,
    index: Tensor,
    crop_boxes: Tensor,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor,
    *,
    block: int = 1024,
) -> Tensor:
    """Fill `out[b]` with the normalised crop `crop_boxes[b]` of `images[index[b]]`, flipped if `flip[b]`; return `out`.

    images: uint8 [N, H, W, 3], contiguous.  index: int64 [B].  crop_boxes: int32 [B, 4] = top, left, height, width, in
    pixels.  flip: bool [B].  mean, std: three fractions of full scale.  out: float32, bfloat16 or float16 [B, 3, h, w],
    channels-last, overwritten.  block: output pixels per program.  All tensors are on one device.  ValueError for
    anything else, before `out` is written.

    Bilinear between pixel centres, without antialiasing, so a box must not be larger than the output. A box of the
    output's size is copied: its pixels equal torchvision's to the last bit, other pixels within rounding. Values of
    boxes and index are checked on a CPU only; on a GPU the caller must ensure that they lie inside the images.
    """
    _check(images, index, crop_boxes, flip, mean, std, out)
    # On a GPU reading the values would wait for the device.
    if out.device.type == "cpu":
        _check_values(images, index, crop_boxes, out)
    if uses_triton(out):
        table, norm = _constants_on(tuple(mean), tuple(std), out.device)
        _crop_triton(images, index, crop_boxes, flip, table, norm, out, block)
    else:
        _crop_cpu(images, index, crop_boxes, flip, *_constants(tuple(mean), tuple(std)), out)
    return out


def crop_flip_normalize_reference(
    images: Tensor,
    index: Tensor,
    crop_boxes: Tensor,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised crops `dtype` [B, 3, height, width], channels-last, new memory. Arguments as `crop_flip_normalize`.

    Output pixel x of a box of width w samples the box at (x + 1/2) w / width - 1/2, clamped to the box, by linear
    interpolation between the two nearest pixels; the same holds for y. Arguments are not checked.
    """
    top, left, box_h, box_w = crop_boxes.long().unbind(1)
    y0, y1, part_y = _places(box_h, height, dtype)
    x0, x1, part_x = _places(box_w, width, dtype)
    x0, x1, part_x = (torch.where(flip[:, None], t.flip(1), t) for t in (x0, x1, part_x))
    rows = [(top[:, None] + y)[:, :, None] for y in (y0, y1)]
    columns = [(left[:, None] + x)[:, None, :] for x in (x0, x1)]
    chosen = index[:, None, None]
    weight_x, weight_y = part_x[:, None, :, None], part_y[:, :, None, None]

    def line(row: Tensor) -> Tensor:
        begin, end = (images[chosen, row, column].to(dtype) / 255.0 for column in columns)
        return begin + weight_x * (end - begin)

    above, below = (line(row) for row in rows)
    centre = torch.tensor(mean, dtype=dtype, device=images.device)
    scale = torch.tensor(std, dtype=dtype, device=images.device)
    return (above + weight_y * (below - above)).sub_(centre).div_(scale).permute(0, 3, 1, 2)


def _places(size: Tensor, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """For `size` int64 [B]: lower and upper pixel, int64 [B, out], and the upper one's weight, `dtype` [B, out]."""
    step = torch.arange(out, device=size.device, dtype=torch.float64) + 0.5
    place = (step * size[:, None] / out - 0.5).clamp_(min=0.0)
    first = place.long()
    return first, torch.minimum(first + 1, size[:, None] - 1), (place - first).to(dtype)


def _check(
    images: Tensor,
    index: Tensor,
    crop_boxes: Tensor,
    flip: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor,
) -> None:
    tensors = {"images": images, "index": index, "crop_boxes": crop_boxes, "flip": flip, "out": out}
    count = out.shape[0] if out.ndim == 4 else -1
    shapes = {"images": (None, None, None, 3), "index": (count,), "crop_boxes": (count, 4), "flip": (count,)}
    shapes["out"] = (None, 3, None, None)
    types = {"images": torch.uint8, "index": torch.int64, "crop_boxes": torch.int32, "flip": torch.bool}
    for name, tensor in tensors.items():
        expected = shapes[name]
        if tensor.ndim != len(expected) or any(e not in (None, n) for e, n in zip(expected, tensor.shape, strict=True)):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if name in types and tensor.dtype != types[name]:
            raise ValueError(f"{name} is {tensor.dtype}, expected {types[name]}")
        if tensor.device != out.device:
            raise ValueError(f"{name} is on {tensor.device}, out on {out.device}")
        dense = tensor.permute(0, 2, 3, 1) if name == "out" else tensor
        if not dense.is_contiguous():
            raise ValueError(f"{name} is not contiguous" if name != "out" else "out is not channels-last")
    if out.dtype not in FLOAT_TYPES:
        raise ValueError(f"out is {out.dtype}, expected one of {FLOAT_TYPES}")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ValueError(f"mean and std are three numbers each, std positive, not {tuple(mean)} and {tuple(std)}")


def _check_values(images: Tensor, index: Tensor, crop_boxes: Tensor, out: Tensor) -> None:
    if not out.shape[0]:
        return
    number, height, width, _ = images.shape
    chosen, box = index.numpy(), crop_boxes.numpy().astype(np.int64)
    if chosen.min() < 0 or chosen.max() >= number:
        raise ValueError(f"index reaches from {chosen.min()} to {chosen.max()}, but there are {number} images")
    top, left, box_h, box_w = box.T
    inside = (top >= 0) & (left >= 0) & (box_h > 0) & (box_w > 0) & (top + box_h <= height) & (left + box_w <= width)
    if not inside.all():
        bad = int(np.flatnonzero(~inside)[0])
        raise ValueError(f"box {bad} {tuple(box[bad].tolist())} is not inside an image of {height}x{width}")
    if box_h.max() > out.shape[2] or box_w.max() > out.shape[3]:
        raise ValueError(
            f"a box of {box_h.max()}x{box_w.max()} is larger than the output {out.shape[2]}x{out.shape[3]}: "
            "shrinking needs antialiasing, which this kernel does not do"
        )


@cache
def _constants_on(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    table, gain, shift = map(torch.from_numpy, _constants(mean, std))
    return table.to(device), torch.cat([gain, shift]).to(device)


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every byte normalised, float32 [256, 3]; gain and shift of each channel, float32 [3]."""
    # The table follows torchvision's order of operations, so that copied pixels have its bits. Interpolated values are
    # no bytes, so they take gain and shift: one multiplication and addition instead of two divisions.
    centre, scale = torch.tensor(mean), torch.tensor(std)
    table = (torch.arange(256, dtype=torch.uint8).float() / 255.0)[:, None].sub(centre).div_(scale)
    gain = 1.0 / (255.0 * np.asarray(std, dtype=np.float64))
    shift = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
    return table.numpy(), gain.astype(np.float32), shift.astype(np.float32)


# CPU: numba

_AT_ONCE = 16  # images


def _crop_cpu(
    images: Tensor,
    index: Tensor,
    crop_boxes: Tensor,
    flip: Tensor,
    table: np.ndarray,
    gain: np.ndarray,
    shift: np.ndarray,
    out: Tensor,
) -> None:
    # numba has no bfloat16 and float16: those go through a float32 buffer, reused for a few images at a time, because
    # fresh memory for a whole batch costs more than the crops.
    each = len(out) if out.dtype == torch.float32 else _AT_ONCE
    buffer = out if out.dtype == torch.float32 else torch.empty_like(out[:each], dtype=torch.float32)
    for start in range(0, len(out), max(each, 1)):
        part = slice(start, start + each)
        crops = buffer[: len(out[part])]
        chosen = (t[part].numpy() for t in (index, crop_boxes, flip))
        compiled(_crop_loop)(images.numpy(), *chosen, table, gain, shift, crops.permute(0, 2, 3, 1).numpy())
        if buffer is not out:
            out[part] = crops


def _crop_loop(
    images: np.ndarray,
    index: np.ndarray,
    crop_boxes: np.ndarray,
    flip: np.ndarray,
    table: np.ndarray,
    gain: np.ndarray,
    shift: np.ndarray,
    out: np.ndarray,
) -> None:
    count, height, width, _ = out.shape
    row = 3 * width  # a row is flat: three values per pixel, so that inner loops are contiguous
    flat = images.reshape(images.shape[0], images.shape[1], 3 * images.shape[2])
    result = out.reshape(count, height, row)
    gains, shifts = np.empty(row, np.float32), np.empty(row, np.float32)
    for i in range(row):
        gains[i], shifts[i] = gain[i % 3], shift[i % 3]
    line = np.empty(row, np.float32)
    stretched = np.empty((height, row), np.float32)
    # Unsigned, because numba tests every signed index for being negative: half the speed.
    near, far = np.empty(width, np.uint32), np.empty(width, np.uint32)
    one, two = np.uint32(1), np.uint32(2)
    part = np.empty(width, np.float32)

    for b in range(count):
        image = flat[index[b]]
        top, left, box_h, box_w = crop_boxes[b, 0], crop_boxes[b, 1], crop_boxes[b, 2], crop_boxes[b, 3]

        if box_h == height and box_w == width:
            for y in range(height):
                source, target = image[top + y, 3 * left : 3 * left + row], result[b, y]
                if flip[b]:
                    for x in range(width):
                        for c in range(3):
                            target[3 * x + c] = table[source[3 * (width - 1 - x) + c], c]
                else:
                    for x in range(width):
                        for c in range(3):
                            target[3 * x + c] = table[source[3 * x + c], c]
            continue

        for x in range(width):
            place = max((x + 0.5) * box_w / width - 0.5, 0.0)
            first = int(place)
            goal = width - 1 - x if flip[b] else x
            near[goal] = 3 * first
            far[goal] = 3 * min(first + 1, box_w - 1)
            part[goal] = place - first
        # Each row of the box is stretched once; an output row then blends two of them over contiguous memory.
        for y in range(box_h):
            source, target = image[top + y, 3 * left : 3 * (left + box_w)], stretched[y]
            for i in range(3 * box_w):
                line[i] = source[i]
            for x in range(width):
                n, f, weight = near[x], far[x], part[x]
                red, green, blue = line[n], line[n + one], line[n + two]
                target[3 * x] = red + weight * (line[f] - red)
                target[3 * x + 1] = green + weight * (line[f + one] - green)
                target[3 * x + 2] = blue + weight * (line[f + two] - blue)
        for y in range(height):
            place = max((y + 0.5) * box_h / height - 0.5, 0.0)
            first = int(place)
            weight = np.float32(place - first)
            above, below = stretched[first], stretched[min(first + 1, box_h - 1)]
            goal_row = result[b, y]
            for i in range(row):
                goal_row[i] = (above[i] + weight * (below[i] - above[i])) * gains[i] + shifts[i]


# GPU: Triton
#
# The lower bound is memory traffic: at most 3 bytes of the source and 3 values of the output per pixel. In practice the
# kernel is bound by instructions. So source coordinates are computed per row and per column and not per pixel, the
# three channels share their addresses, and loads are not masked if the rows and columns of a program divide the image.
# The four source values of an interpolation come from the cache.


@triton.jit
def _place(at, size, out):
    """max((at + 1/2) size / out - 1/2, 0): its integer part, the next pixel inside the box, and its fraction."""
    # In integers, because float32 could round to a neighbouring pixel.
    twice = tl.maximum((2 * at + 1) * size - out, 0)
    first = twice // (2 * out)
    rest = tl.div_rn((twice - first * (2 * out)).to(tl.float32), (2 * out).to(tl.float32))
    return first, tl.minimum(first + 1, size - 1), rest


@triton.jit
def _crop_kernel(
    images, index, crop_boxes, flip, table, norm, out, H, W, h: tl.constexpr, w: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    y, x = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if h % ROWS == 0 and w == COLUMNS:
        valid: tl.constexpr = None
    else:
        valid = (y < h)[:, None] & (x < w)[None, :]
    top, left = tl.load(crop_boxes + 4 * b), tl.load(crop_boxes + 4 * b + 1)
    box_h, box_w = tl.load(crop_boxes + 4 * b + 2), tl.load(crop_boxes + 4 * b + 3)
    source = images + ((tl.load(index + b) * H + top) * W + left) * 3
    goal = tl.where(tl.load(flip + b) != 0, w - 1 - x, x)
    target = out + b * (h * w * 3) + (y * w)[:, None] * 3 + goal[None, :] * 3
    if (box_h == h) & (box_w == w):
        # A copy: torchvision's value of each byte, to the last bit.
        pixel = source + (y * W)[:, None] * 3 + x[None, :] * 3
        for c in tl.static_range(3):
            value = tl.load(table + 3 * tl.load(pixel + c, mask=valid).to(tl.int32) + c, mask=valid)
            tl.store(target + c, value.to(out.dtype.element_ty), mask=valid)
    else:
        y0, y1, part_y = _place(y, box_h, tl.full([], h, tl.int32))
        x0, x1, part_x = _place(x, box_w, tl.full([], w, tl.int32))
        above, below = source + (y0 * W)[:, None] * 3, source + (y1 * W)[:, None] * 3
        begin, end = x0[None, :] * 3, x1[None, :] * 3
        for c in tl.static_range(3):
            upper = tl.load(above + begin + c, mask=valid).to(tl.float32)
            upper += part_x[None, :] * (tl.load(above + end + c, mask=valid).to(tl.float32) - upper)
            lower = tl.load(below + begin + c, mask=valid).to(tl.float32)
            lower += part_x[None, :] * (tl.load(below + end + c, mask=valid).to(tl.float32) - lower)
            value = (upper + part_y[:, None] * (lower - upper)) * tl.load(norm + c) + tl.load(norm + 3 + c)
            tl.store(target + c, value.to(out.dtype.element_ty), mask=valid)


def _crop_triton(
    images: Tensor,
    index: Tensor,
    crop_boxes: Tensor,
    flip: Tensor,
    table: Tensor,
    norm: Tensor,
    out: Tensor,
    block: int,
) -> None:
    """table: float32 [256, 3], every byte normalised. norm: float32 [6], gain and shift of each channel."""
    batch, _, h, w = out.shape
    if out.numel():
        _, H, W, _ = images.shape
        columns = triton.next_power_of_2(w)
        rows = min(max(1, block // columns), triton.next_power_of_2(h))
        warps = min(max(rows * columns // 256, 1), 8)  # eight pixels per thread
        grid = (batch, triton.cdiv(h, rows))
        _crop_kernel[grid](
            images, index, crop_boxes, flip, table, norm, out, H, W, h, w, ROWS=rows, COLUMNS=columns, num_warps=warps
        )
