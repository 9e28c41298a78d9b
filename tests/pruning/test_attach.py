"""Zeros stay: under every optimiser and wrapper, in copies and resumes, in averages, under DDP and compilers."""

import collections
import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import swa_utils

from fastprune import MaskedSGD, Pruner, criteria, mask_layers, schedules
from fastprune.pruning import pruner as pruner_module
from tests.pruning.small import batch, is_plus_zero, network


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    images, labels = batch(seed)
    return F.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: Any, steps: int = 2, seed: int = 0) -> None:
    """Steps of any optimiser: SAM's two, a closure for LBFGS, else the plain loop."""
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, seed + step)
            loss.backward()
            return loss

        closure()
        if hasattr(optimizer, "first_step"):
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        elif isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            optimizer.step()


def check(pruner: Pruner, *optimizers: torch.optim.Optimizer) -> None:
    """Pruned weights and their optimiser state are +0; kept ones are not, and there is such state."""
    for name, weight in pruner.weights().items():
        mask = pruner.masks[name]
        assert is_plus_zero(weight.detach()[~mask]), name
        assert weight.detach()[mask].all(), name
        for optimizer in optimizers:
            remembered = [t for t in optimizer.state[weight].values() if t.shape == weight.shape]
            assert remembered
            for t in remembered:
                assert is_plus_zero(t[~mask])
                assert t[mask].any()


def pruner_of(model: nn.Module, fraction: float = 0.0, **kwargs) -> Pruner:
    pruner = Pruner(model, verbose=False, **kwargs)
    pruner.prune(fraction)
    return pruner


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices, SGD for the rest: two optimisers in one, in a list."""

    def __init__(self, parameters) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        matrices = [p for p in parameters if p.dim() == 2]
        others = [p for p in parameters if p.dim() != 2]
        self.both = [torch.optim.Muon(matrices, lr=0.1), torch.optim.SGD(others, lr=0.1, momentum=0.9)]

    @torch.no_grad()
    def step(self, closure=None):
        for optimizer in self.both:
            optimizer.step()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("attached", ["first", "last"])
def test_every_optimizer_keeps_zeros_and_their_state(name, attached):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, verbose=False)
    if attached == "first":
        pruner.attach(optimizer)
    train(model, optimizer)  # momentum from before the prune
    pruner.prune(0.6)
    if attached == "last":
        pruner.attach(optimizer)
    for _ in range(2):
        train(model, optimizer)
        check(pruner, *([] if name == "Rprop" else [optimizer]))
        pruner.prune(0.3)
    assert pruner.kept == 99  # of 504: 202, 141, 99


def test_a_kept_weight_is_updated_as_without_masks():
    model = network()
    pruner = pruner_of(model, 0.5)
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    pruner.attach(optimizer)
    train(model, optimizer, 1)
    train(twin, other, 1)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        mask = pruner.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[mask], q[mask])
        assert not torch.equal(p, q) or mask.all()


@pytest.mark.parametrize("name", ["Lamb", "Lars", "Lookahead"])
def test_timms_optimizers(name):
    """LAMB and LARS scale a layer's step by its norm; Lookahead writes weights after the optimiser that it holds."""
    made = pytest.importorskip("timm.optim")
    model = network()
    inner = {
        "Lamb": lambda p: made.Lamb(p, lr=0.1),
        "Lars": lambda p: made.Lars(p, lr=0.1, momentum=0.9),
        "Lookahead": lambda p: torch.optim.AdamW(p, lr=0.1),
    }[name](model.parameters())
    optimizer = made.Lookahead(inner) if name == "Lookahead" else inner
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer, 5)
    check(pruner, inner)
    assert "fastprune.masks" in optimizer.state_dict()


def test_lbfgs_never_moves_pruned_weights():
    model = network()
    model[1] = nn.Identity()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    pruner = Pruner(model, verbose=False)
    train(model, optimizer)  # directions from before the prune
    pruner.attach(optimizer)
    pruner.prune(0.5)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.extend(bool(w.detach()[~pruner.masks[n]].any()) for n, w in pruner.weights().items())
        loss = loss_of(model)
        loss.backward()
        return loss

    before = model[0].weight.detach().clone()
    optimizer.step(closure)
    assert len(seen) >= 6
    assert not any(seen)
    assert not torch.equal(model[0].weight, before)
    check(pruner)


def test_muon():
    model = network()
    optimizer = Muon(model.parameters())
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer)
    check(pruner)
    for one in optimizer.both:
        held = [w for w in pruner.weights().values() if w in one.state]
        assert len(held) == 1
        name = next(n for n, w in pruner.weights().items() if w is held[0])
        (buffer,) = (t for t in one.state[held[0]].values() if t is not None and t.shape == held[0].shape)
        assert is_plus_zero(buffer[~pruner.masks[name]])


# Wrappers


class SAM(torch.optim.Optimizer):
    """As in davda54/sam."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for g in self.param_groups for p in g["params"]]), p=2)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_sam(base):
    model = network()
    kwargs = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = SAM(model.parameters(), base, lr=0.1, **kwargs)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer)
    check(pruner, optimizer.base_optimizer)
    assert "fastprune.masks" in optimizer.state_dict()


class Lookahead(torch.optim.Optimizer):
    """As in timm: does not call super().__init__, so torch's hooks do not run on its step."""

    def __init__(self, base, alpha=0.5, k=2) -> None:
        self._optimizer_step_pre_hooks = collections.OrderedDict()
        self._optimizer_step_post_hooks = collections.OrderedDict()
        self._optimizer_state_dict_pre_hooks = collections.OrderedDict()
        self._optimizer_state_dict_post_hooks = collections.OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = collections.OrderedDict()
        self._optimizer_load_state_dict_post_hooks = collections.OrderedDict()
        self.base, self.alpha, self.k, self.steps = base, alpha, k, 0
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = collections.defaultdict(dict)
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.base.step()
        self.steps += 1
        if self.steps % self.k == 0:
            for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)


class Plain:
    """A wrapper that is no Optimizer, with a step that writes weights after the inner one."""

    def __init__(self, base) -> None:
        self.inner = {"base": base}
        self.noise = 0.01

    @property
    def param_groups(self):
        return self.inner["base"].param_groups

    def zero_grad(self):
        self.inner["base"].zero_grad()

    @torch.no_grad()
    def step(self):
        self.inner["base"].step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(self.noise)

    def state_dict(self):
        return {"inner": self.inner["base"].state_dict()}

    def load_state_dict(self, state):
        self.inner["base"].load_state_dict(state["inner"])


class Delegating(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: state and groups are the inner optimiser's."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad()

    def step(self, closure=None):
        self.optimizer.step()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def __getstate__(self):
        return dict(self.__dict__)

    def __setstate__(self, state):
        self.__dict__.update(state)


WRAPPERS = {"Lookahead": Lookahead, "Plain": Plain, "Delegating": Delegating}


def inner_of(wrapper: Any) -> torch.optim.Optimizer:
    if isinstance(wrapper, Plain):
        return wrapper.inner["base"]
    return wrapper.base if isinstance(wrapper, Lookahead) else wrapper.optimizer


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_whose_step_runs_no_hooks(name):
    model = network()
    optimizer = WRAPPERS[name](torch.optim.AdamW(model.parameters(), lr=0.1))
    own = vars(optimizer).get("step")
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer, 3)
    check(pruner, inner_of(optimizer))
    state = optimizer.state_dict()
    assert "fastprune.masks" in (state["inner"] if name == "Plain" else state)
    other = network(1)
    resumed = WRAPPERS[name](torch.optim.AdamW(other.parameters(), lr=0.1))
    second = Pruner(other, verbose=False)
    second.attach(resumed)
    resumed.load_state_dict(copy.deepcopy(state))
    assert torch.equal(second.mask.keep, pruner.mask.keep)
    pruner.finalize()
    assert vars(optimizer).get("step") is own
    train(model, optimizer)
    assert sum(int(w.count_nonzero()) for w in pruner.weights().values()) > 300


@pytest.mark.parametrize("name", ["Plain", "Delegating"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_such_wrappers_keep_zeros_of_their_own(name, how):
    model = network()
    optimizer = WRAPPERS[name](torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    pruner = pruner_of(model, 0.6)
    pruner.attach(optimizer)
    train(model, optimizer)
    pair = pruner, optimizer
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = [p.detach().clone() for p in model.parameters()]
    other.prune(0.3)
    train(other.model, twin, 3)
    check(other, inner_of(twin))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert pruner.kept == 202


def test_a_learning_rate_schedule_around_a_wrapped_step():
    model = network()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 2)
    schedule.step()
    check(pruner)
    assert optimizer.param_groups[0]["lr"] == 0.05
    pruner.finalize()
    train(model, optimizer, 2)
    assert model[4].weight.count_nonzero() > 300


def test_zero_redundancy_optimizer(gloo):
    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer)
    check(pruner, optimizer.optim)
    optimizer.consolidate_state_dict()
    state = copy.deepcopy(optimizer.state_dict())
    other = network(1)
    resumed = ZeroRedundancyOptimizer(other.parameters(), torch.optim.Adam, lr=0.1)
    second = Pruner(other, verbose=False)
    second.attach(resumed)
    resumed.load_state_dict(state)
    assert torch.equal(second.mask.keep, pruner.mask.keep)


def test_masked_sgd_in_a_wrapper():
    model = network()
    pruner = Pruner(model, verbose=False)
    optimizer = SAM(model.parameters(), MaskedSGD, pruner=pruner, lr=0.1, momentum=0.9)
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.6)
    train(model, optimizer)
    check(pruner, optimizer.base_optimizer)


# What cannot be attached


@pytest.mark.parametrize("what", [None, object(), [torch.optim.SGD([torch.ones(1)])], "SGD", torch.optim.SGD])
def test_what_holds_no_optimizer_is_a_type_error(what):
    with pytest.raises(TypeError, match="is no torch optimiser and holds none: attach the inner one"):
        Pruner(network(), verbose=False).attach(what)


def test_a_model_is_no_optimizer():
    model = network()
    with pytest.raises(TypeError, match="Sequential is no torch optimiser"):
        Pruner(model, verbose=False).attach(model)


def test_an_optimizer_of_another_model_is_refused():
    pruner = Pruner(network(), verbose=False)
    optimizer = torch.optim.SGD(network().parameters())
    with pytest.raises(ValueError, match="SGD has none of the pruned parameters: is it of another model"):
        pruner.attach(optimizer)
    assert not vars(optimizer).keys() & {"__reduce_ex__"}
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(ValueError, match="none of the pruned parameters"):
        MaskedSGD(network().parameters(), pruner, lr=0.1)


def test_an_optimizer_of_another_pruner_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    first = Pruner(model, kinds="conv", verbose=False)
    first.attach(optimizer)
    second = Pruner(model, kinds="linear", verbose=False)
    with pytest.raises(ValueError, match="SGD is attached to another Pruner: finalize"):
        second.attach(optimizer)
    first.finalize()
    second.attach(optimizer)


# Steps that come through elsewhere


class Bypass:
    """A holder of two optimisers of which it uses the one that attach does not find."""

    def __init__(self, parameters) -> None:
        parameters = list(parameters)
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)
        used = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.take = used.step


@pytest.mark.parametrize("attach", [True, False])
def test_a_step_of_an_optimizer_that_is_not_attached_is_found(attach):
    model = network()
    optimizers = Bypass(model.parameters())
    pruner = Pruner(model, verbose=False)
    if attach:
        pruner.attach(optimizers)
    loss_of(model).backward()
    optimizers.take()
    pruner.prune(0.5)
    loss_of(model).backward()
    optimizers.take()
    with pytest.raises(RuntimeError, match=r"attach the one whose step\(\) runs, or call pruner\.apply"):
        loss_of(model).backward()


def test_an_optimizer_that_is_attached_and_not_used_is_found():
    model = network()
    pruner = Pruner(model, verbose=False)
    MaskedSGD(model.parameters(), pruner, lr=0.1)
    used = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, used)
    pruner.prune(0.5)
    with pytest.raises(RuntimeError, match="written by other code than an attached optimiser"):
        train(model, used)


@pytest.mark.parametrize("kind", ["SGD", "AdamW fused", "MaskedSGD", "SAM"])
def test_weights_that_are_rewound_without_apply_are_found(kind):
    model = network()
    dense = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, verbose=False)
    if kind == "MaskedSGD":
        optimizer: Any = MaskedSGD(model.parameters(), pruner, lr=0.1, momentum=0.9)
    elif kind == "SAM":
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
    pruner.attach(optimizer)
    train(model, optimizer)
    pruner.prune(0.5)
    train(model, optimizer)
    model.load_state_dict(dense)
    with pytest.raises(RuntimeError, match=r"^4\.weight has pruned weights that are not 0, written by other code"):
        train(model, optimizer)
    pruner.apply()
    train(model, optimizer)
    check(pruner)


@pytest.mark.parametrize("kind", ["SGD", "SGD fused", "MaskedSGD", "AdamW foreach"])
def test_weights_that_only_attached_optimizers_write_are_not_searched(kind, monkeypatch):
    searched: list[int] = []
    search = pruner_module._any_pruned_is_not_zero
    monkeypatch.setattr(pruner_module, "_any_pruned_is_not_zero", lambda *a: (searched.append(1), search(*a))[1])
    model = network()
    pruner = pruner_of(model, 0.5)
    if kind == "MaskedSGD":
        optimizer: Any = MaskedSGD(model.parameters(), pruner, lr=0.1)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
    pruner.attach(optimizer)
    train(model, optimizer, 1)
    assert len(searched) == 2  # no step before
    train(model, optimizer, 3)
    assert len(searched) == 2
    with torch.no_grad():
        model[4].weight.mul_(2)
    train(model, optimizer, 3)
    assert len(searched) == 3


def test_each_weight_waits_for_its_own_optimizer():
    model = network()
    conv = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    linear = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, verbose=False)
    pruner.attach(conv)
    for prune in (0.0, 0.5):
        pruner.prune(prune)
        model.zero_grad()
        loss_of(model).backward()
        conv.step()
        linear.step()
    with pytest.raises(RuntimeError, match=r"^4\.weight has pruned weights that are not 0"):
        loss_of(model).backward()
    pruner.attach(linear)
    model.zero_grad()
    loss_of(model).backward()
    linear.step()
    check(pruner)
    assert is_plus_zero(linear.state[model[4].weight]["momentum_buffer"][~pruner.masks["4.weight"]])


# Copies, pickles, resumes


@pytest.mark.parametrize("kind", ["SGD", "AdamW fused", "MaskedSGD", "SAM"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "pickle 2", "torch.save"])
def test_copies_of_pruner_and_optimizer_belong_together(kind, how, tmp_path):
    model = network()
    pruner = pruner_of(model, 0.5)
    if kind == "MaskedSGD":
        optimizer: Any = MaskedSGD(model.parameters(), pruner, lr=0.1, momentum=0.9)
    elif kind == "SAM":
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
    pruner.attach(optimizer)
    train(model, optimizer)
    pair: Any = pruner, optimizer
    if how == "torch.save":
        torch.save(pair, tmp_path / "pair.pt")
        other, twin = torch.load(tmp_path / "pair.pt", weights_only=False)
    elif how == "deepcopy":
        other, twin = copy.deepcopy(pair)
    else:
        protocol = 2 if how == "pickle 2" else pickle.HIGHEST_PROTOCOL
        other, twin = pickle.loads(pickle.dumps(pair, protocol))
    if kind == "SAM":  # which loses its base optimiser, with or without a Pruner
        assert not hasattr(twin, "base_optimizer")
        return
    assert other is not pruner
    assert {id(p) for g in twin.param_groups for p in g["params"]} == {id(p) for p in other.model.parameters()}
    check(other, twin)
    before = [p.detach().clone() for p in model.parameters()]
    other.prune(0.5)
    train(other.model, twin)
    check(other, twin)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    pruner.prune(0.5)
    train(model, optimizer)
    # The same steps on both, the same result.
    for p, q in zip(model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_alone_takes_its_pruner_along(how):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    state = twin.state_dict()["fastprune.masks"]
    assert all(torch.equal(state[n]["bits"], one["bits"]) for n, one in pruner.state_dict().items())
    masks = {}
    for p, q in zip(model.parameters(), twin.param_groups[0]["params"], strict=True):
        name = next((n for n, w in pruner.weights().items() if w is p), None)
        if name is not None:
            masks[q] = pruner.masks[name]
        q.grad = torch.ones_like(q)
    twin.step()
    for q, mask in masks.items():
        assert is_plus_zero(q.detach()[~mask])
        assert is_plus_zero(twin.state[q]["exp_avg"][~mask])
        assert q.detach()[mask].all()


def test_a_checkpoint_resumes_to_the_bit(tmp_path):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = network(1)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    second = Pruner(other, verbose=False)
    second.attach(resumed)
    other.load_state_dict(content["model"])
    resumed.load_state_dict(content["optimizer"])
    assert torch.equal(second.mask.keep, pruner.mask.keep)
    train(model, optimizer, seed=5)
    train(other, resumed, seed=5)
    check(second, resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer)
    kept, weights = pruner.mask.keep, [p.detach().clone() for p in model.parameters()]
    ones = {
        n: {"shape": list(m.shape), "bits": torch.full_like(pruner.state_dict()[n]["bits"], 255)}
        for n, m in pruner.masks.items()
    }
    fewer = copy.deepcopy(optimizer.state_dict()) | {"fastprune.masks": ones}
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(fewer)
    damaged = copy.deepcopy(optimizer.state_dict()) | {"fastprune.masks": {"0.weight": ones["0.weight"]}}
    with pytest.raises(ValueError, match=r"no mask of 4\.weight"):
        optimizer.load_state_dict(damaged)
    assert torch.equal(pruner.mask.keep, kept)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_a_state_without_masks_keeps_the_present_ones():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    dense = copy.deepcopy(optimizer.state_dict())
    assert "fastprune.masks" not in dense
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    optimizer.load_state_dict(dense)
    assert pruner.kept == 252
    check(pruner, optimizer)


def test_attaching_twice_is_attaching_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    hooks = {name: len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    pruner.attach(optimizer)
    assert {name: len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")} == hooks
    assert sum(hooks.values()) == 4


def test_several_attached_optimizers():
    model = network()
    optimizers = [torch.optim.Adam(model[i].parameters(), lr=0.1) for i in (0, 4)]
    pruner = Pruner(model, verbose=False)
    for optimizer in optimizers:
        pruner.attach(optimizer)
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.prune(0.3)
    for optimizer, name in zip(optimizers, pruner.names, strict=True):
        weight = pruner.weights()[name]
        assert is_plus_zero(optimizer.state[weight]["exp_avg"][~pruner.masks[name]])
        assert "fastprune.masks" in optimizer.state_dict()
    check(pruner)


def test_states_that_are_no_floats_are_left():
    # A quantised state (8-bit Adam's) is uint8, and its 0 stands for the lowest value.
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    optimizer.state[model[4].weight]["code"] = torch.full((5, 63), 7, dtype=torch.uint8)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer, 1)
    assert (optimizer.state[model[4].weight]["code"] == 7).all()
    check(pruner)


def test_a_grad_scaler_and_its_skipped_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    check(pruner, optimizer)
    before = model[4].weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(loss_of(model) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert torch.equal(model[4].weight, before)
    check(pruner, optimizer)


def test_learning_rate_schedules():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, 0.5)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        [2],
    )
    pruner.attach(optimizer)
    for _ in range(4):
        train(model, optimizer, 1)
        schedule.step()
    check(pruner, optimizer)
    twin = copy.deepcopy(optimizer)
    assert twin.state_dict()["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]


def test_schedules_that_prune_each_step_keep_zeros():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    gradual = schedules.Gradual(pruner, 0.9, begin=0, end=4, every=1)
    for _ in range(6):
        train(model, optimizer, 1)
        gradual.step()
        check(pruner, optimizer)
    assert pruner.kept == 504 - round(0.9 * 504)


# Averages


def ema_of(model: nn.Module, **kwargs) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5), **kwargs)


@pytest.mark.parametrize("kind", ["SWA", "EMA", "avg_fn", "buffers", "masked layers", "buffers, masked layers"])
@pytest.mark.parametrize("made", ["before", "after"])
def test_averages_follow_the_masks(kind, made):
    model = network()
    if "masked" in kind:
        mask_layers(model)
    make = {
        "SWA": swa_utils.AveragedModel,
        "EMA": ema_of,
        "avg_fn": lambda m: swa_utils.AveragedModel(m, avg_fn=swa_utils.get_ema_avg_fn(0.5)),
        "buffers": lambda m: ema_of(m, use_buffers=True),
        "masked layers": ema_of,
        "buffers, masked layers": lambda m: ema_of(m, use_buffers=True),
    }[kind]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    if made == "after":
        pruner.prune(0.5)
    average = make(model)
    if made == "before":
        pruner.attach_average(average)
    for round in range(3):
        train(model, optimizer)
        average.update_parameters(model)
        if made == "before":
            pruner.prune(0.5)
        for name, weight in average.module.named_parameters():
            if name in pruner.names:
                mask = pruner.masks[name]
                assert is_plus_zero(weight.detach()[~mask]), round
                assert weight.detach()[mask].all()
        if "masked" in kind:
            for i in (0, 4):
                assert torch.equal(average.module[i].mask, model[i].mask)
    kept = sum(int(w.count_nonzero()) for n, w in average.module.named_parameters() if n in pruner.names)
    assert kept == pruner.kept == (63 if made == "before" else 252)


def test_an_average_made_before_follows_only_when_attached():
    model = network()
    plain, attached = ema_of(model), ema_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    pruner.attach_average(attached)
    for average in (plain, attached):
        average.update_parameters(model)
    pruner.prune(0.5)
    for average in (plain, attached):
        average.update_parameters(model)
    assert plain.module[4].weight.count_nonzero() == 315
    assert attached.module[4].weight.count_nonzero() == pruner.masks["4.weight"].sum()


def test_swa_with_its_learning_rate():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    average, schedule = swa_utils.AveragedModel(model), swa_utils.SWALR(optimizer, 0.05, anneal_epochs=2)
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
        schedule.step()
    swa_utils.update_bn([batch()[0]], average)
    assert optimizer.param_groups[0]["lr"] == 0.05
    for name, weight in average.module.named_parameters():
        if name in pruner.names:
            assert is_plus_zero(weight.detach()[~pruner.masks[name]])
    assert Pruner(average, verbose=False).kept == pruner.kept


@pytest.mark.parametrize("kind", ["model", "named", "dict"])
def test_own_averages(kind):
    model = network()
    pruner = Pruner(model, verbose=False)
    twin = copy.deepcopy(model)
    average: Any = twin if kind == "model" else dict(twin.named_parameters())
    if kind == "dict":
        average = {name: t.clone() for name, t in twin.state_dict().items()}
    pruner.attach_average(average)
    pruner.prune(0.5)
    tensors = dict(twin.named_parameters()) if kind == "model" else average
    if kind == "dict":
        average["4.weight"] = average["4.weight"] + 1  # another tensor by the same name
    pruner.prune(0.5)
    for name in pruner.names:
        assert is_plus_zero(tensors[name].detach()[~pruner.masks[name]])


def test_an_average_of_another_model_is_refused():
    pruner = Pruner(network(), verbose=False)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 7, 1)), {}):
        with pytest.raises(ValueError, match=r"the average has no 0\.weight of shape \(7, 3, 3, 3\): is it of another"):
            pruner.attach_average(other)


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timms_averages(version):
    utils = pytest.importorskip("timm.utils")
    model = network()
    average = getattr(utils, version)(model, decay=0.5)
    pruner = Pruner(model, verbose=False)
    pruner.attach_average(average)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    for _ in range(2):
        train(model, optimizer)
        average.update(model)
        pruner.prune(0.5)
    assert sum(int(w.count_nonzero()) for n, w in average.module.named_parameters() if n in pruner.names) == 126


def test_an_average_attached_to_a_tied_model():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    model = Tied()
    average = swa_utils.AveragedModel(model)
    pruner = Pruner(model, verbose=False)
    pruner.attach_average(average)
    pruner.prune(0.5)
    assert average.module.head.weight.count_nonzero() == 14


# DDP, compilers, exports


def test_ddp_averages_masked_gradients(gloo):
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(wrapped, 0.5)
    pruner.attach(optimizer)
    seen: list[Tensor] = []

    def averages(state, bucket):
        seen.append(bucket.buffer().clone())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(dist.group.WORLD, averages)
    train(wrapped, optimizer, 1)
    kept = pruner.kept + sum(p.numel() for n, p in model.named_parameters() if n not in pruner.names)
    assert len(seen) >= 1
    assert 0 < sum(int(t.count_nonzero()) for t in seen) <= kept
    train(wrapped, optimizer)
    pruner.prune(0.5)
    train(wrapped, optimizer)
    check(pruner, optimizer)


@pytest.mark.parametrize("what", ["model", "step", "both", "step of a wrapper", "step of MaskedSGD"])
def test_a_compiled_model_trains_with_zeros_kept(what):
    torch.compiler.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager") if what in ("model", "both") else model
    pruner = pruner_of(compiled, 0.5)
    if what == "step of MaskedSGD":
        optimizer: Any = MaskedSGD(model.parameters(), pruner, lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if what == "step of a wrapper":
        optimizer = Plain(optimizer)
    pruner.attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager") if what != "model" else optimizer.step
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(compiled).backward()
        step()
        check(pruner, inner_of(optimizer) if isinstance(optimizer, Plain) else optimizer)
        pruner.prune(0.2)
    assert pruner.kept == 130  # 252, 202, 162, 130
    torch.compiler.reset()


def exported(model: nn.Module, x: Tensor, how: str) -> Any:
    if how == "export":
        return torch.export.export(model, (x,)).module()
    if how == "fx":
        return torch.fx.symbolic_trace(model)
    if how == "script":
        return torch.jit.script(model)
    return torch.jit.trace(model, x)


@pytest.mark.parametrize("how", ["export", "fx", "script", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_a_pruned_model_exports_as_a_plain_one(how):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    train(model, optimizer)
    model.eval()
    x = batch()[0]
    made = exported(model, x, how)
    assert torch.equal(made(x), model(x))
    state = made.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name in pruner.names:
        assert torch.equal(state[name] != 0, pruner.masks[name])


def test_dynamic_quantization_keeps_zeros():
    ao = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = pruner_of(model, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            quantized = ao.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"this torch does not quantise: {error}")
        for i in (0, 2):
            weight = quantized[i].weight().dequantize()
            assert not weight[~pruner.masks[f"{i}.weight"]].any()
            assert weight.any()


def test_qat_modules_are_covered_and_convert_with_zeros():
    ao = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(
        ao.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), ao.DeQuantStub()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "x86" not in torch.backends.quantized.supported_engines:
            pytest.skip("this torch has no engine for x86")
        model.train()
        model.qconfig = ao.get_default_qat_qconfig("x86")
        pruner = pruner_of(model, 0.3)
        pruner.attach(optimizer)
        ao.prepare_qat(model, inplace=True)
        assert type(model[1]) is not nn.Conv2d
        qat = Pruner(model, verbose=False)
        assert qat.names == pruner.names == ("1.weight", "4.weight")
        assert qat.kept == pruner.kept
        qat_optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        qat.attach(qat_optimizer)
        train(model, qat_optimizer)
        qat.prune(0.3)
        train(model, qat_optimizer)
        check(qat, qat_optimizer)
        quantized = ao.convert(model.eval())
        for i in (1, 4):
            weight = quantized[i].weight().dequantize()
            assert not weight[~qat.masks[f"{i}.weight"]].any()
            assert weight.any()


def test_movement_and_growth_under_an_attached_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, 0.5)
    pruner.attach(optimizer)
    movement = criteria.Movement(pruner.weights)
    rigl = schedules.RigL(pruner, every=2, end=6)
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        movement.update()
        if not rigl.step():
            optimizer.step()
        for name, weight in pruner.weights().items():
            assert is_plus_zero(weight.detach()[~pruner.masks[name]])
        assert pruner.kept == 252
    gc.collect()
    pruner.prune(0.5, criterion=movement)
    assert pruner.kept == 126
