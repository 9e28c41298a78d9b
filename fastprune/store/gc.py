"""Garbage collection: removes leftovers and, when the user confirms it, what no recorded figure needs.

A node's files are removed only under its lease: the files of a node that a process computes stay.
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastprune.errors import InputError
from fastprune.files import SUMS, read_sums, tree_bytes, write_sums
from fastprune.store.lease import SECONDS, Leases, read_holder
from fastprune.store.listing import KEY, Found, is_published, node_folder, node_folders, read_node
from fastprune.store.needs import Needs, awaited, named, read_needs
from fastprune.store.run_store import RunStore


@dataclass
class Removed:
    """Bytes by path. leftovers: removed. published: of published nodes, removed only if the user confirmed it. left:
    one line for each node that was not touched because a process computes it."""

    leftovers: dict[Path, int] = field(default_factory=dict)
    published: dict[Path, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def collect(
    store: RunStore,
    *,
    unneeded: bool = False,
    states: bool = False,
    forget: str | None = None,
    yes: bool = False,
    seconds: float = SECONDS,
) -> Removed:
    """Removes temporary files, checkpoints of published runs, leases of dead processes, logs of nodes that have
    succeeded since, and compiler caches of other machines or copies.

    unneeded: lists also nodes and checkpoints that no recorded figure needs. states: lists also weights and momentum
    that no unpublished node of a recorded figure reads. forget: ignores the record of this figure, and lists it. yes:
    removes what these three list. seconds: a lease untouched for so long is abandoned. InputError if `unneeded` or
    `states` is asked for and no figure is recorded. Do not use `unneeded` while another process starts a run: its
    record may not be written yet.
    """
    # A corrupt record might need everything, so it is an error wherever published files may be removed.
    needs = read_needs(store.root) if unneeded or states or forget is not None else _readable_needs(store.root)
    if (unneeded or states) and not needs:
        raise InputError(
            f"store {store.root}: no figure is recorded, so what is unneeded is unknown; rerun the figures to keep "
            "(published nodes are not computed again)"
        )
    forgotten = named(needs, [forget] if forget is not None else [])
    collection = _Collection(store, [n for n in needs if n not in forgotten], yes, seconds)
    collection.plan([n.path for n in forgotten], unneeded, states)
    collection.run()
    return collection.removed


def _readable_needs(root: Path) -> list[Needs]:
    with contextlib.suppress(InputError):  # the records decide here only which checkpoints of published runs stay
        return read_needs(root)
    return []


class _Collection:
    """`plan` lists what may be removed, by key; `run` removes each key's part under its lease."""

    def __init__(self, store: RunStore, needs: list[Needs], yes: bool, seconds: float) -> None:
        self.store, self.needs, self.yes, self.seconds = store, needs, yes, seconds
        self.removed = Removed()
        self.of_node: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.others: list[Callable[[], None]] = []

    def plan(self, records: list[Path], unneeded: bool, states: bool) -> None:
        root = self.store.root
        needed = frozenset().union(*(n.nodes for n in self.needs))
        self.others += [self._removal_of_published(path) for path in records]
        for path in sorted((root / "tmp").iterdir()):
            self._leftover(path, path.name[:32])
        for path in sorted((root / "partial").iterdir()):
            key = path.name.removeprefix(".")[:32]
            if path.name.startswith(".") or self._is_finished(key):
                self._leftover(path, key)
            elif unneeded and key not in needed:
                self.of_node[key].append(self._removal_of_published(path))
        for folder in node_folders(root):
            if unneeded and folder.name not in needed:
                self.of_node[folder.name].append(self._removal_of_published(folder))
                continue
            for path in self._not_listed(folder):
                self._leftover(path, folder.name)
            if states:
                self.of_node[folder.name].append(self._removal_of_states(folder))
        for path in (root / "leases").iterdir():
            key = path.name.removeprefix(".")[:32]
            if path.name.startswith("."):
                self._leftover(path, key)
            elif KEY.fullmatch(key):
                # Acquiring an abandoned lease and releasing it removes the file; there is no more to do.
                self.of_node[key].append(lambda: None)
        for path in sorted((root / "logs").glob("*.log")):
            if _is_older(path, node_folder(root, path.stem) / "node.json"):
                self._leftover(path, path.stem)
        for path in (*root.glob(".store.json.*"), *sorted((root / "figures").glob(".*"))):
            self._leftover(path, "")

    def run(self) -> None:
        root = self.store.root
        with Leases(root / "leases", self.seconds) as leases:
            busy = [key for key in sorted(self.of_node) if not self._under_lease(leases, key)]
            silent = [key for key in busy if self._is_untouched(root / "leases" / key)]
            # A process on another machine cannot be asked whether it lives: only a lease that stays untouched while
            # this process watches tells that it is dead.
            if silent:
                print(
                    f"waiting {self.seconds:.0f} s: do the holders of {len(silent)} leases still live?", file=sys.stderr
                )
                time.sleep(self.seconds + 1.0)
                busy = [key for key in busy if key not in silent or not self._under_lease(leases, key)]
        for key in busy:
            self.removed.left.append(
                f"left alone: {key} is being computed by {read_holder(root / 'leases' / key) or 'a process'}"
            )
        if not busy:  # a busy process may load compiled code from a cache
            own = self.store.cache().name
            self.others += [self._removal(path) for path in sorted((root / "cache").iterdir()) if path.name != own]
        for remove in self.others:
            remove()

    def _under_lease(self, leases: Leases, key: str) -> bool:
        """Does all that is planned for the node if no other process holds its lease; whether it did."""
        try:
            mine, _ = leases.acquire(key)
        except OSError as error:
            # gc must work on a full disk, which takes no lease file: making room is what it is for.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            mine = not (self.store.root / "leases" / key).exists()  # no other process can create one either
        if mine:
            for remove in self.of_node[key]:
                remove()
            leases.release(key)
        return mine

    def _is_untouched(self, path: Path) -> bool:
        try:
            return time.time() - path.lstat().st_mtime > self.seconds
        except OSError:
            return False

    def _leftover(self, path: Path, key: str) -> None:
        """Plans to remove a leftover: under the lease of `key`, or, if it belongs to no node, once it is old."""
        if KEY.fullmatch(key):
            self.of_node[key].append(self._removal(path))
        elif self._is_untouched(path):  # a younger one may still be written: no lease protects it
            self.others.append(self._removal(path))

    def _removal(self, path: Path) -> Callable[[], None]:
        def remove() -> None:
            is_folder = path.is_dir() and not path.is_symlink()
            try:
                size = tree_bytes(path) if is_folder else path.lstat().st_size
            except FileNotFoundError:  # its writer has removed or renamed it meanwhile
                return
            shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
            self.removed.leftovers[path] = size

        return remove

    def _removal_of_published(self, path: Path) -> Callable[[], None]:
        """Removes a node's folder at once, or a file; without `yes` it only counts the bytes."""

        def remove() -> None:
            if path.is_dir():
                self.removed.published[path] = tree_bytes(path)
                if self.yes:
                    self.store.remove(path)
            elif path.exists():
                self.removed.published[path] = path.stat().st_size
                if self.yes:
                    path.unlink(missing_ok=True)

        return remove

    def _removal_of_states(self, folder: Path) -> Callable[[], None]:
        """Removes the weights and momentum that no unpublished node reads."""

        def remove() -> None:
            node = read_node(folder)
            try:
                sums = read_sums(folder)
                epochs = int(node.result["epochs"]) if isinstance(node, Found) and node.kind == "train" else None
            except (OSError, ValueError, KeyError, TypeError):
                return  # corrupt: verify reports it
            if epochs is None:
                return
            keep = awaited(self.store.root, self.needs, folder.name, epochs)
            unread = sorted(n for n in sums if n.startswith(("state-", "momentum-")) and n not in keep)
            # The list of checksums comes first: killed in between, this leaves unlisted files, which the next gc
            # removes; the other way round it would leave a node whose listed files are missing, which is corrupt.
            if unread and self.yes:
                write_sums(folder, {name: d for name, d in sums.items() if name not in unread})
            for name in unread:
                self._removal_of_published(folder / name)()

        return remove

    def _not_listed(self, folder: Path) -> list[Path]:
        """Half-written files, and complete ones whose writer died before it listed them in SHA256SUMS."""
        names = os.listdir(folder)
        hidden = [folder / name for name in names if name.startswith(".")]
        try:
            sums = read_sums(folder)
        except (OSError, ValueError):
            return hidden
        return hidden + [folder / n for n in names if n not in sums and n != SUMS and not n.startswith(".")]

    def _is_finished(self, key: str) -> bool:
        """Whether a run is published with all outputs that others still read, so that no process resumes it."""
        if not KEY.fullmatch(key) or not is_published(self.store.root, key):
            return False
        folder = node_folder(self.store.root, key)
        node = read_node(folder)
        try:
            epochs, sums = int(node.result["epochs"]), read_sums(folder)  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError, KeyError, TypeError):
            return False  # corrupt: when it is computed again, this checkpoint saves epochs
        wanted = awaited(self.store.root, self.needs, key, epochs)
        wanted |= {name for n in self.needs for name in n.histories.get(key, ())}
        return wanted <= sums.keys()


def _is_older(path: Path, than: Path) -> bool:
    try:
        return path.stat().st_mtime <= than.stat().st_mtime
    except OSError:
        return False
