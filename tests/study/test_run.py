"""The scheduler, with workers that die, runs that fail, and a data set of tensors in place of images."""

import errno
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from multiprocessing.context import SpawnProcess

import pytest

from fastprune.errors import InputError
from fastprune.figures.paper import A2
from fastprune.loaders.manifest import Manifest
from fastprune.specs import DataSpec, Prune, Train
from fastprune.store import RunStore
from fastprune.store.lease import Leases
from fastprune.study import compute
from fastprune.study import graph as graph_module
from fastprune.study.chains import Chains
from fastprune.study.compute import WorkConfig, Worker
from fastprune.study.graph import Graph, Queue
from fastprune.study.run import execute
from fastprune.study.settings import preset
from fastprune.study.workers import Processes
from tests.fakes import Images, Silent, eval_runs, find_runs, masks

SETTINGS = preset(A2.protocol, "smoke").override(seeds=1, rounds=2, fraction=0.6, epochs=3, batch_size=8)
DATA = DataSpec("made up", "f" * 64, 4, None, None, 24, 8)


@pytest.fixture
def config(tmp_path, monkeypatch) -> WorkConfig:
    monkeypatch.setattr(compute, "open_data", lambda *args, **kwargs: Images())
    manifest = Manifest.__new__(Manifest)  # nothing looks into it
    return WorkConfig(tmp_path, {DATA.fingerprint: compute.Images(manifest, None, "made up")}, checkpoint_seconds=0.0)


def chains(**changes) -> Chains:
    return Chains(SETTINGS.override(**changes), DATA, 0)


def contents(store: RunStore) -> dict[str, bytes]:
    """All that a run may not change: masks, states, metrics."""
    found = {}
    for path in sorted(store.root.glob("nodes/*/*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name not in ("node.json", "times.csv", "SHA256SUMS"):
            found[name] = path.read_bytes()
    return found


def test_a_chain_of_rounds_by_hand(config):
    c = chains()
    graph = Graph.of([*find_runs(c, 0.2), masks(c, 0.2)[-1]])
    view = Silent()
    outcome = execute(graph, config, view)
    assert outcome.done == [n.key for n in graph.nodes]
    store = RunStore(config.store)
    first, second = (store.node(m)["result"] for m in masks(c, 0.2))
    assert first["kept"] == first["total"] - round(0.6 * first["total"])
    assert second["kept"] == first["kept"] - round(0.6 * first["kept"])
    assert view.images == 2 * 3 * 24
    assert (store.path(masks(c, 0.2)[0]) / "layers.csv").read_text().startswith("layer,weights,kept")
    assert not list((config.store / "partial").iterdir())
    assert execute(graph, config, Silent()).done == []


def test_only_what_is_missing_is_computed(config):
    c = chains()
    graph = Graph.of(eval_runs(c, None, 0.5))
    execute(Graph.of(eval_runs(c, None, 0.5)[:2]), config, Silent())
    view = Silent()
    execute(graph, config, view)
    assert {n.key for n in view.finished_nodes} == {eval_runs(c, None, 0.5)[2].key, masks(c, None)[1].key}


class Killed(BaseException):
    """What a SIGKILL looks like to a test that wants to go on."""


@pytest.mark.parametrize("after", range(1, 12))
def test_interrupted_anywhere_it_ends_the_same(config, monkeypatch, after, tmp_path_factory):
    c = chains()
    graph = Graph.of(find_runs(c, 0.2))
    whole = replace(config, store=tmp_path_factory.mktemp("whole"))
    execute(graph, whole, Silent())
    left = after

    def report_until(original):
        def wrapped(self, node, states, report):
            def counted(epoch, images):
                nonlocal left
                left -= 1
                if left == 0:
                    raise Killed
                report(epoch, images)

            return original(self, node, states, counted)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", report_until(Worker.run))
        with pytest.raises(Killed):
            execute(graph, config, Silent())
    done_before = {n.key for n in graph.nodes if RunStore(config.store).has(n)}
    view = Silent()
    execute(graph, config, view)
    assert not done_before & {n.key for n in view.finished_nodes}
    assert contents(RunStore(config.store)) == contents(RunStore(whole.store))
    for node in (n for n in graph.nodes if n.kind == "train"):
        made = RunStore(config.store).node(node)["provenance"]
        parts = made.get("parts", [{"from": 0, "to": node.stop}])
        assert [0, *(part["to"] for part in parts)] == [*(part["from"] for part in parts), node.stop]
        assert all(part["code"] == made["code"] for part in made.get("parts", []))
        if after == 7 and node is graph.nodes[0]:  # killed in its second epoch
            assert [(part["from"], part["to"]) for part in made["parts"]] == [(0, 1), (1, 3)]


def test_a_resumed_run_trains_only_the_epochs_it_lacks(config, monkeypatch):
    c = chains()
    run = find_runs(c, 0.2)[0]
    graph = Graph.of([run])
    original = compute.Trainer.fit

    def stop_after_one(self, *args, on_epoch, **kwargs):
        def and_die(metrics):
            on_epoch(metrics)
            raise Killed

        return original(self, *args, on_epoch=and_die, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(compute.Trainer, "fit", stop_after_one)
        with pytest.raises(Killed):
            execute(graph, config, Silent())
    view = Silent()
    execute(graph, config, view)
    assert view.images == 2 * 24
    lines = (RunStore(config.store).path(run) / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3"]


def test_a_damaged_checkpoint_is_said_and_the_run_starts_again(config, capsys):
    run = find_runs(chains(), 0.2)[0]
    store = RunStore(config.store)
    store.save_partial(run, "checkpoint", lambda p: p.write_bytes(b"damaged"))
    view = Silent()
    execute(Graph.of([run]), config, view)
    assert view.images == 3 * 24
    assert "unusable checkpoint" in capsys.readouterr().err


def test_divergence_is_a_result(config):
    c = chains(lr_find=(1e30,))
    graph = Graph.of(eval_runs(c, 1e30, 0.5))
    view = Silent()
    outcome = execute(graph, config, view)
    assert outcome.failed == {}
    store = RunStore(config.store)
    result = store.node(find_runs(c, 1e30)[0])["result"]
    assert result["diverged"] is True
    assert result["accuracy"] is None
    assert result["epochs"] < 3
    mask = store.node(masks(c, 1e30)[0])["result"]
    assert mask["kept"] == mask["total"] - round(0.6 * mask["total"])


def test_a_failure_is_kept_and_the_others_go_on(config, monkeypatch):
    c = chains()
    graph = Graph.of([*find_runs(c, 0.2), *eval_runs(c, None, 0.5)])
    original = Worker._train

    def fail_on_find(self, node, states, report):
        if node.schedule.lr == 0.2:
            raise RuntimeError("planted")
        return original(self, node, states, report)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_train", fail_on_find)
        view = Silent()
        outcome = execute(graph, config, view)
    assert list(outcome.failed) == [find_runs(c, 0.2)[0].key]
    assert outcome.not_reached == 2
    assert "planted" in view.failures[0][1]
    log = next((config.store / "logs").iterdir()).read_text()
    assert "Traceback" in log
    assert len(outcome.done) == 5
    assert execute(graph, config, Silent()).failed == {}


def test_a_full_disk_is_bad_input(config, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(compute, "write_csv", full)
    with pytest.raises(InputError, match="No space left") as error:
        execute(Graph.of(find_runs(chains(), 0.2)[:1]), config, Silent())
    assert "\n" not in str(error.value)
    assert not list((config.store / "tmp").iterdir())


def test_a_damaged_mask_says_what_to_delete_and_then_is_made_again(config):
    c = chains()
    first = masks(c, None)[0]
    execute(Graph.of([first]), config, Silent())
    store = RunStore(config.store)
    (store.path(first) / "mask.safetensors").write_bytes(b"")
    graph = Graph.of(eval_runs(c, None, 0.5)[:2])
    with pytest.raises(InputError, match=f"delete the folder {store.path(first)}"):
        execute(graph, config, Silent())
    shutil.rmtree(store.path(first))
    assert execute(graph, config, Silent()).failed == {}


def test_what_another_process_published_is_not_counted_as_done_here(config, monkeypatch):
    run = find_runs(chains(), 0.2)[0]
    execute(Graph.of([run]), config, Silent())
    monkeypatch.setattr(Graph, "todo", lambda self, store: list(self.nodes))  # it looked before that was published
    outcome = execute(Graph.of([run]), config, Silent())
    assert (outcome.done, outcome.found, outcome.epochs) == ([], [run.key], {})


@pytest.mark.slow
def test_a_worker_whose_node_failed_is_another_afterwards(config):
    """Whatever broke in its process may stay broken: a CUDA context does."""
    RunStore(config.store)
    good = masks(chains(), None)[0]
    bad = replace(good, allocation="by moonlight")
    crew = Processes(Graph.of([bad, good]), config, ["cpu"], 1)
    heard: list[tuple[str, object]] = []
    try:
        for node in (bad, good):
            place = crew.place(0)
            crew.give(0, node)
            while not heard or heard[-1][0] == "progress":
                crew.listen(lambda worker, kind, value: heard.append((kind, value)))
            kind, value = heard.pop()
            assert crew.free() == [0]
            assert (kind, crew.place(0) != place) == ("failed" if node is bad else "done", node is bad), value
    finally:
        crew.close()


def test_an_unknown_allocation_is_no_global_mask(config):
    prune = replace(masks(chains(), None)[0], allocation="by moonlight")
    outcome = execute(Graph.of([prune]), config, Silent())
    assert "by moonlight" in outcome.failed[prune.key]


def test_the_longest_chain_goes_first(config):
    c = chains(rounds=3)
    graph = Graph.of([*eval_runs(c, None, 0.5), *find_runs(c, 0.2)])
    queue = Queue(graph, graph.nodes)
    first = queue.next()
    assert isinstance(first, Train)
    assert first.key == find_runs(c, 0.2)[0].key
    assert isinstance(queue.next(), Prune)


def test_a_node_that_another_process_computes_is_waited_for(config, monkeypatch):
    run = find_runs(chains(), 0.2)[0]
    monkeypatch.setattr(graph_module, "_BUSY_SECONDS", (0.01, 0.1))
    RunStore(config.store)
    view = Silent()
    with Leases(config.store / "leases") as other, Leases(config.store / "leases") as third:
        assert other.acquire(run.key)[0]
        threading.Timer(1.0, other.release, [run.key]).start()
        began = time.monotonic()
        assert execute(Graph.of([run]), config, view).done == [run.key]
        assert time.monotonic() - began > 1.0
        assert third.acquire(run.key) == (True, None)
    assert view.notes == []


def test_a_killed_keeper_of_the_leases_disturbs_no_run(config, monkeypatch):
    graph = Graph.of(find_runs(chains(), 0.2))
    made = []
    original = Leases.__init__
    monkeypatch.setattr(Leases, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    view = Silent()

    def kill(worker, node, epoch, images):
        if epoch == 2 and images and made[0]._process.poll() is None:
            made[0]._process.kill()
            made[0]._process.wait()

    monkeypatch.setattr(view, "progress", kill)
    assert len(execute(graph, config, view).done) == 3
    assert view.notes == []
    assert list((config.store / "leases").iterdir()) == []


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_worker_starts_comes_when_it_has_started(config, monkeypatch, which):
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
        with pytest.raises(KeyboardInterrupt):
            Processes(Graph.of(find_runs(chains(), 0.2)), config, ["cpu"], 2)
        assert signal.getsignal(which) is interrupt
    finally:
        signal.signal(which, before)
    assert len(started) == 1
    assert started[0].exitcode == -signal.SIGTERM
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_that_cannot_be_started_leaves_none_behind(config, monkeypatch):
    def start(process):
        if started:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        original(process)
        started.append(process)

    original, started = SpawnProcess.start, []
    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(OSError, match="Cannot allocate"):
        Processes(Graph.of(find_runs(chains(), 0.2)), config, ["cpu"], 2)
    assert started[0].exitcode == -signal.SIGTERM
