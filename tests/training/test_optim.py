"""MaskedSGD against torch.optim.SGD, and any other optimiser under masks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask, weight_masks
from fastprune.training.optim import MaskedSGD, keep_pruned

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def network(device="cpu") -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, groups=1), nn.Flatten()
    return fastprune.attach(nn.Sequential(*layers, nn.Linear(5 * 16, 4)).to(device))


def give_masks(model: nn.Module, fraction: float = 0.6, round: int = 1) -> Mask:
    mask = fastprune.masks_of(model)
    mask = Mask(mask.keep.cpu(), mask.segments)  # where random scores are drawn
    fastprune.attach(model, new := prune(random_scores(mask, 0, round), mask, fraction))
    return new


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0, scaler=None) -> None:
    g, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        images, labels = torch.randn(4, 3, 8, 8, generator=g), torch.randint(4, (4,), generator=g)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images.to(device)), labels.to(device))).backward()
        scaler.step(optimizer)
        scaler.update()


def all_pruned_are_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    found = []
    for weight, mask in weight_masks(model).items():
        remembered = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
        assert remembered
        for t in (weight.detach(), *remembered):
            found.append(not t[~mask].any() and not torch.signbit(t[~mask]).any() and bool(t[mask].any()))
    return len(found) >= 4 and all(found)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dense_it_is_torchs_sgd_to_the_bit(nesterov, channels_last):
    ours = network()
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    a = MaskedSGD(ours.parameters(), ours, **HYPER, nesterov=nesterov)
    b = torch.optim.SGD(theirs.parameters(), **HYPER, nesterov=nesterov, foreach=False)
    take_steps(ours, a)
    take_steps(theirs, b)
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_groups_schedulers_and_state_are_those_of_any_optimizer():
    model = network()
    give_masks(model)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[5].parameters(), "weight_decay": 0.0}]
    optimizer = MaskedSGD(groups, model, **HYPER)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    still = model[3].weight.detach().clone()
    take_steps(model, optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert torch.equal(model[3].weight, still)
    twin = copy.deepcopy(model)
    resumed = MaskedSGD([{"params": twin[0].parameters()}, {"params": twin[5].parameters()}], twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, seed=1)
    take_steps(twin, resumed, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))


def test_masks_that_change_take_their_momentum_along(device):
    model = network(device)
    optimizer = MaskedSGD(model.parameters(), model, **HYPER)
    take_steps(model, optimizer)
    for round in (1, 2):
        give_masks(model, 0.4, round)
        take_steps(model, optimizer, 1)
        assert all_pruned_are_zero(model, optimizer)


def test_gradients_are_left_as_they_are():
    model = network()
    optimizer = MaskedSGD(model.parameters(), model, **HYPER)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_grad_scaler_changes_nothing_and_skips_infinite_steps(device):
    plain, scaled = network(device), network(device)
    for model in (plain, scaled):
        give_masks(model)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    take_steps(plain, MaskedSGD(plain.parameters(), plain, **HYPER))
    optimizer = MaskedSGD(scaled.parameters(), scaled, **HYPER)
    take_steps(scaled, optimizer, scaler=scaler)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in scaled.parameters()]
    for p in scaled.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, b) for p, b in zip(scaled.parameters(), before, strict=True))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: torch.optim.RMSprop(p, momentum=0.9),
    lambda p: torch.optim.SGD(p, **HYPER, nesterov=True),
], ids=["AdamW", "RMSprop", "SGD"])  # fmt: skip
def test_any_optimizer_keeps_pruned_weights_at_zero(make, device):
    model = network(device)
    optimizer = make(list(model.parameters()))
    take_steps(model, optimizer)  # so that there is momentum when the masks come
    give_masks(model)
    handle = keep_pruned(optimizer, model)
    take_steps(model, optimizer)
    assert all_pruned_are_zero(model, optimizer)
    handle.remove()


def test_adamw_alone_keeps_weights_that_were_pruned_from_its_start(device):
    model = network(device)
    give_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    take_steps(model, optimizer)
    assert all_pruned_are_zero(model, optimizer)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": -0.1}, {"nesterov": True}])
def test_wrong_hyperparameters_are_value_errors(wrong):
    model = network()
    with pytest.raises(ValueError, match=r"negative|momentum"):
        MaskedSGD(model.parameters(), model, **wrong)
