"""A data set of tensors in place of images, and a View that remembers: what tests of the engine share."""

from typing import Any

import torch

from fastprune.specs import Prune, Train
from fastprune.store import RunStore
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import Outcome, run
from fastprune.study.workers import InPlaceWorker


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
