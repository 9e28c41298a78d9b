"""Write images to a .beton file with FFCV's writer, watched from outside."""

import errno
import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastprune.errors import InputError
from fastprune.loaders.beton import page_bytes
from fastprune.loaders.child import Child, ChildError, Send, failure
from fastprune.loaders.inspection import progress_bar
from fastprune.loaders.samples import Samples

_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}


def write_betons(files: Mapping[Path, Samples], *, height: int, width: int, workers: int, show: bool = True) -> None:
    """Write each of `files`, images of `height` x `width`, with the fields image (raw), label and index.

    FFCV runs in a child process and with `workers` processes of its own; all of them end with this call, whatever
    happens. InputError where the disk does not take a file; RuntimeError where the writer fails otherwise.
    """
    folder = next(iter(files)).parent
    total = sum(map(len, files.values()))
    with (
        progress_bar(total, "writing .beton files", show) as bar,
        Child(write_with_ffcv, files, page_bytes(height, width), workers) as child,
    ):
        try:
            for kind, content in child.messages():
                if kind == "broken":
                    raise InputError(f"ffcv is installed but cannot be imported ({content}): install it again")
                if kind == "failed":
                    raise ChildError(*content)
                bar.update(content)
        except ChildError as error:
            if error.errno is not None and error.errno in _DISK:
                raise InputError(f"cannot write {folder}: {os.strerror(error.errno)}; choose another folder") from None
            raise RuntimeError(f"FFCV could not write to {folder}: {error}") from None


def write_with_ffcv(files: Mapping[Path, Samples], page: int, workers: int, send: Send) -> None:
    """What the child does. FFCV's bar becomes messages, the death of one of its processes becomes known,
    and nothing of it outlives a kill."""
    try:
        import ffcv.writer as writer
        from ffcv.fields import IntField, RGBImageField
    except (ImportError, OSError) as error:
        send(("broken", " ".join(str(error).split())))
        return

    multiprocessing.set_start_method("fork", force=True)
    started: list[Any] = []

    class Worker(multiprocessing.Process):
        def start(self) -> None:
            super().start()
            started.append(self)

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                send(failure(error))
                os._exit(1)

    class Shared:
        """Shared memory that forked processes inherit. Python's has a name, and stays when its owner is killed."""

        def __init__(self, create: bool, size: int) -> None:
            self.buf = memoryview(mmap.mmap(-1, size))

        def close(self) -> None: ...

        def unlink(self) -> None: ...

    class Bar:
        def __init__(self, total: int) -> None: ...

        def update(self, count: int) -> None:
            send(("done", count))

        def close(self) -> None: ...

    class Rows:
        """FFCV asks for a tuple in the order of its fields."""

        def __init__(self, samples: Samples) -> None:
            self.samples = samples

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, i: int) -> tuple[Any, int, int]:
            return self.samples.image(i), int(self.samples.labels[i]), int(i)

    def watch() -> None:
        while True:
            for process in started:
                if process.exitcode:
                    time.sleep(0.5)  # its own message, if it could send one, says more
                    send(("failed", (f"a process of the writer died (exit code {process.exitcode})", None)))
                    return
            time.sleep(0.2)

    writer.Process, writer.tqdm, writer.shared_memory = Worker, Bar, SimpleNamespace(SharedMemory=Shared)
    threading.Thread(target=watch, daemon=True).start()
    for path, samples in files.items():
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField(), "index": IntField()}
        rows = writer.DatasetWriter(str(path), fields, page_size=page, num_workers=workers)
        rows.from_indexed_dataset(Rows(samples))
