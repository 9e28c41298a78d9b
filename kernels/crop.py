"""Crop, mirror and normalise a batch of whole uint8 images in one pass over the pixels.

The boxes come from `fastprune.loaders.augment.boxes`; nothing random happens here. The meaning is torchvision's
`normalize(hflip(resized_crop(image / 255, *box, size)))` on float tensors, written out in `crop_reference.py`. On a CPU
one numba loop does it without an intermediate float image, on a GPU one Triton kernel (crop_triton.py).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from fastprune.kernels.device import on_its_device
from fastprune.kernels.jit import compiled
from fastprune.kernels.ops import uses_triton

_AT_ONCE = 16
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@on_its_device
def crop_flip_normalize(
    images: torch.Tensor,
    index: torch.Tensor,
    boxes: torch.Tensor,
    flip: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: torch.Tensor,
    *,
    block: int = 1024,
) -> torch.Tensor:
    """Fill `out[b]` with the normalised crop `boxes[b]` of `images[index[b]]`, mirrored where `flip[b]`; return `out`.

    images: uint8 [N, H, W, 3], contiguous.  index: int64 [B].  boxes: int32 [B, 4] = top, left, height, width, in
    pixels.  flip: bool [B].  mean, std: three fractions of full scale.  out: float32, bfloat16 or float16 [B, 3, h, w],
    channels-last, overwritten. All tensors on one device. ValueError for anything else, before out is touched.

    Bilinear between pixel centres, without antialiasing, so a box may not be larger than the output (ValueError). A
    box of exactly the output's size is copied: those pixels equal torchvision's to the last bit, the others within
    rounding. On a CPU bfloat16 and float16 go through a float32 buffer (numba has no such types), and boxes and index
    are checked against the image; on a GPU that check would wait for the device, so there the caller answers for them.
    block: output pixels a program.
    """
    _check(images, index, boxes, flip, mean, std, out)
    if out.device.type == "cpu":
        _check_values(images, index, boxes, out)
    if uses_triton(out):
        from fastprune.kernels import crop_triton

        crop_triton.crop(images, index, boxes, flip, *_on_device(tuple(mean), tuple(std), out.device), out, block)
        return out
    constants = _constants(tuple(mean), tuple(std))
    # Short floats a few images at a time: fresh memory for a whole batch costs more than the crops.
    each = len(out) if out.dtype == torch.float32 else _AT_ONCE
    wide = out if out.dtype == torch.float32 else torch.empty_like(out[:each], dtype=torch.float32)
    for start in range(0, len(out), max(each, 1)):
        part = slice(start, start + each)
        made = wide[: len(out[part])]
        chosen = (t[part].numpy() for t in (index, boxes, flip))
        compiled(_crop_flip_normalize)(images.numpy(), *chosen, *constants, made.permute(0, 2, 3, 1).numpy())
        if wide is not out:
            out[part] = made
    return out


def _check(
    images: torch.Tensor,
    index: torch.Tensor,
    boxes: torch.Tensor,
    flip: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: torch.Tensor,
) -> None:
    tensors = {"images": images, "index": index, "boxes": boxes, "flip": flip, "out": out}
    count = out.shape[0] if out.ndim == 4 else -1
    shapes = {"images": (None, None, None, 3), "index": (count,), "boxes": (count, 4), "flip": (count,)}
    shapes["out"] = (None, 3, None, None)
    types = {"images": torch.uint8, "index": torch.int64, "boxes": torch.int32, "flip": torch.bool}
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


def _check_values(images: torch.Tensor, index: torch.Tensor, boxes: torch.Tensor, out: torch.Tensor) -> None:
    if not out.shape[0]:
        return
    number, height, width, _ = images.shape
    chosen, box = index.numpy(), boxes.numpy().astype(np.int64)
    if chosen.min() < 0 or chosen.max() >= number:
        raise ValueError(f"index reaches from {chosen.min()} to {chosen.max()}, but there are {number} images")
    top, left, tall, wide = box.T
    inside = (top >= 0) & (left >= 0) & (tall > 0) & (wide > 0) & (top + tall <= height) & (left + wide <= width)
    if not inside.all():
        bad = int(np.flatnonzero(~inside)[0])
        raise ValueError(f"box {bad} {tuple(box[bad].tolist())} is not inside an image of {height}x{width}")
    if tall.max() > out.shape[2] or wide.max() > out.shape[3]:
        raise ValueError(
            f"a box of {tall.max()}x{wide.max()} is larger than the output {out.shape[2]}x{out.shape[3]}: "
            "shrinking needs antialiasing, which this kernel does not do"
        )


@cache
def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    table, gain, shift = map(torch.from_numpy, _constants(mean, std))
    return table.to(device), torch.cat([gain, shift]).to(device)


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every byte normalised in torchvision's order of operations, float32 [256, 3]; gain and shift, float32 [3]."""
    centre, scale = torch.tensor(mean), torch.tensor(std)
    table = (torch.arange(256, dtype=torch.uint8).float() / 255.0)[:, None].sub(centre).div_(scale)
    gain = 1.0 / (255.0 * np.asarray(std, dtype=np.float64))
    shift = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
    return table.numpy(), gain.astype(np.float32), shift.astype(np.float32)


def _crop_flip_normalize(
    images: np.ndarray,
    index: np.ndarray,
    boxes: np.ndarray,
    flip: np.ndarray,
    table: np.ndarray,
    gain: np.ndarray,
    shift: np.ndarray,
    out: np.ndarray,
) -> None:
    count, height, width, _ = out.shape
    row = 3 * width  # rows are handled flat, pixel after pixel, three bytes or floats each
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
        top, left, tall, wide = boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3]

        if tall == height and wide == width:
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
            place = max((x + 0.5) * wide / width - 0.5, 0.0)
            first = int(place)
            goal = width - 1 - x if flip[b] else x
            near[goal] = 3 * first
            far[goal] = 3 * min(first + 1, wide - 1)
            part[goal] = place - first
        # Each row of the box is stretched once; an output row then blends two of them over contiguous memory.
        for y in range(tall):
            source, target = image[top + y, 3 * left : 3 * (left + wide)], stretched[y]
            for i in range(3 * wide):
                line[i] = source[i]
            for x in range(width):
                n, f, weight = near[x], far[x], part[x]
                red, green, blue = line[n], line[n + one], line[n + two]
                target[3 * x] = red + weight * (line[f] - red)
                target[3 * x + 1] = green + weight * (line[f + one] - green)
                target[3 * x + 2] = blue + weight * (line[f + two] - blue)
        for y in range(height):
            place = max((y + 0.5) * tall / height - 0.5, 0.0)
            first = int(place)
            weight = np.float32(place - first)
            above, below = stretched[first], stretched[min(first + 1, tall - 1)]
            goal_row = result[b, y]
            for i in range(row):
                goal_row[i] = (above[i] + weight * (below[i] - above[i])) * gains[i] + shifts[i]
