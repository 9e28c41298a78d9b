"""What both readers of .beton files need of FFCV: its import, its loader, its threads. All of it is imported on use."""

import queue
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastprune.errors import InputError


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """For the imports of FFCV's parts: with it, they are quiet, and torch keeps its number of threads, which they set
    to 1. InputError where one of them fails.
    """
    with _undisturbed():
        try:
            _import_fast()
            yield
        except (ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"ffcv cannot be imported ({reason}): install it again, or use the loader torchvision"
            ) from None


def open_loader(make: Callable[..., Any], path: Path, decoder: Any, **options: Any) -> Any:
    """FFCV's loader over the images of a file, made by its class or what wraps it; labels and order are kept by us.

    options: further ones of that class. torch keeps its number of threads.
    """
    with _undisturbed():
        return make(
            str(path),
            batch_size=1,  # set for each epoch or thread
            num_workers=1,
            os_cache=True,
            seed=0,  # unused, but otherwise drawn from numpy's global generator
            pipelines={"image": [decoder], "label": None, "index": None},
            drop_last=False,
            **options,
        )


def next_batch(thread: Any) -> Any:
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


def end_threads(threads: Sequence[Any]) -> None:
    """End EpochIterators, whatever they are at: one that waits to hand over a batch would live for ever, and keep its
    memory.
    """
    for thread in threads:
        thread.close()
    for thread in threads:
        while thread.is_alive():
            while not thread.output_queue.empty():
                thread.output_queue.get()
            thread.join(timeout=0.01)


@contextmanager
def _undisturbed() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FFCV's, about what it imports
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
