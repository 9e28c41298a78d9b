"""The training loop: one warm Trainer runs dense and masked trainings one after another, all in place."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.flat import FlatParams
from fastprune.masks import Mask, masks_of
from fastprune.optim import FlatSGD
from fastprune.specs import PRECISIONS, OptimizerSpec, ScheduleSpec

Batches = Iterable[tuple[Tensor, Tensor]]
"""(images [B, 3, H, W], labels int64 [B]); `set_epoch(epoch)`, if it has one, is called before each training epoch."""


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch gave: mean losses in nats, accuracies (top-1) in [0, 1], the rate at the epoch's start.

    epoch counts from 1. images_per_second is of training alone.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """A training loss that is no finite number, or weights that give NaN afterwards."""
        return not math.isfinite(self.train_loss) or math.isnan(self.val_loss)

    as_dict = asdict


class Trainer:
    """Trains `model` in channels-last, its parameters flat.

    Masks that the model carries hold from the start.
    precision: "fp32", "bf16" (autocast) or "fp16" (autocast and a gradient scaler). The model is moved to `device`, and
    its parameters are replaced by views of flat buffers.
    """

    def __init__(self, model: nn.Module, *, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        self.device = torch.device(device)
        self.precision = precision
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        carried = masks_of(self.model)
        self.flat = FlatParams(self.model)
        self.flat.set_mask(carried.keep)
        self.optimizer = FlatSGD(self.flat, lr=0.0)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def state(self) -> dict[str, Tensor]:
        """All that a run continues from, as fresh CPU tensors: weights and batch-norm statistics ("model.NAME") and
        momentum ("momentum.NAME"), each of logical shape, and the gradient scaler where there is one."""
        state = {f"model.{k}": v.detach().to("cpu", copy=True).contiguous() for k, v in self._tensors().items()}
        momentum = self.flat.packed(self.flat.momentum) | self._rest(self.flat.rest_momentum)
        state |= {f"momentum.{k}": v for k, v in momentum.items()}
        for name, value in self.scaler.state_dict().items():
            state[f"scaler.{name}"] = torch.tensor(value, dtype=torch.float64)
        return state

    def load_state(self, state: dict[str, Tensor], *, momentum: bool = True) -> None:
        """Restores, in place, weights and batch-norm statistics, and momentum if it is there and wanted (else zero).

        The mask becomes dense. ValueError if tensors are missing or have other shapes.
        """
        for name, tensor in self._tensors().items():
            if f"model.{name}" not in state or state[f"model.{name}"].shape != tensor.shape:
                raise ValueError(f"the state has no {name} of shape {tuple(tensor.shape)}")
            tensor.detach().copy_(state[f"model.{name}"])
        self.flat.momentum.zero_()
        self.flat.rest_momentum.zero_()
        if momentum:
            for s in self.flat.segments:
                if f"momentum.{s.name}" in state:
                    s.view(self.flat.momentum).copy_(state[f"momentum.{s.name}"])
            for s in self.flat.rest_segments:
                if f"momentum.{s.name}" in state:
                    s.view(self.flat.rest_momentum).copy_(state[f"momentum.{s.name}"].flatten())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        scaler = self.scaler.state_dict()
        if momentum and all(f"scaler.{name}" in state for name in scaler):
            self.scaler.load_state_dict({k: type(v)(state[f"scaler.{k}"].item()) for k, v in scaler.items()})
        for s in self.flat.segments:
            self.flat.mask[s.span] = True

    def set_mask(self, mask: Mask | None) -> None:
        """Writes the mask (None: dense) in place and zeroes what it prunes; a graph that was captured stays valid."""
        if mask is None:
            mask = Mask.dense(self.flat.segments)
        if mask.segments != self.flat.segments:
            raise ValueError("the mask belongs to a model with other layers")
        self.flat.set_mask(mask.keep)

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
        epoch gave. Stops after an epoch whose loss is not finite. Returns the metrics of the epochs trained.
        """
        self.flat.check_aliased()
        self.optimizer.param_groups[0].update(
            momentum=optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
        )
        history = []
        for epoch in range(start, schedule.epochs if stop is None else stop):
            began = time.perf_counter()
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            loss, accuracy, count = self._epoch(train, schedule, epoch, optimizer.label_smoothing, on_batch)
            rate = count / (time.perf_counter() - began)
            val_loss, val_accuracy = self.evaluate(val)
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
        self,
        train: Batches,
        schedule: ScheduleSpec,
        epoch: int,
        label_smoothing: float,
        on_batch: Callable[[int], None] | None,
    ) -> tuple[float, float, int]:
        self.model.train()
        steps = len(train) if schedule.warmup_epochs > epoch else 1  # type: ignore[arg-type]
        tally = _Tally(self.device)
        for step, (images, labels) in enumerate(train):
            images, labels = self._to_device(images), labels.to(self.device, non_blocking=True)
            self.optimizer.param_groups[0]["lr"] = schedule.lr_at(epoch, step / steps)
            self.optimizer.zero_grad()
            with self._autocast():
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            tally.add(loss, logits, labels)
            if on_batch is not None:
                on_batch(len(labels))
        return tally.result()

    @torch.no_grad()
    def evaluate(self, val: Batches) -> tuple[float, float]:
        """(mean loss, top-1 accuracy) over `val`, with batch norm's running statistics."""
        self.model.eval()
        tally = _Tally(self.device)
        for images, labels in val:
            images, labels = self._to_device(images), labels.to(self.device, non_blocking=True)
            with self._autocast():
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels)
            tally.add(loss, logits, labels)
        return tally.result()[:2]

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=torch.channels_last, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    def _rest(self, buffer: Tensor) -> dict[str, Tensor]:
        shapes = dict(self.model.named_parameters())
        packed = ((s.name, s.view(buffer).to("cpu", copy=True)) for s in self.flat.rest_segments)
        return {name: t.view(shapes[name].shape) for name, t in packed}


class _Tally:
    """Sums loss and hits on the device, so that nothing waits for it before the epoch's end."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += loss.detach() * len(labels)
        self.hits += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)

    def result(self) -> tuple[float, float, int]:
        if not self.images:
            raise ValueError("the loader gave no batch: is the data set smaller than one batch?")
        return self.loss.item() / self.images, self.hits.item() / self.images, self.images
