"""Launches go to the current GPU: the operations make it the one that their tensors are on."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(operation: Callable[P, R]) -> Callable[P, R]:
    """`operation` with the device of its first argument, a tensor, as the current one."""

    @wraps(operation)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        if isinstance(first, torch.Tensor) and first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return operation(*args, **kwargs)
        return operation(*args, **kwargs)

    return wrapped
