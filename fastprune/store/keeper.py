"""Holds leases for another process, from a process of its own: however long a step of that one takes, and whatever it
locks, the heartbeat goes on; and when it dies, its leases are given back at once.

    python keeper.py FOLDER SECONDS     reads {"do": "acquire" | "release", "key": ..., "number": n} lines, answers
                                        each with one, {"to": n, ...}

A lease is a file <key>.<n>.lock that its holder creates exclusively and touches ever so often: filelock.SoftFileLease.
Of several, the highest n counts. Whoever has seen it untouched for SECONDS, by its own clock, takes over with n + 1.
That needs neither file locks nor an exchange of names, which network file systems lack, and without which filelock does
not break a lease there; elsewhere it follows a holder of the same machine that is gone at once. Beside it <key>.holder
says who has it, and in which boot of which machine, as machines may share a name: copies of one image do. Found by the
next holder, it tells of a takeover. Run by path, so it imports nothing of fastprune.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout


def boot() -> str:
    """Tells machines apart that have the same name, and a machine from itself before it was started again; "" where the
    system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Keeper:
    """The leases of the process `pid`, by key."""

    def __init__(self, folder: Path, seconds: float, pid: int) -> None:
        self.folder, self.seconds = folder, seconds
        self.me = {"host": socket.gethostname(), "pid": pid, "boot": boot()}
        self.leases: dict[str, tuple[int, SoftFileLease]] = {}
        self.seen: dict[str, tuple[tuple[int, bytes, int], float]] = {}

    def acquire(self, key: str) -> dict[str, Any]:
        """{"mine": bool, "holder": who has it, or had it and is gone}."""
        before = self._numbers(key)
        number = max(before, default=1)
        # filelock would look for the process of a namesake here, and not find it.
        lease = None if before and self._namesake(self._holder(key)) else self._acquired(key, number)
        if lease is None and self._untouched(key, number):
            number += 1
            lease = self._acquired(key, number)
        # A list of files may be old; creating one renews it. What is new in it is somebody's who was quicker.
        if lease is not None and (max(now := self._numbers(key), default=0) != number or now - before - {number}):
            lease.release()
            lease = None
        if lease is None:
            return {"mine": False, "holder": self._holder(key)}
        was = self._holder(key)
        for dead in self._numbers(key) - {number}:
            self._lock(key, dead).unlink(missing_ok=True)
        # Renamed over that of another user, which could not be written to.
        aside = self.folder / f".{key}.{os.getpid()}.{self.me['host']}"
        try:
            aside.write_text(json.dumps({**self.me, "since": time.time()}) + "\n")
            os.replace(aside, self._holder_file(key))
        except OSError:
            lease.release()
            raise
        finally:
            aside.unlink(missing_ok=True)
        self.seen.pop(key, None)
        self.leases[key] = number, lease
        return {"mine": True, "holder": was}

    def _acquired(self, key: str, number: int) -> SoftFileLease | None:
        lease = SoftFileLease(
            self._lock(key, number),
            lease_duration=self.seconds,
            heartbeat_interval=self.seconds / 6,
            thread_local=False,
        )
        try:
            lease.acquire(timeout=0)
        except Timeout:
            return None
        return lease

    def _namesake(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder["host"] == self.me["host"] and holder["boot"] != self.me["boot"]

    def _untouched(self, key: str, number: int) -> bool:
        """Whether the lock has been the same, whenever we looked, for as long as a lease lasts."""
        try:
            with self._lock(key, number).open("rb") as file:  # opening makes NFS ask the server
                look = number, file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        before, since = self.seen.get(key, (None, 0.0))
        if look != before:
            self.seen[key] = look, time.monotonic()
            return False
        return time.monotonic() - since >= self.seconds

    def _numbers(self, key: str) -> set[int]:
        names = (path.name.split(".") for path in self.folder.glob(f"{key}.*.lock"))
        return {int(parts[1]) for parts in names if len(parts) == 3 and parts[1].isdecimal()}

    def _lock(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}.lock"

    def release(self, key: str) -> dict[str, Any]:
        """{"lost": whether somebody had taken it over meanwhile}."""
        if key not in self.leases:  # held by another keeper of our parent, which was killed
            return {"lost": True}
        number, lease = self.leases.pop(key)
        lost = lease.compromise is not None or max(self._numbers(key), default=0) != number
        if not lost:
            self._holder_file(key).unlink(missing_ok=True)
        lease.release()
        return {"lost": lost}

    def abandon(self) -> None:
        """Gives all back, and leaves the notes of who had them."""
        for _, lease in self.leases.values():
            lease.release()

    def _holder_file(self, key: str) -> Path:
        return self.folder / f"{key}.holder"

    def _holder(self, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._holder_file(key).read_text())
            return {
                "host": str(found["host"]),
                "pid": int(found["pid"]),
                "since": float(found["since"]),
                "boot": str(found["boot"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None


def main(folder: str, seconds: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # it ends after the process that it serves, not before
        signal.signal(ignored, signal.SIG_IGN)
    parent, pending = os.getppid(), b""
    keeper = Keeper(Path(folder), float(seconds), parent)
    while os.getppid() == parent:  # a child of the parent may keep the pipe open after its death
        if not select.select([0], [], [], 1.0)[0]:
            continue
        if not (more := os.read(0, 1 << 16)):
            break
        *lines, pending = (pending + more).split(b"\n")
        for line in lines:
            asked = json.loads(line)
            try:
                answer = getattr(keeper, {"acquire": "acquire", "release": "release"}[asked["do"]])(asked["key"])
            except OSError as error:
                answer = {"errno": error.errno, "error": error.strerror or str(error), "file": error.filename}
            except (RuntimeError, ValueError) as error:
                answer = {"errno": None, "error": str(error), "file": None}
            sys.stdout.write(json.dumps({"to": asked["number"], **answer}) + "\n")
            sys.stdout.flush()
    keeper.abandon()


if __name__ == "__main__":
    main(*sys.argv[1:])
