"""Records of what each figure needs from a store, in its folder figures/. gc and export read them.

A run writes the record of each figure that it is asked for.
"""

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import write_atomically
from fastprune.specs import LprHistory, Runnable, states_read
from fastprune.store import RunStore, lpr_name
from fastprune.store.listing import KEY, is_published, read_json

RECORD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}[.]json")
# In records the words of the library, in file names those of the store.
_WHAT = {"weights": "state", "momentum": "momentum"}


def record_figure(
    store: RunStore,
    figure: str,
    preset: str,
    nodes: Sequence[Runnable],
    histories: Sequence[LprHistory],
    command: str,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Records the nodes of a figure's graph and the LPR histories that it shows; returns the file.

    settings, data: as JSON values, from which the figure can be made again. "nodes": their keys. "reads": for the key
    of each run whose outputs are read, the keys of the readers of its "weights" and "momentum", by epoch, and the
    fractions of its "histories". Call it before the nodes are computed: a node without
    a record is unneeded to gc.
    """
    # By reader: once all readers of a state are published, gc may remove it.
    reads: dict[str, dict[str, Any]] = defaultdict(dict)
    for node in nodes:
        for source, momentum in states_read(node):
            for what in ("weights", "momentum") if momentum else ("weights",):
                reads[source.node.key].setdefault(what, {}).setdefault(str(source.epoch), []).append(node.key)
    for history in histories:
        reads[history.node.key].setdefault("histories", []).append(history.fraction)
    keys = sorted(n.key for n in nodes)
    described = {
        "figure": figure,
        "preset": preset,
        "command": command,
        "settings": settings,
        "data": data,
        "at": time.time(),
        "nodes": keys,
        "reads": reads,
    }
    # The nodes' hash keeps apart records of one figure with other data or settings: each call needs its own nodes.
    name = f"{figure}-{preset}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"
    path = store.root / "figures" / f"{name}.json"
    text = json.dumps(described, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text))
    return path


@dataclass(frozen=True)
class Needs:
    """A record that record_figure wrote. states: by a run's key and (file prefix, epoch), the keys of the readers.
    histories: by a run's key, file names. made: its other fields, unchecked."""

    path: Path
    figure: str
    nodes: frozenset[str]
    states: dict[str, dict[tuple[str, int], list[str]]]
    histories: dict[str, list[str]]
    made: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, path: Path) -> "Needs":
        """The record in a file. InputError if it is not one that record_figure wrote."""
        try:
            return cls.of(path, read_json(path))
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise InputError(f"{path}: not a record of a figure ({type(error).__name__}); rerun the figure") from None

    @classmethod
    def of(cls, path: Path, content: Any) -> "Needs":
        """The record in parsed JSON. KeyError, TypeError, AttributeError or ValueError if it is none."""
        states: dict[str, dict[tuple[str, int], list[str]]] = {}
        histories: dict[str, list[str]] = {}
        for key, products in content["reads"].items():
            states[_key(key)] = {
                (prefix, int(epoch)): [_key(reader) for reader in readers]
                for what, prefix in _WHAT.items()
                for epoch, readers in products.get(what, {}).items()
            }
            histories[key] = [lpr_name(float(fraction)) for fraction in products.get("histories", [])]
        nodes = content["nodes"]
        if not isinstance(content["figure"], str) or not isinstance(nodes, list):
            raise TypeError
        made = {name: content.get(name) for name in ("preset", "command", "at", "settings", "data")}
        return cls(path, content["figure"], frozenset(map(_key, nodes)), states, histories, made)


def _key(text: str) -> str:
    # merge takes records from elsewhere, and keys become parts of paths.
    if KEY.fullmatch(text) is None:
        raise ValueError("not a key")
    return text


def read_needs(root: Path) -> list[Needs]:
    """All records of a store. InputError if one is corrupt."""
    # Skipping a corrupt one would let gc remove what it needs.
    return [Needs.read(p) for p in sorted((root / "figures").glob("*.json")) if not p.name.startswith(".")]


def named(needs: Iterable[Needs], names: Iterable[str]) -> list[Needs]:
    """The records whose figure or file (without suffix) has one of `names`. InputError for a name without a record."""
    needs, found = list(needs), []
    for name in names:
        matching = [n for n in needs if name in (n.figure, n.path.stem)]
        if not matching:
            known = ", ".join(sorted({n.figure for n in needs})) or "none"
            raise InputError(f"no figure {name!r} is recorded in this store (recorded: {known})")
        found += matching
    return found


def awaited(root: Path, needs: Iterable[Needs], key: str, epochs: int) -> set[str]:
    """The state and momentum files of a published run of `epochs` epochs that unpublished nodes still read."""
    return {
        # A run that diverged before the epoch has stored its last state in place of that epoch's.
        f"{prefix}-{min(epoch, epochs)}.safetensors"
        for each in needs
        for (prefix, epoch), readers in each.states.get(key, {}).items()
        if not all(is_published(root, reader) for reader in readers)
    }
