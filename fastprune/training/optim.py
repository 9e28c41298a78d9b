"""Optimisers under which pruned weights stay +0: for a user's own loop, for any torch optimiser, for flat parameters.

model = fastprune.attach(model, mask)
optimizer = MaskedSGD(model.parameters(), model, lr=0.1, momentum=0.9)  # or
keep_pruned(optimizer := torch.optim.AdamW(model.parameters()), model)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastprune.kernels import masked_sgd_
from fastprune.pruning.masks import weight_masks
from fastprune.training.flat import FlatParams


class MaskedSGD(torch.optim.Optimizer):
    """torch.optim.SGD for a model with masks: pruned weights and their momentum are exactly +0 after each step.

    params: parameters or groups of them, float32 (float64 on a CPU). model: the attached model whose masks hold; they
    are looked up at each step, so they may change at any time. State is SGD's own: a "momentum_buffer" a parameter.
    Gradients are left as they are. One launch a parameter on a GPU; a Trainer needs two in all.
    """

    def __init__(
        self,
        params: Iterable[Any],
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if lr < 0 or momentum < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, momentum {momentum} and weight_decay {weight_decay} may not be negative")
        if nesterov and momentum == 0:
            raise ValueError("Nesterov momentum needs momentum > 0")
        self._model = model
        self._step_supports_amp_scaling = True  # so that a GradScaler does not wait for the device
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masks, scaling = weight_masks(self._model), _scaling(self)
        for group in self.param_groups:
            hyper = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                grad = torch.empty_like(p).copy_(p.grad)  # the step works in it
                mask = masks.get(p)
                if mask is not None and mask.stride() != p.stride():
                    mask = torch.empty_like(p, dtype=torch.bool).copy_(mask)
                weight, grad, buffer = (_dense(t) for t in (p, grad, state["momentum_buffer"]))
                masked_sgd_(weight, grad, buffer, None if mask is None else _dense(mask), **hyper, **scaling)
        return loss


def keep_pruned(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """From now on, after each step of `optimizer`, what the masks of `model` prune is +0: weights, and whatever the
    optimiser remembers of them (momentum, averages). Returns the handle that ends it.
    """

    @torch.no_grad()
    def zero(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight, mask in weight_masks(model).items():
            pruned = ~mask
            weight.masked_fill_(pruned, 0.0)
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned, 0.0)

    return optimizer.register_step_post_hook(zero)


class FlatSGD(torch.optim.Optimizer):
    """torch.optim.SGD's update on a FlatParams, masked, in one pass over each of its two buffers.

    step() mutates weight and momentum; pruned weights and their momentum are exactly +0 after it. zero_grad() fills the
    gradients with zeros in place, whatever `set_to_none` says: they are views of one buffer.
    """

    def __init__(
        self,
        flat: FlatParams,
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.flat = flat
        views = [nn.Parameter(flat.weight), nn.Parameter(flat.other_params)]
        for view, grad in zip(views, (flat.grad, flat.other_grad), strict=True):
            view.grad = grad
        self._step_supports_amp_scaling = True  # so that a GradScaler does not wait for the device
        super().__init__(views, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.flat.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("FlatSGD takes no closure")
        group = self.param_groups[0]
        self.flat.sgd_step(
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            **_scaling(self),
        )


def _scaling(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a GradScaler sets for as long as a step takes; no scale if the gradients were unscaled before."""
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and grad_scale is None:
        grad_scale = torch.ones_like(found_inf)
    return {"grad_scale": grad_scale, "found_inf": found_inf}


def _dense(tensor: Tensor) -> Tensor:
    """All elements as they lie in memory, [n]. ValueError if there are gaps."""
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps in memory")
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
