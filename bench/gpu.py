"""Checks, then times, everything on a CUDA machine. Needs no network, FFCV or plug-ins of pytest.

    python bench/gpu.py [--only checks kernels steps more share] [--cache FOLDER] [--json FILE]

Parts, each of at most eight minutes: `checks` runs the tests of kernels and training with `--device cuda`; `kernels`
and `steps` time the rows of bench/rows.py and bench/training.py. Two must be named: `more` times the steps that tell
less, in several calls, and `share` times several trainings at once. Results are merged into one JSON file for each
device, which holds the results of one state of the code. Its first line is a summary, which is also printed after each
task and before the final table. A task that cannot end in time is not begun; the same command goes on with it, and
repeats what failed. A run that is killed loses the task that it was at. A test or a row that crashes or hangs costs no
other. Nothing is timed if a check failed, but with `--despite-failures`.
`--device cpu --small` does the same on a laptop. Exit code: 1 if a check or a row failed, 2 for bad usage.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import checks, record, rows, timed
from bench.child import ROOT, Child, Message, described
from bench.record import Record

PARTS = ("checks", *timed.PARTS)
LIMIT = 470.0
"""Seconds of a part: eight minutes with the start of the process. Of a task that is not done then nothing is kept."""
PATIENCE = 60.0
"""Seconds after which a row hangs, and at least three times what its task is expected to take."""
LONGEST = 11_000
"""Characters of the final table: some terminals and services keep no more than the last 12,000 of the output."""


def timed_command(part: str, device: torch.device, small: bool, blocks: bool) -> list[str]:
    """The command line of the process that does the tasks of a part."""
    flags = [flag for flag, wanted in (("--small", small), ("--blocks", blocks)) if wanted]
    return [sys.executable, "-m", "bench.timed", part, "--device", str(device), *flags]


def run_checks(paths: Sequence[str], device: str, results: Record, limit: float, jobs: int, gib: float) -> None:
    """Runs test files and records the outcomes."""
    until = time.monotonic() + limit
    results.left["checks"] = [file for file in results.left.get("checks", []) if (ROOT / file).is_file()]
    todo = results.begin("checks", checks.files(paths))
    minutes = checks.expected(todo, results.checks, jobs) / 60
    print(
        f"\nchecks: {len(todo)} files, {jobs} at once, expected {minutes:.0f} minutes, at most {limit / 60:.0f}",
        flush=True,
    )
    how: dict[str, Any] = {"jobs": jobs, "gib": gib, "until": until, "saved": results.save}
    for file in checks.run(todo, device, results.checks, **how):
        found = file.outcome
        results.done("checks", file.name, well=not found["failed"] and not found["unfinished"])
        results.checked(file.name, file.texts)
        counts = f"{found['passed']} passed, {len(found['failed'])} failed, {sum(found['skipped'].values())} skipped"
        cut = ", cut by the limit" if found["unfinished"] else ""
        print(f"  {file.name:<46}{counts} in {found['seconds']:.0f} s{cut}", flush=True)
        for test, why in found["failed"].items():
            print(f"    {test}: {why}", flush=True)
        report(results)


class Doer:
    """The process that does the tasks of a part; a new one after a task that broke it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._child: Child | None = None

    def do(self, name: str, expected: float, results: Record, until: float) -> None:
        """Does a task, and again without each row that breaks the process, until time.monotonic() is `until`."""
        began = time.monotonic()
        broken: dict[str, str] = {}
        while True:
            self._child = self._child or Child(self._command)
            answer, fault = self._ask(self._child, {"task": name, "without": [*broken]}, expected, until)
            # Also of a task that did not end: the next run begins it where so much time is left.
            results.seconds[name] = round(time.monotonic() - began, 1)
            if answer and not answer["lost"]:
                results.put(name, answer["rows"], broken | answer["errors"])
                return
            # Of what was timed before nothing is kept: those may be times of a device in trouble.
            self.end()
            fault = answer.get("errors", fault)
            broken |= fault
            if "" in fault or time.monotonic() > until:
                results.fail(name, broken)
                return

    def _ask(self, child: Child, task: Message, expected: float, until: float) -> tuple[Message, dict[str, str]]:
        """(the answer, what went wrong by row); the former is empty where the latter is not."""
        child.tell(**task)
        row, since = "", time.monotonic()
        patience = max(PATIENCE, 3 * expected)
        while True:
            messages, code = child.messages(0.2)
            now = time.monotonic()
            for message in messages:
                row, since = message.get("row", row), now
                if "ended" in message:
                    return message, {}
            if code is not None:
                return {}, {row: f"ended its process: {described(code)}: {child.last_lines()}"[:200]}
            if now > until:
                return {}, {"": "the part's time was over"}
            if now - since > patience:
                return {}, {row: f"no end after {patience:.0f} s"}

    def end(self) -> None:
        """Ends the process."""
        if self._child is not None:
            self._child.end()
        self._child = None


def run_timed(part: str, tasks: Sequence[timed.Task], command: Sequence[str], results: Record, limit: float) -> None:
    """Does the tasks of a part, in a process of their own."""
    until = time.monotonic() + limit
    todo = results.begin(part, [task.name for task in tasks])
    # What an earlier run saw of a task, on this device, is better than a prediction.
    expected = {task.name: results.seconds.get(task.name, task.seconds) for task in tasks}
    total = sum(expected[name] for name in todo)
    print(f"\n{part}: {len(todo)} tasks, expected {total / 60:.0f} minutes, at most {limit / 60:.0f}", flush=True)
    doer = Doer(command)
    try:
        begun = False
        # A task that took longer than a whole part is begun where nothing else is.
        while fits := [name for name in todo if expected[name] <= until - time.monotonic()] or todo[: not begun]:
            name, begun = fits[0], True
            todo.remove(name)
            doer.do(name, expected[name], results, until)
            results.done(part, name, well=not results.errors_of(name))
            show(results, name)
            report(results)
    finally:
        doer.end()
    if results.left[part]:
        print(f"  {len(results.left[part])} left: the same command goes on with them", flush=True)


def show(results: Record, name: str) -> None:
    """Prints the rows of a group and the errors of those that failed."""
    if name in results.rows:
        print("", *rows.table(name, results.rows[name]), sep="\n", flush=True)
    for what, why in results.errors_of(name).items():
        print(f"  not timed: {what}: {why}", flush=True)


def report(results: Record) -> None:
    """Saves the results, and says in a line what they are so far."""
    results.save()
    print(f"summary: {results.summary()}", flush=True)


def final(results: Record) -> Iterator[str]:
    """Lines: the summary, then what failed, what is left and the targets; LONGEST characters at most."""
    yield f"summary: {results.summary()}"
    yield f"results: {results.file}"
    lists = (
        ("failed", results.failed),
        ("not timed", [f"{what}: {why}" for what, why in results.errors.items()]),
        ("skipped", [f"{number} x {why}" for why, number in results.skipped.items()]),
        ("left", [f"{part}: {name}" for part, names in results.left.items() for name in names]),
    )
    for title, lines in lists:
        for line in lines[:8]:
            yield f"  {title}: {line}"[:140]
        if len(lines) > 8:
            yield f"  {title}: {len(lines) - 8} more: see the file"
    yield ""
    known = results.copy_rate is not None and results.matrix_rate is not None
    rates = f"{results.copy_rate:,.0f} GB/s and {results.matrix_rate:,.0f} TFLOP/s" if known else "not measured"
    yield f"targets; floors at the rates of this device: {rates}; predicted for an H200, before any measurement"
    yield from record.table(results.judged())


@contextmanager
def told_to_end() -> Iterator[None]:
    """Within it SIGTERM, which services send before they kill, ends the program in order: results are shown."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true", help="sizes for a laptop")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:3], metavar="PART", help="|".join(PARTS))
    p.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DEVICE.json")
    p.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps what Triton and torch compile between parts")
    p.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"of a part (default: {LIMIT:.0f})")
    p.add_argument("--tests", nargs="+", default=checks.TESTS, metavar="PATH", help="files or folders of checks")
    p.add_argument("--jobs", type=int, metavar="N", help="test files at once (default: half the cores, at most 8)")
    p.add_argument("--blocks", action="store_true", help="also time block sizes")
    p.add_argument("--despite-failures", action="store_true", help="time even if a check failed")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no CUDA device here; `--device cpu --small` runs the same on a CPU", file=sys.stderr)
        return 2
    if args.cache is not None:  # read by both libraries when they compile, in the processes that do
        os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve() / "triton")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache.resolve() / "inductor")
    facts = rows.environment(device) | {"code": record.code(), "small": args.small}
    name = facts["device"].lower().replace(" ", "-") + ("-small" if args.small else "")
    results = Record(args.json or ROOT / "bench" / "results" / f"{name}.json", facts)
    print(" ".join(f"{k}={v}" for k, v in facts.items()), flush=True)
    jobs = args.jobs or max(1, min(8, (os.cpu_count() or 1) // 2))
    try:
        with told_to_end():
            if "checks" in args.only:
                run_checks(args.tests, args.device, results, args.limit, jobs, facts.get("memory_gb", 64.0))
            parts = [part for part in timed.PARTS if part in args.only]
            why = "kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
            # A time of a kernel that computes something else means nothing.
            if results.failed and not args.despite_failures:
                why = "a check failed (--despite-failures times all the same)"
            if parts and why:
                print(f"\nnothing is timed: {why}")
            for part in parts if not why else ():
                tasks = timed.tasks(part, device, args.small, args.blocks)
                run_timed(part, tasks, timed_command(part, device, args.small, args.blocks), results, args.limit)
    finally:
        results.save()
        print("", *final(results), sep="\n", flush=True)
    return 1 if results.failed or results.errors else 0


if __name__ == "__main__":
    sys.exit(main())
