"""MaskedSGD against torch.optim.SGD."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune import MaskedSGD, Pruner, criteria

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def network(device="cpu", dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, groups=1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(5 * 16, 4)).to(device, dtype)


def pruner_of(model: nn.Module, fraction: float = 0.0, kinds="conv") -> Pruner:
    pruner = Pruner(model, kinds=kinds, verbose=False)
    pruner.prune(fraction, criterion=criteria.random(0))
    return pruner


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0, scaler=None) -> None:
    g, like = torch.Generator().manual_seed(seed), next(model.parameters())
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(steps):
        images, labels = torch.randn(4, 3, 8, 8, generator=g), torch.randint(4, (4,), generator=g)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(like.device, like.dtype)), labels.to(like.device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def check_zeros(pruner: Pruner, optimizer: torch.optim.Optimizer) -> None:
    """Pruned weights and their optimiser state are +0, kept ones are not."""
    for name, weight in pruner.weights().items():
        mask = pruner.masks[name]
        remembered = [v for v in optimizer.state[weight].values() if v.shape == weight.shape]
        assert remembered
        for t in (weight.detach(), *remembered):
            assert not t[~mask].any()
            assert not torch.signbit(t[~mask]).any()
            assert t[mask].any()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_it_is_torchs_sgd_to_the_bit(nesterov, channels_last, dtype):
    ours = network(dtype=dtype)
    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    a = MaskedSGD(ours.parameters(), pruner_of(ours), **HYPER, nesterov=nesterov)
    b = torch.optim.SGD(theirs.parameters(), **HYPER, nesterov=nesterov, foreach=False)
    take_steps(ours, a)
    take_steps(theirs, b)
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_masked_it_is_torchs_sgd_with_masked_gradients(dtype, device):
    ours = network(device, dtype if device.type == "cpu" or dtype != torch.float64 else torch.float32)
    pruner = pruner_of(ours, 0.6)
    theirs = copy.deepcopy(ours)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    take_steps(ours, optimizer := MaskedSGD(ours.parameters(), pruner, **HYPER))
    b = torch.optim.SGD(theirs.parameters(), **HYPER, foreach=False)
    for name, weight in theirs.named_parameters():
        if name in masks:
            weight.register_hook(lambda grad, mask=masks[name]: grad.masked_fill(~mask, 0))
    take_steps(theirs, b)
    exact = device.type == "cpu"
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    check_zeros(pruner, optimizer)


def test_groups_schedulers_and_state_are_those_of_any_optimizer():
    model = network()
    pruner = pruner_of(model, 0.6)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[5].parameters(), "weight_decay": 0.0}]
    optimizer = MaskedSGD(groups, pruner, **HYPER)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    still = model[3].weight.detach().clone()
    take_steps(model, optimizer)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    assert torch.equal(model[3].weight, still)
    twin = copy.deepcopy(model)
    other = Pruner(twin, kinds="conv", adopt_zeros=False, verbose=False)
    resumed = MaskedSGD([{"params": twin[0].parameters()}, {"params": twin[5].parameters()}], other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, seed=1)
    take_steps(twin, resumed, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(other.mask.keep, pruner.mask.keep)


def test_masks_that_change_take_their_momentum_along(device):
    model = network(device)
    pruner = pruner_of(model)
    optimizer = MaskedSGD(model.parameters(), pruner, **HYPER)
    take_steps(model, optimizer)
    for _ in range(2):
        pruner.prune(0.4, criterion="random")
        take_steps(model, optimizer, 1)
        check_zeros(pruner, optimizer)


def test_only_pruned_gradients_are_changed():
    model = network()
    optimizer = MaskedSGD(model.parameters(), pruner_of(model), **HYPER)
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_a_grad_scaler_changes_nothing_and_skips_infinite_steps(device):
    plain, scaled = network(device), network(device)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    take_steps(plain, MaskedSGD(plain.parameters(), pruner_of(plain, 0.6), **HYPER))
    optimizer = MaskedSGD(scaled.parameters(), pruner_of(scaled, 0.6), **HYPER)
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


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": -0.1}, {"nesterov": True}])
def test_wrong_hyperparameters_are_value_errors(wrong):
    model = network()
    with pytest.raises(ValueError, match=r"negative|momentum"):
        MaskedSGD(model.parameters(), pruner_of(model), **wrong)


def test_a_weight_with_gaps_in_memory_is_refused():
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(torch.randn(3, 8)[:, ::2])
    optimizer = MaskedSGD(model.parameters(), Pruner(model, verbose=False), lr=0.1)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="gaps in memory"):
        optimizer.step()
