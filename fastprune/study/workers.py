"""Workers of this machine: each computes one node at a time, and gives a future for it. Ray's: ray_workers.py."""

import contextlib
import errno
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
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
"""The least time between two reports of a child process."""

_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Each further node would fail for the same reason: these errors end the run at once.
_STORE_IS_UNUSABLE = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Done:
    """A node's result, and the numbers of epochs and training images that this worker computed for it."""

    result: dict[str, Any]
    epochs: int
    images: int


@dataclass(frozen=True)
class Failed:
    """Computing a node raised an exception. cause: one line. text: the traceback."""

    cause: str
    text: str


@dataclass(frozen=True)
class BadInput:
    """Computing a node raised an InputError, which holds for all nodes. line: its message."""

    line: str


@dataclass(frozen=True)
class Lost:
    """The worker's process died. with_machine: the machine that it ran on was lost, too."""

    reason: str
    with_machine: bool = False


Answer = Done | Failed | BadInput | Lost


class Report(Protocol):
    """Called with (epochs of a training's schedule done, training images so far, how it computes)."""

    def __call__(self, epoch: int, images: int, how: str = "", /) -> None: ...


class Worker(Protocol):
    """A warm process with a share of a device, which computes one node at a time. If it dies, it is started again."""

    @property
    def device(self) -> str:
        """The device's name; "" while the worker starts, when it takes no node."""

    @property
    def place(self) -> str:
        """Device and process (and host, on a cluster), to show to the user."""

    def submit(self, key: str, report: Report) -> "Future[Any]":
        """Computes a node whose parents are published. The future gives Done, Failed or BadInput; if it raises, pass
        the exception to `lost`. `report` is called from here or from `poll`."""

    def poll(self) -> None:
        """Calls `report` for the reports that have arrived. InputError if the worker cannot work at all."""

    def lost(self, error: BaseException) -> Lost:
        """Why the process died; starts another one. Raises `error` if it is not the loss of a process."""

    def renew(self) -> None:
        """Replaces the process: after a failed node it may be broken, as a CUDA context is after an error."""

    def close(self) -> None:
        """Ends the process, even while it computes. May be called again."""


def answer(computer: NodeComputer, graph: Graph, key: str, report: Report, *, every: float = 0.0) -> Answer:
    """Computes and publishes a node whose parents are published. every: the least seconds between two reports."""
    node, images, how, sent = graph.by_key[key], 0, "", time.monotonic()

    def count(epoch: int, more: int, said: str = "", /) -> None:
        nonlocal images, how, sent
        images, how = images + more, said or how
        if time.monotonic() - sent >= every:
            report(epoch, images, how)
            sent = time.monotonic()

    try:
        # Another machine may just have published a parent, which a network disk shows here only later.
        for parent in node.parents():
            computer.store.await_node(parent)
        return Done(*computer.compute_node(node, graph.requested_outputs(node), count), images)
    except Exception as error:
        return refusal(error, computer.config.store)


def refusal(error: Exception, store: Path) -> BadInput | Failed:
    """The answer for an exception. To be called in its handler, as it takes the traceback."""
    if isinstance(error, InputError):
        return BadInput(str(error))
    if isinstance(error, OSError) and error.errno in _STORE_IS_UNUSABLE:
        return BadInput(cannot_write(error, store))
    return Failed(cause_of(error), traceback.format_exc())


def cannot_write(error: OSError, store: Path) -> str:
    """The message of an InputError for a store that cannot be written."""
    return f"{error.filename or store}: cannot be written ({error.strerror}); make room or choose another --store"


def cause_of(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message (and the second, after a colon)."""
    # CUDA and compilers add many lines of advice, which the log keeps.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def local_workers(graph: Graph, config: WorkConfig, devices: list[str], count: int) -> Iterator[list[Worker]]:
    """`count` workers, spread evenly over the devices of this machine. A single one on a CPU is this process."""
    workers: list[Worker] = []
    try:
        # On a GPU always a child: a CUDA error breaks its process, and only a new process can use the device again.
        if count <= 1 and devices[0] == "cpu":
            workers.append(InPlaceWorker(graph, replace(config, device="cpu", show=True)))
        else:
            for i in range(count):  # one by one, so that `finally` also ends those before one that cannot start
                workers.append(ProcessWorker(graph, replace(config, device=devices[i % len(devices)])))
        yield workers
    finally:
        for worker in workers:
            worker.close()


class InPlaceWorker:
    """This process: `submit` computes the node and returns a future that is done."""

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
    """A child process: an executor with one process, and a pipe for its reports. It dies with this process.

    OSError if no process can be started.
    """

    def __init__(self, graph: Graph, config: WorkConfig) -> None:
        self.graph, self.config, self.device = graph, config, config.device
        self._report: Report | None = None
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")  # CUDA and threads do not survive a fork
        self._reports, theirs = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(
            1, mp_context=context, initializer=_initialize, initargs=(self.graph, self.config, theirs)
        )
        self._process: BaseProcess | None = None
        before = set(mp.active_children())
        try:
            with _interrupts_wait():
                # Any call starts the process; not waiting for it lets all workers import torch at the same time.
                self._executor.submit(os.getpid)
                # The executor does not tell its process, which `close` must be able to kill.
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
        except BrokenProcessPool:  # the process died while it was idle
            self.renew()
            return self._executor.submit(_answer, key)

    def poll(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # the process died: its future raises
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
            self._process.kill()  # safe at any moment: the store publishes by a rename
        self._executor.shutdown(cancel_futures=True)
        if self._process is not None:
            self._process.join()
        self._reports.close()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Delays interrupts until a child is started; a signal that comes meanwhile is raised afterwards."""
    # An interrupt in between would leave a child that `close` does not know. The child inherits the mask, so that a
    # Ctrl-C at the terminal, which signals the whole group, does not end it before it ignores the signal itself.
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread
        yield
        return
    came: list[int] = []
    ensure_running()  # starting multiprocessing's resource tracker would unmask the interrupt
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    # A mask is not enough: the system may deliver the signal to another thread, and Python runs the handler here.
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
"""State of a child process, kept from node to node: an executor passes only the key."""


def _initialize(graph: Graph, config: WorkConfig, pipe: Connection) -> None:
    global _graph, _config, _pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _graph, _config, _pipe = graph, config, pipe


def _answer(key: str) -> Answer:
    global _computer
    if _computer is None:
        try:
            # Not in _initialize, whose exceptions the executor hides: here a broken device fails a node, with a cause.
            _computer = NodeComputer(_config)
        except Exception as error:
            return refusal(error, _config.store)
    return answer(_computer, _graph, key, lambda *said: _pipe.send(said), every=_REPORT_SECONDS)


def _die_with_parent() -> None:
    # A child that outlives its parent would compute without a lease, beside the process that takes the node over.
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
