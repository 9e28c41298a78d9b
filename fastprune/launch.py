"""Starts a script's command in an environment that has its packages. Runs on any Python 3: imports nothing of ours."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

_NEEDED = ("torch", "torchvision", "numpy", "matplotlib", "safetensors", "tqdm")


def launch(module: str, script: str) -> None:
    """Runs `main` of the module and exits with its code.

    Where packages are missing, the script goes on in the checkout's .venv and says so in a line; where there is none,
    one line names `make setup`, with exit code 2.
    """
    name, root = os.path.basename(script), Path(script).resolve().parents[1]
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing or sys.version_info < (3, 11):
        what = missing[0] if missing else "Python 3.11"
        python = root / ".venv" / "bin" / "python"
        if not python.exists() or Path(sys.prefix).resolve() == (root / ".venv").resolve():
            sys.exit(_say(name, f"{sys.executable} lacks {what}: run `make setup` in {root}"))
        _say(name, f"{sys.executable} lacks {what}: going on with {python}")
        os.execv(python, [str(python), script, *sys.argv[1:]])
    try:
        sys.exit(importlib.import_module(module).main())
    except KeyboardInterrupt:  # before main could say so
        sys.exit(130)


def _say(name: str, text: str) -> int:
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return 2
