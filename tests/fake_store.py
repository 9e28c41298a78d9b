"""Stores with small nodes that have what real ones have, for tests of what looks after stores."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastprune.figures.paper import A2
from fastprune.files import write_tensors
from fastprune.specs import ChannelSelection, DataSpec, Prune, Runnable, Train
from fastprune.store import RunStore, write_csv
from fastprune.study.chains import Chains
from fastprune.study.graph import Graph
from fastprune.study.settings import preset
from tests.fakes import eval_runs, find_runs, masks

DATA = DataSpec("tiny-imagenet", "f" * 64, 200, None, None, 100_000, 10_000)
CHAINS = Chains(preset(A2.protocol, "paper").override(rounds=2), DATA, 0)
FIND, MASKS = find_runs(CHAINS, 0.2), masks(CHAINS, 0.2)
EVAL = eval_runs(CHAINS, 0.2, 0.05)
GRAPH = Graph.of(EVAL)
TRAIN, PRUNE = FIND[0], MASKS[0]
FILTERS = ChannelSelection(TRAIN.final, 0.5)


def put(
    store: RunStore,
    node: Runnable,
    states: tuple[int, ...] = (),
    *,
    salt: float = 0.0,
    by: str = "cpu",
    host: str = "here",
    **made: Any,
) -> Path:
    """Publishes a node, or adds states to it; returns its folder. salt: makes other products. by, host, made:
    provenance."""
    provenance = {
        **{"device": by, "host": host, "devices": 1, "threads": 1, "loader": "synthetic", "versions": {"torch": "2"}},
        **{"wall_seconds": 90.0, "images_per_second": 45_300.0, "at": 1.7e9},
        **made,
    }
    files: dict[str, Any] = {}
    if isinstance(node, Train):
        result: dict[str, Any] = {"epochs": node.stop, "diverged": False, "accuracy": 0.5, "loss": 1.5}
        files["metrics.csv"] = lambda p: write_csv(p, [{"epoch": i, "val_accuracy": 0.5 + salt} for i in (1, 2)])
        files["times.csv"] = lambda p: write_csv(p, [{"epoch": 1, "seconds": 1.5 * len(by)}])
        files["ratios-0.2.csv"] = lambda p: write_csv(p, [{"epoch": 0, "conv1": 0.1}])
        for epoch in states:
            tensors = {"model.w": torch.full((4, 3), epoch + salt)}
            files[f"state-{epoch}.safetensors"] = lambda p, t=tensors: write_tensors(p, t)
            files[f"momentum-{epoch}.safetensors"] = lambda p, t=tensors: write_tensors(p, t, {"of": "momentum"})
    elif isinstance(node, Prune):
        result = {"round": node.round, "total": 10, "kept": 8, "density": 0.8, "layerwise_ratios": {}, "dead": 0}
        files["mask.safetensors"] = lambda p: write_tensors(p, {"conv1": torch.arange(5, dtype=torch.uint8)}, [salt])
        files["layers.csv"] = lambda p: write_csv(p, [{"layer": "conv1", "weights": 10, "kept": 8}])
    else:
        result = {"fraction": node.fraction, "removed_fraction": 0.5, "spared": [], "parameters": 9, "flops": 90}
        provenance |= {"latency_ms": 1.0 + len(by), "latency_whole_ms": 2.0}
        files["channels.json"] = lambda p: p.write_text(f'{{"kept": {{"conv1": [0, {salt}]}}}}\n')
        files["layers.csv"] = lambda p: write_csv(p, [{"layer": "conv1", "filters": 10, "kept": 8}])
    store.publish(node, result, provenance, files)
    return store.path(node)


def put_all(root: Path, graph: Graph = GRAPH, **how: Any) -> RunStore:
    """A store with all nodes of a graph and the states that they read."""
    store = RunStore(root)
    for node in graph.nodes:
        put(store, node, graph.needed(node).weights, **how)
    return store


def seeds(node: Any, count: int) -> list[Any]:
    """The node with other seeds; a training that begins anew also with the initial weights that they draw."""
    if not isinstance(node, Train):
        return [dataclasses.replace(node, seed=1000 + i) for i in range(count)]
    starts = (dataclasses.replace(node.start, seed=1000 + i) for i in range(count))  # type: ignore[arg-type]
    return [dataclasses.replace(node, seed=1000 + i, start=start) for i, start in enumerate(starts)]


def tree(root: Path) -> dict[str, bytes]:
    """By name the content of every file of the nodes."""
    files = (p for p in (root / "nodes").rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def temporaries(root: Path) -> list[Path]:
    return [*(root / "tmp").iterdir(), *(root / "leases").iterdir(), *(p for p in root.rglob(".*") if p.is_file())]
