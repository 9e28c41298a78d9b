"""Flat parameters: all prunable weights of a model in one buffer, all its other parameters in another.

The optimiser step, masking, pruning and rewinding are then a few operations on long vectors, for any model.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.rmsprop import rmsprop

from fastprune.kernels import Segment, masked_cast, masked_sgd_, masked_sgd_scattered_
from fastprune.kernels.masked_sgd import SgdTiles, gather, lies_as, sgd_tiles
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.masks import buffer_size, layout
from fastprune.specs import OptimizerSpec

Decays = tuple[tuple[int, int, float], ...]
"""Runs of the other parameters, [start, stop) in their buffer, and the weight decay of each."""


class FlatParams:
    """Moves the parameters of `model` into flat float32 buffers, of which they and their gradients become views.

    weight, grad, momentum: float32 [n], all prunable weights in storage order: segment after segment, convs as OHWI.
    mask: bool [n], True keeps; at first all True but the padding. other_params, other_grad, other_momentum: float32
    [m], all other parameters. half: bf16 or fp16 [n], the weight in `half_precision`, or None; steps, `set_mask`,
    `sync` and `rewind` keep it up to date. square, other_square: the second moments of AdamW and RMSprop, None until
    `begin` asks for one of them; their first moment, or momentum, is where SGD's is. steps: of AdamW and RMSprop,
    float32 []. averages: buffers [n] of other code that a change of the mask sets to +0, too.

    A step may read the gradients of prunable weights where autograd left them (`backward` with scattered): it does not
    write `grad`. What is to read `grad`, and the parameters' `.grad`, calls `gather_grad` before such a step;
    `hide_grad` makes it NaN, so that gradients of before are not taken for those of now.

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
        self.square: Tensor | None = None
        self.other_square: Tensor | None = None
        self.steps = torch.zeros((), device=device)
        self.averages: list[Tensor] = []
        self._holds: str | None = None  # the optimiser whose state the buffers hold; None: the next one's
        self._rewind: tuple[Tensor, Tensor] | None = None
        self._leaves: list[Tensor] = [p for _, p in [*named, *other]]
        self._grads = [p.grad for p in self._leaves if p.grad is not None]
        self._scattered: list[Tensor] | None = None  # gradients that lie where autograd left them
        self._tiles: list[SgdTiles] = []  # kept, because captured steps read them
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

    def backward(self, output: Tensor, gradient: Tensor | None = None, *, scattered: bool = False) -> None:
        """Overwrites the flat gradients by those of a loss: zero for parameters that it does not depend on.

        output: the loss, []; with `gradient` what the loss depends on, and its gradient. scattered: those of prunable
        weights stay where autograd left them until `sgd_step` or `gather_grad`, and `grad` is not written. Not for a
        GradScaler, which looks for inf in `grad`, nor where ranks average it.
        """
        # Not loss.backward(): it accumulates, so that the buffers would have to be zeroed first, one more pass.
        grads = torch.autograd.grad(output, self._leaves, gradient, allow_unused=True)
        first = len(self.segments)
        self._scattered = self._in_place(grads[:first]) if scattered else None
        # Two calls, because _foreach_copy_ is a single launch only if all tensors share a dtype, and the gradients of
        # convs may be bf16 or fp16.
        parts = [(self.grad, slice(first)), (self.other_grad, slice(first, None))]
        for flat, part in parts if self._scattered is None else parts[1:]:
            there = [(into, g) for into, g in zip(self._grads[part], grads[part], strict=True) if g is not None]
            if len(there) < len(self._grads[part]):
                flat.zero_()
            if there:
                torch._foreach_copy_([into for into, _ in there], [g for _, g in there])

    def _in_place(self, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The gradients of prunable weights for masked_sgd_scattered_; None if their dtypes differ, as with recurrent
        layers in low precision."""
        dtypes = {grad.dtype for grad in grads if grad is not None} or {torch.float32}
        if len(dtypes) > 1:
            return None
        if not self._tiles:
            self._tiles = sgd_tiles(self.segments, self.weight)
        (dtype,) = dtypes
        found = []
        for place, grad in zip(self._grads, grads, strict=False):
            if grad is None or not lies_as(grad, place):
                copy = torch.zeros_like(place, dtype=dtype)
                grad = copy if grad is None else copy.copy_(grad)
            found.append(grad)
        return found

    def gather_grad(self) -> None:
        """Copies gradients that lie where autograd left them into `grad`. Without effect where there are none."""
        if self._scattered is not None:
            gather(self._scattered, self.segments, self.grad)
            self._scattered = None

    def hide_grad(self) -> None:
        """Sets `grad` to NaN, but for the padding, in place."""
        torch._foreach_mul_([s.view(self.grad) for s in self.segments], math.nan)

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
        for buffer in (self.momentum, self.square, *self.averages):
            if buffer is not None:
                masked_cast(buffer, self.mask, buffer)
        self.sync()

    def begin(self, name: str) -> None:
        """Makes room for the state of optimiser `name`, one of OPTIMIZERS; another one's state becomes zero."""
        if self._holds not in (None, name):
            self.reset_state()
        self._holds = name
        if name != "sgd" and self.square is None:
            self.square, self.other_square = torch.zeros_like(self.weight), torch.zeros_like(self.other_params)

    def let_next_begin(self) -> None:
        """Says that the state was written by other code, for whichever optimiser begins next."""
        self._holds = None

    def reset_state(self) -> None:
        """Sets the optimiser's state to zero, in place."""
        self._holds = None
        for buffer in (self.momentum, self.other_momentum, self.square, self.other_square, self.steps):
            if buffer is not None:
                buffer.zero_()

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
        self.reset_state()

    def sgd_step(
        self,
        *,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        decays: Decays | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One masked SGD step on all parameters, in place, as kernels.masked_sgd_ defines it.

        decays: weight decays of the other parameters, None for that of the weights. Mutates weights, momentum and
        `half`; pruned weights and their momentum are exactly +0 afterwards.
        """
        hyper: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "grad_scale": grad_scale,
            "found_inf": found_inf,
        }
        if self._scattered is None:
            masked_sgd_(self.weight, self.grad, self.momentum, self.mask, self.half, **hyper)
        else:
            grads, self._scattered = self._scattered, None
            masked_sgd_scattered_(self.weight, grads, self.momentum, self.mask, self._tiles, self.half, **hyper)
        self.other_sgd_step(decays, **hyper)

    def other_sgd_step(self, decays: Decays | None, **hyper: Any) -> None:
        """The part of `sgd_step` for the other parameters."""
        for start, stop, decay in decays or ((0, len(self.other_params), hyper["weight_decay"]),):
            run = slice(start, stop)
            buffers = self.other_params[run], self.other_grad[run], self.other_momentum[run]
            masked_sgd_(*buffers, None, **(hyper | {"weight_decay": decay}))

    def mask_grad(self) -> None:
        """Sets the gradients of pruned weights to +0, so that no optimiser moves what is +0 and no norm counts them."""
        masked_cast(self.grad, self.mask, self.grad)

    def clip(self, gradients: Sequence[Tensor], most: float) -> None:
        """Scales the gradients, in place, so that the norm of all together is at most `most`; waits for no device."""
        # By parts: on a CPU torch adds up in float32, which for 25 million elements errs by 0.1 %. The rest as
        # nn.utils.clip_grad_norm_, which takes no gradients without their parameters.
        norm = nn.utils.get_total_norm([part for gradient in gradients for part in gradient.split(1 << 16)])
        torch._foreach_mul_(list(gradients), (most / (norm + 1e-6)).clamp(max=1.0))

    def elementwise_step(
        self,
        name: str,
        *,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        decays: Decays,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step of torch.optim's AdamW or RMSprop on all parameters, in place, after `begin(name)`.

        Gradients must be unscaled and, where pruned, +0: then pruned weights and their state stay exactly +0. Nothing
        changes if found_inf, float32 [], is not 0. Mutates weights, momentum, square, steps and `half`.
        """
        assert self.square is not None, "begin() comes first"
        assert self.other_square is not None
        runs = [slice(start, stop) for start, stop, _ in decays]
        # Lists of one tensor each: the weights, and the runs of other parameters, by their weight decay.
        columns = [
            [whole, *(rest[run] for run in runs)]
            for whole, rest in (
                (self.weight, self.other_params),
                (self.grad, self.other_grad),
                (self.momentum, self.other_momentum),
                (self.square, self.other_square),
            )
        ]
        on_gpu = self.weight.is_cuda
        if found_inf is not None and not on_gpu:
            if found_inf.item():
                return
            found_inf = None
        before = None
        if found_inf is not None and name == "rmsprop":  # torch's has no found_inf: it is undone
            before = [t.clone() for column in (columns[0], *columns[2:]) for t in column]
        steps = self.steps
        for row, decay in zip(zip(*columns, strict=True), (weight_decay, *(d for _, _, d in decays)), strict=True):
            steps = self.steps.clone()  # each call counts
            p, grad, first, second = ([t] for t in row)
            if name == "adamw":
                adamw(
                    p, grad, first, second, [], [steps], foreach=False, capturable=on_gpu, fused=on_gpu,
                    found_inf=found_inf, amsgrad=False, beta1=0.9, beta2=0.999,
                    lr=lr.float() if on_gpu and isinstance(lr, Tensor) else float(lr),
                    weight_decay=decay, eps=1e-8, maximize=False,
                )  # fmt: skip
            else:
                rmsprop(
                    p, grad, second, [], first, [steps], foreach=on_gpu, capturable=on_gpu,
                    lr=lr if on_gpu else float(lr), alpha=0.9, eps=0.0316, weight_decay=decay, momentum=momentum,
                    centered=False,
                )  # fmt: skip
        if before is not None and found_inf is not None:
            after = [t for column in (columns[0], *columns[2:]) for t in column]
            for now, old in zip([*after, steps], [*before, self.steps], strict=True):
                torch.where(found_inf.bool(), old, now, out=now)
        self.steps.copy_(steps)
        if self.half is not None:
            self.half.copy_(self.weight)

    def decays(self, model: nn.Module, optimizer: OptimizerSpec) -> Decays:
        """The weight decays of the other parameters, as runs that cover their buffer."""
        named = {name: decay for decay, names in decay_groups(model, optimizer) for name in names}
        assert all(named[s.name] == optimizer.weight_decay for s in self.segments), "no bias or norm is covered"
        runs: list[tuple[int, int, float]] = []
        for s in self.other_segments:
            start = s.offset
            if runs and runs[-1][2] == named[s.name]:
                start = runs.pop()[0]
            elif runs:
                runs[-1] = (runs[-1][0], start, runs[-1][2])
            runs.append((start, len(self.other_params), named[s.name]))
        return tuple(runs)

    def packed(self, buffer: Tensor) -> dict[str, Tensor]:
        """The segments of a flat buffer [n] by parameter name: fresh contiguous CPU tensors of logical shape."""
        return {s.name: s.view(buffer).to("cpu", copy=True).contiguous() for s in self.segments}

    def __reduce__(self) -> Any:
        # The parameters of a copied model would be no views of the copied buffers, and no error would say so.
        raise TypeError("views of flat buffers cannot be copied or pickled: copy the model, or save its state")


class FlatOptimizer(torch.optim.Optimizer):
    """torch.optim's SGD, AdamW or RMSprop on a FlatParams, masked: each one pass over each of its two weight buffers.

    name: one of OPTIMIZERS; see OptimizerSpec. decays: of the other parameters, None for weight_decay. clip_grad_norm:
    the largest norm of the gradient of all that is kept, or None. step() mutates weights and state, with AdamW,
    RMSprop or clipping the gradients, too; pruned weights and their state are exactly +0 afterwards. zero_grad() writes
    zeros in place and ignores `set_to_none`, because gradients are views of one buffer.
    """

    def __init__(
        self,
        flat: FlatParams,
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        name: str = "sgd",
        decays: Decays | None = None,
        clip_grad_norm: float | None = None,
    ) -> None:
        self.flat = flat
        # One parameter a buffer, so that a GradScaler looks for inf in two tensors and not in one a layer.
        views = [nn.Parameter(flat.weight), nn.Parameter(flat.other_params)]
        for view, grad in zip(views, (flat.grad, flat.other_grad), strict=True):
            view.grad = grad
        self._step_supports_amp_scaling = True  # as in MaskedSGD
        flat.begin(name)
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "name": name}
        super().__init__(views, hyper | {"decays": decays, "clip_grad_norm": clip_grad_norm})

    @property
    def needs_unscaled(self) -> bool:
        """Whether a GradScaler must unscale the gradients before step(): SGD does so in its own pass."""
        group = self.param_groups[0]
        return group["name"] != "sgd" or group["clip_grad_norm"] is not None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.flat.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("FlatOptimizer takes no closure")
        flat, group = self.flat, self.param_groups[0]
        hyper = {name: group[name] for name in ("lr", "momentum", "weight_decay", "decays")}
        if self.needs_unscaled:
            flat.gather_grad()
            flat.mask_grad()
            if (most := group["clip_grad_norm"]) is not None:
                flat.clip([flat.grad, flat.other_grad], most)
        if group["name"] == "sgd":
            flat.sgd_step(**hyper, nesterov=group["nesterov"], **scaling(self))
            return
        hyper["decays"] = hyper["decays"] or ((0, len(flat.other_params), group["weight_decay"]),)
        flat.elementwise_step(group["name"], **hyper, found_inf=scaling(self)["found_inf"])


def decay_groups(model: nn.Module, optimizer: OptimizerSpec) -> Iterator[tuple[float, list[str]]]:
    """The trained parameters' names by weight decay, in the groups and the order of torchvision's reference script."""
    own = dict(optimizer.other_decays)
    norm, groups = own.pop("norm", None), {"": (optimizer.weight_decay, list[str]())}
    if norm is not None:
        groups["norm"] = norm, []
    groups |= {key: (decay, []) for key, decay in own.items()}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            rest = "norm" if norm is not None and isinstance(module, _NORMS) else ""
            groups[next((key for key in own if key == (full if "." in key else name)), rest)][1].append(full)
    return ((decay, names) for decay, names in groups.values() if names)


_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
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
