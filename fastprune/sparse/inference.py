"""Compiled inference: a network's forward on kept weights alone, on a CPU in float32.

A model is lowered to a program, its batch norms are folded, and each operation is placed: *in lanes*, the layout of
kernels/lanes.py, or in torch. Convolutions finish their tiles with bias, residual sum and ReLU while these are in
registers. Values are converted where an operation reads one of the other place, and their memory is used again as soon
as no operation needs it.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.errors import InputError, kind_of, not_a_module
from fastprune.kernels.dense_conv import GROUP, dense_product
from fastprune.kernels.lanes import BYTES, LANES, address, blocks_of, from_lanes, to_lanes
from fastprune.kernels.sparse_chain import COLUMNS, chain
from fastprune.kernels.sparse_conv import Tile, spmm, tile
from fastprune.kernels.winograd import POINTS, TAPS, stem, tiles_of_stem, transformed_weights
from fastprune.sparse import conv, planes
from fastprune.sparse.conv import Geometry, Piece, Plane, Product, pieces, tile_vectors, tiling
from fastprune.sparse.file import Kept, Weights, read, write
from fastprune.sparse.planes import Buffer, Threads, plane_of
from fastprune.sparse.program import (
    Add,
    FusedConv,
    Linear,
    MaxPool,
    Mean,
    Name,
    Norm,
    Op,
    Program,
    Relu,
    Torch,
    Unsupported,
    Value,
    fold,
    fuse,
    inputs,
    lower,
    map_leaves,
    names,
)

DENSEST = 0.7
"""Layers that keep more of their weights are computed densely: an entry of a list costs more than its share there."""

DENSEST_STEM = 0.25
"""The same for layers that kernels/winograd.py computes in a third of the multiply-adds."""

_POINTWISE, _ENTRIES = 384, 10
"""Vectors of input that a tile of a pointwise conv reads in a block of channels, for a first-level cache, and entries
that a row has there at least."""

_FLAT = 0.6
"""What a vector of sixteen images costs, by the model of `_Planner.few_images`, in one of sixteen output pixels: copies
and layers in torch cost the rest."""

STEM_CHANNELS = 4
"""Input channels of such a layer at most: their transforms must fit a second-level cache."""


def compile(model: nn.Module, example: Tensor) -> "CompiledModel":
    """`model` in evaluation mode, with what is zero in its weights left out.

    example: float32 [B, C, H, W] on a CPU, for the shape of images; any batch size may follow. The model is left as it
    was; the compiled one has its own copy of the weights. InputError if the model cannot be exported by torch.export,
    TypeError for what is no module or no tensor.
    """
    if not isinstance(model, nn.Module):
        raise not_a_module(model, "compile")
    _require_tensor(example, "compile takes an example")
    tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in (*tensors.items(), ("the example", example)):
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise InputError(f"compile takes float32 on a CPU: {name} is {tensor.dtype} on {tensor.device.type}")
    if example.dim() != 4 or example.dtype != torch.float32:
        raise InputError(f"compile takes an example float32 [B, C, H, W], got {example.dtype} {list(example.shape)}")
    with torch.no_grad():
        try:
            program, folded = fold(lower(model, example, train=False), tensors)
        except Unsupported as error:
            raise InputError(f"the model cannot be compiled: {error}") from error
        program = fuse(program)
        # In the order that `load` gives them, on which bits of operations in torch may depend.
        contiguous = torch.contiguous_format
        weights: dict[str, Tensor | Kept] = {n: t.detach().clone(memory_format=contiguous) for n, t in folded.items()}
    whole = {name for op in program.ops if isinstance(op, Torch) for name in names(op)}  # torch knows no lists
    for op in program.ops:
        if isinstance(op, FusedConv | Linear) and op.weight not in whole:
            weight = weights[op.weight]
            if isinstance(weight, Tensor) and int(weight.count_nonzero()) <= DENSEST * weight.numel():
                weights[op.weight] = Kept.of(weight)
    return CompiledModel(program, weights)


def _require_tensor(images: object, what: str) -> None:
    """TypeError unless `images` is a tensor. what: the beginning of the message."""
    if isinstance(images, Tensor):
        return
    mend = ""
    if isinstance(images, np.ndarray):
        mend = ": give torch.from_numpy(array).float()"
    elif isinstance(images, tuple | list) and len(images) == 1 and isinstance(images[0], Tensor):
        mend = ": give the tensor in it"
    raise TypeError(f"{what} float32 [B, C, H, W], a tensor, not {kind_of(images)}{mend}")


def _require(found: Any, shape: tuple[int, ...], what: str) -> None:
    """InputError unless it is a tensor as kernels read it. A file may say something else of what torch gives."""
    if not isinstance(found, Tensor):
        got = type(found).__name__
    elif found.device.type == "cpu" and found.layout == torch.strided and found.dtype == torch.float32:
        if found.shape == shape:
            return
        got = f"the shape {list(found.shape)}"
    else:
        got = f"{str(found.dtype).removeprefix('torch.')} in {found.layout} on {found.device}"
    raise InputError(f"{what} gives {got}, and the program says float32 {list(shape)}")


def load(path: str | Path) -> "CompiledModel":
    """The network in a file that `CompiledModel.save` wrote. InputError for a damaged or foreign file."""
    return CompiledModel(*read(path))


class CompiledModel:
    """A network that was made by `compile` or `load`.

    Several threads may call it; calls run one after another. Each call splits its work over torch.get_num_threads()
    threads; results do not depend on their number where no operation runs in torch. Memory for a batch size is kept
    until a batch of another size comes.
    """

    def __init__(self, program: Program, weights: Weights) -> None:
        self.program, self.weights = program, weights
        self._lock = threading.Lock()
        self._call = _Call(Threads(1))
        planner = _Planner(program, weights)
        self._steps = planner.steps()
        # Batches of so few images have sixteen output pixels in a vector, and not sixteen images.
        self._few_images = planner.few_images()
        self._few = _Planner(program, weights, few=True).steps()
        self._by_block = next((i for i, step in enumerate(self._steps) if not step.by_block), len(self._steps))
        last = next((op for op in program.ops if op.y == program.output), None)
        self._is_view = last is None or isinstance(last, Torch)
        early = self._steps[: self._by_block]
        gone = {place for step in early for place in step.dead}
        self._kept = frozenset(place[0] for step in early for place in step.made if place not in gone)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The output, float32 [B, ...], new memory. images: float32 [B, C, H, W] on a CPU. InputError for others,
        TypeError for what is no tensor."""
        _require_tensor(images, "images must be")
        if images.dtype != torch.float32 or images.is_cuda or tuple(images.shape[1:]) != self.program.input.shape:
            expected = ", ".join(map(str, ("B", *self.program.input.shape)))
            got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)} on {images.device.type}"
            alone = tuple(images.shape) == self.program.input.shape
            raise InputError(
                f"images must be float32 [{expected}] on a CPU, got {got}{': give images[None]' if alone else ''}"
            )
        if not len(images):
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        with self._lock:
            call = self._call
            if call.threads.number != torch.get_num_threads():
                call.threads.close()
                call.threads = Threads(torch.get_num_threads())
            call.begin(images, self.program.input, self._kept)
            if len(images) <= self._few_images:
                call.whole()
                for step in self._few:
                    step.run(call)
                few: Tensor = call.end(self.program.output)
                return few.clone() if self._is_view else few.contiguous()
            # Values of early layers are large: those of sixteen images stay in the cache from layer to layer.
            for block in call.parts():
                call.part(block, 1)
                for step in self._steps[: self._by_block]:
                    step.run(call, last=block == call.parts()[-1])
            call.whole()
            for step in self._steps[self._by_block :]:
                step.run(call)
            found: Tensor = call.end(self.program.output)
            # An operation in torch may return a view of the images or of weights.
            return found.clone() if self._is_view else found

    @property
    def in_torch(self) -> list[str]:
        """Names of the operations that run in torch because there is no kernel for them."""
        return self.program.unknown

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a file for `load`. dtype: float32 or float16, of the weights in it.

        InputError where an operation in torch or a tensor is none that a file can hold, or for another dtype.
        """
        write(path, self.program, self.weights, dtype)


class _Call:
    """The values of a call in progress, and memory that is kept between calls.

    images, blocks: of the part of the batch that is being computed, which begins at block `first`.
    """

    def __init__(self, threads: Threads) -> None:
        self.threads = threads
        self.images = self.blocks = self.first = 0
        self._batch = self._blocks = 0  # of the whole batch
        self._scratch: dict[str, Tensor] = {}
        self._lanes: dict[Value, Buffer] = {}
        self._free: dict[tuple[Plane, int], list[Buffer]] = defaultdict(list)
        self._torch: dict[Value, Any] = {}
        self._kept: Set[Value] = frozenset()

    def begin(self, images: Tensor, value: Value, kept: Set[Value]) -> None:
        """kept: values that are needed of the whole batch while a part of it is computed."""
        self._batch = len(images)
        if blocks_of(self._batch) != self._blocks:
            self._free.clear()
        # What a call left that ended with an error.
        self._lanes.clear()
        self._blocks, self._kept, self._torch = blocks_of(self._batch), kept, {value: images}

    def part(self, first: int, blocks: int) -> None:
        """From now on, computes these blocks of the batch."""
        self.first, self.blocks = first, blocks
        self.images = min(self._batch - LANES * first, LANES * blocks)

    def parts(self) -> range:
        return range(self._blocks)

    def whole(self) -> None:
        self.part(0, self._blocks)

    def end(self, value: Value) -> Any:
        found = self._torch[value]
        self._torch = {}
        return found

    def lanes(self, value: Value) -> Buffer:
        """The value for the images of this part."""
        found = self._lanes[value]
        if value in self._kept and self.blocks < self._blocks:
            return Buffer(found.plane, found.tensor[self.first : self.first + self.blocks])
        return found

    def new(self, value: Value, plane: Plane) -> Buffer:
        """Memory for a value; its border is 0."""
        if value not in self._lanes:
            blocks = self._blocks if value in self._kept else self.blocks
            free = self._free[plane, blocks]
            # Kernels write the inside only, so that borders stay 0.
            self._lanes[value] = free.pop() if free else Buffer(plane, torch.zeros(plane.shape(blocks)))
        return self.lanes(value)

    def rename(self, value: Value, new: Value) -> None:
        """Gives a value's memory to `new`, if both are of this part of the batch."""
        if (value in self._kept) == (new in self._kept):
            self._lanes[new] = self._lanes.pop(value)

    def vectors(self, use: str, count: int) -> int:
        """The address of scratch memory for `count` vectors: finite numbers."""
        if use not in self._scratch or len(self._scratch[use]) < count:
            self._scratch[use] = torch.zeros(count, 16)
        return address(self._scratch[use])

    def scratch(self, vectors: int) -> Callable[[int], int]:
        """By thread, the address of memory for so many vectors, until the next call."""
        first = self.vectors("scratch", self.threads.number * vectors)
        return lambda thread: first + thread * vectors * BYTES

    def torch(self, value: Value) -> Any:
        """The value in torch, of the images of this part."""
        found = self._torch[value]
        return found if self.images == self._batch else found[LANES * self.first :][: self.images]

    def put(self, value: Value, result: Any) -> None:
        self._torch[value] = result

    def free(self, value: Value, in_lanes: bool) -> None:
        if in_lanes and value in self._lanes:
            buffer = self._lanes.pop(value)
            self._free[buffer.plane, len(buffer.tensor)].append(buffer)
        elif not in_lanes:
            del self._torch[value]


Place = tuple[Value, bool]
"""A value, and whether it is in lanes."""


@dataclass(frozen=True)
class _Step:
    """What is done in one go. reads, made: the values that it reads and writes, with their places (True: in lanes).
    by_block: whether sixteen images at a time are as cheap as all at once. links: of a `_Chain`. dead: values that no
    later step reads."""

    what: str
    work: Callable[[_Call], None]
    reads: tuple[Place, ...]
    made: tuple[Place, ...]
    by_block: bool
    links: "tuple[_Link, ...]" = ()
    dead: tuple[Place, ...] = ()

    def run(self, call: _Call, last: bool = True) -> None:
        """last: of the parts of the batch."""
        self.work(call)
        for value, in_lanes in self.dead:
            if in_lanes or last:
                call.free(value, in_lanes)


class _Planner:
    """Places the operations of a program, and makes their steps."""

    def __init__(self, program: Program, weights: Weights, few: bool = False) -> None:
        """few: for batches of few images."""
        self.program, self.weights, self.few = program, weights, few
        self.readers: dict[Value, list[Op]] = defaultdict(list)
        for op in program.ops:
            for value in inputs(op):
                self.readers[value].append(op)
        self.makers = {op.y: op for op in program.ops}
        self.in_lanes = defaultdict(bool) if few else self._places()
        self.planes = self._planes()

    def _is_stem(self, op: Op) -> bool:
        """Whether kernels/winograd.py can compute an operation."""
        if not isinstance(op, FusedConv) or op.residual is not None or op.stride != (2, 2):
            return False
        sizes = all(TAPS < k <= 2 * TAPS for k in op.kernel) and all(n % 4 == 0 for n in op.y.shape[1:])
        return sizes and op.y.shape[0] % GROUP == 0 and op.x.shape[0] <= STEM_CHANNELS

    def _is_sparse(self, op: Op) -> bool:
        if not isinstance(op, FusedConv | Linear):
            return False
        weight = self.weights[op.weight]
        return isinstance(weight, Kept) and weight.density <= (DENSEST_STEM if self._is_stem(op) else DENSEST)

    def _dense(self, name: str) -> Tensor:
        weight = self.weights[name]
        return weight.dense() if isinstance(weight, Kept) else weight

    def _pool_after(self, op: Op) -> MaxPool | None:
        """The pooling that kernels/winograd.py does with a stem."""
        readers = self.readers[op.y]
        if not isinstance(op, FusedConv) or not op.relu or len(readers) != 1 or op.y == self.program.output:
            return None
        pool = readers[0]
        if not isinstance(pool, MaxPool) or not self.in_lanes[pool.y]:
            return None
        return pool if (pool.kernel, pool.stride, pool.padding) == ((3, 3), (2, 2), (1, 1)) else None

    def _places(self) -> dict[Value, bool]:
        """By the result of an operation: whether it runs in lanes."""
        found: dict[Value, bool] = {self.program.input: False}
        free = []
        for op in self.program.ops:
            if isinstance(op, Torch) or not self._fits(op):
                found[op.y] = False
            elif self._is_sparse(op):
                found[op.y] = True
            elif isinstance(op, Linear):
                found[op.y] = False  # a product of matrices, and small
            else:
                free.append(op)
        # What can run in both goes with what reads it, so that images enter the lanes before the first layer.
        for op in reversed(free):
            if not isinstance(op, Mean):
                # A Linear in torch reads few numbers.
                known = [found[r.y] for r in self.readers[op.y] if r.y in found and not isinstance(r, Linear)]
                if known:
                    found[op.y] = any(known)
        for op in free:
            if op.y not in found:
                found[op.y] = any(found[v] for v in inputs(op))
        return found

    def _fits(self, op: Op) -> bool:
        """Whether an operation can run in lanes at all."""
        if isinstance(op, MaxPool):
            return all(2 * p <= k for p, k in zip(op.padding, op.kernel, strict=True))
        if isinstance(op, FusedConv) and not self._is_sparse(op):
            return op.y.shape[0] % GROUP == 0
        return True

    def _planes(self) -> dict[Value, Plane]:
        """The planes of all values that are in lanes somewhere."""
        borders: dict[Value, int] = defaultdict(int)
        for op in self.program.ops:
            if isinstance(op, FusedConv | Linear) and self.in_lanes[op.y]:
                borders[op.x] = max(borders[op.x], Geometry.of_op(op).border)
                if isinstance(op, FusedConv) and self._is_stem(op) and not self._is_sparse(op):
                    # Windows of 14 inputs, of which the last tile's end at 2 * outputs + 5 - padding.
                    sizes = zip(op.y.shape[1:], op.x.shape[1:], op.padding, strict=True)
                    borders[op.x] = max(borders[op.x], *(2 * o + 6 - p - n for o, n, p in sizes))
        # Tiles of a result and of what is added to it lie at the same offsets, so that both need one border.
        changed = True
        while changed:
            changed = False
            for op in self.program.ops:
                if isinstance(op, FusedConv) and op.residual is not None:
                    most = max(borders[op.residual], borders[op.y])
                    changed |= borders[op.residual] != borders[op.y]
                    borders[op.residual] = borders[op.y] = most
        values = [self.program.input, *(op.y for op in self.program.ops)]
        return {v: plane_of(v.shape, borders[v]) for v in values if len(v.shape) in (1, 3)}

    def steps(self) -> list[_Step]:
        found: list[_Step] = []
        present: set[Place] = {(self.program.input, False)}

        def add(step: _Step) -> None:
            present.update(step.made)
            joined = _joined(found[-1], step) if found else None
            if joined is None:
                found.append(step)
            else:
                found[-1] = joined

        def need(value: Value, lanes: bool) -> None:
            if (value, lanes) not in present:
                work = self._into_lanes(value) if lanes else self._into_torch(value)
                add(_Step("convert", work, ((value, not lanes),), ((value, lanes),), lanes))

        pooled: set[Value] = set()
        for op in self.program.ops:
            if op.y in pooled:
                continue
            lanes, y = self.in_lanes[op.y], op.y
            for value in inputs(op):
                need(value, lanes)
            links: tuple[_Link, ...] = ()
            if lanes and isinstance(op, FusedConv) and self._is_stem(op) and not self._is_sparse(op):
                pool = self._pool_after(op)
                work = self._stem(op, pool)
                if pool is not None:
                    y = pool.y
                    pooled.add(y)
            elif lanes and isinstance(op, FusedConv) and self._is_sparse(op) and not Geometry.of_op(op).unrolled:
                links = (self._link(op),)
                work = _Chain(links).run
            else:
                work = self._lowered(op) if lanes else self._in_torch(op)
            reads = tuple((v, lanes) for v in inputs(op))
            add(_Step(type(op).__name__, work, reads, ((y, lanes),), lanes and self._fills(op), links))
        need(self.program.output, False)
        last = {place: i for i, step in enumerate(found) for place in (*step.reads, *step.made)}
        last.pop((self.program.output, False), None)
        dead: dict[int, list[Place]] = defaultdict(list)
        for place, i in last.items():
            dead[i].append(place)
        for i, step in enumerate(found):
            read = [value for link in step.links for value in inputs(link.op)]
            for link in step.links:
                added = link.op.residual
                link.in_place = added is not None and (added, True) in dead[i] and read.count(added) == 1
        return [replace(step, dead=tuple(dead[i])) for i, step in enumerate(found)]

    def _flat(self, op: FusedConv) -> "_Flat":
        weight = self.weights[op.weight]
        assert isinstance(weight, Kept)
        return _Flat(op, Geometry.of_op(op), weight, self._bias(op.bias, op.y.shape[0], 1))

    def _link(self, op: FusedConv) -> "_Link":
        weight, plane = self.weights[op.weight], self.planes[op.y]
        assert isinstance(weight, Kept)
        return _Link(op, Geometry.of_op(op), self.planes[op.x], plane, weight, self._bias(op.bias, plane.channels, 1))

    def few_images(self) -> int:
        """Batches of at most so many images are cheaper with output pixels in a vector. By shapes and kept weights."""
        flat = lanes = 0
        for op in self.program.ops:
            weight = self.weights[op.weight] if isinstance(op, FusedConv) and self._is_sparse(op) else None
            if isinstance(op, FusedConv) and isinstance(weight, Kept):
                geometry, kept = Geometry.of_op(op), len(weight.places)
                _, height, width = geometry.outputs
                vectors = ceil(height * (width + (op.kernel[1] - 1) // op.stride[1]) / LANES)
                size = 1 << (min(tile_vectors(), vectors).bit_length() - 1)
                # As in conv.tiling, an entry costs a tile about three instructions beside its vectors. On an unrolled
                # map about half of the pairs of positions have a tap.
                flat += kept * ceil(vectors / size) * (size + 3)
                cover = tiling(height, width, tile_vectors())
                tiles = sum(len(at) * (r * c + 3) for r, c, at in cover.pieces)
                lanes += kept * (2 * height * width if geometry.unrolled else tiles)
        return int(_FLAT * lanes / flat) if flat else 0

    def _fills(self, op: Op) -> bool:
        """Whether sixteen images of the result fill a tile."""
        _, height, width = (*op.y.shape, 1, 1)[:3]
        return height * width >= tile_vectors()

    def _into_lanes(self, value: Value) -> Callable[[_Call], None]:
        plane = self.planes[value]

        def work(call: _Call) -> None:
            found = call.torch(value)
            to_lanes(found if found.dim() == 4 else found[:, :, None, None], call.new(value, plane).interior())

        return work

    def _into_torch(self, value: Value) -> Callable[[_Call], None]:
        def work(call: _Call) -> None:
            found = from_lanes(call.lanes(value).interior(), call.images)
            call.put(value, found if len(value.shape) == 3 else found.flatten(1))

        return work

    # Operations in torch

    def _in_torch(self, op: Op) -> Callable[[_Call], None]:
        def tensor(name: str | None) -> Tensor | None:
            return None if name is None else self._dense(name)

        if isinstance(op, Torch):
            known = {**self.program.constants, **self.weights}
            by_kernels = any(not isinstance(reader, Torch) for reader in self.readers[op.y])

            def leaf(call: _Call, part: Any) -> Any:
                if isinstance(part, Name):
                    return known[part.name]
                return call.torch(part) if isinstance(part, Value) else part

            def run(call: _Call) -> Any:
                args, kwargs = map_leaves(lambda part: leaf(call, part), (op.args, op.kwargs))
                found = op.target(*args, **kwargs)
                if by_kernels:
                    _require(found, (call.images, *op.y.shape), op.name)
                    found = found.resolve_neg()  # torch may leave a minus for later
                return found
        elif isinstance(op, FusedConv) and self.few and self._is_sparse(op):
            flat = self._flat(op)

            def run(call: _Call) -> Any:
                return flat.run(call)
        elif isinstance(op, FusedConv):
            weight = tensor(op.weight)
            assert weight is not None
            weight, bias = weight.contiguous(memory_format=torch.channels_last), tensor(op.bias)

            def run(call: _Call) -> Any:
                y = F.conv2d(call.torch(op.x), weight, bias, op.stride, op.padding)
                y = y if op.residual is None else y.add_(call.torch(op.residual))
                return y.relu_() if op.relu else y
        elif isinstance(op, Norm):
            norm, pool = op.batch_norm, op.pool

            def run(call: _Call) -> Any:
                scale = tensor(norm.weight), tensor(norm.bias), False, 0.0, norm.eps
                y = F.batch_norm(call.torch(op.x), tensor(norm.mean), tensor(norm.var), *scale)
                y = y if op.residual is None else y.add_(call.torch(op.residual))
                y = y.relu_() if op.relu else y
                return y if pool is None else F.max_pool2d(y, pool.kernel, pool.stride, pool.padding)
        elif isinstance(op, Linear):
            matrix = cache(lambda: self._dense(op.weight).flatten(1))  # made only if such a batch comes

            def run(call: _Call) -> Any:
                y = F.linear(call.torch(op.x), matrix(), tensor(op.bias))
                return y.relu_() if op.relu else y
        elif isinstance(op, Add):

            def run(call: _Call) -> Any:
                return call.torch(op.x) + call.torch(op.other)
        elif isinstance(op, MaxPool):

            def run(call: _Call) -> Any:
                return F.max_pool2d(call.torch(op.x), op.kernel, op.stride, op.padding)
        elif isinstance(op, Mean):

            def run(call: _Call) -> Any:
                return call.torch(op.x).mean((2, 3))
        else:
            assert isinstance(op, Relu)

            def run(call: _Call) -> Any:
                return F.relu(call.torch(op.x))

        return lambda call: call.put(op.y, run(call))

    # Operations in lanes

    def _lowered(self, op: Op) -> Callable[[_Call], None]:
        match op:
            case FusedConv() | Linear():
                return self._product(op)
            case Norm():
                return self._norm(op)
            case Relu():
                return self._add(op.x, None, op.y, True)
            case Add():
                return self._add(op.x, op.other, op.y, False)
            case MaxPool():
                return self._max_pool(op)
            case Mean():
                return self._mean(op)
        raise AssertionError(op)

    def _bias(self, name: str | None, rows: int, repeats: int) -> np.ndarray:
        """float32 [rows * repeats]: the bias of each channel `repeats` times."""
        bias = torch.zeros(rows) if name is None else self.weights[name]
        assert isinstance(bias, Tensor)
        return np.repeat(bias.numpy(), repeats)

    def _product(self, op: FusedConv | Linear) -> Callable[[_Call], None]:
        geometry, plane = Geometry.of_op(op), self.planes[op.y]
        pointwise = (
            self._is_sparse(op) and geometry.unrolled and geometry.kernel == (1, 1) and not any(geometry.padding)
        )
        positions = plane.height * plane.width if geometry.unrolled and not pointwise else 1
        bias = self._bias(op.bias, plane.channels, positions)
        residual = op.residual if isinstance(op, FusedConv) else None
        x_plane, weight = self.planes[op.x], self.weights[op.weight]
        product: _Sparse | _Dense
        if isinstance(weight, Kept) and self._is_sparse(op) and pointwise:
            product = _Sparse.pointwise(geometry, x_plane, plane, weight, bias)
        elif isinstance(weight, Kept) and self._is_sparse(op):
            product = _Sparse(conv.forward(weight.mask, geometry, x_plane, plane), weight, bias)
        else:
            product = _Dense(geometry, x_plane, plane, self._dense(op.weight), bias)

        def work(call: _Call) -> None:
            x, add = call.lanes(op.x), 0 if residual is None else call.lanes(residual).address
            y = call.new(op.y, plane)
            call.threads.ranges(
                product.split(call.threads.number),
                lambda _, *part: product.run(x.address, y.address, add, op.relu, call.blocks, *part),
            )

        return work

    def _stem(self, op: FusedConv, pool: MaxPool | None) -> Callable[[_Call], None]:
        y = op.y if pool is None else pool.y
        transformed, bias = transformed_weights(self._dense(op.weight).numpy()), self._bias(op.bias, op.y.shape[0], 1)
        (channels, height, width), entries, plane = op.y.shape, 4 * op.x.shape[0], self.planes[y]
        bands, tiles = height // 4, width // 4
        up = (op.padding[0], op.padding[1])

        def work(call: _Call) -> None:
            x, z = call.lanes(op.x), call.new(y, plane)
            first_input = x.inner - up[0] * x.plane.row - up[1] * BYTES
            carry = call.vectors("carry", channels * (width + 1))

            def part(i: int, first: int, last: int) -> None:
                v = call.vectors(f"v{i}", POINTS**2 * entries * (-(-tiles // 4) * 4))
                m = call.vectors(f"m{i}", (4 * GROUP + 1) * POINTS**2)
                rows = call.vectors(f"rows{i}", 5 * GROUP * (width + 1))
                stem(
                    *tiles_of_stem(), first_input, x.steps, op.x.shape[0], address(transformed), bias, op.relu,
                    pool is not None, bands, tiles, call.blocks, v, m, rows, carry, z.inner, z.steps, first, last,
                )  # fmt: skip

            call.threads.channels(channels // GROUP, part)

        return work

    def _norm(self, op: Norm) -> Callable[[_Call], None]:
        norm, pool, channels = op.batch_norm, op.pool, op.x.shape[0]

        def numbers(name: str | None, default: Callable[..., Tensor]) -> Tensor:
            found = default(channels) if name is None else self.weights[name]
            assert isinstance(found, Tensor)
            return found

        weight, bias = (numbers(norm.weight, torch.ones).numpy(), numbers(norm.bias, torch.zeros).numpy())
        mean, variance = (numbers(name, torch.zeros).double().numpy() for name in (norm.mean, norm.var))
        affine = weight, bias, norm.eps, mean, variance, False
        plane = self.planes[op.y]
        window = None if pool is None else planes.window_of(pool)

        def work(call: _Call) -> None:
            x, y, sizes = call.lanes(op.x), call.new(op.y, plane), (call.blocks, call.images)
            if pool is not None:
                assert window is not None
                scratch = call.scratch(planes.padded(x.plane, pool.padding))
                run = planes.norm_pool(x, y, sizes, affine, window, pool.padding, 0, scratch)
            else:
                add = None if op.residual is None else call.lanes(op.residual)
                run = planes.norm(x, y, add, sizes, affine, op.relu)
            call.threads.channels(channels, run)

        return work

    def _add(self, x: Value, other: Value | None, y: Value, positive: bool) -> Callable[[_Call], None]:
        plane = self.planes[y]

        def work(call: _Call) -> None:
            a, b = call.lanes(x), None if other is None else call.lanes(other)
            planes.add(call.threads, a, b, call.new(y, plane), call.blocks, positive)

        return work

    def _max_pool(self, op: MaxPool) -> Callable[[_Call], None]:
        plane, window = self.planes[op.y], planes.window_of(op)

        def work(call: _Call) -> None:
            x, z = call.lanes(op.x), call.new(op.y, plane)
            scratch = call.scratch(planes.padded(x.plane, op.padding))
            planes.max_pool(call.threads, x, z, call.blocks, window, op.padding, 0, scratch)

        return work

    def _mean(self, op: Mean) -> Callable[[_Call], None]:
        plane = self.planes[op.y]
        # The kernel writes planes without a border.
        assert plane.border == 0

        def work(call: _Call) -> None:
            planes.mean(call.threads, call.lanes(op.x), call.new(op.y, plane), call.blocks)

        return work


class _Link:
    """A convolution over kept weights, as a line of `chain`'s table."""

    def __init__(
        self, op: FusedConv, geometry: Geometry, x: Plane, y: Plane, weight: Kept, bias: np.ndarray
    ) -> None:  # fmt: skip
        self.op, self.x, self.y, self.bias = op, x, y, bias
        self.in_place = False  # whether the result may take the memory of the residual
        product = conv.forward(weight.mask, geometry, x, y)
        self.lists, self.cover = product.lists, product.cover
        self.values = weight.values if self.lists.index is None else weight.values[self.lists.index]
        lists = self.lists
        self.fixed = (
            x.block, op.stride[0] * x.row, y.block, y.row, y.channel, y.channels, address(lists.start),
            lists.start.shape[0], address(lists.offsets), address(self.values), address(bias),
        )  # fmt: skip

    def line(self, call: _Call) -> tuple[int, ...]:
        op = self.op
        x, residual = call.lanes(op.x), 0
        if op.residual is not None:
            residual = call.lanes(op.residual).inner
            if self.in_place:
                call.rename(op.residual, op.y)
        y = call.new(op.y, self.y)
        return x.inner, y.inner, residual, *self.fixed, int(op.relu) + 2 * (op.stride[1] > 1)

    def may_follow(self, others: Sequence["_Link"]) -> bool:
        """Whether it can be computed tile by tile with those before it."""
        op, before = self.op, {link.op.y for link in others}
        steps = {link.op.stride[1] for link in (*others, self)} - {1}
        if self.cover != others[0].cover or len(steps) > 1:
            return False
        # Its tile of the input is then the tile of the output of an earlier one.
        pointwise = op.kernel == (1, 1) and op.stride == (1, 1) and op.padding == (0, 0)
        return pointwise or op.x not in before


def _joined(step: _Step, new: _Step) -> _Step | None:
    """Two steps as one chain, if they can be."""
    if not step.links or not new.links or not new.links[0].may_follow(step.links):
        return None
    links = step.links + new.links
    reads = tuple(place for place in new.reads if place not in step.made)
    return replace(step, work=_Chain(links).run, reads=(*step.reads, *reads), made=(*step.made, *new.made), links=links)


class _Chain:
    """Convolutions that are computed tile by tile, one after another."""

    def __init__(self, links: Sequence[_Link]) -> None:
        self.links = links
        self._pieces: dict[int, list[Piece]] = {}

    def run(self, call: _Call) -> None:
        table = np.array([link.line(call) for link in self.links], np.int64)
        assert table.shape[1] == COLUMNS
        for part in self._pieces_for(call.blocks):
            self._run_piece(call.threads, table, *part)

    def _run_piece(
        self, threads: Threads, table: np.ndarray, x_tile: Tile, y_tile: Tile, x_at: np.ndarray, y_at: np.ndarray
    ) -> None:
        number, tiles = threads.number, x_at.shape[1]
        if number == 1 or tiles >= 4 * number:
            threads.channels(tiles, lambda _, *part: chain(x_tile, y_tile, table, x_at, y_at, *part, 0, -1))
            return
        # Too few tiles for all threads: each takes some rows of a link, all of which the next link may read.
        for i, link in enumerate(self.links):
            one = table[i : i + 1], x_at[i : i + 1], y_at[i : i + 1], 0, tiles
            threads.ranges(link.lists.split(number), lambda _, *rows, one=one: chain(x_tile, y_tile, *one, *rows))

    def _pieces_for(self, blocks: int) -> list[Piece]:
        """(tile of x, tile of y, byte offsets in x, byte offsets in y) for so many blocks of images."""
        if blocks not in self._pieces:
            every = [pieces(k.cover, blocks, tile_vectors(), k.x, k.y, k.op.stride) for k in self.links]
            found = []
            for parts in zip(*every, strict=True):
                # The tiles of links differ in the step between columns, if at all.
                x_tile = max((part[0] for part in parts), key=lambda shape: len(shape[3]))
                found.append((x_tile, parts[0][1], *(np.stack([part[i] for part in parts]) for i in (2, 3))))
            self._pieces[blocks] = found
        return self._pieces[blocks]


class _Flat:
    """A convolution over kept weights for few images: sixteen neighbouring outputs in a vector.

    Inputs are padded and split by their parities (of any stride), so that a tap is a distance in memory. Rows follow
    one another without a gap: outputs between the last of a row and the first of the next are computed and not used.
    """

    def __init__(self, op: FusedConv, geometry: Geometry, weight: Kept, bias: np.ndarray) -> None:
        self.op, self.bias = op, bias
        (_, height, width), (kh, kw), (sh, sw) = geometry.outputs, geometry.kernel, geometry.stride
        self.pointwise = (kh, kw, sh, sw) == (1, 1, 1, 1) and geometry.padding == (0, 0)
        self.weight, self.geometry = weight, geometry
        # Of a parity of the inputs, and of the outputs.
        self.rows, self.row = height + (kh - 1) // sh, width + (kw - 1) // sw
        self._made: dict[tuple[int, int], tuple[conv.Lists, np.ndarray, np.ndarray]] = {}

    def _lists(self, row: int, channel: int) -> tuple[conv.Lists, np.ndarray, np.ndarray]:
        """Lists, values and places of rows in y for inputs with so many float32 in a row and in a channel."""
        if (row, channel) not in self._made:
            (kh, kw), (sh, sw) = self.geometry.kernel, self.geometry.stride
            taps = []
            for i, j in np.ndindex(kh, kw):
                parity = i % sh * sw + j % sw
                taps.append([(0, 4 * (parity * self.rows * row + i // sh * row + j // sw))])
            size = kh * kw * BYTES * tile_vectors() // (2 if kh * kw > 1 else 1)  # taps of a kernel share inputs
            kept, (outputs, _, _, inputs_) = len(self.weight.places), self.weight.shape
            block = conv.channels_in_block(kept, outputs, inputs_, size, 1.0)
            lists = conv.build(self.weight.mask, False, taps, 1, 4 * channel, block)
            values = self.weight.values if lists.index is None else self.weight.values[lists.index]
            self._made[row, channel] = lists, values, np.arange(outputs) * (4 * self._length(row))
        return self._made[row, channel]

    def _length(self, row: int) -> int:
        """float32 of a channel of outputs: whole vectors."""
        return -(-self.geometry.outputs[1] * row // LANES) * LANES

    def run(self, call: _Call) -> Tensor:
        op, x = self.op, call.torch(self.op.x)
        images, (outputs, height, width) = len(x), self.geometry.outputs
        if not (self.pointwise and x.stride(3) == 1 and x.stride(2) >= width and self._covers(x)):
            x = self._split(x)
        row, channel = x.stride(2), x.stride(1)
        lists, values, row_at = self._lists(row, channel)
        length = self._length(row)
        y = torch.empty(images, outputs, length)
        result = y[:, :, : height * row].unflatten(2, (height, row))[..., :width]
        added = None if op.residual is None else call.torch(op.residual)
        if added is not None and (added.stride() != result.stride() or not self._covers(added)):
            added = torch.empty_like(y)[:, :, : height * row].unflatten(2, (height, row))[..., :width].copy_(added)
        vectors = length // LANES
        size = 1 << (min(tile_vectors(), vectors).bit_length() - 1)
        # The last tile overlaps the one before it, so that there is one size.
        firsts = [min(first, vectors - size) * BYTES for first in range(0, vectors, size)]
        of_image = np.arange(images)[:, None]
        x_at, y_at = ((of_image * (4 * t.stride(0)) + firsts).ravel() for t in (x, y))
        shape = tile(1, 1, size)
        call.threads.ranges(
            lists.split(call.threads.number),
            lambda _, *part: spmm(
                shape, shape, address(x), address(y), 0, 0, 0, 0, x_at, y_at, row_at, *part, lists.start,
                address(lists.offsets), address(values), False, self.bias, 0 if added is None else address(added),
                op.relu,
            ),
        )  # fmt: skip
        return result

    def _covers(self, x: Tensor) -> bool:
        """Whether whole vectors of a map can be read, as of results of this class."""
        length = self._length(x.stride(2))
        end = x.storage_offset() + (len(x) - 1) * x.stride(0) + (x.shape[1] - 1) * x.stride(1) + length
        return x.stride(3) == 1 and x.stride(1) >= length and bool(end <= x.untyped_storage().nbytes() // 4)

    def _split(self, x: Tensor) -> Tensor:
        """The padded inputs, the rows of each parity after another, [B, C, parities * rows, row]; memory follows."""
        (sh, sw), (top, left) = self.geometry.stride, self.geometry.padding
        images, channels, height, width = x.shape
        size = sh * sw * self.rows * self.row
        # Whole vectors are read, from the last tap too.
        room = torch.zeros(images * channels * size + self._length(self.row) + size)
        parts = room[: images * channels * size].view(images, channels, sh, sw, self.rows, self.row)
        around = left, sw * self.row - width - left, top, sh * self.rows - height - top
        padded = F.pad(x, around).reshape(images, channels, self.rows, sh, self.row, sw)
        parts.copy_(padded.permute(0, 1, 3, 5, 2, 4))
        return parts.flatten(2, 4)


class _Sparse:
    """A convolution over kept weights."""

    def __init__(self, product: Product, weight: Kept, bias: np.ndarray) -> None:
        index = product.lists.index
        self.product, self.bias = product, bias
        self.values = weight.values if index is None else weight.values[index]

    @classmethod
    def pointwise(cls, geometry: Geometry, x: Plane, y: Plane, weight: Kept, bias: np.ndarray) -> "_Sparse":
        """Of one tap on a small map: a tile is the map for several blocks of images.

        `conv.forward` would unroll it, which saves nothing where no tap falls outside the map.
        """
        per_row = len(weight.places) / y.channels
        block = max(_POINTWISE // tile_vectors(), ceil(x.channels * _ENTRIES / max(per_row, 1e-9)))
        lists = conv.build(weight.mask, False, [[(0, 0)]], 1, x.channel, min(block, x.channels))
        cover = tiling(y.height, y.width, tile_vectors())
        product = Product(lists, x, y, x.origin, y.origin, geometry.stride, (1, 1), cover, y.rows_at(False))
        return cls(product, weight, bias)

    def split(self, parts: int) -> list[int]:
        """Bounds of `parts` ranges of rows with about equal work."""
        return self.product.lists.split(parts)

    def run(self, x: int, y: int, residual: int, positive: bool, blocks: int, first: int, last: int) -> None:
        """y = relu(conv(x) + bias + residual) for rows first to last. x, y, residual: addresses."""
        self.product.multiply(
            x, y, address(self.values), blocks, (first, last), bias=self.bias, residual=residual, positive=positive
        )


class _Dense:
    """A convolution that computes all weights, GROUP output channels together.

    All channels read from the same places: lists are those of one channel, with a row for each class of outputs. A
    class is a position of an unrolled map, or else the whole map.
    """

    def __init__(self, geometry: Geometry, x: Plane, y: Plane, weight: Tensor, bias: np.ndarray) -> None:
        (channels, height, width), (kh, kw), (ph, pw) = geometry.outputs, geometry.kernel, geometry.padding
        self.x, self.y, self.stride = x, y, geometry.stride
        firsts = list(np.ndindex(height, width)) if geometry.unrolled else [(0, 0)]
        taps: list[list[tuple[int, int]]] = [[] for _ in range(kh * kw)]
        if geometry.unrolled:
            for tap, (r, c), (row, column) in geometry.pairs():
                taps[tap].append((r * width + c, row * x.row + column * BYTES))
        else:
            for i, j in np.ndindex(kh, kw):
                taps[i * kw + j].append((0, (i - ph) * x.row + (j - pw) * BYTES))
        self.lists = conv.build(np.ones((1, kh, kw, x.channels), bool), False, taps, len(firsts), x.channel, x.channels)
        self.cover = tiling(*((1, 1) if geometry.unrolled else (height, width)), max(1, tile_vectors() // GROUP))
        self.per_class = channels // GROUP
        at = [r * y.row + c * BYTES for r, c in firsts]
        self.row_at = np.add.outer(at, np.arange(self.per_class) * (GROUP * y.channel)).ravel()
        # float32 [classes, groups, entries, GROUP], and [groups of all classes, GROUP].
        stored = (weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight).reshape(self.per_class, GROUP, -1)
        index = np.arange(stored.shape[2]) if self.lists.index is None else self.lists.index
        rows = [stored.numpy()[:, :, index[a:b]].transpose(0, 2, 1).ravel() for a, b in pairwise(self.lists.start[0])]
        self.values = np.concatenate(rows)
        bias = bias.reshape(self.per_class, GROUP, len(firsts))
        self.bias = np.ascontiguousarray(bias.transpose(2, 0, 1)).reshape(-1, GROUP)
        self._pieces: dict[int, list[Piece]] = {}

    def split(self, parts: int) -> list[int]:
        """Bounds of `parts` equal ranges of groups."""
        groups = len(self.row_at)
        return [groups * i // parts for i in range(parts + 1)]

    def run(self, x: int, y: int, residual: int, positive: bool, blocks: int, first: int, last: int) -> None:
        """y = relu(conv(x) + bias + residual) for groups first to last. x, y, residual: addresses."""
        if blocks not in self._pieces:
            vectors = max(1, tile_vectors() // GROUP)
            self._pieces[blocks] = pieces(self.cover, blocks, vectors, self.x, self.y, self.stride)
        for x_tile, y_tile, x_at, y_at in self._pieces[blocks]:
            dense_product(
                x_tile, y_tile, x + self.x.origin, y + self.y.origin, self.x.block, self.stride[0] * self.x.row,
                self.y.block, self.y.row, x_at, y_at, self.row_at, self.y.channel, first, last, self.per_class,
                self.lists.start[0], self.lists.offsets.ctypes.data, address(self.values), self.bias,
                residual + self.y.origin if residual else 0, positive,
            )  # fmt: skip
