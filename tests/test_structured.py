"""Whole filters: groups listed by hand, rankings by hand, and networks that are really smaller."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastprune.latency import latency
from fastprune.models import build
from fastprune.specs import ModelSpec
from fastprune.structured import Group, Selection, channel_groups, cost, gamma_scores, kept_filters, remove, select

SIZE = 32


def network(name: str, stem: str = "imagenet") -> nn.Module:
    """Width 8, with gammas, statistics and a classifier as after some training."""
    torch.manual_seed(0)
    model = build(ModelSpec(name, 5, stem, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.0, 1.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def alone(conv: str, norm: str, channels: int) -> Group:
    return Group((conv,), (norm,), channels)


RESNET18 = (
    Group(("conv1", "layer1.0.conv2", "layer1.1.conv2"), ("bn1", "layer1.0.bn2", "layer1.1.bn2"), 8),
    alone("layer1.0.conv1", "layer1.0.bn1", 8),
    alone("layer1.1.conv1", "layer1.1.bn1", 8),
    alone("layer2.0.conv1", "layer2.0.bn1", 16),
    Group(
        ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"),
        ("layer2.0.bn2", "layer2.0.downsample.1", "layer2.1.bn2"),
        16,
    ),
    alone("layer2.1.conv1", "layer2.1.bn1", 16),
    alone("layer3.0.conv1", "layer3.0.bn1", 32),
    Group(
        ("layer3.0.conv2", "layer3.0.downsample.0", "layer3.1.conv2"),
        ("layer3.0.bn2", "layer3.0.downsample.1", "layer3.1.bn2"),
        32,
    ),
    alone("layer3.1.conv1", "layer3.1.bn1", 32),
    alone("layer4.0.conv1", "layer4.0.bn1", 64),
    Group(
        ("layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"),
        ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2"),
        64,
    ),
    alone("layer4.1.conv1", "layer4.1.bn1", 64),
)

# The first conv does not join the first stage's residuals: each of its blocks' shortcuts is a conv of its own.
RESNET50 = (
    alone("conv1", "bn1", 8),
    alone("layer1.0.conv1", "layer1.0.bn1", 8),
    alone("layer1.0.conv2", "layer1.0.bn2", 8),
    Group(
        ("layer1.0.conv3", "layer1.0.downsample.0", "layer1.1.conv3", "layer1.2.conv3"),
        ("layer1.0.bn3", "layer1.0.downsample.1", "layer1.1.bn3", "layer1.2.bn3"),
        32,
    ),
    alone("layer1.1.conv1", "layer1.1.bn1", 8),
    alone("layer1.1.conv2", "layer1.1.bn2", 8),
    alone("layer1.2.conv1", "layer1.2.bn1", 8),
    alone("layer1.2.conv2", "layer1.2.bn2", 8),
    alone("layer2.0.conv1", "layer2.0.bn1", 16),
    alone("layer2.0.conv2", "layer2.0.bn2", 16),
    Group(
        ("layer2.0.conv3", "layer2.0.downsample.0", "layer2.1.conv3", "layer2.2.conv3", "layer2.3.conv3"),
        ("layer2.0.bn3", "layer2.0.downsample.1", "layer2.1.bn3", "layer2.2.bn3", "layer2.3.bn3"),
        64,
    ),
    alone("layer2.1.conv1", "layer2.1.bn1", 16),
    alone("layer2.1.conv2", "layer2.1.bn2", 16),
    alone("layer2.2.conv1", "layer2.2.bn1", 16),
    alone("layer2.2.conv2", "layer2.2.bn2", 16),
    alone("layer2.3.conv1", "layer2.3.bn1", 16),
    alone("layer2.3.conv2", "layer2.3.bn2", 16),
    alone("layer3.0.conv1", "layer3.0.bn1", 32),
    alone("layer3.0.conv2", "layer3.0.bn2", 32),
    Group(
        (
            "layer3.0.conv3", "layer3.0.downsample.0", "layer3.1.conv3", "layer3.2.conv3", "layer3.3.conv3",
            "layer3.4.conv3", "layer3.5.conv3",
        ),
        (
            "layer3.0.bn3", "layer3.0.downsample.1", "layer3.1.bn3", "layer3.2.bn3", "layer3.3.bn3",
            "layer3.4.bn3", "layer3.5.bn3",
        ),
        128,
    ),
    alone("layer3.1.conv1", "layer3.1.bn1", 32),
    alone("layer3.1.conv2", "layer3.1.bn2", 32),
    alone("layer3.2.conv1", "layer3.2.bn1", 32),
    alone("layer3.2.conv2", "layer3.2.bn2", 32),
    alone("layer3.3.conv1", "layer3.3.bn1", 32),
    alone("layer3.3.conv2", "layer3.3.bn2", 32),
    alone("layer3.4.conv1", "layer3.4.bn1", 32),
    alone("layer3.4.conv2", "layer3.4.bn2", 32),
    alone("layer3.5.conv1", "layer3.5.bn1", 32),
    alone("layer3.5.conv2", "layer3.5.bn2", 32),
    alone("layer4.0.conv1", "layer4.0.bn1", 64),
    alone("layer4.0.conv2", "layer4.0.bn2", 64),
    Group(
        ("layer4.0.conv3", "layer4.0.downsample.0", "layer4.1.conv3", "layer4.2.conv3"),
        ("layer4.0.bn3", "layer4.0.downsample.1", "layer4.1.bn3", "layer4.2.bn3"),
        256,
    ),
    alone("layer4.1.conv1", "layer4.1.bn1", 64),
    alone("layer4.1.conv2", "layer4.1.bn2", 64),
    alone("layer4.2.conv1", "layer4.2.bn1", 64),
    alone("layer4.2.conv2", "layer4.2.bn2", 64),
)  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), [("resnet18", RESNET18), ("resnet50", RESNET50)])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_groups_by_hand(name, expected, stem):
    model = network(name, stem).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert channel_groups(model, SIZE) == expected
    convs = [conv for group in expected for conv in group.convs]
    assert sorted(convs) == sorted(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert all(m.training for m in model.modules())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())


A, B = Group(("a", "c"), ("na", "nc"), 3), Group(("b",), ("nb",), 4)


def test_joined_channels_are_ranked_by_the_sum_of_their_gammas():
    state = {"na.weight": torch.tensor([1.0, -2.0, 0.5]), "nc.weight": torch.tensor([-4.0, 1.0, 0.25])}
    scores = gamma_scores([A, B], state | {"nb.weight": torch.tensor([-3.0, 0.1, 0.75, 9.0])})
    assert scores["a"].tolist() == [5.0, 3.0, 0.75]
    assert scores["b"].tolist() == pytest.approx([3.0, 0.1, 0.75, 9.0])
    with pytest.raises(ValueError, match="no batch norm"):
        gamma_scores([Group(("a",), (), 3)], state)


def scored(a: list[float], b: list[float]) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


def test_the_lowest_of_all_groups_go_ties_by_position():
    scores = scored([5.0, 3.0, 0.75], [3.0, 0.1, 0.75, 9.0])
    # Rising: b1 0.1, a2 and b2 0.75, a1 and b0 3, a0 5, b3 9; of equals the earlier group goes first.
    for gone, kept in enumerate([
        {"a": (0, 1, 2), "b": (0, 1, 2, 3)},
        {"a": (0, 1, 2), "b": (0, 2, 3)},
        {"a": (0, 1), "b": (0, 2, 3)},
        {"a": (0, 1), "b": (0, 3)},
        {"a": (0,), "b": (0, 3)},
        {"a": (0,), "b": (3,)},
    ]):  # fmt: skip
        assert select([A, B], scores, gone / 7) == Selection(kept, ())


def test_a_layer_keeps_its_best_filter_and_the_next_goes_instead():
    scores = scored([0.1, 0.3, 0.2], [5.0, 6.0, 7.0, 8.0])
    assert select([A, B], scores, 3 / 7) == Selection({"a": (1,), "b": (1, 2, 3)}, ("a",))
    assert select([A, B], scores, 2 / 7) == Selection({"a": (1,), "b": (0, 1, 2, 3)}, ())
    same = scored([0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert select([A, B], same, 5 / 7) == Selection({"a": (0,), "b": (0,)}, ("a",))


def test_what_cannot_be_selected():
    scores = scored([1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    for fraction in (6 / 7, 1.0):
        with pytest.raises(ValueError, match="each of 2 groups keeps one"):
            select([A, B], scores, fraction)
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction"):
            select([A, B], scores, fraction)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a has scores"):
            select([A, B], scored([1.0, value, 1.0], [1.0] * 4), 0.3)


@given(st.data())
def test_exactly_as_many_go_and_every_group_keeps_its_best(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    groups = [Group((f"c{i}",), (f"n{i}",), n) for i, n in enumerate(sizes)]
    value = st.sampled_from([0.0, 0.5, 1.0, 2.0])
    scores = {g.name: torch.tensor(data.draw(st.lists(value, min_size=g.channels, max_size=g.channels))) for g in groups}
    fraction = data.draw(st.floats(0, (sum(sizes) - len(sizes)) / sum(sizes)))
    selection = select(groups, scores, fraction)
    assert sum(sizes) - sum(map(len, selection.kept.values())) == round(fraction * sum(sizes))
    for group in groups:
        kept = selection.kept[group.name]
        assert int(scores[group.name].argmax()) in kept
    worst_kept = min(
        (scores[g.name][i].item() for g in groups for i in selection.kept[g.name][1:]), default=math.inf
    )
    gone = [scores[g.name][i].item() for g in groups for i in set(range(g.channels)) - set(selection.kept[g.name])]
    best = {g.name: scores[g.name].max().item() for g in groups}
    spare = [
        scores[g.name][i].item()
        for g in groups
        for i in selection.kept[g.name]
        if scores[g.name][i].item() < best[g.name]
    ]
    assert max(gone, default=-1) <= min(spare, default=math.inf)
    assert worst_kept >= 0
    assert Selection.from_dict(json.loads(json.dumps(selection.as_dict()))) == selection


@pytest.mark.parametrize(
    "content",
    [
        None, [], {}, {"kept": 3, "spared": []}, {"kept": {"a": []}, "spared": []}, {"kept": {"a": [1, 0]}, "spared": []},
        {"kept": {"a": [0, 0]}, "spared": []}, {"kept": {"a": [-1]}, "spared": []}, {"kept": {"a": [0.5]}, "spared": []},
        {"kept": {"a": [True]}, "spared": []}, {"kept": {"a": ["0"]}, "spared": []}, {"kept": {"a": [0]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_foreign_selection_is_refused(content):
    with pytest.raises(ValueError, match="selection|rising"):
        Selection.from_dict(content)


def test_a_selection_of_another_network_is_not_applied():
    model = network("resnet18")
    before = cost(model, SIZE)
    kept = {g.name: tuple(range(g.channels)) for g in RESNET18}
    for wrong in (kept | {"conv1": (0, 8)}, {**kept, "extra": (0,)}, dict(list(kept.items())[1:])):
        with pytest.raises(ValueError, match="network|has 8 filters"):
            remove(model, Selection(wrong, ()), SIZE)
    assert cost(model, SIZE) == before


def silenced(model: nn.Module, selection: Selection, groups: tuple[Group, ...]) -> nn.Module:
    """The whole network with gamma and beta of what goes at zero."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group in groups:
            gone = [i for i in range(group.channels) if i not in selection.kept[group.name]]
            for norm in group.norms:
                modules[norm].weight[gone] = 0.0
                modules[norm].bias[gone] = 0.0
    return model


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("name", "groups"), [("resnet18", RESNET18), ("resnet50", RESNET50)])
def test_the_smaller_network_computes_what_the_silenced_one_does(name, groups, fraction):
    model, whole = network(name).double().eval(), network(name).double().eval()
    selection = select(groups, gamma_scores(groups, model.state_dict()), fraction)
    small = remove(model, selection, SIZE)
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(images), silenced(whole, selection, groups)(images), rtol=1e-9, atol=1e-9)
    left = kept_filters(selection, groups)
    for conv, n in left.items():
        assert dict(small.named_modules())[conv].out_channels == n
        assert dict(small.named_parameters())[f"{conv}.weight"].shape[0] == n
    assert sum(map(len, selection.kept.values())) == sum(g.channels for g in groups) - round(
        fraction * sum(g.channels for g in groups)
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("fraction", [i / 10 for i in range(1, 10)])
def test_every_sparsity_of_the_figure_trains(name, fraction):
    from fastprune.specs import OptimizerSpec, ScheduleSpec
    from fastprune.train import Trainer

    model = network(name)
    groups = channel_groups(model, SIZE)
    before = cost(model, SIZE)
    remove(model, select(groups, gamma_scores(groups, model.state_dict()), fraction), SIZE)
    after = cost(model, SIZE)
    assert after.parameters < before.parameters
    assert after.flops < before.flops
    assert after.parameters == sum(p.numel() for p in model.parameters())
    batch = [(torch.randn(4, 3, SIZE, SIZE), torch.arange(4))]
    (metrics,) = Trainer(model).fit(batch, batch, OptimizerSpec(4), ScheduleSpec(0.01, 1))
    assert math.isfinite(metrics.train_loss)


def test_torch_pruning_chooses_the_same_where_no_group_dies():
    """Its own global pruning, with raw sums: it takes int(channels x ratio) of the ranking, where we round."""
    import torch_pruning as tp

    model, other = network("resnet18"), network("resnet18")
    groups = channel_groups(model, SIZE)
    fraction = 0.25  # of 360: 90, whole in both
    selection = select(groups, gamma_scores(groups, model.state_dict()), fraction)
    assert selection.spared == ()
    importance = tp.importance.BNScaleImportance(group_reduction="sum", normalizer=None)
    pruner = tp.pruner.BasePruner(
        other,
        torch.zeros(1, 3, SIZE, SIZE),
        importance,
        global_pruning=True,
        pruning_ratio=fraction,
        ignored_layers=[other.fc],
    )
    pruner.step()
    mine = {k: v.shape for k, v in remove(model, selection, SIZE).state_dict().items()}
    assert mine == {k: v.shape for k, v in other.state_dict().items()}
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_flops_by_hand():
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    found = cost(model, 8)
    assert found.flops == 2 * (8 * 8 * 4 * 3 * 9) + 2 * (4 * 2)
    assert found.parameters == 4 * 3 * 9 + 8 + 4 * 2 + 2


def test_latency_times_each_and_leaves_statistics_alone():
    models = {"one": network("resnet18"), "two": network("resnet50")}
    before = models["one"].bn1.running_mean.clone()
    found = latency(models, SIZE, 2, "cpu")
    assert found.keys() == models.keys()
    assert all(ms > 0 for ms in found.values())
    assert torch.equal(models["one"].bn1.running_mean, before)


def test_importing_it_needs_no_torch_pruning():
    import subprocess

    code = "import sys, fastprune.structured; sys.exit('torch_pruning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


