"""Masked layers compute what they should, and an unmasked one what it computed before, bit for bit."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fastprune.errors import InputError
from fastprune.kernels import pack_bits
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import magnitude_scores, random_scores
from fastprune.pruning.masks import Mask, MaskedConv2d, attach, masks_of
from fastprune.specs import ModelSpec, n_to_prune
from fastprune.training.flat import FlatParams
from fastprune.training.models import build
from fastprune.training.trainer import Trainer


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec("resnet18", 10, "imagenet", 8))


def random_mask(model: nn.Module, keep: float = 0.5) -> Mask:
    g = torch.Generator().manual_seed(1)
    flat = {n: torch.rand(p.shape, generator=g) < keep for n, p in model.named_parameters() if p.dim() == 4}
    return Mask.from_tensors(flat)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_unmasked_wrapper_is_bit_identical(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    plain, wrapped = copy.deepcopy(model), attach(copy.deepcopy(model))
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(m, MaskedConv2d) for m in wrapped.modules()) == sum(
        isinstance(m, nn.Conv2d) for m in plain.modules()
    )
    outputs = [m(images) for m in (plain, wrapped)]
    for out in outputs:
        out.square().sum().backward()
    assert torch.equal(*outputs)
    for (n, p), (_, q) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), n
    for (n, p), (_, q) in zip(plain.named_buffers(), wrapped.named_buffers(), strict=True):
        assert torch.equal(p, q), n


def test_wrapping_keeps_hyperparameters_and_bias():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=True, padding_mode="reflect")
    x = torch.randn(1, 4, 9, 9)
    expected = conv(x)
    attach(conv)
    assert isinstance(conv, MaskedConv2d)
    assert torch.equal(conv(x), expected)


def test_masked_model_is_a_model_with_zeroed_weights():
    model, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    mask = random_mask(model)
    zeroed = copy.deepcopy(model)
    for name, keep in mask.tensors().items():
        zeroed.get_parameter(name).data.mul_(keep)
    attach(model, mask)
    assert torch.equal(model(images), zeroed(images))
    model(images).sum().backward()
    for name, keep in mask.tensors().items():
        weight = model.get_parameter(name)
        assert not weight[~keep].any()
        assert not torch.signbit(weight[~keep]).any()
        assert not weight.grad[~keep].any()
        assert weight.grad[keep].any()


def test_masks_are_written_in_place():
    model = attach(tiny(), random_mask(tiny()))
    before = model.conv1.mask
    attach(model, random_mask(model, keep=0.1))
    assert model.conv1.mask is before
    assert masks_of(model).kept == random_mask(model, keep=0.1).kept


def test_state_dict_carries_the_masks():
    mask = random_mask(tiny())
    state = attach(tiny(), mask).state_dict()
    other = attach(tiny())
    other.load_state_dict(state)
    assert torch.equal(masks_of(other).keep, mask.keep)


def test_a_plain_state_dict_loads_into_a_masked_model_and_back():
    mask = random_mask(tiny())
    masked = attach(tiny(), mask)
    masked.load_state_dict(tiny().state_dict())
    assert torch.equal(masks_of(masked).keep, mask.keep)


def test_a_trainer_keeps_the_masks_that_a_model_carries():
    mask = random_mask(tiny())
    trainer = Trainer(attach(tiny(), mask))
    assert torch.equal(trainer.flat.mask, mask.keep)


def test_a_weight_that_two_layers_share_is_refused():
    one, two = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
    two.weight = one.weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight"):
        FlatParams(nn.Sequential(one, two))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_masked_model_compiles_without_graph_breaks(autocast):
    model, images = attach(tiny(), random_mask(tiny())).eval(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(images), model(images))
    torch.compiler.reset()


def test_autocast_computes_with_the_mask_too():
    model, images = tiny().eval(), torch.randn(2, 3, 32, 32)
    mask = random_mask(model)
    zeroed = copy.deepcopy(model)
    for name, keep in mask.tensors().items():
        zeroed.get_parameter(name).data.mul_(keep)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attach(model, mask)(images), zeroed(images))


def test_linear_layers_when_asked():
    model = attach(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 1, 1)), linear=True)
    keep = {"0.weight": torch.eye(3, 4, dtype=torch.bool), "1.weight": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    attach(model, Mask.from_tensors(keep), linear=True)
    x = torch.randn(2, 4)
    assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight * keep["0.weight"], model[0].bias))


def test_foreign_masks_and_layers_are_refused():
    class Odd(nn.Conv2d):
        pass

    with pytest.raises(ValueError, match="Odd"):
        attach(nn.Sequential(Odd(1, 1, 1)))
    with pytest.raises(ValueError, match="layers"):
        attach(tiny(), Mask.from_tensors({"conv1.weight": torch.ones(1, 1, 1, 1, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="shape"):
        attach(nn.Sequential(nn.Conv2d(1, 1, 3)), Mask.from_tensors({"0.weight": torch.ones(1, 1, 1, 1) > 0}))


def test_saved_mask_is_one_bit_a_weight_and_comes_back(tmp_path):
    mask = random_mask(tiny())
    mask.save(tmp_path / "mask.safetensors")
    back = Mask.load(tmp_path / "mask.safetensors")
    assert back.segments == mask.segments
    assert torch.equal(back.keep, mask.keep)
    assert (tmp_path / "mask.safetensors").stat().st_size < mask.total / 8 + 10_000
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "mask.safetensors")["conv1.weight"]
    assert torch.equal(stored, pack_bits(mask.tensors()["conv1.weight"].flatten()))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"junk"])
def test_a_damaged_mask_is_bad_input(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        Mask.load(tmp_path / "m")


def test_ratios_by_hand():
    mask = Mask.from_tensors(
        {"a": torch.tensor([[[[True, False, False, False]]]]), "b": torch.ones(1, 1, 1, 2, dtype=torch.bool)}
    )
    assert mask.layerwise_ratios() == {"a": 0.75, "b": 0.0}
    assert mask.density == 0.5
    assert mask.ratios_csv().splitlines() == ["layer,weights,kept,pruned_fraction", "a,4,1,0.75", "b,2,2,0.0"]


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_thirty_rounds_are_nested_and_exact(score):
    model = tiny()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights["conv1.weight"].zero_()  # ties
    mask, left = Mask.dense(FlatParams(model).segments), None
    for round in range(1, 31):
        left = mask.kept
        scores = magnitude_scores(weights, mask) if score == "magnitude" else random_scores(mask, 0, round)
        new = prune(scores, mask, 0.2)
        assert new.kept == left - n_to_prune(left, 0.2)
        assert not (new.keep & ~mask.keep).any()
        mask = new
    assert mask.density == pytest.approx(0.8**30, rel=0.01)


def test_random_scores_depend_on_seed_and_round_and_nothing_else():
    mask = Mask.dense(FlatParams(tiny()).segments)
    a = random_scores(mask, 3, 1)
    assert torch.equal(a, random_scores(mask, 3, 1))
    assert not torch.equal(a, random_scores(mask, 1, 3))
    first = mask.segments[0].view(a).flatten()[:3].tolist()
    assert first == [0.7400963480618715, 0.8483457319721872, 0.8133807586025494]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_out_of_range(fraction):
    mask = Mask.dense(FlatParams(tiny()).segments)
    with pytest.raises(ValueError, match="fraction"):
        prune(torch.zeros(mask.keep.shape), mask, fraction)
