"""Chains of every kind, killed at many moments: rewinding from stored states, transplanted ratios, smaller networks."""

import json
from dataclasses import replace

import pytest

from fastprune.figures import load
from fastprune.loaders.manifest import Manifest
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Rewind
from fastprune.store import RunStore
from fastprune.study import compute
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import WorkConfig, Worker
from fastprune.study.graph import Graph
from fastprune.study.run import execute
from fastprune.study.settings import preset
from tests.fakes import Images, Silent

DATA = DataSpec("made up", "f" * 64, 4, None, None, 24, 8)
SMALL = {"seeds": 1, "epochs": 3, "batch_size": 8, "width": 4}
MADE_HERE = ("latency_ms", "latency_whole_ms")  # measured: no two calls agree


class Killed(BaseException):
    """What a SIGKILL looks like to a test that wants to go on."""


def chains(**changes) -> Chains:
    return Chains(preset(load("A2").protocol, "smoke").override(rounds=2, fraction=0.5, **SMALL, **changes), DATA, 0)


def graphs() -> dict[str, Graph]:
    source = MaskRecipe(0.05)
    kinds = {
        name: Graph.of([(c := chains(rewind=name)).eval_run(source, 2, 0.1), LprHistory(c.dense(0.05), 0.5)])
        for name in ("late", "lr", "finetune")
    }
    taker = MaskRecipe(0.2, ratios_of=0.05)
    kinds["transplant"] = Graph.of([chains().eval_run(taker, 2, 0.2)])
    structured = Chains(preset(load("structured").protocol, "smoke").override(**SMALL), DATA, 0)
    dense = structured.dense(0.1)
    filters = ChannelSelection(dense.final, 0.5)
    kinds["structured"] = Graph.of([structured.train(0.05, filters, Rewind(dense.final, 0, momentum=False))])
    return kinds


@pytest.fixture
def config(tmp_path, monkeypatch) -> WorkConfig:
    monkeypatch.setattr(compute, "open_data", lambda *args, **kwargs: Images())
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "height", 32)  # all that is looked at
    images = {DATA.fingerprint: compute.Images(manifest, None, "made up")}
    return WorkConfig(tmp_path / "store", images, checkpoint_seconds=0.0)


def contents(store: RunStore) -> dict[str, object]:
    """All that a run may not change: files without times, and results without what is measured."""
    found: dict[str, object] = {}
    for path in sorted(store.root.glob("nodes/*/*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name in ("times.csv", "SHA256SUMS"):
            continue
        if path.name == "node.json":
            result = json.loads(path.read_text())["result"]
            found[name] = {k: v for k, v in result.items() if k not in MADE_HERE}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["late", "lr", "finetune", "transplant", "structured"])
def test_killed_again_and_again_it_ends_the_same(config, monkeypatch, kind):
    graph = graphs()[kind]
    whole = replace(config, store=config.store.with_name("whole"))
    assert execute(graph, whole, Silent()).failed == {}
    calls = 0

    def killing(original):
        def wrapped(self, node, products, report):
            def counted(epoch, images):
                nonlocal calls
                calls += 1
                if calls % 7 == 0:
                    raise Killed
                report(epoch, images)

            return original(self, node, products, counted)

        return wrapped

    deaths = 0
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", killing(Worker.run))
        for _ in range(60):
            try:
                outcome = execute(graph, config, Silent())
                break
            except Killed:
                deaths += 1
    assert outcome.failed == {}
    assert deaths > 3
    assert contents(RunStore(config.store)) == contents(RunStore(whole.store))
    assert not list((config.store / "partial").iterdir())


def test_a_smaller_network_is_what_is_trained(config):
    graph = graphs()["structured"]
    execute(graph, config, Silent())
    store, (dense, filters, tuned) = RunStore(config.store), graph.nodes
    result = store.node(filters)["result"]
    assert result["removed"] == round(0.5 * result["channels"])
    assert result["parameters"] < result["parameters_whole"]
    assert result["flops"] < result["flops_whole"]
    assert result["latency_ms"] > 0 < result["latency_whole_ms"]
    worker = Worker(config)
    rows = (store.path(filters) / "layers.csv").read_text().splitlines()[1:]
    kept = {name: int(count) for name, _, count in (row.split(",") for row in rows)}
    with worker._trainer(tuned) as trainer:
        assert sum(p.numel() for p in trainer.model.parameters()) == result["parameters"]
        found = {name: module.out_channels for name, module in trainer.model.named_modules() if name in kept}
    assert found == kept
    assert list(store.metrics(tuned)) == [1, 2, 3]
    assert store.node(dense)["result"]["epochs"] == 3


def test_a_trace_that_is_missing_is_made_by_training_again_and_nothing_else_changes(config):
    c = chains()
    dense = c.dense(0.05)
    execute(Graph.of([dense]), config, Silent())
    store = RunStore(config.store)
    before = (store.path(dense) / "metrics.csv").read_bytes()
    graph = Graph.of([LprHistory(dense, 0.5)])
    assert graph.todo(store) == [dense]
    execute(graph, config, Silent())
    assert (store.path(dense) / "metrics.csv").read_bytes() == before
    assert list(store.lpr_history(LprHistory(dense, 0.5))) == [0, 1, 2, 3]
    assert graph.todo(store) == []


def test_the_run_that_is_pruned_first_leaves_its_trace_unasked(config):
    c = chains()
    source = MaskRecipe(0.05)
    execute(Graph.of([c.masks(source)[0]]), config, Silent())
    store = RunStore(config.store)
    assert Graph.of([LprHistory(c.dense(0.05), 0.5)]).todo(store) == []
    last = store.lpr_history(LprHistory(c.dense(0.05), 0.5))[3]
    assert last == store.node(c.masks(source)[0])["result"]["layerwise_ratios"]


def test_momentum_is_kept_only_where_a_run_goes_on_from_it(config):
    c = chains(rewind="late")
    run = c.eval_run(MaskRecipe(0.05), 1, 0.1)
    execute(Graph.of([run]), config, Silent())
    store = RunStore(config.store)
    kept = sorted(p.name for p in store.path(c.dense(0.05)).glob("*.safetensors"))
    late = c.settings.late_epoch
    assert kept == [f"momentum-{late}.safetensors", f"state-{late}.safetensors", "state-3.safetensors"]
