"""The lines of train.py, as torchvision's reference script prints them."""

import time
from collections.abc import Callable
from datetime import timedelta

from fastprune.specs import ScheduleSpec
from fastprune.step import EpochMetrics


class TrainLog:
    """Prints an epoch: a line now and then while it lasts, and what it gave.

    sums: reads the running (mean loss, accuracy, images) of this process, or None where that would wait for a device:
    then there are no lines within an epoch. Losses in nats, accuracies in percent; in `loss: a (b)`, a is the mean
    since the last line and b that of the epoch. batches, batch_size: of each of `ranks` ranks; images/s are those of
    all together.
    """

    def __init__(
        self,
        batches: int,
        batch_size: int,
        schedule: ScheduleSpec,
        *,
        every: int,
        sums: Callable[[], tuple[float, float, int]] | None,
        epoch: int,
        ranks: int = 1,
    ) -> None:
        self._batches, self._schedule, self._every, self._sums, self._ranks = batches, schedule, every, sums, ranks
        self._images = batches * batch_size * ranks
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._done = epoch, 0
        self._began = self._last = time.perf_counter()
        self._before = (0.0, 0.0, 0)

    def batch(self, images: int) -> None:
        """To be called after each training batch."""
        number, self._done = self._done, self._done + 1
        if self._sums is None or number % self._every:
            return
        now, (loss, accuracy, seen) = time.perf_counter(), self._sums()
        old_loss, old_accuracy, old = self._before
        fresh = seen - old
        recent = (loss * seen - old_loss * old) / fresh, (accuracy * seen - old_accuracy * old) / fresh
        left = (now - self._began) / self._done * (self._batches - self._done)
        rate = fresh * self._ranks / (now - self._last)
        lr = self._schedule.lr_at(self._epoch, number / self._batches)
        self._line(number, left, lr, rate, f"{recent[0]:.4f} ({loss:.4f})", _both(recent[1], accuracy))
        self._last, self._before = now, (loss, accuracy, seen)

    def epoch(self, m: EpochMetrics) -> None:
        """To be called after each epoch."""
        accuracy = f"{100 * m.train_accuracy:.3f}"
        self._line(self._batches, 0.0, m.lr, m.images_per_second, f"{m.train_loss:.4f}", accuracy)
        say(f"Epoch: [{self._epoch}] Total time: {clock(self._images / m.images_per_second)}")
        say_test(m.val_loss, m.val_accuracy)
        self._begin(m.epoch)

    def _line(self, number: int, left: float, lr: float, rate: float, loss: str, accuracy: str) -> None:
        width = len(str(self._batches))
        say(
            f"Epoch: [{self._epoch}]  [{number:{width}d}/{self._batches}]  eta: {clock(left)}  lr: {lr:.6g}  "
            f"img/s: {rate:.1f}  loss: {loss}  acc1: {accuracy}"
        )


def _both(recent: float, mean: float) -> str:
    return f"{100 * recent:.3f} ({100 * mean:.3f})"


def say_test(loss: float, accuracy: float) -> None:
    """The line of an evaluation."""
    say(f"Test:  Acc@1 {100 * accuracy:.3f} loss {loss:.4f}")


def say(text: str) -> None:
    print(text, flush=True)


def clock(seconds: float) -> str:
    """0:01:23"""
    return str(timedelta(seconds=int(seconds)))
