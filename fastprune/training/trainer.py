"""The training loop: one warm Trainer runs dense and masked trainings one after another, all in place."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastprune.pruning.allocation import prune
from fastprune.pruning.masks import Mask, masks_of, share_masks, unshare_masks
from fastprune.specs import PRECISIONS, OptimizerSpec, ScheduleSpec
from fastprune.training.distributed import all_reduce_mean, all_reduce_sum, broadcast_statistics
from fastprune.training.flat import FlatParams
from fastprune.training.optim import FlatSGD
from fastprune.training.step import EpochMetrics, EpochSums, GraphedStep, Step, check_labels

_HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images [B, 3, H, W], labels int64 [B]); `set_epoch(epoch)`, if it has one, is called before each training epoch."""


class Trainer:
    """Trains `model` in channels-last, its parameters flat.

    Masks that the model carries hold from the start. One Trainer serves any number of trainings: masks, weights and
    learning rates are written in place, so nothing is compiled or captured twice for batches of the same shape.

    precision: "fp32", "bf16" (autocast) or "fp16" (autocast and a gradient scaler); with the last two, convs read the
    copy of the weights that the optimiser's own pass writes. The model is moved to `device`, and its parameters are
    replaced by views of flat buffers. compile: torch.compile for the network, by default on a GPU only. graph: the
    whole step as one CUDA graph, by default on a GPU. Under torch.distributed, gradients are averaged over all ranks,
    each of which brings its own batches; batch-norm statistics are each rank's own while an epoch lasts, then the
    first's.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        compile: bool | str | None = None,
        graph: bool | None = None,
    ) -> None:
        """compile may name a backend of torch.compile. ValueError for a model without convs."""
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.precision = precision
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        carried = masks_of(self.model)
        if not carried.segments:
            raise ValueError(f"{type(model).__name__} has no conv layer: there is nothing to prune")
        self.flat = FlatParams(self.model, half_precision=_HALF[precision])
        self.flat.set_mask(carried.keep)
        share_masks(self.model, self.flat.segments, self.flat.mask)
        self._lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer = FlatSGD(self.flat, lr=self._lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._fresh_scaler = self.scaler.state_dict()
        compile = on_gpu if compile is None else compile
        half = _HALF[precision]
        self.images = half if on_gpu and half is not None else torch.float32
        """The dtype in which batches are best made: the network's first conv would cast them to it anyway."""
        self._network = _network(self.model, self.flat.half_views)
        if compile:
            backend = compile if isinstance(compile, str) else "inductor"
            # torch counts all Trainers of a process together, and past its limit runs uncompiled.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, 256)
            self._network = torch.compile(self._network, dynamic=False, backend=backend)
        self._graphed: dict[tuple[Any, ...], GraphedStep] = {}
        self._pool = (
            (torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)) if on_gpu and graph is not False else None
        )
        self._sums = EpochSums(self.device)
        self._smoothing = 0.0
        self._classes: int | None = None  # known after the first batch
        self._marked: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """All that a run continues from, as fresh CPU tensors: weights and batch-norm statistics ("model.NAME") and
        momentum ("momentum.NAME"), each of logical shape, and the gradient scaler where there is one."""
        state = {f"model.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in self._tensors().items()}
        momentum = self.flat.packed(self.flat.momentum) | self._rest(self.flat.other_momentum)
        state |= {f"momentum.{k}": v for k, v in momentum.items()}
        for name, value in self.scaler.state_dict().items():
            state[f"scaler.{name}"] = torch.tensor(value, dtype=torch.float64)
        return state

    def load_state(self, state: dict[str, Tensor], *, momentum: bool = True) -> None:
        """Restores, in place, weights and batch-norm statistics, and momentum if it is there and wanted (else zero).

        The mask becomes dense. ValueError if tensors are missing or have other shapes.
        """
        tensors = self._tensors()
        for name, tensor in tensors.items():
            if f"model.{name}" not in state or state[f"model.{name}"].shape != tensor.shape:
                raise ValueError(f"the state has no {name} of shape {tuple(tensor.shape)}")
        for name, tensor in tensors.items():
            tensor.detach().copy_(state[f"model.{name}"])
        self.flat.momentum.zero_()
        self.flat.other_momentum.zero_()
        if momentum:
            for s in self.flat.segments:
                if f"momentum.{s.name}" in state:
                    s.view(self.flat.momentum).copy_(state[f"momentum.{s.name}"])
            for s in self.flat.other_segments:
                if f"momentum.{s.name}" in state:
                    s.view(self.flat.other_momentum).copy_(state[f"momentum.{s.name}"].flatten())
        scaler = dict(self._fresh_scaler)
        if momentum and all(f"scaler.{name}" in state for name in scaler):
            scaler = {k: type(v)(state[f"scaler.{k}"].item()) for k, v in scaler.items()}
        if scaler:
            self.scaler.load_state_dict(scaler)  # in place, as a captured step needs it
        for s in self.flat.segments:
            self.flat.mask[s.span] = True
        self.flat.sync()

    def set_mask(self, mask: Mask | None) -> None:
        """Writes the mask (None: dense) in place and zeroes what it prunes; a graph that was captured stays valid."""
        if mask is None:
            mask = Mask.dense(self.flat.segments)
        if mask.segments != self.flat.segments:
            raise ValueError("the mask belongs to a model with other layers")
        self.flat.set_mask(mask.keep)

    def close(self) -> None:
        """Gives back the memory of captured steps, and the model to whoever trains it otherwise from now on.

        Must come before a process group is destroyed: it waits for graphs that captured its collectives.
        """
        self._graphed.clear()
        unshare_masks(self.model)

    def preview_prune(self, fraction: float) -> Mask:
        """The mask that `prune` would leave; nothing is changed."""
        return prune(self.flat.weight.abs(), Mask(self.flat.mask, self.flat.segments), fraction)

    def prune(self, fraction: float) -> Mask:
        """Prunes round(fraction x remaining) weights of the lowest magnitude over all layers, in place."""
        new = self.preview_prune(fraction)
        self.flat.set_mask(new.keep)
        return new

    @torch.no_grad()
    def save_rewind_point(self) -> None:
        """Keeps weights and batch-norm statistics as they are now, on the device, for `rewind`."""
        self.flat.save_rewind_point()
        self._marked = {name: b.clone() for name, b in self.model.named_buffers() if b.dtype != torch.bool}

    @torch.no_grad()
    def rewind(self) -> None:
        """Weights and statistics as at the last `save_rewind_point`, under the present mask; momentum zero."""
        self.flat.rewind()
        for name, buffer in self.model.named_buffers():
            if name in self._marked:
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
    ) -> list[EpochMetrics]:
        """Trains epochs start + 1 to stop (default: the schedule's end) from the present state and mask.

        The batch size is the loader's. on_batch gets the number of images of each training batch, on_epoch what each
        epoch gave. Stops after an epoch whose loss is not finite. Returns the metrics of the epochs trained. ValueError
        for labels outside the network's classes (of batches on a GPU, only the first is looked at).
        """
        self.flat.check_aliased()
        self.flat.sync()  # whoever wrote weights since
        self._smoothing = optimizer.label_smoothing
        self.optimizer.param_groups[0].update(
            momentum=optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
        )
        history = []
        for epoch in range(start, schedule.epochs if stop is None else stop):
            began = time.perf_counter()
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            loss, accuracy, count = self._epoch(train, schedule, epoch, on_batch)
            rate = count / (time.perf_counter() - began)
            val_loss, val_accuracy = self._evaluate(val)
            seconds = time.perf_counter() - began
            metrics = EpochMetrics(
                epoch + 1, schedule.lr_at(epoch), loss, accuracy, val_loss, val_accuracy, rate, seconds
            )
            history.append(metrics)
            if on_epoch is not None:
                on_epoch(metrics)
            if metrics.diverged:
                break
        self.flat.check_aliased()
        return history

    def _epoch(
        self, train: Batches, schedule: ScheduleSpec, epoch: int, on_batch: Callable[[int], None] | None
    ) -> tuple[float, float, int]:
        self.model.train()
        self._sums.clear()
        steps = len(train) if schedule.varies_within(epoch) else 1  # type: ignore[arg-type]
        rate = None
        for step, (images, labels) in enumerate(train):
            if rate != (rate := schedule.lr_at(epoch, step / steps)):
                self._lr.fill_(rate)
            self._run(self._train_step, images, labels)
            if on_batch is not None:
                on_batch(len(labels))
        broadcast_statistics(self.model)
        return self._result()

    @torch.no_grad()
    def evaluate(self, val: Batches) -> tuple[float, float]:
        """(mean loss, top-1 accuracy) over `val`, with batch norm's running statistics."""
        self.flat.sync()  # whoever wrote weights since
        return self._evaluate(val)

    @torch.no_grad()
    def _evaluate(self, val: Batches) -> tuple[float, float]:
        self.model.eval()
        self._sums.clear()
        for images, labels in val:
            self._run(self._eval_step, images, labels)
        return self._result()[:2]

    def so_far(self) -> tuple[float, float, int]:
        """(mean loss, accuracy, images) of the epoch that runs, on this rank; waits for the device."""
        return self._sums.result()

    def _result(self) -> tuple[float, float, int]:
        all_reduce_sum(self._sums.sums)
        return self._sums.result()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self._logits(images, labels)
            loss = F.cross_entropy(logits, labels, label_smoothing=self._smoothing)
        self.flat.backward(self.scaler.scale(loss))
        all_reduce_mean(self.flat.grad, self.flat.other_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._sums.add(loss, logits, labels)

    def _eval_step(self, images: Tensor, labels: Tensor) -> None:
        with self._autocast():
            logits = self._logits(images, labels)
            loss = F.cross_entropy(logits, labels)
        self._sums.add(loss, logits, labels)

    def _logits(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._network(images)
        if self._classes is None:
            self._classes = logits.shape[1]
            check_labels(labels, self._classes)
        return logits

    def _run(self, step: Step, images: Tensor, labels: Tensor) -> None:
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                self._run_step(step, images, labels)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"out of memory on {self.device} with batches of {' x '.join(map(str, images.shape))} in "
                f"{self.precision}: lower the batch size or the image size"
                + (", or train in bf16" if self.precision == "fp32" else "")
            ) from error

    def _run_step(self, step: Step, images: Tensor, labels: Tensor) -> None:
        if self._classes is not None and not labels.is_cuda:  # on a GPU the check would wait for it
            check_labels(labels, self._classes)
        images = self._moved(images).contiguous(memory_format=torch.channels_last)
        labels = self._moved(labels)
        if self._pool is None:
            step(images, labels)
            return
        group = self.optimizer.param_groups[0]
        hyper = (self._smoothing, *(group[name] for name in ("momentum", "weight_decay", "nesterov")))
        key = (step, images.shape, images.dtype, hyper if step == self._train_step else None)
        if key not in self._graphed:
            self._graphed[key] = GraphedStep(step, *self._pool)
        self._graphed[key](images, labels)

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device; nothing waits for the copy."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        half = _HALF[self.precision]
        return nullcontext() if half is None else torch.autocast(self.device.type, half)

    def _tensors(self) -> dict[str, Tensor]:
        buffers = {name: b for name, b in self.model.named_buffers() if b.dtype != torch.bool}  # masks are no state
        return dict(self.model.named_parameters()) | buffers

    def _rest(self, buffer: Tensor) -> dict[str, Tensor]:
        shapes = dict(self.model.named_parameters())
        packed = ((s.name, s.view(buffer).to("cpu", copy=True)) for s in self.flat.other_segments)
        return {name: t.view(shapes[name].shape) for name, t in packed}


def _network(model: nn.Module, half_views: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Images to logits; convs read the low-precision copy where there is one.

    No method of the Trainer, which would then refer to itself and, after its last use, keep its buffers until the
    garbage collector comes by: that is seldom, for it counts objects, not bytes.
    """

    def compute(images: Tensor) -> Tensor:
        return functional_call(model, half_views, (images,)) if half_views else model(images)

    return compute
