"""The graphs behind the figures: how many trainings, which are shared, what each point stands for."""

from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.figures import FIGURES, PAPER, load
from fastprune.figures.figure import LprPoint, Point, build_graph
from fastprune.figures.reproduce import FigureRequest
from fastprune.specs import ChannelSelection, DataSpec, ModelSpec, Prune, Ratios, Rewind, Train
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.graph import Cost, Graph, merge_graphs
from fastprune.study.plan import NetworkSize, bytes_on_disk
from fastprune.study.settings import PRESETS, preset

TINY = DataSpec("tiny-imagenet-200", "t" * 64, 200, None, None, 100_000, 10_000)
PLACES = DataSpec("miniplaces", "m" * 64, 100, None, None, 100_000, 10_000)


def planned(name: str, preset_name: str = "paper", **changes):
    figure = load(name)
    settings = preset(figure.protocol, preset_name, figure.presets).override(**changes)
    data = PLACES if settings.dataset == "miniplaces" else TINY
    return build_graph(figure, settings, data)


# By hand, of 30 rounds. A1: 3 dense; find runs 3 x 29; evaluated at another rate 6 x 30, at their own once more each
# (round 30): 3. A2: 4 dense (0.5 is no LR_find); 3 x 29; at 0.5 three and random, 120; at 0.8 two and random, 90, and 1
# more. A3: 3; 3 x 29; at each rate two others: 2 x 60, and its own round 30: 2. A6: 2 dense; 2 x 4 x 29; 2 x 4 x 30.
# transplant: 2 dense, chains 0.05 (29 + 30) and 0.5 (30), 0.5 by 0.05 (30, evaluated as found), 0.05 by 0.5 (29 + 30).
# variants: 3 dense, shared by all but warmup; four times 29 + 30 twice and 30; with warmup 3 + 148 as well.
# structured: 3 dense and 3 x 9.
TRAININGS = {
    "A1": 273, "A2": 302, "A3": 212, "A4": 2, "A5": 4, "A6": 474,
    "transplant": 2 + 59 + 30 + 30 + 59, "variants": 5 * 148 + 2 * 3, "structured": 30,
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_trainings_of_the_paper(name):
    _, graph = planned(name)
    assert Cost.of(graph.nodes).per_seed == dict.fromkeys(range(5), TRAININGS[name])


def test_figures_share_what_is_the_same():
    graphs = {name: planned(name)[1] for name in PAPER}
    whole = Cost.of(merge_graphs(graphs.values()).nodes).trainings
    # A4 and A5 train nothing that A3 and A6 do not: 0.1, 0.2, 0.5 and 0.05, 0.2 are theirs; A3 and A6 share 0.2.
    assert whole == 5 * (273 + 302 + 212 + 474 - 1)


def test_a4_and_a5_read_the_runs_of_a3_and_a6():
    graph = merge_graphs(planned(name)[1] for name in ("A3", "A6"))
    for name in ("A4", "A5"):
        for point in planned(name)[0]:
            assert isinstance(point, LprPoint)
            run = graph.by_key[point.node.key]
            assert point.history.fraction in graph.requested_outputs(run).histories or point.lr_find in (
                0.05,
                0.2,
            )


def test_a6_begins_with_snapshots_of_the_dense_run():
    points, graph = planned("A6", seeds=1)
    dense = {lr: Chains(preset(load("A6").protocol, "paper"), TINY, 0).dense(lr) for lr in (0.05, 0.2)}
    assert graph.requested_outputs(dense[0.05]).weights == (20, 50, 70, 110)
    for panel, lr in (("a", 0.05), ("b", 0.2)):
        zero = {p.series: (p.node, p.epoch, p.lr_eval) for p in points if p.panel == panel and p.round == 0}
        assert zero == {str(e): (dense[lr], e, lr) for e in (20, 50, 70, 110)}
    later = [p for p in points if p.panel in "ab" and p.round > 0]
    assert {(p.node.schedule.lr, p.node.stop) for p in later} == {(0.5, 110)}
    found = {(p.series, p.node.stop) for p in points if p.panel == "find-a" and p.round > 0}
    assert found == {("20", 20), ("50", 50), ("70", 70), ("110", 110)}


def test_local_pruning_and_transplants_say_so_in_their_nodes():
    assert {n.allocation for n in planned("A3", seeds=1)[1].nodes if isinstance(n, Prune)} == {"local"}
    points, _ = planned("transplant", seeds=1)
    donors = {p.node.mask for p in points if p.series == "0.05" and p.panel == "a"}
    for p in points:
        if p.series == "0.5 by 0.05" and p.panel == "a" and p.round > 0:
            assert isinstance(p.node.mask.allocation, Ratios)
            assert p.node.mask.allocation.mask in donors
            assert p.node.mask.allocation.mask.round == p.round
            assert p.node.mask.source.node.schedule.lr == 0.5


def test_structured_points_stand_in_each_panel():
    points, graph = planned("structured", seeds=1)
    assert len(points) == 4 * 3 * 10
    assert all(isinstance(p.selection, ChannelSelection) for p in points)
    assert {p.selection.fraction for p in points} == {i / 10 for i in range(10)}
    tuned = [n for n in graph.trainings if n.mask is not None]
    assert {(n.schedule.lr, n.schedule.decay, n.schedule.warmup_epochs, n.stop) for n in tuned} == {
        (0.1, "cosine", 5, 200)
    }
    assert all(isinstance(n.start, Rewind) and n.start.state.epoch == 200 and not n.start.momentum for n in tuned)
    assert {n.optimizer.nesterov for n in tuned} == {True}


@pytest.mark.parametrize("preset_name", PRESETS)
@pytest.mark.parametrize("name", FIGURES)
def test_every_point_has_its_place(name, preset_name):
    points, graph = planned(name, preset_name)
    figure, settings = load(name), preset(load(name).protocol, preset_name, load(name).presets)
    panels = {panel.id: panel for panel in figure.panels_of(settings)}
    drawn = [p for p in points if not p.panel.startswith("find")]
    assert {p.panel for p in drawn} == set(panels)
    assert {p.series for p in drawn if p.series is not None} <= set(figure.labels(settings))
    places = [(p.panel, p.series, p.seed, p.round) for p in points if isinstance(p, Point)]
    assert len(places) == len(set(places))
    for panel, shown in panels.items():
        assert {p.x for p in drawn if isinstance(p, Point) and p.panel == panel} <= {shown.x}
    named = {p.series for p in points if p.series is not None}
    for claim in figure.claims_of(settings):
        for comparison in claim.comparisons:
            assert comparison.panel in {p.panel for p in points}
            sides = {getattr(comparison, side, None) for side in ("left", "right", "series")} - {None}
            assert sides <= named
    assert all(n.key in graph.labels for n in graph.nodes)


def test_seeds_from_another_first_one_are_the_same_runs():
    """So that a study's seeds can be shared between machines, and their stores merged."""
    points, graph = planned("A2", "quick", seeds=2, first_seed=1)
    assert {p.seed for p in points} == {1, 2}
    _, whole = planned("A2", "quick", seeds=3)
    assert {n.key for n in graph.nodes} == {n.key for n in whole.nodes if n.seed > 0}


def test_every_run_of_a_figure_is_of_its_seed():
    for name in FIGURES:
        points, _ = planned(name, "quick")
        for p in points:
            assert p.node.seed == p.seed


def test_a_chain_by_ratios_needs_its_donor_first():
    chains = Chains(preset(load("transplant").protocol, "paper"), TINY, 0)
    graph = Graph.of([chains.masks(MaskRecipe(0.5, ratios_of=0.05))[0]])
    kinds = [(n.kind, n.schedule.lr if isinstance(n, Train) else None) for n in graph.nodes]
    assert sorted(map(str, kinds[:-1])) == sorted(map(str, [("train", 0.05), ("prune", None), ("train", 0.5)]))


@pytest.mark.parametrize(
    "model",
    [ModelSpec("resnet18", 200), ModelSpec("resnet34", 7, "cifar", 16), ModelSpec("resnet50", 100, "imagenet", 8)],
    ids=lambda m: m.name,
)
def test_sizes_are_those_of_the_networks(model):
    import torch

    from fastprune.pruning.coverage import conv_weights
    from fastprune.training.models import build

    with torch.device("meta"):
        network = build(model)
    size = NetworkSize.of(model)
    assert size.weights == sum(w.numel() for _, w in conv_weights(network))
    assert size.layers == len(list(conv_weights(network)))
    assert size.parameters == sum(p.numel() for p in network.parameters())
    assert size.statistics == sum(b.numel() for b in network.buffers() if b.dtype == torch.float32)


def test_disk_of_the_paper_is_mostly_find_states():
    _, graph = planned("A2")
    find_runs = 5 * 3 * 30
    weights = 4 * (NetworkSize.of(ModelSpec("resnet18", 200)).parameters)
    assert find_runs * weights < bytes_on_disk(graph, graph.nodes) < 1.2 * find_runs * weights


def test_settings_that_a_figure_has_not():
    with pytest.raises(InputError, match="lr-find"):
        planned("transplant", lr_find=(0.1,))
    with pytest.raises(InputError, match="lr-eval"):
        planned("A6", lr_eval=(0.1, 0.2))
    with pytest.raises(InputError, match="choose one of"):
        load("A7")


def test_a_plan_counts_the_images_of_the_folder_without_reading_them(tmp_path):
    for split, count in (("train", 7), ("val", 2)):
        for name in "abc":
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            for i in range(count + (name == "c")):
                (tmp_path / "animals" / split / name / f"{i}.jpg").touch()
    settings = preset(load("A3").protocol, "paper").override(batch_size=8)
    figure = FigureRequest(load("A3"), "paper", settings, str(tmp_path / "animals"), tmp_path / "out")
    data = figure.images.planned(tmp_path / "store")
    assert (data.name, data.classes, data.train_count, data.val_count) == ("animals", 3, 22, 7)
    part = replace(figure, settings=settings.override(classes=2, train_per_class=5))
    assert part.images.planned(tmp_path / "store").train_count == 10
    assert replace(figure, data=None).images.planned(tmp_path / "store").train_count == 100_000
    assert not (tmp_path / "store").exists()
