"""Nodes that fail and workers that die: what is tried again, where, and what is given up."""

import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest

from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.study import run as run_module
from fastprune.study.graph import Graph
from fastprune.study.run import run
from fastprune.study.workers import Done, Failed, Lost, cause_of
from tests.fakes import Silent, find_runs
from tests.study.test_run import chains

FAILED = Failed("RuntimeError: planted", "Traceback\nRuntimeError: planted")
DONE = Done({"diverged": False}, 0, 0)


class FakeWorker:
    """Answers at once, as `answer` says for (device, node's key): (epoch that is reported, answer)."""

    def __init__(self, device: str, answer, given: list[tuple[str, str]]) -> None:
        self.device = self.place = device
        self.answer, self.given = answer, given
        self.renewed = 0

    def submit(self, key, report):
        self.given.append((self.device, key))
        epoch, said = self.answer(self.device, key)
        report(epoch, 0)
        future: Future = Future()
        future.set_exception(DeadError(said)) if isinstance(said, Lost) else future.set_result(said)
        return future

    def poll(self): ...

    def lost(self, error):
        return error.args[0]

    def renew(self):
        self.renewed += 1

    def close(self): ...


class DeadError(Exception):
    """A worker's future raises it where its process dies."""


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path / "runs")


def run_fake(store: RunStore, count: int, devices: list[str], answer, view=None):
    """(outcome, view, (device, key) of each attempt, workers) of that many nodes."""
    dense = find_runs(chains(), 0.2)[0]
    graph = Graph.of([replace(dense, seed=seed) for seed in range(count)])
    given: list[tuple[str, str]] = []
    workers, view = [FakeWorker(device, answer, given) for device in devices], view or Silent()
    return run(graph, store, workers, view), view, given, workers


def test_a_broken_gpu_is_left_out_and_costs_nothing(store):
    outcome, view, given, workers = run_fake(
        store, 40, ["cuda:0", "cuda:1"], lambda device, _: (0, FAILED if device == "cuda:1" else DONE)
    )
    assert (outcome.failed, outcome.blocked, len(outcome.done)) == ({}, 0, 40)
    assert [device for device, _ in given].count("cuda:1") == workers[1].renewed == 3
    assert [note for note in view.notes if "no more" in note] == ["cuda:1 gets no more nodes: 3 failures in a row"]
    assert "failed on cuda:1: RuntimeError: planted" in view.notes[0]


def test_what_fails_on_two_devices_has_failed_and_no_device_is_blamed(store):
    outcome, view, given, _ = run_fake(
        store, 40, ["cuda:0", "cuda:1"], lambda _, key: (0, FAILED if key < "8" else DONE)
    )
    bad = {key for _, key in given if key < "8"}
    assert set(outcome.failed) == bad
    assert len(bad) > 5
    assert len(outcome.done) == 40 - len(bad)
    assert not any("no more" in note for note in view.notes)
    for key in bad:
        assert sorted(device for device, k in given if k == key) == ["cuda:0", "cuda:1"]
    assert len(view.failures) == len(bad)


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_with_one_device_a_node_is_tried_there_once_more(store, devices):
    outcome, _, given, _ = run_fake(store, 5, devices, lambda *_: (0, FAILED))
    assert len(outcome.failed) == 5
    assert sorted(Counter(given).values()) == [2] * 5


def test_a_failure_that_does_not_come_again_is_none(store):
    seen: set[str] = set()

    def fail_first(_, key):
        first = key not in seen
        seen.add(key)
        return 0, FAILED if first else DONE

    outcome, view, given, _ = run_fake(store, 5, ["cpu"], fail_first)
    assert (outcome.failed, len(outcome.done), len(given)) == ({}, 5, 10)
    assert sum(note.startswith("retry: ") for note in view.notes) == 5


def test_when_all_devices_are_broken_the_last_goes_on_and_the_run_ends(store):
    outcome, _, given, _ = run_fake(store, 30, ["cuda:0", "cuda:1"], lambda *_: (0, FAILED))
    assert len(outcome.failed) == 30
    assert len(given) == 60


LOST, MACHINE = Lost("exit code -9"), Lost("node died", with_machine=True)


@pytest.mark.parametrize(
    ("answer", "epochs", "fails"),
    [
        (LOST, [0], False),
        (LOST, [0, 0], True),
        (LOST, [3, 2], True),
        (LOST, [3, 5, 9, 10], False),
        (MACHINE, [0] * 10, False),
    ],
)
def test_a_run_that_is_killed_again_and_again_goes_on_as_long_as_it_gets_further(store, answer, epochs, fails):
    left = list(epochs)
    outcome, view, _, _ = run_fake(store, 1, ["cpu"], lambda *_: (left.pop(0), answer) if left else (0, DONE))
    assert bool(outcome.failed) is fails
    assert len(view.notes) == len(epochs) - fails
    if fails:
        assert "worker died (exit code -9): out of memory? (log: " in next(iter(outcome.failed.values()))


def test_not_every_death_is_blamed_on_memory(store):
    outcome, *_ = run_fake(store, 1, ["cpu"], lambda *_: (0, Lost("exit code -11")))
    assert "memory" not in next(iter(outcome.failed.values()))


def test_a_log_that_cannot_be_written_ends_nothing(store, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied", "f")

    monkeypatch.setattr(RunStore, "log", refused)
    outcome, *_ = run_fake(store, 2, ["cpu"], lambda *_: (0, FAILED))
    assert set(outcome.failed.values()) == {"RuntimeError: planted (no log: Permission denied)"}


def test_a_log_of_another_user_is_replaced(store):
    node = find_runs(chains(), 0.2)[0]
    before = store.log(node, "first")
    inode = before.stat().st_ino
    assert store.log(node, "second").read_text() == "second"
    assert before.stat().st_ino != inode  # not written into


def test_what_a_lost_lease_broke_is_no_failure(store, monkeypatch):
    """The process that took it over has removed what this worker was writing; it publishes, or this one tries again."""
    answers = [FAILED, FAILED, FAILED, DONE]

    def lose_lease(_, key):
        said = answers.pop(0)
        if said is FAILED:
            (store.root / "leases" / key).unlink()
        return 0, said

    monkeypatch.setattr(run_module, "_LOOK_AGAIN", (0.01, 0.01))
    outcome, view, given, _ = run_fake(store, 1, ["cpu"], lose_lease)
    assert (outcome.failed, len(outcome.done), len(given)) == ({}, 1, 4)
    assert view.notes == []


def test_it_says_which_process_it_waits_for(store, monkeypatch):
    monkeypatch.setattr(run_module, "_WAITING_SECONDS", 0.1)
    monkeypatch.setattr(run_module, "_LOOK_AGAIN", (0.01, 0.01))
    view, keys = Silent(), [replace(find_runs(chains(), 0.2)[0], seed=seed).key for seed in range(2)]
    with Leases(store.root / "leases") as other:
        for key in keys:
            other.acquire(key)
        said = threading.Event()
        monkeypatch.setattr(view, "note", lambda text: (view.notes.append(text), said.set()))
        releasing = threading.Thread(target=lambda: (said.wait(), [other.release(key) for key in keys]))
        releasing.start()
        run_fake(store, 2, ["cpu"], lambda *_: (0, DONE), view)
        releasing.join()
    (note,) = view.notes
    assert note.startswith("waiting for other processes: train ")
    assert " (process " in note
    assert note.endswith(", and 1 more")


def test_a_worker_that_reports_nothing_is_mentioned(store, monkeypatch):
    monkeypatch.setattr(run_module, "_SILENT_SECONDS", 0.0)
    view = Silent()
    graph = Graph.of([find_runs(chains(), 0.2)[0]])
    worker = FakeWorker("cpu", lambda *_: (0, DONE), [])
    future: Future = Future()
    monkeypatch.setattr(worker, "submit", lambda key, report: future)
    monkeypatch.setattr(worker, "poll", lambda: view.notes and not future.done() and future.set_result(DONE))
    run(graph, store, [worker], view)
    assert view.notes[0].startswith("no report from train ")


def test_the_cause_is_the_line_that_says_something():
    cuda = RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable it.\n")
    assert cause_of(cuda) == "RuntimeError: CUDA error: device-side assert triggered"
    assert cause_of(ValueError("backend='inductor' raised:\nTypeError: no\n\nSet TORCHDYNAMO_VERBOSE=1")) == (
        "ValueError: backend='inductor' raised: TypeError: no"
    )
    assert (cause_of(KeyError("density")), cause_of(MemoryError())) == ("KeyError: 'density'", "MemoryError")
