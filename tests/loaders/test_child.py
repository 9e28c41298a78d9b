"""Child processes: messages, failures, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastprune.loaders.child import Child, ChildError

ROOT = Path(__file__).resolve().parents[2]
HELPERS = "child_helpers"


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    """A module that both sides can import, with the functions that the children run."""
    (tmp_path / f"{HELPERS}.py").write_text(
        "import os, subprocess, sys, time\n"
        "def count(n, send):\n    [send(i) for i in range(n)]\n"
        "def noise(send):\n    print('not a message'); os.system('echo nor this'); send(bytes(1 << 20))\n"
        "def full(send):\n    raise OSError(28, 'disk full')\n"
        "def wrong(send):\n    send(1); raise ValueError('two\\nlines')\n"
        "def die(send):\n    print('last words', file=sys.stderr); os._exit(7)\n"
        "def linger(path, send):\n"
        "    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    send((os.getpid(), other.pid)); time.sleep(600)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import importlib

    yield importlib.import_module(HELPERS)
    sys.modules.pop(HELPERS)


def gone(pid: int) -> bool:
    """Whether a process has ended, or only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.02)


def test_messages_in_order(helpers):
    with Child(helpers.count, 1000) as child:
        assert list(child.messages()) == list(range(1000))


def test_what_is_printed_is_no_message(helpers):
    with Child(helpers.noise) as child:
        assert list(child.messages()) == [bytes(1 << 20)]


def test_failures_arrive_as_one_line(helpers):
    with Child(helpers.full) as child, pytest.raises(ChildError, match="disk full") as caught:
        list(child.messages())
    assert caught.value.errno == 28
    with Child(helpers.wrong) as child, pytest.raises(ChildError, match="ValueError: two lines"):
        list(child.messages())


def test_a_child_that_dies_says_what_it_printed_last(helpers):
    with Child(helpers.die) as child, pytest.raises(ChildError, match="exit code 7: last words"):
        list(child.messages())


def test_leaving_ends_the_child_and_what_it_started(helpers):
    with Child(helpers.linger, "x") as child:
        pids = next(child.messages())
        assert not any(map(gone, pids))
    wait_until_gone(*pids)


def test_they_end_when_the_parent_is_killed(helpers):
    code = (
        f"import time, {HELPERS} as h; from fastprune.loaders.child import Child\n"
        "with Child(h.linger, 'x') as child:\n"
        "    print(*next(child.messages()), flush=True); time.sleep(600)\n"
    )
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    wait_until_gone(*pids)
