"""Metrics of published trainings in TensorBoard or Weights & Biases: one run of theirs for each node."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fastprune.specs import Train
from fastprune.store import RunStore
from fastprune.study.graph import Graph
from fastprune.training.scalars import open_log


def log_folder(store: RunStore, kind: str) -> Path:
    """Where the runs of a log lie, one folder a training: for `tensorboard --logdir`."""
    return store.root / kind


def log_training(store: RunStore, graph: Graph, kinds: Iterable[str], node: Train) -> None:
    """Writes the epochs of a published training to each log, once: a node in a log is not written again."""
    for kind in kinds:
        # By its key: the store is shared by figures, in which a training has other names.
        folder = log_folder(store, kind) / node.key[:16]
        if folder.exists():
            continue
        config = {"key": node.key, "label": graph.label(node), **store.node(node)["result"]}
        unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
        log = open_log(kind, unfinished, name=graph.label(node), config=config)
        try:
            for epoch, row in sorted(store.metrics(node).items()):
                log.add(epoch, row)
        finally:
            log.close()
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
