"""Data parallelism over torch.distributed: all_reduce of flat buffers. Without a process group nothing is changed.

Every rank holds all weights and reads its own batches. Averaged gradients keep the weights equal on all ranks, so all
ranks prune to the same mask.
"""

# No DistributedDataParallel: it buckets gradients into buffers of its own, which FlatParams has already, and broadcasts
# the model's buffers, masks included, at every forward.

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Within it this rank counts as the only one: it neither sends nor waits."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_mean(*buffers: Tensor) -> None:
    """Replaces each buffer, in place, by its mean over all ranks."""
    if (ranks := world_size()) > 1:
        for buffer in buffers:
            dist.all_reduce(buffer)
            buffer.div_(ranks)


def all_reduce_sum(buffer: Tensor) -> None:
    """Replaces the buffer, in place, by its sum over all ranks."""
    if world_size() > 1:
        dist.all_reduce(buffer)


def of_rank_0(*numbers: float, device: torch.device | None = None) -> list[float]:
    """The numbers that rank 0 has. device: the ranks' own, which NCCL needs."""
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.broadcast(found, 0)
    return found.tolist()


def broadcast_statistics(model: nn.Module) -> None:
    """Copies the buffers of `model` (batch-norm statistics) from rank 0 to all ranks, in place."""
    # Each rank's statistics come from its own batches; to add up their validation sums, all must evaluate one network.
    broadcast_tensors(model.buffers())


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copies the tensors, masks (bool) left out, from rank 0 to all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            if tensor.dtype != torch.bool:  # masks are equal on all ranks already
                dist.broadcast(tensor, 0)
