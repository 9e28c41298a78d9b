"""What runs once a batch, on the device alone: a step captured as one CUDA graph, and the sums of an epoch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], None]
"""A function of a batch (images, labels) that reads and writes memory which stays where it is."""

_EAGER = 3
"""Real batches before the capture: libraries choose their algorithms and allocate what they keep."""


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

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what does not depend on where it was computed, how fast that was); the epoch in both."""
        all = asdict(self)
        times = {name: all.pop(name) for name in ("images_per_second", "seconds")}
        return all, {"epoch": self.epoch, **times}


class GraphedStep:
    """A step for batches of one shape, replayed as one CUDA graph from the fourth batch on.

    Everything that the step mutates must be written in place, by whomever: a graph reads and writes the memory that it
    was captured with. Batches are copied into its own.
    """

    def __init__(self, step: Step, pool: Any, stream: Any) -> None:
        """stream: what the first batches and the capture run on, the same for all that share the pool."""
        self._step, self._pool, self._stream = step, pool, stream
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self._calls += 1
        if self._calls <= _EAGER:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(images, labels)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None or self._batch is None:
            batch, graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            # A loader's own threads may go on calling CUDA.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                self._step(*batch)
            self._batch, self._graph = batch, graph
        else:
            self._batch[0].copy_(images)
            self._batch[1].copy_(labels)
        self._graph.replay()


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless all labels (int64 [B]) lie in [0, classes). Waits for the device."""
    if labels.numel():
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels reach from {low} to {high}, but the network has {classes} classes")


class EpochSums:
    """Sums of loss and hits on the device, so that nothing waits for it before the epoch's end."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """loss times images, hits, images."""

    def clear(self) -> None:
        self.sums.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: mean over the batch, []; logits: [B, classes]; labels: int64 [B]."""
        count = len(labels)
        self.sums[0] += loss.detach() * count
        self.sums[1] += (logits.detach().argmax(1) == labels).sum()
        self.sums[2] += count

    def result(self) -> tuple[float, float, int]:
        """(mean loss, accuracy, images). ValueError if there were none. Waits for the device."""
        loss, hits, images = self.sums.tolist()
        if not images:
            raise ValueError("the loader gave no batch: is the data set smaller than one batch?")
        return loss / images, hits / images, int(images)
