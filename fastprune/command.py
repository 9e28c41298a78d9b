"""What the command lines share: one line for what is wrong, exit codes, signals, streams."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from fastprune.errors import InputError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Bad usage is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def printable(text: object) -> str:
    """On one line, without what would steer a terminal: names of files, stores and archives may be from elsewhere."""
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def run_command(name: str, work: Callable[[], int], then: str = "") -> int:
    """Calls `work` and returns its exit code; else 2 for InputError and OSError, which are one line on stderr, 0 where
    the reader of stdout has seen enough, 130 for SIGINT and SIGTERM, where a line says what the KeyboardInterrupt says
    about what comes then, or `then`.

    From a main thread SIGTERM, which schedulers send before they kill, interrupts from then on. What stdout's encoding
    lacks is printed as `?`.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush to at the exit
        return DONE
    except (InputError, OSError) as error:
        print(f"{name}: {printable(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print(": ".join(filter(None, [name, "interrupted", *map(printable, stop.args or [then])])), file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
