"""Which channels are joined, which of them go, and that the network without them computes what it should."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.pruning import channels as latency_module
from fastprune.pruning.channels import (
    Cost,
    Group,
    Selection,
    channel_groups,
    cost,
    gamma_scores,
    kept_filters,
    latency,
    remove,
    select,
)
from fastprune.pruning.masks import attach
from fastprune.specs import ModelSpec
from fastprune.training.flat import FlatParams
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
    convs = [c for group in channel_groups(model, 64) for c in group.convs]
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
    assert [(g.channels, " ".join(g.convs), " ".join(g.norms)) for g in groups] == list(RESNET18.values())
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


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (block(nn.Conv2d(3, 4, 3)), "0 has no batch norm"),
        (block(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), "1 cannot be removed: it is a GroupNorm"),
        (
            block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
            "2 is a masked",
        ),
        (
            block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
            "2 is a masked",
        ),
        (attach(network()), "conv1 is a masked"),
    ],
    ids=["no norm", "other norm", "grouped", "depthwise", "masked"],
)
def test_networks_that_cannot_be_pruned_so(model, says):
    with pytest.raises(ValueError, match=says):
        channel_groups(model, SIDE)


def test_a_conv_that_the_network_does_not_use():
    model = network()
    model.spare = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="is it used"):
        channel_groups(model, SIDE)


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
    assert kept_filters(selection, THREE) == {c: len(kept[g.name]) for g in THREE for c in g.convs}


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


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", BY_HAND)
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
    assert [(g.convs, g.channels) for g in channel_groups(model, SIDE)] == [(g.convs, kept[g.name]) for g in groups]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    start = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(model(torch.randn(4, 3, SIDE, SIDE)), torch.arange(4)).backward()
    optimiser.step()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(t, start[n]) for n, t in model.state_dict().items() if n.endswith("bias"))


def stream(groups: tuple[Group, ...]) -> str:
    """The group of the last stage's residual stream: the one with its shortcut conv."""
    return next(g.name for g in groups if "layer4.0.downsample.0" in g.convs)


def test_flat_parameters_take_the_smaller_network():
    model = remove(network(), ranked(network(), 0.5)[1], SIDE)
    flat = FlatParams(model)
    flat.backward(model(torch.randn(4, 3, SIDE, SIDE)).square().mean())
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
    assert latency({"whole": whole, "small": small}, 8, 2, "cpu", repeats=3, warmup=1) == {"whole": 5.0, "small": 2.0}
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
    assert 0.0 < times["narrow"] < 10_000.0
    assert device == "cuda" or times["narrow"] < times["wide"]  # launches decide on a GPU
    assert latency({}, SIDE, 1, device) == {}


def test_latency_refuses():
    with pytest.raises(ValueError, match="not on meta"):
        latency({"tiny": tiny()}, 8, 1, "meta")
    with pytest.raises(ValueError, match="at least one repeat"):
        latency({"tiny": tiny()}, 8, 1, "cpu", repeats=0)
