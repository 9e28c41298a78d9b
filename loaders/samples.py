"""Labelled images of one split, decoded one at a time or in parallel by worker processes.

Preparation and the resident loader read a data set through this module.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from PIL import ExifTags, Image

from fastprune.console import progress_bar
from fastprune.errors import InputError
from fastprune.loaders.layout import Layout

CHUNK = 200  # images that a process decodes per job
LIST_NAME = "unreadable.txt"
JPEG, RAW = 0, 1  # FFCV's modes of a stored image
MOST_PIXELS = (1 << 16) - 1  # on a side: FFCV's format stores height and width as uint16


class Samples(Protocol):
    """Images of one split in stored order."""

    @property
    def labels(self) -> Sequence[int]:
        """Class of every image."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Name of image `i` for messages."""

    def image(self, i: int) -> np.ndarray:
        """Image `i`, uint8 [H, W, 3]. Raises any exception if the image cannot be decoded."""

    def decode(self, i: int) -> tuple[np.ndarray, bool]:
        """Image `i` as by `image`, and whether it has an EXIF rotation (see `has_rotation`)."""

    def jpeg(self, i: int) -> np.ndarray | None:
        """File content of image `i`, uint8 [n], if it is a JPEG file that FFCV's decoder can read; else None."""

    def part(self, start: int, stop: int) -> Self:
        """The images from `start` to `stop` (exclusive)."""


@dataclass(frozen=True)
class FolderSamples:
    """Image files below `root`; files: paths relative to it."""

    root: Path
    files: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return str(self.root / self.files[i])

    def image(self, i: int) -> np.ndarray:
        return read_image(self.root / self.files[i])

    def decode(self, i: int) -> tuple[np.ndarray, bool]:
        with Image.open(self.root / self.files[i]) as image:
            return np.array(to_rgb(image)), has_rotation(image)

    def jpeg(self, i: int) -> np.ndarray | None:
        with Image.open(self.root / self.files[i]) as image:
            # FFCV decodes with libjpeg-turbo, which does not convert CMYK.
            readable = image.format == "JPEG" and image.mode in ("RGB", "L")
        return np.fromfile(self.root / self.files[i], np.uint8) if readable else None

    def part(self, start: int, stop: int) -> "FolderSamples":
        return FolderSamples(self.root, self.files[start:stop], self.labels[start:stop])


@dataclass(frozen=True)
class ArraySamples:
    """Images in memory, uint8 [n, H, W, 3]."""

    images: np.ndarray
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return f"image {i}"

    def image(self, i: int) -> np.ndarray:
        return self.images[i]

    def decode(self, i: int) -> tuple[np.ndarray, bool]:
        return self.images[i], False

    def jpeg(self, i: int) -> np.ndarray | None:
        return None

    def part(self, start: int, stop: int) -> "ArraySamples":
        return ArraySamples(self.images[start:stop], self.labels[start:stop])


def folder_samples(layout: Layout) -> dict[str, FolderSamples]:
    return {split: FolderSamples(layout.root, files, layout.labels[split]) for split, files in layout.files.items()}


def read_image(path: str | Path) -> np.ndarray:
    """Decode a file to RGB, uint8 [H, W, 3]. See `open_rgb`."""
    return np.array(open_rgb(path))


def open_rgb(path: str | Path) -> Image.Image:
    """Decode a file to an image of mode RGB. See `to_rgb`. The EXIF rotation of a file is not applied."""
    with Image.open(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened file as an image of mode RGB. Grey images (Tiny ImageNet has some) are converted.

    16-bit values become value // 256.  ValueError if pixels are floating-point numbers, or integers whose full scale is
    unknown.
    """
    # Pillow's own conversion clips at 255, which turns 16-bit grey images white. Of 16-bit colour it reads the
    # high bytes.
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    if not _is_16_bit_grey(image):
        raise ValueError(f"pixels of mode {image.mode} have no known full scale: convert the image to 8 bits")
    return Image.fromarray((np.asarray(image) // 256).astype(np.uint8)).convert("RGB")


def _is_16_bit_grey(image: Image.Image) -> bool:
    """Whether the values of an image of mode I, I;16, I;16B or F are 0 (black) to 65535 (white)."""
    if image.format == "TIFF":
        # Mode I;16 also holds 12-bit images, and images in which 0 is white.
        bits, black = image.tag_v2.get(258), image.tag_v2.get(262)  # type: ignore[attr-defined]
        return image.mode.startswith("I;16") and bits == (16,) and black == 1
    # Pillow scales a PGM file of any maximum above 255 to 65535.
    return image.format in ("PNG", "PPM") and image.mode[0] == "I"


def has_rotation(image: Image.Image) -> bool:
    """Whether the EXIF orientation of a decoded file asks for a rotation or a mirror image."""
    # A TIFF file has none here, because Pillow applies it on decoding. Damaged EXIF data is no reason to fail: the
    # pixels do not depend on it.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:
        return False


def rotation_line(rotated: Sequence[str], total: int) -> str:
    """Message for images with an EXIF rotation, given by name."""
    return (
        f"the EXIF rotation of {len(rotated)} of {total} images is not applied (as in torchvision), first {rotated[0]}"
    )


def digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


class Stored(NamedTuple):
    """An image as a .beton file stores it.

    mode: JPEG or RAW.  height, width: pixels.  content: uint8 [n], the JPEG file or the pixels in C order.
    """

    mode: int
    height: int
    width: int
    content: np.ndarray


@dataclass
class Chunk:
    """Result of decoding consecutive images of one split.

    sizes (height, width), digests (of the pixels) and stored (empty unless contents are kept) list the readable images
    in order.  unreadable: name and reason of each other image.  rotated: names of images with an EXIF rotation.  sums,
    squares: int64 [3], sums of the pixel values and of their squares in each channel.
    """

    sizes: list[tuple[int, int]]
    digests: list[bytes]
    stored: list[Stored]
    unreadable: list[tuple[str, str]]
    rotated: list[str]
    sums: np.ndarray
    squares: np.ndarray


def read_chunk(samples: Samples, keep: str) -> Chunk:
    """Decode `samples`.

    keep: "pixels"; "files", which keeps JPEG files unchanged and the pixels of other images; or "nothing".
    """
    chunk = Chunk([], [], [], [], [], np.zeros(3, np.int64), np.zeros(3, np.int64))
    for i in range(len(samples)):
        try:
            pixels, rotated = samples.decode(i)
            jpeg = samples.jpeg(i) if keep == "files" else None
            if max(pixels.shape) > MOST_PIXELS:
                raise ValueError(f"more than {MOST_PIXELS} pixels on a side")
        except Exception as error:  # decoders of broken files raise nearly anything
            chunk.unreadable.append((samples.name(i), reason(error)))
            continue
        height, width, _ = pixels.shape
        chunk.sizes.append((height, width))
        chunk.digests.append(digest(pixels))
        if rotated:
            chunk.rotated.append(samples.name(i))
        if keep != "nothing":
            mode, content = (RAW, pixels.reshape(-1)) if jpeg is None else (JPEG, jpeg)
            chunk.stored.append(Stored(mode, height, width, content))
        # Added up as integers, so that totals do not depend on the order. Within an image float64 is exact, because the
        # sums stay far below 2**53, and three times as fast.
        channels = np.ascontiguousarray(pixels.reshape(-1, 3).T, dtype=np.float64)
        chunk.sums += channels.sum(axis=1).astype(np.int64)
        chunk.squares += np.einsum("ij,ij->i", channels, channels).astype(np.int64)
    return chunk


def read_chunks(data: Mapping[str, Samples], keep: str, workers: int) -> Generator[tuple[str, int, Chunk], None, None]:
    """Decode all splits in `workers` processes, CHUNK images per job.

    Yields split, position of the chunk's first image, and Chunk, in stored order.
    """
    places = [(split, start) for split, samples in data.items() for start in range(0, len(samples), CHUNK)]
    jobs = ((data[split].part(start, start + CHUNK), keep) for split, start in places)
    with closing(in_processes(read_chunk, jobs, workers)) as results:
        for (split, start), chunk in zip(places, results, strict=True):
            yield split, start, chunk


def in_processes(
    function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int
) -> Generator[Any, None, None]:
    """Yield `function(*job)` of each job, in order, computed by `workers` processes.

    InputError if a process is killed.  The processes end when this generator or this process ends.
    """
    # Processes, because the interpreter's lock leaves threads no gain here. Spawned, because after a fork the threads
    # that numba starts for FFCV can keep the parent from exiting.
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        for job in jobs:
            # Ctrl-C is sent to the whole process group, but only the parent handles it. A process inherits the signal
            # mask, and the pool starts processes on submit.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                waiting.append(pool.submit(function, *job))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # Bounds memory: a slow consumer must not let decoded images pile up.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        # Usually the kernel has killed a process that took too much memory.
        raise InputError(
            "a process that reads images was killed: try again with fewer workers if memory is short; a script that "
            "calls this must do so under `if __name__ == '__main__':`"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Initialise a worker process: it exits when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    # A parent that is killed closes no pool, and its workers would wait for jobs forever.
    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def images_bar(what: str, total: int, show: bool) -> Any:
    """A progress bar over `total` images; without `show` an object whose `update` does nothing."""
    return progress_bar(what, total, " images") if show else nullcontext(_Silent())


class _Silent:
    def update(self, count: int) -> None: ...


def reason(error: BaseException) -> str:
    """The message of an exception in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def unreadable_line(unreadable: Sequence[tuple[str, str]], total: int, folder: Path) -> str:
    """Message for unreadable images, each a name and a reason. Writes LIST_NAME into `folder` if there are several."""
    unreadable = sorted(unreadable)
    name, why = unreadable[0]
    if len(unreadable) == 1:
        return f"cannot read 1 of {total} images: {name} ({why}); replace it or unpack the data set again"
    path = folder / LIST_NAME
    try:
        os.makedirs(folder, exist_ok=True)
        path.write_text("".join(f"{n}\t{r}\n" for n, r in unreadable), encoding="utf-8")
        where = f"all are in {path}"
    except OSError as error:
        where = f"the list could not be written to {path}: {error.strerror}"
    return f"cannot read {len(unreadable)} of {total} images, first {name} ({why}); {where}"
