"""A data set of tensors in place of images, and a View that remembers: what tests of the engine share."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch

from fastprune.specs import GpuOptions, Prune, Train
from fastprune.store import RunStore
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import Outcome, run
from fastprune.study.workers import InPlaceWorker
from fastprune.training import tuning
from fastprune.training.trainer import Trainer


class Images:
    """Gaussian images whose mean tells the class."""

    loader = "fake"

    def __init__(self, batches: int = 3) -> None:
        self.batches = batches

    def train(self, *, seed, batch_size, subset, dtype):
        return Epochs(seed, batch_size, self.batches)

    def val(self, *, batch_size, subset, dtype):
        return Epochs(99, batch_size, self.batches)


class Epochs:
    """Batches that differ from epoch to epoch, and depend on nothing else."""

    def __init__(self, seed: int = 0, batch_size: int = 8, batches: int = 3) -> None:
        self.seed, self.batch_size, self.batches, self.epoch = seed, batch_size, batches, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        g = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for _ in range(self.batches):
            labels = torch.randint(4, (self.batch_size,), generator=g)
            yield torch.randn(self.batch_size, 3, 32, 32, generator=g) + labels.view(-1, 1, 1, 1), labels


def run_here(graph: Graph, config: WorkConfig, view: Any) -> Outcome:
    """Runs the graph in this process."""
    return run(graph, RunStore(config.store), [InPlaceWorker(graph, config)], view)


def made_up_options(monkeypatch) -> SimpleNamespace:
    """Trainers on a CPU choose GPU options as on a GPU, with stand-ins for their kernels, which scale the loss, and a
    clock that knows them: two are faster.

    kernels: by option, a function of the loss. ms: by option, what it adds to a step of 2 ms. ran: the options of the
    steps that were timed.
    """
    names = list(asdict(GpuOptions()))
    found = SimpleNamespace(
        kernels=dict(zip(names, (lambda x: x * 0.97, lambda x: x, lambda x: x * 1.05), strict=True)),
        ms=dict(zip(names, (-0.2, 0.1, -0.1), strict=True)),
        ran=[],
    )
    original, make = Trainer._mean_loss, Trainer.__init__

    def on_a_gpu(self, *args, **how):
        make(self, *args, **how)
        self._tunes = True

    def mean_loss(self, logits, labels, smoothing):
        loss = original(self, logits, labels, smoothing)
        for name, on in asdict(self.gpu_options).items():
            loss = found.kernels[name](loss) if on else loss
        return loss

    def clock(step):
        step()
        found.ran.append(step.__self__._copy.gpu_options)
        return 2.0 + sum(found.ms[name] for name, on in asdict(found.ran[-1]).items() if on)

    monkeypatch.setattr(Trainer, "_mean_loss", mean_loss)
    monkeypatch.setattr(tuning, "device_milliseconds", clock)
    monkeypatch.setattr(Trainer, "__init__", on_a_gpu)
    monkeypatch.setattr(tuning, "STEPS", 2)
    monkeypatch.setattr(tuning, "_WARM", 2)
    return found


class Silent:
    """A View that remembers."""

    def __init__(self) -> None:
        self.finished_nodes: list = []
        self.failures: list = []
        self.notes: list[str] = []
        self.images = 0
        self.how: dict[str, str] = {}

    def started(self, worker, node, place): ...

    def progress(self, worker, node, epoch, images):
        self.images += images

    def computes(self, worker, node, how):
        self.how[node.key] = how

    def note(self, text):
        self.notes.append(text)

    def finished(self, worker, node, result):
        self.finished_nodes.append(node)

    def failed(self, worker, node, reason, blocked):
        self.failures.append((node, reason))


def find_runs(chains: Chains, lr: float) -> list[Train]:
    """The runs whose weights are pruned, by round."""
    return [chains.find_state(MaskRecipe(lr), round).node for round in range(chains.settings.rounds)]


def eval_runs(chains: Chains, lr: float | None, lr_eval: float) -> list[Train]:
    """The dense network and each round's mask, trained with lr_eval."""
    return [chains.eval_run(MaskRecipe(lr), round, lr_eval) for round in range(chains.settings.rounds + 1)]


def masks(chains: Chains, lr: float | None) -> list[Prune]:
    return chains.masks(MaskRecipe(lr))
