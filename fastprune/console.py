"""What the terminal gets: one printable line, a progress bar."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def printable(text: object) -> str:
    """On one line, without what would steer a terminal: names of files, stores and archives may be from elsewhere."""
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def progress_bar(what: str, total: int, unit: str, items: Iterable[Any] | None = None) -> "tqdm[Any]":
    """A bar on stderr, over the items if given, for what takes longer than a moment; it goes when it is closed.

    unit: " nodes", or "B" for bytes. Where stderr is no terminal, it shows every ten seconds.
    """
    from tqdm import tqdm

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
