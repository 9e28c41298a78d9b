"""Workers on a Ray cluster: each is an actor with a share of a GPU or a CPU core, warm over many nodes."""

# Actors, not GPU tasks: Ray ends a task's process after one call, and each node would compile anew.

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.client import ray as client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import fastprune
from fastprune.errors import InputError
from fastprune.store import RunStore
from fastprune.study.compute import NodeComputer, WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.workers import Answer, BadInput, Lost, Report, Worker, answer, refusal

_REPORT_SECONDS = 1.0
"""Seconds between two reports of a worker, and between two queries for reports."""

_SEEN_SECONDS = 60.0
"""How long a worker's machine may take to see a file that the driver has just written: NFS caches names."""

_ANSWER_SECONDS = 10.0
"""How long a cluster's address may take to accept a connection."""

_RAYLET_SECONDS = 2.0
"""How long Ray on a machine whose worker was lost may take to accept a connection."""

_DEATHS_LIMIT = 5
"""After so many deaths of a worker's process in a row while it starts, the run ends."""

_PASSED_ON = ("OMP_", "MKL_", "NUMBA_", "TRITON_", "TORCHINDUCTOR_", "MPLCONFIGDIR")
"""Prefixes of the environment variables that workers get from the driver: threads and compiler caches."""


class _Reports:
    """An actor that collects reports until they are taken: (worker, key) -> the arguments of a Report."""

    # An actor of its own: a worker's actor answers no call while it computes a node.

    def __init__(self) -> None:
        self.said: dict[tuple[int, str], tuple[int, int, str]] = {}

    def put(self, worker: int, key: str, epoch: int, images: int, how: str) -> None:
        self.said[worker, key] = epoch, images, how

    def take(self) -> dict[tuple[int, str], tuple[int, int, str]]:
        said, self.said = self.said, {}
        return said


class _Actor:
    """One worker's process, on some machine of the cluster. Ray starts it again if it dies."""

    def __init__(self, number: int) -> None:
        self.number, self.gpus = number, ray.get_gpu_ids()
        self.computer: NodeComputer | None = None

    def open(
        self, graph: Graph, config: WorkConfig, reports: Any, store_id: str, version: str
    ) -> BadInput | tuple[str, str, str]:
        """(device, place, Ray's id of the machine), or BadInput if it cannot work here. To be called first."""
        # Not arguments of __init__: Ray may have lost them when it starts the actor again.
        self.graph, self.config, self.reports = graph, config, reports
        host = socket.gethostname()
        if fastprune.__version__ != version:
            return BadInput(f"{host} has fastprune {fastprune.__version__}, the driver {version}: install the same one")
        folders = [images.folder for images in self.config.images.values() if images.folder is not None]
        shared = "--store and --data must be on a disk that all machines see at the same path"
        for path in (self.config.store / "store.json", *folders):
            if not _appears(path):
                return BadInput(f"{host} does not see {path}: {shared}")
        # A path that exists is not enough: on a local disk the same path would be another store.
        if RunStore(self.config.store).id != store_id:
            return BadInput(f"{host} has another store at {self.config.store}: {shared}")
        place = f"{host} {'cuda' if self.gpus else 'cpu'}{''.join(map(str, self.gpus[:1]))}"
        return place, f"{place}, process {os.getpid()}", ray.get_runtime_context().get_node_id()

    def compute(self, key: str) -> Answer:
        def send(epoch: int, images: int, how: str = "", /) -> None:
            self.reports.put.remote(self.number, key, epoch, images, how)

        try:
            if self.computer is None:  # here, not in open: a broken device fails a node, with a cause
                self.computer = NodeComputer(replace(self.config, device="cuda" if self.gpus else "cpu"))
        except Exception as error:
            return refusal(error, self.config.store)
        return answer(self.computer, self.graph, key, send, every=_REPORT_SECONDS)


def _appears(path: Path) -> bool:
    """Waits until this machine sees the path; False after _SEEN_SECONDS."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes an NFS client ask the server again
    return True


@dataclass
class RayWorkers:
    """Workers on a cluster. about: the cluster, its room and the share of each worker, in words for the user."""

    workers: list[Worker]
    about: str


@contextlib.contextmanager
def ray_workers(
    graph: Graph, config: WorkConfig, *, address: str | None, count: int | None, gpus: float | None, most: int
) -> Iterator[RayWorkers]:
    """`count` workers (None: as many as the cluster has room for now), at most `most`.

    gpus: share of a GPU for each; 0: a CPU core; None: one GPU, or a CPU core if the cluster has no GPU. A worker
    without room starts as soon as there is room. address: as for ray.init; None joins the cluster of this machine, or
    starts one here. InputError if no cluster can be reached, or if `count` is None and there is no room for a worker.
    """
    try:
        which = _connect(address)
        gpus, room = _room(gpus)
        if count is None and room == 0:
            raise InputError(f"the Ray cluster has no room for a worker with {gpus:g} GPUs; change --gpus-per-run")
        count = max(1, min(count or room, most))
        each = f"each with {gpus:g} of a GPU" if gpus else "each on a CPU core"
        fewer = f", {room} for now: the cluster has no room for more" if room < count else ""
        variables = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
        # The driver's own package comes first: each worker must run the same code, installed there or not.
        path = [str(Path(fastprune.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(path)
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, runtime_env={"env_vars": variables})(_Actor)
        inbox, store_id = _Inbox(), RunStore(config.store).id
        # A graph of nine figures is large: each machine gets it once.
        opened_with = ray.put(graph), ray.put(config), inbox.reports, store_id, fastprune.__version__
        workers: list[Worker] = [RayWorker(i, partial(actor.remote, i), opened_with, inbox) for i in range(count)]
        yield RayWorkers(workers, f"{which}, runs at once: up to {count}, {each}{fewer}")
    finally:
        ray.shutdown()


class _Inbox:
    """The driver's side of _Reports: queries it once a second, without waiting for the answer."""

    def __init__(self) -> None:
        # On the driver's machine, so that no other machine's loss ends it. If Ray starts it again, a few seconds of
        # reports are lost, which changes no total: workers report totals.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(num_cpus=0)(_Reports)
        self.reports = actor.options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote()
        self._asked: Future[Any] | None = None
        self._at = 0.0
        self._said: dict[tuple[int, str], tuple[int, int, str]] = {}

    def take(self, worker: int, key: str | None) -> tuple[int, int, str] | None:
        """The last report on a worker's node; None without a new one. InputError if the cluster is lost."""
        if self._asked is not None and self._asked.done():
            try:
                self._said |= self._asked.result()
            except RayError as error:
                raise InputError(
                    f"the Ray cluster is lost ({_first_line(error)}); rerun the command to continue"
                ) from error
            self._asked = None
        if self._asked is None and time.monotonic() - self._at > _REPORT_SECONDS:
            self._asked, self._at = self.reports.take.remote().future(), time.monotonic()
        return None if key is None else self._said.pop((worker, key), None)


class RayWorker:
    """The driver's side of an actor. Ray places it, and places it again if its process or its machine is lost."""

    def __init__(self, number: int, make: Callable[[], Any], opened_with: tuple[Any, ...], inbox: _Inbox) -> None:
        """make: creates the actor. opened_with: the arguments of its method `open`."""
        self._number, self._make, self._opened_with, self._inbox = number, make, opened_with, inbox
        self._actor, self._machine = make(), ""
        self._key: str | None = None
        self._report: Report | None = None
        self._deaths = 0
        self._open()

    def _open(self) -> None:
        self.device, self.place = "", "starting"
        self._opening: Future[Any] | None = self._actor.open.remote(*self._opened_with).future()

    def submit(self, key: str, report: Report) -> "Future[Any]":
        self._key, self._report = key, report
        future: Future[Any] = self._actor.compute.remote(key).future()
        return future

    def poll(self) -> None:
        if self._opening is not None and self._opening.done():
            opening, self._opening = self._opening, None
            try:
                found = opening.result()
            except RayError as error:  # the process died while it started: Ray starts it again
                # An actor that is merely unavailable, as on a slow network, has not died.
                self._deaths += not isinstance(error, ActorUnavailableError)
                if self._deaths >= _DEATHS_LIMIT:
                    raise InputError(
                        f"Ray's workers die while they start ({_first_line(error)}); see Ray's logs"
                    ) from error
                self._open()
                return
            self._deaths = 0
            if isinstance(found, BadInput):
                raise InputError(found.line)
            self.device, self.place, self._machine = found
        said = self._inbox.take(self._number, self._key)
        if said is not None and self._report is not None:
            self._report(*said)

    def lost(self, error: BaseException) -> Lost:
        if not isinstance(error, RayError):
            raise error
        machine = self._machine
        self._open()  # Ray starts the process by itself, but it must be given the graph again
        return Lost(_first_line(error), with_machine=not _is_up(machine))

    def renew(self) -> None:
        # Another actor, not a restart of this one: ray.kill ends an actor for good.
        ray.kill(self._actor)
        self._actor = self._make()
        self._open()

    def close(self) -> None:
        if ray.is_initialized():  # without a connection there is nothing to kill, and ray.kill would start a cluster
            ray.kill(self._actor)


def _alive() -> dict[str, dict[str, Any]]:
    """What Ray says of each machine of the cluster that it calls alive, by Ray's id."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _is_up(machine: str) -> bool:
    """Whether a machine of the cluster is alive and, where that can be seen from here, its Ray answers."""
    found = _alive().get(machine)
    if found is None or client.is_connected():  # through ray:// only the cluster's head is sure to be within reach
        return found is not None
    try:  # Ray itself calls a machine that is gone alive for up to half a minute
        socket.create_connection((found["NodeManagerAddress"], found["NodeManagerPort"]), _RAYLET_SECONDS).close()
    except OSError:
        return False
    return True


def _connect(address: str | None) -> str:
    """Connects to a cluster, or starts one; returns it in words for the user. InputError if there is none."""
    # ray.init sets its own handler of SIGTERM, which takes the signal for a crash: the caller's is restored below.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    where, how = _expected_at(address)
    host, _, port = where.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # ray.init would try for minutes to reach a cluster that does not exist
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:  # a ConnectionError is an OSError
        mend = "start one with ray start --head, or use --ray-address local"
        if where:
            mend = "check the address, and that ~/.ray/auth_token is the cluster's; --ray-address local starts one here"
        raise InputError(f"{how}: no Ray cluster there ({_first_line(error)}); {mend}") from error
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
    machines = len(_alive())
    return f"Ray cluster at {ray.get_runtime_context().gcs_address} of {machines} machine{'s' if machines > 1 else ''}"


def _expected_at(address: str | None) -> tuple[str, str]:
    """(address at which Ray will look for a cluster, "" if it starts or searches one; what names the address)."""
    # The order is that of ray.init: the argument, RAY_ADDRESS, then the file that `ray start` wrote on this machine.
    if address not in (None, "auto"):
        return ("" if address == "local" else str(address)), f"--ray-address {address}"
    if found := os.environ.get("RAY_ADDRESS", ""):
        return found, f"RAY_ADDRESS {found}"
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    try:
        found = noted.read_text().strip()
    except OSError:
        return "", f"--ray-address {address or 'auto'}"
    return found, f"{found}, which {noted} names"


def _room(gpus: float | None) -> tuple[float, int]:
    """(GPUs of a worker, number of workers that the cluster has room for)."""
    there = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0.0) >= 1.0 else 0.0
    room = int(there.get("CPU", 0.0))
    if gpus > 0.0:
        # A share lies within one GPU: shares of 0.4 fit twice into each, and what is left over is not combined.
        each = math.floor(1.0 / gpus) if gpus <= 1.0 else 1.0 / gpus
        room = min(room, int(there.get("GPU", 0.0) * each))
    return gpus, room


def _first_line(error: BaseException) -> str:
    """The first line of a message that is not empty. Ray's messages hold whole tracebacks of other processes."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
