"""SGD over flat parameters, as a torch optimiser, so that GradScaler and hooks work with it."""

from typing import Any

import torch
from torch import Tensor, nn

from fastprune.flat import FlatParams


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
        views = [nn.Parameter(flat.weight), nn.Parameter(flat.rest_weight)]
        for view, grad in zip(views, (flat.grad, flat.rest_grad), strict=True):
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
        # A GradScaler sets these for as long as the step takes, no scale if the gradients were unscaled before.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and grad_scale is None:
            grad_scale = torch.ones_like(found_inf)
        self.flat.sgd_step(
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
