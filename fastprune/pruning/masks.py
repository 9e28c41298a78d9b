"""Flat parameters: every prunable weight of a model in one buffer, everything else that trains in another.

The optimiser, the masks, pruning and rewinding then are a few operations on long vectors, whatever the model.
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

_ALIGN = 64
"""Elements: every segment starts on a 256-byte boundary of the fp32 buffer, and on a 64-byte one of the masks."""


def prunable(model: nn.Module, linear: bool = False) -> list[tuple[str, Tensor]]:
    """(name, weight) of every conv, in the model's order; never the bias, and linear layers only when asked.

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
    """Segments for these weights, aligned, in order."""
    segments, offset, position = [], 0, 0
    for name, weight in named:
        segment = Segment(name, tuple(weight.shape), offset, position)
        segments.append(segment)
        offset += -(-segment.numel // _ALIGN) * _ALIGN
        position += segment.numel
    return tuple(segments)


def buffer_size(segments: tuple[Segment, ...]) -> int:
    """Elements of a buffer with this layout, padding behind the last segment included."""
    return max((-(-(s.offset + s.numel) // _ALIGN) * _ALIGN for s in segments), default=0)


@dataclass(frozen=True)
class Mask:
    """Which weights are kept: bool [n] in the storage order of `segments`, padding False.

    Saved as one bit a weight in logical order, a tensor for each layer, readable without fastprune.
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
        return sum(s.numel for s in self.segments)

    @property
    def kept(self) -> int:
        return int(segment_counts(self.keep, self.segments).sum())

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, in [0, 1]."""
        return self.kept / self.total if self.total else 1.0

    def layerwise_ratios(self) -> dict[str, float]:
        """LPR: for each layer the fraction of its weights that is pruned."""
        counts = segment_counts(self.keep, self.segments).tolist()
        return {s.name: 1.0 - n / s.numel for s, n in zip(self.segments, counts, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """bool tensors of logical shape, by parameter name."""
        return {s.name: s.view(self.keep).contiguous() for s in self.segments}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Mask":
        """From bool tensors of logical shape, in their order."""
        mask = cls.dense(layout(tensors.items()))
        for s in mask.segments:
            s.view(mask.keep).copy_(tensors[s.name])
        return mask

    def save(self, path: Path) -> None:
        """Writes uint8 tensors of packed bits (lowest bit first, logical order); shapes stand in the metadata."""
        packed = {name: pack_bits(t.flatten()) for name, t in self.tensors().items()}
        write_tensors(path, packed, {"mask": 1, "shapes": {s.name: list(s.shape) for s in self.segments}})

    @classmethod
    def load(cls, path: Path) -> "Mask":
        """Reads what `save` wrote. InputError if it is something else."""
        packed, facts = read_tensors(path)
        try:
            if facts["mask"] != 1:
                raise InputError(f"{path}: a mask of format {facts['mask']}, this version reads format 1")
            shapes = {name: torch.Size(shape) for name, shape in facts["shapes"].items()}
            return cls.from_tensors({n: unpack_bits(packed[n], s.numel()).view(s) for n, s in shapes.items()})
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{path}: not a mask of fastprune") from error

    def ratios_csv(self) -> str:
        """layer,weights,kept,pruned_fraction lines, readable without fastprune."""
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["layer", "weights", "kept", "pruned_fraction"])
        for (name, ratio), n in zip(
            self.layerwise_ratios().items(), segment_counts(self.keep, self.segments).tolist(), strict=True
        ):
            numel = next(s.numel for s in self.segments if s.name == name)
            rows.writerow([name, numel, n, repr(ratio)])
        return out.getvalue()


class _Masked(nn.Module):
    """What masked layers share: `mask` (bool, the weight's shape) is a buffer written in place, or None for dense."""

    mask: Tensor | None
    weight: Any  # a Parameter, annotated differently by the two kinds of layer
    held = False
    """Whether somebody else keeps pruned weights at +0, as a Trainer does: then the weight is used as it is."""

    @classmethod
    def wrap(cls, module: nn.Module) -> Self:
        """`module` itself, made a masked layer in place: same parameters, hyperparameters and hooks."""
        if type(module) is not cls.__bases__[1]:
            raise ValueError(f"only a plain {cls.__bases__[1].__name__} can be masked, not {type(module).__name__}")
        module.__class__ = cls
        module.register_buffer("mask", None)
        return module  # type: ignore[return-value]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "held"}  # nobody holds a copy

    def set_mask(self, keep: Tensor) -> None:
        """Writes the mask in place (a captured graph stays valid) and +0 into the weights that it prunes."""
        if keep.shape != self.weight.shape:
            raise ValueError(f"mask of shape {tuple(keep.shape)} for a weight of shape {tuple(self.weight.shape)}")
        if self.mask is None:
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        self.mask.copy_(keep)
        with torch.no_grad():
            self.weight.masked_fill_(~self.mask, 0.0)

    def _masked_weight(self) -> Tensor:
        """The weight to compute with, under autocast in its dtype already: one pass, not a mask and then a cast."""
        if self.mask is None or self.held:
            return self.weight
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return masked_weight(self.weight, self.mask, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.mask is None and prefix + "mask" in state_dict:
            self.mask = torch.empty_like(self.weight, dtype=torch.bool)
        missing: list[str] = args[2]
        before = len(missing)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "mask" in missing[before:]:  # a plain model's weights: the mask stays as it is
            missing.remove(prefix + "mask")


class MaskedConv2d(_Masked, nn.Conv2d):
    """A conv that computes with where(mask, weight, 0); without a mask it is nn.Conv2d to the bit.

    The gradient of a pruned weight is 0, and its value does not matter.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self._masked_weight(), self.bias)


class MaskedLinear(_Masked, nn.Linear):
    """A linear layer that computes with where(mask, weight, 0); see MaskedConv2d."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._masked_weight(), self.bias)


def attach(model: nn.Module, mask: Mask | None = None, *, linear: bool = False) -> nn.Module:
    """Gives every conv of `model` (and linear layers when asked) a mask, in place; returns the model.

    Without a `mask` it computes what it computed before, bit for bit. A second call writes the masks in place.
    ValueError if the mask's layers or shapes are not the model's, or a conv is of a kind that cannot be masked.
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
    """Of each layer that carries a mask: its weight (a Parameter) and its mask (bool, of that shape), not copied."""
    layers = (m for m in model.modules() if isinstance(m, _Masked))
    return {m.weight: m.mask for m in layers if m.mask is not None}


def share_masks(model: nn.Module, segments: tuple[Segment, ...], keep: Tensor) -> None:
    """Makes the masks of an attached model views of `keep` (bool [n], laid out as `segments`), whose owner from now on
    keeps pruned weights at +0. A layer that is not masked is left alone."""
    for s in segments:
        module = model.get_submodule(s.name.rpartition(".")[0])
        if isinstance(module, _Masked):
            module.mask, module.held = s.view(keep), True


def unshare_masks(model: nn.Module) -> None:
    """Ends what `share_masks` began: the layers mask their weights themselves again."""
    for module in model.modules():
        if isinstance(module, _Masked):
            module.held = False


def masks_of(model: nn.Module, *, linear: bool = False) -> Mask:
    """The masks that an attached model carries; a layer without one counts as dense."""
    tensors = {}
    for name, weight in prunable(model, linear):
        keep = getattr(model.get_submodule(name.rpartition(".")[0]), "mask", None)
        tensors[name] = torch.ones_like(weight, dtype=torch.bool).cpu() if keep is None else keep.cpu()
    return Mask.from_tensors(tensors)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` as its plain class has it: no masks, +0 where one prunes; fresh contiguous CPU tensors.

    Also of a model whose parameters are views of flat buffers: torch.save of such a view would write the whole buffer.
    """
    state = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, _Masked):
            prefix = f"{name}." if name else ""
            mask = state.pop(prefix + "mask", None)
            if mask is not None:
                state[prefix + "weight"].masked_fill_(~mask, 0.0)
    return state
