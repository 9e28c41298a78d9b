"""Is every operation right beyond 2^31 elements? On a CUDA device with room for them; see gpu_checks.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor

from bench.gpu_checks import crop_inputs, sgd
from bench.gpu_tools import (
    INF,
    NORM,
    Check,
    mask_of,
    poisoned,
    require,
    same,
)
from fastprune.kernels import (
    Segment,
    crop_flip_normalize,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    pack_bits,
    segment_counts,
    unpack_bits,
)
from fastprune.kernels.keep_top import keep_top_reference, kth_smallest_magnitude_reference
from fastprune.kernels.masked_cast import masked_cast_reference
from fastprune.kernels.pack_bits import pack_bits_reference

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

EDGE = 2**31  # positions from here on do not fit into 32 bits
FAR = EDGE + 4099  # elements
CHUNK = 1 << 26


def room(s: Suite, gib: int) -> None:
    """SkipTest unless so much device memory is free."""
    if not s.cuda:
        raise SkipTest(f"needs {gib} GiB on a CUDA device")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(s.device)
    if free < gib * 2**30:
        raise SkipTest(f"needs {gib} GiB of device memory, {free / 2**30:.1f} are free")


def chunks(n: int | None = None) -> Iterator[slice]:
    n = FAR if n is None else n
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))


def drawn(s: Suite, seed: int, part: slice, kind: torch.dtype) -> Tensor:
    """Whole numbers from -8 to 8 (bool: True or False), of (seed, part) alone, so that they can be drawn again."""
    generator = torch.Generator(s.device).manual_seed(seed * FAR + part.start)
    low, high, type_ = (0, 2, torch.uint8) if kind == torch.bool else (-8, 9, kind)
    shape = (part.stop - part.start,)
    return torch.randint(low, high, shape, generator=generator, device=s.device, dtype=type_).to(kind)


def far(s: Suite, seed: int, kind: torch.dtype) -> Tensor:
    """More than 2^31 elements of `drawn`."""
    result = torch.empty(FAR, dtype=kind, device=s.device)
    for part in chunks():
        result[part] = drawn(s, seed, part, kind)
    return result


@poisoned
def check_far_cast(s: Suite) -> None:
    room(s, 14)
    weight, mask = far(s, 1, torch.bfloat16), far(s, 2, torch.bool)
    out = masked_cast(weight, mask, torch.empty_like(weight))
    for part in chunks():
        same(s, out[part], masked_cast_reference(weight[part], mask[part], out.dtype), f"from {part.start}")


@poisoned
def check_far_sgd(s: Suite) -> None:
    """Numbers that float32 and bf16 hold exactly, so that the whole result is known to the bit."""
    room(s, 36)
    weight, grad, momentum = (far(s, seed, torch.float32) for seed in (1, 2, 3))
    mask, copy = far(s, 4, torch.bool), torch.empty(FAR, dtype=torch.bfloat16, device=s.device)
    masked_sgd_(weight, grad, momentum, mask, copy, lr=0.5, momentum=0.5)
    hyper: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, "nesterov": False}
    for part in chunks():
        before = [drawn(s, seed, part, torch.float32) for seed in (1, 2, 3)]
        expected = sgd(torch.float32, before, mask[part], **hyper)
        same(s, weight[part], expected[0], f"weight from {part.start}")
        same(s, momentum[part], expected[1], f"momentum from {part.start}")
        same(s, copy[part], expected[0].to(copy.dtype), f"copy from {part.start}")


def far_segments(few: bool) -> tuple[Segment, ...]:
    """A conv from before element 2^31 to after it, and a linear layer; unless `few`, one that fills what is before."""
    start = EDGE - 64
    huge = () if few else (Segment("huge", (start,), 0, 0),)
    position = 0 if few else start
    conv, linear = ((4, 5, 3, 3), start), ((9, 7), EDGE + 192)
    return (*huge, Segment("conv", *conv, position), Segment("linear", *linear, position + 180))


@poisoned
def check_far_counts(s: Suite) -> None:
    room(s, 5)
    mask, segments = far(s, 5, torch.bool), far_segments(few=False)
    expected = torch.stack([sum(mask[p.span][c].sum() for c in chunks(p.numel)) for p in segments])  # type: ignore[misc]
    same(s, segment_counts(mask, segments), expected, "counts")


@poisoned
def check_far_prune(s: Suite) -> None:
    """A few weights behind much that is not kept, in each layer, over all and the threshold; then with all kept."""
    room(s, 34)
    segments, start = far_segments(few=True), EDGE - 64
    score, mask = torch.empty(FAR, device=s.device), torch.zeros(FAR, dtype=torch.bool, device=s.device)
    near_by = [Segment(p.name, p.shape, p.offset - start, p.position) for p in segments]
    for p in segments:
        mask[p.span] = mask_of(s, p.numel, 0.7).to(s.device)
        score[p.span] = s.randn(p.numel).abs().mul_(4).round_()
    few_scores, few = score[start:].cpu(), mask[start:].cpu()
    for number in ([31, 5], 50):
        new = keep_top(score, mask, number, segments)
        same(s, new[start:], keep_top_reference(few_scores, few, number, near_by), f"{number}")
        require(not any(new[:start][part].any() for part in chunks(start)), f"{number}: something else is kept")
    got = kth_smallest_magnitude(score, mask, 40)
    same(s, got, kth_smallest_magnitude_reference(few_scores, few, 40), "threshold of few")
    mask.fill_(True)
    for part in chunks():
        score[part].uniform_(generator=s.generator)
    number = EDGE + 5
    new = keep_top(score, mask, number)
    require(sum(int(new[part].sum()) for part in chunks()) == FAR - number, "another number is kept than asked for")
    pruned = max(score[part][~new[part]].max().item() for part in chunks())
    kept = min(score[part].masked_fill(~new[part], INF).min().item() for part in chunks())
    require(pruned <= kept, f"{pruned} is pruned and {kept} kept")


@poisoned
def check_far_bits(s: Suite) -> None:
    room(s, 8)
    flags = far(s, 6, torch.bool)
    packed = pack_bits(flags)
    unpacked = unpack_bits(packed, FAR)
    for part in chunks():
        bytes_of = slice(part.start // 8, (part.stop + 7) // 8)
        same(s, packed[bytes_of], pack_bits_reference(flags[part]), f"pack from {part.start}")
        same(s, unpacked[part], flags[part], f"unpack from {part.start}")


@poisoned
def check_far_crop(s: Suite) -> None:
    room(s, 4)
    side = 64
    number = EDGE // (3 * side**2) + 9
    few, index, boxes, flip = (t.to(s.device) for t in crop_inputs(s, 32, side, side))
    images = torch.empty((number, side, side, 3), dtype=torch.uint8, device=s.device)
    images[-len(few) :] = few
    out, expected = (
        torch.empty((32, 3, side, side), device=s.device, memory_format=torch.channels_last) for _ in range(2)
    )
    crop_flip_normalize(few, index, boxes, flip, *NORM, expected)
    crop_flip_normalize(images, index + number - len(few), boxes, flip, *NORM, out)
    same(s, out, expected, "the last images")
    require(out.std() > 0.1, "all pixels are alike")


CHECKS: dict[str, Check] = {
    "masked_cast beyond 2^31": check_far_cast,
    "masked_sgd_ beyond 2^31": check_far_sgd,
    "segment_counts beyond 2^31": check_far_counts,
    "keep_top, threshold beyond 2^31": check_far_prune,
    "pack_bits, unpack_bits beyond 2^31": check_far_bits,
    "crop_flip_normalize beyond 2^31": check_far_crop,
}
