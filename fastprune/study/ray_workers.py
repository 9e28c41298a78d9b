"""Workers on a Ray cluster: one actor a run, warm over many, with a share of a GPU or a CPU core."""

import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import fastprune
from fastprune.errors import InputError
from fastprune.specs import Runnable
from fastprune.store import RunStore
from fastprune.study.compute import WorkConfig, Worker
from fastprune.study.graph import Graph
from fastprune.study.workers import STARTS_LIMIT, Hear, cause_of, compute

_REPORT_SECONDS = 1.0
"""Between two reports of a worker's progress, and two looks at them."""

_SEEN_SECONDS = 60.0
"""How long a worker's machine may take to see a file that the driver's has just written."""

_ANSWER_SECONDS = 10.0

_TOUCH_SECONDS = 10.0

_PASSED_ON = ("OMP_", "MKL_", "NUMBA_", "TRITON_", "TORCHINDUCTOR_", "MPLCONFIGDIR")
"""What of the driver's environment its workers get."""


class _Reports:
    """What workers said since somebody last asked: (worker, key) -> (epoch, training images so far)."""

    def __init__(self) -> None:
        self.said: dict[tuple[int, str], tuple[int, int]] = {}

    def put(self, worker: int, key: str, epoch: int, images: int) -> None:
        self.said[worker, key] = epoch, images

    def take(self) -> dict[tuple[int, str], tuple[int, int]]:
        said, self.said = self.said, {}
        return said


class _Remote:
    """One worker, in a process of its own on some machine of the cluster."""

    def __init__(self, number: int, reports: Any) -> None:
        self.number, self.reports = number, reports

    def open(self, graph: Graph, config: WorkConfig, token: str, version: str) -> tuple[str, Any]:
        """("ready", (where this is, Ray's name of the machine)), or ("input", what keeps it from working here)."""
        host = socket.gethostname()
        if fastprune.__version__ != version:
            return "input", f"{host} has fastprune {fastprune.__version__}, here it is {version}: install the same"
        folders = [images.folder for images in config.images.values() if images.folder is not None]
        for path in (config.store / "tmp" / token, *folders):
            if not _appears(path):
                shared = "--store and --data must be on a disk that all machines see at the same path"
                return "input", f"{host} does not see {path.parent if path.name == token else path}: {shared}"
        gpus = ray.get_gpu_ids()
        try:
            self.graph, self.worker = graph, Worker(replace(config, device="cuda" if gpus else "cpu"))
        except Exception as error:
            return "input", f"{host} cannot work: {cause_of(error)}"
        place = f"{host} {'cuda' if gpus else 'cpu'}{''.join(map(str, gpus[:1]))}"
        return "ready", (place, ray.get_runtime_context().get_node_id())

    def compute(self, key: str) -> tuple[str, Any, int]:
        """The answer of crew.compute, and the training images that it took."""
        sent, seen = time.monotonic(), 0

        def report(epoch: int, images: int) -> None:
            nonlocal sent, seen
            seen += images
            if time.monotonic() - sent > _REPORT_SECONDS:
                self.reports.put.remote(self.number, key, epoch, seen)
                sent = time.monotonic()

        kind, value = compute(self.worker, self.graph, self.graph.by_key[key], report)
        return kind, value, seen


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        if path.parent.is_dir():
            os.listdir(path.parent)  # makes NFS look again
    return True


class RayCrew:
    """`workers` actors (None: as many as the cluster has room for now), but no more than `most`, each with `gpus` of a
    GPU, or on a CPU core if that is 0 or None and the cluster has no GPU. Those without room join when there is some.

    address: as ray.init takes it; None joins the cluster that this machine belongs to, or starts one here.
    InputError where no cluster can be reached, or it has no room for a single worker. about: which cluster it is, how
    many workers it has room for, and what each gets, for a person.
    """

    def __init__(
        self,
        graph: Graph,
        config: WorkConfig,
        *,
        address: str | None,
        workers: int | None,
        gpus: float | None,
        most: int,
    ) -> None:
        self.graph = graph
        with contextlib.ExitStack() as undo:
            undo.callback(ray.shutdown)
            which = _connect(address)
            gpus, room = _room(gpus)
            if workers is None and room == 0:
                raise InputError(f"the Ray cluster has no room for a worker with {gpus:g} GPUs: see --gpus-per-run")
            self.count = max(1, min(workers or room, most))
            each = f"each with {gpus:g} of a GPU" if gpus else "each on a CPU core"
            fewer = f", {room} for now: the cluster has no room for more" if room < self.count else ""
            self.about = f"{which}, runs at once: up to {self.count}, {each}{fewer}"
            token = f"{secrets.token_hex(8)}.seen"
            self.token = RunStore(config.store).root / "tmp" / token
            undo.callback(self.token.unlink, missing_ok=True)
            self.token.touch()
            self.shared = [ray.put(graph), ray.put(config), token, fastprune.__version__]
            variables = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
            variables["PYTHONPATH"] = os.pathsep.join(
                [str(Path(fastprune.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
            # Here, where this machine's end is the run's; begun again, it lacks a few seconds of what workers said.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            reports: Any = ray.remote(num_cpus=0)(_Reports)
            self.reports = reports.options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote()
            self.actor = ray.remote(num_cpus=1, num_gpus=gpus, runtime_env={"env_vars": variables})(_Remote)
            self.actors: list[Any] = [None] * self.count
            self.places: list[str | None] = [None] * self.count
            self.machines: list[str] = [""] * self.count
            self.keys: list[str | None] = [None] * self.count
            self.images = [0] * self.count
            self.waits: dict[Any, int | None] = {}
            self.died_at_start = 0
            self.asked = self.touched = 0.0
            for worker in range(self.count):
                self._start(worker)
            undo.pop_all()

    def _start(self, worker: int) -> None:
        self.places[worker] = self.keys[worker] = None
        self.actors[worker] = self.actor.remote(worker, self.reports)
        self.waits[self.actors[worker].open.remote(*self.shared)] = worker

    def free(self) -> list[int]:
        return [i for i in range(self.count) if self.places[i] is not None and self.keys[i] is None]

    def devices(self) -> list[str]:
        return [place or "" for place in self.places]

    def place(self, worker: int) -> str:
        return self.places[worker] or "starting"

    def give(self, worker: int, node: Runnable) -> None:
        self.keys[worker], self.images[worker] = node.key, 0
        self.waits[self.actors[worker].compute.remote(node.key)] = worker

    def listen(self, hear: Hear) -> None:
        if time.monotonic() - self.touched > _TOUCH_SECONDS:
            self.touched = time.monotonic()
            self.token.touch()  # for those that start later; gc takes what has not been touched for longer
        if time.monotonic() - self.asked > _REPORT_SECONDS and None not in self.waits.values():
            self.asked = time.monotonic()
            self.waits[self.reports.take.remote()] = None
        ready, _ = ray.wait(list(self.waits), num_returns=len(self.waits), timeout=0.2)
        for ref in ready:
            worker = self.waits.pop(ref)
            try:
                answer = ray.get(ref)
            except RayError as error:
                if worker is None:
                    raise InputError(
                        f"the Ray cluster is gone ({_first_line(error)}); the same command goes on"
                    ) from error
                self._replace(worker, _first_line(error), hear)
                continue
            if worker is None:
                for (number, key), (epoch, images) in answer.items():
                    self._count(number, key, epoch, images, hear)
            elif answer[0] == "ready":
                self.places[worker], self.machines[worker] = answer[1]
                self.died_at_start = 0
            elif self.keys[worker] is None:  # it could not begin
                raise InputError(answer[1])
            else:
                kind, value, images = answer
                self._count(worker, self.keys[worker], 0, images, hear)
                self.keys[worker] = None
                if kind == "failed":  # what broke may stay broken: a CUDA context does
                    ray.kill(self.actors[worker])
                    self._start(worker)
                hear(worker, kind, value)

    def _count(self, worker: int, key: str | None, epoch: int, images: int, hear: Hear) -> None:
        """Passes on progress, unless it is old."""
        if key == self.keys[worker]:
            more, self.images[worker] = images - self.images[worker], images
            hear(worker, "progress", (epoch, more))

    def _replace(self, worker: int, reason: str, hear: Hear) -> None:
        self.died_at_start += self.places[worker] is None
        if self.died_at_start >= STARTS_LIMIT:
            raise InputError(f"Ray's workers die as they start ({reason})")
        ray.kill(self.actors[worker])
        was_busy, machine = self.keys[worker] is not None, self.machines[worker]
        self._start(worker)
        if was_busy:
            hear(worker, "lost" if machine in _alive() else "gone", reason)

    def close(self) -> None:
        """May be called again."""
        self.token.unlink(missing_ok=True)
        if not ray.is_initialized():
            return
        for actor in [*self.actors, self.reports]:
            if actor is not None:
                ray.kill(actor)
        ray.shutdown()


def _alive() -> set[str]:
    """The machines of the cluster, by Ray's names."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _connect(address: str | None) -> str:
    """Which cluster it is, for a person. Ray itself would try for minutes where nobody listens; and it takes SIGTERM
    for a crash."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    where, how = _expected_at(address)
    host, _, port = where.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, OverflowError) as error:  # a ConnectionError is an OSError
        mend = "start one with ray start --head, or use --ray-address local"
        if where:
            mend = "is that right, and ~/.ray/auth_token the same as there? --ray-address local starts one here"
        raise InputError(f"{how}: no Ray cluster there ({_first_line(error)}); {mend}") from error
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
    machines = len(_alive())
    return f"Ray cluster at {ray.get_runtime_context().gcs_address} of {machines} machine{'s' if machines > 1 else ''}"


def _expected_at(address: str | None) -> tuple[str, str]:
    """(where Ray will look for a cluster, "" where it looks around; who says so)."""
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
    """GPUs of a worker, and how many workers there is room for."""
    there = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0.0) >= 1.0 else 0.0
    room = int(there.get("CPU", 0.0))
    if gpus > 0.0:
        # Shares of one GPU do not add up over several: a third fits three times into each.
        each = math.floor(1.0 / gpus) if gpus <= 1.0 else 1.0 / gpus
        room = min(room, int(there.get("GPU", 0.0) * each))
    return gpus, room


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
