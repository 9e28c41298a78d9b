"""What a plan says of each figure; the simulated cluster, by hand on small graphs, and against the bounds of list
scheduling on any.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.cli.reproduce import main
from fastprune.errors import InputError
from fastprune.figures import FIGURES, load, reproduce
from fastprune.specs import DataSpec, Prune, Train
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.forecast import Rates, longest_chain, simulate
from fastprune.study.graph import Graph
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
        "1 46 h 04 min 100 %".split(),
        "64 57 min 76 % the longest chain decides".split(),
        "512 57 min 10 % the longest chain decides".split(),
    ]
    assert "31 trainings, to A2 eval" in after[5]
    # 302 * 5 / 31 = 48.7. Fewer GPUs have too much to do; as many need not be enough.
    assert after[6].strip() == "that short only with 49 GPUs or more"


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ([], "46 h 04 min   on one worker, at 100,000 images/s as given"),
        (["--workers", "1"], "46 h 04 min   on one worker, at 100,000 images/s as given"),
        (["--workers", "64"], "57 min   on 64 workers, each at 100,000 images/s as given"),
    ],
)
def test_the_time_left_is_that_of_the_workers(workers, said, tmp_path, capsys):
    """The numbers of the test above: 64 wait for the longest chain."""
    assert said in next(line for line in planned(capsys, tmp_path, *PLAN, *workers) if "time left" in line)


def test_a_training_takes_as_long_as_those_of_the_nearest_density():
    """Dense at 100 and 300 images/s, and after one round, where a share of 0.8 is left, at 800."""
    chains = Chains(CHAINS.settings.override(fraction=0.2), DATA, 0)
    runs, other = find_runs(chains, 0.2), chains.dense(0.5)
    measured = {runs[0].key: 100.0, other.key: 300.0, runs[1].key: 800.0}
    assert [n.mask.density for n in runs[1:]] == pytest.approx([0.8, 0.64])

    class Store:
        def has(self, node):
            return node.key in measured

        def node(self, node):
            return {"provenance": {"images_per_second": measured[node.key]}}

    graph = Graph.of([*runs, other])
    rates = Rates.of_store(graph, Store())
    assert [rates.of(n) for n in (*runs, other)] == [200.0, 800.0, 800.0, 200.0]
    # Runs of one density are averaged, no others.
    measured[runs[2].key] = 500.0
    assert Rates.of_store(graph, Store()).of(runs[2]) == 500.0
    assert Rates.of_store(graph, Store(), 50.0).of(runs[2]) == 50.0
    measured.clear()
    assert Rates.of_store(graph, Store()).of(runs[2]) is None


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


# What is said of each figure


def planned(capsys, tmp_path, *flags: str) -> list[str]:
    assert main([*flags, "--plan", "--store", str(tmp_path / "none")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def counted(lines: list[str]) -> list[str]:
    """The lines that divide the trainings among panels, single-spaced."""
    first = next(i for i, line in enumerate(lines) if line.startswith("  trainings"))
    last = next(i for i, line in enumerate(lines) if line.startswith("  prune steps"))
    return [" ".join(line.split()) for line in lines[first + 1 : last]]


BESIDE = ", beside those above"
# At preset smoke: two seeds, three rounds, four epochs. Counted as in tests/figures/test_figures.py.
SMOKE = {
    "A1": ("rounds 3 of 80 %", ["18 to find masks", *(f"14 for panel {p}" for p in "abc"), "0 for panel d"]),
    "A2": ("rounds 3 of 80 %", ["18 to find masks", "26 for panel a", "20 for panel b"]),
    "A3": ("rounds 3 of 80 %", ["18 to find masks", "14 for panel a", "14 for panel b"]),
    "A4": ("LPR at 80 %", ["2 for panel a", "2 for panel b"]),
    "A5": ("LPR at 80 %", ["8 for panel a"]),
    "A6": (
        "rounds 3 of 80 % pruned at epochs 1 2 3 4",
        ["18 to find masks of panel a", "18 to find masks of panel b", "24 for panel a", "24 for panel b"],
    ),
    "transplant": ("rounds 3 of 80 %", ["20 to find masks", "16 for panel a"]),
    "variants": (
        "rounds 3 of 80 %",
        [
            *(f"{n} to find masks of panel {p}" for n, p in zip((18, 18, 12, 12, 12), "abcde", strict=True)),
            *(f"14 for panel {p}" for p in "abcde"),
        ],
    ),
    "structured": ("3 sparsities", ["24 for panel a", *(f"0 for panel {p}" for p in "bcd")]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_plan_of_each_figure_says_what_is_true_of_it(name, tmp_path, capsys):
    what, panels = SMOKE[name]
    lines = planned(capsys, tmp_path, "--fig", name)
    assert f"; seeds 2, {what}, epochs 4, " in lines[0]
    assert counted(lines) == [panels[0], *(f"{line}{BESIDE}" for line in panels[1:])]
    # The user gave no flag, so a flag is named only as what to give.
    named = [line for line in lines if "--" in line]
    assert len(named) == 1
    assert named[0].endswith("no such run was measured in this store; to assume a rate, give --images-per-second R")


def test_bf16_on_a_slow_cpu_is_advised_against(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "bf16_advice", lambda instead: f"slow: {instead}")
    line = "  slow: add --precision fp32 (its runs are other nodes)"
    quick = ["--fig", "A2", "--preset", "quick", "--images-per-second", "1000"]
    for drivers, more, expected in (
        ((), [], True),
        (("/",), [], False),  # there may be a GPU
        (("/",), ["--device", "cpu"], True),
        ((), ["--gpus", "8"], False),  # of other machines
        ((), ["--executor", "ray"], False),
        ((), ["--precision", "fp32"], False),
    ):
        monkeypatch.setattr(reproduce, "_DRIVERS", drivers)
        assert planned(capsys, tmp_path, *quick, *more).count(line) == expected, more


def test_the_prune_epochs_of_a_plan_are_those_in_effect(tmp_path, capsys):
    assert "pruned at epochs 20 50 70 110, " in planned(capsys, tmp_path, "--fig", "A6", "--preset", "paper")[0]
    assert "pruned at epochs 2 5 7 11, " in planned(capsys, tmp_path, "--fig", "A6", "--preset", "quick")[0]
    assert "pruned at epochs 1 3, " in planned(capsys, tmp_path, "--fig", "A6", "--prune-epochs", "1", "3")[0]


def test_one_training_is_one(tmp_path, capsys):
    lines = planned(capsys, tmp_path, "--fig", "A5", "--gpus", "2", "--images-per-second", "10")
    assert "   1 training, to A5 dense" in next(line for line in lines if "longest chain" in line)


@pytest.mark.parametrize(
    ("figure", "changes", "said"),
    [
        (
            "A6",
            {"epochs": 2},
            "find runs of 2 epochs would stop after epochs 1 1 1 2, which do not rise: raise --epochs, or choose "
            "--prune-epochs",
        ),
        ("A6", {"prune_epochs": (1, 1)}, "--prune-epochs are 1 1, expected rising epochs from 1 to 4"),
        ("A6", {"prune_epochs": (1, 5)}, "--prune-epochs are 1 5, expected rising epochs from 1 to 4"),
        ("A2", {"epochs": 1, "rewind": "late"}, "returns to epoch 1, but find runs stop after epoch 1: raise --epochs"),
        (
            "A6",
            {"rewind": "late", "prune_epochs": (1, 3)},
            "returns to epoch 1, but find runs stop after epoch 1: raise --prune-epochs",
        ),
        ("A2", {"rewind": "late", "rewind_epoch": 4}, "--rewind-epoch is 4, but find runs stop after epoch 4: lower"),
        ("structured", {"momentum": 0.0}, "Nesterov momentum requires --momentum above 0"),
    ],
)
def test_an_error_names_a_flag_as_given_only_if_it_was(figure, changes, said):
    smoke = preset(load(figure).protocol, "smoke", load(figure).presets)
    with pytest.raises(InputError) as caught:
        smoke.override(**changes)
    assert said in str(caught.value)
