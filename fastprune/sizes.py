"""How large a network is and what a node leaves on disk, told without building anything. Standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass

from fastprune.graph import Graph
from fastprune.specs import ModelSpec, Prune, Runnable, Train

_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_FLOAT = 4
_TEXT_PER_EPOCH = 150
_TEXT_PER_RATIO = 21
_TEXT_PER_LAYER = 100
_JSON = 2500


@dataclass(frozen=True)
class NetworkSize:
    """Numbers of conv layers, of conv weights, of all parameters, and of batch norm's running values."""

    layers: int
    weights: int
    parameters: int
    statistics: int

    @classmethod
    def of(cls, model: ModelSpec) -> "NetworkSize":
        """As torchvision's ResNet has them, with our stem and width."""
        bottleneck = model.name == "resnet50"
        side = 3 if model.stem == "small" else 7
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
                if block == 0 and (stage > 0 or inputs != outputs):
                    convs.append((inputs, outputs, 1))
                inputs = outputs
        weights = sum(i * o * k * k for i, o, k in convs)
        channels = sum(o for _, o, _ in convs)
        classifier = (inputs + 1) * model.classes
        return cls(len(convs), weights, weights + 2 * channels + classifier, 2 * channels)


def bytes_on_disk(graph: Graph, nodes: Iterable[Runnable]) -> int:
    """About what `nodes` of the graph leave in the store."""
    sizes: dict[ModelSpec, NetworkSize] = {}
    total = 0
    for node in nodes:
        size = sizes.setdefault(node.model, NetworkSize.of(node.model))
        total += _JSON
        if isinstance(node, Train):
            products = graph.products(node)
            total += node.epochs * _TEXT_PER_EPOCH
            total += len(products.weights) * _FLOAT * (size.parameters + size.statistics)
            total += len(products.momentum) * _FLOAT * size.parameters
            total += len(products.traces) * (node.epochs + 1) * size.layers * _TEXT_PER_RATIO
        elif isinstance(node, Prune):
            total += size.weights // 8 + size.layers * _TEXT_PER_LAYER
    return total
