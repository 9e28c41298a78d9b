"""Structured pruning in one shot: whole filters go, ranked over the network by |gamma| of their batch norms.

Channels that a residual addition joins live and die together, and their measures are summed. torch-pruning's
dependency graph finds what is joined and does the cutting; it is imported only when one of the two is asked for.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastprune.specs import n_to_prune

_FORMAT = 1


@dataclass(frozen=True)
class Group:
    """Channels that can only go together: output channel i of each of `convs`, and channel i of each of `norms`.

    convs, norms: module names in the model's order (a shortcut's stand behind the block's own). channels: how many
    output channels each of the convs has.
    """

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    channels: int

    @property
    def name(self) -> str:
        """The first conv."""
        return self.convs[0]


@dataclass(frozen=True)
class Selection:
    """What stays. By group name, in network order: `kept`, sorted indices of the channels that stay, at least one, and
    `channels`, how many there were. spared: groups that would have gone whole, had each not been left its best channel.
    """

    kept: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, int]
    spared: tuple[str, ...]

    def removed(self, name: str) -> list[int]:
        """Sorted indices of the channels of a group that go."""
        return sorted(set(range(self.channels[name])) - set(self.kept[name]))

    def check(self, groups: Sequence[Group]) -> None:
        """ValueError unless this was selected from groups of these names and sizes."""
        if self.channels != {group.name: group.channels for group in groups}:
            raise ValueError("the selection is that of another network: its groups of channels are not this one's")

    def as_dict(self) -> dict[str, Any]:
        """As lists, strings and whole numbers, for JSON."""
        groups = [{"name": n, "channels": self.channels[n], "kept": list(kept)} for n, kept in self.kept.items()]
        return {"selection": _FORMAT, "groups": groups, "spared": list(self.spared)}

    @classmethod
    def from_dict(cls, content: Any) -> "Selection":
        """From what `as_dict` gave. ValueError for anything else, whatever its type."""
        try:
            groups = [(g["name"], g["channels"], tuple(g["kept"])) for g in content["groups"]]
            found = cls(
                {n: kept for n, _, kept in groups}, {n: count for n, count, _ in groups}, tuple(content["spared"])
            )
            # Described again it is the same: nothing was unknown, missing or doubled.
            valid = found.as_dict() == content and all(_is_valid(*group) for group in groups)
            valid = valid and found.spared == tuple(n for n in found.kept if n in found.spared)
        except (KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ValueError("not a selection of channels as fastprune writes it")
        return found


def channel_groups(model: nn.Module, image_size: int) -> tuple[Group, ...]:
    """The groups of a network of convs and batch norms, in network order; every conv stands in exactly one.

    A copy of the model is traced in eval mode with one RGB image of image_size x image_size, on the model's device (the
    meta device will do); `model` itself, its mode and torch's generators are left as they are. ValueError for a network
    whose channels cannot be joined like this: masked or grouped convs, convs without batch norm, other normalisation.
    """
    with torch.inference_mode(False), _traced(copy.deepcopy(model), image_size) as graph:
        return _groups(graph)


def gamma_scores(groups: Sequence[Group], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By group name, float64 [channels] on the CPU: the sum over the group's batch norms of |gamma|, not normalised.

    state: a state dict. NaN and inf are handed on (`select` refuses them). ValueError for a state of another network.
    """
    scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for norm in group.norms:
            gamma = state.get(f"{norm}.weight")
            if gamma is None or gamma.shape != total.shape:
                raise ValueError(f"the state has no {norm}.weight of {group.channels} channels: another network's?")
            total += gamma.detach().to("cpu", torch.float64).abs()
        scores[group.name] = total
    return scores


def select(groups: Sequence[Group], scores: Mapping[str, Tensor], fraction: float) -> Selection:
    """Leaves out exactly round(fraction x entries) channels, those with the lowest scores of all groups together.

    An entry is one channel of one group, however many convs it joins. Ties go by position: group order, then index. The
    highest channel of each group (of equals the first) never goes, the next in rank goes in its stead.
    scores: by group name, [channels]. ValueError if fraction is outside [0, 1] or asks for more than can go, if the
    scores are not those of the groups, and if one is NaN or inf: a network that diverged has no ranking.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}, expected a number in [0, 1]")
    sizes = {group.name: group.channels for group in groups}
    if {name: s.numel() for name, s in scores.items()} != sizes:
        raise ValueError("the scores are those of another network: its groups of channels are not this one's")
    for name in sizes:
        if not scores[name].isfinite().all():
            raise ValueError(f"{name} has scores that are not finite: did the network diverge?")
    total = sum(sizes.values())
    gone = n_to_prune(total, fraction)
    if gone > total - len(sizes):
        raise ValueError(f"{gone} of {total} channels cannot go: each of the {len(sizes)} groups keeps one")
    ranked = torch.cat([scores[name].flatten() for name in sizes])
    best = torch.cat([_first_maximum(scores[name]) for name in sizes])
    order = ranked.sort(stable=True).indices
    lowest, keep = torch.ones(2, total, dtype=torch.bool)
    lowest[order[:gone]] = False
    keep[order[~best[order]][:gone]] = False
    counts = list(sizes.values())
    kept = {n: tuple(k.nonzero().flatten().tolist()) for n, k in zip(sizes, keep.split(counts), strict=True)}
    spared = tuple(n for n, k in zip(sizes, lowest.split(counts), strict=True) if not k.any())
    return Selection(kept, sizes, spared)


def remove(model: nn.Module, selection: Selection, image_size: int) -> nn.Module:
    """Cuts the channels that are not kept out of `model`, in place, and returns it.

    Convs, batch norms with their statistics, and the classifier's inputs shrink; names, modules, mode, devices,
    requires_grad and channels-last stay. Gradients are dropped, and parameters that shrink are new objects: make
    optimisers and flat buffers afterwards. In eval mode the network then computes what the whole one would with
    gamma = beta = 0 in the channels that went, in each batch norm of their groups. Works on the meta device too.
    ValueError, with nothing cut yet, if the selection does not fit the network.
    """
    selection.check(channel_groups(model, image_size))
    model.zero_grad(set_to_none=True)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    channels_last = any(_is_channels_last(p) for p in model.parameters())
    with _evaluating(model), torch.inference_mode(False), _traced(model, image_size) as graph:
        for name in selection.kept:
            conv = model.get_submodule(name)
            cut = graph.get_pruner_of_module(conv).prune_out_channels
            if removed := selection.removed(name):
                graph.get_pruning_group(conv, cut, removed).prune(record_history=False)
    # torch-pruning makes plain contiguous parameters, all of which require gradients.
    for name, p in model.named_parameters():
        p.requires_grad_(trained[name])
    return model.to(memory_format=torch.channels_last) if channels_last else model


def kept_filters(selection: Selection, groups: Sequence[Group]) -> dict[str, int]:
    """By conv name, how many of its filters stay, group after group. ValueError if selection and groups do not fit."""
    selection.check(groups)
    return {conv: len(selection.kept[group.name]) for group in groups for conv in group.convs}


@dataclass(frozen=True)
class Cost:
    """parameters: all of the network's. flops: of the forward pass of one image, a multiplication and an addition being
    two; those of convs and matrix products, as torch.utils.flop_counter counts them."""

    parameters: int
    flops: int


def cost(model: nn.Module, image_size: int) -> Cost:
    """What the network has and does, in eval mode, counted on its own device (the meta device will do)."""
    with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_image(model, image_size))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


@contextmanager
def _traced(model: nn.Module, image_size: int) -> Iterator[Any]:
    """torch-pruning's DependencyGraph, emptied afterwards: its nodes refer to each other, and would keep the network
    until the garbage collector comes by. It puts the model into eval mode, and needs gradients enabled.
    """
    import torch_pruning

    # Our own call, for left to itself it tries model(*images) first and hides what then fails. An image that requires a
    # gradient, for it follows autograd's graph, where frozen layers would be missing.
    image = _image(model, image_size).requires_grad_()
    graph = torch_pruning.DependencyGraph()
    try:
        yield graph.build_dependency(model, image, forward_fn=lambda model, image: model(image))
    finally:
        for node in getattr(graph, "module2node", {}).values():
            vars(node).clear()
        vars(graph).clear()


def _groups(graph: Any) -> tuple[Group, ...]:
    names = {module: name for name, module in graph.model.named_modules()}
    for module, name in names.items():
        if isinstance(module, nn.Conv2d) and (type(module) is not nn.Conv2d or module.groups != 1):
            raise ValueError(f"{name} is a masked, grouped or special conv: its filters cannot be removed")
    groups = []
    for joined in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
        convs: set[str] = set()
        norms: set[str] = set()
        channels = joined[0].dep.target.module.out_channels
        for dependency, indices in joined:
            module = dependency.target.module
            if module not in names:  # an addition, an activation
                continue
            if isinstance(module, nn.BatchNorm2d):
                norms.add(names[module])
            elif isinstance(module, nn.Conv2d) and graph.is_out_channel_pruning_fn(dependency.handler):
                convs.add(names[module])
            elif not isinstance(module, nn.Conv2d | nn.Linear) or graph.is_out_channel_pruning_fn(dependency.handler):
                raise ValueError(f"the channels of {names[module]} cannot be removed: it is a {type(module).__name__}")
            if not isinstance(module, nn.Linear) and indices != list(range(channels)):
                raise ValueError(f"{names[module]} does not have the channels of {names[joined[0].dep.target.module]}")
        groups.append(Group(_ordered(convs, names), _ordered(norms, names), channels))
    position = {name: i for i, name in enumerate(names.values())}
    groups.sort(key=lambda group: position[group.name])
    for group in groups:
        if not group.norms:
            raise ValueError(f"{group.name} has no batch norm to rank its filters by")
    if sorted(c for g in groups for c in g.convs) != sorted(n for m, n in names.items() if isinstance(m, nn.Conv2d)):
        raise ValueError("a conv stands in no group of channels or in several: is it used, and once?")
    return tuple(groups)


def _ordered(some: set[str], names: Mapping[nn.Module, str]) -> tuple[str, ...]:
    return tuple(name for name in names.values() if name in some)


def _image(model: nn.Module, size: int) -> Tensor:
    like = next(model.parameters())
    return torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)


def _first_maximum(scores: Tensor) -> Tensor:
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[scores.argmax()] = True
    return found


def _is_channels_last(p: Tensor) -> bool:
    return p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _is_valid(name: Any, channels: Any, kept: tuple[Any, ...]) -> bool:
    whole = all(type(i) is int for i in (channels, *kept))
    return (
        isinstance(name, str) and whole and kept != () and list(kept) == sorted({i for i in kept if 0 <= i < channels})
    )


def latency(
    models: Mapping[str, nn.Module],
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Milliseconds for the forward pass of a batch [batch_size, 3, image_size, image_size], by name: the median.

    Copies of the models are measured, on `device`, in eval mode, channels-last and under inference_mode, in each
    model's own dtype (no autocast), eagerly (no compilation, no CUDA graph), with torch's settings as they are. The
    batch lies on the device already and is the same for all. After `warmup` passes of each model, every model runs once
    in each of `repeats` rounds, and each round begins with another one, so that a device that warms up or a neighbour
    slows all of them alike. On CUDA the time is that between two events around the pass on an idle device: it includes
    the gaps where the host is slower to launch than the device to compute. On a CPU it is wall-clock time. torch's
    generators are left as they are. ValueError for another kind of device, and without a repeat.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency can be measured on cpu and cuda, not on {device.type}")
    if repeats < 1:
        raise ValueError("latency needs at least one repeat")
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
        for repeat in range(repeats):
            first = repeat % len(names) if names else 0
            for name in names[first:] + names[:first]:
                times[name].append(_milliseconds(*ready[name], device))
    return {name: statistics.median(measured) for name, measured in times.items()}


def _milliseconds(model: nn.Module, batch: Tensor, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        model(batch)
        return 1000.0 * (time.perf_counter() - start)
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record(stream)
    model(batch)
    after.record(stream)
    torch.cuda.synchronize(device)
    return before.elapsed_time(after)
