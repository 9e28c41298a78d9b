"""Fresh memory holds garbage in kernel tests, so that an element that is read before it is written shows."""

import sys
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch

from tests.kernels.inputs import SIZES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`n`: an awkward number of elements; on a GPU also more than one program has."""
    if "n" in metafunc.fixturenames:
        large = [] if metafunc.config.getoption("--device") == "cpu" else [10_007, (1 << 20) + 3]
        metafunc.parametrize("n", SIZES + large)


class PoisonedNumpy:
    """numpy whose `empty` and `empty_like` are filled: NaN, the largest integer, True."""

    # What numba takes this for in the functions that it compiles.
    _numba_type_ = numba.types.Module(np)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return poison(np.empty(*args, **kwargs))

    def empty_like(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return poison(np.empty_like(*args, **kwargs))


def poison(array: np.ndarray) -> np.ndarray:
    """`array`, filled as torch fills a fresh tensor of its type."""
    kind = array.dtype.kind
    array.fill(True if kind == "b" else np.iinfo(array.dtype).max if kind in "iu" else np.nan)
    return array


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch and numpy fill what they allocate; the operations that torch then refuses are not used here."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    poisoned = PoisonedNumpy()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastprune.kernels.") and getattr(module, "np", None) is np:
            monkeypatch.setattr(module, "np", poisoned)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def plain_memory(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For buffers so large that filling them would not do."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """numpy, in which the interpreter computes, warns of an overflow and of inf - inf: here they are meant."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


@pytest.fixture
def cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the CPU path, in a process that interprets Triton, too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastprune.kernels.") and hasattr(module, "uses_triton"):
            monkeypatch.setattr(module, "uses_triton", lambda tensor: tensor.is_cuda)
