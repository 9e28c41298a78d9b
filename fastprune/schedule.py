"""Which node of a graph runs next."""

import heapq
import time
from collections.abc import Iterable

from fastprune.graph import Graph
from fastprune.specs import Runnable

_BUSY_SECONDS = 1.0, 10.0
"""How long a node that another process computes is left alone before it is looked at again: at first, and at last."""


class Queue:
    """The nodes still to do, handed out when their parents are there, longest remaining chain first."""

    def __init__(self, graph: Graph, todo: Iterable[Runnable]) -> None:
        """todo: nodes of the graph, parents first; a parent that is not among them is there."""
        self.graph = graph
        todo = list(todo)
        self._open = {n.key for n in todo}
        self._waiting: dict[str, set[str]] = {}
        self._children: dict[str, list[str]] = {}
        self._ready: list[tuple[int, int, str]] = []
        self._busy: list[tuple[float, str]] = []
        self._busy_since: dict[str, float] = {}
        self._order = {n.key: i for i, n in enumerate(graph.nodes)}
        for node in todo:
            missing = {p.key for p in node.parents()} & self._open
            self._waiting[node.key] = missing
            for parent in missing:
                self._children.setdefault(parent, []).append(node.key)
            if not missing:
                self._push(node.key)

    def _push(self, key: str) -> None:
        heapq.heappush(self._ready, (-self.graph.height[key], self._order[key], key))

    @property
    def left(self) -> int:
        """Nodes neither done nor failed."""
        return len(self._open)

    def next(self) -> Runnable | None:
        """A node that can run now, or None."""
        now = time.monotonic()
        while self._busy and self._busy[0][0] <= now:
            self._push(heapq.heappop(self._busy)[1])
        if not self._ready:
            return None
        return self.graph.by_key[heapq.heappop(self._ready)[2]]

    def busy(self, node: Runnable) -> None:
        """Another process computes this node: look again later, the less often the longer it takes."""
        now = time.monotonic()
        shortest, longest = _BUSY_SECONDS
        waited = now - self._busy_since.setdefault(node.key, now)
        heapq.heappush(self._busy, (now + min(max(shortest, 0.1 * waited), longest), node.key))

    def is_settled(self, key: str) -> bool:
        """Whether it is done or failed."""
        return key not in self._open

    def again(self, node: Runnable) -> None:
        self._push(node.key)

    def done(self, node: Runnable) -> None:
        self._open.discard(node.key)
        for child in self._children.get(node.key, []):
            self._waiting[child].discard(node.key)
            if not self._waiting[child] and child in self._open:
                self._push(child)

    def fail(self, node: Runnable) -> list[Runnable]:
        """Gives up a node and all that rests on it; returns what rests on it."""
        self._open.discard(node.key)
        lost, stack = [], list(self._children.get(node.key, []))
        while stack:
            key = stack.pop()
            if key in self._open:
                self._open.discard(key)
                lost.append(self.graph.by_key[key])
                stack.extend(self._children.get(key, []))
        return lost
