"""Runs a graph: computes each missing node once, parents first, the longest chain first, on workers that give futures.

Several processes may run graphs on one store: leases share the nodes among them.
"""

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
"""Seconds until a node that another process computes is checked again: the least, and the most."""

_SILENT_SECONDS = 600.0
"""A busy worker without a report for so long is noted to the user. Also the time between two notes on waiting."""

_WAITING_SECONDS = 30.0
"""Seconds of waiting for other processes until the first note."""

_FAILURES_LIMIT = 3
"""After so many failures in a row a device gets no more nodes."""


class View(Protocol):
    """Receives the events of a run, on the loop's thread.

    worker: its number. place: where it runs. images: training images since the last call. how: how a training computes,
    in words, told once. blocked: nodes that depend on the failed one.
    """

    def started(self, worker: int, node: Runnable, place: str) -> None: ...
    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None: ...
    def computes(self, worker: int, node: Runnable, how: str) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None: ...
    def failed(self, worker: int, node: Runnable, reason: str, blocked: list[Runnable]) -> None: ...


@dataclass
class Outcome:
    """What happened to the missing nodes.

    done: keys of nodes computed here. failed: cause by key. found: keys of nodes that another process published
    meanwhile. epochs: computed here, by key of a training in `done`. images: training images of all workers. blocked:
    number of nodes that depend on a failed one. seconds: wall time.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    images: int = 0
    blocked: int = 0
    seconds: float = 0.0


def run(graph: Graph, store: RunStore, workers: Sequence[Worker], view: View) -> Outcome:
    """Computes and publishes the nodes of the graph that the store lacks. Closes the workers.

    A node that fails is tried once more, then reported; the nodes that do not depend on it are still computed.
    InputError (a corrupt file, a full disk) and KeyboardInterrupt end the run; calling it again resumes it.
    """
    began = time.monotonic()
    with Leases(store.root / "leases") as leases:
        loop = _Loop(graph, store, workers, leases, view)
        try:
            loop.run()
        finally:
            for worker in workers:  # before the leases are released: no worker may write without one
                worker.close()
    loop.outcome.seconds = time.monotonic() - began
    return loop.outcome


@dataclass
class _Task:
    """A node that a worker computes. heard: monotonic time of the last report; epoch, images, how: its content."""

    worker: int
    node: Runnable
    device: str
    heard: float
    epoch: int = 0
    images: int = 0
    how: str = ""


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
        busy, devices = {task.worker for task in self.running.values()}, self._devices()
        for number, worker in enumerate(self.workers):
            device = worker.device
            # A worker without a device is still starting: on a cluster it may wait for room.
            if number in busy or not device or self.retries.has_ended(device, devices):
                continue
            if (node := self._claim_next(device, devices)) is not None:
                self.view.started(number, node, worker.place)
                task = _Task(number, node, device, time.monotonic())
                self.running[worker.submit(node.key, partial(self._report, task))] = task

    def _devices(self) -> set[str]:
        return {worker.device for worker in self.workers} - {""}

    def _claim_next(self, device: str, devices: Collection[str]) -> Runnable | None:
        """Claims the ready node with the longest chain that may run on the device; None if there is none."""
        while (node := self._next(device, devices)) is not None:
            if self._claim(node):
                return node
        return None

    def _next(self, device: str, devices: Collection[str]) -> Runnable | None:
        # A node leased elsewhere is skipped for a while: each look at its lease asks a disk that many may share.
        now = time.monotonic()
        for node in self.schedule.ready():
            is_due = node.key not in self.elsewhere or self.elsewhere[node.key].look_at <= now
            if is_due and self.retries.may_run(node.key, device, devices):
                return node
        return None

    def _claim(self, node: Runnable) -> bool:
        """Whether this process is to compute the node: it holds the lease, and the node is not published."""
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
        # Only under the lease is this final: another process may have published between the last look and now.
        if self.store.holds(node, self.graph.needed(node)):
            self.leases.release(node.key)
            self.schedule.done(node)
            self.outcome.found.append(node.key)
            self.view.finished(None, node, self.store.node(node)["result"])
            return False
        return True

    def _leave(self, node: Runnable, holder: Holder | None) -> None:
        """Records that another process computes the node, and when to check it again."""
        # The longer it takes, the rarer the checks: a tenth of the time waited delays the end by at most a tenth.
        now = time.monotonic()
        since = self.elsewhere[node.key].since if node.key in self.elsewhere else now
        first, last = _LOOK_AGAIN
        self.elsewhere[node.key] = _Elsewhere(holder, since, now + min(max(first, 0.1 * (now - since)), last))

    def _listen(self) -> None:
        """Waits at most one tick for a future, passes on reports, and settles the futures that are done."""
        if self.running:
            done, _ = wait(self.running, _TICK, FIRST_COMPLETED)
        else:  # all ready nodes are computed elsewhere, or no worker has started yet
            done = set()
            time.sleep(_TICK)
        for worker in self.workers:
            worker.poll()
        for future in done:
            self._settle(self.running.pop(future), future)

    def _report(self, task: _Task, epoch: int, images: int, how: str = "", /) -> None:
        # Workers report totals, so that a lost or repeated report changes no sum.
        more, task.images = images - task.images, images
        task.heard, task.epoch = time.monotonic(), max(task.epoch, epoch)
        self.outcome.images += more
        if how and how != task.how:
            task.how = how
            self.view.computes(task.worker, task.node, how)
        self.view.progress(task.worker, task.node, epoch, more)

    def _settle(self, task: _Task, future: "Future[Any]") -> None:
        node, worker = task.node, self.workers[task.worker]
        error = future.exception()
        answer: Answer = future.result() if error is None else worker.lost(error)
        still_ours = self.leases.release(node.key)
        if isinstance(answer, BadInput):
            raise InputError(answer.line)
        if isinstance(answer, Done):  # even if the lease was lost meanwhile: the node is published
            self._report(task, task.epoch, answer.images)
            self.retries.succeeded(task.device)
            self.outcome.done.append(node.key)
            if isinstance(node, Train):
                self.outcome.epochs[node.key] = answer.epochs
            self.schedule.done(node)
            self.view.finished(task.worker, node, answer.result)
            return
        if isinstance(answer, Failed):  # the exception may have left the process broken, as a CUDA error does
            worker.renew()
        # The process that took the lease over has removed this worker's temporary files: the failure tells nothing.
        if not still_ours:
            self._leave(node, None)
            self.schedule.put_back(node)
        elif self._try_again(task, answer):
            self.schedule.put_back(node)

    def _try_again(self, task: _Task, answer: Failed | Lost) -> bool:
        """Whether a node that failed or lost its worker is tried again; reports the failure if not."""
        node, device, label = task.node, task.device, self.graph.label(task.node)
        # A lost machine is no fault of the node, and a run that got further will end, however often it is killed.
        if isinstance(answer, Lost) and (answer.with_machine or self.retries.got_further(node.key, device, task.epoch)):
            self.view.note(f"retry: {label}, whose worker died ({answer.reason})")
            return True
        had_ended = self.retries.has_ended(device, self._devices())
        again = self.retries.failed(node.key, device, self._devices())
        if isinstance(answer, Failed):
            reason = self._log(node, answer.cause, answer.text)
        else:
            # The kernel's out-of-memory killer sends signal 9 and leaves no message of its own.
            hint = ": out of memory?" if "code -9" in answer.reason or "memory" in answer.reason.lower() else ""
            reason = f"worker died ({answer.reason}){hint}"
            if not again:  # a lost process leaves no traceback: a log is of use only for the final report
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
        """Writes the node's log; returns the cause with the log's path."""
        try:
            log = self.store.log(node, f"{self.graph.label(node)}\n{text}")
            return f"{cause} (log: {log})"
        except OSError as error:  # the cause of the failure must not be replaced by that of a missing log
            return f"{cause} (no log: {error.strerror})"

    def _mention_the_silent(self) -> None:
        for task in self.running.values():
            if time.monotonic() - task.heard > _SILENT_SECONDS:
                task.heard = time.monotonic()
                label, place = self.graph.label(task.node), self.workers[task.worker].place
                self.view.note(f"no report from {label} for {_SILENT_SECONDS / 60:.0f} minutes ({place}); it may hang")

    def _mention_others(self) -> None:
        """Tells the user which node of another process this one waits for, if it has nothing else to do."""
        now = time.monotonic()
        others = [] if self.running else [n for n in self.schedule.ready() if n.key in self.elsewhere]
        if not others:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = now
        elif now - self.waiting_since > _WAITING_SECONDS:
            # In the future, so that the next note comes _SILENT_SECONDS from now.
            self.waiting_since = now + _SILENT_SECONDS - _WAITING_SECONDS
            label, holder = self.graph.label(others[0]), self.elsewhere[others[0].key].holder
            more = f", and {len(others) - 1} more" if len(others) > 1 else ""
            self.view.note(f"waiting for other processes: {label} ({holder or 'another process'}){more}")


@dataclass
class _Elsewhere:
    """A node that another process computes. since, look_at: monotonic seconds. holder: None if unknown."""

    holder: Holder | None
    since: float
    look_at: float


class Retries:
    """The failures of one run, and which node may run on which device; nodes by key, devices by name.

    A failed node gets a second attempt, on another device if there is one. A node whose worker dies gets further
    attempts as long as each gets further. A device with only failures gets no more nodes, unless it is the last one.
    """

    def __init__(self) -> None:
        self._failed_on: dict[str, str] = {}
        self._epoch: dict[str, int] = {}
        self._in_a_row: Counter[str] = Counter()
        self._ended: set[str] = set()

    def got_further(self, key: str, device: str, epoch: int) -> bool:
        """Whether a node whose worker died had completed more epochs than in any earlier attempt."""
        further = epoch > self._epoch.get(key, 0)
        if further:
            self._epoch[key], self._failed_on[key] = epoch, device
        return further

    def failed(self, key: str, device: str, devices: Collection[str]) -> bool:
        """Records a failure; whether the node is tried once more. devices: those of all workers."""
        first = self._failed_on.pop(key, None)
        if first not in (None, device):  # a node that fails on two devices is the cause itself: neither is to blame
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
        """Whether the node has not failed on the device, or there is no other device."""
        return self._failed_on.get(key) != device or not self._others(device, devices)

    def has_ended(self, device: str, devices: Collection[str]) -> bool:
        """Whether the device gets no more nodes."""
        # Asked each time: the other devices may have ended or been lost since, and the last one always gets nodes.
        return device in self._ended and self._others(device, devices)

    def _others(self, device: str, devices: Collection[str]) -> bool:
        return any(d != device and d not in self._ended for d in devices)
