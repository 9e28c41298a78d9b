"""`--plan`: what would run, what figures share, and what it would cost. Imports nothing heavy, reads no image."""

import math
from collections import defaultdict
from collections.abc import Iterable

from fastprune.errors import InputError
from fastprune.figures import load
from fastprune.figures.plan import AnyPoint, Point
from fastprune.graph import Cost, Graph
from fastprune.request import UNKNOWN, FigureRequest, Request, planned_data
from fastprune.settings import Settings
from fastprune.simulation import longest_chain, simulate
from fastprune.sizes import bytes_on_disk
from fastprune.specs import DataSpec, Prune, Runnable, Train
from fastprune.store import RunStore


def points_and_graph(figure: FigureRequest, data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """The figure's points, and the graph of all runs that they need."""
    points: list[AnyPoint] = load(figure.name).points(figure.settings, data)
    labels: dict[str, str] = {}
    for point in points:
        labels.setdefault(point.node.key, f"{figure.name} {point.label}")
        if not isinstance(point, Point):
            continue
        about = f"{point.series} · seed {point.seed}"
        if isinstance(mask := point.node.mask, Prune):
            labels.setdefault(mask.key, f"{figure.name} prune · {about} · round {mask.round}")
        if point.filters is not None:
            labels.setdefault(point.filters.key, f"{figure.name} filters · {about} · {point.filters.fraction:g}")
    return points, Graph.of((w for p in points for w in p.wanted), labels)


def together(graphs: Iterable[Graph]) -> Graph:
    """One graph of several: what they share stands in it once."""
    graphs = list(graphs)
    labels: dict[str, str] = {}
    for graph in reversed(graphs):
        labels |= graph.labels
    return Graph.of([w for g in graphs for w in (*g.nodes, *g.traces)], labels)


def plan(request: Request) -> None:
    """Prints what would run and what it would cost; writes nothing."""
    store = RunStore(request.store, read_only=True)
    planned = []
    for figure in request.figures:
        data = planned_data(figure, request.store)
        points, graph = points_and_graph(figure, data)
        planned.append(graph)
        print(f"Figure {figure.name}, preset {figure.preset}: {describe(figure.settings, data)}")
        _print_trainings(figure, points, graph, brief=len(request.figures) > 1)
    whole = together(planned)
    if len(planned) > 1:
        _print_sharing(request, planned, whole)
    _print_cost(request, whole, store)


def _print_trainings(figure: FigureRequest, points: list[AnyPoint], graph: Graph, *, brief: bool) -> None:
    cost = Cost.of(graph.nodes)
    per_seed = " or ".join(map(str, sorted(set(cost.per_seed.values()))))
    print(f"  trainings    {cost.trainings:>15,}   {per_seed} a seed")
    if brief:
        return
    seen: set[str] = set()
    for panel in dict.fromkeys(p.panel for p in points):
        fresh = {p.node.key for p in points if p.panel == panel} - seen
        seen |= fresh
        title = "to find masks" if panel == "find" else f"for panel {panel}, not shared with the above"
        print(f"               {len(fresh):>15,}   {title}")


def _print_sharing(request: Request, graphs: list[Graph], whole: Graph) -> None:
    costs = [Cost.of(g.nodes) for g in graphs]
    cost = Cost.of(whole.nodes)
    apart, epochs = sum(c.trainings for c in costs), sum(c.epochs for c in costs)
    print(f"Together: {', '.join(f.name for f in request.figures)}")
    print(f"  trainings    {cost.trainings:>15,}   {apart:,} if each figure ran alone")
    print(f"  shared       {apart - cost.trainings:>15,}   trainings, {epochs - cost.epochs:,} epochs saved")
    for i, (figure, graph) in enumerate(zip(request.figures, graphs, strict=True)):
        keys = {n.key for n in graph.trainings}
        others = [
            f"{len(keys & {n.key for n in other.trainings}):,} with {request.figures[j].name}"
            for j, other in enumerate(graphs)
            if i != j and keys & {n.key for n in other.trainings}
        ]
        if others:
            print(f"  {figure.name:<12} {'':>15}   shares {', '.join(others)}")


def _print_cost(request: Request, graph: Graph, store: RunStore) -> None:
    todo = graph.todo(store)
    cost, left = Cost.of(graph.nodes), Cost.of(todo)
    print(f"  prune steps  {cost.nodes - cost.trainings:>15,}")
    print(f"  epochs       {cost.epochs:>15,}")
    print(f"  images       {cost.images:>15,}")
    print(f"  in the store {cost.trainings - left.trainings:>15,}   trainings; {left.trainings:,} to do")
    if any(n.data.fingerprint.startswith(UNKNOWN) for n in graph.trainings):
        print("  Of images that are not prepared yet, nothing counts as being in the store.")
    print(f"  disk         {_size(bytes_on_disk(graph, todo)):>15}   for what is to do")
    rates = _measured(graph, store)
    _print_time(request, todo, rates)
    if request.clusters:
        _print_clusters(request, graph, todo, _seconds(request, todo, rates, _prune_seconds(graph, store)))


def _print_time(request: Request, todo: list[Runnable], measured: dict[tuple[str, int, str], float]) -> None:
    seconds, unmeasured, used = 0.0, 0, set()
    for node in todo:
        if isinstance(node, Train):
            rate = request.rate or measured.get(_kind(node))
            if rate is None:
                unmeasured += 1
            else:
                used.add(f"{rate:,.0f}")
                seconds += Cost.of([node]).images / rate
    if used:
        source = "as given" if request.rate else "measured in this store"
        print(f"  time left    {duration(seconds):>15}   on one worker, at {', '.join(sorted(used))} images/s {source}")
    if unmeasured:
        more = f" of {unmeasured:,} more trainings" if used else ""
        print(f"  time left            unknown  {more} no such run was measured in this store: --images-per-second")


def _seconds(
    request: Request, todo: list[Runnable], measured: dict[tuple[str, int, str], float], prune: float
) -> dict[str, float]:
    """By key, what a node takes. InputError where that is not known."""
    seconds = {}
    for node in todo:
        if isinstance(node, Train):
            rate = request.rate or measured.get(_kind(node))
            if rate is None:
                raise InputError("--gpus needs the rate of a run, and none was measured here: --images-per-second R")
            seconds[node.key] = Cost.of([node]).images / rate
        else:
            seconds[node.key] = prune
    return seconds


def _print_clusters(request: Request, graph: Graph, todo: list[Runnable], seconds: dict[str, float]) -> None:
    length, chain = longest_chain(graph, todo, seconds)
    if not chain:
        return
    work = sum(seconds.values())
    pruning = max((seconds[n.key] for n in todo if not isinstance(n, Train)), default=0.0)
    about = f"prune steps {pruning:.2g} s each, as measured here" if pruning else "prune steps counted as no time"
    print(f"On a cluster (simulated; one run a GPU, {about})")
    print(f"  {'GPUs':<12} {'time':>15}   busy")
    for workers in request.clusters:
        found = simulate(graph, todo, seconds, workers)
        bound = "the longest chain decides" if found.makespan < 1.01 * length else ""
        print(f"  {workers:<12,} {duration(found.makespan):>15}   {100 * found.utilisation:>3.0f} %   {bound}".rstrip())
    trainings = sum(isinstance(node, Train) for node in chain)
    print(f"  longest chain {duration(length):>14}   {trainings} trainings, to {graph.label(chain[-1])}")
    print(f"  {'':<12} {'':>15}   so more than {math.ceil(work / length):,} GPUs cannot be faster")


def _prune_seconds(graph: Graph, store: RunStore) -> float:
    """Mean of the prune steps in the store; 0 where there are none."""
    found = [store.node(n)["provenance"]["wall_seconds"] for n in graph.nodes if isinstance(n, Prune) and store.has(n)]
    return sum(found) / len(found) if found else 0.0


def _kind(node: Train) -> tuple[str, int, str]:
    """Runs that are about as fast."""
    return node.model.name, node.model.width, node.data.fingerprint


def _measured(graph: Graph, store: RunStore) -> dict[tuple[str, int, str], float]:
    """Mean images/s of each kind of run in the store."""
    rates: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for node in graph.trainings:
        if store.has(node):
            rates[_kind(node)].append(store.node(node)["provenance"]["images_per_second"])
    return {kind: sum(found) / len(found) for kind, found in rates.items()}


def describe(s: Settings, data: DataSpec) -> str:
    """A figure's settings in a line."""
    rates = "".join(
        f", {name} {' '.join(f'{r:g}' for r in values)}"
        for name, values in (("LR_find", s.lr_find), ("LR_eval", s.lr_eval))
        if values
    )
    what = f"{len(s.sparsities)} sparsities" if s.sparsities else f"rounds {s.rounds} of {100 * s.fraction:.3g} %"
    return (
        f"{s.model} (stem {s.stem}, width {s.width}) on {data.name} "
        f"({data.classes} classes, {data.train_count:,} images){rates}; seeds {s.seeds}, "
        f"{what}, epochs {s.epochs}, batch {s.batch_size}, {s.precision}"
    )


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours >= 100:
        return f"{hours / 24:,.1f} days"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
