"""The exponential moving average of a network on flat parameters: torch's AveragedModel, buffers included."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastprune.training.distributed import broadcast_tensors
from fastprune.training.flat import FlatParams


class Ema:
    """An average of weights, other parameters and buffers, in memory of its own; +0 where the mask prunes.

    count: updates since the average was last a copy of the network; 0: the next update copies.
    """

    def __init__(self, flat: FlatParams, model: nn.Module) -> None:
        self._flat, self._model = flat, model
        self.count = 0
        self._weight = torch.zeros_like(flat.weight)
        self._buffers = [b.clone() for b in model.buffers()]
        self._averages = [self._weight, torch.zeros_like(flat.other_params), *self._buffers]
        flat.averages.append(self._weight)

    def _network(self) -> list[Tensor]:
        return [self._flat.weight, self._flat.other_params, *self._model.buffers()]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Moves the average towards the network's present values: average + (1 - decay) (value - average)."""
        for average, value in zip(self._averages, self._network(), strict=True):
            if self.count == 0 or average.dtype == torch.bool:
                average.copy_(value)
            elif average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:  # counters, as torch averages them
                average.copy_(average * decay + value * (1 - decay))
        self.count += 1

    def agree(self) -> None:
        """Gives all ranks the buffers of rank 0: each averages its own batch-norm statistics."""
        broadcast_tensors(self._buffers)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the average, at the addresses of its own values; what is written goes there."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in zip(self._averages, self._network(), strict=True):
            held = average.clone()
            average.copy_(value)
            value.copy_(held)
        self._flat.sync()

    def close(self) -> None:
        """Takes the average out of the flat parameters' care."""
        self._flat.averages[:] = [a for a in self._flat.averages if a is not self._weight]
