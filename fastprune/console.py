"""Output on the terminal: printable lines and progress bars."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def printable(text: object) -> str:
    """`text` on one line, with "?" in place of control characters."""
    # Names of files, stores and archives may come from other people, and escape sequences would steer the terminal.
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def progress_bar(what: str, total: int, unit: str, items: Iterable[Any] | None = None) -> "tqdm[Any]":
    """A progress bar on stderr, which disappears when it is closed. items: iterates over them, as tqdm does.

    unit: " nodes", or "B" for bytes, which are scaled to kB, MB, ...
    """
    from tqdm import tqdm

    # A short task shows no bar at all. A log file gets a line every ten seconds, a terminal three per second.
    seconds, scaled = (0.3 if sys.stderr.isatty() else 10.0), unit == "B"
    return tqdm(
        items,
        what,
        total,
        leave=False,
        file=sys.stderr,
        unit=unit,
        unit_scale=scaled,
        mininterval=seconds,
        delay=seconds,
    )
