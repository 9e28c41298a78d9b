"""Workers that compute nodes: this process itself, or processes of this machine. crew_ray.py has those of a cluster."""

import contextlib
import errno
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.resource_tracker import ensure_running
from typing import Any, Protocol

from fastprune.errors import InputError
from fastprune.specs import Runnable
from fastprune.study.compute import Report, WorkConfig, Worker
from fastprune.study.graph import Graph

Hear = Callable[[int, str, Any], None]
"""Called with a worker's number and what it said: ("progress", (epochs done, images since the last time)); or as its
answer ("done", (result, epochs computed)), ("input", line), ("failed", (cause, traceback)), ("lost", how its process
ended), ("gone", what became of its machine)."""

REPORT_SECONDS = 0.2
"""Between two reports of a worker's progress."""

STARTS_LIMIT = 5
"""So many workers died as they started, and none came up between: something is wrong with all of them."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_STORE_IS_UNUSABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)


class Crew(Protocol):
    """Warm workers, numbered from 0. Each computes one node at a time; one that dies is replaced."""

    def free(self) -> list[int]:
        """Those that can take a node now."""

    def devices(self) -> list[str]:
        """By worker what it computes on; "" where that is not known yet."""

    def place(self, worker: int) -> str:
        """Where it runs, for a person."""

    def give(self, worker: int, node: Runnable) -> None: ...

    def listen(self, hear: Hear) -> None:
        """Waits a moment for what workers say, and passes it on. InputError where none can be started."""

    def close(self) -> None: ...


def compute(worker: Worker, graph: Graph, node: Runnable, report: Report) -> tuple[str, Any]:
    """A worker's answer on a node whose parents are published."""
    try:
        for parent in node.parents():
            worker.store.await_node(parent)
        return "done", worker.run(node, graph.requested_outputs(node), report)
    except InputError as error:
        return "input", str(error)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _STORE_IS_UNUSABLE:
            where = error.filename or worker.config.store
            return "input", f"{where}: cannot be written ({error.strerror}); make room or choose another --store"
        return "failed", (cause_of(error), traceback.format_exc())


def cause_of(error: BaseException) -> str:
    """An exception in one line: its first that says something. CUDA and compilers add lines of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


class Here:
    """This process as the only worker."""

    def __init__(self, graph: Graph, config: WorkConfig, device: str) -> None:
        self.graph, self.worker = graph, Worker(replace(config, device=device, show=True))
        self.node: Runnable | None = None

    def free(self) -> list[int]:
        return [0]

    def devices(self) -> list[str]:
        return [self.worker.config.device]

    def place(self, worker: int) -> str:
        return self.worker.config.device

    def give(self, worker: int, node: Runnable) -> None:
        self.node = node

    def listen(self, hear: Hear) -> None:
        if self.node is None:
            time.sleep(0.05)
            return
        node, self.node = self.node, None
        answer = compute(self.worker, self.graph, node, lambda epoch, images: hear(0, "progress", (epoch, images)))
        hear(0, *answer)

    def close(self) -> None: ...


class Processes:
    """Worker processes, each with one pipe: a node's key goes in, progress and the answer come out."""

    def __init__(self, graph: Graph, config: WorkConfig, devices: list[str], count: int) -> None:
        self.graph = graph
        self.configs = [replace(config, device=devices[i % len(devices)]) for i in range(count)]
        self.context = mp.get_context("spawn")
        self.died_at_start = 0
        self.came_up = [False] * count
        self.processes: list[Any] = [None] * count
        self.pipes: list[Connection] = []
        self.busy = [False] * count
        try:
            for i in range(count):
                self._start(i)
        except BaseException:
            self.close()
            raise

    def _start(self, i: int) -> None:
        mine, theirs = self.context.Pipe()
        self.processes[i] = self.context.Process(
            target=_worker_main, args=(theirs, self.configs[i], self.graph), daemon=False
        )
        with _interrupts_wait():
            self.processes[i].start()
        theirs.close()
        self.pipes[i : i + 1] = [mine]
        self.busy[i] = self.came_up[i] = False

    def free(self) -> list[int]:
        return [i for i, busy in enumerate(self.busy) if not busy]

    def devices(self) -> list[str]:
        return [config.device for config in self.configs]

    def place(self, worker: int) -> str:
        return f"{self.configs[worker].device}, process {self.processes[worker].pid}"

    def give(self, worker: int, node: Runnable) -> None:
        self.busy[worker] = True
        with contextlib.suppress(OSError):  # a dead worker is noticed in listen
            self.pipes[worker].send(node.key)

    def listen(self, hear: Hear) -> None:
        ready = wait(self.pipes, timeout=0.2)
        for i, pipe in enumerate(self.pipes):
            if pipe not in ready:
                continue
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                self._replace(i, hear)
                continue
            if kind == "ready":
                self.came_up[i], self.died_at_start = True, 0
                continue
            if kind != "progress":
                self.busy[i] = False
            if kind == "failed":  # what broke may stay broken: a CUDA context does
                self.processes[i].kill()
                self._renew(i)
            hear(i, kind, value)

    def _replace(self, i: int, hear: Hear) -> None:
        self.processes[i].join()
        code = self.processes[i].exitcode
        self.died_at_start += not self.came_up[i]
        if self.died_at_start >= STARTS_LIMIT:
            raise InputError(f"workers die as they start (exit code {code}): --workers 1 shows why")
        self._renew(i)
        hear(i, "lost", f"exit code {code}")

    def _renew(self, i: int) -> None:
        self.processes[i].join()
        self.pipes[i].close()
        self._start(i)

    def close(self) -> None:
        started = [process for process in self.processes if process is not None and process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A child is started whole or not at all, and a terminal's interrupt is not for it: it inherits the mask. What
    comes meanwhile comes afterwards."""
    if threading.current_thread() is not threading.main_thread():  # that of interrupts is another
        yield
        return
    came: list[int] = []
    ensure_running()  # on its start it would unmask the interrupt
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # Any other thread may take the signal.
    handlers = {number: signal.signal(number, lambda n, _: came.append(n)) for number in _INTERRUPTS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _worker_main(pipe: Connection, config: WorkConfig, graph: Graph) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    worker = Worker(config)
    pipe.send(("ready", None))
    while True:
        try:
            key = pipe.recv()
        except EOFError:
            return
        sent, images = time.monotonic(), 0

        def report(epoch: int, more: int) -> None:
            nonlocal sent, images
            images += more
            if time.monotonic() - sent > REPORT_SECONDS:
                pipe.send(("progress", (epoch, images)))
                sent, images = time.monotonic(), 0

        answer = compute(worker, graph, graph.by_key[key], report)
        pipe.send(("progress", (0, images)))
        pipe.send(answer)


def _die_with_parent() -> None:
    """Ends this worker when its parent is gone, however it went: two owners of one run would waste both."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
