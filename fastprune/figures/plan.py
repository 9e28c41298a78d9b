"""What a figure is made of: points, each a trained network or the trace of one; and the chains of runs that find masks.

Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_lowercase

from fastprune.errors import InputError
from fastprune.settings import Settings
from fastprune.specs import DataSpec, Filters, Init, Prune, Ratios, Rewind, StateRef, Trace, Train


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
    filters: Filters | None = None

    @property
    def label(self) -> str:
        role = "find" if self.panel.startswith("find") else f"eval {self.lr_eval:g}"
        source = self.series if self.lr_find is None else f"LR_find {self.series}"
        return f"{role} · {source} · seed {self.seed} · round {self.round}"

    @property
    def wanted(self) -> tuple[Train | Filters, ...]:
        """What must exist."""
        return (self.node,) if self.filters is None else (self.node, self.filters)


@dataclass(frozen=True)
class TracePoint:
    """What the trace of a dense run shows. series: None for a line for each layer (its LPR), else the line's name
    (the mean over layers of the LPR's absolute difference from that at the end)."""

    panel: str
    series: str | None
    seed: int
    lr_find: float
    trace: Trace

    @property
    def label(self) -> str:
        return f"dense · LR {self.lr_find:g} · seed {self.seed}"

    @property
    def node(self) -> Train:
        return self.trace.node

    @property
    def wanted(self) -> tuple[Trace]:
        return (self.trace,)


AnyPoint = Point | TracePoint


@dataclass(frozen=True)
class Source:
    """How masks are found: with a learning rate (None: at random), by find runs that stop after epoch `stop` (None: at
    the end), each layer pruned by the ratios of the masks that rate `ratios_of` finds (None: by `allocation`)."""

    lr: float | None
    stop: int | None = None
    ratios_of: float | None = None

    @property
    def name(self) -> str:
        """The series."""
        ratios = "" if self.ratios_of is None else f" by {self.ratios_of:g}"
        return "random" if self.lr is None else f"{self.lr:g}{ratios}"


class Chains:
    """Builds the runs of one seed. The same run asked for twice is the same node, so nothing is shared by hand."""

    def __init__(self, settings: Settings, data: DataSpec, seed: int) -> None:
        self.settings, self.data, self.seed = settings, data, seed
        self.init = Init(settings.network(data), seed)
        self._masks: dict[Source, list[Prune]] = {}
        self._found: dict[tuple[Source, int], StateRef] = {}

    def dense(self, lr: float) -> Train:
        """The dense network, from its initial weights to the end of the schedule."""
        return self.train(lr, None, self.init)

    def train(self, lr: float, mask: Prune | Filters | None, start: Init | Rewind, stop: int | None = None) -> Train:
        """With peak learning rate `lr`; from a start that fine-tuning gives, with that schedule's last rate."""
        s = self.settings
        schedule = s.schedule(lr)
        if s.rewind == "finetune" and isinstance(start, Rewind):
            schedule = replace(s, warmup_epochs=0, milestones=(), decay="multistep").schedule(
                schedule.lr_at(s.epochs - 1)
            )
        return Train(self.data, start, mask, s.optimizer(), schedule, stop or s.epochs, self.seed, s.precision)

    def masks(self, source: Source) -> list[Prune]:
        """The masks of rounds 1 to `rounds`."""
        if source not in self._masks:
            s, masks = self.settings, self._masks.setdefault(source, [])
            donors = None if source.ratios_of is None else self.masks(Source(source.ratios_of))
            for round in range(s.rounds):
                pruned = self.init if source.lr is None else self.found(source, round)
                score = "random" if source.lr is None else "magnitude"
                allocation = s.allocation if donors is None else Ratios(donors[round])
                prior = masks[-1] if masks else None
                masks.append(Prune(pruned, prior, s.fraction, score, allocation, self.seed))
        return self._masks[source]

    def found(self, source: Source, round: int) -> StateRef:
        """The state that is pruned after `round`."""
        if (source, round) not in self._found:
            assert source.lr is not None
            stop = source.stop or self.settings.epochs
            run = self.dense(source.lr)
            if round > 0:
                mask, start = self.masks(source)[round - 1], self._start(source, round, source.lr)
                run = self.train(source.lr, mask, start, stop)
            self._found[source, round] = StateRef(run, stop)
        return self._found[source, round]

    def evaluated(self, source: Source, round: int, lr_eval: float) -> Train:
        """The dense network, or the mask of `round`, trained with `lr_eval`."""
        if round == 0:
            return self.dense(lr_eval)
        return self.train(lr_eval, self.masks(source)[round - 1], self._start(source, round, lr_eval))

    def _start(self, source: Source, round: int, lr: float) -> Init | Rewind:
        """Where the network of `round` starts; the random baseline's late point is that of the run with `lr`."""
        s = self.settings
        if s.rewind == "init":
            return self.init
        if s.rewind == "late":
            dense = self.dense(lr if source.lr is None else source.lr)
            return Rewind(StateRef(dense, s.late_epoch), s.late_epoch, momentum=True)
        if source.lr is None:
            raise InputError(f"--rewind {s.rewind}: the random baseline has no trained weights to go back to")
        return Rewind(self.found(source, round - 1), 0, momentum=False)


def evaluation_panel(
    panel: str, chains: Chains, sources: Sequence[Source], lr_eval: float, names: Sequence[str] | None = None
) -> list[Point]:
    """The points of a panel with one LR_eval and a line for each source."""
    return [
        Point(panel, name, chains.seed, round, source.lr, lr_eval, chains.evaluated(source, round, lr_eval))
        for source, name in zip(sources, names or [s.name for s in sources], strict=True)
        for round in range(chains.settings.rounds + 1)
    ]


def find_panel(
    chains: Chains, sources: Sequence[Source], names: Sequence[str] | None = None, panel: str = "find"
) -> list[Point]:
    """The find runs themselves, as they fall out: rounds 0 to `rounds` - 1."""
    points = []
    for source, name in zip(sources, names or [s.name for s in sources], strict=True):
        for round in range(chains.settings.rounds):
            assert source.lr is not None
            state = chains.found(source, round)
            points.append(Point(panel, name, chains.seed, round, source.lr, source.lr, state.node, epoch=state.epoch))
    return points


def grid(settings: Settings, data: DataSpec, sources: Sequence[Source]) -> list[Point]:
    """All seeds: the find runs, and a panel (a, b, ...) for each LR_eval with a line for each source."""
    points = []
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        points += find_panel(chains, [s for s in sources if s.lr is not None])
        for panel, lr_eval in zip(ascii_lowercase, settings.lr_eval, strict=False):
            points += evaluation_panel(panel, chains, sources, lr_eval)
    return points


def dense_traces(settings: Settings, data: DataSpec) -> list[tuple[int, float, Trace]]:
    """Seed, LR_find and the LPR at each epoch of the dense run, for all of both."""
    return [
        (seed, lr, Trace(Chains(settings, data, seed).dense(lr), settings.fraction))
        for seed in range(settings.seeds)
        for lr in settings.lr_find
    ]
