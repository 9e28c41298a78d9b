"""What all commands share: exit codes, one-line errors, signals, output streams."""

import argparse
import contextlib
import difflib
import io
import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from fastprune.console import printable
from fastprune.errors import InputError
from fastprune.specs import GpuOptions, forced_options

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

COMPUTE_HELP = (
    "how a CPU trains: as torch does (plain), with small convs as GEMMs (dense), on kept weights alone (sparse, fp32 "
    "only), or by the cheaper of the last two (auto, the default); they differ by rounding"
)

GPU_OPTIONS_HELP = (
    "kernels of our own in a step on a GPU: auto (default: each is used where it is measured to be faster), on or off "
    f"for all, or a list such as fused_norm=on,fused_loss=off of {', '.join(asdict(GpuOptions()))}"
)


def gpu_options(text: str) -> str:
    """An argparse type: a text that forced_options takes."""
    try:
        forced_options(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def checked(convert: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """An argparse type: a finite number for which `holds` is true, else the error "VALUE is not WHAT"."""

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return read


def expanded(text: str) -> str:
    """An argparse type: text in which a leading ~ or ~USER is a home folder.

    A shell leaves it as it is in `--out=~/x` and in quotes.
    """
    return os.path.expanduser(text)


def to_path(text: str) -> Path:
    """An argparse type: a path, `expanded`."""
    return Path(expanded(text))


def close_to(word: str, known: Iterable[str]) -> str:
    """ ": did you mean X?" for the one of `known` that is most like `word`, "" where none is."""
    found = difflib.get_close_matches(word, known, 1, 0.68)
    return f": did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError for bad usage, and names a flag that is like an unknown one."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    # argparse exits by itself with several lines of usage; every error of ours is one line from one place.

    def error(self, message: str) -> NoReturn:
        # First, since argparse would complain of a flag that is missing where it is misspelt.
        known = self._flags()
        for word in itertools.takewhile(lambda word: word != "--", self._given):
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                raise InputError(f"unrecognized arguments: {flag}{close_to(flag, known)} (see --help)")
        raise InputError(f"{message} (see --help)")

    def _flags(self) -> set[str]:
        """The flags of this parser and of its subcommands."""
        flags = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags |= {flag for parser in action.choices.values() for flag in parser._option_string_actions}
        return flags


def add_figure_module(parser: argparse.ArgumentParser) -> None:
    """Adds --figure-module: a list of the user's modules, for study.plugins.load_modules."""
    parser.add_argument(
        "--figure-module",
        type=expanded,
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module or .py file that registers figures or criteria of your own (may be repeated)",
    )


def run_command(name: str, work: Callable[[], int], then: str = "") -> int:
    """Calls `work` and returns its exit code.

    Other exit codes: 2 for InputError and OSError, reported in one line on stderr; 130 for SIGINT, SIGTERM and SIGHUP,
    with the argument of the KeyboardInterrupt as explanation, else `then`; 0 for a closed stdout, as of `... | head`.
    An interrupt that arrives while Python runs a finalizer, and ignores exceptions, is raised again after it.
    Installs handlers for SIGTERM and SIGHUP if called from the main thread. Characters that the encoding of stdout
    lacks are printed as `?`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        with _interrupts():
            code = work()
        # Here, so that a full disk or a closed pipe is caught below and not at the interpreter's exit.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _leave_stdout()
        return DONE
    except (InputError, OSError) as error:
        about: object = error
        if isinstance(error, OSError) and error.strerror:
            about = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{name}: {printable(about)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _leave_stdout()
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(": ".join(filter(None, [name, "interrupted", *map(printable, stop.args or [then])])), file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP interrupts too, and raises those again that Python ignores, as it does any exception in
    a finalizer or a weakref's callback."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread
        yield
        return
    # Schedulers send SIGTERM before they kill, and a terminal sends SIGHUP when it is closed: time for a checkpoint.
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under nohup it stays ignored
        signal.signal(signal.SIGHUP, _interrupt)
    # Imports and the garbage collector run finalizers all the time, and a run that misses its Ctrl-C goes on for hours.
    again: list[threading.Timer] = []

    def ignored(what: Any, /) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            hook(what)
            return
        # Later, as here it would be ignored again. A signal, as it also ends a wait that another thread cannot end.
        again.append(threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGTERM]))
        again[-1].start()

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for timer in again:
            timer.cancel()


def _leave_stdout() -> None:
    """Redirects stdout to /dev/null, so that the flush at the interpreter's exit cannot fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
