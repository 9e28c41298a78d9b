"""Holds leases for another process, from a process of its own: however long a step of that one takes, and whatever it
locks, the heartbeat goes on; and when it dies, its leases are given back at once.

    python keeper.py FOLDER SECONDS     reads {"do": "acquire" | "release", "key": ..., "number": n} lines, answers
                                        each with one, {"to": n, ...}

A lease is a file that its holder touches; whoever has seen it untouched for SECONDS, by its own clock, takes it over,
and at once if the holder was a process of the same machine that is gone (filelock.SoftFileLease; it needs no locks of
the file system, so it works over NFS). Beside it `<key>.holder` says who that is; found by the next holder, it tells of
a takeover. Run by path, so it imports nothing of fastprune.
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


class Keeper:
    """The leases of the process `pid`, by key."""

    def __init__(self, folder: Path, seconds: float, pid: int) -> None:
        self.folder, self.seconds = folder, seconds
        self.me = {"host": socket.gethostname(), "pid": pid}
        self.leases: dict[str, SoftFileLease] = {}

    def acquire(self, key: str) -> dict[str, Any]:
        """{"mine": bool, "holder": who has it, or had it and is gone}."""
        # Kept while it is another's: it remembers since when the file has not been touched.
        lease = self.leases.setdefault(
            key,
            SoftFileLease(
                self.folder / f"{key}.lock",
                lease_duration=self.seconds,
                heartbeat_interval=self.seconds / 6,
                thread_local=False,
            ),
        )
        try:
            lease.acquire(timeout=0)
        except Timeout:
            return {"mine": False, "holder": self._holder(key)}
        was = self._holder(key)
        self._holder_file(key).write_text(json.dumps({**self.me, "since": time.time()}) + "\n")
        return {"mine": True, "holder": was}

    def release(self, key: str) -> dict[str, Any]:
        """{"lost": whether somebody had taken it over meanwhile}."""
        lease = self.leases.pop(key)
        lost = lease.compromise is not None or not lease.is_locked
        if not lost:
            self._holder_file(key).unlink(missing_ok=True)
        lease.release()
        return {"lost": lost}

    def abandon(self) -> None:
        """Gives all back, and leaves the notes of who had them."""
        for lease in self.leases.values():
            if lease.is_locked:
                lease.release()

    def _holder_file(self, key: str) -> Path:
        return self.folder / f"{key}.holder"

    def _holder(self, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads(self._holder_file(key).read_text())
            return {"host": str(found["host"]), "pid": int(found["pid"]), "since": float(found["since"])}
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
