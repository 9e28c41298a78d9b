"""Fresh memory holds garbage in kernel tests, so that an element that is read before it is written shows."""

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch

from fastprune.kernels import segments, select_cpu


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
    for module in (segments, select_cpu):
        monkeypatch.setattr(module, "np", PoisonedNumpy())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def plain_memory(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For buffers so large that filling them would not do."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
