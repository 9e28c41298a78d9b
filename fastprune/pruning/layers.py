"""Masked layers: a conv and a linear layer whose forward masks the weight itself.

For a model that is to compute with masks and not only to hold zeros; a Pruner keeps pruned weights at +0 without them.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from fastprune.kernels import masked_weight


class _Masked(nn.Module):
    mask: Tensor
    if TYPE_CHECKING:  # not at run time: TorchScript reads annotations, and knows no Any
        weight: Any  # a Parameter, annotated differently by the two kinds of layer

    @classmethod
    def of(cls, layer: nn.Module) -> Self:
        """A masked layer with the parameters of a plain `layer` and a mask of ones. ValueError for any other layer."""
        plain = cls.__bases__[1]
        # A subclass may have a forward of its own, which the masked layer would not run.
        if type(layer) is not plain:
            raise ValueError(f"{cls.__name__} stands for a plain {plain.__name__}, not for a {type(layer).__name__}")
        made = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        made._parameters, made._buffers = dict(layer._parameters), dict(layer._buffers)
        made.register_buffer("mask", torch.ones_like(layer.weight, dtype=torch.bool))  # type: ignore[arg-type]
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.ao.quantization finds layers by their exact class: it would leave this one as it is, in silence.
        if name == "qconfig" and value is not None:
            raise ValueError(
                f"a {type(self).__name__} cannot be quantised: Pruner(model).finalize() makes masked layers plain ones"
            )
        super().__setattr__(name, value)


class MaskedConv2d(_Masked, nn.Conv2d):
    """A conv that computes with where(mask, weight, +0); with a mask of ones it equals nn.Conv2d bit for bit.

    Takes nn.Conv2d's arguments. mask: bool buffer of the weight's shape, True keeps; write it in place. The value of a
    pruned weight does not enter the result, and its gradient is 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, _computed(self.weight, self.mask), self.bias)


class MaskedLinear(_Masked, nn.Linear):
    """A linear layer that computes with where(mask, weight, +0); see MaskedConv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, _computed(self.weight, self.mask), self.bias)


def _computed(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight, under autocast in autocast's dtype."""
    if torch.jit.is_scripting():
        return torch.where(mask, weight, torch.zeros_like(weight))
    return _fused(weight, mask)


# A single call in a traced graph: tracing into it would need to know whether autocast is on.
torch.fx.wrap("_computed")


@torch.jit.unused
def _fused(weight: Tensor, mask: Tensor) -> Tensor:
    # Masking and casting in one pass; autocast would read and write the weights a second time.
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return masked_weight(weight, mask, dtype)


def masked_layers(model: nn.Module) -> dict[str, "MaskedConv2d | MaskedLinear"]:
    """By the name of its weight, each masked layer of the model."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, (MaskedConv2d, MaskedLinear)))
    return {f"{name}.weight" if name else "weight": m for name, m in found}


def mask_layers(model: nn.Module, *, linear: bool = True) -> nn.Module:
    """Replaces plain nn.Conv2d, and with `linear` nn.Linear, by masked layers of the same parameters, masks of ones.

    In place; returns the model, or the masked layer if `model` itself is one of them.
    """
    kinds: dict[type, Any] = {nn.Conv2d: MaskedConv2d} | ({nn.Linear: MaskedLinear} if linear else {})
    if type(model) in kinds:
        return kinds[type(model)].of(model)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) in kinds:
                setattr(module, name, kinds[type(child)].of(child))
    return model


def plain_layers(model: nn.Module) -> None:
    """Turns masked layers into plain ones, in place; pruned weights become +0."""
    for layer in masked_layers(model).values():
        with torch.no_grad():
            layer.weight.masked_fill_(~layer.mask, 0.0)
        del layer._buffers["mask"]
        layer.__class__ = type(layer).__bases__[1]  # the object stays: an optimiser or a parent may hold it
