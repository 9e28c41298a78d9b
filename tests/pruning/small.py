"""A small network for tests of the Pruner, and batches for it."""

import torch
from torch import Tensor, nn


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 9, 5))


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 5, 5, generator=g), torch.randint(5, (4,), generator=g)


def is_plus_zero(tensor: Tensor) -> bool:
    return not tensor.any() and not torch.signbit(tensor).any()
