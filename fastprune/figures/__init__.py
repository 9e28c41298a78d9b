"""The paper's figures: each module says which nodes it needs, which series it draws and what its caption claims."""

from importlib import import_module
from types import ModuleType

from fastprune.errors import InputError

FIGURES = ("A2",)


def load(name: str) -> ModuleType:
    """The module of a figure. InputError for an unknown one."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}")
    return import_module(f"fastprune.figures.{name.lower()}")
