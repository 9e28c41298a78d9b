"""Frozen records that describe nodes: data, model, training, pruning; and their keys.

The key of a node is the hash of all its semantic fields, its parents' keys and SEMANTICS. What cannot change a result
(paths, workers, loader, device, versions) is not a field; the store records it as provenance.
"""

# Standard library only: `--plan` imports this module and must start without torch.

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from fastprune.errors import InputError

SEMANTICS = 3
"""Version of the meaning of the fields, and of what training and pruning compute from them. Part of every key."""
# Raising it makes every stored result unusable, so it is raised once per change of meaning, never for a refactoring.

PRECISIONS = ("fp32", "bf16", "fp16")

COMPUTES = ("auto", "dense", "sparse", "plain")
ALLOCATIONS = ("global", "local")
DECAYS = ("multistep", "cosine", "exponential")
WARMUPS = ("linear", "constant")
OPTIMIZERS = ("sgd", "adamw", "rmsprop")


class Record:
    """A frozen dataclass of plain values and records."""

    def identity(self) -> dict[str, Any]:
        """The values that its key hashes, as JSON types."""
        # All fields, not only those that differ from a default: a changed default must change the key.
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    # A node enters by its key, so that a key stands for the whole history of prune steps and runs before it.
    if isinstance(value, Node):
        return value.key
    if isinstance(value, Record):
        return value.identity()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class ModelSpec(Record):
    """A torchvision ResNet.

    name: "resnet18", "resnet34" or "resnet50". stem: "imagenet" (7x7 conv of stride 2, max-pool) or "cifar" (3x3 conv,
    no pooling). width: channels of the first stage, 64 in the original.
    """

    name: str
    classes: int
    stem: str = "imagenet"
    width: int = 64


@dataclass(frozen=True)
class DataSpec(Record):
    """A data set, or the first `classes` classes of it and the first images of each class.

    fingerprint: hash of the ordered labels and decoded pixels of the whole set. train_per_class, val_per_class: images
    used of each class; None: all. train_count, val_count: images of the subset.
    """

    name: str
    fingerprint: str
    classes: int
    train_per_class: int | None
    val_per_class: int | None
    train_count: int
    val_count: int

    def identity(self) -> dict[str, Any]:
        # Counts follow from the other fields, and the name is what a user calls the folder.
        return {
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "train_per_class": self.train_per_class,
            "val_per_class": self.val_per_class,
        }


@dataclass(frozen=True)
class ScheduleSpec(Record):
    """Learning rate over `epochs`. It is constant within an epoch, except during a linear warmup.

    lr: the peak. decay: "multistep" (times gamma at each milestone), "cosine" (from lr to lr_min over the epochs after
    the warmup), or "exponential" (times gamma after each of these epochs). warmup: over `warmup_epochs`, "linear"
    (rises per batch from warmup_start * lr to lr) or "constant" (warmup_start * lr).
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
        """The learning rate in epoch `epoch`, counted from 0, after the fraction `progress` of it."""
        if epoch < self.warmup_epochs:
            risen = (epoch + progress) / self.warmup_epochs if self.warmup == "linear" else 0.0
            return self.lr * (self.warmup_start + (1.0 - self.warmup_start) * risen)
        after = epoch - self.warmup_epochs
        if self.decay == "cosine":
            # Loshchilov and Hutter, SGDR, equation 5, without restarts.
            share = after / (self.epochs - self.warmup_epochs)
            return self.lr_min + (self.lr - self.lr_min) * (1.0 + math.cos(math.pi * share)) / 2.0
        steps = after if self.decay == "exponential" else sum(epoch >= m for m in self.milestones)
        return float(self.lr * self.gamma**steps)

    def varies_within(self, epoch: int) -> bool:
        """Whether the rate changes from batch to batch in this epoch."""
        return epoch < self.warmup_epochs and self.warmup == "linear"


@dataclass(frozen=True)
class OptimizerSpec(Record):
    """An optimiser as torch.optim defines it. batch_size: images per step and rank.

    name: one of OPTIMIZERS; adamw with torch's betas and eps, rmsprop with the alpha of 0.9 and eps of 0.0316 of
    torchvision's reference script. momentum: of sgd and rmsprop. weight_decay: of all parameters that other_decays do
    not name: pairs of "norm" (the parameters of normalisation layers) or a parameter's name ("bias", "layer.bias") and
    the weight decay there; names go before "norm". clip_grad_norm: the largest norm of the whole gradient, or None.
    """

    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    label_smoothing: float = 0.0
    name: str = "sgd"
    other_decays: tuple[tuple[str, float], ...] = ()
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"unknown optimiser {self.name!r}: choose one of {', '.join(OPTIMIZERS)}")
        if self.nesterov and self.name != "sgd":
            raise ValueError(f"{self.name} has no Nesterov momentum")

    def identity(self) -> dict[str, Any]:
        # What the study never uses is hashed only where it is used, so that its keys are those of before there was it.
        # Each is neutral by default, and will be: a default that does something would need SEMANTICS.
        found = super().identity()
        neutral: dict[str, Any] = {"name": "sgd", "other_decays": [], "clip_grad_norm": None}
        return {name: value for name, value in found.items() if name not in neutral or value != neutral[name]}


@dataclass(frozen=True)
class EmaSpec:
    """An exponential moving average of weights and buffers. decay: of an update, one every `steps` steps of an epoch.

    In the epochs of the schedule's warmup the average is a copy, as in torchvision's reference script.
    """

    decay: float
    steps: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1 or self.steps < 1:
            raise ValueError(f"decay is {self.decay} and steps {self.steps}, expected [0, 1] and 1 or more")


@dataclass(frozen=True)
class GpuOptions:
    """Which of fastprune's own kernels a training step on a GPU uses in place of torch's. They differ by rounding.

    fused_norm: batch norm with the residual sum, ReLU and the stem's pooling (kernels/batch_norm.py), in the compiled
    network. gradient_table: SGD reads the gradients of prunable weights where autograd left them, without a flat copy,
    in fp32 and bf16, on one rank and without clipping. Their `.grad` is NaN then: a backward pass of your own needs
    `zero_grad(set_to_none=False)` before. fused_loss: cross-entropy of one class an image, and the sums of an epoch,
    in one kernel.
    """

    fused_norm: bool = False
    gradient_table: bool = False
    fused_loss: bool = False

    def __str__(self) -> str:
        """As --gpu-options takes it."""
        return ",".join(f"{name}={'on' if on else 'off'}" for name, on in asdict(self).items())

    @classmethod
    def of(cls, text: str) -> "GpuOptions":
        """The options that str() gave. ValueError for any other text; an option that it does not name is off."""
        return cls(**forced_options(text))


def forced_options(text: str) -> dict[str, bool]:
    """What a text forces, by option: nothing for "auto", all for "on" or "off", else as "fused_norm=on,fused_loss=off".

    ValueError for other text.
    """
    names = [f.name for f in fields(GpuOptions)]
    if text == "auto":
        return {}
    if text in ("on", "off"):
        return dict.fromkeys(names, text == "on")
    forced: dict[str, bool] = {}
    for part in text.split(","):
        name, _, state = part.strip().partition("=")
        if name not in names:
            raise ValueError(f"unknown GPU option {name!r}: choose from {', '.join(names)}, or auto, on, off for all")
        if state not in ("on", "off") or name in forced:
            raise ValueError(f"{text!r}: give each option once, as {name}=on or {name}=off")
        forced[name] = state == "on"
    return forced


def check_gpu_options(forced: Mapping[str, bool], device: str | None) -> None:
    """InputError where options are forced on for a CPU. device: None if it is not known."""
    if device == "cpu" and any(forced.values()):
        given = ",".join(f"{name}=on" for name, on in forced.items() if on)
        raise InputError(f"--gpu-options {given} requires a GPU, and this run is on the CPU: leave it out")


def key_of(kind: str, semantics: int, identity: dict[str, Any]) -> str:
    """The key of a node, from the description that node.json contains: 32 hex digits of its SHA-256."""
    described = {"kind": kind, "semantics": semantics, **identity}
    # sort_keys: the order in which fields are declared must not matter. 128 bits are enough to exclude collisions.
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


class Node(Record):
    """A record that the store can hold. Nodes of equal key are equal."""

    kind: str

    @cached_property
    def key(self) -> str:
        """Identifies the node in every store: 32 hex digits."""
        # With a stack of its own: a chain of hundreds of rounds is too deep for Python's.
        waiting: list[Node] = [self]
        while waiting:
            if missing := [parent for parent in waiting[-1].parents() if "key" not in vars(parent)]:
                waiting += missing
            else:
                node = waiting.pop()
                # Where cached_property looks, so that a key is computed once and not once per child.
                vars(node)["key"] = key_of(node.kind, SEMANTICS, node.identity())
        return str(vars(self)["key"])

    def parents(self) -> "Iterator[Runnable]":
        """The nodes that must be published before this one can be computed."""
        return iter(())

    # By key, because the equality of a dataclass would compare whole chains of rounds, field by field.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class Init(Node):
    """The initial weights that `seed` draws for `model`: a start point. Never stored, since they can be drawn again."""

    model: ModelSpec
    seed: int
    kind = "init"


@dataclass(frozen=True)
class StateRef(Record):
    """The state (weights, statistics, momentum) of the training run `node` after `epoch` epochs."""

    node: "Train"
    epoch: int


@dataclass(frozen=True)
class LprHistory(Record):
    """The LPR that a run would have if pruned at each epoch: before the first one and after each.

    fraction: of the weights that its mask keeps, pruned by global magnitude. Computed while the run trains.
    """

    node: "Train"
    fraction: float


@dataclass(frozen=True)
class Rewind(Record):
    """A start from trained weights and their batch-norm statistics.

    epoch: at which the schedule and the data order begin. momentum: whether momentum is restored; otherwise it is zero.
    """

    state: StateRef
    epoch: int
    # True for late rewinding, which continues a run; False for learning rate rewinding, which starts a new one.
    momentum: bool


@dataclass(frozen=True)
class Ratios(Record):
    """An allocation: each layer is pruned by its ratio in `mask`."""

    mask: "Prune"


@dataclass(frozen=True, eq=False)
class Train(Node):
    """A training run from `start`, stopped after epoch `stop` of its schedule.

    mask: None: dense; a `Prune`: weights are masked; a `ChannelSelection`: the network is smaller. seed: of data order
    and augmentation. precision: one of PRECISIONS.
    """

    data: DataSpec
    start: Init | Rewind
    mask: "Prune | ChannelSelection | None"
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    # Not schedule.epochs: pruning early (A6) stops a run without changing the schedule up to there.
    stop: int
    seed: int
    precision: str
    kind = "train"

    @property
    def model(self) -> ModelSpec:
        return self.start.model if isinstance(self.start, Init) else self.start.state.node.model

    @property
    def begin(self) -> int:
        """The epoch of the schedule at which training begins."""
        return 0 if isinstance(self.start, Init) else self.start.epoch

    @property
    def epochs(self) -> int:
        """The number of epochs that are trained."""
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
    """A user's criterion, as registered in `fastprune.pruning.criteria`. Its version is part of the key."""

    name: str
    version: int


@dataclass(frozen=True, eq=False)
class Prune(Node):
    """One prune step. Its result is a mask: `prior` (None: dense) without `fraction` of the weights that it keeps.

    Weights with the lowest scores are pruned. source: the state whose weights are scored. criterion: "magnitude",
    "random" (drawn anew in each round from `seed`), or a user's own. allocation: "global" (over all layers), "local"
    (the same fraction of each layer), or the ratios of another mask.
    """

    source: StateRef | Init
    prior: "Prune | None"
    fraction: float
    criterion: str | CriterionRef
    allocation: str | Ratios
    seed: int
    kind = "prune"

    @cached_property
    def round(self) -> int:
        """The prune round, from 1."""
        return 1 if self.prior is None else self.prior.round + 1

    @cached_property
    def density(self) -> float:
        """The share of weights that are kept, but for rounding to whole weights."""
        return (1 - self.fraction) * (1.0 if self.prior is None else self.prior.density)

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
    """The filters that a network keeps when `fraction` of them are removed, those with the lowest |gamma| first.

    gamma: the scale of the filter's batch norm. Channels joined by a residual connection are removed together and
    ranked by the sum of their |gamma| (section A.1).
    """

    source: StateRef
    fraction: float
    kind = "channels"

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
    """The states that the computation of `node` reads, and of each whether its momentum is read."""
    # Momentum is asked for only where it is used: states without it are half as large (bench/NOTES.md).
    if isinstance(node, Train):
        return [(node.start.state, node.start.momentum)] if isinstance(node.start, Rewind) else []
    if isinstance(node, ChannelSelection):
        return [(node.source, False)]
    return [(node.source, False)] if isinstance(node.source, StateRef) else []


def n_to_prune(remaining: int, fraction: float) -> int:
    """The number of weights that one round prunes: round(fraction * remaining), with halves rounded to even."""
    # One function, because the check before a run, the prune step and the check of its mask must agree exactly.
    return round(fraction * remaining)
