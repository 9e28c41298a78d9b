"""Positions in a flat buffer."""

import pytest
import torch

from fastprune.kernels import Segment
from fastprune.kernels.segments import check_segments, logical_positions


def test_logical_positions_follow_the_view():
    segments = [Segment("a", (3, 2, 2, 2), 4, 0), Segment("b", (5,), 40, 24)]
    stored = torch.arange(64)
    for s in segments:
        view = s.view(stored).flatten().numpy()
        assert logical_positions(segments, view).tolist() == list(range(s.position, s.position + s.numel))


@pytest.mark.parametrize(
    "segments",
    [[Segment("a", (2,), 0, 0), Segment("b", (2,), 1, 2)], [Segment("b", (2,), 2, 0), Segment("a", (2,), 0, 2)]],
    ids=["overlap", "out of order"],
)
def test_other_layouts_are_refused(segments):
    with pytest.raises(ValueError, match="inside the one before it"):
        check_segments(segments, 4)
