"""Writes a trained network to a file: `scripts/compile.py checkpoint.pth --out net.fastprune`. See docs/deploy.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install
from fastprune.launch import launch

if __name__ == "__main__":
    launch("fastprune.cli.compile", __file__)
