"""Training with kept weights alone: the sparse way to compute of a Trainer.

FlatParams owns weights, momentum and mask; `pull` takes the kept ones from it, `push` writes them back. In between only
kept weights exist, with their momentum: forward, both gradients and the optimiser's step cost what is kept. Batch-norm
statistics and all other parameters are the module's own memory throughout.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.kernels import Segment, masked_sgd_
from fastprune.sparse.program import Program, Torch
from fastprune.sparse.tape import Tape


class Flat(Protocol):
    """What is needed of training.flat.FlatParams."""

    weight: Tensor
    momentum: Tensor
    mask: Tensor
    other_params: Tensor
    other_grad: Tensor
    other_momentum: Tensor
    segments: tuple[Segment, ...]

    def sync(self) -> None:
        """Sets pruned weights to +0, after other code wrote weights."""

    def other_sgd_step(self, decays: Any, **hyper: Any) -> None:
        """One SGD step on the other parameters."""

    def clip(self, gradients: list[Tensor], most: float) -> None:
        """Scales the gradients in place, so that their norm is at most `most`."""

    def mask_changed(self) -> None:
        """Sets pruned weights and momentum to +0, after other code wrote the mask."""


def masks(flat: Flat) -> dict[str, np.ndarray]:
    """The masks of all layers, bool [O, KH, KW, I] as they are stored, views of the flat mask."""
    found = {}
    for s in flat.segments:
        shape = (s.shape[0], *s.shape[2:], s.shape[1]) if len(s.shape) == 4 else (s.shape[0], 1, 1, s.shape[1])
        found[s.name] = flat.mask[s.span].view(shape).numpy()
    return found


def settings(model: nn.Module) -> tuple[Any, ...]:
    """The numbers and words that a model's modules hold, such as the rate of a dropout, but for whether they train."""
    kinds = bool | int | float | str | tuple
    return tuple(
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, kinds) and key != "training"
    )


class Sparse:
    """A network's training step on kept weights alone, on a CPU in float32.

    program: fused, of the model in training mode; with operations of torch, those of its islands. It uses every covered
    weight, each once. The number of threads is torch's at `pull`; results do not depend on it.
    """

    name = "sparse"

    def __init__(self, model: nn.Module, flat: Flat, program: Program) -> None:
        self._model, self._flat, self.program = model, flat, program
        self._mask: Tensor | None = None
        self._tape: Tape | None = None
        self._logits: Tensor | None = None
        self._ahead = False  # whether steps were taken that the flat parameters do not know
        self._in_torch = any(isinstance(op, Torch) for op in program.ops)
        self._settings = settings(model)
        self._same: bool | None = None  # whether they are those of the program; None where they may have changed

    @property
    def tape(self) -> Tape:
        assert self._tape is not None, "pull() comes first"
        return self._tape

    def pull(self) -> None:
        """Takes kept weights and momentum from the flat parameters; makes new lists if the mask has changed."""
        flat, threads = self._flat, torch.get_num_threads()
        self._ahead = False
        # `push` writes kept ones alone: what others wrote into pruned ones would stay.
        if self._mask is not None and torch.equal(self._mask, flat.mask):
            flat.sync()
        else:
            flat.mask_changed()
            self.close()
        if self._tape is None or self._tape.threads.number != threads:
            self.close()
            self._mask = flat.mask.clone()
            self._kept = flat.mask.nonzero().squeeze(1)
            named: dict[str, Tensor] = dict(self._model.named_parameters())
            gradients = {n: p.grad for n, p in named.items() if p.requires_grad and p.grad is not None}
            covered = masks(flat)
            others = {n: g for n, g in gradients.items() if n not in covered}
            tape = Tape(self.program, named | dict(self._model.named_buffers()), others, covered, threads=threads)
            self._momentum = torch.zeros_like(tape.values)
            self._tape = tape  # last: Ctrl-C may come at any time
        tape, count = self.tape, len(self._kept)
        torch.index_select(flat.weight, 0, self._kept, out=tape.values[:count])
        torch.index_select(flat.momentum, 0, self._kept, out=self._momentum[:count])

    def stepped(self) -> None:
        """The tape has counted the batch."""

    def push(self) -> None:
        """Writes kept weights and momentum back; pruned ones are +0 there already. After a push without a step since,
        the flat parameters are newer, or as new: nothing is written."""
        self._same = None
        if not self._ahead:
            return
        count = len(self._kept)
        self._flat.weight.index_copy_(0, self._kept, self.tape.values[:count])
        self._flat.momentum.index_copy_(0, self._kept, self._momentum[:count])
        self._ahead = False

    def takes(self, images: Tensor, train: bool = True) -> bool:
        """Whether the program is for images of this size, [B, C, H, W]. Operations of torch, such as dropout, are those
        of training alone, and of the model as it was."""
        known = self.program.input.shape == tuple(images.shape[1:])
        if not known or not self._in_torch:
            return known
        if self._same is None:
            self._same = settings(self._model) == self._settings
        return train and self._same

    @torch.no_grad()
    def _forward(self, images: Tensor, train: bool) -> Tensor:
        return self.tape.forward(images, train)

    def logits(self, images: Tensor, train: bool) -> Tensor:
        """The network's output. With `train` a leaf that requires a gradient, for `backward`."""
        found = self._forward(images, train)
        if train:
            self._logits = found.requires_grad_()
        return found

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Computes the gradients of a loss with respect to all parameters. output, gradient: as of Compute."""
        assert self._logits is not None
        (by_logits,) = torch.autograd.grad(output, self._logits, gradient, allow_unused=True)
        if by_logits is None:
            by_logits = torch.zeros_like(self._logits)
        with torch.no_grad():
            self.tape.backward(by_logits)

    def gradients(self) -> list[Tensor]:
        """What data parallel training averages: the mask, and so the order, is equal on all ranks."""
        return [self.tape.kept_gradients, self._flat.other_grad]

    @torch.no_grad()
    def step(self, hyper: Mapping[str, Any]) -> None:
        """One SGD step. hyper: of training.flat.FlatOptimizer."""
        tape = self.tape
        self._ahead = True
        if hyper["clip_grad_norm"] is not None:
            self._flat.clip(self.gradients(), hyper["clip_grad_norm"])
        sgd = {name: hyper[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        masked_sgd_(tape.values, tape.kept_gradients, self._momentum, None, **sgd)
        self._flat.other_sgd_step(hyper["decays"], **sgd)

    def close(self) -> None:
        """Ends the threads."""
        if self._tape is not None:
            self._tape.close()
            self._tape = None
