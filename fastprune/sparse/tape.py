"""The training tape: a program's operations, forward and backward, in the sparse layout.

Values and gradients live in planes (`conv.Plane`) that are made once and reused at every step. Convolutions read and
write kept weights alone, one vector for the whole network; all other parameters are the module's own. What no kernel
computes is left to torch and its autograd, between two conversions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from weakref import proxy

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels import lanes_norm as kernels
from fastprune.kernels.lanes import BYTES, address, blocks_of, from_lanes, to_lanes
from fastprune.sparse import planes
from fastprune.sparse.conv import Geometry, Plane, SparseConv
from fastprune.sparse.planes import Buffer, Threads, plane_of
from fastprune.sparse.program import (
    Add,
    Conv,
    Island,
    Linear,
    MaxPool,
    Mean,
    Name,
    Norm,
    Program,
    Relu,
    Torch,
    Value,
    inputs,
    is_size,
    islands,
    map_leaves,
)


class Tape:
    """Forward and backward of a program, of which torch computes the islands; of such a program in training only.

    parameters: the module's parameters and buffers by name; running statistics are updated in place. gradients: by
    name, where gradients of parameters that are not in `keep` are written. keep: masks of convs and linear layers,
    bool [O, KH, KW, I]. `values` and `kept_gradients`, float32, hold the kept weights of all of these, one after the
    other in `spans`, each in storage order.
    """

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        keep: Mapping[str, np.ndarray],
        threads: int = 1,
    ) -> None:
        self.program, self.gradients = program, gradients
        self.parameters = {**program.constants, **parameters}
        self.threads = Threads(threads)
        self.spans: dict[str, slice] = {}
        end = 0
        for name, mask in keep.items():
            self.spans[name] = slice(end, end := end + int(np.count_nonzero(mask)))
        # torch's fused SGD rounds the elements that do not fill a vector of 64 differently.
        self.values, self.kept_gradients = (torch.zeros(-(-end // 64) * 64) for _ in range(2))
        self._blocks = 0  # that the buffers have room for
        self._values: dict[int, Buffer] = {}
        self._free: dict[Plane, list[Buffer]] = defaultdict(list)
        self._places: dict[int, Tensor] = {}
        self._scratch = torch.empty(0)
        producers = {op.y.number: op for op in program.ops}
        self._planes, self._gradient_planes = {}, {}
        consumers: dict[int, list[Any]] = defaultdict(list)
        for op in program.ops:
            if isinstance(op, Conv):
                consumers[op.x.number].append(op)
        values = [program.input, *(op.y for op in program.ops)]
        for v in values:
            if not v.batched or len(v.shape) not in (1, 3):  # within an island
                continue
            border = max((Geometry.of_op(op).border for op in consumers[v.number]), default=0)
            self._planes[v.number] = plane_of(v.shape, border)
            made = producers.get(v.number)
            border = Geometry.of_op(made).gradient_border if isinstance(made, Conv) else 0
            self._gradient_planes[v.number] = plane_of(v.shape, border)
        self.sizes: dict[Value, Any] = {}  # numbers that islands gave in this step
        self._ops: list[_Op] = [self._lowered(part, keep) for part in islands(program)]
        read = [v for op in program.ops for v in inputs(op)] + [program.output]
        for conv, norm in pairwise(self._ops):
            if not isinstance(conv, _Weighted) or not isinstance(norm, _Norm):
                continue
            if norm.op.x == conv.op.y and read.count(conv.op.y) == 1:
                conv.norm, norm.conv = norm, proxy(conv)  # not a circle, either

    def _lowered(self, op: Any, keep: Mapping[str, np.ndarray]) -> "_Op":
        if isinstance(op, Island):
            return _Island(self, op, keep)
        if isinstance(op, Conv | Linear) and op.weight in keep:
            return _Weighted(self, op, keep[op.weight])
        return {Linear: _Linear, Norm: _Norm, Relu: _Relu, Add: _Add, MaxPool: _MaxPool, Mean: _Mean}[type(op)](
            self, op
        )

    def forward(self, images: Tensor, train: bool) -> Tensor:
        """The output, float32 [B, ...], new memory. images: float32 [B, C, H, W]. train: batch norm takes the batch's
        statistics and updates the running ones, and `backward` may follow. ValueError for images of another size or
        type than the program's."""
        if images.shape[1:] != self.program.input.shape or images.dtype != torch.float32:
            known, given = (" x ".join(map(str, sizes)) for sizes in (self.program.input.shape, images.shape[1:]))
            kind = str(images.dtype).removeprefix("torch.")
            raise ValueError(f"the sparse engine takes images of {known} in float32, got {given} in {kind}")
        self.images, self.blocks, self.train = len(images), blocks_of(len(images)), train
        if self.blocks > self._blocks:
            # Buffers are as large as the largest batch so far; smaller ones use their first blocks.
            self._blocks = self.blocks
            self._values.clear()
            self._free.clear()
            self._places.clear()
        to_lanes(images, self.value(self.program.input).interior(self.blocks))
        for op in self._ops:
            op.forward()
        return self.batch(self.value(self.program.output))

    def backward(self, gradient: Tensor) -> None:
        """Writes the gradients of all parameters, given that of the output, float32 [B, ...]."""
        self._grads: dict[int, Buffer] = {}
        to_lanes(_as_maps(gradient), self.gradient(self.program.output)[0].interior(self.blocks))
        for op in reversed(self._ops):
            op.pull_back()

    def release(self, gradient: Buffer) -> None:
        """Frees the memory of a value's gradient, unless it has become another's."""
        if gradient not in self._grads.values():
            self._free[gradient.plane].append(gradient)

    def batch(self, value: Buffer) -> Tensor:
        """A value as float32 [B, F] or [B, C, H, W], new memory."""
        found = from_lanes(value.interior(self.blocks), self.images)
        return found.flatten(1) if found.shape[2:] == (1, 1) else found

    def _new(self, plane: Plane) -> Buffer:
        return Buffer(plane, torch.zeros(plane.shape(self._blocks)))

    def places(self, v: Value) -> int:
        """The address of room for the tap of each maximum of a pooled value."""
        if v.number not in self._places:
            self._places[v.number] = torch.empty(self._blocks, *v.shape, 16)
        return address(self._places[v.number])

    def scratch(self, vectors: int) -> Callable[[int], int]:
        """By thread, the address of memory for so many vectors, until the next call."""
        count = self.threads.number * vectors
        if len(self._scratch) < count:
            self._scratch = torch.empty(count, 16)
        return lambda thread: address(self._scratch) + thread * vectors * BYTES

    def value(self, v: Value) -> Buffer:
        if v.number not in self._values:
            self._values[v.number] = self._new(self._planes[v.number])
        return self._values[v.number]

    def gradient(self, v: Value) -> tuple[Buffer, bool]:
        """(the buffer of a value's gradient, whether it holds a part of it that must be added to)."""
        if v.number in self._grads:
            return self._grads[v.number], True
        plane = self._gradient_planes[v.number]
        self._grads[v.number] = self._free[plane].pop() if self._free[plane] else self._new(plane)
        return self._grads[v.number], False

    def pass_on(self, v: Value, gradient: Buffer, give: bool = True) -> None:
        """Adds `gradient` to that of `v`. give: it is not needed otherwise, so that its memory may become v's."""
        if give and v.number not in self._grads and gradient.plane == self._gradient_planes[v.number]:
            self._grads[v.number] = gradient
            return
        into, more = self.gradient(v)
        planes.add(self.threads, gradient, into if more else None, into, self.blocks)

    def needs_gradient(self, v: Value) -> bool:
        return v.number != self.program.input.number

    def close(self) -> None:
        self.threads.close()

    def nbytes(self) -> int:
        """Bytes of all buffers of values and gradients."""
        every = [*self._values.values(), *(b for free in self._free.values() for b in free)]
        return sum(b.tensor.nbytes for b in every)


def _as_maps(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.dim() == 2 else features


class _Op:
    """An operation on a tape. forward reads and writes values; backward gets the gradient of y and adds to that of x,
    which it may overwrite."""

    def __init__(self, tape: Tape, op: Any) -> None:
        # A tape refers to its operations: with a circle only Python's garbage collector would free its buffers.
        self.tape, self.op = proxy(tape), op

    def forward(self) -> None:
        raise NotImplementedError

    def pull_back(self) -> None:
        """Takes the gradient of y from the tape, and passes it on."""
        found = self.tape._grads.pop(self.op.y.number, None)
        if found is None:  # nothing that the loss depends on
            self.no_gradient()
            return
        self.backward(found)
        self.tape.release(found)

    def backward(self, g: Buffer) -> None:
        raise NotImplementedError

    def no_gradient(self) -> None:
        """Sets the gradients of the parameters to 0: the loss does not depend on them."""
        for name in (getattr(self.op, "weight", None), getattr(self.op, "bias", None)):
            if name is not None and name in self.tape.gradients:
                self.tape.gradients[name].zero_()


class _Weighted(_Op):
    """A convolution, or a linear layer as one on maps of one position, over kept weights."""

    def __init__(self, tape: Tape, op: Conv | Linear, keep: np.ndarray) -> None:
        super().__init__(tape, op)
        x, y, geometry = tape._planes[op.x.number], tape._planes[op.y.number], Geometry.of_op(op)
        dx = tape._gradient_planes[op.x.number] if tape.needs_gradient(op.x) else None
        self.conv = SparseConv(keep, geometry, x, y, tape._gradient_planes[op.y.number], dx)
        self.span = tape.spans[op.weight]
        self.positions = y.height * y.width if geometry.unrolled else 1
        # For the values in the order of each product's lists: with its own memory a thread orders what it then reads.
        self._ahead, *self._back = (np.empty(p.lists.entries, np.float32) for p in (self.conv.ahead, *self.conv.back))
        self._sums = np.empty(self.conv.ahead.lists.entries + 3, np.float32)
        self.norm: _Norm | None = None
        """What alone reads the output: a thread goes on with the channels that it has computed."""

    def channels(self, thread: int) -> tuple[int, int]:
        """The output channels of a thread, first and end."""
        lists = self.conv.ahead.lists
        first, last = (row // lists.together for row in lists.part(thread, self.tape.threads.number))
        return first, last

    def forward(self) -> None:
        tape, product, number = self.tape, self.conv.ahead, self.tape.threads.number
        x, y, values = tape.value(self.op.x), tape.value(self.op.y), tape.values[self.span].numpy()
        bias = None
        if self.op.bias is not None:
            bias = np.repeat(tape.parameters[self.op.bias].detach().numpy(), self.positions)

        normalize = None if self.norm is None else self.norm.start()

        def run(thread: int) -> None:
            part = product.lists.part(thread, number)
            ordered = product.lists.ordered(values, self._ahead, part)
            product.multiply(x.address, y.address, ordered, tape.blocks, part, bias=bias)
            if normalize is not None:
                normalize(thread, *self.channels(thread))

        tape.threads.each(run)
        if self.norm is not None:
            self.norm.finish()

    def weight_gradients(self, g: Buffer) -> Callable[[int], None]:
        """What a thread does for the gradients of its channels' weights, from those of the output's same channels."""
        tape, product = self.tape, self.conv.weight_pass
        assert product is not None
        x, kept = tape.value(self.op.x), tape.kept_gradients[self.span].numpy()

        def run(thread: int) -> None:
            part = product.lists.part(thread, tape.threads.number)
            product.lists.clear(self._sums, part)
            product.correlate(x.address, g.address, self._sums.ctypes.data, tape.blocks, part)
            first, last = (self.conv.filters[channel] for channel in self.channels(thread))
            kept[first:last] = 0
            product.lists.add_up(self._sums, kept, part)

        return run

    def backward(self, g: Buffer) -> None:
        tape, values = self.tape, self.tape.values[self.span].numpy()
        # Those of a conv before batch norm are there already.
        weights = self.weight_gradients(g) if self.norm is None else None
        dx, add = tape.gradient(self.op.x) if self.conv.back else (None, False)

        def run(thread: int) -> None:
            if weights is not None:
                weights(thread)
            for back, into in zip(self.conv.back, self._back, strict=True):
                assert dx is not None
                part = back.lists.part(thread, tape.threads.number)
                ordered = back.lists.ordered(values, into, part)
                back.multiply(g.address, dx.address, ordered, tape.blocks, part, add)

        tape.threads.each(run)
        if self.op.bias in tape.gradients:
            torch.sum(g.interior(tape.blocks), (0, 2, 3, 4), out=tape.gradients[self.op.bias])

    def no_gradient(self) -> None:
        super().no_gradient()
        self.tape.kept_gradients[self.span].zero_()


class _Norm(_Op):
    """Batch norm with what follows it: a residual sum, a ReLU, max pooling."""

    def __init__(self, tape: Tape, op: Norm) -> None:
        super().__init__(tape, op)
        norm, c = op.batch_norm, op.x.shape[0]
        self._mean, self._variance = np.zeros(c), np.zeros(c)
        ones, zeros = torch.ones(c), torch.zeros(c)
        self._weight = ones if norm.weight is None else tape.parameters[norm.weight].detach()
        self._bias = zeros if norm.bias is None else tape.parameters[norm.bias].detach()
        # Gradients of parameters that are frozen or do not exist go nowhere.
        self._into = [tape.gradients.get(n or "", torch.empty(c)).numpy() for n in (norm.weight, norm.bias)]
        if op.pool is not None:
            self._window = planes.window_of(op.pool)
        self.conv: _Weighted | None = None
        """The conv whose output nothing else reads."""

    def forward(self) -> None:
        if self.conv is None:  # else that has done it
            self.tape.threads.channels(self.op.x.shape[0], self.start())
            self.finish()

    def start(self) -> Callable[[int, int, int], Any]:
        """The forward pass of some channels: (thread, first, last)."""
        tape, norm = self.tape, self.op.batch_norm
        y, z = tape.value(self.op.x), tape.value(self.op.y)
        train = tape.train
        if not train:
            self._mean[:] = tape.parameters[norm.mean].numpy()
            self._variance[:] = tape.parameters[norm.var].numpy()
        affine = self._weight.numpy(), self._bias.numpy(), norm.eps, self._mean, self._variance, train
        sizes, pool = (tape.blocks, tape.images), self.op.pool
        if pool is not None:
            where, scratch = tape.places(self.op.y) if train else 0, tape.scratch(planes.padded(y.plane, pool.padding))
            return planes.norm_pool(y, z, sizes, affine, self._window, pool.padding, where, scratch)
        add = None if self.op.residual is None else tape.value(self.op.residual)
        return planes.norm(y, z, add, sizes, affine, self.op.relu)

    def finish(self) -> None:
        """Updates the running statistics after all channels."""
        norm, tape = self.op.batch_norm, self.tape
        if not tape.train:
            return
        count = tape.images * self.op.x.shape[1] * self.op.x.shape[2]
        variance = torch.from_numpy(self._variance) * (count / max(1, count - 1))
        for name, now in ((norm.mean, torch.from_numpy(self._mean)), (norm.var, variance)):
            tape.parameters[name].mul_(1 - norm.momentum).add_(now.float(), alpha=norm.momentum)
        if norm.count is not None:
            tape.parameters[norm.count].add_(1)

    def backward(self, g: Buffer) -> None:
        tape, norm = self.tape, self.op.batch_norm
        y, z = tape.value(self.op.x), tape.value(self.op.y)
        p = y.plane
        dy, add = tape.gradient(self.op.x)
        before = dy
        if add:  # another operation reads what is normalised: its gradient is added afterwards
            del tape._grads[self.op.x.number]
            dy, _ = tape.gradient(self.op.x)
        sizes = p.height, p.width, tape.blocks, tape.images
        saved = self._weight.numpy(), norm.eps, self._mean, self._variance
        run: Callable[[int, int, int], Any]
        if self.op.pool is not None:
            where, padding = tape.places(self.op.y), self.op.pool.padding
            scratch = tape.scratch(tape.blocks * planes.padded(p, padding))
            run = lambda i, *part: kernels.norm_pool_backward(  # noqa: E731
                y.inner, y.steps, z.inner, z.steps, where, g.inner, g.steps, dy.inner, dy.steps, *sizes, *saved,
                *self._into, self._window, padding, scratch(i), *part,
            )  # fmt: skip
        else:
            run = lambda _, *part: kernels.norm_backward(  # noqa: E731
                y.inner, y.steps, z.inner, z.steps, g.inner, g.steps, dy.inner, dy.steps, *sizes, *saved,
                self.op.relu, *self._into, *part,
            )  # fmt: skip
        conv = self.conv
        if conv is None:
            tape.threads.channels(p.channels, run)
        else:
            weights = conv.weight_gradients(dy)

            def both(thread: int) -> None:
                run(thread, *conv.channels(thread))
                weights(thread)

            tape.threads.each(both)
        if self.op.residual is not None:
            tape.pass_on(self.op.residual, g)
        if add:
            tape.pass_on(self.op.x, before)
            tape._free[before.plane].append(before)

    def no_gradient(self) -> None:
        for into in self._into:
            into[:] = 0


class _Relu(_Op):
    def forward(self) -> None:
        tape = self.tape
        planes.add(tape.threads, tape.value(self.op.x), None, tape.value(self.op.y), tape.blocks, positive=True)

    def backward(self, g: Buffer) -> None:
        tape = self.tape
        z, (dx, add) = tape.value(self.op.y), tape.gradient(self.op.x)
        p = z.plane
        tape.threads.channels(
            p.channels,
            lambda _, *part: kernels.relu_backward(
                z.inner, z.steps, g.inner, g.steps, dx.inner, dx.steps, p.height, p.width, tape.blocks, add, *part
            ),
        )


class _Add(_Op):
    def forward(self) -> None:
        x, other, y = (self.tape.value(v) for v in (self.op.x, self.op.other, self.op.y))
        planes.add(self.tape.threads, x, other, y, self.tape.blocks)

    def backward(self, g: Buffer) -> None:
        # Copied for the first: the two gradients go different ways, and either may be added to.
        self.tape.pass_on(self.op.x, g, give=False)
        self.tape.pass_on(self.op.other, g)


class _MaxPool(_Op):
    def __init__(self, tape: Tape, op: MaxPool) -> None:
        super().__init__(tape, op)
        self._window = planes.window_of(op)

    def forward(self) -> None:
        tape, padding = self.tape, self.op.padding
        x, z, places = tape.value(self.op.x), tape.value(self.op.y), tape.places(self.op.y) if tape.train else 0
        scratch = tape.scratch(planes.padded(x.plane, padding))
        planes.max_pool(tape.threads, x, z, tape.blocks, self._window, padding, places, scratch)

    def backward(self, g: Buffer) -> None:
        tape = self.tape
        (dx, add), where, padding = tape.gradient(self.op.x), tape.places(self.op.y), self.op.padding
        p = dx.plane
        scratch = tape.scratch(planes.padded(p, padding))
        tape.threads.channels(
            p.channels,
            lambda i, *part: kernels.pool_backward(
                g.inner, g.steps, where, dx.inner, dx.steps, p.height, p.width, tape.blocks, p.channels, self._window,
                padding, scratch(i), add, *part,
            ),
        )  # fmt: skip


class _Mean(_Op):
    def forward(self) -> None:
        tape = self.tape
        planes.mean(tape.threads, tape.value(self.op.x), tape.value(self.op.y), tape.blocks)

    def backward(self, g: Buffer) -> None:
        tape = self.tape
        dx, add = tape.gradient(self.op.x)
        p = dx.plane
        tape.threads.channels(
            p.channels,
            lambda _, *part: kernels.mean_backward(
                g.address, dx.inner, dx.steps, p.height, p.width, tape.blocks, p.channels, add, *part
            ),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of torch's: the rounding of its matrix products depends on their number."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


class _Linear(_Op):
    """A linear layer without a mask: torch's own product."""

    @_one_thread()
    def forward(self) -> None:
        tape = self.tape
        self._features = tape.batch(tape.value(self.op.x))
        weight, bias = (n and tape.parameters[n].detach() for n in (self.op.weight, self.op.bias))
        out = torch.nn.functional.linear(self._features, weight, bias)
        to_lanes(_as_maps(out), tape.value(self.op.y).interior(tape.blocks))

    @_one_thread()
    def backward(self, g: Buffer) -> None:
        tape = self.tape
        gradient = tape.batch(g)
        if self.op.weight in tape.gradients:
            torch.mm(gradient.t(), self._features, out=tape.gradients[self.op.weight])
        if self.op.bias in tape.gradients:
            torch.sum(gradient, 0, out=tape.gradients[self.op.bias])
        into, add = tape.gradient(self.op.x)
        back = gradient @ tape.parameters[self.op.weight].detach()
        if add:
            back += tape.batch(into)
        to_lanes(_as_maps(back), into.interior(tape.blocks))


class _Island(_Op):
    """Operations of torch, by its autograd. Weights with masks are made dense in each step."""

    def __init__(self, tape: Tape, op: Island, keep: Mapping[str, np.ndarray]) -> None:
        super().__init__(tape, op)
        self._kept = {name: torch.from_numpy(keep[name]) for name in op.names if name in keep}
        self._learn = [name for name in op.names if name in self._kept or name in tape.gradients]

    def _known(self) -> dict[str, Tensor]:
        """Parameters, buffers and constants by name; those that are trained are leaves that require a gradient."""
        tape, found = self.tape, {}
        for name in self.op.names:
            tensor = tape.parameters[name].detach()
            if name in self._kept:
                dense = torch.zeros(self._kept[name].shape)
                dense[self._kept[name]] = tape.values[tape.spans[name]]
                tensor = dense.permute(0, 3, 1, 2) if tensor.dim() == 4 else dense.flatten(1)
            found[name] = tensor.requires_grad_() if name in self._learn else tensor
        return found

    def _of_torch(self, value: Value, buffer: Buffer) -> Tensor:
        return from_lanes(buffer.interior(self.tape.blocks), self.tape.images).view(-1, *value.shape)

    @_one_thread()
    @torch.enable_grad()
    def forward(self) -> None:
        tape = self.tape
        assert tape.train, "operations of torch are those of training"
        values: dict[Value, Any] = {}
        for value in self.op.reads:
            values[value] = self._of_torch(value, tape.value(value)).requires_grad_(tape.needs_gradient(value))
        known = self._known()

        def argument(leaf: Any) -> Any:
            if isinstance(leaf, Name):
                return known[leaf.name]
            return (tape.sizes if leaf in tape.sizes else values)[leaf] if isinstance(leaf, Value) else leaf

        for op in self.op.ops:
            if is_size(op):
                tape.sizes[op.y] = self._size(op, argument)
            else:
                values[op.y] = op.target(*map_leaves(argument, op.args), **map_leaves(argument, op.kwargs))
        for value in self.op.gives:
            found = values[value].detach()
            assert found.dtype == torch.float32
            assert found.shape == (tape.images, *value.shape)
            to_lanes(_as_maps(found), tape.value(value).interior(tape.blocks))
        self._leaves = [*(values[v] for v in self.op.reads if values[v].requires_grad), *map(known.get, self._learn)]
        self._results = [values[value] for value in self.op.gives]

    def _size(self, op: Torch, argument: Callable[[Any], Any]) -> Any:
        # Of a value in lanes, which need not be converted for that.
        if op.name == "aten.sym_size":
            value, dimension = op.args
            if isinstance(value, Value) and value.batched:
                return (self.tape.images, *value.shape)[dimension]
        return op.target(*map_leaves(argument, op.args), **map_leaves(argument, op.kwargs))

    @_one_thread()
    def pull_back(self) -> None:
        tape = self.tape
        given: list[tuple[Tensor, Tensor]] = []
        for value, result in zip(self.op.gives, self._results, strict=True):
            gradient = tape._grads.pop(value.number, None)
            if gradient is not None:
                if result.requires_grad:
                    given.append((result, self._of_torch(value, gradient)))
                tape.release(gradient)
        found: list[Tensor | None] = [None] * len(self._leaves)
        if given and self._leaves:
            results, gradients = zip(*given, strict=True)
            found = list(torch.autograd.grad(results, self._leaves, gradients, allow_unused=True))
        self._leaves, self._results = [], []
        learnt = found[len(found) - len(self._learn) :]
        for value, back in zip((v for v in self.op.reads if tape.needs_gradient(v)), found, strict=False):
            if back is not None:
                into, add = tape.gradient(value)
                back = back + self._of_torch(value, into) if add else back
                to_lanes(_as_maps(back), into.interior(tape.blocks))
        for name, gradient in zip(self._learn, learnt, strict=True):
            if name not in self._kept:
                into = tape.gradients[name]
                into.zero_() if gradient is None else into.copy_(gradient)
            elif gradient is None:
                tape.kept_gradients[tape.spans[name]] = 0
            else:
                stored = gradient.permute(0, 2, 3, 1) if gradient.dim() == 4 else gradient[:, None, None]
                tape.kept_gradients[tape.spans[name]] = stored[self._kept[name]]
