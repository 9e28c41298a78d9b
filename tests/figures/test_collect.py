"""Rows from published runs: layerwise ratios and their distance by hand, diverged runs, layers that died."""

import pytest
import torch
from torch import nn

from fastprune.figures import load
from fastprune.figures.collect import collect, remark
from fastprune.figures.figure import LprPoint, Panel, Point, Series, find_points
from fastprune.specs import ChannelSelection, DataSpec, LprHistory
from fastprune.store import RunStore, lpr_name, write_csv
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.settings import preset
from fastprune.training.trainer import Trainer

DATA = DataSpec("made up", "f" * 64, 4, None, None, 24, 8)
SETTINGS = preset(load("A4").protocol, "smoke").override(seeds=1, epochs=2, fraction=0.5, rounds=2)
FOUND = Panel("a", "", SETTINGS, (Series("0.5", "", MaskRecipe(0.5), 0.5),))
DENSE = Chains(SETTINGS, DATA, 0).dense(0.5)
TRACE = LprHistory(DENSE, 0.5)


def three_layers() -> nn.Module:
    """Convs of 4, 6 and 10 weights."""
    convs = [nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(5, 2, 1, bias=False)]
    return nn.ModuleDict(dict(zip("abc", convs, strict=True)))


def ratios(model: nn.Module) -> dict[str, float]:
    return Trainer(model).preview_prune(0.5).layerwise_ratios()


def test_the_lpr_of_three_layers_by_hand():
    """Half of 20 weights go. First a keeps all and c loses nine; then, its weights grown, c keeps all but b none."""
    model = three_layers()
    with torch.no_grad():
        model["a"].weight.copy_(torch.tensor([10.0, -20.0, 30.0, -40.0]).view(2, 2, 1, 1))
        model["b"].weight.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0]).view(3, 2, 1, 1))
        model["c"].weight.copy_(torch.tensor([-0.1, 0.2, -0.3, 0.4, -0.5, 0.6, -0.7, 0.8, -0.9, 7.0]).view(2, 5, 1, 1))
    before = ratios(model)
    assert before == {"a.weight": 0.0, "b.weight": pytest.approx(1 / 6), "c.weight": pytest.approx(9 / 10)}
    with torch.no_grad():
        model["c"].weight.mul_(1000)
    after = ratios(model)  # b's six go, and a's 10, -20, 30, -40
    assert after == {"a.weight": 1.0, "b.weight": 1.0, "c.weight": 0.0}


def published(tmp_path, rows, diverged=False) -> RunStore:
    store = RunStore(tmp_path)
    result = {"epochs": len(rows) - 1, "diverged": diverged, "accuracy": None if diverged else 0.5}
    store.publish(DENSE, result, {}, {lpr_name(0.5): lambda p: write_csv(p, rows)})
    return store


BY_HAND = [
    {"epoch": 0, "a.weight": 0.0, "b.weight": 0.25, "c.weight": 1.0},
    {"epoch": 1, "a.weight": 0.5, "b.weight": 0.25, "c.weight": 0.5},
    {"epoch": 2, "a.weight": 0.75, "b.weight": 0.0, "c.weight": 0.625},
]


def test_ratios_and_their_distance_by_hand(tmp_path):
    store = published(tmp_path, BY_HAND)
    layers = collect("A4", [LprPoint("a", None, 0, 0.5, TRACE)], store)
    assert {(r.series, r.round): (r.x, r.y) for r in layers} == {
        (layer, row["epoch"]): (float(row["epoch"]), row[f"{layer}.weight"]) for row in BY_HAND for layer in "abc"
    }
    assert {(r.series, r.round): r.dead for r in layers if r.dead} == {("c", 0): 1}
    distance = collect("A5", [LprPoint("a", "0.5", 0, 0.5, TRACE)], store)
    # Epoch 0: 0.75, 0.25 and 0.375 from the end; epoch 1: 0.25, 0.25 and 0.125.
    assert [r.y for r in distance] == [pytest.approx(1.375 / 3), pytest.approx(0.625 / 3), 0.0]
    assert [r.dead for r in distance] == [1, 0, 0]


def test_a_run_that_diverged_has_ratios_up_to_there_and_no_distance(tmp_path):
    store = RunStore(tmp_path)
    rows = BY_HAND[:2]
    result = {"epochs": 2, "diverged": True, "accuracy": None}
    store.publish(DENSE, result, {}, {lpr_name(0.5): lambda p: write_csv(p, rows)})
    layers = collect("A4", [LprPoint("a", None, 0, 0.5, TRACE)], store)
    assert {(r.series, r.round) for r in layers if r.diverged} == {("a", 2), ("b", 2), ("c", 2)}
    distance = collect("A5", [LprPoint("a", "0.5", 0, 0.5, TRACE)], store)
    assert [r.y for r in distance] == [None, None, None]


def test_layers_that_died_are_counted_and_missing_runs_are_left_out(tmp_path):
    chains, store = Chains(SETTINGS, DATA, 0), RunStore(tmp_path)
    points = list(find_points(FOUND, chains))
    assert collect("A6", points, store) == []
    first, second = points
    store.publish(first.node, {"epochs": 2, "diverged": False, "accuracy": 0.5}, {}, {})
    mask = {"round": 1, "total": 8, "kept": 4, "density": 0.5, "layerwise_ratios": {"a": 1.0, "b": 0.25, "c": 1.0}}
    store.publish(second.node.mask, mask, {}, {})
    store.publish(second.node, {"epochs": 1, "diverged": True, "accuracy": None}, {}, {})
    rows = collect("A6", points, store)
    assert [(r.round, r.x, r.y, r.dead, r.diverged) for r in rows] == [(0, 1.0, 0.5, 0, False), (1, 0.5, None, 2, True)]


def test_accuracy_at_an_epoch_is_that_of_the_epoch(tmp_path):
    from dataclasses import replace

    store = RunStore(tmp_path)
    metrics = [{"epoch": 1, "val_accuracy": 0.25}, {"epoch": 2, "val_accuracy": float("nan")}]
    result = {"epochs": 2, "diverged": True, "accuracy": None}
    store.publish(DENSE, result, {}, {"metrics.csv": lambda p: write_csv(p, metrics)})
    point = next(find_points(FOUND, Chains(SETTINGS, DATA, 0)))
    found = [collect("A6", [replace(point, epoch=epoch)], store)[0].y for epoch in (1, 2)]
    assert found == [0.25, None]


def test_latency_is_what_rounds_agree_on_and_its_spread_is_told(tmp_path):
    store = RunStore(tmp_path)
    store.publish(DENSE, {"epochs": 2, "diverged": False, "accuracy": 0.5}, {}, {})
    points = []
    for fraction, relative, spared in ((0.5, 0.8, []), (0.9, 0.4, ["conv1", "conv2"])):
        node = ChannelSelection(DENSE.final, fraction)
        result = {"fraction": fraction, "removed_fraction": fraction, "spared": spared, "groups": 36}
        result |= {"parameters": 9, "flops": 90}
        timed = {"latency_ms": 3.0, "latency_whole_ms": 6.0, "latency_batch": 8}
        paired = {"latency_relative": relative, "latency_rounds": 60}
        # Half of the ratios within 0.02: 2.5 % of 0.8 and 5 % of 0.4, 3.75 % in the middle.
        timed |= paired | {"latency_quartiles": [relative - 0.02, relative + 0.02]}
        store.publish(node, result, timed, {})
        points.append(Point("d", "0.5", 0, len(points), 0.5, 0.5, DENSE, x="latency", selection=node))
    assert [row.x for row in collect("structured", points, store)] == [0.8, 0.4]
    said = remark(points, store)
    timed, kept = said.split(" Each ")
    assert timed == (
        "The dense network takes 6 ms for a batch of 8. "
        "A latency is the median of 60 ratios to it, timed in turn; half of them lie within 3.8 %."
    )
    assert kept == "of 36 groups of filters keeps at least one; by rank none would stay in 2 at 90 %."


def test_latency_of_nodes_without_rounds_is_that_of_the_medians(tmp_path):
    store, node = RunStore(tmp_path), ChannelSelection(DENSE.final, 0.5)
    store.publish(DENSE, {"epochs": 2, "diverged": False, "accuracy": 0.5}, {}, {})
    timed = {"latency_ms": 3.0, "latency_whole_ms": 6.0, "latency_batch": 64}
    store.publish(
        node, {"fraction": 0.5, "removed_fraction": 0.5, "spared": [], "parameters": 9, "flops": 90}, timed, {}
    )
    point = Point("d", "0.5", 0, 1, 0.5, 0.5, DENSE, x="latency", selection=node)
    assert [row.x for row in collect("structured", [point], store)] == [0.5]
    assert remark([point], store) == "The dense network takes 6 ms for a batch of 64."
