"""The run store: a folder of published nodes. A node appears complete, and never changes, but may gain files."""

import csv
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import SUMS, digest, flush, read_sums, write_atomically, write_sums
from fastprune.specs import SEMANTICS, ChannelSelection, LprHistory, Node, Prune, Runnable, StateRef, Train

_NUMBER = (int, float)

_RESULTS: dict[str, dict[str, tuple[type, ...]]] = {
    "train": {"epochs": (int,), "diverged": (bool,), "accuracy": (*_NUMBER, type(None))},
    "prune": {"round": (int,), "total": (int,), "kept": (int,), "density": _NUMBER, "layerwise_ratios": (dict,)},
    "channels": {
        "removed_fraction": _NUMBER,
        "parameters": _NUMBER,
        "flops": _NUMBER,
        "spared": (list,),
    },
}
"""The fields that a result must have, with their types, by kind of node."""


def check_about(about: Any, key: str) -> None:
    """Checks the content of a node.json of the node `key`. ValueError if a field is missing or wrong."""
    if not isinstance(about, dict):
        raise ValueError("it does not describe a node")
    if not isinstance(about.get("kind"), str) or not isinstance(about.get("semantics"), int):
        raise ValueError("kind or semantics are missing")
    for name in ("about", "spec", "result", "provenance"):
        if not isinstance(about.get(name), dict):
            raise ValueError(f"{name} is missing")
    if about.get("key") != key:
        raise ValueError(f"it describes another node, {str(about.get('key'))[:40]!r}")
    for name, types in _RESULTS.get(about["kind"], {}).items():
        value = about["result"].get(name, "missing")
        # bool is a subclass of int: true must not pass for a number.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"its result's {name} is {str(value)[:40]}")


def in_words(node: Runnable) -> dict[str, str]:
    """{"network", "data"}: what a spec gives as keys and fingerprints only, in words; no "data" if none was used."""
    model, run = node.model, node
    if not isinstance(node, Train):
        run = node.source.node if isinstance(node.source, StateRef) else node
    of_width = "" if model.width == 64 else f" width {model.width}"
    of_stem = "" if model.stem == "imagenet" else f" stem {model.stem}"
    about = {"network": f"{model.name}{of_width}{of_stem}"}
    return about | {"data": run.data.name} if isinstance(run, Train) else about


FORMAT = 3

FOLDERS = ("nodes", "partial", "figures", "leases", "tmp", "logs", "data", "cache")

_APPEAR_SECONDS = 60.0
"""How long another machine may not see a new folder: NFS clients cache that a name did not exist."""


@dataclass(frozen=True)
class RequestedOutputs:
    """What a training run stores beside its metrics.

    weights, momentum: epochs after which the weights (with batch-norm statistics) or the momentum are stored.
    histories: fractions for which the LPR of a magnitude prune is recorded at each epoch.
    """

    weights: tuple[int, ...] = ()
    momentum: tuple[int, ...] = ()
    histories: tuple[float, ...] = ()


class RunStore:
    """A folder of published nodes. Opening it creates it, unless `read_only`.

    InputError if it cannot be written or is of another format.
    """

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        check_format(root)
        if read_only:
            return
        marker = root / "store.json"
        try:
            for name in FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                about = json.dumps({"format": FORMAT, "id": secrets.token_hex(8)}) + "\n"
                write_atomically(marker, lambda p: p.write_text(about))
            # A disk that cannot be written is better found here than at the end of the first training.
            with tempfile.TemporaryFile(dir=root / "tmp"):
                pass
        except OSError as error:
            raise InputError(f"store {root}: cannot be written ({error.strerror}); choose another --store") from error

    def cache(self) -> Path:
        """The folder for caches of compilers, not created."""
        # Caches hold code that will be executed. A store copied from elsewhere must not bring its own, so the name
        # depends on the store.json of this disk: device, inode and change time differ in any copy.
        found = os.stat(self.root / "store.json")
        name = hashlib.sha256(f"{found.st_dev} {found.st_ino} {found.st_ctime_ns}".encode()).hexdigest()[:16]
        return self.root / "cache" / name

    @property
    def id(self) -> str:
        """A random identifier: another machine that reads the same one at this path sees the same store."""
        return str(json.loads((self.root / "store.json").read_text())["id"])

    def path(self, node: Node) -> Path:
        """The folder of a node, published or not."""
        return self.root / "nodes" / node.key[:2] / node.key

    def has(self, node: Node) -> bool:
        """Whether the node is published."""
        # A folder alone does not count: a user may have deleted the files in it.
        return (self.path(node) / "node.json").exists()

    def holds(self, node: Node, products: RequestedOutputs) -> bool:
        """Whether the node is published with all outputs in `products`."""
        if not self.has(node):
            return False
        wanted = {lpr_name(fraction) for fraction in products.histories}
        for what, epochs in (("state", products.weights), ("momentum", products.momentum)):
            wanted |= {self._state_name(StateRef(node, epoch), what) for epoch in epochs}  # type: ignore[arg-type]
        return wanted <= self.files(node).keys()

    def files(self, node: Node) -> dict[str, str]:
        """The SHA-256 of each file of a published node, by name. InputError if SHA256SUMS is corrupt."""
        try:
            return read_sums(self.path(node))
        except (OSError, ValueError) as error:
            raise self.corrupt(self.path(node) / SUMS, error) from error

    def file(self, node: Node, name: str) -> Path:
        """The path of a published node's file, whose checksum was compared; InputError if it does not match."""
        path = self.path(node) / name
        try:
            if digest(path) != self.files(node)[name]:
                raise ValueError("its checksum is not that in SHA256SUMS")
        except KeyError:
            raise self.corrupt(path, f"not in {SUMS}") from None
        except (OSError, ValueError) as error:
            raise self.corrupt(path, error) from error
        return path

    def await_node(self, node: Node, seconds: float = _APPEAR_SECONDS) -> None:
        """Waits until this machine sees a node that another one has published. InputError after `seconds`."""
        deadline, pause = time.monotonic() + seconds, 0.05
        while not self.has(node):
            if time.monotonic() > deadline:
                raise InputError(f"{self.path(node)} is missing; all machines must see the same store at this path")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
            # Listing a folder makes an NFS client ask the server again.
            for folder in (self.root / "nodes", self.path(node).parent):
                if folder.is_dir():
                    os.listdir(folder)

    def state(self, ref: StateRef, what: str = "state") -> Path | None:
        """The file of a "state" or "momentum", its checksum compared; None if it is not stored."""
        if not self.has(ref.node) or (name := self._state_name(ref, what)) not in self.files(ref.node):
            return None
        return self.file(ref.node, name)

    def _state_name(self, ref: StateRef, what: str) -> str:
        # A run that diverged before the epoch has stored its last state in place of that epoch's.
        epoch = min(ref.epoch, self.node(ref.node)["result"]["epochs"])
        return f"{what}-{epoch}.safetensors"

    def metrics(self, node: Train) -> dict[int, dict[str, float]]:
        """The metrics of a published run, by epoch (from 1). InputError if the file is corrupt."""
        return self._numbers(node, "metrics.csv")

    def lpr_history(self, history: LprHistory) -> dict[int, dict[str, float]]:
        """The LPR of each layer, by epoch (0: before the first), up to the epoch in which the run diverged."""
        return self._numbers(history.node, lpr_name(history.fraction))

    def _numbers(self, node: Node, name: str) -> dict[int, dict[str, float]]:
        path = self.file(node, name)
        try:
            with path.open(newline="") as f:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f, strict=True)]
            return {int(row.pop("epoch")): row for row in rows}
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            raise self.corrupt(path, error) from error

    def node(self, node: Node) -> dict[str, Any]:
        """The content of a published node's node.json. InputError if it is corrupt."""
        path = self.file(node, "node.json")
        try:
            found = json.loads(path.read_text())
            check_about(found, node.key)
        except (OSError, ValueError) as error:
            raise self.corrupt(path, error) from error
        return dict(found)

    def corrupt(self, path: Path, why: Any) -> InputError:
        """The error to raise for a corrupt or missing file of a node."""
        return InputError(
            f"{path}: corrupt or missing ({why}); delete the folder {path.parent} to recompute the node "
            "(scripts/store.py verify --delete deletes all corrupt nodes)"
        )

    def mask(self, node: Prune) -> Path:
        """The mask file of a published prune step, its checksum compared."""
        return self.file(node, "mask.safetensors")

    def channels(self, node: ChannelSelection) -> Path:
        """The file of a published channel selection, its checksum compared."""
        return self.file(node, "channels.json")

    def partial_path(self, node: Train, name: str) -> Path:
        """A file of a run in progress: "checkpoint", or an output of an epoch behind it ("state-<epoch>",
        "momentum-<epoch>")."""
        return self.root / "partial" / f"{node.key}.{name}.safetensors"

    def publish(
        self,
        node: Runnable,
        result: dict[str, Any],
        provenance: dict[str, Any],
        files: dict[str, Callable[[Path], Any]],
    ) -> None:
        """Publishes a node: writes its folder aside, flushes it to disk, renames it. The first to publish wins.

        files: name -> function that writes the file at a given path. A node that is published already only gains the
        files that it lacks.
        """
        described = {
            "kind": node.kind,
            "key": node.key,
            "semantics": SEMANTICS,
            "about": in_words(node),
            "spec": node.identity(),
            "result": result,
            "provenance": provenance,
        }
        final = self.path(node)
        if self.has(node):
            # The earlier result stays: other nodes may have been computed from it.
            self._add(node, files)
            return
        folder = self.aside(node.key)
        try:
            for name, write in files.items():
                write(folder / name)
                flush(folder / name)
            (folder / "node.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
            flush(folder / "node.json")
            write_sums(folder, {name: digest(folder / name) for name in (*files, "node.json")})
            self.adopt(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _add(self, node: Node, files: dict[str, Callable[[Path], Any]]) -> None:
        gain(self.path(node), self.files(node), files)

    def aside(self, key: str) -> Path:
        """Creates a folder, on the store's disk, in which a node is written before it is published."""
        folder = self.root / "tmp" / f"{key}-{secrets.token_hex(4)}"
        folder.mkdir()
        return folder

    def adopt(self, folder: Path, final: Path) -> bool:
        """Renames the folder of a complete node to `final`; False if the node was published meanwhile.

        The files must be flushed to disk already.
        """
        flush(folder)
        final.parent.mkdir(exist_ok=True)
        if final.exists() and not (final / "node.json").exists():  # a user deleted files in it
            self.remove(final)
        # A rename replaces an empty folder only: where another process has published, it raises and changes nothing.
        try:
            os.rename(folder, final)
        except OSError:
            if not (final / "node.json").exists():
                raise
            return False
        flush(final.parent)
        return True

    def remove(self, folder: Path) -> None:
        """Removes a node's folder at once, or not at all. Only the holder of its lease may call it."""
        # A rename first: other processes never see a node of which some files are deleted.
        aside = self.aside(folder.name)
        try:
            os.rename(folder, aside / "removed")
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def save_partial(self, node: Train, name: str, write: Callable[[Path], Any]) -> None:
        """Writes or replaces a file of a run in progress, atomically. write: writes it at a given path."""
        write_atomically(self.partial_path(node, name), write)

    def drop_partial(self, node: Train) -> None:
        """Removes the checkpoint and the outputs of a run in progress, once it is published."""
        for path in (self.root / "partial").glob(f"{node.key}.*"):
            path.unlink(missing_ok=True)

    def tidy(self, node: Node) -> None:
        """Removes a node's half-written files of dead processes. Only the holder of its lease may call it."""
        for folder in (self.root / "tmp").glob(f"{node.key}-*"):
            shutil.rmtree(folder, ignore_errors=True)
        half_written = [*(self.root / "partial").glob(f".{node.key}.*"), *self.path(node).glob(".*")]
        for path in half_written:
            path.unlink(missing_ok=True)

    def log(self, node: Node, text: str) -> Path:
        """Writes the log of a failed node, over an earlier one; returns its path."""
        path = self.root / "logs" / f"{node.key}.log"
        write_atomically(path, lambda p: p.write_text(text))  # by a rename, which replaces a file of another user, too
        return path


def gain(folder: Path, sums: dict[str, str], files: dict[str, Callable[[Path], Any]]) -> list[str]:
    """Adds to a published node the `files` that `sums`, its checksums, do not list; returns their names."""
    digests: dict[str, str] = {}

    def written(name: str, path: Path) -> None:
        files[name](path)
        digests[name] = digest(path)  # before the file appears, so that it is unlisted as briefly as possible

    for name in sorted(files.keys() - sums.keys()):
        write_atomically(folder / name, partial(written, name))
    if digests:
        # Read again: a process that was wrongly taken for dead may have added files meanwhile.
        write_sums(folder, read_sums(folder) | digests)
    return list(digests)


def lpr_name(fraction: float) -> str:
    """The name of the file with the LPR at each epoch for a fraction."""
    # repr reads back as the same float, so that two fractions never share a file.
    return f"ratios-{fraction!r}.csv"


def check_format(root: Path) -> None:
    """InputError if `root` holds a store of another format. Writes nothing."""
    marker = root / "store.json"
    if not marker.exists():
        return
    try:
        found = json.loads(marker.read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{marker}: not a store of fastprune; choose another --store") from error
    if found != FORMAT:
        raise InputError(
            f"store {root}: written in format {found}, this version reads format {FORMAT}; choose another --store"
        )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with equal columns; floats read back exactly."""
    # The same line end on each system: equal results have equal bytes.
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: repr(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
