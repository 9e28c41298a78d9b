"""FlatParams: what lies where, and every way in which its views come loose or a copy goes stale."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.layers import MaskedConv2d, mask_layers
from fastprune.pruning.masks import Mask
from fastprune.pruning.pruner import Pruner
from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.flat import FlatParams
from fastprune.training.models import build
from fastprune.training.trainer import Trainer

SPEC = ModelSpec("resnet18", 4, "imagenet", 8)
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": False}


def flat_of(low: torch.dtype | None = None, device="cpu") -> FlatParams:
    torch.manual_seed(0)
    return FlatParams(build(SPEC).to(device), half_precision=low)


def random_keep(flat: FlatParams, fraction: float = 0.6) -> torch.Tensor:
    dense = Mask.dense(flat.segments)
    return prune(random_scores(dense, 0, 1), dense, fraction).keep


def test_all_buffers_are_laid_out_alike():
    flat = flat_of(torch.bfloat16)
    flat.save_rewind_point()
    convs = {n: p.detach() for n, p in flat._model.named_parameters() if p.dim() == 4}
    for s in flat.segments:
        assert s.offset % 64 == 0
        for buffer in (flat.weight, flat._rewind[0]):
            assert torch.equal(s.view(buffer), convs[s.name])
        assert torch.equal(s.view(flat.half), convs[s.name].bfloat16())
        assert s.view(flat.mask).all()
        assert s.view(flat.half).is_contiguous(memory_format=torch.channels_last)
    assert int(flat.mask.sum()) == flat.total == sum(w.numel() for w in convs.values())
    assert len(flat.weight) > flat.total  # there is padding, never kept
    assert len(flat.other_params) >= sum(p.numel() for p in flat._model.parameters()) - flat.total


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_the_low_precision_copy_follows_every_write(low, device):
    flat = flat_of(low, device)
    keep = random_keep(flat)

    def follows() -> bool:
        return torch.equal(flat.half, flat.weight.to(low)) and not flat.weight[~flat.mask].any()

    flat.set_mask(keep)
    assert follows()
    flat.grad.normal_()
    flat.sgd_step(**HYPER)
    assert follows()
    flat._model.load_state_dict(build(SPEC).state_dict())
    assert not follows()
    flat.sync()
    assert follows()
    flat.save_rewind_point()
    flat.sgd_step(**HYPER)
    flat.rewind()
    assert follows()


def test_rewinding_brings_weights_back_under_the_present_mask(device):
    flat = flat_of(device=device)
    initial, rest = flat.weight.clone(), flat.other_params.clone()
    with pytest.raises(RuntimeError, match="save_rewind_point"):
        flat.rewind()
    flat.save_rewind_point()
    place = flat.weight.data_ptr()
    for buffer in (flat.grad, flat.other_grad):
        buffer.normal_()
    flat.sgd_step(**HYPER)
    assert not torch.equal(flat.weight, initial)
    flat.set_mask(random_keep(flat))
    flat.rewind()
    assert torch.equal(flat.weight, torch.where(flat.mask, initial, 0.0))
    assert torch.equal(flat.other_params, rest)
    assert not flat.momentum.any()
    assert not flat.other_momentum.any()
    assert flat.weight.data_ptr() == place
    flat.check_aliased()


def test_a_deepcopy_of_the_model_is_a_model_of_its_own():
    flat = flat_of()
    twin = copy.deepcopy(flat._model)
    before = {n: p.detach().clone() for n, p in twin.named_parameters()}
    flat.weight.add_(1.0)
    assert all(torch.equal(p, before[n]) for n, p in twin.named_parameters())
    images = torch.randn(2, 3, 32, 32)
    twin(images).sum().backward()  # its gradients are its own as well
    assert not flat.grad.any()
    FlatParams(twin).check_aliased()
    flat.check_aliased()


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_flat_buffers_and_what_holds_them_are_not_copied(copying):
    for thing in (flat_of(), Trainer(build(SPEC))):
        if copying is copy.copy and isinstance(thing, Trainer):
            continue  # the same buffers under two names: nothing comes loose
        with pytest.raises(TypeError, match="copy the model"):
            copying(thing)


def test_gradients_of_unused_parameters_are_zero():
    flat = flat_of()
    flat.grad.fill_(float("nan"))
    flat.other_grad.fill_(float("nan"))
    flat.backward(flat._model.conv1(torch.randn(1, 3, 32, 32)).sum())
    conv1 = flat.segments[0]
    assert conv1.view(flat.grad).any()
    assert int(flat.grad.count_nonzero()) <= conv1.numel
    assert not flat.other_grad.any()


def test_model_zero_grad_in_place_is_allowed():
    flat = flat_of()
    flat.grad.fill_(3.0)
    flat._model.zero_grad(set_to_none=False)
    assert not any(s.view(flat.grad).any() for s in flat.segments)
    flat.check_aliased()


def test_saved_packed_in_logical_order_it_loads_into_torchvisions_model(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    trainer = Trainer(model, precision="bf16")
    mask = trainer.prune(0.7)
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    trainer.fit(batch, batch, OptimizerSpec(4), ScheduleSpec(0.1, 1, (), 0.1))
    state = trainer.state_dict()
    torch.save(state, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    plain = torchvision.models.resnet18(num_classes=4)
    plain.load_state_dict(loaded)
    plain.to(memory_format=torch.channels_last).eval()
    model.eval()
    for name, keep in mask.tensors().items():
        assert loaded[name].is_contiguous()
        assert not loaded[name][~keep].any()
    assert torch.equal(plain(batch[0][0]), model(batch[0][0]))
    one = io.BytesIO()
    torch.save(loaded["conv1.weight"], one)
    assert len(one.getvalue()) < 2 * 4 * loaded["conv1.weight"].numel()  # not the whole buffer


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_convs_that_read_the_copy_equal_masked_convs_under_autocast(precision):
    """The Trainer's way against a user's own loop, step by step, to the bit."""
    low = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ours = Trainer(flat_of()._model, precision=precision, compute="plain")
    theirs = mask_layers(copy.deepcopy(ours.model), linear=False)
    mask = ours.prune(0.5)
    Pruner(theirs, kinds="conv", verbose=False).set_masks(mask)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        images, labels = torch.randn(8, 3, 32, 32, generator=g), torch.randint(4, (8,), generator=g)
        images = images.to(memory_format=torch.channels_last)
        batch = [(images, labels)]
        history = ours.fit(batch, batch, OptimizerSpec(8, weight_decay=1e-3), ScheduleSpec(0.1, 1, (), 0.1))
        theirs.train()
        sgd.zero_grad()
        with torch.autocast("cpu", low, enabled=precision != "fp32"):
            loss = F.cross_entropy(theirs(images), labels)
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        assert history[0].train_loss == loss.item()
        for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("masked", [False, True])
def test_the_pruner_is_the_trainers(masked):
    """Both write the same masks, which masked layers follow."""
    model = build(SPEC)
    trainer = Trainer(mask_layers(model) if masked else model)
    mask = trainer.prune(0.4)
    assert torch.equal(trainer.pruner.mask.keep, mask.keep)
    trainer.pruner.prune(0.5, criterion="lamp", allocation="uniform")
    assert trainer.flat.mask.data_ptr() == trainer.pruner.masks["conv1.weight"].data_ptr()
    assert int(trainer.flat.mask.sum()) == trainer.pruner.kept == mask.kept - round(0.5 * mask.kept)
    assert not trainer.flat.weight[~trainer.flat.mask].any()
    for name, keep in trainer.pruner.masks.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, MaskedConv2d) == masked
        assert not masked or torch.equal(layer.mask, keep)
    trainer.set_mask(None)
    assert trainer.pruner.density == 1
    assert not masked or model.conv1.mask.all()
    trainer.prune(0.5)
    trainer.load_state(trainer.state())
    assert trainer.pruner.density == 1
    assert not masked or model.conv1.mask.all()


def test_zeros_of_a_model_are_its_mask(capsys):
    model = build(SPEC)
    keep = torch.rand(model.conv1.weight.shape) < 0.5
    model.conv1.weight.data.masked_fill_(~keep, 0)
    trainer = Trainer(model)
    assert torch.equal(trainer.pruner.masks["conv1.weight"], keep)
    assert "are zero already and count as pruned" in capsys.readouterr().err


def test_a_model_without_convs_trains_when_asked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="nothing to prune"):
        Trainer(model)
    trainer = Trainer(model, kinds="linear")
    trainer.prune(0.5)
    batch = [(torch.randn(3, 1, 2, 2), torch.tensor([0, 1, 1]))]
    trainer.fit(batch, batch, OptimizerSpec(3), ScheduleSpec(0.1, 1))
    assert int((model[1].weight == 0).sum()) == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["attention", "recurrent", "bias"])
def test_other_layers_than_convs_train_under_masks(precision, kind):
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no bf16 LSTM on a CPU without AVX-512")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x, _ = self.lstm(x.flatten(1, 2).transpose(1, 2))
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Net()
    for bias in (model.attention.in_proj_bias, model.attention.out_proj.bias):
        nn.init.normal_(bias)  # by default 0, and so the first to go, whole
    trainer = Trainer(model, kinds=kind, precision=precision)
    trainer.prune(0.5)
    before = trainer.state_dict()
    batch = [(torch.randn(6, 2, 2, 5), torch.arange(6) % 3)]
    trainer.fit(batch, batch, OptimizerSpec(6), ScheduleSpec(0.1, 3))
    for name, weight in trainer.pruner.weights().items():
        keep = trainer.pruner.masks[name]
        assert not weight[~keep].any()
        assert (weight[keep] != before[name][keep]).any(), name


def odd_model() -> nn.Module:
    """No layer's size is a multiple of anything."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.Flatten(), nn.Linear(80, 3)
    )


BATCH = [(torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))]


def test_a_model_of_odd_sizes_trains_prunes_and_takes_masks(tmp_path):
    trainer = Trainer(odd_model())
    trainer.fit(BATCH, BATCH, OptimizerSpec(4), ScheduleSpec(0.1, 1))
    mask = trainer.prune(0.5)
    mask.save(tmp_path / "mask.safetensors")
    trainer.set_mask(None)
    trainer.set_mask(Mask.load(tmp_path / "mask.safetensors"))
    assert torch.equal(trainer.flat.mask, mask.keep)
    assert mask.kept == mask.total - round(mask.total * 0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_sees_weights_and_masks_that_other_code_wrote(precision):
    model = odd_model()
    trainer = Trainer(model, precision=precision)
    before, *_ = trainer.evaluate(BATCH)
    model.load_state_dict({k: v * 3 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    changed, *_ = trainer.evaluate(BATCH)
    assert changed != before
    trainer.pruner.masks["3.weight"].zero_()
    assert trainer.evaluate(BATCH)[0] != changed
    assert not model[3].weight.any()


def test_a_plain_models_state_loads_and_a_wrong_one_changes_nothing():
    trainer = Trainer(odd_model())
    trainer.load_state({f"model.{k}": v for k, v in odd_model().state_dict().items()})
    before = trainer.state()
    wrong = {k: v + 1 for k, v in before.items()} | {"model.5.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"5\.bias"):
        trainer.load_state(wrong)
    assert all(torch.equal(v, before[k]) for k, v in trainer.state().items())


def test_other_parameters_of_four_dimensions_are_laid_out_too():
    model = odd_model()
    model.place = nn.Parameter(torch.randn(1, 3, 2, 2))
    model[0].register_forward_pre_hook(lambda m, args: (args[0] + model.place.mean(),))
    Trainer(model).fit(BATCH, BATCH, OptimizerSpec(4), ScheduleSpec(0.1, 1))


def test_frozen_parameters_stay_as_they_are():
    model = odd_model()
    for frozen in (model[0].weight, model[3].bias):
        frozen.requires_grad_(False)
    before = [model[0].weight.clone(), model[3].bias.clone()]
    trainer = Trainer(model)
    assert trainer.pruner.names == ("3.weight",)
    trainer.prune(0.5)
    trainer.fit(BATCH, BATCH, OptimizerSpec(4), ScheduleSpec(0.1, 2))
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[3].bias, before[1])
    assert int((model[3].weight == 0).sum()) == round(0.5 * model[3].weight.numel())


def test_half_models_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight is torch\.float16, expected float32"):
        Trainer(odd_model().half())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_arrive_with_the_strides_of_their_places(precision):
    """Where one of them does not, torch copies each by a launch of its own: 62 for ResNet-18, and not two."""
    trainer = Trainer(build(ModelSpec("resnet18", 4, width=8)), precision=precision, compute="plain")
    trainer.model.train()
    images = torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    logits = trainer._dense["plain"].logits(images, True)
    gradients = torch.autograd.grad(logits.float().sum(), trainer.flat._leaves)
    names = [s.name for s in (*trainer.flat.segments, *trainer.flat.other_segments)]
    found = {name: (g.shape, g.stride()) for name, g in zip(names, gradients, strict=True)}
    assert found == {n: (g.shape, g.stride()) for n, g in zip(names, trainer.flat._grads, strict=True)}
    assert len({g.dtype for g in gradients[: len(trainer.flat.segments)]}) == 1
