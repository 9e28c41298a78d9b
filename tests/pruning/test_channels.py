"""Which channels are joined, which of them go, and that the network without them computes what it should."""

import copy
import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.pruning import channels as latency_module
from fastprune.pruning.channels import (
    Cost,
    Group,
    Latency,
    Selection,
    channel_groups,
    cost,
    filter_scores,
    gamma_scores,
    kept_filters,
    latency,
    remove,
    remove_channels,
    select,
)
from fastprune.pruning.layers import mask_layers
from fastprune.specs import ModelSpec
from fastprune.training.flat import FlatParams
from fastprune.training.lower import lowered
from fastprune.training.models import build

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32
FRACTIONS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]

# By hand, from torchvision's code: every residual stream (of stage 1 of ResNet-18 the stem is part, for that stage has
# no shortcut conv) and every conv inside a block.
RESNET18 = {
    "conv1": (8, "conv1 layer1.0.conv2 layer1.1.conv2", "bn1 layer1.0.bn2 layer1.1.bn2"),
    "layer1.0.conv1": (8, "layer1.0.conv1", "layer1.0.bn1"),
    "layer1.1.conv1": (8, "layer1.1.conv1", "layer1.1.bn1"),
    "layer2.0.conv1": (16, "layer2.0.conv1", "layer2.0.bn1"),
    "layer2.0.conv2": (
        16, "layer2.0.conv2 layer2.0.downsample.0 layer2.1.conv2", "layer2.0.bn2 layer2.0.downsample.1 layer2.1.bn2",
    ),
    "layer2.1.conv1": (16, "layer2.1.conv1", "layer2.1.bn1"),
    "layer3.0.conv1": (32, "layer3.0.conv1", "layer3.0.bn1"),
    "layer3.0.conv2": (
        32, "layer3.0.conv2 layer3.0.downsample.0 layer3.1.conv2", "layer3.0.bn2 layer3.0.downsample.1 layer3.1.bn2",
    ),
    "layer3.1.conv1": (32, "layer3.1.conv1", "layer3.1.bn1"),
    "layer4.0.conv1": (64, "layer4.0.conv1", "layer4.0.bn1"),
    "layer4.0.conv2": (
        64, "layer4.0.conv2 layer4.0.downsample.0 layer4.1.conv2", "layer4.0.bn2 layer4.0.downsample.1 layer4.1.bn2",
    ),
    "layer4.1.conv1": (64, "layer4.1.conv1", "layer4.1.bn1"),
}  # fmt: skip
RESNET50 = {
    "conv1": (8, "conv1", "bn1"),
    "layer1.0.conv1": (8, "layer1.0.conv1", "layer1.0.bn1"),
    "layer1.0.conv2": (8, "layer1.0.conv2", "layer1.0.bn2"),
    "layer1.0.conv3": (
        32, "layer1.0.conv3 layer1.0.downsample.0 layer1.1.conv3 layer1.2.conv3",
        "layer1.0.bn3 layer1.0.downsample.1 layer1.1.bn3 layer1.2.bn3",
    ),
    "layer1.1.conv1": (8, "layer1.1.conv1", "layer1.1.bn1"),
    "layer1.1.conv2": (8, "layer1.1.conv2", "layer1.1.bn2"),
    "layer1.2.conv1": (8, "layer1.2.conv1", "layer1.2.bn1"),
    "layer1.2.conv2": (8, "layer1.2.conv2", "layer1.2.bn2"),
    "layer2.0.conv1": (16, "layer2.0.conv1", "layer2.0.bn1"),
    "layer2.0.conv2": (16, "layer2.0.conv2", "layer2.0.bn2"),
    "layer2.0.conv3": (
        64, "layer2.0.conv3 layer2.0.downsample.0 layer2.1.conv3 layer2.2.conv3 layer2.3.conv3",
        "layer2.0.bn3 layer2.0.downsample.1 layer2.1.bn3 layer2.2.bn3 layer2.3.bn3",
    ),
    "layer2.1.conv1": (16, "layer2.1.conv1", "layer2.1.bn1"),
    "layer2.1.conv2": (16, "layer2.1.conv2", "layer2.1.bn2"),
    "layer2.2.conv1": (16, "layer2.2.conv1", "layer2.2.bn1"),
    "layer2.2.conv2": (16, "layer2.2.conv2", "layer2.2.bn2"),
    "layer2.3.conv1": (16, "layer2.3.conv1", "layer2.3.bn1"),
    "layer2.3.conv2": (16, "layer2.3.conv2", "layer2.3.bn2"),
    "layer3.0.conv1": (32, "layer3.0.conv1", "layer3.0.bn1"),
    "layer3.0.conv2": (32, "layer3.0.conv2", "layer3.0.bn2"),
    "layer3.0.conv3": (
        128,
        "layer3.0.conv3 layer3.0.downsample.0 layer3.1.conv3 layer3.2.conv3 "
        "layer3.3.conv3 layer3.4.conv3 layer3.5.conv3",
        "layer3.0.bn3 layer3.0.downsample.1 layer3.1.bn3 layer3.2.bn3 layer3.3.bn3 layer3.4.bn3 layer3.5.bn3",
    ),
    "layer3.1.conv1": (32, "layer3.1.conv1", "layer3.1.bn1"),
    "layer3.1.conv2": (32, "layer3.1.conv2", "layer3.1.bn2"),
    "layer3.2.conv1": (32, "layer3.2.conv1", "layer3.2.bn1"),
    "layer3.2.conv2": (32, "layer3.2.conv2", "layer3.2.bn2"),
    "layer3.3.conv1": (32, "layer3.3.conv1", "layer3.3.bn1"),
    "layer3.3.conv2": (32, "layer3.3.conv2", "layer3.3.bn2"),
    "layer3.4.conv1": (32, "layer3.4.conv1", "layer3.4.bn1"),
    "layer3.4.conv2": (32, "layer3.4.conv2", "layer3.4.bn2"),
    "layer3.5.conv1": (32, "layer3.5.conv1", "layer3.5.bn1"),
    "layer3.5.conv2": (32, "layer3.5.conv2", "layer3.5.bn2"),
    "layer4.0.conv1": (64, "layer4.0.conv1", "layer4.0.bn1"),
    "layer4.0.conv2": (64, "layer4.0.conv2", "layer4.0.bn2"),
    "layer4.0.conv3": (
        256, "layer4.0.conv3 layer4.0.downsample.0 layer4.1.conv3 layer4.2.conv3",
        "layer4.0.bn3 layer4.0.downsample.1 layer4.1.bn3 layer4.2.bn3",
    ),
    "layer4.1.conv1": (64, "layer4.1.conv1", "layer4.1.bn1"),
    "layer4.1.conv2": (64, "layer4.1.conv2", "layer4.1.bn2"),
    "layer4.2.conv1": (64, "layer4.2.conv1", "layer4.2.bn1"),
    "layer4.2.conv2": (64, "layer4.2.conv2", "layer4.2.bn2"),
}  # fmt: skip
BY_HAND = {"resnet18": RESNET18, "resnet50": RESNET50}


def network(name="resnet18", stem="cifar", width=8):
    """With batch norms as after some training: random gamma (of either sign), beta and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(ModelSpec(name=name, classes=5, stem=stem, width=width))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(values)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def ranked(model: nn.Module, fraction: float) -> tuple[tuple[Group, ...], Selection]:
    groups = channel_groups(model, SIDE)
    return groups, select(groups, gamma_scores(groups, model.state_dict()), fraction)


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", BY_HAND)
def test_groups_are_those_listed_by_hand(name, stem):
    groups = channel_groups(network(name, stem), SIDE)
    expected = [Group(tuple(c.split()), tuple(n.split()), channels) for channels, c, n in BY_HAND[name].values()]
    assert list(groups) == expected
    assert [group.name for group in groups] == list(BY_HAND[name])


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_every_conv_stands_in_one_group_and_the_classifier_in_none(name):
    with torch.device("meta"):
        model = network(name, "imagenet", 64)
    convs = [c for group in channel_groups(model, 64) for c in group.layers]
    assert sorted(convs) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert len(set(convs)) == len(convs)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_is_left_behind_in_the_model_or_elsewhere(guard, capsys):
    model = network().train()
    model.layer2.eval()
    for module in (model.conv1, model.bn1, model.layer1):  # frozen from the image on
        module.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    random = torch.get_rng_state()
    with guard():
        groups = channel_groups(model, SIDE)
        cost(model, SIDE)
    assert [(g.channels, " ".join(g.layers), " ".join(g.norms)) for g in groups] == list(RESNET18.values())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for (p, trained, grad), now in zip(parameters, model.parameters(), strict=True):
        assert p is now
        assert now.requires_grad == trained
        assert now.grad is grad
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    with guard():
        small = remove(model, ranked(model, 0.5)[1], SIDE)
    assert small is model
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [trained for _, trained, _ in parameters]
    assert all(p.grad is None and p.is_leaf and not p.is_inference() for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert capsys.readouterr() == ("", "")


def test_a_failed_trace_leaves_the_model_alone():
    model = network()
    with pytest.raises(RuntimeError, match="negative"):
        channel_groups(model, -1)
    model.fc = nn.Linear(3, 5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        channel_groups(model, SIDE)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_torch_pruning_is_imported_only_when_needed():
    code = "import sys; import fastprune.pruning.channels; assert 'torch_pruning' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def block(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_gamma_needs_a_batch_norm_in_each_group():
    for norm in (nn.Identity(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)):
        model = block(nn.Conv2d(3, 4, 3), norm)
        with pytest.raises(ValueError, match=r"^0 has no batch norm: its filters cannot be ranked by gamma$"):
            gamma_scores(channel_groups(model, SIDE), model.state_dict())


def test_masked_layers_are_refused():
    model = mask_layers(network())
    with pytest.raises(ValueError, match=r"^conv1 is a masked layer: turn masked layers into plain ones first"):
        channel_groups(model, SIDE)
    with pytest.raises(ValueError, match=r"^fc is a masked layer"):
        remove_channels(nn.Sequential(OrderedDict(fc=mask_layers(nn.Linear(3, 4)))), torch.empty(1, 3), 0.5)


def test_gammas_of_joined_norms_are_summed_by_magnitude():
    model = network()
    model.bn1.weight.data = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, 0])
    model.layer1[0].bn2.weight.data = torch.tensor([0.5, 0.5, -0.5, -0.5, 0, 0, -0.0, 0])
    model.layer1[1].bn2.weight.data = torch.tensor([10.0, 20, 30, 40, -50, -60, -70, -0.0])
    model.layer1[1].bn1.weight.data = torch.tensor([-1.0, 1, -1, 1, -1, 1, 0, 2])
    groups = channel_groups(model, SIDE)
    scores = gamma_scores(groups, model.state_dict())
    assert list(scores) == list(RESNET18)
    assert scores["conv1"].tolist() == [11.5, 22.5, 33.5, 44.5, 55.0, 66.0, 77.0, 0.0]
    assert scores["layer1.1.conv1"].tolist() == [1, 1, 1, 1, 1, 1, 0, 2]
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in scores.values())
    half = gamma_scores(groups, {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()})
    assert torch.equal(half["conv1"], scores["conv1"])


def test_gammas_of_another_network():
    groups = channel_groups(network(), SIDE)
    with pytest.raises(ValueError, match=r"no bn1\.weight of 8 channels"):
        gamma_scores(groups, network(width=4).state_dict())
    with pytest.raises(ValueError, match=r"no bn1\.weight of 8 channels"):
        gamma_scores(groups, {})


THREE = (Group(("a", "a2"), ("an", "a2n"), 3), Group(("b",), ("bn",), 2), Group(("c",), ("cn",), 1))
SCORES = {
    "a": torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64),
    "b": torch.tensor([0.5, 0.5], dtype=torch.float64),
    "c": torch.tensor([0.1], dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("fraction", "kept", "spared"),
    [
        # In rank: c0, b0, b1, a1, a2, a0. Each group's best, that may not go: a0, b0 (of equals the first) and c0.
        (0.0, {"a": (0, 1, 2), "b": (0, 1), "c": (0,)}, ()),
        (0.25, {"a": (0, 2), "b": (0,), "c": (0,)}, ("c",)),  # round(1.5) = 2: b1 and, of equals, a1 before a2
        (0.41, {"a": (0, 2), "b": (0,), "c": (0,)}, ("c",)),  # round(2.46) = 2
        (0.42, {"a": (0,), "b": (0,), "c": (0,)}, ("b", "c")),  # round(2.52) = 3: without the exemption c0, b0, b1
        (0.5, {"a": (0,), "b": (0,), "c": (0,)}, ("b", "c")),
    ],
)
def test_selection_by_hand(fraction, kept, spared):
    selection = select(THREE, SCORES, fraction)
    assert selection == Selection(kept, {"a": 3, "b": 2, "c": 1}, spared)
    assert kept_filters(selection, THREE) == {c: len(kept[g.name]) for g in THREE for c in g.layers}


def test_the_next_in_rank_goes_instead_of_a_last_channel():
    groups = (Group(("x",), ("xn",), 2), Group(("y",), ("yn",), 3))
    scores = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0, 9.0, 3.0])}
    selection = select(groups, scores, 0.4)  # 2 of 5: x0, and not x1 but y0
    assert selection.kept == {"x": (1,), "y": (1, 2)}
    assert selection.spared == ("x",)
    assert (selection.removed("x"), selection.removed("y")) == ([0], [0])


def test_equal_gammas_go_by_position():
    # As at initialisation, where every gamma is 1: the streams' sums are higher, and the inner convs go from the front.
    model = build(ModelSpec(name="resnet18", classes=5, stem="cifar", width=8))
    _, selection = ranked(model, 20 / 360)  # 240 inner channels: 8, 8, 16, ... of which each group keeps its first
    gone = {name: selection.removed(name) for name in selection.kept if selection.removed(name)}
    assert gone == {
        "layer1.0.conv1": [1, 2, 3, 4, 5, 6, 7],
        "layer1.1.conv1": [1, 2, 3, 4, 5, 6, 7],
        "layer2.0.conv1": [1, 2, 3, 4, 5, 6],
    }
    assert selection.spared == ("layer1.0.conv1", "layer1.1.conv1")  # 20 by position are 8, 8 and 4 of 16


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
def test_fractions_that_are_none(fraction):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        select(THREE, SCORES, fraction)


def test_more_than_can_go():
    with pytest.raises(ValueError, match="cannot remove 4 of 6 channels: each of the 3 groups keeps one"):
        select(THREE, SCORES, 0.6)
    with pytest.raises(ValueError, match="6 of 6"):
        select(THREE, SCORES, 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_network_has_no_ranking(bad):
    model = network()
    model.layer2[0].bn2.weight.data[3] = bad
    groups = channel_groups(model, SIDE)
    scores = gamma_scores(groups, model.state_dict())
    assert not scores["layer2.0.conv2"].isfinite().all()
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2 has scores that are not finite: did the network diverge"):
        select(groups, scores, 0.1)


def test_scores_of_other_groups():
    for bad in ({"a": SCORES["a"]}, {**SCORES, "b": torch.ones(3)}, {**SCORES, "d": torch.ones(3)}):
        with pytest.raises(ValueError, match="another network"):
            select(THREE, bad, 0.1)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_exactly_so_many_go_and_they_are_the_lowest(values, fraction):
    groups = tuple(Group((f"g{i}",), (f"n{i}",), len(v)) for i, v in enumerate(values))
    scores = {f"g{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    entries = sorted((score, g, c) for g, v in enumerate(values) for c, score in enumerate(v))
    best = {(g, v.index(max(v))) for g, v in enumerate(values)}
    count = round(fraction * len(entries))
    if count > len(entries) - len(groups):
        with pytest.raises(ValueError, match="cannot remove"):
            select(groups, scores, fraction)
        return
    selection = select(groups, scores, fraction)
    gone = {(g, c) for g, group in enumerate(groups) for c in selection.removed(group.name)}
    assert gone == set([(g, c) for _, g, c in entries if (g, c) not in best][:count])
    assert len(gone) == count
    plain = {(g, c) for _, g, c in entries[:count]}
    assert selection.spared == tuple(
        f"g{g}" for g, v in enumerate(values) if all((g, c) in plain for c in range(len(v)))
    )
    assert Selection.from_dict(json.loads(json.dumps(selection.as_dict()))) == selection


def without(selection: dict, *path):
    damaged = copy.deepcopy(selection)
    at = damaged
    for step in path[:-1]:
        at = at[step]
    del at[path[-1]]
    return damaged


def having(selection: dict, value, *path):
    damaged = copy.deepcopy(selection)
    at = damaged
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return damaged


GOOD = select(THREE, SCORES, 0.25).as_dict()


def test_what_is_written():
    assert GOOD == {
        "selection": 1,
        "groups": [
            {"name": "a", "channels": 3, "kept": [0, 2]},
            {"name": "b", "channels": 2, "kept": [0]},
            {"name": "c", "channels": 1, "kept": [0]},
        ],
        "spared": ["c"],
    }


BAD_KEPT: list = [[], [2, 0], [0, 0], [0, 3], [-1], [True], [0.0], ["0"], [[0]], None, {}, "02"]


@pytest.mark.parametrize(
    "damaged",
    [
        None, 3, "x", [], {}, [GOOD],
        *(without(GOOD, key) for key in GOOD),
        *(without(GOOD, "groups", 0, key) for key in ("name", "channels", "kept")),
        having(GOOD, 2, "selection"),
        having(GOOD, 1, "more"),
        having(GOOD, 1, "groups", 0, "more"),
        having(GOOD, None, "groups"),
        having(GOOD, GOOD["groups"][0], "groups", 1),
        having(GOOD, 7, "groups", 0, "name"),
        *(having(GOOD, kept, "groups", 0, "kept") for kept in BAD_KEPT),
        *(having(GOOD, channels, "groups", 0, "channels") for channels in (2, 0, -3, 3.0, True, None, "3")),
        *(having(GOOD, spared, "spared") for spared in (["d"], ["c", "c"], ["c", "a"], "c", None, [["c"]])),
    ],
)  # fmt: skip
def test_damaged_and_foreign_selections_are_refused(damaged):
    with pytest.raises(ValueError, match="not a selection"):
        Selection.from_dict(damaged)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["groups", "spared", "kept"]), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    JSON, st.sampled_from([("groups",), ("groups", 0), ("groups", 1, "kept"), ("groups", 2, "channels"), ("spared",)])
)
def test_any_other_content_is_refused_or_means_itself(value, path):
    content = having(GOOD, value, *path)
    try:
        assert Selection.from_dict(content).as_dict() == content
    except ValueError as error:
        assert "not a selection" in str(error)  # noqa: PT017


def test_a_selection_of_another_network_is_not_applied():
    other = ranked(network("resnet50"), 0.5)[1]
    wider = ranked(network(width=16), 0.5)[1]
    model = network()
    before = copy.deepcopy(model.state_dict())
    for selection in (other, wider, select(THREE, SCORES, 0.5)):
        with pytest.raises(ValueError, match="another network"):
            remove(model, selection, SIDE)
        with pytest.raises(ValueError, match="another network"):
            kept_filters(selection, channel_groups(model, SIDE))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def silenced(model, groups, selection):
    """The whole network, with gamma = beta = 0 wherever a channel goes, and wild statistics there."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            gone = selection.removed(group.name)
            for norm in map(model.get_submodule, group.norms):
                norm.weight[gone] = norm.bias[gone] = 0.0
                norm.running_mean[gone] = 1e3
    return model


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", BY_HAND)
def test_it_computes_what_the_whole_network_does_with_those_channels_silenced(name, fraction, stem):
    model = network(name, stem).double().eval()
    groups, selection = ranked(model, fraction)
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, whole = silenced(model, groups, selection)(images), model(images)
        found = remove(model, selection, SIDE)(images)
    # A sum of at most 256 x 9 products in another order, in each of at most 50 layers.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * whole.abs().max().item())
    assert fraction == 0.0 or not torch.allclose(found, whole, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "fraction"), [*(("resnet18", f) for f in FRACTIONS), *(("resnet50", f) for f in FRACTIONS[::4])]
)
def test_every_fraction_is_removed_and_the_rest_trains(name, fraction):
    model = network(name)
    groups, selection = ranked(model, fraction)
    entries = sum(group.channels for group in groups)
    before = dict(model.named_modules())
    names = list(model.state_dict())
    remove(model, selection, SIDE)
    assert sum(len(kept) for kept in selection.kept.values()) == entries - round(fraction * entries)
    assert list(model.state_dict()) == names
    assert dict(model.named_modules()) == before  # the same objects
    kept = kept_filters(selection, groups)
    for n, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == kept[n] > 0
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
    for group in groups:
        for norm in map(model.get_submodule, group.norms):
            assert {norm.num_features, *(len(t) for t in (norm.weight, norm.bias, norm.running_mean))} == {
                kept[group.name]
            }
    assert model.fc.in_features == model.fc.weight.shape[1] == kept[stream(groups)]
    assert model.fc.weight.shape[0] == 5
    assert [(g.layers, g.channels) for g in channel_groups(model, SIDE)] == [(g.layers, kept[g.name]) for g in groups]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(model(torch.randn(4, 3, SIDE, SIDE)), torch.arange(4)).backward()
    optimiser.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(t, start[n]) for n, t in model.state_dict().items() if n.endswith("bias"))


def stream(groups: tuple[Group, ...]) -> str:
    """The group of the last stage's residual stream: the one with its shortcut conv."""
    return next(g.name for g in groups if "layer4.0.downsample.0" in g.layers)


def test_flat_parameters_take_the_smaller_network():
    model = remove(network(), ranked(network(), 0.5)[1], SIDE)
    flat = FlatParams(model)
    with lowered():  # a shortcut has become so narrow that oneDNN would write past its memory
        output = model(torch.randn(4, 3, SIDE, SIDE))
    flat.backward(output.square().mean())
    flat.sgd_step(lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    flat.check_aliased()


def test_channels_last_and_frozen_layers_stay_so():
    model = network().to(memory_format=torch.channels_last)
    model.layer3.requires_grad_(False)
    _, selection = ranked(model, 0.5)
    expected = remove(copy.deepcopy(model).to(memory_format=torch.contiguous_format), selection, SIDE)
    remove(model, selection, SIDE)
    for (n, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert p.requires_grad == (not n.startswith("layer3"))
        assert p.dim() != 4 or p.is_contiguous(memory_format=torch.channels_last)
        assert q.is_contiguous()
        assert torch.equal(p, q)
    model(torch.randn(2, 3, SIDE, SIDE).to(memory_format=torch.channels_last))


def test_the_meta_device_plans_what_the_cpu_does():
    real = network("resnet50")
    groups, selection = ranked(real, 0.7)
    with torch.device("meta"):
        planned = network("resnet50")
    assert channel_groups(planned, SIDE) == groups
    whole = cost(planned, SIDE)
    remove(planned, selection, SIDE)
    remove(real, selection, SIDE)
    assert {n: t.shape for n, t in planned.state_dict().items()} == {n: t.shape for n, t in real.state_dict().items()}
    assert all(t.is_meta for t in planned.state_dict().values())
    assert cost(planned, SIDE) == cost(real, SIDE)
    assert cost(real, SIDE).flops < whole.flops
    assert cost(real, SIDE).parameters < whole.parameters


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_torch_prunings_own_global_pruning_takes_the_same(fraction):
    # It keeps int(entries x (1 - fraction)) channels, where we remove round(entries x fraction): the same number here,
    # for 360 x 0.25 and 360 x 0.5 are whole and exact in binary. It prunes by threshold, so that ties would all go, and
    # leaves a group that would die whole as it is; neither happens with these gammas.
    import torch_pruning

    ours = network()
    for i, module in enumerate(m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
        generator = torch.Generator().manual_seed(i)
        module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
    theirs = copy.deepcopy(ours)
    _, selection = ranked(ours, fraction)
    assert selection.spared == ()
    importance = torch_pruning.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    pruner = torch_pruning.pruner.BasePruner(
        theirs, (torch.zeros(1, 3, SIDE, SIDE),), importance, global_pruning=True, pruning_ratio=fraction,
        ignored_layers=[theirs.fc],
    )  # fmt: skip
    pruner.step()
    remove(ours, selection, SIDE)
    theirs_state = theirs.state_dict()
    assert list(theirs_state) == list(ours.state_dict())
    for name, t in ours.state_dict().items():
        assert torch.equal(t, theirs_state[name]), name


# Any network


class Net(nn.Module):
    """Layers by name, and how they compute."""

    def __init__(self, compute, **layers):
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.compute(self, *inputs)


class Stage(nn.Sequential):
    def __init__(self, conv, norm):
        super().__init__(conv, norm, nn.ReLU())


def unet():
    def compute(net, x):
        a = net.down1(x)
        b = net.down2(F.max_pool2d(a, 2))
        c = net.middle(F.max_pool2d(b, 2))
        b = net.level2(torch.cat([net.up2(c), b], 1))
        return net.head(net.level1(torch.cat([net.up1(b), a], 1)))

    return Net(
        compute,
        down1=Stage(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)),
        down2=Stage(nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10)),
        middle=Stage(nn.Conv2d(10, 14, 3, padding=1), nn.BatchNorm2d(14)),
        up2=Stage(nn.ConvTranspose2d(14, 9, 2, stride=2), nn.BatchNorm2d(9)),
        level2=Stage(nn.Conv2d(19, 8, 3, padding=1), nn.BatchNorm2d(8)),
        up1=Stage(nn.ConvTranspose2d(8, 5, 2, stride=2), nn.BatchNorm2d(5)),
        level1=Stage(nn.Conv2d(11, 7, 3, padding=1), nn.BatchNorm2d(7)),
        head=nn.Conv2d(7, 4, 1),
    )


def densenet():
    return torchvision.models.DenseNet(
        growth_rate=6, block_config=(2, 3), num_init_features=8, bn_size=2, num_classes=5
    )


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(63, 11), nn.ReLU(), nn.Dropout(), nn.Linear(11, 4),
    )  # fmt: skip


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 9, 3, stride=2), nn.BatchNorm1d(9), nn.ReLU(),
        nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip


def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 5, 2), nn.BatchNorm3d(5), nn.ReLU(),
        nn.Conv3d(5, 3, 1),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 3))


def groupnorm():
    def compute(net, x):
        x = F.relu(net.norm1(net.conv1(x)))
        x = x + net.norm2(net.conv2(x))
        return net.fc(net.conv3(x).mean((2, 3)))

    return Net(
        compute,
        conv1=nn.Conv2d(3, 12, 3), norm1=nn.GroupNorm(3, 12), conv2=nn.Conv2d(12, 12, 3, padding=1),
        norm2=nn.GroupNorm(2, 12), conv3=nn.Conv2d(12, 6, 1), fc=nn.Linear(6, 4),
    )  # fmt: skip


def transformer():
    return Net(
        lambda net, tokens: net.head(net.layer(net.embed(tokens))),
        embed=nn.Embedding(11, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 20, activation="gelu", batch_first=True),
        head=nn.Linear(8, 11),
    )


def grouped():
    """Two grouped convs, the second transposed, and a depthwise one between them."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ReLU(), nn.Conv2d(18, 18, 3, groups=18),
        nn.ReLU(), nn.ConvTranspose2d(18, 8, 2, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1),
    )  # fmt: skip


IMAGES, SIGNAL, VOLUME = torch.empty(2, 3, 32, 32), torch.empty(2, 2, 40), torch.empty(1, 2, 5, 6, 7)
TOKENS = torch.arange(10).view(2, 5)
ZOO = {
    "resnet18": (network, IMAGES, "gamma", "fc"),
    "mobilenet": (lambda: torchvision.models.MobileNetV2(5, width_mult=0.25), IMAGES, "gamma", "classifier.1"),
    "densenet": (densenet, IMAGES, "gamma", "classifier"),
    "unet": (unet, IMAGES, "gamma", "head"),
    "conv1d": (conv1d, SIGNAL, "gamma", "8"),
    "conv3d": (conv3d, VOLUME, "gamma", "6"),
    "vgg": (vgg, IMAGES, "l1", "10"),
    "mlp": (mlp, torch.empty(3, 7), "l2", "2"),
    "transformer": (transformer, TOKENS, "l1", "head"),
    "groupnorm": (groupnorm, IMAGES, "l2", "fc"),
    "grouped": (grouped, IMAGES, "l1", "8"),
}
EXACT = sorted(set(ZOO) - {"groupnorm"})  # a GroupNorm's statistics are of other channels


def made(name):
    """(model in float64 and eval mode, example, score, output layer), with norms as after some training."""
    build_model, example, score, output = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = build_model().double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for values in (module.weight, module.bias, module.running_mean):
                    nn.init.normal_(values)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, example, score, output


def values(example):
    if not example.is_floating_point():
        return example
    return torch.randn(example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zeroed(model, report):
    """The whole network with zeros where a channel is written: filters, biases, gamma and beta."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in report.groups:
            for name in (*group.layers, *group.norms):
                module, entries = model.get_submodule(name), group.outputs(name).entries
                gone = [i for channel in report.selection.removed(group.name) for i in entries[channel]]
                weight = module.weight
                if getattr(module, "transposed", False):  # [in, out / groups, ...]
                    n, (ins, outs) = module.groups, weight.shape[:2]
                    weight = weight.view(n, ins // n, outs, -1).transpose(1, 2)
                    for i in gone:
                        weight[i // outs, i % outs] = 0.0
                else:
                    weight[gone] = 0.0
                if module.bias is not None:
                    module.bias[gone] = 0.0
    return model


@pytest.mark.parametrize("name", ZOO)
def test_any_network_gets_smaller(name):
    model, example, score, output = made(name)
    x, modules = values(example), dict(model.named_modules())
    layers = [n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    with torch.no_grad():
        shape, before = model(x).shape, sum(p.numel() for p in model.parameters())
    outputs = {n: modules[n].weight.shape for n in layers}
    report = remove_channels(model, example, 0.4, score=score)
    with torch.no_grad():
        assert model(x).shape == shape
    after = sum(p.numel() for p in model.parameters())
    assert (report.before.parameters, report.after.parameters) == (before, after)
    assert after < before
    assert report.after.flops < report.before.flops
    channels = sum(group.channels for group in report.groups)
    kept = report.selection.kept
    assert sum(map(len, kept.values())) == channels - round(0.4 * channels)
    assert report.left[output] == "an output of the model"
    assert modules[output].weight.shape[0] == outputs[output][0]
    # Each layer is in a group or left; those in a group have as many outputs as it says.
    assert sorted({layer for group in report.groups for layer in group.layers} | set(report.left)) == sorted(layers)
    for layer, n in kept_filters(report.selection, report.groups).items():
        module = modules[layer]
        assert n == (module.out_features if isinstance(module, nn.Linear) else module.out_channels)
    model.train()(x).double().square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("fraction", [0.2, 0.6])
@pytest.mark.parametrize("name", EXACT)
def test_any_smaller_network_computes_what_the_whole_one_does_with_zeros(name, fraction):
    model, example, score, _ = made(name)
    whole, x = copy.deepcopy(model), values(example)
    report = remove_channels(model, example, fraction, score=score)
    with torch.no_grad():
        found, expected, scale = model(x), zeroed(whole, report)(x), whole(x).abs().max().item()
    # Sums of at most 2,000 products in another order, in each of at most 53 layers.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * scale)
    assert not torch.allclose(found, whole(x), rtol=1e-3, atol=1e-6 * scale)


def test_a_groupnorms_blocks_stay_equal():
    # Of conv1 and conv2, which the addition joins: blocks of 4 and of 6 outputs tie those with equal index modulo 2.
    model, example, *_ = made("groupnorm")
    report = remove_channels(model, example, 1 / 8, score=lambda group: -torch.arange(group.channels).double())
    assert [(g.name, g.layers, g.channels) for g in report.groups] == [
        ("conv1", ("conv1", "conv2"), 2),
        ("conv3", ("conv3",), 6),
    ]
    assert report.groups[0].outputs("conv2").entries == ((0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11))
    assert report.selection.kept == {"conv1": (0, 1), "conv3": (0, 1, 2, 3, 4)}

    model, example, *_ = made("groupnorm")
    whole, x = copy.deepcopy(model), values(example)
    remove_channels(
        model, example, 1 / 2, score=lambda group: -torch.arange(group.channels).double(), include="conv[12]"
    )
    assert (model.norm1.num_channels, model.norm1.num_groups, model.norm2.num_groups) == (6, 3, 2)
    even = slice(0, None, 2)
    with torch.no_grad():
        y = F.conv2d(x, whole.conv1.weight[even], whole.conv1.bias[even])
        y = F.relu(F.group_norm(y, 3, whole.norm1.weight[even], whole.norm1.bias[even]))
        z = F.conv2d(y, whole.conv2.weight[even, even], whole.conv2.bias[even], padding=1)
        y = y + F.group_norm(z, 2, whole.norm2.weight[even], whole.norm2.bias[even])
        y = whole.fc(F.conv2d(y, whole.conv3.weight[:, even], whole.conv3.bias).mean((2, 3)))
        torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_the_papers_recipe_is_one_call(fraction, stem):
    model, expected = network(stem=stem).eval(), network(stem=stem).eval()
    groups, selection = ranked(expected, fraction)
    whole = cost(expected, SIDE)
    remove(expected, selection, SIDE)
    report = remove_channels(model, torch.empty(1, 3, SIDE, SIDE), fraction)
    assert (report.selection, report.groups) == (selection, groups)
    assert (report.before, report.after) == (whole, cost(expected, SIDE))
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in model.state_dict().items())
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))


def test_a_selection_rebuilds_the_network():
    model, example, *_ = made("unet")
    whole = copy.deepcopy(model)
    report = remove_channels(model, example, 0.5, exclude=["down1", "up1"])
    assert report.selection.kept["down1.0"] == tuple(range(6))
    selection = Selection.from_dict(json.loads(json.dumps(report.selection.as_dict())))
    remove(whole, selection, example).load_state_dict(model.state_dict())


def test_filters_by_hand():
    a, b = nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 1)
    a.weight.data = torch.tensor([[[1.0, -2]], [[0, 4]]])
    b.weight.data = torch.tensor([[[3.0], [0]], [[-1.0], [2]]])
    c = nn.ConvTranspose1d(2, 4, 1, groups=2)  # [in, out / groups, 1]: input 0 writes outputs 0 and 1
    c.weight.data = torch.tensor([[[1.0], [2]], [[3], [-4]]])
    d = nn.Linear(4, 3)
    d.weight.data = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, -3], [0, 0, 0, 0]])
    e, f = nn.Linear(2, 1), nn.Linear(3, 1)

    def compute(net, x, y):
        x = net.a(x)
        return net.e((x + net.b(x)).mean(2)), net.f(net.d(net.c(y).mean(2)))

    model = Net(compute, a=a, b=b, c=c, d=d, e=e, f=f)
    groups = channel_groups(model, (torch.empty(1, 1, 9), torch.empty(1, 2, 9)))
    assert [(g.layers, g.channels) for g in groups] == [(("a", "b"), 2), (("c",), 2), (("d",), 3)]
    assert groups[1].outputs("c").entries == ((0, 2), (1, 3))
    l1, l2 = filter_scores(groups, model, 1), filter_scores(groups, model, 2)
    assert {n: s.tolist() for n, s in l1.items()} == {"a": [6.0, 7.0], "c": [4.0, 6.0], "d": [4.0, 3.0, 0.0]}
    roots = {"a": [14, 21], "c": [10, 20], "d": [4, 9, 0]}
    assert {n: s.tolist() for n, s in l2.items()} == {n: [math.sqrt(s) for s in of] for n, of in roots.items()}
    assert all(s.dtype == torch.float64 and not s.requires_grad for s in (*l1.values(), *l2.values()))


def test_gammas_after_a_concatenation():
    # As in a DenseNet: the channels of a are scaled by both norms, in the second behind those of b.
    def compute(net, x):
        a = net.a(x)
        b = net.b(F.relu(net.n1(a)))
        return net.c(F.relu(net.n2(torch.cat([b, a], 1))))

    model = Net(
        compute, a=nn.Conv2d(3, 2, 1), n1=nn.BatchNorm2d(2), b=nn.Conv2d(2, 3, 1), n2=nn.BatchNorm2d(5),
        c=nn.Conv2d(5, 4, 1),
    )  # fmt: skip
    model.n1.weight.data = torch.tensor([1.0, -2])
    model.n2.weight.data = torch.tensor([10.0, 20, 30, -40, 50])
    groups = channel_groups(model, 8)
    assert [(g.layers, g.norms, g.channels) for g in groups] == [(("a",), ("n1", "n2"), 2), (("b",), ("n2",), 3)]
    scores = gamma_scores(groups, model.state_dict())
    assert {n: s.tolist() for n, s in scores.items()} == {"a": [41.0, 52.0], "b": [10.0, 20.0, 30.0]}
    weight = model.c.weight.clone()
    remove_channels(model, torch.empty(1, 3, 8, 8), 2 / 5)
    assert torch.equal(model.c.weight, weight[:, [2, 3, 4]])
    assert torch.equal(model.n2.weight, torch.tensor([30.0, -40, 50]))


def test_an_input_that_is_concatenated_keeps_its_place():
    model = Net(
        lambda net, x: net.b(torch.cat([x, net.a(x), x], 1)).mean((2, 3)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(10, 2, 1)
    )
    weight = model.b.weight.clone()
    report = remove_channels(model, torch.empty(1, 3, 8, 8), 0.5, score={"a": torch.tensor([1.0, 4, 2, 3])})
    assert report.selection.kept == {"a": (1, 3)}
    assert torch.equal(model.b.weight, weight[:, [0, 1, 2, 4, 6, 7, 8, 9]])


def two(a, b, between=None):
    """A conv of 8 outputs, something in between, a second conv and a classifier."""
    return Net(
        lambda net, x: net.fc(net.b(F.relu(net.between(net, net.a(x)) if between else net.a(x))).mean((2, 3))),
        a=a, b=b, fc=nn.Linear(b.out_channels, 2), between=between,
    )  # fmt: skip


def conv(ins=3, outs=8):
    return nn.Conv2d(ins, outs, 1)


def attention():
    """A pre-norm block with attention of its own."""

    def compute(net, x):
        x = net.embed(x)
        q, k, v = net.qkv(net.norm1(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + net.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
        return net.head(x + net.down(F.gelu(net.up(net.norm2(x)))))

    return Net(
        compute, embed=nn.Linear(7, 8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), norm1=nn.LayerNorm(8),
        norm2=nn.LayerNorm(8), up=nn.Linear(8, 12), down=nn.Linear(12, 8), head=nn.Linear(8, 5),
    )  # fmt: skip


def recurrent(kind):
    return Net(
        lambda net, x: net.fc(net.rnn(net.a(x).transpose(1, 2))[0]),
        a=nn.Conv1d(2, 6, 3), rnn=kind(6, 5, batch_first=True), fc=nn.Linear(5, 3),
    )  # fmt: skip


def tied():
    model = Net(
        lambda net, x: net.head(net.down(F.relu(net.up(net.embed(x))))),
        embed=nn.Embedding(11, 6), up=nn.Linear(6, 9), down=nn.Linear(9, 6), head=nn.Linear(6, 11, bias=False),
    )  # fmt: skip
    model.head.weight = model.embed.weight
    return model


def with_weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2))


SMALL = torch.empty(2, 3, 8, 8)
LEFT = {
    "input": (Net(lambda n, x: n.fc(n.b(x + n.a(x)).mean((2, 3))), a=conv(3, 3), b=conv(), fc=nn.Linear(8, 2)), SMALL,
              {"a": "joined with an input of the model", "fc": "an output of the model"}),
    "unused": (Net(lambda n, x: n.c(n.a(x)), a=conv(), spare=conv(), c=conv(8, 2)), SMALL,
               {"spare": "the forward does not call it in eval mode", "c": "an output of the model"}),
    "two outputs": (Net(lambda n, x: {"y": n.c(n.b(n.a(x))), "features": [n.a(x)], "n": 3},
                        a=conv(), b=conv(8, 4), c=conv(4, 2)), SMALL,
                    {"a": "an output of the model", "c": "an output of the model"}),
    "output behind an activation": (Net(lambda n, x: n.b(n.a(x)).softmax(1), a=conv(), b=conv(8, 2)), SMALL,
                                    {"b": "an output of the model"}),
    "transformer": (transformer(), TOKENS,
                    {"layer.self_attn.out_proj": "the forward does not call it in eval mode",
                     "layer.linear2": "meets layer.self_attn, a MultiheadAttention", "head": "an output of the model"}),
    "lstm": (Net(lambda n, x: n.fc(n.rnn(F.relu(n.b(n.a(x))).flatten(2).transpose(1, 2))[0]), a=conv(), b=conv(8, 6),
                 rnn=nn.LSTM(6, 5, batch_first=True), fc=nn.Linear(5, 3)), SMALL,
             {"b": "meets rnn, a LSTM", "fc": "an output of the model"}),
    "tied": (tied(), TOKENS,
             {"down": "meets head, which shares a parameter with another layer", "head": "an output of the model"}),
    "weight norm": (with_weight_norm(), SMALL,
                    {"0": "meets 0, a ParametrizedConv2d whose tensors are computed from others",
                     "4": "an output of the model"}),
    "halves": (Net(lambda n, x: n.c(torch.cat([n.b1((y := n.a(x))[:, :4]), n.b2(y[:, 4:])], 1)), a=conv(),
                   b1=conv(4, 5), b2=conv(4, 5), c=conv(10, 2)), SMALL,
               {"a": "meets b1, which has a part of the channels", "c": "an output of the model"}),
    "one filter a group": (nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=4), conv(4, 6), conv(6, 2)),
                           SMALL,
                           {"0": "meets 2, a Conv2d with several input channels and one filter in each group",
                            "2": "meets 2, a Conv2d with several input channels and one filter in each group",
                            "4": "an output of the model"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name):
    model, example, left = LEFT[name]
    report = remove_channels(model, example, 0.3, score="l1")
    assert report.left == left
    assert report.after.parameters < report.before.parameters
    for why in set(left.values()):
        assert f" ({why})" in str(report)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_nothing_can_go(kind):
    with pytest.raises(ValueError, match=rf"^no channels can be removed: a \(meets rnn, a {kind.__name__}\); fc \(an"):
        remove_channels(recurrent(kind), SIGNAL, 0.3, score="l1")
    with pytest.raises(ValueError, match=r"^no channels can be removed: the model \(an output of the model\)$"):
        remove_channels(nn.Linear(3, 4), torch.empty(1, 3), 0.3, score="l1")
    with pytest.raises(ValueError, match=r"^no channels can be removed: no conv or linear layer$"):
        remove_channels(nn.BatchNorm1d(3), torch.empty(1, 3), 0.3)


MIXED = {
    "shuffle": (two(conv(), conv(8, 8), lambda _, x: x.view(2, 2, -1, 8, 8).transpose(1, 2).reshape(2, -1, 8, 8)), "a"),
    "constants": (two(conv(), conv(10, 8), lambda _, x: torch.cat([torch.ones(2, 2, 8, 8), x], 1)), "a"),
    "mean of channels": (two(conv(), conv(8, 8), lambda _, x: x * x.mean(1, keepdim=True)), "a"),
    "literal sizes": (two(conv(), conv(8, 8), lambda _, x: x.flatten(2).view(2, 8, 8, 8)), "a"),
    "reversed": (two(conv(), conv(8, 8), lambda _, x: x.flip(1)), "a"),
}


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_the_forward_mixes_are_refused_by_name(name):
    model, mixed = MIXED[name]
    scores = {"a": torch.tensor([1.0, 9, 2, 9, 9, 9, 9, 9]), "b": torch.tensor([3.0] + [9] * 7)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^the forward mixes the channels of {mixed} in a way .*: exclude them$"):
        remove_channels(model, SMALL, 3 / 16, score=scores)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert remove_channels(model, SMALL, 1 / 8, score=scores, exclude="a").selection.removed("b") == [0]


def test_a_weight_that_the_forward_uses_by_itself():
    model = two(conv(), conv(8, 8), lambda net, x: x + F.conv2d(x, net.b.weight))
    with pytest.raises(ValueError, match="the forward mixes the channels of a, b in a way"):
        remove_channels(model, SMALL, 0.5, score="l1")


def test_attention_of_ones_own():
    model, x = attention(), torch.empty(2, 5, 7)
    with pytest.raises(ValueError, match="the forward mixes the channels of qkv in a way"):
        remove_channels(model, x, 0.3, score="l1", include="qkv")
    assert model.qkv.out_features == 24
    report = remove_channels(model, x, 0.5, score="l1", include=["up"])
    assert report.left["down"] == "not included"
    assert (model.up.out_features, model.down.in_features, model.qkv.out_features) == (6, 6, 24)
    report = remove_channels(model, x, 0.5, score="l1", exclude="qkv")
    assert report.left == {"qkv": "excluded", "head": "an output of the model"}
    assert [(g.layers, g.channels) for g in report.groups] == [
        (("embed", "out", "down"), 8),
        (("qkv",), 8),
        (("up",), 6),
    ]
    assert model.norm1.normalized_shape == model.norm2.normalized_shape == (model.head.in_features,)


def test_layers_that_carry_channels_shrink_with_them():
    def compute(net, tokens):
        x = net.rms(net.embed(tokens) + net.position)
        x = net.layer(x + net.down(F.relu(net.up(x)))).transpose(1, 2)
        return net.head(net.prelu(net.instance(net.scale * x)).mean(2))

    model = Net(
        compute, embed=nn.Embedding(11, 8), position=nn.Parameter(torch.randn(1, 5, 8)), rms=nn.RMSNorm(8),
        up=nn.Linear(8, 3), down=nn.Linear(3, 8), layer=nn.LayerNorm(8, bias=False),
        scale=nn.Parameter(torch.randn(8, 1)), instance=nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
        prelu=nn.PReLU(8), head=nn.Linear(8, 4),
    )  # fmt: skip
    with torch.no_grad():
        for values_of in (*model.parameters(), model.instance.running_mean, model.instance.running_var):
            values_of.uniform_(0.5, 1.5)
    whole = {n: t.clone() for n, t in model.state_dict().items()}
    report = remove_channels(model, TOKENS, 3 / 11, score="l1", exclude="up")
    kept = list(report.selection.kept["down"])
    dims = {
        "embed.weight": 1, "position": 2, "rms.weight": 0, "up.weight": 1, "down.weight": 0, "down.bias": 0,
        "layer.weight": 0, "scale": 0, "instance.weight": 0, "instance.bias": 0, "instance.running_mean": 0,
        "instance.running_var": 0, "prelu.weight": 0, "head.weight": 1,
    }  # fmt: skip
    assert len(kept) == 6  # round(3 / 11 of down's 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(
            tensor, whole[name].index_select(dims[name], torch.tensor(kept)) if name in dims else whole[name]
        )
    assert model.embed.embedding_dim == model.instance.num_features == model.prelu.num_parameters == 6
    assert model.rms.normalized_shape == model.layer.normalized_shape == (6,)


def test_a_layer_that_is_called_twice():
    shared = conv(8, 8)
    model = Net(lambda n, x: n.c(F.relu(n.b(F.relu(n.b(n.a(x)))))), a=conv(), b=shared, c=conv(8, 2))
    model.double()
    whole, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = remove_channels(model, SMALL, 0.5, score="l1")
    assert [(g.layers, g.channels) for g in report.groups] == [(("a", "b"), 8)]
    with torch.no_grad():
        torch.testing.assert_close(model(x), zeroed(whole, report)(x), rtol=1e-12, atol=1e-12)


def test_halves_of_a_gate_go_together():
    model = Net(lambda n, x: n.b(torch.mul(*n.a(x).chunk(2, 1))), a=conv(3, 10), b=conv(5, 2))
    weight = model.a.weight.clone()
    report = remove_channels(model, SMALL, 0.4, score={"a": torch.tensor([1.0, 5, 4, 0, 3])})
    assert report.groups[0].outputs("a").entries == ((0, 5), (1, 6), (2, 7), (3, 8), (4, 9))
    assert torch.equal(model.a.weight, weight[[1, 2, 4, 6, 7, 9]])
    assert kept_filters(report.selection, report.groups) == {"a": 6}


def test_a_gate_of_one_channel_is_not_joined():
    model = Net(lambda n, x: n.b(n.a(x) * n.gate(x).sigmoid()).mean((2, 3)), a=conv(), gate=conv(3, 1), b=conv(8, 2))
    report = remove_channels(model, SMALL, 4 / 9, score="l1")
    assert [(g.layers, g.channels) for g in report.groups] == [(("a",), 8), (("gate",), 1)]
    assert (model.a.out_channels, model.gate.out_channels, model.b.in_channels) == (4, 1, 4)


def test_include_and_exclude():
    def chosen(**which):
        report = remove_channels(network(), SIDE, 0.25, **which)
        assert all(len(report.selection.kept[n]) == c for n, c in report.selection.channels.items() if n in report.left)
        return report, {name for name in RESNET18 if name not in report.left}

    every = set(RESNET18)
    layer4 = {"layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"}
    assert chosen()[1] == every
    assert chosen(include="layer4")[1] == layer4
    assert chosen(include=["layer4.*", "layer3"], exclude="layer3")[1] == layer4
    assert chosen(exclude=lambda name, p: p.shape[0] < 64)[1] == layer4
    report, names = chosen(exclude="layer1.0.conv2")
    assert names == every - {"conv1"}
    assert report.left == {
        "conv1": "joined with layer1.0.conv2, excluded",
        "layer1.0.conv2": "excluded",
        "layer1.1.conv2": "joined with layer1.0.conv2, excluded",
        "fc": "an output of the model",
    }
    model = network()
    remove_channels(model, SIDE, 0.5, include=model.layer2[1].conv1)
    assert model.layer2[1].conv1.out_channels == 8
    with pytest.raises(ValueError, match=r"^include layer5 selects no conv or linear layer of the model$"):
        chosen(include=["layer4", "layer5"])
    with pytest.raises(ValueError, match=r"^no channels can be removed: fc \(an output of the model\); conv1, layer1"):
        chosen(exclude="*")


def test_the_report_is_a_table():
    model = tiny()
    report = remove_channels(model, torch.empty(1, 3, 8, 8), 0.5, score=lambda g: torch.arange(float(g.channels)))
    assert str(report) == (
        "group  channels  kept  layers\n"
        "0             4     1  0\n"
        "3             6     4  3\n"
        "total        10     5\n"
        "left: 7 (an output of the model)\n"
        "parameters: 193 -> 70 (0.3627)\n"
        "flops: 16,956 -> 4,008 (0.2364)"
    )


BAD = {
    "fraction": ({"fraction": 1.5}, r"\[0, 1\]"),
    "too many": ({"fraction": 1.0}, "cannot remove 360 of 360"),
    "unknown score": ({"score": "l3"}, "unknown score 'l3': give gamma, l1, l2, a function, or tensors"),
    "not a score": ({"score": None}, "unknown score None"),
    "a group without": ({"score": {"conv1": torch.ones(8)}}, "score has no tensor for the group layer1.0.conv1"),
    "a wrong shape": ({"score": lambda group: torch.ones(3)}, r"conv1 is \(3,\), expected a tensor of shape \(8,\)"),
    "a list": ({"score": lambda group: [1.0] * group.channels}, "the score of conv1 is list"),
    "nan": ({"score": lambda group: torch.full((group.channels,), torch.nan)}, "conv1 has scores that are not finite"),
    "no such layer": ({"exclude": "head"}, "exclude head selects no conv or linear layer"),
    "a bad example": ({"example_inputs": torch.empty(1, 4, 32, 32)}, "to have 3 channels"),
    "no example": ({"example_inputs": ()}, "example_inputs must be a tensor or a tuple of tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_call_that_fails_changes_nothing(name):
    arguments, says = BAD[name]
    model = network().train()
    model.layer2.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    parameters, state = [(p, p.grad) for p in model.parameters()], copy.deepcopy(model.state_dict())
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    random = torch.get_rng_state()
    with pytest.raises((ValueError, RuntimeError, TypeError), match=says):
        remove_channels(**({"model": model, "example_inputs": SIDE, "fraction": 0.5} | arguments))
    assert torch.equal(torch.get_rng_state(), random)
    assert [type(m) for m in model.modules()] == kinds
    assert [m.training for m in model.modules()] == modes
    assert all(p is q and p.grad is g for (p, g), q in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_stays(guard, capsys):
    model = Net(
        lambda net, x: F.dropout(net.c(F.relu(net.n(net.b(net.a(x)))))),
        a=nn.Conv3d(2, 6, 3), b=nn.Conv3d(6, 5, 1), n=nn.BatchNorm3d(5), c=nn.Conv3d(5, 3, 1),
    ).to(memory_format=torch.channels_last_3d)  # fmt: skip
    model.b.requires_grad_(False)
    model.n.eval()
    random, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    with guard():
        remove_channels(model, VOLUME, 0.3, score="l1")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"b.weight", "b.bias"}
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not model.a.weight.is_contiguous()
    assert all(p.is_leaf and not p.is_inference() for p in model.parameters())
    assert capsys.readouterr() == ("", "")
    model(VOLUME).square().mean().backward()


def test_any_network_on_the_meta_device():
    for name in ("unet", "transformer", "groupnorm"):
        model, example, _, _ = made(name)
        planned = copy.deepcopy(model).to("meta")
        groups = channel_groups(model, example)
        selection = select(groups, {g.name: torch.arange(float(g.channels)) for g in groups}, 0.4)
        assert channel_groups(planned, example) == groups
        remove(model, selection, example)
        remove(planned, selection, example)
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        assert {n: t.shape for n, t in planned.state_dict().items()} == shapes


def test_a_half_precision_network():
    model = made("unet")[0].bfloat16()
    expected = copy.deepcopy(model).double()
    report = remove_channels(model, torch.empty(1, 3, 16, 16), 0.4)
    again = remove_channels(expected, torch.empty(1, 3, 16, 16), 0.4)
    assert report.selection == again.selection
    assert all(t.dtype == torch.bfloat16 for t in model.state_dict().values() if t.is_floating_point())


def test_cost_by_hand():
    model = tiny()
    # Parameters: 4x3x3x3 + 2x4 of the first conv and norm, 6x4 + 6 and 2x6 of the second, 5x6 + 5 of the classifier.
    # Multiplications: 27 for each of 4 channels at 8x8 places, 4 for each of 6 at as many, 6 for each of 5 classes.
    assert cost(model, 8) == Cost(108 + 8 + 30 + 12 + 35, 2 * (27 * 4 * 64 + 4 * 6 * 64 + 6 * 5))
    groups = channel_groups(model, 8)
    assert groups == (Group(("0",), ("1",), 4), Group(("3",), ("4",), 6))
    selection = Selection({"0": (0, 3), "3": (1, 2, 4)}, {"0": 4, "3": 6}, ())
    weight, bias, first = model[3].weight.clone(), model[3].bias.clone(), model[0].weight.clone()
    assert cost(remove(model, selection, 8), 8) == Cost(54 + 4 + 9 + 6 + 20, 2 * (27 * 2 * 64 + 2 * 3 * 64 + 3 * 5))
    assert torch.equal(model[0].weight, first[[0, 3]])
    assert torch.equal(model[3].weight, weight[[1, 2, 4]][:, [0, 3]])
    assert torch.equal(model[3].bias, bias[[1, 2, 4]])


def test_latency_is_the_median_of_rounds_in_turn(monkeypatch):
    whole, small = tiny(), tiny()
    state = copy.deepcopy(whole.state_dict())
    calls = []

    def pretend(model, batch, device):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        assert batch.shape == (2, 3, 8, 8)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert model is not whole
        calls.append("whole" if torch.equal(model[0].weight, whole[0].weight) else "small")
        return {"whole": [5.0, 100.0, 4.0], "small": [1.0, 2.0, 3.0]}[calls[-1]][calls.count(calls[-1]) - 1]

    monkeypatch.setattr(latency_module, "_milliseconds", pretend)
    random = torch.get_rng_state()
    times = latency({"whole": whole, "small": small}, 8, 2, "cpu", repeats=3, warmup=1)
    # Rounds (5, 1), (100, 2) and (4, 3): ratios 0.2, 0.02 and 0.75.
    assert times["whole"] == Latency(5.0, 1.0, (1.0, 1.0), 3)
    assert times["small"] == Latency(2.0, 0.2, (pytest.approx(0.11), pytest.approx(0.475)), 3)
    assert calls == ["whole", "small", "small", "whole", "whole", "small"]
    assert torch.equal(torch.get_rng_state(), random)
    assert whole.training
    assert all(torch.equal(t, state[n]) for n, t in whole.state_dict().items())


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))],
)
def test_latency_measures(device):
    times = latency({"wide": network(width=32), "narrow": network(width=4)}, SIDE, 8, device, repeats=5)
    assert 0.0 < times["narrow"].ms < 10_000.0
    low, high = times["narrow"].quartiles
    assert low <= times["narrow"].relative <= high
    assert times["wide"].relative == 1.0
    assert device == "cuda" or times["narrow"].relative < 1.0  # launches decide on a GPU
    assert latency({}, SIDE, 1, device) == {}


def test_latency_refuses():
    with pytest.raises(ValueError, match="not on meta"):
        latency({"tiny": tiny()}, 8, 1, "meta")
    with pytest.raises(ValueError, match="at least one repeat"):
        latency({"tiny": tiny()}, 8, 1, "cpu", repeats=0)
