"""Where weights go: over all layers, the same share of each, or as given ratios say. Numbers by hand."""

import copy
from fractions import Fraction
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from fastprune import Pruner
from fastprune.pruning.allocation import amount_to_prune, counts_of_ratios, counts_to_prune, prune, prune_to_ratios
from fastprune.pruning.criteria import magnitude_scores
from fastprune.pruning.masks import Mask, layout

# Three layers on scales of their own: 4, 6 and 10 weights. Layer c holds the smallest magnitudes, layer a the largest.
WEIGHTS = {
    "a": torch.tensor([10.0, -20.0, 30.0, -40.0]).view(2, 2, 1, 1),
    "b": torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0]).view(3, 2, 1, 1),
    "c": torch.tensor([-0.1, 0.2, -0.3, 0.4, -0.5, 0.6, -0.7, 0.8, -0.9, 7.0]).view(5, 2, 1, 1),
}
DENSE = Mask.dense(layout(WEIGHTS.items()))
SCORES = magnitude_scores(WEIGHTS, DENSE)


def kept(mask: Mask) -> dict[str, list[int]]:
    """Indices that each layer keeps, in logical order."""
    return {name: t.flatten().nonzero().flatten().tolist() for name, t in mask.tensors().items()}


def test_global_takes_the_smallest_of_all_layers():
    mask = prune(SCORES, DENSE, 0.5)  # 10 of 20: the nine below 1, then 1.0 of layer b
    assert kept(mask) == {"a": [0, 1, 2, 3], "b": [1, 2, 3, 4, 5], "c": [9]}
    assert mask.layerwise_ratios() == {"a": 0.0, "b": pytest.approx(1 / 6), "c": pytest.approx(0.9)}


def test_local_takes_the_same_share_of_each_layer():
    mask = prune(SCORES, DENSE, 0.5, "local")
    assert kept(mask) == {"a": [2, 3], "b": [3, 4, 5], "c": [5, 6, 7, 8, 9]}
    again = prune(SCORES, mask, 0.5, "local")  # of 2, 3 and 5: round(1), round(1.5) = 2, round(2.5) = 2
    assert kept(again) == {"a": [3], "b": [5], "c": [7, 8, 9]}


def test_a_layer_of_one_weight_never_dies_locally():
    mask = DENSE
    for _ in range(30):
        mask = prune(SCORES, mask, 0.2, "local")
    assert mask.layerwise_ratios() == {"a": 0.5, "b": pytest.approx(4 / 6), "c": pytest.approx(0.8)}  # 2 of each stay


def test_given_ratios_are_met_in_each_layer():
    mask = prune_to_ratios(SCORES, DENSE, {"a": 0.75, "b": 0.0, "c": 0.4})
    assert kept(mask) == {"a": [3], "b": [0, 1, 2, 3, 4, 5], "c": [4, 5, 6, 7, 8, 9]}


def test_a_layer_can_be_given_up_whole():
    mask = prune_to_ratios(SCORES, DENSE, {"a": 1.0, "b": 0.0, "c": 0.0})
    assert kept(mask)["a"] == []
    assert mask.layerwise_ratios()["a"] == 1.0


def test_another_masks_ratios_are_reproduced_exactly():
    other = {name: torch.rand(t.shape, generator=torch.Generator().manual_seed(3)) for name, t in WEIGHTS.items()}
    mask, donor = DENSE, DENSE
    for _ in range(4):
        donor = prune(magnitude_scores(other, donor), donor, 0.3)
        new = prune_to_ratios(SCORES, mask, donor.layerwise_ratios())
        assert new.layerwise_ratios() == donor.layerwise_ratios()
        assert new.kept == donor.kept
        assert not (new.keep & ~mask.keep).any()  # nested
        mask = new


def test_ratios_that_cannot_be():
    with pytest.raises(ValueError, match="other layers"):
        prune_to_ratios(SCORES, DENSE, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="a has 2 weights pruned already"):
        prune_to_ratios(SCORES, prune(SCORES, DENSE, 0.5, "local"), {"a": 0.25, "b": 1.0, "c": 1.0})
    for bad in (-0.1, 1.1, float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            counts_of_ratios([bad], [10])
    with pytest.raises(ValueError, match="allocation"):
        prune(SCORES, DENSE, 0.5, "everywhere")
    with pytest.raises(ValueError, match="fraction"):
        prune(SCORES, DENSE, 1.5)


def test_largest_remainder_by_hand():
    # 3 x 0.5 = 1.5, 5 x 0.5 = 2.5, 7 x 0.1 = 0.7: whole parts 1, 2, 0 of round(4.7) = 5; 0.7 first, then the first 0.5
    assert counts_of_ratios([0.5, 0.5, 0.1], [3, 5, 7]) == [2, 2, 1]
    assert counts_of_ratios([0.0, 1.0], [4, 4]) == [0, 4]
    assert counts_of_ratios([], []) == []


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10**6)), max_size=60))
def test_counts_add_up_and_are_off_by_less_than_one(layers):
    ratios, sizes = [r for r, _ in layers], [n for _, n in layers]
    counts = counts_of_ratios(ratios, sizes)
    exact = [Fraction(r) * n for r, n in layers]
    assert abs(sum(counts) - sum(exact)) <= Fraction(1, 2) + len(layers) * Fraction(1, 10**6)
    for count, quota, size in zip(counts, exact, sizes, strict=True):
        assert abs(count - quota) < 1 + Fraction(1, 10**6)
        assert 0 <= count <= size


@given(st.lists(st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), max_size=60))
def test_a_ratio_made_from_counts_gives_them_back(layers):
    ratios = [1.0 - (n - gone) / n for gone, n in layers]
    assert counts_of_ratios(ratios, [n for _, n in layers]) == [gone for gone, _ in layers]


# A Pruner: how much


def small(*, bias: bool = False) -> nn.Sequential:
    """A conv (3, 2, 3, 3) and linear layers (5, 8) and (2, 5): 54, 40 and 10 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.Linear(8, 5, bias=bias), nn.Linear(5, 2, bias=bias))


def pruner_of(model: nn.Module, **options) -> Pruner:
    return Pruner(model, verbose=False, **options)


def kept_of(pruner: Pruner) -> list[int]:
    return [int(mask.sum()) for mask in pruner.masks.values()]


def test_each_amount_is_met_exactly():
    pruner = pruner_of(small())
    assert pruner.prune(0.25) == 26  # of 104
    assert pruner.prune(0.25) == 20  # round(19.5) of 78, to even
    assert pruner.prune(n=8) == 8
    assert pruner.prune(to=0.75) == 78 - 54
    assert pruner.kept == 26


def test_to_below_what_is_pruned():
    pruner = pruner_of(small())
    pruner.prune(n=54)
    before = copy.deepcopy(dict(pruner.masks))
    with pytest.raises(ValueError, match=r"to is 0\.5, but 0\.519231 of the weights are pruned already"):
        pruner.prune(to=0.5)
    assert all(torch.equal(before[name], mask) for name, mask in pruner.masks.items())
    assert pruner.prune(to=54 / 104) == 0
    assert pruner.prune(to=1.0) == 50
    assert kept_of(pruner) == [0, 0, 0]
    assert pruner.prune(1.0) == pruner.prune(n=0) == pruner.prune(to=1) == 0


AMOUNTS = {
    "none": ((), {}, "one amount"),
    "two": ((0.1,), {"to": 0.5}, "one amount"),
    "fraction and n": ((0.1,), {"n": 5}, "one amount"),
    "all three": ((0.1,), {"to": 0.5, "n": 5}, "one amount"),
    "a negative fraction": ((-0.1,), {}, "fraction is -0.1"),
    "percent": ((20,), {}, r"fraction is 20, expected a number in \[0, 1\]"),
    "NaN": ((float("nan"),), {}, "fraction is nan"),
    "a bool": ((True,), {}, "not a bool"),
    "a negative sparsity": ((), {"to": -0.5}, "to is -0.5"),
    "a sparsity in percent": ((), {"to": 95}, r"to is 95, expected a sparsity in \[0, 1\]"),
    "NaN sparsity": ((), {"to": float("nan")}, "to is nan"),
    "a bool as sparsity": ((), {"to": False}, "not a bool"),
    "a negative number": ((), {"n": -1}, "n is -1, expected a whole number from 0 to the 104"),
    "more than there are": ((), {"n": 105}, "n is 105"),
    "half a weight": ((), {"n": 2.5}, "n is 2.5"),
    "a number that is a bool": ((), {"n": True}, "not a bool"),
    "infinitely many": ((), {"n": float("inf")}, "n is inf"),
    "NaN weights": ((), {"n": float("nan")}, "n is nan"),
    "an amount with ratios": ((0.5,), {"allocation": {"0.weight": 0.5}}, "give no amount"),
    "an amount with N:M": ((0.5,), {"allocation": "1:1"}, "give no amount"),
    "unknown": ((0.5,), {"allocation": "everywhere"}, "choose global, uniform, erk"),
    "unknown pattern": ((0.5,), {"allocation": "2:4:8"}, "choose global, uniform, erk"),
    "a number as allocation": ((0.5,), {"allocation": 0.5}, "unknown allocation 0.5"),
    "no allocation": ((0.5,), {"allocation": None}, "unknown allocation None"),
}


@pytest.mark.parametrize("what", AMOUNTS)
def test_amounts_that_cannot_be_change_nothing(what):
    model = small()
    pruner = pruner_of(model)
    before = copy.deepcopy(model.state_dict())
    args, options, words = AMOUNTS[what]
    with pytest.raises(ValueError, match=words):
        pruner.prune(*args, **options)
    assert pruner.kept == 104
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_amounts_may_be_numpys_and_torchs():
    pruner = pruner_of(small())
    assert pruner.prune(n=np.int64(4)) == pruner.prune(n=torch.tensor(4)) == pruner.prune(n=4.0) == 4
    assert pruner.prune(np.float32(0.5)) == 46
    assert pruner.prune(allocation={"1.weight": np.float32(0.875), "2.weight": torch.tensor(0.9)}) > 0
    assert pruner.layerwise_ratios()["1.weight"] == 35 / 40


# A Pruner: where

SIZES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=5,
)


def layers_of(shapes) -> nn.Sequential:
    kinds = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}
    return nn.Sequential(*[kinds[len(s)](s[1], s[0], *([s[2:]] if len(s) > 2 else [])) for s in shapes])


@settings(deadline=None)
@given(SIZES, st.lists(st.tuples(st.sampled_from(["global", "uniform", "erk"]), st.floats(0, 1)), max_size=4))
def test_exactly_as_many_as_asked_of_any_model_and_nested(shapes, steps):
    model = layers_of(shapes)
    pruner = pruner_of(model)
    for allocation, fraction in steps:
        before, left = copy.deepcopy(dict(pruner.masks)), pruner.kept
        count = round(fraction * left)
        assert pruner.prune(fraction, allocation=allocation) == count
        assert pruner.kept == left - count
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert not weight[~mask].signbit().any()


@given(st.data())
def test_uniform_takes_the_same_share_of_what_is_left(data):
    """Exactly in all, and of each layer less than one weight from its share: the largest remainders get one more."""
    kept = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=30).filter(any))
    amount = data.draw(st.integers(0, sum(kept)))
    shapes = {f"l{i}": (n + 3, 1) for i, n in enumerate(kept)}
    counts = counts_to_prune("uniform", amount, shapes, kept)
    assert sum(counts) == amount
    # In whole numbers: the shares are amount x n / total.
    floors, rests = zip(*[divmod(amount * n, sum(kept)) for n in kept], strict=True)
    first = sorted(range(len(kept)), key=lambda i: (-rests[i], i))[: amount - sum(floors)]
    assert counts == [floor + (i in first) for i, floor in enumerate(floors)]
    assert all(0 <= count <= n for count, n in zip(counts, kept, strict=True))


def test_uniform_by_hand():
    pruner = pruner_of(small())
    pruner.prune(0.5, allocation="uniform")
    assert kept_of(pruner) == [27, 20, 5]
    pruner.prune(n=1, allocation="uniform")  # shares 27/52, 20/52 and 5/52
    assert kept_of(pruner) == [26, 20, 5]
    pruner.prune(n=4, allocation="uniform")  # of 51: 2.04, 1.57 and 0.39
    assert kept_of(pruner) == [24, 18, 5]


def erk_by_breakpoints(keep: int, shapes, limits) -> list[Fraction]:
    """Exact numbers to keep: min(limit, scale x sum of dimensions), with the scale at which they add up to `keep`.

    The sum grows in lines between the scales at which one more layer is full: found by going through these.
    """
    sums = [sum(shape) for shape in shapes]
    breaks = sorted({Fraction(limit, s) for limit, s in zip(limits, sums, strict=True)})
    for scale in breaks:
        total = sum(min(Fraction(limit), scale * s) for limit, s in zip(limits, sums, strict=True))
        if total >= keep:
            full = [Fraction(limit, s) < scale for limit, s in zip(limits, sums, strict=True)]
            rest = keep - sum(limit for limit, f in zip(limits, full, strict=True) if f)
            scale = Fraction(rest, sum(s for s, f in zip(sums, full, strict=True) if not f))
            return [Fraction(n) if f else scale * s for n, s, f in zip(limits, sums, full, strict=True)]
    return [Fraction(limit) for limit in limits]


@settings(deadline=None)
@given(SIZES, st.data())
def test_erk_against_an_independent_solver(shapes, data):
    limits = [data.draw(st.integers(0, prod(shape))) for shape in shapes]
    if not data.draw(st.booleans(), "some are pruned already"):
        limits = [prod(shape) for shape in shapes]
    amount = data.draw(st.integers(0, sum(limits)))
    names = {f"l{i}": shape for i, shape in enumerate(shapes)}
    counts = counts_to_prune("erk", amount, names, limits)
    kept = [limit - count for limit, count in zip(limits, counts, strict=True)]
    exact = erk_by_breakpoints(sum(limits) - amount, shapes, limits)
    assert sum(counts) == amount
    for n, quota, limit in zip(kept, exact, limits, strict=True):
        assert 0 <= n <= limit
        assert abs(n - quota) < 1
        assert quota != limit or n == limit


def test_erk_by_hand():
    """The paper's densities: (n_in + n_out + kernel) / (n_in x n_out x kernel), up to one factor."""
    # Sums of dimensions 11, 13 and 7. With 31 kept: one for each. All layers have more.
    pruner = pruner_of(small())
    pruner.prune(n=104 - 31, allocation="erk")
    assert kept_of(pruner) == [3 + 2 + 3 + 3, 5 + 8, 2 + 5]
    # With 62 kept the last would have 14 of its 10: it stays dense, and 52 are shared out as 11 : 13.
    pruner = pruner_of(small())
    pruner.prune(n=104 - 62, allocation="erk")
    assert kept_of(pruner) == [24, 28, 10]  # 23.83 and 28.17
    # The middle layer has 20 left: it keeps them all, and of the other 32 all go to the conv.
    pruner = pruner_of(small())
    pruner.prune(allocation={"1.weight": 0.5})
    pruner.prune(n=84 - 62, allocation="erk")
    assert kept_of(pruner) == [32, 20, 10]


def test_erk_in_one_dimension_and_three():
    model = nn.Sequential(nn.Conv1d(4, 6, 5), nn.Conv3d(2, 3, (1, 2, 3)), nn.ConvTranspose2d(3, 4, 2))
    pruner = pruner_of(model)
    pruner.prune(n=120 + 36 + 48 - 37, allocation="erk")
    assert kept_of(pruner) == [6 + 4 + 5, 3 + 2 + 1 + 2 + 3, 3 + 4 + 2 + 2]


def test_given_ratios_leave_other_layers_alone():
    pruner = pruner_of(small())
    pruner.prune(n=7)
    before = copy.deepcopy(dict(pruner.masks))
    gone = 40 - int(before["1.weight"].sum())
    assert pruner.prune(allocation={"1.weight": 0.5}) == 20 - gone
    assert pruner.layerwise_ratios()["1.weight"] == 0.5
    for name in ("0.weight", "2.weight"):
        assert torch.equal(pruner.masks[name], before[name])
    assert pruner.prune(allocation={}) == 0


def test_given_ratios_add_up_and_may_come_in_any_order():
    pruner = pruner_of(small())
    # 54 x 0.55 = 29.7, 10 x 0.25 = 2.5 and 40 x 0.21 = 8.4: in all round(40.6) = 41, so 29.7 and 2.5 are rounded up.
    assert pruner.prune(allocation={"2.weight": 0.25, "0.weight": 0.55, "1.weight": 0.21}) == 41
    assert kept_of(pruner) == [24, 32, 7]
    assert pruner.prune(allocation={"2.weight": 1.0}) == 7


def test_given_ratios_that_cannot_be():
    pruner = pruner_of(small())
    pruner.prune(allocation={"1.weight": 0.5})
    for ratios, words in [
        ({"1.weight": 0.25}, r"1\.weight has 0\.5 pruned already, more than its 0\.25"),
        ({"0.weight": 0.9, "1.weight": 0.25}, r"1\.weight has 0\.5 pruned already"),
        ({"0.weight": 1.5}, r"ratios are 1\.5: expected fractions in \[0, 1\]"),
        ({"0.weight": float("nan")}, r"ratios are nan"),
        ({"0.weight": float("inf")}, r"ratios are inf"),
        ({"0.weight": 0.9, "0.bias": 0.5}, r"0\.bias is none of the layers: 0\.weight, 1\.weight"),
    ]:
        with pytest.raises(ValueError, match=words):
            pruner.prune(allocation=ratios)
    assert kept_of(pruner) == [54, 20, 10]


def test_an_unknown_allocation_is_found_before_an_amount_is_looked_at():
    with pytest.raises(ValueError, match="unknown allocation 'evenly'"):
        counts_to_prune("evenly", 1, {"a": (2, 2)}, [4])
    assert amount_to_prune("global", {"a": (2, 2)}, [3], None, 0.5, None) == 1


def test_an_allocation_by_given_scores():
    """How many each layer loses does not depend on the scores, which of them does."""
    for allocation in ("uniform", "erk"):
        by_magnitude, by_scores = pruner_of(small()), pruner_of(small())
        by_magnitude.prune(0.5, allocation=allocation)
        order = {n: torch.arange(1.0, w.numel() + 1).view(w.shape) for n, w in by_scores.weights().items()}
        by_scores.prune(0.5, allocation=allocation, criterion=order)
        assert kept_of(by_magnitude) == kept_of(by_scores)
        for mask in by_scores.masks.values():
            kept = int(mask.sum())
            assert mask.flatten().tolist() == [False] * (mask.numel() - kept) + [True] * kept


# N of M


def patterned(weight: torch.Tensor, mask: torch.Tensor, n: int, m: int) -> list[bool]:
    """By definition: the n best of m consecutive inputs among those the mask keeps, of tied ones the last."""
    weight, mask = weight.movedim(1, -1), mask.movedim(1, -1)
    scores, kept = weight.reshape(-1, m).tolist(), mask.reshape(-1, m).tolist()
    new = []
    for group, there in zip(scores, kept, strict=True):
        best = sorted((i for i in range(m) if there[i]), key=lambda i: (group[i], i))[-n:]
        new += [i in best for i in range(m)]
    return torch.tensor(new).view(mask.shape).movedim(-1, 1).flatten().tolist()


@settings(deadline=None)
@given(st.data())
def test_n_of_m_is_its_definition(data):
    """Of linear layers and convs, by magnitude and by signed scores, with ties, under an earlier mask."""
    m = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(1, m))
    outputs, groups = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    model = nn.Sequential(
        nn.Linear(groups * m, outputs, bias=False),
        nn.Conv2d(groups * m, outputs, (2, 1), bias=False).to(memory_format=torch.channels_last),
        nn.Conv1d(m, outputs, 2, bias=False),
    )
    values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
    pruner = pruner_of(model, adopt_zeros=False)
    earlier, scores = {}, {}
    for name, w in pruner.weights().items():
        size = {"min_size": w.numel(), "max_size": w.numel()}
        w.data.copy_(torch.tensor(data.draw(st.lists(values, **size))).view(w.shape))
        scores[name] = torch.tensor(data.draw(st.lists(values, **size))).view(w.shape)
        earlier[name] = torch.tensor(data.draw(st.lists(st.booleans(), **size))).view(w.shape)
    pruner.set_masks(earlier)
    given_scores = data.draw(st.booleans())
    ranked = scores if given_scores else {name: w.detach().abs() for name, w in pruner.weights().items()}
    expected = {name: patterned(ranked[name], earlier[name], n, m) for name in earlier}
    before = pruner.kept
    went = pruner.prune(allocation=f"{n}:{m}", criterion=scores if given_scores else "magnitude")
    assert {name: mask.flatten().tolist() for name, mask in pruner.masks.items()} == expected
    assert went == before - pruner.kept


def test_two_of_four_by_hand():
    layer = nn.Linear(8, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]])
    pruner = pruner_of(layer)
    assert pruner.prune(allocation="2:4") == 4
    assert layer.weight.tolist() == [[0.0, -3.0, 2.0, 0.0, 0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torchs_semi_structured_format_holds_such_weights_without_loss(dtype):
    """Its compression for CUTLASS, which runs here, too. Of float32 it is 1:2, and the way back is for halves only."""
    torch.manual_seed(0)
    n, m = (1, 2) if dtype == torch.float32 else (2, 4)
    layer = nn.Linear(128, 64, bias=False, dtype=dtype)
    dense = layer.weight.detach().clone()
    pruner_of(layer).prune(allocation=f"{n}:{m}")
    weight = layer.weight.detach()
    assert (weight.view(-1, m) != 0).sum(1).eq(n).all()
    compressed, meta = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(compressed.flatten(), weight[weight != 0])
    if dtype != torch.float32:
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(compressed, meta), weight)
        lost = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(dense))
        assert not torch.equal(lost, dense)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(8, 2), nn.Linear(6, 4)), r"1\.weight has 6 inputs, no multiple of 4"),
        (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), r"1\.weight has 1 inputs"),
    ],
)
def test_n_of_m_of_a_layer_that_does_not_divide_changes_nothing(model, words):
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_of(model)
    with pytest.raises(ValueError, match=words):
        pruner.prune(allocation="2:4")
    assert pruner.kept == pruner.total
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert pruner_of(model, exclude="1.weight").prune(allocation="2:4") > 0


@pytest.mark.parametrize("pattern", ["0:4", "5:4", "0:0"])
def test_patterns_that_cannot_be(pattern):
    with pytest.raises(ValueError, match=f"allocation is {pattern}"):
        pruner_of(nn.Linear(8, 2)).prune(allocation=pattern)


def test_n_of_m_then_more_at_will():
    """Any other pruning of a 2:4 model stays nested in its pattern."""
    pruner = pruner_of(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)))
    assert pruner.prune(allocation="2:4") == 80
    assert pruner.prune(0.5) == 40
    assert pruner.prune(allocation="2:4") == 0
    assert all((mask.view(-1, 4).sum(1) <= 2).all() for mask in pruner.masks.values())


def test_n_of_m_runs_along_the_inputs_of_a_transposed_conv():
    layer = torch.nn.ConvTranspose2d(8, 3, 2)
    pruner = Pruner(layer, verbose=False)
    assert pruner.prune(allocation="2:4") == layer.weight.numel() // 2
    groups = (layer.weight != 0).movedim(0, -1).reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    with pytest.raises(ValueError, match="weight has 8 inputs, no multiple of 3"):
        pruner.prune(allocation="1:3")


def test_a_sparsity_counts_layers_that_are_frozen_later():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10))
    pruner = Pruner(model, verbose=False)
    pruner.prune(allocation={"0.weight": 0.8})
    model[1].weight.requires_grad_(False)
    assert pruner.prune(to=0.45) == 10
    assert pruner.layerwise_ratios() == pytest.approx({"0.weight": 0.9, "1.weight": 0.0})
    with pytest.raises(ValueError, match="only 10 weights are left"):
        pruner.prune(to=0.6)
