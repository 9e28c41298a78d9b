"""Who computes which node: one holder a lease, among all processes and machines that share the store."""

import contextlib
import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.errors import InputError

SECONDS = 45.0
"""A holder that has not been heard of for so long is taken to be dead. Equal for all that share a store."""


class NoSpaceError(InputError):
    """The disk is full: nobody can take a lease."""


@dataclass(frozen=True)
class Holder:
    """A process that has, or had, a lease. since: Unix time. boot: see keeper.boot."""

    host: str
    pid: int
    since: float
    boot: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Leases:
    """The leases that this process holds, kept alive by a child of its own (see keeper.py). A context manager.

    Losing one to a false alarm (a machine cut off for longer than SECONDS) costs work, nothing else: whoever publishes
    first wins, and both would publish the same.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self._command = [sys.executable, "-P", str(Path(__file__).with_name("keeper.py")), str(folder), str(seconds)]
        self._process: subprocess.Popen[str] | None = None
        self._held: set[str] = set()
        self._asked = 0

    def acquire(self, key: str) -> tuple[bool, Holder | None]:
        """(whether the lease is now ours, who holds it; or, where it is ours, who died with it). Does not wait.

        InputError where the folder cannot be written, NoSpaceError where the disk is full.
        """
        answer = self._ask("acquire", key)
        if answer["mine"]:
            self._held.add(key)
        return answer["mine"], None if answer["holder"] is None else Holder(**answer["holder"])

    def release(self, key: str) -> bool:
        """Gives a lease back; whether it was still ours."""
        self.tend()
        if key not in self._held:
            return False
        lost = self._ask("release", key)["lost"]
        self._held.discard(key)
        return not lost

    def tend(self) -> None:
        """Where the process that keeps the leases was killed, starts another, which takes them again: until then nobody
        keeps them alive. What somebody else has taken meanwhile is lost."""
        if self._process is None or self._process.poll() is None:
            return
        self._drop()
        for key in sorted(self._held):
            answer = self._answer("acquire", key)
            if answer is None or not answer.get("mine"):
                self._held.discard(key)

    def close(self) -> None:
        """Gives all back."""
        if self._process is None:
            return
        for key in sorted(self._held):
            self.release(key)
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ask(self, do: str, key: str) -> Any:
        self.tend()
        answer = self._answer(do, key)
        if answer is None:  # killed just now
            self.tend()
            answer = self._answer(do, key)
        if answer is None:
            raise RuntimeError("the process that keeps leases ends as it starts")
        if "error" in answer:
            said = f"{answer['file'] or key}: no lease ({answer['error']})"
            if answer["errno"] in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(f"{said}; make room, with scripts/store.py gc or otherwise")
            raise InputError(f"{said}; choose another --store")
        return answer

    def _answer(self, do: str, key: str) -> dict[str, Any] | None:
        """None where the process that keeps the leases has ended."""
        if self._process is None:
            # A session of its own: an interrupt from the terminal is not for it.
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asked += 1
        answer: dict[str, Any] = {"to": None}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, "key": key, "number": self._asked}) + "\n")
            self._process.stdin.flush()
        while answer["to"] != self._asked:  # an interrupt may have left an answer unread
            line = self._process.stdout.readline()
            if not line.endswith("\n"):
                self._process.wait()
                return None
            answer = json.loads(line)
        return answer

    def _drop(self) -> None:
        """Forgets a process that has ended."""
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process is not None else ():
            with contextlib.suppress(BrokenPipeError):  # what it was asked last
                if pipe is not None:
                    pipe.close()
