"""A run in a process of its own that is killed at a chosen operation on its store, or at a chosen training step.

Children are forked from a server that has imported and compiled everything, so that a kill costs the run only.
"""

import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fastprune.figures import load
from fastprune.loaders.manifest import Manifest
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Rewind
from fastprune.store.lease import Leases
from fastprune.study import compute, run
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import NodeComputer, WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.settings import preset
from tests.fakes import Images, Silent, run_here

DATA = DataSpec("fake", "f" * 64, 4, None, None, 8, 8)
SMALL = {"seeds": 1, "rounds": 2, "fraction": 0.5, "epochs": 3, "batch_size": 8, "width": 4}
LEASE_SECONDS = 2.0
KINDS = ("random", "late", "lr", "finetune", "transplant", "structured")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.crash_run"])


def graph(kind: str) -> Graph:
    """Every kind of chain: from stored states with and without momentum, with histories, ratios, smaller networks."""

    def chains(figure: str = "A2", **changes: Any) -> Chains:
        return Chains(preset(load(figure).protocol, "smoke").override(**SMALL, **changes), DATA, 0)

    if kind == "random":
        return Graph.of([chains().eval_run(MaskRecipe(None), 2, 0.2), chains().eval_run(MaskRecipe(None), 1, 0.1)])
    if kind == "transplant":
        return Graph.of([chains().eval_run(MaskRecipe(0.2, ratios_of=0.05), 1, 0.2)])
    if kind == "structured":
        c = Chains(
            preset(load("structured").protocol, "smoke").override(
                **{k: v for k, v in SMALL.items() if k not in ("rounds", "fraction")}, model="resnet18"
            ),
            DATA,
            0,
        )
        dense = c.dense(0.1)
        return Graph.of([c.train(0.05, ChannelSelection(dense.final, 0.5), Rewind(dense.final, 0, momentum=False))])
    c = chains(rewind=kind, rewind_epoch=2)
    return Graph.of([c.eval_run(MaskRecipe(0.05), 2, 0.1), LprHistory(c.dense(0.05), 0.5)])


GRAPHS = {kind: graph(kind) for kind in KINDS}


def config(root: Path) -> WorkConfig:
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "height", 32)  # all that is looked at
    images = {DATA.fingerprint: compute.Images(manifest, None, "fake")}
    return WorkConfig(root, images, checkpoint_seconds=0.0)  # a checkpoint after each epoch


def published(root: Path) -> dict[str, tuple[int, int]]:
    """By key, what tells whether a node was written again."""
    found = {path.parent.name: path.stat() for path in root.glob("nodes/*/*/node.json")}
    return {key: (at.st_ino, at.st_mtime_ns) for key, at in found.items()}


def start(
    root: Path, kind: str, *, kill_at: int | None = None, torn: bool = False, step: int = 0, pipe: Any = None
) -> BaseProcess:
    """The run, begun or continued.

    kill_at: the number of the operation on the store before which it kills itself; torn: as if in the middle of writing
    the file that was opened last. step: the number of the training step at which it says "now" in the pipe or, without
    a pipe, kills itself (-1: never; unless it is 0, epochs are longer). pipe: gets in the end (keys computed, keys that
    were computed though published, number of operations, number of steps).
    """
    process = CONTEXT.Process(target=_run, args=(root, kind, kill_at, torn, step, pipe))
    process.start()
    return process


def _run(root: Path, kind: str, kill_at: int | None, torn: bool, step: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    compute.open_data = lambda *args, **kwargs: Images(batches=1 if step == 0 else 8)
    run.Leases = functools.partial(Leases, seconds=LEASE_SECONDS)  # type: ignore[misc, assignment]
    again: list[str] = []
    original: Callable[..., Any] = NodeComputer.compute_node

    def checked(self: NodeComputer, node: Any, outputs: Any, report: Any) -> Any:
        if self.store.holds(node, GRAPHS[kind].needed(node)):
            again.append(node.key)
        return original(self, node, outputs, report)

    NodeComputer.compute_node = checked  # type: ignore[method-assign]
    view = _Steps(pipe, step)
    operations = _Operations(root, kill_at, torn)
    sys.addaudithook(operations)
    outcome = run_here(GRAPHS[kind], config(root), view)
    assert outcome.failed == {}, outcome.failed
    if pipe is not None:
        pipe.send((outcome.done, again, operations.count, view.heard))


class _Steps(Silent):
    """Counts reports of progress, which are as many as training steps."""

    def __init__(self, pipe: Any, at: int) -> None:
        super().__init__()
        self.pipe, self.at, self.heard = pipe, at, 0

    def progress(self, *about: Any) -> None:
        self.heard += 1
        if self.heard == self.at:
            _die() if self.pipe is None else self.pipe.send("now")


class _Operations:
    """An audit hook that counts what changes the store: files opened for writing, renamed, removed; folders made."""

    def __init__(self, root: Path, kill_at: int | None, torn: bool) -> None:
        self.root, self.kill_at, self.torn = os.fspath(root), kill_at, torn
        self.count = 0
        self.written = ""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not isinstance(args[0], str | os.PathLike) or not os.fspath(args[0]).startswith(self.root):
            return
        if self.count == self.kill_at:
            self.kill_at = None  # what follows is no operation of the run
            # Whatever became of that file: an error raised here would reach the run, which would then go on.
            with suppress(OSError):
                if self.torn:
                    os.truncate(self.written, os.path.getsize(self.written) // 2)
            _die()
        self.count += 1
        if event == "open":
            self.written = os.fspath(args[0])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _warm() -> None:
    original = compute.open_data
    compute.open_data = lambda *args, **kwargs: Images(batches=1)
    try:
        for kind in ("late", "structured"):
            with tempfile.TemporaryDirectory() as folder:
                run_here(GRAPHS[kind], config(Path(folder)), Silent())
    finally:
        compute.open_data = original


torch.set_num_threads(1)
_warm()
