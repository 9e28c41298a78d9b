"""Whether several runs at once on one device pay: images/s of all together, through the real worker processes."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.figures import load
from fastprune.figures.reproduce import data_spec
from fastprune.loaders import locate
from fastprune.loaders.synthetic import SyntheticData
from fastprune.specs import Runnable
from fastprune.study.chains import Chains
from fastprune.study.compute import Images, WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import execute
from fastprune.study.settings import Settings, preset
from fastprune.study.workers import Processes

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

WORKERS = (1, 2, 4)


class _EnoughError(Exception):
    """Measured: the runs need not end."""


class _Meter:
    """A View that measures for `window` seconds from when all workers are past their first epoch: all is compiled then.
    seen: (seconds, training images) of each report."""

    def __init__(self, workers: int, window: float) -> None:
        self.workers, self.window = workers, window
        self.warm: set[int] = set()
        self.seen: list[tuple[float, int]] = []

    def started(self, worker: int, node: Runnable, place: str) -> None: ...

    def progress(self, worker: int, node: Runnable, epoch: int, images: int) -> None:
        """_EnoughError when the window is over."""
        if epoch >= 1:
            self.warm.add(worker)
        if len(self.warm) == self.workers:
            self.seen.append((time.perf_counter(), images))
            if self.seen[-1][0] - self.seen[0][0] > self.window:
                raise _EnoughError

    def note(self, text: str) -> None: ...

    def finished(self, worker: int | None, node: Runnable, result: dict[str, Any]) -> None:
        raise RuntimeError("a run ended before the measurement did")

    def failed(self, worker: int, node: Runnable, reason: str, resting: list[Runnable]) -> None:
        raise RuntimeError(reason)

    @property
    def rate(self) -> float:
        """Images/s; what the first report brings was computed before it."""
        return sum(images for _, images in self.seen[1:]) / (self.seen[-1][0] - self.seen[0][0])


def time_shared(s: "Suite") -> None:
    """For a small network and the paper's: rows `NETWORK, N at once` with images/s of all N, and a batch's share."""
    base = preset(load("A2").protocol, "smoke").override(seeds=max(WORKERS), precision="fp32" if s.small else "bf16")
    size: dict[str, Any] = {"train_per_class": 100, "batch_size": 50, "epochs": 1000, "width": 4, "image_size": 32}
    if not s.small:
        size = {"train_per_class": 5000, "batch_size": 512, "epochs": 1000, "width": 16, "image_size": 32}
    networks = {f"ResNet-18 of width {size['width']} at {size['image_size']} px": base.override(**size)}
    if not s.small:
        networks["ResNet-18 at 64 px"] = base.override(**size | {"width": 64, "image_size": 64})
    for name, settings in networks.items():
        for workers in WORKERS:
            try:
                row = _shared(s, settings, workers)
            except RuntimeError as error:  # a row that fails must not cost the others
                s.errors[f"{name}, {workers} at once"] = str(error)[:200]
                continue
            s.record(f"{name}, {workers} at once", row)


def _shared(s: "Suite", settings: Settings, workers: int) -> dict[str, Any]:
    data = SyntheticData(10, settings.train_per_class or 500, 10, size=settings.image_size)
    with tempfile.TemporaryDirectory() as folder:
        manifest, found = locate(data, Path(folder), loader="auto")
        spec = data_spec(manifest, settings)
        graph = Graph.of([Chains(settings, spec, seed).dense(0.1) for seed in range(workers)])
        images = Images(manifest, found, "resident" if s.cuda else "synthetic")
        config = WorkConfig(Path(folder) / "store", {manifest.fingerprint: images}, device=str(s.device))
        meter = _Meter(workers, 2.0 if s.small else 8.0)
        with suppress(_EnoughError):
            execute(graph, config, meter, crew=Processes(graph, config, [str(s.device)], workers))
    return {"ms": 1e3 * settings.batch_size / meter.rate, "images_per_s": meter.rate, "how": "processes"}
