"""A whole figure from the command line, so small that it takes seconds: what several tests run and compare."""

import os
import sys
from pathlib import Path

from fastprune.cli.reproduce import main

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("--fig A2 --seeds 1 --rounds 2 --epochs 2 --classes 3 --train-per-class 24 --val-per-class 8").split(),
    *("--batch-size 24").split(),
]
TRAININGS, NODES = 22, 30
"""Of that figure."""


def folders(root: Path, store: Path | None = None) -> list[str]:
    return ["--out", str(root / "out"), "--store", str(store or root / "store")]


def command(root: Path, *more: str, store: Path | None = None) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/reproduce.py"), *TINY, *folders(root, store), *more]


def published(store: Path) -> dict[str, int]:
    """By key of each published node, when that was."""
    return {p.parent.name: p.stat().st_mtime_ns for p in store.glob("nodes/*/*/node.json")}


def products(store: Path) -> dict[str, bytes]:
    """All that must be the same to the bit, wherever it was computed."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in store.glob("nodes/*/*/*")
        if path.name not in ("node.json", "times.csv", "SHA256SUMS")
    }


def results(root: Path) -> bytes:
    return (root / "out/A2/results.csv").read_bytes()


def make(root: Path) -> Path:
    """The figure, made by this process alone."""
    environment = dict(os.environ)
    try:
        assert main([*TINY, "--device", "cpu", "--workers", "1", *folders(root)]) == 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return root
