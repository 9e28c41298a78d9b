"""Workers and devices that break: what is tried again, where, and what is given up."""

import os
import signal
import time
from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.study import run as execute_module
from fastprune.study.compute import WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.run import Attempts, execute
from fastprune.study.workers import STARTS_LIMIT, Processes, cause_of
from tests.fakes import Silent, eval_runs, find_runs, masks
from tests.study.test_run import chains


class Made:
    """A crew that answers at once, as `answer` says: it is given a worker's device and the node."""

    def __init__(self, devices: list[str], answer) -> None:
        self.names, self.answer = devices, answer
        self.given: list[tuple[str, str]] = []
        self.waiting: list[tuple[int, object]] = []

    def free(self):
        busy = {worker for worker, _ in self.waiting}
        return [i for i in range(len(self.names)) if i not in busy]

    def devices(self):
        return self.names

    def place(self, worker):
        return self.names[worker]

    def give(self, worker, node):
        self.given.append((self.names[worker], node.key))
        self.waiting.append((worker, node))

    def listen(self, hear):
        waiting, self.waiting = self.waiting, []
        for worker, node in waiting:
            for kind, value in self.answer(self.names[worker], node):
                hear(worker, kind, value)

    def close(self):
        pass


FAILED = ("failed", ("RuntimeError: planted", "Traceback\nRuntimeError: planted"))
DONE = ("done", ({"diverged": False}, 0))


@pytest.fixture
def config(tmp_path):
    RunStore(tmp_path / "runs")
    return WorkConfig(tmp_path / "runs", {})


def many(count: int) -> Graph:
    dense = find_runs(chains(), 0.2)[0]
    return Graph.of([replace(dense, seed=seed) for seed in range(count)])


def test_a_broken_gpu_is_left_out_and_costs_nothing(config):
    graph, view = many(40), Silent()
    crew = Made(["cuda:0", "cuda:1"], lambda device, node: [FAILED if device == "cuda:1" else DONE])
    outcome = execute(graph, config, view, crew=crew)
    assert (outcome.failed, outcome.not_reached, len(outcome.done)) == ({}, 0, 40)
    assert [device for device, _ in crew.given].count("cuda:1") == 3
    assert [note for note in view.notes if "left out" in note] == [
        "cuda:1 is left out from here on: what it got failed, time after time"
    ]
    assert "failed on cuda:1: RuntimeError: planted" in view.notes[0]


def test_what_fails_on_two_devices_has_failed_and_no_device_is_blamed(config):
    graph, view = many(40), Silent()
    bad = {node.key for node in graph.nodes[:20]}
    crew = Made(["cuda:0", "cuda:1"], lambda device, node: [FAILED if node.key in bad else DONE])
    outcome = execute(graph, config, view, crew=crew)
    assert set(outcome.failed) == bad
    assert len(outcome.done) == 20
    assert not any("left out" in note for note in view.notes)
    for key in bad:
        assert sorted(device for device, k in crew.given if k == key) == ["cuda:0", "cuda:1"]
    assert len(view.failures) == 20


def test_with_one_device_a_node_fails_at_once(config):
    crew = Made(["cpu", "cpu"], lambda device, node: [FAILED])
    outcome = execute(many(5), config, Silent(), crew=crew)
    assert len(outcome.failed) == len(crew.given) == 5


def test_when_all_devices_are_broken_it_ends(config):
    outcome = execute(many(30), config, Silent(), crew=Made(["cuda:0", "cuda:1"], lambda *_: [FAILED]))
    assert len(outcome.failed) == 30


def dying(kind: str, epochs: list[int], reason: str = "exit code -9"):
    """Each attempt gets so far, then its worker dies; after those the node is done."""
    left = list(epochs)

    def answer(device, node):
        return [("progress", (left.pop(0), 1)), (kind, reason)] if left else [DONE]

    return answer


@pytest.mark.parametrize(
    ("kind", "epochs", "fails"),
    [
        ("lost", [0], False),
        ("lost", [0, 0], True),
        ("lost", [3, 2], True),
        ("lost", [3, 5, 9, 10], False),
        ("gone", [0] * 10, False),
    ],
)
def test_a_preempted_run_goes_on_as_long_as_it_gets_further(config, kind, epochs, fails):
    view = Silent()
    outcome = execute(many(1), config, view, crew=Made(["cpu"], dying(kind, epochs)))
    assert bool(outcome.failed) is fails
    assert len(view.notes) == len(epochs) - fails
    if fails:
        assert "having come no further (exit code -9): out of memory? (log: " in next(iter(outcome.failed.values()))


def test_not_every_death_is_blamed_on_memory(config):
    outcome = execute(many(1), config, Silent(), crew=Made(["cpu"], dying("lost", [0, 0], "exit code -11")))
    assert "memory" not in next(iter(outcome.failed.values()))


def test_a_log_that_cannot_be_written_ends_nothing(config, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied", "f")

    monkeypatch.setattr(RunStore, "log", refused)
    outcome = execute(many(2), config, Silent(), crew=Made(["cpu"], lambda *_: [FAILED]))
    assert set(outcome.failed.values()) == {"RuntimeError: planted (no log: Permission denied)"}


def test_a_log_of_another_user_is_replaced(config):
    store, node = RunStore(config.store), find_runs(chains(), 0.2)[0]
    before = store.log(node, "first")
    inode = before.stat().st_ino
    assert store.log(node, "second").read_text() == "second"
    assert before.stat().st_ino != inode  # not written into


def test_it_says_for_whom_it_waits(config, monkeypatch):
    monkeypatch.setattr(execute_module, "_WAITING_SECONDS", 0.3)
    graph, view = many(2), Silent()
    with Leases(config.store / "leases") as other:
        for node in graph.nodes:
            other.acquire(node.key)
        crew, began = Made(["cpu"], lambda *_: [DONE]), time.monotonic()
        listen = crew.listen

        def patient(hear):
            time.sleep(0.02)
            if view.notes or time.monotonic() - began > 20:
                other.close()
            listen(hear)

        monkeypatch.setattr(crew, "listen", patient)
        execute(graph, config, view, crew=crew)
    (note,) = view.notes
    assert note.startswith(f"waiting for what others compute: {graph.label(graph.nodes[0])} (process {os.getpid()} on ")
    assert note.endswith(", and 1 more")


def test_the_cause_is_the_line_that_says_something():
    cuda = RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable it.\n")
    assert cause_of(cuda) == "RuntimeError: CUDA error: device-side assert triggered"
    assert cause_of(ValueError("backend='inductor' raised:\nTypeError: no\n\nSet TORCHDYNAMO_VERBOSE=1")) == (
        "ValueError: backend='inductor' raised: TypeError: no"
    )
    assert (cause_of(KeyError("density")), cause_of(MemoryError())) == ("KeyError: 'density'", "MemoryError")


def kill_what_starts(crew: Processes) -> None:
    while True:
        crew.processes[0].kill()
        crew.listen(lambda *said: None)


@pytest.mark.slow
def test_workers_that_are_killed_at_work_are_replaced_however_many(config):
    """A container's memory limit kills them all at once."""
    graph = Graph.of([masks(chains(), None)[0], *eval_runs(chains(), None, 0.5)])
    crew = Processes(graph, config, ["cpu"], STARTS_LIMIT + 1)
    heard: list[tuple[int, str]] = []
    try:
        while not all(crew.came_up):
            crew.listen(lambda *said: None)
        crew.busy = [True] * len(crew.busy)
        for process in crew.processes:
            os.kill(process.pid, signal.SIGKILL)
        while len(heard) < len(crew.busy):
            crew.listen(lambda worker, kind, value: heard.append((worker, kind)))
        assert sorted(heard) == [(i, "lost") for i in range(len(crew.busy))]
        with pytest.raises(InputError, match="die as they start"):  # these have not come up yet
            kill_what_starts(crew)
    finally:
        crew.close()


def test_counts_are_of_each_node_and_device():
    attempts = Attempts()
    devices = ["a", "b"]
    assert attempts.failed("x", "a", devices)
    assert not attempts.suits("x", "a", devices)
    assert attempts.suits("x", "b", devices)
    assert attempts.suits("y", "a", devices)
    assert attempts.suits("x", "a", ["a"])
    assert attempts.suits("x", "a", ["a", ""])  # the other one is still starting
    attempts.succeeded("a")
    for key in "yz":
        assert attempts.failed(key, "a", devices)
        assert not attempts.is_left_out("a", devices)
    assert attempts.failed("w", "a", devices)
    assert attempts.is_left_out("a", devices)
    assert not attempts.is_left_out("a", ["a"])
