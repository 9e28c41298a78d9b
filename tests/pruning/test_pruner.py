"""The Pruner itself: pruned weights and gradients at +0, calls that fail change nothing, copies and files."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import MaskedConv2d, MaskedLinear, MaskedSGD, Pruner, mask_layers
from fastprune.errors import InputError
from fastprune.pruning.masks import Mask
from tests.pruning.small import batch, is_plus_zero, network


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    images, labels = batch(seed)
    like = next(model.parameters())
    return F.cross_entropy(model(images.to(like.dtype)).float(), labels)


def pruned(model: nn.Module, fraction: float = 0.5, **kwargs) -> Pruner:
    pruner = Pruner(model, verbose=False, **kwargs)
    pruner.prune(fraction)
    return pruner


def check_weights(pruner: Pruner) -> None:
    """Pruned weights are +0, kept ones are not 0."""
    for name, weight in pruner.weights().items():
        mask = pruner.masks[name]
        assert is_plus_zero(weight.detach()[~mask]), name
        assert weight.detach()[mask].all(), name


def everything(pruner: Pruner) -> list[Tensor]:
    """Copies of all that a call might change."""
    grads = [p.grad for p in pruner.model.parameters() if p.grad is not None]
    return [t.clone() for t in (*pruner.model.state_dict().values(), *pruner.masks.values(), *grads)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Weights


def test_by_hand():
    model = nn.Linear(3, 2)
    model.weight.data = torch.tensor([[-1.0, 0.5, -3.0], [0.5, -2.0, 0.25]])
    pruner = Pruner(model, verbose=False)
    assert pruner.prune(n=2) == 2
    assert model.weight.tolist() == [[-1.0, 0.0, -3.0], [0.5, -2.0, 0.0]]  # of the tied ones the first goes
    assert not torch.signbit(model.weight[0, 1])
    assert (pruner.total, pruner.kept, pruner.density, pruner.sparsity) == (6, 4, 4 / 6, 1 - 4 / 6)
    assert pruner.masks["weight"].tolist() == [[True, False, True], [True, True, False]]
    assert pruner.prune(0.5) == 2
    assert pruner.prune(to=5 / 6) == 1
    assert model.weight.tolist() == [[0.0, 0.0, -3.0], [0.0, 0.0, 0.0]]
    assert pruner.layerwise_ratios() == {"weight": 1 - 1 / 6}


def test_pruned_weights_are_plus_zero_whatever_they_were():
    model = nn.Linear(40, 10)
    model.weight.data[0] = torch.tensor([-1e-3, -0.0, 1e-3, -1e-30] * 10)
    pruner = pruned(model, 0.3, adopt_zeros=False)
    assert pruner.kept == 280
    check_weights(pruner)


def test_nan_and_inf_rank_highest():
    model = nn.Linear(6, 1)
    model.weight.data = torch.tensor([[torch.nan, 5.0, -torch.inf, 0.1, -torch.nan, 3.0]])
    pruner = pruned(model, 0.5)
    assert pruner.masks["weight"].tolist() == [[True, False, True, False, True, False]]
    assert model.weight[0, 1::2].tolist() == [0, 0, 0]
    # inf and NaN tie, so the first go first.
    pruner.prune(n=1)
    assert pruner.masks["weight"].tolist() == [[False, False, True, False, True, False]]
    assert model.weight[0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = network().to(dtype)
    magnitudes = torch.cat([model[0].weight.abs().flatten(), model[4].weight.abs().flatten()])
    pruner = pruned(model, 0.5)
    n = magnitudes.numel()
    assert pruner.kept == n - round(n / 2)
    check_weights(pruner)
    gone = torch.cat([~m.flatten() for m in pruner.masks.values()])
    assert magnitudes[gone].max() <= magnitudes[~gone].min()


def test_layers_of_several_dtypes_are_ranked_together():
    model = nn.Sequential(nn.Linear(2, 1).half(), nn.Linear(2, 1).bfloat16(), nn.Linear(2, 1).double())
    for layer, values in zip(model, ([1.0, 6.0], [2.0, 5.0], [3.0, 1.0 + 2**-40]), strict=True):
        layer.weight.data.copy_(torch.tensor([values], dtype=torch.float64))
    pruner = Pruner(model, verbose=False)
    pruner.prune(n=2)  # 1 and 1 + 2^-40, which float32 would not tell apart
    assert [w.tolist() for w in pruner.weights().values()] == [[[0, 6]], [[2, 5]], [[3, 0]]]
    pruner.prune(n=2)
    assert [w.tolist() for w in pruner.weights().values()] == [[[0, 6]], [[0, 5]], [[0, 0]]]


def channels_last_3d(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_channels_last_weights_give_the_same_mask(dims, before):
    torch.manual_seed(0)
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    plain = nn.Sequential(conv(5, 6, 3), conv(6, 4, 1))
    for layer in plain:
        layer.weight.data = (layer.weight.data * 20).round().mul(0.05)  # ties
    other, order = copy.deepcopy(plain), torch.channels_last if dims == 2 else torch.channels_last_3d
    if before:
        other = other.to(memory_format=order)
    a, b = Pruner(plain, verbose=False, adopt_zeros=False), Pruner(other, verbose=False, adopt_zeros=False)
    for share in (0.3, 0.5):
        a.prune(share)
        b.prune(share)
        other = other.to(memory_format=order)
        for name in a.names:
            assert torch.equal(a.masks[name], b.masks[name])
            assert torch.equal(a.weights()[name], b.weights()[name])
    assert other[0].weight.is_contiguous(memory_format=order)
    assert same([*a.mask.tensors().values()], [*b.mask.tensors().values()])
    assert all(torch.equal(a.state_dict()[n]["bits"], b.state_dict()[n]["bits"]) for n in a.names)


@pytest.mark.parametrize("kind", ["gaps", "transposed", "expanded"])
def test_weights_with_odd_strides(kind):
    torch.manual_seed(0)
    values = torch.randn(6, 10)
    model = nn.Linear(5, 6)
    if kind == "gaps":
        model.weight = nn.Parameter(values[:, ::2])
    elif kind == "transposed":
        model.weight = nn.Parameter(torch.randn(5, 6).t())
    else:
        model.weight = nn.Parameter(values.view(-1).as_strided((6, 5), (7, 1)))
    twin = nn.Linear(5, 6)
    twin.weight = nn.Parameter(model.weight.detach().clone(memory_format=torch.contiguous_format))
    twin.bias = model.bias
    rest = values[:, 1::2].clone()
    a, b = pruned(model, 0.4), pruned(twin, 0.4)
    assert torch.equal(a.masks["weight"], b.masks["weight"])
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(values[:, 1::2], rest) or kind != "gaps"
    check_weights(a)
    for m in (model, twin):
        m(torch.ones(2, 5)).sum().backward()
        assert torch.equal(m.weight.grad, torch.where(a.masks["weight"], 2.0, 0.0))


def test_a_model_on_the_meta_device_constructs_and_counts():
    with torch.device("meta"):
        model = network()
    pruner = Pruner(model, verbose=False)
    assert (pruner.total, pruner.kept, pruner.density) == (189 + 315, 504, 1.0)
    assert "189" in str(pruner)
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p)
    assert pruner.prune(0.5) == 252
    check_weights(pruner)


def test_pruning_everything_and_nothing():
    pruner = Pruner(network(), verbose=False)
    before = everything(pruner)
    assert pruner.prune(0.0) == pruner.prune(n=0) == pruner.prune(to=0) == 0
    assert same(before, everything(pruner))
    assert pruner.prune(to=1) == 504
    assert (pruner.kept, pruner.prune(0.5), pruner.density) == (0, 0, 0.0)
    check_weights(pruner)


def test_layers_that_are_frozen_now_are_left():
    model = network()
    pruner = Pruner(model, verbose=False)
    model[0].weight.requires_grad = False
    with pytest.raises(ValueError, match=r"to is 0\.9, but only 315 weights are left in layers that are not frozen"):
        pruner.prune(to=0.9)
    assert pruner.prune(0.2) == round(0.2 * 315)
    assert pruner.prune(to=0.5) == 252 - 63
    assert pruner.sparsity == 0.5
    assert model[0].weight.count_nonzero() == 189
    model[4].weight.requires_grad = False
    for call in (lambda: pruner.prune(0.5), lambda: pruner.drop_and_grow(0.5, lambda name, w: w)):
        with pytest.raises(ValueError, match="all covered layers are frozen now: there is nothing to prune"):
            call()


# Gradients


def test_gradients_of_pruned_weights_are_plus_zero_and_others_are_torchs():
    model = network()
    pruner = pruned(model)
    twin = copy.deepcopy(model)
    loss_of(model).backward()
    loss_of(twin).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        mask = pruner.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert q.grad[~mask].any() or mask.all()
        assert is_plus_zero(p.grad[~mask])
        assert torch.equal(p.grad[mask], q.grad[mask])
    dense = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    kept = [p.grad[{**dense, **pruner.masks}[name]].clone() for name, p in model.named_parameters()]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(norm, torch.cat(kept).norm())


def test_gradients_accumulate():
    model = network()
    pruner = pruned(model)
    (loss_of(model) / 2).backward()
    first = model[4].weight.grad.clone()
    (loss_of(model, 1) / 2).backward()
    twin = copy.deepcopy(model)
    (loss_of(twin, 1) / 2).backward()
    mask = pruner.masks["4.weight"]
    assert torch.equal(model[4].weight.grad[mask], (first + twin[4].weight.grad)[mask])
    assert is_plus_zero(model[4].weight.grad[~mask])


def test_gradients_that_are_inf_or_nan_are_zeroed_where_pruned():
    model = nn.Linear(2, 2, bias=False)
    pruned(model)
    model(torch.tensor([[torch.inf, torch.nan]])).sum().backward()
    mask = model.weight != 0
    assert is_plus_zero(model.weight.grad[~mask])
    assert not model.weight.grad[mask].isfinite().any()


def test_sparse_gradients_of_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True))
    pruner = pruned(model, kinds=nn.Embedding)
    weights = torch.randn(4, 4) * torch.tensor([[1.0], [-1.0], [torch.inf], [1.0]])
    for _ in range(2):
        (model(torch.tensor([1, 3, 8, 1])) * weights).sum().backward()
    grad = model[0].weight.grad
    assert grad.is_sparse
    mask = pruner.masks["0.weight"]
    dense = grad.to_dense()
    assert is_plus_zero(dense[~mask])
    twin = nn.Embedding(9, 4)
    for _ in range(2):
        (twin(torch.tensor([1, 3, 8, 1])) * weights).sum().backward()
    assert torch.equal(dense[mask], twin.weight.grad[mask])
    pruner.prune(0.5)
    assert is_plus_zero(model[0].weight.grad.to_dense()[~pruner.masks["0.weight"]])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert is_plus_zero(model[0].weight.detach()[~pruner.masks["0.weight"]])


def test_pruning_zeroes_the_gradients_that_are_there():
    model = network()
    pruner = Pruner(model, verbose=False)
    loss_of(model).backward()
    pruner.prune(0.5)
    for name, weight in pruner.weights().items():
        assert is_plus_zero(weight.grad[~pruner.masks[name]])
        assert weight.grad[pruner.masks[name]].any()


def test_a_prune_between_forward_and_backward_is_an_error_of_autograd():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    pruner = Pruner(model, verbose=False)
    out = model(torch.ones(1, 3)).sum()
    pruner.prune(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    check_weights(pruner)


def test_a_step_of_masked_sgd_between_forward_and_backward_is_an_error_of_autograd():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = MaskedSGD(model.parameters(), Pruner(model, verbose=False), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    out = model(torch.ones(1, 3)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_without_hooks_gradients_are_left_alone():
    model = network()
    pruner = pruned(model, hooks=False)
    loss_of(model).backward()
    assert model[4].weight.grad[~pruner.masks["4.weight"]].any()


def test_dense_gradients_when_asked():
    model = network()
    pruner = pruned(model)
    loss_of(model).backward()
    assert pruner.dense_grads == {}
    model.zero_grad()
    pruner.dense_grad = True
    loss_of(model).backward()
    twin = copy.deepcopy(model)
    loss_of(twin).backward()
    assert list(pruner.dense_grads) == ["4.weight", "0.weight"]
    for name, grad in pruner.dense_grads.items():
        assert torch.equal(grad, twin.get_parameter(name).grad)


def test_pruned_weights_that_move_without_an_attached_optimizer_are_an_error():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, verbose=False)
    loss_of(model).backward()
    optimizer.step()
    pruner.prune(0.5)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()  # by the momentum from before
    with pytest.raises(RuntimeError, match=r"^4\.weight has pruned weights that are not 0, written by other code"):
        loss_of(model).backward()
    pruner.apply()
    model.zero_grad()
    loss_of(model).backward()
    check_weights(pruner)


# Calls that fail


def wrong_calls() -> dict[str, tuple[type[Exception], str, object]]:
    ones = {"0.weight": torch.ones(7, 3, 3, 3), "4.weight": torch.ones(5, 63)}
    zeros = {"0.weight": torch.zeros(7, 3, 3, 3)}
    shapes = {name: t.tolist() for name, t in ones.items()}
    nan = {**ones, "4.weight": torch.full((5, 63), torch.nan)}

    def fails(weights):
        raise KeyError("mine")

    return {
        "no amount": (ValueError, "give one amount", lambda p: p.prune()),
        "two amounts": (ValueError, "give one amount", lambda p: p.prune(0.5, n=3)),
        "fraction": (ValueError, "fraction", lambda p: p.prune(1.5)),
        "nan": (ValueError, "fraction", lambda p: p.prune(float("nan"))),
        "to": (ValueError, "sparsity", lambda p: p.prune(to=-0.1)),
        "to less": (ValueError, "pruned already", lambda p: p.prune(to=0.1)),
        "n": (ValueError, "whole number", lambda p: p.prune(n=505)),
        "half a weight": (ValueError, "whole number", lambda p: p.prune(n=1.5)),
        "criterion": (ValueError, "unknown criterion", lambda p: p.prune(0.5, criterion="size")),
        "allocation": (ValueError, "unknown allocation", lambda p: p.prune(0.5, allocation="local")),
        "ratio of no layer": (ValueError, "none of the layers", lambda p: p.prune(allocation={"1.weight": 0.5})),
        "ratio": (ValueError, "ratios", lambda p: p.prune(allocation={"0.weight": 0.9, "4.weight": 2})),
        "2:4": (ValueError, "0.weight has 3 inputs", lambda p: p.prune(allocation="2:4")),
        "scores of one layer": (ValueError, "no scores of 4.weight", lambda p: p.prune(0.5, criterion=zeros)),
        "NaN": (ValueError, "4.weight are NaN", lambda p: p.prune(0.5, criterion=nan)),
        "no gradient": (ValueError, "no gradient", lambda p: (p.model.zero_grad(), p.prune(0.5, criterion="taylor"))),
        "own error": (KeyError, "mine", lambda p: p.prune(0.5, criterion=fails)),
        "masks of one layer": (ValueError, "no mask of 4.weight", lambda p: p.set_masks(zeros)),
        "second shape": (ValueError, "shape", lambda p: p.set_masks({**zeros, "4.weight": torch.ones(63, 5)})),
        "soft": (ValueError, "0.3", lambda p: p.set_masks({**zeros, "4.weight": torch.full((5, 63), 0.3)})),
        "no tensors": (ValueError, "4.weight|mask", lambda p: p.set_masks({**zeros, "4.weight": "ones"})),
        "file": (InputError, "cannot be read", lambda p: p.load("missing.safetensors")),
        "state": (ValueError, "not a Pruner's state", lambda p: p.load_state_dict(ones)),
        "lists": (ValueError, "not a Pruner's state", lambda p: p.load_state_dict(shapes)),
        "empty state": (ValueError, "there are no masks", lambda p: p.load_state_dict({})),
        "no state": (ValueError, "not a Pruner's state", lambda p: p.load_state_dict(None)),
        "short bits": (ValueError, "bits", lambda p: p.load_state_dict(short_state(p))),
        "drop": (ValueError, "fraction", lambda p: p.drop_and_grow(1.5, lambda name, w: w)),
        "grow": (ValueError, "4.weight", lambda p: p.drop_and_grow(0.5, lambda n, w: torch.ones(7, 3, 3, 3))),
        "grow NaN": (
            ValueError,
            "4.weight",
            lambda p: p.drop_and_grow(0.5, lambda n, w: w.detach() * (torch.nan if n == "4.weight" else 1)),
        ),
        "average": (ValueError, "average has no 0.weight", lambda p: p.attach_average(nn.Linear(2, 2))),
    }


def short_state(pruner: Pruner) -> dict:
    state = pruner.state_dict()
    state["4.weight"]["bits"] = state["4.weight"]["bits"][:-1]
    return state


@pytest.mark.parametrize("what", wrong_calls())
def test_a_call_that_fails_changes_nothing(what):
    model = network()
    pruner = pruned(model, 0.3)
    optimizer = MaskedSGD(model.parameters(), pruner, lr=0.1, momentum=0.9)
    loss_of(model).backward()
    optimizer.step()
    error, said, call = wrong_calls()[what]
    if what == "no gradient":
        model.zero_grad()
    before, momentum = everything(pruner), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(error, match=said):
        call(pruner)
    assert same(before, everything(pruner))
    for i, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum[i]["momentum_buffer"])


# Masks from outside


def test_set_masks_prunes_and_brings_back():
    model = nn.Linear(3, 2)
    pruner = Pruner(model, verbose=False)
    before = model.weight.detach().clone()
    pruner.set_masks({"weight": torch.tensor([[1, 0, 1], [0, 1, 1]])})
    assert torch.equal(model.weight, before * torch.tensor([[1, 0, 1], [0, 1, 1]]))
    pruner.set_masks({"weight": np.array([[0, 1, 1], [0, 1, 1]], dtype=np.float32)})
    assert pruner.masks["weight"].tolist() == [[False, True, True], [False, True, True]]
    assert model.weight.tolist() == [[0, 0, before[0, 2]], [0, before[1, 1], before[1, 2]]]
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad.tolist() == [[0, 1, 1], [0, 1, 1]]


def test_masks_are_written_in_place():
    pruner = Pruner(network(), verbose=False)
    held = dict(pruner.masks)
    pruner.prune(0.5)
    pruner.set_masks({name: mask.clone() for name, mask in held.items()})
    pruner.load_state_dict(pruner.state_dict())
    assert all(pruner.masks[name] is mask for name, mask in held.items())
    assert sum(int(m.sum()) for m in held.values()) == 252


def test_apply_after_foreign_writes():
    model = network()
    start = copy.deepcopy(model.state_dict())
    pruner = pruned(model)
    loss_of(model).backward()
    model.load_state_dict(start)
    for w in pruner.weights().values():
        w.grad.fill_(-1)
    pruner.apply()
    check_weights(pruner)
    for name, weight in pruner.weights().items():
        mask = pruner.masks[name]
        assert torch.equal(weight[mask], start[name][mask])
        assert is_plus_zero(weight.grad[~mask])
        assert (weight.grad[mask] == -1).all()


@pytest.mark.parametrize("how", ["to dtype", "channels_last", "assign", "load", "double, and back"])
def test_what_happens_to_the_model_does_not_lose_the_masks(how):
    model = network()
    dense = copy.deepcopy(model.state_dict())
    pruner = pruned(model)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    if how == "to dtype":
        model.to(torch.bfloat16)
    elif how == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif how == "double, and back":
        model.double().float()
    else:
        model.load_state_dict(dense, assign=how == "assign")
        pruner.apply()
    loss_of(model).backward()
    for name, weight in pruner.weights().items():
        assert torch.equal(pruner.masks[name], masks[name])
        assert is_plus_zero(weight.grad[~masks[name]])
    check_weights(pruner)
    pruner.prune(0.5)
    assert pruner.kept == 126
    check_weights(pruner)


@pytest.mark.parametrize("call", ["prune", "attach"])
def test_a_layer_that_is_replaced_is_pruned_in_its_place(call):
    model = network()
    pruner = Pruner(model, verbose=False)
    model[4] = nn.Linear(63, 5)
    with torch.no_grad():
        model[4].weight.fill_(1e-4)
    if call == "prune":
        pruner.prune(n=300)
        assert model[4].weight.count_nonzero() == 15  # not by the magnitudes of the layer before
        assert model[0].weight.all()
    else:
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1, momentum=0.9)
        pruner.attach(optimizer)
        loss_of(model).backward()
        optimizer.step()
        pruner.prune(to=0.9)
        optimizer.step()
    loss_of(model).backward()
    for name, weight in pruner.weights().items():
        assert is_plus_zero(weight.detach()[~pruner.masks[name]])
        assert is_plus_zero(weight.grad[~pruner.masks[name]])


# drop_and_grow


def test_drop_and_grow_by_hand():
    model = nn.Linear(4, 2, bias=False)
    model.weight.data = torch.tensor([[4.0, 1.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    pruner.set_masks({"weight": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])})
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    assert momentum.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    scores = torch.tensor([[0.0, -1.0, 0.0, 7.0], [-2.0, 8.0, -3.0, 0.0]])
    # 5 kept: the two of lowest magnitude, 1 and 2, go. Of the five that are pruned then, 8 and 7 come: one of them new,
    # the other just dropped.
    assert pruner.drop_and_grow(0.4, lambda name, weight: scores) == 2
    assert pruner.masks["weight"].tolist() == [[True, False, True, True], [False, True, False, True]]
    assert model.weight.tolist() == [[4, 0, 3, 0], [0, 0, 0, 9]]
    assert momentum.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]
    assert not torch.signbit(model.weight).any()
    assert not torch.signbit(momentum).any()


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_drop_and_grow_keeps_each_layers_number(fraction):
    model = network()
    pruner = pruned(model, 0.7)
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.items()}
    g = torch.Generator().manual_seed(0)
    n = pruner.drop_and_grow(fraction, lambda name, w: torch.rand(w.shape, generator=g))
    assert n == sum(round(fraction * k) for k in kept.values())
    assert {name: int(mask.sum()) for name, mask in pruner.masks.items()} == kept
    for name, weight in pruner.weights().items():
        assert is_plus_zero(weight.detach()[~pruner.masks[name]])


def test_a_layer_that_is_pruned_whole_neither_drops_nor_grows():
    pruner = Pruner(network(), verbose=False)
    pruner.prune(allocation={"0.weight": 1.0})
    assert pruner.drop_and_grow(0.5, lambda name, w: w.detach().abs()) == round(0.5 * 315)
    assert not pruner.masks["0.weight"].any()


# Files and copies


@pytest.mark.parametrize("kind", [str, lambda p: p])
def test_saved_masks_come_back(tmp_path, kind):
    pruner = pruned(network(), 0.7)
    pruner.save(kind(tmp_path / "mask"))
    other = Pruner(network(1), verbose=False)
    other.load(kind(tmp_path / "mask"))
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())
    check_weights(other)
    assert torch.equal(Mask.load(tmp_path / "mask").keep, pruner.mask.keep)


def test_state_dict_holds_bits_and_loads_into_another():
    model = nn.Linear(3, 3)
    pruner = Pruner(model, verbose=False)
    pruner.set_masks({"weight": torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]])})
    state = pruner.state_dict()
    assert state["weight"]["shape"] == [3, 3]
    assert state["weight"]["bits"].tolist() == [0b00011001, 1]
    other = Pruner(nn.Linear(3, 3), verbose=False)
    other.load_state_dict(state)
    assert torch.equal(other.masks["weight"], pruner.masks["weight"])
    assert is_plus_zero(other.model.weight.detach()[~pruner.masks["weight"]])


def test_a_state_is_a_copy():
    pruner = Pruner(network(), verbose=False)
    state = pruner.state_dict()
    pruner.prune(0.5)
    pruner.load_state_dict(state)
    assert pruner.density == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_take_model_and_masks_along_and_are_independent(how):
    model = network()
    pruner = pruned(model, dense_grad=True)
    twin = copy.deepcopy(pruner) if how == "deepcopy" else pickle.loads(pickle.dumps(pruner))
    assert twin.names == pruner.names
    assert twin.dense_grad
    assert all(torch.equal(twin.masks[name], mask) for name, mask in pruner.masks.items())
    assert same(list(twin.model.state_dict().values()), list(model.state_dict().values()))
    before = everything(pruner)
    twin.prune(0.5)
    loss_of(twin.model).backward()
    assert same(before, everything(pruner))
    check_weights(twin)
    for name, weight in twin.weights().items():
        assert is_plus_zero(weight.grad[~twin.masks[name]])
        assert twin.dense_grads[name][~twin.masks[name]].any()
    assert pruner.dense_grads == {}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_alone_are_plain(how, tmp_path):
    model = network()
    pruner = pruned(model)
    pruner.attach(torch.optim.Adam(model.parameters()))
    if how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert b"fastprune" not in pickle.dumps(model)
    check_plain(twin)
    assert same(list(twin.state_dict().values()), list(model.state_dict().values()))
    loss_of(twin).backward()
    assert twin[4].weight.grad[~pruner.masks["4.weight"]].any()


def check_plain(model: nn.Module) -> None:
    for p in model.parameters():
        assert not p._post_accumulate_grad_hooks
        assert not p._backward_hooks
    for m in model.modules():
        assert type(m).__module__.startswith("torch.")
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._state_dict_hooks):
            assert not hooks
        assert "forward" not in vars(m)


def test_the_model_is_untouched_while_it_is_pruned():
    model = network()
    keys, attributes = list(model.state_dict()), {name: set(vars(m)) for name, m in model.named_modules()}
    pruned(model)
    assert list(model.state_dict()) == keys
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for p in model.parameters():
        p._post_accumulate_grad_hooks = None  # all that a Pruner adds
    check_plain(model)


@pytest.mark.parametrize("masked", [False, True])
def test_finalize_leaves_a_plain_model(masked):
    model = network()
    types = [type(m) for m in model.modules()]
    if masked:
        mask_layers(model)
    optimizer = torch.optim.Adam(model.parameters())
    plain = pickle.dumps(torch.optim.Adam(network().parameters()))
    ema = torch.optim.swa_utils.AveragedModel(model)
    pruner = pruned(model)
    pruner.attach(optimizer)
    pruner.attach_average(ema)
    loss_of(model).backward()
    optimizer.step()
    model.eval()
    images, _ = batch()
    out = model(images)
    assert pruner.finalize() is model
    assert torch.equal(model(images), out)
    assert [type(m) for m in model.modules()] == types
    check_plain(model)
    assert not list(model.state_dict().keys() ^ network().state_dict().keys())
    assert not vars(optimizer).keys() & {"__reduce_ex__", "step"}
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            assert not value, name
    assert b"fastprune" not in pickle.dumps(optimizer)
    assert b"fastprune" not in plain
    assert "fastprune.masks" not in optimizer.state_dict()
    # Dense from here on: training brings pruned weights back.
    model.train()
    loss_of(model).backward()
    optimizer.step()
    assert model[4].weight.count_nonzero() > 300


def test_a_finalized_model_takes_a_new_pruner():
    model = network()
    pruned(model).finalize()
    pruner = Pruner(model, verbose=False)
    assert pruner.kept == 252
    assert pruner.prune(0.5) == 126


# Several Pruners


def test_two_pruners_share_a_model_by_layers():
    model = network()
    convs, linear = pruned(model, 0.5, kinds="conv"), pruned(model, 0.9, kinds="linear")
    loss_of(model).backward()
    assert (convs.kept, linear.kept) == (189 - 94, 315 - 284)
    for pruner in (convs, linear):
        for name, weight in pruner.weights().items():
            assert is_plus_zero(weight.grad[~pruner.masks[name]])


def test_a_weight_that_another_pruner_prunes_does_not_come_back_in_silence():
    model = network()
    first = pruned(model)
    second = Pruner(model, verbose=False)
    assert second.kept == 252
    second.prune(0.5)
    ones = {name: torch.ones_like(mask) for name, mask in second.masks.items()}
    before = everything(second)
    for call in (lambda: second.set_masks(ones), lambda: second.drop_and_grow(1.0, lambda n, w: -w.detach().abs())):
        with pytest.raises(ValueError, match=r"another Pruner prunes weights of 0\.weight that this one keeps: fina"):
            call()
        assert same(before, everything(second))
    first.finalize()
    second.set_masks(ones)
    assert second.density == 1


def test_optimizers_of_earlier_rounds_are_freed():
    model = network()
    pruner = pruned(model)
    old = torch.optim.Adam(model.parameters())
    pruner.attach(old)
    loss_of(model).backward()
    old.step()
    gone = weakref.ref(old)
    del old
    pruner.attach(torch.optim.Adam(model.parameters()))
    gc.collect()
    assert gone() is None


# Masked layers


def test_masked_layers_follow_and_are_taken_as_they_come():
    model = mask_layers(network())
    assert isinstance(model[0], MaskedConv2d)
    assert isinstance(model[4], MaskedLinear)
    model[0].mask.view(-1)[:100] = False
    pruner = Pruner(model, verbose=False)
    assert pruner.kept == 404
    assert is_plus_zero(model[0].weight.detach().view(-1)[:100])
    pruner.prune(0.5)
    for name, layer in (("0.weight", model[0]), ("4.weight", model[4])):
        assert torch.equal(layer.mask, pruner.masks[name])
    pruner.set_masks({name: torch.ones_like(mask) for name, mask in pruner.masks.items()})
    assert model[0].mask.all()


def test_masked_layers_may_hold_anything_in_pruned_weights():
    model = mask_layers(network())
    dense = copy.deepcopy(model.state_dict())
    pruner = pruned(model)
    model.load_state_dict({name: t for name, t in dense.items() if "mask" not in name}, strict=False)
    loss_of(model).backward()  # no error: the forward masks
    assert is_plus_zero(model[4].weight.grad[~pruner.masks["4.weight"]])


def test_on_prune_is_told_after_each_change():
    """And not by a copy, whose masks are its own."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    heard: list[int] = []
    pruner = Pruner(model, verbose=False, on_prune=lambda p: heard.append(p.kept))
    pruner.prune(0.25)
    state = pruner.state_dict()
    pruner.drop_and_grow(0.5, lambda name, weight: torch.rand_like(weight))
    pruner.prune(n=16)
    pruner.load_state_dict(state)
    assert heard == [96, 96, 80, 96]
    copy.deepcopy(pruner).prune(0.5)
    with pytest.raises(ValueError, match="fraction"):
        pruner.prune(2.0)
    assert len(heard) == 4
