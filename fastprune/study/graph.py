"""The nodes of a figure: what must exist, in which order, what is there, what it will cost. Standard library only."""

from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter

from fastprune.specs import LprHistory, Node, Prune, Runnable, StateRef, Train, states_read
from fastprune.store import RequestedOutputs, RunStore


@dataclass(frozen=True)
class Graph:
    """Nodes, each once, parents before children. histories: of LPR that are wanted. labels: by key, for people."""

    nodes: tuple[Runnable, ...]
    histories: tuple[LprHistory, ...]
    labels: dict[str, str]

    @classmethod
    def of(cls, wanted: Iterable[Runnable | LprHistory], labels: dict[str, str] | None = None) -> "Graph":
        """What is wanted, and all that it depends on."""
        wanted = list(wanted)
        histories = tuple(w for w in wanted if isinstance(w, LprHistory))
        seen: dict[str, Runnable] = {}
        stack: list[tuple[Runnable, bool]] = [
            (w.node if isinstance(w, LprHistory) else w, False) for w in reversed(wanted)
        ]
        while stack:
            node, expanded = stack.pop()
            if node.key in seen:
                continue
            if expanded:
                seen[node.key] = node
            else:
                stack.append((node, True))
                stack.extend((parent, False) for parent in node.parents())
        return cls(tuple(seen.values()), histories, labels or {})

    def label(self, node: Node) -> str:
        return self.labels.get(node.key, f"{node.kind} {node.key[:8]}")

    @cached_property
    def trainings(self) -> tuple[Train, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Train))

    @cached_property
    def by_key(self) -> dict[str, Runnable]:
        return {n.key: n for n in self.nodes}

    @cached_property
    def height(self) -> dict[str, int]:
        """Epochs on the longest path from a node to the end: what is started first."""
        height = {n.key: 0 for n in self.nodes}
        for node in reversed(self.nodes):
            below = height[node.key] + (node.epochs if isinstance(node, Train) else 0)
            for parent in node.parents():
                height[parent.key] = max(height[parent.key], below)
        return height

    def todo(self, store: RunStore | None) -> list[Runnable]:
        """Nodes still to compute: not published, or without something that an unpublished node or the figure reads."""
        if store is None:
            return list(self.nodes)
        missing = {n.key for n in self.nodes if not store.has(n)}
        for history in self.histories:
            if not store.holds(history.node, RequestedOutputs(histories=(history.fraction,))):
                missing.add(history.node.key)
        for node in reversed(self.nodes):  # a run that is trained again may need a state of another
            for source, momentum in states_read(node) if node.key in missing else ():
                epochs = (source.epoch,)
                if not store.holds(source.node, RequestedOutputs(weights=epochs, momentum=epochs if momentum else ())):
                    missing.add(source.node.key)
        return [n for n in self.nodes if n.key in missing]

    def requested_outputs(self, node: Runnable) -> RequestedOutputs:
        """What the run is to leave: what others read of it, and the LPR at each epoch of a run that is pruned first,
        as that costs next to nothing and may spare training it again."""
        needed = self.needed(node)
        return RequestedOutputs(
            needed.weights, needed.momentum, tuple(sorted({*needed.histories, *self._first.get(node.key, ())}))
        )

    def needed(self, node: Runnable) -> RequestedOutputs:
        """What others read of the run."""
        weights, momentum, histories = self._read.get(node.key, (set(), set(), set()))
        return RequestedOutputs(tuple(sorted(weights)), tuple(sorted(momentum)), tuple(sorted(histories)))

    @cached_property
    def _read(self) -> dict[str, tuple[set[int], set[int], set[float]]]:
        read: dict[str, tuple[set[int], set[int], set[float]]] = defaultdict(lambda: (set(), set(), set()))
        for node in self.nodes:
            for source, momentum in states_read(node):
                read[source.node.key][0].add(source.epoch)
                if momentum:
                    read[source.node.key][1].add(source.epoch)
        for history in self.histories:
            read[history.node.key][2].add(history.fraction)
        return dict(read)

    @cached_property
    def _first(self) -> dict[str, set[float]]:
        found: dict[str, set[float]] = defaultdict(set)
        for node in self.nodes:
            if isinstance(node, Prune) and node.prior is None and isinstance(node.source, StateRef):
                found[node.source.node.key].add(node.fraction)
        return dict(found)


@dataclass(frozen=True)
class Cost:
    """Nodes, trainings, epochs and training images (validation not counted)."""

    nodes: int
    trainings: int
    epochs: int
    images: int
    per_seed: dict[int, int]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> "Cost":
        nodes = list(nodes)
        runs = [n for n in nodes if isinstance(n, Train)]
        images = sum(n.epochs * (n.data.train_count // n.optimizer.batch_size) * n.optimizer.batch_size for n in runs)
        return cls(
            len(nodes),
            len(runs),
            sum(n.epochs for n in runs),
            images,
            dict(sorted(Counter(n.seed for n in runs).items())),
        )


class Schedule:
    """The nodes still to do, in the order in which they are: parents first, the longest remaining chain first."""

    def __init__(self, graph: Graph, todo: Iterable[Runnable]) -> None:
        """todo: nodes of the graph, parents first; a parent that is not among them is there."""
        self.todo = {node.key: node for node in todo}
        self._rank = {key: (-graph.height[key], i) for i, key in enumerate(self.todo)}
        self._sorter = TopologicalSorter(
            {key: [p.key for p in node.parents() if p.key in self.todo] for key, node in self.todo.items()}
        )
        self._sorter.prepare()
        self._ready: list[Runnable] = []
        self._blocked: set[str] = set()

    def ready(self) -> list[Runnable]:
        """Those whose parents are done, and that are not taken."""
        for key in self._sorter.get_ready():
            self.put_back(self.todo[key])
        return list(self._ready)

    def take(self, node: Runnable) -> None:
        self._ready.remove(node)

    def put_back(self, node: Runnable) -> None:
        insort(self._ready, node, key=lambda n: self._rank[n.key])

    def done(self, node: Runnable) -> None:
        """For a node that was taken."""
        self._sorter.done(node.key)

    def failed(self, node: Runnable) -> list[Runnable]:
        """For a node that was taken: what depends on it, and on no other that has failed."""
        keys = {node.key}
        for key, other in self.todo.items():
            if key not in self._blocked and any(parent.key in keys for parent in other.parents()):
                keys.add(key)
        blocked = [other for key, other in self.todo.items() if key in keys and key != node.key]
        self._blocked |= keys
        return blocked


def merge_graphs(graphs: Iterable[Graph]) -> Graph:
    """One graph of several: what they share stands in it once."""
    graphs = list(graphs)
    labels: dict[str, str] = {}
    for graph in reversed(graphs):
        labels |= graph.labels
    return Graph.of([w for g in graphs for w in (*g.nodes, *g.histories)], labels)
