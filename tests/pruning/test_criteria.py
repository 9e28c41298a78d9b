"""Criteria against their definitions: by hand, or computed here in float64. What is no score changes nothing."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastprune import Pruner, criteria, schedules
from fastprune.pruning.criteria import scores_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pruner_of(model: nn.Module, **options: Any) -> Pruner:
    return Pruner(model, verbose=False, **options)


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers with tanh between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def two_layers(dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)) -> nn.Sequential:
    """A conv of shape (3, 2, 2, 1), stored channels-last, and a linear layer (2, 5): 12 and 10 weights."""
    conv = nn.Conv2d(2, 3, (2, 1), bias=False, dtype=dtypes[0]).to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.Linear(5, 2, bias=False, dtype=dtypes[1]))


def kept_by_rank(scores: dict[str, Tensor], masks: dict[str, Tensor], count: int) -> dict[str, list[bool]]:
    """Masks without the `count` lowest scores of all layers; of equal ones the first, in the layers' order."""
    ranked, position = [], 0
    for name, mask in masks.items():
        for score, keep in zip(scores[name].flatten().tolist(), mask.flatten().tolist(), strict=True):
            ranked.append((score, position, keep))
            position += 1
    gone = {position for _, position, _ in sorted(r for r in ranked if r[2])[:count]}
    flat, result = [keep and position not in gone for _, position, keep in ranked], {}
    for name, mask in masks.items():
        result[name], flat = flat[: mask.numel()], flat[mask.numel() :]
    return result


def flat_masks(pruner: Pruner) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in pruner.masks.items()}


# The selection, with whatever scores


@settings(deadline=None)
@given(st.data())
def test_any_scores_rank_all_layers_together(data):
    """Signed or not, of mixed dtypes, tied, of both zeros, under an earlier mask: against a sort in Python."""
    model = two_layers()
    pruner = pruner_of(model)
    few, many = [-1.0, -0.0, 0.0], [-2.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0]
    values = st.sampled_from(data.draw(st.sampled_from([few, many])))
    some = values if data.draw(st.booleans(), "signed") else values.map(abs)
    earlier, scores = {}, {}
    for name, weight in pruner.weights().items():
        n = weight.numel()
        drawn = data.draw(st.lists(some, min_size=n, max_size=n), name)
        scores[name] = torch.tensor(drawn, dtype=data.draw(st.sampled_from(DTYPES))).view(weight.shape)
        if data.draw(st.booleans(), "stored channels-last") and weight.dim() == 4:
            scores[name] = scores[name].to(memory_format=torch.channels_last)
        earlier[name] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))).view(weight.shape)
    pruner.set_masks(earlier)
    count = data.draw(st.integers(0, pruner.kept), "count")
    expected = kept_by_rank(scores, earlier, count)
    assert pruner.prune(n=count, criterion=scores) == count
    assert flat_masks(pruner) == expected


@settings(deadline=None)
@given(st.data())
def test_magnitudes_rank_all_layers_together(data):
    """Also of layers of different dtypes, whose values are compared as numbers."""
    dtypes = data.draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)))
    model = two_layers(dtypes)
    values = st.sampled_from([-3.0, -1.0, -0.25, -0.0, 0.0, 0.25, 0.5, 1.0])
    for p in model.parameters():
        drawn = data.draw(st.lists(values, min_size=p.numel(), max_size=p.numel()))
        p.data.copy_(torch.tensor(drawn).view(p.shape))
    pruner = pruner_of(model, adopt_zeros=False)
    magnitudes = {name: w.detach().abs().double() for name, w in pruner.weights().items()}
    count = data.draw(st.integers(0, 22), "count")
    expected = kept_by_rank(magnitudes, pruner.masks, count)
    assert pruner.prune(n=count) == count
    assert flat_masks(pruner) == expected
    for name, weight in pruner.weights().items():
        assert weight.dtype == dtypes[list(pruner.masks).index(name)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signed_scores_of_both_zeros_tie(dtype):
    pruner = pruner_of(nn.Linear(5, 1))
    pruner.prune(n=3, criterion={"weight": torch.tensor([[0.0, -0.0, -1.0, 2.0, -0.0]], dtype=dtype)})
    assert flat_masks(pruner) == {"weight": [False, False, False, True, True]}


def test_scores_that_differ_only_in_float64():
    model = nn.Linear(4, 1)
    pruner = pruner_of(model)
    close = 1.0 + torch.tensor([[3.0, 1.0, 0.0, 2.0]], dtype=torch.float64) * 2.0**-40
    assert close.float().unique().tolist() == [1.0]
    pruner.prune(n=2, criterion={"weight": close})
    assert flat_masks(pruner) == {"weight": [True, False, False, True]}


def test_scores_of_one_value_need_no_memory_of_their_own():
    """Expanded scores: those of the lowest positions go first."""
    model = two_layers()
    pruner = pruner_of(model)
    pruner.prune(n=15, criterion=lambda weights: {n: torch.tensor(0.5).expand(w.shape) for n, w in weights.items()})
    assert flat_masks(pruner) == {"0.weight": [False] * 12, "1.weight": [False] * 3 + [True] * 7}
    sparse = torch.tensor([3.0, 0.0, 1.0, 0.0, 2.0, 0.0, 5.0, 0.0, 4.0, 0.0])[::2].expand(2, 5)
    pruner.prune(n=4, criterion={"0.weight": torch.zeros(3, 2, 2, 1), "1.weight": sparse})
    assert flat_masks(pruner)["1.weight"] == [i in (3, 8, 9) for i in range(10)]


def test_scores_of_other_names_are_ignored():
    pruner = pruner_of(nn.Linear(2, 1))
    pruner.prune(n=1, criterion={"weight": torch.tensor([[2.0, 1.0]]), "bias": torch.tensor(math.nan)})
    assert flat_masks(pruner) == {"weight": [True, False]}


NO_SCORES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "of one layer only": (lambda w: {"0.weight": w["0.weight"].abs()}, "no scores of 1.weight"),
    "transposed": (lambda w: {n: s.abs().mT for n, s in w.items()}, "no scores of 0.weight.* shape"),
    "one for a row": (lambda w: {n: s.abs().sum(-1) for n, s in w.items()}, "no scores of 0.weight"),
    "NaN in the last layer": (
        lambda w: {"0.weight": w["0.weight"].abs(), "1.weight": torch.full((2, 5), math.nan)},
        "scores of 1.weight are NaN",
    ),
    "inf": (lambda w: {n: s / 0 for n, s in w.items()}, "scores of 0.weight are NaN or inf"),
    "minus inf": (lambda w: {n: torch.full_like(s, -math.inf) for n, s in w.items()}, "NaN or inf"),
    "whole numbers": (lambda w: {n: s.long() for n, s in w.items()}, "tensor of floats"),
    "bools": (lambda w: {n: s > 0 for n, s in w.items()}, "tensor of floats"),
    "arrays": (lambda w: {n: s.detach().numpy() for n, s in w.items()}, "tensor of floats"),
    "a tensor": (lambda w: w["0.weight"], "not a Parameter"),
    "nothing": (lambda w: None, "not a NoneType"),
    "a list": (lambda w: list(w.values()), "not a list"),
}


@pytest.mark.parametrize("what", NO_SCORES)
@pytest.mark.parametrize("allocation", ["global", "uniform", "1:1"])
def test_what_is_no_score_is_refused_and_changes_nothing(what, allocation):
    torch.manual_seed(0)
    model = two_layers()
    pruner = pruner_of(model)
    pruner.prune(0.3)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(pruner.masks))
    function, words = NO_SCORES[what]
    for criterion in (function, function(pruner.weights())) if what != "a tensor" else (function,):
        with pytest.raises(ValueError, match=words):
            pruner.prune(*([] if allocation == "1:1" else [0.5]), criterion=criterion, allocation=allocation)
    for then, now in zip(before, (model.state_dict(), pruner.masks), strict=True):
        assert all(torch.equal(then[name], now[name]) for name in then)


def test_an_error_in_a_users_function_changes_nothing():
    pruner = pruner_of(two_layers())

    def broken(weights):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pruner.prune(0.5, criterion=broken)
    assert pruner.kept == 22


@pytest.mark.parametrize("name", ["Magnitude", "snip", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="choose magnitude, random, lamp, taylor"):
        pruner_of(nn.Linear(2, 2)).prune(0.5, criterion=name)


def test_a_function_sees_the_parameters_with_their_gradients_and_no_graph_is_made():
    model = mlp(3, 4, 2)
    pruner = pruner_of(model)
    model(torch.ones(1, 3)).sum().backward()
    seen = {}

    def look(weights):
        seen.update(weights)
        scores = {name: w.grad.abs() + w for name, w in weights.items()}
        assert not any(s.requires_grad for s in scores.values())
        return scores

    pruner.prune(0.5, criterion=look)
    assert list(seen) == ["0.weight", "2.weight"]
    assert seen["0.weight"] is model[0].weight


def test_frozen_layers_are_neither_scored_nor_pruned():
    model = two_layers()
    pruner = pruner_of(model)
    model[0].weight.requires_grad_(False)
    seen = []
    pruner.prune(n=10, criterion=lambda weights: seen.extend(weights) or {n: w.abs() for n, w in weights.items()})
    assert seen == ["1.weight"]
    assert pruner.layerwise_ratios() == {"0.weight": 0.0, "1.weight": 1.0}


# LAMP


def lamp_by_definition(weights: list[float]) -> list[float]:
    """Lee et al., 2021, equation 2: w_u^2 over the sum of w_v^2 of all v >= u, weights in order of w^2."""
    order = sorted(range(len(weights)), key=lambda i: (weights[i] ** 2, i))
    scores = [0.0] * len(weights)
    for rank, i in enumerate(order):
        total = sum(weights[j] ** 2 for j in order[rank:])
        scores[i] = weights[i] ** 2 / total if total else 0.0
    return scores


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40), st.booleans())
def test_lamp_is_its_definition(values, channels_last):
    """Of small whole numbers, whose sums of squares are exact: equal to the bit, ties and zeros included."""
    weight = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 1, 1).clone()
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    scores = criteria.lamp({"a": nn.Parameter(weight)})["a"]
    assert scores.dtype == torch.float64
    assert scores.flatten().tolist() == lamp_by_definition(weight.flatten().tolist())


def test_lamp_of_ties_by_hand():
    # Squares 4 1 4 1 0: in order 0, 1, 1, 4, 4 with sums 10, 10, 9, 8, 4 above.
    scores = criteria.lamp({"a": nn.Parameter(torch.tensor([[2.0, -1.0, -2.0, 1.0, 0.0]]))})["a"]
    assert scores.tolist() == [[4 / 8, 1 / 10, 4 / 4, 1 / 9, 0.0]]


def test_lamp_finds_layerwise_sparsity_where_magnitudes_empty_a_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch.manual_seed(0)
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight * 1e-3)
    by_magnitude, by_lamp = pruner_of(copy.deepcopy(model)), pruner_of(model)
    by_magnitude.prune(0.5)
    by_lamp.prune(0.5, criterion="lamp")
    assert by_magnitude.layerwise_ratios() == {"0.weight": 0.0, "1.weight": 1.0}
    assert by_lamp.layerwise_ratios() == {"0.weight": 0.5, "1.weight": 0.5}  # it is the same layer but for its scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lamp_of_any_dtype_prunes_exactly(dtype):
    model = mlp(7, 9, 5, dtype=dtype)
    pruner = pruner_of(model)
    assert pruner.prune(n=41, criterion="lamp") == 41
    assert pruner.prune(n=41, criterion="lamp") == 41
    assert pruner.kept == 7 * 9 + 9 * 5 - 82


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", ["lamp", "taylor"])
def test_a_weight_that_is_not_finite_is_no_score(criterion, value):
    """One NaN must not become scores of 0 for its layer."""
    model = mlp(3, 4, 2)
    model(torch.ones(1, 3)).sum().backward()
    model[2].weight.data[1, 2] = value
    pruner = pruner_of(model)
    with pytest.raises(ValueError, match=r"scores of 2\.weight are NaN or inf"):
        pruner.prune(0.5, criterion=criterion)
    assert pruner.kept == pruner.total


# Gradients that are there: Taylor, movement


def test_taylor_is_weight_times_gradient():
    model = two_layers()
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    found = criteria.taylor(dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(found[name], (p.detach() * p.grad).abs())
        assert not found[name].requires_grad


def test_taylor_without_a_gradient():
    model = mlp(3, 4, 2)
    with pytest.raises(ValueError, match=r"0.weight has no gradient: run loss.backward\(\)"):
        pruner_of(model).prune(0.5, criterion="taylor")


def test_taylor_in_half_precision_neither_overflows_nor_ties():
    weight = nn.Parameter(torch.tensor([300.0, 3e-4, 2e-4, 1.0], dtype=torch.float16).view(1, 4))
    weight.grad = torch.tensor([[300.0, 1e-4, 1e-4, 1.0]], dtype=torch.float16)
    scores = criteria.taylor({"a": weight})["a"]
    assert scores.dtype == torch.float32
    assert torch.equal(scores, weight.detach().float() * weight.grad.float())
    assert scores.isfinite().all()
    assert scores.unique().numel() == 4


def test_taylor_of_a_sparse_gradient():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    assert table.weight.grad.is_sparse
    expected = table.weight.detach().abs() * torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    assert torch.equal(criteria.taylor({"weight": table.weight})["weight"], expected)


def test_movement_sums_over_steps():
    model = mlp(3, 4, 2)
    pruner = pruner_of(model)
    movement = criteria.Movement(pruner.weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(2)
    expected = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in pruner.weights().items()}
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 3)), torch.randint(2, (6,))).backward()
        for name, w in pruner.weights().items():
            expected[name] -= w.detach().double() * w.grad.double()
        movement.update()
        optimizer.step()
    for name, score in movement(pruner.weights()).items():
        # Five products and sums, each rounded to float32: 10 half units of the largest partial sum.
        bound = 10 * 2.0**-24 * max(1.0, expected[name].abs().max())
        torch.testing.assert_close(score.double(), expected[name], rtol=0, atol=bound)
    assert any(bool((s < 0).any()) for s in expected.values())
    masks = kept_by_rank(movement(pruner.weights()), pruner.masks, 11)
    pruner.prune(n=11, criterion=movement)
    assert flat_masks(pruner) == masks


def test_movement_by_hand_keeps_what_moves_away_from_zero():
    weight = nn.Parameter(torch.tensor([[1.0, 1.0, -2.0, -2.0]]))
    movement = criteria.Movement(lambda: {"a": weight})
    for gradient in ([[-1.0, 1.0, 1.0, -1.0]], [[-0.5, 0.0, 1.0, 0.0]]):
        weight.grad = torch.tensor(gradient)
        movement.update()
    assert movement({"a": weight})["a"].tolist() == [[1.5, -1.0, 4.0, -2.0]]
    movement.clear()
    with pytest.raises(ValueError, match=r"no movement of a yet: call update\(\)"):
        movement({"a": weight})


def test_movement_of_frozen_layers_and_an_update_that_fails():
    model = mlp(2, 2, 2)
    pruner = pruner_of(model)
    movement = criteria.Movement(pruner.weights)
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.full((2, 2), 2.0)
    movement.update()
    pruner.prune(n=2, criterion=movement)  # the frozen layer is left alone, and needs no scores
    assert pruner.layerwise_ratios() == {"0.weight": 0.0, "2.weight": 0.5}
    model[0].weight.requires_grad_(True)
    model[0].weight.grad, model[2].weight.grad = torch.ones(2, 2), None
    with pytest.raises(ValueError, match=r"2\.weight has no gradient"):
        movement.update()
    with pytest.raises(ValueError, match=r"no movement of 0\.weight"):  # of neither layer anything was added
        pruner.prune(n=1, criterion=movement)


def test_movement_of_half_precision_weights_does_not_stand_still():
    """In bf16, 256 + 1 is 256."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    weight.grad = -torch.ones(1, 1, dtype=torch.bfloat16)
    movement = criteria.Movement(lambda: {"a": weight})
    for _ in range(300):
        movement.update()
    assert movement({"a": weight})["a"].item() == 300


# Gradients that the criterion takes: SNIP, GraSP


def test_snip_by_hand():
    """0.5 |Wx - y|^2 has the gradient (Wx - y) x; of whole numbers, so exactly."""
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0]])
    x, y = torch.tensor([2.0, -1.0, 1.0]), torch.tensor([5.0, 1.0])
    # Wx = 7 and -5, so the errors are 2 and -6.
    expected = [[1 * 4.0, 2 * 2.0, 3 * 2.0], [0.0, 4 * 6.0, 1 * 6.0]]
    scores = criteria.snip(lambda: (layer(x) - y).square().sum() / 2)(dict(layer.named_parameters()))
    assert scores["weight"].tolist() == expected


def test_snip_is_weight_times_autograds_gradient_and_leaves_grad():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    torch.manual_seed(0)
    images, labels = torch.randn(5, 2, 6, 6), torch.randint(3, (5,))
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(images), labels).backward()
    pruner = pruner_of(model)
    held = torch.full_like(model[0].weight, 7.0)
    model[0].weight.grad = held
    scores = scores_of(criteria.snip(lambda: F.cross_entropy(model(images), labels)), pruner.weights())
    for name, w in twin.named_parameters():
        if name in pruner.names:
            assert torch.equal(scores[name], (w.detach() * w.grad).abs())
    assert model[0].weight.grad is held
    assert (held == 7.0).all()
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")


def test_snip_within_prune_though_that_makes_no_graphs():
    model = mlp(3, 4, 2)
    pruner = pruner_of(model)
    loss = lambda: model(torch.ones(2, 3)).square().sum()  # noqa: E731
    expected = kept_by_rank(criteria.snip(loss)(pruner.weights()), pruner.masks, 9)
    pruner.prune(n=9, criterion=criteria.snip(loss))
    assert flat_masks(pruner) == expected
    assert all(p.grad is None for p in model.parameters())


def test_grasp_against_an_explicit_hessian():
    model = mlp(3, 4, 2, dtype=torch.float64)
    torch.manual_seed(3)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    sizes = [w.numel() for w in weights.values()]

    def loss_of(flat: Tensor) -> Tensor:
        first, second = flat.split(sizes)
        hidden = torch.tanh(F.linear(x, first.view(4, 3), model[0].bias.detach()))
        return F.cross_entropy(F.linear(hidden, second.view(2, 4), model[2].bias.detach()), y)

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    gradient = torch.func.grad(loss_of)(flat)
    hessian = torch.autograd.functional.hessian(loss_of, flat)
    expected = (flat * (hessian @ gradient)).split(sizes)
    held = model[0].weight.grad
    scores = criteria.grasp(lambda: F.cross_entropy(model(x), y))(weights)
    for (name, score), right in zip(scores.items(), expected, strict=True):
        # Sums of at most 20 products in float64.
        torch.testing.assert_close(score.flatten(), right, rtol=1e-12, atol=1e-15)
        assert score.shape == weights[name].shape
    assert any(bool((s < 0).any()) for s in scores.values())
    assert model[0].weight.grad is held


def test_grasp_prunes_what_its_paper_removes_first():
    """The paper removes the highest -w x Hg."""
    model = mlp(3, 4, 2)
    pruner = pruner_of(model)
    torch.manual_seed(3)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    criterion = criteria.grasp(lambda: F.cross_entropy(model(x), y))
    minus = torch.cat([-s.flatten() for s in criterion(pruner.weights()).values()])
    pruner.prune(n=8, criterion=criterion)
    gone = torch.cat([~mask.flatten() for mask in pruner.masks.values()])
    assert minus[gone].min() > minus[~gone].max()


@pytest.mark.parametrize("criterion", [criteria.snip, criteria.grasp])
def test_a_loss_of_another_model_is_refused(criterion):
    model, other = mlp(3, 4, 2), mlp(3, 4, 2)
    pruner = pruner_of(model)
    for loss in (lambda: other(torch.ones(1, 3)).square().sum(), lambda: torch.tensor(1.0)):
        with pytest.raises(ValueError, match="depend on none of the weights"):
            pruner.prune(0.5, criterion=criterion(loss))
    assert pruner.kept == pruner.total


def test_a_weight_that_the_loss_does_not_use_scores_zero():
    model = mlp(3, 4, 2)
    head = criteria.snip(lambda: model[0](torch.ones(1, 3)).square().sum())
    scores = head(pruner_of(model).weights())
    assert (scores["0.weight"] > 0).all()
    assert torch.equal(scores["2.weight"], torch.zeros(2, 4))


def test_grasp_of_a_loss_without_curvature_is_refused():
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="depend on none of the weights"):
        pruner_of(layer).prune(0.5, criterion=criteria.grasp(lambda: layer(torch.ones(1, 3)).sum()))


# SynFlow


def with_norm() -> nn.Sequential:
    """Linear, batch norm with statistics, linear: R can be written down."""
    torch.manual_seed(4)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        for tensor in (*model.parameters(), norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape))
        norm.running_var.copy_(torch.rand(4) + 0.5)
    return model


def synflow_by_hand(model: Any, batch: int) -> dict[str, Tensor]:
    first, norm, second = (
        {n: t.detach().double().abs() for n, t in (*m.named_parameters(), *m.named_buffers())} for m in model
    )
    scale = norm["weight"] / (norm["running_var"] + model[1].eps).sqrt()
    hidden = (first["weight"].sum(1) + first["bias"] - norm["running_mean"]) * scale + norm["bias"]
    into = batch * second["weight"].sum(0) * scale  # dR by the output of the first layer
    return {
        "0.weight": (first["weight"] * into[:, None]).abs(),
        "2.weight": (second["weight"] * batch * hidden).abs(),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_synflow_by_hand(batch):
    model = with_norm()
    expected = synflow_by_hand(model, batch)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        example = torch.full((batch, 3), -5.0, dtype=dtype)  # its values do not count
        scores = criteria.synflow(model, example)(pruner_of(model).weights())
        for name, score in scores.items():
            assert score.dtype == dtype
            torch.testing.assert_close(score.double(), expected[name], rtol=tolerance, atol=tolerance)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("in the forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("breaks", [False, True])
def test_synflow_restores_the_model(breaks, dtype):
    model = with_norm()
    model.append(Breaks() if breaks else nn.Dropout(0.5))
    model.train()
    model[1].eval()
    pruner = pruner_of(model)
    pruner.prune(0.3)
    model[0].weight.grad = held = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    places = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    modes = [m.training for m in model.modules()]
    criterion = criteria.synflow(model, torch.ones(2, 3, dtype=dtype))
    if breaks:
        with pytest.raises(RuntimeError, match="in the forward"):
            pruner.prune(0.5, criterion=criterion)
    else:
        criterion(pruner.weights())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == places
    assert [m.training for m in model.modules()] == modes == [True, True, False, True, True]
    assert model[0].weight.grad is held
    # The gradients of pruned weights are still zeroed after a backward pass.
    model[:3].zero_grad()
    model[:3](torch.ones(2, 3)).square().sum().backward()
    assert not model[0].weight.grad[~pruner.masks["0.weight"]].any()
    assert model[0].weight.grad[pruner.masks["0.weight"]].any()


def test_synflow_in_a_hundred_rounds_keeps_every_layer_and_in_one_does_not():
    """Tanaka et al., 2020: with few rounds a wide layer, whose scores are small, is pruned whole."""
    left = {}
    for rounds in (1, 100):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
        pruner = pruner_of(model)
        criterion = criteria.synflow(model, torch.ones(1, 16, dtype=torch.float64))
        for sparsity in schedules.geometric_to(0.99, rounds):
            pruner.prune(to=sparsity, criterion=criterion)
        assert pruner.total - pruner.kept == round(0.99 * pruner.total)
        left[rounds] = min(round((1 - r) * pruner.masks[n].numel()) for n, r in pruner.layerwise_ratios().items())
    assert left[1] == 0
    assert left[100] > 0


def test_synflow_of_a_deep_net_asks_for_float64():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(30)])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)
    pruner = pruner_of(model)
    with pytest.raises(ValueError, match="give the example in float64"):
        pruner.prune(0.5, criterion=criteria.synflow(model, torch.ones(1, 32)))
    assert pruner.kept == pruner.total
    assert pruner.prune(0.5, criterion=criteria.synflow(model, torch.ones(1, 32, dtype=torch.float64))) == 15 * 1024


def test_synflow_of_tokens_and_of_another_model():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    # Both positions hold token 1: R = 2 sum_k (sum_j |W_kj| |E_1j| + |b_k|).
    scores = criteria.synflow(model, tokens)(pruner_of(model).weights())["1.weight"]
    expected = 2 * model[1].weight.detach().double().abs() * model[0].weight.detach().double().abs()[1]
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="is the model another one"):
        pruner_of(copy.deepcopy(model)).prune(0.5, criterion=criteria.synflow(model, tokens))


# Random


def test_random_scores_depend_on_seed_and_call():
    weights = pruner_of(two_layers()).weights()
    first, again, other = criteria.random(7), criteria.random(7), criteria.random(8)
    calls = [first(weights), first(weights)]
    for call in calls:
        same = again(weights)
        assert all(torch.equal(call[name], same[name]) for name in weights)
    everything = [torch.cat([s.flatten() for s in c.values()]) for c in (*calls, other(weights))]
    assert torch.cat(everything).unique().numel() == 3 * 22
    assert all(((s >= 0) & (s < 1)).all() for s in everything)


def test_random_scores_by_definition():
    """The upper 53 bits of Philox's numbers, in logical order, layer after layer."""
    raw = np.random.Philox(key=np.array([7, 0], dtype=np.uint64)).random_raw(22)
    expected = [int(bits >> np.uint64(11)) * 2.0**-53 for bits in raw]
    scores = criteria.random(7)(pruner_of(two_layers()).weights())
    assert [x for s in scores.values() for x in s.flatten().tolist()] == expected


def test_random_scores_depend_neither_on_values_nor_on_dtype_layout_and_device(device):
    models = [two_layers(), two_layers((torch.bfloat16, torch.float16)), two_layers(), two_layers().to(device)]
    models[2][0].to(memory_format=torch.contiguous_format)
    masks = []
    for model in models:
        pruner = pruner_of(model)
        pruner.prune(0.5, criterion=criteria.random(seed=3))
        masks.append(flat_masks(pruner))
    assert masks[0] == masks[1] == masks[2] == masks[3]
    assert masks[0]["0.weight"].count(False) + masks[0]["1.weight"].count(False) == 11


def test_random_by_name_follows_torchs_seed():
    masks = []
    for seed in (0, 0, 1):
        pruner = pruner_of(mlp(8, 8, 8))
        torch.manual_seed(seed)
        pruner.prune(0.5, criterion="random")
        masks.append(flat_masks(pruner))
    assert masks[0] == masks[1] != masks[2]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_cannot_be(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        criteria.random(seed)
    criteria.random(2**64 - 1)(pruner_of(nn.Linear(2, 2)).weights())


def test_a_uniform_share_goes_on_average():
    """Each weight is as likely as the others: the scores' mean over many is 1/2, their variance 1/12."""
    score = criteria.random(0)({"a": nn.Parameter(torch.empty(1000, 1000))})["a"]
    # Six standard deviations: of a mean of 10^6 numbers 1/sqrt(12e6), of their squares' mean sqrt(4/45e6).
    assert abs(score.mean() - 1 / 2) < 6 / math.sqrt(12e6)
    assert abs(score.square().mean() - 1 / 3) < 6 * math.sqrt(4 / 45e6)
