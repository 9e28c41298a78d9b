"""The nodes of a figure: what must exist, in which order, what is there, what it will cost. Standard library only."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fastprune.specs import Node, Prune, StateRef, Train
from fastprune.store import RunStore

Runnable = Train | Prune


@dataclass(frozen=True)
class Graph:
    """Nodes, each once, parents before children. labels: by key, what a person calls the node."""

    nodes: tuple[Runnable, ...]
    labels: dict[str, str]

    @classmethod
    def of(cls, wanted: Iterable[Runnable], labels: dict[str, str] | None = None) -> "Graph":
        """The wanted nodes and all that they rest on."""
        seen: dict[str, Runnable] = {}
        stack: list[tuple[Runnable, bool]] = [(node, False) for node in reversed(list(wanted))]
        while stack:
            node, expanded = stack.pop()
            if node.key in seen:
                continue
            if expanded:
                seen[node.key] = node
            else:
                stack.append((node, True))
                stack.extend((parent, False) for parent in node.parents())
        return cls(tuple(seen.values()), labels or {})

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
            below = height[node.key] + (node.stop if isinstance(node, Train) else 0)
            for parent in node.parents():
                height[parent.key] = max(height[parent.key], below)
        return height

    def todo(self, store: RunStore | None) -> list[Runnable]:
        """Nodes still to compute: not published, or without a state that an unpublished prune step reads."""
        if store is None:
            return list(self.nodes)
        missing = {n.key for n in self.nodes if not store.has(n)}
        for node in self.nodes:
            source = node.source if isinstance(node, Prune) else None
            if node.key in missing and isinstance(source, StateRef) and not store.has_state(source):
                missing.add(source.node.key)
        return [n for n in self.nodes if n.key in missing]

    def states_wanted(self, node: Train) -> list[int]:
        """Epochs after which some prune step of the graph reads the run's weights."""
        return self._states.get(node.key, [])

    @cached_property
    def _states(self) -> dict[str, list[int]]:
        wanted: dict[str, set[int]] = {}
        for node in self.nodes:
            if isinstance(node, Prune) and isinstance(node.source, StateRef):
                wanted.setdefault(node.source.node.key, set()).add(node.source.epoch)
        return {key: sorted(epochs) for key, epochs in wanted.items()}


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
        images = sum(n.stop * (n.data.train_count // n.optimizer.batch_size) * n.optimizer.batch_size for n in runs)
        return cls(
            len(nodes),
            len(runs),
            sum(n.stop for n in runs),
            images,
            dict(sorted(Counter(n.seed for n in runs).items())),
        )
