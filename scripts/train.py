"""Trains a torchvision model, dense or under a mask, with the flags of torchvision's reference script. See --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without an install
from fastprune.launch import launch

if __name__ == "__main__":
    launch("fastprune.cli.train", __file__)
