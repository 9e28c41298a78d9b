"""Whether a training computes on kept weights alone: if it can, and if that is cheaper."""

# The rest of the room is imported on use, since numba takes a second: dense and short trainings do not wait for it.

from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastprune.sparse.engine import Flat, Sparse
    from fastprune.sparse.program import Program

_DENSEST = 0.75
"""No network of a larger density is worth the seconds that exporting it takes."""

_FEWEST = 200
"""Nor is a training of fewer steps."""

_MOST = 16
"""Programs that are kept, for models whose numbers change all the time."""


class Chooser:
    """Chooses for one model's trainings, one after another; keeps its programs and its last engine."""

    def __init__(self, model: nn.Module, flat: "Flat") -> None:
        self._model, self._flat = model, flat
        self._programs: dict[Any, Program | str] = {}
        self._made: tuple[Any, Sparse] | None = None

    def choose(self, images: Tensor, batch: int, steps: float = inf, *, forced: bool = False) -> "Sparse | str":
        """The engine for a training on such `images`, or in words why it computes densely.

        batch: images of a step. steps: of the whole training. forced: whatever is cheaper.
        """
        found = self._choose(images, batch, steps, forced)
        if isinstance(found, str):
            self.close()
        return found

    def _choose(self, images: Tensor, batch: int, steps: float, forced: bool) -> "Sparse | str":
        kept, total = int(self._flat.mask.sum()), sum(s.numel for s in self._flat.segments)
        cheaper = f"at density {kept / total:.2f} dense is cheaper"
        if not forced and kept > _DENSEST * total:
            return cheaper
        if not forced and steps < _FEWEST:
            return f"a training of {steps:.0f} steps is too short"
        if images.dim() != 4 or images.dtype != torch.float32:
            return f"batches of {images.dim()} dimensions in {str(images.dtype).removeprefix('torch.')}"
        from fastprune.sparse.cost import SECONDS_TO_START, estimate
        from fastprune.sparse.engine import Sparse, masks, settings

        # A program has numbers of the model in it, such as the rate of a dropout.
        known = tuple(images.shape[1:]), settings(self._model)
        if known not in self._programs:
            if len(self._programs) == _MOST:
                self._programs.clear()
            self._programs[known] = program_of(self._model, self._flat, images)
        program = self._programs[known]
        if isinstance(program, str):
            return program
        if not forced:
            sparse, dense = estimate(program, masks(self._flat), batch)
            if sparse >= dense:
                return cheaper
            if (dense - sparse) * steps / 1000 < SECONDS_TO_START:
                return f"a training of {steps:.0f} steps is too short"
        if self._made is None or self._made[0] != known:
            self.close()
            self._made = known, Sparse(self._model, self._flat, program)
        return self._made[1]

    def close(self) -> None:
        """Frees the engine's memory and ends its threads."""
        if self._made is not None:
            self._made[1].close()
            self._made = None


def program_of(model: nn.Module, flat: "Flat", images: Tensor) -> "Program | str":
    """The fused training program of a model with masks, or why the sparse engine cannot train it."""
    from fastprune.kernels.lanes import BYTES
    from fastprune.sparse.program import Conv, Torch, Unsupported, aten, fuse, inputs, islands, lower, names

    try:
        program = fuse(lower(model, images, train=True))
        islands(program)
    except Unsupported as error:
        return str(error)
    if len(program.output.shape) != 1:
        return "the sparse engine does not know the shape of the output"
    used = [name for op in program.ops for name in names(op)]
    for name, p in model.named_parameters():
        if p.requires_grad and used.count(name) != 1:
            return f"{name} is used {used.count(name)} times in the forward"
    covered = {s.name: s.shape for s in flat.segments}
    for name, sizes in covered.items():
        if len(sizes) not in (2, 4):
            return f"the sparse engine does not know masks of {len(sizes)} dimensions ({name})"
    for op in program.ops:
        if isinstance(op, Conv) and op.weight not in covered:
            return f"{op.weight} has no mask"
        # Its counter of batches would stand still.
        is_norm = isinstance(op, Torch) and op.target is aten.batch_norm.default
        if isinstance(op, Torch) and is_norm and op.args[3] is not None and op.args[5]:
            return f"the sparse engine does not know {op.name}"
        for shape in (v.shape for v in (*inputs(op), op.y)):
            # Lists have offsets of 32 bits; a border of 8 is more than any kernel here needs.
            if len(shape) == 3 and (shape[0] + 1) * (shape[1] + 16) * (shape[2] + 16) * BYTES >= 2**31:
                return f"maps of {' x '.join(map(str, shape))} are too large for its lists"
    return program
