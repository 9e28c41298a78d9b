"""The graph of a figure's nodes: which are missing, in which order they are computed, what they cost.

Standard library only, so that --plan starts without importing torch.
"""

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
    """Nodes, each once, parents before children. histories: LPR histories to record. labels: by key, for the user."""

    nodes: tuple[Runnable, ...]
    histories: tuple[LprHistory, ...]
    labels: dict[str, str]

    @classmethod
    def of(cls, wanted: Iterable[Runnable | LprHistory], labels: dict[str, str] | None = None) -> "Graph":
        """The graph of `wanted` and of all nodes that it depends on."""
        wanted = list(wanted)
        histories = tuple(w for w in wanted if isinstance(w, LprHistory))
        # A stack, not recursion: a chain of many rounds may be deeper than Python's limit. Reversed, so that nodes
        # come in the order in which they are wanted.
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
        """The node's name for the user."""
        return self.labels.get(node.key, f"{node.kind} {node.key[:8]}")

    @cached_property
    def trainings(self) -> tuple[Train, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Train))

    @cached_property
    def by_key(self) -> dict[str, Runnable]:
        return {n.key: n for n in self.nodes}

    @cached_property
    def height(self) -> dict[str, int]:
        """Epochs on the longest path below each node, without its own, by key."""
        height = {n.key: 0 for n in self.nodes}
        for node in reversed(self.nodes):
            # Only epochs count: a prune takes a moment.
            below = height[node.key] + (node.epochs if isinstance(node, Train) else 0)
            for parent in node.parents():
                height[parent.key] = max(height[parent.key], below)
        return height

    def todo(self, store: RunStore | None) -> list[Runnable]:
        """The nodes to compute: not published, or published without an output that a missing node or the figure reads.

        store: None stands for an empty one.
        """
        if store is None:
            return list(self.nodes)
        missing = {n.key for n in self.nodes if not store.has(n)}
        for history in self.histories:
            if not store.holds(history.node, RequestedOutputs(histories=(history.fraction,))):
                missing.add(history.node.key)
        # Children first: a run that has to be trained again may itself read a state that its parent has not stored.
        for node in reversed(self.nodes):
            for source, momentum in states_read(node) if node.key in missing else ():
                epochs = (source.epoch,)
                if not store.holds(source.node, RequestedOutputs(weights=epochs, momentum=epochs if momentum else ())):
                    missing.add(source.node.key)
        return [n for n in self.nodes if n.key in missing]

    def requested_outputs(self, node: Runnable) -> RequestedOutputs:
        """The outputs that a run stores: those that others read, and the LPR history of a run that is pruned first."""
        # The history costs next to nothing, and a figure asked for later may need it: without it the run would be
        # trained again.
        needed = self.needed(node)
        return RequestedOutputs(
            needed.weights, needed.momentum, tuple(sorted({*needed.histories, *self._first.get(node.key, ())}))
        )

    def needed(self, node: Runnable) -> RequestedOutputs:
        """The outputs of a run that other nodes or the figure read."""
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
    """Numbers of nodes, trainings, epochs and training images (without validation). per_seed: trainings by seed."""

    nodes: int
    trainings: int
    epochs: int
    images: int
    per_seed: dict[int, int]

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> "Cost":
        nodes = list(nodes)
        runs = [n for n in nodes if isinstance(n, Train)]
        # An epoch drops its last, incomplete batch.
        images = sum(n.epochs * (n.data.train_count // n.optimizer.batch_size) * n.optimizer.batch_size for n in runs)
        return cls(
            len(nodes),
            len(runs),
            sum(n.epochs for n in runs),
            images,
            dict(sorted(Counter(n.seed for n in runs).items())),
        )


class Schedule:
    """Orders the nodes to compute: parents first, then the longest remaining chain first."""

    # The longest chain decides when a run ends: with many workers, a long one started last would run alone.

    def __init__(self, graph: Graph, todo: Iterable[Runnable]) -> None:
        """todo: nodes of the graph, parents first. A parent that is not among them is published."""
        self.todo = {node.key: node for node in todo}
        # The place in the graph breaks ties, so that the order is the same in each process.
        self._rank = {key: (-graph.height[key], i) for i, key in enumerate(self.todo)}
        self._sorter = TopologicalSorter(
            {key: [p.key for p in node.parents() if p.key in self.todo] for key, node in self.todo.items()}
        )
        self._sorter.prepare()
        self._ready: list[Runnable] = []
        self._blocked: set[str] = set()

    def ready(self) -> list[Runnable]:
        """The nodes whose parents are done and that are not taken, the longest chain first."""
        for key in self._sorter.get_ready():
            self.put_back(self.todo[key])
        return list(self._ready)

    def take(self, node: Runnable) -> None:
        """Removes a node from the ready ones, as it is being computed."""
        self._ready.remove(node)

    def put_back(self, node: Runnable) -> None:
        """Makes a taken node ready again."""
        insort(self._ready, node, key=lambda n: self._rank[n.key])

    def done(self, node: Runnable) -> None:
        """Marks a taken node as published: its children may become ready."""
        self._sorter.done(node.key)

    def failed(self, node: Runnable) -> list[Runnable]:
        """Marks a taken node as failed; returns the nodes that this blocks and that no earlier failure has blocked."""
        # TopologicalSorter is not told that the node ended, so that its children never become ready.
        keys = {node.key}
        for key, other in self.todo.items():
            if key not in self._blocked and any(parent.key in keys for parent in other.parents()):
                keys.add(key)
        blocked = [other for key, other in self.todo.items() if key in keys and key != node.key]
        self._blocked |= keys
        return blocked


def merge_graphs(graphs: Iterable[Graph]) -> Graph:
    """One graph of several; a node that they share is in it once."""
    graphs = list(graphs)
    labels: dict[str, str] = {}
    for graph in reversed(graphs):  # the first graph with a node names it
        labels |= graph.labels
    return Graph.of([w for g in graphs for w in (*g.nodes, *g.histories)], labels)
