"""Shared by all tests: one thread, the real images where they are."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

torch.set_num_threads(1)
