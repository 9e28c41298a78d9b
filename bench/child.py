"""A process that sends messages to the one that started it, and may crash or hang: a new kernel can do both.

Standard library only: the parent outlives whatever happens to a child.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_PIPE = "FASTPRUNE_BENCH_PIPE"
"""Environment variable: the file descriptor on which a child sends."""

Message = dict[str, Any]


def attach() -> None:
    """In a child: it ends when its parent does."""
    if sys.platform == "linux":  # elsewhere a child of a killed parent ends after its task
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def send(**message: Any) -> None:
    """In a child: sends a message to the parent. Elsewhere, as in a test, nobody hears it."""
    if _PIPE not in os.environ:
        return
    line = (json.dumps(message) + "\n").encode()
    pipe = int(os.environ[_PIPE])
    while line:
        line = line[os.write(pipe, line) :]


def device_lost() -> bool:
    """In a child: whether a CUDA error has ended this process's use of the GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Child:
    """A running command whose messages are read. What it prints goes to a temporary file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """environment: in addition to that of this process. The child imports from the project's folder."""
        self._reader, writer = os.pipe()
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, _PIPE: str(writer), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
            process_group=0,  # so that its own children end with it
        )
        os.close(writer)
        self._received = b""

    def tell(self, **message: Any) -> None:
        """Writes a line to its standard input. A child that has died does not read it, which `messages` shows."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()

    def fileno(self) -> int:
        """Of the pipe: `select` waits for several children."""
        return self._reader

    def messages(self, timeout: float = 0.0) -> tuple[list[Message], int | None]:
        """(what it has sent, after waiting `timeout` seconds at most; its exit code once it has ended, else None)."""
        # Asked first: what a process has sent before its end is then all in the pipe.
        code = self._process.poll()
        found: list[Message] = []
        while select.select([self._reader], [], [], 0.0 if found or code is not None else timeout)[0]:
            read = os.read(self._reader, 1 << 16)
            if not read:
                code = self._process.wait()
                break
            *lines, self._received = (self._received + read).split(b"\n")
            found += map(json.loads, lines)
        return found, code

    def last_lines(self, number: int = 1) -> str:
        """The end of what it has printed, without blank lines."""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-number:])

    def end(self) -> None:
        """Kills it and its children, if it still runs, and frees what belongs to it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._reader)
        self._log.close()


def described(code: int) -> str:
    """An exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
