"""Work per batch that never waits for the device: a step replayed as a CUDA graph, and the sums of an epoch."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.kernels import cross_entropy_
from fastprune.kernels.cross_entropy import IGNORED

Step = Callable[[Tensor, Tensor], None]
"""step(images, labels). All other memory that it reads or writes must keep its address, so that it can be captured."""

# Libraries choose algorithms and allocate workspaces in their first calls, which a capture does not allow. Three calls
# as in torch's documentation, but on real batches, so that none is wasted.
_EAGER = 3
"""Batches that a GraphedStep runs eagerly before it captures."""


class Evaluation(NamedTuple):
    """loss: mean, in nats. accuracy: top-1, in [0, 1]. accuracy5: top-5 (of fewer classes, top-all), None per pixel."""

    loss: float
    accuracy: float
    accuracy5: float | None


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of one epoch.

    epoch: from 1. lr: learning rate at the start of the epoch. Losses: means in nats. Accuracies: top-1, in [0, 1].
    images_per_second: of training, without validation. seconds: of both. train_accuracy5, val_accuracy5: top-5, None
    for labels per pixel. ema_loss, ema_accuracy, ema_accuracy5: validation of the moving average, if there is one.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float
    seconds: float
    train_accuracy5: float | None = None
    val_accuracy5: float | None = None
    ema_loss: float | None = None
    ema_accuracy: float | None = None
    ema_accuracy5: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the training loss is not finite, or the validation loss is NaN."""
        return not math.isfinite(self.train_loss) or math.isnan(self.val_loss)

    as_dict = asdict

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(results, speed): the metrics that do not depend on where they were computed, and the others; the epoch is in
        both. Without those that have a default: the store's columns are the same in all versions."""
        names = [f.name for f in fields(self) if f.default is MISSING]
        all = {name: getattr(self, name) for name in names}
        times = {name: all.pop(name) for name in ("images_per_second", "seconds")}
        return all, {"epoch": self.epoch, **times}


@contextmanager
def capturing(graph: Any, pool: Any = None, stream: Any = None, mend: str = "") -> Iterator[None]:
    """Captures what is launched within it into `graph`; afterwards the current stream is the one of before.

    pool: a torch.cuda.graph_pool_handle(), by default a new one. If the capture fails, the first error is raised, with
    `mend` as a note: what the user can do. Later captures are possible then, too.
    """
    # An unreachable trainer's memory is freed before, not by chance during the capture, where freeing is an error.
    gc.collect()
    before, first = torch.cuda.current_stream(), None
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    collecting = gc.isenabled()
    gc.disable()
    try:
        # thread_local: a loader's threads go on calling CUDA during the capture, which a global capture forbids.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            try:
                yield
            except BaseException as error:
                first = error
                raise
    except BaseException as error:
        # torch ends the capture on leaving; where that fails, as it does after an error within, its own error hides
        # the first, and its stream stays the current one.
        torch.cuda.set_stream(before)
        _abandon(graph, pool)
        cause = first or error
        if mend:
            cause.add_note(mend)
        raise cause from None
    finally:
        if collecting:
            gc.enable()


def _abandon(graph: Any, pool: Any) -> None:
    """Takes a capture that failed out of torch's allocator.

    Where torch 2.11 cannot end a capture, its allocator goes on as if it were under way. All later captures of the
    process would fail: each begins by emptying the cache, which is forbidden then. Torch 2.15 does the same in `reset`.
    """
    graph.reset()
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it was ended, and the graph has released the pool or never had it
    torch._C._cuda_releasePool(device, pool)


class GraphedStep:
    """A step for batches of one shape, replayed as one CUDA graph from the fourth batch on.

    The graph reads and writes the memory that it was captured with: what the step uses must always be written in place,
    by the step and by other code. Batches may lie anywhere; they are copied into the graph's own memory.
    """

    def __init__(self, pool: Any, stream: Any) -> None:
        """pool: a torch.cuda.graph_pool_handle(). stream: for the first batches and the capture, the same for all
        steps that share the pool."""
        self._pool, self._stream = pool, stream
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, step: Step, images: Tensor, labels: Tensor) -> None:
        """step: the same in each call. It is not kept: a method of a Trainer that keeps this would keep the Trainer."""
        self._calls += 1
        if self._calls <= _EAGER:
            # On the stream of the capture, so that what libraries allocate for a stream exists when the capture begins.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream), _searching():
                step(images, labels)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None or self._batch is None:
            batch, graph = (images.clone(), labels.clone()), torch.cuda.CUDAGraph()
            with capturing(graph, self._pool, self._stream, "Trainer(graph=False) runs without CUDA graphs"):
                step(*batch)
            # A capture records and computes nothing: the batch that was cloned above is computed by the replay below.
            self._batch, self._graph = batch, graph
        else:
            self._batch[0].copy_(images)
            self._batch[1].copy_(labels)
        self._graph.replay()


@contextmanager
def _searching() -> Iterator[None]:
    """Within it cuDNN times its algorithms for each conv that is new to it, and remembers the fastest for the capture.
    Not where the user asked for deterministic algorithms: which is fastest differs between runs."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def padded(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A batch of `size` from a smaller one: further images are zero, and their labels IGNORED.

    images: [B, C, H, W], whose memory format stays. labels: int64 [B].
    """
    more = size - len(labels)
    return F.pad(images, (*[0] * 7, more)), F.pad(labels, (0, more), value=IGNORED)


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless all labels (int64) are in [0, classes); probabilities pass. Per pixel, -100 is no label. Waits
    for the device."""
    # Without this check the loss fails in a device-side assertion, after which the process cannot use its GPU.
    if labels.dim() > 1 and not labels.is_floating_point():
        labels = labels[labels != IGNORED]
    if labels.numel() and not labels.is_floating_point():
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels reach from {low} to {high}, but the network has {classes} classes")


class EpochSums:
    """Running sums of loss, correct predictions and images on the device; the host waits only in `result`."""

    def __init__(self, device: torch.device) -> None:
        # float64, because float32 counts no further than 2^24 images. One tensor, so that one all_reduce is enough.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        """float64 [4]: loss x images, images whose class is predicted, images, those whose class is among the first 5
        (NaN for labels per pixel)."""
        self._arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def clear(self) -> None:
        """Sets the sums to zero, in place."""
        self.sums.zero_()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, *, padded: bool = False) -> None:
        """Adds a batch. loss: its mean, []. logits: [B, classes, ...]. labels: int64 [B, ...], or floats as the logits.

        Of labels per pixel an image counts with the fraction of its pixels that is right. padded: images whose label is
        IGNORED do not count, of labels int64 [B].
        """
        count: int | Tensor = (labels != IGNORED).sum() if padded else len(labels)
        if labels.is_floating_point():  # probabilities: the most likely class is the right one
            labels = labels.argmax(1)
        hits = logits.detach().argmax(1) == labels
        self.sums[0] += loss.detach() * count
        if labels.dim() == 1:
            first5 = ranks(logits.detach(), labels.clamp(min=0) if padded else labels) < 5
            self.sums[1] += hits.sum()
            self.sums[3] += (first5 & (labels != IGNORED) if padded else first5).sum()
        else:
            known = (labels != IGNORED).flatten(1).sum(1)
            self.sums[1] += (hits.flatten(1).sum(1) / known.clamp(min=1)).sum()
            self.sums[3] = math.nan
        self.sums[2] += count

    def add_cross_entropy(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> None:
        """Adds a batch by the loss that cross-entropy is, in one launch. Labels that are IGNORED do not count.

        logits: [B, classes]. labels: int64 [B].
        """
        cross_entropy_(self.sums, self._arrived, _rows(logits), labels, smoothing=smoothing)

    def cross_entropy_gradient(self, logits: Tensor, labels: Tensor, smoothing: float, scale: Tensor) -> Tensor:
        """As `add_cross_entropy`, and the gradient of the mean loss by the logits, times `scale` (float32 [])."""
        rows = _rows(logits)
        gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        cross_entropy_(self.sums, self._arrived, rows, labels, smoothing=smoothing, gradient=gradient, scale=scale)
        return gradient

    def snapshot(self) -> "Snapshot":
        """The sums of now, on their way to the host, which does not wait for them."""
        return Snapshot(self.sums)

    def result(self) -> tuple[Evaluation, int]:
        """(means, images). Waits for the device. ValueError if no batch was added."""
        return self.snapshot().result()


class Snapshot:
    """A copy of an EpochSums' sums. On a GPU it is made when the device comes to it."""

    def __init__(self, sums: Tensor) -> None:
        # Pinned, as a copy to pageable memory is not asynchronous.
        self._sums = torch.empty_like(sums, device="cpu", pin_memory=sums.is_cuda)
        self._sums.copy_(sums, non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if sums.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def is_ready(self) -> bool:
        """Whether `result` would not wait."""
        return self._copied is None or self._copied.query()

    def result(self) -> tuple[Evaluation, int]:
        """(means, images). Waits for the device. ValueError if no batch was added."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, hits, images, hits5 = self._sums.tolist()
        if not images:
            raise ValueError("the loader gave no batch: is the data set smaller than one batch?")
        top5 = None if math.isnan(hits5) else hits5 / images
        return Evaluation(loss / images, hits / images, top5), int(images)


def _rows(logits: Tensor) -> Tensor:
    return logits.detach() if logits.stride(1) == 1 else logits.detach().contiguous()


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes are predicted before the label's, int64 [B]: of equal logits the first class goes first.

    logits: [B, classes]. A NaN goes before all numbers.
    """
    # Not topk, whose sort takes longer than these passes, and whose ties are any.
    own, position = logits.gather(1, labels[:, None]), torch.arange(logits.shape[1], device=logits.device)
    return (~(logits <= own) | ((logits == own) & (position < labels[:, None]))).sum(1)
