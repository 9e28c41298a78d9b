"""The timed layers of a training step: batch norm with what follows it, the stem's pooling, the loss, beside torch's.

As in rows.py. The layers are ResNet-18's at 64x64 px. Bytes are those of a layer that reads and writes each map
once; batch norm needs its input twice, so that what is in no cache is read again.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rows import BF16, Group, Row
from fastprune.kernels import batch_norm, batch_norm_pool, cross_entropy_
from fastprune.training.step import EpochSums

BATCH = 512
OURS, EAGER, COMPILED = "fastprune", "torch, eager", "torch.compile"
FORWARD, BOTH = "forward", "forward and backward"


@dataclass(frozen=True)
class Shape:
    """A layer: its channels and side. residual: added before ReLU, and then the result has two consumers, as at the end
    of a residual block. pooled: max pooling follows, as in the stem."""

    name: str
    channels: int
    side: int
    residual: bool = False
    pooled: bool = False

    @property
    def bytes(self) -> dict[str, float]:
        """By direction the bytes for each value of the input."""
        if self.pooled:
            # In: x. Out: a quarter. Backward: the gradient of that, x, and the gradient of x.
            return {FORWARD: 2 + 0.5, BOTH: 2 + 0.5 + 0.5 + 2 + 2}
        # In: x and the residual. Out: y. Backward: the gradients of each consumer, x, and y where ReLU's mask does not
        # follow from x; the gradients of x and of the residual.
        more = 2 if self.residual else 0
        return {FORWARD: 4 + more, BOTH: 4 + more + 6 + 3 * more}


SHAPES = (
    Shape("stem, with pooling", 64, 32, pooled=True),
    Shape("64 channels of 16x16", 64, 16),
    Shape("128 channels of 8x8, residual", 128, 8, residual=True),
    Shape("512 channels of 2x2", 512, 2),
)


class Layer:
    """Inputs of a layer, bf16 and channels-last, and the gradients of its results."""

    def __init__(self, shape: Shape, batch: int, device: torch.device, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        self.shape = shape

        def drawn(side: int) -> Tensor:
            size = (batch, shape.channels, side, side)
            return torch.randn(size, generator=g, device=device).to(BF16, memory_format=torch.channels_last)

        self.x = drawn(shape.side).requires_grad_()
        self.residual = drawn(shape.side).requires_grad_() if shape.residual else None
        self.weight = torch.rand(shape.channels, generator=g, device=device).requires_grad_()
        self.bias = torch.randn(shape.channels, generator=g, device=device).requires_grad_()
        self.running = (torch.zeros(shape.channels, device=device), torch.ones(shape.channels, device=device))
        out = (shape.side + 1) // 2 if shape.pooled else shape.side
        self.grads = [drawn(out) for _ in range(2 if shape.residual else 1)]

    def call(self, way: str, direction: str) -> Any:
        """The results, or the gradients of all inputs."""
        if direction == FORWARD:
            with torch.no_grad():
                return self.forward(way)
        trained = [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]
        return torch.autograd.grad(self.forward(way), trained, self.grads)

    def forward(self, way: str) -> tuple[Tensor, ...]:
        """One result for each consumer."""
        norm = (self.x, self.weight, self.bias, *self.running)
        if way == OURS:
            if self.shape.pooled:
                return (batch_norm_pool(*norm, 0.1, 1e-5),)
            branches = 2 if self.shape.residual else 1
            ours: Any = batch_norm(*norm, self.residual, 0.1, 1e-5, relu=True, branches=branches)
            return ours if branches == 2 else (ours,)
        function = compiled(self.x.device.type) if way == COMPILED else plain
        y = function(*norm, self.residual, self.shape.pooled)
        return (y, y) if self.shape.residual else (y,)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None, pooled: bool
) -> Tensor:
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    y = F.relu(y if residual is None else y + residual)
    return F.max_pool2d(y, 3, stride=2, padding=1) if pooled else y


@cache
def compiled(kind: str) -> Any:
    # On a CPU the code would take longer to generate than all other rows to time.
    return torch.compile(plain, dynamic=False, backend="inductor" if kind == "cuda" else "aot_eager")


def layer_group(shape: Shape, direction: str, device: torch.device, small: bool = False) -> Group:
    batch = 2 if small else BATCH

    def row(way: str) -> Row:
        return Row(
            way,
            lambda layer: layer.call(way, direction),
            ours=way == OURS,
            bytes=lambda layer: shape.bytes[direction] * layer.x.numel(),
        )

    def make(seed: int) -> Layer:
        if seed == 0:
            # torch counts compilations of a function over all shapes, and beyond its limit runs uncompiled.
            torch.compiler.reset()
        return Layer(shape, batch, device, seed)

    return Group(f"batch norm, {shape.name}, {direction}", tuple(map(row, (OURS, EAGER, COMPILED))), make)


def layer_groups(device: torch.device, small: bool = False) -> list[Group]:
    each = [layer_group(shape, direction, device, small) for shape in SHAPES for direction in (FORWARD, BOTH)]
    return [*each, loss_group(device)]


LOSS = f"loss of {BATCH} images, 200 classes, bf16"


class Logits:
    """Logits bf16 [BATCH, 200] and labels, and where their loss, gradient and hits go."""

    def __init__(self, device: torch.device, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        self.logits = torch.randn(BATCH, 200, generator=g, device=device).to(BF16).requires_grad_()
        self.labels = torch.randint(200, (BATCH,), generator=g, device=device)
        self.gradient = torch.empty(BATCH, 200, dtype=BF16, device=device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)
        self.sums = EpochSums(device)

    def ours(self) -> Tensor:
        """The gradient."""
        logits = self.logits.detach()
        cross_entropy_(self.sums.sums, self.arrived, logits, self.labels, gradient=self.gradient)
        return self.gradient

    def torchs(self) -> Tensor:
        """The gradient. As a Trainer's step without fused_loss."""
        loss = F.cross_entropy(self.logits.float(), self.labels)
        self.sums.add(loss, self.logits, self.labels)
        return torch.autograd.grad(loss, self.logits)[0]


def loss_group(device: torch.device) -> Group:
    def size(given: Logits) -> float:
        return 2 * given.gradient.nbytes + given.labels.nbytes

    made = (Row(OURS, Logits.ours, ours=True, bytes=size), Row(EAGER, Logits.torchs, bytes=size))
    return Group(LOSS, made, lambda seed: Logits(device, seed))
