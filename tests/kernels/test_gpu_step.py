"""A Trainer with our own loss and optimiser kernels, interpreted; on a plain CPU the options have no effect."""

import math

import pytest
import torch
from torch import nn

from fastprune.kernels import cross_entropy_
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.specs import GpuOptions, OptimizerSpec, ScheduleSpec
from fastprune.training import compute, flat, step
from fastprune.training.trainer import Trainer

BOTH = GpuOptions(gradient_table=True, fused_loss=True)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton is not interpreted")


class Net(nn.Sequential):
    """Its last conv takes no part."""

    def forward(self, x):
        for layer in self[:-1]:
            x = layer(x)
        return x


def model():
    """Odd sizes, a 1x1 conv, groups of one channel, and a conv without a gradient."""
    torch.manual_seed(0)
    return Net(
        nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 7, 3, 2, groups=7),
        nn.ReLU(), nn.Conv2d(7, 5, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 6),
        nn.Conv2d(2, 3, 1),
    )  # fmt: skip


def batches(number, seed):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, 8, 8, generator=g), torch.randint(6, (n,), generator=g)) for n in [6] * (number - 1) + [4]
    ]


def trained(options, precision="fp32", optimizer=None, steps=3, epochs=2):
    trainer = Trainer(model(), precision=precision, compute="plain", gpu_options=options)
    trainer.prune(0.4)
    spec = optimizer or OptimizerSpec(6, weight_decay=1e-3, label_smoothing=0.1)
    history = trainer.fit(batches(steps, 0), batches(2, 1), spec, ScheduleSpec(0.1, epochs))
    return trainer, history


@pytest.mark.parametrize(("precision", "nesterov"), [("fp32", False), ("fp32", True), ("bf16", False), ("fp16", True)])
def test_the_same_training_with_and_without(precision, nesterov):
    if not INTERPRETED and (precision, nesterov) != ("fp32", True):
        pytest.skip("the same where the options have no effect")
    spec = OptimizerSpec(6, weight_decay=1e-3, label_smoothing=0.1, nesterov=nesterov)
    # In low precision one step: its forward pass is the same. Later a rounding more may decide which side of a ReLU a
    # value is on, and so a whole gradient.
    steps = {} if precision == "fp32" else {"steps": 1, "epochs": 1}
    (plain, before), (ours, after) = (trained(options, precision, spec, **steps) for options in (None, BOTH))
    # The gradient by the logits differs by an ulp (2^-7 of bf16, 2^-10 of fp16), which three layers round again.
    rounding = {"fp32": 1e-5, "bf16": 4 * 2**-7, "fp16": 4 * 2**-10}[precision] if INTERPRETED else 0
    for one, other in zip(before, after, strict=True):
        assert (one.train_accuracy, one.train_accuracy5) == (other.train_accuracy, other.train_accuracy5)
        for name in ("train_loss", "val_loss"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=rounding, abs=0)
    for (name, a), (_, b) in zip(plain.state().items(), ours.state().items(), strict=True):
        if a.is_floating_point():
            assert (a - b).abs().max() <= rounding * a.abs().max(), name
    assert not ours.flat.weight[~ours.flat.mask].any()
    assert torch.equal(plain.flat.mask, ours.flat.mask)


@interpreted
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_table_alone_changes_no_bit(precision):
    (plain, before), (ours, after) = (
        trained(options, precision) for options in (None, GpuOptions(gradient_table=True))
    )
    assert [h.parts()[0] for h in before] == [h.parts()[0] for h in after]
    for name in ("weight", "momentum", "other_params", "mask"):
        assert torch.equal(getattr(plain.flat, name), getattr(ours.flat, name)), name
    grads = {s.name: s.view(ours.flat.grad) for s in ours.flat.segments}
    assert all(grad.isnan().all() for grad in grads.values())
    assert plain.flat.grad.isfinite().all()
    # Only what lies in no segment stays: a GradScaler would take NaN there for an overflow.
    assert int(ours.flat.grad.isnan().sum()) == ours.flat.total


@interpreted
def test_criteria_say_that_there_is_no_gradient_and_take_the_next(monkeypatch):
    ours, _ = trained(GpuOptions(gradient_table=True))
    before = ours.pruner.kept
    with pytest.raises(ValueError, match="NaN"):
        ours.pruner.prune(0.5, criterion="taylor")
    assert ours.pruner.kept == before
    ours.model.zero_grad(set_to_none=False)
    images, labels = batches(1, 0)[0]
    torch.nn.functional.cross_entropy(ours.model(images), labels).backward()
    ours.pruner.prune(0.5, criterion="taylor")
    assert ours.pruner.kept == before - round(0.5 * before)


@interpreted
def test_gradients_are_there_for_whoever_asks():
    """As data parallel training does, between the backward pass and the step."""
    trainers = [Trainer(model(), compute="plain", gpu_options=GpuOptions(gradient_table=t)) for t in (False, True)]
    images, labels = batches(2, 0)[0]
    for trainer in trainers:
        trainer.model.train()
        dense = trainer._dense["plain"]
        dense.pull()
        dense.backward(torch.nn.functional.cross_entropy(dense.logits(images, True), labels))
    plain, ours = (trainer.flat for trainer in trainers)
    assert ours._scattered is not None
    assert ours.grad[ours.mask].isnan().all()
    for one, other in zip(*(trainer._dense["plain"].gradients() for trainer in trainers), strict=True):
        assert torch.equal(one, other)
    for trainer in trainers:
        trainer.flat.sgd_step(lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=False)
    assert torch.equal(plain.weight, ours.weight)


OTHERS = {
    "clipping": {"clip_grad_norm": 0.5},
    "adamw": {"name": "adamw"},
    "rmsprop": {"name": "rmsprop"},
}


@interpreted
@pytest.mark.parametrize("what", [*OTHERS, "scaler", "ranks"])
def test_what_reads_the_flat_gradient_gets_it(what, monkeypatch):
    if what == "ranks":
        monkeypatch.setattr(compute, "world_size", lambda: 2)
    used = []
    monkeypatch.setattr(flat, "masked_sgd_scattered_", lambda *a, **k: used.append(a))
    spec = OptimizerSpec(6, **OTHERS.get(what, {}))
    ours, _ = trained(GpuOptions(gradient_table=True), "fp16" if what == "scaler" else "fp32", spec)
    assert not used
    assert ours.flat.grad.isfinite().all()
    assert ours.flat.grad.any()


@interpreted
def test_a_user_who_asks_the_flat_optimiser_for_more_gets_the_flat_gradient():
    """FlatParams.backward in a loop of one's own, with clipping in FlatOptimizer."""
    weights = []
    for scattered in (False, True):
        params = flat.FlatParams(model())
        optimizer = flat.FlatOptimizer(params, lr=0.1, clip_grad_norm=0.01)
        images, labels = batches(2, 0)[0]
        params.backward(torch.nn.functional.cross_entropy(params._model(images), labels), scattered=scattered)
        optimizer.step()
        weights.append(params.weight)
    assert torch.equal(*weights)


@interpreted
@pytest.mark.parametrize("what", ["own loss", "probabilities", "pixels"])
def test_other_losses_stay_torchs(what, monkeypatch):
    monkeypatch.setattr(step, "cross_entropy_", None)
    images, labels = batches(2, 0)[0]
    net, how = model(), {}
    if what == "own loss":
        how["loss"] = torch.nn.functional.cross_entropy
    elif what == "probabilities":
        labels = torch.nn.functional.one_hot(labels, 6).float()
    else:
        net, labels = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), torch.randint(6, (6, 8, 8))
    trainer = Trainer(net, compute="plain", gpu_options=BOTH, **how)
    (metrics,) = trainer.fit([(images, labels)], [(images, labels)], OptimizerSpec(6), ScheduleSpec(0.1, 1))
    assert math.isfinite(metrics.val_loss)


@interpreted
def test_padded_validation_counts_real_images_alone(monkeypatch):
    ours, plain = (Trainer(model(), compute="plain", gpu_options=options) for options in (BOTH, None))
    ours._pads = True
    val, batches_seen = batches(3, 1), []
    monkeypatch.setattr(
        step, "cross_entropy_", lambda *a, **how: (batches_seen.append(a), cross_entropy_(*a, **how))[-1]
    )
    found, expected = ours.evaluate(val), plain.evaluate(val)
    assert len(batches_seen) == len(val)
    assert int(ours._sums.sums[2]) == sum(len(labels) for _, labels in val)
    assert found[1:] == expected[1:]
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
