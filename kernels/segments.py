"""Segments of a flat buffer: the location of each layer, the logical position of an element, the tiles of a launch.

A conv weight of logical shape (O, I, H, W) is stored as (O, H, W, I), the order that channels-last convs read.
Positions (ties, packed masks, saved files) are always in logical order, layer after layer, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One layer's weight inside a flat buffer.

    name: of the parameter.  shape: logical shape, (O, I, H, W) of a conv or (O, I) of a linear layer.  offset: index of
    the first element in the buffer.  position: logical position of the first element.  channels_last: whether a weight
    of four dimensions is stored as (O, H, W, I); all others are stored in logical order.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    position: int
    channels_last: bool = True

    @property
    def permuted(self) -> bool:
        """Whether the storage order differs from the logical one."""
        return self.channels_last and len(self.shape) == 4

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def span(self) -> slice:
        """The segment's elements in the buffer."""
        return slice(self.offset, self.offset + self.numel)

    def view(self, buffer: Tensor) -> Tensor:
        """The segment as a view of its logical shape; a weight stored channels-last has such strides."""
        flat = buffer[self.span]
        if not self.permuted:
            return flat.view(self.shape)
        o, i, h, w = self.shape
        return flat.view(o, h, w, i).permute(0, 3, 1, 2)

    def logical(self, stored: np.ndarray) -> np.ndarray:
        """Logical positions of `stored`, int64 indices into the buffer that lie in this segment."""
        local = stored - self.offset
        if not self.permuted:
            return self.position + local
        _, i, h, w = self.shape
        rest, channel = np.divmod(local, i)
        out, pixel = np.divmod(rest, h * w)
        return self.position + (out * i + channel) * (h * w) + pixel


def logical_positions(segments: Sequence[Segment], stored: np.ndarray) -> np.ndarray:
    """Logical positions, int64, of `stored`, int64 indices into the buffer that all lie in segments."""
    starts = np.array([s.offset for s in segments], dtype=np.int64)
    owner = np.searchsorted(starts, stored, side="right") - 1
    positions = np.empty_like(stored)
    for k in np.unique(owner):
        chosen = owner == k
        positions[chosen] = segments[k].logical(stored[chosen])
    return positions


def check_segments(segments: Sequence[Segment], numel: int) -> None:
    """ValueError unless the segments are ordered, disjoint and inside a buffer of `numel` elements."""
    end = 0
    for segment in segments:
        if segment.offset < end:
            raise ValueError(f"segment {segment.name} starts at {segment.offset}, inside the one before it")
        end = segment.offset + segment.numel
    if end > numel:
        raise ValueError(f"the segments end at {end}, but the buffer has {numel} elements")


class Tiling(NamedTuple):
    """The work of the programs of one launch, int64 on the device. A tile never crosses a segment.

    tiles [n, 4]: start, length, segment, group.  table [segments, 4]: offset, position, channels, pixels.  ranges
    [groups, 2]: first element and size in the buffer.  aligned: all tiles start and end at multiples of 16.  A group is
    a set of segments with one count to prune: all segments together, or each segment alone.
    """

    # Alignment is passed on because the compiler cannot derive it from indices in a table, and without it emits 4-byte
    # loads instead of 16-byte ones.

    tiles: Tensor
    table: Tensor
    ranges: Tensor
    aligned: bool


# Cached, because a training uses the same few tilings again, and each costs a copy from host to device.
@lru_cache(maxsize=32)
def tiling(
    segments: tuple[Segment, ...], n: int, block: int, local: bool, device: torch.device, padded: bool = True
) -> Tiling:
    """The tiling of a buffer of n elements.

    local: each segment is a group of its own.  padded: the last tile of a segment may include the padding behind it,
    which no mask keeps.
    """
    tiles, table, ranges = [], [], [] if local else [(0, n)]
    ends = [*(s.offset for s in segments[1:]), n]
    for number, (s, room) in enumerate(zip(segments, ends, strict=True)):
        channels, pixels = (s.shape[1], s.shape[2] * s.shape[3]) if s.permuted else (1, 1)
        table.append((s.offset, s.position, max(channels, 1), max(pixels, 1)))
        end = s.offset + s.numel
        end = min(-(-end // 16) * 16, room) if padded else end
        if local:
            ranges.append((s.offset, end - s.offset))
        for start in range(s.offset, end, block):
            tiles.append((start, min(block, end - start), number, number if local else 0))
    aligned = all(start % 16 == 0 == length % 16 for start, length, _, _ in tiles)
    a, b, c = (
        torch.tensor(rows, dtype=torch.int64).view(-1, width).to(device)
        for rows, width in ((tiles, 4), (table, 4), (ranges, 2))
    )
    return Tiling(a, b, c, aligned)
