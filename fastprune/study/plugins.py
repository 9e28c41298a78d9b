"""Modules of the user's own that register figures and criteria: `--figure-module`, imported by workers, too."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fastprune.errors import InputError


def load_modules(names: Sequence[str]) -> None:
    """Imports each, once a process: a name that Python finds, or the path of a .py file.

    InputError, one line, for a module that is not there or does not import.
    """
    for name in names:
        try:
            _load(name)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--figure-module {name} does not import ({type(error).__name__}: {error})") from error


def _load(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"--figure-module {name}: there is no such file")
    known = f"fastprune_user_{path.stem}"
    if known in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[known] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[known]
        raise
