"""The nodes of a figure: what must exist, in which order, what is there, what it will cost. Standard library only."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fastprune.specs import Filters, Node, Prune, Rewind, Runnable, StateRef, Trace, Train
from fastprune.store import Products, RunStore


@dataclass(frozen=True)
class Graph:
    """Nodes, each once, parents before children. traces: wanted of them. labels: by key, what a person calls a node."""

    nodes: tuple[Runnable, ...]
    traces: tuple[Trace, ...]
    labels: dict[str, str]

    @classmethod
    def of(cls, wanted: Iterable[Runnable | Trace], labels: dict[str, str] | None = None) -> "Graph":
        """What is wanted, and all that it rests on."""
        wanted = list(wanted)
        traces = tuple(w for w in wanted if isinstance(w, Trace))
        seen: dict[str, Runnable] = {}
        stack: list[tuple[Runnable, bool]] = [(w.node if isinstance(w, Trace) else w, False) for w in reversed(wanted)]
        while stack:
            node, expanded = stack.pop()
            if node.key in seen:
                continue
            if expanded:
                seen[node.key] = node
            else:
                stack.append((node, True))
                stack.extend((parent, False) for parent in node.parents())
        return cls(tuple(seen.values()), traces, labels or {})

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
        for trace in self.traces:
            if not store.holds(trace.node, Products(traces=(trace.fraction,))):
                missing.add(trace.node.key)
        for node in reversed(self.nodes):  # a run that is trained again may need a state of another
            for source, momentum in states_read(node) if node.key in missing else ():
                epochs = (source.epoch,)
                if not store.holds(source.node, Products(weights=epochs, momentum=epochs if momentum else ())):
                    missing.add(source.node.key)
        return [n for n in self.nodes if n.key in missing]

    def products(self, node: Runnable) -> Products:
        """What the run is to leave: what others read of it, and the LPR at each epoch of a run that is pruned first,
        as that costs next to nothing and may spare training it again."""
        needed = self.needed(node)
        return Products(
            needed.weights, needed.momentum, tuple(sorted({*needed.traces, *self._first.get(node.key, ())}))
        )

    def needed(self, node: Runnable) -> Products:
        """What others read of the run."""
        weights, momentum, traces = self._read.get(node.key, (set(), set(), set()))
        return Products(tuple(sorted(weights)), tuple(sorted(momentum)), tuple(sorted(traces)))

    @cached_property
    def _read(self) -> dict[str, tuple[set[int], set[int], set[float]]]:
        read: dict[str, tuple[set[int], set[int], set[float]]] = defaultdict(lambda: (set(), set(), set()))
        for node in self.nodes:
            for source, momentum in states_read(node):
                read[source.node.key][0].add(source.epoch)
                if momentum:
                    read[source.node.key][1].add(source.epoch)
        for trace in self.traces:
            read[trace.node.key][2].add(trace.fraction)
        return dict(read)

    @cached_property
    def _first(self) -> dict[str, set[float]]:
        found: dict[str, set[float]] = defaultdict(set)
        for node in self.nodes:
            if isinstance(node, Prune) and node.prior is None and isinstance(node.source, StateRef):
                found[node.source.node.key].add(node.fraction)
        return dict(found)


def states_read(node: Runnable) -> list[tuple[StateRef, bool]]:
    """The states that computing a node reads, and whether with momentum."""
    if isinstance(node, Train):
        return [(node.start.state, node.start.momentum)] if isinstance(node.start, Rewind) else []
    if isinstance(node, Filters):
        return [(node.source, False)]
    return [(node.source, False)] if isinstance(node.source, StateRef) else []


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
