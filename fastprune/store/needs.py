"""What figures need of a store, recorded in its folder figures/ by each call that asks for one."""

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import write_atomically
from fastprune.specs import LprHistory, Runnable, states_read
from fastprune.store import RunStore, lpr_name
from fastprune.store.listing import KEY, is_published, read_json

RECORD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}[.]json")
_WHAT = {"weights": "state", "momentum": "momentum"}


def record_figure(
    store: RunStore,
    figure: str,
    preset: str,
    nodes: Sequence[Runnable],
    histories: Sequence[LprHistory],
    command: str,
) -> Path:
    """Writes down what the figure needs: the nodes of its graph and the histories it shows; returns the file.

    To be called before its nodes are computed.

    "nodes": their keys. "reads": by the key of a run what others read of it: by epoch the keys of those that
    read its "weights" or "momentum", and the fractions of its "histories".
    """
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
        "at": time.time(),
        "nodes": keys,
        "reads": reads,
    }
    name = f"{figure}-{preset}-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:8]}"
    path = store.root / "figures" / f"{name}.json"
    text = json.dumps(described, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text))
    return path


@dataclass(frozen=True)
class Needs:
    """A record of record_figure. states: by key, (weights or momentum's file prefix, epoch) and who reads them."""

    path: Path
    figure: str
    nodes: frozenset[str]
    states: dict[str, dict[tuple[str, int], list[str]]]
    histories: dict[str, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Needs":
        """InputError for a file that is no such record."""
        try:
            return cls.of(path, read_json(path))
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            raise InputError(f"{path}: corrupt or foreign ({type(error).__name__}); run its figure again") from None

    @classmethod
    def of(cls, path: Path, content: Any) -> "Needs":
        """KeyError, TypeError, AttributeError or ValueError for what is no such record."""
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
        return cls(path, content["figure"], frozenset(map(_key, nodes)), states, histories)


def _key(text: str) -> str:
    if KEY.fullmatch(text) is None:
        raise ValueError("no key")
    return text


def read_needs(root: Path) -> list[Needs]:
    """All that is recorded. InputError where a record is corrupt: what it needs is not known."""
    return [Needs.read(p) for p in sorted((root / "figures").glob("*.json")) if not p.name.startswith(".")]


def named(needs: Iterable[Needs], names: Iterable[str]) -> list[Needs]:
    """The records of figures, by the figure's name or the file's. InputError for a name that none has."""
    needs, found = list(needs), []
    for name in names:
        matching = [n for n in needs if name in (n.figure, n.path.stem)]
        if not matching:
            known = ", ".join(sorted({n.figure for n in needs})) or "none"
            raise InputError(f"no figure {name!r} is recorded in this store (recorded: {known})")
        found += matching
    return found


def awaited(root: Path, needs: Iterable[Needs], key: str, epochs: int) -> set[str]:
    """The files of a published run of `epochs` epochs that a node still reads which is not published. A run that
    diverged before an epoch stands there with its last state."""
    return {
        f"{prefix}-{min(epoch, epochs)}.safetensors"
        for each in needs
        for (prefix, epoch), readers in each.states.get(key, {}).items()
        if not all(is_published(root, reader) for reader in readers)
    }
