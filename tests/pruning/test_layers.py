"""Masked layers compute with the masked weight, and with a mask of ones what the plain layer computes, bit for bit."""

import copy
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn

from fastprune import MaskedConv2d, MaskedLinear, Pruner, mask_layers
from fastprune.pruning.layers import plain_layers
from fastprune.specs import ModelSpec
from fastprune.training.models import build


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec("resnet18", 10, "imagenet", 8))


def masked(model: nn.Module, fraction: float = 0.5) -> nn.Module:
    """Masked layers, with the weights that are pruned not zero."""
    weights = copy.deepcopy(model.state_dict())
    mask_layers(model)
    Pruner(model, verbose=False).prune(fraction)
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_a_mask_of_ones_changes_no_bit(name):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, num_classes=10)
    wrapped = mask_layers(copy.deepcopy(plain))
    assert sum(isinstance(m, (MaskedConv2d, MaskedLinear)) for m in wrapped.modules()) == sum(
        isinstance(m, (nn.Conv2d, nn.Linear)) for m in plain.modules()
    )
    images = torch.randn(2, 3, 64, 64)
    outputs = [m(images) for m in (plain, wrapped)]
    for out in outputs:
        out.square().sum().backward()
    assert torch.equal(*outputs)
    for (n, p), (_, q) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), n


def test_arguments_and_parameters_stay():
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2, groups=4, bias=True, padding_mode="reflect")
    x = torch.randn(1, 4, 9, 9)
    made = mask_layers(conv)
    assert isinstance(made, MaskedConv2d)
    assert made.weight is conv.weight
    assert torch.equal(made(x), conv(x))
    assert not isinstance(conv, MaskedConv2d)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_forward_masks_whatever_the_weights_are(autocast):
    model = masked(tiny().eval())
    zeroed = copy.deepcopy(model)
    plain_layers(zeroed)
    assert not any(isinstance(m, (MaskedConv2d, MaskedLinear)) for m in zeroed.modules())
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = model(images), zeroed(images)
    assert torch.equal(out, expected)
    out.sum().backward()
    for layer in (m for m in model.modules() if isinstance(m, (MaskedConv2d, MaskedLinear))):
        assert (layer.weight[~layer.mask] != 0).all()
        assert not layer.weight.grad[~layer.mask].any()
        assert layer.weight.grad[layer.mask].any()


def test_a_nan_that_is_pruned_reaches_nothing():
    layer = MaskedLinear(3, 2)
    layer.mask[0, 1] = False
    layer.weight.data[0, 1] = torch.nan
    out = layer(torch.ones(1, 3))
    out.sum().backward()
    assert out.isfinite().all()
    assert layer.weight.grad.tolist() == [[1, 0, 1], [1, 1, 1]]


def test_pickled_copied_and_saved_the_mask_comes_along(tmp_path):
    model = masked(tiny())
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    other = mask_layers(tiny()).eval()
    other.load_state_dict(model.state_dict())
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), other):
        assert torch.equal(twin(images), model(images))
        twin.conv1.mask.zero_()
        assert model.conv1.mask.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["fx", "script", "trace", "compile", "export"])
def test_masked_layers_are_traced_whole(how):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    masked(model)
    x = torch.randn(2, 3, 4, 4)
    if how == "fx":
        made = torch.fx.symbolic_trace(model)
    elif how == "script":
        made = torch.jit.script(model)
    elif how == "trace":
        made = torch.jit.trace(model, x)
    elif how == "export":
        made = torch.export.export(model, (x,)).module()
    else:
        made = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(made(x), model(x))
    model[0].mask.zero_()
    if how in ("fx", "script", "trace", "compile"):  # which read the very mask
        torch.testing.assert_close(made(x), model(x))
    torch.compiler.reset()


@pytest.mark.parametrize("prepare", ["prepare", "prepare_qat"])
def test_quantisation_does_not_pass_masked_layers_by_in_silence(prepare):
    ao = pytest.importorskip("torch.ao.quantization")
    model = masked(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    model.train(prepare == "prepare_qat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = ao.get_default_qat_qconfig("x86")
        with pytest.raises(
            ValueError, match=r"a MaskedConv2d cannot be quantised: Pruner\(model\)\.finalize\(\) makes"
        ):
            getattr(ao, prepare)(model, inplace=True)
        assert type(model[0]) is MaskedConv2d
        kept = model[0].mask
        Pruner(model, verbose=False).finalize()
        getattr(ao, prepare)(model, inplace=True)
    assert isinstance(model[0], nn.Conv2d)
    assert torch.equal(model[0].weight != 0, kept)
    assert hasattr(model[0], "weight_fake_quant" if prepare == "prepare_qat" else "activation_post_process")
    MaskedConv2d(1, 1, 1).qconfig = None  # as torch marks what is not to be quantised


def test_subclasses_are_left_alone_and_refused():
    class Odd(nn.Conv2d):
        pass

    model = nn.Sequential(Odd(1, 1, 1), nn.Conv2d(1, 1, 1))
    mask_layers(model)
    assert [type(m) for m in model] == [Odd, MaskedConv2d]
    with pytest.raises(ValueError, match="not for a Odd"):
        MaskedConv2d.of(model[0])
