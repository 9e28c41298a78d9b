"""A whole step with GpuOptions is the step without them: compiled, captured and masked, on a GPU."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.training import OPTIONS
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import GpuOptions, OptimizerSpec, ScheduleSpec
from fastprune.training import trainer as trainer_module
from fastprune.training.step import EpochMetrics
from fastprune.training.tuning import Choices, choose
from tests.training.test_device import BATCH, LR, bits, loop, relative

pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch.compile recommends what is not exact


class Trained(NamedTuple):
    """After ten steps. moved: how far the weights went, [n]. pruned: the weights that are, and their momentum.
    statistics: of batch norms."""

    moved: Tensor
    pruned: tuple[Tensor, Tensor]
    statistics: list[Tensor]
    metrics: EpochMetrics


def trained(device: torch.device, precision: str, options: GpuOptions) -> Trained:
    """80 % pruned."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        trainer, batches = loop(device, precision, gpu_options=options, compute="dense")
        flat, everything = trainer.flat, Mask.dense(trainer.flat.segments)
        trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
        start, val = flat.weight.clone(), [next(iter(batches))]
        (metrics,) = trainer.fit(batches, val, OptimizerSpec(BATCH), ScheduleSpec(LR, 1 << 20), stop=1)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    statistics = [b.clone() for name, b in trainer.model.named_buffers() if name.endswith(("mean", "var"))]
    pruned = flat.weight[~flat.mask], flat.momentum[~flat.mask]
    return Trained(flat.weight - start, pruned, statistics, metrics)


@pytest.fixture(scope="module")
def without(device) -> Callable[[str], Trained]:
    """By precision what is trained without options, once."""
    return cache(lambda precision: trained(device, precision, OPTIONS["none"]))


@pytest.mark.parametrize(
    ("precision", "options"),
    [*(("fp32", name) for name in OPTIONS if name != "none"), ("bf16", "all"), ("fp16", "all")],
)
def test_a_step_with_options_is_the_step_without(precision, options, device, without):
    """To within rounding; on a CPU, where options have no effect, to the bit."""
    if device.type == "cpu" and (precision, options) != ("bf16", "all"):
        pytest.skip("the same on a CPU")
    found, expected = trained(device, precision, OPTIONS[options]), without(precision)
    assert not any(bits(buffer).any() for buffer in found.pruned)
    assert expected.moved.norm() > 0
    if device.type == "cpu":
        assert torch.equal(bits(found.moved), bits(expected.moved))
        assert found.metrics.train_loss == expected.metrics.train_loss
        return
    if precision == "fp32":
        # Differences of 1e-6 have become 0.03 after ten steps (measured on a CPU); a wrong gradient gives 0.3 or so.
        assert relative([found.moved], [expected.moved]) <= 0.1
    # In half precision gradients that are rounded otherwise point elsewhere, by 0.5; how long they are hardly differs.
    assert found.moved.norm().item() == pytest.approx(expected.moved.norm().item(), rel=0.1)
    assert relative(found.statistics, expected.statistics) <= {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}[precision]
    for name in ("train_loss", "val_loss"):
        assert getattr(found.metrics, name) == pytest.approx(getattr(expected.metrics, name), rel=0.02)


def test_each_option_is_timed_and_none_fails(device, tmp_path, monkeypatch):
    if device.type == "cpu":
        pytest.skip("nothing is timed on a CPU")
    monkeypatch.setattr(trainer_module, "choose", choose)  # see tests/conftest.py
    trainer, batches = loop(device, "bf16", choices=Choices(tmp_path))
    trainer.fit(batches, [next(iter(batches))], OptimizerSpec(BATCH), ScheduleSpec(LR, 1 << 20), stop=1)
    (file,) = tmp_path.glob("*/choice.json")
    timings = json.loads(file.read_text())["timings"]
    assert timings.keys() == asdict(GpuOptions()).keys()
    assert all(isinstance(timing, list) and min(timing) > 0 for timing in timings.values()), timings
