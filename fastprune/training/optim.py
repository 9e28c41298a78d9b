"""MaskedSGD: torch's SGD for a Pruner's weights in a user's own loop, masked in the optimiser's own pass."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastprune.kernels import masked_cast, masked_sgd_
from fastprune.kernels.masked_sgd import sgd_by_torch
from fastprune.pruning.pruner import Pruner
from fastprune.training.flat import scaling

_FULL = (torch.float32, torch.float64)


class MaskedSGD(torch.optim.Optimizer):
    """torch.optim.SGD for a model with masks: pruned weights and their momentum are exactly +0 after each step.

    params: parameters or parameter groups of floats, bf16 and fp16 included, which round as torch's. pruner: its masks
    are read at each step and may change at any time; the optimiser is attached to it. State: SGD's own, a
    "momentum_buffer" for each parameter. `step` mutates weights and momentum, not the gradients. float32 takes one
    launch a parameter on a GPU; FlatOptimizer takes two in all. ValueError for hyperparameters that torch.optim.SGD
    refuses, and for a parameter with gaps in memory.
    """

    keeps_pruned = True  # read by Pruner.attach: no pass of its own is needed after a step

    def __init__(
        self,
        params: Iterable[Any],
        pruner: Pruner,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        if lr < 0 or momentum < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, momentum {momentum} and weight_decay {weight_decay} may not be negative")
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True requires momentum > 0")
        self._pruner = pruner
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        self._prepare()
        pruner.attach(self)

    def _prepare(self) -> None:
        self._step_supports_amp_scaling = True  # a GradScaler then does not wait: step() reads found_inf
        # A compiler that traces step() must not trace into the kernels, which are no torch operations.
        self._untraced_update = torch.compiler.disable(self._update)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._untraced_update()
        return loss

    def _update(self) -> None:
        named = self._pruner.masks
        masks = {weight: named[name] for name, weight in self._pruner.weights().items()}
        scale = scaling(self)
        for group in self.param_groups:
            hyper = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                # torch's SGD sets the buffer to the first gradient; zeros give the same first step.
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                # The step walks memory: element i of gradient and mask must belong to element i of the weight.
                grad, mask = p.grad, masks.get(p)
                if grad.stride() != p.stride():
                    grad = torch.empty_like(p).copy_(grad)
                if mask is not None and mask.stride() != p.stride():
                    mask = torch.empty_like(p, dtype=torch.bool).copy_(mask)
                weight, grad, buffer = (_dense(t) for t in (p, grad, state["momentum_buffer"]))
                step = masked_sgd_ if p.dtype in _FULL else _half_step
                step(weight, grad, buffer, None if mask is None else _dense(mask), **hyper, **scale)
                torch.autograd.graph.increment_version(p)  # the step writes memory, which autograd does not see

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pruner": self._pruner}


def _half_step(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    mask: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """masked_sgd_ in bf16 or fp16, for which there is no kernel."""
    if found_inf is not None and grad_scale is not None:
        if found_inf.item():
            return
        grad = grad * grad_scale.double().reciprocal().to(grad.dtype)
    sgd_by_torch(weight, grad, buffer, float(lr), momentum, weight_decay, nesterov)
    if mask is not None:
        masked_cast(weight, mask, weight)
        masked_cast(buffer, mask, buffer)


def _dense(tensor: Tensor) -> Tensor:
    """A one-dimensional view of all elements in memory order. ValueError if the tensor has gaps in memory."""
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps in memory: clone() it"
        )
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
