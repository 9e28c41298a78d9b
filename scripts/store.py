"""Looks after a run store: `python scripts/store.py ls`. See --help, and docs/clusters.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install
from fastprune.launch import launch

if __name__ == "__main__":
    launch("fastprune.cli.store", __file__)
