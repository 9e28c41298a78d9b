"""Images that vary in size out of .beton files through FFCV, with a decoder of our own.

What becomes of an image (box, size, mirror) is decided in Python, batch by batch, and handed to the compiled decoder as
a table: compiled code freezes what it closes over, the number of an epoch for one. The decoder writes into the batch's
own tensor, so nothing is copied; each of several FFCV threads fills its share of the rows of every batch.
"""

import functools
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.beton import RAW
from fastprune.loaders.ffcv_use import end_threads, importing_ffcv, next_batch, open_loader
from fastprune.loaders.varying_beton import Table
from fastprune.loaders.varying_cache import cached_tables
from fastprune.loaders.varying_folder import ImageFolder
from fastprune.loaders.varying_jpeg import ACCURATE, RGB, turbojpeg
from fastprune.loaders.varying_resample import make, normalisation
from fastprune.loaders.varying_view import CUT, Draw, View, fill_cuts

AHEAD = 2  # batches that a thread may have ready
REQUEST = np.dtype([*CUT, ("pointer", "<i8"), ("bytes", "<i8"), ("raw", "?")])
"""One image: what is to be made of it, and where and how it is stored."""


def requests(table: Table, samples: np.ndarray, draw: Draw | None, view: View) -> np.ndarray:
    """What is to be made of `samples` (int64 [n]), as REQUEST [n]."""
    stored, made = table.images[samples], np.zeros(len(samples), REQUEST)
    made["pointer"], made["bytes"], made["raw"] = stored["pointer"], table.sizes[samples], stored["mode"] == RAW
    made["height"], made["width"] = stored["height"], stored["width"]
    fill_cuts(made, samples, draw, view)
    return made


class BetonImages:
    """Reader of train.beton and val.beton: one FFCV loader a split, compiled once, for every epoch and batch size."""

    def __init__(self, tables: dict[str, Table], view: View, threads: int) -> None:
        self._tables, self._view, self._threads = tables, view, threads
        self._loaders: dict[str, Any] = {}

    def images(
        self, split: str, samples: np.ndarray, batch_size: int, draw: Draw | None
    ) -> Generator[torch.Tensor, None, None]:
        batches = _Batches(self._tables[split], self._view, samples, batch_size, draw)
        loader = self._loader(split)
        torch_threads = torch.get_num_threads()
        share = -(-batch_size // self._threads)
        running: list[Any] = []
        try:
            for first in range(0, min(batch_size, len(samples)), share):
                running.append(_parts().Thread(loader, batches, first, min(share, batch_size - first)))
            for number in range(len(batches)):
                for thread in running:
                    if number < thread.count:
                        _raise_if_bad(next_batch(thread), batches.table)
                if number == 0:
                    torch.set_num_threads(torch_threads)  # the threads have set it to 1 before their first batch
                yield batches.take(number)
        finally:
            end_threads(running)

    def _loader(self, split: str) -> Any:
        if split not in self._loaders:
            self._loaders[split] = _open_loader(self._tables[split], self._view)
        return self._loaders[split]


def open_betons(images: ImageFolder, view: View, cache: Path | None, workers: int, threads: int) -> BetonImages:
    """The .beton files of the folder, written first where they are missing. InputError as `cached_tables` says."""
    turbojpeg()  # what is wrong with it is no image's fault
    return BetonImages(cached_tables(images, cache, workers or len(os.sched_getaffinity(0))), view, threads)


class _Batches:
    """The batches that are being filled: each comes into being when the first thread asks for it."""

    def __init__(self, table: Table, view: View, samples: np.ndarray, batch_size: int, draw: Draw | None) -> None:
        self.table, self.samples, self.batch_size = table, samples, batch_size
        self._view, self._draw = view, draw
        self._size = view.output(draw)
        self._lock = threading.Lock()
        self._tensors: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def rows(self, number: int, first: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What to decode into batch `number` from row `first` on, REQUEST [n], and where to: float32 [n, S, 3 S]."""
        with self._lock:
            if number not in self._tensors:
                length = min(self.batch_size, len(self.samples) - number * self.batch_size)
                shape = (length, 3, self._size, self._size)
                self._tensors[number] = torch.empty(shape, memory_format=torch.channels_last)
            out = self._tensors[number].permute(0, 2, 3, 1).numpy()
        part = out[first : first + len(samples)].reshape(len(samples), self._size, -1)
        return requests(self.table, samples, self._draw, self._view), part

    def take(self, number: int) -> torch.Tensor:
        with self._lock:
            return self._tensors.pop(number)


def _raise_if_bad(result: Any, table: Table) -> None:
    if isinstance(result, Exception):
        raise result
    if result is not None:
        raise InputError(f"image {result} in {table.path} is damaged: remove its folder and run again")


def _open_loader(table: Table, view: View) -> Any:
    return open_loader(_parts().open, table.path, _parts().Decoder(view), batches_ahead=AHEAD)


class _Parts:
    """What is made of FFCV's classes, which are imported on first use."""

    open: Callable[..., Any]
    Decoder: Any
    Thread: Any


@functools.cache
def _parts() -> _Parts:
    with importing_ffcv():
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import loader
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.memory_managers import OSCacheManager
        from ffcv.memory_managers.os_cache import OSCacheContext
        from ffcv.pipeline.compiler import Compiler

    class Manager(OSCacheManager):
        """Maps the file, without FFCV's table of pages (half a kilobyte an image) and the function that reads."""

        def __init__(self, reader: Any) -> None:
            self.reader = reader
            self.ptrs = self.sizes = np.empty(0, np.uint64)
            self.context = OSCacheContext(self)

        def compile_reader(self) -> None: ...

    def open_with_manager(*arguments: Any, **options: Any) -> Any:
        loader.OSCacheManager = Manager
        Compiler.set_enabled(False)  # it would allow roundings of which torchvision's loader knows nothing
        try:
            return loader.Loader(*arguments, **options)
        finally:
            loader.OSCacheManager = OSCacheManager
            Compiler.set_enabled(True)

    class Decoder(SimpleRGBImageDecoder):
        """Gets (requests, where to write) in the place of the field's metadata; returns the first row that failed."""

        def __init__(self, view: View) -> None:
            super().__init__()
            self._code = numba.njit(_decoder(*normalisation(view.mean, view.std)), nogil=True)

        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
            return replace(previous_state, jit_mode=True, shape=(1,), dtype=np.dtype("<i8")), None

        def generate_code(self) -> Callable[..., int]:
            return self._code

    class Thread(EpochIterator):
        """Fills `share` rows of every batch, from row `first` on. What it hands over is None, the position of an image
        that is damaged, or an exception."""

        def __init__(self, loader: Any, batches: _Batches, first: int, share: int) -> None:
            self._batches, self._first = batches, first
            place = np.arange(len(batches.samples)) % batches.batch_size
            samples = batches.samples[(place >= first) & (place < first + share)]
            self.count = -(-len(samples) // share)
            loader.batch_size = share
            super().__init__(loader, samples)

        def run_pipeline(self, number: int, samples: np.ndarray, slot: int, event: Any) -> Any:
            if self.terminate_event.is_set():
                raise StopIteration  # which ends the thread; FFCV would read the epoch to its end
            try:
                self.metadata = {"f0": self._batches.rows(number, self._first, samples)}
                (bad,) = super().run_pipeline(number, samples, slot, event)
                return None if bad < 0 else int(samples[bad])
            except Exception as error:  # raised again where the batch is awaited
                self.terminate_event.set()
                return error

    parts = _Parts()
    parts.open, parts.Decoder, parts.Thread = open_with_manager, Decoder, Thread
    return parts


def _decoder(gain: np.ndarray, shift: np.ndarray) -> Callable[..., int]:
    """The decoder's code, in numba's language. No writable byte array in it has one dimension: FFCV's own manager
    changes that type behind numba's back, after which compiling may never end.
    """
    init, _, decompress, destroy = turbojpeg()

    def decode(samples, nothing, metadata, storage):  # type: ignore[no-untyped-def]
        made, out = metadata
        file, _, _ = storage
        failed = -1
        handle = init()
        for i in range(len(made)):
            row = made[i]
            height, width = row["height"], row["width"]
            content = file[row["pointer"] : row["pointer"] + row["bytes"]]
            if row["raw"]:
                make(content.reshape(height, 3 * width), made, i, gain, shift, out[i])
                continue
            pixels = np.empty((height, 3 * width), np.uint8)
            if decompress(
                handle, content.ctypes.data, content.size, pixels.ctypes.data, width, 0, height, RGB, ACCURATE
            ):
                failed = i
                break
            make(pixels, made, i, gain, shift, out[i])
        destroy(handle)
        return failed

    return decode
