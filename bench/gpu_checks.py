"""Is every operation right on this device? Against its meaning on the CPU: in float64 where it rounds, else to the bit.

A check takes the suite, raises where something is wrong, and may return a note. Inputs are fresh random numbers with
what is awkward strewn in; memory that an operation allocates or fills holds NaN, the largest integer or True before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.transforms.functional import convert_image_dtype, hflip, normalize

from bench.gpu_tools import (
    FLOATS,
    KEPT,
    NAN,
    NORM,
    NORMAL,
    SMALL,
    VALUES,
    Check,
    bits,
    mask_of,
    near,
    network,
    odd_layout,
    poisoned,
    require,
    same,
    sizes,
    values,
)
from fastprune.kernels import (
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
from fastprune.kernels.crop import crop_flip_normalize_reference
from fastprune.kernels.keep_top import keep_top_reference, kth_smallest_magnitude_reference
from fastprune.kernels.masked_cast import masked_cast_reference
from fastprune.kernels.masked_sgd import masked_sgd_reference
from fastprune.kernels.pack_bits import pack_bits_reference
from fastprune.loaders import augment

if TYPE_CHECKING:
    from bench.gpu_suite import Suite


@poisoned
def check_cast(s: Suite) -> None:
    for n, kept, source, target in product(sizes(s), KEPT, FLOATS, FLOATS):
        weight, mask = values(s, n, kind=source), mask_of(s, n, kept)
        expected = masked_cast_reference(weight, mask, target)
        there = weight.to(s.device)
        out = there if source == target else torch.empty(n, dtype=target, device=s.device)
        masked_cast(there, mask.to(s.device), out)
        same(s, out, expected, f"{n} {source} to {target}, {kept:.0%} kept", rounded=source != target)


def sgd(kind: torch.dtype, before: Sequence[Tensor], mask: Tensor | None, **hyper: Any) -> tuple[Tensor, Tensor]:
    """The meaning, computed in `kind`; before: weight, gradient, momentum."""
    weight, grad, momentum = (t.to(kind) for t in before)
    return masked_sgd_reference(weight, grad, momentum, mask, **hyper)


@poisoned
def check_sgd(s: Suite) -> None:
    """Normal numbers, denormals beside each other, and what is not finite; the rate a number, or on the device beside a
    scale of the gradient."""
    families, shorts = ((NORMAL, 1.0), (SMALL, 1e-40), (VALUES, 1.0)), (None, *FLOATS[1:])
    cases = product(sizes(s), (*KEPT, None), (False, True), shorts, families)
    for n, kept, nesterov, short, (special, scale) in cases:
        before = [values(s, n, special) for _ in range(3)]
        for t in before:
            t[1::2] *= scale
        mask = None if kept is None else mask_of(s, n, kept)
        hyper: dict[str, Any] = {"lr": 0.25, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
        # A number that float32 rounds would differ between the two precisions before anything is computed.
        hyper |= {name: float(torch.tensor(hyper[name])) for name in ("momentum", "weight_decay")}
        plain, exact = (sgd(kind, before, mask, **hyper) for kind in (torch.float32, torch.float64))
        weight, grad, momentum = (t.clone().to(s.device) for t in before)
        copy = None if short is None else torch.empty(n, dtype=short, device=s.device)
        if kept == 0.6:
            rate, factor, finite = (torch.tensor(value, device=s.device) for value in (0.25, 1024.0, 0.0))
            grad *= factor
            hyper |= {"lr": rate, "grad_scale": factor, "found_inf": finite}
        masked_sgd_(weight, grad, momentum, None if mask is None else mask.to(s.device), copy, **hyper)
        what = f"{n}, kept {kept}, nesterov {nesterov}, copy {short}, {special[0]}"
        for got, plain_one, exact_one in zip((weight.cpu(), momentum.cpu()), plain, exact, strict=True):
            known = plain_one.isfinite()
            same(s, got[~known], plain_one[~known], what)
            near(got[known], plain_one[known], exact_one[known], what)
            if mask is not None:
                require(not bits(got[~mask]).any(), f"{what}: pruned is not +0")
        if copy is not None and short is not None:
            same(s, copy, weight.cpu().to(short), f"{what}: copy", rounded=True)


@poisoned
def check_sgd_skips(s: Suite) -> None:
    """Where a gradient scaler found an inf, nothing changes."""
    n = sizes(s)[-1]
    weight, grad, momentum = (values(s, n).to(s.device) for _ in range(3))
    mask, copy = mask_of(s, n, 0.6).to(s.device), values(s, n).to(s.device, torch.bfloat16)
    before = [t.clone() for t in (weight, momentum, copy)]
    one = torch.ones((), device=s.device)
    masked_sgd_(weight, grad, momentum, mask, copy, lr=one, momentum=0.9, grad_scale=one, found_inf=one)
    for got, old in zip((weight, momentum, copy), before, strict=True):
        same(s, got, old, "a step that should be skipped")


@poisoned
def check_sgd_graph(s: Suite) -> None:
    """One captured step, replayed with another rate on the device each time, against steps that were not captured."""
    n = sizes(s)[-1]
    start = [s.randn(n) for _ in range(3)]
    mask, lr = mask_of(s, n, 0.6).to(s.device), torch.tensor(0.0, device=s.device)
    state, grad = [t.clone() for t in start], torch.empty(n, device=s.device)
    copy = torch.empty(n, dtype=torch.bfloat16, device=s.device)
    hyper: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2}

    def step(weight: Tensor, momentum: Tensor, rate: Tensor) -> None:
        grad.copy_(start[2])  # the step may leave anything there
        masked_sgd_(weight, grad, momentum, mask, copy, lr=rate, **hyper)

    replay = s.capture([lambda: step(state[0], state[1], lr)])
    for t, first in zip(state, start, strict=True):
        t.copy_(first)
    weight, momentum = start[0].clone(), start[1].clone()
    grad_there = start[2].cpu()
    exact = plain = (start[0].cpu(), start[1].cpu())
    for rate in (0.5, 0.125, 0.75):
        step(weight, momentum, torch.tensor(rate, device=s.device))
        lr.fill_(rate)
        replay()
        known = {**hyper, "lr": rate, "nesterov": False}
        exact = sgd(torch.float64, (exact[0], grad_there, exact[1]), mask.cpu(), **known)
        plain = sgd(torch.float32, (plain[0], grad_there, plain[1]), mask.cpu(), **known)
    for got, eager, plain_one, exact_one in zip(state, (weight, momentum), plain, exact, strict=False):
        same(s, got, eager, "replayed against eager")
        near(got, plain_one, exact_one, "three replays")
    same(s, copy, state[0].to(torch.bfloat16), "copy", rounded=True)


@poisoned
def check_threshold(s: Suite) -> None:
    for n, kept, kind in product(sizes(s)[1:], (1.0, 0.6, 0.01), FLOATS):
        skewed = torch.randn(n, generator=s.host).pow(5)
        for weight in (values(s, n, kind=kind), torch.full((n,), 2e-38).to(kind), skewed.to(kind)):
            mask = mask_of(s, n, kept)
            left = int(mask.sum())
            for k in {1, left // 5, left // 2, left} - {0}:
                if k <= left:
                    got = kth_smallest_magnitude(weight.to(s.device), mask.to(s.device), k)
                    expected = kth_smallest_magnitude_reference(weight, mask, k).float()
                    same(s, got, expected, f"{k} of {n} {kind}, {kept:.0%} kept")


def compare_prune(s: Suite, score: Tensor, mask: Tensor, n: Any, segments: Any, what: str) -> None:
    new = keep_top(score.to(s.device), mask.to(s.device), n, segments)
    same(s, new, keep_top_reference(score, mask, n, segments), what)


@poisoned
def check_keep_top(s: Suite) -> None:
    for n, kept, kind in product(sizes(s), KEPT, FLOATS):
        mask = mask_of(s, n, kept)
        left = int(mask.sum())
        ties = torch.rand(n, generator=s.host).mul(8).round()
        for score in (values(s, n, kind=kind).abs(), ties.to(kind), torch.full((n,), 2e-38, dtype=kind)):
            for number in {0, min(1, left), left // 5, left}:
                compare_prune(s, score, mask, number, None, f"{number} of {n} {kind}, {kept:.0%} kept")


@poisoned
def check_segments(s: Suite) -> None:
    """keep_top over all layers and in each, and segment_counts; what lies between layers scores NaN."""
    for n, kept, real in [*product(sizes(s), KEPT, (False,)), (0, 0.5, True)]:
        segments = network(s) if real else odd_layout(n)
        size = segments[-1].span.stop
        mask = torch.zeros(size, dtype=torch.bool)
        for part in segments:
            mask[part.span] = mask_of(s, part.numel, kept)
        counts = torch.stack([mask[part.span].sum() for part in segments])
        what = f"{len(segments)} layers of {size}, {kept:.0%} kept"
        same(s, segment_counts(mask.to(s.device), segments), counts, what)
        ties = torch.full((size,), NAN)
        for part in segments:
            ties[part.span] = torch.rand(part.numel, generator=s.host).mul_(6).round_()
        for score, share in product((values(s, size).abs(), ties), (0.2,) if real else (0.0, 0.3, 1.0)):
            each = [int(share * c) for c in counts.tolist()]
            compare_prune(s, score, mask, sum(each), segments, f"{what}: {share:.0%} of all")
            compare_prune(s, score, mask, each, segments, f"{what}: {share:.0%} of each")
    number = int(counts.sum()) // 5
    expected = kth_smallest_magnitude_reference(score, mask, number)
    same(s, kth_smallest_magnitude(score.to(s.device), mask.to(s.device), number), expected, "threshold of a network")


@poisoned
def check_bits(s: Suite) -> None:
    for n, kept in product(sizes(s), (*KEPT, 0.01)):
        flags = mask_of(s, n, kept)
        packed = pack_bits(flags.to(s.device))
        same(s, packed, pack_bits_reference(flags), f"pack {n}")
        if n % 8:
            packed[-1] |= 255 << n % 8 & 255  # what no element has may be anything
        same(s, unpack_bits(packed, n), flags, f"unpack {n}")


def crop_inputs(s: Suite, batch: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """images, index, boxes, flip on the CPU; the first boxes are the whole image, and one pixel in the last corner."""
    images = torch.randint(256, (7, h, w, 3), dtype=torch.uint8, generator=s.host)
    index = torch.randint(7, (batch,), generator=s.host)
    boxes, flip = augment.boxes(int(index.sum()), h, index.numpy() + torch.arange(batch).numpy(), h, w)
    boxes[:2], boxes[2] = [0, 0, h, w], [h - 1, w - 1, 1, 1]
    flip[:2] = [False, True]
    return images, index, torch.from_numpy(boxes), torch.from_numpy(flip)


@poisoned
def check_crop(s: Suite) -> None:
    sides = [(1, 1), (1, 7), (5, 2), (63, 65), (64, 64), (33, 128), (128, 128)]
    for (h, w), kind in product(sides[:5] if s.interpreted else sides, FLOATS):
        batch = 5 if s.small else 64
        images, index, boxes, flip = inputs = crop_inputs(s, batch, h, w)
        out = torch.empty((batch, 3, h, w), dtype=kind, device=s.device, memory_format=torch.channels_last)
        there = [t.to(s.device) for t in inputs]
        crop_flip_normalize(there[0], there[1], there[2], there[3], *NORM, out)
        exact = crop_flip_normalize_reference(images, index, boxes, flip, *NORM, h, w, torch.float64)
        plain = crop_flip_normalize_reference(images, index, boxes, flip, *NORM, h, w)
        what = f"{h}x{w} {kind}"
        if kind == torch.float32:
            near(out, plain, exact, what)
            planes = convert_image_dtype(images[index[:2]].permute(0, 3, 1, 2), torch.float32)
            planes[1] = hflip(planes[1])
            same(s, out[:2], normalize(planes, *NORM), f"{what}: whole images are torchvision's")
        else:  # half an ulp of the value, a whole one where the interpreter truncates, beside float32's error
            ulps = 1.0 if s.interpreted else 0.5
            single = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
            error = (out.cpu().double() - exact).abs()
            bound = ulps * torch.finfo(kind).eps * (exact.abs() + single) + single
            require((error <= bound).all(), f"{what}: error {(error - bound).max():.3e} above what is allowed")


@poisoned
def check_masked_weight(s: Suite) -> None:
    shapes = [(n,) for n in sizes(s)] + [(64, 3, 7, 7), (16, 8, 3, 3)]
    for shape, kept, kind in product(shapes, KEPT, FLOATS):
        n = torch.Size(shape).numel()
        weight, grad, mask = (
            values(s, n).view(shape),
            values(s, n, kind=kind).view(shape),
            mask_of(s, n, kept).view(shape),
        )
        form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        there = weight.to(s.device, memory_format=form).requires_grad_()
        out = masked_weight(there, mask.to(s.device, memory_format=form), kind)
        what = f"{shape} {kind}, {kept:.0%} kept"
        same(s, out.detach(), masked_cast_reference(weight, mask, kind), what, rounded=True)
        out.backward(grad.to(s.device))
        require(there.grad is not None, f"{what}: no gradient")
        same(s, there.grad, masked_cast_reference(grad, mask, torch.float32), f"{what}: gradient")  # type: ignore[arg-type]


CHECKS: dict[str, Check] = {
    "masked_cast": check_cast,
    "masked_sgd_": check_sgd,
    "masked_sgd_ skips a step": check_sgd_skips,
    "masked_sgd_ in a CUDA graph": check_sgd_graph,
    "kth_smallest_magnitude": check_threshold,
    "keep_top": check_keep_top,
    "keep_top and segment_counts of layers": check_segments,
    "pack_bits and unpack_bits": check_bits,
    "crop_flip_normalize": check_crop,
    "masked_weight and its gradient": check_masked_weight,
}
