"""Runs a graph: each node once, parents first, the longest chain first, by a crew of warm workers."""

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastprune.errors import InputError
from fastprune.specs import Runnable, Train
from fastprune.store import RunStore
from fastprune.store.lease import Holder, Leases
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph, Queue
from fastprune.study.workers import Crew, Here, Processes

_SILENT_SECONDS = 600.0
"""A busy worker that says nothing for so long is mentioned, and again when others are waited for."""

_WAITING_SECONDS = 30.0
"""How long nodes of other processes are waited for without a word."""


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
    """What breaks on a GPU breaks the process that uses it, which is then replaced: it is never this one."""
    if count <= 1 and devices[0] == "cpu":
        return Here(graph, config, devices[0])
    return Processes(graph, config, devices, max(count, 1))


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
        self.devices: dict[int, str] = {}
        self.heard: dict[int, float] = {}
        self.attempts = Attempts()
        self.elsewhere: dict[str, Holder | None] = {}
        self.waiting_since: float | None = None

    def run(self) -> None:
        while self.queue.left:
            self._hand_out()
            self.crew.listen(self._hear)
            self._mention_the_silent()
            self._mention_others()

    def _hand_out(self) -> None:
        devices = self.crew.devices()
        for worker in self.crew.free():
            device = devices[worker]
            if self.attempts.is_left_out(device, devices):
                continue
            if (node := self._next(device, devices)) is not None:
                self.nodes[worker], self.devices[worker] = node, device
                self.heard[worker] = time.monotonic()
                self.view.started(worker, node, self.crew.place(worker))
                self.crew.give(worker, node)

    def _next(self, device: str, devices: list[str]) -> Runnable | None:
        """A node for a worker on that device, claimed."""
        others: list[Runnable] = []
        while (node := self.queue.next()) is not None:
            if not self.attempts.suits(node.key, device, devices):
                others.append(node)
            elif self._claim(node):
                break
        for other in others:
            self.queue.again(other)
        return node

    def _claim(self, node: Runnable) -> bool:
        """Whether it is ours to compute: nobody else's at present, and not published meanwhile."""
        store = self.store
        mine, holder = self.leases.acquire(node.key)
        if not mine:
            self.elsewhere[node.key] = holder
            self.queue.busy(node)
            return False
        self.elsewhere.pop(node.key, None)
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
            self.attempts.reached(node.key, epoch)
            self.outcome.images += images
            self.view.progress(worker, node, epoch, images)
            return
        del self.nodes[worker]
        if kind == "gone" or (kind == "lost" and self.attempts.died(node.key)):  # the whole machine, or the worker
            self.view.note(f"again: {self.queue.graph.label(node)}, as its worker died ({value})")
            self.leases.release(node.key)
            self.queue.again(node)
            return
        still_ours = self.leases.release(node.key)
        if kind == "input":
            raise InputError(value)
        if kind == "done":
            self.attempts.succeeded(self.devices[worker])
            self._done(worker, node, *value)
        elif not still_ours:  # whoever took it over has cleared away what this worker was writing
            self.queue.busy(node)
        elif kind == "lost":
            reason = f"its worker died again, having come no further ({value}){_guess(value)}"
            self._failed(worker, node, reason, reason)
        elif self.attempts.failed(node.key, self.devices[worker], devices := self.crew.devices()):
            label, device = self.queue.graph.label(node), self.devices[worker]
            self.view.note(f"again elsewhere: {label}, which failed on {device}: {self._logged(node, *value)}")
            if self.attempts.is_left_out(device, devices):
                self.view.note(f"{device} is left out from here on: what it got failed, time after time")
            self.queue.again(node)
        else:
            self._failed(worker, node, *value)

    def _done(self, worker: int, node: Runnable, result: dict[str, Any], epochs: int) -> None:
        self.outcome.done.append(node.key)
        if isinstance(node, Train):
            self.outcome.epochs[node.key] = epochs
        self.queue.done(node)
        self.view.finished(worker, node, result)

    def _failed(self, worker: int, node: Runnable, cause: str, text: str) -> None:
        reason = self.outcome.failed[node.key] = self._logged(node, cause, text)
        resting = self.queue.fail(node)
        self.outcome.not_reached += len(resting)
        self.view.failed(worker, node, reason, resting)

    def _logged(self, node: Runnable, cause: str, text: str) -> str:
        """The cause, and where all that is known was written down."""
        try:
            log = self.store.log(node, f"{self.queue.graph.label(node)}\n{text}")
            return f"{cause} (log: {log})"
        except OSError as error:
            return f"{cause} (no log: {error.strerror})"

    def _mention_the_silent(self) -> None:
        for worker, node in self.nodes.items():
            if time.monotonic() - self.heard[worker] > _SILENT_SECONDS:
                self.heard[worker] = time.monotonic()
                label, place = self.queue.graph.label(node), self.crew.place(worker)
                self.view.note(f"no sign of {label} for {_SILENT_SECONDS / 60:.0f} minutes ({place}): does it hang?")

    def _mention_others(self) -> None:
        """Says for whom this process waits when there is nothing else for it to do."""
        now = time.monotonic()
        busy = [] if self.nodes else [key for key in self.elsewhere if not self.queue.is_settled(key)]
        if not busy:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = now
        elif now - self.waiting_since > _WAITING_SECONDS:
            self.waiting_since = now + _SILENT_SECONDS - _WAITING_SECONDS
            label, holder = self.queue.graph.label(self.queue.graph.by_key[busy[0]]), self.elsewhere[busy[0]]
            more = f", and {len(busy) - 1} more" if len(busy) > 1 else ""
            self.view.note(f"waiting for what others compute: {label} ({holder or 'somebody'}){more}")


def _guess(reason: str) -> str:
    return ": out of memory?" if "code -9" in reason or "memory" in reason.lower() else ""


_DEATHS_LIMIT = 2
"""A node whose workers died this often, without coming any further, has failed."""

_FAILURES_LIMIT = 3
"""A device on which so many nodes in a row failed gets no more."""


class Attempts:
    """Counts of one execution. Nodes by key, devices by name; devices: those of all workers, "" where not known yet."""

    def __init__(self) -> None:
        self._reached: dict[str, int] = {}
        self._reached_before: dict[str, int] = {}
        self._deaths: dict[str, int] = {}
        self._failed_on: dict[str, str] = {}
        self._in_a_row: dict[str, int] = {}

    def reached(self, key: str, epoch: int) -> None:
        self._reached[key] = max(self._reached.get(key, 0), epoch)

    def died(self, key: str) -> bool:
        """Whether a node whose worker died is tried again. Preempted again and again, a run gets done all the same; one
        that needs too much memory does not."""
        reached = self._reached.get(key, 0)
        further = reached > self._reached_before.get(key, 0)
        self._reached_before[key] = reached
        self._deaths[key] = 1 if further else self._deaths.get(key, 0) + 1
        return self._deaths[key] < _DEATHS_LIMIT

    def succeeded(self, device: str) -> None:
        self._in_a_row[device] = 0

    def failed(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node is to be tried on another of the devices. What fails on two is not the devices' fault."""
        if key in self._failed_on:
            self._in_a_row[self._failed_on[key]] = self._in_a_row[device] = 0
            return False
        self._in_a_row[device] = self._in_a_row.get(device, 0) + 1
        self._failed_on[key] = device
        return self._others_work(device, devices)

    def suits(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node may be given to the device: it did not fail there, unless there is no other."""
        return self._failed_on.get(key) != device or not self._others_work(device, devices)

    def is_left_out(self, device: str, devices: Collection[str]) -> bool:
        return self._in_a_row.get(device, 0) >= _FAILURES_LIMIT and self._others_work(device, devices)

    def _others_work(self, device: str, devices: Collection[str]) -> bool:
        return any(d not in (device, "") and self._in_a_row.get(d, 0) < _FAILURES_LIMIT for d in devices)
