"""The live view of a run: one bar over all training images, one line for each worker."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from tqdm import tqdm

from fastprune.specs import Runnable, Train
from fastprune.study.forecast import Rates, simulate
from fastprune.study.graph import Cost, Graph

_LINES = 24
"""The most workers that get a line each: more would not fit on a terminal."""

_FIRST_SECONDS = 0.2
"""The time that the first reported images took, roughly: it is not known."""


@dataclass(frozen=True)
class Live:
    """The state of a run. trained, failed, blocked: of its `trainings`. images: training images done, of images_total.
    rate: images per second so far, seconds_left: until all is done; None: not known yet. doing: what each busy worker
    computes, in words. notes: what happened so far that a user should know. going: False once it ended before all was
    done."""

    trainings: int
    trained: int
    failed: int
    blocked: int
    images: int
    images_total: int
    rate: float | None
    seconds_left: float | None
    doing: tuple[str, ...]
    notes: tuple[str, ...]
    going: bool = True


Watch = Callable[[Callable[[], Live]], None]
"""Called after each event with a function that tells the state of the run."""


class _Total(tqdm):
    """A bar whose time left is forecast, instead of assuming the mean rate so far."""

    seconds_left: Callable[[], float | None] = staticmethod(lambda: None)

    @property
    def format_dict(self) -> dict[str, Any]:
        left = self.seconds_left()
        return super().format_dict | {"left": "?" if left is None else self.format_interval(left)}


class Bars:
    """A View of tqdm bars on stderr: images/s and time left for the whole run, and what each worker computes.

    If stderr is no terminal, only the bar of the whole run, a line every ten seconds.
    """

    def __init__(
        self,
        graph: Graph,
        todo: list[Runnable],
        workers: int,
        watch: Watch = lambda state: None,
        on_training: Callable[[Train], None] = lambda node: None,
    ) -> None:
        """on_training: called with each training that has been published, here or by another process."""
        self.graph, self.watch, self.on_training = graph, watch, on_training
        self.doing: dict[int, str] = {}
        self.notes: list[str] = []
        live = bool(todo) and sys.stderr.isatty()
        self.trainings = sum(isinstance(n, Train) for n in todo)
        self.trained = self.failures = self.blocked = 0
        self.left = {node.key: node for node in todo}
        self.rates, self.workers = Rates(), workers
        self._ends = self._next_forecast = 0.0
        self.total = _Total(
            total=Cost.of(todo).images,
            unit=" images",
            unit_scale=True,
            desc=f"0/{self.trainings} trainings",
            mininterval=0.2 if live else 10.0,
            dynamic_ncols=live,
            disable=not todo,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}]",
            smoothing=0,  # the mean rate: workers report in bursts, and an epoch's validation reports nothing
        )
        self.total.seconds_left = self.seconds_left
        self.lines = [
            tqdm(total=0, bar_format="  {desc}", dynamic_ncols=True, position=i + 1, leave=False)
            for i in range(min(workers, _LINES) if live else 0)
        ]
        self.images: dict[str, int] = {}
        self.began: dict[str, float] = {}
        self.places: dict[int, str] = {}
        self.how: dict[str, str] = {}

    def started(self, worker: int, node: Runnable, place: str) -> None:
        self.places[worker], self.began[node.key] = place, time.monotonic()
        self.how.pop(node.key, None)  # an earlier attempt's
        self._say(worker, f"{place}: {self.graph.label(node)}")

    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None:
        seen = self.images[node.key] = self.images.get(node.key, 0) + images
        if images and not self.total.n:
            # The clock starts with the first images: the time that workers take to start would lower the rate. tqdm
            # writes no final line end for a bar whose last print is earlier than its start, so both are set.
            self.total.start_t = self.total.last_print_t = time.time() - _FIRST_SECONDS
        self.total.update(images)
        if isinstance(node, Train) and epoch:
            rate = seen / max(time.monotonic() - self.began[node.key], 1e-9)
            about = f"{self.graph.label(node)} · epoch {epoch}/{node.stop} · {rate:,.0f} images/s"
            about += f" · {self.how[node.key]}" if node.key in self.how else ""
            self._say(worker, f"{self.places[worker]}: {about}")
            self.rates.measured(node, rate)
        self.watch(self.live)

    def live(self) -> Live:
        """The state of the run now."""
        rate, left = self._mean_rate(), self.seconds_left()
        counts = (self.trainings, self.trained, self.failures, self.blocked)
        doing = tuple(text for _, text in sorted(self.doing.items()))
        return Live(*counts, int(self.total.n), int(self.total.total), rate, left, doing, tuple(self.notes))

    def _mean_rate(self) -> float | None:
        return self.total.n / max(time.time() - self.total.start_t, 1e-9) if self.total.n else None

    def seconds_left(self) -> float | None:
        """Until all is done, as rates by density that this run measured so far have it; None before the first images.

        A training of a kind that none was measured of has the mean rate.
        """
        if not self.left:
            return 0.0
        if (mean := self._mean_rate()) is None:
            return None
        now = time.monotonic()
        if now >= self._next_forecast:
            seconds = {}
            for key, node in self.left.items():
                rate = (self.rates.of(node) if isinstance(node, Train) else None) or mean / self.workers
                seconds[key] = max(0, Cost.of([node]).images - self.images.get(key, 0)) / rate
            self._ends = now + simulate(self.graph, list(self.left.values()), seconds, self.workers).makespan
            # 1 % of the time at most: a study of all figures has thousands of nodes.
            self._next_forecast = max(now + 1.0, now + 100 * (time.monotonic() - now))
        return max(0.0, self._ends - now)

    def computes(self, worker: int, node: Runnable, how: str) -> None:
        self.how[node.key] = how
        self._say(worker, f"{self.places[worker]}: {self.graph.label(node)} · {how}")

    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None:
        """worker: None if another process computed the node."""
        self.left.pop(node.key, None)
        if worker is not None:
            self._say(worker, "")
        if isinstance(node, Train):
            self.trained += 1
            self._expect_no_more_of([node])  # a resumed or diverged run takes fewer images than planned
            self._count()
            self.on_training(node)
            if result["diverged"]:
                self.note(f"diverged: {self.graph.label(node)}, in epoch {result['epochs']}")
        self.watch(self.live)

    def failed(self, worker: int, node: Runnable, reason: str, blocked: list[Runnable]) -> None:
        self._say(worker, "")
        self.failures += 1
        self.blocked += len(blocked)
        for gone in (node, *blocked):
            self.left.pop(gone.key, None)
        self._expect_no_more_of([node, *blocked])
        self._count()
        self.note(f"failed: {self.graph.label(node)}: {reason}")
        self.watch(self.live)

    def _expect_no_more_of(self, nodes: list[Runnable]) -> None:
        """Takes the images that these nodes will not compute off the bar's total."""
        # A node that was computed twice has been counted twice: the total must not fall below what the bar shows.
        unseen = Cost.of(nodes).images - sum(self.images.get(n.key, 0) for n in nodes)
        self.total.total = max(self.total.n, self.total.total - unseen)

    def _count(self) -> None:
        failures = f", {self.failures} failed" if self.failures else ""
        failures += f", {self.blocked} blocked" if self.blocked else ""
        self.total.set_description(f"{self.trained}/{self.trainings} trainings{failures}", refresh=False)

    def note(self, text: str) -> None:
        """Prints a line above the bars."""
        # Not print: tqdm clears the bars first, and draws them again below the line.
        tqdm.write(text, file=sys.stderr)
        self.notes.append(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for line in self.lines:
            line.close()
        self.total.close()

    def _say(self, worker: int, text: str) -> None:
        """Replaces the text of a worker's line, if it has one."""
        self.doing[worker] = text
        if not text:
            del self.doing[worker]
        if worker < len(self.lines):
            self.lines[worker].set_description_str(text)
