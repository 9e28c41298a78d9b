"""Output on the terminal: printable lines, advice and progress bars."""

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def printable(text: object) -> str:
    """`text` on one line, with "?" in place of control characters."""
    # Names of files, stores and archives may come from other people, and escape sequences would steer the terminal.
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def duration(seconds: float) -> str:
    """Seconds as text, in s, min, h and min, or days; with at least two digits."""
    # The limits lie where rounding would give "100 s" or "100 min".
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 100 else f"{seconds / 86400:,.1f} days"


def version_of(package: str) -> str | None:
    """The installed version of a package, which is not imported, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bf16_advice(instead: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """A line that recommends `instead` where this machine's CPU is known to compute slower in bf16 than in fp32."""
    # With AVX512_BF16 and no AMX a step takes 0.54 of one in fp32 (EPYC), without either 1.12. A processor that lists
    # no "flags" is none of x86: unknown.
    try:
        flags = [line for line in cpuinfo.read_text(errors="replace").splitlines() if line.startswith("flags")]
    except OSError:
        return ""
    if not flags or {"amx_bf16", "avx512_bf16"} & set(flags[0].split()):
        return ""
    return f"On this CPU bf16 is slower than fp32 (no instructions for it), and it never computes sparsely: {instead}"


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
