"""Test files, each in a process of its own and several at once, until a deadline."""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.checks_plugin import DONE
from bench.child import ROOT, Child, described

TESTS = ("tests/kernels", "tests/training", "tests/loaders/test_batches.py")
# Seconds that a file is expected to take beside seven others, with nothing compiled before (predicted): all but
# the last compile whole networks, which takes longest, and are begun first; then what a step uses. The others follow.
FIRST = {
    "test_gpu_options": 300.0,
    "test_device": 240.0,
    "test_figure": 150.0,
    "test_trainer": 120.0,
    "test_recipes": 120.0,
    "test_masked_sgd": 60.0,
}
OTHERS = 45.0
PATIENCE = 240.0
"""Seconds after which a test hangs. Compiling a ResNet beside seven other processes takes up to two minutes."""
RESTARTS = 8
"""Of a file: as many tests may end its process."""
GIB = 4.0
"""GPU memory of a file that asks for no more: a context, small networks and what their allocator keeps."""

Outcome = dict[str, Any]
"""Of a file. passed: number. failed: reason by test. skipped: number by reason. seconds. unfinished: tests that have
ended, in a file whose others have not."""


def fresh() -> Outcome:
    return {"passed": 0, "failed": {}, "skipped": {}, "seconds": 0.0, "unfinished": []}


def files(paths: Iterable[str]) -> list[str]:
    """Test files of files and folders, relative to the project, in the order in which they are begun."""
    found = []
    for path in paths:
        root = ROOT / path
        found += [os.path.relpath(f, ROOT) for f in (sorted(root.rglob("test_*.py")) if root.is_dir() else [root])]

    def place(file: str) -> tuple[int, str]:
        first, name = list(FIRST), Path(file).stem
        return (first.index(name) if name in first else len(first), file)

    return sorted(found, key=place)


def expected(names: Iterable[str], outcomes: dict[str, Outcome], jobs: int) -> float:
    """Seconds that the files take, `jobs` at once, by what they took before or are expected to."""
    each = [(outcomes.get(name) or {}).get("seconds") or FIRST.get(Path(name).stem, OTHERS) for name in names]
    return max([0.0, sum(each) / jobs, *each])


def gib_of(file: str) -> float:
    """GPU memory that a file's tests take at most, by what they ask of tests/kernels/inputs.py."""
    # Side by side, two tests that each found enough memory free could both run out of it.
    asked = re.findall(r"require_(?:gpu_)?memory\((\d+)", (ROOT / file).read_text()) if (ROOT / file).is_file() else []
    return max([GIB, *map(float, asked)])


def command(file: str, device: str) -> list[str]:
    """The command line that runs a test file with the project's settings."""
    how = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q"]
    # The project's settings make warnings errors, but other versions of libraries give other warnings.
    how += ["-W", "default", "-p", "no:cacheprovider", "-p", "bench.checks_plugin", "--tb=short"]
    return [*how, "--device", device, file]


class File:
    """A test file whose tests run in a process of their own, and in a new one after a test that ended it."""

    def __init__(self, name: str, device: str, outcome: Outcome, patience: float) -> None:
        """outcome: mutated; what it says is unfinished is not run again."""
        self.name, self.outcome = name, outcome
        self.texts: dict[str, str] = {}
        """By failed test the end of its traceback."""
        self._device, self._patience, self._restarts = device, patience, 0
        self._before = outcome["seconds"]
        self._began = time.monotonic()
        self._start()

    def _start(self) -> None:
        self._test: str | None = None
        self._lost = False  # whether the last test failed: if that broke the device, its process ends after it
        self._since = time.monotonic()
        self._done = tempfile.NamedTemporaryFile("w", suffix=".json")  # noqa: SIM115 - as long as the process
        json.dump(self.outcome["unfinished"], self._done)
        self._done.flush()
        # No plug-in is loaded even if installed, so that the checks are the same on every machine.
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", DONE: self._done.name}
        self._child = Child(command(self.name, self._device), alone)

    def step(self) -> bool:
        """Counts in what its process has sent; whether the file is finished."""
        status, code = self._take()
        if status is not None:
            return self._finish(status)
        quiet = time.monotonic() - self._since
        # Before its first test a process imports and collects, which has nothing to do with the tests' patience.
        if code is None and quiet <= (PATIENCE if self._test is None else self._patience):
            return False
        why = f"no end after {quiet:.0f} s" if code is None else f"ended its process: {described(code)}"
        between = self._test is None and not self._lost
        if self._test is not None:
            self._count(self._test, "failed", why, self._child.last_lines(40))
        if between or self._restarts == RESTARTS:
            # Nothing ran that could be left out.
            self._count("", "failed", f"pytest: {why}: {self._child.last_lines()}"[:200], self._child.last_lines(40))
            return self._finish(0)
        self._restarts += 1
        self._stop()
        self._start()
        return False

    def _take(self) -> tuple[int | None, int | None]:
        """Counts in what has been sent; (the status with which pytest finished, the exit code), None before that."""
        messages, code = self._child.messages()
        status = None
        for message in messages:
            self._since = time.monotonic()
            if "begun" in message:
                self._test = message["begun"]
            elif "ended" in message:
                self._count(message["ended"], message["outcome"], message.get("why", ""), message.get("text", ""))
            else:
                status = message["finished"]
        return status, code

    def _count(self, test: str, outcome: str, why: str, text: str = "") -> None:
        self._test = None
        self._lost = outcome == "failed"
        self.outcome["unfinished"].append(test)
        if outcome == "passed":
            self.outcome["passed"] += 1
        elif outcome == "skipped":
            self.outcome["skipped"][why] = self.outcome["skipped"].get(why, 0) + 1
        else:
            self.outcome["failed"][test], self.texts[test] = why, text

    def _finish(self, status: int) -> bool:
        # 5: no test was collected. Otherwise pytest itself failed, which no test reports.
        if status not in (0, 1, 5) and not self.outcome["failed"]:
            self._count("", "failed", f"pytest ended with {status}: {self._child.last_lines()}"[:200])
        self.outcome["unfinished"] = []
        return True

    def end(self) -> None:
        """Ends its process, whether or not it is finished. What it has sent is counted in."""
        self._take()
        self.outcome["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        self._stop()

    def _stop(self) -> None:
        self._child.end()
        self._done.close()


def run(
    waiting: Sequence[str],
    device: str,
    outcomes: dict[str, Outcome],
    *,
    jobs: int,
    gib: float,
    until: float,
    patience: float = PATIENCE,
    saved: Callable[[], None] = lambda: None,
) -> Iterator[File]:
    """Runs test files, `jobs` at once, until time.monotonic() reaches `until`; yields each that is finished or cut.

    outcomes: by file, mutated; those not in it were not begun. gib: memory of the device; files that need more than 0.8
    of it together do not run at once. saved: is called after each second in which something was counted in.
    """
    left, running = list(waiting), list[File]()
    last = time.monotonic()
    try:
        while (left or running) and time.monotonic() < until:
            taken = sum(gib_of(file.name) for file in running)
            fits = [name for name in left if not running or taken + gib_of(name) <= 0.8 * gib]
            if fits and len(running) < jobs:
                left.remove(fits[0])
                if not outcomes.get(fits[0], fresh())["unfinished"]:
                    outcomes[fits[0]] = fresh()
                running.append(File(fits[0], device, outcomes[fits[0]], patience))
                continue
            time.sleep(0.05)
            for file in [file for file in running if file.step()]:
                running.remove(file)
                file.end()
                yield file
            if time.monotonic() - last > 1:
                saved()
                last = time.monotonic()
    finally:
        for file in running:
            file.end()
    yield from running
