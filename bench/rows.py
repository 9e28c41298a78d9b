"""The timed operations, shared by all suites: kernels on the weights of whole networks, and crops of batches.

A row is one call. Rows of a group do the same work on the same inputs: fastprune's, common alternatives, and a floor, a
simple operation that moves about as many bytes. On a CPU a run is one call on one input set. On a GPU a run replays a
CUDA graph of one call on each of several input sets.
"""

import itertools
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torchvision.transforms import v2

import fastprune
from fastprune.kernels import (
    Segment,
    crop_flip_normalize,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    masked_weight,
    pack_bits,
    segment_counts,
    unpack_bits,
)
from fastprune.kernels.masked_sgd import SgdTiles, gather, masked_sgd_scattered_, sgd_tiles
from fastprune.loaders.augment import crop_boxes, epoch_order
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.masks import Mask, layout
from fastprune.specs import ModelSpec
from fastprune.training.models import build
from fastprune.training.step import capturing

BF16 = torch.bfloat16
# Bytes: five times the L2 cache of an H100 or H200. Calls rotate through input sets that together exceed it, because in
# training other kernels evict the weights between two calls. A single set would be read from the cache.
CACHE = 256e6
# Seconds of GPU work in a timed run: launching a graph and waiting for it, some 10 us each, are then below 1 %.
LONG = 0.02
# Seconds of untimed work before: an idle GPU runs at a sixth of its clock rate, and takes some milliseconds to rise.
WARM = 0.1


@dataclass(frozen=True)
class Row:
    """One timed call. call: takes an input set.

    ours: the reference of its group, to which the times of the others are given as ratios. bytes: the fewest that the
    call must move, by input set. flop: the multiplications and additions of its matrix products. images: in one call.
    floor: name of the row that is its floor; None: a copy of as many bytes. waits: the call waits for the device, which
    a CUDA graph cannot capture. cpu_only: has no form for a GPU.
    """

    what: str
    call: Callable[[Any], Any]
    ours: bool = False
    bytes: Callable[[Any], float] | None = None
    flop: float | None = None
    images: Callable[[Any], int] | None = None
    floor: str | None = None
    waits: bool = False
    cpu_only: bool = False


@dataclass(frozen=True)
class Group:
    """Rows that are compared. make: allocates an input set from a seed."""

    name: str
    rows: tuple[Row, ...]
    make: Callable[[int], Any]

    def inputs(self, device: torch.device) -> list[Any]:
        """On a CPU one input set; on a GPU as many as exceed its cache, at least 2 and at most 32."""
        first = self.make(0)
        # One buffer of ResNet-18's weights, 45 MB, exceeds the cache of a CPU core.
        if device.type == "cpu":
            return [first]
        # By the row that moves least: its sets too must be evicted before their next turn.
        sizes = [row.bytes(first) for row in self.rows if row.bytes]
        return [first, *map(self.make, range(1, max(2, min(32, math.ceil(CACHE / min(sizes))))))]


class Weights:
    """The conv weights of a network, flat [n] and as a tensor for each layer. Buffers are allocated at first use."""

    # Cached properties, because each group uses a few of the buffers, and a GPU holds several sets of them.
    SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}  # noqa: RUF012

    def __init__(self, segments: tuple[Segment, ...], device: torch.device, seed: int = 0) -> None:
        self.segments, self.device = segments, device
        self.dense = Mask.dense(segments).keep.to(device)
        self.n, self.total = len(self.dense), sum(s.numel for s in segments)
        self.each = [int(0.2 * s.numel) for s in segments]
        self.k = int(0.2 * self.total)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._optimizers: dict[str, torch.optim.SGD] = {}

    def _normal(self) -> Tensor:
        """float32 [n], normal; in each layer the standard deviation of He initialisation (fan out)."""
        # Layers differ in scale as in a real network: a threshold search that relies on one scale would look too good.
        buffer = torch.zeros(self.n, device=self.device)
        for s in self.segments:
            buffer[s.span].normal_(0, (2 / (s.shape[0] * math.prod(s.shape[2:]))) ** 0.5, generator=self._generator)
        return buffer

    weight = cached_property(_normal)
    grad = cached_property(_normal)
    momentum = cached_property(_normal)

    @cached_property
    def mask(self) -> Tensor:
        """bool [n]; 80 % kept."""
        drawn = torch.rand(self.n, device=self.device, generator=self._generator)
        return self.dense & (drawn < 0.8)

    @cached_property
    def scores(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def half(self) -> Tensor:
        return torch.empty_like(self.weight, dtype=BF16)

    @cached_property
    def half_grads(self) -> list[Tensor]:
        """bf16, one for each layer, in the order in memory that autograd gives them: the weight's."""
        drawn = self._normal()
        return [s.view(drawn).to(BF16) for s in self.segments]

    @cached_property
    def tiles(self) -> list[SgdTiles]:
        return sgd_tiles(self.segments, self.weight)

    @cached_property
    def new_mask(self) -> Tensor:
        return torch.empty_like(self.dense)

    @cached_property
    def packed(self) -> Tensor:
        return pack_bits(self.mask)

    @cached_property
    def powers(self) -> Tensor:
        """uint8 [8]: the values of the bits of a byte, lowest first."""
        return 2 ** torch.arange(8, dtype=torch.uint8, device=self.device)

    @cached_property
    def parts(self) -> list[Tensor]:
        return [s.view(self.weight).contiguous() for s in self.segments]

    @cached_property
    def part_masks(self) -> list[Tensor]:
        return [s.view(self.mask).contiguous() for s in self.segments]

    @cached_property
    def part_floats(self) -> list[Tensor]:
        return [mask.float() for mask in self.part_masks]

    @cached_property
    def part_halves(self) -> list[Tensor]:
        return [torch.empty_like(part, dtype=BF16) for part in self.parts]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        parameters = [nn.Parameter(part.clone()) for part in self.parts]
        for p in parameters:
            p.grad = torch.randn_like(p)
        return parameters

    def torch_sgd(self, kind: str, *, mask: bool = False, copy: bool = False) -> None:
        """A step of torch.optim.SGD. kind: "fused", "foreach" or "single".

        mask: then multiplies each weight by its mask. copy: then copies the weights to bf16.
        """
        if kind not in self._optimizers:
            how = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}}[kind]
            self._optimizers[kind] = torch.optim.SGD(self.parameters, **self.SGD, **how)
        self._optimizers[kind].step()
        with torch.no_grad():
            for p, m in zip(self.parameters, self.part_masks, strict=True) if mask else ():
                p.mul_(m)
            for p, half in zip(self.parameters, self.part_halves, strict=True) if copy else ():
                half.copy_(p)

    def torch_modules(self) -> list[nn.Module]:
        """A module for each weight: torch.nn.utils.prune works on modules. Weights are shared, not copied."""
        # New ones for each call: torch stacks the masks of repeated pruning, so the second call would do other work.
        modules = [nn.Module() for _ in self.parts]
        for module, part in zip(modules, self.parts, strict=True):
            module.weight = nn.Parameter(part)
        return modules

    def torch_global_prune(self) -> list[Tensor]:
        """torch's masks; the k smallest weights over all layers are pruned."""
        modules = self.torch_modules()
        torch_prune.global_unstructured([(m, "weight") for m in modules], torch_prune.L1Unstructured, amount=self.k)
        return [m.weight_mask for m in modules]  # type: ignore[misc]

    def torch_local_prune(self) -> list[Tensor]:
        """torch's masks; a fifth of each layer is pruned."""
        modules = self.torch_modules()
        for module, number in zip(modules, self.each, strict=True):
            torch_prune.l1_unstructured(module, "weight", amount=number)
        return [m.weight_mask for m in modules]  # type: ignore[misc]


@cache
def segments_of(network: str, small: bool) -> tuple[Segment, ...]:
    return layout(conv_weights(build(ModelSpec(network, 200, width=8 if small else 64))))


# Bytes a weight that a call must read or write once: 4 for float32, 2 for bf16, 1 for a mask, 1/8 for a packed mask.
READ = "floor: vector_norm(w, 1), one read"
COMPARED = "floor: scores > threshold, one read and write"
SCATTERED = "SGD step, bf16 gradients of layers"
OF_LAYERS, COPIED = "masked_sgd_scattered_ with a bf16 copy", "copies to a flat gradient, then masked_sgd_"
COUNTED = "floor: np.count_nonzero(mask), one read"
# In the order of their worth: what every step does, then what a round does once.
OPERATIONS: dict[str, tuple[Row, ...]] = {
    "SGD step": (
        Row(
            "masked_sgd_",
            lambda w: masked_sgd_(w.weight, w.grad, w.momentum, w.mask, **w.SGD),
            ours=True,
            bytes=lambda w: 21 * w.n,  # reads weight, gradient, momentum and mask; writes weight and momentum
        ),
        Row(
            "masked_sgd_ with a bf16 copy",
            lambda w: masked_sgd_(w.weight, w.grad, w.momentum, w.mask, w.half, **w.SGD),
            bytes=lambda w: 23 * w.n,
        ),
        Row(
            "masked_sgd_, dense",
            lambda w: masked_sgd_(w.weight, w.grad, w.momentum, None, **w.SGD),
            bytes=lambda w: 20 * w.n,
        ),
        Row("floor: SGD fused, dense", lambda w: w.torch_sgd("fused"), bytes=lambda w: 20 * w.n),
        Row(
            "floor with a copy: SGD fused, dense, then copy to bf16",
            lambda w: w.torch_sgd("fused", copy=True),
            bytes=lambda w: 26 * w.n,  # 20, then the copy reads 4 and writes 2
        ),
        Row("SGD foreach, then weight *= mask", lambda w: w.torch_sgd("foreach", mask=True)),
        Row("SGD for each tensor, then weight *= mask", lambda w: w.torch_sgd("single", mask=True)),
        Row("SGD fused, then weight *= mask", lambda w: w.torch_sgd("fused", mask=True)),
        Row(
            "SGD fused, then weight *= mask, then copy to bf16",
            lambda w: w.torch_sgd("fused", mask=True, copy=True),
        ),
    ),
    SCATTERED: (
        Row(
            OF_LAYERS,
            lambda w: masked_sgd_scattered_(w.weight, w.half_grads, w.momentum, w.mask, w.tiles, w.half, **w.SGD),
            ours=True,
            bytes=lambda w: 21 * w.n,  # as masked_sgd_, with two bytes of the gradient instead of four
        ),
        Row(
            COPIED,
            lambda w: masked_sgd_(
                w.weight, gather(w.half_grads, w.segments, w.grad), w.momentum, w.mask, w.half, **w.SGD
            ),
            bytes=lambda w: 21 * w.n,
        ),
    ),
    "cast": (
        Row(
            "masked_cast to bf16",
            lambda w: masked_cast(w.weight, w.mask, w.half),
            ours=True,
            bytes=lambda w: 7 * w.n,
        ),
        Row(
            "masked_weight to bf16 a layer",
            lambda w: [masked_weight(p, m, BF16) for p, m in zip(w.parts, w.part_masks, strict=True)],
            bytes=lambda w: 7 * w.n,
        ),
        Row(
            "(mask * weight).bfloat16() a layer",
            lambda w: [(m * p).bfloat16() for m, p in zip(w.part_floats, w.parts, strict=True)],
        ),
        Row(
            "torch._foreach_mul, then _foreach_copy_ to bf16",
            lambda w: torch._foreach_copy_(w.part_halves, torch._foreach_mul(w.parts, w.part_floats)),
        ),
        Row("floor: copy to bf16", lambda w: w.half.copy_(w.weight), bytes=lambda w: 6 * w.n),
    ),
    "threshold": (
        Row(
            "kth_smallest_magnitude",
            lambda w: kth_smallest_magnitude(w.weight, w.dense, w.k),
            ours=True,
            bytes=lambda w: 5 * w.n,  # weight and mask, read once; the floor reads the weight alone
            floor=READ,
        ),
        Row(READ, lambda w: torch.linalg.vector_norm(w.weight, 1), bytes=lambda w: 4 * w.n),
        Row(
            "np.partition(np.abs(w), k)",
            lambda w: np.partition(np.abs(w.weight.numpy()), w.k - 1)[w.k - 1],
            cpu_only=True,
        ),
        # Not captured in a graph: torch does not document whether these three synchronise.
        Row("w.abs().kthvalue(k)", lambda w: w.weight.abs().kthvalue(w.k), waits=True),
        Row("w.abs().sort()", lambda w: w.weight.abs().sort(), waits=True),
        Row("w.abs().topk(k, largest=False)", lambda w: w.weight.abs().topk(w.k, largest=False), waits=True),
    ),
    "global prune, scores to mask": (
        Row(
            "keep_top",
            lambda w: keep_top(w.scores, w.dense, w.k, w.segments),
            ours=True,
            bytes=lambda w: 6 * w.n,
            waits=True,
        ),
        Row(COMPARED, lambda w: torch.gt(w.scores, 0.01, out=w.new_mask), bytes=lambda w: 5 * w.n),
        Row("torch.nn.utils.prune.global_unstructured", Weights.torch_global_prune, waits=True),
    ),
    "survivors a layer": (
        Row("segment_counts", lambda w: segment_counts(w.mask, w.segments), ours=True, bytes=lambda w: w.n),
        Row(COUNTED, lambda w: np.count_nonzero(w.mask.numpy()), bytes=lambda w: w.n, cpu_only=True),
        Row("mask.sum() a layer", lambda w: [w.mask[s.span].sum() for s in w.segments], bytes=lambda w: w.n),
    ),
    "mask to bits": (
        Row("pack_bits", lambda w: pack_bits(w.mask), ours=True, bytes=lambda w: 1.125 * w.n),
        Row(COUNTED, lambda w: np.count_nonzero(w.mask.numpy()), bytes=lambda w: w.n, cpu_only=True),
        Row("np.packbits(mask)", lambda w: np.packbits(w.mask.numpy()), bytes=lambda w: 1.125 * w.n, cpu_only=True),
        Row(
            "pack_bits in torch",
            lambda w: (w.mask.view(-1, 8) * w.powers).sum(1, dtype=torch.uint8),
            bytes=lambda w: 1.125 * w.n,
        ),
    ),
    "bits to mask": (
        Row("unpack_bits", lambda w: unpack_bits(w.packed, w.n), ours=True, bytes=lambda w: 1.125 * w.n),
        Row("floor: new.fill_(True), one write", lambda w: w.new_mask.fill_(True), bytes=lambda w: w.n),
        Row(
            "np.unpackbits(packed).astype(bool)",
            lambda w: np.unpackbits(w.packed.numpy(), count=w.n).astype(bool),
            bytes=lambda w: 1.125 * w.n,
            cpu_only=True,
        ),
        Row(
            "unpack_bits in torch",
            lambda w: (w.packed[:, None] & w.powers).bool(),
            bytes=lambda w: 1.125 * w.n,
        ),
    ),
    "local prune, scores to mask": (
        Row(
            "keep_top, so many of each",
            lambda w: keep_top(w.scores, w.dense, w.each, w.segments),
            ours=True,
            bytes=lambda w: 6 * w.n,
            waits=True,
        ),
        Row(COMPARED, lambda w: torch.gt(w.scores, 0.01, out=w.new_mask), bytes=lambda w: 5 * w.n),
        Row("torch.nn.utils.prune.l1_unstructured a layer", Weights.torch_local_prune, waits=True),
    ),
}
NETWORKS = ("resnet18", "resnet50")


def by_block(call: Callable[..., Any], bytes: Callable[[Any], float], powers: range) -> tuple[Row, ...]:
    """A row for each block size 2**power: the elements of one Triton program."""
    return tuple(Row(f"block {2**i}", partial(call, block=2**i), bytes=bytes) for i in powers)


BLOCKS: dict[str, tuple[Row, ...]] = {
    "masked_cast by block": by_block(
        lambda w, block: masked_cast(w.weight, w.mask, w.half, block=block), lambda w: 7 * w.n, range(8, 14)
    ),
    "masked_sgd_ by block": by_block(
        lambda w, block: masked_sgd_(w.weight, w.grad, w.momentum, w.mask, w.half, **w.SGD, block=block),
        lambda w: 23 * w.n,
        range(8, 14),
    ),
    "kth_smallest_magnitude by block": by_block(
        lambda w, block: kth_smallest_magnitude(w.weight, w.dense, w.k, block=block), lambda w: 5 * w.n, range(10, 15)
    ),
}


# Tiny ImageNet, per channel.
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)


class Crops:
    """A batch of indices into many images, uint8 [N, side, side, 3], with random boxes and flips.

    Boxes have the distribution of torchvision's RandomResizedCrop.
    """

    def __init__(self, side: int, dtype: torch.dtype, device: torch.device, small: bool, epoch: int = 0) -> None:
        self.side, self.dtype, self.device, self.epoch = side, dtype, device, epoch
        self.batch = 16 if small else 512
        # A loader gathers a batch from all over the data set, so most of its images are not in the cache: here on a CPU
        # four batches suffice for that, on a GPU it takes a whole data set.
        number = 4 * self.batch if small or device.type == "cpu" else {64: 100_000, 128: 30_000}[side]
        self.images = pixels(number, side, device)
        self.index_on_host = epoch_order(0, epoch, number)[: self.batch]
        self.index = torch.from_numpy(self.index_on_host).to(device)
        self.box, self.flip = self.draw()
        shape = (self.batch, 3, side, side)
        self.out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        written = self.out.numel() * dtype.itemsize
        # Bytes: the kernel reads the pixels of the boxes only, the floor whole images.
        self.least = written + 3 * int((self.box[:, 2] * self.box[:, 3]).sum())
        self.whole = written + self.out.numel()

    def draw(self) -> tuple[Tensor, Tensor]:
        box, flip = crop_boxes(0, self.epoch, self.index_on_host, self.side, self.side)
        return torch.from_numpy(box).to(self.device), torch.from_numpy(flip).to(self.device)

    def crop(self, box: Tensor, flip: Tensor, **block: int) -> Tensor:
        return crop_flip_normalize(self.images, self.index, box, flip, MEAN, STD, self.out, **block)

    @cached_property
    def planes(self) -> Tensor:
        return self.images[self.index].permute(0, 3, 1, 2)

    @cached_property
    def pictures(self) -> list[Any]:
        return [v2.functional.to_pil_image(image) for image in self.planes]

    @cached_property
    def norm(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(t, device=self.device).view(3, 1, 1) for t in (MEAN, STD))
        return mean, std

    @cached_property
    def transform(self) -> v2.Compose:
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        return v2.Compose([v2.RandomResizedCrop(self.side, antialias=True), v2.RandomHorizontalFlip(), *last])

    @cached_property
    def picture_transform(self) -> v2.Compose:
        first = [v2.RandomResizedCrop(self.side), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        return v2.Compose([*first, *self.transform.transforms[2:]])

    def grid_sample(self) -> Tensor:
        """The same batch as `crop` but for pixels at the edge of a box, which blend with pixels outside the box."""
        planes = self.images[self.index].permute(0, 3, 1, 2).float().div_(255.0)
        top, left, height, width = (self.box / self.side).unbind(1)  # in units of the image, which is square
        zero = torch.zeros_like(top)
        across = torch.stack([torch.where(self.flip, -width, width), zero, 2 * left + width - 1], 1)
        theta = torch.stack([across, torch.stack([zero, height, 2 * top + height - 1], 1)], 1)
        grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
        made = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return made.sub_(self.norm[0]).div_(self.norm[1]).to(self.dtype)


@cache
def pixels(number: int, side: int, device: torch.device) -> Tensor:
    """Random images, uint8 [number, side, side, 3], the same at each call."""
    # Cached: the input sets of a group share the data set, which at 128 pixels takes 1.5 GB. Their indices differ.
    generator = torch.Generator(device).manual_seed(0)
    shape = (number, side, side, 3)
    return torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)


CROP, GRID = "crop_flip_normalize", "grid_sample of the batch"
CROPS = (
    Row(
        CROP,
        lambda c: c.crop(c.box, c.flip),
        ours=True,
        bytes=lambda c: c.least,
        images=lambda c: c.batch,
    ),
    # Boxes are drawn on the host and copied to the device, which no CUDA graph captures.
    Row("crop_flip_normalize, boxes drawn as well", lambda c: c.crop(*c.draw()), images=lambda c: c.batch, waits=True),
    Row(
        "floor: uint8 batch to float, one read and write",
        lambda c: c.out.copy_(c.planes),
        bytes=lambda c: c.whole,
        images=lambda c: c.batch,
    ),
    Row(GRID, Crops.grid_sample, images=lambda c: c.batch),
    Row(
        "torchvision v2 a sample, on tensors",
        lambda c: torch.stack([c.transform(image) for image in c.planes]).to(c.dtype),
        images=lambda c: c.batch,
        waits=True,
    ),
    Row(
        "torchvision v2 a sample, on PIL images",
        lambda c: torch.stack([c.picture_transform(picture) for picture in c.pictures]).to(c.dtype),
        images=lambda c: c.batch,
        cpu_only=True,
    ),
)
SIDES, DTYPES = (64, 128), (torch.float32, BF16)
CROP_BLOCKS = by_block(lambda c, block: c.crop(c.box, c.flip, block=block), lambda c: c.least, range(7, 13))

TABLE = Group(
    "table of an epoch",
    (
        Row(
            "order, boxes and flips of 100,000 images",
            lambda number: crop_boxes(0, 0, epoch_order(0, 0, number), 64, 64),
            ours=True,
            images=lambda number: number,
            cpu_only=True,
        ),
    ),
    lambda seed: 100_000,
)


class Buffers:
    """Two float32 buffers of n elements."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.a, self.b = n, torch.randn(n, device=device), torch.empty(n, device=device)


COPY, PRODUCT = "copy", "matrix product"


def copy_group(device: torch.device, small: bool = False) -> Group:
    """The copy at whose rate floors are counted; each byte is read once and written once."""
    # 64 MB on a CPU and 512 MB on a GPU: beyond the caches, so that this is the rate of memory.
    n = 100_000 if small else 1 << 24 if device.type == "cpu" else 1 << 27
    row = Row("one buffer to another", lambda c: c.b.copy_(c.a), ours=True, bytes=lambda c: 8 * c.n)
    return Group(COPY, (row,), lambda seed: Buffers(n, device))


class Matrices:
    """Two random bf16 matrices [n, n] and one for their product."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.a, self.b = (torch.randn(n, n, device=device, dtype=BF16) for _ in range(2))
        self.out = torch.empty_like(self.a)


def product_group(device: torch.device, small: bool = False) -> Group:
    """The matrix product at whose rate floors of convs are counted."""
    n = 64 if small else 1024 if device.type == "cpu" else 8192
    row = Row(
        f"bf16, {n} x {n}",
        lambda m: torch.mm(m.a, m.b, out=m.out),
        ours=True,
        bytes=lambda m: 6 * n * n,
        flop=2 * n**3,
    )
    return Group(PRODUCT, (row,), lambda seed: Matrices(n, device))


def operation_group(name: str, network: str, device: torch.device, small: bool = False) -> Group:
    rows = (OPERATIONS | BLOCKS)[name]
    return Group(f"{name}, {network}", rows, lambda seed: Weights(segments_of(network, small), device, seed))


def crop_group(
    side: int, dtype: torch.dtype, device: torch.device, small: bool = False, rows: tuple[Row, ...] = CROPS
) -> Group:
    name = f"crop {'by block ' if rows is CROP_BLOCKS else ''}to {side}x{side}, {str(dtype).removeprefix('torch.')}"
    return Group(name, rows, lambda seed: Crops(side, dtype, device, small, seed))


def kernel_groups(device: torch.device, small: bool = False, blocks: bool = False) -> list[Group]:
    """All groups, the most telling first. blocks: also those that compare block sizes."""
    # The ceilings come first: the floors of all others are counted at their rates.
    found = [copy_group(device, small), product_group(device, small)]
    found += [crop_group(64, BF16, device, small)]
    found += [operation_group(name, network, device, small) for name in OPERATIONS for network in NETWORKS]
    found += [crop_group(*size, device, small) for size in itertools.product(SIDES, DTYPES) if size != (64, BF16)]
    if device.type == "cpu":
        found.append(TABLE)
    if blocks:
        # The largest network and the usual precision: what a default block size is chosen for.
        found += [operation_group(name, "resnet50", device, small) for name in BLOCKS]
        found.append(crop_group(64, BF16, device, small, CROP_BLOCKS))
    return found


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rows: on it they are called first and captured. Libraries and kernels keep memory for each stream."""
    return torch.cuda.Stream(device)


def prepared(row: Row, inputs: Sequence[Any], device: torch.device) -> tuple[Callable[[], None], int]:
    """(run, calls): `run()` calls the row `calls` times, on the inputs in turn, and waits for the device."""

    def once() -> None:
        for each in inputs:
            row.call(each)

    if device.type == "cpu":
        once()  # allocates the buffers that the row uses, and compiles
        (only,) = inputs
        return lambda: row.call(only), 1
    stream = side_stream(device)
    torch.cuda.synchronize(device)  # the inputs are there
    with torch.cuda.stream(stream):
        once()
    replay = once
    torch.cuda.synchronize(device)
    # A launch from Python takes longer than a small kernel runs. The replay of a graph measures the device alone, and
    # the Trainer replays its step in the same way.
    if not row.waits:
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, stream=stream):
            once()
        replay = graph.replay
    replay()  # the first replay uploads the graph
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    replay()
    torch.cuda.synchronize(device)
    times = max(1, min(1000, math.ceil(LONG / (time.perf_counter() - began))))

    def run() -> None:
        for _ in range(times):
            replay()
        torch.cuda.synchronize(device)

    return run, times * len(inputs)


def facts_of(row: Row, inputs: Sequence[Any], calls: int) -> dict[str, Any]:
    """What a row's time is compared with. bytes: the mean over the inputs, whose boxes differ in size."""
    size = statistics.mean(map(row.bytes, inputs)) if row.bytes else None
    images = row.images(inputs[0]) if row.images else None
    return {
        "ours": row.ours,
        "bytes": size,
        "flop": row.flop,
        "images": images,
        "floor": row.floor,
        "calls": calls,
        "sets": len(inputs),
    }


def time_row(row: Row, inputs: Sequence[Any], device: torch.device, rounds: int) -> dict[str, Any]:
    """The row's facts with `ms`, the mean of two medians of `rounds` runs, and `spread`, their relative difference."""
    run, calls = prepared(row, inputs, device)
    began = time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - began < WARM:
        run()
    # A median ignores single runs that another process slowed down. Two medians, one after the other, show drift of the
    # clock rate, which the spread of the runs within one would not.
    medians = []
    for _ in range(2):
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times) / calls)
    ms = 1e3 * statistics.mean(medians)
    return facts_of(row, inputs, calls) | {"ms": ms, "spread": 1e3 * (max(medians) - min(medians)) / ms}


def compare(found: dict[str, dict[str, Any]], copy_rate: float | None, matrix_rate: float | None) -> None:
    """Adds rates and ratios to the rows of a group; mutates `found`.

    gb_per_s, images_per_s; over_floor: the time over that of the floor row, or over that of `bytes` at `copy_rate`
    (GB/s) or of `flop` at `matrix_rate` (TFLOP/s), whichever is longer, if these are known; over_ours, where it is not
    there: the time over that of fastprune's row.
    """
    timed = [facts for facts in found.values() if "ms" in facts]
    ours = next((facts["ms"] for facts in timed if facts["ours"]), None)
    for facts in timed:
        ms, floors = facts["ms"], []
        if facts.get("bytes"):
            facts["gb_per_s"] = facts["bytes"] / ms / 1e6
            floors += [facts["bytes"] / copy_rate / 1e6] if copy_rate else []
        if facts.get("flop"):
            facts["tflop_per_s"] = facts["flop"] / ms / 1e9
            floors += [facts["flop"] / matrix_rate / 1e9] if matrix_rate else []
        # Of a row with both, one floor alone is none.
        if len(floors) == sum(bool(facts.get(what)) for what in ("bytes", "flop")) > 0:
            facts["over_floor"] = ms / max(floors)
        if facts.get("images"):
            facts["images_per_s"] = 1e3 * facts["images"] / ms
        # A floor that is measured replaces the counted one: on a CPU a read runs at another rate than a copy.
        if facts.get("floor") in found:
            facts["over_floor"] = ms / found[facts["floor"]]["ms"]
        if ours is not None:
            facts.setdefault("over_ours", ms / ours)


COLUMNS = (
    ("ms", "ms", 11, ",.3f"),
    ("spread", "spread", 8, ".1%"),
    ("gb_per_s", "GB/s", 9, ",.1f"),
    ("tflop_per_s", "TFLOP/s", 9, ",.1f"),
    ("over_floor", "x floor", 9, ".2f"),
    ("over_ours", "x ours", 9, ".2f"),
    ("images_per_s", "images/s", 13, ",.0f"),
    ("bytes_a_weight_over_plain", "B/weight", 10, ",.2f"),
    ("share", "share", 8, ".1%"),
    ("launches", "launches", 10, ",.1f"),
)


def table(name: str, found: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Lines of a table: the rows of a group, fastest first, with the columns of which any value is known."""
    columns = [c for c in COLUMNS if any(facts.get(c[0]) is not None for facts in found.values())]
    yield f"{name:<58}" + "".join(f"{title:>{width}}" for _, title, width, _ in columns)
    for what, facts in sorted(found.items(), key=lambda item: item[1].get("ms", 0.0)):
        cells = (f"{facts[k]:>{w}{form}}" if facts.get(k) is not None else " " * w for k, _, w, form in columns)
        yield f"  {what:<56}" + "".join(cells).rstrip()


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date, which identify a measurement."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip()

    facts: dict[str, Any] = {"device": f"cpu {platform.machine()}", "threads": torch.get_num_threads()}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        facts = {"device": known.name, "capability": f"{known.major}.{known.minor}", "cuda": torch.version.cuda}
        facts |= {"memory_gb": known.total_memory / 1e9, "multiprocessors": known.multi_processor_count}
        facts |= {"l2_mb": known.L2_cache_size / 1e6}
    commit = git("rev-parse", "--short", "HEAD")
    return facts | {
        "fastprune": fastprune.__version__,
        "commit": commit or "unknown",
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(),
        **{name: getattr(__import__(name), "__version__", None) for name in ("torch", "torchvision", "triton")},
        "date": time.strftime("%Y-%m-%d"),
    }
