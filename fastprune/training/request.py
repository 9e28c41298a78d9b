"""What one call of train.py asks for. Standard library only."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.files import MASK, SAVED, TENSORS, check_kind, file_kind
from fastprune.loaders.transforms import Augment
from fastprune.specs import EmaSpec, OptimizerSpec, ScheduleSpec

Plain = str | int | float | bool | list[str] | None

PRUNE_SCHEDULES = ("once", "geometric", "cubic")


@dataclass(frozen=True)
class PruneSchedule:
    """Pruning at the start of each epoch from `first` to `last`, counted from 0, until `sparsity`.

    name: "geometric" or "cubic", as in fastprune.pruning.schedules, from a dense network.
    """

    name: str
    sparsity: float
    first: int
    last: int


@dataclass(frozen=True)
class TrainRequest:
    """One call of train.py, its flags checked one by one.

    data: a folder, a .beton file of a prepared one, or "synthetic".  device: None for a GPU if there is one.
    train_crop, val_resize, val_crop: pixels, None where not asked for.  workers: None for what is useful.
    resume, mask, output, store: None where not given.  prune: conv, all or a pattern of names, None where not asked
    for.  sparsity: of the weights that `prune` covers together, in [0, 1), or None.  compute: one of COMPUTES.
    gpu_options: those that are forced on or off, by name.
    ema: its decay as given, see `adjusted_ema`.  mixup, cutmix: alphas, 0 for none.  augment: None for crops and flips.
    repeats: of --ra-sampler, 1 without.  prune_schedule: None to prune before training.  log: some of LOGS.
    flags, command, versions: all flags as plain values, the command line, and name -> version of what computes, for the
    checkpoint.
    """

    data: str
    model: str
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    weights: str | None = None
    device: str | None = None
    precision: str = "fp32"
    train_crop: int | None = None
    val_resize: int | None = None
    val_crop: int | None = None
    loader: str = "auto"
    workers: int | None = None
    store: Path | None = None
    seed: int = 0
    resume: Path | None = None
    start_epoch: int = 0
    sparsity: float | None = None
    prune: str | None = None
    mask: Path | None = None
    output: Path | None = None
    test_only: bool = False
    print_freq: int = 10
    deterministic: bool = False
    compute: str = "auto"
    gpu_options: Mapping[str, bool] = field(default_factory=dict)
    ema: EmaSpec | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: Augment | None = None
    repeats: int = 1
    prune_schedule: PruneSchedule | None = None
    log: tuple[str, ...] = ()
    flags: dict[str, Plain] = field(default_factory=dict)
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        """Where the run keeps its last good state, if anywhere."""
        return None if self.output is None else self.output / "checkpoint.pth"

    def adjusted_ema(self, world_size: int) -> EmaSpec | None:
        """The moving average with the reference's adjustment: a decay of its half-life in images, not in updates."""
        if self.ema is None:
            return None
        adjust = world_size * self.optimizer.batch_size * self.ema.steps / self.schedule.epochs
        return EmaSpec(1.0 - min(1.0, (1.0 - self.ema.decay) * adjust), self.ema.steps)


CHECKPOINT = "a checkpoint (checkpoint.pth) or a state dict", SAVED, TENSORS
"""What --resume takes, for files.check_kind."""


def check_paths(request: TrainRequest) -> None:
    """InputError where --resume or --mask is no such file, or where --output-dir cannot be made or written."""
    # By their beginnings: a mistake is told before data are read and a model is built. Readers check the rest.
    if (resume := request.resume) is not None:
        if not resume.exists():
            raise InputError(f"no such checkpoint: {resume}")
        if file_kind(resume) == MASK:
            raise InputError(f"{resume} is {MASK}: give it as --mask; --resume takes a checkpoint.pth")
        check_kind(resume, *CHECKPOINT)
    if (mask := request.mask) is not None:
        if not mask.exists():
            raise InputError(f"no such mask: {mask}")
        if file_kind(mask) == SAVED:
            raise InputError(f"{mask} is {SAVED}: give a checkpoint as --resume; --mask takes a mask.safetensors")
        check_kind(mask, "a mask (mask.safetensors)", MASK, TENSORS)
    if request.output is not None and not request.test_only:
        there = next(place for place in (request.output, *request.output.absolute().parents) if place.exists())
        if not there.is_dir():
            raise InputError(f"--output-dir {request.output}: {there} is a file: name a folder")
        if not os.access(there, os.W_OK):
            raise InputError(f"--output-dir {request.output}: {there} cannot be written: name another folder")


def prune_schedule_of(flags: Mapping[str, Any]) -> PruneSchedule | None:
    """The schedule of the flags of train.py, None where all is pruned at once."""
    name, sparsity, epochs = (flags.get(flag) for flag in ("prune_schedule", "sparsity", "epochs"))
    if name in (None, "once") or sparsity is None or epochs is None:
        return None
    first, last = flags.get("prune_start_epoch") or 0, flags.get("prune_end_epoch")
    return PruneSchedule(name, sparsity, first, max(first, epochs * 3 // 4) if last is None else last)


EMBEDDINGS = ("class_token", "position_embedding", "relative_position_bias_table")
"""Parameters to which --transformer-embedding-decay applies, as in the reference script."""


def other_decays(flags: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """OptimizerSpec.other_decays of the flags of train.py or of the reference script."""
    named = {
        "norm": "norm_weight_decay",
        "bias": "bias_weight_decay",
        **dict.fromkeys(EMBEDDINGS, "transformer_embedding_decay"),
    }
    given = {name: flags.get(flag) for name, flag in named.items()}
    return tuple((name, float(decay)) for name, decay in given.items() if decay is not None)
