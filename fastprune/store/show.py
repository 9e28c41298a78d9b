"""One node of a store in full: what it is, its files, what it rests on and what rests on it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastprune.command import printable
from fastprune.errors import InputError
from fastprune.files import SUMS, digest, read_sums
from fastprune.store.list import date, size
from fastprune.store.read import Damaged, Found, is_published, node_folder, node_folders, read_node, rests_on


def find(root: Path, prefix: str) -> Path:
    """The folder of the one node whose key begins so. InputError for none or several."""
    found = [folder for folder in node_folders(root) if folder.name.startswith(prefix.lower())]
    if len(found) != 1:
        several = f": {', '.join(f.name[:12] for f in found[:4])}{', ...' if len(found) > 4 else ''}" if found else ""
        count = f"{len(found):,} nodes have" if found else "no node has"
        raise InputError(f"{count} a key that begins with {prefix!r}{several}; see ls")
    return found[0]


def show(root: Path, prefix: str) -> list[str]:
    """Lines: everything that is known of a node. InputError for one that is not there or cannot be read."""
    node = read_node(find(root, prefix))
    if isinstance(node, Damaged):
        raise InputError(f"{node.folder}: {node.why}; delete this folder to make it again")
    said = [f"{node.kind} {node.key}", str(node.folder), ""]
    for part in ("spec", "result", "provenance"):
        said += [part, *_tree(node.about[part]), ""]
    at = node.provenance.get("at")
    if isinstance(at, int | float):
        said[-1:] = [f"  made on {date(at)}", ""]
    return [*said, "files", *_files(node.folder), "", *_neighbours(root, node)]


def _tree(content: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield indent + printable(name)
            yield from _tree(value, indent + "  ")
        else:
            yield indent + printable(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")


def _files(folder: Path) -> Iterator[str]:
    try:
        sums = read_sums(folder)
    except (OSError, ValueError) as error:
        sums = {}
        yield f"  {SUMS}: {' '.join(str(error).split())}"
    for name in sorted({*sums, *os.listdir(folder)} - {SUMS}):
        try:
            state = f"not in {SUMS}" if name not in sums else "ok" if digest(folder / name) == sums[name] else "DAMAGED"
            yield f"  {name}  {size((folder / name).stat().st_size)}  {state}"
        except OSError as error:
            yield f"  {name}  {error.strerror}"


def _neighbours(root: Path, node: Found) -> Iterator[str]:
    parents, text = rests_on(node.spec), node.key.encode()
    for title, keys in (
        ("rests on", sorted(k for k in parents if is_published(root, k))),
        ("what rests on it", [f.name for f in node_folders(root) if f != node.folder and _names(f, text, node.key)]),
    ):
        yield title
        for key in keys:
            other = read_node(node_folder(root, key))
            yield f"  {key} {other.kind if isinstance(other, Found) else 'damaged'}"
        if not keys:
            yield "  nothing"


def _names(folder: Path, text: bytes, key: str) -> bool:
    try:
        if text not in (folder / "node.json").read_bytes():  # most: parsing takes longer
            return False
    except OSError:
        return False
    other = read_node(folder)
    return isinstance(other, Found) and key in rests_on(other.spec)
