"""Throughput of several training runs that share one device: images/s of all together, in worker processes."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastprune.figures import load
from fastprune.loaders import find_or_prepare
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import Runnable
from fastprune.store import RunStore
from fastprune.study.chains import Chains
from fastprune.study.compute import Images, WorkConfig
from fastprune.study.data import data_spec
from fastprune.study.graph import Graph
from fastprune.study.run import run
from fastprune.study.settings import Settings, preset
from fastprune.study.workers import ProcessWorker

WORKERS = (1, 2, 4)


class _EnoughError(Exception):
    """The measurement is complete. Ends the runs early."""


class _Meter:
    """A View that counts images for `window` seconds once all workers are past their first epoch.

    seen: (seconds, training images) of each report.
    """

    def __init__(self, workers: int, window: float) -> None:
        self.workers, self.window = workers, window
        self.warm: set[int] = set()
        self.seen: list[tuple[float, int]] = []

    def started(self, worker: int, node: Runnable, place: str) -> None: ...

    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None:
        """Raises _EnoughError when the window is over."""
        # The first epoch imports, compiles and captures. Until every worker is past it they do not compete in full.
        if epoch >= 1:
            self.warm.add(worker)
        if len(self.warm) == self.workers:
            self.seen.append((time.perf_counter(), images))
            if self.seen[-1][0] - self.seen[0][0] > self.window:
                raise _EnoughError

    def computes(self, worker: int, node: Runnable, how: str) -> None: ...

    def note(self, text: str) -> None: ...

    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None:
        raise RuntimeError("a run ended before the measurement did")

    def failed(self, worker: int, node: Runnable, reason: str, blocked: list[Runnable]) -> None:
        raise RuntimeError(reason)

    @property
    def rate(self) -> float:
        """Images/s of all workers within the window."""
        # The images of the first report were computed before the window began.
        return sum(images for _, images in self.seen[1:]) / (self.seen[-1][0] - self.seen[0][0])


def networks(small: bool) -> dict[str, Settings]:
    """Settings by name: a small network, too small to fill a GPU, and the paper's."""
    base = preset(load("A2").protocol, "smoke").override(seeds=max(WORKERS), precision="fp32" if small else "bf16")
    # More epochs than any window takes: a run that ended would stop competing.
    size: dict[str, Any] = {"train_per_class": 100, "batch_size": 50, "epochs": 1000, "width": 4, "image_size": 32}
    if small:
        return {"ResNet-18 of width 4 at 32 px": base.override(**size)}
    size |= {"train_per_class": 5000, "batch_size": 512, "width": 16}
    large = size | {"width": 64, "image_size": 64}
    return {"ResNet-18 of width 16 at 32 px": base.override(**size), "ResNet-18 at 64 px": base.override(**large)}


def time_shared(settings: Settings, workers: int, device: torch.device, window: float) -> dict[str, Any]:
    """A row: images/s of `workers` runs together, and ms a batch at that rate. RuntimeError if a run fails."""
    data = SyntheticData(10, settings.train_per_class or 500, 10, size=settings.image_size)
    with tempfile.TemporaryDirectory() as folder:
        manifest, found = find_or_prepare(data, Path(folder), loader="auto")
        spec = data_spec(manifest, settings)
        # One node a worker, told apart by seed: equal nodes would be trained once.
        graph = Graph.of([Chains(settings, spec, seed).dense(0.1) for seed in range(workers)])
        # Batches from memory, so that runs compete for the device and not for a loader.
        images = Images(manifest, found, "resident" if device.type == "cuda" else "synthetic")
        config = WorkConfig(Path(folder) / "store", {manifest.fingerprint: images}, device=str(device))
        meter = _Meter(workers, window)
        with suppress(_EnoughError):
            run(graph, RunStore(config.store), [ProcessWorker(graph, config) for _ in range(workers)], meter)
    return {"ours": workers == 1, "ms": 1e3 * settings.batch_size / meter.rate, "images_per_s": meter.rate}
