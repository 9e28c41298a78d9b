"""What kernel tests share: awkward numbers, layouts, comparison to the bit, buffers of more than 2^31 elements.

Inputs are made on the CPU and moved to the device under test; what is expected is computed on the CPU.
"""

import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprune.kernels import Segment
from fastprune.kernels.dispatch import INTERPRETED

SIZES = [0, 1, 7, 63, 64, 65, 2000]
KEPT = {"all kept": 1.0, "all pruned": 0.0, "mixed": 0.6}
INF, NAN = float("inf"), float("nan")
# Denormal in float32 and so in bf16 (the smallest are 1.4e-45 and 9e-41).
SMALL = [1e-45, 1e-40, -1e-42, -0.0]
# Denormal in fp16 (the smallest is 6e-8), too small or too large for fp16, and its largest.
FINITE = [*SMALL, 6e-8, -5e-7, 3e-5, 1e-8, 0.0, 1e5, -65504.0, 1.5]
VALUES = [*FINITE, INF, NAN, -INF]
SHORT = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *SHORT]
BF16_NORMAL = torch.finfo(torch.bfloat16).smallest_normal
# Interpreted, a program costs milliseconds whatever its size: few programs where several are not the point.
WHOLE = {"block": 1 << 16} if INTERPRETED else {}

kept = pytest.mark.parametrize("kept", KEPT)


def values(n: int, special: list[float], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every other element is one of the special values, in turn, the others are normally distributed; [n]."""
    result = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    count = len(result[::2])
    # `roll`: so that one element alone is not always the first of them.
    result[::2] = torch.tensor(special).roll(seed).repeat(count // len(special) + 1)[:count]
    if INTERPRETED and dtype == torch.bfloat16:
        result[result.abs() < BF16_NORMAL] = 0.0  # converted wrongly by the interpreter
    return result.to(dtype)


def random_mask(n: int, density: float, seed: int = 5) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density


def mask_of(n: int, kept: str) -> Tensor:
    return random_mask(n, KEPT[kept])


def bits(tensor: Tensor) -> Tensor:
    """The bits as integers, so that +0 and -0 differ; every NaN is one value."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(kind).masked_fill(tensor.isnan(), torch.iinfo(kind).max).long()


def assert_same_bits(got: Tensor, expected: Tensor, rounded: bool = False) -> None:
    """rounded: from float32 to this type. Triton's interpreter truncates to bf16, so one off, and errs on denormals."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    got, expected = got.cpu().contiguous(), expected.cpu().contiguous()
    off = (bits(got) - bits(expected)).abs()
    if INTERPRETED and rounded and got.dtype == torch.bfloat16:
        off = (off - 1).masked_fill(expected.abs() < BF16_NORMAL, 0)
    assert not (off > 0).any(), (got[off > 0], expected[off > 0])


def equal_bits(got: Tensor, expected: Tensor) -> bool:
    """On the device, for what is too large for `assert_same_bits`; NaN equals only the same NaN."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    return got.dtype == expected.dtype and torch.equal(got.view(kind), expected.view(kind))


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice that of the float32 reference, and one ulp of the largest value."""
    error, allowed = ((t.cpu().double() - exact).abs().max() for t in (got, plain))
    largest = exact.abs().max().float()
    ulp = torch.nextafter(largest, torch.tensor(INF)) - largest
    assert error <= 2 * allowed + ulp.double()


def odd_layout(n: int) -> list[Segment]:
    """n elements as a conv and a linear layer, or fewer where n is small; a gap before each, none at the end."""
    few: dict[int, list[tuple[int, ...]]] = {0: [(0,)], 1: [(1,)], 7: [(2, 3), (1,)]}
    shapes = few.get(n, [(n // 36, 4, 3, 3), (n % 36,)])
    result, offset, position = [], 2, 0
    for i, shape in enumerate(shapes):
        result.append(Segment(f"s{i}", shape, offset, position))
        offset, position = offset + result[-1].numel + 3, position + result[-1].numel
    return result


def resnet18(width: int) -> list[Segment]:
    """The convs and the linear layer of a ResNet-18, each at a multiple of 64: as the engine lays them out."""
    shapes: list[tuple[int, ...]] = [(width, 3, 3, 3)]
    for stage in range(4):
        o = width * 2**stage
        shapes += [(o, max(o // 2, width), 3, 3), *[(o, o, 3, 3)] * 3] + [(o, o // 2, 1, 1)] * (stage > 0)
    result, offset, position = [], 0, 0
    for i, shape in enumerate([*shapes, (10, 8 * width)]):
        result.append(Segment(f"s{i}", shape, offset, position))
        offset, position = offset + -(-result[-1].numel // 64) * 64, position + result[-1].numel
    return result


def mask_over(segments: list[Segment], density: float) -> Tensor:
    """False outside the segments."""
    mask = torch.zeros(segments[-1].span.stop, dtype=torch.bool)
    for s in segments:
        mask[s.span] = random_mask(s.numel, density)
    return mask


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On a GPU the call as a CUDA graph, elsewhere the call; it runs before, too, so that kernels are compiled."""
    call()
    if device.type != "cuda":
        return call
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


# More than 2^31 elements

EDGE = 2**31  # positions from here on do not fit into 32 bits
FAR = EDGE + 4099
CHUNK = 1 << 26


def require_memory(gib: int, device: torch.device) -> None:
    """Skips unless so much memory of the device is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        known = Path("/proc/meminfo")
        fields = dict(line.split(":") for line in known.read_text().splitlines()) if known.exists() else {}
        free = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of memory on {device}, {free / 2**30:.1f} are free")


def require_gpu_memory(gib: int, device: torch.device) -> None:
    """Skips on a CPU, where so large a buffer takes minutes, and on a GPU with too little memory."""
    if device.type != "cuda":
        pytest.skip(f"needs {gib} GiB on a CUDA device: pytest --device cuda")
    require_memory(gib, device)


def far_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in memory that the system gives only where it is written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize
    for length in shape:
        size *= length
    no_reserve = 0x4000 if sys.platform == "linux" else 0  # older Pythons have no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", no_reserve)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size / 2**30:.1f} GiB of addresses: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@contextmanager
def little_memory(device: torch.device, limit: int = 2**26) -> Iterator[None]:
    """Fails where the body makes the system give this process more than `limit` bytes; on a GPU, not measured."""
    statm = Path("/proc/self/statm")
    measured = device.type == "cpu" and statm.exists()
    before = int(statm.read_text().split()[1]) if measured else 0
    yield
    if measured:
        assert (int(statm.read_text().split()[1]) - before) * mmap.PAGESIZE < limit


def chunks(n: int = FAR) -> Iterator[slice]:
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))


def drawn(seed: int, part: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Whole numbers from -8 to 8 (bool: True or False), of (seed, part) alone, so that they can be drawn again."""
    generator = torch.Generator(device).manual_seed(seed * FAR + part.start)
    low, high, kind = (0, 2, torch.uint8) if dtype == torch.bool else (-8, 9, dtype)
    shape = (part.stop - part.start,)
    return torch.randint(low, high, shape, generator=generator, device=device, dtype=kind).to(dtype)


def far_drawn(seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """FAR elements of `drawn`."""
    result = torch.empty(FAR, dtype=dtype, device=device)
    for part in chunks():
        result[part] = drawn(seed, part, dtype, device)
    return result


def far_segments() -> list[Segment]:
    """A conv that begins before element 2^31 and ends after it, and a linear layer further on."""
    return [Segment("conv", (4, 5, 3, 3), EDGE - 64, 0), Segment("linear", (9, 7), EDGE + 192, 180)]
