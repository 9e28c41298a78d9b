"""Dispatch by device: Triton on a GPU, numba or torch on a CPU. An exception never selects another path.

Operations import `triton` and `tl` from here. Under TRITON_INTERPRET=1 the Triton code runs on CPU tensors, slowly: the
tests use this without a GPU. Triton reads the variable on import, so it must be set before this package is imported.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# macOS has no Triton. With TRITON_INTERPRET=1 a missing Triton is an ImportError below, and not a silent CPU path.
HAS_TRITON = INTERPRETED or find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
else:
    # Enough to define the kernels, as plain functions that cannot be launched: uses_triton never selects them here.
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: SimpleNamespace(value=value))

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on this tensor run Triton code. RuntimeError on a GPU without Triton."""
    if tensor.is_cuda and not HAS_TRITON:
        raise RuntimeError("operations on a GPU need Triton, which is not installed: pip install triton")
    return tensor.is_cuda or INTERPRETED


def on_its_device(operation: Callable[P, R]) -> Callable[P, R]:
    """Decorator: run `operation` with the GPU of its first argument, a tensor, as the current device."""

    @wraps(operation)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        # Triton launches on the current GPU, and not on that of the tensors.
        if isinstance(first, torch.Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return wrapped


def grid_and_warps(n: int, block: int, each: int) -> tuple[tuple[int], int]:
    """Grid of one program per block of n elements, and the number of warps that gives each thread `each` elements."""
    return (triton.cdiv(n, block),), min(max(block // (32 * each), 1), 16)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by numba to run without the interpreter's lock.

    The first call takes seconds, less with a cache on disk, which is used only if NUMBA_CACHE_DIR is set.
    """
    # Imported here: a process that never runs a CPU path does not wait for numba.
    import numba
    from numba.core import config

    folder = getattr(config, "CACHE_DIR", "")
    return numba.njit(function, nogil=True, cache=_usable(folder))


def _usable(folder: str) -> bool:
    # If numba cannot write to its cache folder it uses one beside the source, inside the package: better no cache.
    if folder:
        with suppress(OSError):
            os.makedirs(folder, exist_ok=True)
    return bool(folder) and os.access(folder, os.W_OK)


def check_tensor(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless the tensor is one-dimensional, contiguous, of one of `dtypes`, and as long as `like` on its
    device.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be one-dimensional and contiguous, got shape {tuple(tensor.shape)}")
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} ({tuple(tensor.shape)} on {tensor.device}) does not match {tuple(like.shape)} on {like.device}"
        )


def check_block(block: int) -> None:
    """ValueError unless `block`, the number of elements per program, is a power of two."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"block is {block}, expected a power of two")


@triton.jit
def arrived_last(counter, number):  # type: ignore[no-untyped-def]
    """Whether this program is the last of `number`. It then sees what they all have stored, and the counter is zero."""
    # The stores of all threads come before the atomic operation of one of them, which publishes them.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == number - 1
    tl.store(counter, 0, mask=last)
    return last
