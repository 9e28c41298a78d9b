"""Order, boxes and flips: known answers, torchvision's distribution, nothing but (seed, epoch, sample)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, ks_2samp
from torchvision.transforms import RandomResizedCrop

from fastprune.loaders.augment import RATIO, SCALE, crop_boxes, epoch_order, flips, philox4x32, sample_seeds

ALL = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = [  # Random123, kat_vectors, philox4x32 10
    ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]

ORDER_0_0 = [2, 0, 5, 7, 6, 3, 4, 1]
ORDER_1_2 = [5, 7, 6, 2, 1, 4, 3, 0]
BOXES_3_4 = [[2, 1, 57, 61], [3, 26, 30, 37], [29, 1, 26, 23], [11, 0, 45, 53], [11, 2, 53, 62]]
FLIPS_3_4 = [True, True, False, True, True]


@pytest.mark.parametrize(("words", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(words, answer):
    *counter, k0, k1 = words
    assert tuple(int(w) for w in philox4x32(*counter, k0, k1)) == answer


def test_philox_of_arrays_is_philox_of_each():
    counters = np.random.default_rng(0).integers(0, 1 << 32, (5, 4))
    whole = philox4x32(*counters.T, 7, 9)
    for i, row in enumerate(counters):
        assert [int(w) for w in philox4x32(*map(int, row), 7, 9)] == [int(w[i]) for w in whole]
    assert all(w.dtype == np.uint32 for w in whole)


def test_pinned():
    """Whoever changes these changes every run in every store."""
    assert epoch_order(0, 0, 8).tolist() == ORDER_0_0
    assert epoch_order(1, 2, 8).tolist() == ORDER_1_2
    box, flip = crop_boxes(3, 4, np.arange(5), 64, 64)
    assert box.tolist() == BOXES_3_4
    assert flip.tolist() == flips(3, 4, np.arange(5)).tolist() == FLIPS_3_4


def test_seeds_of_samples_are_their_own():
    seeds = sample_seeds(3, 4, np.arange(1000))
    assert seeds.dtype == np.uint64
    assert len({*seeds.tolist(), *sample_seeds(4, 3, np.arange(1000)).tolist()}) == 2000
    assert sample_seeds(3, 4, np.array([999, 3])).tolist() == seeds[[999, 3]].tolist()


def test_order_is_a_permutation_that_mixes_seed_and_epoch():
    seen = set()
    for seed in range(5):
        for epoch in range(5):
            order = epoch_order(seed, epoch, 100)
            assert sorted(order) == list(range(100))
            seen.add(tuple(order))
    assert len(seen) == 25
    assert epoch_order(0, 1, 50).tolist() != epoch_order(1, 0, 50).tolist()
    assert epoch_order(1 << 40, 0, 50).tolist() != epoch_order(0, 0, 50).tolist()
    assert epoch_order(0, 0, 0).tolist() == []
    assert epoch_order(0, 0, 1).tolist() == [0]


def test_order_is_uniform():
    """Where sample 0 of 6 lands, over 3,000 epochs: chi-squared at one in a million."""
    places = np.bincount([int(np.flatnonzero(epoch_order(0, e, 6) == 0)[0]) for e in range(3000)], minlength=6)
    assert ((places - 500) ** 2 / 500).sum() < chi2.isf(1e-6, 5)


def test_a_box_depends_on_its_sample_alone():
    box, flip = crop_boxes(5, 6, np.arange(1000), 64, 64)
    some = np.array([999, 3, 500, 3])
    again, flip_again = crop_boxes(5, 6, some, 64, 64)
    assert np.array_equal(again, box[some])
    assert np.array_equal(flip_again, flip[some])
    other, _ = crop_boxes(6, 5, np.arange(1000), 64, 64)
    assert (other != box).any(axis=1).mean() > 0.99
    mixed, _ = crop_boxes(5, 6, np.arange(1000), np.where(np.arange(1000) % 2, 64, 48), np.full(1000, 64))
    assert np.array_equal(mixed[1::2], box[1::2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (1000, 300)], ids=str)
def test_boxes_are_distributed_as_torchvisions(height, width):
    """Kolmogorov-Smirnov on each coordinate against get_params, at one in a million."""
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(4000)])
    ours, flip = crop_boxes(0, 0, np.arange(20000), height, width)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-6
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-6
    assert abs(flip.mean() - 0.5) < 5 * 0.5 / 20000**0.5


@pytest.mark.parametrize(("height", "width"), [(1, 100), (100, 1), (2, 90), (90, 2), (3, 3), (1, 1)], ids=str)
def test_extreme_shapes_fall_back_as_torchvision_does(height, width):
    """Where no attempt can fit, get_params is certain: compare those boxes literally."""
    torch.manual_seed(0)
    theirs = {tuple(RandomResizedCrop.get_params(torch.empty(3, height, width), SCALE, RATIO)) for _ in range(200)}
    ours = {tuple(box) for box in crop_boxes(0, 0, np.arange(2000), height, width)[0].tolist()}
    if max(height, width) > 10:
        assert len(theirs) == 1
        assert ours == theirs
    else:
        assert theirs <= ours


def test_fallback_by_hand():
    assert crop_boxes(0, 0, np.arange(1), 1, 100)[0].tolist() == [[0, 49, 1, 1]]
    assert crop_boxes(0, 0, np.arange(1), 200, 3)[0].tolist() == [[98, 0, 4, 3]]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300))
def test_boxes_lie_inside(seed, epoch, height, width):
    box, flip = crop_boxes(seed, epoch, np.arange(20) * 12345678901, height, width)
    top, left, box_h, box_w = box.T
    assert box.dtype == np.int32
    assert flip.dtype == bool
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_h > 0).all()
    assert (box_w > 0).all()
    assert (top + box_h <= height).all()
    assert (left + box_w <= width).all()


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (1 << 64, 0), (0, -1), (0, 1 << 32)])
def test_seeds_that_would_wrap_are_refused(seed, epoch):
    with pytest.raises(ValueError, match="not in"):
        epoch_order(seed, epoch, 3)
    with pytest.raises(ValueError, match="not in"):
        crop_boxes(seed, epoch, np.arange(3), 8, 8)


def test_no_samples():
    box, flip = crop_boxes(0, 0, np.arange(0), 8, 8)
    assert box.shape == (0, 4)
    assert flip.shape == (0,)
