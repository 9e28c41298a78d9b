"""Workers of this machine: child processes that are started completely, replaced where they die, and never orphans."""

import errno
import os
import signal
import subprocess
import time
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from fastprune.store import RunStore
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import run
from fastprune.study.workers import Done, Failed, InPlaceWorker, ProcessWorker, local_workers
from tests.fakes import Silent, masks
from tests.small_figure import command, published
from tests.study.test_run import chains

MASKS = masks(chains(), None)
GRAPH = Graph.of(MASKS)


@pytest.fixture
def config(tmp_path) -> WorkConfig:
    RunStore(tmp_path / "runs")
    return WorkConfig(tmp_path / "runs", {})


def test_a_device_has_its_processes_and_a_cpu_alone_has_this_one(config, monkeypatch):
    made = []
    monkeypatch.setattr(ProcessWorker, "__init__", lambda self, graph, config: made.append(config.device))
    monkeypatch.setattr(ProcessWorker, "close", lambda self: made.append("closed"))
    with local_workers(GRAPH, config, ["cpu"], 1) as workers:
        assert [type(worker) for worker in workers] == [InPlaceWorker]
    for devices, count in ((["cuda:0"], 1), (["cuda:0", "cuda:1"], 3), (["cpu"], 2)):
        with local_workers(GRAPH, config, devices, count):
            assert made == [devices[i % len(devices)] for i in range(count)]
        assert made[count:] == ["closed"] * count
        made.clear()


@pytest.mark.slow
def test_a_process_is_replaced_where_it_dies_idle_at_work_or_fails(config):
    bad = replace(MASKS[0], allocation="by moonlight")
    reports: list[tuple[int, int]] = []
    worker = ProcessWorker(Graph.of([bad, *MASKS]), config)
    try:
        first = pid(worker)
        answer = worker.submit(MASKS[0].key, lambda *said: reports.append(said)).result()
        assert isinstance(answer, Done)
        assert answer.result == RunStore(config.store).node(MASKS[0])["result"]
        assert pid(worker) == first

        os.kill(first, signal.SIGKILL)  # idle
        with suppress(ChildProcessError):  # the executor's own thread may have reaped it already
            os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        answer = submit_again(worker, bad.key)
        assert isinstance(answer, Failed)
        assert "by moonlight" in answer.cause
        assert "Traceback" in answer.text
        worker.renew()
        third = pid(worker)
        assert third != first

        RunStore(config.store).remove(RunStore(config.store).path(MASKS[0]))
        os.kill(third, signal.SIGSTOP)  # at work, as far as the executor knows
        future = worker.submit(MASKS[1].key, lambda *said: None)
        os.kill(third, signal.SIGKILL)
        assert worker.lost(future.exception()).reason == "exit code -9"
        assert isinstance(worker.submit(MASKS[0].key, lambda *said: None).result(), Done)
    finally:
        worker.close()
    assert not Path(f"/proc/{pid(worker)}").exists()


def pid(worker: ProcessWorker) -> int:
    assert worker._process is not None
    assert worker._process.pid is not None
    return worker._process.pid


def submit_again(worker: ProcessWorker, key: str):
    """The executor may take a moment to see that its process has died; a node that it loses by that is tried again."""
    future = worker.submit(key, lambda *said: None)
    wait([future])
    if (error := future.exception()) is not None:
        assert worker.lost(error).reason == "exit code -9"
        return worker.submit(key, lambda *said: None).result()
    return future.result()


@pytest.mark.slow
def test_processes_that_are_killed_all_at_once_end_nothing(config):
    """As a container's memory limit does."""
    workers = [ProcessWorker(GRAPH, config) for _ in range(4)]
    for worker in workers:
        os.kill(pid(worker), signal.SIGKILL)
    outcome = run(GRAPH, RunStore(config.store), workers, Silent())
    assert outcome.failed == {}
    assert len(outcome.done) == len(MASKS)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_process_starts_comes_when_it_has_started(config, monkeypatch, which):
    """Neither lost, nor in the middle of what could then not be ended."""

    def start(process):
        os.kill(os.getpid(), which)
        original(process)
        started.append(process)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    original, started = SpawnProcess.start, []
    monkeypatch.setattr(SpawnProcess, "start", start)
    before = signal.signal(which, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), local_workers(GRAPH, config, ["cpu"], 2):
            pass
        assert signal.getsignal(which) is interrupt
    finally:
        signal.signal(which, before)
    assert len(started) == 1
    assert started[0].exitcode == -signal.SIGKILL
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_that_cannot_be_started_leaves_none_behind(config, monkeypatch):
    def start(process):
        if started:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        original(process)
        started.append(process)

    original, started = SpawnProcess.start, []
    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(OSError, match="Cannot allocate"), local_workers(GRAPH, config, ["cpu"], 2):
        pass
    assert started[0].exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_their_parent_however_that_ends(tmp_path, which):
    arguments = command(tmp_path, "--device", "cpu", "--workers", "2")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(published(tmp_path / "store")) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = [
        int(pid)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    assert len(children) >= 2
    process.send_signal(which)
    _, err = process.communicate()  # children have its stderr: this ends when they do
    assert process.returncode == (130 if which == signal.SIGTERM else -signal.SIGKILL)
    if which == signal.SIGTERM:
        assert err.splitlines()[-1] == "reproduce.py: interrupted: the same command continues"
    while any(Path(f"/proc/{pid}").exists() for pid in children):  # or the test's own limit ends it
        time.sleep(0.02)
