"""Data parallel over torch.distributed, without a wrapper; without a process group each function does nothing.

Every rank holds all weights and gives its own batches. Gradients are averaged in one all_reduce for each flat buffer,
so all ranks keep the same weights, and prune to the same mask.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_mean(*buffers: Tensor) -> None:
    """Replaces each buffer by its mean over all ranks."""
    if (ranks := world_size()) > 1:
        for buffer in buffers:
            dist.all_reduce(buffer)
            buffer.div_(ranks)


def all_reduce_sum(buffer: Tensor) -> None:
    """Replaces the buffer by its sum over all ranks."""
    if world_size() > 1:
        dist.all_reduce(buffer)


def broadcast_statistics(model: nn.Module) -> None:
    """Gives every rank the first one's buffers (batch-norm statistics), so that all evaluate the same network."""
    if world_size() > 1:
        for buffer in model.buffers():
            if buffer.dtype != torch.bool:  # masks are the same anyway
                dist.broadcast(buffer, 0)
