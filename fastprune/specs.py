"""What a run is: frozen records with a key. Standard library only, so that planning imports nothing heavy.

A record's key is the hash of all its semantic fields, of its parents' keys and of SEMANTICS. Whatever cannot change a
result (paths, workers, loader, device, versions) is no field here; the store keeps it as provenance.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

SEMANTICS = 2
"""Version of what the fields mean and of what training and pruning compute from them; part of every key."""

PRECISIONS = ("fp32", "bf16", "fp16")
ALLOCATIONS = ("global", "local")
DECAYS = ("multistep", "cosine", "exponential")
WARMUPS = ("linear", "constant")


class Record:
    """A frozen dataclass of plain values; `identity()` is what its key hashes."""

    def identity(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return value.key
    if isinstance(value, Record):
        return value.identity()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class ModelSpec(Record):
    """A torchvision ResNet. stem: "imagenet" (7x7 stride 2 and max-pool) or "small" (3x3, no pool); width: channels of
    the first stage, 64 in the original."""

    name: str
    classes: int
    stem: str = "imagenet"
    width: int = 64


@dataclass(frozen=True)
class DataSpec(Record):
    """Which images: `fingerprint` names labels and pixels of the whole set; the subset takes the first `classes`
    classes and the first images of each (None: all). Counts are those after the subset, for planning only."""

    name: str
    fingerprint: str
    classes: int
    train_per_class: int | None
    val_per_class: int | None
    train_count: int
    val_count: int

    def identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "train_per_class": self.train_per_class,
            "val_per_class": self.val_per_class,
        }


@dataclass(frozen=True)
class ScheduleSpec(Record):
    """Learning rate over `epochs`, the same within an epoch but for a linear warmup.

    decay: "multistep" (x gamma at each milestone), "cosine" (from lr to lr_min over the epochs after the warmup) or
    "exponential" (x gamma after each of them). warmup: "linear", rising batch by batch from warmup_start x lr to lr
    over `warmup_epochs`, or "constant", warmup_start x lr for as long.
    """

    lr: float
    epochs: int
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    decay: str = "multistep"
    lr_min: float = 0.0
    warmup: str = "linear"
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (("decay", self.decay, DECAYS), ("warmup", self.warmup, WARMUPS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")

    def lr_at(self, epoch: int, progress: float = 0.0) -> float:
        """The rate at fraction `progress` of `epoch` (both from 0)."""
        if epoch < self.warmup_epochs:
            risen = (epoch + progress) / self.warmup_epochs if self.warmup == "linear" else 0.0
            return self.lr * (self.warmup_start + (1.0 - self.warmup_start) * risen)
        after = epoch - self.warmup_epochs
        if self.decay == "cosine":
            share = after / (self.epochs - self.warmup_epochs)
            return self.lr_min + (self.lr - self.lr_min) * (1.0 + math.cos(math.pi * share)) / 2.0
        steps = after if self.decay == "exponential" else sum(epoch >= m for m in self.milestones)
        return float(self.lr * self.gamma**steps)

    def varies_within(self, epoch: int) -> bool:
        """Whether the rate changes from batch to batch of this epoch."""
        return epoch < self.warmup_epochs and self.warmup == "linear"


@dataclass(frozen=True)
class OptimizerSpec(Record):
    """SGD as torch.optim.SGD defines it; weight decay on all parameters."""

    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    label_smoothing: float = 0.0


def key_of(kind: str, semantics: int, identity: dict[str, Any]) -> str:
    """The key of a node that is so described, as node.json does it."""
    described = {"kind": kind, "semantics": semantics, **identity}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


class Node(Record):
    """A record that the store can hold. Equality and hash are by key."""

    kind: str

    @cached_property
    def key(self) -> str:
        """32 hex digits."""
        waiting: list[Node] = [self]  # a stack: a chain of hundreds of rounds is too deep for recursion
        while waiting:
            if missing := [parent for parent in waiting[-1].parents() if "key" not in vars(parent)]:
                waiting += missing
            else:
                node = waiting.pop()
                vars(node)["key"] = key_of(node.kind, SEMANTICS, node.identity())
        return str(vars(self)["key"])

    def parents(self) -> "Iterator[Runnable]":
        """The nodes that must exist before this one."""
        return iter(())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Init(Node):
    """The initial weights that `seed` draws for `model`: a start point, never stored."""

    model: ModelSpec
    seed: int
    kind = "init"


@dataclass(frozen=True)
class StateRef(Record):
    """The state of a training run after `epoch` epochs."""

    node: "Train"
    epoch: int


@dataclass(frozen=True)
class LprHistory(Record):
    """The LPR of a training run before its first epoch and after each, were it pruned there and then: `fraction` of
    what its mask keeps, by magnitude over all layers. Computed while it trains."""

    node: "Train"
    fraction: float


@dataclass(frozen=True)
class Rewind(Record):
    """A start from trained weights and their batch-norm statistics.

    epoch: where the schedule and the data order begin. momentum: whether that is restored as well (else zero).
    """

    state: StateRef
    epoch: int
    momentum: bool


@dataclass(frozen=True)
class Ratios(Record):
    """An allocation: each layer is pruned by the ratio that `mask` prunes of it."""

    mask: "Prune"


@dataclass(frozen=True, eq=False)
class Train(Node):
    """A training run from `start` under `mask` (None: dense), stopped after epoch `stop` of its schedule.

    A `ChannelSelection` makes a smaller network. seed: data order and augmentation. precision: one of PRECISIONS.
    """

    data: DataSpec
    start: Init | Rewind
    mask: "Prune | ChannelSelection | None"
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    stop: int
    seed: int
    precision: str
    kind = "train"

    @property
    def model(self) -> ModelSpec:
        return self.start.model if isinstance(self.start, Init) else self.start.state.node.model

    @property
    def begin(self) -> int:
        """Epochs of the schedule that lie before the start."""
        return 0 if isinstance(self.start, Init) else self.start.epoch

    @property
    def epochs(self) -> int:
        """How many are trained."""
        return self.stop - self.begin

    @property
    def final(self) -> StateRef:
        return StateRef(self, self.stop)

    def parents(self) -> "Iterator[Runnable]":
        if isinstance(self.start, Rewind):
            yield self.start.state.node
        if self.mask is not None:
            yield self.mask


@dataclass(frozen=True)
class CriterionRef(Record):
    """A criterion of the user's own, as `fastprune.pruning.criteria` has it registered."""

    name: str
    version: int


@dataclass(frozen=True, eq=False)
class Prune(Node):
    """A mask: `prior` (None: dense) less `fraction` of what it keeps, the lowest scores of `source` first.

    score: "magnitude" of the source's weights, "random", drawn from `seed` for each round anew, or a user's criterion.
    allocation: where the weights go: "global" over all layers, "local" (the same fraction of each layer), or as another
    mask's ratios.
    """

    source: StateRef | Init
    prior: "Prune | None"
    fraction: float
    score: str | CriterionRef
    allocation: str | Ratios
    seed: int
    kind = "prune"

    @cached_property
    def round(self) -> int:
        """1 for the first prune step."""
        return 1 if self.prior is None else self.prior.round + 1

    @property
    def model(self) -> ModelSpec:
        return self.source.model if isinstance(self.source, Init) else self.source.node.model

    def parents(self) -> "Iterator[Runnable]":
        if isinstance(self.source, StateRef):
            yield self.source.node
        if self.prior is not None:
            yield self.prior
        if isinstance(self.allocation, Ratios):
            yield self.allocation.mask


@dataclass(frozen=True, eq=False)
class ChannelSelection(Node):
    """Which filters of a network stay: `fraction` of them go, those with the lowest |gamma| of their batch norms
    first; channels that a residual joins go together, by the sum of their |gamma|."""

    source: StateRef
    fraction: float
    kind = "filters"

    @property
    def model(self) -> ModelSpec:
        return self.source.node.model

    @property
    def seed(self) -> int:
        return self.source.node.seed

    def parents(self) -> "Iterator[Runnable]":
        yield self.source.node


Runnable = Train | Prune | ChannelSelection


def states_read(node: Runnable) -> list[tuple[StateRef, bool]]:
    """The states that computing a node reads, and whether with momentum."""
    if isinstance(node, Train):
        return [(node.start.state, node.start.momentum)] if isinstance(node.start, Rewind) else []
    if isinstance(node, ChannelSelection):
        return [(node.source, False)]
    return [(node.source, False)] if isinstance(node.source, StateRef) else []


def n_to_prune(remaining: int, fraction: float) -> int:
    """round(fraction x remaining), the number that one round prunes; halves go to the even number, as Python rounds."""
    return round(fraction * remaining)
