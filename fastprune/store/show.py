"""One node of a store in full: what it is, its files, what it rests on and what rests on it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastprune.command import printable
from fastprune.errors import InputError
from fastprune.files import SUMS, digest, read_sums
from fastprune.store.list import date, going_on, size
from fastprune.store.read import KEY, Damaged, Found, is_published, node_folder, node_folders, read_node, rests_on


def show(root: Path, prefix: str) -> tuple[list[str], bool]:
    """(lines: everything that is known of a node, or of what there is of one that is not published; whether all that is
    whole). prefix: what its key, and no other, begins with; InputError for none or several."""
    found = [folder for folder in node_folders(root) if folder.name.startswith(prefix.lower())]
    if not found and (unpublished := _unpublished(root, prefix.lower())) is not None:
        return unpublished, True
    if len(found) != 1:
        several = f": {', '.join(f.name[:12] for f in found[:4])}{', ...' if len(found) > 4 else ''}" if found else ""
        count = f"{len(found):,} nodes have" if found else "no node has"
        raise InputError(f"{count} a key that begins with {prefix!r}{several}; see ls")
    node = read_node(found[0])
    if isinstance(node, Damaged):
        return [f"{node.folder}: {node.why}; delete this folder to make it again", "", "files", *_files(node)[0]], False
    said = [f"{node.kind} {node.key}", str(node.folder), ""]
    for part in ("spec", "result", "provenance"):
        said += [part, *_tree(node.about[part]), ""]
    at = node.provenance.get("at")
    if isinstance(at, int | float):
        said[-1:] = [f"  made on {date(at)}", ""]
    files, whole = _files(node)
    return [*said, "files", *files, "", *_neighbours(root, node)], whole


def _unpublished(root: Path, prefix: str) -> list[str] | None:
    """What a node has left that failed or is not finished: leases, checkpoints, its log."""
    names = [name for folder in ("leases", "partial", "logs") for name in os.listdir(root / folder)]
    keys = {name[:32] for name in names if KEY.fullmatch(name[:32]) and name.startswith(prefix)}
    if len(keys) != 1:
        return None
    key = keys.pop()
    said = [f"{key}: not published", *(line for line in going_on(root) if line.split()[1].startswith(key[:8]))]
    for path in sorted((root / "partial").glob(f"{key}.*")):
        said.append(f"  {path}")
    log = root / "logs" / f"{key}.log"
    if log.exists():
        said += ["", *(f"  {printable(line)}" for line in log.read_text(errors="replace").splitlines())]
    return said


def _tree(content: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield indent + printable(name)
            yield from _tree(value, indent + "  ")
        else:
            yield indent + printable(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")


def _files(node: Found | Damaged) -> tuple[list[str], bool]:
    """(a line each, whether all are as they were written)."""
    said, whole = [], True
    try:
        sums = read_sums(node.folder)
    except (OSError, ValueError) as error:
        sums, whole = {}, False
        said.append(f"  {SUMS}: {error.strerror if isinstance(error, OSError) else error}")
    for name in sorted({*sums, *os.listdir(node.folder)} - {SUMS}):
        path = node.folder / name
        try:
            state = f"not in {SUMS}" if name not in sums else "ok" if digest(path) == sums[name] else "DAMAGED"
            said.append(f"  {name}  {size(path.stat().st_size)}  {state}")
        except OSError as error:
            state = "missing"
            said.append(f"  {name}  {error.strerror}")
        whole &= state == "ok"
    return said, whole


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
