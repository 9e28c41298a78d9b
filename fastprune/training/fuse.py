"""The backends of torch.compile that a Trainer uses: inductor, and inductor with our own batch norms in the graph.

`fused` rewrites the graph that Dynamo traced, before autograd and inductor see it. The user's modules stay as they are.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastprune.kernels.batch_norm import FLOAT_TYPES, batch_norm
from fastprune.kernels.batch_norm_pool import batch_norm_pool


def inductor(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """torch.compile's inductor, except that max pooling's backward pass gathers gradients and scatters none."""
    # Imported here, as it takes seconds.
    from torch._inductor.compile_fx import compile_fx

    # The tag keeps what torch.compile stored for others, with the scattering, from being found here.
    tag = f"{torch.compiler.config.cache_key_tag} gathers"
    with _without_scattering(), torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(module, inputs)


@contextmanager
def _without_scattering() -> Iterator[None]:
    """Within it max pooling's backward pass is not decomposed, and inductor uses its own kernel, which gathers."""
    from torch._inductor.decomposition import select_decomp_table

    # torch 2.15 decomposes it into atomic float32 additions to a map in NCHW: 0.8 GB more in a step of ResNet-18, and
    # sums that differ from run to run. Taken out of torch's table, as a table of our own would switch its caches off:
    # each worker would then compile for half a minute.
    table, packet = select_decomp_table(), torch.ops.aten.max_pool2d_with_indices_backward
    removed = {op: table.pop(op) for op in (packet, packet.default) if op in table}
    try:
        yield
    finally:
        table.update(removed)


def fused(module: GraphModule, inputs: Sequence[Any]) -> Any:
    """As `inductor`, with batch norms of training mode and what follows them in our own kernels: see `fuse`."""
    fuse(module)
    return inductor(module, inputs)


def fuse(module: GraphModule) -> int:
    """Replaces the batch norms of a graph that Dynamo traced, in place, and returns how many.

    A norm takes with it the sum with a residual and the ReLU that follow, or the ReLU and max pooling 3x3 of an
    ImageNet stem, where their inputs have no other use. Two consumers of the result get a branch each. Replaced are
    norms in training mode, with affine weights, running statistics and a momentum, of float32, bf16 or fp16
    [B, C, H, W], channels-last. All else stays as it is.
    """
    norms = [(node, norm) for node in module.graph.nodes if (norm := _norm(node)) is not None]
    for node, norm in norms:
        _replace(module.graph, node, norm)
    if norms:
        module.graph.lint()
        module.recompile()
    return len(norms)


class _Norm(NamedTuple):
    """The arguments of F.batch_norm in the order of kernels.batch_norm. Nodes, and numbers."""

    x: Node
    weight: Node
    bias: Node
    running_mean: Node
    running_var: Node
    momentum: float
    eps: float


def _norm(node: Node) -> _Norm | None:
    """The batch norm that this node is, if our kernels compute it."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    a = _arguments(
        node, "input running_mean running_var weight bias training momentum eps", (None, None, False, 0.1, 1e-5)
    )
    norm = _Norm(*(a[n] for n in "input weight bias running_mean running_var momentum eps".split()))
    x, *channels = (_value(part) for part in norm[:5])
    if a["training"] is not True or not isinstance(norm.momentum, float) or not _is_map(x):
        return None
    fits = all(
        isinstance(t, Tensor) and t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device
        for t in channels
    )
    return norm if fits and x.numel() > x.shape[1] else None


def _replace(graph: Graph, node: Node, norm: _Norm) -> None:
    """Replaces one norm and what it takes with it by one call."""
    last, residual, place = node, None, node
    added = _user(node, _is_sum)
    if added is not None and _may_move(node, added, norm):
        first, second = added.args
        last, residual, place = added, second if first is node else first, added
    relu = _user(last, _is_relu)
    pool = _user(relu, _is_stem_pool) if relu is not None and residual is None else None
    last = pool or relu or last
    with graph.inserting_before(place):
        if pool is not None:
            new = graph.call_function(batch_norm_pool, tuple(norm))
        else:
            *tensors, momentum, eps = norm
            arguments = (*tensors, residual, momentum, eps, relu is not None)
            users = list(last.users)
            if len(users) == 2 and all(_only_reads(user, last) for user in users):
                pair = graph.call_function(batch_norm, (*arguments, 2))
                for i, user in enumerate(users):
                    branch = graph.call_function(operator.getitem, (pair, i))
                    branch.meta = dict(last.meta)
                    user.replace_input_with(last, branch)
                pair.meta = {k: v for k, v in last.meta.items() if k != "example_value"}
                new = pair
            else:
                new = graph.call_function(batch_norm, arguments)
    if last.users:
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
    # From the last to the first: a node that is erased has no users.
    for old in (last, relu, added if residual is not None else None, node):
        if old is not None and not old._erased:
            graph.erase_node(old)


def _user(node: Node, fits: Callable[[Node, Node], bool]) -> Node | None:
    """The only user of a node, if it fits."""
    users = list(node.users)
    return users[0] if len(users) == 1 and fits(users[0], node) else None


def _is_sum(user: Node, node: Node) -> bool:
    """Whether `user` adds a map of the same kind to the node's."""
    functions, methods = (operator.add, operator.iadd, torch.add), ("add", "add_")
    if not _calls(user, functions, methods) or len(user.args) != 2 or user.kwargs:
        return False
    first, second = user.args
    if user.target in (operator.iadd, "add_") and first is not node:
        return False  # it writes into the other one
    here, there = _value(node), _value(second if first is node else first)
    return first is not second and _is_map(there) and there.shape == here.shape and there.dtype == here.dtype


def _is_relu(user: Node, node: Node) -> bool:
    return _calls(user, (F.relu, torch.relu, F.relu_, torch.relu_), ("relu", "relu_")) and user.args[:1] == (node,)


def _is_stem_pool(user: Node, node: Node) -> bool:
    if not _calls(user, (F.max_pool2d, torch.max_pool2d), ()):
        return False
    names = "input kernel_size stride padding dilation ceil_mode return_indices"
    a = _arguments(user, names, (None, 0, 1, False, False))
    pairs = ((a["kernel_size"], 3), (a["stride"], 2), (a["padding"], 1), (a["dilation"], 1))
    same = all(given == n or (isinstance(given, Sequence) and list(given) == [n, n]) for given, n in pairs)
    return a["input"] is node and same and not a["ceil_mode"] and not a["return_indices"]


_READERS = (torch.conv2d, F.conv2d, operator.add, torch.add, F.adaptive_avg_pool2d, F.max_pool2d, batch_norm)


def _only_reads(user: Node, node: Node) -> bool:
    """Whether `user` is known neither to write into the node's tensor nor to return a view of it."""
    if _calls(user, (operator.iadd,), ("add_",)):
        return user.args[0] is not node
    return _calls(user, (*_READERS, batch_norm_pool, F.batch_norm), ())


def _may_move(node: Node, to: Node, norm: _Norm) -> bool:
    """Whether the norm can be computed where `to` is: what it reads is the same there, and nobody waits for what it
    writes."""
    if len(norm.running_mean.users) > 1 or len(norm.running_var.users) > 1:
        return False
    memory = _memory(norm.x)
    between = node.next
    while between is not to:
        touching = [n for n in between.all_input_nodes if _memory(n) == memory]
        if any(not _only_reads(between, n) for n in touching):
            return False
        between = between.next
    return True


def _calls(node: Node, functions: tuple[Any, ...], methods: tuple[str, ...]) -> bool:
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _arguments(node: Node, names: str, defaults: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of a call by name. defaults: of the last parameters."""
    each = names.split()
    return (
        dict(zip(each[-len(defaults) :], defaults, strict=True))
        | dict(zip(each, node.args, strict=False))
        | node.kwargs
    )


def _value(node: Any) -> Any:
    """What Dynamo computed for a node: a tensor without memory."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def _memory(node: Any) -> int | None:
    """What memory a node's tensor is in."""
    value = _value(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_map(value: Any) -> bool:
    """Whether a value is an activation map that our kernels take."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FLOAT_TYPES
        and value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
    )
