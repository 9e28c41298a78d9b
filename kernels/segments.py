"""Where each layer lies in a flat buffer, and which logical position a stored element has.

A conv weight of logical shape (O, I, H, W) is stored as (O, H, W, I), the order that channels-last convs read.
Positions (ties, packed masks, saved files) are always those of the logical order, layer after layer, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One layer's weight inside a flat buffer.

    name: parameter name. shape: logical shape, (O, I, H, W) of a conv or (O, I) of a linear layer. offset: first
    element in the buffer. position: logical position of its first element.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    position: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def span(self) -> slice:
        """The segment's elements in the buffer."""
        return slice(self.offset, self.offset + self.numel)

    def view(self, buffer: Tensor) -> Tensor:
        """The segment as a view of its logical shape; a conv weight has channels-last strides."""
        flat = buffer[self.span]
        if len(self.shape) != 4:
            return flat.view(self.shape)
        o, i, h, w = self.shape
        return flat.view(o, h, w, i).permute(0, 3, 1, 2)

    def logical(self, stored: np.ndarray) -> np.ndarray:
        """Logical positions of the elements `stored` (int64 indices into the buffer that lie in this segment)."""
        local = stored - self.offset
        if len(self.shape) != 4:
            return self.position + local
        _, i, h, w = self.shape
        rest, channel = np.divmod(local, i)
        out, pixel = np.divmod(rest, h * w)
        return self.position + (out * i + channel) * (h * w) + pixel


def logical_positions(segments: Sequence[Segment], stored: np.ndarray) -> np.ndarray:
    """Logical positions of int64 buffer indices, all of which lie in some segment; int64, the same shape."""
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
