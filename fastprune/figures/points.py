"""From a figure's panels to points, each a trained network or the LPR history of one, and to the graph of their runs.

Standard library only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fastprune.figures.figure import Figure, Panel, Series
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Prune, Rewind, Train
from fastprune.study.chains import Chains
from fastprune.study.graph import Graph
from fastprune.study.settings import Settings


@dataclass(frozen=True)
class Point:
    """The accuracy of one network as it stands in a figure. lr_find is None for the random baseline.

    epoch: after which the accuracy is taken (None: the last). x: what stands on the horizontal axis. selection: the
    channels that a structured network keeps.
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
        """What must exist."""
        return (self.node,) if self.selection is None else (self.node, self.selection)


@dataclass(frozen=True)
class LprPoint:
    """What the LPR history of a dense run shows. series: None for a line for each layer (its LPR), else the line's name
    (the mean over layers of the LPR's absolute difference from that at the end)."""

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
    """Every point of the figure for every seed, and the find runs."""
    panels = figure.panels_of(settings)
    found: list[AnyPoint] = []
    for seed in range(settings.seeds):
        chains = {panel.settings: Chains(panel.settings, data, seed) for panel in panels}
        points = [point for panel in panels for point in find_points(panel, chains[panel.settings])]
        # Several panels may share one find panel: its points are the same ones.
        found += list({(p.panel, p.series, p.round): p for p in points}.values())
        for panel in panels:
            for series in panel.series:
                found += _points(panel, series, chains[panel.settings])
    return found


def _points(panel: Panel, series: Series, chains: Chains) -> Iterator[AnyPoint]:
    """What stands on the x axis decides: rounds over density, epochs of a dense run, or networks cut in one shot."""
    if panel.x == "density":
        return _eval_points(panel, series, chains)
    if panel.x == "epoch":
        return _lpr_points(panel, series, chains)
    return _channel_points(panel, series, chains)


def find_points(panel: Panel, chains: Chains) -> Iterator[Point]:
    """The find runs themselves, as they fall out: rounds 0 to `rounds` - 1."""
    for series in panel.series:
        recipe = series.recipe
        if panel.x == "density" and panel.find is not None and recipe.lr is not None:
            for round in range(chains.settings.rounds):
                state = chains.find_state(recipe, round)
                yield Point(
                    panel.find, series.name, chains.seed, round, recipe.lr, recipe.lr, state.node, epoch=state.epoch
                )


def _eval_points(panel: Panel, series: Series, chains: Chains) -> Iterator[Point]:
    recipe, lr_eval = series.recipe, series.lr_eval
    assert lr_eval is not None
    for round in range(chains.settings.rounds + 1):
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
        if round > 0:
            node, lr = chains.train(lr_eval, selection, Rewind(dense.final, 0, momentum=False)), lr_eval
        yield Point(panel.id, series.name, chains.seed, round, lr_find, lr, node, x=panel.x, selection=selection)


def build_graph(figure: Figure, settings: Settings, data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """The figure's points, and the graph of all runs that they need."""
    points = points_of(figure, settings, data)
    labels: dict[str, str] = {}
    for point in points:
        labels.setdefault(point.node.key, f"{figure.name} {point.label}")
        if not isinstance(point, Point):
            continue
        about = f"{point.series} · seed {point.seed}"
        if isinstance(mask := point.node.mask, Prune):
            labels.setdefault(mask.key, f"{figure.name} prune · {about} · round {mask.round}")
        if point.selection is not None:
            labels.setdefault(point.selection.key, f"{figure.name} filters · {about} · {point.selection.fraction:g}")
    return points, Graph.of((w for p in points for w in p.wanted), labels)
