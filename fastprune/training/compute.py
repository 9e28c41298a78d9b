"""How a Trainer computes: one interface, and the dense way, by torch's autograd on flat parameters.

The sparse way, on kept weights alone, is fastprune.sparse.engine. A training uses one of them from its beginning to its
end; FlatParams owns weights, momentum and mask, and either goes on from what the other left there.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprune.training.flat import FlatOptimizer, FlatParams
from fastprune.training.lower import lowered


class Compute(Protocol):
    """What a training step consists of. name: "plain", "dense" or "sparse", for provenance and checkpoints."""

    name: str

    def takes(self, images: Tensor) -> bool:
        """Whether it computes for images of this size."""

    def logits(self, images: Tensor, train: bool) -> Tensor:
        """The network's output for images float32 [B, 3, H, W], channels-last."""

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of `loss`, a function of the last logits."""

    def gradients(self) -> list[Tensor]:
        """The gradients, as the vectors that data parallel training averages in place."""

    def step(self, hyper: Mapping[str, Any]) -> None:
        """The masked optimiser's step. hyper: the arguments of FlatOptimizer."""

    def pull(self) -> None:
        """Takes weights, momentum and mask from the flat parameters, when other code may have written them."""

    def push(self) -> None:
        """Writes weights and momentum to the flat parameters, before other code reads them."""


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast to `half`; no effect for None."""
    return nullcontext() if half is None else torch.autocast(device.type, half)


class Dense:
    """Torch's autograd, on the flat parameters themselves. lower: small convs as GEMMs (training/lower.py)."""

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        flat: FlatParams,
        optimizer: FlatOptimizer,
        scaler: torch.amp.GradScaler,
        half: torch.dtype | None,
        lower: bool,
    ) -> None:
        self.name = "dense" if lower else "plain"
        self._network, self._flat, self._optimizer, self._scaler = network, flat, optimizer, scaler
        self._half, self._lower = half, lower
        self._without: set[torch.Size] = set()  # shapes of images for which no conv was lowered

    def takes(self, images: Tensor) -> bool:
        return True

    def logits(self, images: Tensor, train: bool) -> Tensor:
        if not self._lower or images.shape in self._without:
            with autocast(self._flat.weight.device, self._half):
                return self._network(images)
        with lowered() as lowering:
            found = self._network(images)
        if not lowering.convs:
            self._without.add(images.shape)
        return found

    def backward(self, loss: Tensor) -> None:
        self._flat.backward(self._scaler.scale(loss))

    def gradients(self) -> list[Tensor]:
        return [self._flat.grad, self._flat.other_grad]

    def step(self, hyper: Mapping[str, Any]) -> None:
        self._optimizer.param_groups[0].update(hyper)
        if self._optimizer.needs_unscaled:
            self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def pull(self) -> None:
        self._flat.sync()

    def push(self) -> None:
        pass
