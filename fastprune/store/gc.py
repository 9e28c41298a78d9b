"""Removes from a store what is worthless, and when asked what no recorded figure needs.

Everything that belongs to a node goes under its lease, so what somebody is working on stays.
"""

import contextlib
import os
import shutil
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastprune.errors import InputError
from fastprune.files import SUMS, read_sums, tree_bytes, write_sums
from fastprune.store import RunStore
from fastprune.store.keeper import boot
from fastprune.store.lease import SECONDS, Leases, NoSpaceError
from fastprune.store.needs import Needs, awaited, named, read_needs
from fastprune.store.read import KEY, Found, holder_note, is_published, lock_file, node_folder, node_folders, read_node


@dataclass
class Removed:
    """What was removed, or would be: by path how many bytes. left: what was left alone, a line each."""

    sizes: dict[Path, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def collect(
    store: RunStore,
    *,
    unneeded: bool = False,
    states: bool = False,
    forget: str | None = None,
    dry_run: bool = False,
    seconds: float = SECONDS,
) -> Removed:
    """Removes temporary files, checkpoints of what is published, notes of holders who died, logs of what has succeeded
    since, caches of other machines or copies.

    forget: the record of a figure. unneeded: also nodes, and checkpoints, that no figure needs which is recorded.
    states: also states and momentum that no unpublished node of such a figure reads. dry_run: only says so. seconds:
    how long a lease lies untouched until its holder is dead. InputError where nothing is recorded that would be needed
    to decide. Not to be asked for what is unneeded while a run is being started.
    """
    needs = read_needs(store.root) if unneeded or states or forget is not None else _readable_needs(store.root)
    if (unneeded or states) and not needs:
        raise InputError(
            f"store {store.root}: no figure is recorded, so nothing is known to be unneeded; run the figures to keep "
            "once more (what is there is not trained again)"
        )
    forgotten = named(needs, [forget] if forget is not None else [])
    collection = _Collection(store, [n for n in needs if n not in forgotten], dry_run, seconds)
    collection.plan([n.path for n in forgotten], unneeded, states)
    collection.run()
    return collection.removed


def _readable_needs(root: Path) -> list[Needs]:
    with contextlib.suppress(InputError):  # it decides only which checkpoints of published runs are kept
        return read_needs(root)
    return []


class _Collection:
    """First all that may go, by key; then each key's part under its lease."""

    def __init__(self, store: RunStore, needs: list[Needs], dry_run: bool, seconds: float) -> None:
        self.store, self.needs, self.dry_run, self.seconds = store, needs, dry_run, seconds
        self.removed = Removed()
        self.work: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.free: list[Callable[[], None]] = []

    def plan(self, records: list[Path], unneeded: bool, states: bool) -> None:
        root = self.store.root
        needed = frozenset().union(*(n.nodes for n in self.needs))
        self.free += [self._removal(path) for path in records]
        for path in sorted((root / "tmp").iterdir()):
            self._file(path, path.name[:32])
        for path in sorted((root / "partial").iterdir()):
            key = path.name.removeprefix(".")[:32]
            if path.name.startswith(".") or (unneeded and key not in needed) or self._finished(key):
                self._file(path, key)
        for folder in node_folders(root):
            if unneeded and folder.name not in needed:
                self.work[folder.name].append(self._taking_away(folder))
                continue
            for path in self._not_listed(folder):
                self._file(path, folder.name)
            if states:
                self.work[folder.name].append(self._states(folder))
        for path in (root / "leases").iterdir():
            key = path.name.removeprefix(".")[:32]
            if path.name.startswith("."):  # what a keeper was writing that died
                self._file(path, key)
            elif KEY.fullmatch(key):
                self.work[key].append(lambda: None)  # taking its lease and giving it back is all
        for path in sorted((root / "logs").glob("*.log")):
            if self._older(path, node_folder(root, path.stem) / "node.json"):
                self._file(path, path.stem)
        for path in (*root.glob(".store.json.*"), *sorted((root / "figures").glob(".*"))):
            self._file(path, "")

    def run(self) -> None:
        with Leases(self.store.root / "leases", self.seconds) as leases:
            busy = [key for key in sorted(self.work) if not self._under_lease(leases, key, self.work[key])]
            suspects = [key for key in busy if self._silent(key)]
            if suspects and not self.dry_run:  # only watching tells whether a holder on another machine is alive
                print(f"waiting {self.seconds:.0f} s for a sign of who holds {len(suspects)} leases", file=sys.stderr)
                time.sleep(self.seconds + 1.0)
                busy = [k for k in busy if k not in suspects or not self._under_lease(leases, k, self.work[k])]
        for key in busy:
            holder = holder_note(self.store.root, key)
            by = f"process {holder['pid']} on {holder['host']}" if holder else "somebody"
            self.removed.left.append(f"left alone: {key}, on which {by} works")
        if not busy:  # who works here may run code from there
            own = self.store.cache().name
            caches = sorted((self.store.root / "cache").iterdir())
            self.free += [self._removal(path) for path in caches if path.name != own]
        for remove in self.free:
            remove()

    def _under_lease(self, leases: Leases, key: str, work: list[Callable[[], None]]) -> bool:
        """Whether the work could be done."""
        if self.dry_run:
            mine = not self._seems_alive(key)
        else:
            try:
                mine = leases.acquire(key)[0]
            except NoSpaceError:  # then nobody else can take it either, until something is removed
                mine = lock_file(self.store.root, key) is None
        if mine:
            for remove in work:
                remove()
            if not self.dry_run:
                leases.release(key)
        return mine

    def _seems_alive(self, key: str) -> bool:
        """Without taking the lease, which would change it."""
        holder = holder_note(self.store.root, key)
        if holder is not None and (holder["host"], holder["boot"]) == (socket.gethostname(), boot()):
            try:
                os.kill(holder["pid"], 0)
            except ProcessLookupError:
                return False
            except (OSError, OverflowError):
                pass
        return lock_file(self.store.root, key) is not None and not self._silent(key)

    def _silent(self, key: str) -> bool:
        lock = lock_file(self.store.root, key)
        return lock is not None and self._aged(lock)

    def _aged(self, path: Path) -> bool:
        try:
            return time.time() - path.lstat().st_mtime > self.seconds
        except OSError:
            return False

    def _file(self, path: Path, key: str) -> None:
        """Plans to remove it: under the lease of `key`, or, where it is no node's, if it has not just been written."""
        if KEY.fullmatch(key):
            self.work[key].append(self._removal(path))
        elif self._aged(path):
            self.free.append(self._removal(path))

    def _removal(self, path: Path) -> Callable[[], None]:
        def remove() -> None:
            folder = path.is_dir() and not path.is_symlink()
            try:
                size = tree_bytes(path) if folder else path.lstat().st_size
            except FileNotFoundError:  # its owner has removed it meanwhile
                return
            if not self.dry_run:
                shutil.rmtree(path) if folder else path.unlink(missing_ok=True)
            self.removed.sizes[path] = size

        return remove

    def _taking_away(self, folder: Path) -> Callable[[], None]:
        def take() -> None:
            if folder.exists():
                self.removed.sizes[folder] = tree_bytes(folder)
                if not self.dry_run:
                    self.store.take_away(folder)

        return take

    def _states(self, folder: Path) -> Callable[[], None]:
        """The list of checksums is rewritten first: what is not in it does not count."""

        def remove() -> None:
            node = read_node(folder)
            try:
                sums = read_sums(folder)
                epochs = int(node.result["epochs"]) if isinstance(node, Found) and node.kind == "train" else None
            except (OSError, ValueError, KeyError, TypeError):
                return  # damaged: that is for verify to say
            if epochs is None:
                return
            keep = awaited(self.store.root, self.needs, folder.name, epochs)
            gone = sorted(n for n in sums if n.startswith(("state-", "momentum-")) and n not in keep)
            if gone and not self.dry_run:
                write_sums(folder, {name: d for name, d in sums.items() if name not in gone})
            for name in gone:
                self._removal(folder / name)()

        return remove

    def _not_listed(self, folder: Path) -> list[Path]:
        """Half-written files, and whole ones whose writer died before they counted."""
        names = os.listdir(folder)
        hidden = [folder / name for name in names if name.startswith(".")]
        try:
            sums = read_sums(folder)
        except (OSError, ValueError):
            return hidden
        return hidden + [folder / n for n in names if n not in sums and n != SUMS and not n.startswith(".")]

    def _finished(self, key: str) -> bool:
        """Whether a run is published with all that others still read of it, so that nobody continues it."""
        if not KEY.fullmatch(key) or not is_published(self.store.root, key):
            return False
        folder = node_folder(self.store.root, key)
        node = read_node(folder)
        try:
            epochs, sums = int(node.result["epochs"]), read_sums(folder)  # type: ignore[union-attr]
        except (AttributeError, OSError, ValueError, KeyError, TypeError):
            return False  # damaged: it may be made again from there
        wanted = awaited(self.store.root, self.needs, key, epochs)
        wanted |= {name for n in self.needs for name in n.histories.get(key, ())}
        return wanted <= sums.keys()

    def _older(self, path: Path, than: Path) -> bool:
        try:
            return path.stat().st_mtime <= than.stat().st_mtime
        except OSError:
            return False
