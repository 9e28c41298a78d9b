"""What a figure is made of: points, each a trained network or the LPR history of one.

Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import TYPE_CHECKING

from fastprune.figures import load
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Prune, Train
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.graph import Graph
from fastprune.study.settings import Settings

if TYPE_CHECKING:
    from fastprune.figures.reproduce import FigureRequest


@dataclass(frozen=True)
class Point:
    """The accuracy of one network as it stands in a figure. lr_find is None for the random baseline.

    epoch: after which the accuracy is taken (None: the last). x: what stands on the horizontal axis. filters: those
    that a structured network keeps.
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
    filters: ChannelSelection | None = None

    @property
    def label(self) -> str:
        role = "find" if self.panel.startswith("find") else f"eval {self.lr_eval:g}"
        source = self.series if self.lr_find is None else f"LR_find {self.series}"
        return f"{role} · {source} · seed {self.seed} · round {self.round}"

    @property
    def wanted(self) -> tuple[Train | ChannelSelection, ...]:
        """What must exist."""
        return (self.node,) if self.filters is None else (self.node, self.filters)


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


def evaluation_panel(
    panel: str, chains: Chains, sources: Sequence[MaskRecipe], lr_eval: float, names: Sequence[str] | None = None
) -> list[Point]:
    """The points of a panel with one LR_eval and a line for each source."""
    return [
        Point(panel, name, chains.seed, round, source.lr, lr_eval, chains.eval_run(source, round, lr_eval))
        for source, name in zip(sources, names or [s.name for s in sources], strict=True)
        for round in range(chains.settings.rounds + 1)
    ]


def find_panel(
    chains: Chains, sources: Sequence[MaskRecipe], names: Sequence[str] | None = None, panel: str = "find"
) -> list[Point]:
    """The find runs themselves, as they fall out: rounds 0 to `rounds` - 1."""
    points = []
    for source, name in zip(sources, names or [s.name for s in sources], strict=True):
        for round in range(chains.settings.rounds):
            assert source.lr is not None
            state = chains.find_state(source, round)
            points.append(Point(panel, name, chains.seed, round, source.lr, source.lr, state.node, epoch=state.epoch))
    return points


def grid(settings: Settings, data: DataSpec, sources: Sequence[MaskRecipe]) -> list[Point]:
    """All seeds: the find runs, and a panel (a, b, ...) for each LR_eval with a line for each source."""
    points = []
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        points += find_panel(chains, [s for s in sources if s.lr is not None])
        for panel, lr_eval in zip(ascii_lowercase, settings.lr_eval, strict=False):
            points += evaluation_panel(panel, chains, sources, lr_eval)
    return points


def dense_histories(settings: Settings, data: DataSpec) -> list[tuple[int, float, LprHistory]]:
    """Seed, LR_find and the LPR at each epoch of the dense run, for all of both."""
    return [
        (seed, lr, LprHistory(Chains(settings, data, seed).dense(lr), settings.fraction))
        for seed in range(settings.seeds)
        for lr in settings.lr_find
    ]


def build_graph(figure: "FigureRequest", data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """The figure's points, and the graph of all runs that they need."""
    points: list[AnyPoint] = load(figure.name).points(figure.settings, data)
    labels: dict[str, str] = {}
    for point in points:
        labels.setdefault(point.node.key, f"{figure.name} {point.label}")
        if not isinstance(point, Point):
            continue
        about = f"{point.series} · seed {point.seed}"
        if isinstance(mask := point.node.mask, Prune):
            labels.setdefault(mask.key, f"{figure.name} prune · {about} · round {mask.round}")
        if point.filters is not None:
            labels.setdefault(point.filters.key, f"{figure.name} filters · {about} · {point.filters.fraction:g}")
    return points, Graph.of((w for p in points for w in p.wanted), labels)
