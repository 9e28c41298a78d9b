"""A Ray cluster of this machine: the same results as one process, whatever happens to its workers."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from fastprune.cli.reproduce import main
from tests.small_figure import NODES, TINY, TRAININGS, command, folders, products, published, results

pytest.importorskip("ray", reason="Ray is not installed")

from ray.exceptions import ActorUnavailableError

from fastprune.study import ray_workers


@pytest.fixture(autouse=True)
def as_important_as_other_tests(monkeypatch):
    """Ray's workers are nicer than whatever else runs: on a busy machine they get next to nothing."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


def actors(parent: int, name: str) -> dict[int, str]:
    """By process id, what Ray's actors of this name below `parent` say they are doing."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            if title.startswith(f"ray::{name}") and str(parent) in _ancestors(int(folder.name)):
                found[int(folder.name)] = title
        except OSError:
            continue
    return found


def _ancestors(pid: int) -> list[str]:
    line = []
    while pid > 1:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.partition("PPid:")[2].split()[0])
        line.append(str(pid))
    return line


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_gives_the_same_figure_though_processes_of_it_are_killed(small_figure, tmp_path):
    arguments = command(tmp_path, "--executor", "ray", "--ray-address", "local", "--workers", "3")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(published(tmp_path / "store")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    while not (busy := [pid for pid, title in actors(process.pid, "_Actor").items() if "compute" in title]):
        time.sleep(0.01)
    reports = list(actors(process.pid, "_Reports"))
    assert len(reports) == 1
    for pid in (busy[0], *reports):
        os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert re.search(r"on Ray cluster at [\d.]+:\d+ of 1 machine, runs at once: up to 3, each on a CPU core", out)
    assert f"{TRAININGS} trainings run" in out
    assert len(published(tmp_path / "store")) == NODES
    assert results(tmp_path) == results(small_figure)
    assert products(tmp_path / "store") == products(small_figure / "store")
    assert [p for name in ("tmp", "partial", "leases", "logs") for p in (tmp_path / "store" / name).iterdir()] == []
    before = published(tmp_path / "store")
    assert main([*TINY, *folders(tmp_path), "--executor", "ray"]) == 0  # nothing to do: no cluster is started
    assert published(tmp_path / "store") == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ray-address", "auto"], "--ray-address"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run"),
        (["--executor", "ray", "--gpus-per-run", "2"], "--gpus-per-run"),
        (["--executor", "ray", "--device", "cpu"], "--device"),
        (["--executor", "slurm"], "--executor"),
    ],
)
def test_flags_that_mean_nothing_are_one_line(tmp_path, capsys, flags, said):
    assert main([*TINY, *folders(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--ray-address", "127.0.0.1:1"], ["--ray-address", "local", "--gpus-per-run", "1"]])
def test_a_cluster_that_is_not_there_or_has_no_room_is_one_line(tmp_path, flags):
    done = subprocess.run(
        command(tmp_path, "--executor", "ray", *flags), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done
    assert len([line for line in done.stderr.splitlines() if line.startswith("reproduce.py:")]) == 1
    assert "Traceback" not in done.stderr
    assert flags[-1] in done.stderr or "--gpus-per-run" in done.stderr


@pytest.mark.slow
def test_an_interrupt_from_a_scheduler_is_no_crash(tmp_path):
    """Nor is it silent that there is no room for a worker: it may come."""
    arguments = command(
        tmp_path, "--executor", "ray", "--ray-address", "local", "--workers", "2", "--gpus-per-run", "1"
    )
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = []
    while "on Ray cluster" not in "".join(said):
        said.append(process.stdout.readline())
        assert said[-1], process.communicate()
    assert "up to 2, each with 1 of a GPU, 0 for now" in said[-1]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "SIGTERM" not in err
    assert err.splitlines()[-1] == "reproduce.py: interrupted: the same command continues"
    assert [p for name in ("tmp", "leases") for p in (tmp_path / "store" / name).iterdir()] == []


LOSE = """
import subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
from tests.small_figure import command, published

root, count = Path(sys.argv[1]), int(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=count)
cluster.wait_for_nodes()
flags = ["--executor", "ray", "--ray-address", cluster.address, "--workers", str(count + 1)]
run = subprocess.Popen(command(root, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
try:
    # The head has one core, so one of two at least is over there. On a slow machine a third may never be at work.
    at_work = lambda: len(list((root / "store" / "leases").glob("*"))) > 1
    while not (len(published(root / "store")) >= 3 and at_work()):
        assert run.poll() is None, "it ended before the other machine was at work"
        time.sleep(0.005)
    cluster.remove_node(other, allow_graceful=False)
    out, err = run.communicate(timeout=400)
    print(out)
    print(err, file=sys.stderr)
finally:
    if run.poll() is None:
        run.kill()
    cluster.shutdown()
sys.exit(run.returncode)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_goes_with_many_workers_ends_nothing(small_figure, tmp_path):
    arguments = [sys.executable, "-c", LOSE, str(tmp_path), "5"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done
    assert "of 2 machines, runs at once: up to 6, each on a CPU core" in done.stdout
    assert results(tmp_path) == results(small_figure)
    assert products(tmp_path / "store") == products(small_figure / "store")


def test_a_machine_that_ray_still_calls_alive_is_gone_if_it_does_not_answer(monkeypatch):
    """Otherwise a node whose worker was lost there twice would have failed."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        node = {"NodeID": "a", "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
        monkeypatch.setattr(ray_workers.ray, "nodes", lambda: [node])
        worker = ray_workers.RayWorker(0, mock.MagicMock(), (), mock.MagicMock())
        worker._machine = "a"
        error = ActorUnavailableError("connection refused", None)
        assert not worker.lost(error).with_machine
    assert worker.lost(error).with_machine
    worker._machine = "b"
    assert worker.lost(error).with_machine


@pytest.mark.slow
@pytest.mark.parametrize("through", ["RAY_ADDRESS", "ray_current_cluster"])
def test_a_cluster_that_was_there_once_is_one_line(tmp_path, through):
    """Ray itself would look for it for minutes."""
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path)}
    if through == "RAY_ADDRESS":
        environment["RAY_ADDRESS"] = "127.0.0.1:1"
    else:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / through).write_text("127.0.0.1:1")
    arguments = command(tmp_path, "--executor", "ray")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 2, done
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("reproduce.py:"))
    assert through in said
    assert "127.0.0.1:1" in said
    assert "--ray-address local" in said
