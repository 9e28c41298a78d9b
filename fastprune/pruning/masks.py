"""Masks: which weights of a model are kept, as one flat bool buffer (`Mask`) or beside each layer (masked layers).

`prunable` names the weights, `layout` places them in a flat buffer, `attach` gives a model's own layers masks.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.files import read_tensors, write_tensors
from fastprune.kernels import Segment, masked_weight, pack_bits, segment_counts, unpack_bits

# Triton loads are wide where tiles start at multiples of 16 elements. On a CPU torch's fused SGD rounds as its default
# one only if the buffer is a multiple of 64.
_ALIGN = 64
"""Every segment starts at a multiple of _ALIGN elements: 256 bytes of a float32 buffer, 64 bytes of a mask."""


def prunable(model: nn.Module, linear: bool = False) -> list[tuple[str, Tensor]]:
    """(parameter name, weight) of every conv, and with `linear` of every linear layer, in the model's order; no biases.

    ValueError for a weight that two layers share.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)
    found: dict[int, tuple[str, Tensor]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, kinds):
            name = f"{module_name}.weight" if module_name else "weight"
            if id(module.weight) in found:
                raise ValueError(
                    f"{found[id(module.weight)][0]} and {name} are one weight: shared layers cannot be pruned"
                )
            found[id(module.weight)] = (name, module.weight)
    return list(found.values())


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
        """LPR: by parameter name, the fraction of the layer's weights that is pruned, in [0, 1]."""
        counts = segment_counts(self.keep, self.segments).tolist()
        return {s.name: 1.0 - n / s.numel for s, n in zip(self.segments, counts, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """By parameter name, bool of logical shape, contiguous; views of `keep` where the orders are the same."""
        return {s.name: s.view(self.keep).contiguous() for s in self.segments}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Mask":
        """The mask of bool tensors of logical shape by parameter name, in their order; on the CPU."""
        mask = cls.dense(layout(tensors.items()))
        for s in mask.segments:
            s.view(mask.keep).copy_(tensors[s.name])
        return mask

    def save(self, path: Path) -> None:
        """Writes a safetensors file: by parameter name uint8, 8 weights a byte, the first in the lowest bit, in logical
        order; the shapes are in the metadata."""
        packed = {name: pack_bits(t.flatten()) for name, t in self.tensors().items()}
        write_tensors(path, packed, {"mask": 1, "shapes": {s.name: list(s.shape) for s in self.segments}})

    @classmethod
    def load(cls, path: Path) -> "Mask":
        """Reads a file that `save` wrote, to the CPU. InputError for any other file."""
        packed, facts = read_tensors(path)
        try:
            if facts["mask"] != 1:
                raise InputError(f"{path}: a mask of format {facts['mask']}; this version of fastprune reads format 1")
            shapes = {name: torch.Size(shape) for name, shape in facts["shapes"].items()}
            return cls.from_tensors({n: unpack_bits(packed[n], s.numel()).view(s) for n, s in shapes.items()})
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
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


class _Masked(nn.Module):
    """Base of masked layers. mask: bool buffer of the weight's shape, True keeps, written in place; None for dense."""

    mask: Tensor | None
    weight: Any  # a Parameter, annotated differently by the two kinds of layer
    # Masking again in the forward would cost a pass over every weight, and change nothing.
    held = False
    """Whether a Trainer keeps pruned weights at +0: the forward then uses the weight unmasked."""

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """Turns `module` into a masked layer in place and returns it. ValueError for a subclass of the plain layer."""
        # A subclass may have a forward of its own, which the new class would replace.
        if type(module) is not cls.__bases__[1]:
            raise ValueError(f"only a plain {cls.__bases__[1].__name__} can be masked, not {type(module).__name__}")
        # The class changes, not the object: a new one could lose groups, dilation, hooks or the initial weights, and an
        # optimiser would hold the parameters of the old one.
        module.__class__ = cls
        module.register_buffer("mask", None)
        return module  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        # No Trainer keeps a copy's pruned weights at +0: the copy masks them itself.
        return {name: value for name, value in self.__dict__.items() if name != "held"}

    def set_mask(self, keep: Tensor) -> None:
        """Writes `keep` (bool, the weight's shape) into the mask in place, and +0 into the weights that it prunes.

        ValueError for another shape.
        """
        if keep.shape != self.weight.shape:
            raise ValueError(f"mask of shape {tuple(keep.shape)} for a weight of shape {tuple(self.weight.shape)}")
        if self.mask is None:
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        self.mask.copy_(keep)  # in place: a captured CUDA graph reads this memory, a new tensor would leave it stale
        with torch.no_grad():
            # A select, not a product: 0 x -w is -0, and 0 x inf is NaN.
            self.weight.masked_fill_(~self.mask, 0.0)

    def _masked_weight(self) -> Tensor:
        """The weight that the forward uses: masked, and under autocast in autocast's dtype."""
        if self.mask is None or self.held:
            return self.weight
        # Masking and casting in one pass; autocast would read and write the weights a second time.
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return masked_weight(self.weight, self.mask, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # torch loads into existing buffers only, and None is no buffer to it.
        if self.mask is None and prefix + "mask" in state_dict:
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "mask" in missing[before:]:  # the state dict of a plain model loads, too: the mask stays as it is
            missing.remove(prefix + "mask")


class MaskedConv2d(_Masked, nn.Conv2d):
    """A conv that computes with where(mask, weight, +0); without a mask it equals nn.Conv2d bit for bit.

    The value of a pruned weight does not enter the result, and its gradient is 0.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._masked_weight(), self.bias)


class MaskedLinear(_Masked, nn.Linear):
    """A linear layer that computes with where(mask, weight, +0); see MaskedConv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._masked_weight(), self.bias)


def attach(model: nn.Module, mask: Mask | None = None, *, linear: bool = False) -> nn.Module:
    """Turns every conv of `model` (with `linear` every linear layer, too) into a masked layer, in place.

    Returns the model. With a `mask`, pruned weights become +0. Without one the model computes what it computed before,
    bit for bit. A further call writes new masks in place. ValueError if the mask's layers or shapes are not the
    model's, for a subclass of nn.Conv2d or nn.Linear, and for a weight that two layers share.
    """
    named = prunable(model, linear)
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in named}
    for name, module in layers.items():
        if not isinstance(module, _Masked):
            layers[name] = (MaskedConv2d if isinstance(module, nn.Conv2d) else MaskedLinear).wrap(module)
    if mask is not None:
        tensors = mask.tensors()
        if set(tensors) != set(layers):
            raise ValueError(f"the mask's layers are not the model's: {sorted(set(tensors) ^ set(layers))[:4]}")
        for name, keep in tensors.items():
            layers[name].set_mask(keep)  # type: ignore[operator]
    return model


def weight_masks(model: nn.Module) -> dict[Tensor, Tensor]:
    """By weight (a Parameter), the mask (bool, of its shape) of each layer that has one; no copies."""
    layers = (m for m in model.modules() if isinstance(m, _Masked))
    return {m.weight: m.mask for m in layers if m.mask is not None}


def share_masks(model: nn.Module, segments: tuple[Segment, ...], keep: Tensor) -> None:
    """Makes the masks of an attached model views of `keep` (bool [n] in the storage order of `segments`).

    The owner of `keep` must hold pruned weights at +0 from now on: the layers no longer mask them. Layers that are not
    masked layers are unchanged.
    """
    for s in segments:
        module = model.get_submodule(s.name.rpartition(".")[0])
        if isinstance(module, _Masked):
            module.mask, module.held = s.view(keep), True


def unshare_masks(model: nn.Module) -> None:
    """Undoes `share_masks`: the layers mask their weights themselves again, by the masks that they share."""
    for module in model.modules():
        if isinstance(module, _Masked):
            module.held = False


def masks_of(model: nn.Module, *, linear: bool = False) -> Mask:
    """The masks of an attached model, copied to the CPU; a layer without one counts as dense."""
    tensors = {}
    for name, weight in prunable(model, linear):
        keep = getattr(model.get_submodule(name.rpartition(".")[0]), "mask", None)
        tensors[name] = torch.ones_like(weight, dtype=torch.bool).cpu() if keep is None else keep.cpu()
    return Mask.from_tensors(tensors)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without fastprune: no masks, +0 for pruned weights; fresh contiguous CPU tensors."""
    # Copies, because torch.save of a view writes the whole buffer under it, and a Trainer's parameters are such views.
    state = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, _Masked):
            prefix = f"{name}." if name else ""
            mask = state.pop(prefix + "mask", None)
            if mask is not None:
                state[prefix + "weight"].masked_fill_(~mask, 0.0)
    return state
