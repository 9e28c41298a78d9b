"""Writes figures and their page again from a store: `python scripts/report.py --store runs`. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install
from fastprune.launch import launch

if __name__ == "__main__":
    launch("fastprune.cli.report", __file__)
