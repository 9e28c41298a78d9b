"""Benchmark of sparse training on one core: convs by density beside torch's, and whole steps, measured and estimated.

    make bench ARGS=bench/bench_sparse.py

Prints minima of processor time, the ways in turns, in milliseconds and as ratios. The estimates are those of the rule
that chooses between dense and sparse (fastprune/sparse/cost.py): they should lie within some 20 % of what is measured,
and above all be on the right side of 1.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bench.step_cost import Stepper
from fastprune.kernels.lanes import address, blocks_of
from fastprune.pruning.masks import Mask
from fastprune.sparse.conv import Geometry, Plane, SparseConv
from fastprune.sparse.cost import estimate
from fastprune.sparse.engine import Sparse, masks
from fastprune.specs import Init, ModelSpec
from fastprune.training.models import initial_model

TURNS = 5
BATCH = 64
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.01)
CONVS = {
    "stem 7x7, 64 px": (3, 64, 64, 7, 2),
    "3x3, 64 channels, 16x16": (64, 64, 16, 3, 1),
    "3x3, 128 channels, 8x8": (128, 128, 8, 3, 1),
    "3x3, 256 channels, 4x4": (256, 256, 4, 3, 1),
    "3x3, 512 channels, 2x2": (512, 512, 2, 3, 1),
    "1x1, 256 to 64 channels, 16x16": (256, 64, 16, 1, 1),
}
"""(input channels, output channels, side of the input, of the kernel, stride)."""


def minima(ways: Mapping[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, float]:
    """Processor seconds of each, the least of some turns."""
    for way in ways.values():
        way()
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for name, way in ways.items():
            began = time.process_time()
            way()
            found[name] = min(found[name], time.process_time() - began)
    return found


def passes(inputs: int, outputs: int, side: int, kernel: int, stride: int, density: float) -> dict[str, Any]:
    """Forward, input gradient and weight gradient of one conv, by torch and on kept weights."""
    padding = kernel // 2
    g = Geometry.of((inputs, side, side), outputs, (kernel, kernel), (stride, stride), (padding, padding))
    keep = np.random.default_rng(0).random((outputs, kernel, kernel, inputs)) < density
    planes = Plane(inputs, side, side, g.border), Plane(*g.outputs), Plane(*g.outputs, g.gradient_border)
    conv = SparseConv(keep, g, *planes, dx := Plane(inputs, side, side))
    blocks = blocks_of(BATCH)
    x, y, dy, into = (torch.randn(p.shape(blocks)) for p in (*planes, dx))
    products = [conv.ahead, *conv.back]
    values = [torch.randn(p.lists.entries + 3) for p in products]
    gradients = torch.zeros(conv.ahead.lists.entries + 3)

    def backward() -> None:
        for p, v in zip(conv.back, values[1:], strict=True):
            p.multiply(address(dy), address(into), address(v), blocks, (0, p.lists.rows))

    ahead = conv.ahead
    rows = (0, ahead.lists.rows)
    last = {"memory_format": torch.channels_last}
    image = torch.randn(BATCH, inputs, side, side).contiguous(**last)
    weight = torch.randn(outputs, inputs, kernel, kernel).contiguous(**last)
    gradient = torch.randn(BATCH, *g.outputs).contiguous(**last)
    both: Any = (None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)

    def torch_backward(*wanted: bool) -> None:
        torch.ops.aten.convolution_backward(gradient, image, weight, *both, [*wanted, False])

    assert conv.weight_pass is not None
    correlate = conv.weight_pass.correlate
    return {
        "forward": (
            lambda: F.conv2d(image, weight, None, stride, padding),
            lambda: ahead.multiply(address(x), address(y), address(values[0]), blocks, rows),
        ),
        "input": (lambda: torch_backward(True, False), backward),
        "weight": (
            lambda: torch_backward(False, True),
            lambda: correlate(address(x), address(dy), address(gradients), blocks, rows),
        ),
    }


@pytest.mark.parametrize("name", CONVS)
def test_convs(name: str, benchmark: Any, capsys: Any) -> None:
    """Each pass of a conv at some densities, beside torch's dense one."""
    found: dict[float, dict[str, tuple[float, float]]] = {}

    def measured() -> None:
        for density in DENSITIES:
            found[density] = {}
            for what, (dense, sparse) in passes(*CONVS[name], density).items():
                times = minima({"dense": dense, "sparse": sparse})
                found[density][what] = times["dense"], times["sparse"]

    benchmark.group = "convs by density"
    benchmark.pedantic(measured, rounds=1)
    benchmark.extra_info.update(found={str(d): each for d, each in found.items()})
    with capsys.disabled():
        print(f"\n{name}, batch {BATCH}: torch ms, fastprune ms, torch / fastprune")
        for density, each in found.items():
            cells = "".join(f"   {what} {1e3 * a:6.2f} {1e3 * b:6.2f} {a / b:6.1f}x" for what, (a, b) in each.items())
            print(f"  density {density:<5}{cells}")


def built(network: str, width: int) -> nn.Module:
    """width: 64 for networks that have none of their own; a VGG has a head for small images."""
    if network.startswith("resnet"):
        return initial_model(Init(ModelSpec(network, 200, width=width), 0))
    model = torchvision.models.get_model(network, num_classes=200)
    if network.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        model.classifier = nn.Sequential(nn.Linear(2048, 512), nn.ReLU(True), nn.Dropout(), nn.Linear(512, 200))
    return model


NETWORKS = [
    ("resnet18", 64),
    ("resnet18", 32),
    ("resnet50", 64),
    ("vgg11_bn", 64),
    ("densenet121", 64),
    ("mobilenet_v2", 64),
]
"""The last three leave operations to torch."""


@pytest.mark.parametrize(("network", "width"), NETWORKS)
def test_steps(network: str, width: int, benchmark: Any, capsys: Any) -> None:
    """A training step, 64x64 images: plain, dense and sparse, with the estimates that the choice rests on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 200, (BATCH,), generator=generator)
    steppers = {way: Stepper(built(network, width), way, images, labels) for way in ("plain", "dense", "sparse")}
    rows = []

    def measured() -> None:
        for density in (0.64, 0.33, 0.1, 0.033, 0.01):
            mask = uniform(steppers["plain"].trainer.flat.segments, density)
            for stepper in steppers.values():
                stepper.start(mask)
            engine = steppers["sparse"].trainer._compute
            assert isinstance(engine, Sparse)
            guess = estimate(engine.program, masks(steppers["sparse"].trainer.flat), BATCH)
            rows.append((density, minima(steppers, 3), guess))

    benchmark.group = "training steps by density"
    benchmark.pedantic(measured, rounds=1)
    benchmark.extra_info.update(rows=rows)
    with capsys.disabled():
        print(f"\n{network}, width {width}, 64 px, batch {BATCH}, uniform masks, stem dense: ms a step (estimate)")
        for density, times, (sparse, dense) in rows:
            plain = times["plain"]
            print(
                f"  density {density:<6} plain {1e3 * plain:7.1f}   dense {1e3 * times['dense']:7.1f} ({dense:.0f})   "
                f"sparse {1e3 * times['sparse']:7.1f} ({sparse:.0f})   plain / sparse {plain / times['sparse']:.2f}x   "
                f"sparse / dense {times['sparse'] / times['dense']:.2f} ({sparse / dense:.2f})"
            )


def uniform(segments: Any, density: float) -> Mask:
    """Every layer at one density, but for the first, which stays dense."""
    generator = torch.Generator().manual_seed(0)
    first = segments[0].name
    return Mask.from_tensors(
        {s.name: torch.rand(s.shape, generator=generator) < (1 if s.name == first else density) for s in segments}
    )
