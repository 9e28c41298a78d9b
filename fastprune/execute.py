"""Runs a graph: each node once, parents first, the longest chain first; in this process or in several warm workers."""

import contextlib
import errno
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from fastprune.errors import InputError
from fastprune.graph import Graph
from fastprune.schedule import Queue
from fastprune.specs import Runnable, Train
from fastprune.store import RunStore
from fastprune.work import Report, WorkConfig, Worker

_LOST_LIMIT = 2
"""A node whose worker died this often has failed."""
_STARTS_LIMIT = 5
"""So many workers in a row died before they gave an answer: something is wrong with all of them."""
_SILENT_SECONDS = 600.0
"""A busy worker that says nothing for so long is mentioned."""
_STORE_IS_UNUSABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)


class View(Protocol):
    """What is told of the work as it goes."""

    def started(self, worker: int, node: Runnable) -> None: ...
    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None: ...
    def note(self, text: str) -> None: ...
    def finished(self, worker: int, node: Runnable, result: dict[str, Any]) -> None: ...
    def failed(self, worker: int, node: Runnable, reason: str) -> None: ...


@dataclass
class Outcome:
    """What became of the nodes that were to do: keys computed here, and by key why a node failed.

    found: keys of nodes that another process published meanwhile. epochs: of the trainings among the done, how many
    were computed here. images: training images seen by all workers. not_reached: nodes that rest on a failed one.
    seconds: wall time.
    """

    devices: list[str]
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)
    images: int = 0
    not_reached: int = 0
    seconds: float = 0.0


def execute(
    graph: Graph, config: WorkConfig, view: View, *, workers: int = 1, devices: list[str] | None = None
) -> Outcome:
    """Computes what the store lacks of the graph. A node that fails is reported and the others go on.

    InputError (a damaged data file, a full disk) ends the whole run; so does KeyboardInterrupt. Both leave a store that
    the same command continues from.
    """
    began = time.monotonic()
    queue = Queue(graph, RunStore(config.store))
    outcome = Outcome(devices or [config.device])
    count = max(1, min(workers, queue.left))
    if count == 1:
        _run_here(queue, replace(config, device=outcome.devices[0], show=True), view, outcome)
    else:
        _Pool(queue, config, view, outcome, count).run()
    outcome.seconds = time.monotonic() - began
    return outcome


def _compute(worker: Worker, graph: Graph, node: Runnable, report: Report) -> tuple[str, Any]:
    """What became of one node: ("done", (result, epochs computed)), ("found", result) where another process was faster,
    ("busy", None), ("input", line) or ("failed", traceback)."""
    try:
        with worker.store.lease(node) as mine:
            if not mine:
                return "busy", None
            if worker.store.holds(node, graph.needed(node)):
                return "found", worker.store.node(node)["result"]
            return "done", worker.run(node, graph.products(node), report)
    except InputError as error:
        return "input", str(error)
    except OSError as error:
        if error.errno in _STORE_IS_UNUSABLE:
            where = error.filename or worker.config.store
            return "input", f"{where}: cannot be written ({error.strerror}); make room or choose another --store"
        return "failed", traceback.format_exc()
    except Exception:
        return "failed", traceback.format_exc()


def _settle(queue: Queue, view: View, outcome: Outcome, worker: int, node: Runnable, answer: tuple[str, Any]) -> None:
    kind, value = answer
    if kind == "busy":
        queue.busy(node)
    elif kind == "input":
        raise InputError(value)
    elif kind == "found":
        outcome.found.append(node.key)
        queue.done(node)
        view.finished(worker, node, value)
    elif kind == "done":
        result, epochs = value
        outcome.done.append(node.key)
        if isinstance(node, Train):
            outcome.epochs[node.key] = epochs
        queue.done(node)
        view.finished(worker, node, result)
    else:
        log = queue.store.log(node, value)
        reason = f"{value.strip().splitlines()[-1]} (log: {log})"
        outcome.failed[node.key] = reason
        outcome.not_reached += queue.fail(node)
        view.failed(worker, node, reason)


def _run_here(queue: Queue, config: WorkConfig, view: View, outcome: Outcome) -> None:
    worker = Worker(config)
    while queue.left:
        node = queue.next()
        if node is None:
            time.sleep(0.05)
            continue
        view.started(0, node)

        def report(epoch: int, images: int, node: Runnable = node) -> None:
            outcome.images += images
            view.progress(0, node, epoch, images)

        _settle(queue, view, outcome, 0, node, _compute(worker, queue.graph, node, report))


class _Pool:
    """Worker processes, each with one pipe: a node goes in, progress and the answer come out."""

    def __init__(self, queue: Queue, config: WorkConfig, view: View, outcome: Outcome, count: int) -> None:
        self.queue, self.view, self.outcome = queue, view, outcome
        self.configs = [replace(config, device=outcome.devices[i % len(outcome.devices)]) for i in range(count)]
        self.context = mp.get_context("spawn")
        self.lost: dict[str, int] = {}
        self.died_unused = 0
        self.heard = [time.monotonic()] * count
        self.processes: list[Any] = [None] * count
        self.pipes: list[Connection | None] = [None] * count
        self.nodes: list[Runnable | None] = [None] * count

    def run(self) -> None:
        try:
            for i in range(len(self.configs)):
                self._start(i)
            while self.queue.left:
                self._hand_out()
                self._listen()
        finally:
            self._stop()

    def _start(self, i: int) -> None:
        mine, theirs = self.context.Pipe()
        self.processes[i] = self.context.Process(
            target=_worker_main, args=(theirs, self.configs[i], self.queue.graph), daemon=False
        )
        # An interrupt is the parent's to handle: the child inherits that it ignores it, from its first moment.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.processes[i].start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()
        self.pipes[i] = mine

    def _hand_out(self) -> None:
        for i, busy_with in enumerate(self.nodes):
            if busy_with is None and (node := self.queue.next()) is not None:
                self.nodes[i], self.heard[i] = node, time.monotonic()
                self.view.started(i, node)
                with contextlib.suppress(OSError):  # a dead worker is noticed in _listen
                    self.pipes[i].send(node.key)  # type: ignore[union-attr]

    def _listen(self) -> None:
        ready = wait([p for p in self.pipes if p is not None], timeout=0.2)
        for i, busy_with in enumerate(self.nodes):
            if busy_with is not None and time.monotonic() - self.heard[i] > _SILENT_SECONDS:
                self.heard[i] = time.monotonic()
                label, pid = self.queue.graph.label(busy_with), self.processes[i].pid
                self.view.note(
                    f"no sign of {label} for {_SILENT_SECONDS / 60:.0f} minutes (process {pid}): does it hang?"
                )
        for i, pipe in enumerate(self.pipes):
            if pipe is None or pipe not in ready:
                continue
            try:
                kind, *rest = pipe.recv()
            except (EOFError, OSError):
                self._lost(i)
                continue
            node = self.nodes[i]
            self.heard[i], self.died_unused = time.monotonic(), 0
            if node is None:
                continue
            if kind == "progress":
                epoch, images = rest
                self.outcome.images += images
                self.view.progress(i, node, epoch, images)
            else:
                self.nodes[i] = None
                _settle(self.queue, self.view, self.outcome, i, node, (str(kind), rest[0]))

    def _lost(self, i: int) -> None:
        """A worker died (killed, out of memory): another takes its place, and its node is tried once more."""
        self.processes[i].join()
        code, node = self.processes[i].exitcode, self.nodes[i]
        self.nodes[i] = None
        if node is not None:
            self.lost[node.key] = self.lost.get(node.key, 0) + 1
            if self.lost[node.key] < _LOST_LIMIT:
                self.queue.again(node)
            else:
                reason = f"its worker died {_LOST_LIMIT} times, last with exit code {code}: out of memory?"
                _settle(self.queue, self.view, self.outcome, i, node, ("failed", reason))
        self.died_unused += 1
        if self.died_unused >= _STARTS_LIMIT:
            raise InputError(f"workers die as they start (exit code {code}): --workers 1 shows why")
        if self.queue.left:
            self._start(i)
        else:
            self.pipes[i] = None

    def _stop(self) -> None:
        for process in self.processes:
            if process is not None:
                process.terminate()
        for process in self.processes:
            if process is not None:
                process.join(10)
                if process.is_alive():
                    process.kill()


def _worker_main(pipe: Connection, config: WorkConfig, graph: Graph) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    worker = Worker(config)
    while True:
        try:
            key = pipe.recv()
        except EOFError:
            return
        node = graph.by_key[key]
        sent, images = time.monotonic(), 0

        def report(epoch: int, more: int) -> None:
            nonlocal sent, images
            images += more
            if time.monotonic() - sent > 0.2:
                pipe.send(("progress", epoch, images))
                sent, images = time.monotonic(), 0

        answer = _compute(worker, graph, node, report)
        pipe.send(("progress", 0, images))
        pipe.send(answer)


def _die_with_parent() -> None:
    """Ends this worker when its parent is gone, however it went: two owners of one run would waste both."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
