"""Runs a graph: each node once, parents first, the longest chain first, by workers that give futures."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from fastprune.errors import InputError
from fastprune.specs import Runnable, Train
from fastprune.store import RunStore
from fastprune.store.lease import Holder, Leases
from fastprune.study.graph import Graph, Schedule
from fastprune.study.workers import Answer, BadInput, Done, Failed, Lost, Worker, cannot_write

_TICK = 0.2
"""Seconds between two looks at the workers when no future is done."""

_LOOK_AGAIN = 1.0, 10.0
"""After how many seconds a node that another process computes is looked at again: at first, and at last."""

_SILENT_SECONDS = 600.0
"""A busy worker that reports nothing for so long is mentioned, and again when other processes are waited for."""

_WAITING_SECONDS = 30.0
"""How long nodes of other processes are waited for without a word."""

_FAILURES_LIMIT = 3
"""So many failures in a row on a device end its workers."""


class View(Protocol):
    """What is told of the run as it goes. worker: its number; place: where it runs; blocked: nodes that depend on a
    failed one."""

    def started(self, worker: int, node: Runnable, place: str) -> None: ...
    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None: ...
    def failed(self, worker: int, node: Runnable, reason: str, blocked: list[Runnable]) -> None: ...


@dataclass
class Outcome:
    """What became of the nodes that were missing: keys computed here, and by key why a node failed.

    found: keys of nodes that another process published meanwhile. epochs: of the trainings among the done, how many
    were computed here. images: training images seen by all workers. blocked: how many nodes depend on a failed one.
    seconds: wall time.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    images: int = 0
    blocked: int = 0
    seconds: float = 0.0


def run(graph: Graph, store: RunStore, workers: Sequence[Worker], view: View) -> Outcome:
    """Computes what the store lacks of the graph. A node that fails is tried once more, then reported, and the others
    go on.

    InputError (a corrupt file, a full disk) ends the run; so does KeyboardInterrupt. After both, the same call goes on.
    """
    began = time.monotonic()
    with Leases(store.root / "leases") as leases:
        loop = _Loop(graph, store, workers, leases, view)
        try:
            loop.run()
        finally:
            for worker in workers:  # no worker writes any more when the leases are given back
                worker.close()
    loop.outcome.seconds = time.monotonic() - began
    return loop.outcome


@dataclass
class _Task:
    """A node that a worker computes. heard: when it last reported; epoch, images: what."""

    worker: int
    node: Runnable
    device: str
    heard: float
    epoch: int = 0
    images: int = 0


class _Loop:
    def __init__(self, graph: Graph, store: RunStore, workers: Sequence[Worker], leases: Leases, view: View) -> None:
        self.graph, self.store, self.workers, self.leases, self.view = graph, store, workers, leases, view
        self.outcome, self.retries = Outcome(), Retries()
        self.schedule = Schedule(graph, graph.todo(store))
        self.running: dict[Future[Any], _Task] = {}
        self.elsewhere: dict[str, _Elsewhere] = {}
        self.waiting_since: float | None = None

    def run(self) -> None:
        while True:
            self._hand_out()
            if not self.running and not self.schedule.ready():
                return
            self._listen()
            self._mention_the_silent()
            self._mention_others()

    def _hand_out(self) -> None:
        busy = {task.worker for task in self.running.values()}
        for number, worker in enumerate(self.workers):
            device = worker.device
            if number in busy or not device or self.retries.has_ended(device, self._devices()):
                continue
            if (node := self._claim_next(device)) is not None:
                self.view.started(number, node, worker.place)
                task = _Task(number, node, device, time.monotonic())
                self.running[worker.submit(node.key, partial(self._report, task))] = task

    def _devices(self) -> set[str]:
        return {worker.device for worker in self.workers} - {""}

    def _claim_next(self, device: str) -> Runnable | None:
        """The ready node with the longest chain that may run on the device, and that no other process computes."""
        while (node := self._next(device)) is not None:
            if self._claim(node):
                return node
        return None

    def _next(self, device: str) -> Runnable | None:
        now, devices = time.monotonic(), self._devices()
        for node in self.schedule.ready():
            is_due = node.key not in self.elsewhere or self.elsewhere[node.key].look_at <= now
            if is_due and self.retries.may_run(node.key, device, devices):
                return node
        return None

    def _claim(self, node: Runnable) -> bool:
        """Whether it is ours to compute: no other process does, or has published it meanwhile."""
        try:
            mine, holder = self.leases.acquire(node.key)
        except OSError as error:
            raise InputError(cannot_write(error, self.store.root)) from error
        if not mine:
            self._leave(node, holder)
            return False
        self.schedule.take(node)
        self.elsewhere.pop(node.key, None)
        if holder is not None:
            self.view.note(f"taken over: {self.graph.label(node)}, from {holder}, which died")
        self.store.tidy(node)
        if self.store.holds(node, self.graph.needed(node)):
            self.leases.release(node.key)
            self.schedule.done(node)
            self.outcome.found.append(node.key)
            self.view.finished(None, node, self.store.node(node)["result"])
            return False
        return True

    def _leave(self, node: Runnable, holder: Holder | None) -> None:
        """To another process, which computes it; the longer that takes, the less often it is looked at."""
        now = time.monotonic()
        since = self.elsewhere[node.key].since if node.key in self.elsewhere else now
        first, last = _LOOK_AGAIN
        self.elsewhere[node.key] = _Elsewhere(holder, since, now + min(max(first, 0.1 * (now - since)), last))

    def _listen(self) -> None:
        """Waits a moment for what the workers say, and settles what they have done."""
        if self.running:
            done, _ = wait(self.running, _TICK, FIRST_COMPLETED)
        else:
            done = set()
            time.sleep(_TICK)
        for worker in self.workers:
            worker.poll()
        for future in done:
            self._settle(self.running.pop(future), future)

    def _report(self, task: _Task, epoch: int, images: int) -> None:
        more, task.images = images - task.images, images
        task.heard, task.epoch = time.monotonic(), max(task.epoch, epoch)
        self.outcome.images += more
        self.view.progress(task.worker, task.node, epoch, more)

    def _settle(self, task: _Task, future: "Future[Any]") -> None:
        node, worker = task.node, self.workers[task.worker]
        error = future.exception()
        answer: Answer = future.result() if error is None else worker.lost(error)
        still_ours = self.leases.release(node.key)
        if isinstance(answer, BadInput):
            raise InputError(answer.line)
        if isinstance(answer, Done):
            self._report(task, task.epoch, answer.images)
            self.retries.succeeded(task.device)
            self.outcome.done.append(node.key)
            if isinstance(node, Train):
                self.outcome.epochs[node.key] = answer.epochs
            self.schedule.done(node)
            self.view.finished(task.worker, node, answer.result)
            return
        if isinstance(answer, Failed):
            worker.renew()
        if not still_ours:  # the process that took it over has removed what this worker was writing
            self._leave(node, None)
            self.schedule.put_back(node)
        elif self._try_again(task, answer):
            self.schedule.put_back(node)

    def _try_again(self, task: _Task, answer: Failed | Lost) -> bool:
        """Whether a node that was not computed is tried once more; if not, it is reported."""
        node, device, label = task.node, task.device, self.graph.label(task.node)
        if isinstance(answer, Lost) and (answer.with_machine or self.retries.got_further(node.key, device, task.epoch)):
            self.view.note(f"retry: {label}, whose worker died ({answer.reason})")
            return True
        had_ended = self.retries.has_ended(device, self._devices())
        again = self.retries.failed(node.key, device, self._devices())
        if isinstance(answer, Failed):
            reason = self._log(node, answer.cause, answer.text)
        else:
            hint = ": out of memory?" if "code -9" in answer.reason or "memory" in answer.reason.lower() else ""
            reason = f"worker died ({answer.reason}){hint}"
            if not again:  # else there is no more to say
                reason = self._log(node, reason, reason)
        if again:
            self.view.note(f"retry: {label}, which failed on {device}: {reason}")
        else:
            self.outcome.failed[node.key] = reason
            blocked = self.schedule.failed(node)
            self.outcome.blocked += len(blocked)
            self.view.failed(task.worker, node, reason, blocked)
        if self.retries.has_ended(device, self._devices()) and not had_ended:
            self.view.note(f"{device} gets no more nodes: {_FAILURES_LIMIT} failures in a row")
        return again

    def _log(self, node: Runnable, cause: str, text: str) -> str:
        """The cause, and where all that is known is written down."""
        try:
            log = self.store.log(node, f"{self.graph.label(node)}\n{text}")
            return f"{cause} (log: {log})"
        except OSError as error:
            return f"{cause} (no log: {error.strerror})"

    def _mention_the_silent(self) -> None:
        for task in self.running.values():
            if time.monotonic() - task.heard > _SILENT_SECONDS:
                task.heard = time.monotonic()
                label, place = self.graph.label(task.node), self.workers[task.worker].place
                self.view.note(f"no sign of {label} for {_SILENT_SECONDS / 60:.0f} minutes ({place}): does it hang?")

    def _mention_others(self) -> None:
        """Says which processes this one waits for when it has nothing else to do."""
        now = time.monotonic()
        others = [] if self.running else [n for n in self.schedule.ready() if n.key in self.elsewhere]
        if not others:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = now
        elif now - self.waiting_since > _WAITING_SECONDS:
            self.waiting_since = now + _SILENT_SECONDS - _WAITING_SECONDS
            label, holder = self.graph.label(others[0]), self.elsewhere[others[0].key].holder
            more = f", and {len(others) - 1} more" if len(others) > 1 else ""
            self.view.note(f"waiting for what others compute: {label} ({holder or 'another process'}){more}")


@dataclass
class _Elsewhere:
    """A node that another process computes. Monotonic seconds; holder: None where it is not known."""

    holder: Holder | None
    since: float
    look_at: float


class Retries:
    """What failed where in one run, and what follows: nodes by key, devices by name.

    A node gets a second attempt, on another device where there is one; one whose worker dies gets more, as long as it
    comes further each time. Devices on which only failures come get no more nodes, but for the last device.
    """

    def __init__(self) -> None:
        self._failed_on: dict[str, str] = {}
        self._epoch: dict[str, int] = {}
        self._in_a_row: Counter[str] = Counter()
        self._ended: set[str] = set()

    def got_further(self, key: str, device: str, epoch: int) -> bool:
        """Whether a node whose worker died had come further than ever before."""
        further = epoch > self._epoch.get(key, 0)
        if further:
            self._epoch[key], self._failed_on[key] = epoch, device
        return further

    def failed(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node is tried once more. devices: those of all workers. What fails on two is not their fault."""
        first = self._failed_on.pop(key, None)
        if first not in (None, device):
            self._in_a_row[first] = self._in_a_row[device] = 0
            return False
        self._in_a_row[device] += 1
        if self._in_a_row[device] >= _FAILURES_LIMIT and self._others(device, devices):
            self._ended.add(device)
        if first is None:
            self._failed_on[key] = device
        return first is None

    def succeeded(self, device: str) -> None:
        self._in_a_row[device] = 0

    def may_run(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Whether the node did not fail on the device, or there is no other."""
        return self._failed_on.get(key) != device or not self._others(device, devices)

    def has_ended(self, device: str, devices: Collection[str]) -> bool:
        return device in self._ended and self._others(device, devices)

    def _others(self, device: str, devices: Collection[str]) -> bool:
        return any(d != device and d not in self._ended for d in devices)
