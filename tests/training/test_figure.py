"""A whole figure on a CUDA device: through the graph, the workers' processes and the store."""

import pytest

from fastprune.figures import load
from fastprune.figures.reproduce import FigureRequest, Request, run
from fastprune.study.settings import preset


def test_a_small_figure_twice(device, tmp_path):
    """The second call trains nothing and gives the same results."""
    if device.type == "cpu":
        pytest.skip("tests/figures/test_reproduce.py does the same on a CPU")
    figure = load("A2")
    settings = preset(figure.protocol, "smoke").override(seeds=1, rounds=2, epochs=2, train_per_class=100)
    wanted = FigureRequest(figure, "smoke", settings, "synthetic", tmp_path / "out")
    seen = []
    for _ in range(2):
        assert run(Request((wanted,), tmp_path / "store", device=str(device), workers=1))
        nodes = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("nodes/*/*/node.json")}
        seen.append((nodes, (tmp_path / "out" / "results.csv").read_bytes()))
    assert len(seen[0][0]) > 20
    assert seen[0] == seen[1]
