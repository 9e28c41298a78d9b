"""Chains of find runs and prune steps, and the eval runs of their masks: the nodes of one seed."""

# Standard library only: `--plan` imports this module and must start without torch.

from dataclasses import dataclass, replace

from fastprune.errors import InputError
from fastprune.specs import (
    ChannelSelection,
    CriterionRef,
    DataSpec,
    Init,
    Prune,
    Ratios,
    Rewind,
    StateRef,
    Train,
)
from fastprune.study.settings import Settings


@dataclass(frozen=True)
class MaskRecipe:
    """How the masks of a series are found.

    lr: LR_find; None: the random baseline. stop: the epoch after which find runs stop and are pruned; None: the last.
    ratios_of: each layer is pruned by the ratios of the masks that this LR_find finds; None: by the setting
    `allocation`.
    """

    lr: float | None
    stop: int | None = None
    ratios_of: float | None = None

    @property
    def name(self) -> str:
        """The name of the series in results.csv."""
        ratios = "" if self.ratios_of is None else f" by {self.ratios_of:g}"
        return "random" if self.lr is None else f"{self.lr:g}{ratios}"

    @property
    def label(self) -> str:
        """The label in a legend."""
        ratios = "" if self.ratios_of is None else f", ratios of {self.ratios_of:g}"
        return "random pruning" if self.lr is None else f"LR_find = {self.lr:g}{ratios}"


class Chains:
    """Builds the nodes of one seed."""

    # Runs are shared between series, panels and figures by their keys: building the same run twice gives equal nodes.

    def __init__(self, settings: Settings, data: DataSpec, seed: int) -> None:
        self.settings, self.data, self.seed = settings, data, seed
        self.init = Init(settings.network(data), seed)
        self.criterion = _criterion(settings.criterion)
        self._masks: dict[MaskRecipe, list[Prune]] = {}
        self._found: dict[tuple[MaskRecipe, int], StateRef] = {}

    def dense(self, lr: float) -> Train:
        """The run that trains the dense network from initialisation to the end of the schedule."""
        return self.train(lr, None, self.init)

    def train(
        self, lr: float, mask: Prune | ChannelSelection | None, start: Init | Rewind, stop: int | None = None
    ) -> Train:
        """A run with peak learning rate `lr`. A fine-tuning run has the last rate of that schedule throughout."""
        s = self.settings
        schedule = s.schedule(lr)
        if s.rewind == "finetune" and isinstance(start, Rewind):
            schedule = replace(s, warmup_epochs=0, milestones=(), decay="multistep").schedule(
                schedule.lr_at(s.epochs - 1)
            )
        return Train(self.data, start, mask, s.optimizer(), schedule, stop or s.epochs, self.seed, s.precision)

    def masks(self, recipe: MaskRecipe) -> list[Prune]:
        """The prune nodes of rounds 1 to `rounds`, in order."""
        if recipe not in self._masks:
            s, masks = self.settings, self._masks.setdefault(recipe, [])
            donors = None if recipe.ratios_of is None else self.masks(MaskRecipe(recipe.ratios_of))
            for round in range(s.rounds):
                # The random baseline reads no trained weights, so its masks need no find runs.
                pruned = self.init if recipe.lr is None else self.find_state(recipe, round)
                criterion = "random" if recipe.lr is None else self.criterion
                allocation = s.allocation if donors is None else Ratios(donors[round])
                prior = masks[-1] if masks else None
                masks.append(Prune(pruned, prior, s.fraction, criterion, allocation, self.seed))
        return self._masks[recipe]

    def find_state(self, recipe: MaskRecipe, round: int) -> StateRef:
        """The trained state of find run `round` that the next prune step reads."""
        if (recipe, round) not in self._found:
            assert recipe.lr is not None
            stop = recipe.stop or self.settings.epochs
            run = self.dense(recipe.lr)
            if round > 0:
                mask, start = self.masks(recipe)[round - 1], self._start(recipe, round, recipe.lr)
                run = self.train(recipe.lr, mask, start, stop)
            self._found[recipe, round] = StateRef(run, stop)
        return self._found[recipe, round]

    def eval_run(self, recipe: MaskRecipe, round: int, lr_eval: float) -> Train:
        """The eval run of `round`: the mask of that round (0: dense), trained with `lr_eval`."""
        if round == 0:
            return self.dense(lr_eval)
        return self.train(lr_eval, self.masks(recipe)[round - 1], self._start(recipe, round, lr_eval))

    def _start(self, recipe: MaskRecipe, round: int, lr: float) -> Init | Rewind:
        """The rewind point of `round`. InputError where the random baseline would need trained weights."""
        s = self.settings
        if s.rewind == "init":
            return self.init
        if s.rewind == "late":
            # The random baseline has no LR_find, so its late rewind point is taken from the dense run with LR_eval.
            dense = self.dense(lr if recipe.lr is None else recipe.lr)
            return Rewind(StateRef(dense, s.late_epoch), s.late_epoch, momentum=True)
        if recipe.lr is None:
            raise InputError(
                f"--rewind {s.rewind}: the random baseline has no trained weights to return to; use init or late"
            )
        return Rewind(self.find_state(recipe, round - 1), 0, momentum=False)


def _criterion(name: str) -> str | CriterionRef:
    """The criterion as a prune node records it."""
    if name == "magnitude":
        return name
    from fastprune.pruning.criteria import criterion  # here: it imports torch

    # The version is part of the key, because the function behind a name can change.
    return CriterionRef(name, criterion(name).version)
