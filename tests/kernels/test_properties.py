"""Properties of the operations on inputs that hypothesis makes up."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V2

from fastprune.kernels import Segment, keep_top, kth_smallest_magnitude, pack_bits, unpack_bits
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.keep_top import keep_top_reference, kth_smallest_magnitude_reference
from fastprune.kernels.pack_bits import pack_bits_reference
from tests.kernels.test_crop import EPS, crop_one, random_images

# A machine with a GPU may lack it.
hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")
given = hypothesis.given


def examples(number, interpreted):
    return hypothesis.settings(max_examples=interpreted if INTERPRETED else number, deadline=None)


@st.composite
def problems(draw):
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), max_size=4)
    )
    segments, offset, position = [], 0, 0
    for i, shape in enumerate(shapes):
        offset += draw(st.integers(0, 5))
        segments.append(Segment(f"s{i}", shape, offset, position))
        offset += segments[-1].numel
        position += segments[-1].numel
    mask = np.zeros(offset, dtype=bool)
    for s in segments:
        mask[s.span] = draw(st.lists(st.booleans(), min_size=s.numel, max_size=s.numel))
    values = st.sampled_from([0.0, 0.5, 1.0, 1e-40, float("inf"), float("nan")])
    score = np.array(draw(st.lists(values, min_size=offset, max_size=offset)), dtype=np.float32)
    return torch.from_numpy(score), torch.from_numpy(mask), segments, draw(st.floats(0, 1))


@examples(150, interpreted=25)
@given(problem=problems())
def test_keep_top_is_its_reference(problem, device):
    score, mask, segments, fraction = problem
    there = score.to(device), mask.to(device)
    n = round(fraction * int(mask.sum()))
    if segments:
        new = keep_top(*there, n, segments).cpu()
        assert torch.equal(new, keep_top_reference(score, mask, n, segments))
        assert int(new.sum()) == int(mask.sum()) - n
        assert not (new & ~mask).any()
        each = [round(fraction * int(mask[s.span].sum())) for s in segments]
        local = keep_top(*there, each, segments).cpu()
        assert torch.equal(local, keep_top_reference(score, mask, each, segments))
    assert torch.equal(keep_top(*there, n).cpu(), keep_top_reference(score, mask, n))
    if n:
        assert kth_smallest_magnitude(*there, n).cpu() == kth_smallest_magnitude_reference(score, mask, n)


@examples(60, interpreted=15)
@given(bits=st.lists(st.booleans(), max_size=70))
def test_bits_round_trip(bits, device):
    flags = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(flags.to(device))
    assert torch.equal(packed.cpu(), pack_bits_reference(flags))
    assert torch.equal(unpack_bits(packed, len(bits)).cpu(), flags)


@examples(150, interpreted=50)
@given(data=st.data())
def test_any_crop_stays_within_its_pixels_and_mirrors(data, device):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    box_h, box_w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - box_h)), data.draw(st.integers(0, width - box_w))
    size = (box_h + data.draw(st.integers(0, 6)), box_w + data.draw(st.integers(0, 6)))
    image = random_images(1, height, width, seed=data.draw(st.integers(0, 99)))[0]
    unit = (0.0,) * 3, (1.0,) * 3
    crop = crop_one(image, [top, left, box_h, box_w], False, size, device, *unit)
    inside = image[top : top + box_h, left : left + box_w].float() / 255.0
    assert crop.min() >= inside.min() - EPS
    assert crop.max() <= inside.max() + EPS
    assert torch.equal(crop_one(image, [top, left, box_h, box_w], True, size, device, *unit), crop.flip(2))
    planes = image.permute(2, 0, 1).float() / 255.0
    # Without antialiasing: with it, torch 2.15 repeats the first row where the output is one pixel wide.
    theirs = V2.resized_crop(planes, top, left, box_h, box_w, list(size), antialias=False)
    assert (crop - theirs).abs().max() <= 4 * EPS * max(*size, 2)
