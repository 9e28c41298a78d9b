"""The simulated cluster, by hand on small graphs, and against the bounds of list scheduling on any."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.cli.reproduce import main
from fastprune.figures import load
from fastprune.specs import DataSpec, Prune, Train
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.graph import Graph
from fastprune.study.plan import longest_chain, simulate
from fastprune.study.settings import preset
from tests.fakes import eval_runs, find_runs, masks

DATA = DataSpec("fake", "f" * 64, 4, None, None, 24, 8)
CHAINS = Chains(preset(load("A2").protocol, "smoke").override(seeds=1, rounds=3, epochs=2, batch_size=8), DATA, 0)


def spans(graph: Graph, train: float = 10.0, prune: float = 1.0) -> dict[str, float]:
    return {n.key: train if isinstance(n, Train) else prune for n in graph.nodes}


@pytest.mark.parametrize("workers", [1, 2, 100])
def test_a_chain_takes_its_length_whatever_the_workers(workers):
    graph = Graph.of([masks(CHAINS, 0.2)[-1]])  # train, prune, three times
    found = simulate(graph, graph.nodes, spans(graph), workers)
    assert found.makespan == 33.0
    assert found.busy == 33.0
    assert found.utilisation == 1.0 / workers
    length, chain = longest_chain(graph, graph.nodes, spans(graph))
    assert length == 33.0
    assert [type(n) for n in chain] == [Train, Prune] * 3
    assert chain[-1] == masks(CHAINS, 0.2)[-1]


@pytest.mark.parametrize(("workers", "makespan"), [(1, 70.0), (2, 40.0), (3, 30.0), (4, 20.0), (7, 10.0), (9, 10.0)])
def test_runs_that_rest_on_nothing_fill_the_workers(workers, makespan):
    graph = Graph.of([CHAINS.dense(0.1 * i) for i in range(1, 8)])
    found = simulate(graph, graph.nodes, spans(graph), workers)
    assert found.makespan == makespan
    assert found.utilisation == pytest.approx(70.0 / (workers * makespan))
    assert longest_chain(graph, graph.nodes, spans(graph))[0] == 10.0


def test_a_fork_waits_for_its_stem_and_the_longest_chain_goes_first():
    """Find: F0 P1 F1 P2 F2 P3; eval: E0 at once, E1 to E3 after their masks. Two workers, by hand:
    0-10 F0 E0, 10-11 P1, 11-21 F1 E1, 21-22 P2, 22-32 F2 E2, 32-33 P3, 33-43 E3."""
    graph = Graph.of([*find_runs(CHAINS, 0.2), *eval_runs(CHAINS, 0.2, 0.5)])
    assert len(graph.nodes) == 3 + 3 + 4
    assert simulate(graph, graph.nodes, spans(graph), 2).makespan == 43.0
    assert simulate(graph, graph.nodes, spans(graph), 1).makespan == 73.0


def test_only_what_is_to_do_counts():
    graph = Graph.of([masks(CHAINS, 0.2)[-1]])
    todo = list(graph.nodes)[-3:]  # the last prune step, its run, and the prune step before that
    assert simulate(graph, todo, spans(graph), 4).makespan == 12.0
    assert longest_chain(graph, todo, spans(graph)) == (12.0, todo)
    nothing = simulate(graph, [], {}, 4)
    assert (nothing.makespan, nothing.utilisation) == (0.0, 1.0)
    assert longest_chain(graph, [], {}) == (0.0, [])


@given(st.data(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_it_lies_between_the_bounds_of_list_scheduling(data, workers):
    """R. L. Graham, Bounds on multiprocessing timing anomalies, 1969: at most work / w + (1 - 1 / w) chain."""
    sources = st.sampled_from([None, 0.05, 0.2, 0.8])
    wanted = data.draw(st.lists(st.tuples(sources, st.integers(0, 3), st.sampled_from([0.5, 0.8])), min_size=1))
    graph = Graph.of([CHAINS.eval_run(MaskRecipe(lr), round, rate) for lr, round, rate in wanted])
    seconds = {n.key: data.draw(st.integers(0, 20), label=n.kind) * 1.0 for n in graph.nodes}
    found = simulate(graph, graph.nodes, seconds, workers)
    chain, work = longest_chain(graph, graph.nodes, seconds)[0], sum(seconds.values())
    assert found.busy == work
    assert max(chain, work / workers) <= found.makespan + 1e-9
    assert found.makespan <= work / workers + (1 - 1 / workers) * chain + 1e-9


PLAN = ["--fig", "A2", "--preset", "paper", "--plan", "--images-per-second", "100000"]


def test_the_plan_says_how_long_and_where_the_chain_decides(tmp_path, capsys):
    """One run is 110 epochs of 195 batches of 512: 10,982,400 images, 109.8 s; a chain has 31, 302 a seed."""
    assert main([*PLAN, "--gpus", "1", "64", "512", "--store", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    after = said[said.index("On a cluster") :].splitlines()
    assert [line.split() for line in after[2:5]] == [
        "1 46 h 03 min 100 %".split(),
        "64 56 min 45 s 76 % the longest chain decides".split(),
        "512 56 min 45 s 10 % the longest chain decides".split(),
    ]
    assert "31 trainings, to A2 eval" in after[5]
    assert "more than 49 GPUs" in after[6]  # 302 * 5 / 31 = 48.7


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*PLAN[:5], "--gpus", "8"], "--images-per-second"),
        (["--fig", "A2", "--gpus", "8"], "--plan"),
        ([*PLAN, "--gpus", "0"], "--gpus"),
        ([*PLAN, "--gpus"], "--gpus"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(tmp_path, capsys, flags, said):
    assert main([*flags, "--store", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
