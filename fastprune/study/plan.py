"""`--plan`: what would run, and what it would cost on one machine or on a cluster."""

# No import of torch, here or below: that alone takes longer than planning a figure (0.2 s, bench/NOTES.md).

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastprune.console import duration
from fastprune.errors import InputError
from fastprune.specs import DataSpec, ModelSpec, Prune, Runnable, Train, n_to_prune
from fastprune.store import RunStore
from fastprune.study.data import UNKNOWN
from fastprune.study.forecast import Rates, longest_chain, simulate
from fastprune.study.graph import Cost, Graph, merge_graphs
from fastprune.study.settings import Settings


@dataclass(frozen=True)
class Planned:
    """A figure to plan. about: its settings in one line. panels: panel -> keys of its trainings."""

    name: str
    about: str
    graph: Graph
    panels: Mapping[str, set[str]]


def print_plan(
    figures: Sequence[Planned],
    store: RunStore,
    *,
    images_per_second: float | None = None,
    workers: int = 1,
    gpus: Sequence[int] = (),
) -> None:
    """Prints what would run and what it would cost; writes nothing.

    images_per_second: of one worker, to assume; None: those measured in the store. workers: how many compute at once.
    gpus: numbers of GPUs to simulate.
    """
    for figure in figures:
        print(figure.about)
        _print_trainings(figure, brief=len(figures) > 1)
    whole = merge_graphs(f.graph for f in figures)
    if len(figures) > 1:
        _print_sharing(figures, whole)
    _print_cost(whole, store, images_per_second, workers, gpus)


def _print_trainings(figure: Planned, *, brief: bool) -> None:
    cost = Cost.of(figure.graph.nodes)
    per_seed = " or ".join(map(str, sorted(set(cost.per_seed.values()))))
    print(f"  trainings    {cost.trainings:>15,}   {per_seed} a seed")
    if brief:
        return
    seen: set[str] = set()
    for panel, keys in figure.panels.items():
        # A training that several panels share is counted in the first, so that the lines add up to the total.
        fresh = keys - seen
        title = f"for panel {panel}"
        if panel.startswith("find"):
            # The find runs of all panels are "find", those of one panel "find-a".
            of = panel.removeprefix("find").removeprefix("-")
            title = f"to find masks of panel {of}" if of else "to find masks"
        print(f"               {len(fresh):>15,}   {title}{', beside those above' if seen else ''}")
        seen |= fresh


def _print_sharing(figures: Sequence[Planned], whole: Graph) -> None:
    costs = [Cost.of(f.graph.nodes) for f in figures]
    cost = Cost.of(whole.nodes)
    apart, epochs = sum(c.trainings for c in costs), sum(c.epochs for c in costs)
    print(f"Together: {', '.join(f.name for f in figures)}")
    print(f"  trainings    {cost.trainings:>15,}   {apart:,} if each figure ran alone")
    print(f"  shared       {apart - cost.trainings:>15,}   trainings, {epochs - cost.epochs:,} epochs saved")
    trainings = {f.name: {n.key for n in f.graph.trainings} for f in figures}
    for name, keys in trainings.items():
        shared = {other: len(keys & theirs) for other, theirs in trainings.items() if other != name}
        if with_others := [f"{count:,} with {other}" for other, count in shared.items() if count]:
            print(f"  {name:<12} {'':>15}   shares {', '.join(with_others)}")


def _print_cost(graph: Graph, store: RunStore, given: float | None, workers: int, gpus: Sequence[int]) -> None:
    todo = graph.todo(store)
    cost, left = Cost.of(graph.nodes), Cost.of(todo)
    print(f"  prune steps  {cost.nodes - cost.trainings:>15,}")
    print(f"  epochs       {cost.epochs:>15,}")
    print(f"  images       {cost.images:>15,}")
    print(f"  in the store {cost.trainings - left.trainings:>15,}   trainings; {left.trainings:,} to do")
    if any(n.data.fingerprint.startswith(UNKNOWN) for n in graph.trainings):
        print("  Images that are not prepared yet have no fingerprint: none of their trainings counts as in the store.")
    print(f"  disk         {_size(bytes_on_disk(graph, todo)):>15}   for the nodes to do")
    rates = Rates.of_store(graph, store, given)
    _print_time(graph, todo, rates, workers)
    if gpus:
        _print_clusters(gpus, graph, todo, _seconds(todo, rates, _prune_seconds(graph, store)))


def _print_time(graph: Graph, todo: list[Runnable], rates: Rates, workers: int) -> None:
    seconds, unmeasured, used = {node.key: 0.0 for node in todo}, 0, set()
    for node in todo:
        if isinstance(node, Train):
            rate = rates.of(node)
            if rate is None:
                unmeasured += 1
            else:
                used.add(rate)
                seconds[node.key] = Cost.of([node]).images / rate
    if used:
        at = " to ".join(f"{rate:,.0f}" for rate in sorted({min(used), max(used)}))
        source = "as given" if rates.given else "measured in this store"
        # A run waits for the mask that it trains under, so that more workers need not be as many times faster.
        time = duration(simulate(graph, todo, seconds, workers).makespan)
        on = "one worker" if workers == 1 else f"{workers} workers"
        print(f"  time left    {time:>15}   on {on}, {'each ' * (workers > 1)}at {at} images/s {source}")
    if unmeasured:
        more = f" of {unmeasured:,} more trainings" if used else ""
        why = "no such run was measured in this store; to assume a rate, give --images-per-second R"
        print(f"  time left            unknown  {more} {why}")


def _seconds(todo: list[Runnable], rates: Rates, prune: float) -> dict[str, float]:
    """Key -> seconds that the node takes. InputError where no rate is known."""
    seconds = {}
    for node in todo:
        if isinstance(node, Train):
            rate = rates.of(node)
            if rate is None:
                raise InputError(
                    "--gpus needs the rate of a run, and this store has none measured: give --images-per-second R"
                )
            seconds[node.key] = Cost.of([node]).images / rate
        else:
            seconds[node.key] = prune
    return seconds


def _print_clusters(gpus: Sequence[int], graph: Graph, todo: list[Runnable], seconds: dict[str, float]) -> None:
    length, chain = longest_chain(graph, todo, seconds)
    if not chain:
        return
    work = sum(seconds.values())
    pruning = max((seconds[n.key] for n in todo if not isinstance(n, Train)), default=0.0)
    about = f"prune steps {pruning:.2g} s each, as measured here" if pruning else "prune steps counted as no time"
    print(f"On a cluster (simulated; one run a GPU, {about})")
    print(f"  {'GPUs':<12} {'time':>15}   busy")
    for workers in gpus:
        found = simulate(graph, todo, seconds, workers)
        # Within 1 % of the bound, more GPUs bring nothing.
        bound = "the longest chain decides" if found.makespan < 1.01 * length else ""
        print(f"  {workers:<12,} {duration(found.makespan):>15}   {100 * found.utilisation:>3.0f} %   {bound}".rstrip())
    trainings = sum(isinstance(node, Train) for node in chain)
    what = f"{trainings} training{'' if trainings == 1 else 's'}"
    print(f"  longest chain {duration(length):>14}   {what}, to {graph.label(chain[-1])}")
    print(f"  {'':<12} {'':>15}   that short only with {math.ceil(work / length):,} GPUs or more")


def _prune_seconds(graph: Graph, store: RunStore) -> float:
    """Mean seconds of the graph's prune steps in the store; 0 where there are none."""
    found = [store.node(n)["provenance"]["wall_seconds"] for n in graph.nodes if isinstance(n, Prune) and store.has(n)]
    return sum(found) / len(found) if found else 0.0


def describe(s: Settings, data: DataSpec) -> str:
    """The settings of a figure in one line."""
    rates = "".join(
        f", {name} {' '.join(f'{r:g}' for r in values)}"
        for name, values in (("LR_find", s.lr_find), ("LR_eval", s.lr_eval))
        if values
    )
    # A figure without eval runs has no rounds either: it shows the ratios that one prune step would leave.
    what = f"rounds {s.rounds} of {100 * s.fraction:.3g} %" if s.lr_eval else f"LPR at {100 * s.fraction:.3g} %"
    if s.sparsities:
        what = f"{len(s.sparsities)} sparsities"
    if s.stops:
        what += f" pruned at epochs {' '.join(map(str, s.stops))}"
    seeds = f"{s.seeds}" + f" from {s.first_seed}" * bool(s.first_seed)
    return (
        f"{s.model} (stem {s.stem}, width {s.width}) on {data.name} "
        f"({data.classes} classes, {data.train_count:,} images){rates}; seeds {seeds}, "
        f"{what}, epochs {s.epochs}, batch {s.batch_size}, {s.precision}"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


# Blocks per stage: He et al., Deep Residual Learning for Image Recognition, table 1.
_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}

# Estimated bytes. Weights dominate a store, so the sizes of text need not be exact.
_FLOAT = 4

_TEXT_PER_EPOCH = 150  # a row of metrics

_TEXT_PER_RATIO = 21  # an entry of an LPR history

_TEXT_PER_LAYER = 100  # of a mask: name, shape, ratio

_JSON = 2500  # node.json


@dataclass(frozen=True)
class NetworkSize:
    """Numbers of conv layers, of conv weights, of all parameters, and of running means and variances."""

    layers: int
    weights: int
    parameters: int
    statistics: int

    @classmethod
    def of(cls, model: ModelSpec) -> "NetworkSize":
        """The size of a torchvision ResNet with the given stem and width, counted without building it."""
        bottleneck = model.name == "resnet50"
        side = 3 if model.stem == "cifar" else 7
        convs = [(3, model.width, side)]
        inputs = model.width
        for stage, blocks in enumerate(_BLOCKS[model.name]):
            planes = model.width << stage
            outputs = 4 * planes if bottleneck else planes
            for block in range(blocks):
                if bottleneck:
                    convs += [(inputs, planes, 1), (planes, planes, 3), (planes, outputs, 1)]
                else:
                    convs += [(inputs, planes, 3), (planes, planes, 3)]
                # The 1x1 shortcut, where a block changes the shape.
                if block == 0 and (stage > 0 or inputs != outputs):
                    convs.append((inputs, outputs, 1))
                inputs = outputs
        weights = sum(i * o * k * k for i, o, k in convs)
        channels = sum(o for _, o, _ in convs)
        classifier = (inputs + 1) * model.classes
        # Each channel has a scale and a shift, and a running mean and a variance.
        return cls(len(convs), weights, weights + 2 * channels + classifier, 2 * channels)


def check_rounds(settings: Settings, data: DataSpec) -> None:
    """InputError where a round would prune no weight, or every remaining one."""
    left = NetworkSize.of(settings.network(data)).weights
    for round in range(1, settings.rounds + 1):
        gone = n_to_prune(left, settings.fraction)
        if not 0 < gone < left:
            what = "nothing" if gone == 0 else "all"
            raise InputError(
                f"round {round} of {settings.rounds} would prune {what} of {left} weights: change --fraction"
            )
        left -= gone


def bytes_on_disk(graph: Graph, nodes: Iterable[Runnable]) -> int:
    """Estimate of the bytes that `nodes` of the graph leave in the store."""
    sizes: dict[ModelSpec, NetworkSize] = {}
    total = 0
    for node in nodes:
        size = sizes.setdefault(node.model, NetworkSize.of(node.model))
        total += _JSON
        if isinstance(node, Train):
            products = graph.requested_outputs(node)
            total += node.epochs * _TEXT_PER_EPOCH
            total += len(products.weights) * _FLOAT * (size.parameters + size.statistics)
            total += len(products.momentum) * _FLOAT * size.parameters
            total += len(products.histories) * (node.epochs + 1) * size.layers * _TEXT_PER_RATIO
        elif isinstance(node, Prune):
            # One bit per weight.
            total += size.weights // 8 + size.layers * _TEXT_PER_LAYER
    return total
