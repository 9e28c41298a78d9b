"""Benchmark of the Pruner as a user calls it: a global prune, and a step of an own loop under masks.

    make bench ARGS="bench/bench_pruner.py [--device cuda]"

Prints medians and ratios. Targets: a prune at least 25 times faster than torch.nn.utils.prune's, a step with MaskedSGD
at most 1.03 of the dense step.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune as torch_prune

from fastprune import MaskedSGD, Pruner

OURS, TORCHS = "pruner.prune(0.2)", "torch.nn.utils.prune.global_unstructured"
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
ROUNDS, STEPS = 5, 9


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def test_global_prune(device: torch.device, benchmark: Any, capsys: Any) -> None:
    """ResNet-50, from the model's weights to masks and zeros in the weights. Both prune the same weights."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50().to(device)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights = [m.weight.detach().clone() for m in convs]
    pruner = Pruner(model, kinds="conv", verbose=False)
    took: dict[str, list[float]] = {OURS: [], TORCHS: []}

    def fresh() -> None:
        pruner.set_masks({name: torch.ones_like(mask) for name, mask in pruner.masks.items()})
        with torch.no_grad():
            for m, weight in zip(convs, weights, strict=True):
                m.weight.copy_(weight)

    def theirs() -> None:
        other = torchvision.models.resnet50().to(device)
        layers = [(m, "weight") for m in other.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            for (m, _), weight in zip(layers, weights, strict=True):
                m.weight.copy_(weight)

        def call() -> None:
            torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.2)

        took[TORCHS].append(seconds(call, device))
        for (m, _), mask in zip(layers, masks, strict=True):
            assert torch.equal(m.get_buffer("weight_mask").bool(), mask)

    def setup() -> None:
        if took[OURS]:
            theirs()
        fresh()

    def ours() -> None:
        took[OURS].append(seconds(lambda: pruner.prune(0.2), device))

    fresh()
    pruner.prune(0.2)  # compiles
    masks = [mask.clone() for mask in pruner.masks.values()]
    benchmark.group = "global prune of ResNet-50, as a user calls it"
    benchmark.pedantic(ours, setup=setup, rounds=ROUNDS)
    theirs()
    found = {name: statistics.median(each) for name, each in took.items()}
    benchmark.extra_info.update(what=OURS, medians=found, ratio=found[TORCHS] / found[OURS])
    with capsys.disabled():
        print(f"\n{benchmark.group}: {found[TORCHS] / found[OURS]:.1f} x faster")
        for name, median in found.items():
            print(f"  {name:<44}{1e3 * median:9.1f} ms")


def test_own_loop(device: torch.device, benchmark: Any, capsys: Any) -> None:
    """A step of ResNet-18, batch 32 at 64 x 64, fp32: the optimisers under masks (80 % pruned) and without."""
    images = torch.randn(32, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(32, device=device)

    def loop(make: Callable[[nn.Module], torch.optim.Optimizer], hooks: bool = False) -> Callable[[], None]:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=200).to(device)
        if hooks:  # before the change of layout, with which it fails
            for m in model.modules():
                if isinstance(m, nn.Conv2d):
                    torch_prune.l1_unstructured(m, "weight", amount=0.8)
        optimizer = make(model.to(memory_format=torch.channels_last))

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    def pruned(model: nn.Module) -> Pruner:
        pruner = Pruner(model, kinds="conv", verbose=False)
        pruner.prune(0.8)
        return pruner

    def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        pruned(model).attach(optimizer)
        return optimizer

    ways = {
        "SGD, dense": loop(lambda m: torch.optim.SGD(m.parameters(), **SGD, fused=True)),
        "MaskedSGD": loop(lambda m: MaskedSGD(m.parameters(), pruned(m), **SGD)),
        "SGD, attached": loop(lambda m: attached(m, torch.optim.SGD(m.parameters(), **SGD, fused=True))),
        "SGD, torch.nn.utils.prune": loop(lambda m: torch.optim.SGD(m.parameters(), **SGD, fused=True), hooks=True),
        "AdamW, dense": loop(lambda m: torch.optim.AdamW(m.parameters(), fused=True)),
        "AdamW, attached": loop(lambda m: attached(m, torch.optim.AdamW(m.parameters(), fused=True))),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}

    # All take turns within one run, so that load on the machine hits all alike.
    def others() -> None:
        for name, step in ways.items():
            if name != "MaskedSGD":
                took[name].append(seconds(step, device))

    benchmark.group = "step of an own loop, ResNet-18, 32 x 64 px, fp32"
    benchmark.pedantic(
        lambda: took["MaskedSGD"].append(seconds(ways["MaskedSGD"], device)),
        setup=others,
        rounds=STEPS,
        warmup_rounds=2,
    )
    found = {name: statistics.median(each[2:]) for name, each in took.items()}
    benchmark.extra_info.update(what="MaskedSGD", medians=found)
    with capsys.disabled():
        print(f"\n{benchmark.group}, 80 % pruned")
        for name, median in found.items():
            base = "AdamW, dense" if name.startswith("AdamW") else "SGD, dense"
            print(f"  {name:<30}{1e3 * median:9.1f} ms   {median / found[base]:5.3f} of {base}")
