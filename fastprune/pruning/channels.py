"""Structured pruning: removes whole channels of any network, in place, with all weights that write or read them.

Channels that a network joins are removed together: those of two convs that a residual addition joins, of a depthwise
conv and the conv before it, and all norms on the way. torch-pruning's dependency graph (Fang et al., 2023) tells which
they are; only `_traced` imports it. Its rules for reshapes and unknown operations are heuristics. So every removal is
tried first, on a copy with random weights: there the smaller network must compute what the whole one computes with
zeros in all weights that go.

The paper's recipe is that of network slimming (Liu et al., 2017): one shot, ranked over the network by |gamma|.
"""

import copy
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastprune.pruning.coverage import Selecting, Selectors
from fastprune.pruning.layers import masked_layers
from fastprune.specs import n_to_prune

_FORMAT = 1  # of a selection's JSON

Example = Tensor | Sequence[Tensor] | int
"""What a model's forward takes: a tensor, several, or an int s for an RGB image [1, 3, s, s].

Moved to the model's device, floating-point ones to its dtype. Only shapes matter, and the values of integers.
"""


@dataclass(frozen=True)
class Member:
    """What one layer has of a group's channels.

    name: of the layer. side: "out" (it writes the channels), "in" (it reads them) or "both" (it keeps channels apart:
    norms and depthwise convs). size: number of channels on that side before pruning. entries: for each channel of the
    group, the indices that it has there. dim: None; of a bare parameter, the dimension of its channels.
    """

    name: str
    side: str
    size: int
    entries: tuple[tuple[int, ...], ...]
    dim: int | None = None


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together: channel i of the group is one output of each of `layers`, or several.

    layers: convs and linear layers that write the channels, in the model's order (in torchvision's ResNets a block's
    own come before its shortcut's). norms: batch norms with a gamma, likewise. channels: number of channels. members:
    the channels' place in every layer; (): channel i is output i of each layer and norm.

    A channel is several outputs of one layer where the network ties them: the two halves before a gated linear unit, or
    those at the same place in each group of a grouped conv or a GroupNorm, since these groups must stay equally large.
    """

    layers: tuple[str, ...]
    norms: tuple[str, ...]
    channels: int
    members: tuple[Member, ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """Name of the group: its first layer."""
        return self.layers[0]

    def outputs(self, name: str) -> Member:
        """The group's channels among the outputs of a layer or norm."""
        found = [m for m in self.members if m.name == name and m.side != "in"]
        return found[0] if found else Member(name, "out", self.channels, tuple((i,) for i in range(self.channels)))


@dataclass(frozen=True)
class Selection:
    """The channels that a network keeps.

    kept: by group name, in network order, the sorted indices of the kept channels, at least one. channels: by group
    name, the number of channels before pruning. spared: names of the groups that keep their best channel only because
    no group may lose all of its channels.
    """

    kept: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, int]
    spared: tuple[str, ...]

    def removed(self, name: str) -> list[int]:
        """Sorted indices of the removed channels of group `name`."""
        return sorted(set(range(self.channels[name])) - set(self.kept[name]))

    def check(self, groups: Sequence[Group]) -> None:
        """ValueError unless `groups` have the names and sizes of the groups that this was selected from."""
        if self.channels != {group.name: group.channels for group in groups}:
            raise ValueError("the selection belongs to another network: its groups of channels differ from this one's")

    def as_dict(self) -> dict[str, Any]:
        """The selection in lists, strings and integers, for JSON."""
        groups = [{"name": n, "channels": self.channels[n], "kept": list(kept)} for n, kept in self.kept.items()]
        return {"selection": _FORMAT, "groups": groups, "spared": list(self.spared)}

    @classmethod
    def from_dict(cls, content: Any) -> "Selection":
        """The inverse of `as_dict`. ValueError for any other content, of any type."""
        try:
            groups = [(g["name"], g["channels"], tuple(g["kept"])) for g in content["groups"]]
            found = cls(
                {n: kept for n, _, kept in groups}, {n: count for n, count, _ in groups}, tuple(content["spared"])
            )
            # The comparison refuses unknown keys, another format and duplicate groups (which the dicts above collapse).
            valid = found.as_dict() == content and all(_is_valid(*group) for group in groups)
            valid = valid and found.spared == tuple(n for n in found.kept if n in found.spared)
        except (KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(f"not a selection of channels in fastprune's format {_FORMAT}: write it by as_dict()")
        return found


def channel_groups(model: nn.Module, example_inputs: Example) -> tuple[Group, ...]:
    """The channel groups that can be removed, in network order; `remove_channels` reports why others cannot.

    Traces a copy of the model in eval mode, on the model's device (meta included). Changes neither `model`, its mode
    nor torch's generators. ValueError for masked layers, parameters that are not initialised, and a network that
    torch-pruning cannot trace; errors of the model's forward are passed on.
    """
    return _analysed(model, _inputs(model, example_inputs))[0]


def gamma_scores(groups: Sequence[Group], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By group name, the sum of |gamma| over the group's batch norms, not normalised: float64 [channels] on the CPU.

    state: a state dict. NaN and inf are passed on, `select` refuses them. ValueError for a group without batch norm,
    and for a state of another network.
    """
    if bare := [group.name for group in groups if not group.norms]:
        raise ValueError(f"{_listed(bare)} has no batch norm: its filters cannot be ranked by gamma")
    scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for norm in group.norms:
            member = group.outputs(norm)
            gamma = state.get(f"{norm}.weight")
            if gamma is None or gamma.shape != (member.size,):
                raise ValueError(f"the state has no {norm}.weight of {member.size} channels: is it another network's?")
            # float64, because rounding in a float32 sum can tie two channels, or swap them.
            _add(total, member, gamma.detach().to("cpu", torch.float64).abs())
        scores[group.name] = total
    return scores


def filter_scores(groups: Sequence[Group], model: nn.Module, p: int) -> dict[str, Tensor]:
    """By group name, the l1 or l2 norm (p = 1 or 2) of each channel's filters: float64 [channels] on the CPU.

    A channel's filters are the weights that write it, those of all `layers` of its group together: the kernels of its
    outputs in convs (transposed and depthwise ones included), the rows of its outputs in linear layers. Biases, norms,
    embeddings and the weights that read the channel do not count. p = 1 is the score of Li et al. (2017), Pruning
    Filters for Efficient ConvNets, summed over the group.
    """
    scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for name in group.layers:
            layer = model.get_submodule(name)
            weight = layer.weight.detach().to("cpu", torch.float64)  # type: ignore[operator]
            _add(total, group.outputs(name), _by_output(layer, weight.abs() if p == 1 else weight.square()))
        scores[group.name] = total if p == 1 else total.sqrt()
    return scores


def _add(total: Tensor, member: Member, values: Tensor) -> None:
    """Adds to each channel's total the values of its entries."""
    of = [channel for channel, entries in enumerate(member.entries) for _ in entries]
    total.index_add_(0, torch.tensor(of), values[[i for entries in member.entries for i in entries]])


def _by_output(layer: nn.Module, values: Tensor) -> Tensor:
    """The sum of the values, of the weight's shape, that belong to each output of a conv or linear layer."""
    if isinstance(layer, _ConvNd) and layer.transposed:  # [in, out / groups, ...]
        blocks = values.reshape(layer.groups, layer.in_channels // layer.groups, *values.shape[1:])
        return blocks.transpose(1, 2).reshape(layer.out_channels, -1).sum(1)
    return values.flatten(1).sum(1)


def select(groups: Sequence[Group], scores: Mapping[str, Tensor], fraction: float) -> Selection:
    """Removes exactly round(fraction x channels) channels, those with the lowest scores over all groups together.

    A channel of a group counts once, however many convs it joins. Ties are broken by position: group order, then index.
    Each group keeps its channel of highest score (the first of equals); the next in rank is removed instead.

    scores: by group name, [channels]. ValueError if fraction is outside [0, 1] or exceeds what can be removed, if the
    scores do not fit the groups, or if a score is NaN or inf.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 1]")
    sizes = {group.name: group.channels for group in groups}
    if {name: s.numel() for name, s in scores.items()} != sizes:
        raise ValueError("the scores belong to another network: its groups of channels differ from this one's")
    for name in sizes:
        # A network that diverged has no ranking: a sort would put NaN somewhere and select arbitrary channels.
        if not scores[name].isfinite().all():
            raise ValueError(f"{name} has scores that are not finite: did the network diverge?")
    total = sum(sizes.values())
    n_removed = n_to_prune(total, fraction)
    if n_removed > total - len(sizes):
        raise ValueError(f"cannot remove {n_removed} of {total} channels: each of the {len(sizes)} groups keeps one")
    ranked = torch.cat([scores[name].flatten() for name in sizes])
    best = torch.cat([_first_maximum(scores[name]) for name in sizes])
    # Stable: ties keep their order by position, the same on every machine.
    order = ranked.sort(stable=True).indices
    # `lowest` ranks without the rule that each group keeps its best channel: it tells which groups that rule spared.
    lowest, keep = torch.ones(2, total, dtype=torch.bool)
    lowest[order[:n_removed]] = False
    keep[order[~best[order]][:n_removed]] = False
    counts = list(sizes.values())
    kept = {n: tuple(k.nonzero().flatten().tolist()) for n, k in zip(sizes, keep.split(counts), strict=True)}
    spared = tuple(n for n, k in zip(sizes, lowest.split(counts), strict=True) if not k.any())
    return Selection(kept, sizes, spared)


def remove(model: nn.Module, selection: Selection, example_inputs: Example) -> nn.Module:
    """Removes the channels that the selection does not keep from `model`, in place, and returns the model.

    The layers that write, carry and read the channels shrink, norms with their statistics. Names, modules, mode,
    devices, requires_grad and channels-last stay. Gradients become None, and parameters that shrink are new objects:
    create optimisers and flat buffers afterwards. In eval mode the smaller network computes what the full one computes
    with zeros in all weights that go; where those channels have batch norms and ReLUs, as with gamma = beta = 0.

    The removal is tried on copies first, in float32 or the model's dtype if that is wider. On the meta device only
    shapes can be checked. ValueError if the selection does not fit the network, or if the forward mixes these channels
    in a way that torch-pruning does not see; the network then is unchanged.
    """
    inputs = _inputs(model, example_inputs)
    groups, _ = _analysed(model, inputs)
    # Before anything is removed: a selection that does not fit must leave the model as it is.
    selection.check(groups)
    _try(model, groups, selection, inputs)
    return _cut(model, _removed(groups, selection))


def kept_filters(selection: Selection, groups: Sequence[Group]) -> dict[str, int]:
    """By layer, the number of kept filters, group by group. ValueError if the selection does not fit the groups."""
    selection.check(groups)
    count: Counter[str] = Counter()
    for group in groups:
        for name in group.layers:
            entries = group.outputs(name).entries
            count[name] += sum(len(entries[channel]) for channel in selection.kept[group.name])
    return dict(count)


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    parameters: number of parameters. flops: FLOPs of one forward pass, a multiply-add counted as two; convs and matrix
    products only, as torch.utils.flop_counter counts them.
    """

    parameters: int
    flops: int


def cost(model: nn.Module, example_inputs: Example) -> Cost:
    """Parameters and FLOPs of the network in eval mode, by one forward pass on its own device (meta included)."""
    inputs = _inputs(model, example_inputs)
    with _evaluating(model), _undisturbed(inputs), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


Score = str | Callable[[Group], Tensor] | Mapping[str, Tensor]
"""Which channels go first, those of lowest score: "gamma", "l1", "l2", a function from a group to a tensor [channels],
or such tensors by group name."""


@dataclass(frozen=True)
class Removal:
    """What `remove_channels` did. selection: the kept channels by group. groups: those of the network before.

    left: by name, each conv and linear layer that keeps its outputs whatever their score, and why. before, after: cost
    of the network, FLOPs for a forward pass of the example.
    """

    selection: Selection
    groups: tuple[Group, ...]
    left: Mapping[str, str]
    before: Cost
    after: Cost

    def __str__(self) -> str:
        """A table of the groups: name, channels, kept, layers; then what was left, parameters and FLOPs."""
        rows = [("group", "channels", "kept", "layers")]
        for group in self.groups:
            kept = len(self.selection.kept[group.name])
            rows.append((group.name, f"{group.channels:,}", f"{kept:,}", _listed(group.layers)))
        channels, kept = sum(self.selection.channels.values()), sum(map(len, self.selection.kept.values()))
        rows.append(("total", f"{channels:,}", f"{kept:,}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{n.ljust(widths[0])}  {c.rjust(widths[1])}  {k.rjust(widths[2])}  {ls}".rstrip() for n, c, k, ls in rows
        ]
        lines += [f"left: {names}" for names in _reasons(self.left)]
        for what in ("parameters", "flops"):
            before, after = getattr(self.before, what), getattr(self.after, what)
            lines.append(f"{what}: {before:,} -> {after:,} ({after / max(before, 1):.4f})")
        return "\n".join(lines)


def remove_channels(
    model: nn.Module,
    example_inputs: Example,
    fraction: float,
    *,
    score: Score = "gamma",
    include: Selectors | None = None,
    exclude: Selectors | None = None,
) -> Removal:
    """Removes round(fraction x channels) channels of any network, those of lowest score, in place; see `remove`.

    Channels that the network joins are one channel of one group (see `Group`). All groups are ranked together, ties by
    position, and each keeps its best channel. Layers keep all outputs that are outputs of the model, are joined with
    its inputs, or meet a layer that cannot lose channels one by one (attention, recurrent layers, shared weights): the
    report names them. The fraction is of the channels of the other groups. Traces in eval mode: a layer that only
    training calls is not seen.

    example_inputs: what the forward takes, for tracing; see `Example`. score: "gamma" sums |gamma| over a group's batch
    norms (Liu et al., 2017), "l1" and "l2" are norms of the filters that write the channel (Li et al., 2017; see
    `filter_scores`), or your own; see `Score`. include, exclude: layers by pattern of names, module or predicate, as a
    Pruner selects their weights. A group may lose channels if all its layers are included and none is excluded.

    A call that fails leaves the model unchanged. ValueError for masked layers, a selector that selects nothing, scores
    that do not fit, a group without batch norm under "gamma", no group that may lose channels, more channels than can
    go, and a forward that mixes channels in a way that torch-pruning does not see: exclude the layers that it names.
    """
    inputs = _inputs(model, example_inputs)
    every, left = _analysed(model, inputs)
    unselected = _unselected(model, every, include, exclude)
    left |= unselected
    groups = [group for group in every if group.name not in unselected]
    if not groups:
        raise ValueError(f"no channels can be removed: {'; '.join(_reasons(left)) or 'no conv or linear layer'}")
    chosen = select(groups, _scores(model, groups, score), fraction)
    kept = {group.name: chosen.kept.get(group.name, tuple(range(group.channels))) for group in every}
    selection = Selection(kept, {group.name: group.channels for group in every}, chosen.spared)
    _try(model, every, selection, inputs)
    removed = _removed(every, selection)
    with torch.inference_mode(False):
        # Whatever may fail is done on a copy first.
        small = copy.deepcopy(model)
        before = cost(small, inputs)
        after = cost(_cut(small, removed), inputs)
    _cut(model, removed)
    return Removal(selection, every, {name: left[name] for name, _ in _layers(model) if name in left}, before, after)


def _scores(model: nn.Module, groups: Sequence[Group], score: Score) -> dict[str, Tensor]:
    """By group name, the scores: float64 [channels] on the CPU."""
    if score == "gamma":
        return gamma_scores(groups, model.state_dict())
    if score in ("l1", "l2"):
        return filter_scores(groups, model, 1 if score == "l1" else 2)
    if callable(score):
        found = {group.name: score(group) for group in groups}
    elif isinstance(score, Mapping):
        if missing := [group.name for group in groups if group.name not in score]:
            raise ValueError(f"score has no tensor for the group {missing[0]}")
        found = {group.name: score[group.name] for group in groups}
    else:
        raise ValueError(f"unknown score {score!r}: give gamma, l1, l2, a function, or tensors by group name")
    for group in groups:
        tensor = found[group.name]
        if not isinstance(tensor, Tensor) or tensor.shape != (group.channels,):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"the score of {group.name} is {shape}, expected a tensor of shape ({group.channels},)")
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in found.items()}


def _unselected(
    model: nn.Module, groups: Sequence[Group], include: Selectors | None, exclude: Selectors | None
) -> dict[str, str]:
    """By name, the layers of the groups that `include` and `exclude` leave, and why."""
    chosen, barred = Selecting(model, include), Selecting(model, exclude)
    why: dict[str, str] = {}
    for name, layer in _layers(model):
        names, weight = [f"{name}.weight" if name else "weight"], layer._parameters.get("weight")
        if include is not None and not chosen.has(names, weight):
            why[name] = "not included"
        if barred.has(names, weight):
            why[name] = "excluded"
    for selectors, argument in ((chosen, "include"), (barred, "exclude")):
        if unused := selectors.unused():
            raise ValueError(f"{argument} {unused} selects no conv or linear layer of the model")
    left: dict[str, str] = {}
    for group in groups:
        if named := [layer for layer in group.layers if layer in why]:
            left |= {layer: why.get(layer, f"joined with {named[0]}, {why[named[0]]}") for layer in group.layers}
    return left


def _reasons(left: Mapping[str, str]) -> list[str]:
    """The layers by reason, in words."""
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name or "the model")
    return [f"{_listed(of)} ({why})" for why, of in names.items()]


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of every conv and linear layer, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)]


def _inputs(model: nn.Module, example: Example) -> tuple[Tensor, ...]:
    """The example as the model takes it: copies on its device, floating-point ones in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise ValueError("the model has no parameters of floating point")
    example = torch.zeros(1, 3, example, example) if isinstance(example, int) else example
    tensors = (example,) if isinstance(example, Tensor) else tuple(example)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError("example_inputs must be a tensor or a tuple of tensors")
    # Copies, because tensors of inference mode cannot enter a graph.
    with torch.inference_mode(False):
        return tuple(t.detach().clone().to(like.device, like.dtype if t.is_floating_point() else None) for t in tensors)


@contextmanager
def _undisturbed(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a forward calls its layers one by one. torch's generators are restored on exit: two runs draw alike."""
    device = inputs[0].device
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            # In eval mode torch's transformer layers compute all in one operation, which hides their layers.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


# Which channels are joined


class _Pair(NamedTuple):
    """Channel idx of some tensor, which goes with channel root_idx of a group's first layer."""

    # The names that torch-pruning's index mappings read.
    idx: int
    root_idx: int


class _Key(NamedTuple):
    """One side of one layer, as in Member."""

    name: str
    side: str
    dim: int | None


class _Unsupported(Exception):  # noqa: N818
    """Why a layer cannot lose channels."""


@dataclass(frozen=True)
class _Side:
    """One side of a layer. side, size: as in Member. tensors: by name, the dimension of its channels. counts: the
    attributes that give their number. blocks: the channels are in so many equal blocks, which must lose the same ones.
    """

    side: str
    size: int
    tensors: Mapping[str, int]
    counts: tuple[str, ...]
    blocks: int = 1


def _side(layer: nn.Module, end: str) -> _Side | None:
    """The "out" or "in" side of a layer; None if it has no channels of its own. Raises _Unsupported."""
    kind = type(layer).__name__
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return None
    own = {name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    own -= {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    if isinstance(layer, _ConvNd | nn.Linear | _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm) and own:
        raise _Unsupported(f"a {kind} with a tensor {min(own)}")
    if is_parametrized(layer):
        raise _Unsupported(f"a {kind} whose tensors are computed from others")
    out = end != "in"
    if isinstance(layer, _ConvNd):
        n = layer.out_channels if out else layer.in_channels
        if layer.groups == layer.in_channels == layer.out_channels and n > 1:
            return _Side("both", n, {"weight": 0, "bias": 0}, ("in_channels", "out_channels", "groups"))
        if layer.groups == layer.out_channels > 1:  # torch-pruning takes it for a depthwise conv
            raise _Unsupported(f"a {kind} with several input channels and one filter in each group")
        dim = int(layer.transposed) if out else 1 - int(layer.transposed)
        return _Side(end, n, {"weight": dim} | ({"bias": 0} if out else {}), (f"{end}_channels",), layer.groups)
    if isinstance(layer, nn.Linear):
        if out:
            return _Side("out", layer.out_features, {"weight": 0, "bias": 0}, ("out_features",))
        return _Side("in", layer.in_features, {"weight": 1}, ("in_features",))
    if isinstance(layer, _NormBase):  # batch and instance norms
        tensors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        return _Side("both", layer.num_features, tensors, ("num_features",))
    if isinstance(layer, nn.GroupNorm):
        n, tensors = layer.num_channels, {"weight": 0, "bias": 0}
        if layer.num_groups == n:
            return _Side("both", n, tensors, ("num_channels", "num_groups"))
        return _Side("both", n, tensors, ("num_channels",), layer.num_groups)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm) and len(layer.normalized_shape) == 1:
        return _Side("both", layer.normalized_shape[0], {"weight": 0, "bias": 0}, ("normalized_shape",))
    if isinstance(layer, nn.PReLU):
        return _Side("both", layer.num_parameters, {"weight": 0}, ("num_parameters",))
    if isinstance(layer, nn.Embedding):
        return _Side("both", layer.embedding_dim, {"weight": 1}, ("embedding_dim",))
    raise _Unsupported(f"a {kind}")


def _resolved(network: nn.Module, key: _Key) -> tuple[nn.Module, _Side | None]:
    """The layer, or the owner of a bare parameter, and its side. Raises _Unsupported."""
    if key.dim is not None:
        owner, _, name = key.name.rpartition(".")
        layer = network.get_submodule(owner)
        return layer, _Side("both", getattr(layer, name).shape[key.dim], {name: key.dim}, ())
    layer = network.get_submodule(key.name)
    try:
        return layer, _side(layer, key.side)
    except _Unsupported as why:
        raise _Unsupported(f"{key.name}, {why}") from None


class _Entry(nn.Module):
    """An input of the network, as a layer: without one, torch-pruning would not see what is joined with it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_() * 1


class _EntryPruner:
    """What torch-pruning asks of a layer's pruner, for tracing."""

    def prune_out_channels(self, layer: _Entry, idxs: list[int]) -> None:
        raise AssertionError("nothing is pruned by torch-pruning")

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: _Entry) -> int:
        return layer.channels

    get_in_channels = get_out_channels


class _Network(nn.Module):
    """The network behind its inputs."""

    def __init__(self, network: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.network = network
        self.entries = nn.ModuleList(_Entry(x.shape[1] if x.dim() > 1 else x.numel()) for x in inputs)

    def forward(self, *inputs: Tensor) -> Any:
        # Integers have no gradient: what is computed from them begins at an embedding.
        entries = zip(self.entries, inputs, strict=True)
        return self.network(*(entry(x) if x.is_floating_point() else x for entry, x in entries))


@dataclass(frozen=True)
class _Trace:
    """A traced copy of the network. graph: torch-pruning's DependencyGraph. outputs: autograd's nodes of the outputs.

    names, parameters: names by module, and by id of the parameter. shared: ids of parameters of several modules.
    widest: the largest size of a layer or output.
    """

    graph: Any
    network: nn.Module
    names: Mapping[nn.Module, str]
    parameters: Mapping[int, str]
    shared: frozenset[int]
    outputs: frozenset[Any]
    widest: int

    def place(self, node: Any, end: str) -> tuple[_Key, _Side] | None:
        """Where a node keeps its channels; None for an operation without any of its own. Raises _Unsupported."""
        layer, dim = node.module, None
        if isinstance(layer, nn.Parameter):
            name, dim = self.parameters[id(layer)], node.pruning_dim
            owner = self.network.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.RMSNorm):  # a layer that torch-pruning does not know
                layer, dim = owner, None
            elif type(owner).__module__.startswith("torch.nn."):
                raise _Unsupported(f"{self.names[owner]}, a {type(owner).__name__}")
            elif id(layer) in self.shared:
                raise _Unsupported(f"{name}, a parameter of several layers")
        if dim is None:
            if layer not in self.names:
                return None
            name = self.names[layer]
            if any(id(p) in self.shared for p in layer.parameters(recurse=False)):
                raise _Unsupported(f"{name}, which shares a parameter with another layer")
        side = _resolved(self.network, _Key(name, end, dim))[1]
        return None if side is None else (_Key(name, side.side, dim), side)


@contextmanager
def _traced(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[_Trace]:
    """The trace of a copy of the model in eval mode, emptied on exit."""
    import torch_pruning  # here, because only structured pruning needs it

    # A copy, because tracing sets eval mode, and a trace that fails leaves torch-pruning's forward hooks behind.
    network = copy.deepcopy(model)
    # torch-pruning follows autograd's graph: frozen layers would be missing from it.
    for p in network.parameters():
        p.requires_grad_(p.is_floating_point())
    owners = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    outputs: list[Tensor] = []

    def forward(traced: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        # Products, so that each output has a node of its own, and not that of the layer that computes it.
        outputs.extend(t * 1 for t in _tensors(traced(*inputs)) if t.grad_fn is not None)
        if not outputs:
            raise ValueError("no output of the model has a gradient: its channels cannot be traced")
        return outputs

    graph = torch_pruning.DependencyGraph()
    try:
        try:
            with warnings.catch_warnings():
                # It goes on with a channel count unknown, and what is wrong then is found by `_try`.
                warnings.filterwarnings("ignore", "Maximum recursive depth reached", UserWarning)
                graph.build_dependency(
                    _Network(network, inputs),
                    tuple(inputs),
                    forward_fn=forward,
                    customized_pruners={_Entry: _EntryPruner()},
                    verbose=False,
                )
        except Exception as error:
            if not outputs:  # the model's own error
                raise
            raise ValueError(f"torch-pruning cannot trace this network ({type(error).__name__}: {error})") from error
        shapes = [*(_widths(layer) for _, layer in _layers(network)), *(t.shape for t in outputs), (1,)]
        yield _Trace(
            graph,
            network,
            {module: name for name, module in network.named_modules()},
            {id(p): name for name, p in network.named_parameters()},
            frozenset(key for key, n in owners.items() if n > 1),
            frozenset(t.grad_fn for t in outputs),
            max(n for shape in shapes for n in shape),
        )
    finally:
        # Its nodes refer to each other, so only Python's garbage collector would free the network. That runs seldom: it
        # counts objects, not bytes (bench/NOTES.md, memory of a warm worker).
        for node in getattr(graph, "module2node", {}).values():
            vars(node).clear()
        vars(graph).clear()


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in what a model returns. ValueError for objects that could hide some."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for part in output for t in _tensors(part)]
    if output is None or isinstance(output, int | float | str):
        return []
    raise ValueError(f"the model returns a {type(output).__name__}: only tensors in tuples, lists and dicts are known")


def _analysed(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """(groups, left): the groups that can be removed, and by layer, why others cannot."""
    if masked := [name.removesuffix("weight").rstrip(".") for name in masked_layers(model)]:
        raise ValueError(f"{masked[0]} is a masked layer: turn masked layers into plain ones first (plain_layers)")
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{name} is not initialised yet: pass a batch through the model first")
    with torch.inference_mode(False), _undisturbed(inputs), _traced(model, inputs) as trace:
        return _groups(trace)


def _groups(trace: _Trace) -> tuple[tuple[Group, ...], dict[str, str]]:
    groups: list[Group] = []
    left: dict[str, str] = {}
    visited: set[str] = set()  # of a layer that joins a group with some of its outputs, the others stay
    # In the model's order and not that of torch-pruning's traversal, because ties in `select` depend on it.
    for name, layer in _layers(trace.network):
        if name in visited:
            continue
        if layer not in trace.graph.module2node:
            left[name] = "the forward does not call it in eval mode"
            continue
        group, joined, why = _group(trace, layer)
        visited |= {name, *joined}
        if group is None:
            left |= dict.fromkeys((name, *joined), why)
        else:
            groups.append(group)
    # A layer in two groups has been visited from both: torch-pruning's relation is not symmetric there.
    count = Counter((m.name, m.side, i) for g in groups for m in g.members for e in m.entries for i in e)
    twice = {name for (name, _, _), n in count.items() if n > 1}
    for group in list(groups):
        if partial := [m.name for m in group.members if m.name in twice]:
            groups.remove(group)
            left |= dict.fromkeys(group.layers, f"meets {partial[0]}, whose channels are joined in part only")
    return tuple(groups), left


def _group(trace: _Trace, root: nn.Module) -> tuple[Group | None, list[str], str]:
    """(group, layers, why): the group of `root`'s outputs, or None and why they must stay; all layers that write it."""
    joined = _Joined(trace, root)
    channel = {i: number for number, i in enumerate(sorted({joined.first(i) for i in range(joined.width)}))}
    members = []
    for key, (size, at) in joined.places.items():
        entries: list[list[int]] = [[] for _ in channel]
        for idx, i in sorted(at.items()):
            entries[channel[joined.first(i)]].append(idx)
        # All channels are alike, so that a group that keeps one leaves no layer empty.
        if not all(entries):
            joined.reasons.add((3, f"meets {key.name}, which has a part of the channels"))
        members.append(Member(key.name, key.side, size, tuple(map(tuple, entries)), key.dim))
    order = {name: position for position, name in enumerate(trace.names.values())}
    members.sort(key=lambda m: (order.get(m.name, len(order)), m.name, m.side))
    writing = {m.name: trace.network.get_submodule(m.name) for m in members if m.side != "in" and m.dim is None}
    layers = [name for name, layer in writing.items() if isinstance(layer, _ConvNd | nn.Linear)]
    norms = [name for name, layer in writing.items() if isinstance(layer, _BatchNorm) and layer.affine]
    if joined.reasons:
        return None, layers, min(joined.reasons)[1]
    return Group(tuple(layers), tuple(norms), len(channel), tuple(members)), layers, ""


class _Joined:
    """Where the outputs of a conv or linear layer arrive, over torch-pruning's dependencies.

    width: number of outputs. places: by layer and side, its size, and by index there, an output that arrives. first:
    the first of the outputs that an output is tied to, because they arrive at the same place. reasons: why the outputs
    must stay, with a rank; the smallest is the one to give.
    """

    # Not by torch-pruning's get_pruning_group: where several outputs arrive at one place, that forgets all but one, and
    # it does not know that the blocks of a GroupNorm must stay equal.
    def __init__(self, trace: _Trace, root: nn.Module) -> None:
        self.width = _widths(root)[0]
        self.places: dict[_Key, tuple[int, dict[int, int]]] = {}
        self.reasons: set[tuple[int, str]] = set()
        self._parent = list(range(self.width))
        graph = trace.graph
        seen: dict[tuple[Any, Any], dict[int, int]] = {}
        start = graph.get_pruner_of_module(root).prune_out_channels
        stack = [(graph.module2node[root], start, [_Pair(i, i) for i in range(self.width)])]
        while stack:
            node, prune, pairs = stack.pop()
            end = "out" if graph.is_out_channel_pruning_fn(prune) else "in"
            place = None
            try:
                place = trace.place(node, end)
            except _Unsupported as why:
                self.reasons.add((2, f"meets {why}"))
            size, blocks = (trace.widest, 1) if place is None else (place[1].size, place[1].blocks)
            if place is not None and (size == 1) != (self.width == 1):  # broadcast over the channels, not one of them
                continue
            # torch-pruning follows wrong reshapes round and round, to ever larger indices.
            if any(p.root_idx is None or p.idx >= size for p in pairs):
                self.reasons.add(
                    (3, f"meets {place[0].name if place else 'a reshape'}, whose channels do not correspond")
                )
                continue
            at = seen.setdefault((node, prune), {})
            fresh = self._arrive(at, pairs, size // blocks, blocks)
            if not fresh:
                continue
            if place is not None:
                self.places[place[0]] = size, at
            if end == "out" and node.grad_fn in trace.outputs:
                self.reasons.add((0, "an output of the model"))
            if isinstance(node.module, _Entry):
                self.reasons.add((1, "joined with an input of the model"))
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(prune):
                    continue
                mapped = fresh
                try:
                    for mapping in dependency.index_mapping:
                        mapped = mapped if mapping is None else mapping(mapped)
                except IndexError:  # its offsets of a split or concatenation are incomplete
                    self.reasons.add((3, "split or concatenated in a way that torch-pruning does not know"))
                    continue
                stack.append((dependency.target, dependency.handler, mapped))

    def _arrive(self, at: dict[int, int], pairs: Sequence[Any], block: int, blocks: int) -> list[_Pair]:
        """Adds the pairs to `at`, ties outputs that are there already, and returns the new pairs."""
        fresh = []
        for idx, i in pairs:
            # In equal blocks, an output that arrives in one goes with those at the same place in the others.
            for k in range(idx % block, block * blocks, block) if blocks > 1 else (idx,):
                if k in at:
                    self._tie(at[k], i)
                else:
                    at[k] = i
                    fresh.append(_Pair(k, i))
        return fresh

    def _tie(self, i: int, j: int) -> None:
        a, b = self.first(i), self.first(j)
        self._parent[max(a, b)] = min(a, b)

    def first(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i


def _widths(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a conv or linear layer."""
    if isinstance(layer, _ConvNd):
        return layer.out_channels, layer.in_channels
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


# Cutting


def _removed(groups: Sequence[Group], selection: Selection) -> dict[_Key, set[int]]:
    """By layer and side, the indices that go."""
    found: dict[_Key, set[int]] = {}
    for group in groups:
        gone = selection.removed(group.name)
        for m in group.members if gone else ():
            found.setdefault(_Key(m.name, m.side, m.dim), set()).update(i for c in gone for i in m.entries[c])
    return found


def _slices(model: nn.Module, removed: Mapping[_Key, set[int]]) -> Iterator[tuple[nn.Module, str, int, list[int]]]:
    """(layer, tensor, dim, indices): what goes of each tensor of each layer."""
    for key, gone in removed.items():
        layer, side = _resolved(model, key)
        assert side is not None
        for name, dim in side.tensors.items():
            if (tensor := getattr(layer, name, None)) is not None:
                # The weight of a grouped conv has the channels of one block.
                yield layer, name, dim, sorted({i % tensor.shape[dim] for i in gone})


@torch.inference_mode(False)
@torch.no_grad()
def _cut(model: nn.Module, removed: Mapping[_Key, set[int]]) -> nn.Module:
    """Removes the indices from the model's layers, in place, and returns the model."""
    formats = {p.dim(): form for p in model.parameters() if (form := _memory_format(p)) is not None}
    # All tensors are made before the first is replaced: if memory runs out, the model is still whole.
    smaller: dict[tuple[nn.Module, str], Tensor] = {}
    for layer, name, dim, indices in _slices(model, removed):
        tensor = smaller.get((layer, name), getattr(layer, name))
        kept = sorted(set(range(tensor.shape[dim])) - set(indices))
        smaller[layer, name] = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
    model.zero_grad(set_to_none=True)
    for (layer, name), tensor in smaller.items():
        whole = getattr(layer, name)
        setattr(layer, name, nn.Parameter(tensor, whole.requires_grad) if isinstance(whole, nn.Parameter) else tensor)
    for key, gone in removed.items():
        layer, side = _resolved(model, key)
        assert side is not None
        for count in side.counts:
            n = getattr(layer, count)
            setattr(layer, count, (n[0] - len(gone),) if isinstance(n, tuple) else n - len(gone))
    for p in model.parameters():
        if p.dim() in formats:
            p.data = p.data.to(memory_format=formats[p.dim()])
    return model


def _memory_format(p: Tensor) -> torch.memory_format | None:
    """channels_last or channels_last_3d, if the tensor is in that format and not contiguous as well."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(p.dim())
    return form if form and p.is_contiguous(memory_format=form) and not p.is_contiguous() else None


# Trying


def _try(model: nn.Module, groups: Sequence[Group], selection: Selection, inputs: Sequence[Tensor]) -> None:
    """ValueError, naming the groups, unless the smaller network computes what it should. Changes nothing."""
    cut = [group for group in groups if selection.removed(group.name)]
    with torch.inference_mode(False), torch.no_grad():
        if not cut or (problem := _difference(model, _removed(cut, selection), inputs)) is None:
            return
        # One by one, so that the error names all that must be excluded.
        alone = [g.name for g in cut if _difference(model, _removed([g], selection), inputs) is not None]
    names = ", ".join(alone or [group.name for group in cut])
    raise ValueError(
        f"the forward mixes the channels of {names} in a way that torch-pruning does not see ({problem}): exclude them"
    )


def _difference(model: nn.Module, removed: Mapping[_Key, set[int]], inputs: Sequence[Tensor]) -> str | None:
    """What differs between the network without these indices and the whole one with zeros there; None: nothing."""
    whole = copy.deepcopy(model).eval()
    meta = inputs[0].is_meta
    if not meta:
        whole.to(dtype=torch.promote_types(next(t.dtype for t in _floating(model)), torch.float32))
        inputs = _randomise(whole, inputs)
    small = _cut(copy.deepcopy(whole), removed)
    for layer, tensor_name, dim, indices in () if meta else _slices(whole, removed):
        tensor = getattr(layer, tensor_name)
        tensor.index_fill_(dim, torch.tensor(indices, device=tensor.device), 0.0)
    try:
        expected, sizes = _outputs(whole, inputs)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"the model fails with random weights, so that no removal can be tried: {error}") from error
    if not meta and (odd := [name for name, t in expected if not t.isfinite().all()]):
        return f"{odd[0]} is not finite with random weights"
    try:
        found, _ = _outputs(small, inputs, sizes)
    except Exception as error:
        return f"without them it fails, {type(error).__name__}: {' '.join(str(error).split())}"
    if [name for name, _ in expected] != [name for name, _ in found]:
        return "without them it calls other layers"
    for (name, a), (_, b) in zip(expected, found, strict=True):
        gone = removed.get(_Key(name, "out", None), set()) | removed.get(_Key(name, "both", None), set())
        if gone:
            dim = _channel_dim(whole.get_submodule(name))
            a = a.index_select(dim, torch.tensor(sorted(set(range(a.shape[dim])) - gone), device=a.device))
        if a.shape != b.shape or not (meta or not a.is_floating_point() or _close(a, b)):
            return f"{name} differs"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    # Both sum the same products in another order. In float32 that changes a layer's output by about 1e-7 of its norm,
    # in TF32, where it tips roundings to 10 bits, by 4e-4; 600 layers add up to sqrt(600) x 4e-4 = 1e-2. One channel
    # of n in the wrong place changes it by sqrt(2 / n), more than 1e-2 up to n = 20,000.
    return bool((a - b).norm() <= 1e-2 * a.norm())


def _channel_dim(layer: nn.Module) -> int:
    return -1 - len(layer.kernel_size) if isinstance(layer, _ConvNd) else -1


def _randomise(network: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Writes random weights and statistics into the network; returns random inputs, integers as they are."""
    # The network's own could hide a difference: zeros in a pruned network, or gamma = 0 at initialisation.
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    for p in _floating(network):
        if p.dim() > 1:
            # Outputs are about as large as inputs.
            p.normal_(0.0, (p.shape[0] / max(p.numel(), 1)) ** 0.5, generator=generator)
        else:
            p.uniform_(0.5, 1.5, generator=generator)
    for norm in network.modules():
        if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    dtype = next(_floating(network)).dtype
    return [
        torch.empty_like(x, dtype=dtype).uniform_(generator=generator) if x.is_floating_point() else x for x in inputs
    ]


def _floating(network: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in network.parameters() if p.is_floating_point())


def _outputs(
    network: nn.Module, inputs: Sequence[Tensor], sizes: list[Tensor] | None = None
) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """(outputs, sizes): (layer, output) of each call of a conv or linear layer, and of the network; see _NormsApart."""
    found: list[tuple[str, Tensor]] = []
    hooks = [
        # Copies, because activations may work in place.
        layer.register_forward_hook(lambda _, __, out, of=name: found.extend((of, t.clone()) for t in _tensors(out)))
        for name, layer in _layers(network)
    ]
    with _undisturbed(inputs), _NormsApart(sizes) as norms:
        output = network(*inputs)
    for hook in hooks:
        hook.remove()
    return found + [("the output", t) for t in _tensors(output)], norms.used


class _NormsApart(TorchFunctionMode):
    """Inside, layer and group norms keep channels apart: they divide by one number, scale and shift.

    A norm over fewer channels has other statistics. That is meant, and would hide what is not. sizes: the numbers, one
    for each call of a norm; None: the root mean square of its input, which is appended to `used`.
    """

    def __init__(self, sizes: list[Tensor] | None) -> None:
        super().__init__()
        self.sizes = None if sizes is None else iter(sizes)
        self.used: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))  # always, for its checks of shapes
        if func not in (F.layer_norm, F.rms_norm, F.group_norm):
            return found
        given = signature(func).bind(*args, **(kwargs or {})).arguments
        x = given["input"]
        self.used.append(x.square().mean().sqrt() if self.sizes is None else next(self.sizes))
        shape = (-1, *[1] * (x.dim() - 2)) if func is F.group_norm else (-1,)
        weight, bias = (given.get(name) for name in ("weight", "bias"))
        x = x / self.used[-1]
        x = x if weight is None else x * weight.view(shape)
        return x if bias is None else x + bias.view(shape)


def _first_maximum(scores: Tensor) -> Tensor:
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[scores.argmax()] = True
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode restored on exit."""
    # By module: a model may train with some of its batch norms frozen in eval mode.
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _is_valid(name: Any, channels: Any, kept: tuple[Any, ...]) -> bool:
    # type(), not isinstance: True is an instance of int, and equal to 1 in the comparison of `from_dict`.
    ints = all(type(i) is int for i in (channels, *kept))
    return (
        isinstance(name, str) and ints and kept != () and list(kept) == sorted({i for i in kept if 0 <= i < channels})
    )


@dataclass(frozen=True)
class Latency:
    """How long a model's forward pass takes.

    ms: milliseconds, the median over rounds. relative: the median over rounds of its time over that of the first model
    in the same round; quartiles: the first and the third of these ratios. rounds: their number.
    """

    ms: float
    relative: float
    quartiles: tuple[float, float]
    rounds: int


def latency(
    models: Mapping[str, nn.Module],
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    *,
    repeats: int = 60,
    warmup: int = 3,
) -> dict[str, Latency]:
    """Times of the forward pass of a batch [batch_size, 3, image_size, image_size], by model name.

    Measures copies of the models on `device`: eval mode, channels-last, inference_mode, each model's own dtype (no
    autocast), eager (no compilation, no CUDA graph), torch's settings unchanged. All models get the same batch, which
    is on the device beforehand. Each model runs `warmup` times, then once in each of `repeats` rounds.
    Small batches make `relative` steady: in a short round, what slows down one model slows down the others, too.

    On CUDA the time is that between two events around the pass on an idle device: it includes the gaps where the host
    launches more slowly than the device computes. On a CPU it is wall-clock time. torch's generators are not advanced.
    ValueError for another kind of device, or fewer than one repeat.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency can be measured on cpu and cuda, not on {device.type}")
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, but latency needs at least one repeat")
    # Its own generator, so that a measurement between trainings does not change what they draw.
    images = torch.rand(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    ready: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, model in models.items():
        dtype = next(model.parameters()).dtype
        batch = images.to(device, dtype, memory_format=torch.channels_last)
        ready[name] = copy.deepcopy(model).eval().to(device).to(memory_format=torch.channels_last), batch
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with torch.inference_mode():
        for model, batch in ready.values():
            for _ in range(warmup):
                model(batch)
        # In turn, each round beginning with another model: a clock that changes or a busy neighbour affects all alike.
        for repeat in range(repeats):
            first = repeat % len(names) if names else 0
            for name in names[first:] + names[:first]:
                times[name].append(_milliseconds(*ready[name], device))
    found = {}
    for name, measured in times.items():
        # Within a round, not of the medians: a clock that changes over rounds then cancels.
        ratios = [time / whole for time, whole in zip(measured, times[names[0]], strict=True)]
        low, high = torch.tensor(ratios, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75]).double()).tolist()
        found[name] = Latency(statistics.median(measured), statistics.median(ratios), (low, high), repeats)
    return found


def _milliseconds(model: nn.Module, batch: Tensor, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        model(batch)
        return 1000.0 * (time.perf_counter() - start)
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # An idle device: else the first event would wait for earlier work, and hide the host's launches behind it.
    torch.cuda.synchronize(device)
    before.record(stream)
    model(batch)
    after.record(stream)
    torch.cuda.synchronize(device)
    return before.elapsed_time(after)
