"""Values in lanes: their memory, and what training and inference do with them alike, on several threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from torch import Tensor

from fastprune.kernels import lanes_norm as kernels
from fastprune.kernels.lanes import address
from fastprune.sparse.conv import Plane
from fastprune.sparse.program import MaxPool


def plane_of(shape: tuple[int, ...], border: int = 0) -> Plane:
    """The plane of a value's shape; features (F,) are maps of one position."""
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    return Plane(channels, height, width, border)


class Threads:
    """Runs a kernel over parts of its rows or channels, one for each thread. Results do not depend on their number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._pool = ThreadPoolExecutor(number - 1) if number > 1 else None

    def each(self, run: Callable[[int], Any], number: int | None = None) -> None:
        """run(thread) on each thread, or on the first `number` of them."""
        assert number is None or number <= self.number
        futures = [self._pool.submit(run, i) for i in range(1, number or self.number)] if self._pool is not None else []
        try:
            run(0)
        finally:
            wait(futures)  # also after Ctrl-C: kernels write to memory that the caller may then free or change
        for future in futures:
            future.result()

    def ranges(self, bounds: Sequence[int], run: Callable[[int, int, int], Any]) -> None:
        """run(thread, first, last) for each two neighbouring bounds, at most as many as threads."""
        self.each(lambda i: run(i, bounds[i], bounds[i + 1]), len(bounds) - 1)

    def channels(self, number: int, run: Callable[[int, int, int], Any]) -> None:
        """run(thread, first, last) for equal ranges of so many channels."""
        parts = max(1, min(self.number, number))
        self.ranges([number * i // parts for i in range(parts + 1)], run)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class Buffer:
    """Memory of a plane. tensor: float32 [blocks, C, H+2p, W+2p, 16], with a border of 0; kernels write the inside
    only, so that it stays 0. address: of its first element, inner: of the first inside the border."""

    def __init__(self, plane: Plane, tensor: Tensor) -> None:
        self.plane, self.tensor, self.address = plane, tensor, address(tensor)
        self.inner = self.address + plane.origin
        self.steps = plane.block, plane.channel, plane.row

    def interior(self, blocks: int | None = None) -> Tensor:
        """float32 [blocks, C, H, W, 16] of the first blocks, by default of all."""
        p, b = self.plane, self.plane.border
        return self.tensor[:blocks, :, b : b + p.height, b : b + p.width]


def window_of(pool: MaxPool) -> np.ndarray:
    """int64 [6]: height and width of the output, kernel and stride, as kernels/lanes_norm.py takes them."""
    return np.array([*pool.y.shape[1:], *pool.kernel, *pool.stride], np.int64)


def padded(p: Plane, padding: tuple[int, int]) -> int:
    """Vectors of a channel with so much padding."""
    return (p.height + 2 * padding[0]) * (p.width + 2 * padding[1])


def add(threads: Threads, x: Buffer, other: Buffer | None, z: Buffer, blocks: int, positive: bool = False) -> None:
    """z = x + other, then max(z, 0) if `positive`. other: None for x alone."""
    where, steps = (0, x.steps) if other is None else (other.inner, other.steps)
    p = z.plane
    threads.channels(
        p.channels,
        lambda _, *part: kernels.add_planes(
            x.inner, x.steps, where, steps, z.inner, z.steps, p.height, p.width, blocks, positive, *part
        ),
    )


def mean(threads: Threads, x: Buffer, z: Buffer, blocks: int) -> None:
    """z = the mean of x over all positions. z has no border."""
    p = x.plane
    threads.channels(
        p.channels,
        lambda _, *part: kernels.mean_forward(
            x.inner, x.steps, z.address, p.height, p.width, blocks, p.channels, *part
        ),
    )


def max_pool(
    threads: Threads, x: Buffer, z: Buffer, blocks: int, window: np.ndarray, padding: tuple[int, int], places: int,
    scratch: Callable[[int], int],
) -> None:  # fmt: skip
    """z = max_pool(x). places: address for the taps of the maxima, or 0. scratch: by thread, the address of `padded`
    vectors."""
    p = x.plane
    threads.channels(
        p.channels,
        lambda i, *part: kernels.pool_forward(
            x.inner, x.steps, z.inner, z.steps, places, p.height, p.width, blocks, p.channels, window, padding,
            scratch(i), *part,
        ),
    )  # fmt: skip


def norm(
    y: Buffer, z: Buffer, residual: Buffer | None, sizes: tuple[int, int], affine: tuple[Any, ...], relu: bool
) -> Callable[[int, int, int], Any]:
    """For `Threads.channels`: z = relu(batch_norm(y) + residual). sizes: blocks and images. affine: weight, bias, eps,
    mean, variance and whether the last two are the batch's, as kernels.norm_forward takes them."""
    where, steps = (0, (0, 0, 0)) if residual is None else (residual.inner, residual.steps)
    p = y.plane
    return lambda _, *part: kernels.norm_forward(
        y.inner, y.steps, z.inner, z.steps, where, steps, p.height, p.width, *sizes, *affine, relu, *part
    )


def norm_pool(
    y: Buffer, z: Buffer, sizes: tuple[int, int], affine: tuple[Any, ...], window: np.ndarray,
    padding: tuple[int, int], places: int, scratch: Callable[[int], int],
) -> Callable[[int, int, int], Any]:  # fmt: skip
    """For `Threads.channels`: z = max_pool(relu(batch_norm(y))). As `norm` and `max_pool`."""
    p = y.plane
    return lambda i, *part: kernels.norm_pool_forward(
        y.inner, y.steps, z.inner, z.steps, places, p.height, p.width, *sizes, *affine, window, padding, scratch(i),
        *part,
    )  # fmt: skip
