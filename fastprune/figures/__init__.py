"""The paper's figures and ours: each module says which nodes it needs, which series it draws and what it claims.

PROTOCOL: its Settings. PRESETS: what it changes of the presets. UNUSED: settings that mean nothing to it. panels,
series, points, claims: functions of the settings.
"""

from importlib import import_module
from types import ModuleType

from fastprune.errors import InputError

PAPER = ("A1", "A2", "A3", "A4", "A5", "A6")
EXTRA = ("transplant", "variants", "structured")
FIGURES = (*PAPER, *EXTRA)


def load(name: str) -> ModuleType:
    """The module of a figure. InputError for an unknown one."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}, or all")
    return import_module(f"fastprune.figures.{name.lower()}")
