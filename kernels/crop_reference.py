"""The meaning of `crop_flip_normalize`, in plain torch on any device and in any float type."""

from collections.abc import Sequence

import torch


def crop_flip_normalize_reference(
    images: torch.Tensor,
    index: torch.Tensor,
    boxes: torch.Tensor,
    flip: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalised crops `dtype` [B, 3, height, width], channels-last, new memory; arguments as `crop_flip_normalize`.

    Output pixel x of a box of width w takes its value at (x + 1/2) w / width - 1/2, clamped to the box, linearly
    between the two nearest pixels; the same in y. Nothing is checked.
    """
    top, left, tall, wide = boxes.long().unbind(1)
    y0, y1, part_y = _places(tall, height, dtype)
    x0, x1, part_x = _places(wide, width, dtype)
    x0, x1, part_x = (torch.where(flip[:, None], t.flip(1), t) for t in (x0, x1, part_x))
    rows = [(top[:, None] + y)[:, :, None] for y in (y0, y1)]
    columns = [(left[:, None] + x)[:, None, :] for x in (x0, x1)]
    chosen = index[:, None, None]
    weight_x, weight_y = part_x[:, None, :, None], part_y[:, :, None, None]

    def line(row: torch.Tensor) -> torch.Tensor:
        begin, end = (images[chosen, row, column].to(dtype) / 255.0 for column in columns)
        return begin + weight_x * (end - begin)

    above, below = (line(row) for row in rows)
    centre = torch.tensor(mean, dtype=dtype, device=images.device)
    scale = torch.tensor(std, dtype=dtype, device=images.device)
    return (above + weight_y * (below - above)).sub_(centre).div_(scale).permute(0, 3, 1, 2)


def _places(size: torch.Tensor, out: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For `size` int64 [B]: lower and upper pixel, int64 [B, out], and the upper one's weight, `dtype` [B, out]."""
    step = torch.arange(out, device=size.device, dtype=torch.float64) + 0.5
    place = (step * size[:, None] / out - 0.5).clamp_(min=0.0)
    first = place.long()
    return first, torch.minimum(first + 1, size[:, None] - 1), (place - first).to(dtype)
