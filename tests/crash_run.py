"""A run of some ten seconds in a process of its own, to be killed at any moment from outside, or at a chosen point.

Children are forked from a server that has imported everything, so that a kill costs the run and not the imports.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fastprune import files
from fastprune.figures import load
from fastprune.loaders.manifest import Manifest
from fastprune.specs import DataSpec
from fastprune.store import RunStore, run_store
from fastprune.study import compute
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import execute
from fastprune.study.settings import preset
from fastprune.training.flat import FlatParams
from tests.fakes import Images, Silent

DATA = DataSpec("made up", "f" * 64, 4, None, None, 24, 8)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.crash_run"])


def graph() -> Graph:
    """Find and eval chains of two rounds, late rewinding (states and momentum on the way), the random baseline."""
    settings = {"seeds": 1, "epochs": 5, "batch_size": 8, "rounds": 2, "fraction": 0.5, "width": 8}
    base = preset(load("A2").protocol, "smoke").override(**settings)
    late, init = Chains(base.override(rewind="late", rewind_epoch=2), DATA, 0), Chains(base, DATA, 0)
    return Graph.of(
        [
            late.eval_run(MaskRecipe(0.05), 2, 0.1),
            init.eval_run(MaskRecipe(0.2), 2, 0.2),
            init.eval_run(MaskRecipe(None), 2, 0.2),
        ]
    )


def config(root: Path) -> WorkConfig:
    manifest = Manifest.__new__(Manifest)  # nothing looks into it
    images = {DATA.fingerprint: compute.Images(manifest, None, "made up")}
    return WorkConfig(root, images, checkpoint_seconds=0.0)  # a checkpoint after each epoch


def published(root: Path) -> dict[str, tuple[int, int]]:
    """By key, what tells whether a node was written again."""
    found = {path.parent.name: path.stat() for path in root.glob("nodes/*/*/node.json")}
    return {key: (at.st_ino, at.st_mtime_ns) for key, at in found.items()}


class Counting(Silent):
    """When it has heard of progress `at` times, it says so in a pipe or, where there is none, kills the process."""

    def __init__(self, pipe: Any, at: int) -> None:
        super().__init__()
        self.pipe, self.at, self.heard = pipe, at, 0

    def progress(self, *about: Any) -> None:
        self.heard += 1
        if self.heard == self.at:
            _die() if self.pipe is None else self.pipe.send("now")


def start(root: Path, *, die_at: str | None = None, pipe: Any = None, report: int = 0) -> BaseProcess:
    """The run, begun or continued. die_at: one of POINTS, where it kills itself. report: by its number, a report of
    progress (they are as many as training steps) at which it says "now" in the pipe or, without a pipe, kills itself.
    pipe: gets (keys computed, number of reports) in the end."""
    process = CONTEXT.Process(target=_run, args=(root, die_at, pipe, report))
    process.start()
    return process


def _run(root: Path, die_at: str | None, pipe: Any, report: int) -> None:
    torch.set_num_threads(1)
    compute.open_data = lambda *args, **kwargs: Images(batches=16)
    if die_at is not None:
        POINTS[die_at]()
    view = Counting(pipe, report)
    outcome = execute(graph(), config(root), view)
    assert outcome.failed == {}
    if pipe is not None:
        pipe.send((outcome.done, view.heard))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _killed_by(module: Any, name: str, when: Callable[..., bool], *, after: bool = False, call: int = 1) -> None:
    """Makes the `call`-th call of module.name that `when` is about the process's last act."""
    original = getattr(module, name)
    left = call

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        hit = when(*args, **kwargs)
        left -= hit
        if hit and left == 0 and not after:
            _die()
        given = original(*args, **kwargs)
        if hit and left == 0:
            _die()
        return given

    setattr(module, name, wrapped)


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _checkpoint(path: Path, *_: Any) -> bool:
    return "checkpoint" in path.name


def _in_nodes(_: Any, final: Any) -> bool:
    return Path(final).parent.parent.name == "nodes"


POINTS: dict[str, Callable[[], None]] = {
    # Gradients are there, the weights are the old ones, somewhere in the third run.
    "inside a step": lambda: _killed_by(FlatParams, "backward", _always, after=True, call=2 * 5 * 16 + 41),
    "in a checkpoint, half written": lambda: _killed_by(files, "flush", _checkpoint, call=3),
    "in a checkpoint, not yet renamed": lambda: _killed_by(files, "flush", _checkpoint, after=True, call=3),
    "after a checkpoint": lambda: _killed_by(
        compute.RunStore, "save_partial", lambda *a: a[2] == "checkpoint", after=True
    ),
    "at a state on the way": lambda: _killed_by(
        compute.RunStore, "save_partial", lambda *a: a[2].startswith("momentum"), after=True
    ),
    "in a publish, some files written": lambda: _killed_by(run_store, "flush", lambda p: p.name == "times.csv", call=2),
    "in a publish, without checksums": lambda: _killed_by(run_store, "write_sums", _always, call=2),
    "in a publish, not yet renamed": lambda: _killed_by(os, "rename", _in_nodes, call=3),
    "in a publish, just renamed": lambda: _killed_by(os, "rename", _in_nodes, after=True, call=3),
    "published, checkpoint still there": lambda: _killed_by(RunStore, "drop_partial", _always, call=2),
    "in a prune": lambda: _killed_by(compute, "prune", _always, call=2),
    "in a prune, mask written": lambda: _killed_by(
        run_store, "flush", lambda p: p.name == "mask.safetensors", after=True
    ),
}
