"""numba for the CPU paths: compiled on first use, kept on disk only where NUMBA_CACHE_DIR says."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled without the interpreter's lock: a few seconds on first use, less from the cache."""
    import numba
    from numba.core import config

    folder = getattr(config, "CACHE_DIR", "")
    return numba.njit(function, nogil=True, cache=_usable(folder))


def _usable(folder: str) -> bool:
    """Where numba cannot write to the folder it was given it would use one beside the source: then keep nothing."""
    if folder:
        with suppress(OSError):
            os.makedirs(folder, exist_ok=True)
    return bool(folder) and os.access(folder, os.W_OK)
