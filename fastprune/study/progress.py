"""The live view of a run: one bar over all training images, one line for each worker."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from tqdm import tqdm

from fastprune.specs import Runnable, Train
from fastprune.study.graph import Cost, Graph

_LINES = 24
"""The most workers that get a line each: more would not fit on a terminal."""

_FIRST_SECONDS = 0.2
"""The time that the first reported images took, roughly: it is not known."""


@dataclass(frozen=True)
class Live:
    """The state of a run. trained, failed, blocked: of its `trainings`. images: training images done, of images_total.
    rate: images per second; None: not known yet. doing: what each busy worker computes, in words. notes: what happened
    so far that a user should know. going: False once it ended before all was done."""

    trainings: int
    trained: int
    failed: int
    blocked: int
    images: int
    images_total: int
    rate: float | None
    doing: tuple[str, ...]
    notes: tuple[str, ...]
    going: bool = True

    @property
    def seconds_left(self) -> float | None:
        return (self.images_total - self.images) / self.rate if self.rate and self.going else None


Watch = Callable[[Callable[[], Live]], None]
"""Called after each event with a function that tells the state of the run."""


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
        self.total = tqdm(
            total=Cost.of(todo).images,
            unit=" images",
            unit_scale=True,
            desc=f"0/{self.trainings} trainings",
            mininterval=0.2 if live else 10.0,
            dynamic_ncols=live,
            disable=not todo,
            smoothing=0,  # the mean rate: workers report in bursts, and an epoch's validation reports nothing
        )
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
        self.watch(self.live)

    def live(self) -> Live:
        """The state of the run now."""
        rate = self.total.format_dict["n"] / self.total.format_dict["elapsed"] if self.total.n else None
        counts = (self.trainings, self.trained, self.failures, self.blocked)
        doing = tuple(text for _, text in sorted(self.doing.items()))
        return Live(*counts, int(self.total.n), int(self.total.total), rate, doing, tuple(self.notes))

    def computes(self, worker: int, node: Runnable, how: str) -> None:
        self.how[node.key] = how
        self._say(worker, f"{self.places[worker]}: {self.graph.label(node)} · {how}")

    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None:
        """worker: None if another process computed the node."""
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
