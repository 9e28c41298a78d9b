"""segment_counts: kept elements of each layer, and none of what lies between."""

import pytest
import torch

from fastprune.kernels import Segment, segment_counts
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.segment_counts import segment_counts_reference
from tests.kernels.inputs import (
    EDGE,
    FAR,
    KEPT,
    chunks,
    far_drawn,
    far_segments,
    far_zeros,
    kept,
    little_memory,
    mask_over,
    odd_layout,
    require_gpu_memory,
    require_memory,
    resnet18,
)


@kept
def test_counts(n, kept, device):
    segments = odd_layout(n)
    mask = mask_over(segments, KEPT[kept])
    between = ~mask_over(segments, 1.1)
    counts = segment_counts(mask.to(device), segments)
    assert counts.dtype == torch.int64
    assert counts.device.type == device.type
    assert torch.equal(counts.cpu(), segment_counts_reference(mask, segments))
    assert torch.equal(segment_counts((mask | between).to(device), segments), counts)


def test_layers_of_a_network(device):
    segments = resnet18(64 if device.type == "cuda" else 4 if INTERPRETED else 16)
    mask = mask_over(segments, 0.5)
    assert torch.equal(segment_counts(mask.to(device), segments).cpu(), segment_counts_reference(mask, segments))


def test_segments_without_elements(device):
    segments = [Segment("a", (0,), 0, 0), Segment("b", (2, 0, 3, 3), 1, 0), Segment("c", (3,), 1, 0)]
    mask = torch.tensor([False, True, True, True], device=device)
    assert segment_counts(mask, segments).tolist() == [0, 0, 3]
    assert segment_counts(mask[:0], segments[:1]).tolist() == [0]


def test_a_segment_beyond_the_buffer_is_refused():
    with pytest.raises(ValueError, match="the buffer has 4"):
        segment_counts(torch.ones(4, dtype=torch.bool), [Segment("a", (5,), 0, 0)])


@pytest.mark.usefixtures("plain_memory")
def test_few_beyond_2_to_31_elements(device):
    require_memory(3 if device.type == "cuda" else 1, device)
    segments = far_segments()
    with little_memory(device):
        mask = far_zeros(EDGE + 256, dtype=torch.bool, device=device)
        for s in segments:
            mask[s.span] = (torch.arange(s.numel) % 3 > 0).to(device)
        assert segment_counts(mask, segments).tolist() == [120, 42]


def test_many_beyond_2_to_31_elements(device):
    require_gpu_memory(5, device)
    mask, start = far_drawn(5, torch.bool, device), EDGE - 64
    segments = [Segment("huge", (start,), 0, 0), *far_segments()]
    expected = [sum(int(mask[s.span][part].sum()) for part in chunks(s.numel)) for s in segments]
    assert len(mask) == FAR
    assert segment_counts(mask, segments).tolist() == expected
