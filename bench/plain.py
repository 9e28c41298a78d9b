"""The baseline of training.py and rounds.py: pruning and training in plain PyTorch, as a careful user writes them.

`mask * weight` in the forward pass, torch.optim.SGD, kthvalue, DataLoader. The usual advice is followed: channels-last,
autocast, a fused optimiser, images decoded beforehand, pinned memory, asynchronous copies, no `.item()` in an epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastprune.specs import OptimizerSpec

# By precision: the dtype of autocast; None is without.
LOW = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class ProductConv2d(nn.Conv2d):
    """A conv that computes with `mask * weight`. mask: buffer of the weight's shape and dtype, 1 keeps, 0 prunes."""

    mask: Tensor

    @classmethod
    def wrap(cls, module: nn.Conv2d) -> ProductConv2d:
        """Turns a conv into a ProductConv2d with a mask of ones. Mutates and returns `module`."""
        # The class alone changes: parameters, their order and the random state stay those of the plain network.
        module.__class__ = cls
        module.register_buffer("mask", torch.ones_like(module.weight))
        return module  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.mask * self.weight, self.bias)


class Wrapped:
    """Base of wrappers around an iterable of batches: hands on its length and its epoch."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


class Plain:
    """A training loop. Mutates the model: moves it to the device and, if `masked`, adds masks to its convs.

    precision: "fp32", "bf16" or "fp16". compile: True or the backend's name for torch.compile. fused: as in
    torch.optim.SGD; None is torch's own choice. sgd: momentum, weight decay and nesterov.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        masked: bool = True,
        compile: bool | str = False,
        fused: bool | None = True,
        sgd: OptimizerSpec | None = None,
        lr: float = 0.1,
    ) -> None:
        self.device, self.precision, self._fused = torch.device(device), precision, fused
        self._spec = sgd or OptimizerSpec(batch_size=0)
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        self.convs = [ProductConv2d.wrap(m) for m in convs] if masked else []
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network: Any = self.model
        if compile:
            self._network = torch.compile(self.model, backend=compile if isinstance(compile, str) else "inductor")
        # Loss times images, hits, images. On the device: a step that read its loss would wait for the GPU.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.fresh(lr)
        self._start: dict[str, Any] = {}

    def fresh(self, lr: float) -> None:
        """Replaces the optimiser and the gradient scaler by new ones: momentum is zero."""
        s = self._spec
        self.sgd = torch.optim.SGD(
            self.model.parameters(),
            lr,
            s.momentum,
            weight_decay=s.weight_decay,
            nesterov=s.nesterov,
            fused=self._fused,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step on a batch, float [n, 3, H, W] and int64 [n]."""
        images, labels = self._moved(images, labels)
        with self._autocast():
            logits = self._network(images)
            loss = F.cross_entropy(logits, labels)
        self.sgd.zero_grad()
        # The scaler passes everything through unless the precision is fp16.
        self.scaler.scale(loss).backward()
        self.scaler.step(self.sgd)
        self.scaler.update()
        self._count(loss, logits, labels)

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, int]:
        """One epoch: (mean loss in nats, accuracy in [0, 1], images)."""
        self.model.train()
        self.sums.zero_()
        for images, labels in batches:
            self.step(images, labels)
        return self._result()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, int]:
        """(mean loss in nats, accuracy in [0, 1], images) in eval mode."""
        self.model.eval()
        self.sums.zero_()
        for images, labels in batches:
            images, labels = self._moved(images, labels)
            with self._autocast():
                logits = self._network(images)
                loss = F.cross_entropy(logits, labels)
            self._count(loss, logits, labels)
        return self._result()

    @torch.no_grad()
    def prune(self, fraction: float) -> int:
        """Prunes the smallest `fraction` of the remaining weights of all convs, by magnitude; the number kept.

        Weights tied with the threshold are pruned, too.
        """
        remaining = torch.cat([c.weight.abs()[c.mask > 0] for c in self.convs])
        threshold = remaining.kthvalue(round(fraction * len(remaining))).values
        for c in self.convs:
            c.mask *= c.weight.abs() > threshold
        return int(sum(c.mask.sum() for c in self.convs))

    def save_rewind_point(self) -> None:
        """Copies the present weights and batch-norm statistics, without the masks."""
        state = {name: value for name, value in self.model.state_dict().items() if not name.endswith(".mask")}
        self._start = copy.deepcopy(state)

    def rewind(self, lr: float) -> None:
        """Restores weights and statistics of the last `save_rewind_point`; a new optimiser. Masks stay."""
        # strict=False: the saved state has no masks.
        self.model.load_state_dict(self._start, strict=False)
        self.fresh(lr)

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        low = LOW[self.precision]
        return nullcontext() if low is None else torch.autocast(self.device.type, low)

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.sums[0] += loss.detach() * len(labels)
        self.sums[1] += (logits.detach().argmax(1) == labels).sum()
        self.sums[2] += len(labels)

    def _result(self) -> tuple[float, float, int]:
        loss, hits, images = self.sums.tolist()
        return loss / images, hits / images, int(images)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded images, uint8 [n, 3, H, W], and labels; an image is transformed when it is read."""

    def __init__(self, images: Tensor, labels: Sequence[int], transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), self.labels[i]


def loaders(
    train: tuple[Tensor, Sequence[int]],
    val: tuple[Tensor, Sequence[int]],
    batch: int,
    norm: tuple[Sequence[float], Sequence[float]],
    *,
    workers: int = 0,
    pin: bool = False,
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """New DataLoaders (train, val) of decoded images, uint8 [n, 3, H, W], and labels, transformed by torchvision.

    norm: (mean, standard deviation) of each channel, of pixels in [0, 1]. workers, pin: as in DataLoader.
    """
    normal = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(norm[0]), list(norm[1]))]
    size = train[0].shape[-2:]
    crop = [v2.RandomResizedCrop(list(size), antialias=True), v2.RandomHorizontalFlip()]
    how: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "persistent_workers": workers > 0}
    return (
        DataLoader(Pictures(*train, v2.Compose([*crop, *normal])), batch, shuffle=True, drop_last=True, **how),
        DataLoader(Pictures(*val, v2.Compose(normal)), batch, **how),
    )


class DeviceBatches:
    """Batches of images on the device, uint8 [n, 3, H, W], cropped and flipped a batch at a time by `grid_sample`.

    Boxes are drawn as by RandomResizedCrop, but clamped to the image where it draws again. norm: as of `loaders`.
    steps: at most so many batches in an epoch.
    """

    # On a GPU a DataLoader would be the bottleneck by far, and a step would be compared with a wait. This is the common
    # remedy without custom kernels; drawing on the device as well keeps the host from waiting for it.

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch: int,
        norm: tuple[Sequence[float], Sequence[float]],
        steps: int | None = None,
    ) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.steps = min(len(images) // batch, steps or len(images))
        self.mean, self.std = (torch.tensor(t, device=images.device).view(3, 1, 1) for t in norm)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), device=self.images.device)
        for step in range(self.steps):
            index = order[step * self.batch : (step + 1) * self.batch]
            yield self._augment(self.images[index]), self.labels[index]

    def _augment(self, images: Tensor) -> Tensor:
        """float32 [n, 3, H, W], normalised."""
        draw = torch.rand(5, len(images), device=images.device)
        # RandomResizedCrop's defaults: area uniform in [0.08, 1], aspect ratio log-uniform in [3/4, 4/3].
        area, stretch = 0.08 + 0.92 * draw[0], ((2 * draw[1] - 1) * math.log(4 / 3)).exp()
        box_w, box_h = ((area * stretch).sqrt().clamp(max=1), (area / stretch).sqrt().clamp(max=1))
        theta = torch.zeros(len(images), 2, 3, device=images.device)
        # The edges of the image are at -1 and 1, and centres are drawn so that the box stays within. A negative scale
        # mirrors.
        theta[:, 0, 0] = torch.where(draw[4] < 0.5, box_w, -box_w)
        theta[:, 1, 1] = box_h
        theta[:, 0, 2], theta[:, 1, 2] = (2 * draw[2] - 1) * (1 - box_w), (2 * draw[3] - 1) * (1 - box_h)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        planes = images.float().to(memory_format=torch.channels_last) / 255
        return (F.grid_sample(planes, grid, padding_mode="border", align_corners=False) - self.mean) / self.std
