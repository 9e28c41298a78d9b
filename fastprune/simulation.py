"""How long a graph would take on so many workers: its nodes handed out as `execute` does it, in made-up time."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastprune.graph import Graph
from fastprune.schedule import Queue
from fastprune.specs import Runnable


@dataclass(frozen=True)
class Simulated:
    """makespan: seconds until the last node is done. busy: seconds of all workers together."""

    workers: int
    makespan: float
    busy: float

    @property
    def utilisation(self) -> float:
        """The fraction of the workers' time in which they compute."""
        return self.busy / (self.workers * self.makespan) if self.makespan else 1.0


def simulate(graph: Graph, todo: Sequence[Runnable], seconds: Mapping[str, float], workers: int) -> Simulated:
    """Runs `todo`, nodes of the graph, on that many workers. seconds: by key, what a node takes on any of them."""
    queue = Queue(graph, todo)
    running: list[tuple[float, int, Runnable]] = []
    now, started = 0.0, 0
    while queue.left:
        while len(running) < workers and (node := queue.next()) is not None:
            heapq.heappush(running, (now + seconds[node.key], started, node))
            started += 1
        now, _, node = heapq.heappop(running)
        queue.done(node)
    return Simulated(workers, now, sum(seconds[node.key] for node in todo))


def longest_chain(graph: Graph, todo: Sequence[Runnable], seconds: Mapping[str, float]) -> tuple[float, list[Runnable]]:
    """What no number of workers can beat: the chain of `todo` that takes longest, and how many seconds that is."""
    ends: dict[str, float] = {}
    before: dict[str, Runnable | None] = {}
    for node in todo:  # parents come first
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
