"""One command on a CUDA machine, without network or FFCV: checks every operation, then times it and training steps.

    PYTHONPATH=. python bench/gpu_suite.py [--json FILE] [--only checks kernels steps share] [--sweep] [--profile]

Nothing is timed before all checks pass. A kernel's time is the median over replays of a CUDA graph that runs it once on
each of several input sets, which together do not fit into the cache. Exits with 1 if a check failed and with 2 where
there is no CUDA device; `--device cpu --small` does the same on a laptop, and under TRITON_INTERPRET=1 checks the
Triton code there.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import SkipTest

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastprune
from bench import gpu_checks, gpu_far, gpu_share, gpu_speed, gpu_steps
from bench.gpu_times import sweep, targets, time_kernels

STAGES = ("checks", "kernels", "steps", "share")


class Suite:
    """Runs checks and timings and keeps what they gave; `device` and `small` decide where and how large.

    checks: name to passed. skipped, errors: name to one line that says why. timings: name to a row of figures: `ms` a
    call, `spread` between two measurements as a fraction, and what `time` adds. facts: device and versions.
    """

    def __init__(self, device: str, small: bool, file: Path | None = None) -> None:
        self.device, self.small, self.file = torch.device(device), small, file
        self.cuda = self.device.type == "cuda"
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.generator, self.host = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
        self.checks: dict[str, bool] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.timings: dict[str, dict[str, Any]] = {}
        self.targets: dict[str, dict[str, Any]] = {}
        self.facts = environment(self.device)
        self.copy_rate = math.nan

    def save(self) -> None:
        """Writes the JSON file, after every result: a run that is cut off keeps what it has."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            names = ("checks", "skipped", "errors", "timings", "targets")
            content = self.facts | {"small": self.small} | {name: getattr(self, name) for name in names}
            self.file.write_text(json.dumps(content, indent=1) + "\n")

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers on the device, fresh each time."""
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def check(self, name: str, function: Callable[["Suite"], str | None]) -> None:
        """Runs it: an exception is a failure, SkipTest says why it cannot run here, a returned text is printed."""
        began, note = time.perf_counter(), None
        try:
            note = function(self)
        except SkipTest as reason:
            self.skipped[name] = str(reason)
        except Exception as error:  # whatever it is, the other checks go on
            self.checks[name], self.errors[name] = False, one_line(error)
        else:
            self.checks[name] = True
        word = {True: "ok  ", False: "FAIL", None: "skip"}[self.checks.get(name)]
        note = note or self.skipped.get(name) or self.errors.get(name)
        print(f"  {word} {time.perf_counter() - began:6.1f} s  {name}" + f": {note}" * bool(note), flush=True)
        self.save()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
        """One CUDA graph that runs the calls in turn, on a CPU a loop. They run before it, too: kernels compile then.

        Whatever memory they use must outlive the graph.
        """

        def loop() -> None:
            for call in calls:
                call()

        loop()
        if not self.cuda:
            return loop
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loop()
        return graph.replay

    def milliseconds(self, calls: Sequence[Callable[[], Any]], graph: bool) -> tuple[float, float]:
        """Time of one call, the mean of two medians, and the difference of those as a fraction of it."""

        def loop() -> None:
            for call in calls:
                call()

        run = self.capture(calls) if graph else loop
        began, seconds, warm = time.perf_counter(), 0.0, 0
        while warm < (1 if self.small else 3) or (seconds < 0.1 and warm < 1000):  # until the clocks have gone up
            run()
            if self.cuda:
                torch.cuda.synchronize()
            warm, seconds = warm + 1, time.perf_counter() - began
        repeats = 3 if self.small else max(5, min(20, int(warm / seconds)))
        medians = [statistics.median(self._runs(run, repeats)) / len(calls) for _ in range(2)]
        ms = statistics.mean(medians)
        return ms, (max(medians) - min(medians)) / ms

    def _runs(self, run: Callable[[], None], repeats: int) -> list[float]:
        if not self.cuda:
            times = [time.perf_counter()]
            for _ in range(repeats):
                run()
                times.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def time(
        self,
        name: str,
        calls: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        graph: bool = False,
        scale: float = 1.0,
        bytes: float = 0.0,
        images: int = 0,
        floor: str | None = None,
        ours: str | None = None,
    ) -> float:
        """Times a call, or the mean of several on different memory, and prints a row; milliseconds, NaN if it failed.

        graph: replay from a CUDA graph, which an operation that waits for the device cannot. scale: times this. bytes:
        the fewest that must move; they give GB/s, and the floor at the rate of a plain copy. images: per call, for
        images/s. floor: name of the row that is the floor instead. ours: name of our row, to be compared with.
        """
        calls = [calls] if callable(calls) else calls
        row: dict[str, Any] = {"how": ("graph" if graph else "events") if self.cuda else "loop", "sets": len(calls)}
        try:
            ms, row["spread"] = self.milliseconds(calls, graph)
        except Exception as error:  # a row that fails must not cost the others
            self.errors[name] = one_line(error)
            print(f"  {name:<58} not timed: {self.errors[name]}", flush=True)
            return math.nan
        row["ms"] = ms = ms * scale
        if bytes:
            row["gb_per_s"] = bytes / ms / 1e6
        if images:
            row["images_per_s"] = 1e3 * images / ms
        known = bytes / self.copy_rate / 1e6 if floor is None else self.timings.get(floor, {}).get("ms", math.nan)
        if known > 0:
            row["floor_ms"], row["over_floor"] = known, ms / known
        if ours in self.timings:
            row["over_ours"] = ms / self.timings[ours]["ms"]
        self.record(name, row)
        return ms

    def record(self, name: str, row: dict[str, Any]) -> None:
        """Keeps a row of figures, and prints it."""
        self.timings[name] = row
        print(line(name, row), flush=True)
        self.save()


HEADER = f"  {'':<58} {'ms':>9} {'spread':>6} {'GB/s':>7} {'x floor':>7} {'x ours':>8} {'images/s':>11}"


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table; what is not known is left blank."""
    columns = [("spread", 6, ".1%"), ("gb_per_s", 7, ",.0f"), ("over_floor", 7, ".2f"), ("over_ours", 8, ".2f")]
    columns.append(("images_per_s", 11, ",.0f"))
    cells = [f"{row[key]:>{width}{form}}" if key in row else " " * width for key, width, form in columns]
    return f"  {name:<58} {row['ms']:9.4f} {' '.join(cells)}  {row['how']}"


def one_line(error: Exception) -> str:
    """Its type and the first line that says something, at most 200 characters."""
    first = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit: what a figure means nothing without."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            return ""
        return done.stdout.strip()

    facts: dict[str, Any] = {"device": f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"}
    if device.type == "cuda":
        known = torch.cuda.get_device_properties(device)
        facts = {"device": known.name, "capability": f"{known.major}.{known.minor}", "cuda": torch.version.cuda}
        facts |= {"memory_gb": known.total_memory / 1e9, "multiprocessors": known.multi_processor_count}
        facts |= {"l2_mb": known.L2_cache_size / 1e6}
    commit = git("rev-parse", "--short", "HEAD")
    return facts | {
        "fastprune": fastprune.__version__,
        "commit": commit or "unknown",
        "changed": bool(git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        **{name: getattr(__import__(name), "__version__", None) for name in ("torch", "torchvision", "triton")},
        "date": time.strftime("%Y-%m-%d"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true", help="sizes for a CPU")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    p.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=STAGES[:3],
        metavar="STAGE",
        help="|".join(STAGES) + ": all but share",
    )
    p.add_argument("--sweep", action="store_true", help="also time block sizes")
    p.add_argument("--profile", action="store_true", help="also list the kernels of a training step")
    args = p.parse_args(arguments)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_suite.py: no CUDA device here (--device cpu --small runs the same on a CPU)", file=sys.stderr)
        return 2
    suite = Suite(args.device, args.small, args.json)
    print(" ".join(f"{k}={v}" for k, v in suite.facts.items()), flush=True)
    if "checks" in args.only:
        print("checks:")
        for name, check in (gpu_checks.CHECKS | gpu_far.CHECKS | gpu_steps.CHECKS).items():
            suite.check(name, check)
    failed = [name for name, ok in suite.checks.items() if not ok]
    if suite.interpreted or failed:
        print("nothing is timed: " + ("the kernels are interpreted" if suite.interpreted else "a check failed"))
    else:
        if "kernels" in args.only:
            print("kernels:", HEADER, sep="\n")
            time_kernels(suite)
            if args.sweep:
                sweep(suite)
        if "steps" in args.only:
            print("steps:", HEADER, sep="\n")
            gpu_speed.time_steps(suite, args.profile)
        if "share" in args.only:
            print("several runs at once on the device (ms: of a batch, by all together):", HEADER, sep="\n")
            gpu_share.time_shared(suite)
        if "kernels" in args.only:
            print("targets:")
            targets(suite)
    suite.save()
    print(f"{len(suite.checks) - len(failed)} checks passed, {len(failed)} failed, {len(suite.skipped)} skipped")
    for name, error in suite.errors.items():
        print(f"  {name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
