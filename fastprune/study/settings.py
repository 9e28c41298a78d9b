"""What can be set about a figure: each setting once, with its type, default, bounds and help. Data, no logic.

The paper's protocol, presets over it, the command line over both. Flags, checks and `--help` follow from the
annotations. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastprune.errors import InputError
from fastprune.specs import ALLOCATIONS, DECAYS, PRECISIONS, DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec

REWINDS = ("init", "late", "lr", "finetune")


@dataclass(frozen=True)
class Flag:
    """How a setting stands on the command line. low, high: bounds of its value, ends included."""

    help: str | None = None
    metavar: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every hyperparameter of a figure.

    rewind: where training restarts after a prune step. "init": the initial weights; "late": the dense run with LR_find
    after `rewind_epoch`, as it was then (weights, statistics, momentum, place in schedule and data order); "lr": the
    weights and statistics that were pruned, the schedule from its start, momentum zero; "finetune": the same, at the
    schedule's last rate throughout.

    milestones, warmup_epochs, rewind_epoch and prune_epochs are epochs of a run of `protocol_epochs`: a run of other
    length scales them, but not those given `by_hand`.
    """

    seeds: Annotated[int, Flag("seeds 0 to N-1", "N", 1, 1000)] = 5
    rounds: Annotated[int, Flag("prune rounds after the dense one", "N", 1, 1000)] = 30
    fraction: Annotated[float, Flag("pruned of what remains, each round", "F", 1e-6, 1 - 1e-6)] = 0.2
    epochs: Annotated[int, Flag("per training; the milestones scale along", "N", 1, 100_000)]
    milestones: Annotated[tuple[int, ...], Flag("epochs after which the rate decays", "E")]
    gamma: Annotated[float, Flag("factor at each milestone", None, 1e-9, 1.0)]
    warmup_epochs: Annotated[int, Flag("linear, from 0", "N", 0, 100_000)] = 0
    decay: Annotated[str, Flag(choices=DECAYS)] = "multistep"
    criterion: Annotated[
        str, Flag("why a weight goes: magnitude, or a name that --figure-module registers", "NAME")
    ] = "magnitude"
    allocation: Annotated[str, Flag("where weights go", choices=ALLOCATIONS)] = "global"
    rewind: Annotated[str, Flag("where training restarts after a prune step", choices=REWINDS)] = "init"
    rewind_epoch: Annotated[int, Flag("of late rewinding", "E", 1, 100_000)] = 2
    prune_epochs: Annotated[tuple[int, ...], Flag("A6: where find runs stop", "E")] = ()
    sparsities: Annotated[tuple[float, ...], Flag("structured: fractions of filters removed", "F")] = ()
    lr_find: Annotated[tuple[float, ...], Flag(None, "LR")] = ()
    lr_eval: Annotated[tuple[float, ...], Flag(None, "LR")] = ()
    batch_size: Annotated[int, Flag(None, "N", 1, 1 << 20)] = 512
    momentum: Annotated[float, Flag(low=0.0, high=0.999999)] = 0.9
    nesterov: Annotated[bool, Flag()] = False
    weight_decay: Annotated[float, Flag(low=0.0, high=1e6)] = 1e-4
    label_smoothing: Annotated[float, Flag(low=0.0, high=0.999999)] = 0.0
    model: Annotated[str, Flag(choices=("resnet18", "resnet34", "resnet50"))]
    stem: Annotated[str, Flag(choices=("imagenet", "small"))]
    # Narrower networks crash CPU convolutions of some PyTorch versions in channels-last.
    width: Annotated[int, Flag("channels of the first stage (64)", "N", 4, 4096)]
    precision: Annotated[str, Flag(choices=PRECISIONS)] = "bf16"
    classes: Annotated[int | None, Flag("use the first N classes only", "N", 2, 1 << 20)] = None
    train_per_class: Annotated[int | None, Flag("use the first N images of each class only", "N", 1, 1 << 30)] = None
    val_per_class: Annotated[int | None, Flag(None, "N", 1, 1 << 30)] = None
    image_size: Annotated[int, Flag("pixels a side of generated images (64)", "N", 32, 512)] = 64
    dataset: str = "tiny-imagenet-200"
    protocol_epochs: int
    by_hand: tuple[str, ...] = ()

    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(self.batch_size, self.momentum, self.weight_decay, self.nesterov, self.label_smoothing)

    def schedule(self, lr: float) -> ScheduleSpec:
        """The protocol's warmup and decay; milestones that fall on epoch 0 are dropped."""
        milestones = (self.scaled("milestones", m) for m in self.milestones)
        return ScheduleSpec(
            lr,
            self.epochs,
            tuple(m for m in milestones if m > 0),
            self.gamma,
            max(1, self.scaled("warmup_epochs", self.warmup_epochs)) if self.warmup_epochs else 0,
            self.decay,
        )

    def scaled(self, name: str, epoch: int) -> int:
        """An epoch of the setting `name`, at the same fraction of the run as in the protocol."""
        return epoch if name in self.by_hand else round(epoch * self.epochs / self.protocol_epochs)

    @property
    def late_epoch(self) -> int:
        """The epoch that late rewinding goes back to."""
        return max(1, self.scaled("rewind_epoch", self.rewind_epoch))

    @property
    def stops(self) -> tuple[int, ...]:
        """The epochs after which find runs are pruned early."""
        return tuple(max(1, self.scaled("prune_epochs", e)) for e in self.prune_epochs)

    def network(self, data: DataSpec) -> ModelSpec:
        return ModelSpec(self.model, data.classes, self.stem, self.width)

    def override(self, **changes: Any) -> "Settings":
        """These settings with what is not None changed; epochs given by hand are taken as they are."""
        changes = {k: v for k, v in changes.items() if v is not None}
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise InputError(f"unknown settings: {', '.join(sorted(unknown))}")
        for name in ("lr_find", "lr_eval", "sparsities", "prune_epochs"):
            if name in changes and not changes[name]:
                raise InputError(f"{flag_of(name)} names nothing")
        by_hand = {*self.by_hand, *(changes.keys() & _IN_EPOCHS)}
        return check(replace(self, **changes, by_hand=tuple(sorted(by_hand))))


_IN_EPOCHS = {"milestones", "warmup_epochs", "rewind_epoch", "prune_epochs"}


def flags() -> dict[str, tuple[type, bool, Flag]]:
    """By setting that the command line can change: the type of a value, whether it takes several, and its flag."""
    found = {}
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, flag = get_args(hint)
            several = get_origin(kind) is tuple
            found[name] = (get_args(kind)[0] if get_args(kind) else kind, several, flag)
    return found


def flag_of(name: str) -> str:
    """A setting as the command line calls it."""
    return f"--{name.replace('_', '-')}"


def check(s: Settings) -> Settings:
    """InputError, one line, for settings that make no sense."""
    for name, (_, _, flag) in flags().items():
        value = getattr(s, name)
        if flag.choices and value not in flag.choices:
            raise InputError(f"{flag_of(name)} is {value}, expected one of {', '.join(flag.choices)}")
        if flag.low is not None and flag.high is not None and value is not None and not flag.low <= value <= flag.high:
            raise InputError(f"{flag_of(name)} is {value}, expected {flag.low:g} to {flag.high:g}")
    if s.nesterov and s.momentum == 0:
        raise InputError("--nesterov needs a --momentum above 0")
    if any(m < 1 for m in s.milestones) or list(s.milestones) != sorted(set(s.milestones)):
        raise InputError(
            f"--milestones are {' '.join(map(str, s.milestones))}, expected epochs in rising order, from 1"
        )
    for name, epoch in (("warmup_epochs", s.schedule(1.0).warmup_epochs), ("rewind_epoch", s.late_epoch)):
        if epoch > s.epochs:
            raise InputError(f"{flag_of(name)} is {epoch}, but a training has {s.epochs} epochs")
    if s.rewind == "late" and s.late_epoch >= min((*s.stops, s.epochs)):
        raise InputError(
            f"--rewind-epoch is {s.late_epoch}: nothing is left to train up to {min((*s.stops, s.epochs))}"
        )
    if list(s.stops) != sorted(set(s.stops)) or not all(1 <= e <= s.epochs for e in s.stops):
        stops = " ".join(map(str, s.stops))
        raise InputError(f"--prune-epochs are {stops}, expected rising epochs from 1 to {s.epochs}")
    if list(s.sparsities) != sorted(set(s.sparsities)) or not all(0 < x < 1 for x in s.sparsities):
        raise InputError("--sparsities are rising fractions above 0 and below 1")
    for name in ("lr_find", "lr_eval"):
        rates = getattr(s, name)
        if any(not 0 < r < float("inf") for r in rates):
            raise InputError(f"{flag_of(name)} needs rates above 0")
        if len({f"{r:g}" for r in rates}) < len(rates):
            raise InputError(f"{flag_of(name)} names a rate twice (to six digits)")
    return s


PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores: every part of the machinery once, on ten classes and a network of an eighth the width.
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
    # The real data set and network on one GPU: 12 rounds to 0.8^30 of the weights, a tenth of the epochs, 3 seeds.
    "quick": {"seeds": 3, "rounds": 12, "fraction": 1 - 0.8 ** (30 / 12), "epochs": 11},
    "paper": {},
}


def preset(protocol: Settings, name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Settings:
    """The protocol under a preset. changes: what a figure changes of the presets. InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return protocol.override(**(PRESETS[name] | dict((changes or {}).get(name, {}))))
