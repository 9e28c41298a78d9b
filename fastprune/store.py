"""The run store: one folder per node, published whole or not at all, never changed afterwards.

    store.json                          the store's format
    nodes/<kk>/<key>/node.json          what the node is, what it gave, where and how it was computed
                     metrics.csv        a training run: one line an epoch
                     mask.safetensors   a prune step: one bit a weight, and layers.csv, its LPR
                     filters.json       which filters stay, and layers.csv, how many of each conv
                     state-<epoch>.safetensors     weights and batch-norm statistics, where an edge asks for them
                     momentum-<epoch>.safetensors  likewise
                     ratios-<fraction>.csv         the LPR at each epoch, were the run pruned there
    partial/<key>.*.safetensors         checkpoint of an interrupted run, and states it has passed
    locks/ tmp/ logs/ data/ cache/      housekeeping

Standard library and filelock only: tensors are written by callables that the caller hands in.
"""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.specs import SEMANTICS, Filters, Node, Prune, StateRef, Trace, Train

FORMAT = 1


@dataclass(frozen=True)
class Products:
    """What is asked of a training run beside its metrics: epochs after which its weights (with batch-norm statistics)
    or its momentum are kept, and fractions whose LPR is traced."""

    weights: tuple[int, ...] = ()
    momentum: tuple[int, ...] = ()
    traces: tuple[float, ...] = ()


class RunStore:
    """A folder of published nodes. Opening it creates it, unless it is only to be read.

    InputError for one that cannot be written or is of another format.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        check_format(root)
        if read_only:
            return
        marker = root / "store.json"
        try:
            for name in ("nodes", "partial", "locks", "tmp", "logs", "data", "cache"):
                (root / name).mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                _write_atomically(marker, lambda p: p.write_text(json.dumps({"format": FORMAT}) + "\n"))
            with tempfile.TemporaryFile(dir=root / "tmp"):
                pass
        except OSError as error:
            raise InputError(f"store {root}: cannot be written ({error.strerror}); choose another --store") from error

    def path(self, node: Node) -> Path:
        """The folder of a node, published or not."""
        return self.root / "nodes" / node.key[:2] / node.key

    def has(self, node: Node) -> bool:
        return (self.path(node) / "node.json").exists()

    def holds(self, node: Node, products: Products) -> bool:
        """Whether the node is published with all of `products`."""
        return (
            self.has(node)
            and all(self.state_path(StateRef(node, e)) for e in products.weights)  # type: ignore[arg-type]
            and all(self.state_path(StateRef(node, e), "momentum") for e in products.momentum)  # type: ignore[arg-type]
            and all((self.path(node) / trace_name(f)).exists() for f in products.traces)
        )

    def state_path(self, ref: StateRef, what: str = "state") -> Path | None:
        """The file of a state or "momentum", or None. A run that diverged before the epoch stands there with its last
        state."""
        if not self.has(ref.node):
            return None
        epoch = min(ref.epoch, self.node(ref.node)["result"]["epochs"])
        path = self.path(ref.node) / f"{what}-{epoch}.safetensors"
        return path if path.exists() else None

    def metrics(self, node: Train) -> dict[int, dict[str, float]]:
        """By epoch (from 1) what a published run measured. InputError if the file is damaged."""
        return self._numbers(node, "metrics.csv")

    def trace(self, trace: Trace) -> dict[int, dict[str, float]]:
        """By epoch (0: before the first) the LPR of each layer, up to the epoch in which the run diverged."""
        return self._numbers(trace.node, trace_name(trace.fraction))

    def _numbers(self, node: Node, name: str) -> dict[int, dict[str, float]]:
        path = self.path(node) / name
        try:
            with path.open(newline="") as f:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f, strict=True)]
            return {int(row.pop("epoch")): row for row in rows}
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            raise InputError(f"{path}: damaged or unreadable ({error}); delete its folder to make it again") from error

    def node(self, node: Node) -> dict[str, Any]:
        """node.json of a published node. InputError if it is damaged."""
        path = self.path(node) / "node.json"
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict) or not {"result", "provenance"} <= found.keys():
                raise ValueError("fields are missing")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged or unreadable ({error}); delete its folder to make it again") from error
        return found

    def mask_path(self, node: Prune) -> Path:
        return self.path(node) / "mask.safetensors"

    def filters_path(self, node: Filters) -> Path:
        return self.path(node) / "filters.json"

    def partial_path(self, node: Train, name: str) -> Path:
        """What a run in progress keeps: its "checkpoint", and what it passed ("state-<epoch>", "momentum-<epoch>")."""
        return self.root / "partial" / f"{node.key}.{name}.safetensors"

    def publish(
        self,
        node: Node,
        result: dict[str, Any],
        provenance: dict[str, Any],
        files: dict[str, Callable[[Path], Any]],
    ) -> None:
        """Makes the node's folder appear whole: written aside, flushed to disk, renamed. The first published wins.

        files: name -> function that writes it at the path it is given. A node that is there already only gains the
        files that it lacks.
        """
        described = {
            "kind": node.kind,
            "key": node.key,
            "semantics": SEMANTICS,
            "spec": node.identity(),
            "result": result,
            "provenance": provenance,
        }
        final = self.path(node)
        if self.has(node):
            for name, write in files.items():
                if not (final / name).exists():
                    _write_atomically(final / name, write)
            return
        final.parent.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{node.key}-", dir=self.root / "tmp"))
        try:
            for name, write in files.items():
                write(folder / name)
                _fsync(folder / name)
            (folder / "node.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
            _fsync(folder / "node.json")
            _fsync(folder)
            folder.chmod(0o755)
            if final.exists() and not self.has(node):  # somebody took node.json away: what is left is of no use
                os.rename(final, self.root / "tmp" / f"{node.key}-damaged-{os.getpid()}")
            try:
                os.rename(folder, final)
            except OSError:
                if not self.has(node):
                    raise
            _fsync(final.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(self.root / "tmp" / f"{node.key}-damaged-{os.getpid()}", ignore_errors=True)

    def save_partial(self, node: Train, name: str, write: Callable[[Path], Any]) -> None:
        """Writes or replaces a file of a run in progress, atomically."""
        _write_atomically(self.partial_path(node, name), write)

    def drop_partial(self, node: Train) -> None:
        """Removes what a run in progress kept, once it is published."""
        for path in (self.root / "partial").glob(f"{node.key}.*"):
            path.unlink(missing_ok=True)

    @contextmanager
    def lease(self, node: Node) -> Iterator[bool]:
        """Whether this process may compute the node now: False while another does. Released when the holder dies.

        Whoever gets it removes what a dead holder left half-written.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{node.key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            for folder in (self.root / "tmp").glob(f"{node.key}-*"):
                shutil.rmtree(folder, ignore_errors=True)
            for half_written in (self.root / "partial").glob(f".{node.key}.*"):
                half_written.unlink(missing_ok=True)
            for half_written in self.path(node).glob(".*"):
                half_written.unlink(missing_ok=True)
            yield True
        finally:
            lock.release()

    def log(self, node: Node, text: str) -> Path:
        """Keeps what a failed node said; returns the file."""
        path = self.root / "logs" / f"{node.key}.log"
        path.write_text(text)
        return path


def trace_name(fraction: float) -> str:
    """The file of an LPR at each epoch."""
    return f"ratios-{fraction!r}.csv"


def check_format(root: Path) -> None:
    """InputError if a store of another format stands at `root`; nothing is written."""
    marker = root / "store.json"
    if not marker.exists():
        return
    try:
        found = json.loads(marker.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{marker}: not a store of fastprune; choose another --store") from error
    if found != FORMAT:
        raise InputError(
            f"store {root}: written in format {found}, this version reads format {FORMAT}; choose another --store"
        )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of one shape, floats so that they read back exactly."""
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        _fsync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
