"""What modern recipes add to the training loop, each compared with a plain loop of torch's own optimisers and tools."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops._utils import split_normalization_params

from fastprune.pruning.allocation import prune
from fastprune.pruning.masks import Mask
from fastprune.specs import EmaSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.step import ranks
from fastprune.training.trainer import Trainer

SCHEDULE = ScheduleSpec(0.01, 2, (), 0.1, warmup_epochs=1, warmup="constant", warmup_start=0.5)
NO_NORM = (("norm", 0.0),)
OPTIMIZERS = {
    "nesterov": OptimizerSpec(8, 0.9, 1e-2, nesterov=True),
    "norm": OptimizerSpec(8, 0.9, 1e-2, other_decays=NO_NORM),
    "clip": OptimizerSpec(8, 0.9, 1e-2, clip_grad_norm=0.5),
    "adamw": OptimizerSpec(8, 0.0, 0.1, name="adamw"),
    "rmsprop": OptimizerSpec(8, 0.9, 1e-3, name="rmsprop"),
    "rmsprop-no-momentum": OptimizerSpec(8, 0.0, 1e-3, name="rmsprop", other_decays=NO_NORM),
    "adamw-clip-norm": OptimizerSpec(8, 0.0, 0.1, name="adamw", other_decays=NO_NORM, clip_grad_norm=0.5),
}
EMA = EmaSpec(0.75, 2)


class Epochs:
    """Four batches of eight noise images, other ones in each epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        g = torch.Generator().manual_seed(self.epoch)
        for _ in range(4):
            yield torch.randn(8, 3, 16, 16, generator=g), torch.randint(10, (8,), generator=g)


def network() -> nn.Module:
    """Two convs with batch norm, sizes that fill no vector, and weights from seed 0."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 17, 3, stride=2, bias=False),
        nn.BatchNorm2d(17),
        nn.ReLU(),
        nn.Conv2d(17, 33, 3, bias=False),  # before a norm, its gradient would be rounding alone
        nn.BatchNorm2d(33),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(33, 10),
    )


def trainer(precision: str = "fp32", device: str = "cpu", compute: str = "plain") -> Trainer:
    return Trainer(network(), device=device, precision=precision, compile=False, compute=compute)


def random_mask(t: Trainer, kept: float) -> Mask:
    dense, g = Mask.dense(t.flat.segments), torch.Generator().manual_seed(1)
    return prune(torch.rand(dense.keep.shape, generator=g), dense, 1 - kept)


def torchs(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that torchvision's reference script makes."""
    groups: list[dict] = [{"params": list(model.parameters()), "weight_decay": spec.weight_decay}]
    if spec.other_decays:
        norm, others = split_normalization_params(model)
        groups = [{"params": others, "weight_decay": spec.weight_decay}, {"params": norm, "weight_decay": 0.0}]
    if spec.name == "adamw":
        return torch.optim.AdamW(groups, SCHEDULE.lr)
    if spec.name == "rmsprop":
        return torch.optim.RMSprop(groups, SCHEDULE.lr, momentum=spec.momentum, eps=0.0316, alpha=0.9)
    return torch.optim.SGD(groups, SCHEDULE.lr, momentum=spec.momentum, nesterov=spec.nesterov)


def plain_loop(spec: OptimizerSpec, mask: Mask, ema: EmaSpec) -> tuple[nn.Module, nn.Module]:
    """The reference's loop over SCHEDULE, with weights and gradients times the mask; the network and its average."""
    model = network().to(memory_format=torch.channels_last).train()
    named, optimizer = dict(model.named_parameters()), torchs(spec, model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema.decay), use_buffers=True)
    keeps = mask.tensors()
    for name, keep in keeps.items():
        named[name].data[~keep] = 0
    batches = Epochs()
    for epoch in range(SCHEDULE.epochs):
        batches.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.lr_at(epoch)
        for i, (images, labels) in enumerate(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels).backward()
            for name, keep in keeps.items():
                grad = named[name].grad
                assert grad is not None
                grad[~keep] = 0
            if spec.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), spec.clip_grad_norm)
            optimizer.step()
            if i % ema.steps == 0:
                average.update_parameters(model)
                if epoch < SCHEDULE.warmup_epochs:
                    average.n_averaged.fill_(0)
    return model, average.module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_epochs_are_those_of_the_plain_loop(name):
    """Weights, statistics and their moving average, to the bit."""
    spec, ours = OPTIMIZERS[name], trainer()
    mask = random_mask(ours, 0.5)
    ours.set_mask(mask)
    ours.fit(Epochs(), Epochs(), spec, SCHEDULE, ema=EMA)
    model, average = plain_loop(spec, mask, EMA)
    # Norms are added up in another order: with clipping, updates differ by a few ulp, which eight steps carry on.
    near = {"rtol": 0.0, "atol": 0.0} if spec.clip_grad_norm is None else {"rtol": 1e-5, "atol": 1e-6}
    for theirs, found in ((model, ours.state_dict()), (average, ours.state_dict(averaged=True))):
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}", **near)
    assert not torch.equal(model[0].weight, average[0].weight)
    pruned_is_zero(ours, mask)


@pytest.mark.parametrize("name", ["adamw-clip-norm", "rmsprop", "norm"])
def test_the_device_computes_as_a_cpu_does(name, device, monkeypatch):
    """On a GPU fused or foreach steps in a captured graph, with the rate and the count of steps in its memory."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    both = [Trainer(network(), device=d, compile=False, compute="plain") for d in ("cpu", device)]
    mask = random_mask(both[0], 0.5)
    for t in both:
        t.set_mask(mask)
        t.fit(Epochs(), Epochs(), OPTIMIZERS[name], SCHEDULE, ema=EMA)
        pruned_is_zero(t, mask)
    expected, found = (t.state() for t in both)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def pruned_is_zero(t: Trainer, mask: Mask) -> None:
    """Pruned weights, their state and their average are exactly +0."""
    state = t.state()
    for name, keep in mask.tensors().items():
        for kind in ("model", "momentum", "square", "ema"):
            if f"{kind}.{name}" in state:
                pruned = state[f"{kind}.{name}"][~keep]
                assert not pruned.any()
                assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("name", ["adamw-clip-norm", "rmsprop", "clip"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_is_uninterrupted_bit_for_bit(name, precision):
    whole, first, second = (trainer(precision) for _ in range(3))
    mask = random_mask(whole, 0.5)
    schedule = ScheduleSpec(0.01, 3)
    for t in (whole, first):
        t.set_mask(mask)
    whole.fit(Epochs(), Epochs(), OPTIMIZERS[name], schedule, ema=EMA)
    first.fit(Epochs(), Epochs(), OPTIMIZERS[name], schedule, ema=EMA, stop=1)
    second.load_state(copy.deepcopy(first.state()))
    second.set_mask(mask)
    second.fit(Epochs(), Epochs(), OPTIMIZERS[name], schedule, ema=EMA, start=1)
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert any(key.startswith("ema.") for key in found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "clip"])
def test_an_overflow_in_half_precision_changes_nothing(name, device):
    """A GradScaler's first scale of 65,536, times a loss that overflows: no step, and half the scale."""
    t = Trainer(network(), device=device, precision="fp16", loss=lambda logits, labels: logits.float().sum() * 1e5)
    before = t.state()
    t.fit([next(iter(Epochs()))], Epochs(), OPTIMIZERS[name], ScheduleSpec(0.1, 1))
    after = t.state()
    for key in after:
        if key.startswith(("momentum", "square", "steps")) or key == "model.0.weight":
            assert torch.equal(after[key], before.get(key, torch.zeros_like(after[key]))), key
    assert after["scaler.scale"] == before["scaler.scale"] / 2


def test_a_new_mask_prunes_the_average_and_all_state():
    t = trainer()
    t.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE, ema=EMA)
    pruned_is_zero(t, t.prune(0.5))
    mask = random_mask(t, 0.25)
    t.set_mask(mask)
    pruned_is_zero(t, mask)


def test_another_optimiser_begins_without_state_and_a_rewind_forgets_all():
    used, fresh = trainer(), trainer()
    used.save_rewind_point()
    for first in ("clip", "rmsprop"):
        used.fit(Epochs(), Epochs(), OPTIMIZERS[first], SCHEDULE, ema=EMA)
        used.flat.rewind()
        used.rewind()
        assert used.ema is None
        for t in (used, fresh):
            t.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE, ema=EMA)
        for key, value in fresh.state().items():
            assert torch.equal(used.state()[key], value), key
        used.rewind()
        fresh = trainer()
    # Without a rewind between them: first moments are no momentum.
    used.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE)
    middle = used.state()
    used.fit(Epochs(), Epochs(), OPTIMIZERS["nesterov"], SCHEDULE)
    fresh.load_state({key: value for key, value in middle.items() if key.startswith("model.")})
    fresh.fit(Epochs(), Epochs(), OPTIMIZERS["nesterov"], SCHEDULE)
    assert torch.equal(used.state()["model.0.weight"], fresh.state()["model.0.weight"])


def test_the_sparse_engine_has_no_adamw():
    t = trainer(compute="auto")
    t.set_mask(random_mask(t, 0.1))
    t.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE)
    assert (t.computed, t.reason) == ("dense", "the sparse engine has no adamw")
    with pytest.raises(ValueError, match="'sparse' is not possible here: the sparse engine has no adamw"):
        t.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE, compute="sparse")


def test_weight_decay_by_name_goes_before_that_of_norms():
    """As in the reference: a key with a dot is a whole name, another one a name within its module."""
    t = trainer()
    spec = OptimizerSpec(8, 0.9, 0.4, other_decays=(("norm", 0.0), ("bias", 0.1), ("1.weight", 0.2)))
    runs = t.flat.decays(t.model, spec)
    found = {s.name: next(d for start, stop, d in runs if start <= s.offset < stop) for s in t.flat.other_segments}
    expected = {"1.weight": 0.2, "1.bias": 0.1, "4.weight": 0.0, "4.bias": 0.1, "8.weight": 0.4, "8.bias": 0.1}
    assert found == expected
    assert [run[0] for run in runs[1:]] == [run[1] for run in runs[:-1]]
    assert (runs[0][0], runs[-1][1]) == (0, len(t.flat.other_params))


def test_the_average_is_evaluated_apart():
    t = trainer()
    [*_, last] = t.fit(Epochs(), Epochs(), OPTIMIZERS["clip"], SCHEDULE, ema=EMA)
    model = network()
    for averaged, expected in ((False, last.val_loss), (True, last.ema_loss)):
        model.load_state_dict(t.state_dict(averaged=averaged))
        model.eval()
        losses = [F.cross_entropy(model(images), labels).item() for images, labels in Epochs()]
        assert sum(losses) / 4 == pytest.approx(expected, rel=1e-5)
        assert t.evaluate(Epochs(), averaged=averaged).loss == pytest.approx(expected, rel=1e-6)
    assert last.val_loss != last.ema_loss
    t.fit(Epochs(), Epochs(), OPTIMIZERS["clip"], SCHEDULE)
    with pytest.raises(ValueError, match="no moving average"):
        t.evaluate(Epochs(), averaged=True)


def test_on_prune_hears_of_every_change_of_masks():
    heard: list[float] = []
    t = Trainer(network(), on_prune=lambda pruner: heard.append(pruner.density))
    t.prune(0.5)
    t.pruner.prune(to=0.75)
    t.set_mask(None)
    assert heard == pytest.approx([0.5, 0.25, 1.0], abs=1e-3)
    t.fit(Epochs(), Epochs(), OPTIMIZERS["adamw"], SCHEDULE)
    assert len(heard) == 3


def test_ranks_are_those_of_a_stable_sort():
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(6, (200, 9), generator=g).float()  # with many ties
    labels = torch.randint(9, (200,), generator=g)
    order = logits.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(ranks(logits, labels), (order == labels[:, None]).int().argmax(1))
    nan = torch.full((1, 3), torch.nan)
    assert ranks(nan, torch.tensor([0])).item() == 3
    t = trainer()
    images, labels = next(iter(Epochs()))
    top = t.model.eval()(images).topk(5).indices
    expected = (top == labels[:, None]).any(1).float().mean().item()
    assert t.evaluate([(images, labels)]).accuracy5 == pytest.approx(expected)
