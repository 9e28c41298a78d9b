"""From the panels of a figure to its points, and to the graph of the runs that the points need.

A point is one trained network, or the LPR history of one.
"""

# Standard library only: `--plan` imports this module and must start without torch.

from collections.abc import Iterator
from dataclasses import dataclass

from fastprune.figures.figure import Figure, Panel, Series
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Prune, Rewind, Train
from fastprune.study.chains import Chains
from fastprune.study.graph import Graph
from fastprune.study.settings import Settings


@dataclass(frozen=True)
class Point:
    """The accuracy of one trained network in one panel.

    lr_find: None for the random baseline. epoch: the epoch after which accuracy is read; None: the last. x: name of the
    horizontal axis (axes.py). selection: the channels that a structured network keeps; None for unstructured pruning.
    """

    panel: str
    series: str
    seed: int
    round: int
    lr_find: float | None
    lr_eval: float
    node: Train
    epoch: int | None = None
    x: str = "density"
    selection: ChannelSelection | None = None

    @property
    def label(self) -> str:
        role = "find" if self.panel.startswith("find") else f"eval {self.lr_eval:g}"
        source = self.series if self.lr_find is None else f"LR_find {self.series}"
        return f"{role} · {source} · seed {self.seed} · round {self.round}"

    @property
    def wanted(self) -> tuple[Train | ChannelSelection, ...]:
        """The nodes that must be published before this point can be drawn."""
        return (self.node,) if self.selection is None else (self.node, self.selection)


@dataclass(frozen=True)
class LprPoint:
    """The LPR history of one dense run in one panel.

    series: None: one line per layer, its LPR (A4). A name: one line of that name, the distance from the LPR at the end,
    which is the mean over layers of the absolute difference (A5).
    """

    panel: str
    series: str | None
    seed: int
    lr_find: float
    history: LprHistory

    @property
    def label(self) -> str:
        return f"dense · LR {self.lr_find:g} · seed {self.seed}"

    @property
    def node(self) -> Train:
        return self.history.node

    @property
    def wanted(self) -> tuple[LprHistory]:
        return (self.history,)


AnyPoint = Point | LprPoint


def points_of(figure: Figure, settings: Settings, data: DataSpec) -> list[AnyPoint]:
    """All points of the figure, for every seed: those of its panels, and one per find run."""
    panels = figure.panels_of(settings)
    found: list[AnyPoint] = []
    for seed in range(settings.seeds):
        # Panels with equal settings share one builder, which remembers the masks that it has built.
        chains = {panel.settings: Chains(panel.settings, data, seed) for panel in panels}
        points = [point for panel in panels for point in find_points(panel, chains[panel.settings])]
        # Panels that share find runs list them under the same find panel; results.csv allows one row per point.
        found += list({(p.panel, p.series, p.round): p for p in points}.values())
        for panel in panels:
            for series in panel.series:
                found += _points(panel, series, chains[panel.settings])
    return found


def _points(panel: Panel, series: Series, chains: Chains) -> Iterator[AnyPoint]:
    """The points of one series: prune rounds, epochs of a dense run, or one-shot structured networks, by the x axis."""
    if panel.x == "density":
        return _eval_points(panel, series, chains)
    if panel.x == "epoch":
        return _lpr_points(panel, series, chains)
    return _channel_points(panel, series, chains)


def find_points(panel: Panel, chains: Chains) -> Iterator[Point]:
    """One point per find run of the panel, rounds 0 to `rounds` - 1."""
    for series in panel.series:
        recipe = series.recipe
        if panel.x == "density" and panel.find is not None and recipe.lr is not None:
            # The mask of the last round is evaluated, but no find run trains under it.
            for round in range(chains.settings.rounds):
                state = chains.find_state(recipe, round)
                yield Point(
                    panel.find, series.name, chains.seed, round, recipe.lr, recipe.lr, state.node, epoch=state.epoch
                )


def _eval_points(panel: Panel, series: Series, chains: Chains) -> Iterator[Point]:
    recipe, lr_eval = series.recipe, series.lr_eval
    assert lr_eval is not None
    for round in range(chains.settings.rounds + 1):
        # A6 shows at 0 % sparsity the dense network as it was pruned, after `stop` epochs with LR_find.
        if round == 0 and series.dense == "find":
            assert recipe.lr is not None
            node = chains.dense(recipe.lr)
            yield Point(
                panel.id, series.name, chains.seed, 0, recipe.lr, recipe.lr, node, epoch=recipe.stop or node.stop
            )
        else:
            node = chains.eval_run(recipe, round, lr_eval)
            yield Point(panel.id, series.name, chains.seed, round, recipe.lr, lr_eval, node)


def _lpr_points(panel: Panel, series: Series, chains: Chains) -> Iterator[LprPoint]:
    lr = series.recipe.lr
    assert lr is not None
    history = LprHistory(chains.dense(lr), chains.settings.fraction)
    yield LprPoint(panel.id, series.name or None, chains.seed, lr, history)


def _channel_points(panel: Panel, series: Series, chains: Chains) -> Iterator[Point]:
    lr_find, lr_eval = series.recipe.lr, series.lr_eval
    assert lr_find is not None
    assert lr_eval is not None
    dense = chains.dense(lr_find)
    for round, sparsity in enumerate((0.0, *chains.settings.sparsities)):
        selection = ChannelSelection(dense.final, sparsity)
        node, lr = dense, lr_find
        # At 0 % stands the pre-trained network itself: fine-tuning a network with all of its filters prunes nothing.
        if round > 0:
            node, lr = chains.train(lr_eval, selection, Rewind(dense.final, 0, momentum=False)), lr_eval
        yield Point(panel.id, series.name, chains.seed, round, lr_find, lr, node, x=panel.x, selection=selection)


def build_graph(figure: Figure, settings: Settings, data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """The points of the figure, and the graph of all nodes that they need, labelled for progress and error messages."""
    points = points_of(figure, settings, data)
    labels: dict[str, str] = {}
    for point in points:
        # A run that several points share keeps the label of the first.
        labels.setdefault(point.node.key, f"{figure.name} {point.label}")
        if not isinstance(point, Point):
            continue
        about = f"{point.series} · seed {point.seed}"
        if isinstance(mask := point.node.mask, Prune):
            labels.setdefault(mask.key, f"{figure.name} prune · {about} · round {mask.round}")
        if point.selection is not None:
            labels.setdefault(point.selection.key, f"{figure.name} filters · {about} · {point.selection.fraction:g}")
    return points, Graph.of((w for p in points for w in p.wanted), labels)
