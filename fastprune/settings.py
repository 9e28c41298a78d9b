"""What can be set about a figure: the paper's protocol, presets over it, the command line over both. Data, no logic.

Standard library only.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from fastprune.errors import InputError
from fastprune.specs import DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec


@dataclass(frozen=True)
class Settings:
    """Every hyperparameter of a figure. Rates are per batch, `fraction` is pruned of what remains in each round.

    milestones are epochs of a run of `protocol_epochs`; a run of other length scales them (see `schedule`).
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
    seeds: int = 5
    rounds: int = 30
    fraction: float = 0.2
    batch_size: int = 512
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    warmup_epochs: int = 0
    precision: str = "bf16"
    classes: int | None = None
    train_per_class: int | None = None
    val_per_class: int | None = None

    def optimizer(self) -> OptimizerSpec:
        return OptimizerSpec(self.batch_size, self.momentum, self.weight_decay, self.nesterov, self.label_smoothing)

    def schedule(self, lr: float) -> ScheduleSpec:
        """The protocol's decay, its milestones at the same fractions of the run; those on epoch 0 are dropped."""
        scaled = (round(m * self.epochs / self.protocol_epochs) for m in self.milestones)
        return ScheduleSpec(lr, self.epochs, tuple(m for m in scaled if m > 0), self.gamma, self.warmup_epochs)

    def network(self, data: DataSpec) -> ModelSpec:
        return ModelSpec(self.model, data.classes, self.stem, self.width)

    def override(self, **changes: Any) -> "Settings":
        """These settings with what is not None changed; milestones given by hand are taken as they are."""
        changes = {k: v for k, v in changes.items() if v is not None}
        unknown = set(changes) - {f.name for f in fields(self)}
        if unknown:
            raise InputError(f"unknown settings: {', '.join(sorted(unknown))}")
        if "milestones" in changes:
            changes["protocol_epochs"] = changes.get("epochs", self.epochs)
        return check(replace(self, **changes))


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
    if s.warmup_epochs > s.epochs:
        raise InputError(f"--warmup-epochs is {s.warmup_epochs}, but a training has {s.epochs} epochs")
    for name in ("lr_find", "lr_eval"):
        rates = getattr(s, name)
        if not rates or any(not 0 < r < float("inf") for r in rates):
            raise InputError(f"{_flag(name)} needs one or more rates above 0")
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


def preset(protocol: Settings, name: str) -> Settings:
    """The protocol under a preset. InputError for an unknown one."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return protocol.override(**PRESETS[name])
