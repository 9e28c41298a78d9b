"""What a figure of pruning curves is made of: points, each one training run; and the chains of runs that find masks.

Standard library only.
"""

from dataclasses import dataclass

from fastprune.settings import Settings
from fastprune.specs import DataSpec, Init, Prune, Train


@dataclass(frozen=True)
class Point:
    """One training run as it stands in a figure. lr_find is None for the random baseline."""

    panel: str
    series: str
    seed: int
    round: int
    lr_find: float | None
    lr_eval: float
    node: Train

    @property
    def label(self) -> str:
        role = "find" if self.panel == "find" else f"eval {self.lr_eval:g}"
        source = self.series if self.lr_find is None else f"LR_find {self.series}"
        return f"{role} · {source} · seed {self.seed} · round {self.round}"


class Chains:
    """Builds the runs of one seed. The same run asked for twice is the same node, so nothing is shared by hand."""

    def __init__(self, settings: Settings, data: DataSpec, seed: int) -> None:
        self.settings, self.data, self.seed = settings, data, seed
        self.init = Init(settings.network(data), seed)
        self._masks: dict[float | None, list[Prune]] = {}

    def train(self, lr: float, mask: Prune | None) -> Train:
        """From the initial weights, under the mask, with learning rate `lr`."""
        s = self.settings
        schedule = s.schedule(lr)
        return Train(self.data, self.init, mask, s.optimizer(), schedule, schedule.epochs, self.seed, s.precision)

    def masks(self, lr_find: float | None) -> list[Prune]:
        """The masks of rounds 1 to `rounds`, found with `lr_find`; None: the random baseline."""
        if lr_find not in self._masks:
            masks: list[Prune] = []
            for _ in range(self.settings.rounds):
                prior = masks[-1] if masks else None
                source = self.init if lr_find is None else self.train(lr_find, prior).final
                score = "random" if lr_find is None else "magnitude"
                masks.append(Prune(source, prior, self.settings.fraction, score, "global", self.seed))
            self._masks[lr_find] = masks
        return self._masks[lr_find]

    def find_runs(self, lr_find: float) -> list[Train]:
        """The runs whose final weights are pruned: rounds 0 to `rounds` - 1."""
        return [self.train(lr_find, mask) for mask in [None, *self.masks(lr_find)[:-1]]]

    def eval_runs(self, lr_find: float | None, lr_eval: float) -> list[Train]:
        """The dense network and each round's mask, trained with `lr_eval`."""
        return [self.train(lr_eval, mask) for mask in [None, *self.masks(lr_find)]]


def series_name(lr_find: float | None) -> str:
    return "random" if lr_find is None else f"{lr_find:g}"


def evaluation_panel(panel: str, chains: Chains, lr_finds: tuple[float | None, ...], lr_eval: float) -> list[Point]:
    """The points of a panel with one LR_eval and a line for each LR_find."""
    return [
        Point(panel, series_name(lr), chains.seed, round, lr, lr_eval, node)
        for lr in lr_finds
        for round, node in enumerate(chains.eval_runs(lr, lr_eval))
    ]


def find_panel(chains: Chains, lr_finds: tuple[float, ...]) -> list[Point]:
    """The find runs themselves, as they fall out."""
    return [
        Point("find", series_name(lr), chains.seed, round, lr, lr, node)
        for lr in lr_finds
        for round, node in enumerate(chains.find_runs(lr))
    ]
