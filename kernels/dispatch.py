"""What runs where: the tensor's device decides, never an exception. Triton on a GPU, numba or torch on a CPU.

Triton is imported here, once; the operations take `triton` and `tl` from here. Under TRITON_INTERPRET=1 the Triton code
itself runs on CPU tensors, slowly: that is how it is tested without a GPU. Triton reads the variable when it is
imported, so it must be set before this package is.
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
# Not on macOS. Where it was asked to interpret, a missing Triton is an ImportError.
HAS_TRITON = INTERPRETED or find_spec("triton") is not None

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl
else:
    # As much as the definitions of kernels need. They stay plain functions, which cannot be launched.
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
    """`operation` with the device of its first argument, a tensor, as the current one."""

    @wraps(operation)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        # Triton launches on the current GPU, wherever the tensors are.
        if isinstance(first, torch.Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return wrapped


def grid_and_warps(n: int, block: int, each: int) -> tuple[tuple[int], int]:
    """Grid of one program a block of n elements, and the number of warps with which a thread has `each` of them."""
    return (triton.cdiv(n, block),), min(max(block // (32 * each), 1), 16)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by numba without the interpreter's lock: a few seconds on first use, less from the cache.

    The cache is kept on disk only where NUMBA_CACHE_DIR says.
    """
    # Not at the top: a process that never runs a CPU path need not wait for it.
    import numba
    from numba.core import config

    folder = getattr(config, "CACHE_DIR", "")
    return numba.njit(function, nogil=True, cache=_usable(folder))


def _usable(folder: str) -> bool:
    # Where numba cannot write to the folder that it was given it would use one beside the source: then keep nothing.
    if folder:
        with suppress(OSError):
            os.makedirs(folder, exist_ok=True)
    return bool(folder) and os.access(folder, os.W_OK)


def check_tensor(name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """ValueError unless the tensor is one-dimensional, contiguous, of one of the dtypes, and `like` another: as long,
    on its device.
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
    """ValueError unless `block`, elements a program, is a power of two."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"block is {block}, expected a power of two")
