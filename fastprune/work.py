"""Computes one node. A Worker stays warm: it keeps a Trainer per network and the opened data set over many nodes."""

import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastprune
from fastprune.errors import InputError
from fastprune.flat import layout, prunable
from fastprune.graph import Runnable
from fastprune.loaders import DataSource, Subset, open_data
from fastprune.loaders.manifest import Manifest
from fastprune.masks import Mask
from fastprune.models import build, initial_model
from fastprune.pruning import magnitude_scores, prune, random_scores
from fastprune.specs import ALLOCATIONS, SCORES, Init, ModelSpec, Prune, Train
from fastprune.step import EpochMetrics
from fastprune.store import RunStore, write_csv
from fastprune.tensors import read_tensors, write_tensors
from fastprune.train import Trainer

Report = Callable[[int, int], None]
"""Called with (epochs done, training images since the last call)."""


@dataclass(frozen=True)
class WorkConfig:
    """What a worker needs to know beside the node: nothing in here changes a result.

    show: progress on stderr while the data set is opened.
    """

    store: Path
    manifest: Manifest
    folder: Path | None
    loader: str
    device: str = "cpu"
    threads: int = 1
    show: bool = False
    checkpoint_seconds: float = 60.0


class Worker:
    """Runs nodes one after another in this process."""

    def __init__(self, config: WorkConfig) -> None:
        self.config = config
        self.store = RunStore(config.store)
        if config.device == "cpu":
            torch.set_num_threads(config.threads)
        elif ":" in config.device:
            torch.cuda.set_device(config.device)  # where kernels and graphs go that name no device
        self._source: DataSource | None = None
        self._trainers: dict[tuple[ModelSpec, str], Trainer] = {}
        self._initial: dict[str, dict[str, Tensor]] = {}

    def run(self, node: Runnable, states: list[int], report: Report) -> tuple[dict[str, Any], int]:
        """Computes and publishes a node whose parents are published; returns its result, and the epochs it took here.

        states: epochs after which a training run's state is kept.
        """
        if isinstance(node, Prune):
            return self._prune(node), 0
        return self._train(node, states, report)

    def _train(self, node: Train, states: list[int], report: Report) -> tuple[dict[str, Any], int]:
        trainer = self._trainer(node.model, node.precision)
        history = self._start(trainer, node, states)
        done_before = len(history)
        trainer.set_mask(None if node.mask is None else self._mask(node.mask))
        train, val = self._batches(node, trainer.images)
        saved_at = time.monotonic()
        report(len(history), 0)

        def on_epoch(metrics: EpochMetrics) -> None:
            nonlocal saved_at
            history.append(metrics)
            report(len(history), 0)
            if metrics.epoch in states and metrics.epoch < node.stop:
                self.store.save_partial(node, f"state-{metrics.epoch}", lambda p: write_tensors(p, trainer.state()))
            if metrics.epoch < node.stop and time.monotonic() - saved_at >= self.config.checkpoint_seconds:
                done = [m.as_dict() for m in history]
                self.store.save_partial(node, "checkpoint", lambda p: write_tensors(p, trainer.state(), done))
                saved_at = time.monotonic()

        if len(history) < node.stop and not (history and history[-1].diverged):
            trainer.fit(
                train,
                val,
                node.optimizer,
                node.schedule,
                start=len(history),
                stop=node.stop,
                on_batch=lambda images: report(len(history), images),
                on_epoch=on_epoch,
            )
        last = history[-1]
        files: dict[str, Callable[[Path], Any]] = {
            "metrics.csv": lambda p: write_csv(p, [m.as_dict() for m in history])
        }
        for epoch in states:
            if epoch < last.epoch:
                source = self.store.partial_path(node, f"state-{epoch}")
                files[f"state-{epoch}.safetensors"] = lambda p, source=source: shutil.copyfile(source, p)  # type: ignore
            else:
                files[f"state-{last.epoch}.safetensors"] = lambda p: write_tensors(p, trainer.state())
        result = {
            "epochs": last.epoch,
            "diverged": last.diverged,
            "accuracy": None if last.diverged else last.val_accuracy,
            "loss": last.val_loss if math.isfinite(last.val_loss) else None,
        }
        rate = sum(m.images_per_second for m in history) / len(history)
        seconds = sum(m.seconds for m in history)
        self.store.publish(node, result, self._provenance(seconds, rate), files)
        self.store.drop_partial(node)
        return result, len(history) - done_before

    def _start(self, trainer: Trainer, node: Train, states: list[int]) -> list[EpochMetrics]:
        """Puts the trainer where the run begins, or where its checkpoint left it; returns the epochs done.

        A checkpoint that has passed a state which is wanted only now does not help.
        """
        path = self.store.partial_path(node, "checkpoint")
        if path.exists():
            try:
                state, done = read_tensors(path)
                history = [EpochMetrics(**m) for m in done]
                passed = (e for e in states if e <= len(history))
                if all(self.store.partial_path(node, f"state-{e}").exists() for e in passed):
                    trainer.load_state(state)
                    return history
            except (TypeError, ValueError) as error:
                print(f"unusable checkpoint, this run starts from its beginning: {error}", file=sys.stderr)
        trainer.load_state(self._initial_state(node.start), momentum=False)
        return []

    def _prune(self, node: Prune) -> dict[str, Any]:
        if node.score not in SCORES or node.allocation not in ALLOCATIONS:
            raise ValueError(f"cannot prune by score {node.score!r} with allocation {node.allocation!r}")
        began = time.perf_counter()
        if node.prior is not None:
            mask = self._mask(node.prior)
        else:
            with torch.device("meta"):
                model = build(node.model)
            mask = Mask.dense(layout(prunable(model)))
        if node.score == "random":
            scores = random_scores(mask, node.seed, node.round)
        else:
            scores = magnitude_scores(self._weights(node), mask)
        new = prune(scores, mask, node.fraction)
        result = {
            "round": node.round,
            "total": new.total,
            "kept": new.kept,
            "density": new.density,
            "layerwise_ratios": new.layerwise_ratios(),
        }
        self.store.publish(
            node,
            result,
            self._provenance(time.perf_counter() - began, None),
            {"mask.safetensors": new.save, "layers.csv": lambda p: p.write_text(new.ratios_csv())},
        )
        return result

    def _mask(self, node: Prune) -> Mask:
        path = self.store.mask_path(node)
        with _to_be_made_again(path):
            return Mask.load(path)

    def _weights(self, node: Prune) -> dict[str, Tensor]:
        if isinstance(node.source, Init):
            state = self._initial_state(node.source)
        else:
            path = self.store.state_path(node.source)
            if path is None:
                raise RuntimeError(f"training {node.source.node.key} has no state after epoch {node.source.epoch}")
            with _to_be_made_again(path):
                state, _ = read_tensors(path)
        return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}

    def _trainer(self, model: ModelSpec, precision: str) -> Trainer:
        if (model, precision) not in self._trainers:
            self._trainers[model, precision] = Trainer(build(model), device=self.config.device, precision=precision)
        return self._trainers[model, precision]

    def _initial_state(self, init: Init) -> dict[str, Tensor]:
        if init.key not in self._initial:
            state = initial_model(init).state_dict()
            self._initial = {init.key: {f"model.{name}": tensor for name, tensor in state.items()}}
        return self._initial[init.key]

    def _batches(self, node: Train, dtype: torch.dtype) -> tuple[Any, Any]:
        data, batch_size = node.data, node.optimizer.batch_size
        if self._source is None:
            c = self.config
            self._source = open_data(c.manifest, c.folder, loader=c.loader, device=c.device, show=c.show)
        subset = Subset(data.classes, data.train_per_class, data.val_per_class)
        how = {"batch_size": batch_size, "subset": subset, "dtype": dtype}
        return self._source.train(seed=node.seed, **how), self._source.val(**how)

    def _provenance(self, seconds: float, rate: float | None) -> dict[str, Any]:
        where = environment(self.config.loader, [self.config.device])
        return {**where, "wall_seconds": seconds, "images_per_second": rate, "at": time.time()}


@contextmanager
def _to_be_made_again(path: Path) -> Iterator[None]:
    """Says what to do about a damaged file of a published node."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete the folder {path.parent} to make it again") from error


def environment(loader: str, devices: list[str]) -> dict[str, Any]:
    """Where results are computed: versions, devices, threads, loader. Recorded, never part of a key."""

    def name(device: str) -> str:
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu ({platform.machine()})"

    versions = {
        "fastprune": fastprune.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {
        "device": ", ".join(dict.fromkeys(map(name, devices))),
        "devices": len(devices),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "loader": loader,
        "versions": versions,
    }
