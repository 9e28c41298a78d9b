"""Schedules: sparsities against their formulas; SET and RigL against a move of weights computed here."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import Pruner, criteria, schedules


def pruner_of(model: nn.Module, **options: Any) -> Pruner:
    return Pruner(model, verbose=False, **options)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 7), nn.ReLU(), nn.Linear(7, 3))


def backward(model: nn.Module, seed: int) -> None:
    """A backward pass of a batch that depends on the seed alone, from gradients of None."""
    g = torch.Generator().manual_seed(seed)
    model.zero_grad()
    labels = torch.randint(3, (8,), generator=g)
    F.cross_entropy(model(torch.randn(8, 2, 6, 6, generator=g)), labels).backward()


def state_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> list[Tensor]:
    return [t for t in optimizer.state[weight].values() if isinstance(t, Tensor) and t.shape == weight.shape]


# How much


def test_thirty_rounds_of_a_fifth():
    model = nn.Linear(100, 100)
    pruner = pruner_of(model)
    left = 10_000
    for round_, sparsity in enumerate(schedules.geometric(0.2, 30), 1):
        pruner.prune(to=sparsity)
        assert sparsity == 1 - 0.8**round_
        assert pruner.kept == 10_000 - round(sparsity * 10_000)
        assert abs(pruner.kept - 0.8 * left) < 1
        left = pruner.kept
    assert round_ == 30
    assert sparsity == 1 - 0.8**30
    assert pruner.kept == 12  # 12.38


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_geometric_to_ends_at_the_very_number(sparsity, rounds):
    steps = list(schedules.geometric_to(sparsity, rounds))
    assert len(steps) == rounds
    assert steps[-1] == sparsity
    assert steps == sorted(steps)
    before = 1.0
    for step in steps:  # the same share of what is left each time
        assert (1 - step) / before == pytest.approx((1 - sparsity) ** (1 / rounds), rel=1e-12)
        before = 1 - step


@pytest.mark.parametrize(("share", "rounds"), [(1.0, 3), (-0.1, 3), (float("nan"), 3), (0.2, 0), (0.2, -1)])
@pytest.mark.parametrize("schedule", [schedules.geometric, schedules.geometric_to])
def test_rounds_that_cannot_be(schedule, share, rounds):
    with pytest.raises(ValueError, match=r"expected \[0, 1\) and 1 or more"):  # at the call, not at the first round
        schedule(share, rounds)


# Gradual


def zhu_and_gupta(t: int, initial: float, final: float, t0: int, n: int, delta: int) -> float:
    """To prune, or not to prune (2017), equation 1: the sparsity from step t in {t0, t0 + delta, ..., t0 + n delta}."""
    return final + (initial - final) * (1 - (t - t0) / (n * delta)) ** 3


@pytest.mark.parametrize("initial", [None, 0.2])
@pytest.mark.parametrize("begin", [0, 6])
def test_gradual_at_each_step(begin, initial):
    pruner = pruner_of(nn.Linear(40, 25))
    pruner.prune(0.1)
    gradual = schedules.Gradual(pruner, 0.85, begin=begin, end=begin + 20, every=4, initial=initial)
    pruned = 100
    for t in range(1, begin + 26):
        due = begin <= t <= begin + 20 and (t - begin) % 4 == 0
        if due:
            sparsity = zhu_and_gupta(t, 0.1 if initial is None else initial, 0.85, begin, 5, 4)
            changes, pruned = round(sparsity * 1000) > pruned, round(sparsity * 1000)
        assert gradual.step() is (due and changes)
        assert gradual.steps == t
        assert 1000 - pruner.kept == pruned
    assert pruned == 850


def test_gradual_ends_at_final_also_between_its_steps_and_stops_there():
    pruner = pruner_of(nn.Linear(40, 25))
    gradual = schedules.Gradual(pruner, 0.5, begin=2, end=9, every=3)
    due = [t for t in range(1, 20) if gradual.step()]
    assert due == [5, 8, 9]
    assert pruner.kept == 500


def test_a_training_of_end_steps_reaches_final():
    """With the defaults that come to mind: from 0 to the number of steps."""
    pruner = pruner_of(nn.Linear(40, 25))
    gradual = schedules.Gradual(pruner, 0.9, begin=0, end=250)
    for _ in range(250):
        gradual.step()
    assert pruner.kept == 100


def test_gradual_resumes_by_its_number_of_steps():
    whole, parts = (pruner_of(nn.Linear(40, 25)) for _ in range(2))
    with torch.no_grad():
        parts.model.weight.copy_(whole.model.weight)
    options = {"begin": 1, "end": 12, "every": 3, "initial": 0.0}
    one, first = schedules.Gradual(whole, 0.7, **options), schedules.Gradual(parts, 0.7, **options)
    for _ in range(7):
        one.step()
        first.step()
    second = schedules.Gradual(parts, 0.7, **options)
    second.steps = first.steps
    for _ in range(8):
        assert one.step() == second.step()
        assert torch.equal(whole.masks["weight"], parts.masks["weight"])
    assert whole.kept == 300


def test_gradual_never_goes_back_where_a_model_is_sparser_already():
    pruner = pruner_of(nn.Linear(40, 25))
    gradual = schedules.Gradual(pruner, 0.6, begin=0, end=10, every=1)
    pruner.prune(0.5)
    changed = [gradual.step() for _ in range(10)]
    sparsities = [zhu_and_gupta(t, 0.0, 0.6, 0, 10, 1) for t in range(1, 11)]
    assert changed == [sparsity > 0.5 for sparsity in sparsities]
    assert pruner.kept == 400


def test_gradual_passes_criterion_and_allocation_on():
    pruner = pruner_of(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)))
    scores = {name: torch.arange(100.0).view(10, 10) for name in pruner.names}
    gradual = schedules.Gradual(pruner, 0.5, begin=0, end=1, criterion=scores, allocation="uniform")
    assert gradual.step()
    assert all(mask.flatten().tolist() == [False] * 50 + [True] * 50 for mask in pruner.masks.values())


@pytest.mark.parametrize(
    "options",
    [
        {"final": 1.1, "begin": 0, "end": 5},
        {"final": 0.5, "begin": 0, "end": 5, "initial": 0.6},
        {"final": 0.5, "begin": 0, "end": 5, "initial": -0.1},
        {"final": 0.5, "begin": 5, "end": 5},
        {"final": 0.5, "begin": -1, "end": 5},
        {"final": 0.5, "begin": 0, "end": 5, "every": 0},
        {"final": float("nan"), "begin": 0, "end": 5},
    ],
)
def test_gradual_that_cannot_be(options):
    with pytest.raises(ValueError, match="expected 0 <="):
        schedules.Gradual(pruner_of(nn.Linear(4, 4)), **options)


def test_gradual_to_less_than_is_pruned():
    pruner = pruner_of(nn.Linear(4, 4))
    pruner.prune(0.5)
    with pytest.raises(ValueError, match=r"sparsity goes from 0\.5 to 0\.25"):
        schedules.Gradual(pruner, 0.25, begin=0, end=5)


# Drop and grow


def moved(weight: Tensor, mask: Tensor, fraction: float, scores: Tensor) -> Tensor:
    """The mask without its round(fraction x kept) lowest magnitudes, and with as many highest scores of the others."""
    magnitudes, kept, ranks = weight.abs().flatten().tolist(), mask.flatten().tolist(), scores.flatten().tolist()
    count = round(fraction * sum(kept))
    dropped = set(sorted((i for i, k in enumerate(kept) if k), key=lambda i: (magnitudes[i], i))[:count])
    stay = [k and i not in dropped for i, k in enumerate(kept)]
    others = sorted((i for i, k in enumerate(stay) if not k), key=lambda i: (ranks[i], i))
    grown = set(others[len(others) - count :])
    return torch.tensor([k or i in grown for i, k in enumerate(stay)]).view(mask.shape)


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = 2):
    """(model, Pruner at 60 %, attached optimiser with state)."""
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.6, allocation="uniform")
    optimizer = make(model.parameters())
    pruner.attach(optimizer)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    return model, pruner, optimizer


MAKERS = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}


def check_move(before: dict[str, Tensor], old: dict[str, Tensor], pruner: Pruner, optimizer: Any, fraction: float):
    """Densities stay; weights that stay keep their bits; all others, come back at once or not, are +0 without state."""
    grown_in_all = 0
    for name, weight in pruner.weights().items():
        mask, count = pruner.masks[name], round(fraction * int(old[name].sum()))
        assert int(mask.sum()) == int(old[name].sum())
        magnitudes = before[name].abs().masked_fill(~old[name], torch.inf).flatten()
        dropped = torch.zeros(mask.numel(), dtype=torch.bool)
        dropped[magnitudes.sort(stable=True).indices[:count]] = True
        stays = old[name] & ~dropped.view(mask.shape)
        assert not (stays & ~mask).any()
        assert torch.equal(weight.detach()[stays], before[name][stays])
        for tensor in (weight.detach(), *state_of(optimizer, weight)):
            assert not tensor[~stays].any()
            assert not tensor[~stays].signbit().any()
        grown_in_all += int((mask & ~stays).sum())
        assert int((mask & ~stays).sum()) == count
    return grown_in_all


@pytest.mark.parametrize("optimiser", MAKERS)
def test_rigl_moves_to_the_largest_dense_gradients(optimiser):
    model, pruner, optimizer = trained(MAKERS[optimiser])
    rigl = schedules.RigL(pruner, 0.3, every=3, end=12)
    for t in range(1, 15):
        backward(model, 100 + t)
        dense = copy.deepcopy(model)
        backward(dense, 100 + t)  # a plain model of the same weights: its gradients are not masked
        before = {name: w.detach().clone() for name, w in pruner.weights().items()}
        old = {name: mask.clone() for name, mask in pruner.masks.items()}
        due = t in (3, 6, 9)
        assert rigl.step() is due
        if not due:
            assert all(torch.equal(mask, old[name]) for name, mask in pruner.masks.items())
            optimizer.step()
            continue
        fraction = 0.3 / 2 * (1 + math.cos(math.pi * t / 12))
        for name, mask in pruner.masks.items():
            gradient = dense.get_parameter(name).grad.abs()
            assert gradient[~old[name]].any()
            assert torch.equal(mask, moved(before[name], old[name], fraction, gradient)), name
        assert check_move(before, old, pruner, optimizer, fraction) > 0
    assert rigl.steps == 14


def test_rigl_copies_gradients_only_where_they_are_needed():
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.5)
    rigl = schedules.RigL(pruner, every=3, end=7)
    copied = []
    for t in range(1, 11):
        backward(model, t)
        if pruner.dense_grads:
            copied.append(t)
        rigl.step()
        assert not pruner.dense_grads
    assert copied == [3, 6]


def test_rigl_resumes_by_its_number_of_steps():
    """Also right before an update: the dense gradients must be there at the next backward pass."""
    masks = []
    for resumed_at in (None, 0, 1, 2, 3, 4):
        model = net()
        pruner = pruner_of(model)
        pruner.prune(0.5)
        rigl = schedules.RigL(pruner, every=3, end=10)
        moves = 0
        for t in range(1, 8):
            if t - 1 == resumed_at:
                pruner.dense_grad = False
                rigl = schedules.RigL(pruner, every=3, end=10)
                rigl.steps = resumed_at
            backward(model, t)
            moves += rigl.step()
        assert moves == 2
        masks.append(copy.deepcopy(dict(pruner.masks)))
    for other in masks[1:]:
        assert all(torch.equal(other[name], masks[0][name]) for name in other)


def test_rigl_at_every_step_needs_gradients_from_the_first_on():
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.5)
    rigl = schedules.RigL(pruner, every=1, end=4)
    due = []
    for t in range(1, 7):
        backward(model, t)
        due.append(rigl.step())
    assert due == [True, True, True, False, False, False]


def test_rigl_without_a_backward_pass_changes_nothing():
    model, pruner, _ = trained(MAKERS["AdamW"])
    rigl = schedules.RigL(pruner, every=1, end=4)
    before, old = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(pruner.masks))
    with pytest.raises(ValueError, match=r"0\.weight has no gradient: call step\(\) after the backward pass"):
        rigl.step()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(old[name], mask) for name, mask in pruner.masks.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rigl_with_a_gradient_that_is_not_finite_changes_nothing(value):
    model, pruner, _ = trained(MAKERS["AdamW"])
    rigl = schedules.RigL(pruner, every=1, end=4)
    before, old = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(pruner.masks))
    backward(model, 3)
    pruner.dense_grads["5.weight"][0, 0] = value  # of the last layer
    with pytest.raises(ValueError, match=r"scores of 5\.weight are not finite"):
        rigl.step()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(old[name], mask) for name, mask in pruner.masks.items())


@pytest.mark.parametrize("optimiser", MAKERS)
def test_set_moves_at_random_by_its_seed(optimiser):
    """The scores are `criteria.random`'s: of the seed and of the step, as its call."""
    model, pruner, optimizer = trained(MAKERS[optimiser])
    moves = schedules.SET(pruner, 0.25, every=2, end=7, seed=5)
    for t in range(1, 10):
        backward(model, 50 + t)
        optimizer.step()
        before = {name: w.detach().clone() for name, w in pruner.weights().items()}
        old = {name: mask.clone() for name, mask in pruner.masks.items()}
        due = t in (2, 4, 6)
        assert moves.step() is due
        if not due:
            assert all(torch.equal(mask, old[name]) for name, mask in pruner.masks.items())
            continue
        draw = criteria.random(5)
        for _ in range(t):
            draw(pruner.weights())
        drawn = draw(pruner.weights())
        for name, mask in pruner.masks.items():
            assert torch.equal(mask, moved(before[name], old[name], 0.25, drawn[name])), name
        assert check_move(before, old, pruner, optimizer, 0.25) > 0


def test_set_resumes_to_the_same_masks():
    masks = []
    for resumed in (False, True):
        pruner = pruner_of(net())
        pruner.prune(0.5)
        moves = schedules.SET(pruner, every=1, end=10, seed=1)
        for t in range(6):
            if resumed and t == 3:
                moves = schedules.SET(pruner, every=1, end=10, seed=1)
                moves.steps = 3
            assert moves.step()
        masks.append(copy.deepcopy(dict(pruner.masks)))
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_set_by_torchs_seed():
    masks = []
    for seed in (0, 0, 1):
        pruner = pruner_of(net())
        pruner.prune(0.5)
        torch.manual_seed(seed)
        moves = schedules.SET(pruner, every=1, end=2 + 1)
        assert moves.step()
        masks.append(torch.cat([m.flatten() for m in pruner.masks.values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_frozen_layers_neither_drop_nor_grow():
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.5)
    model[3].weight.requires_grad_(False)
    old = copy.deepcopy(dict(pruner.masks))
    rigl, moves = schedules.RigL(pruner, every=1, end=9), schedules.SET(pruner, every=1, end=9, seed=0)
    backward(model, 0)
    assert rigl.step()
    assert moves.step()
    assert torch.equal(pruner.masks["3.weight"], old["3.weight"])
    assert not torch.equal(pruner.masks["0.weight"], old["0.weight"])


def test_a_dense_layer_and_an_empty_one_stay_as_they_are():
    pruner = pruner_of(net())
    pruner.prune(allocation={"0.weight": 1.0, "3.weight": 0.5})
    assert schedules.SET(pruner, every=1, end=9, seed=0).step()
    assert list(pruner.layerwise_ratios().values()) == [1.0, 0.5, 0.0]


def test_what_is_dropped_and_grows_at_once_is_zero():
    """A dense layer: what it drops is all that can grow."""
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, -1.0, 2.0, 3.0]])
    pruner = pruner_of(layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.0)
    pruner.attach(optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert pruner.drop_and_grow(0.5, lambda name, weight: torch.ones(1, 4)) == 2
    assert pruner.kept == 4
    assert layer.weight.tolist() == [[4.0, 0.0, 0.0, 3.0]]
    assert not layer.weight.signbit().any()
    for value in state_of(optimizer, layer.weight):
        assert (value != 0).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.1}, {"every": 0}, {"end": 0}])
@pytest.mark.parametrize("schedule", [schedules.SET, schedules.RigL])
def test_drop_and_grow_that_cannot_be(schedule, options):
    with pytest.raises(ValueError, match=r"expected \(0, 1\], and 1 or more"):
        schedule(pruner_of(nn.Linear(4, 4)), **{"every": 1, "end": 5, **options})


def test_a_seed_that_cannot_be():
    with pytest.raises(ValueError, match="seed is -1"):
        schedules.SET(pruner_of(nn.Linear(4, 4)), every=1, end=5, seed=-1)
