"""Workers of this machine: each computes a node at a time, and gives a future for it. A cluster's: ray_workers.py."""

import contextlib
import errno
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import Any, Protocol

from fastprune.errors import InputError
from fastprune.study.compute import NodeComputer, WorkConfig
from fastprune.study.graph import Graph

_REPORT_SECONDS = 0.2

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_STORE_IS_UNUSABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Done:
    """A node's result, and the epochs and training images that were computed for it here."""

    result: dict[str, Any]
    epochs: int
    images: int


@dataclass(frozen=True)
class Failed:
    """Computing a node raised: the cause in one line, and the traceback."""

    cause: str
    text: str


@dataclass(frozen=True)
class BadInput:
    """Nothing else can be computed either: the line of an InputError."""

    line: str


@dataclass(frozen=True)
class Lost:
    """The worker's process died, as `reason` says; with_machine: and the machine that it ran on."""

    reason: str
    with_machine: bool = False


Answer = Done | Failed | BadInput | Lost


Report = Callable[[int, int], None]
"""Called with (epochs of a training's schedule done, training images so far)."""


class Worker(Protocol):
    """A warm process with a share of a device, which computes one node at a time. It is started anew where it dies."""

    @property
    def device(self) -> str:
        """What it computes on; "" as long as that is not known, and then it takes no node."""

    @property
    def place(self) -> str:
        """Where it runs, for the user."""

    def submit(self, key: str, report: Report) -> "Future[Any]":
        """Computes a node whose parents are published. Its future gives Done, Failed or BadInput; where it raises,
        `lost` says why. `report` is called from here or from `poll`."""

    def poll(self) -> None:
        """Passes on what it has reported. InputError where it cannot work at all."""

    def lost(self, error: BaseException) -> Lost:
        """What became of the process; the worker is usable again."""

    def renew(self) -> None:
        """Starts another process: what a failed node broke may stay broken, as a CUDA context does."""

    def close(self) -> None:
        """Ends it, whatever it computes. May be called again."""


def answer(computer: NodeComputer, graph: Graph, key: str, report: Report, *, every: float = 0.0) -> Answer:
    """Computes a node whose parents are published, perhaps by another machine just now. every: seconds between two
    reports, at least."""
    node, images, sent = graph.by_key[key], 0, time.monotonic()

    def count(epoch: int, more: int) -> None:
        nonlocal images, sent
        images += more
        if time.monotonic() - sent >= every:
            report(epoch, images)
            sent = time.monotonic()

    try:
        for parent in node.parents():
            computer.store.await_node(parent)
        return Done(*computer.compute_node(node, graph.requested_outputs(node), count), images)
    except Exception as error:
        return refusal(error, computer.config.store)


def refusal(error: Exception, store: Path) -> BadInput | Failed:
    """The answer in place of a result, in the handler of an exception."""
    if isinstance(error, InputError):
        return BadInput(str(error))
    if isinstance(error, OSError) and error.errno in _STORE_IS_UNUSABLE:
        return BadInput(cannot_write(error, store))
    return Failed(cause_of(error), traceback.format_exc())


def cannot_write(error: OSError, store: Path) -> str:
    return f"{error.filename or store}: cannot be written ({error.strerror}); make room or choose another --store"


def cause_of(error: BaseException) -> str:
    """An exception in one line: its first that says something. CUDA and compilers add lines of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def local_workers(graph: Graph, config: WorkConfig, devices: list[str], count: int) -> Iterator[list[Worker]]:
    """`count` workers over the devices of this machine, each device as often as the others.

    One on a CPU is this process. On a GPU it is always a child: what breaks there breaks the process that uses it.
    """
    workers: list[Worker] = []
    try:
        if count <= 1 and devices[0] == "cpu":
            workers.append(InPlaceWorker(graph, replace(config, device="cpu", show=True)))
        else:
            for i in range(count):
                workers.append(ProcessWorker(graph, replace(config, device=devices[i % len(devices)])))
        yield workers
    finally:
        for worker in workers:
            worker.close()


class InPlaceWorker:
    """This process: a submitted node is computed at once."""

    def __init__(self, graph: Graph, config: WorkConfig) -> None:
        self.graph, self.computer = graph, NodeComputer(config)
        self.device = self.place = config.device

    def submit(self, key: str, report: Report) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(answer(self.computer, self.graph, key, report))
        return future

    def poll(self) -> None: ...

    def lost(self, error: BaseException) -> Lost:
        raise error

    def renew(self) -> None: ...

    def close(self) -> None: ...


class ProcessWorker:
    """A child process, by an executor of one; reports come through a pipe. It dies with this process in any case.

    OSError where no process can be started.
    """

    def __init__(self, graph: Graph, config: WorkConfig) -> None:
        self.graph, self.config, self.device = graph, config, config.device
        self._report: Report | None = None
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._reports, theirs = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            1, mp_context=context, initializer=_initialize, initargs=(self.graph, self.config, theirs)
        )
        self._process: BaseProcess | None = None
        before = set(mp.active_children())
        try:
            with _interrupts_wait():
                self._executor.submit(os.getpid)  # starts the process, which then imports beside others
                (self._process,) = set(mp.active_children()) - before
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()

    @property
    def place(self) -> str:
        return f"{self.device}, process {self._process.pid if self._process is not None else '-'}"

    def submit(self, key: str, report: Report) -> "Future[Any]":
        self._report = report
        try:
            return self._executor.submit(_answer, key)
        except BrokenProcessPool:  # it died when it had nothing to do
            self.renew()
            return self._executor.submit(_answer, key)

    def poll(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # it died: its future says so
            while self._reports.poll():
                said = self._reports.recv()
                if self._report is not None:
                    self._report(*said)

    def lost(self, error: BaseException) -> Lost:
        if not isinstance(error, BrokenProcessPool):
            raise error
        process = self._process
        self.renew()
        return Lost(f"exit code {process.exitcode}" if process is not None else str(error))

    def renew(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # a store and its leases stand that at any moment
        self._executor.shutdown(cancel_futures=True)
        if self._process is not None:
            self._process.join()
        self._reports.close()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """A child is started completely or not at all, and an interrupt from the terminal is not for it: it inherits the
    mask. A signal that comes meanwhile is raised afterwards."""
    if threading.current_thread() is not threading.main_thread():  # interrupts are another thread's
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


_computer: NodeComputer | None = None
_graph: Graph
_config: WorkConfig
_pipe: Connection
"""What a child process keeps from one node to the next."""


def _initialize(graph: Graph, config: WorkConfig, pipe: Connection) -> None:
    global _graph, _config, _pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _graph, _config, _pipe = graph, config, pipe


def _answer(key: str) -> Answer:
    global _computer
    if _computer is None:
        try:
            _computer = NodeComputer(_config)  # not in _initialize: a device that is broken fails a node
        except Exception as error:
            return refusal(error, _config.store)
    return answer(_computer, _graph, key, lambda *said: _pipe.send(said), every=_REPORT_SECONDS)


def _die_with_parent() -> None:
    """Two owners of one run would waste both."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
