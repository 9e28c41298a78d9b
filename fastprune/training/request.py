"""What one call of train.py asks for. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprune.specs import OptimizerSpec, ScheduleSpec

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class TrainRequest:
    """One call of train.py, its flags checked one by one.

    data: a folder, a .beton file of a prepared one, or "synthetic".  device: None for a GPU if there is one.
    train_crop, val_resize, val_crop: pixels, None where not asked for.  workers: None for what is useful.
    resume, mask, output, store: None where not given.  prune: conv, all or a pattern of names, None where not asked
    for.  sparsity: of the weights that `prune` covers together, in [0, 1), or None.  compute: one of COMPUTES.
    flags: all flags as plain values, for the checkpoint.
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
    flags: dict[str, Plain] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        """Where the run keeps its last good state, if anywhere."""
        return None if self.output is None else self.output / "checkpoint.pth"


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
