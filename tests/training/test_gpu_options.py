"""A whole step with GpuOptions is the step without them: compiled, captured and masked, on a GPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.training import OPTIONS
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import GpuOptions, OptimizerSpec, ScheduleSpec
from fastprune.training.step import EpochMetrics
from tests.training.test_device import BATCH, bits, loop, relative

pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch.compile recommends what is not exact


class Trained(NamedTuple):
    """After ten steps. moved: how far the weights went, [n]. pruned: the weights that are, and their momentum.
    statistics: of batch norms."""

    moved: Tensor
    pruned: tuple[Tensor, Tensor]
    statistics: list[Tensor]
    metrics: EpochMetrics


def trained(device: torch.device, options: GpuOptions) -> Trained:
    """In bf16, 80 % pruned."""
    trainer, batches = loop(device, "bf16", gpu_options=options)
    flat, everything = trainer.flat, Mask.dense(trainer.flat.segments)
    trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
    start, val = flat.weight.clone(), [next(iter(batches))]
    (metrics,) = trainer.fit(batches, val, OptimizerSpec(BATCH), ScheduleSpec(0.01, 1 << 20), stop=1)
    statistics = [b.clone() for name, b in trainer.model.named_buffers() if name.endswith(("mean", "var"))]
    pruned = flat.weight[~flat.mask], flat.momentum[~flat.mask]
    return Trained(flat.weight - start, pruned, statistics, metrics)


@pytest.fixture(scope="module")
def without(device) -> Trained:
    return trained(device, OPTIONS["none"])


@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "none"])
def test_a_step_with_options_is_the_step_without(options, device, without):
    """To within rounding; on a CPU, where options have no effect, to the bit."""
    found = trained(device, OPTIONS[options])
    assert not any(bits(buffer).any() for buffer in found.pruned)
    assert without.moved.norm() > 0
    if device.type == "cpu":
        assert torch.equal(bits(found.moved), bits(without.moved))
        assert found.metrics.train_loss == without.metrics.train_loss
        return
    # As far apart as a captured bf16 step and an eager one; a wrong gradient parts them by a third or so.
    assert relative([found.moved], [without.moved]) <= 0.1
    assert relative(found.statistics, without.statistics) <= 0.02
    for name in ("train_loss", "val_loss"):
        assert getattr(found.metrics, name) == pytest.approx(getattr(without.metrics, name), rel=0.02)
