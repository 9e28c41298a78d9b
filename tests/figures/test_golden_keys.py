"""The keys of all figures at preset paper, frozen: a change here trains everything anew, so it is never an accident.

golden_keys.json has of each figure the digest of its sorted keys, that of its points with theirs, and a few by label.
"""

import hashlib
import json
from pathlib import Path

import pytest

from fastprune.figures import FIGURES, load
from fastprune.figures.figure import build_graph
from fastprune.specs import DataSpec
from fastprune.study.settings import preset

GOLDEN = json.loads(Path(__file__).with_name("golden_keys.json").read_text())


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def test_every_figure_is_frozen():
    assert set(GOLDEN) == set(FIGURES)


@pytest.mark.parametrize("name", GOLDEN)
def test_keys_are_those_of_the_golden_file(name):
    figure, golden = load(name), GOLDEN[name]
    settings = preset(figure.protocol, "paper", figure.presets)
    data = DataSpec(settings.dataset, "0" * 64, 200, None, None, 100_000, 10_000)
    points, graph = build_graph(figure, settings, data)
    assert {kind: sum(n.kind == kind for n in graph.nodes) for kind in golden["nodes"]} == golden["nodes"]
    assert {label: key for label, key in golden["some"].items() if key not in graph.by_key} == {}
    assert digest([n.key for n in graph.nodes]) == golden["sha256"]
    shown = [f"{p.panel} {p.series} {p.seed} {getattr(p, 'round', '')} {p.node.key}" for p in points]
    assert digest(shown) == golden["points"]
    histories = {f"{t.node.key} {t.fraction}" for t in graph.histories}
    assert histories >= set(golden["histories"])
