"""Is every operation right on this device? Against its meaning on the CPU: in float64 where it rounds, else to the bit.

A check takes the suite, raises where something is wrong, and may return a note. Inputs are fresh random numbers with
what is awkward strewn in; memory that an operation allocates or fills holds NaN, the largest integer or True before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import product
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor
from torchvision.transforms.functional import convert_image_dtype, hflip, normalize

from fastprune.flat import layout, prunable
from fastprune.kernels import (
    Segment,
    crop_flip_normalize,
    keep_top,
    kth_smallest_magnitude,
    masked_cast,
    masked_sgd_,
    masked_weight,
    pack_bits,
    reference,
    segment_counts,
    unpack_bits,
)
from fastprune.kernels.crop_reference import crop_flip_normalize_reference
from fastprune.loaders import augment
from fastprune.models import build
from fastprune.specs import ModelSpec

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

SIZES = (0, 1, 63, 2000, 10_007, (1 << 20) + 3)
KEPT = (1.0, 0.0, 0.6)
INF, NAN = float("inf"), float("nan")
# Denormal in float32 and bf16, denormal in fp16, too small or too large for fp16, and its largest.
SMALL = [1e-45, 1e-40, -1e-42, -0.0]
FINITE = [*SMALL, 6e-8, -5e-7, 3e-5, 1e-8, 0.0, 1e5, -65504.0, 1.5]
VALUES = [*FINITE, INF, NAN, -INF]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NORMAL = [1.0, -0.5, 0.0]
BF16_NORMAL = torch.finfo(torch.bfloat16).smallest_normal
NORM = ((0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816))
EDGE = 2**31  # positions from here on do not fit into 32 bits
FAR = EDGE + 4099  # elements
CHUNK = 1 << 26

Check = Callable[["Suite"], "str | None"]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what it allocates with NaN, the largest integer or True."""
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operations of torch that have no deterministic form
            require(torch.empty(1).isnan() and torch.empty(1, dtype=torch.bool), "fresh memory is not poisoned")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


def poisoned(check: Check) -> Check:
    @wraps(check)
    def wrapped(s: Suite) -> str | None:
        with poisoned_memory():
            return check(s)

    return wrapped


def require(ok: object, message: str) -> None:
    if not ok:
        raise AssertionError(message)


def bits(tensor: Tensor) -> Tensor:
    """Its bits as integers, so that +0 and -0 differ; every NaN is one value."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(kind).masked_fill(tensor.isnan(), torch.iinfo(kind).max)


def same(s: Suite, got: Tensor, expected: Tensor, what: str, rounded: bool = False) -> None:
    """To the bit, on the device of `expected`. rounded: to bf16, which the interpreter truncates: one off, and wrong
    for denormals."""
    require((got.dtype, got.shape) == (expected.dtype, expected.shape), f"{what}: {got.dtype} {tuple(got.shape)}")
    got, known = bits(got.to(expected.device).contiguous()), bits(expected.contiguous())
    if torch.equal(got, known):
        return
    off = (got.long() - known.long()).abs()
    if s.interpreted and rounded and expected.dtype == torch.bfloat16:
        off = (off - 1).masked_fill(expected.abs() < BF16_NORMAL, 0)
    wrong = (off > 0).flatten().nonzero().flatten()
    require(not len(wrong), f"{what}: {len(wrong)} of {got.numel()} differ, first {wrong[:3].tolist()}")


def near(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Error against float64 at most twice that of the plain float32 computation, and one ulp of the largest value."""
    if exact.numel():
        error, allowed = ((t.cpu().double() - exact).abs().max().item() for t in (got, plain))
        largest = exact.abs().max().float()
        bound = 2 * allowed + (torch.nextafter(largest, torch.tensor(INF)) - largest).item()
        require(error <= bound, f"{what}: error {error:.3e} against float64, allowed {bound:.3e}")


def sizes(s: Suite) -> tuple[int, ...]:
    return SIZES[:4] if s.interpreted else SIZES[:5] if s.small else SIZES


def values(s: Suite, n: int, special: Sequence[float] = VALUES, kind: torch.dtype = torch.float32) -> Tensor:
    """[n] on the CPU, normal; every other element is one of the special values."""
    result = torch.randn(n, generator=s.host)
    some = torch.randint(len(special), result[::2].shape, generator=s.host)
    result[::2] = torch.tensor(special)[some]
    if s.interpreted and kind == torch.bfloat16:
        result[result.abs() < BF16_NORMAL] = 0.0  # the interpreter converts them wrongly
    return result.to(kind)


def mask_of(s: Suite, n: int, kept: float) -> Tensor:
    return torch.rand(n, generator=s.host) < kept


def network(s: Suite) -> tuple[Segment, ...]:
    """The real layout: every conv of ResNet-50, of a narrow ResNet-18 where that is too much."""
    spec = ModelSpec("resnet18", 10, width=4 if s.interpreted else 16) if s.small else ModelSpec("resnet50", 200)
    return layout(prunable(build(spec)))


def odd_layout(n: int) -> tuple[Segment, ...]:
    """About n elements as a conv and a linear layer, at positions that nothing divides."""
    shapes = [(n // 36, 4, 3, 3), (n % 36,)]
    return Segment("conv", shapes[0], 2, 0), Segment("linear", shapes[1], 5 + n // 36 * 36, n // 36 * 36)


@poisoned
def check_cast(s: Suite) -> None:
    for n, kept, source, target in product(sizes(s), KEPT, FLOATS, FLOATS):
        weight, mask = values(s, n, kind=source), mask_of(s, n, kept)
        expected = reference.masked_cast(weight, mask, target)
        there = weight.to(s.device)
        out = there if source == target else torch.empty(n, dtype=target, device=s.device)
        masked_cast(there, mask.to(s.device), out)
        same(s, out, expected, f"{n} {source} to {target}, {kept:.0%} kept", rounded=source != target)


def sgd(kind: torch.dtype, before: Sequence[Tensor], mask: Tensor | None, **hyper: Any) -> tuple[Tensor, Tensor]:
    """The meaning, computed in `kind`; before: weight, gradient, momentum."""
    weight, grad, momentum = (t.to(kind) for t in before)
    return reference.masked_sgd(weight, grad, momentum, mask, **hyper)


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
                    expected = reference.kth_smallest_magnitude(weight, mask, k).float()
                    same(s, got, expected, f"{k} of {n} {kind}, {kept:.0%} kept")


def compare_prune(s: Suite, score: Tensor, mask: Tensor, n: Any, segments: Any, what: str) -> None:
    new = keep_top(score.to(s.device), mask.to(s.device), n, segments)
    same(s, new, reference.keep_top(score, mask, n, segments), what)


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
    expected = reference.kth_smallest_magnitude(score, mask, number)
    same(s, kth_smallest_magnitude(score.to(s.device), mask.to(s.device), number), expected, "threshold of a network")


@poisoned
def check_bits(s: Suite) -> None:
    for n, kept in product(sizes(s), (*KEPT, 0.01)):
        flags = mask_of(s, n, kept)
        packed = pack_bits(flags.to(s.device))
        same(s, packed, reference.pack_bits(flags), f"pack {n}")
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
        same(s, out.detach(), reference.masked_cast(weight, mask, kind), what, rounded=True)
        out.backward(grad.to(s.device))
        require(there.grad is not None, f"{what}: no gradient")
        same(s, there.grad, reference.masked_cast(grad, mask, torch.float32), f"{what}: gradient")  # type: ignore[arg-type]


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
        same(s, out[part], reference.masked_cast(weight[part], mask[part], out.dtype), f"from {part.start}")


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
        same(s, new[start:], reference.keep_top(few_scores, few, number, near_by), f"{number}")
        require(not any(new[:start][part].any() for part in chunks(start)), f"{number}: something else is kept")
    got = kth_smallest_magnitude(score, mask, 40)
    same(s, got, reference.kth_smallest_magnitude(few_scores, few, 40), "threshold of few")
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
        same(s, packed[bytes_of], reference.pack_bits(flags[part]), f"pack from {part.start}")
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
    "masked_cast beyond 2^31": check_far_cast,
    "masked_sgd_ beyond 2^31": check_far_sgd,
    "segment_counts beyond 2^31": check_far_counts,
    "keep_top, threshold beyond 2^31": check_far_prune,
    "pack_bits, unpack_bits beyond 2^31": check_far_bits,
    "crop_flip_normalize beyond 2^31": check_far_crop,
}
