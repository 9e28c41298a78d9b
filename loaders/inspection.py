"""Decode every image of a data set once: is it readable, how large, which pixels; and from that the fingerprint."""

import hashlib
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fastprune.errors import InputError
from fastprune.loaders.child import Child, Send
from fastprune.loaders.samples import Samples, digest

CHUNK = 200  # images a child reports on at once
LIST_NAME = "unreadable.txt"
UNREAD = (0, 0)  # for a size


@dataclass(frozen=True)
class Inspection:
    """What decoding a data set tells. digests: SHA-256 of each image's pixels, by split, in stored order."""

    fingerprint: str
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digests: Mapping[str, Sequence[bytes]]


@dataclass(frozen=True)
class _Report:
    """One chunk of one split, from `start` on; sums and squares: int64 [3], over the bytes of each channel."""

    split: str
    start: int
    digests: list[bytes]
    sizes: list[tuple[int, int]]
    unreadable: list[tuple[str, str]]
    sums: np.ndarray
    squares: np.ndarray


def inspect(data: Mapping[str, Samples], *, workers: int, list_folder: Path, show: bool = True) -> Inspection:
    """Decode all images of the splits of `data` in `workers` processes.

    InputError where images cannot be decoded (all of them named, in a file in `list_folder` if there are several) or
    differ in size, which ends it at once. `show`: progress on stderr, with rate and time left.
    """
    found: set[tuple[int, int]] = set()
    digests = {split: [b""] * len(samples) for split, samples in data.items()}
    sizes = {split: [UNREAD] * len(samples) for split, samples in data.items()}
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    unreadable: list[tuple[str, str]] = []
    total = sum(map(len, data.values()))
    with (
        progress_bar(total, "reading images", show) as bar,
        closing(from_children(inspect_share, workers, data)) as reports,
    ):
        for report in reports:
            part = slice(report.start, report.start + len(report.digests))
            digests[report.split][part] = report.digests
            sizes[report.split][part] = report.sizes
            unreadable += report.unreadable
            if report.split == "train":
                sums += report.sums
                squares += report.squares
            bar.update(len(report.digests))
            found.update(size for size in report.sizes if size != UNREAD)
            if len(found) > 1:
                break
    if unreadable:
        raise InputError(unreadable_line(unreadable, total, list_folder))
    height, width = _one_size(data, sizes)
    count = len(data["train"]) * height * width
    mean = [int(s) / (count * 255) for s in sums]
    variance = [int(q) / (count * 255**2) - m * m for q, m in zip(squares, mean, strict=True)]
    # A channel without contrast would divide by zero; 1/255 is the smallest step there is.
    std = [max(math.sqrt(max(v, 0.0)), 1 / 255) for v in variance]
    return Inspection(
        fingerprint=fingerprint({split: data[split].labels for split in data}, digests, height, width),
        height=height,
        width=width,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        digests=digests,
    )


def fingerprint(
    labels: Mapping[str, Sequence[int]], digests: Mapping[str, Sequence[bytes]], height: int, width: int
) -> str:
    """SHA-256 (hex) over split, label, size and pixel digest of every image in order, train before val."""
    total = hashlib.sha256()
    for split in ("train", "val"):
        for label, pixels in zip(labels[split], digests[split], strict=True):
            total.update(f"{split} {label} {height} {width} {pixels.hex()}\n".encode())
    return total.hexdigest()


def progress_bar(total: int, title: str, show: bool) -> "tqdm[Any]":
    """Images done, rate and time left on stderr; where that is no terminal, a line every ten seconds."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        unit=" images",
        unit_scale=True,
        disable=not show,
        mininterval=0.2 if live else 10.0,
        dynamic_ncols=live,
    )


def from_children(function: Callable[..., None], workers: int, *arguments: Any) -> Generator[Any, None, None]:
    """What `workers` children send, each of which calls `function(*arguments, rank, workers, send)`; unordered."""
    arrived: queue.Queue[Any] = queue.Queue()

    def collect(child: Child) -> None:
        try:
            for report in child.messages():
                arrived.put(report)
            arrived.put(None)
        except Exception as error:  # raised again where the reports are awaited
            arrived.put(error)

    with ExitStack() as stack:
        children = [stack.enter_context(Child(function, *arguments, rank, workers)) for rank in range(workers)]
        for child in children:
            threading.Thread(target=collect, args=(child,), daemon=True).start()
        running = workers
        while running:
            report = arrived.get()
            if isinstance(report, BaseException):
                raise report
            if report is None:
                running -= 1
            else:
                yield report


def inspect_share(data: Mapping[str, Samples], rank: int, workers: int, send: Send) -> None:
    """What a child does: every workers-th chunk of each split, beginning with `rank`."""
    chunks = [(split, start) for split, samples in data.items() for start in range(0, len(samples), CHUNK)]
    for split, start in chunks[rank::workers]:
        send(_inspect_chunk(data[split], split, start))


def _inspect_chunk(samples: Samples, split: str, start: int) -> _Report:
    report = _Report(split, start, [], [], [], np.zeros(3, np.int64), np.zeros(3, np.int64))
    for i in range(start, min(start + CHUNK, len(samples))):
        try:
            pixels = samples.image(i)
        except Exception as error:  # decoders of broken files raise nearly anything
            report.unreadable.append((samples.name(i), " ".join(str(error).split()) or type(error).__name__))
            report.digests.append(b"")
            report.sizes.append(UNREAD)
            continue
        report.digests.append(digest(pixels))
        report.sizes.append((pixels.shape[0], pixels.shape[1]))
        # Exact in float64, where the sums stay far below 2**53, and three times as fast as in integers.
        channels = np.ascontiguousarray(pixels.reshape(-1, 3).T, dtype=np.float64)
        report.sums[:] += channels.sum(axis=1).astype(np.int64)
        report.squares[:] += np.einsum("ij,ij->i", channels, channels).astype(np.int64)
    return report


def unreadable_line(unreadable: Sequence[tuple[str, str]], total: int, folder: Path) -> str:
    """What to say of images that cannot be read, each a name and a reason; several are listed in a file in `folder`."""
    unreadable = sorted(unreadable)
    name, reason = unreadable[0]
    if len(unreadable) == 1:
        return f"cannot read 1 of {total} images: {name} ({reason}); replace it or unpack the data set again"
    path = folder / LIST_NAME
    try:
        os.makedirs(folder, exist_ok=True)
        path.write_text("".join(f"{n}\t{r}\n" for n, r in unreadable), encoding="utf-8")
        where = f"all are in {path}"
    except OSError as error:
        where = f"the list could not be written to {path}: {error.strerror}"
    return f"cannot read {len(unreadable)} of {total} images, first {name} ({reason}); {where}"


def _one_size(data: Mapping[str, Samples], sizes: Mapping[str, Sequence[tuple[int, int]]]) -> tuple[int, int]:
    """Height and width of all images read. InputError names two that differ."""
    first: tuple[tuple[int, int], str] | None = None
    for split, samples in data.items():
        for i, size in enumerate(sizes[split]):
            if size == UNREAD:
                continue
            if first is None:
                first = size, samples.name(i)
            elif size != first[0]:
                (height, width), name = first
                raise InputError(
                    f"images of varying size cannot be batched: {name} has {height}x{width} pixels, {samples.name(i)} "
                    f"has {size[0]}x{size[1]}; make them equal with scripts/prepare_data.py --source DIR --out DIR "
                    "--resize N"
                )
    assert first is not None
    return first[0]
