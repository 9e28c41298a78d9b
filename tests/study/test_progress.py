"""The bars: what they count when runs fail, diverge, or are another process's."""

import pytest

from fastprune.study.graph import Cost, Graph
from fastprune.study.progress import Bars
from tests.fakes import eval_runs, find_runs
from tests.study.test_run import chains


@pytest.fixture
def graph():
    c = chains()
    return Graph.of([*find_runs(c, 0.2), *eval_runs(c, None, 0.5)])


def images(*nodes) -> int:
    return Cost.of(nodes).images


def test_all_done_is_all_that_was_announced(graph, capsys):
    with Bars(graph, graph.nodes, 1) as bars:
        for node in graph.nodes:
            bars.started(0, node, "cpu")
            bars.progress(0, node, 1, images(node))
            bars.finished(0, node, {"diverged": False})
        assert bars.total.n == bars.total.total == images(*graph.nodes) > 0
    assert f"{len(graph.trainings)}/{len(graph.trainings)} trainings: 100%" in capsys.readouterr().err


def test_a_failure_takes_along_what_depends_on_it(graph, capsys):
    dense, *others = graph.trainings
    blocked, rest = others[:2], others[2:]
    with Bars(graph, graph.nodes, 1) as bars:
        seen = images(dense) // 2
        bars.started(0, dense, "cpu")
        bars.progress(0, dense, 1, seen)
        bars.failed(0, dense, "RuntimeError: planted (log: f)", blocked)
        assert bars.total.total == images(*rest) + seen
        for node in rest:
            bars.started(0, node, "cpu")
            bars.progress(0, node, 1, images(node))
            bars.finished(0, node, {"diverged": False})
        assert bars.total.n == bars.total.total
    said = capsys.readouterr().err
    assert f"failed: {graph.label(dense)}: RuntimeError: planted (log: f)" in said
    assert f"{len(rest)}/{len(graph.trainings)} trainings, 1 failed, 2 blocked: 100%" in said


def test_what_diverged_or_was_computed_elsewhere_is_not_waited_for(graph, capsys):
    first, second = graph.trainings[:2]
    with Bars(graph, [first, second], 1) as bars:
        bars.started(0, first, "cpu")
        bars.progress(0, first, 1, 7)
        bars.finished(0, first, {"diverged": True, "epochs": 1})
        assert (bars.total.n, bars.total.total) == (7, 7 + images(second))
        bars.finished(None, second, {"diverged": False})
        assert (bars.total.n, bars.total.total) == (7, 7)
    assert f"diverged: {graph.label(first)}, in epoch 1" in capsys.readouterr().err


def test_the_rate_counts_from_the_first_image(graph, capsys, monkeypatch):
    with Bars(graph, graph.nodes, 1) as bars:
        node = graph.nodes[0]
        bars.total.start_t -= 1000.0  # so long the workers took to start
        bars.started(0, node, "cpu")
        bars.progress(0, node, 0, 0)
        bars.progress(0, node, 0, 8)
        assert 0.1 < bars.total.format_dict["elapsed"] < 100.0
    assert capsys.readouterr().err.endswith("\n")  # what is said next has a line of its own


def test_a_line_says_how_its_training_computes(graph, monkeypatch):
    first, second = graph.trainings[:2]
    said = []
    with Bars(graph, graph.nodes, 1) as bars:
        monkeypatch.setattr(bars, "_say", lambda worker, text: said.append(text))
        for node, how in ((first, "computes sparsely: density 0.11"), (second, "")):
            bars.started(0, node, "cpu")
            if how:
                bars.computes(0, node, how)
            bars.progress(0, node, 0, 8)
            bars.progress(0, node, 1, 8)
            bars.finished(0, node, {"diverged": False})
    assert said[1] == f"cpu: {graph.label(first)} · computes sparsely: density 0.11"
    assert said[2].startswith(f"cpu: {graph.label(first)} · epoch 1/")
    assert said[2].endswith(" images/s · computes sparsely: density 0.11")
    assert said[-2].endswith(" images/s")
