"""`--figure-module`: import of a user's modules, which register figures and criteria."""

# Workers call this, too: a spawned process starts without what the parent has imported.

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from fastprune.errors import InputError


def load_modules(names: Sequence[str]) -> None:
    """Imports each module, once per process: a name on Python's path, or the path of a .py file.

    InputError for a module that does not exist or raises while it is imported.
    """
    for name in names:
        try:
            _load(name)
        except InputError:
            raise
        # Any exception: it is the user's code, whose first line is of more use than a traceback through ours.
        except Exception as error:
            raise InputError(f"--figure-module {name} cannot be imported ({type(error).__name__}: {error})") from error


def _load(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise InputError(f"--figure-module {name}: no such file")
    # The prefix keeps a user's mine.py or json.py from replacing a module of that name.
    known = f"fastprune_user_{path.stem}"
    if known in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[known] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:  # a module that was imported halfway must not count as imported
        del sys.modules[known]
        raise
