"""Leases: one holder each, whatever dies, and a heartbeat that nothing in the holder stalls."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastprune.errors import InputError
from fastprune.store.keeper import Keeper
from fastprune.store.lease import Holder, Leases

HOLD = """
import ctypes, os, sys, time
from pathlib import Path
from fastprune.store.lease import Leases
leases = Leases(Path(sys.argv[1]), float(sys.argv[2]))
print(leases.acquire("node")[0], leases._process.pid, flush=True)
{then}
"""


def hold(folder: Path, seconds: float, then: str = "time.sleep(100)") -> tuple[subprocess.Popen, int]:
    """A process that holds the lease on "node", and the process that keeps it alive."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(folder), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    mine, keeper = process.stdout.readline().split()
    assert mine == "True"
    return process, int(keeper)


def take(leases: Leases, patience: float) -> tuple[Holder | None, float]:
    """Tries until the lease is ours; who had it, and how many seconds that took."""
    began = time.monotonic()
    while time.monotonic() - began < patience:
        mine, holder = leases.acquire("node")
        if mine:
            return holder, time.monotonic() - began
        time.sleep(0.05)
    raise TimeoutError


def test_one_holder_at_a_time(tmp_path):
    with Leases(tmp_path) as a, Leases(tmp_path) as b:
        assert a.acquire("node") == (True, None)
        mine, holder = b.acquire("node")
        assert (mine, holder.pid) == (False, os.getpid())
        assert "process" in str(holder)
        assert b.acquire("another") == (True, None)
        assert a.release("node") is True
        assert b.acquire("node") == (True, None)
    assert list(tmp_path.iterdir()) == []


def test_closing_gives_back(tmp_path):
    with Leases(tmp_path) as a, Leases(tmp_path) as b:
        a.acquire("node")
        a.close()
        assert b.acquire("node") == (True, None)


def test_a_holder_that_is_killed_is_followed_at_once(tmp_path):
    process, _ = hold(tmp_path, 45.0)
    with Leases(tmp_path) as leases:
        assert leases.acquire("node")[0] is False
        process.kill()
        process.communicate()
        holder, seconds = take(leases, 10.0)
        assert holder.pid == process.pid
        assert seconds < 10.0
        assert leases.release("node") is True
        assert leases.acquire("node") == (True, None)  # a takeover is told of once


def test_so_is_one_that_is_killed_with_all_it_started(tmp_path):
    process, keeper = hold(tmp_path, 45.0)
    os.kill(keeper, signal.SIGKILL)
    process.kill()
    process.communicate()
    with Leases(tmp_path) as leases:
        assert take(leases, 30.0)[0].pid == process.pid


def test_a_machine_that_is_gone_is_followed_when_its_time_is_up(tmp_path):
    """Stopped, its keeper looks like one of another machine: there, but silent."""
    process, keeper = hold(tmp_path, 2.0)
    os.kill(keeper, signal.SIGSTOP)
    with Leases(tmp_path, 2.0) as leases:
        try:
            _, seconds = take(leases, 30.0)
            assert seconds > 1.0
        finally:
            os.kill(keeper, signal.SIGCONT)
            process.kill()
            process.communicate()
        time.sleep(1.5)  # what the old keeper finds it leaves alone
        assert leases.release("node") is True


def test_it_is_followed_too_where_names_cannot_be_exchanged(tmp_path):
    """As on NFS, SMB or FUSE, where filelock alone would wait for ever."""
    for name in range(2):
        process, keeper = hold(tmp_path, 2.0)
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        process.communicate()
        with without_exchange(tmp_path, 2.0) as leases:
            holder, seconds = take(leases, 30.0)
            assert holder.pid == process.pid
            assert seconds >= 2.0
            assert len(list(tmp_path.glob("node.*.lock"))) == 1
            if name == 0:
                assert leases.release("node") is True
    assert list(tmp_path.iterdir()) == []


def without_exchange(folder: Path, seconds: float) -> Leases:
    """Leases on a file system that does not exchange names."""
    leases = Leases(folder, seconds)
    start = (
        "import sys, runpy; import filelock._soft as soft; soft.exchange_names = lambda a, b: False;"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    leases._command[2:2] = ["-c", start]
    return leases


def test_a_machine_of_the_same_name_is_not_taken_for_this_one(tmp_path):
    """Copies of one image. Its process is not found here, where filelock looks for it; its heartbeat is."""
    process, keeper = hold(tmp_path, 2.0)
    os.kill(keeper, signal.SIGKILL)
    process.kill()
    process.communicate()
    note = tmp_path / "node.holder"
    note.write_text(json.dumps({**json.loads(note.read_text()), "boot": "another"}))
    (lock,) = tmp_path.glob("node.*.lock")
    with Leases(tmp_path, 2.0) as leases:
        for _ in range(30):
            os.utime(lock)
            mine, holder = leases.acquire("node")
            assert (mine, holder.boot) == (False, "another")
            time.sleep(0.1)
        holder, seconds = take(leases, 30.0)
        assert holder.boot == "another"
        assert seconds > 1.0
        assert leases.release("node") is True
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_does(tmp_path):
    process, keeper = hold(tmp_path, 2.0)
    os.kill(keeper, signal.SIGSTOP)
    takers = [without_exchange(tmp_path, 2.0) for _ in range(6)]
    try:
        got: list[int] = []
        began = time.monotonic()
        while time.monotonic() - began < 8.0:
            got += [i for i, taker in enumerate(takers) if i not in got and taker.acquire("node")[0]]
            time.sleep(0.02)
        assert len(got) == 1
        assert takers[got[0]].release("node") is True
    finally:
        os.kill(keeper, signal.SIGKILL)
        process.kill()
        process.communicate()
        for taker in takers:
            taker.close()


def test_a_long_step_that_locks_the_interpreter_does_not_cost_the_lease(tmp_path):
    """PyDLL keeps Python's global lock: no thread of the holder runs for eight times the lease."""
    then = "ctypes.PyDLL(None).usleep(12_000_000); print('awake', flush=True); input(); print(leases.release('node'))"
    process, _ = hold(tmp_path, 1.5, then)
    with Leases(tmp_path, 1.5) as other:
        while not select.select([process.stdout], [], [], 0.1)[0]:
            assert other.acquire("node")[0] is False
        assert process.communicate("\n", timeout=60)[0].split() == ["awake", "True"]


def test_one_that_was_taken_for_dead_learns_it(tmp_path):
    with Leases(tmp_path, 1.0) as slow, Leases(tmp_path, 1.0) as other:
        slow.acquire("node")
        os.kill(slow._process.pid, signal.SIGSTOP)
        try:
            take(other, 30.0)
        finally:
            os.kill(slow._process.pid, signal.SIGCONT)
        time.sleep(1.0)
        assert slow.release("node") is False
        assert other.release("node") is True


def test_an_answer_that_an_interrupt_left_unread_is_not_taken_for_another(tmp_path):
    with Leases(tmp_path) as leases:
        leases.acquire("a")
        leases._process.stdin.write('{"do": "acquire", "key": "b", "number": 77}\n')
        assert leases.acquire("a" * 32) == (True, None)
        assert leases.release("a") is True


def kill_keeper(leases) -> None:
    os.kill(leases._process.pid, signal.SIGKILL)
    leases._process.wait()


def test_a_keeper_that_is_killed_is_replaced(tmp_path):
    with Leases(tmp_path) as leases, Leases(tmp_path) as other:
        leases.acquire("node")
        kill_keeper(leases)
        leases.tend()
        assert other.acquire("node")[0] is False
        kill_keeper(leases)
        assert leases.acquire("another") == (True, None)
        assert leases.release("node") is True
        assert other.acquire("node") == (True, None)
    assert list(tmp_path.iterdir()) == []


def test_what_another_took_while_no_keeper_lived_is_lost(tmp_path):
    with Leases(tmp_path) as leases, Leases(tmp_path) as other:
        leases.acquire("node")
        kill_keeper(leases)
        assert take(other, 30.0)[0].pid == os.getpid()
        assert leases.release("node") is False
        assert other.release("node") is True
    assert list(tmp_path.iterdir()) == []


def test_a_keeper_that_cannot_start_is_not_started_for_ever(tmp_path):
    with Leases(tmp_path) as leases:
        leases._command = ["false"]
        with pytest.raises(RuntimeError, match="ends as it starts"):
            leases.acquire("node")


def test_a_lock_that_a_takeover_clears_away_as_it_is_made_is_none(tmp_path):
    """Its maker had looked before the takeover; whoever took over has cleared up, and is through, by the time it looks
    again."""
    keeper = Keeper(tmp_path, 45.0, os.getpid())
    made = keeper._acquired

    def make_and_lose(key, number):
        lease = made(key, number)
        keeper._lock(key, number).unlink()
        return lease

    keeper._acquired = make_and_lose
    assert keeper.acquire("node") == {"mine": False, "holder": None}


def test_a_number_that_was_given_back_meanwhile_is_not_taken_beside_a_new_holders(tmp_path):
    """Looked at while somebody held number 2 after a takeover; who came next began with 1 again."""
    slow, quick = Keeper(tmp_path, 45.0, 1), Keeper(tmp_path, 45.0, 2)
    held = slow._acquired("node", 2)
    made = slow._acquired

    def make_late(key, number):
        held.release()
        assert quick.acquire(key)["mine"] is True
        return made(key, number)

    slow._acquired = make_late
    assert slow.acquire("node")["mine"] is False
    assert quick.release("node") == {"lost": False}


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Leases(tmp_path / "file") as leases, pytest.raises(InputError, match="file") as error:
        leases.acquire("node")
    assert "\n" not in str(error.value)
