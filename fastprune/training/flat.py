"""Flat parameters: all prunable weights of a model in one buffer, all its other parameters in another.

The optimiser step, masking, pruning and rewinding are then a few operations on long vectors, for any model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.kernels import Segment, masked_cast, masked_sgd_
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.masks import buffer_size, layout


class FlatParams:
    """Moves the parameters of `model` into flat float32 buffers, of which they and their gradients become views.

    weight, grad, momentum: float32 [n], all prunable weights in storage order: segment after segment, convs as OHWI.
    mask: bool [n], True keeps; at first all True but the padding. other_params, other_grad, other_momentum: float32
    [m], all other parameters. half: bf16 or fp16 [n], the weight in `half_precision`, or None; `sgd_step`, `set_mask`,
    `sync` and `rewind` keep it up to date.

    Rebinding a parameter breaks the views: `.to(dtype)`, `load_state_dict(assign=True)` and
    `zero_grad(set_to_none=True)` do so, and `check_aliased()` detects it. `copy.deepcopy` of the model gives an
    independent model; of a FlatParams it is a TypeError. Frozen parameters stay where they are. names: of the prunable
    parameters, by default those of the convs. ValueError for trained parameters that are not float32.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str] | None = None, half_precision: torch.dtype | None = None
    ) -> None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {parameter.dtype}, expected float32: call model.float(), and use precision="
                )
        wanted = [name for name, _ in conv_weights(model)] if names is None else names
        named = [(name, parameters.pop(name)) for name in wanted]
        other = list(parameters.items())
        device = next(model.parameters()).device
        self.segments = layout(named)
        self.other_segments = layout((name, p.reshape(-1)) for name, p in other)
        self._model = model
        self.weight, self.grad, self.momentum = (_buffer(self.segments, device) for _ in range(3))
        self.other_params, self.other_grad, self.other_momentum = (
            _buffer(self.other_segments, device) for _ in range(3)
        )
        self.mask = torch.zeros(self.weight.shape, dtype=torch.bool, device=device)
        for segment, (_, p) in zip(self.segments, named, strict=True):
            self.mask[segment.span] = True
            _rebind(p, segment.view(self.weight), segment.view(self.grad))
        for segment, (_, p) in zip(self.other_segments, other, strict=True):
            _rebind(p, segment.view(self.other_params).view(p.shape), segment.view(self.other_grad).view(p.shape))
        self.half = None if half_precision is None else torch.zeros_like(self.weight, dtype=half_precision)
        self._rewind: tuple[Tensor, Tensor] | None = None
        self._leaves: list[Tensor] = [p for _, p in [*named, *other]]
        self._grads = [p.grad for p in self._leaves if p.grad is not None]
        self.half_views: dict[str, Tensor] = {}
        """By parameter name, leaf views of `half` that a forward in low precision uses in place of the weights."""
        if self.half is not None:
            # Leaves, so that gradients arrive in low precision: autograd need not go through a cast of every weight.
            # Recurrent layers keep references to their parameters, which a replacement by name does not reach.
            fixed = {id(p) for m in model.modules() if isinstance(m, nn.RNNBase) for p in m.parameters()}
            views = {s.name: s.view(self.half).requires_grad_() for s in self.segments}
            self.half_views = {name: views[name] for name, p in named if id(p) not in fixed}
            self._leaves[: len(named)] = [self.half_views.get(name, p) for name, p in named]
        self.sync()

    @property
    def total(self) -> int:
        """Number of prunable weights; padding is not counted."""
        return sum(s.numel for s in self.segments)

    def check_aliased(self) -> None:
        """RuntimeError unless every parameter and every gradient is still a view of its part of the buffers."""
        parameters = dict(self._model.named_parameters())
        places = [(s, self.weight, self.grad) for s in self.segments]
        places += [(s, self.other_params, self.other_grad) for s in self.other_segments]
        for segment, weight, grad in places:
            # The model's parameters of now, not those of __init__: load_state_dict(assign=True) makes new objects.
            p = parameters[segment.name]
            if p.data_ptr() != weight.data_ptr() + weight.element_size() * segment.offset or p.dtype != weight.dtype:
                raise RuntimeError(
                    f"{segment.name} is no view of the flat buffer any more: write it in place, rebind nothing"
                )
            if p.grad is None or p.grad.data_ptr() != grad.data_ptr() + grad.element_size() * segment.offset:
                raise RuntimeError(
                    f"{segment.name}.grad is no view of the flat buffer any more: call zero_grad(set_to_none=False)"
                )

    def backward(self, loss: Tensor) -> None:
        """Overwrites the flat gradients by those of `loss`: zero for parameters that it does not depend on."""
        # Not loss.backward(): it accumulates, so that the buffers would have to be zeroed first, one more pass.
        grads = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        if any(grad is None for grad in grads):
            self.zero_grad()
        # Two calls, because _foreach_copy_ is a single launch only if all tensors share a dtype, and the gradients of
        # convs may be bf16 or fp16.
        first = len(self.segments)
        for part in (slice(first), slice(first, None)):
            there = [(into, g) for into, g in zip(self._grads[part], grads[part], strict=True) if g is not None]
            if there:
                torch._foreach_copy_([into for into, _ in there], [g for _, g in there])

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place; they stay views of the buffers."""
        self.grad.zero_()
        self.other_grad.zero_()

    def set_mask(self, mask: Tensor) -> None:
        """Writes `mask` (bool [n]) into the mask in place, and +0 into pruned weights and their momentum."""
        self.mask.copy_(mask)
        self.mask_changed()

    @torch.no_grad()
    def mask_changed(self) -> None:
        """Writes +0 into pruned weights and momentum, and renews `half`, after other code has written the mask."""
        # Momentum, too: a weight that a later mask keeps again must not move by a momentum from before it was pruned.
        masked_cast(self.momentum, self.mask, self.momentum)
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Sets pruned weights to +0 and renews `half`; to be called after other code than `sgd_step` wrote weights."""
        self._set_weight(self.weight)

    def _set_weight(self, weight: Tensor) -> None:
        masked_cast(weight, self.mask, self.weight)
        if self.half is not None:
            self.half.copy_(self.weight)

    @torch.no_grad()
    def save_rewind_point(self) -> None:
        """Copies the present weights and other parameters for `rewind`; a later call overwrites the copy."""
        # Into the memory of the first call, so that later rounds allocate nothing.
        if self._rewind is None:
            self._rewind = torch.empty_like(self.weight), torch.empty_like(self.other_params)
        for copy, now in zip(self._rewind, (self.weight, self.other_params), strict=True):
            copy.copy_(now)

    @torch.no_grad()
    def rewind(self) -> None:
        """Restores the weights of the last `save_rewind_point` under the present mask, in place; sets momentum to zero.

        RuntimeError without a rewind point.
        """
        if self._rewind is None:
            raise RuntimeError("no rewind point: call save_rewind_point() first")
        weight, other = self._rewind
        self._set_weight(weight)
        self.other_params.copy_(other)
        self.momentum.zero_()
        self.other_momentum.zero_()

    def sgd_step(
        self,
        *,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One masked SGD step on all parameters, in place, as kernels.masked_sgd_ defines it.

        Mutates weights, momentum and `half`; pruned weights and their momentum are exactly +0 afterwards.
        """
        hyper: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
        }
        masked_sgd_(self.weight, self.grad, self.momentum, self.mask, self.half, **hyper)
        masked_sgd_(self.other_params, self.other_grad, self.other_momentum, None, **hyper)

    def packed(self, buffer: Tensor) -> dict[str, Tensor]:
        """The segments of a flat buffer [n] by parameter name: fresh contiguous CPU tensors of logical shape."""
        return {s.name: s.view(buffer).to("cpu", copy=True).contiguous() for s in self.segments}

    def __reduce__(self) -> Any:
        # The parameters of a copied model would be no views of the copied buffers, and no error would say so.
        raise TypeError("views of flat buffers cannot be copied or pickled: copy the model, or save its state")


class FlatSGD(torch.optim.Optimizer):
    """torch.optim.SGD's update on a FlatParams, masked, in one pass over each of its two weight buffers.

    step() mutates weights and momentum; pruned weights and their momentum are exactly +0 afterwards. zero_grad() writes
    zeros in place and ignores `set_to_none`, because gradients are views of one buffer.
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
        # One parameter a buffer, so that a GradScaler looks for inf in two tensors and not in one a layer.
        views = [nn.Parameter(flat.weight), nn.Parameter(flat.other_params)]
        for view, grad in zip(views, (flat.grad, flat.other_grad), strict=True):
            view.grad = grad
        self._step_supports_amp_scaling = True  # as in MaskedSGD
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
            **scaling(self),
        )


def scaling(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """grad_scale and found_inf for masked_sgd_: float32 of one element each, or None without a GradScaler."""
    # A GradScaler sets both as attributes for the duration of step(). After its unscale_() grad_scale is None: the
    # gradients are divided already, which a scale of 1 says.
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and grad_scale is None:
        grad_scale = torch.ones_like(found_inf)
    return {"grad_scale": grad_scale, "found_inf": found_inf}


def _buffer(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    return torch.zeros(buffer_size(segments), device=device)


def _rebind(p: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Moves parameter `p` to the view `weight`, with its values, and its gradient to the view `grad`."""
    weight.copy_(p.detach())
    p.data = weight  # not a new Parameter: a reference to this one would go on with the old memory
    p.grad = grad
