"""Several processes on one store: each node is computed once, and one that dies holds up nobody."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.small_figure import NODES, TRAININGS, command, products, published, results

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start(root, store, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(root, "--device", "cpu", "--workers", "1", *more, store=store),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(said: str) -> int:
    found = re.search(r"(\d+) trainings run", said)
    assert found is not None, said
    return int(found[1])


@pytest.mark.parametrize("count", [2, 4])
def test_started_at_once_they_train_every_node_once(small_figure, tmp_path, count):
    store = tmp_path / "store"
    processes = [start(tmp_path / str(i), store) for i in range(count)]
    said = [process.communicate(timeout=500) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    assert sum(trained(out) for out, _ in said) == TRAININGS
    assert not any("taken over" in err for _, err in said)
    assert len(published(store)) == NODES
    assert products(store) == products(small_figure / "store")
    assert {results(tmp_path / str(i)) for i in range(count)} == {results(small_figure)}
    assert [p for name in ("tmp", "partial", "leases") for p in (store / name).iterdir()] == []


def holders(store) -> dict[str, int]:
    """By key of each leased node, the process that has it."""
    found = {}
    for path in store.glob("leases/*.holder"):
        text = path.read_text() if path.exists() else ""
        if pid := re.search(r'"pid": (\d+)', text):
            found[path.stem] = int(pid[1])
    return found


def stop_while_it_holds(process: subprocess.Popen, store) -> str:
    """The key of the node that it is stopped at."""
    while True:
        assert process.poll() is None
        time.sleep(0.02)
        if process.pid in holders(store).values() and len(published(store)) > 2:
            process.send_signal(signal.SIGSTOP)
            mine = [key for key, pid in holders(store).items() if pid == process.pid]
            if len(mine) == 1 and mine[0] not in published(store):
                return mine[0]
            process.send_signal(signal.SIGCONT)


def test_one_that_is_killed_while_it_holds_a_lease_does_not_block_the_others(small_figure, tmp_path):
    """Stopped, it keeps its lease, and the others do what else there is. Then it is killed, with the process that keeps
    the lease, as when a machine goes."""
    store = tmp_path / "store"
    dying = start(tmp_path / "dying", store)
    key = stop_while_it_holds(dying, store)
    before = len(published(store))
    trained_before = sum(json.loads(path.read_text())["kind"] == "train" for path in store.glob("nodes/*/*/node.json"))
    others = [start(tmp_path / str(i), store) for i in range(2)]
    while len(published(store)) < before + 3:
        assert all(other.poll() is None for other in others), [other.communicate() for other in others]
        time.sleep(0.05)
    keepers = Path(f"/proc/{dying.pid}/task/{dying.pid}/children").read_text().split()
    assert len(keepers) == 1
    for pid in (*map(int, keepers), dying.pid):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    dying.communicate()
    while key not in published(store):
        assert time.monotonic() - killed < 60.0, "nobody took its node over"
        time.sleep(0.05)
    said = [process.communicate(timeout=400) for process in others]
    assert [process.returncode for process in others] == [0, 0], said
    takeovers = [line for _, err in said for line in err.splitlines() if "taken over" in line]
    assert len(takeovers) == 1
    assert f"process {dying.pid} on" in takeovers[0]
    assert trained_before + sum(trained(out) for out, _ in said) == TRAININGS
    assert len(published(store)) == NODES
    assert products(store) == products(small_figure / "store")
    assert {results(tmp_path / str(i)) for i in range(2)} == {results(small_figure)}
