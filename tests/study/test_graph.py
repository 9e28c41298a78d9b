"""Nodes, keys and counts: what is shared, what a change of any field changes."""

from dataclasses import fields, replace

import pytest

from fastprune.errors import InputError
from fastprune.figures import load
from fastprune.figures.figure import points_of
from fastprune.figures.paper import A2
from fastprune.specs import DataSpec, Init, ModelSpec, OptimizerSpec, Prune, ScheduleSpec, StateRef, Train, n_to_prune
from fastprune.study.chains import Chains
from fastprune.study.graph import Cost, Graph
from fastprune.study.settings import PRESETS, preset
from tests.fakes import eval_runs, find_runs, masks

DATA = DataSpec("tiny-imagenet", "f" * 64, 200, None, None, 100_000, 10_000)
PAPER = preset(A2.protocol, "paper")
SMALL = PAPER.override(seeds=2, rounds=3, epochs=4)


def graph(settings=SMALL) -> Graph:
    return Graph.of([p.node for p in points_of(A2, settings, DATA)])


def test_the_paper_is_302_trainings_a_seed():
    cost = Cost.of(graph(PAPER).nodes)
    assert cost.per_seed == dict.fromkeys(range(5), 302)
    assert (cost.trainings, cost.epochs) == (1510, 166_100)
    assert cost.images == 166_100 * 195 * 512


def test_every_node_stands_once_and_after_its_parents():
    seen = set()
    for node in graph().nodes:
        assert node.key not in seen
        assert {p.key for p in node.parents()} <= seen
        seen.add(node.key)


def test_an_eval_run_at_its_find_rate_is_the_find_run():
    chains = Chains(SMALL, DATA, 0)
    assert [n.key for n in find_runs(chains, 0.8)] == [n.key for n in eval_runs(chains, 0.8, 0.8)[:-1]]
    assert eval_runs(chains, 0.2, 0.5)[0].key == eval_runs(chains, None, 0.5)[0].key
    assert eval_runs(chains, 0.2, 0.5)[1].key != eval_runs(chains, None, 0.5)[1].key


def test_random_masks_rest_on_no_training():
    nodes = Graph.of(masks(Chains(SMALL, DATA, 0), None)).nodes
    assert [type(n) for n in nodes] == [Prune] * 3
    assert [n.round for n in nodes] == [1, 2, 3]


def other_values():
    """A train and a prune node, and the same with each semantic field changed in turn."""
    chains = Chains(SMALL, DATA, 0)
    train, prune = find_runs(chains, 0.2)[1], masks(chains, 0.2)[1]
    yield "train.data.fingerprint", train, replace(train, data=replace(DATA, fingerprint="0"))
    yield "train.data.classes", train, replace(train, data=replace(DATA, classes=10))
    yield "train.data.train_per_class", train, replace(train, data=replace(DATA, train_per_class=3))
    yield "train.data.val_per_class", train, replace(train, data=replace(DATA, val_per_class=3))
    for f in fields(ModelSpec):
        value = {"name": "resnet50", "classes": 3, "stem": "cifar", "width": 8}[f.name]
        changed = replace(train.model, **{f.name: value})
        yield f"train.model.{f.name}", train, replace(train, start=Init(changed, 0))
    yield "train.start.seed", train, replace(train, start=Init(train.model, 1))
    yield "train.mask", train, replace(train, mask=None)
    yield "train.mask's parents", train, replace(train, mask=masks(chains, 0.05)[0])
    for f in fields(OptimizerSpec):
        value = {
            "batch_size": 8, "momentum": 0.25, "weight_decay": 0.25, "nesterov": True, "label_smoothing": 0.25,
            "name": "adamw", "other_decays": (("norm", 0.0),), "clip_grad_norm": 1.0,
        }[f.name]  # fmt: skip
        yield f"train.optimizer.{f.name}", train, replace(train, optimizer=replace(train.optimizer, **{f.name: value}))
    for f in fields(ScheduleSpec):
        value = {
            "lr": 1.0, "epochs": 7, "milestones": (1,), "gamma": 0.3, "warmup_epochs": 1, "decay": "cosine",
            "lr_min": 0.1, "warmup": "constant", "warmup_start": 0.1,
        }[f.name]  # fmt: skip
        yield f"train.schedule.{f.name}", train, replace(train, schedule=replace(train.schedule, **{f.name: value}))
    yield "train.stop", train, replace(train, stop=2)
    yield "train.seed", train, replace(train, seed=1)
    yield "train.precision", train, replace(train, precision="fp32")
    yield "prune.source.epoch", prune, replace(prune, source=StateRef(prune.source.node, 2))
    yield "prune.source", prune, replace(prune, source=Init(train.model, 0))
    yield "prune.prior", prune, replace(prune, prior=None)
    yield "prune.fraction", prune, replace(prune, fraction=0.5)
    yield "prune.criterion", prune, replace(prune, criterion="random")
    yield "prune.allocation", prune, replace(prune, allocation="local")
    yield "prune.seed", prune, replace(prune, seed=1)


@pytest.mark.parametrize(("name", "node", "changed"), [pytest.param(*v, id=v[0]) for v in other_values()])
def test_a_key_holds_every_semantic_field(name, node, changed):
    assert node.key == replace(node).key
    assert node.key != changed.key


def test_no_field_is_left_out_of_the_test_above():
    named = {name.split(".")[1].split("'")[0] for name, *_ in other_values() if name.startswith("train")}
    assert named - {"model"} == {f.name for f in fields(Train)}
    named = {name.split(".")[1] for name, *_ in other_values() if name.startswith("prune")}
    assert named == {f.name for f in fields(Prune)}


def test_keys_are_pinned():
    """A change of these keys orphans every store: it needs a new SEMANTICS, on purpose."""
    chains = Chains(SMALL, DATA, 0)
    assert find_runs(chains, 0.2)[1].key == "ef63105e2318b11ea4372587d5d7d5ca"
    assert masks(chains, None)[1].key == "4fd0a2a2f7092f64d8196cdefe32b08a"


def test_what_is_longest_starts_first():
    g = graph()
    chain = Chains(SMALL, DATA, 0)
    heights = [g.height[n.key] for n in find_runs(chain, 0.05)]
    assert heights == [12, 8, 4]
    assert g.height[eval_runs(chain, 0.05, 0.5)[-1].key] == 0


def test_milestones_scale_with_the_epochs_unless_given():
    assert PAPER.schedule(0.1).milestones == (80, 100)
    assert PAPER.override(epochs=11).schedule(0.1).milestones == (8, 10)
    assert PAPER.override(epochs=1).schedule(0.1).milestones == (1, 1)
    assert PAPER.override(epochs=20, milestones=(5, 6)).schedule(0.1).milestones == (5, 6)


def test_quick_ends_at_the_papers_sparsity():
    quick = preset(A2.protocol, "quick")
    assert (1 - quick.fraction) ** quick.rounds == pytest.approx(0.8**30)
    assert quick.seeds == 3


@pytest.mark.parametrize(("remaining", "expected"), [(0, 0), (1, 0), (2, 0), (3, 1), (10, 2), (12, 2), (13, 3)])
def test_number_to_prune(remaining, expected):
    assert n_to_prune(remaining, 0.2) == expected


BAD = {
    "seeds": 0, "rounds": -1, "epochs": 0, "fraction": 1.0, "gamma": 0.0, "batch_size": 0, "width": 0,
    "momentum": -1.0, "lr_find": (), "lr_eval": (0.5, 0.5), "classes": 0, "weight_decay": float("nan"),
    "milestones": (3, 2), "label_smoothing": 2.0, "warmup_epochs": 111, "train_per_class": 0, "val_per_class": -1,
}  # fmt: skip


def test_settings_that_only_fail_together():
    with pytest.raises(InputError, match="--momentum"):
        PAPER.override(nesterov=True, momentum=0.0)
    with pytest.raises(InputError, match="equal to six digits"):
        PAPER.override(lr_find=(0.1, 0.1000000001))  # one name in the figure


@pytest.mark.parametrize("name", BAD)
def test_senseless_settings_are_one_line(name):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}") as error:
        PAPER.override(**{name: BAD[name]})
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(InputError, match="unknown figure 'A9'"):
        load("A9")
    with pytest.raises(InputError, match="unknown preset"):
        preset(A2.protocol, "tiny")
    assert set(PRESETS) == {"smoke", "quick", "cpu", "paper"}


def test_rates_of_preset_cpu_keep_their_ratio_to_the_batch_size():
    found = preset(A2.protocol, "cpu")
    assert found.batch_size == 64
    assert found.lr_find == (0.00625, 0.025, 0.1)
    assert found.lr_eval == (0.0625, 0.1)
    assert preset(A2.protocol, "cpu", A2.presets).lr_eval == (0.1,)  # as the figure says
    assert preset(load("structured").protocol, "cpu").lr_eval == (0.025,)  # 0.1 at a batch of 256
    assert preset(load("A4").protocol, "cpu").lr_eval == ()
    assert preset(A2.protocol, "quick").lr_find == A2.protocol.lr_find
    steps = found.epochs * (100 * 500 // found.batch_size)
    assert steps == 15_620
    assert found.schedule(0.1).milestones == (15, 18)
