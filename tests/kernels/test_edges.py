"""Every operation at awkward sizes and values, on fresh memory that is poisoned, and beyond 2^31 elements."""

import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    select,
    select_cpu,
    unpack_bits,
)
from fastprune.kernels.crop_reference import crop_flip_normalize_reference
from tests.kernels.test_targets import CASES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = [0, 1, 7, 63, 64, 65, 2000]
KEPT = {"all kept": 1.0, "all pruned": 0.0, "mixed": 0.6}
INF, NAN = float("inf"), float("nan")
# Denormal in float32 and so in bf16 (the smallest are 1.4e-45 and 9e-41), denormal in fp16 (the smallest is 6e-8), too
# small or too large for fp16, and its largest.
FINITE = [1e-45, 1e-40, -1e-42, -0.0, 6e-8, -5e-7, 3e-5, 1e-8, 0.0, 1e5, -65504.0, 1.5]
VALUES = [*FINITE, INF, NAN, -INF]
SHORT = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *SHORT]
BF16_NORMAL = torch.finfo(torch.bfloat16).smallest_normal

sizes = pytest.mark.parametrize("n", SIZES)
kept = pytest.mark.parametrize("kept", KEPT)


@pytest.fixture(autouse=True)
def quiet_interpreter():
    """numpy, in which the interpreter computes, warns of an overflow and of inf - inf: here they are meant."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def values(n: int, special: list[float], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every other element is one of the special values, in turn, the others are normally distributed; [n]."""
    result = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    count = len(result[::2])
    # `roll`: so that one element alone is not always the first of them.
    result[::2] = torch.tensor(special).roll(seed).repeat(count // len(special) + 1)[:count]
    if INTERPRETED and dtype == torch.bfloat16:
        result[result.abs() < BF16_NORMAL] = 0.0  # converted wrongly by the interpreter
    return result.to(dtype)


def mask_of(n: int, kept: str) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(5)) < KEPT[kept]


def bits(tensor: Tensor) -> Tensor:
    """The bits as integers, so that +0 and -0 differ; every NaN is one value."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(kind).masked_fill(tensor.isnan(), torch.iinfo(kind).max).long()


def assert_same_bits(got: Tensor, expected: Tensor, rounded: bool = False) -> None:
    """rounded: from float32 to this type. Triton's interpreter truncates to bf16, so one off, and errs on denormals."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    off = (bits(got) - bits(expected)).abs()
    if INTERPRETED and rounded and got.dtype == torch.bfloat16:
        off = (off - 1).masked_fill(expected.abs() < BF16_NORMAL, 0)
    assert not (off > 0).any(), (got[off > 0], expected[off > 0])


def layouts(n: int) -> list[Segment]:
    """n elements as a conv and a linear layer, or fewer where n is small; a gap before each, none at the end."""
    few: dict[int, list[tuple[int, ...]]] = {0: [(0,)], 1: [(1,)], 7: [(2, 3), (1,)]}
    shapes = few.get(n, [(n // 36, 4, 3, 3), (n % 36,)])
    result, offset, position = [], 2, 0
    for i, shape in enumerate(shapes):
        result.append(Segment(f"s{i}", shape, offset, position))
        offset, position = offset + result[-1].numel + 3, position + result[-1].numel
    return result


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fresh_memory_is_poisoned(dtype):
    for fresh in (torch.empty(5, dtype=dtype), torch.empty_like(torch.zeros(5, dtype=dtype))):
        assert fresh.isnan().all()
    for kind in (torch.uint8, torch.int32, torch.int64):
        for fresh in (torch.empty(5, dtype=kind), torch.empty_like(torch.zeros(5, dtype=kind))):
            assert (fresh == torch.iinfo(kind).max).all()
    assert torch.empty(5, dtype=torch.bool).all()
    assert torch.empty_like(torch.zeros(5, dtype=torch.bool)).all()
    assert (select_cpu.np.empty(5, np.uint32) == 2**32 - 1).all()
    assert select_cpu.np.empty_like(np.zeros(5, bool)).all()
    assert np.isnan(select_cpu.np.empty(5)).all()


@sizes
@kept
@pytest.mark.parametrize(
    ("source", "target"),
    [(a, b) for a in FLOATS for b in FLOATS if a == torch.float32 or a != b],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_cast(n, kept, source, target):
    weight, mask = values(n, VALUES, n, source), mask_of(n, kept)
    expected = reference.masked_cast(weight, mask, target)
    assert_same_bits(masked_cast(weight, mask, torch.empty(n, dtype=target)), expected, rounded=source != target)
    if source == target:
        assert_same_bits(masked_cast(weight, mask, weight), expected)


@sizes
@kept
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_weight_and_its_gradient(n, kept, dtype):
    weight, mask = values(n, VALUES, n).requires_grad_(), mask_of(n, kept)
    grad = values(n, VALUES, n + 1, dtype)
    out = masked_weight(weight, mask, dtype)
    assert_same_bits(out.detach(), reference.masked_cast(weight.detach(), mask, dtype), rounded=True)
    out.backward(grad)
    assert_same_bits(weight.grad, reference.masked_cast(grad, mask, torch.float32))


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of the float32 reference, and one ulp of the largest value."""
    error, allowed = ((t.double() - exact).abs().max() for t in (got, plain))
    largest = exact.abs().max().float()
    ulp = torch.nextafter(largest, torch.tensor(INF)) - largest
    assert error <= 2 * allowed + ulp.double()


@sizes
@kept
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("copy", [None, *SHORT], ids=str)
def test_sgd(n, kept, nesterov, copy):
    """Denormals beside each other, where the smallest step is an ulp; large values; and what is not finite."""
    small = [v for v in FINITE if abs(v) < 1e-38]
    hyper = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    mask = mask_of(n, kept)
    short = None if copy is None else torch.empty(n, dtype=copy)
    for special, scale in ((small, 1e-40), (FINITE, 1.0), (VALUES, 1.0)):
        weight, grad, buffer = (values(n, special, n + i) for i in range(3))
        for t in (weight, grad, buffer):
            t[1::2] *= scale
        exact = reference.masked_sgd(weight.double(), grad.double(), buffer.double(), mask, **hyper)
        plain = reference.masked_sgd(weight, grad, buffer, mask, **hyper)
        masked_sgd_(weight, grad, buffer, mask, short, **hyper)
        for got, plain_one, exact_one in zip((weight, buffer), plain, exact, strict=True):
            finite = plain_one.isfinite()
            assert_same_bits(got[~finite], plain_one[~finite])
            if finite.any():
                assert_as_exact(got[finite], plain_one[finite], exact_one[finite])
            assert not bits(got[~mask]).any()
        if short is not None:
            assert_same_bits(short, weight.to(copy), rounded=True)


@pytest.mark.parametrize("n", [n for n in SIZES if n])
@kept
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold(n, kept, dtype):
    weight, mask = values(n, VALUES, n, dtype), mask_of(n, kept)
    left = int(mask.sum())
    for k in {1, left // 2, left} - {0}:
        if k <= left:
            expected = reference.kth_smallest_magnitude(weight, mask, k).float()
            assert_same_bits(kth_smallest_magnitude(weight, mask, k), expected)
        elif not INTERPRETED:
            with pytest.raises(ValueError, match="keeps 0"):
                kth_smallest_magnitude(weight, mask, k)


@sizes
@kept
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prune(n, kept, dtype):
    score, mask = values(n, VALUES, n, dtype).abs(), mask_of(n, kept)
    left = int(mask.sum())
    for number in {0, min(1, left), left // 2, left}:
        new = keep_top(score, mask, number)
        assert torch.equal(new, reference.keep_top(score, mask, number))
        assert int(new.sum()) == left - number


@sizes
@kept
@pytest.mark.parametrize("ties", [False, True], ids=["few ties", "many ties"])
def test_prune_in_segments(n, kept, ties):
    """Padding scores NaN and is pruned; what is kept where is the same whatever the padding holds."""
    segments = layouts(n)
    size = segments[-1].span.stop
    score = values(size, [0.0, 1e-45, 1e-40, -0.0, INF, NAN], n).abs()
    if ties:
        score[1::2] = 1e-40
    mask = torch.zeros(size, dtype=torch.bool)
    for s in segments:
        mask[s.span] = mask_of(s.numel, kept)
    counts = segment_counts(mask, segments)
    inside = torch.zeros_like(mask)
    for s in segments:
        inside[s.span] = True
    assert torch.equal(segment_counts(mask | ~inside, segments), counts)  # what lies between is not counted
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int(mask[s.span].sum()) for s in segments]
    for part in (0.0, 0.3, 1.0):
        number, each = int(part * int(counts.sum())), [int(part * c) for c in counts.tolist()]
        new = keep_top(score, mask, number, segments)
        local = keep_top(score, mask, each, segments)
        assert torch.equal(new, reference.keep_top(score, mask, number, segments))
        assert torch.equal(local, reference.keep_top(score, mask, each, segments))
        assert int(new.sum()) == int(mask.sum()) - number
        assert int(local.sum()) == int(mask.sum()) - sum(each)


def test_segments_without_elements():
    segments = [Segment("a", (0,), 0, 0), Segment("b", (2, 0, 3, 3), 1, 0), Segment("c", (3,), 1, 0)]
    mask = torch.tensor([False, True, True, True])
    score = torch.tensor([NAN, 3.0, 1.0, 2.0])
    assert segment_counts(mask, segments).tolist() == [0, 0, 3]
    assert keep_top(score, mask, 2, segments).tolist() == [False, True, False, False]
    assert keep_top(score, mask, [0, 0, 1], segments).tolist() == [False, True, False, True]
    assert segment_counts(mask[:0], segments[:1]).tolist() == [0]
    assert keep_top(score[:0], mask[:0], [0], segments[:1]).tolist() == []


@sizes
@kept
def test_bits(n, kept):
    flags = mask_of(n, kept)
    packed = pack_bits(flags, block=64)
    assert torch.equal(packed, reference.pack_bits(flags))
    if n % 8:
        packed[-1] |= 255 << n % 8 & 255  # what no element has may be anything
    assert torch.equal(unpack_bits(packed, n, block=64), flags)


@pytest.mark.parametrize("n", [n for n in SIZES if n])
@pytest.mark.parametrize("tall", [True, False], ids=["column", "row"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_crop(n, tall, dtype):
    """One image of n pixels: whole, enlarged from a part and from one pixel, each also mirrored."""
    height, width = (n, 1) if tall else (1, n)
    pixels = np.random.default_rng(n).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    images, part = torch.from_numpy(pixels), n // 2 + 1
    box = [[0, 0, n, 1], [n - part, 0, part, 1], [n - 1, 0, 1, 1]]
    boxes = torch.tensor([b if tall else [b[1], b[0], b[3], b[2]] for b in box] * 2, dtype=torch.int32)
    index, flip = torch.tensor([0, 1, 1, 0, 0, 1]), torch.arange(6) < 3
    norm = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)
    out = torch.empty((6, 3, height, width), dtype=dtype, memory_format=torch.channels_last)
    crop_flip_normalize(images, index, boxes, flip, *norm, out)
    arguments = (images, index, boxes, flip, *norm, height, width)
    exact = crop_flip_normalize_reference(*arguments, torch.float64)
    plain = crop_flip_normalize_reference(*arguments)
    if dtype == torch.float32:
        assert_as_exact(out, plain, exact)
    else:
        # Twice the error that half an ulp of the type is, or a whole ulp where the interpreter truncates.
        assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps * (exact.abs() + 1e-2)).all()


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in memory that the system gives only where it is written to."""
    size = int(np.prod(shape)) * dtype.itemsize
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # older Pythons have no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", no_reserve)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size / 2**30:.1f} GiB of addresses: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def resident() -> int:
    """Bytes of memory that this process really has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is really used is read from /proc")


@linux
@pytest.mark.usefixtures("plain_memory")
def test_crop_from_images_beyond_2_to_31_bytes():
    side = 64
    number = 2**31 // (3 * side**2) + 3
    images = untouched(number, side, side, 3, dtype=torch.uint8)
    last = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    index, flip = torch.tensor([number - 1, 0, number - 1]), torch.tensor([False, False, True])
    boxes = torch.tensor([[0, 0, 64, 64], [0, 0, 64, 64], [5, 7, 40, 57]], dtype=torch.int32)
    out = torch.full((3, 3, side, side), NAN).to(memory_format=torch.channels_last)
    few = torch.stack([torch.zeros_like(last), last])
    expected = torch.empty_like(out)
    crop_flip_normalize(few, torch.tensor([1, 0, 1]), boxes, flip, (0.5,) * 3, (0.25,) * 3, expected)
    before = resident()
    images[-1] = last
    crop_flip_normalize(images, index, boxes, flip, (0.5,) * 3, (0.25,) * 3, out)
    assert resident() - before < 2**26
    assert torch.equal(out, expected)
    assert out[0].std() > 1


def far_segments() -> tuple[list[Segment], Tensor]:
    """A conv that begins before element 2^31 and ends after it, and a layer further on; the mask keeps two in three."""
    segments = [Segment("conv", (4, 5, 3, 3), 2**31 - 64, 0), Segment("linear", (9, 7), 2**31 + 192, 180)]
    mask = untouched(2**31 + 256, dtype=torch.bool)
    for s in segments:
        mask[s.span] = torch.arange(s.numel) % 3 > 0
    return segments, mask


@linux
@pytest.mark.usefixtures("plain_memory")
def test_counts_beyond_2_to_31_elements():
    before = resident()
    segments, mask = far_segments()
    assert segment_counts(mask, segments).tolist() == [120, 42]
    assert resident() - before < 2**26


@linux
@pytest.mark.usefixtures("plain_memory")
def test_prune_beyond_2_to_31_elements(monkeypatch):
    """Only the new mask is really there: 2 GiB."""
    # Little is gathered: no need for as many programs to search it as so many scores would have, slowly interpreted.
    monkeypatch.setattr(select, "_PROGRAMS", 2)
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) < 5 * 2**20:
        pytest.skip("less than 5 GiB of memory are free")
    segments, mask = far_segments()
    score = untouched(len(mask), dtype=torch.float32)
    near = [Segment(s.name, s.shape, s.offset - 2**31 + 64, s.position) for s in segments]
    for s in segments:
        score[s.span] = torch.rand(s.numel, generator=torch.Generator().manual_seed(0)).mul_(9).round_()
    score_near, mask_near = (t[2**31 - 64 :].clone() for t in (score, mask))
    new = keep_top(score, mask, [31, 5], segments)
    expected = reference.keep_top(score_near, mask_near, [31, 5], near)
    assert torch.equal(new[2**31 - 64 :], expected)
    assert segment_counts(new, segments).tolist() == [89, 37]


FLAT = ["masked_cast", "masked_sgd", "masked_sgd, rate on the device", "pack", "unpack", "crop"]


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is no source")
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # a notice of one Triton version; either value is right
def test_the_program_that_walks_over_elements_counts_in_64_bits(name, tmp_path, monkeypatch):
    """In 32 bits program x block wraps beyond 2^31 elements. Of crop it is the image's: pixels of one image are few."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, types, constants = CASES[name]
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ttir"]
    programs = re.findall(r"(%\w+) = tt\.get_program_id x : i32", text)
    assert programs
    for program in programs:
        uses = [line for line in text.splitlines() if re.search(rf"[ (,]{program}\b(?! =)", line.split("=", 1)[-1])]
        assert uses
        assert all(re.search(rf"arith\.extsi {program} : i32 to i64", line) for line in uses), uses
