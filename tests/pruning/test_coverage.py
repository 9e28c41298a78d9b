"""Coverage: which weights a Pruner takes, which it leaves, and what it says of it."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from fastprune import MaskedConv2d, MaskedLinear, Pruner
from fastprune.pruning.coverage import KINDS, conv_weights, coverage


def names(model: nn.Module, *args, **kwargs) -> list[str]:
    return [c.name for c in coverage(model, *args, **kwargs).covered]


def quiet(model: nn.Module, **kwargs) -> Pruner:
    return Pruner(model, verbose=False, **kwargs)


class StdConv2d(nn.Conv2d):
    """timm's weight-standardised conv."""

    def forward(self, x):
        weight = self.weight
        mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (weight - mean) / (var + 1e-6).sqrt(), self.bias)


class LoRALinear(nn.Linear):
    """A frozen linear layer and a product of low rank beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad = False
        self.lora_A = nn.Parameter(torch.randn(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


class Mixed(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.attn = nn.MultiheadAttention(4, 2)
        self.rnn = nn.LSTM(4, 5)
        self.head = nn.Linear(5, 2)
        self.embedding = nn.Embedding(6, 4)


# Which layers


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv3d(2, 4, 3),
        nn.ConvTranspose1d(2, 4, 3),
        nn.ConvTranspose2d(2, 4, 3),
        nn.ConvTranspose3d(2, 4, 3),
        nn.Linear(3, 5),
        nn.modules.linear.NonDynamicallyQuantizableLinear(3, 5),
        StdConv2d(2, 4, 3),
        MaskedConv2d(2, 4, 3),
        MaskedLinear(2, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_weight_of_convs_and_linear_layers(layer):
    assert names(layer) == ["weight"]
    kind = "conv" if isinstance(layer, nn.modules.conv._ConvNd) else "linear"
    assert names(layer, kind) == ["weight"]
    assert names(layer, "recurrent") == []


@pytest.mark.parametrize("kind", ["conv", "linear", "attention", "recurrent"])
def test_kinds_are_apart(kind):
    found = {
        "conv": ["stem.0.weight"],
        "linear": ["attn.out_proj.weight", "head.weight"],
        "attention": ["attn.in_proj_weight", "attn.out_proj.weight"],
        "recurrent": ["rnn.weight_ih_l0", "rnn.weight_hh_l0"],
    }
    model = Mixed()
    assert names(model, kind) == found[kind]
    assert set(names(model)) == {name for of_kind in found.values() for name in of_kind}


def test_names_are_in_the_models_order():
    everything = [name for name, p in Mixed().named_parameters() if p.dim() > 1 and "embedding" not in name]
    assert names(Mixed()) == everything
    assert names(Mixed(), ["linear", "conv"]) == ["stem.0.weight", "attn.out_proj.weight", "head.weight"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.RNN(3, 4), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.GRU(3, 4, 2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (
            nn.LSTM(3, 4, bidirectional=True, proj_size=2),
            [f"weight_{kind}_l0{way}" for way in ("", "_reverse") for kind in ("ih", "hh", "hr")],
        ),
        (nn.LSTM(3, 4, bias=False), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.RNNCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.LSTMCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_of_several_weights(layer, expected):
    assert names(layer) == expected


@pytest.mark.parametrize(
    "layer",
    [nn.Embedding(5, 4), nn.EmbeddingBag(5, 4), nn.Bilinear(2, 3, 4), nn.BatchNorm2d(3), nn.LayerNorm(3), nn.PReLU()],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_left(layer):
    model = nn.Sequential(layer, nn.Linear(2, 2))
    assert names(model) == ["1.weight"]
    assert coverage(model).excluded == ()


def test_a_class_stands_for_its_own_matrices():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Bilinear(2, 3, 4), nn.Linear(2, 2), nn.BatchNorm1d(3))
    assert names(model, nn.Embedding) == ["0.weight"]
    assert names(model, ["linear", nn.Bilinear]) == ["1.weight", "2.weight"]
    assert names(model, nn.Module) == ["0.weight", "1.weight", "2.weight"]
    assert names(model, ("all", nn.Embedding)) == ["0.weight", "2.weight"]
    assert names(LoRALinear(4, 3, 2), LoRALinear) == []


def test_a_loras_base_is_frozen_and_stays():
    model = nn.Sequential(LoRALinear(4, 3, 2), nn.Linear(3, 2))
    found = coverage(model)
    assert [c.name for c in found.covered] == ["1.weight"]
    assert found.frozen == ("0.weight",)
    before = model[0].weight.clone()
    quiet(model).prune(to=0.9)
    assert torch.equal(model[0].weight, before)


def test_biases_where_they_are_asked_for():
    model = Mixed()
    model.stem[0].bias.requires_grad = False
    model.plain = nn.Linear(2, 2, bias=False)
    biases = ["attn.in_proj_bias", "attn.out_proj.bias", "rnn.bias_ih_l0", "rnn.bias_hh_l0", "head.bias"]
    assert names(model, "bias") == biases  # not of the norm
    assert coverage(model, "bias").frozen == ("stem.0.bias",)
    assert set(names(model, iter(["all", "bias"]))) == {*names(model), *biases}
    assert names(model, ["linear", "bias"], include="head") == ["head.weight", "head.bias"]
    assert names(nn.LSTMCell(3, 4), ("bias",)) == ["bias_ih", "bias_hh"]
    parametrizations.orthogonal(model.plain)
    torch.nn.utils.parametrize.register_parametrization(model.head, "bias", nn.Tanh())
    with pytest.raises(ValueError, match=r"^head\.bias is computed from other parameters \(Tanh\)"):
        coverage(model, "bias")


@pytest.mark.parametrize("kinds", ["convs", ["conv", "lin"], [3], int, [torch.Tensor]])
def test_unknown_kinds(kinds):
    with pytest.raises(
        ValueError, match=r"unknown kind .*: give all, conv, linear, attention, recurrent, bias, or a class"
    ):
        coverage(Mixed(), kinds)


def test_kinds_are_listed_once():
    assert list(KINDS) == ["conv", "linear", "attention", "recurrent"]
    assert conv_weights(Mixed())[0][0] == "stem.0.weight"


# Selectors


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("head", ["head.weight"]),
        ("head.weight", ["head.weight"]),
        ("attn", ["attn.in_proj_weight", "attn.out_proj.weight"]),
        ("attn.out_proj", ["attn.out_proj.weight"]),
        ("*_ih_*", ["rnn.weight_ih_l0"]),
        ("[sh]*", ["stem.0.weight", "head.weight"]),
        (["head", "stem"], ["stem.0.weight", "head.weight"]),
        (lambda name, p: p.shape[0] == 20, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ([lambda name, p: p.dim() == 4, "head"], ["stem.0.weight", "head.weight"]),
    ],
)
def test_include_and_exclude_are_opposites(include, expected):
    model = Mixed()
    assert names(model, include=include) == expected
    everything = names(model)
    assert names(model, exclude=include) == [name for name in everything if name not in expected]


def test_modules_select_what_they_contain():
    model = Mixed()
    assert names(model, include=model.attn) == ["attn.in_proj_weight", "attn.out_proj.weight"]
    assert names(model, include=[model.stem, model.head]) == ["stem.0.weight", "head.weight"]
    assert names(model, include=model) == names(model)
    assert names(model, include=model.attn, exclude=model.attn.out_proj) == ["attn.in_proj_weight"]
    assert names(model, exclude=iter(["attn", "rnn"])) == ["stem.0.weight", "head.weight"]


def test_exclude_wins_over_include():
    found = coverage(Mixed(), include=["attn", "head"], exclude="*out_proj*")
    assert [c.name for c in found.covered] == ["attn.in_proj_weight", "head.weight"]
    assert set(found.excluded) == {"stem.0.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "attn.out_proj.weight"}


def test_an_exclude_counts_as_used_where_include_selects_nothing_anyway():
    assert names(Mixed(), include="stem", exclude="head") == ["stem.0.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("tail", "tail"),
        (["head", "heads"], "heads"),
        (nn.Linear(2, 2), "Linear"),
        (lambda name, p: False, "<lambda>"),
        ("embedding", "embedding"),
        ("head.bias", "head.bias"),
    ],
)
def test_a_selector_that_selects_nothing_is_named(argument, selector, said):
    with pytest.raises(ValueError, match=rf"^{argument} {said} selects none of the weights .*\(stem.0.weight, .*\)$"):
        coverage(Mixed(), **{argument: selector})


@pytest.mark.parametrize("selector", [3, [3], [None], torch.ones(2)])
def test_what_is_no_selector(selector):
    with pytest.raises((ValueError, TypeError), match=r"cannot select by a|not iterable"):
        coverage(Mixed(), include=selector)


def test_a_class_is_no_selector():
    with pytest.raises(ValueError, match="cannot select by the class Conv2d: give it as kinds="):
        coverage(Mixed(), exclude=nn.Conv2d)


# Tied, frozen


def test_a_head_tied_to_its_embedding_is_covered_once():
    found = coverage(Tied())
    assert [c.names for c in found.covered] == [("embedding.weight", "head.weight")]
    assert found.total == 28 + 8
    for selector in ("embedding", "head", "head.weight"):
        assert names(Tied(), include=selector) == ["embedding.weight"]
        with pytest.raises(ValueError, match="nothing to prune"):
            quiet(Tied(), exclude=selector)


def test_two_linear_layers_that_share_a_weight_and_a_layer_used_twice():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model.append(model[0])
    pruner = quiet(model)
    assert pruner.coverage.covered[0].names == ("0.weight", "2.weight", "3.weight")
    assert (pruner.total, pruner.prune(4 / 9)) == (9, 4)
    assert model[2].weight.count_nonzero() == 5


def test_frozen_weights_are_left():
    model = Mixed()
    model.head.weight.requires_grad = False
    model.attn.requires_grad_(False)
    found = coverage(model)
    assert [c.name for c in found.covered] == ["stem.0.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert set(found.frozen) == {"head.weight", "attn.in_proj_weight", "attn.out_proj.weight"}
    before = copy.deepcopy(model.state_dict())
    quiet(model).prune(to=1)
    for name in found.frozen:
        assert torch.equal(model.state_dict()[name], before[name])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Mixed has nothing to prune \(it has 6 frozen"):
        quiet(model)


# Computed weights


def normed(how: str, layer: nn.Module, name: str = "weight") -> nn.Module:
    if how == "old weight_norm":
        with pytest.warns(FutureWarning):
            return torch.nn.utils.weight_norm(layer, name)
    functions: dict[str, Any] = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old spectral_norm": torch.nn.utils.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }
    return functions[how](layer, name)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("old weight_norm", r"weight_norm.*remove_weight_norm\(1, 'weight'\)"),
        ("weight_norm", r"_WeightNorm.*remove_parametrizations\(1, 'weight'\)"),
        ("spectral_norm", r"_SpectralNorm.*remove_parametrizations\(1, 'weight'\)"),
        ("old spectral_norm", r"spectral_norm.*remove_spectral_norm\(1, 'weight'\)"),
        ("orthogonal", r"_Orthogonal.*remove_parametrizations\(1, 'weight'\)"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Linear, nn.Embedding])
def test_computed_weights_are_refused_by_name_and_can_be_excluded(how, said, layer):
    model = nn.Sequential(nn.Linear(3, 3), normed(how, layer(3, 3)))
    kinds = ["all", layer]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^1\.weight is computed from other parameters \({said}, or exclude it$"):
        quiet(model, kinds=kinds)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for selector in ("1", "1.weight", model[1]):
        assert names(model, kinds, exclude=selector) == ["0.weight"]
    assert names(model, kinds, include="0") == ["0.weight"]


@pytest.mark.parametrize("how", ["old weight_norm", "weight_norm"])
def test_a_recurrent_weight_under_weight_norm_is_refused(how):
    with pytest.raises(ValueError, match="weight_hh_l0 is computed from other parameters"):
        coverage(normed(how, nn.LSTM(3, 4), "weight_hh_l0"))


def test_a_layer_without_its_weight_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    del model[1].weight
    model[1].weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"^1 has no parameter weight: exclude it$"):
        coverage(model)


def test_complex_weights_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^1\.weight is torch.complex64, expected floats: exclude it$"):
        coverage(model)
    assert names(model, exclude="1") == ["0.weight"]


def test_sharded_weights_are_refused(gloo):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match=r"^weight is sharded over processes \(DTensor\)"):
        coverage(model)


def test_shards_of_fsdp_are_refused():
    """FSDP with use_orig_params leaves a flat part of a weight in its place, or nothing of it."""
    for shard in (torch.zeros(8), torch.zeros(0)):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].weight = nn.Parameter(shard)
        with pytest.raises(ValueError, match=rf"^0\.weight has the shape \[{len(shard)}\], as shards"):
            coverage(model, kinds=["linear", "bias"])
        assert names(model, kinds="bias") == ["0.bias"]


# torch.nn.utils.prune


def test_masks_under_torchs_hooks_are_taken_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for layer in (model[0], model[1], model[3]):
        torch_prune.l1_unstructured(layer, "weight", 0.5)
    torch_prune.random_unstructured(model[1], "weight", 0.2)  # a PruningContainer
    masks = {f"{i}.weight": model[i].weight_mask.bool() for i in (0, 1, 3)}
    x = torch.randn(1, 2, 5, 5)
    out = model(x)
    pruner = quiet(model)
    assert pruner.names == ("0.weight", "1.weight", "3.weight")
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in masks.items())
    assert pruner.kept == sum(int(mask.sum()) for mask in masks.values())
    assert sorted(name for name, _ in model.named_parameters()) == sorted(
        f"{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")
    )
    assert not list(model.buffers())
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), out)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all(id(w) in held for w in pruner.weights().values())
    for name, weight in pruner.weights().items():
        assert not torch.signbit(weight[~masks[name]]).any()


def test_a_recurrent_layer_under_torchs_hooks_is_taken_over():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    torch_prune.l1_unstructured(model, "weight_ih_l0", 0.5)
    torch_prune.l1_unstructured(model, "weight_hh_l0", 0.25)
    out = model(x := torch.randn(2, 1, 3))[0]
    pruner = quiet(model)
    assert (pruner.total, pruner.kept) == (16 * 7, 24 + 48)
    assert torch.equal(model(x)[0], out)
    pruner.prune(n=70)
    assert model.weight_ih_l0.count_nonzero() + model.weight_hh_l0.count_nonzero() == 2
    assert sum(int(w.count_nonzero()) for w in model._flat_weights[:2]) == 2


def test_hooks_on_what_is_not_covered_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[0], "bias", 0.5)
    torch_prune.l1_unstructured(model[1], "weight", 0.5)
    torch_prune.l1_unstructured(model[2], "weight", 0.5)
    model[2].weight_orig.requires_grad = False
    pruner = quiet(model, exclude="1.weight")
    assert pruner.names == ("0.weight",)
    assert pruner.coverage.excluded == ("1.weight",)
    assert pruner.coverage.frozen == ("2.weight",)
    assert torch_prune.is_pruned(model[0])
    assert model[0].bias_mask.sum() == 2
    assert model[1].weight_mask.sum() == 8
    assert model[2].weight_mask.sum() == 4


def test_torchs_masks_are_taken_whatever_adopt_zeros_says(capsys):
    model = nn.Linear(4, 4)
    torch_prune.l1_unstructured(model, "weight", 4)
    pruner = Pruner(model, adopt_zeros=False)
    assert pruner.kept == 12
    assert "; 4 of them (25.0%) are pruned; leaves" in capsys.readouterr().err


def test_an_embedding_under_torchs_hooks():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    torch_prune.random_unstructured(model[0], "weight", 5)
    pruner = quiet(model, kinds=["linear", nn.Embedding])
    assert pruner.names == ("0.weight", "1.weight")
    assert (pruner.kept, model[0].weight.count_nonzero()) == (27, 11)


# Lazy, empty, wrapped


def test_lazy_layers_need_a_batch_or_are_excluded():
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"^1\.weight is not initialised yet: pass a batch through the model first$"):
        quiet(model)
    found = coverage(model, exclude="1")
    assert [c.name for c in found.covered] == ["0.weight"]
    assert found.excluded == ("1.weight",)
    assert (found.total, found.left) == (9, 0)
    with pytest.raises(ValueError, match=r"^1\.weight is not initialised yet"):
        coverage(model, nn.Module)
    model(torch.ones(1, 2))
    assert names(model) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("model", "kinds", "left"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Embedding(2, 3)), "all", "12 other parameters (biases, norms"),
        (nn.Linear(3, 2), "conv", "8 other parameters"),
        (nn.Linear(3, 2), [], "8 other parameters"),
        (nn.ReLU(), "all", ""),
    ],
)
def test_nothing_to_prune_is_an_error(model, kinds, left):
    with pytest.raises(ValueError, match=f"^{type(model).__name__} has nothing to prune") as caught:
        quiet(model, kinds=kinds)
    assert left in str(caught.value)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_weights():
    with pytest.raises(ValueError, match="nothing to prune"):
        quiet(nn.Linear(0, 3))
    pruner = quiet(nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)))
    assert pruner.names == ("0.weight", "1.weight")
    assert (pruner.prune(0.5), pruner.kept) == (3, 3)
    assert pruner.layerwise_ratios() == {"0.weight": 0.0, "1.weight": 0.5}
    assert str(pruner).splitlines()[1].split() == ["0.weight", "3", "x", "0", "0", "0", "0.0000"]


class Wrapper(nn.Module):
    """As DDP and AveragedModel: the model is its only child, named module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrap", ["compile", "DataParallel", "DDP", "AveragedModel", "compiled DDP", "plain"])
def test_wrappers_add_no_prefix(wrap, request):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    if "DDP" in wrap:
        request.getfixturevalue("gloo")
    wrapped = {
        "compile": lambda: torch.compile(model, backend="eager"),
        "DataParallel": lambda: nn.DataParallel(model),
        "DDP": lambda: nn.parallel.DistributedDataParallel(model),
        "compiled DDP": lambda: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(model),
        "plain": lambda: model,
    }[wrap]()
    pruner = quiet(wrapped, include=["0.weight", "1"])
    assert pruner.names == ("0.weight", "1.weight")
    assert pruner.model is model or wrap == "AveragedModel"
    pruner.prune(n=5)
    assert sum(int(p.count_nonzero()) for p in wrapped.parameters() if p.dim() == 2) == 7


def test_a_model_with_more_than_a_module_is_no_wrapper():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    class Scaled(Wrapper):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.scale = nn.Parameter(torch.ones(()))

    assert quiet(Own()).names == ("module.weight", "head.weight")
    assert quiet(Scaled(nn.Linear(2, 3))).names == ("module.weight",)


# What it says


def test_the_line_and_its_numbers(capsys):
    model = Mixed()
    model.head.weight.requires_grad = False
    Pruner(model, exclude=["rnn", "attn"])
    total = sum(p.numel() for p in model.parameters())
    other = total - 108 - 10 - (48 + 16) - (80 + 100)
    line = (
        f"fastprune: covers 1 weights of Mixed, 108 of {total} parameters ({108 / total:.1%}); leaves 1 frozen "
        "(head.weight), 4 not selected (attn.in_proj_weight, attn.out_proj.weight, rnn.weight_ih_l0, ...), "
        f"{other} other parameters (biases, norms, other kinds)\n"
    )
    assert capsys.readouterr() == ("", line)


def test_the_line_of_a_model_without_anything_else(capsys):
    Pruner(nn.Sequential(nn.Linear(40, 50, bias=False), nn.Linear(50, 20, bias=False)))
    assert capsys.readouterr().err == "fastprune: covers 2 weights of Sequential, 3,000 of 3,000 parameters (100.0%)\n"


def test_verbose_says_nothing_on_request(capsys):
    quiet(Mixed())
    assert capsys.readouterr() == ("", "")


def test_the_table():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Linear(1000, 3))
    pruner = quiet(model)
    pruner.prune(allocation={"0.weight": 0.25})
    assert str(pruner).splitlines() == [
        "layer     shape          weights   kept  density",
        "0.weight  4 x 2 x 3 x 3       72     54   0.7500",
        "1.weight  3 x 1000         3,000  3,000   1.0000",
        "total                      3,072  3,054   0.9941",
    ]


# Zeros that a model comes with


def zeroed(n: int, size: int = 200) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].get_parameter("weight").view(-1)[:n] = 0.0
    return model


@pytest.mark.parametrize(("zeros", "adopted"), [(0, 0), (1, 0), (4, 0), (5, 5), (7, 7), (20_000, 20_000)])
def test_zeros_count_as_pruned_from_one_in_ten_thousand_on(zeros, adopted):
    model = zeroed(zeros)  # 40,016 weights
    pruner = quiet(model)
    assert pruner.total - pruner.kept == adopted
    assert torch.equal(pruner.masks["0.weight"], model[0].weight != 0) == (adopted == zeros)
    assert quiet(zeroed(zeros), adopt_zeros=False).density == 1


def test_negative_zeros_are_zeros_and_become_positive():
    model = nn.Linear(4, 4)
    model.weight.data[0] = -0.0
    assert quiet(model).kept == 12
    assert not torch.signbit(model.weight[0]).any()


def test_nan_and_denormals_are_no_zeros():
    model = nn.Linear(4, 4)
    model.weight.data[0] = torch.tensor([torch.nan, 1e-45, -1e-45, 0.0])
    assert quiet(model).kept == 15


def test_the_line_of_adopted_zeros(capsys):
    model = zeroed(100)
    model[1].weight.data.zero_()
    Pruner(model)
    said = capsys.readouterr().err
    assert "; 116 of them (0.3%) are zero already and count as pruned, all of 1.weight among them" in said
    assert "(adopt_zeros=False keeps them); leaves" in said
    assert "pruned" not in (Pruner(model, adopt_zeros=False), capsys.readouterr().err)[1]


def test_layers_that_start_at_zero_are_no_pruned_model(capsys):
    # As ViT's head, whose gradient is not 0: as pruned it would never learn.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Conv2d(2, 2, 1))
    model[1].weight.data.zero_()
    assert Pruner(model).density == 1
    assert "zero already" not in capsys.readouterr().err
    model[0].weight.data[0] = 0.0
    assert quiet(model).kept == 16 + 12 + 4 - 4 - 12
    assert quiet(torchvision.models.vit_b_32(image_size=32, num_classes=1000)).density == 1


def test_zeros_of_frozen_and_excluded_weights_do_not_count():
    model = zeroed(20_000)
    assert quiet(model, exclude="0").density == 1
    model[0].weight.requires_grad = False
    assert quiet(model).density == 1
