"""The checks of GPU training find what can go wrong there, acted out on a CPU by a Trainer that replays wrongly."""

import pytest
import torch

from bench import gpu_speed, gpu_steps
from bench.gpu_suite import Suite
from fastprune.training import optim
from fastprune.training.trainer import Trainer


class Stale(Trainer):
    """From the fourth training step on it repeats something of that step, as a wrongly captured graph would."""

    what = "nothing"

    def __init__(self, *args, graph=None, **kwargs):
        super().__init__(*args, graph=graph, **kwargs)
        self._replays, self._steps, self._kept = graph is not False, 0, None

    def _train_step(self, images, labels):
        self._steps += 1
        mask = self.flat.mask
        if self._replays and self._steps >= 4:
            if self._kept is None:
                self._kept = {"batch": (images, labels), "rate": self._lr.clone(), "mask": mask.clone()}
            if self.what == "batch":
                images, labels = self._kept["batch"]
            if self.what == "rate":
                self._lr.copy_(self._kept["rate"])
            if self.what == "mask":
                self.flat.mask = self._kept["mask"]
        super()._train_step(images, labels)
        self.flat.mask = mask


@pytest.fixture
def act(monkeypatch):
    def replay_wrongly(what):
        monkeypatch.setattr(Stale, "what", what)
        monkeypatch.setattr(gpu_steps, "Trainer", Stale)
        return Suite("cpu", small=True)

    return replay_wrongly


def test_a_trainer_that_replays_rightly_passes(act):
    gpu_steps.check_captured(act("nothing"))
    gpu_steps.check_capture_follows(act("nothing"))


def test_a_replay_on_an_old_batch_is_found(act):
    with pytest.raises(AssertionError, match="apart"):
        gpu_steps.check_captured(act("batch"))


def test_a_replay_at_an_old_rate_is_found(act):
    with pytest.raises(AssertionError, match="the old rate was used"):
        gpu_steps.check_capture_follows(act("rate"))


def test_a_replay_under_an_old_mask_is_found(act):
    with pytest.raises(AssertionError, match="the old mask was used"):
        gpu_steps.check_capture_follows(act("mask"))


def test_a_scaler_that_takes_every_step_is_found(monkeypatch):
    def careless(optimizer):
        """Beyond a scale of 2^40; before the check reaches that, ordinary steps look for their own."""
        found = optimizer.found_inf * (optimizer.grad_scale < 2.0**40)
        return {"grad_scale": optimizer.grad_scale, "found_inf": found}

    monkeypatch.setattr(optim, "_scaling", careless)
    with pytest.raises(AssertionError, match="infinite gradients was taken"):
        gpu_steps.check_scaler(Suite("cpu", small=True))


def test_targets_of_training_are_judged_by_what_was_measured(capsys):
    s = Suite("cpu", small=True)
    gpu_speed.judge(s, "none", 2.0, 1.0)
    s.cuda = True
    for name, measured, limit in (
        ("slow", 149_999.0, -150_000),
        ("fast", 150_000.0, -150_000),
        ("most", 1.02, 1.02),
        ("over", 1.03, 1.02),
        ("unknown", None, 1.02),
    ):
        gpu_speed.judge(s, name, measured, limit)
    verdicts = {name: target["verdict"] for name, target in s.targets.items()}
    assert verdicts == {
        "none": "not judged on a CPU",
        "slow": "missed",
        "fast": "met",
        "most": "met",
        "over": "missed",
        "unknown": "not measured",
    }


def test_what_fails_costs_no_other_row(capsys):
    s = Suite("cpu", small=True)

    def wrong():
        raise ValueError("no such thing")

    gpu_speed.by_turns(s, {"ours": lambda: (0.5, 10), "broken": wrong, "other": lambda: (1.0, 10)}, "ours")
    assert set(s.timings) == {"ours", "other"}
    assert s.timings["ours"]["images_per_s"] == 20
    assert s.timings["other"]["over_ours"] == 2
    assert s.errors == {"broken": "ValueError: no such thing"}


def test_augmented_batches_of_plain_pytorch_are_pieces_of_the_images():
    """A crop of a constant image is that image; one of a ramp stays within it and keeps its direction or mirrors it."""
    images = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = 255
    images[:, 1] = (16 * torch.arange(16)).to(torch.uint8)
    images[:, 2] = (16 * torch.arange(16)[:, None]).to(torch.uint8)
    batches = gpu_speed.DeviceBatches(images, torch.arange(32), 16, ((0.0,) * 3, (1.0,) * 3))
    seen = list(batches)
    assert len(seen) == len(batches) == 2
    assert torch.equal(torch.cat([labels for _, labels in seen]).sort().values, torch.arange(32))
    mirrored = 0
    for crops, _ in seen:
        torch.testing.assert_close(crops[:, 0], torch.ones(16, 16, 16))
        assert (crops[:, 1:] <= 240 / 255 + 1e-6).all()
        assert (crops[:, 2].diff(dim=1) >= -1e-6).all()
        steps = crops[:, 1].diff(dim=2).sum((1, 2))
        mirrored += int((steps < 0).sum())
    assert 0 < mirrored < 32
