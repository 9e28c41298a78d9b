"""What the command lines share: one line for what is wrong, exit codes, signals, streams."""

import argparse
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from fastprune.console import printable
from fastprune.errors import InputError

if TYPE_CHECKING:
    pass

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def checked(convert: Callable[[str], Any], holds: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """An argparse type: a finite value that holds, else "... is not WHAT"."""

    def read(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not (math.isfinite(value) and holds(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return read


class Parser(argparse.ArgumentParser):
    """Bad usage is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def run_command(name: str, work: Callable[[], int], then: str = "") -> int:
    """Calls `work` and returns its exit code; else 2 for InputError and OSError, which are one line on stderr, 0 where
    the reader of stdout has seen enough, 130 for SIGINT, SIGTERM and SIGHUP, where a line says what the
    KeyboardInterrupt says about what comes then, or `then`.

    From a main thread SIGTERM, which schedulers send before they kill, and SIGHUP, which a terminal sends that is
    closed, interrupt from then on. What stdout's encoding lacks is printed as `?`.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(signal.SIGHUP, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = work()
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


def _leave_stdout() -> None:
    """Nothing is flushed to it any more, at the exit neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
