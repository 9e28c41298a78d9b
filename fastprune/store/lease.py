"""Who computes which node: a file that its holder creates exclusively and touches from a thread.

A lease saves work, it does not guard the store: of two processes that compute the same node the first to publish wins,
and both would publish the same. So nothing here needs file locks or an atomic exchange, which network disks lack.
"""

import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

SECONDS = 90.0
"""A lease that was not touched for so long is abandoned. Equal for all processes that share a store."""

_TOUCHES = 6
"""How often a lease is touched in that time: a disk that hangs for a moment costs no lease."""


@dataclass(frozen=True)
class Holder:
    """The process that has, or had, a lease. since: Unix time. token: tells two leases of one process apart."""

    host: str
    machine: str
    pid: int
    since: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def has_died(self) -> bool:
        """Whether it ran on this machine, and does no more. A process of another machine cannot be asked."""
        if not self.machine or self.machine != this_machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False


@cache
def this_machine() -> str:
    """Tells machines of one name apart, one machine from itself before a reboot, and containers that count their
    processes apart; "" where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def read_holder(path: Path) -> Holder | None:
    """Whose lease the file is; None where there is none, or its holder has created it just now."""
    try:
        found = json.loads(path.read_bytes())
        types = {"host": str, "machine": str, "pid": int, "since": float, "token": str}
        return Holder(**{name: of(found[name]) for name, of in types.items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Leases:
    """The leases that this process holds, by key: files in `folder`, touched by one thread. A context manager.

    seconds: after which an untouched lease is abandoned, by the clock of the process that looks at it.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._held: dict[str, str] = {}
        self._seen: dict[str, tuple[object, float]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, key: str) -> tuple[bool, Holder | None]:
        """(whether the lease is now ours, its holder; or, where it is ours, the one that died with it). Does not wait.

        OSError where the folder takes no files.
        """
        path, holder = self._folder / key, None
        mine = self._create(key)
        if not mine:
            holder = read_holder(path)
            if self._is_abandoned(key, holder) and self._remove(path, holder):
                mine = self._create(key)
        if mine:
            self._seen.pop(key, None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._touch_all, daemon=True)
                self._thread.start()
        return mine, holder

    def release(self, key: str) -> bool:
        """Gives a lease back; whether it was still ours."""
        token, path = self._held.pop(key, None), self._folder / key
        holder = read_holder(path)
        if token is None or holder is None or holder.token != token:
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Gives all back."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        for key in list(self._held):
            self.release(key)

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _create(self, key: str) -> bool:
        token = secrets.token_hex(8)
        holder = Holder(socket.gethostname(), this_machine(), os.getpid(), time.time(), token)
        path = self._folder / key
        try:
            file = path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(asdict(holder), file)
        except OSError:  # a full disk
            path.unlink(missing_ok=True)
            raise
        self._held[key] = token
        return True

    def _is_abandoned(self, key: str, holder: Holder | None) -> bool:
        """Its process has died, or it has been the same, whenever this process looked, for as long as a lease lasts."""
        if holder is not None and holder.has_died:
            return True
        try:
            with (self._folder / key).open("rb") as file:  # opening makes NFS ask the server
                look = holder, os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        before, since = self._seen.get(key, (None, 0.0))
        if look != before:
            self._seen[key] = look, time.monotonic()
            return False
        return time.monotonic() - since >= self._seconds

    def _remove(self, path: Path, holder: Holder | None) -> bool:
        """Takes an abandoned lease away; False where another process was quicker, and has it now."""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            os.rename(path, aside)  # of several processes one succeeds
            if read_holder(aside) != holder:
                os.rename(aside, path)
                return False
        except FileNotFoundError:
            return False
        aside.unlink(missing_ok=True)
        return True

    def _touch_all(self) -> None:
        while not self._closed.wait(self._seconds / _TOUCHES):
            for key, token in list(self._held.items()):
                path = self._folder / key
                holder = read_holder(path)
                if holder is not None and holder.token == token:
                    try:
                        os.utime(path)
                    except OSError:  # the disk hangs or is full: the next touch may succeed
                        continue
