"""What the checks of the GPU suite share: awkward numbers, poisoned memory, comparisons."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprune.kernels import (
    Segment,
)
from fastprune.pruning.masks import layout, prunable
from fastprune.specs import ModelSpec
from fastprune.training.models import build

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
