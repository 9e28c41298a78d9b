"""Images out of .beton files through FFCV, mirrored and normalised as soon as they come.

FFCV's own flips are unseeded, its random order mixes seed and epoch badly, its batches are views that it overwrites,
and when its thread fails the caller waits for ever: so it is asked for images in a given order, and everything else
happens here. Images of one size come whole and are cropped here, too; others are cropped by FFCV's own decoders, which
draw from a generator that cannot be seeded.
"""

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
    """Reader of train.beton and val.beton: one FFCV loader a split, compiled once, for every epoch, order and batch
    size. crop: of images that differ in size.  threads: that decode those.
    """

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
        """FFCV's loader over the images of a file; labels and order are kept by us."""
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
                batch_size=1,  # set for each epoch
                num_workers=threads,
                os_cache=True,
                seed=0,  # unused, but otherwise drawn from numpy's global generator
                pipelines={name: [decoder] if name == "image" else None for name in file.fields},
                drop_last=False,
            )


def _frugal(decoder: Any) -> Any:
    """FFCV's class of a cropping decoder, but with memory for one whole image at a time. FFCV's own has some for the
    largest image of the file, for each row of five batches: 47 GB for ImageNet at batches of 256.
    """
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
    """Check both files. InputError where one is missing, truncated, foreign, or not the manifest's."""
    import numba

    assert folder is not None
    threads = min(max(1, workers), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    return FfcvReader(manifest, manifest_files(manifest, folder), crop, threads)


@contextmanager
def fetched(loader: Any, samples: np.ndarray, batch_size: int) -> Iterator[Iterator[np.ndarray]]:
    """FFCV's thread over `samples`, as batches uint8 [B, H, W, 3] that are valid until the next one is asked for.

    loader: FFCV's; its batch size is changed.  samples: int64 [n].  However it is left, the thread is ended.
    """
    from ffcv.loader.epoch_iterator import EpochIterator

    threads = torch.get_num_threads()
    loader.batch_size = batch_size
    thread = EpochIterator(loader, samples)

    def batches() -> Iterator[np.ndarray]:
        for number in range(-(-len(samples) // batch_size)):
            (images,) = _next_batch(thread)
            if number == 0:
                torch.set_num_threads(threads)  # the thread has set it before its first batch
            yield images

    try:
        yield batches()
    finally:
        # A thread that waits to hand over a batch would live for ever, and keep its memory.
        thread.close()
        while thread.is_alive():
            while not thread.output_queue.empty():
                thread.output_queue.get()
            thread.join(timeout=0.01)
        torch.set_num_threads(threads)


def _next_batch(thread: Any) -> Any:
    """What FFCV's EpochIterator hands over next; waits for it. RuntimeError where its thread has failed."""
    while True:
        try:
            batch = thread.output_queue.get(timeout=1.0)
        except queue.Empty:
            if not thread.is_alive() and thread.output_queue.empty():
                raise RuntimeError("FFCV's reading thread failed; what it printed says why") from None
            continue
        if batch is None:
            raise RuntimeError("FFCV delivered fewer batches than it was asked for")
        return batch[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without FFCV's warnings about what it imports; torch keeps its number of threads, which FFCV sets."""
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def _import_fast() -> None:
    """Without three seconds of compiling a typed dictionary of two constants, which then is a plain one."""
    from numba.core import config

    compiling = getattr(config, "DISABLE_JIT", 0)
    setattr(config, "DISABLE_JIT", 1)  # noqa: B010, numba's own types do not know it
    try:
        import ffcv  # noqa: F401
    finally:
        setattr(config, "DISABLE_JIT", compiling)  # noqa: B010
