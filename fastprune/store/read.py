"""What a run store holds, read as it lies there: nodes by key, without the records they were made from."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import tree_bytes
from fastprune.store import check_format
from fastprune.store.run_store import check_about

KEY = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Found:
    """A published node. about: its node.json, found to have the fields that every node has. size: bytes on disk."""

    key: str
    folder: Path
    about: dict[str, Any]
    size: int

    @property
    def kind(self) -> str:
        return str(self.about["kind"])

    @property
    def spec(self) -> dict[str, Any]:
        return self.about["spec"]

    @property
    def result(self) -> dict[str, Any]:
        return self.about["result"]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.about["provenance"]


@dataclass(frozen=True)
class Damaged:
    """A node that cannot be read, and why."""

    key: str
    folder: Path
    why: str


def existing_store(root: Path) -> None:
    """InputError unless there is a store of this format at `root`."""
    check_format(root)
    if not (root / "store.json").is_file():
        raise InputError(f"no store at {root}: say where it is with --store DIR")


def node_folders(root: Path) -> Iterator[Path]:
    """The folders of all nodes, by key, published whole or not."""
    nodes = root / "nodes"
    for short in sorted(os.listdir(nodes)) if nodes.is_dir() else ():
        if (nodes / short).is_dir():
            yield from (nodes / short / key for key in sorted(os.listdir(nodes / short)) if KEY.fullmatch(key))


def node_folder(root: Path, key: str) -> Path:
    return root / "nodes" / key[:2] / key


def is_published(root: Path, key: str) -> bool:
    return (node_folder(root, key) / "node.json").exists()


def read_json(path: Path) -> Any:
    """OSError for a file that cannot be read, ValueError for one that is not JSON, however it is not."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_node(folder: Path) -> Found | Damaged:
    """A node as its node.json describes it. Fast: checksums are verify's business."""
    try:
        about = read_json(folder / "node.json")
        check_about(about, folder.name)
        size = tree_bytes(folder)
    except FileNotFoundError as error:
        return Damaged(folder.name, folder, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError) as error:
        return Damaged(folder.name, folder, f"node.json: {' '.join(str(error).split())}")
    return Found(folder.name, folder, about, size)


def read_all(root: Path) -> Iterator[Found | Damaged]:
    """All nodes, by key."""
    return map(read_node, node_folders(root))


def rests_on(spec: Any) -> set[str]:
    """The keys that a spec names, initial weights among them, which are never stored."""
    keys, left = set(), [spec]
    while left:
        part = left.pop()
        if isinstance(part, str) and KEY.fullmatch(part):
            keys.add(part)
        elif isinstance(part, dict):
            left += part.values()
        elif isinstance(part, list):
            left += part
    return keys


def lock_file(root: Path, key: str) -> Path | None:
    """What the holder of a node's lease touches; None where nobody has it."""
    found = sorted((root / "leases").glob(f"{key}.*.lock"), key=lambda p: (len(p.name), p.name))
    return found[-1] if found else None


def holder_note(root: Path, key: str) -> dict[str, Any] | None:
    """Who has, or had, the lease of a node: {"host", "boot", "pid", "since" (Unix time)}; None where that is not
    known."""
    try:
        found = read_json(root / "leases" / f"{key}.holder")
        host, boot = str(found["host"]), str(found["boot"])
        return {"host": host, "boot": boot, "pid": int(found["pid"]), "since": float(found["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
