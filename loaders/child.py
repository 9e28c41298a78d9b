"""One call in a fresh process that reports back, and that never outlives its parent.

Decoding needs processes (threads gain nothing here: the interpreter's lock decides), and FFCV's writer waits for ever
when one of its own worker processes dies. So a child leads a process group of its own, sends messages through a pipe,
and kills the whole group when the pipe from its parent closes, however the parent went.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

Send = Callable[[Any], None]
_END = "the call returned"


class ChildError(RuntimeError):
    """The call failed in the child. `errno` is that of an OSError there, else None."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class Child:
    """`function(*arguments, send)` in a new process; what it sends comes out of `messages`. A context manager."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        paths = [_package_root(), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            # Importing FFCV compiles for three seconds what writing and decoding do not need.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NUMBA_DISABLE_JIT": "1"},
        )
        self._last_words: deque[str] = deque(maxlen=20)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once: messages() says why
            self._process.stdin.write(pickle.dumps((function, arguments)))
            self._process.stdin.flush()

    def messages(self) -> Iterator[Any]:
        """What the child sends, until its call returns. ChildError where that failed or the process died."""
        assert self._process.stdout is not None
        while True:
            try:
                kind, content = pickle.load(self._process.stdout)
            except EOFError:
                self.stop()
                words = self._last_words[-1] if self._last_words else "no message"
                raise ChildError(f"a process ended early (exit code {self._process.returncode}: {words})") from None
            if kind == "failed":
                raise ChildError(*content)
            if kind == _END:
                return
            yield content

    def stop(self) -> None:
        """End the child and all it started. A second call does nothing."""
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_words.append(line.decode(errors="replace").rstrip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _package_root() -> str:
    """The folder that holds the package, installed or not."""
    spec = find_spec("fastprune")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent.parent)


def failure(error: BaseException) -> tuple[str, tuple[str, int | None]]:
    """The message that makes `messages` raise a ChildError."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return "failed", (text, error.errno if isinstance(error, OSError) else None)


def send_raw(message: tuple[str, Any], descriptor: int) -> None:
    """Write a message at once: short ones (under 4 KiB) stay whole even when several processes share the pipe."""
    content = memoryview(pickle.dumps(message))
    while content:
        content = content[os.write(descriptor, content) :]


def _follow_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    pipe = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not get between the messages
    function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        function(*arguments, lambda content: send_raw(("sent", content), pipe))
        send_raw((_END, None), pipe)
    except Exception as error:
        send_raw(failure(error), pipe)


if __name__ == "__main__":
    main()
