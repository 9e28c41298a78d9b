"""The reader of .beton files: FFCV fetches and decodes images in a given order, this module augments them.

Images of one size are cropped here. Images that differ in size are cropped by FFCV's own decoders, which draw from a
generator that cannot be seeded.
"""

# FFCV only delivers images, because the rest of its pipeline breaks the promises of a batch: its flips are unseeded,
# its random order uses seed + epoch (so that (0, 1) and (1, 0) agree), its batches are views that it overwrites, and a
# failure of its thread leaves the consumer waiting forever.

import queue
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastprune.errors import InputError
from fastprune.loaders.beton import Beton, manifest_files
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.readers import Crop, Table
from fastprune.loaders.readers.memory import normalised, on_device
from fastprune.loaders.samples import JPEG


class FfcvReader:
    """Reader of train.beton and val.beton.

    crop: for images that differ in size, else None.  threads: that decode such images.
    """

    # One FFCV loader per split serves every epoch, order and batch size: a new one for each round would
    # compile again.

    device = torch.device("cpu")

    def __init__(self, manifest: Manifest, files: dict[str, Beton], crop: Crop | None, threads: int) -> None:
        self._manifest, self._files, self._crop, self._threads = manifest, files, crop, threads
        self._loaders: dict[str, Any] = {}
        self.labels: dict[str, np.ndarray] = {split: file.labels for split, file in files.items()}

    def images(
        self, split: str, table: Table, batch_size: int, dtype: torch.dtype
    ) -> Generator[torch.Tensor, None, None]:
        constants = self._crop or self._manifest
        every, crops, flips = (on_device(c, self.device) for c in (np.arange(batch_size), *table[1:3]))
        with fetched(self._loader(split), table.samples, batch_size) as batches:
            for start, pixels in zip(range(0, len(table.samples), batch_size), batches, strict=True):
                part, images = slice(start, start + len(pixels)), torch.from_numpy(pixels)
                size = (self._manifest.height, self._manifest.width) if self._crop is None else pixels.shape[1:3]
                yield normalised(images, every[: len(pixels)], crops[part], flips[part], size, constants, dtype)

    def _loader(self, split: str) -> Any:
        if split not in self._loaders:
            self._loaders[split] = self._open(split)
        return self._loaders[split]

    def _open(self, split: str) -> Any:
        """FFCV's loader over the images of a split. It reads neither labels nor an order of its own."""
        file, crop = self._files[split], self._crop
        with _quiet():
            try:
                _import_fast()
                from ffcv.fields import rgb_image
                from ffcv.loader import Loader
            except (ImportError, OSError) as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"ffcv cannot be imported ({reason}): install it again, or use the loader torchvision"
                ) from None
            # Images of one size are stored raw and only copied, which needs one thread.
            threads = 1
            if crop is None:
                decoder = rgb_image.SimpleRGBImageDecoder()
            else:
                threads = self._threads
                size = (crop.size(split),) * 2
                if split == "train":
                    decoder = _frugal(rgb_image.RandomResizedCropRGBImageDecoder)(size)
                else:
                    decoder = _frugal(rgb_image.CenterCropRGBImageDecoder)(size, crop.val_crop / crop.val_resize)
            return Loader(
                str(file.path),
                batch_size=1,  # `fetched` sets it for each epoch
                num_workers=threads,
                os_cache=True,
                seed=0,  # unused, but FFCV would draw one from numpy's global generator
                pipelines={name: [decoder] if name == "image" else None for name in file.fields},
                drop_last=False,
            )


def _frugal(decoder: Any) -> Any:
    """Subclass of one of FFCV's cropping decoders that allocates memory for one decoded image at a time."""
    # FFCV's own allocates the largest image of the file for each row of five batches: 47 GB for ImageNet at a batch
    # size of 256.
    from ffcv.fields.rgb_image import imdecode, resize_crop
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

    class Frugal(decoder):
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            state, (made, _) = super().declare_state_and_memory(previous_state)
            return state, AllocationQuery(made.shape, made.dtype)

        def generate_code(self) -> Any:
            read, rows = self.memory_read, Compiler.get_iterator()
            decode_jpeg, resize, box = map(Compiler.compile, (imdecode, resize_crop, self.get_crop_generator))
            scale, ratio = self.scale, self.ratio
            if isinstance(ratio, tuple):
                scale, ratio = np.array(scale), np.array(ratio)

            def decode(samples, out, metadata, storage):  # type: ignore[no-untyped-def]
                for row in rows(len(samples)):
                    field = metadata[samples[row]]
                    content = read(field["data_ptr"], storage)
                    height, width = np.uint32(field["height"]), np.uint32(field["width"])
                    if field["mode"] == JPEG:
                        pixels = np.empty((height, width, 3), np.uint8)
                        decode_jpeg(content, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    else:
                        pixels = content.reshape(height, width, 3)
                    top, left, box_h, box_w = box(height, width, scale, ratio)
                    resize(pixels, top, top + box_h, left, left + box_w, out[row])
                return out[: len(samples)]

            decode.is_parallel = True  # type: ignore[attr-defined]
            return decode

    return Frugal


def open_ffcv(manifest: Manifest, folder: Path | None, crop: Crop | None, workers: int) -> FfcvReader:
    """Check both files and return their reader. InputError if one is missing, truncated or not the manifest's."""
    import numba

    assert folder is not None
    # numba refuses more threads than it started with.
    threads = min(max(1, workers), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    return FfcvReader(manifest, manifest_files(manifest, folder), crop, threads)


@contextmanager
def fetched(loader: Any, samples: np.ndarray, batch_size: int) -> Iterator[Iterator[np.ndarray]]:
    """Run FFCV's reading thread over `samples`, int64 [n]; the thread is joined on exit.

    Gives an iterator of batches uint8 [B, H, W, 3]; each is valid until the next one is requested.  loader: FFCV's; its
    batch size is mutated.
    """
    from ffcv.loader.epoch_iterator import EpochIterator

    # Created directly and not by iterating over the loader: it takes any order, and its thread can be joined.

    threads = torch.get_num_threads()
    loader.batch_size = batch_size
    thread = EpochIterator(loader, samples)

    def batches() -> Iterator[np.ndarray]:
        for number in range(-(-len(samples) // batch_size)):
            (images,) = _next_batch(thread)
            if number == 0:
                # FFCV's thread sets torch's global number of threads before its first batch.
                torch.set_num_threads(threads)
            yield images

    try:
        yield batches()
    finally:
        # A thread blocked on a full queue would never end and would keep its memory: empty the queue until it ends.
        thread.close()
        while thread.is_alive():
            while not thread.output_queue.empty():
                thread.output_queue.get()
            thread.join(timeout=0.01)
        torch.set_num_threads(threads)


def _next_batch(thread: Any) -> Any:
    """Wait for the next batch of FFCV's EpochIterator. RuntimeError if its thread has failed."""
    while True:
        try:
            # With a timeout, because a failed thread puts nothing into the queue.
            batch = thread.output_queue.get(timeout=1.0)
        except queue.Empty:
            if not thread.is_alive() and thread.output_queue.empty():
                raise RuntimeError("FFCV's reading thread failed; what it printed says why") from None
            continue
        if batch is None:
            raise RuntimeError("FFCV delivered fewer batches than requested")
        return batch[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of FFCV's imports, and restore torch's number of threads, which FFCV sets."""
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def _import_fast() -> None:
    """Import ffcv without compiling anything."""
    # FFCV fills a typed dictionary of two constants on import: three seconds of compilation. With the JIT disabled it
    # is a plain dictionary.
    from numba.core import config

    compiling = getattr(config, "DISABLE_JIT", 0)
    setattr(config, "DISABLE_JIT", 1)  # noqa: B010, numba's own types do not know it
    try:
        import ffcv  # noqa: F401
    finally:
        setattr(config, "DISABLE_JIT", compiling)  # noqa: B010
