"""Each operation against its floor and against what a user would write, on the weights of whole networks.

    make bench

On the CPU, with one thread. `x` is the time over that of fastprune's operation in the same group.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

from fastprune.flat import FlatParams
from fastprune.kernels import (
    Segment,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    pack_bits,
    segment_counts,
)
from fastprune.models import build
from fastprune.specs import ModelSpec

NETWORKS = ("resnet18", "resnet50")
SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
Benchmarks = dict[str, tuple[Callable[[], Any], bool, int | None]]


@cache
def weights(network: str) -> tuple[FlatParams, tuple[Segment, ...], list[Tensor]]:
    """Flat parameters, their layout, and the same weights as a list of tensors."""
    torch.manual_seed(0)
    flat = FlatParams(build(ModelSpec(network, 200)))
    flat.grad.normal_()
    return flat, flat.segments, [s.view(flat.weight).contiguous() for s in flat.segments]


def threshold(network: str) -> Benchmarks:
    flat, _, _ = weights(network)
    w, mask = flat.weight, flat.mask
    k = int(0.2 * flat.total)
    return {
        "kth_smallest_magnitude": (lambda: kth_smallest_magnitude(w, mask, k), True, 5 * w.numel()),
        "floor: vector_norm(w, 1), one read": (lambda: torch.linalg.vector_norm(w, 1), False, 4 * w.numel()),
        "w.abs().kthvalue(k)": (lambda: w.abs().kthvalue(k), False, None),
        "w.abs().sort()": (lambda: w.abs().sort(), False, None),
        "w.abs().topk(k, largest=False)": (lambda: w.abs().topk(k, largest=False), False, None),
    }


def global_prune(network: str) -> Benchmarks:
    flat, segments, parts = weights(network)
    scores = flat.weight.abs()
    n = int(0.2 * flat.total)

    def unstructured() -> None:
        modules = [nn.Module() for _ in parts]
        for module, part in zip(modules, parts, strict=True):
            module.weight = nn.Parameter(part)
        named = [(module, "weight") for module in modules]
        torch_prune.global_unstructured(named, torch_prune.L1Unstructured, amount=n)

    return {
        "keep_top": (lambda: keep_top(scores, flat.mask, n, segments), True, None),
        "torch.nn.utils.prune.global_unstructured": (unstructured, False, None),
    }


def sgd_step(network: str) -> Benchmarks:
    flat, _, parts = weights(network)
    copies = [nn.Parameter(p.clone()) for p in parts]
    masks = [torch.ones_like(p, dtype=torch.bool) for p in parts]
    for p in copies:
        p.grad = torch.randn_like(p)
    foreach, single = torch.optim.SGD(copies, **SGD, foreach=True), torch.optim.SGD(copies, **SGD, foreach=False)
    fused = torch.optim.SGD(copies, **SGD, fused=True)

    def then_mask(step: Callable[[], Any]) -> None:
        step()
        with torch.no_grad():
            for p, mask in zip(copies, masks, strict=True):
                p.mul_(mask)

    n = flat.weight.numel()
    return {
        "masked_sgd_": (lambda: masked_sgd_(flat.weight, flat.grad, flat.momentum, flat.mask, **SGD), True, 21 * n),
        "SGD foreach, then weight *= mask": (lambda: then_mask(foreach.step), False, None),
        "SGD for each tensor, then weight *= mask": (lambda: then_mask(single.step), False, None),
        "SGD fused, then weight *= mask": (lambda: then_mask(fused.step), False, None),
        "SGD fused, dense": (fused.step, False, None),
    }


def cast(network: str) -> Benchmarks:
    flat, _, parts = weights(network)
    masks = [torch.ones_like(p) for p in parts]
    out = torch.empty(flat.weight.shape, dtype=torch.bfloat16)
    n = flat.weight.numel()
    return {
        "masked_cast to bf16": (lambda: masked_cast(flat.weight, flat.mask, out), True, 7 * n),
        "(mask * weight).bfloat16() a layer": (
            lambda: [(m * p).bfloat16() for m, p in zip(masks, parts, strict=True)],
            False,
            None,
        ),
        "floor: copy to bf16": (lambda: out.copy_(flat.weight), False, 6 * n),
    }


def bookkeeping(network: str) -> Benchmarks:
    flat, segments, _ = weights(network)
    n = flat.mask.numel()
    return {
        "segment_counts": (lambda: segment_counts(flat.mask, segments), True, n),
        "mask.sum() a layer": (lambda: [int(flat.mask[s.span].sum()) for s in segments], False, n),
        "pack_bits": (lambda: pack_bits(flat.mask), False, n),
    }


GROUPS = {
    "threshold": threshold,
    "global prune, scores to mask": global_prune,
    "SGD step": sgd_step,
    "cast": cast,
    "bookkeeping": bookkeeping,
}
CASES = [(network, group, what) for network in NETWORKS for group in GROUPS for what in GROUPS[group](network)]


@pytest.mark.parametrize(("network", "group", "what"), CASES, ids=lambda v: str(v))
def test_speed(measure: Any, network: str, group: str, what: str) -> None:
    function, ours, size = GROUPS[group](network)[what]
    measure(f"{group}, {network}", what, function, ours=ours, bytes=size)
