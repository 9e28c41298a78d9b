"""The training loop: one Trainer runs any number of dense and masked trainings, in place, compiled once."""

import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from math import inf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastprune.errors import not_a_module
from fastprune.kernels.cross_entropy import MOST_CLASSES
from fastprune.kernels.dispatch import uses_triton
from fastprune.pruning.allocation import prune
from fastprune.pruning.coverage import Kinds, Selectors
from fastprune.pruning.masks import Mask
from fastprune.pruning.pruner import Pruner
from fastprune.specs import COMPUTES, PRECISIONS, EmaSpec, GpuOptions, OptimizerSpec, ScheduleSpec
from fastprune.training.compute import Compute, Dense, autocast
from fastprune.training.distributed import (
    all_reduce_mean,
    all_reduce_sum,
    alone,
    broadcast_statistics,
    of_rank_0,
    rank,
    world_size,
)
from fastprune.training.ema import Ema
from fastprune.training.flat import FlatOptimizer, FlatParams
from fastprune.training.fuse import fused, inductor
from fastprune.training.step import (
    EpochMetrics,
    EpochSums,
    Evaluation,
    GraphedStep,
    Snapshot,
    Step,
    check_labels,
    padded,
)
from fastprune.training.tuning import Choice, Choices, StepTimer, choose, machine

if TYPE_CHECKING:
    from fastprune.sparse.choice import Chooser

_HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_HERE = Choices()
"""The choices of all Trainers of this process that are given none."""

Loss = Callable[[Tensor, Tensor], Tensor]

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images [B, 3, H, W], labels int64 [B]). A `set_epoch(epoch)` method, if there is one, is called before each training
epoch, with the epoch from 0."""


class Trainer:
    """Trains a model with masks: SGD, AdamW or RMSprop on flat parameters, channels-last.

    The model is moved to `device` and its parameters become views of flat buffers (`FlatParams`). `pruner` is a Pruner
    on them: convs by default, other layers by kinds, include and exclude. Weights of the model that are zero already
    count as pruned, as in Pruner. Masks, weights and learning rates are written in place, so a Trainer compiles and
    captures once for each shape of batch, over any number of trainings.

    precision: "fp32", "bf16" (autocast) or "fp16" (autocast and a gradient scaler). With bf16 and fp16, convs read the
    low-precision copy of the weights that the optimiser's pass writes. compile: torch.compile for the network, by
    default on a GPU only. graph: the whole step as one CUDA graph, by default on a GPU; without effect on a CPU.
    loss: from (logits, labels) to the mean loss of a batch, [], by default cross-entropy; with a loss of its own, a
    Trainer does not use `label_smoothing`. Labels are classes (int64 [B], or [B, H, W] per pixel) or their
    probabilities (floating, of the logits' shape). Frozen parameters stay as they are.

    compute: how a training computes. "plain": torch's own operations. "dense": convs of small maps as GEMMs, where that
    is faster. "sparse": kept weights alone, in float32 on a CPU. "auto": for each training the cheaper of the last two,
    by a rule on mask and shapes. Outside `fit` a Trainer evaluates densely. They differ by rounding; resume a training
    with `fit(compute=trainer.computed)`. `computed` says how the last training computed, `reason` why not sparsely.

    gpu_options: which of our own kernels a captured step on a GPU uses. A GpuOptions decides all; a mapping, such as
    {"fused_norm": True}, some. The others are chosen at the first batch of a training, by timing steps of a copy of the
    Trainer with and without each, once for a device type, versions and shapes, and kept in `choices` (by default in
    this process). Without graphs, and with torch's deterministic algorithms, which give the same bits in each process,
    nothing is timed and the others are off. `gpu_options` says what is used; resume a training with
    `fit(gpu_options=trainer.gpu_options)`. They have no effect on a CPU.

    `ema` is the moving average of weights and buffers that `fit(ema=)` asks for, None without one.

    Under torch.distributed, gradients are averaged over all ranks, each of which reads its own batches. Batch-norm
    statistics are local during an epoch; after it, all ranks get those of rank 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool | str | None = None,
        graph: bool | None = None,
        loss: Loss | None = None,
        kinds: Kinds = "conv",
        include: Selectors | None = None,
        exclude: Selectors | None = None,
        compute: str = "auto",
        on_prune: Callable[[Pruner], None] | None = None,
        gpu_options: GpuOptions | Mapping[str, bool] | None = None,
        choices: Choices | None = None,
        verbose: bool = True,
    ) -> None:
        """compile: True, False, or the name of a torch.compile backend. on_prune: as of Pruner. verbose: says
        on stderr how many weights are zero already. ValueError for an unknown precision or `compute`, for a model with
        nothing to prune, and for trained parameters that are not float32. TypeError for what is no module, and for an
        unknown GPU option."""
        if not isinstance(model, nn.Module):
            raise not_a_module(model, "a Trainer")
        for what, given, known in (("precision", precision, PRECISIONS), ("compute", compute, COMPUTES)):
            if given not in known:
                raise ValueError(f"unknown {what} {given!r}: choose one of {', '.join(known)}")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.device.index is None:
            # With its number, because the current device may be another one at a later step.
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = precision
        self._forced = asdict(gpu_options) if isinstance(gpu_options, GpuOptions) else dict(gpu_options or {})
        self.gpu_options = GpuOptions(**self._forced)
        self._choices = _HERE if choices is None else choices
        self._tunes = on_gpu and graph is not False
        self._kinds = kinds
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pruner = Pruner(
            self.model, kinds=kinds, include=include, exclude=exclude, verbose=False, hooks=False, on_prune=on_prune
        )
        if verbose and self.pruner.kept < self.pruner.total:
            print(f"fastprune: {self.pruner.described()}", file=sys.stderr)
        self.flat = FlatParams(self.model, self.pruner.names, half_precision=_HALF[precision])
        self.pruner.share({s.name: s.view(self.flat.mask) for s in self.flat.segments}, self.flat.mask_changed)
        # On the device, because a captured graph would keep a Python number forever. float64, so that it is exactly the
        # schedule's number.
        self._lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer = FlatOptimizer(self.flat, lr=self._lr)
        self.ema: Ema | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._fresh_scaler = self.scaler.state_dict()
        compile = on_gpu if compile is None else compile
        half = _HALF[precision]
        self.images = half if on_gpu and half is not None else torch.float32
        """dtype in which a loader should deliver images: on a GPU autocast's, to which they would be cast anyway."""
        self._compile = compile
        self._networks: dict[bool, Callable[[Tensor], Tensor]] = {}
        self._ways: dict[GpuOptions, dict[str, Dense]] = {}
        self._asked = compute
        self._use(self.gpu_options)
        reasons = {"a GPU": on_gpu, f"precision {precision}": half is not None, "compiled": bool(compile)}
        self.not_sparse = next((why for why, holds in reasons.items() if holds), "")
        """Why this Trainer never computes sparsely, whatever the model; "" if it may."""
        self._chooser: Chooser | None = None
        self._compute: Compute | None = None  # of the training that runs
        self.computed, self.reason = self._densely.name, ""
        self._hyper: dict[str, Any] = {}
        self._graphed: dict[tuple[Any, ...], GraphedStep] = {}
        # One pool and one stream for all graphs: they run one after the other and leave no result in the pool, so they
        # can share its memory.
        self._pool = (
            (torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)) if on_gpu and graph is not False else None
        )
        self._sums = EpochSums(self.device)
        self._smoothing, self._loss = 0.0, loss
        self._one = torch.ones((), device=self.device)
        # A loss of the user's may count images that cross-entropy ignores.
        self._pads = loss is None and (self._pool is not None or bool(compile))
        self._largest = 0  # batch of the present evaluation
        self._classes: int | None = None  # of the network's output; known after the first batch
        self._marked: dict[str, Tensor] = {}

    def _use(self, options: GpuOptions) -> None:
        """Computes with these options from here on. What was compiled and captured with others stays, for a training
        that returns to them."""
        self.gpu_options = options
        if options not in self._ways:
            on_gpu, half = self.device.type == "cuda", _HALF[self.precision]
            eager = not on_gpu and half is None and not self._compile
            network = self._compiled(options)
            scattered = options.gradient_table and uses_triton(self.flat.weight)
            parts = self.model, network, self.flat, self.optimizer, self.scaler, half
            self._ways[options] = {
                name: Dense(*parts, eager and name == "dense", eager, scattered) for name in ("plain", "dense")
            }
        self._dense = self._ways[options]
        # Unless a training says otherwise.
        self._densely = self._dense["plain" if self._asked == "plain" else "dense"]

    def _compiled(self, options: GpuOptions) -> Callable[[Tensor], Tensor]:
        """The network from images to logits, compiled if that is wanted."""
        if options.fused_norm not in self._networks:
            network = _network(self.model, self.flat.half_views)
            if self._compile:
                backend: Any = self._compile if isinstance(self._compile, str) else "inductor"
                if backend == "inductor":
                    backend = fused if options.fused_norm and uses_triton(self.flat.weight) else inductor
                # torch counts recompilations over all Trainers of a process, and beyond its limit runs uncompiled.
                dynamo = torch._dynamo.config
                dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
                # Static shapes: each shape of batch gets code of its own, as it gets a graph of its own.
                network = torch.compile(network, dynamic=False, backend=backend)
            self._networks[options.fused_norm] = network
        return self._networks[options.fused_norm]

    def state(self) -> dict[str, Tensor]:
        """The state that a run resumes from, but for the mask, as fresh CPU tensors.

        "model.NAME": weights and batch-norm statistics, "momentum.NAME": momentum, each of logical shape.
        "scaler.NAME": float64 [], the gradient scaler's state, with fp16 only. With AdamW and RMSprop "square.NAME":
        second moments, and "steps": float32 []. "ema.NAME" as "model.NAME", and "ema": int64 [], the number of updates,
        with a moving average.
        """
        state = {f"model.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in self._tensors().items()}
        momentum = self.flat.packed(self.flat.momentum) | self._rest(self.flat.other_momentum)
        state |= {f"momentum.{k}": v for k, v in momentum.items()}
        for name, value in self.scaler.state_dict().items():
            state[f"scaler.{name}"] = torch.tensor(value, dtype=torch.float64)
        if self.flat.square is not None and self.flat.other_square is not None:
            square = self.flat.packed(self.flat.square) | self._rest(self.flat.other_square)
            state |= {f"square.{k}": v for k, v in square.items()}
            state["steps"] = self.flat.steps.to("cpu", copy=True)
        if self.ema is not None:
            state["ema"] = torch.tensor(self.ema.count)
            with self.ema.in_place():
                state |= {f"ema.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in self._tensors().items()}
        return state

    def state_dict(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """The model's state dict, for a model without a Trainer: fresh contiguous tensors on the CPU. averaged: that of
        the moving average."""
        # Copies, because torch.save of a view writes the whole buffer under it.
        with self._averaged(averaged):
            return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in self.model.state_dict().items()}

    def _averaged(self, wanted: bool) -> AbstractContextManager[None]:
        """Within it the model is the moving average, if that is wanted. ValueError if there is none."""
        if wanted and self.ema is None:
            raise ValueError("there is no moving average: fit(ema=) makes one")
        return self.ema.in_place() if wanted and self.ema is not None else nullcontext()

    def _set_ema(self, wanted: bool) -> None:
        """Makes a moving average, to begin as a copy, or forgets the present one."""
        if self.ema is not None:
            self.ema.close()
        self.ema = Ema(self.flat, self.model) if wanted else None

    def load_state(self, state: dict[str, Tensor], *, momentum: bool = True) -> None:
        """Restores a `state()` in place: weights, statistics, and with `momentum` the optimiser's state, scaler and
        moving average.

        Missing or unwanted momentum becomes zero, the scaler its initial state, and the mask dense; there is no moving
        average then. ValueError if weights or statistics are missing or have other shapes; nothing is changed then.
        """
        tensors = self._tensors()
        # All checks before the first write: a state that does not fit must not leave a mixture of two networks.
        for name, tensor in tensors.items():
            if f"model.{name}" not in state or state[f"model.{name}"].shape != tensor.shape:
                raise ValueError(f"the state has no {name} of shape {tuple(tensor.shape)}: is it of another model?")
        for name, tensor in tensors.items():
            tensor.detach().copy_(state[f"model.{name}"])
        self.flat.reset_state()
        self._set_ema(momentum and "ema" in state)
        if momentum:
            self._load_vectors("momentum", self.flat.momentum, self.flat.other_momentum, state)
            if "steps" in state:
                self.flat.begin("adamw")  # or rmsprop: the buffers are the same
                self.flat.let_next_begin()
                assert self.flat.square is not None
                assert self.flat.other_square is not None
                self._load_vectors("square", self.flat.square, self.flat.other_square, state)
                self.flat.steps.copy_(state["steps"])
        if self.ema is not None:
            self.ema.count = int(state["ema"])
            with self.ema.in_place():
                for name, tensor in tensors.items():
                    tensor.detach().copy_(state[f"ema.{name}"])
        scaler = dict(self._fresh_scaler)
        if momentum and all(f"scaler.{name}" in state for name in scaler):
            scaler = {k: type(v)(state[f"scaler.{k}"].item()) for k, v in scaler.items()}
        if scaler:
            self.scaler.load_state_dict(scaler)  # it writes in place: a captured step keeps reading the same memory
        for segment in self.flat.segments:
            self.flat.mask[segment.span] = True
        self.pruner.apply()

    def _load_vectors(self, kind: str, flat: Tensor, other: Tensor, state: dict[str, Tensor]) -> None:
        for s in self.flat.segments:
            if f"{kind}.{s.name}" in state:
                s.view(flat).copy_(state[f"{kind}.{s.name}"])
        for s in self.flat.other_segments:
            if f"{kind}.{s.name}" in state:
                s.view(other).copy_(state[f"{kind}.{s.name}"].flatten())

    def set_mask(self, mask: Mask | None) -> None:
        """Writes the mask (None: dense) in place, and +0 into pruned weights and their momentum.

        ValueError for a mask of other layers. Weights that an earlier mask pruned stay +0 until they are trained.
        """
        if mask is None:
            mask = Mask.dense(self.flat.segments)
        if mask.segments != self.flat.segments:
            raise ValueError("the mask has other layers or shapes than the model")
        self.flat.mask.copy_(mask.keep)
        self.pruner.apply()
        self.pruner.masks_changed()

    def close(self) -> None:
        """Frees the memory of captured steps and ends threads. Call it before a process group is destroyed."""
        # Destroying a process group waits for the graphs that captured its collectives.
        self._graphed.clear()
        if self._chooser is not None:
            self._chooser.close()

    def preview_prune(self, fraction: float) -> Mask:
        """The mask that `prune(fraction)` would set, on the device; changes nothing."""
        return prune(self.flat.weight, Mask(self.flat.mask, self.flat.segments), fraction)

    def prune(self, fraction: float) -> Mask:
        """Prunes exactly round(fraction x kept) weights, those of lowest magnitude over all layers, in place.

        Returns the new mask, a copy on the device. ValueError for a fraction outside [0, 1].
        """
        new = self.preview_prune(fraction)
        self.set_mask(new)
        return new

    @torch.no_grad()
    def save_rewind_point(self) -> None:
        """Copies the present weights and batch-norm statistics, on the device, for `rewind`."""
        self.flat.save_rewind_point()
        self._marked = {name: b.clone() for name, b in self.model.named_buffers()}

    @torch.no_grad()
    def rewind(self) -> None:
        """Restores the weights and statistics of the last `save_rewind_point`, in place, under the present mask.

        Momentum becomes zero, the gradient scaler its initial one, and there is no moving average. RuntimeError without
        a rewind point.
        """
        self.flat.rewind()
        self._set_ema(False)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self._marked[name])
        if self._fresh_scaler:
            self.scaler.load_state_dict(dict(self._fresh_scaler))

    def fit(
        self,
        train: Batches,
        val: Batches,
        optimizer: OptimizerSpec,
        schedule: ScheduleSpec,
        *,
        start: int = 0,
        stop: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        on_epoch: Callable[[EpochMetrics], None] | None = None,
        report: Callable[[int], None] | None = None,
        compute: str | None = None,
        strict: bool = True,
        ema: EmaSpec | None = None,
        gpu_options: GpuOptions | None = None,
    ) -> list[EpochMetrics]:
        """Trains epochs `start` + 1 to `stop` (counted from 1; default: the schedule's last), from the present state.

        The batch size is the loader's; `optimizer.batch_size` is not read. on_batch gets the number of images of each
        training batch, on_epoch the metrics of each epoch; both may read and write model, weights and masks. report:
        as on_batch, but it touches none of them, which costs a sparse training less. compute: for this training, in
        place of the Trainer's; strict=False: the Trainer's where that is not possible, as for a run that was begun
        elsewhere. ema: keeps a moving average and evaluates it, too; one that is there goes on, without `ema` it ends.
        gpu_options: of a training that goes on; those that the Trainer was given hold all the same. Training ends after
        an epoch that diverged. Returns the metrics of the epochs trained. ValueError for labels outside the network's
        classes (of batches on a GPU only the first is checked), for a loader without a batch, for compute="sparse"
        where that is not possible, and for gradient_table with several ranks. RuntimeError if a parameter was rebound.
        """
        if compute is not None and compute not in COMPUTES:
            raise ValueError(f"unknown compute {compute!r}: choose one of {', '.join(COMPUTES)}")
        # Both ends are checked: a parameter that was rebound would train apart from its mask, without any error.
        self.flat.check_aliased()
        self._smoothing = optimizer.label_smoothing
        self.flat.begin(optimizer.name)
        self._hyper = {
            "name": optimizer.name,
            "lr": self._lr,
            "momentum": optimizer.momentum,
            "weight_decay": optimizer.weight_decay,
            "nesterov": optimizer.nesterov,
            "decays": self.flat.decays(self.model, optimizer),
            "clip_grad_norm": optimizer.clip_grad_norm,
        }
        self.optimizer.param_groups[0].update(self._hyper)
        self._options_before, self._options_known = gpu_options, False
        if (ema is None) != (self.ema is None):
            self._set_ema(ema is not None)
        history = []
        with self._deciding(compute or self._asked, strict):
            for epoch in range(start, schedule.epochs if stop is None else stop):
                began = time.perf_counter()
                if hasattr(train, "set_epoch"):
                    train.set_epoch(epoch)
                trained, count = self._epoch(train, schedule, epoch, on_batch, report, ema)
                rate = count / (time.perf_counter() - began)
                found = self._evaluate(val)
                averaged = self.evaluate(val, averaged=True) if ema is not None else (None, None, None)
                seconds = time.perf_counter() - began
                metrics = EpochMetrics(
                    epoch + 1,
                    schedule.lr_at(epoch),
                    *trained[:2],
                    *found[:2],
                    rate,
                    seconds,
                    trained.accuracy5,
                    found.accuracy5,
                    *averaged,
                )
                history.append(metrics)
                if on_epoch is not None:
                    on_epoch(metrics)
                if metrics.diverged:
                    break
        self.flat.check_aliased()
        return history

    @contextmanager
    def _deciding(self, asked: str, strict: bool = True) -> Iterator[None]:
        """One training: its first batch decides how it computes. At its end the flat parameters are up to date."""
        self._compute, self._asked_now, self._strict = None, asked, strict
        try:
            yield
        finally:
            if self._compute is not None:
                self._compute.push()  # also when an exception ends an epoch: weights fit the statistics then
            self._compute = None

    def _begin(self, images: Tensor, steps: float) -> Compute:
        """The way to compute this training, from its first batch and its length, ready to go on from the flat
        parameters. The first image of another size decides anew."""
        if self._compute is not None and not self._compute.takes(images):
            self._compute.push()
            self._compute = None
        if self._compute is None:
            self._compute, self.reason = self._decide(images, steps)
            self.computed = self._compute.name
        # Not at the first batch alone: a caller may have written weights or masks after the last epoch.
        self._compute.pull()
        return self._compute

    def _decide(self, images: Tensor, steps: float) -> tuple[Compute, str]:
        """(how to compute, why not otherwise). ValueError if it must be sparse and can not."""
        asked, why = self._asked_now, self.why_not_sparse(self._hyper["name"])
        if asked in self._dense:
            return self._dense[asked], ""
        if not why:
            from fastprune.sparse.choice import Chooser

            if self._chooser is None:
                self._chooser = Chooser(self.model, self.flat)
            # All ranks must choose alike, though their last batches and numbers of steps may differ.
            batch, steps = of_rank_0(len(images), steps)
            found = self._chooser.choose(images, int(batch), steps, forced=asked == "sparse")
            if not isinstance(found, str):
                return found, ""
            why = found
        if asked == "sparse" and (self._strict or self._asked == "sparse"):
            raise ValueError(f"compute='sparse' is not possible here: {why}")
        return self._densely, why

    def _options(self, images: Tensor, labels: Tensor, lr: float) -> GpuOptions:
        """The GPU options of a training that begins with this batch: forced, as before, or chosen here."""
        ranks, forced = world_size(), dict(self._forced)
        if ranks > 1:
            # All ranks average one flat gradient.
            if forced.get("gradient_table"):
                raise ValueError("the GPU option gradient_table needs a single rank: leave it out, or set it to off")
            forced["gradient_table"] = False
        if self._options_before is not None:
            return GpuOptions(**(asdict(self._options_before) | forced))
        names = [name for name in asdict(GpuOptions()) if name not in forced]
        if not names or not self._tunes or torch.are_deterministic_algorithms_enabled():
            return GpuOptions(**forced)
        options = GpuOptions()
        if rank() == 0:
            with alone():  # the other ranks take no part in a copy's steps: they wait below
                options = self._choice(images, labels, lr, names, forced, ranks).options
        if ranks == 1:  # nothing to wait for
            return options
        return GpuOptions(*map(bool, of_rank_0(*map(float, asdict(options).values()), device=self.device)))

    def _choice(
        self, images: Tensor, labels: Tensor, lr: float, names: list[str], forced: dict[str, bool], ranks: int
    ) -> Choice:
        """The kept choice of the options `names`, else one by timing steps of a copy on this batch."""
        shapes = {name: list(t.shape) for name, t in self._tensors().items()}
        hyper = {name: self._hyper[name] for name in ("name", "momentum", "nesterov", "clip_grad_norm")}
        question = {
            **machine(self.device),
            "network": hashlib.sha256(json.dumps([type(self.model).__name__, shapes]).encode()).hexdigest()[:16],
            **{"images": list(images.shape), "images_dtype": str(images.dtype)},
            **{"labels": list(labels.shape), "labels_dtype": str(labels.dtype)},
            **{"precision": self.precision, "compile": self._compile, "own_loss": self._loss is not None},
            # Of an optimiser, what decides which passes a step consists of.
            "optimizer": {name: value if isinstance(value, str) else bool(value) for name, value in hyper.items()},
            **{"smoothing": self._smoothing > 0, "ranks": ranks > 1, "forced": forced},
        }
        timer = StepTimer(lambda: _CopiedSteps(self, images, labels, lr))

        def timed() -> Choice:
            with (
                torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(),
                # What a model draws (dropout) must not depend on whether options were timed.
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            ):
                try:
                    return choose(names, forced, timer)
                finally:
                    timer.close()

        return self._choices.get(question, timed)

    def why_not_sparse(self, optimizer: str) -> str:
        """Why this Trainer never computes sparsely under `optimizer`, one of OPTIMIZERS; "" if it may."""
        return self.not_sparse or ("" if optimizer == "sgd" else f"the sparse engine has no {optimizer}")

    def _epoch(
        self,
        train: Batches,
        schedule: ScheduleSpec,
        epoch: int,
        on_batch: Callable[[int], None] | None,
        report: Callable[[int], None] | None,
        ema: EmaSpec | None,
    ) -> tuple[Evaluation, int]:
        self.model.train()
        self._sums.clear()
        # A loader needs no length unless the rate changes from batch to batch.
        steps = 1
        if schedule.varies_within(epoch):
            if not isinstance(train, Sized):
                raise ValueError(
                    "the rate changes from batch to batch (warm-up), so the loader needs a length: __len__"
                )
            steps = len(train)
        rate, compute = None, None
        for step, (images, labels) in enumerate(train):
            if not self._options_known:
                self._use(self._options(images, labels, schedule.lr))
                self._options_known = True
            if compute is None or not compute.takes(images):
                compute = self._begin(images, schedule.epochs * len(train) if isinstance(train, Sized) else inf)
            # Written when it changes only: each write is a launch.
            if rate != (rate := schedule.lr_at(epoch, step / steps)):
                self._lr.fill_(rate)
            self._run(self._train_step, images, labels)
            compute.stepped()
            if ema is not None and self.ema is not None and step % ema.steps == 0:
                compute.push()
                self.ema.update(ema.decay)
                if epoch < schedule.warmup_epochs:
                    self.ema.count = 0
                compute.pull()
            if report is not None:
                report(len(labels))
            if on_batch is not None:
                compute.push()
                on_batch(len(labels))
                compute.pull()
        if compute is not None:
            compute.push()
        broadcast_statistics(self.model)
        return self._result()

    @torch.no_grad()
    def evaluate(self, val: Batches, *, averaged: bool = False) -> Evaluation:
        """(mean loss in nats, top-1 accuracy, top-5 accuracy in [0, 1]) over `val` in eval mode, of all ranks together.

        averaged: of the moving average; ValueError if there is none.
        """
        self.flat.sync()  # a caller may have written weights or masks since
        # Within a training the flat parameters are newer than what a sparse one computes with.
        during, self._compute = self._compute, None
        try:
            with self._averaged(averaged):
                if averaged and self.ema is not None:
                    self.ema.agree()
                return self._evaluate(val)
        finally:
            self._compute = during

    @torch.no_grad()
    def _evaluate(self, val: Batches) -> Evaluation:
        self.model.eval()
        self._sums.clear()
        self._largest = 0
        for images, labels in val:
            self._largest = max(self._largest, len(labels))
            self._run(self._eval_step, images, labels)
        return self._result()[0]

    def described(self) -> str:
        """In words how the training that has begun computes, and why; "" on a GPU and for a dense mask, where there is
        nothing to choose, and where it was asked to compute densely."""
        if self.device.type != "cpu" or (kept := self.pruner.kept) == self.pruner.total:
            return ""
        if self.computed == "sparse":
            return f"computes sparsely: density {kept / self.pruner.total:.3g}"
        return f"computes densely: {self.reason}" if self.reason else ""

    def resumed(self, before: str) -> str:
        """A line for the user on a training that has begun with compute=`before`, as until its checkpoint; "" if it
        goes on so, and as the Trainer's `compute` asks."""
        if self.computed != before:
            why = f" ({self.reason})" if self.reason else ""
            return f"computed {before} until its checkpoint, {self.computed} from here{why}"
        asked = self._dense[self._asked].name if self._asked in self._dense else self._asked
        return "" if asked in ("auto", before) else f"goes on {before}, as until its checkpoint, not {asked}"

    @property
    def recorded_options(self) -> str | None:
        """The GPU options in use as text, for checkpoints and provenance; None on a CPU that was given none."""
        return str(self.gpu_options) if self.device.type == "cuda" or self.gpu_options != GpuOptions() else None

    def resumed_options(self, before: GpuOptions) -> str:
        """A line for the user on a training that has begun with gpu_options=`before`; "" if it goes on with them."""
        if self.gpu_options == before:
            return ""
        return f"used GPU options {before} until its checkpoint, {self.gpu_options} from here"

    def so_far(self) -> Snapshot:
        """The sums of the present epoch up to now, on this rank. Does not wait for the device; reading them does."""
        return self._sums.snapshot()

    def _result(self) -> tuple[Evaluation, int]:
        all_reduce_sum(self._sums.sums)
        return self._sums.result()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        compute = self._now()
        logits = self._checked(compute.logits(images, True), labels)
        if self._fuses(logits, labels):
            scale = self.scaler.scale(self._one)
            compute.backward(logits, self._sums.cross_entropy_gradient(logits, labels, self._smoothing, scale))
        else:
            with self._autocast():
                loss = self._mean_loss(logits, labels, self._smoothing)
            self._sums.add(loss, logits, labels)
            compute.backward(loss)
        if world_size() > 1:
            all_reduce_mean(*compute.gradients())
        compute.step(self._hyper)

    def _eval_step(self, images: Tensor, labels: Tensor) -> None:
        compute = self._now()
        if not compute.takes(images, train=False):  # weights are in the flat parameters: an epoch has ended
            compute = self._densely
        logits = self._checked(compute.logits(images, False), labels)
        # Without label smoothing: validation losses are comparable among runs that smooth differently.
        if self._fuses(logits, labels):
            self._sums.add_cross_entropy(logits, labels)
            return
        with self._autocast():
            loss = self._mean_loss(logits, labels, 0.0)
        self._sums.add(loss, logits, labels, padded=self._pads and labels.dim() == 1)

    def _now(self) -> Compute:
        """How to compute: as the training that runs, else densely."""
        return self._compute or self._densely

    def _checked(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits, once both are known to fit. ValueError if the model returns no logits."""
        if self._classes is None:
            if not isinstance(logits, Tensor) or logits.dim() < 2:
                what = type(logits).__name__ if not isinstance(logits, Tensor) else f"{logits.dim()} dimensions"
                raise ValueError(
                    f"the model returns {what}, expected logits [B, classes, ...]: wrap it in a module that does"
                )
            self._classes = logits.shape[1]
            check_labels(labels, self._classes)
        return logits

    def _fuses(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether the loss and its sums are one kernel: cross-entropy, of one class an image."""
        classes = logits.dim() == 2 and labels.dim() == 1 and logits.shape[1] <= MOST_CLASSES
        wanted = self.gpu_options.fused_loss and self._loss is None and uses_triton(logits)
        return wanted and classes and labels.dtype == torch.int64 and logits.dtype != torch.float64

    def _mean_loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        if self._loss is not None:
            return self._loss(logits, labels)
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def _run(self, step: Step, images: Tensor, labels: Tensor) -> None:
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                self._run_step(step, images, labels)
        except torch.OutOfMemoryError as error:
            # torch's message tells bytes, not which setting to change.
            raise torch.OutOfMemoryError(
                f"out of memory on {self.device} with batches of {' x '.join(map(str, images.shape))} in "
                f"{self.precision}: lower the batch size or the image size"
                + (", or train in bf16" if self.precision == "fp32" else "")
            ) from error

    def _run_step(self, step: Step, images: Tensor, labels: Tensor) -> None:
        if self._classes is not None and not labels.is_cuda:  # on a GPU the check would wait at every step
            check_labels(labels, self._classes)
        images = self._moved(images).contiguous(memory_format=torch.channels_last)
        labels = self._moved(labels)
        training = step == self._train_step
        if not training and self._pads and labels.dim() == 1 and len(labels) < self._largest:
            # A last batch of its own size would be compiled and captured for itself.
            images, labels = padded(images, labels, self._largest)
        if self._pool is None:
            step(images, labels)
            return
        # A graph keeps the Python numbers that it was captured with: another momentum needs another graph. The learning
        # rate is in memory and needs none; an evaluation uses none of them.
        hyper = (self._smoothing, *(value for name, value in self._hyper.items() if name != "lr"))
        # By the step's name: a bound method in a key would keep this Trainer as long as itself.
        key = (training, self.gpu_options, images.shape, images.dtype, labels.shape, hyper if training else None)
        if key not in self._graphed:
            self._graphed[key] = GraphedStep(*self._pool)
        self._graphed[key](step, images, labels)

    def _moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the trainer's device. The host does not wait for the copy."""
        # Pinned, as a copy from pageable memory is not asynchronous.
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, _HALF[self.precision])

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and batch-norm statistics by name, the tensors themselves."""
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _rest(self, buffer: Tensor) -> dict[str, Tensor]:
        """The segments of a buffer of other parameters [m] by name: fresh CPU tensors of the parameters' shapes."""
        shapes = dict(self.model.named_parameters())
        packed = ((s.name, s.view(buffer).to("cpu", copy=True)) for s in self.flat.other_segments)
        return {name: t.view(shapes[name].shape) for name, t in packed}


def _network(model: nn.Module, half_views: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The function from images to logits; with `half_views`, prunable weights are replaced by them."""

    # Not a method of the Trainer, which would then refer to itself: after its last use only Python's garbage collector
    # would free its buffers. That runs seldom, because it counts objects, not bytes.
    def compute(images: Tensor) -> Tensor:
        return functional_call(model, half_views, (images,)) if half_views else model(images)

    return compute


class _CopiedSteps:
    """A Rehearsal: training steps of a copy of `trainer` on one batch, on its device. They write nothing of its own."""

    def __init__(self, trainer: Trainer, images: Tensor, labels: Tensor, lr: float) -> None:
        names = set(trainer.pruner.names)
        self._copy = own = Trainer(
            copy.deepcopy(trainer.model),
            device=trainer.device,
            precision=trainer.precision,
            compile=trainer._compile,
            loss=trainer._loss,
            kinds=trainer._kinds,
            include=lambda name, _: name in names,
            compute=trainer._densely.name,
            gpu_options=GpuOptions(),
            verbose=False,
        )
        own.set_mask(Mask(trainer.flat.mask, trainer.flat.segments))
        own._hyper = {**trainer._hyper, "lr": own._lr}
        own._smoothing = trainer._smoothing
        own.flat.begin(own._hyper["name"])
        own.optimizer.param_groups[0].update(own._hyper)
        # The schedule's peak: a warm-up may begin at 0, with which a step changes nothing.
        own._lr.fill_(lr)
        own.model.train()
        own.save_rewind_point()
        self._start = own.flat.weight.clone(), own.flat.other_params.clone()
        self._batch = images, labels

    def begin(self, options: GpuOptions) -> None:
        own = self._copy
        own._densely.push()
        own.rewind()
        own._sums.clear()
        torch.manual_seed(0)
        own._use(options)
        own._densely.pull()

    def step(self) -> None:
        self._copy._run(self._copy._train_step, *self._batch)
        self._copy._densely.stepped()

    def changes(self) -> list[Tensor]:
        flat = self._copy.flat
        sums = self._copy._sums.sums
        totals = [sums[:1], sums[2:3]]  # of the loss, and of images
        if flat.square is not None and flat.other_square is not None:
            # AdamW's first step has the length of the learning rate, whatever the gradient.
            return [flat.square.sqrt(), flat.other_square.sqrt(), *totals]
        places = zip((flat.weight, flat.other_params), self._start, strict=True)
        return [*(now - start for now, start in places), *totals]

    def close(self) -> None:
        self._copy.close()
