"""How fast the kernels are: against the bytes that they must move, and against what a user would write.

Each operation runs on several independent input sets in turn, more than the cache holds. The floor is its bytes at the
rate of a large device-to-device copy, measured in the same run; that of the threshold is one `vector_norm(w, 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn
from torchvision.transforms import v2

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
from fastprune.kernels.pack_bits import pack_bits_reference, unpack_bits_reference
from fastprune.loaders import augment
from fastprune.pruning.masks import layout, prunable
from fastprune.specs import ModelSpec
from fastprune.training.models import build

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
NORM = ((0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816))
SINGLE = 16  # images that torchvision crops one by one
BF16 = torch.bfloat16
READ = "{} vector_norm(w, 1), one read"  # a row's name
Call = Callable[[], Any]


class Network:
    """The conv weights of a network in one flat buffer of n elements, as a list of tensors, and masks of them."""

    def __init__(self, s: Suite, name: str) -> None:
        self.s, self.name = s, name
        model = build(ModelSpec(name, 200, width=8) if s.small else ModelSpec(name, 200))
        self.segments: tuple[Segment, ...] = layout(prunable(model))
        self.n = self.segments[-1].span.stop

    def weight(self) -> Tensor:
        """float32 [n], normal, in each layer as large as an initialisation makes it."""
        weight = self.s.randn(self.n)
        for p in self.segments:
            weight[p.span] *= (2 / (p.shape[0] * math.prod(p.shape[2:]))) ** 0.5
        return weight

    def mask(self) -> Tensor:
        """bool [n], 80 % kept."""
        return torch.rand(self.n, device=self.s.device, generator=self.s.generator) < 0.8

    def layers(self, buffer: Tensor) -> list[Tensor]:
        """One tensor a layer, each its own memory."""
        return [p.view(buffer).contiguous() for p in self.segments]

    def sets(self, make: Callable[[], Call], bytes: float) -> list[Call]:
        return sets(self.s, make, bytes)


def sets(s: Suite, make: Callable[[], Call], bytes: float) -> list[Call]:
    """So many calls on memory of their own, `bytes` each, that together they exceed the cache several times."""
    return [make() for _ in range(max(2, min(32, math.ceil((1e6 if s.small else 256e6) / bytes))))]


def time_copy(s: Suite) -> None:
    n = 100_000 if s.small else 1 << 27

    def make() -> Call:
        a, b = s.randn(n), s.randn(n)
        return lambda: b.copy_(a)

    name = "copy, device to device"
    s.time(name, sets(s, make, 8 * n), graph=True, bytes=8 * n)
    s.copy_rate = s.timings[name]["gb_per_s"] if name in s.timings else math.nan


def time_cast(net: Network) -> None:
    def ours() -> Call:
        weight, mask, out = net.weight(), net.mask(), torch.empty(net.n, dtype=BF16, device=net.s.device)
        return lambda: masked_cast(weight, mask, out)

    def by_layer() -> Call:
        parts, masks = net.layers(net.weight()), net.layers(net.mask())
        return lambda: [(m * p).bfloat16() for m, p in zip(masks, parts, strict=True)]

    def foreach() -> Call:
        parts, masks = net.layers(net.weight()), net.layers(net.mask().float())
        outs = [torch.empty_like(p, dtype=BF16) for p in parts]
        return lambda: torch._foreach_copy_(outs, torch._foreach_mul(parts, masks))

    def module() -> Call:
        parts, masks = net.layers(net.weight()), net.layers(net.mask())
        return lambda: [masked_weight(p, m, BF16) for p, m in zip(parts, masks, strict=True)]

    name, size = f"{net.name} masked_cast to bf16", 7 * net.n
    net.s.time(name, net.sets(ours, size), graph=True, bytes=size)
    net.s.time(f"{net.name} (mask * weight).bfloat16() a layer", net.sets(by_layer, size), graph=True, ours=name)
    net.s.time(f"{net.name} the same by torch._foreach", net.sets(foreach, size), graph=True, ours=name)
    layered = f"{net.name} masked_weight to bf16 a layer"
    net.s.time(layered, net.sets(module, size), graph=True, bytes=size, ours=name)


def time_sgd(net: Network) -> None:
    def ours(masked: bool, copied: bool) -> Callable[[], Call]:
        def make() -> Call:
            weight, grad, momentum = net.weight(), net.weight(), net.weight()
            mask = net.mask() if masked else None
            copy = torch.empty(net.n, dtype=BF16, device=net.s.device) if copied else None
            return lambda: masked_sgd_(weight, grad, momentum, mask, copy, **SGD)

        return make

    def theirs(then_mask: bool, **how: bool) -> Callable[[], Call]:
        def make() -> Call:
            parts = [nn.Parameter(p) for p in net.layers(net.weight())]
            masks = net.layers(net.mask())
            for p, grad in zip(parts, net.layers(net.weight()), strict=True):
                p.grad = grad
            sgd = torch.optim.SGD(parts, **SGD, **how)

            @torch.no_grad()
            def step() -> None:
                sgd.step()
                for p, m in zip(parts, masks, strict=True) if then_mask else ():
                    p.mul_(m)

            return step

        return make

    name, n = f"{net.name} masked_sgd_ with mask and bf16 copy", net.n
    net.s.time(name, net.sets(ours(True, True), 23 * n), graph=True, bytes=23 * n)
    net.s.time(f"{net.name} masked_sgd_ with mask", net.sets(ours(True, False), 21 * n), graph=True, bytes=21 * n)
    net.s.time(f"{net.name} masked_sgd_ dense", net.sets(ours(False, False), 20 * n), graph=True, bytes=20 * n)
    for kind in ("fused", "foreach"):
        for what, masked in ((", then weight *= mask", True), (", dense", False)):
            calls = net.sets(theirs(masked, **{kind: True}), 20 * n)
            net.s.time(f"{net.name} torch.optim.SGD {kind}{what}", calls, graph=True, ours=name)


def time_threshold(net: Network) -> None:
    k = int(0.2 * 0.8 * net.n)
    weights, masks = [net.weight() for _ in range(3)], [net.mask() for _ in range(3)]

    def each(call: Callable[[Tensor], Any]) -> list[Call]:
        return [lambda w=w: call(w) for w in weights]  # type: ignore[misc]

    read = READ.format(net.name)
    net.s.time(read, each(lambda w: torch.linalg.vector_norm(w, 1)), graph=True, bytes=4 * net.n)
    name = f"{net.name} kth_smallest_magnitude"
    ours = [lambda w=w, m=m: kth_smallest_magnitude(w, m, k) for w, m in zip(weights, masks, strict=True)]
    net.s.time(name, ours, graph=True, bytes=5 * net.n, floor=read)
    for what, call in {
        "w.abs().kthvalue(k)": lambda w: w.abs().kthvalue(k),
        "w.abs().topk(k, largest=False)": lambda w: w.abs().topk(k, largest=False),
        "w.abs().sort()": lambda w: w.abs().sort(),
    }.items():  # by events: they take so long that launching them does not count
        net.s.time(f"{net.name} {what}", each(call), ours=name)


def time_prune(net: Network) -> None:
    """Operations that wait for the device: timed by events, launches and waiting included."""

    def ours() -> Call:
        score, mask = net.weight().abs(), net.mask()
        number = int(0.2 * mask.sum())
        return lambda: keep_top(score, mask, number, net.segments)

    def theirs() -> Call:
        parts = net.layers(net.weight())

        def prune() -> None:
            modules = [nn.Module() for _ in parts]
            for module, part in zip(modules, parts, strict=True):
                module.weight = nn.Parameter(part)
            named = [(module, "weight") for module in modules]
            torch_prune.global_unstructured(named, torch_prune.L1Unstructured, amount=int(0.16 * net.n))

        return prune

    name = f"{net.name} keep_top of all layers (waits)"
    net.s.time(name, net.sets(ours, 6 * net.n), bytes=6 * net.n)
    net.s.time(f"{net.name} torch.nn.utils.prune.global_unstructured", net.sets(theirs, 6 * net.n), ours=name)


def time_bits(net: Network) -> None:
    n, masks = net.n, [net.mask() for _ in range(max(2, math.ceil(256e6 / net.n)) if not net.s.small else 2)]
    packed = [pack_bits(m) for m in masks]

    def each(call: Callable[[Tensor], Any], inputs: Sequence[Tensor] = masks) -> list[Call]:
        return [lambda t=t: call(t) for t in inputs]  # type: ignore[misc]

    counts, pack, unpack = (f"{net.name} {name}" for name in ("segment_counts", "pack_bits", "unpack_bits"))
    net.s.time(counts, each(lambda m: segment_counts(m, net.segments)), graph=True, bytes=n)
    sums = each(lambda m: [m[p.span].sum() for p in net.segments])
    net.s.time(f"{net.name} mask.sum() a layer", sums, graph=True, ours=counts)
    net.s.time(pack, each(pack_bits), graph=True, bytes=9 * n / 8)
    net.s.time(f"{net.name} pack_bits in torch", each(pack_bits_reference), graph=True, ours=pack)
    net.s.time(unpack, each(lambda t: unpack_bits(t, n), packed), graph=True, bytes=9 * n / 8)
    theirs = each(lambda t: unpack_bits_reference(t, n), packed)
    net.s.time(f"{net.name} unpack_bits in torch", theirs, graph=True, ours=unpack)


class Crops:
    """Batches out of a data set of `number` images of side x side pixels on the device; bytes: of a batch's floor."""

    def __init__(self, s: Suite, side: int, number: int, batch: int) -> None:
        self.s, self.side, self.batch, self.bytes = s, side, batch, 0.0
        self.images = torch.randint(256, (number, side, side, 3), dtype=torch.uint8, device=s.device)
        self.chosen = []
        for epoch in range(2 if s.small else 16):
            index = augment.epoch_order(0, epoch, number)[:batch]
            boxes, flip = augment.boxes(0, epoch, index, side, side)
            self.chosen.append([torch.from_numpy(t).to(s.device) for t in (index, boxes, flip)])
            pixels = boxes[:, 2].astype(int) * boxes[:, 3]
            self.bytes += (3 * int(pixels.sum()) + 6 * batch * side**2) / (2 if s.small else 16)

    def ours(self, block: int | None = None) -> list[Call]:
        options: Any = {} if block is None else {"block": block}

        def call(index: Tensor, boxes: Tensor, flip: Tensor) -> Call:
            out = torch.empty((self.batch, 3, self.side, self.side), dtype=BF16, device=self.s.device)
            out = out.to(memory_format=torch.channels_last)
            return lambda: crop_flip_normalize(self.images, index, boxes, flip, *NORM, out, **options)

        return [call(*inputs) for inputs in self.chosen]

    def grid_sample(self) -> list[Call]:
        mean, std = (torch.tensor(t, device=self.s.device)[:, None, None] for t in NORM)

        def call(index: Tensor, boxes: Tensor, flip: Tensor) -> Call:
            top, left, tall, wide = (boxes.float() / self.side).unbind(1)
            theta = torch.zeros(len(index), 2, 3, device=self.s.device)
            theta[:, 0, 0], theta[:, 0, 2] = torch.where(flip, -wide, wide), 2 * left + wide - 1
            theta[:, 1, 1], theta[:, 1, 2] = tall, 2 * top + tall - 1

            def run() -> Tensor:
                planes = self.images[index].permute(0, 3, 1, 2).float() / 255
                grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
                out = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
                return ((out - mean) / std).to(BF16, memory_format=torch.channels_last)

            return run

        return [call(*inputs) for inputs in self.chosen]

    def one_by_one(self) -> Call:
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(self.side, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*NORM),
            ]
        )
        planes = [self.images[i].permute(2, 0, 1) for i in range(SINGLE)]
        return lambda: torch.stack([transform(p) for p in planes]).to(BF16, memory_format=torch.channels_last)


def time_crop(s: Suite, side: int) -> None:
    number, batch = (64, 16) if s.small else ({64: 100_000, 128: 30_000}[side], 512)
    crops = Crops(s, side, number, batch)
    name = f"crop_flip_normalize {batch} x {side} px"
    s.time(name, crops.ours(), graph=True, bytes=crops.bytes, images=batch)
    s.time(f"F.grid_sample, {side} px", crops.grid_sample(), graph=True, images=batch, ours=name)
    single = f"torchvision v2, {SINGLE} images one by one, scaled, {side} px"
    s.time(single, crops.one_by_one(), scale=batch / SINGLE, images=batch, ours=name)


def time_kernels(s: Suite) -> None:
    time_copy(s)
    for name in ("resnet50", "resnet18"):
        net = Network(s, name)
        print(f"  {name}: {net.n:,} weights")
        for group in (time_cast, time_sgd, time_threshold, time_prune, time_bits):
            group(net)
    for side in (64, 128):
        time_crop(s, side)


def sweep(s: Suite) -> None:
    """Block sizes: elements that one program handles."""
    net = Network(s, "resnet50")
    crops = Crops(s, 64, *((64, 16) if s.small else (100_000, 512)))
    k, n = int(0.16 * net.n), net.n

    def inputs(number: int, bytes: float, call: Callable[..., Any]) -> list[Call]:
        def make() -> Call:
            tensors, mask = [net.weight() for _ in range(number)], net.mask()
            copy = torch.empty(n, dtype=BF16, device=s.device)
            return lambda: call(*tensors, mask, copy)

        return net.sets(make, bytes)

    for block in (2**i for i in range(8, 14)):
        cast = inputs(1, 7 * n, lambda w, m, c, b=block: masked_cast(w, m, c, block=b))
        s.time(f"masked_cast, block {block}", cast, graph=True, bytes=7 * n)
        step = inputs(3, 23 * n, lambda w, g, v, m, c, b=block: masked_sgd_(w, g, v, m, c, **SGD, block=b))
        s.time(f"masked_sgd_, block {block}", step, graph=True, bytes=23 * n)
    for block in (2**i for i in range(10, 15)):
        kth = inputs(1, 5 * n, lambda w, m, c, b=block: kth_smallest_magnitude(w, m, k, block=b))
        s.time(f"kth_smallest_magnitude, block {block}", kth, graph=True, bytes=5 * n, floor=READ.format(net.name))
    for block in (2**i for i in range(7, 13)):
        s.time(f"crop 64 px, block {block}", crops.ours(block=block), graph=True, bytes=crops.bytes)


def targets(s: Suite) -> None:
    """Says of each target whether what was measured meets it."""
    limits: dict[str, tuple[str, str, float]] = {}
    for net in ("resnet50", "resnet18"):
        limits[f"{net}: masked_cast within 1.3 of the floor"] = (f"{net} masked_cast to bf16", "over_floor", 1.3)
        step = f"{net} masked_sgd_ with mask and bf16 copy"
        limits[f"{net}: masked_sgd_ within 1.3 of the floor"] = (step, "over_floor", 1.3)
        limits[f"{net}: threshold within 3 reads"] = (f"{net} kth_smallest_magnitude", "over_floor", 3.0)
        limits[f"{net}: threshold 20 x faster than kthvalue"] = (f"{net} w.abs().kthvalue(k)", "over_ours", -20.0)
    for side in (64, 128):
        row = next((name for name in s.timings if name.startswith("crop_flip") and name.endswith(f" {side} px")), "")
        limits[f"crop at {side} px within 2 of the floor"] = (row, "over_floor", 2.0)
    for what, (row, key, limit) in limits.items():
        measured = s.timings.get(row, {}).get(key)
        met = measured is not None and (measured >= -limit if limit < 0 else measured <= limit)
        verdict = (
            "not judged on a CPU" if not s.cuda else "not measured" if measured is None else "met" * met or "missed"
        )
        s.targets[what] = {"measured": measured, "verdict": verdict}
        print(f"  {what:<50} {verdict}" + (f": {measured:.2f}" if s.cuda and measured is not None else ""))
