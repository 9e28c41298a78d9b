"""The scheduler, with workers that die, runs that fail, and a data set of tensors in place of images."""

import shutil
import threading
from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.figures.paper import A2
from fastprune.files import read_tensors, write_tensors
from fastprune.loaders.manifest import Manifest
from fastprune.specs import DataSpec, Prune, Train
from fastprune.store import RequestedOutputs, RunStore
from fastprune.store.lease import Leases
from fastprune.study import compute
from fastprune.study import run as run_module
from fastprune.study.chains import Chains
from fastprune.study.compute import NodeComputer, WorkConfig
from fastprune.study.graph import Graph, Schedule
from fastprune.study.settings import preset
from tests.fakes import Images, Silent, eval_runs, find_runs, made_up_options, masks, run_here

SETTINGS = preset(A2.protocol, "smoke").override(seeds=1, rounds=2, fraction=0.6, epochs=3, batch_size=8)
DATA = DataSpec("fake", "f" * 64, 4, None, None, 24, 8)


@pytest.fixture
def config(tmp_path, monkeypatch) -> WorkConfig:
    monkeypatch.setattr(compute, "open_data", lambda *args, **kwargs: Images())
    manifest = Manifest.__new__(Manifest)  # nothing looks into it
    return WorkConfig(tmp_path, {DATA.fingerprint: compute.Images(manifest, None, "fake")}, checkpoint_seconds=0.0)


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
    outcome = run_here(graph, config, view)
    assert outcome.done == [n.key for n in graph.nodes]
    store = RunStore(config.store)
    first, second = (store.node(m)["result"] for m in masks(c, 0.2))
    assert first["kept"] == first["total"] - round(0.6 * first["total"])
    assert second["kept"] == first["kept"] - round(0.6 * first["kept"])
    assert view.images == 2 * 3 * 24
    assert (store.path(masks(c, 0.2)[0]) / "layers.csv").read_text().startswith("layer,weights,kept")
    assert not list((config.store / "partial").iterdir())
    assert run_here(graph, config, Silent()).done == []


def test_only_what_is_missing_is_computed(config):
    c = chains()
    graph = Graph.of(eval_runs(c, None, 0.5))
    run_here(Graph.of(eval_runs(c, None, 0.5)[:2]), config, Silent())
    view = Silent()
    run_here(graph, config, view)
    assert {n.key for n in view.finished_nodes} == {eval_runs(c, None, 0.5)[2].key, masks(c, None)[1].key}


class Killed(BaseException):
    """What a SIGKILL looks like to a test that wants to go on."""


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
            run_here(graph, config, Silent())
    view = Silent()
    run_here(graph, config, view)
    assert view.images == 2 * 24
    lines = (RunStore(config.store).path(run) / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3"]
    made = RunStore(config.store).node(run)["provenance"]
    assert [(part["from"], part["to"]) for part in made["parts"]] == [(0, 1), (1, run.stop)]
    assert {part["code"] for part in made["parts"]} == {made["code"]}


def interrupted(node: Train, config: WorkConfig) -> NodeComputer:
    """The computer of a node that was interrupted in its second epoch; the node's parents are published."""
    run_here(Graph.of(node.parents()), config, Silent())

    def report(epoch, images, how=""):
        if epoch == 1 and images:
            raise Killed

    with pytest.raises(Killed):
        (computer := NodeComputer(config)).compute_node(node, RequestedOutputs(), report)
    return computer


def resumed(node: Train, config: WorkConfig) -> dict:
    """The provenance of the node after a new process has resumed it."""
    NodeComputer(config).compute_node(node, FINAL, lambda *_: None)
    return RunStore(config.store).node(node)["provenance"]


FINAL = RequestedOutputs(weights=(3,), momentum=(3,))


@pytest.mark.parametrize(
    ("first", "then"), [("plain", "dense"), pytest.param("sparse", "dense", marks=pytest.mark.slow)]
)
def test_a_resumed_run_computes_as_until_its_checkpoint_to_the_bit(config, tmp_path, capsys, first, then):
    node = eval_runs(chains(width=4), None, 0.5)[1]
    interrupted(node, replace(config, compute=first))
    made = resumed(node, replace(config, compute=then))
    assert [part["compute"] for part in made["parts"]] == [first, first] == [made["compute"]] * 2
    assert f"training {node.key[:8]} goes on {first}, as until its checkpoint, not {then}\n" in capsys.readouterr().err

    whole = replace(config, store=tmp_path / "whole", compute=first)
    run_here(Graph.of(node.parents()), whole, Silent())
    assert "parts" not in resumed(node, whole)
    assert capsys.readouterr().err == ""
    assert contents(RunStore(whole.store)) == contents(RunStore(config.store))


@pytest.mark.parametrize(
    ("precision", "says", "ways", "said"),
    [
        ("fp32", None, [None, "plain"], ""),  # of an older version
        (
            "bf16",
            "sparse",
            ["sparse", "plain"],
            "computed sparse until its checkpoint, plain from here (precision bf16)",
        ),
        ("fp32", "abacus", None, "unusable checkpoint"),
    ],
)
def test_what_a_checkpoint_says_and_this_machine_cannot_do(config, capsys, precision, says, ways, said):
    config = replace(config, compute="plain")
    node = eval_runs(chains(width=4, precision=precision), None, 0.5)[1]
    interrupted(node, config)
    path = RunStore(config.store).partial_path(node, "checkpoint")
    tensors, facts = read_tensors(path)
    assert facts["parts"][-1].pop("compute") == "plain"
    facts["parts"][-1] |= {} if says is None else {"compute": says}
    write_tensors(path, tensors, facts)
    made = resumed(node, config)
    assert [part.get("compute") for part in made.get("parts", ())] == (ways or [])
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == bool(said)


@pytest.fixture
def options(monkeypatch):
    return made_up_options(monkeypatch)


USED = "fused_norm=on,gradient_table=off,fused_loss=on"


def test_gpu_options_are_timed_once_and_then_those_of_the_store(config, options, capsys):
    nodes = eval_runs(chains(width=4), None, 0.5)[:2]
    run_here(Graph.of(nodes), config, Silent())
    timed = len(options.ran)
    assert timed == 3 * 2 * 2
    assert capsys.readouterr().err.count("GPU options") == 1
    assert [len(list(path.iterdir())) for path in (config.store / "choices").iterdir()] == [1]
    other = eval_runs(chains(width=4), None, 0.3)[0]
    run_here(Graph.of([other]), config, Silent())  # by another worker
    assert len(options.ran) == timed
    said = capsys.readouterr().err
    assert said.endswith(f"(kept in {config.store / 'choices'})\n")
    assert said.count("\n") == 1
    assert [RunStore(config.store).node(n)["provenance"]["gpu_options"] for n in [*nodes, other]] == [USED] * 3


def test_a_resumed_run_has_the_gpu_options_of_its_checkpoint_to_the_bit(config, options, tmp_path, capsys):
    node = eval_runs(chains(width=4), None, 0.5)[0]
    interrupted(node, config)
    shutil.rmtree(config.store / "choices")
    options.ms["fused_norm"] = 1.0  # another machine, on which it is slower
    capsys.readouterr()
    made = resumed(node, config)
    assert [part["gpu_options"] for part in made["parts"]] == [USED] * 2
    assert capsys.readouterr().err == ""
    options.ms["fused_norm"] = -1.0
    whole = replace(config, store=tmp_path / "whole")
    assert resumed(node, whole)["gpu_options"] == USED
    assert contents(RunStore(whole.store)) == contents(RunStore(config.store))


@pytest.mark.parametrize(
    ("says", "forced", "used", "said"),
    [
        (USED, {"fused_norm": False}, "fused_norm=off,gradient_table=off,fused_loss=on", " until its checkpoint, "),
        (None, {}, USED, "GPU options for batches"),  # of an older version, or of a CPU
        ("fused_nose=on", {}, USED, "unusable checkpoint"),
    ],
)
def test_gpu_options_that_are_forced_unknown_or_not_said(config, options, capsys, says, forced, used, said):
    node = eval_runs(chains(width=4), None, 0.5)[0]
    interrupted(node, config)
    path = RunStore(config.store).partial_path(node, "checkpoint")
    tensors, facts = read_tensors(path)
    assert facts["parts"][-1].pop("gpu_options") == USED
    facts["parts"][-1] |= {} if says is None else {"gpu_options": says}
    write_tensors(path, tensors, facts)
    capsys.readouterr()
    assert resumed(node, replace(config, gpu_options=forced))["gpu_options"] == used
    assert said in capsys.readouterr().err


def test_gpu_options_are_no_part_of_a_key_and_not_for_a_cpu(config):
    node = eval_runs(chains(width=4), None, 0.5)[0]
    run_here(Graph.of([node]), replace(config, gpu_options={"fused_norm": False}), Silent())
    assert "gpu_options" not in RunStore(config.store).node(node)["provenance"]
    assert not (config.store / "choices").exists()
    other = eval_runs(chains(width=4), None, 0.3)[0]
    with pytest.raises(InputError, match="--gpu-options fused_norm=on requires a GPU"):
        run_here(Graph.of([other]), replace(config, gpu_options={"fused_norm": True}), Silent())


def test_sparse_where_no_node_can_be_ends_the_run(config):
    node = eval_runs(chains(width=4, precision="bf16"), None, 0.5)[0]
    with pytest.raises(InputError, match="--compute sparse is not possible here: precision bf16"):
        run_here(Graph.of([node]), replace(config, compute="sparse"), Silent())


def test_how_a_training_computes_is_seen_and_recorded(config):
    c = chains()
    dense, masked = eval_runs(c, None, 0.5)[:2]
    view = Silent()
    run_here(Graph.of([dense, masked]), config, view)
    why = "a training of 9 steps is too short"
    assert view.how == {masked.key: f"computes densely: {why}"}  # of a dense network there is nothing to say
    made = RunStore(config.store).node(masked)["provenance"]
    assert (made["compute"], made["not_sparse"]) == ("dense", why)


def test_a_corrupt_checkpoint_is_said_and_the_run_starts_again(config, capsys):
    run = find_runs(chains(), 0.2)[0]
    store = RunStore(config.store)
    store.save_partial(run, "checkpoint", lambda p: p.write_bytes(b"corrupt"))
    view = Silent()
    run_here(Graph.of([run]), config, view)
    assert view.images == 3 * 24
    assert "unusable checkpoint" in capsys.readouterr().err


def test_divergence_is_a_result(config):
    c = chains(lr_find=(1e30,))
    graph = Graph.of(eval_runs(c, 1e30, 0.5))
    view = Silent()
    outcome = run_here(graph, config, view)
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
    original = NodeComputer._train

    def fail_on_find(self, node, states, report):
        if node.schedule.lr == 0.2:
            raise RuntimeError("planted")
        return original(self, node, states, report)

    with monkeypatch.context() as patch:
        patch.setattr(NodeComputer, "_train", fail_on_find)
        view = Silent()
        outcome = run_here(graph, config, view)
    assert list(outcome.failed) == [find_runs(c, 0.2)[0].key]
    assert outcome.blocked == 2
    assert "planted" in view.failures[0][1]
    log = next((config.store / "logs").iterdir()).read_text()
    assert "Traceback" in log
    assert len(outcome.done) == 5
    assert run_here(graph, config, Silent()).failed == {}


def test_a_full_disk_is_bad_input(config, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(compute, "write_csv", full)
    with pytest.raises(InputError, match="No space left") as error:
        run_here(Graph.of(find_runs(chains(), 0.2)[:1]), config, Silent())
    assert "\n" not in str(error.value)
    assert not list((config.store / "tmp").iterdir())


def test_a_corrupt_mask_says_what_to_delete_and_then_is_made_again(config):
    c = chains()
    first = masks(c, None)[0]
    run_here(Graph.of([first]), config, Silent())
    store = RunStore(config.store)
    (store.path(first) / "mask.safetensors").write_bytes(b"")
    graph = Graph.of(eval_runs(c, None, 0.5)[:2])
    with pytest.raises(InputError, match=f"delete the folder {store.path(first)}"):
        run_here(graph, config, Silent())
    shutil.rmtree(store.path(first))
    assert run_here(graph, config, Silent()).failed == {}


def test_what_another_process_published_is_not_counted_as_done_here(config, monkeypatch):
    run = find_runs(chains(), 0.2)[0]
    run_here(Graph.of([run]), config, Silent())
    monkeypatch.setattr(Graph, "todo", lambda self, store: list(self.nodes))  # it looked before that was published
    outcome = run_here(Graph.of([run]), config, Silent())
    assert (outcome.done, outcome.found, outcome.epochs) == ([], [run.key], {})


def test_an_unknown_allocation_is_no_global_mask(config):
    prune = replace(masks(chains(), None)[0], allocation="by moonlight")
    outcome = run_here(Graph.of([prune]), config, Silent())
    assert "by moonlight" in outcome.failed[prune.key]


def test_the_longest_chain_goes_first():
    c = chains(rounds=3)
    graph = Graph.of([*eval_runs(c, None, 0.5), *find_runs(c, 0.2)])
    schedule = Schedule(graph, graph.nodes)
    first, second, *_ = schedule.ready()
    assert first == find_runs(c, 0.2)[0]
    assert isinstance(second, Prune)
    schedule.take(first)
    assert schedule.ready()[0] == second
    schedule.done(first)
    assert schedule.ready()[0] == masks(c, 0.2)[0]


def test_a_node_that_another_process_computes_is_waited_for(config, monkeypatch):
    run = find_runs(chains(), 0.2)[0]
    monkeypatch.setattr(run_module, "_LOOK_AGAIN", (0.01, 0.1))
    RunStore(config.store)
    view, released, started = Silent(), threading.Event(), []
    monkeypatch.setattr(view, "started", lambda *about: started.append(released.is_set()))
    with Leases(config.store / "leases") as other:
        assert other.acquire(run.key) == (True, None)

        def release():
            released.set()
            other.release(run.key)

        threading.Timer(0.5, release).start()
        assert run_here(Graph.of([run]), config, view).done == [run.key]
    assert started == [True]
    assert view.notes == []
    assert list((config.store / "leases").iterdir()) == []
