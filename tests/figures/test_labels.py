"""The names of runs in plans, bars and error messages."""

import pytest

from fastprune.cli.reproduce import main
from fastprune.figures import FIGURES, load
from fastprune.figures.figure import Figure, build_graph
from fastprune.specs import DataSpec
from fastprune.study.settings import preset

DATA = DataSpec("x", "f" * 64, 10, None, None, 1280, 300)


def labels_of(figure: Figure, preset_name: str = "smoke", **changes) -> list[str]:
    settings = preset(figure.protocol, preset_name, figure.presets).override(**changes)
    _, graph = build_graph(figure, settings, DATA)
    return [graph.label(node) for node in graph.nodes]


@pytest.mark.parametrize("preset_name", ["smoke", "paper"])
@pytest.mark.parametrize("name", FIGURES)
def test_every_node_of_a_figure_has_a_name_of_its_own(name, preset_name):
    labels = labels_of(load(name), preset_name, seeds=2)
    assert len(set(labels)) == len(labels)
    assert all(label.startswith(f"{name} ") and " · seed " in label for label in labels)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A1", ["find · LR_find 0.02 · seed 0 · round 0", "eval 0.5 · LR_find 0.1 · seed 0 · round 3"]),
        ("A2", ["eval 0.5 · random pruning · seed 0 · round 3", "prune · LR_find 0.8 · seed 0 · round 1"]),
        ("A4", ["dense · LR 0.5 · seed 0"]),
        (
            "A6",
            [
                "find · LR_find 0.05 · pruned at epoch 20 · seed 0 · round 0",
                "find · LR_find 0.2 · pruned at epoch 70 · seed 0 · round 2",
                "prune · LR_find 0.2 · pruned at epoch 110 · seed 0 · round 3",
                "eval 0.5 · LR_find 0.05 · pruned at epoch 50 · seed 0 · round 3",
            ],
        ),
        ("transplant", ["eval 0.5 · LR_find 0.5, ratios of 0.05 · seed 0 · round 3"]),
        (
            "variants",
            [
                "eval 0.5 · LR_find 0.2 · seed 0 · round 3",
                "eval 0.5 · LR_find 0.2 · Warmup (5 epochs) · seed 0 · round 3",
                "find · LR_find 0.05 · Late rewinding (epoch 2) · seed 0 · round 2",
                "prune · LR_find 0.05 · Fine-tuning · seed 0 · round 3",
            ],
        ),
        (
            "structured",
            [
                "filters · LR_find 0.05 · seed 0 · 30 % of filters removed",
                "eval 0.1 · LR_find 0.5 · seed 0 · 90 % of filters removed",
            ],
        ),
    ],
)
def test_a_run_is_named_by_what_it_is(name, expected):
    few = {"rounds": 3} if "rounds" in load(name).uses else {}
    labels = labels_of(load(name), "paper", seeds=1, **few)
    assert {f"{name} {label}" for label in expected} <= set(labels)


def test_the_plan_of_a6_calls_a_prune_epoch_so(tmp_path, capsys):
    command = ["--fig", "A6", "--plan", "--gpus", "8", "--images-per-second", "9", "--store", str(tmp_path / "none")]
    assert main(command) == 0
    chain = next(line for line in capsys.readouterr().out.splitlines() if "longest chain" in line and " to " in line)
    assert chain.endswith("to A6 eval 0.5 · LR_find 0.05 · pruned at epoch 4 · seed 0 · round 3")
