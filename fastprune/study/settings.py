"""What can be set about a figure: the paper's protocol, presets over it, the command line over both. Data, no logic.

Standard library only.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from fastprune.errors import InputError
from fastprune.specs import ALLOCATIONS, DECAYS, DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter of a figure. `fraction` is pruned of what remains in each round.

    rewind: where training restarts after a prune step. "init": the initial weights; "late": the dense run with LR_find
    after `rewind_epoch`, as it was then (weights, statistics, momentum, place in schedule and data order); "lr": the
    weights and statistics that were pruned, the schedule from its start, momentum zero; "finetune": the same, at the
    schedule's last rate throughout.

    milestones, warmup_epochs, rewind_epoch and prune_epochs are epochs of a run of `protocol_epochs`: a run of other
    length scales them, but not those given `by_hand`. image_size: a side of generated images, in pixels.
    """

    model: str
    stem: str
    width: int
    epochs: int
    milestones: tuple[int, ...]
    gamma: float
    protocol_epochs: int
    lr_find: tuple[float, ...]
    lr_eval: tuple[float, ...]
    dataset: str = "tiny-imagenet-200"
    seeds: int = 5
    rounds: int = 30
    fraction: float = 0.2
    batch_size: int = 512
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    decay: str = "multistep"
    warmup_epochs: int = 0
    allocation: str = "global"
    rewind: str = "init"
    rewind_epoch: int = 2
    prune_epochs: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = ()
    precision: str = "bf16"
    classes: int | None = None
    train_per_class: int | None = None
    val_per_class: int | None = None
    image_size: int = 64
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
                raise InputError(f"{_flag(name)} names nothing")
        by_hand = {*self.by_hand, *(changes.keys() & _IN_EPOCHS)}
        return check(replace(self, **changes, by_hand=tuple(sorted(by_hand))))


_IN_EPOCHS = {"milestones", "warmup_epochs", "rewind_epoch", "prune_epochs"}

REWINDS = ("init", "late", "lr", "finetune")

_BOUNDS: dict[str, tuple[float, float]] = {
    # Narrower networks crash CPU convolutions of some PyTorch versions in channels-last.
    "width": (4, 4096),
    "epochs": (1, 100_000),
    "seeds": (1, 1000),
    "rounds": (1, 1000),
    "batch_size": (1, 1 << 20),
    "classes": (2, 1 << 20),
    "train_per_class": (1, 1 << 30),
    "val_per_class": (1, 1 << 30),
    "warmup_epochs": (0, 100_000),
    "rewind_epoch": (1, 100_000),
    "image_size": (32, 512),
    "gamma": (1e-9, 1.0),
    "fraction": (1e-6, 1 - 1e-6),
    "momentum": (0.0, 0.999999),
    "weight_decay": (0.0, 1e6),
    "label_smoothing": (0.0, 0.999999),
}


def check(s: Settings) -> Settings:
    """InputError, one line, for settings that make no sense."""
    for name, (low, high) in _BOUNDS.items():
        value = getattr(s, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{_flag(name)} is {value}, expected {low:g} to {high:g}")
    if s.nesterov and s.momentum == 0:
        raise InputError("--nesterov needs a --momentum above 0")
    if any(m < 1 for m in s.milestones) or list(s.milestones) != sorted(set(s.milestones)):
        raise InputError(
            f"--milestones are {' '.join(map(str, s.milestones))}, expected epochs in rising order, from 1"
        )
    for name, known in (("allocation", ALLOCATIONS), ("rewind", REWINDS), ("decay", DECAYS)):
        if getattr(s, name) not in known:
            raise InputError(f"{_flag(name)} is {getattr(s, name)}, expected one of {', '.join(known)}")
    for name, epoch in (("warmup_epochs", s.schedule(1.0).warmup_epochs), ("rewind_epoch", s.late_epoch)):
        if epoch > s.epochs:
            raise InputError(f"{_flag(name)} is {epoch}, but a training has {s.epochs} epochs")
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
            raise InputError(f"{_flag(name)} needs rates above 0")
        if len({f"{r:g}" for r in rates}) < len(rates):
            raise InputError(f"{_flag(name)} names a rate twice (to six digits)")
    return s


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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


def preset(protocol: Settings, name: str, figure: dict[str, dict[str, Any]] | None = None) -> Settings:
    """The protocol under a preset; `figure`: what a figure changes of the presets. InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return protocol.override(**(PRESETS[name] | (figure or {}).get(name, {})))
