"""Optimisers that keep pruned weights at +0 in a user's own loop: MaskedSGD, and keep_pruned for any other.

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
from fastprune.training.flat import scaling


class MaskedSGD(torch.optim.Optimizer):
    """torch.optim.SGD for a model with masks: pruned weights and their momentum are exactly +0 after each step.

    params: parameters or parameter groups, float32 (float64 on a CPU). model: the attached model, whose masks are read
    at each step and may change at any time. State: SGD's own, a "momentum_buffer" for each parameter. `step` mutates
    weights and momentum, not the gradients. On a GPU it takes one launch a parameter; FlatSGD takes two in all.
    ValueError for hyperparameters that torch.optim.SGD refuses, and for a parameter with gaps in memory.
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
            raise ValueError("nesterov=True requires momentum > 0")
        self._model = model
        self._step_supports_amp_scaling = True  # a GradScaler then does not wait: step() reads found_inf
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Looked up here and not kept: attach() or a checkpoint may have given a layer a new mask tensor.
        masks, scale = weight_masks(self._model), scaling(self)
        for group in self.param_groups:
            hyper = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                # torch's SGD sets the buffer to the first gradient; zeros give the same first step.
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
                grad = torch.empty_like(p).copy_(p.grad)  # a copy: the step uses the gradient as scratch memory
                mask = masks.get(p)
                # The step walks memory, so element i of the mask must belong to element i of the weight.
                if mask is not None and mask.stride() != p.stride():
                    mask = torch.empty_like(p, dtype=torch.bool).copy_(mask)
                weight, grad, buffer = (_dense(t) for t in (p, grad, state["momentum_buffer"]))
                masked_sgd_(weight, grad, buffer, None if mask is None else _dense(mask), **hyper, **scale)
        return loss


def keep_pruned(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Registers a hook on `optimizer` that keeps what the masks of `model` prune at +0 after each step.

    The hook mutates weights and every optimiser state of a weight's shape (momentum, moving averages). Returns its
    handle; `handle.remove()` ends it.
    """

    # State, too: momentum from before the pruning would move a weight that a later mask keeps again.
    @torch.no_grad()
    def zero(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for weight, mask in weight_masks(model).items():
            pruned = ~mask
            weight.masked_fill_(pruned, 0.0)
            for value in optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(pruned, 0.0)

    return optimizer.register_step_post_hook(zero)


def _dense(tensor: Tensor) -> Tensor:
    """A one-dimensional view of all elements in memory order. ValueError if the tensor has gaps in memory."""
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps in memory: clone() it"
        )
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
