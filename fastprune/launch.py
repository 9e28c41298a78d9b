"""Starts the command of a script, in the checkout's .venv if packages are missing."""

# Must run on any Python 3 without packages, so it imports only the standard library and uses no recent syntax.

import importlib
import importlib.util
import os
import sys
from pathlib import Path

_NEEDED = ("torch", "torchvision", "numpy", "matplotlib", "safetensors", "tqdm")


def launch(module: str, script: str) -> None:
    """Runs `main` of the module and exits with its exit code.

    If packages are missing, restarts the script in the checkout's .venv and says so in one line. Without a .venv, exits
    with code 2 and one line that names `make setup`.
    """
    name, root = os.path.basename(script), Path(script).resolve().parents[1]
    # find_spec does not import: torch alone would take seconds, here and again in the command.
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing or sys.version_info < (3, 11):
        what = missing[0] if missing else "Python 3.11"
        python = root / ".venv" / "bin" / "python"
        # In the .venv already: restarting there would never end.
        if not python.exists() or Path(sys.prefix).resolve() == (root / ".venv").resolve():
            sys.exit(_say(name, f"{sys.executable} lacks {what}: run `make setup` in {root}"))
        _say(name, f"{sys.executable} lacks {what}: continuing with {python}")
        os.execv(python, [str(python), script, *sys.argv[1:]])
    try:
        sys.exit(importlib.import_module(module).main())
    except KeyboardInterrupt:  # while the module is imported, before main handles it
        sys.exit(130)


def _say(name: str, text: str) -> int:
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return 2
