"""Runs a graph: each node once, parents first, the longest chain first, by a crew of warm workers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastprune.crew import Crew, Here, Processes
from fastprune.errors import InputError
from fastprune.graph import Graph
from fastprune.schedule import Queue
from fastprune.specs import Runnable, Train
from fastprune.store import RunStore
from fastprune.store.lease import Holder, Leases
from fastprune.work import WorkConfig

_LOST_LIMIT = 2
"""A node whose worker died this often has failed."""
_SILENT_SECONDS = 600.0
"""A busy worker that says nothing for so long is mentioned."""


class View(Protocol):
    """What is told of the work as it goes. worker: its number; place: where it runs; resting: nodes that a failed one
    leaves undone."""

    def started(self, worker: int, node: Runnable, place: str) -> None: ...
    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None: ...
    def failed(self, worker: int, node: Runnable, reason: str, resting: list[Runnable]) -> None: ...


@dataclass
class Outcome:
    """What became of the nodes that were to do: keys computed here, and by key why a node failed.

    found: keys of nodes that another process published meanwhile. epochs: of the trainings among the done, how many
    were computed here. images: training images seen by all workers. takeovers: by key of whom. not_reached: nodes that
    rest on a failed one. seconds: wall time.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    images: int = 0
    takeovers: dict[str, Holder] = field(default_factory=dict)
    not_reached: int = 0
    seconds: float = 0.0


def execute(
    graph: Graph,
    config: WorkConfig,
    view: View,
    *,
    workers: int = 1,
    devices: list[str] | None = None,
    crew: Crew | None = None,
) -> Outcome:
    """Computes what the store lacks of the graph, on this machine or by the `crew` given (which it closes). A node that
    fails is reported and the others go on.

    InputError (a damaged data file, a full disk) ends the whole run; so does KeyboardInterrupt. Both leave a store that
    the same command continues from.
    """
    began = time.monotonic()
    store = RunStore(config.store)
    queue = Queue(graph, graph.todo(store))
    outcome = Outcome()
    count = min(workers, queue.left)
    with (
        Leases(config.store / "leases") as leases,  # given back when no worker writes any more
        _closing(crew or _crew(graph, config, devices or [config.device], count)) as open_crew,
    ):
        _Run(queue, store, open_crew, leases, view, outcome).run()
    outcome.seconds = time.monotonic() - began
    return outcome


def _crew(graph: Graph, config: WorkConfig, devices: list[str], count: int) -> Crew:
    return Here(graph, config, devices[0]) if count <= 1 else Processes(graph, config, devices, count)


@contextmanager
def _closing(crew: Crew) -> Iterator[Crew]:
    try:
        yield crew
    finally:
        crew.close()


class _Run:
    """One call of execute: hands nodes that can run to workers that are free, and settles what comes back."""

    def __init__(self, queue: Queue, store: RunStore, crew: Crew, leases: Leases, view: View, outcome: Outcome) -> None:
        self.queue, self.store, self.crew, self.leases = queue, store, crew, leases
        self.view, self.outcome = view, outcome
        self.nodes: dict[int, Runnable] = {}
        self.heard: dict[int, float] = {}
        self.lost: dict[str, int] = {}

    def run(self) -> None:
        while self.queue.left:
            self._hand_out()
            self.crew.listen(self._hear)
            self._mention_the_silent()

    def _hand_out(self) -> None:
        for worker in self.crew.free():
            while (node := self.queue.next()) is not None:
                if self._claim(node):
                    self.nodes[worker], self.heard[worker] = node, time.monotonic()
                    self.view.started(worker, node, self.crew.place(worker))
                    self.crew.give(worker, node)
                    break
            else:
                return

    def _claim(self, node: Runnable) -> bool:
        """Whether it is ours to compute: nobody else's at present, and not published meanwhile."""
        store = self.store
        mine, holder = self.leases.acquire(node.key)
        if not mine:
            self.queue.busy(node)
            return False
        if holder is not None:
            self.outcome.takeovers[node.key] = holder
            self.view.note(f"taken over: {self.queue.graph.label(node)}, from {holder}, which is gone")
        store.tidy(node)
        if store.holds(node, self.queue.graph.needed(node)):
            self.leases.release(node.key)
            self.outcome.found.append(node.key)
            self.queue.done(node)
            self.view.finished(None, node, store.node(node)["result"])
            return False
        return True

    def _hear(self, worker: int, kind: str, value: Any) -> None:
        self.leases.tend()
        node = self.nodes.get(worker)
        self.heard[worker] = time.monotonic()
        if node is None:  # a worker died that had nothing to do
            return
        if kind == "progress":
            epoch, images = value
            self.outcome.images += images
            self.view.progress(worker, node, epoch, images)
            return
        del self.nodes[worker]
        if kind == "lost":
            self.lost[node.key] = self.lost.get(node.key, 0) + 1
            if self.lost[node.key] < _LOST_LIMIT:
                self.view.note(f"again: {self.queue.graph.label(node)}, as its worker died ({value})")
                self.leases.release(node.key)
                self.queue.again(node)
                return
            kind, value = "failed", f"its worker died {_LOST_LIMIT} times, last with {value}: out of memory?"
        still_ours = self.leases.release(node.key)
        if kind == "input":
            raise InputError(value)
        if kind == "done":
            self._done(worker, node, *value)
        elif still_ours:
            self._failed(worker, node, value)
        else:  # whoever took it over has cleared away what this worker was writing
            self.queue.busy(node)

    def _done(self, worker: int, node: Runnable, result: dict[str, Any], epochs: int) -> None:
        self.outcome.done.append(node.key)
        if isinstance(node, Train):
            self.outcome.epochs[node.key] = epochs
        self.queue.done(node)
        self.view.finished(worker, node, result)

    def _failed(self, worker: int, node: Runnable, said: str) -> None:
        log = self.store.log(node, said)
        reason = f"{said.strip().splitlines()[-1]} (log: {log})"
        self.outcome.failed[node.key] = reason
        resting = self.queue.fail(node)
        self.outcome.not_reached += len(resting)
        self.view.failed(worker, node, reason, resting)

    def _mention_the_silent(self) -> None:
        for worker, node in self.nodes.items():
            if time.monotonic() - self.heard[worker] > _SILENT_SECONDS:
                self.heard[worker] = time.monotonic()
                label, place = self.queue.graph.label(node), self.crew.place(worker)
                self.view.note(f"no sign of {label} for {_SILENT_SECONDS / 60:.0f} minutes ({place}): does it hang?")
