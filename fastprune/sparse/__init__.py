"""Computing with what is left of a pruned network on a CPU.

`compile(model, example)` makes a CompiledModel for inference, `load(path)` reads one that was saved. Names are imported
on first use.
"""

# Importing the package must not import numba, which takes a second.

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastprune.sparse.inference import CompiledModel, compile, load

__all__ = ["CompiledModel", "compile", "load"]


# Hidden from type checkers, for which any name would exist: they read the imports above.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module 'fastprune.sparse' has no attribute {name!r}")
        return getattr(import_module("fastprune.sparse.inference"), name)


def __dir__() -> list[str]:
    return __all__
