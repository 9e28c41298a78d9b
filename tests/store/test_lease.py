"""Leases: one holder each, followed when it dies, and none of it needs locks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastprune.store import lease as lease_module
from fastprune.store.lease import Holder, Leases, read_holder

HOLD = """
import sys, time
from pathlib import Path
from fastprune.store.lease import Leases
leases = Leases(Path(sys.argv[1]), float(sys.argv[2]))
print(leases.acquire("node")[0], flush=True)
time.sleep(1000)
"""


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    """A process that holds the lease on "node"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "True\n"
    return process


def take(leases: Leases) -> Holder | None:
    """Tries until the lease is ours; who had it."""
    while True:
        mine, holder = leases.acquire("node")
        if mine:
            return holder
        time.sleep(0.02)


def from_elsewhere(folder: Path, **changes) -> Path:
    """A lease as another machine leaves it."""
    path, holder = folder / "node", Holder("elsewhere", "another boot", 1, 1.0, "token")
    path.write_text(json.dumps(asdict(replace(holder, **changes))))
    return path


class Clock:
    """In place of time.monotonic in lease.py."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


def test_one_holder_at_a_time(tmp_path):
    with Leases(tmp_path) as a, Leases(tmp_path) as b:
        assert a.acquire("node") == (True, None)
        mine, holder = b.acquire("node")
        assert (mine, holder.pid) == (False, os.getpid())
        assert str(holder) == f"process {os.getpid()} on {os.uname().nodename}"
        assert b.acquire("another") == (True, None)
        assert a.release("node") is True
        assert a.release("node") is False
        assert b.acquire("node") == (True, None)
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_is_killed_is_followed_at_once(tmp_path, clock):
    """By the clock no time passes."""
    process = hold(tmp_path, 90.0)
    with Leases(tmp_path) as leases:
        assert leases.acquire("node")[0] is False
        process.kill()
        process.wait()
        mine, holder = leases.acquire("node")
        assert (mine, holder.pid) == (True, process.pid)
        assert leases.release("node") is True
        assert leases.acquire("node") == (True, None)  # a takeover is told of once


@pytest.mark.parametrize("content", ["complete", "", "{", "[]", '{"host": 1}', "\xff"])
def test_a_machine_that_is_lost_is_followed_when_its_lease_was_untouched_for_long(tmp_path, clock, content):
    """By the clock of the process that looks; that of the disk is ten years behind. What was half written, too."""
    path = from_elsewhere(tmp_path)
    if content != "complete":
        path.write_text(content)
    os.utime(path, (1.0e9, 1.0e9))
    with Leases(tmp_path, 90.0) as leases:
        for later in (0.0, 50.0, 39.9):
            clock.now += later
            assert leases.acquire("node")[0] is False
        clock.now += 0.1
        mine, holder = leases.acquire("node")
        assert mine is True
        assert (holder is None) == (content != "complete")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_touches_its_lease_keeps_it(tmp_path, clock):
    path = from_elsewhere(tmp_path)
    with Leases(tmp_path, 90.0) as leases:
        for i in range(20):
            os.utime(path, (1.0e9 + i, 1.0e9 + i))
            assert leases.acquire("node")[0] is False
            clock.now += 80.0


@pytest.mark.parametrize("changes", [{"machine": "another boot"}, {"machine": ""}])
def test_a_machine_of_the_same_name_is_not_taken_for_this_one(tmp_path, clock, changes):
    """Copies of one image, or this one before it was started again. There is no process of that number here."""
    from_elsewhere(tmp_path, host=os.uname().nodename, pid=2**22 + 1, **changes)
    with Leases(tmp_path) as leases:
        assert leases.acquire("node")[0] is False
    from_elsewhere(tmp_path, host="renamed", pid=2**22 + 1, machine=lease_module.this_machine())
    with Leases(tmp_path) as leases:
        assert leases.acquire("node")[0] is True


def test_a_holder_that_is_stopped_is_followed_and_learns_it(tmp_path):
    """As a machine that sleeps: there, but silent. The times are short, but nothing is judged by them."""
    process = hold(tmp_path, 0.6)
    process.send_signal(signal.SIGSTOP)
    with Leases(tmp_path, 0.6) as leases:
        assert take(leases).pid == process.pid
        process.send_signal(signal.SIGCONT)
        ours = read_holder(tmp_path / "node")
        time.sleep(0.5)  # it may touch what it thinks it holds
        assert read_holder(tmp_path / "node") == ours
        assert leases.release("node") is True
    process.kill()
    process.wait()


def test_one_that_was_taken_for_dead_learns_it(tmp_path, clock):
    with Leases(tmp_path) as slow, Leases(tmp_path) as other:
        slow.acquire("node")
        other.acquire("node")
        clock.now += 100.0  # the thread that touches it has had no time
        assert other.acquire("node")[0] is True
        assert slow.release("node") is False
        assert other.release("node") is True


def test_a_held_lease_is_touched(tmp_path):
    with Leases(tmp_path, 0.3) as leases:
        leases.acquire("node")
        os.utime(tmp_path / "node", (1.0, 1.0))
        while (tmp_path / "node").stat().st_mtime == 1.0:
            time.sleep(0.01)


def test_of_many_that_take_over_one_does(tmp_path, clock):
    for turn in range(40):  # a late one must not remove the lease of the first
        from_elsewhere(tmp_path, token=f"token {turn}")
        takers = [Leases(tmp_path) for _ in range(8)]
        assert [taker.acquire("node")[0] for taker in takers] == [False] * 8
        clock.now += 100.0
        start, got = threading.Barrier(len(takers)), []

        def compete(taker: Leases, start=start, got=got) -> None:
            start.wait()
            got.append(taker.acquire("node")[0])

        threads = [threading.Thread(target=compete, args=(taker,)) for taker in takers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(got) == 1
        for taker in takers:
            taker.close()
        assert list(tmp_path.iterdir()) == []


def test_one_that_died_while_it_took_over_stops_no_other(tmp_path, clock, monkeypatch):
    from_elsewhere(tmp_path)
    with Leases(tmp_path) as dead, Leases(tmp_path) as other:
        assert [each.acquire("node")[0] for each in (dead, other)] == [False, False]
        clock.now += 100.0
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # it ends before it tidies up
        monkeypatch.setattr(dead, "_remove", lambda *_: False)
        assert dead.acquire("node")[0] is False
        monkeypatch.undo()
        monkeypatch.setattr(lease_module, "time", clock)
        assert len(list(tmp_path.iterdir())) == 2
        assert other.acquire("node")[0] is False  # it may be at work
        clock.now += 100.0
        assert other.acquire("node")[0] is False  # the turn is abandoned, too
        assert other.acquire("node")[0] is True
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_another_has_just_taken_over_is_put_back(tmp_path, clock):
    """Looked at while it was abandoned, removed when it was another's already."""
    path, other = from_elsewhere(tmp_path), Leases(tmp_path)
    with Leases(tmp_path) as leases:
        leases.acquire("node")
        clock.now += 100.0
        abandoned = leases._is_abandoned

        def too_late(key, holder):
            path.unlink()
            other.acquire("node")
            return abandoned(key, holder) or True

        leases._is_abandoned = too_late
        assert leases.acquire("node")[0] is False
        assert read_holder(path).pid == os.getpid()
        assert other.release("node") is True
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Leases(tmp_path / "file") as leases, pytest.raises(OSError, match="file"):
        leases.acquire("node")
