"""Chains of runs that find masks and evaluate them: the nodes of one seed. Standard library only."""

from dataclasses import dataclass, replace

from fastprune.errors import InputError
from fastprune.specs import ChannelSelection, DataSpec, Init, Prune, Ratios, Rewind, StateRef, Train
from fastprune.study.settings import Settings


@dataclass(frozen=True)
class MaskRecipe:
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
        self._masks: dict[MaskRecipe, list[Prune]] = {}
        self._found: dict[tuple[MaskRecipe, int], StateRef] = {}

    def dense(self, lr: float) -> Train:
        """The dense network, from its initial weights to the end of the schedule."""
        return self.train(lr, None, self.init)

    def train(
        self, lr: float, mask: Prune | ChannelSelection | None, start: Init | Rewind, stop: int | None = None
    ) -> Train:
        """With peak learning rate `lr`; from a start that fine-tuning gives, with that schedule's last rate."""
        s = self.settings
        schedule = s.schedule(lr)
        if s.rewind == "finetune" and isinstance(start, Rewind):
            schedule = replace(s, warmup_epochs=0, milestones=(), decay="multistep").schedule(
                schedule.lr_at(s.epochs - 1)
            )
        return Train(self.data, start, mask, s.optimizer(), schedule, stop or s.epochs, self.seed, s.precision)

    def masks(self, source: MaskRecipe) -> list[Prune]:
        """The masks of rounds 1 to `rounds`."""
        if source not in self._masks:
            s, masks = self.settings, self._masks.setdefault(source, [])
            donors = None if source.ratios_of is None else self.masks(MaskRecipe(source.ratios_of))
            for round in range(s.rounds):
                pruned = self.init if source.lr is None else self.find_state(source, round)
                score = "random" if source.lr is None else "magnitude"
                allocation = s.allocation if donors is None else Ratios(donors[round])
                prior = masks[-1] if masks else None
                masks.append(Prune(pruned, prior, s.fraction, score, allocation, self.seed))
        return self._masks[source]

    def find_state(self, source: MaskRecipe, round: int) -> StateRef:
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

    def eval_run(self, source: MaskRecipe, round: int, lr_eval: float) -> Train:
        """The dense network, or the mask of `round`, trained with `lr_eval`."""
        if round == 0:
            return self.dense(lr_eval)
        return self.train(lr_eval, self.masks(source)[round - 1], self._start(source, round, lr_eval))

    def _start(self, source: MaskRecipe, round: int, lr: float) -> Init | Rewind:
        """Where the network of `round` starts; the random baseline's late point is that of the run with `lr`."""
        s = self.settings
        if s.rewind == "init":
            return self.init
        if s.rewind == "late":
            dense = self.dense(lr if source.lr is None else source.lr)
            return Rewind(StateRef(dense, s.late_epoch), s.late_epoch, momentum=True)
        if source.lr is None:
            raise InputError(f"--rewind {s.rewind}: the random baseline has no trained weights to go back to")
        return Rewind(self.find_state(source, round - 1), 0, momentum=False)
