"""PyTorch's own pruning tests (test/nn/test_pruning.py, 34 of them), from their meaning, for a Pruner.

Each test here names the one there that it stands for. These have no equivalent:

- test_random_pruning_orig: a Pruner keeps no copy of pruned values under another name.
- test_pruning_container: there are no containers; masks compose by being nested.
- test_remove_pruning_exception: `finalize` of a Pruner that has pruned nothing is no error.

As there, some go over weight and bias of two modules. Structured pruning by a norm is pruning by scores
that are equal in each slice, see `prune_slices`.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastprune import Pruner, criteria

MODULES = {"linear": lambda: nn.Linear(5, 7), "conv3d": lambda: nn.Conv3d(2, 2, 2)}
each = pytest.mark.parametrize(("module", "name"), [(m, n) for m in MODULES for n in ("weight", "bias")])
ROWS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, -3.0, -2.0, -1.0]])
IMPORTANCE = torch.tensor([[4.0, 2.0, 1.0, 3.0], [-3.0, -1.0, -2.0, -4.0]])
EIGHT = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
PRIOR = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])


def pruner_of(model: nn.Module, **options: Any) -> Pruner:
    return Pruner(model, verbose=False, **options)


def module_and_pruner(module: str, name: str) -> tuple[nn.Module, Pruner]:
    """A module, and a Pruner of its parameter `name`."""
    model = MODULES[module]()
    return model, pruner_of(model, kinds=["all", "bias"], include=name)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight.clone())
    return layer


def by(scores: Tensor) -> dict[str, Tensor]:
    """Importance scores of the one layer; torch ranks by their magnitude."""
    return {"weight": scores.abs()}


def prune_slices(pruner: Pruner, amount: int, p: float, dim: int, importance: Tensor | None = None) -> None:
    """Prunes the `amount` slices along `dim` of lowest p-norm, of those that are not pruned yet (ln_structured)."""
    mask = pruner.masks["weight"]
    values = (pruner.weights()["weight"].detach() if importance is None else importance) * mask
    others = [d for d in range(mask.dim()) if d != dim % mask.dim()]
    norms = values.norm(p, others, keepdim=True)
    left = mask.sum(others).flatten()
    lowest = norms.flatten().masked_fill(left == 0, torch.inf).argsort()[:amount]
    pruner.prune(n=int(left[lowest].sum()), criterion={"weight": norms.expand(mask.shape)})


# Amounts


@pytest.mark.parametrize("options", [{"fraction": 1.1}, {"fraction": 20.0}, {"n": -10}, {"n": 0.34}])
def test_validate_pruning_amount_init(options):
    pruner = pruner_of(nn.Linear(5, 7))
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        pruner.prune(**options)
    with pytest.raises(TypeError):
        pruner.prune("I'm a string")
    for fine in ({"fraction": 0.34}, {"fraction": 0}, {"fraction": 0.0}, {"n": 0}, {"n": 1}, {"fraction": 1.0}):
        pruner.prune(**fine)
    assert pruner.kept == 0


def test_validate_pruning_amount():
    pruner = pruner_of(nn.Linear(19, 1))
    with pytest.raises(ValueError, match="n is 20, expected a whole number from 0 to the 19 weights"):
        pruner.prune(n=20)
    assert pruner.prune(n=19) == 19
    assert pruner.prune(0.3) == 0  # of nothing


@pytest.mark.parametrize(
    ("options", "size", "count"),
    [
        ({"n": 0}, 15, 0),
        ({"n": 10}, 15, 10),
        ({"n": 1}, 15, 1),
        ({"fraction": 1.0}, 15, 15),
        ({"fraction": 0.4}, 17, 7),
    ],
)
def test_compute_nparams_to_prune(options, size, count):
    pruner = pruner_of(nn.Linear(size, 1))
    assert pruner.prune(**options) == count
    assert pruner.total - pruner.kept == count


# Random pruning


@each
def test_random_pruning_sizes(module, name):
    model, pruner = module_and_pruner(module, name)
    shape = getattr(model, name).shape
    pruner.prune(0.1, criterion="random")
    assert list(pruner.masks) == [name]
    assert pruner.masks[name].shape == getattr(model, name).shape == shape
    assert pruner.total - pruner.kept == round(0.1 * shape.numel())


@each
def test_random_pruning_new_weight(module, name):
    model, pruner = module_and_pruner(module, name)
    before = getattr(model, name).detach().clone()
    pruner.prune(0.5, criterion="random")
    assert 0 < pruner.kept < pruner.total
    assert torch.equal(getattr(model, name), before * pruner.masks[name])


def forward_and_backward(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer.zero_grad()
    out = layer(torch.ones(1, 5))
    out.sum().backward()
    return out.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()


@pytest.mark.parametrize("how", ["test_identity_pruning", "test_random_pruning_0perc"])
def test_a_mask_of_ones_changes_neither_forward_nor_backward(how):
    layer = nn.Linear(5, 2)
    before = forward_and_backward(layer)
    assert torch.equal(before[1], torch.ones(2, 5))
    pruner = pruner_of(layer)
    if how == "test_identity_pruning":
        pruner.set_masks({"weight": torch.ones(2, 5)})
    else:
        assert pruner.prune(0.0, criterion="random") == 0
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(before, forward_and_backward(layer), strict=True))


def two_gone() -> tuple[nn.Linear, Pruner, Tensor]:
    """A layer (2, 5) without weights [1, 0] and [0, 3], its Pruner, and the mask."""
    mask = torch.ones(2, 5)
    mask[1, 0] = mask[0, 3] = 0
    layer = nn.Linear(5, 2)
    pruner = pruner_of(layer)
    pruner.set_masks({"weight": mask})
    return layer, pruner, mask


def test_random_pruning():
    """The gradient of what is pruned is 0, so that an update by hand leaves it alone."""
    layer, _, mask = two_gone()
    _, gradient, of_bias = forward_and_backward(layer)
    assert torch.equal(gradient, mask)
    assert torch.equal(of_bias, torch.ones(2))
    before = layer.weight.detach().clone()
    for p in layer.parameters():
        p.data.sub_(p.grad.data)
    assert layer.weight[1, 0] == layer.weight[0, 3] == 0
    assert torch.equal(layer.weight, before - mask)


def test_random_pruning_forward():
    layer = nn.Linear(5, 2)
    mask = torch.zeros(2, 5)
    mask[1, 0] = mask[0, 3] = 1
    pruner_of(layer).set_masks({"weight": mask})
    out = layer(torch.ones(1, 5))
    assert out[0, 0] == layer.weight[0, 3] + layer.bias[0]
    assert out[0, 1] == layer.weight[1, 0] + layer.bias[1]


def test_pruning_id_consistency():
    layer = nn.Linear(5, 2, bias=False)
    before = id(next(iter(layer.parameters())))
    pruner = pruner_of(layer)
    pruner.prune(0.9, criterion="random")
    assert id(next(iter(layer.parameters()))) == before
    pruner.finalize()
    assert id(next(iter(layer.parameters()))) == before


# Norms, scores, and masks that are there already


def test_l1_unstructured_pruning():
    layer = linear(ROWS)
    pruner = pruner_of(layer)
    pruner.prune(n=2)
    assert layer.weight.tolist() == [[0, 2, 3, 4], [-4, -3, -2, 0]]
    pruner.prune(n=2)
    assert layer.weight.tolist() == [[0, 0, 3, 4], [-4, -3, 0, 0]]


def test_l1_unstructured_pruning_with_importance_scores():
    layer = linear(ROWS)
    pruner = pruner_of(layer)
    pruner.prune(n=2, criterion=by(IMPORTANCE))
    assert layer.weight.tolist() == [[1, 2, 0, 4], [-4, 0, -2, -1]]
    pruner.prune(n=2, criterion=by(IMPORTANCE))
    assert layer.weight.tolist() == [[1, 0, 0, 4], [-4, 0, 0, -1]]


def test_unstructured_pruning_same_magnitude():
    torch.manual_seed(0)
    layer = linear(2.0 * torch.randint(-1, 2, (10, 7)))
    pruner = pruner_of(layer, adopt_zeros=False)
    assert pruner.prune(0.2) == 14
    assert int((~pruner.masks["weight"]).sum()) == 14


def test_prune():
    layer = linear(EIGHT)
    pruner = pruner_of(layer)
    pruner.set_masks({"weight": PRIOR})
    pruner.prune(n=2)
    assert layer.weight.tolist() == [[0, 0, 3, 0], [5, 6, 0, 8]]


def test_prune_importance_scores():
    layer = linear(EIGHT)
    pruner = pruner_of(layer)
    pruner.set_masks({"weight": PRIOR})
    pruner.prune(n=2, criterion=by(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.5, 1.6, 1.7, 1.8]])))
    assert layer.weight.tolist() == [[0, 2, 3, 0], [0, 6, 0, 8]]


def test_prune_importance_scores_mimic_default():
    """The weights themselves as scores prune what magnitudes do."""
    layers = [linear(EIGHT), linear(EIGHT)]
    for layer, options in zip(layers, ({}, {"criterion": by(EIGHT)}), strict=True):
        pruner = pruner_of(layer)
        pruner.set_masks({"weight": PRIOR})
        pruner.prune(n=2, **options)
        assert layer.weight.tolist() == [[0, 0, 3, 0], [5, 6, 0, 8]]


def test_custom_from_mask_pruning():
    """A mask of one's own composes with the present one by `&`; `set_masks` alone replaces it."""
    old = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    own = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    pruner = pruner_of(linear(EIGHT))
    pruner.set_masks({"weight": old})
    pruner.set_masks({"weight": own.bool() & pruner.masks["weight"]})
    assert pruner.masks["weight"].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    pruner.set_masks({"weight": own})
    assert pruner.masks["weight"].int().tolist() == own.tolist()


def test_global_pruning():
    model = nn.Sequential(linear(ROWS), linear(torch.tensor([[0.0, 0.1, -2.0]])))
    pruner = pruner_of(model, adopt_zeros=False)
    pruner.prune(n=4)
    assert model[0].weight.tolist() == [[0, 2, 3, 4], [-4, -3, -2, 0]]
    assert model[1].weight.tolist() == [[0, 0, -2]]
    # By default the 0 counts as pruned already, and three more are the same masks.
    model = nn.Sequential(linear(ROWS), linear(torch.tensor([[0.0, 0.1, -2.0]])))
    other = pruner_of(model)
    other.prune(n=3)
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())


def test_global_pruning_importance_scores():
    model = nn.Sequential(linear(ROWS), linear(torch.tensor([[0.0, 0.1, -2.0]])))
    scores = {"0.weight": IMPORTANCE.abs(), "1.weight": torch.tensor([[0.0, 10.0, -0.2]]).abs()}
    pruner_of(model, adopt_zeros=False).prune(n=4, criterion=scores)
    assert model[0].weight.tolist() == [[1, 2, 0, 4], [-4, 0, -2, -1]]
    assert torch.equal(model[1].weight, torch.tensor([[0.0, 0.1, 0.0]]))


# Structured pruning


def test_random_structured_pruning_amount():
    """Of two slices along the last dimension, round(0.6 x 2) = 1 goes, whole."""
    model = nn.Conv1d(4, 5, 2)
    pruner = pruner_of(model)
    drawn = criteria.random(seed=0)({"slices": nn.Parameter(torch.empty(1, 1, 2))})["slices"]
    pruner.prune(n=round(0.6 * 2) * 20, criterion={"weight": drawn.expand(5, 4, 2)})
    assert sorted((~pruner.masks["weight"]).sum((0, 1)).tolist()) == [0, 20]


CHANNELS = torch.tensor([[[[1.0, 2.0], [1.0, 2.5]], [[0.5, 1.0], [0.1, 0.1]], [[-3.0, -5.0], [0.1, -1.0]]]])
OF_CHANNELS = torch.tensor([[[[10.0, 1.0]] * 2, [[30.0, 3.0]] * 2, [[-20.0, -2.0]] * 2]])


@pytest.mark.parametrize(("importance", "channel", "column"), [(None, 1, 0), (OF_CHANNELS, 0, 1)])
def test_ln_structured_pruning(importance, channel, column):
    """And test_ln_structured_pruning_importance_scores: an input channel by L2, then a column of the kernel by L1."""
    model = nn.Conv2d(3, 1, 2)
    model.weight.data = CHANNELS.clone()
    pruner = pruner_of(model)
    expected = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    expected[:, channel] = False
    prune_slices(pruner, 1, 2, 1, importance)
    assert torch.equal(pruner.masks["weight"], expected)
    expected[..., column] = False
    prune_slices(pruner, 1, 1, -1, importance)
    assert torch.equal(pruner.masks["weight"], expected)
    assert torch.equal(model.weight, CHANNELS * expected)


def test_pruning_container_compute_mask():
    """Composed: two weights by magnitude, then a row, then a column by L2, each under what went before."""
    layer = linear(EIGHT)
    pruner = pruner_of(layer)
    pruner.set_masks({"weight": PRIOR})
    pruner.prune(n=2)
    assert pruner.masks["weight"].int().tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]
    prune_slices(pruner, 1, 2, 0)
    assert pruner.masks["weight"].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 1]]
    prune_slices(pruner, 1, 2, 1)
    assert pruner.masks["weight"].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 1]]


def test_multiple_pruning_calls():
    """Each call is nested in the one before, whatever its kind."""
    torch.manual_seed(0)
    model = nn.Conv3d(2, 2, 2)
    pruner = pruner_of(model)
    masks = [pruner.masks["weight"].clone()]
    for call in (
        lambda: pruner.prune(0.1),
        lambda: prune_slices(pruner, 1, 2, 0),
        lambda: prune_slices(pruner, 1, torch.inf, 1),
        lambda: pruner.prune(n=2, criterion="random"),
    ):
        call()
        masks.append(pruner.masks["weight"].clone())
        assert not (masks[-1] & ~masks[-2]).any()
        assert masks[-1].sum() < masks[-2].sum()
    assert [int(m.sum()) for m in masks[:2]] == [32, 29]
    assert sorted(masks[2].sum((1, 2, 3, 4)).tolist())[0] == 0
    assert sorted(masks[3].sum((0, 2, 3, 4)).tolist())[0] == 0


# Removal, errors, copies


def test_remove_pruning_forward():
    layer, pruner, _ = two_gone()
    before = layer(torch.ones(1, 5))
    pruner.finalize()
    assert torch.equal(layer(torch.ones(1, 5)), before)


@each
def test_remove_pruning(module, name):
    """`finalize` leaves a plain module: names as they were, no hooks, no masks, gradients whole again."""
    model, pruner = module_and_pruner(module, name)
    plain = set(vars(MODULES[module]()))
    pruner.prune(0.5, criterion="random")
    parameter = getattr(model, name)
    pruned = parameter.detach().clone()
    assert set(dict(model.named_parameters())) == {"weight", "bias"}
    assert not dict(model.named_buffers())
    assert pruner.finalize() is model
    assert set(dict(model.named_parameters())) == {"weight", "bias"}
    assert not dict(model.named_buffers())
    assert set(vars(model)) == plain
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert getattr(model, name) is parameter
    assert torch.equal(parameter, pruned)
    (2 * parameter).sum().backward()
    assert (parameter.grad == 2).all()


@each
def test_pruning_rollback(module, name):
    """What fails leaves no half-pruned state behind."""
    model, pruner = module_and_pruner(module, name)
    before = copy.deepcopy(model.state_dict())

    def broken(weights):
        raise Exception("HA!")

    with pytest.raises(Exception, match="HA!"):
        pruner.prune(0.9, criterion=broken)
    assert pruner.kept == pruner.total
    assert set(dict(model.named_parameters())) == {"weight", "bias"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@each
def test_random_pruning_pickle(module, name):
    model, pruner = module_and_pruner(module, name)
    pruner.prune(0.5, criterion="random")
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(getattr(again, name), getattr(model, name))
    both = pickle.loads(pickle.dumps(pruner))
    assert torch.equal(both.masks[name], pruner.masks[name])
    assert both.model is not model
    parameter = getattr(both.model, name)
    parameter.sum().backward()
    assert torch.equal(parameter.grad, pruner.masks[name].float())


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1))


def test_pruning_serialization_model():
    model = tower()
    names = list(model.state_dict())
    pruner_of(model, include="0").prune(0.9)
    assert list(model.state_dict()) == names
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert list(again.state_dict()) == names
    assert torch.equal(again[0].weight, model[0].weight)
    assert int((again[0].weight != 0).sum()) == 10


def test_pruning_serialization_state_dict():
    """A plain model takes it, before and after `finalize`, and a new Pruner takes its zeros as pruned."""
    model = tower()
    pruner = pruner_of(model, include="0")
    pruner.prune(0.9)
    for finalized in (False, True):
        if finalized:
            pruner.finalize()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        new = tower()
        new.load_state_dict(torch.load(buffer))
        assert torch.equal(new[0].weight, model[0].weight)
        again = pruner_of(new)
        assert torch.equal(again.masks["0.weight"], model[0].weight != 0)
        assert again.layerwise_ratios() == {"0.weight": 0.9, "2.weight": 0.0}


def test_rnn_pruning():
    model = nn.LSTM(32, 32)
    flat = list(model._flat_weights)
    pruner = pruner_of(model, include="weight_ih_l0")
    assert pruner.prune(0.5) == 2048
    # The weights stay the very parameters that the layer's kernel reads.
    assert all(isinstance(p, nn.Parameter) for p in model._flat_weights)
    assert all(a is b for a, b in zip(model._flat_weights, flat, strict=True))
    assert int((model.weight_ih_l0 == 0).sum()) == 2048
    out, _ = model(torch.ones(3, 1, 32))
    out.sum().backward()
    assert not model.weight_ih_l0.grad[~pruner.masks["weight_ih_l0"]].any()
    pruner.finalize()
    assert sorted(dict(model.named_parameters())) == ["bias_hh_l0", "bias_ih_l0", "weight_hh_l0", "weight_ih_l0"]
    assert all(a is b for a, b in zip(model._flat_weights, flat, strict=True))
