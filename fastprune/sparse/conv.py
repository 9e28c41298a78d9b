"""A convolution with a mask as lists: where each kept weight finds its input, for each of the three passes.

Values are in the layout of kernels/lanes.py, [N/16][C][H+2p][W+2p][16] (`Plane`). Any kernel size, stride and padding
is only a list of offsets: a weight of tap (i, j) and input channel c reads c planes, i rows and j columns further. The
gradient of the input is the same product with the transposed lists; at stride 2 there is one list for each of the four
parities of the input's position, because each sees other taps.

Maps of at most 2 x 2 outputs are *unrolled*: each position counts as a channel of its own, so that taps which fall
outside the map cost nothing (20 of 36 for a 3 x 3 kernel on 2 x 2 maps) and no border is needed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from math import ceil
from typing import Any

import numpy as np
from llvmlite import binding

from fastprune.kernels.dispatch import compiled
from fastprune.kernels.lanes import BYTES
from fastprune.kernels.sparse_conv import Tile, clear, gather, scatter_add, sddmm, spmm, tile
from fastprune.sparse.program import Conv, FusedConv, Linear

UNROLLED = 4
"""Maps of at most so many outputs are unrolled."""

_TILE_BYTES = 24_000
"""Bytes of input that a tile reads in one block of channels: they stay in a first-level cache of 32 kB or more."""

_ENTRIES = 10
"""Entries that a row has at least in a block of channels, on average: they pay for loading and storing its tile."""


@lru_cache
def tile_vectors() -> int:
    """Vectors of sixteen images in a tile: what the machine's registers hold beside a broadcast weight."""
    # AVX-512 has 32 registers of 16 floats, AVX2 16 of 8.
    return 16 if has_avx512() else 6


def has_avx512() -> bool:
    """Whether kernels are compiled for AVX-512."""
    from numba.core import config

    # Of the environment, for a smaller instruction set than the machine's.
    features = getattr(config, "CPU_FEATURES", None)
    if features is not None:
        return "+avx512f" in features
    return bool(binding.get_host_cpu_features().get("avx512f", False))


@dataclass(frozen=True)
class Plane:
    """A value [C, H, W] in memory: [N/16][C][H+2p][W+2p][16] float32 with a border of p = `border` zeros. Sizes of
    steps are in bytes."""

    channels: int
    height: int
    width: int
    border: int = 0

    @property
    def row(self) -> int:
        return (self.width + 2 * self.border) * BYTES

    @property
    def channel(self) -> int:
        return (self.height + 2 * self.border) * self.row

    @property
    def block(self) -> int:
        return self.channels * self.channel

    @property
    def origin(self) -> int:
        """From the start of a plane to its first position inside the border."""
        return self.border * (self.row + BYTES)

    def shape(self, blocks: int) -> tuple[int, int, int, int, int]:
        p = 2 * self.border
        return blocks, self.channels, self.height + p, self.width + p, 16

    def rows_at(self, each_position: bool) -> np.ndarray:
        """int64, byte offset of each channel from the origin, or of each position of each channel."""
        places = np.zeros(1, np.int64)
        if each_position:
            places = np.add.outer(np.arange(self.height) * self.row, np.arange(self.width) * BYTES).ravel()
        return np.add.outer(np.arange(self.channels) * self.channel, places).ravel()


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution: channels, positions, kernel, stride and padding, each (vertical, horizontal)."""

    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @classmethod
    def of(
        cls,
        inputs: tuple[int, int, int],
        channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> "Geometry":
        height, width = (
            (n + 2 * p - k) // s + 1 for n, p, k, s in zip(inputs[1:], padding, kernel, stride, strict=True)
        )
        return cls(inputs, (channels, height, width), kernel, stride, padding)

    @classmethod
    def of_op(cls, op: Conv | FusedConv | Linear) -> "Geometry":
        """A linear layer is a convolution of one tap on maps of one position."""
        inputs: Any = op.x.shape if len(op.x.shape) == 3 else (op.x.shape[0], 1, 1)
        if isinstance(op, Linear):
            return cls.of(inputs, op.y.shape[0], (1, 1), (1, 1), (0, 0))
        return cls.of(inputs, op.y.shape[0], op.kernel, op.stride, op.padding)

    def pairs(self) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
        """(tap, position of the output, position of the input) of all taps inside the map, output by output."""
        (_, height, width), (kh, kw) = self.outputs, self.kernel
        for r, c, i, j in np.ndindex(height, width, kh, kw):
            row, column = r * self.stride[0] + i - self.padding[0], c * self.stride[1] + j - self.padding[1]
            if 0 <= row < self.inputs[1] and 0 <= column < self.inputs[2]:
                yield i * kw + j, (r, c), (row, column)

    @property
    def unrolled(self) -> bool:
        return self.outputs[1] * self.outputs[2] <= UNROLLED

    @property
    def border(self) -> int:
        """Border that the input needs."""
        if self.unrolled:
            return 0
        after = (
            (o - 1) * s + k - 1 - p - (n - 1)
            for o, s, k, p, n in zip(
                self.outputs[1:], self.stride, self.kernel, self.padding, self.inputs[1:], strict=True
            )
        )
        return max(0, *self.padding, *after)

    @property
    def gradient_border(self) -> int:
        """Border that the gradient of the output needs for the gradient of the input."""
        if self.unrolled:
            return 0
        need = 0
        for axis in range(2):
            for parity in range(self.stride[axis]):
                count, steps = self.parity(axis, parity)
                for _, step in steps:
                    need = max(need, -step, count - 1 + step - (self.outputs[1 + axis] - 1))
        return need

    def parity(self, axis: int, parity: int) -> tuple[int, list[tuple[int, int]]]:
        """Of input positions parity, parity + stride, ...: their number, and (tap, output position - number) of the
        taps that reach them."""
        n, s, k, p = (each[axis] for each in (self.inputs[1:], self.stride, self.kernel, self.padding))
        taps = [(i, (parity + p - i) // s) for i in range(k) if (parity + p - i) % s == 0]
        return ceil((n - parity) / s), taps


@dataclass(frozen=True)
class Tiling:
    """How a map is covered: pieces of equal tiles, [(rows, columns, [(first row, first column), ...])]."""

    pieces: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


@cache
def tiling(height: int, width: int, vectors: int) -> Tiling:
    """The cheapest cover of height x width positions by tiles of at most `vectors`; only the last rows may be fewer."""

    def pieces(rows: int, columns: int) -> Tiling:
        full = height // rows * rows
        parts = []
        for r, first, last in ((rows, 0, full), (height - full, full, height)):
            if r and last > first:
                at = tuple((y, x) for y in range(first, last, r) for x in range(0, width, columns))
                parts.append((r, columns, at))
        return Tiling(tuple(parts))

    def cost(found: Tiling) -> tuple[float, int]:
        # An entry costs a tile about three instructions beside its vectors. Among equals the squarest, which reads the
        # fewest inputs.
        return (
            sum(len(at) * (r * c + 3) for r, c, at in found.pieces),
            sum(len(at) * (r + 2) * (c + 2) for r, c, at in found.pieces),
        )

    columns = [c for c in range(1, min(width, vectors) + 1) if width % c == 0]
    return min((pieces(min(height, vectors // c), c) for c in columns), key=cost)


@dataclass
class Lists:
    """A sparse matrix by blocks of columns.

    start: int64 [blocks, rows + 1], first entry of each row. offsets: int32 [entries + 3], bytes; the last four are
    equal, because sddmm reads four at a time. index: int32 [entries], the kept weight of each entry in storage order,
    or None where they agree. together: rows of a channel, which read the same weights.
    """

    start: np.ndarray
    offsets: np.ndarray
    index: np.ndarray | None
    together: int = 1
    _splits: dict[int, list[int]] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        return len(self.offsets) - 3

    @property
    def rows(self) -> int:
        return self.start.shape[1] - 1

    def split(self, parts: int) -> list[int]:
        """Bounds of `parts` ranges of whole channels' rows with about equal work."""
        if parts not in self._splits:
            # A row costs about what four entries cost, for loading and storing its tile.
            rows = np.diff(self.start, axis=1).sum(0) + 4
            work = np.cumsum(rows.reshape(-1, self.together).sum(1))
            inner = np.searchsorted(work, work[-1] * np.arange(1, parts) / parts) * self.together
            self._splits[parts] = [0, *map(int, inner), self.rows]
        return self._splits[parts]

    def part(self, i: int, parts: int) -> tuple[int, int]:
        """(first, last) row of the i-th range."""
        bounds = self.split(parts)
        return bounds[i], bounds[i + 1]

    def ordered(self, values: np.ndarray, into: np.ndarray, part: tuple[int, int]) -> int:
        """The address of `values`, float32 [kept], in the order of the entries, of which those of rows part[0] to
        part[1] are there. into: float32 [entries], memory for them."""
        if self.index is None:
            return values.ctypes.data
        gather(values, self.index, into, self.start, *part)
        return into.ctypes.data

    def clear(self, sums: np.ndarray, part: tuple[int, int]) -> None:
        """Sets to 0 those of `sums`, float32 [entries + 3], that belong to rows part[0] to part[1]."""
        clear(sums, self.start, *part)

    def add_up(self, sums: np.ndarray, gradients: np.ndarray, part: tuple[int, int]) -> None:
        """Adds the sums of entries of rows part[0] to part[1] to the gradients of their weights, float32 [kept]."""
        if self.index is None:
            first, last = self.start[0, list(part)]
            gradients[first:last] += sums[first:last]
        else:
            scatter_add(sums, self.index, gradients, self.start, *part)


def build(keep: np.ndarray, transposed: bool, taps: Sequence[Sequence[tuple[int, int]]], rows: int, plane: int,
          block: int) -> Lists:  # fmt: skip
    """Lists of a mask `keep`, bool [O, KH, KW, I].

    taps: for each tap (i, j), row by row, the (row within a channel, byte offset) of its entries. Rows are output
    channels x `rows`, with `transposed` input channels x `rows`; an entry reads from `plane` bytes a channel of the
    other side. block: channels in a block of columns.
    """
    first = np.cumsum([0, *map(len, taps)])
    pairs = np.array([pair for tap in taps for pair in tap], np.int64).reshape(-1, 2)
    channels, others = (keep.shape[3], keep.shape[0]) if transposed else (keep.shape[0], keep.shape[3])
    blocks = max(1, ceil(others / block))
    assert (others + 1) * plane < 2**31, "offsets are int32"
    start = np.zeros((blocks, channels * rows + 1), np.int64)
    _count(keep, transposed, first, pairs, rows, block, start)
    # The entries of a block follow those of the block before it.
    start[:, 1:] = np.cumsum(start[:, 1:]).reshape(blocks, -1)
    start[1:, 0] = start[:-1, -1]
    entries = int(start[-1, -1])
    offsets, index = np.zeros(entries + 3, np.int32), np.empty(entries, np.int32)
    _fill(keep, transposed, first, pairs, rows, plane, block, start.copy(), offsets, index)
    offsets[entries:] = offsets[entries - 1] if entries else 0  # 0 may lie outside, with a padding beyond the kernel
    in_order = blocks == 1 and not transposed and rows == 1 and all(len(tap) == 1 for tap in taps)
    return Lists(start, offsets, None if in_order else index, rows)


@compiled
def _kept(line, into):
    """Writes the places of a line that are kept, without a branch that is hard to predict; their number."""
    number = 0
    for c in range(line.shape[0]):
        into[number] = c
        number += line[c]
    return number


@compiled
def _count(keep, transposed, first, pairs, rows, block, start):
    kept = np.empty(keep.shape[3] + 1, np.int32)
    for o in range(keep.shape[0]):
        for tap in range(keep.shape[1] * keep.shape[2]):
            number = _kept(keep[o, tap // keep.shape[2], tap % keep.shape[2]], kept)
            for e in range(first[tap], first[tap + 1]):
                row = pairs[e, 0] + 1
                if transposed:
                    for n in range(number):
                        start[o // block, kept[n] * rows + row] += 1
                else:
                    for n in range(number):
                        start[kept[n] // block, o * rows + row] += 1


@compiled
def _fill(keep, transposed, first, pairs, rows, plane, block, place, offsets, index):
    kept = np.empty(keep.shape[3] + 1, np.int32)
    before = 0
    for o in range(keep.shape[0]):
        for tap in range(keep.shape[1] * keep.shape[2]):
            number = _kept(keep[o, tap // keep.shape[2], tap % keep.shape[2]], kept)
            for e in range(first[tap], first[tap + 1]):
                for n in range(number):
                    mine, other = (kept[n], o) if transposed else (o, kept[n])
                    k, row = other // block, mine * rows + pairs[e, 0]
                    at = place[k, row]
                    place[k, row] = at + 1
                    offsets[at] = other * plane + pairs[e, 1]
                    index[at] = before + n
            before += number


Piece = tuple[Tile, Tile, np.ndarray, np.ndarray]
"""(tile of x, tile of y, byte offsets in x, byte offsets in y)."""


def pieces(
    cover: Tiling,
    blocks: int,
    vectors: int,
    x: Plane,
    y: Plane,
    x_step: tuple[int, int],
    y_step: tuple[int, int] = (1, 1),
) -> list[Piece]:
    """The tiles of a cover for so many blocks of images. vectors: of a tile, at most. x_step, y_step: positions between
    rows and between columns of a tile."""
    found: list[Piece] = []
    for rows, columns, at in cover.pieces:
        together, first = max(1, vectors // (rows * columns)), 0
        while first < blocks:
            # Powers of two, so that few shapes of tiles are compiled.
            deep = 1 << (min(together, blocks - first).bit_length() - 1)
            firsts = range(first, first + (blocks - first) // deep * deep, deep)
            x_at, y_at = (
                np.array([a * p.block + r * s * p.row + c * t * BYTES for a in firsts for r, c in at], np.int64)
                for p, (s, t) in ((x, x_step), (y, y_step))
            )
            found.append((tile(deep, rows, columns, x_step[1]), tile(deep, rows, columns, y_step[1]), x_at, y_at))
            first = firsts[-1] + deep
    return found


@dataclass
class Product:
    """A pass of a convolution: lists, and the tiles of its maps.

    x_*: what entries read. y_*: where rows lie. *_first: byte offset of the first tile. cover: of the map, by tiles.
    *_step: positions between rows and between columns of a tile. row_at: int64 [rows], byte offset of each row.
    """

    lists: Lists
    x: Plane
    y: Plane
    x_first: int
    y_first: int
    x_step: tuple[int, int]
    y_step: tuple[int, int]
    cover: Tiling
    row_at: np.ndarray
    _pieces: dict[int, list[Piece]] = field(default_factory=dict)

    def pieces(self, blocks: int) -> list[Piece]:
        """The tiles for so many blocks of images, from x_first and y_first."""
        if blocks not in self._pieces:
            self._pieces[blocks] = pieces(self.cover, blocks, tile_vectors(), self.x, self.y, self.x_step, self.y_step)
        return self._pieces[blocks]

    def multiply(
        self, x: int, y: int, values: int, blocks: int, part: tuple[int, int], add: bool = False,
        bias: np.ndarray | None = None, residual: int = 0, positive: bool = False,
    ) -> None:  # fmt: skip
        """spmm for rows part[0] to part[1]. x, y, values, residual: addresses."""
        lists = self.lists
        for x_tile, y_tile, x_at, y_at in self.pieces(blocks):
            spmm(
                x_tile, y_tile, x + self.x_first, y + self.y_first, self.x.block, self.x_step[0] * self.x.row,
                self.y.block, self.y_step[0] * self.y.row, x_at, y_at, self.row_at, *part, lists.start,
                lists.offsets.ctypes.data, values, add, bias, residual + self.y_first if residual else 0, positive,
            )  # fmt: skip

    def correlate(self, x: int, y: int, gradients: int, blocks: int, part: tuple[int, int]) -> None:
        """sddmm for rows part[0] to part[1]. x, y, gradients: addresses."""
        lists = self.lists
        for x_tile, y_tile, x_at, y_at in self.pieces(blocks):
            sddmm(
                x_tile, y_tile, x + self.x_first, y + self.y_first, self.x.block, self.x_step[0] * self.x.row,
                self.y.block, self.y_step[0] * self.y.row, x_at, y_at, self.row_at, *part, lists.start,
                lists.offsets.ctypes.data, gradients,
            )  # fmt: skip


def forward(keep: np.ndarray, geometry: Geometry, x: Plane, y: Plane) -> Product:
    """The product that computes the output from the input."""
    g = geometry
    (_, height, width), (kh, kw), (ph, pw) = g.outputs, g.kernel, g.padding
    if g.unrolled:
        taps: list[list[tuple[int, int]]] = [[] for _ in range(kh * kw)]
        for tap, (r, c), (row, column) in g.pairs():
            taps[tap].append((r * width + c, row * x.row + column * BYTES))
        rows, size = height * width, g.inputs[1] * g.inputs[2] * BYTES
        cover, step = tiling(1, 1, 1), (1, 1)
    else:
        taps = [[(0, (i - ph) * x.row + (j - pw) * BYTES)] for i in range(kh) for j in range(kw)]
        rows, cover, step = 1, tiling(height, width, tile_vectors()), g.stride
        size = tile_bytes(cover, g.kernel, g.stride)
    share = sum(map(len, taps)) / rows / (kh * kw)
    block = channels_in_block(int(np.count_nonzero(keep)), keep.shape[0], keep.shape[3], size, share)
    lists = build(keep, False, taps, rows, x.channel, block)
    return Product(lists, x, y, x.origin, y.origin, step, (1, 1), cover, y.rows_at(g.unrolled))


def backward(keep: np.ndarray, geometry: Geometry, y: Plane, x: Plane) -> list[Product]:
    """The products that compute the gradient of the input x from that of the output y, each for its positions."""
    g = geometry
    (_, height, width), (kh, kw), (sh, sw) = g.inputs, g.kernel, g.stride
    if g.unrolled:
        taps: list[list[tuple[int, int]]] = [[] for _ in range(kh * kw)]
        for tap, (r, c), (row, column) in g.pairs():
            taps[tap].append((row * width + column, r * y.row + c * BYTES))
        size = g.outputs[1] * g.outputs[2] * BYTES
        share = sum(map(len, taps)) / (height * width) / (kh * kw)
        block = channels_in_block(int(np.count_nonzero(keep)), keep.shape[3], keep.shape[0], size, share)
        lists = build(keep, True, taps, height * width, y.channel, block)
        return [Product(lists, y, x, y.origin, x.origin, (1, 1), (1, 1), tiling(1, 1, 1), x.rows_at(True))]
    products = []
    for a in range(sh):
        rows, down = g.parity(0, a)
        for b in range(sw):
            columns, right = g.parity(1, b)
            if not rows or not columns:
                continue
            taps = [[] for _ in range(kh * kw)]
            for i, dr in down:
                for j, dc in right:
                    taps[i * kw + j].append((0, dr * y.row + dc * BYTES))
            cover = tiling(rows, columns, tile_vectors())
            size = tile_bytes(cover, (max(1, len(down)), max(1, len(right))), (1, 1))
            share = len(down) * len(right) / (kh * kw)
            block = channels_in_block(int(np.count_nonzero(keep)), keep.shape[3], keep.shape[0], size, share)
            lists = build(keep, True, taps, 1, y.channel, block)
            first = x.origin + a * x.row + b * BYTES
            products.append(Product(lists, y, x, y.origin, first, (1, 1), g.stride, cover, x.rows_at(False)))
    return products


def tile_bytes(cover: Tiling, kernel: tuple[int, int], stride: tuple[int, int]) -> int:
    """Bytes of a channel that a tile reads."""
    rows, columns, _ = cover.pieces[0]
    return ((rows - 1) * stride[0] + kernel[0]) * ((columns - 1) * stride[1] + kernel[1]) * BYTES


def channels_in_block(kept: int, rows: int, others: int, size: int, share: float) -> int:
    """Channels in a block of columns, of `others`. kept: weights. rows: channels of the other side. size: bytes that a
    tile reads of a channel. share: of the taps that count for a row."""
    per_row = kept * share / rows  # entries of a row over all blocks
    enough = ceil(others * _ENTRIES / max(per_row, 1e-9))
    return min(others, max(1, _TILE_BYTES // size, enough))


class SparseConv:
    """The three passes of a convolution over kept weights alone.

    keep: bool [O, KH, KW, I]. values and gradients: float32 [kept (+ 3 for gradients)], in storage order. x, y: planes
    of input and output, g: of the output's gradient, dx: of the input's, None if it is not needed.
    """

    def __init__(
        self, keep: np.ndarray, geometry: Geometry, x: Plane, y: Plane, g: Plane | None = None, dx: Plane | None = None
    ) -> None:
        self.kept = int(np.count_nonzero(keep))
        # First kept weight of each filter, in storage order, and the end.
        self.filters = np.concatenate([[0], np.count_nonzero(keep, axis=(1, 2, 3)).cumsum()])
        self.ahead = forward(keep, geometry, x, y)
        self.weight_pass: Product | None = None
        if g is not None:
            a, row_at = self.ahead, g.rows_at(geometry.unrolled)
            self.weight_pass = Product(a.lists, x, g, a.x_first, g.origin, a.x_step, (1, 1), a.cover, row_at)
        self.back = backward(keep, geometry, g, dx) if g is not None and dx is not None else []

    @cached_property
    def entries(self) -> int:
        """Entries of all lists: int32 offset and index each."""
        return self.ahead.lists.entries + sum(p.lists.entries for p in self.back)
