"""The bars: what they count when runs fail, diverge, or are another process's."""

from types import SimpleNamespace

import pytest

from fastprune.study import progress
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


def test_the_time_left_is_that_of_sparser_rounds_and_of_chains(monkeypatch):
    """A dense run takes 10 s, its first round 2 s: so do the others of the chain, whatever the workers."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    graph = Graph.of(find_runs(chains(rounds=4), 0.2))
    dense, *rounds = graph.trainings
    with Bars(graph, graph.nodes, 2) as bars:
        assert bars.live().seconds_left is None

        def trains(node, seconds: float) -> None:
            bars.started(0, node, "cpu")
            now[0] += seconds
            bars.progress(0, node, 1, images(node))
            bars.finished(0, node, {"diverged": False})
            now[0] += 1.0  # it is not forecast at each call

        trains(dense, 10.0)
        assert bars.live().seconds_left == pytest.approx(10.0 * len(rounds))
        trains(rounds[0], 2.0)
        assert bars.live().seconds_left == pytest.approx(2.0 * len(rounds[1:]))
        assert f"<{bars.total.format_interval(2.0 * len(rounds[1:]))}," in str(bars.total)
        now[0] += 0.5
        assert bars.live().seconds_left == pytest.approx(2.0 * len(rounds[1:]) - 0.5)
        bars.failed(0, rounds[1], "planted", [n for n in graph.nodes if n not in (dense, *rounds[:2])])
        assert bars.live().seconds_left == pytest.approx(0.0)


def test_the_time_left_of_what_was_never_measured_is_by_the_mean_rate(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    c = chains()
    graph = Graph.of([c.dense(0.1), c.dense(0.2)])
    with Bars(graph, graph.nodes, 2) as bars:
        node = graph.trainings[0]
        bars.started(0, node, "cpu")
        bars.progress(0, node, 0, images(node) // 4)  # the clock starts
        now[0] += 10.0 - progress._FIRST_SECONDS
        bars.progress(0, node, 0, images(node) // 4)  # no epoch has ended
        # Half of one of two runs in 10 s, by two workers: 40 s a run, half of the first and all of the second at once.
        assert bars.live().seconds_left == pytest.approx(40.0)


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
