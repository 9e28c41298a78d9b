"""The settings of a figure: each one once, with its type, default, bounds and help.

Values come from the paper's protocol, changed by a preset, changed by the command line. Flags, checks and `--help` are
derived from the annotations.
"""

# Standard library only: `--plan` and `--help` import this module and must start without torch.

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastprune.errors import InputError
from fastprune.specs import ALLOCATIONS, DECAYS, PRECISIONS, DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec

REWINDS = ("init", "late", "lr", "finetune")


@dataclass(frozen=True)
class Flag:
    """The flag of a setting. help, metavar: as in argparse. low, high: bounds of its value, ends included."""

    help: str | None = None
    metavar: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every hyperparameter of a figure.

    rewind: the state that training restarts from after a prune step. "init": initial weights (epoch 0). "late": the
    dense run with LR_find after `rewind_epoch`, with its batch-norm statistics, momentum, and position in schedule and
    data order. "lr" (learning rate rewinding): the weights and statistics that were pruned, momentum zero, the schedule
    from its start. "finetune": the same at the schedule's last rate throughout.

    milestones, warmup_epochs, rewind_epoch and prune_epochs count epochs of a run of `protocol_epochs` and are scaled
    to runs of another length, except those named in `by_hand`.
    """

    # Defaults are those that all protocols share (section A.1). A field without a default differs between them.

    seeds: Annotated[int, Flag("number of seeds", "N", 1, 1000)] = 5
    first_seed: Annotated[
        int,
        Flag("the first of them: another machine's share of a study, or seeds that no figure has", "N", 0, 10**6),
    ] = 0
    rounds: Annotated[int, Flag("prune rounds after round 0, the dense network", "N", 1, 1000)] = 30
    fraction: Annotated[
        float, Flag("fraction of the remaining weights to prune in each round", "F", 1e-6, 1 - 1e-6)
    ] = 0.2
    epochs: Annotated[int, Flag("epochs per training; milestones and warmup scale with it", "N", 1, 100_000)]
    milestones: Annotated[tuple[int, ...], Flag("epochs after which the learning rate decays", "E")]
    gamma: Annotated[float, Flag("factor of the learning rate at each milestone", "G", 1e-9, 1.0)]
    warmup_epochs: Annotated[int, Flag("epochs of linear warmup from 0 to the learning rate", "N", 0, 100_000)] = 0
    decay: Annotated[str, Flag("learning rate decay: at milestones, along a cosine, or each epoch", choices=DECAYS)] = (
        "multistep"
    )
    criterion: Annotated[
        str, Flag("which weights to prune first: magnitude, or a criterion that --figure-module registers", "NAME")
    ] = "magnitude"
    allocation: Annotated[
        str, Flag("prune all layers together (global), or the same fraction of each (local)", choices=ALLOCATIONS)
    ] = "global"
    rewind: Annotated[
        str,
        Flag(
            "where training restarts after a prune step: initial weights (init), an early epoch (late), or trained "
            "weights with the schedule replayed (lr) or at its last rate (finetune)",
            choices=REWINDS,
        ),
    ] = "init"
    rewind_epoch: Annotated[int, Flag("epoch that --rewind late returns to", "E", 1, 100_000)] = 2
    prune_epochs: Annotated[
        tuple[int, ...], Flag("figure A6: epochs after which find runs stop and are pruned", "E")
    ] = ()
    sparsities: Annotated[tuple[float, ...], Flag("figure structured: fractions of filters to remove", "F")] = ()
    lr_find: Annotated[tuple[float, ...], Flag("LR_find: learning rates of the runs that find the masks", "LR")] = ()
    lr_eval: Annotated[
        tuple[float, ...], Flag("LR_eval: learning rates of the runs that evaluate the masks", "LR")
    ] = ()
    batch_size: Annotated[int, Flag("images per optimiser step", "N", 1, 1 << 20)] = 512
    momentum: Annotated[float, Flag("momentum of SGD", "M", 0.0, 0.999999)] = 0.9
    nesterov: Annotated[bool, Flag("use Nesterov momentum")] = False
    weight_decay: Annotated[float, Flag("weight decay of SGD, for all parameters", "W", 0.0, 1e6)] = 1e-4
    label_smoothing: Annotated[float, Flag("label smoothing of the cross-entropy loss", "S", 0.0, 0.999999)] = 0.0
    model: Annotated[str, Flag("network, as torchvision defines it", choices=("resnet18", "resnet34", "resnet50"))]
    stem: Annotated[
        str,
        Flag(
            "first layers: 7x7 conv of stride 2 and max-pool (imagenet), or 3x3 conv (cifar)",
            choices=("imagenet", "cifar"),
        ),
    ]
    # Below 4, CPU convolutions of some PyTorch versions crash in channels-last.
    width: Annotated[int, Flag("channels of the first stage (64 in the paper)", "N", 4, 4096)]
    precision: Annotated[
        str, Flag("precision of forward and backward passes; the weights stay fp32", choices=PRECISIONS)
    ] = "bf16"
    classes: Annotated[int | None, Flag("use only the first N classes", "N", 2, 1 << 20)] = None
    train_per_class: Annotated[int | None, Flag("use only the first N training images per class", "N", 1, 1 << 30)] = (
        None
    )
    val_per_class: Annotated[int | None, Flag("use only the first N validation images per class", "N", 1, 1 << 30)] = (
        None
    )
    image_size: Annotated[int, Flag("height and width of generated images in pixels (64)", "N", 32, 512)] = 64
    # The fields below belong to the protocol: they are not annotated, so the command line has no flag for them.
    dataset: str = "tiny-imagenet-200"
    protocol_epochs: int
    by_hand: tuple[str, ...] = ()

    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(self.batch_size, self.momentum, self.weight_decay, self.nesterov, self.label_smoothing)

    def schedule(self, lr: float) -> ScheduleSpec:
        """Warmup and decay for the peak learning rate `lr`, scaled to `epochs`."""
        # A milestone that scales to epoch 0 is dropped below: it would lower the peak rate itself.
        milestones = (self.scaled("milestones", m) for m in self.milestones)
        return ScheduleSpec(
            lr,
            self.epochs,
            tuple(m for m in milestones if m > 0),
            self.gamma,
            # A warmup that is asked for stays at least one epoch, however short the run.
            max(1, self.scaled("warmup_epochs", self.warmup_epochs)) if self.warmup_epochs else 0,
            self.decay,
        )

    def scaled(self, name: str, epoch: int) -> int:
        """`epoch` of the setting `name`, at the same fraction of a run of `epochs`, unless it was given by hand."""
        return epoch if name in self.by_hand else round(epoch * self.epochs / self.protocol_epochs)

    @property
    def late_epoch(self) -> int:
        """The epoch that late rewinding returns to, at least 1."""
        return max(1, self.scaled("rewind_epoch", self.rewind_epoch))

    @property
    def stops(self) -> tuple[int, ...]:
        """The epochs after which find runs stop and are pruned, each at least 1."""
        return tuple(max(1, self.scaled("prune_epochs", e)) for e in self.prune_epochs)

    def network(self, data: DataSpec) -> ModelSpec:
        return ModelSpec(self.model, data.classes, self.stem, self.width)

    def override(self, **changes: Any) -> "Settings":
        """A checked copy in which the settings given as not None are changed. Epochs given here are not scaled."""
        changes = {k: v for k, v in changes.items() if v is not None}
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise InputError(f"unknown settings: {', '.join(sorted(unknown))}")
        for name in ("lr_find", "lr_eval", "sparsities", "prune_epochs"):
            if name in changes and not changes[name]:
                raise InputError(f"{flag_of(name)} is empty: give at least one value")
        by_hand = {*self.by_hand, *(changes.keys() & _IN_EPOCHS)}
        return check(replace(self, **changes, by_hand=tuple(sorted(by_hand))))


_IN_EPOCHS = {"milestones", "warmup_epochs", "rewind_epoch", "prune_epochs"}


def flags() -> dict[str, tuple[type, bool, Flag]]:
    """Setting -> (type of a value, whether it takes several, its flag). Settings without a flag are not listed."""
    found = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, flag = get_args(hint)
            several = get_origin(kind) is tuple
            found[name] = (get_args(kind)[0] if get_args(kind) else kind, several, flag)
    return found


def flag_of(name: str) -> str:
    """The name of a setting's flag, such as "--lr-find"."""
    return f"--{name.replace('_', '-')}"


def check(s: Settings) -> Settings:
    """Returns the settings unchanged. InputError where one is out of bounds or contradicts another."""
    for name, (_, _, flag) in flags().items():
        value = getattr(s, name)
        if flag.choices and value not in flag.choices:
            raise InputError(f"{flag_of(name)} is {value}, expected one of {', '.join(flag.choices)}")
        if flag.low is not None and flag.high is not None and value is not None and not flag.low <= value <= flag.high:
            raise InputError(f"{flag_of(name)} is {value}, expected {flag.low:g} to {flag.high:g}")
    if s.nesterov and s.momentum == 0:
        raise InputError("Nesterov momentum requires --momentum above 0")
    if any(m < 1 for m in s.milestones) or list(s.milestones) != sorted(set(s.milestones)):
        raise InputError(
            f"--milestones are {' '.join(map(str, s.milestones))}, expected epochs in rising order, from 1"
        )
    for name, epoch in (("warmup_epochs", s.schedule(1.0).warmup_epochs), ("rewind_epoch", s.late_epoch)):
        if epoch > s.epochs:
            raise InputError(f"{flag_of(name)} is {epoch}, but a training has {s.epochs} epochs")
    # Bounds of the annotations say nothing about a scaled epoch, so these are compared as they take effect.
    # A scaled epoch comes from no flag, so its message names one only as what to change.
    stop = min((*s.stops, s.epochs))
    if s.rewind == "late" and s.late_epoch >= stop:
        if "rewind_epoch" in s.by_hand:
            raise InputError(f"--rewind-epoch is {s.late_epoch}, but find runs stop after epoch {stop}: lower it")
        longer = "--prune-epochs" if "prune_epochs" in s.by_hand else "--epochs"
        raise InputError(
            f"late rewinding returns to epoch {s.late_epoch}, but find runs stop after epoch {stop}: raise {longer}"
        )
    if list(s.stops) != sorted(set(s.stops)) or not all(1 <= e <= s.epochs for e in s.stops):
        stops = " ".join(map(str, s.stops))
        if "prune_epochs" in s.by_hand:
            raise InputError(f"--prune-epochs are {stops}, expected rising epochs from 1 to {s.epochs}")
        raise InputError(
            f"find runs of {s.epochs} epochs would stop after epochs {stops}, which do not rise: raise --epochs, or "
            "choose --prune-epochs"
        )
    if list(s.sparsities) != sorted(set(s.sparsities)) or not all(0 < x < 1 for x in s.sparsities):
        raise InputError("--sparsities must be rising fractions above 0 and below 1")
    for name in ("lr_find", "lr_eval"):
        rates = getattr(s, name)
        if any(not 0 < r < float("inf") for r in rates):
            raise InputError(f"{flag_of(name)} must be above 0 and finite")
        # Series are named by the rate in six digits; two equal names would be one line.
        if len({f"{r:g}" for r in rates}) < len(rates):
            raise InputError(f"{flag_of(name)} has two rates that are equal to six digits: remove one")
    return s


PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores: each part of the machinery once. fp32, because some CPUs have no bf16 instructions.
    "smoke": {
        "seeds": 2,
        "rounds": 3,
        "fraction": 0.8,
        "epochs": 4,
        "batch_size": 128,
        "width": 8,
        "precision": "fp32",
        "classes": 10,
        "train_per_class": 160,
        "val_per_class": 50,
    },
    # The real data set and network on one GPU, with a tenth of the epochs. 12 rounds reach the final density of 30
    # (0.8^30), and 3 seeds are the fewest that can decide a claim.
    "quick": {"seeds": 3, "rounds": 12, "fraction": 1 - 0.8 ** (30 / 12), "epochs": 11},
    # Real images at a size that decides something in hours on two CPU cores (docs/evidence): 15,620 steps a training,
    # which small rates need to converge. 8 rounds reach the final density of 30.
    "cpu": {
        "seeds": 3,
        "rounds": 8,
        "fraction": 1 - 0.8 ** (30 / 8),
        "epochs": 20,
        "batch_size": 64,
        "model": "resnet18",
        "width": 16,
        "precision": "fp32",
        "classes": 100,
        "rates": "by batch size",
    },
    "paper": {},
}


def preset(protocol: Settings, name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """`protocol`, changed by the preset `name`. changes: preset -> what the figure changes in it. InputError.

    With "rates": "by batch size", learning rates that are not changed keep their ratio to the batch size (the linear
    scaling rule, Goyal et al. 2017).
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    found = PRESETS[name] | dict((changes or {}).get(name, {}))
    if found.pop("rates", None):
        scale = found["batch_size"] / protocol.batch_size
        for rates in ("lr_find", "lr_eval"):
            if getattr(protocol, rates):
                found = {rates: tuple(round(r * scale, 9) for r in getattr(protocol, rates))} | found
    return protocol.override(**found)
