"""What chains leave in the store: smaller networks, histories, momentum where a run goes on from it."""

import pytest

from fastprune.figures import load
from fastprune.loaders.manifest import Manifest
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Rewind
from fastprune.store import RunStore
from fastprune.study import compute
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import NodeComputer, WorkConfig
from fastprune.study.graph import Graph
from fastprune.study.settings import preset
from tests.fakes import Images, Silent, run_here

DATA = DataSpec("fake", "f" * 64, 4, None, None, 24, 8)
SMALL = {"seeds": 1, "epochs": 3, "batch_size": 8, "width": 4}


def chains(**changes) -> Chains:
    return Chains(preset(load("A2").protocol, "smoke").override(rounds=2, fraction=0.5, **SMALL, **changes), DATA, 0)


def structured() -> Graph:
    """A smaller network, fine-tuned."""
    chains = Chains(preset(load("structured").protocol, "smoke").override(**SMALL), DATA, 0)
    dense = chains.dense(0.1)
    filters = ChannelSelection(dense.final, 0.5)
    return Graph.of([chains.train(0.05, filters, Rewind(dense.final, 0, momentum=False))])


@pytest.fixture
def config(tmp_path, monkeypatch) -> WorkConfig:
    monkeypatch.setattr(compute, "open_data", lambda *args, **kwargs: Images())
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "height", 32)  # all that is looked at
    images = {DATA.fingerprint: compute.Images(manifest, None, "fake")}
    return WorkConfig(tmp_path / "store", images, checkpoint_seconds=0.0)


def test_a_smaller_network_is_what_is_trained(config):
    graph = structured()
    run_here(graph, config, Silent())
    store, (dense, filters, tuned) = RunStore(config.store), graph.nodes
    result = store.node(filters)["result"]
    assert result["removed"] == round(0.5 * result["channels"])
    assert result["parameters"] < result["parameters_whole"]
    assert result["flops"] < result["flops_whole"]
    measured = store.node(filters)["provenance"]
    assert measured["latency_ms"] > 0 < measured["latency_whole_ms"]
    low, high = measured["latency_quartiles"]
    assert 0 < low <= measured["latency_relative"] <= high
    assert measured["latency_rounds"] * measured["latency_batch"] > 0
    worker = NodeComputer(config)
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
    run_here(Graph.of([dense]), config, Silent())
    store = RunStore(config.store)
    before = (store.path(dense) / "metrics.csv").read_bytes()
    graph = Graph.of([LprHistory(dense, 0.5)])
    assert graph.todo(store) == [dense]
    run_here(graph, config, Silent())
    assert (store.path(dense) / "metrics.csv").read_bytes() == before
    assert list(store.lpr_history(LprHistory(dense, 0.5))) == [0, 1, 2, 3]
    assert graph.todo(store) == []


def test_the_run_that_is_pruned_first_leaves_its_trace_unasked(config):
    c = chains()
    source = MaskRecipe(0.05)
    run_here(Graph.of([c.masks(source)[0]]), config, Silent())
    store = RunStore(config.store)
    assert Graph.of([LprHistory(c.dense(0.05), 0.5)]).todo(store) == []
    last = store.lpr_history(LprHistory(c.dense(0.05), 0.5))[3]
    assert last == store.node(c.masks(source)[0])["result"]["layerwise_ratios"]


def test_momentum_is_kept_only_where_a_run_goes_on_from_it(config):
    c = chains(rewind="late")
    run = c.eval_run(MaskRecipe(0.05), 1, 0.1)
    run_here(Graph.of([run]), config, Silent())
    store = RunStore(config.store)
    kept = sorted(p.name for p in store.path(c.dense(0.05)).glob("*.safetensors"))
    late = c.settings.late_epoch
    assert kept == [f"momentum-{late}.safetensors", f"state-{late}.safetensors", "state-3.safetensors"]
