"""`fastprune COMMAND`, or `python -m fastprune COMMAND`: the commands of scripts/ by name."""

import platform
import sys
from collections.abc import Sequence
from importlib import import_module

import fastprune
from fastprune.cli.command import BAD_INPUT, DONE, INTERRUPTED, close_to, run_command
from fastprune.console import version_of
from fastprune.errors import InputError

COMMANDS = {
    "reproduce": "reproduce figures of the paper, as in: fastprune reproduce --fig A2",
    "report": "write figures and their page again from a store",
    "train": "train a torchvision model, dense or under a mask",
    "prepare": "make a data set ready for training",
    "compile": "write a trained network to a file (kept weights alone, a state dict, ONNX) or a folder to share",
    "store": "list, verify, clean up, export and merge a store of runs",
    "doctor": "say what is here, what is missing for which use, and the command that mends it",
}

_HELP = """usage: fastprune COMMAND ...

{}

fastprune COMMAND --help lists the flags of a command; fastprune --version says what is installed.
python -m fastprune COMMAND is the same, and in a checkout so is python scripts/COMMAND.py."""

_LIBRARIES = ("torch", "torchvision", "triton", "numpy", "numba", "ffcv")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, or 2 if none or an unknown one is named."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        return run_command("fastprune", lambda: print(about()) or DONE)
    if not arguments or arguments[0] not in COMMANDS:
        return run_command("fastprune", lambda: _help(arguments))
    try:
        command = import_module(f"fastprune.cli.{arguments[0]}")
    except KeyboardInterrupt:  # before the command handles it
        return INTERRUPTED
    return int(command.main(arguments[1:]))


def about() -> str:
    """The versions of what matters, in a line, without importing any of it."""
    found = [f"fastprune {fastprune.__version__}", f"Python {platform.python_version()}"]
    for library in _LIBRARIES:
        known = version_of(library)
        found.append(f"no {library}" if known is None else f"{library} {known}")
    return ", ".join(found)


def _help(arguments: Sequence[str]) -> int:
    """Prints the commands. InputError if the first argument asks for anything else."""
    if arguments and arguments[0] not in ("-h", "--help"):
        near = close_to(arguments[0], COMMANDS)
        raise InputError(f"unknown command {arguments[0]!r}: choose one of {', '.join(COMMANDS)}{near}")
    lines = "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items())
    print(_HELP.format(lines), file=sys.stdout if arguments else sys.stderr)
    return DONE if arguments else BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
