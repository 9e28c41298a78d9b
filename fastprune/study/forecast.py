"""How long a run takes: rates of trainings by density, and its schedule simulated."""

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fastprune.specs import Prune, Runnable, Train
from fastprune.store import RunStore
from fastprune.study.graph import Graph, Schedule

_Kind = tuple[str, int, str]


class Rates:
    """Images a second of trainings on one worker: as given, or else as measured."""

    def __init__(self, given: float | None = None) -> None:
        self.given = given
        # Kind -> density -> key -> images a second.
        self._measured: dict[_Kind, dict[float, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))

    @classmethod
    def of_store(cls, graph: Graph, store: RunStore, given: float | None = None) -> Self:
        """The rates of the graph's trainings that the store has."""
        rates = cls(given)
        for node in graph.trainings:
            if store.has(node):
                rates.measured(node, store.node(node)["provenance"]["images_per_second"])
        return rates

    def measured(self, node: Train, rate: float) -> None:
        """Notes the rate of a training, in place of an earlier one of the same."""
        self._measured[_kind(node)][_density(node)][node.key] = rate

    def of(self, node: Train) -> float | None:
        """The given rate, or the mean of those runs of the node's kind whose density is nearest to its; None without
        any. Where kept weights alone are computed with, a sparser round takes less time."""
        by_density = self._measured.get(_kind(node))
        if self.given or by_density is None:
            return self.given
        nearest = by_density[min(by_density, key=lambda density: abs(math.log(density / _density(node))))]
        return sum(nearest.values()) / len(nearest)


def _kind(node: Train) -> _Kind:
    """What decides the speed of a dense run: runs of equal kind have about the same images/s."""
    return node.model.name, node.model.width, node.data.fingerprint


def _density(node: Train) -> float:
    return node.mask.density if isinstance(node.mask, Prune) else 1.0


@dataclass(frozen=True)
class Simulated:
    """A simulated run. makespan: seconds until the last node is done. busy: worker-seconds of computation."""

    workers: int
    makespan: float
    busy: float

    @property
    def utilisation(self) -> float:
        """The fraction of the workers' time in which they compute."""
        return self.busy / (self.workers * self.makespan) if self.makespan else 1.0


def simulate(graph: Graph, todo: Sequence[Runnable], seconds: Mapping[str, float], workers: int) -> Simulated:
    """Simulates the computation of `todo`, nodes of the graph, by `workers`. seconds: key -> what the node takes."""
    # The schedule of a real run, so that the simulation hands out nodes as a run does.
    schedule = Schedule(graph, todo)
    running: list[tuple[float, int, Runnable]] = []
    now, started = 0.0, 0
    while True:
        for node in schedule.ready()[: workers - len(running)]:
            schedule.take(node)
            heapq.heappush(running, (now + seconds[node.key], started, node))
            started += 1
        if not running:
            break
        now, _, node = heapq.heappop(running)
        schedule.done(node)
    return Simulated(workers, now, sum(seconds[node.key] for node in todo))


def longest_chain(graph: Graph, todo: Sequence[Runnable], seconds: Mapping[str, float]) -> tuple[float, list[Runnable]]:
    """The chain of dependent nodes in `todo` that takes longest (the critical path), and its seconds.

    No number of workers is faster.
    """
    ends: dict[str, float] = {}
    before: dict[str, Runnable | None] = {}
    for node in todo:  # in topological order, so the parents are known
        parents = [parent for parent in node.parents() if parent.key in ends]
        last = max(parents, key=lambda parent: ends[parent.key], default=None)
        before[node.key] = last
        ends[node.key] = seconds[node.key] + (0.0 if last is None else ends[last.key])
    if not ends:
        return 0.0, []
    node_or_none: Runnable | None = graph.by_key[max(ends, key=lambda key: ends[key])]
    length, chain = max(ends.values()), []
    while node_or_none is not None:
        chain.append(node_or_none)
        node_or_none = before[node_or_none.key]
    return length, chain[::-1]
