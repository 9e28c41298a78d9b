"""How a Trainer computes: one interface, and the dense way, by torch's autograd on flat parameters.

The sparse way, on kept weights alone, is fastprune.sparse.engine. A training uses one of them from its beginning to its
end; FlatParams owns weights, momentum and mask, and either goes on from what the other left there.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastprune.training.distributed import world_size
from fastprune.training.flat import FlatOptimizer, FlatParams
from fastprune.training.lower import lowered


class Compute(Protocol):
    """What a training step consists of. name: "plain", "dense" or "sparse", for provenance and checkpoints."""

    name: str

    def takes(self, images: Tensor, train: bool = True) -> bool:
        """Whether it computes for images of this size, in training or evaluation."""

    def logits(self, images: Tensor, train: bool) -> Tensor:
        """The network's output for images float32 [B, 3, H, W], channels-last."""

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Computes the gradients of a loss, a function of the last logits. output: the loss, []; with `gradient` the
        logits, and the gradient of the loss by them, scaled as a GradScaler asks."""

    def gradients(self) -> list[Tensor]:
        """The gradients, as the vectors that data parallel training averages in place."""

    def step(self, hyper: Mapping[str, Any]) -> None:
        """The masked optimiser's step. hyper: the arguments of FlatOptimizer."""

    def stepped(self) -> None:
        """Called after each training step, also one that a CUDA graph replayed."""

    def pull(self) -> None:
        """Takes weights, momentum and mask from the flat parameters, when other code may have written them."""

    def push(self) -> None:
        """Writes weights and momentum to the flat parameters, before other code reads them."""


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch.autocast to `half`; no effect for None."""
    return nullcontext() if half is None else torch.autocast(device.type, half)


class BatchCounters:
    """The counters of training batches in a model's batch norms (num_batches_tracked), counted here while it trains.

    Each batch norm adds 1 to its own: a launch for each layer and step. batches: how many there were since `take`.
    """

    def __init__(self, model: nn.Module) -> None:
        # A batch norm without momentum averages over all batches, and needs its counter in each step.
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.momentum is not None]
        self._taken: list[tuple[nn.Module, Tensor]] = []
        self.batches = 0

    def take(self) -> None:
        """Takes the counters out of the model. Without effect where they are."""
        if self._taken:
            return
        for norm in self._norms:
            if (counter := norm._buffers.get("num_batches_tracked")) is not None:
                self._taken.append((norm, counter))
                norm._buffers["num_batches_tracked"] = None
        self.batches = 0

    def put_back(self) -> None:
        """Puts the counters back, raised by `batches`. Without effect where they are not taken."""
        for norm, counter in self._taken:
            norm._buffers["num_batches_tracked"] = counter.add_(self.batches)
        self._taken.clear()


class Dense:
    """Torch's autograd, on the flat parameters themselves. lower: small convs as GEMMs (training/lower.py); mend: convs
    that oneDNN gets wrong without their stride. scattered: SGD reads gradients where autograd left them, where nothing
    else reads them."""

    def __init__(
        self,
        model: nn.Module,
        network: Callable[[Tensor], Tensor],
        flat: FlatParams,
        optimizer: FlatOptimizer,
        scaler: torch.amp.GradScaler,
        half: torch.dtype | None,
        lower: bool,
        mend: bool,
        scattered: bool = False,
    ) -> None:
        self.name = "dense" if lower else "plain"
        self._network, self._flat, self._optimizer, self._scaler = network, flat, optimizer, scaler
        self._half, self._lower, self._mend, self._scattered = half, lower, mend, scattered
        self._counters = BatchCounters(model)
        self._without: set[torch.Size] = set()  # shapes of images for which all convs are torch's

    def takes(self, images: Tensor, train: bool = True) -> bool:
        return True

    def logits(self, images: Tensor, train: bool) -> Tensor:
        with autocast(self._flat.weight.device, self._half):
            if not (self._lower or self._mend) or images.shape in self._without:
                return self._network(images)
            with lowered(self._lower) as lowering:
                found = self._network(images)
        if not lowering.convs:
            self._without.add(images.shape)
        return found

    @property
    def _scatters(self) -> bool:
        # Clipping, other optimisers, a scaler's search for inf and the average over ranks read the flat gradient.
        others = self._scaler.is_enabled() or self._optimizer.needs_unscaled or world_size() > 1
        return self._scattered and not others

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        if gradient is None:
            output = self._scaler.scale(output)
        self._flat.backward(output, gradient, scattered=self._scatters)

    def gradients(self) -> list[Tensor]:
        self._flat.gather_grad()
        return [self._flat.grad, self._flat.other_grad]

    def step(self, hyper: Mapping[str, Any]) -> None:
        self._optimizer.param_groups[0].update(hyper)
        if self._optimizer.needs_unscaled:
            self._scaler.unscale_(self._optimizer)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def stepped(self) -> None:
        self._counters.batches += 1

    def pull(self) -> None:
        self._flat.sync()
        self._counters.take()
        # In each call: the steps since may have been replayed with gradients of the other kind.
        if self._scatters:
            self._flat.hide_grad()

    def push(self) -> None:
        self._counters.put_back()
