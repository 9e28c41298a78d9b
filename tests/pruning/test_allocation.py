"""Where weights go: over all layers, the same share of each, or as given ratios say. Numbers by hand."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprune.pruning.allocation import counts_of_ratios, prune, prune_to_ratios
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
    for bad in (-0.1, 1.1):
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
