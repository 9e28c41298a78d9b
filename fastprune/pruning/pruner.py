"""The Pruner: masks beside any model, by parameter, while the model's forward stays its own.

Pruned weights are exactly +0: whatever works with the plain model works with the pruned one.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakSet, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import prune as torch_prune
from torch.utils.hooks import RemovableHandle

from fastprune.errors import not_a_module
from fastprune.kernels import Segment, keep_top_each, masked_cast, pack_bits, unpack_bits
from fastprune.pruning.allocation import Allocation, amount_to_prune, check_share, counts_to_prune, nm_masks
from fastprune.pruning.coverage import Coverage, Kinds, Selectors, coverage, torch_pruned
from fastprune.pruning.criteria import Criterion, scores_of
from fastprune.pruning.exchange import Masks, named_masks
from fastprune.pruning.layers import masked_layers, plain_layers
from fastprune.pruning.masks import Mask, masks_of_zeros

STATE = "fastprune.masks"
"""The entry of an attached optimiser's state dict that holds the masks."""


class Pruner:
    """Prunes a model: keeps a mask beside each weight, and pruned weights at exactly +0.

    model: any module; wrappers of DDP and torch.compile are looked through. kinds: "all" (convs, linear layers,
    attention, recurrent layers, with all subclasses of these), some of "conv", "linear", "attention", "recurrent",
    "bias" (the biases of all of these, which "all" leaves out), or classes of modules. include, exclude: which of their
    weights, by name pattern (of the parameter or of a module that contains it), module, or predicate of name and
    parameter. Tied weights are covered once, frozen ones never.

    adopt_zeros: weights of the model that are exactly 0, as in a pruned checkpoint, count as pruned, if there are at
    least 0.01 % in layers that are not all zeros (those alone are how some models initialise a head). Masks under hooks
    of torch.nn.utils.prune are taken over, and those hooks removed. dense_grad: see there. verbose: print one line on
    what is covered to stderr. hooks: zero the gradients of pruned weights after each accumulation, so that clipping
    counts what is kept; without it the caller keeps pruned weights at +0. on_prune: called with the Pruner after each
    change of masks, as by `prune`, `set_masks` or a schedule, and after loading; it may be set later. Copies have none.

    To keep pruned weights at +0 under an optimiser, `attach` it. A backward pass raises RuntimeError if other code
    has written pruned weights, and they are not 0. Not for parameters sharded over processes (FSDP).
    ValueError if there is nothing to prune, and as in `coverage`; TypeError for what is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kinds: Kinds = "all",
        include: Selectors | None = None,
        exclude: Selectors | None = None,
        adopt_zeros: bool = True,
        dense_grad: bool = False,
        verbose: bool = True,
        hooks: bool = True,
        on_prune: "Callable[[Pruner], None] | None" = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise not_a_module(model, "a Pruner")
        self.model = _plain(model)
        found = coverage(self.model, kinds, include, exclude)
        if not any(c.parameter.numel() for c in found.covered):
            left, name = found.left_out() or "no parameters", type(self.model).__name__
            raise ValueError(f"{name} has nothing to prune (it has {left}): see kinds=, include= and exclude=")
        self.names: tuple[str, ...] = tuple(c.name for c in found.covered)
        """Names of the covered parameters, in the model's order."""
        self.dense_grad = dense_grad
        """Whether each gradient is copied to `dense_grads` before it is masked, as RigL needs; may be switched."""
        self.dense_grads: dict[str, Tensor] = {}
        """By parameter name, the unmasked gradients of the last backward pass; with `dense_grad` only."""
        self.coverage = found
        self._hooked = hooks
        taken = _take_over_torch_masks(self.model, found)
        self._start()
        self._masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights().items()}
        adopted = (masks_of_zeros(self.weights()) if adopt_zeros else None) or {}
        self._adopted = bool(adopted)
        with torch.no_grad():
            own = {name: mask for name, mask in _layer_masks(self.model).items() if name in self._masks}
            for name, keep in [*taken.items(), *adopted.items(), *own.items()]:
                if keep.device.type != "meta":
                    self._masks[name] &= keep
        self.apply()
        self.on_prune: Callable[[Pruner], None] | None = on_prune
        if verbose:
            print(f"fastprune: {self.described()}", file=sys.stderr)

    def _start(self) -> None:
        """The part of a Pruner that is not copied: hooks and what is attached."""
        self._find()
        self._owner: Callable[[], None] | None = None
        self._averages: list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = []  # weights; masks of masked layers
        # Weakly: a loop may make a new optimiser each round, and the old one's momentum is to be freed.
        self._optimizers: WeakSet[Any] = WeakSet()
        self._wrapped: list[ref[Any]] = []  # wrappers whose step() runs none of torch's hooks
        self._handles: list[RemovableHandle] = []
        self._grad_hooks: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}
        # By weight with which an attached optimiser has made a step: autograd's count of its writes, at the last one.
        self._written: dict[str, int] = {}
        self._read: dict[str, Tensor] | None = None
        self._hook_gradients()

    # What is covered

    def weights(self) -> dict[str, nn.Parameter]:
        """By name, the covered parameters themselves."""
        # From their modules each time: load_state_dict(assign=True) makes new Parameters.
        return {name: module._parameters[own] for name, (module, own) in self._places.items()}  # type: ignore[misc]

    def _find(self) -> None:
        """Looks up the module of each covered parameter, and its name there."""
        # Kept, because a lookup by path takes longer than the rest of a step's hooks.
        parts = {name: name.rpartition(".") for name in self.names}
        self._places = {name: (self.model.get_submodule(path), own) for name, (path, _, own) in parts.items()}

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """By parameter name, bool of the weight's shape and on its device: True keeps. Written in place by `prune`."""
        for name, weight in self.weights().items():
            mask = self._masks[name]
            if mask.device != weight.device:  # the model was moved
                empty = mask.device.type == "meta"  # and where it had no values, nothing was pruned
                self._masks[name] = torch.ones_like(weight, dtype=torch.bool) if empty else mask.to(weight.device)
        return self._masks

    @property
    def mask(self) -> Mask:
        """The present masks in one `Mask` on the CPU, a copy."""
        return Mask.from_tensors({name: mask.cpu() for name, mask in self.masks.items()})

    @property
    def total(self) -> int:
        """Number of covered weights."""
        return sum(w.numel() for w in self.weights().values())

    @property
    def kept(self) -> int:
        """Number of kept weights. Waits for the device."""
        return sum(_kept(self.masks.values()))

    @property
    def density(self) -> float:
        """Fraction of the covered weights that is kept, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Fraction of the covered weights that is pruned, in [0, 1]."""
        return 1.0 - self.density

    def layerwise_ratios(self) -> dict[str, float]:
        """By parameter name, the fraction of its weights that is pruned, in [0, 1]."""
        masks = self.masks
        kept = zip(masks, _kept(masks.values()), strict=True)
        return {name: (1.0 - n / size if (size := masks[name].numel()) else 0.0) for name, n in kept}

    def described(self) -> str:
        """One line: what is covered, how much of it is pruned, and what is left out."""
        share = self.total / max(self.coverage.total, 1)
        line = f"covers {len(self.names)} weights of {type(self.model).__name__}, {self.total:,} of "
        line += f"{self.coverage.total:,} parameters ({share:.1%})"
        if pruned := self.total - self.kept:
            how = "are zero already and count as pruned" if self._adopted else "are pruned"
            line += f"; {pruned:,} of them ({pruned / self.total:.1%}) {how}"
            whole = [n for n, ratio in self.layerwise_ratios().items() if ratio == 1]
            if whole:
                line += f", all of {', '.join(whole[:3])}{' and more' if len(whole) > 3 else ''} among them"
            line += " (adopt_zeros=False keeps them)" if self._adopted else ""
        left = self.coverage.left_out()
        return f"{line}; leaves {left}" if left else line

    def __str__(self) -> str:
        """A table of the layers: name, shape, weights, kept, density."""
        rows = [("layer", "shape", "weights", "kept", "density")]
        kept = _kept(self.masks.values())
        for (name, mask), n in zip(self.masks.items(), kept, strict=True):
            shape, count = " x ".join(map(str, mask.shape)), mask.numel()
            rows.append((name, shape, f"{count:,}", f"{n:,}", f"{n / max(count, 1):.4f}"))
        rows.append(("total", "", f"{self.total:,}", f"{sum(kept):,}", f"{sum(kept) / self.total:.4f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    # Pruning

    @torch.no_grad()
    def prune(
        self,
        fraction: float | None = None,
        *,
        to: float | None = None,
        n: int | None = None,
        criterion: Criterion = "magnitude",
        allocation: Allocation = "global",
    ) -> int:
        """Prunes more weights, those of lowest score; returns how many. Masks are written in place, weights become +0.

        Exactly one amount: fraction of the weights that are left, to: the sparsity afterwards, n: a number of weights
        (each of all covered layers together); none for given ratios and N:M. Exactly so many are pruned; ties go by
        position, the lowest first. criterion: "magnitude", "random", "lamp", "taylor", a function of `criteria`, or any
        function from the weights by name to scores by name (or such scores): finite floats, larger ones stay.
        allocation: "global" ranks all layers together, "uniform" and "erk" say how many each layer loses, a mapping
        from parameter names to sparsities does so for the layers that it names, and "2:4" (any N:M) keeps N of M
        consecutive weights along the input dimension.

        Layers that are frozen now are left alone. ValueError for an amount, scores or ratios that do not fit, and if
        all layers are frozen, TypeError for an amount that is no number; nothing is changed then.
        """
        weights, masks = self._trained()
        scores = scores_of(criterion, weights)
        dims = {name: 0 if isinstance(self._places[name][0], _ConvTransposeNd) else 1 for name in weights}
        if (pattern := nm_masks(allocation, weights, masks, scores, dims)) is not None:
            if not fraction is to is n is None:
                raise ValueError(f"allocation {allocation!r} says itself how much is pruned: give no amount")
            new = pattern
            count = sum(_kept(masks.values())) - sum(_kept(new.values()))
        else:
            kept, sizes = _kept(masks.values()), {name: tuple(w.shape) for name, w in weights.items()}
            if to is not None and len(weights) < len(self.names) and isinstance(allocation, str):
                # A sparsity is of all covered layers, although only those that are trained can lose weights.
                all_sizes = {name: tuple(w.shape) for name, w in self.weights().items()}
                n = amount_to_prune(allocation, all_sizes, _kept(self.masks.values()), fraction, to, n)
                if n is not None and n > sum(kept):
                    raise ValueError(f"to is {to}, but only {sum(kept)} weights are left in layers that are not frozen")
                to = None
            counts = counts_to_prune(allocation, amount_to_prune(allocation, sizes, kept, fraction, to, n), sizes, kept)
            new = _keep_top(weights, masks, scores, counts)
            count = counts if isinstance(counts, int) else sum(counts)
        self._write(new)
        return count

    @torch.no_grad()
    def set_masks(self, masks: Masks) -> None:
        """Writes other masks in place; pruned weights become +0, weights that were pruned stay +0 until trained.

        masks: a Mask; by parameter name 0/1 tensors or arrays of the weights' shapes; or the path of a file of such
        tensors (safetensors, or open_lth's mask.pth). All covered layers must be there. ValueError otherwise, or for
        values other than 0 and 1; nothing is changed then.
        """
        self._write(named_masks(masks, {name: tuple(w.shape) for name, w in self.weights().items()}))

    @torch.no_grad()
    def drop_and_grow(self, fraction: float, scores: Callable[[str, nn.Parameter], Tensor]) -> int:
        """In each layer prunes round(fraction x kept) weights of lowest magnitude, and keeps as many others instead.

        scores: from name and weight to the scores of its shape by which pruned weights come back, the highest first;
        those just dropped may come back, too. New weights are +0, with optimiser state 0. Returns how many came back.
        ValueError for a fraction outside [0, 1], scores that do not fit, and if all layers are frozen; nothing is
        changed then. (Mocanu et al., 2018; Evci et al., 2020.)
        """
        check_share("fraction", fraction, "a number in [0, 1]")
        weights, masks = self._trained()
        counts = [round(fraction * kept) for kept in _kept(masks.values())]
        left = _keep_top(weights, masks, None, counts)
        room = [mask.numel() - kept for mask, kept in zip(left.values(), _kept(left.values()), strict=True)]
        new = {}
        for (name, weight), keep, count, free in zip(weights.items(), left.values(), counts, room, strict=True):
            ranked = {name: _finite(name, scores(name, weight).to(weight.device), weight)}
            # The lowest of the pruned ones stay pruned: `free - count` of them, and the rest comes back.
            rest = _keep_top({name: weight}, {name: ~keep}, ranked, [free - count])
            new[name] = keep | rest[name]
        self._refuse_other_pruners(new)
        self._replace(left)  # so that weights that are dropped and come back begin at 0, as the others do
        self._write(new)
        return sum(counts)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets pruned weights, their gradients and their optimiser state to +0, after other code has written them."""
        self._find()  # a layer may have been replaced
        self._hook_gradients()
        if self._owner is not None:
            self._owner()
        masks = self.masks
        for name, weight in self.weights().items():
            mask = masks[name]
            if self._owner is None:
                _zero(weight, mask)
                if weight.grad is not None:
                    _zero_grad(weight, mask)
            for tensors, _ in self._averages:
                _zero(tensors[name], mask.to(tensors[name].device))
        for optimizer in self._optimizers:
            self._zero_state(optimizer)
        for layers in (_layer_masks(self.model), *(of_average for _, of_average in self._averages)):
            for name in layers.keys() & masks.keys():
                layers[name].copy_(masks[name])

    def _trained(self) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """Weights and masks of the layers that are not frozen now. ValueError if there are none."""
        self._find()
        weights, masks = {n: w for n, w in self.weights().items() if w.requires_grad}, self.masks
        if not weights:
            raise ValueError("all covered layers are frozen now: there is nothing to prune")
        return weights, {name: masks[name] for name in weights}

    def _write(self, new: Mapping[str, Tensor]) -> None:
        self._replace(new)
        self.masks_changed()

    def _replace(self, new: Mapping[str, Tensor]) -> None:
        self._refuse_other_pruners(new)
        masks = self.masks
        for name, keep in new.items():
            masks[name].copy_(keep)  # in place: a captured graph reads this memory
        self.apply()

    def masks_changed(self) -> None:
        """Tells `on_prune`; to be called after other code has written the masks."""
        if self.on_prune is not None:
            self.on_prune(self)

    def _refuse_other_pruners(self, new: Mapping[str, Tensor]) -> None:
        """ValueError if another Pruner of the model prunes weights that `new` keeps: they would not be trained."""
        weights = self.weights()
        for name, keep in new.items():
            for hook in (getattr(weights[name], "_post_accumulate_grad_hooks", None) or {}).values():
                if isinstance(hook, _GradientHook) and hook.pruner is not self:
                    other = hook.pruner.masks[hook.name]
                    if other.device.type != "meta" and bool((keep.to(other.device) & ~other).any()):
                        raise ValueError(f"another Pruner prunes weights of {name} that this one keeps: finalize() it")

    # Keeping pruned weights at +0

    def attach(self, optimizer: Any) -> None:
        """Keeps pruned weights and their optimiser state at +0 after each step, and puts the masks into its state dict.

        optimizer: any of torch's, or a wrapper (SAM, Lookahead, ZeroRedundancyOptimizer): the optimisers inside are
        found. Its state_dict() then has an entry "fastprune.masks", and load_state_dict() restores it. Copies and
        pickles of the optimiser hold the model and the Pruner, too. TypeError if there is no torch optimiser in it;
        ValueError if it has none of the covered parameters, or is attached to another Pruner.
        """
        found = list(dict.fromkeys(_optimizers_in(optimizer)))
        if not found:
            raise TypeError(f"{type(optimizer).__name__} is no torch optimiser and holds none: attach the inner one")
        self._find()
        ours = {id(w) for w in self.weights().values()}
        if not any(id(p) in ours for o in found for group in o.param_groups for p in group["params"]):
            raise ValueError(f"{type(optimizer).__name__} has none of the pruned parameters: is it of another model?")
        # A wrapper whose step() does not run torch's hooks may write weights after the optimisers inside it.
        outer = [] if _runs_hooks(optimizer) or not hasattr(optimizer, "step") else [optimizer]
        for one in [*found, *outer]:
            if getattr(vars(one).get("__reduce_ex__"), "pruner", self) is not self:
                raise ValueError(f"{type(one).__name__} is attached to another Pruner: finalize() that one first")
        new = [one for one in found if one not in self._optimizers]
        for one in new:
            if _runs_hooks(one):
                # Not compiled with a step() that is: the kernels are no torch operations.
                self._handles.append(one.register_step_post_hook(torch.compiler.disable(self._after_step)))
            if hasattr(one, "_optimizer_state_dict_post_hooks"):
                self._handles.append(one.register_state_dict_post_hook(self._add_masks))
                self._handles.append(one.register_load_state_dict_pre_hook(self._read_masks))
                self._handles.append(one.register_load_state_dict_post_hook(self._write_read_masks))
        self._optimizers.update(new)
        for one in outer:
            self._wrap_step(one)
        for one in [*new, *outer]:
            one.__reduce_ex__ = _Reduced(one, self)
        with torch.no_grad():
            self.apply()

    def attach_average(self, average: nn.Module | Mapping[str, Tensor]) -> None:
        """Keeps an average of the weights (EMA, SWA) at +0 where the masks prune, now and after each change of masks.

        average: a copy of the model, inside AveragedModel or timm's ModelEma or alone, or tensors by parameter name.
        An average that is made after the last change of masks needs no call. ValueError if a parameter is missing.
        """
        masks: Mapping[str, Tensor] = {}
        if isinstance(average, Mapping):
            tensors = average
        else:
            plain = _plain(average)
            tensors, masks = dict(plain.named_parameters(remove_duplicate=False)), _layer_masks(plain)
        for name, weight in self.weights().items():
            if name not in tensors or tensors[name].shape != weight.shape:
                raise ValueError(f"the average has no {name} of shape {tuple(weight.shape)}: is it of another model?")
        self._averages.append((tensors, masks))
        with torch.no_grad():
            self.apply()

    def _hook_gradients(self) -> None:
        if not self._hooked:
            return
        for name, weight in self.weights().items():
            if name in self._grad_hooks and self._grad_hooks[name][0] is weight:
                continue
            if name in self._grad_hooks:
                self._grad_hooks[name][1].remove()
            if weight.requires_grad:
                hook = _GradientHook(self, name)
                self._grad_hooks[name] = weight, weight.register_post_accumulate_grad_hook(hook)

    def _wrap_step(self, wrapper: Any) -> None:
        if any(one() is wrapper for one in self._wrapped):
            return
        step, apply = wrapper.step, torch.compiler.disable(self.apply)

        def step_and_apply(_: Any, *args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self._wrapped:  # not after finalize(): a learning-rate schedule may hold this function still
                apply()
            return result

        step_and_apply.before = vars(wrapper).get("step")  # type: ignore[attr-defined]
        wrapper.step = MethodType(step_and_apply, wrapper)  # schedules, which wrap it in turn, expect a method
        self._wrapped.append(ref(wrapper))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held, masks = {id(p) for group in optimizer.param_groups for p in group["params"]}, self.masks
        keeps = getattr(optimizer, "keeps_pruned", False)
        for name, weight in self.weights().items():
            if id(weight) in held:
                if not keeps:
                    _zero(weight, masks[name])
                self._written[name] = weight._version
        if not keeps:
            self._zero_state(optimizer)

    def _zero_state(self, optimizer: torch.optim.Optimizer) -> None:
        # State, too: momentum from before the pruning would move a weight that a later mask keeps again.
        masks = {weight: self._masks[name] for name, weight in self.weights().items()}
        for weight, mask in masks.items():
            if weight in optimizer.state:
                for value in optimizer.state[weight].values():
                    # Floats only: in quantised states, which are integers, 0 is no zero.
                    if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                        _zero(value, mask.to(value.device))
        if isinstance(optimizer, torch.optim.LBFGS):
            # Its vectors hold all parameters one after the other; a direction from before would move pruned weights.
            own = optimizer.param_groups[0]["params"]
            keep = torch.cat([masks.get(p, torch.ones_like(p, dtype=torch.bool)).reshape(-1) for p in own])
            for value in optimizer.state[own[0]].values():
                for vector in value if isinstance(value, list) else [value]:
                    if isinstance(vector, Tensor) and vector.shape == keep.shape:
                        _zero(vector, keep)

    def _add_masks(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        state[STATE] = self.state_dict()

    def _read_masks(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        self._read = self._masks_of(state[STATE]) if STATE in state else None

    @torch.no_grad()
    def _write_read_masks(self, optimizer: torch.optim.Optimizer) -> None:
        # Only after the optimiser has taken the state: a state that it refuses changes nothing.
        self._write(self._read or {})
        self._read = None

    # Files

    def state_dict(self) -> dict[str, Any]:
        """By parameter name the shape, and uint8 tensors with one bit a weight, in logical order, on the CPU."""
        return {
            name: {"shape": list(mask.shape), "bits": pack_bits(mask.cpu().reshape(-1))}
            for name, mask in self.masks.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict()` in place. ValueError for one of another model; nothing is changed then."""
        self._write(self._masks_of(state))

    def _masks_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            masks = {
                name: unpack_bits(one["bits"].cpu(), torch.Size(one["shape"]).numel()).view(one["shape"])
                for name, one in state.items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a Pruner's state: {error}") from error
        return named_masks(masks, {name: tuple(w.shape) for name, w in self.weights().items()})

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the masks to a safetensors file, one bit a weight (`Mask.save`)."""
        self.mask.save(Path(path))

    def load(self, path: str | PathLike[str]) -> None:
        """Reads masks from a file, as `set_masks` does."""
        self.set_masks(Path(path))

    def finalize(self) -> nn.Module:
        """Removes all that the Pruner has added, and returns the model: a plain one, whose pruned weights are +0.

        Masked layers become plain ones. The Pruner is not to be used afterwards.
        """
        with torch.no_grad():
            self.apply()
        for _, handle in self._grad_hooks.values():
            handle.remove()
        for handle in self._handles:
            handle.remove()
        wrappers = [wrapper for one in self._wrapped if (wrapper := one()) is not None]
        for wrapper in wrappers:
            step = vars(wrapper).get("step")
            if isinstance(step, MethodType) and hasattr(step, "before"):
                del wrapper.step
                if step.before is not None:
                    wrapper.step = step.before
        for one in [*self._optimizers, *wrappers]:
            vars(one).pop("__reduce_ex__", None)
        self._hooked = False
        self._start()
        plain_layers(self.model)
        return self.model

    def share(self, masks: Mapping[str, Tensor], write_zeros: Callable[[], None]) -> None:
        """Makes `masks` (bool, of the weights' shapes, by name) the Pruner's own, after writing the present ones there.

        write_zeros: sets pruned weights and all that goes with them to +0; called after each change of the masks, in
        place of the Pruner's own passes.
        """
        for name, mask in masks.items():
            mask.copy_(self.masks[name])
        self._masks, self._owner = dict(masks), write_zeros

    def __getstate__(self) -> dict[str, Any]:
        kept = ("model", "coverage", "names", "dense_grad", "_masks", "_hooked", "_adopted")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.dense_grads, self.on_prune = {}, None
        self._start()


class _GradientHook:
    def __init__(self, pruner: Pruner, name: str) -> None:
        self.pruner, self.name = pruner, name

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> None:
        pruner, mask, grad = self.pruner, self.pruner._masks[self.name], weight.grad
        assert grad is not None
        if mask.device != weight.device:
            mask = pruner.masks[self.name]
        if pruner._written.get(self.name) != weight._version:
            # A masked layer may hold anything in pruned weights.
            if _any_pruned_is_not_zero(weight, mask) and self.name not in _layer_masks(pruner.model):
                raise RuntimeError(
                    f"{self.name} has pruned weights that are not 0, written by other code than an attached optimiser: "
                    "attach the one whose step() runs, or call pruner.apply() after writing weights"
                )
            if self.name in pruner._written:
                pruner._written[self.name] = weight._version
        if pruner.dense_grad:
            pruner.dense_grads[self.name] = grad.to_dense() if grad.is_sparse else grad.clone()
        _zero_grad(weight, mask)


class _Reduced:
    """How a copy or a pickle of an attached optimiser is made: with its Pruner, to which the new one is attached."""

    # Optimizer.__getstate__ drops hooks: without this a copy would let pruned weights come back in silence.
    def __init__(self, optimizer: Any, pruner: Pruner) -> None:
        self.optimizer, self.pruner = optimizer, pruner

    def __call__(self, protocol: Any) -> Any:
        plain: Any = type(self.optimizer).__reduce_ex__
        make, args, state = plain(self.optimizer, protocol)[:3]
        if isinstance(state, dict):  # of a wrapper, its whole __dict__
            state = {name: value for name, value in state.items() if name not in ("step", "__reduce_ex__")}
        return _attached, (make, args, state, self.pruner)


def _attached(make: Callable[..., Any], args: tuple[Any, ...], state: Any, pruner: Pruner) -> Any:
    optimizer = make(*args)
    if hasattr(optimizer, "__setstate__"):
        optimizer.__setstate__(state)
    else:
        optimizer.__dict__.update(state)
    pruner.attach(optimizer)
    return optimizer


def _runs_hooks(optimizer: Any) -> bool:
    """Whether step() runs the hooks of torch.optim.Optimizer, whose __init__ sees to it."""
    step = getattr(type(optimizer), "step", None)
    return hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(step, "hooked", False)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch.compile, DDP and averages."""
    while True:
        inner = [m for name, m in model.named_children() if name in ("_orig_mod", "module")]
        own = len(list(model.children())) == 1 and not list(model.parameters(recurse=False))
        if not (own and inner):
            return model
        model = inner[0]


def _kept(masks: Iterable[Tensor]) -> list[int]:
    """Numbers of True elements. On the meta device, where there are none, all count."""
    counts = []
    for mask in masks:
        if mask.device.type == "meta":
            counts.append(mask.numel())
        elif mask.device.type == "cpu":  # many times faster than sum()
            counts.append(int(np.count_nonzero(_in_memory(mask, _channels_last(mask)).numpy())))
        else:
            counts.append(int(mask.sum()))
    return counts


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _in_memory(tensor: Tensor, channels_last: bool) -> Tensor:
    """[numel] in logical order, or in that of channels-last memory; a view where the memory has this order."""
    # contiguous(): of a weight with gaps in memory reshape() may give a view with gaps.
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).reshape(-1).contiguous()


def _keep_top(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    scores: Mapping[str, Tensor] | None,
    counts: int | Sequence[int],
) -> dict[str, Tensor]:
    """New masks of the weights' shapes; without scores by magnitude. counts: as n_prune of keep_top_each."""
    segments, flat_scores, flat_masks, position = [], [], [], 0
    ranked = weights if scores is None else scores
    dtypes, devices = {t.dtype for t in ranked.values()}, {t.device for t in ranked.values()}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    # Layers of several devices are ranked on the CPU, and so is float64, for which the GPU has no keys.
    device = next(iter(devices)) if len(devices) == 1 and dtype != torch.float64 else torch.device("cpu")
    for name, weight in weights.items():
        order = _channels_last(weight)
        segments.append(Segment(name, tuple(weight.shape), 0, position, order))
        position += weight.numel()
        flat_scores.append(_in_memory(ranked[name].detach(), order).to(device, dtype))
        flat_masks.append(_in_memory(masks[name], order).to(device))
    signed = scores is not None and any(bool((s < 0).any()) for s in flat_scores)
    new = keep_top_each(flat_scores, flat_masks, counts, segments, signed=signed)
    return {s.name: s.view(keep).to(weights[s.name].device) for s, keep in zip(segments, new, strict=True)}


def _finite(name: str, scores: Tensor, weight: Tensor) -> Tensor:
    if scores.shape != weight.shape or not scores.is_floating_point() or not bool(scores.isfinite().all()):
        raise ValueError(f"the scores of {name} are not finite floats of shape {tuple(weight.shape)}")
    return scores


def _layer_masks(model: nn.Module) -> dict[str, Tensor]:
    """By the name of its weight, the mask of each masked layer of the model."""
    return {name: layer.mask for name, layer in masked_layers(model).items()}


def _any_pruned_is_not_zero(weight: Tensor, mask: Tensor) -> bool:
    return weight.device.type != "meta" and bool((weight != 0).logical_and_(~mask).any())


def _zero_grad(weight: Tensor, mask: Tensor) -> None:
    """Writes +0 into the weight's gradient where the mask, on its device, is False."""
    grad = weight.grad
    assert grad is not None
    if grad.is_sparse:
        grad = grad.coalesce()
        values = grad.values().masked_fill(~mask[tuple(grad.indices())], 0.0)
        weight.grad = torch.sparse_coo_tensor(
            grad.indices(), values, grad.shape, is_coalesced=True, check_invariants=False
        )
    else:
        _zero(grad, mask)


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Writes +0 into `tensor` where the mask, on its device, is False."""
    tensor = tensor.detach()
    if tensor.device.type == "meta":
        return
    # Kernels write behind autograd's back: a backward pass must see that a weight is not that of its forward any more.
    torch.autograd.graph.increment_version(tensor)
    if tensor.stride() == mask.stride() and torch.ops.aten.is_non_overlapping_and_dense(tensor):
        flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        masked_cast(flat, mask.as_strided((mask.numel(),), (1,), mask.storage_offset()), flat)
    else:
        tensor.masked_fill_(~mask, 0.0)


def _optimizers_in(holder: Any, depth: int = 4) -> Iterator[torch.optim.Optimizer]:
    """The torch optimisers that `holder` is or holds, the outermost first."""
    if isinstance(holder, torch.optim.Optimizer):
        yield holder
    if depth and not isinstance(holder, (nn.Module, Tensor, type, str)) and hasattr(holder, "__dict__"):
        for value in list(vars(holder).values()):
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            for one in held:
                if isinstance(one, torch.optim.Optimizer) or hasattr(one, "param_groups"):
                    yield from (o for o in _optimizers_in(one, depth - 1) if o is not holder)


def _take_over_torch_masks(model: nn.Module, coverage: Coverage) -> dict[str, Tensor]:
    """Removes the hooks of torch.nn.utils.prune from the covered weights; their masks, bool, by name."""
    covered = {id(c.parameter): c.name for c in coverage.covered}
    taken: dict[str, Tensor] = {}
    for original, hooked in torch_pruned(model).items():
        for module, own in hooked if original in covered else []:
            name, mask = covered[original], getattr(module, f"{own}_mask").bool()
            taken[name] = taken[name] & mask if name in taken else mask  # of layers that share it, both
            torch_prune.remove(module, own)  # the original becomes the parameter again, masked
    return taken
