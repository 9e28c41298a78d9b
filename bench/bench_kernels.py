"""Benchmark of each kernel on the weights of whole networks, against its floor and common alternatives.

    make bench ARGS="bench/bench_kernels.py [--device cuda]"

A test checks that the compared pruning rows keep the same weights.
"""

from typing import Any

import pytest
import torch

from bench.rows import NETWORKS, OPERATIONS, Row, Weights, operation_group, segments_of
from fastprune.kernels import keep_top

CASES = [
    pytest.param(network, group, row, id=f"{network}-{group}-{row.what}")
    for network in NETWORKS
    for group, rows in OPERATIONS.items()
    for row in rows
]


@pytest.mark.parametrize(("network", "group", "row"), CASES)
def test_speed(measure: Any, network: str, group: str, row: Row) -> None:
    measure(row, operation_group, group, network)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_the_same_weights_survive_as_in_torch(network: str, local: bool, device: torch.device) -> None:
    """The compared rows do the same work: equal counts are pruned, and masks differ only at ties with the threshold."""
    w = Weights(segments_of(network, small=False), device)
    ours = keep_top(w.scores, w.dense, w.each if local else sum(w.each), w.segments)
    w.k = sum(w.each)
    theirs = w.torch_local_prune() if local else w.torch_global_prune()
    # The largest pruned score. Which of the weights tied with it go is for each implementation to choose.
    threshold = w.scores[w.dense & ~ours].max()
    assert int(ours.sum()) == w.total - sum(w.each) == sum(int(m.sum()) for m in theirs)
    for s, number, mask in zip(w.segments, w.each, theirs, strict=True):
        mine, score = s.view(ours), s.view(w.scores)
        differ = score[mine != mask.bool()]
        if local:
            threshold = score[~mine].max()
            assert int(mine.sum()) == s.numel - number
        assert (differ == threshold).all()
