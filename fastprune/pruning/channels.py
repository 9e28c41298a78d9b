"""One-shot structured pruning: removes whole filters, ranked over the network by |gamma| of their batch norms.

The score is that of network slimming (Liu et al., 2017). Channels that a residual addition joins form one group: they
are kept or removed together, and their scores are summed. torch-pruning's dependency graph finds the groups and removes
the channels. Only `channel_groups` and `remove` import it.
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

_FORMAT = 1  # of a selection's JSON


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together: output channel i of all `convs`, and channel i of all `norms`.

    convs, norms: module names in the model's order (in torchvision's ResNets a block's own come before its shortcut's).
    channels: number of output channels of each conv.
    """

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    channels: int

    @property
    def name(self) -> str:
        """Name of the group: its first conv."""
        return self.convs[0]


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


def channel_groups(model: nn.Module, image_size: int) -> tuple[Group, ...]:
    """The channel groups of a network of convs and batch norms, in network order; every conv is in exactly one group.

    Traces a copy of the model in eval mode with one RGB image of image_size x image_size pixels, on the model's device
    (meta included). Changes neither `model`, its mode nor torch's generators. ValueError for an unsupported network:
    masked or grouped convs, convs without batch norm, other normalisation layers.
    """
    # A copy, because tracing sets eval mode, and a trace that fails leaves torch-pruning's forward hooks behind.
    with torch.inference_mode(False), _traced(copy.deepcopy(model), image_size) as graph:
        return _groups(graph)


def gamma_scores(groups: Sequence[Group], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By group name, the sum of |gamma| over the group's batch norms, not normalised: float64 [channels] on the CPU.

    state: a state dict. NaN and inf are passed on, `select` refuses them. ValueError for a state of another network.
    """
    scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for norm in group.norms:
            gamma = state.get(f"{norm}.weight")
            if gamma is None or gamma.shape != total.shape:
                raise ValueError(
                    f"the state has no {norm}.weight of {group.channels} channels: is it another network's?"
                )
            # float64, because rounding in a float32 sum can tie two channels, or swap them.
            total += gamma.detach().to("cpu", torch.float64).abs()
        scores[group.name] = total
    return scores


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


def remove(model: nn.Module, selection: Selection, image_size: int) -> nn.Module:
    """Removes the channels that the selection does not keep from `model`, in place, and returns the model.

    Convs, batch norms with their statistics, and the classifier's inputs shrink. Names, modules, mode, devices,
    requires_grad and channels-last stay. Gradients become None, and parameters that shrink are new objects: create
    optimisers and flat buffers afterwards. In eval mode the smaller network computes what the full one computes with
    gamma = beta = 0 in the removed channels, in every batch norm of their groups. Works on the meta device, too.
    ValueError if the selection does not fit the network, which then is unchanged.
    """
    # On a copy, before anything is removed: a selection that does not fit must leave the model as it is.
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
    # torch-pruning creates contiguous parameters that all require gradients: frozen layers and channels-last are lost.
    for name, p in model.named_parameters():
        p.requires_grad_(trained[name])
    return model.to(memory_format=torch.channels_last) if channels_last else model


def kept_filters(selection: Selection, groups: Sequence[Group]) -> dict[str, int]:
    """By conv name, the number of kept filters, group by group. ValueError if the selection does not fit the groups."""
    selection.check(groups)
    return {conv: len(selection.kept[group.name]) for group in groups for conv in group.convs}


@dataclass(frozen=True)
class Cost:
    """Size and work of a network.

    parameters: number of parameters. flops: FLOPs of the forward pass of one image, a multiply-add counted as two;
    convs and matrix products only, as torch.utils.flop_counter counts them.
    """

    parameters: int
    flops: int


def cost(model: nn.Module, image_size: int) -> Cost:
    """Parameters and FLOPs of the network in eval mode, by one forward pass on its own device (meta included)."""
    with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_image(model, image_size))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


@contextmanager
def _traced(model: nn.Module, image_size: int) -> Iterator[Any]:
    """torch-pruning's DependencyGraph of the model, emptied on exit. Leaves the model in eval mode."""
    import torch_pruning  # here, because only structured pruning needs it

    # torch-pruning follows autograd's graph: without a gradient at the input, frozen layers would be missing from it.
    image = _image(model, image_size).requires_grad_()
    graph = torch_pruning.DependencyGraph()
    try:
        # forward_fn, because by default torch-pruning tries model(*images) first and hides the error of that call.
        yield graph.build_dependency(model, image, forward_fn=lambda model, image: model(image))
    finally:
        # Its nodes refer to each other, so only Python's garbage collector would free the network. That runs seldom: it
        # counts objects, not bytes (bench/NOTES.md, memory of a warm worker).
        for node in getattr(graph, "module2node", {}).values():
            vars(node).clear()
        vars(graph).clear()


def _groups(graph: Any) -> tuple[Group, ...]:
    names = {module: name for name, module in graph.model.named_modules()}
    for module, name in names.items():
        if isinstance(module, nn.Conv2d) and (type(module) is not nn.Conv2d or module.groups != 1):
            raise ValueError(f"{name} is a masked, grouped or subclassed conv: only a plain nn.Conv2d can lose filters")
    groups = []
    for joined in graph.get_all_groups(root_module_types=(nn.Conv2d,)):
        convs: set[str] = set()
        norms: set[str] = set()
        channels = joined[0].dep.target.module.out_channels
        for dependency, indices in joined:
            module = dependency.target.module
            if module not in names:  # an operation without parameters: an addition, an activation
                continue
            if isinstance(module, nn.BatchNorm2d):
                norms.add(names[module])
            elif isinstance(module, nn.Conv2d) and graph.is_out_channel_pruning_fn(dependency.handler):
                convs.add(names[module])
            elif not isinstance(module, nn.Conv2d | nn.Linear) or graph.is_out_channel_pruning_fn(dependency.handler):
                raise ValueError(f"the channels of {names[module]} cannot be removed: it is a {type(module).__name__}")
            # Splitting and concatenating shift channel indices; one list of kept channels would not describe the group.
            # A linear layer is exempt: it may read several features of one channel.
            if not isinstance(module, nn.Linear) and indices != list(range(channels)):
                raise ValueError(
                    f"the channels of {names[module]} do not correspond one to one to those of "
                    f"{names[joined[0].dep.target.module]}: splitting or concatenating is not supported"
                )
        groups.append(Group(_ordered(convs, names), _ordered(norms, names), channels))
    # The model's order and not that of torch-pruning's traversal, because ties in `select` depend on it.
    position = {name: i for i, name in enumerate(names.values())}
    groups.sort(key=lambda group: position[group.name])
    for group in groups:
        if not group.norms:
            raise ValueError(f"{group.name} has no batch norm: its filters cannot be ranked by gamma")
    if sorted(c for g in groups for c in g.convs) != sorted(n for m, n in names.items() if isinstance(m, nn.Conv2d)):
        raise ValueError("a conv belongs to no group of channels or to several: is it used, and exactly once?")
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


def latency(
    models: Mapping[str, nn.Module],
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Median milliseconds of the forward pass of a batch [batch_size, 3, image_size, image_size], by model name.

    Measures copies of the models on `device`: eval mode, channels-last, inference_mode, each model's own dtype (no
    autocast), eager (no compilation, no CUDA graph), torch's settings unchanged. All models get the same batch, which
    is on the device beforehand. Each model runs `warmup` times, then once in each of `repeats` rounds.

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
    return {name: statistics.median(measured) for name, measured in times.items()}


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
