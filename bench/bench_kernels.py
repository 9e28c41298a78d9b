"""Each operation against its floor and against what a user would write, on the weights of whole networks.

    make bench

On the CPU, with one thread. `x` is the time over that of fastprune's operation in the same group.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

from fastprune.kernels import (
    Segment,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    pack_bits,
    segment_counts,
    unpack_bits,
)
from fastprune.specs import ModelSpec
from fastprune.training.flat import FlatParams
from fastprune.training.models import build

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
        "np.partition(np.abs(w), k)": (lambda: np.partition(np.abs(w.numpy()), k - 1)[k - 1], False, None),
        "w.abs().kthvalue(k)": (lambda: w.abs().kthvalue(k), False, None),
        "w.abs().sort()": (lambda: w.abs().sort(), False, None),
        "w.abs().topk(k, largest=False)": (lambda: w.abs().topk(k, largest=False), False, None),
    }


def modules_of(parts: list[Tensor]) -> list[nn.Module]:
    """A module for each weight, as torch's pruning wants them; the weights are shared."""
    modules = [nn.Module() for _ in parts]
    for module, part in zip(modules, parts, strict=True):
        module.weight = nn.Parameter(part)
    return modules


def prune_all(parts: list[Tensor], n: int) -> list[Tensor]:
    """torch's masks with the n smallest weights of all layers pruned."""
    modules = modules_of(parts)
    torch_prune.global_unstructured([(m, "weight") for m in modules], torch_prune.L1Unstructured, amount=n)
    return [m.weight_mask for m in modules]  # type: ignore[misc]


def prune_each(parts: list[Tensor], numbers: list[int]) -> list[Tensor]:
    """torch's masks with so many of each layer pruned."""
    modules = modules_of(parts)
    for module, number in zip(modules, numbers, strict=True):
        torch_prune.l1_unstructured(module, "weight", amount=number)
    return [m.weight_mask for m in modules]  # type: ignore[misc]


def prune_floor(scores: Tensor, mask: Tensor) -> tuple[Callable[[], Any], bool, int]:
    new = torch.empty_like(mask)
    return lambda: torch.gt(scores, 0.01, out=new), False, 5 * scores.numel()


def global_prune(network: str) -> Benchmarks:
    flat, segments, parts = weights(network)
    scores = flat.weight.abs()
    n = int(0.2 * flat.total)
    return {
        "keep_top": (lambda: keep_top(scores, flat.mask, n, segments), True, 6 * scores.numel()),
        "floor: scores > threshold, one read and write": prune_floor(scores, flat.mask),
        "torch.nn.utils.prune.global_unstructured": (lambda: prune_all(parts, n), False, None),
    }


def local_prune(network: str) -> Benchmarks:
    flat, segments, parts = weights(network)
    scores = flat.weight.abs()
    each = [int(0.2 * s.numel) for s in segments]
    return {
        "keep_top, so many of each": (lambda: keep_top(scores, flat.mask, each, segments), True, 6 * scores.numel()),
        "floor: scores > threshold, one read and write": prune_floor(scores, flat.mask),
        "torch.nn.utils.prune.l1_unstructured a layer": (lambda: prune_each(parts, each), False, None),
    }


def sgd_step(network: str) -> Benchmarks:
    flat, _, parts = weights(network)
    copies = [nn.Parameter(p.clone()) for p in parts]
    masks = [torch.ones_like(p, dtype=torch.bool) for p in parts]
    shorts = [torch.empty_like(p, dtype=torch.bfloat16) for p in parts]
    for p in copies:
        p.grad = torch.randn_like(p)
    foreach, single = torch.optim.SGD(copies, **SGD, foreach=True), torch.optim.SGD(copies, **SGD, foreach=False)
    fused = torch.optim.SGD(copies, **SGD, fused=True)
    weight, grad, momentum = flat.weight.clone(), flat.grad.clone(), flat.momentum.clone()
    short = torch.empty_like(weight, dtype=torch.bfloat16)

    def then_mask(step: Callable[[], Any]) -> None:
        step()
        with torch.no_grad():
            for p, mask in zip(copies, masks, strict=True):
                p.mul_(mask)

    def then_copy(step: Callable[[], Any]) -> None:
        step()
        with torch.no_grad():
            for p, low in zip(copies, shorts, strict=True):
                low.copy_(p)

    n = weight.numel()
    return {
        "masked_sgd_": (lambda: masked_sgd_(weight, grad, momentum, flat.mask, **SGD), True, 21 * n),
        "masked_sgd_ with a bf16 copy": (
            lambda: masked_sgd_(weight, grad, momentum, flat.mask, short, **SGD),
            False,
            23 * n,
        ),
        "floor: SGD fused, dense": (fused.step, False, 20 * n),
        "floor with a copy: SGD fused, dense, then copy to bf16": (lambda: then_copy(fused.step), False, 26 * n),
        "SGD foreach, then weight *= mask": (lambda: then_mask(foreach.step), False, None),
        "SGD for each tensor, then weight *= mask": (lambda: then_mask(single.step), False, None),
        "SGD fused, then weight *= mask": (lambda: then_mask(fused.step), False, None),
        "SGD fused, then weight *= mask, then copy to bf16": (
            lambda: then_copy(lambda: then_mask(fused.step)),
            False,
            None,
        ),
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


def counts(network: str) -> Benchmarks:
    flat, segments, _ = weights(network)
    n = flat.mask.numel()
    return {
        "segment_counts": (lambda: segment_counts(flat.mask, segments), True, n),
        "floor: np.count_nonzero(mask), one read": (lambda: np.count_nonzero(flat.mask.numpy()), False, n),
        "mask.sum() a layer": (lambda: [int(flat.mask[s.span].sum()) for s in segments], False, n),
    }


def pack(network: str) -> Benchmarks:
    mask = weights(network)[0].mask
    n = mask.numel()
    return {
        "pack_bits": (lambda: pack_bits(mask), True, n + n // 8),
        "floor: np.count_nonzero(mask), one read": (lambda: np.count_nonzero(mask.numpy()), False, n),
        "np.packbits(mask)": (lambda: np.packbits(mask.numpy()), False, n + n // 8),
    }


def unpack(network: str) -> Benchmarks:
    mask = weights(network)[0].mask
    packed, n, new = pack_bits(mask), mask.numel(), torch.empty_like(mask)
    return {
        "unpack_bits": (lambda: unpack_bits(packed, n), True, n + n // 8),
        "floor: new.fill_(True), one write": (lambda: new.fill_(True), False, n),
        "np.unpackbits(packed).astype(bool)": (
            lambda: np.unpackbits(packed.numpy(), count=n).astype(bool),
            False,
            n + n // 8,
        ),
    }


GROUPS = {
    "threshold": threshold,
    "global prune, scores to mask": global_prune,
    "local prune, scores to mask": local_prune,
    "SGD step": sgd_step,
    "cast": cast,
    "survivors a layer": counts,
    "mask to bits": pack,
    "bits to mask": unpack,
}


@lru_cache(maxsize=1)  # what is compared shares its buffers; the next group has its own
def group_of(network: str, group: str) -> Benchmarks:
    return GROUPS[group](network)


CASES = [(network, group, what) for network in NETWORKS for group in GROUPS for what in group_of(network, group)]


@pytest.mark.parametrize(("network", "group", "what"), CASES, ids=lambda v: str(v))
def test_speed(measure: Any, network: str, group: str, what: str) -> None:
    function, ours, size = group_of(network, group)[what]
    measure(f"{group}, {network}", what, function, ours=ours, bytes=size)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_the_same_weights_survive_as_in_torch(network: str, local: bool) -> None:
    """What is compared does the same work: as many go, and only elements tied with the threshold may differ."""
    flat, segments, parts = weights(network)
    scores, each = flat.weight.abs(), [int(0.2 * s.numel) for s in segments]
    ours = keep_top(scores, flat.mask, each if local else sum(each), segments)
    theirs = prune_each(parts, each) if local else prune_all(parts, sum(each))
    threshold = scores[flat.mask & ~ours].max()
    assert int(ours.sum()) == flat.total - sum(each) == sum(int(m.sum()) for m in theirs)
    for s, number, mask in zip(segments, each, theirs, strict=True):
        mine, score = s.view(ours), s.view(scores)
        differ = score[mine != mask.bool()]
        if local:
            threshold = score[~mine].max()
            assert int(mine.sum()) == s.numel - number
        assert (differ == threshold).all()
