"""Reproduces a figure of the paper: `python scripts/reproduce.py --fig A2`. See --help, and the README."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install
from fastprune.launch import launch

if __name__ == "__main__":
    launch("fastprune.cli.reproduce", __file__)
