"""Leases: which process computes which node. A lease is a file that its holder creates exclusively and touches.

A lease saves work; it does not protect the store. Two processes that compute the same node publish the same result, and
the first to publish wins. So leases need neither file locks nor an atomic exchange of names, which network disks lack.
"""

import hashlib
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
"""A lease untouched for so long is abandoned. All processes that share a store must use the same value."""

_TOUCHES = 6
"""Touches of a lease in SECONDS: several, so that a disk that hangs for a moment costs no lease."""


@dataclass(frozen=True)
class Holder:
    """The process that holds, or held, a lease. since: Unix time. token: distinguishes two leases of one process."""

    host: str
    machine: str
    pid: int
    since: float
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def has_died(self) -> bool:
        """Whether the process ran on this machine and has ended. False for a process of another machine."""
        if not self.machine or self.machine != this_machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):  # another user's process lives; a pid from a damaged file is no proof of death
            pass
        return False


@cache
def this_machine() -> str:
    """Identifies the kernel's boot and the pid namespace in which a pid is valid; "" where /proc does not tell."""
    # A host name is not enough: cluster images share names, pids restart after a reboot, and containers of one machine
    # number their processes independently.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def read_holder(path: Path) -> Holder | None:
    """The holder of the lease in the file; None if there is no file, or its holder has not finished writing it."""
    try:
        found = json.loads(path.read_bytes())
        types = {"host": str, "machine": str, "pid": int, "since": float, "token": str}
        return Holder(**{name: of(found[name]) for name, of in types.items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Leases:
    """The leases that this process holds, by key: files in `folder`, touched by one thread. A context manager that
    releases them.

    seconds: a lease untouched for so long is abandoned, by the clock of the process that looks at it.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._held: dict[str, str] = {}
        self._seen: dict[str, tuple[object, float]] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, key: str) -> tuple[bool, Holder | None]:
        """(whether this process holds the lease now, the other holder if not, else the dead one that it replaced).

        Does not wait. OSError if the folder cannot be written.
        """
        path, holder = self._folder / key, None
        mine = self._create(key)
        if not mine:
            holder = read_holder(path)
            mine = self._is_abandoned(key, holder) and self._take_over(key, holder)
        if mine:
            self._seen.pop(key, None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._touch_all, daemon=True)
                self._thread.start()
        return mine, holder

    def release(self, key: str) -> bool:
        """Releases a lease; False if another process had taken it over."""
        token, path = self._held.pop(key, None), self._folder / key
        holder = read_holder(path)
        if token is None or holder is None or holder.token != token:
            return False  # the file is another process's lease: it stays
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Stops touching, and releases all leases."""
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
        except OSError:  # a full disk: an empty file would keep all others waiting until it is abandoned
            path.unlink(missing_ok=True)
            raise
        self._held[key] = token
        return True

    def _is_abandoned(self, key: str, holder: Holder | None) -> bool:
        """Whether the holder has died, or the file has not changed for `seconds` since this process first saw it so."""
        return (holder is not None and holder.has_died) or self._is_unchanged(key, holder)

    def _is_unchanged(self, name: str, holder: Holder | None = None) -> bool:
        """Whether a file of the folder has been the same for `seconds`; False if there is none."""
        try:
            with (self._folder / name).open("rb") as file:  # opening makes NFS ask the server
                look = holder, os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        # Both instants are of this process's monotonic clock: the modification time comes from the clock of the disk's
        # server, so it is only compared for equality.
        before, since = self._seen.get(name, (None, 0.0))
        if look != before:
            self._seen[name] = look, time.monotonic()
            return False
        return time.monotonic() - since >= self._seconds

    def _take_over(self, key: str, holder: Holder | None) -> bool:
        """Replaces an abandoned lease by one of this process; False if another process does so."""
        # Contenders look, then act: one that is late would remove the new lease of another. So each first creates a
        # file with the name of the abandoned lease, then looks again.
        token = "" if holder is None else holder.token
        turn = f".{key}.{hashlib.sha256(token.encode()).hexdigest()[:16]}"  # a token of a file may be any text
        try:
            (self._folder / turn).open("x").close()
        except FileExistsError:
            if self._is_unchanged(turn):  # its process has died
                (self._folder / turn).unlink(missing_ok=True)
            return False
        try:
            return self._remove(self._folder / key, holder) and self._create(key)
        finally:
            (self._folder / turn).unlink(missing_ok=True)

    def _remove(self, path: Path, holder: Holder | None) -> bool:
        """Removes an abandoned lease; False if it is another process's by now."""
        if read_holder(path) != holder:
            return False
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            os.rename(path, aside)
            # Between the look and the rename its holder, which was only slow, may have released it and another process
            # created its own.
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
                    except OSError:  # the disk hangs: the next touch may succeed
                        continue
