"""Flat parameters: every prunable weight of a model in one buffer, everything else that trains in another.

The optimiser, the masks, pruning and rewinding then are a few operations on long vectors, whatever the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastprune.kernels import Segment, masked_cast, masked_sgd_
from fastprune.pruning.masks import buffer_size, layout, prunable


class FlatParams:
    """Moves a model's parameters into flat fp32 buffers; its parameters become views of them, as do their gradients.

    weight, grad, momentum: float32 [n], mask: bool [n] (True keeps; all True but for the padding), each in storage
    order: segment after segment, conv weights as OHWI. other_params, other_grad, other_momentum: float32 [m], all other
    parameters. half: bf16 or fp16 [n] or None, what the weight is in `half_precision`, kept up to date by `sgd_step`,
    `set_mask` and `sync`.

    The views stay valid as long as nobody rebinds a parameter: `.to(dtype)`, `load_state_dict(assign=True)` and
    `zero_grad(set_to_none=True)` do. `check_aliased()` finds out. A `deepcopy` of the model is a model of its own; of
    this it is a TypeError.
    """

    def __init__(self, model: nn.Module, linear: bool = False, half_precision: torch.dtype | None = None) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                raise ValueError(f"{name} is frozen (requires_grad is False): a flat buffer is trained as a whole")
        named = prunable(model, linear)
        prunable_ids = {id(p) for _, p in named}
        rest = [(name, p) for name, p in model.named_parameters() if id(p) not in prunable_ids]
        device = next(model.parameters()).device
        self.segments = layout(named)
        self.other_segments = layout((name, p.reshape(-1)) for name, p in rest)
        self._model = model
        self.weight, self.grad, self.momentum = (_buffer(self.segments, device) for _ in range(3))
        self.other_params, self.other_grad, self.other_momentum = (
            _buffer(self.other_segments, device) for _ in range(3)
        )
        self.mask = torch.zeros(self.weight.shape, dtype=torch.bool, device=device)
        for segment, (_, p) in zip(self.segments, named, strict=True):
            self.mask[segment.span] = True
            _rebind(p, segment.view(self.weight), segment.view(self.grad))
        for segment, (_, p) in zip(self.other_segments, rest, strict=True):
            _rebind(p, segment.view(self.other_params).view(p.shape), segment.view(self.other_grad).view(p.shape))
        self.half = None if half_precision is None else torch.zeros_like(self.weight, dtype=half_precision)
        self._rewind: tuple[Tensor, Tensor] | None = None
        self._leaves = [p for _, p in named] + [p for _, p in rest]
        self._grads = [p.grad for p in self._leaves if p.grad is not None]
        self.half_views: dict[str, Tensor] = {}
        """By parameter name, what a forward pass in low precision computes with instead of the weight: leaves."""
        if self.half is not None:
            self.half_views = {s.name: s.view(self.half).requires_grad_() for s in self.segments}
            self._leaves[: len(named)] = self.half_views.values()
        self.sync()

    @property
    def total(self) -> int:
        """Number of prunable weights, padding not counted."""
        return sum(s.numel for s in self.segments)

    def check_aliased(self) -> None:
        """RuntimeError unless every parameter and gradient still is its view of the buffers."""
        parameters = dict(self._model.named_parameters())
        places = [(s, self.weight, self.grad) for s in self.segments]
        places += [(s, self.other_params, self.other_grad) for s in self.other_segments]
        for segment, weight, grad in places:
            p = parameters[segment.name]
            if p.data_ptr() != weight.data_ptr() + weight.element_size() * segment.offset or p.dtype != weight.dtype:
                raise RuntimeError(f"{segment.name} no longer lies in the flat buffer: something rebound the parameter")
            if p.grad is None or p.grad.data_ptr() != grad.data_ptr() + grad.element_size() * segment.offset:
                raise RuntimeError(
                    f"{segment.name}.grad no longer lies in the flat buffer: was zero_grad(set_to_none=True) called?"
                )

    def backward(self, loss: Tensor) -> None:
        """Writes the gradients of `loss` into the flat buffers, whatever was there; zero where it does not depend."""
        grads = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        if any(grad is None for grad in grads):
            self.zero_grad()
        # In two calls, for one is a single launch only where all gradients have one dtype.
        first = len(self.segments)
        for part in (slice(first), slice(first, None)):
            there = [(into, g) for into, g in zip(self._grads[part], grads[part], strict=True) if g is not None]
            if there:
                torch._foreach_copy_([into for into, _ in there], [g for _, g in there])

    def zero_grad(self) -> None:
        """Sets all gradients to zero, in place."""
        self.grad.zero_()
        self.other_grad.zero_()

    def set_mask(self, mask: Tensor) -> None:
        """Writes `mask` (bool [n]) in place, and +0 into what it prunes, momentum included."""
        self.mask.copy_(mask)
        masked_cast(self.momentum, self.mask, self.momentum)
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """After something else than `sgd_step` wrote weights: +0 where pruned, and the low-precision copy anew."""
        masked_cast(self.weight, self.mask, self.weight)
        if self.half is not None:
            self.half.copy_(self.weight)

    @torch.no_grad()
    def save_rewind_point(self) -> None:
        """Keeps the weights as they are now for `rewind`, in copies of the same layout (made at the first call)."""
        if self._rewind is None:
            self._rewind = torch.empty_like(self.weight), torch.empty_like(self.other_params)
        for copy, now in zip(self._rewind, (self.weight, self.other_params), strict=True):
            copy.copy_(now)

    @torch.no_grad()
    def rewind(self) -> None:
        """Weights become those of the last `save_rewind_point`, +0 where the mask prunes now, and all momentum zero."""
        if self._rewind is None:
            raise RuntimeError("nothing to rewind to: save_rewind_point() was never called")
        weight, rest = self._rewind
        masked_cast(weight, self.mask, self.weight)
        if self.half is not None:
            self.half.copy_(self.weight)
        self.other_params.copy_(rest)
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
        """One masked SGD step on all parameters; pruned weights and their momentum are exactly +0 after it."""
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
        """A flat buffer as fresh contiguous CPU tensors of logical shape, by parameter name: what is saved."""
        return {s.name: s.view(buffer).to("cpu", copy=True).contiguous() for s in self.segments}

    def __reduce__(self) -> Any:
        raise TypeError("views of flat buffers cannot be copied or pickled: copy the model, or save its state")


def _buffer(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    return torch.zeros(buffer_size(segments), device=device)


def _rebind(p: Tensor, weight: Tensor, grad: Tensor) -> None:
    weight.copy_(p.detach())
    p.data = weight
    p.grad = grad
