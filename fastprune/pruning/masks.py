"""Masks in one flat bool buffer: `layout` places weights in it, `Mask` says which of them are kept, and is a file."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.files import MASK, TENSORS, check_kind, read_tensors, write_tensors
from fastprune.kernels import Segment, pack_bits, segment_counts, unpack_bits

# Triton loads are wide where tiles start at multiples of 16 elements. On a CPU torch's fused SGD rounds as its default
# one only if the buffer is a multiple of 64.
_ALIGN = 64
"""Every segment starts at a multiple of _ALIGN elements: 256 bytes of a float32 buffer, 64 bytes of a mask."""


def layout(named: Iterable[tuple[str, Tensor]]) -> tuple[Segment, ...]:
    """The segment of each weight in a flat buffer, in the given order, each aligned to _ALIGN elements."""
    segments, offset, position = [], 0, 0
    for name, weight in named:
        segment = Segment(name, tuple(weight.shape), offset, position)
        segments.append(segment)
        # Two counters: padding moves offsets, never positions, so that saved masks and ties do not depend on _ALIGN.
        offset += -(-segment.numel // _ALIGN) * _ALIGN
        position += segment.numel
    return tuple(segments)


def buffer_size(segments: tuple[Segment, ...]) -> int:
    """Number of elements of a buffer with these segments, padding after the last one included."""
    return max((-(-(s.offset + s.numel) // _ALIGN) * _ALIGN for s in segments), default=0)


def masks_of_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """By parameter name, bool of the weights' shapes: False where a weight is 0. None if the model looks unpruned.

    That is, if fewer than 0.01 % of the weights are 0, not counting layers that are all zeros.  weights: floating, by
    parameter name. Without values (on the meta device) there are none.
    """
    known = {name: w.detach() for name, w in weights.items() if w.device.type != "meta"}
    zeros = {name: w.numel() - int(w.count_nonzero()) for name, w in known.items()}
    # Many models initialise a head, or the last layer of a block, with zeros alone (ViT's, LoRA's). And a normal draw
    # is exactly 0 about once in 2^24: so few zeros are chance.
    partly = {name: n for name, n in zeros.items() if n < known[name].numel()}
    if not any(partly.values()) or sum(partly.values()) < 1e-4 * sum(known[name].numel() for name in partly):
        return None
    return {name: w != 0 for name, w in known.items()}


@dataclass(frozen=True)
class Mask:
    """Which weights are kept.

    keep: bool [n] in the storage order of `segments`: True keeps, False prunes; padding is False. A saved mask holds
    one bit a weight in logical order, one tensor a layer, and can be read without fastprune.
    """

    keep: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def dense(cls, segments: tuple[Segment, ...]) -> "Mask":
        """The mask that keeps every weight."""
        keep = torch.zeros(buffer_size(segments), dtype=torch.bool)
        for s in segments:
            keep[s.span] = True
        return cls(keep, segments)

    @property
    def total(self) -> int:
        """Number of weights, padding not counted."""
        return sum(s.numel for s in self.segments)

    @property
    def kept(self) -> int:
        """Number of kept weights. Waits for the device."""
        return int(segment_counts(self.keep, self.segments).sum())

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, in [0, 1]; 1 without weights."""
        return self.kept / self.total if self.total else 1.0

    def layerwise_ratios(self) -> dict[str, float]:
        """LPR: by parameter name, the fraction of the layer's weights that is pruned, in [0, 1]; 0 without weights."""
        counts = segment_counts(self.keep, self.segments).tolist()
        return {s.name: 1.0 - n / s.numel if s.numel else 0.0 for s, n in zip(self.segments, counts, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """By parameter name, bool of logical shape, contiguous; views of `keep` where the orders are the same."""
        return {s.name: s.view(self.keep).contiguous() for s in self.segments}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Mask":
        """The mask of bool tensors of logical shape by parameter name, in their order; on the CPU. ValueError for other
        dtypes."""
        if other := [name for name, tensor in tensors.items() if tensor.dtype != torch.bool]:
            raise ValueError(f"the mask of {other[0]} has dtype {tensors[other[0]].dtype}, expected bool")
        mask = cls.dense(layout(tensors.items()))
        for s in mask.segments:
            s.view(mask.keep).copy_(tensors[s.name])
        return mask

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file: by parameter name uint8, 8 weights a byte, the first in the lowest bit, in logical
        order; the shapes are in the metadata."""
        packed = {name: pack_bits(t.flatten()) for name, t in self.tensors().items()}
        write_tensors(Path(path), packed, {"mask": 1, "shapes": {s.name: list(s.shape) for s in self.segments}})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Mask":
        """Reads a file that `save` wrote, to the CPU. InputError for any other file."""
        expected = "a mask (mask.safetensors)"
        packed, facts = read_tensors(Path(path), expected)
        check_kind(Path(path), expected, MASK, TENSORS)
        try:
            if facts["mask"] != 1:
                raise InputError(f"{path}: a mask of format {facts['mask']}; this version of fastprune reads format 1")
            shapes = {name: torch.Size(shape) for name, shape in facts["shapes"].items()}
            return cls.from_tensors({n: unpack_bits(packed[n], s.numel()).view(s) for n, s in shapes.items()})
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path}: not a mask that fastprune wrote") from error

    def ratios_csv(self) -> str:
        """A CSV table of the layers: layer, weights, kept, pruned_fraction."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["layer", "weights", "kept", "pruned_fraction"])
        for (name, ratio), n in zip(
            self.layerwise_ratios().items(), segment_counts(self.keep, self.segments).tolist(), strict=True
        ):
            numel = next(s.numel for s in self.segments if s.name == name)
            rows.writerow([name, numel, n, repr(ratio)])  # repr: the shortest digits that give the float back
        return out.getvalue()
