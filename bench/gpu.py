"""Checks, then times, everything on a CUDA machine. Needs no network, FFCV or plug-ins of pytest.

    python bench/gpu.py [--only checks kernels steps share] [--cache FOLDER] [--json FILE]

Parts: `checks` runs the tests of kernels and training with `--device cuda`; `kernels` and `steps` time the rows of
bench/rows.py and bench/training.py; `share`, which must be named, times several trainings at once. Results are merged
into one JSON file for each device, which holds the results of one commit. A part starts no task after --limit seconds;
the same command then continues with the rest. Nothing is timed if a check failed on this commit.
`--device cpu --small` does the same on a laptop. Exit code: 1 if a check or a row failed, 2 for bad usage.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import rows, share, training

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("checks", "kernels", "steps", "share")
TESTS = ("tests/kernels", "tests/training")
STEPS = tuple((network, precision) for network in ("resnet18", "resnet50") for precision in ("bf16", "fp16"))
# (group, row, figure, limit). A positive limit is an upper bound; a negative one, without its sign, a lower bound.
# Ratios, where possible: they carry over from one GPU to the next. Reasons and predictions: bench/NOTES.md.
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    *((f"cast, {network}", "masked_cast to bf16", "over_floor", 1.3) for network in rows.NETWORKS),
    *((f"SGD step, {network}", "masked_sgd_ with a bf16 copy", "over_floor", 1.3) for network in rows.NETWORKS),
    *((f"threshold, {network}", "w.abs().kthvalue(k)", "over_ours", -20.0) for network in rows.NETWORKS),
    *((f"crop to {side}x{side}, bfloat16", rows.CROP, "over_floor", 2.0) for side in rows.SIDES),
    ("step of ResNet-18, 512 x 64 px, bf16", training.MASKED, "images_per_s", -150_000),
    ("step of ResNet-50, 512 x 64 px, bf16", training.MASKED, "images_per_s", -50_000),
    ("step of ResNet-18, 512 x 64 px, bf16", training.DENSE, "over_ours", -1 / 1.02),  # masked over dense at most 1.02
    ("step of ResNet-50, 512 x 64 px, bf16", training.DENSE, "over_ours", -1 / 1.02),
    *((f"memory of {network}", training.MASKED, "bytes_a_weight_over_plain", 7.0) for network in rows.NETWORKS),
)

Task = Callable[[], None]


class Record:
    """The JSON file of results.

    checks: by test "passed", "failed: ..." or "skipped: ...". rows: figures by group and row. errors: a line for each
    task or row that could not be timed. left: by part the tasks that --limit left.
    """

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        """Continues from the results in the file that are of the same device, commit and size; ignores others."""
        self.file, self.small = file, bool(facts["small"])
        before = json.loads(file.read_text()) if file.exists() else {}
        # A row of another commit beside rows of this one would give ratios of two programs.
        if any(before.get(name) != facts[name] for name in ("device", "commit", "small")):
            before = {}
        self.facts = facts
        self.copy_rate: float = before.get("copy_gb_per_s") or math.nan
        names = ("checks", "rows", "errors", "left", "targets")
        self.checks, self.rows, self.errors, self.left, self.targets = (before.get(name, {}) for name in names)

    def save(self) -> None:
        """Writes the file."""
        # JSON has no NaN: null until the copy is timed.
        content = self.facts | {"copy_gb_per_s": None if math.isnan(self.copy_rate) else self.copy_rate}
        content |= {"checks": self.checks, "rows": self.rows, "errors": self.errors}
        content |= {"left": self.left, "targets": self.targets}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1) + "\n")

    @property
    def failed(self) -> list[str]:
        return [f"{test}: {result}" for test, result in self.checks.items() if result.startswith("failed")]

    def put(self, group: str, found: dict[str, dict[str, Any]], errors: dict[str, str]) -> None:
        """Records the rows of a group and the errors of those that failed, and prints the table."""
        self.rows[group] = found
        self.errors |= {f"{group}: {row}": error for row, error in errors.items()}
        print("", *rows.table(group, found), sep="\n", flush=True)


def pytest_command(path: str, device: torch.device, report: Path) -> list[str]:
    """The command line that runs a test file with the project's settings."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-q"]
    # The project's settings make warnings errors, but other versions of libraries give other warnings.
    return [*command, "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}", "--device", str(device), path]


def outcome(case: ElementTree.Element) -> str:
    """Passed, failed or skipped; for the latter two with the first line of the message."""
    for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            text = (found.get("message") or "").strip()
            if text == "collection failure":  # the message says no more; the reason is in the text
                text = "\n".join(line[1:].strip() for line in (found.text or "").splitlines() if line.startswith("E "))
            return f"{word}: {text.partition(chr(10))[0]}"[:200]
    return "passed"


def check(path: str, device: torch.device, record: Record) -> None:
    """Runs the tests of a file and records the outcome of each."""
    # In a process of its own: a test that corrupts the CUDA context or crashes must not end this one.
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = pytest_command(path, device, report)
        # No plug-in is loaded even if installed, so that the checks are the same on every machine.
        path_of_children = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path_of_children}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    # A test that was renamed or deleted must not stay in the file.
    for old in [test for test in record.checks if test.startswith(f"{path}::")]:
        del record.checks[old]
    found = {f"{path}::{case.get('name')}": outcome(case) for case in cases}
    # 5: no test was collected. Otherwise pytest itself failed, which no test case reports.
    if done.returncode not in (0, 5) and not any(map(failing, found.values())):
        lines = (done.stderr or done.stdout).strip().splitlines()
        found[f"{path}::"] = f"failed: pytest ended with {done.returncode}: {lines[-1] if lines else ''}"[:200]
    record.checks.update(found)
    counts = {word: sum(r.startswith(word) for r in found.values()) for word in ("passed", "failed", "skipped")}
    print(f"  {path:<58}" + ", ".join(f"{n} {word}" for word, n in counts.items()), flush=True)
    for test, result in found.items():
        if failing(result):
            print(f"    {test}: {result}", flush=True)
    if any(map(failing, found.values())):
        print(done.stdout[-4000:], flush=True)


def failing(result: str) -> bool:
    return result.startswith("failed")


def check_tasks(paths: Sequence[str], device: torch.device, record: Record) -> Iterator[tuple[str, Task]]:
    for path in paths:
        root = ROOT / path
        for file in sorted(root.rglob("test_*.py")) if root.is_dir() else [root]:
            name = os.path.relpath(file, ROOT)
            yield name, partial(check, name, device, record)


def time_group(group: rows.Group, device: torch.device, record: Record) -> None:
    inputs, found, errors = group.inputs(device), {}, {}
    for row in group.rows:
        if row.cpu_only and device.type != "cpu":
            continue
        try:
            found[row.what] = rows.time_row(row, inputs, device, rounds=3 if record.small else 7)
        except Exception as error:  # recorded: time on a GPU is scarce, and the other rows can still be timed
            errors[row.what] = one_line(error)
    if group.name == "copy":
        # Kept in the record: a later call that times other groups counts their floors at the same rate.
        record.copy_rate = max((f["bytes"] / f["ms"] / 1e6 for f in found.values()), default=math.nan)
    rows.compare(found, record.copy_rate)
    record.put(group.name, found, errors)


def kernel_tasks(device: torch.device, record: Record, blocks: bool) -> Iterator[tuple[str, Task]]:
    for group in rows.kernel_groups(device, record.small, blocks):
        yield group.name, partial(time_group, group, device, record)


def time_steps(network: str, precision: str, device: torch.device, record: Record) -> None:
    size = training.Size.of(device, record.small)
    # torch counts recompilations over all networks of a process, and beyond its limit runs uncompiled.
    torch.compiler.reset()
    compared = training.ways(network, precision, device, size)
    found, errors = training.time_turns(compared, 2 if record.small else 7)
    record.put(training.group_name(network, precision, size), found, errors)


def measure_memory(network: str, device: torch.device, record: Record) -> None:
    more = training.extra_memory(network, training.Size.of(device, record.small), device)
    record.rows[f"memory of {network}"] = {training.MASKED: {"bytes_a_weight_over_plain": more}}
    print(f"\n{network}: a masked run takes {more:.2f} bytes a weight more than plain PyTorch's dense one", flush=True)


def print_profile(network: str, device: torch.device, record: Record) -> None:
    print("", *training.profiled(network, training.Size.of(device, record.small), device), sep="\n", flush=True)


def step_tasks(device: torch.device, record: Record, profile: bool) -> Iterator[tuple[str, Task]]:
    for network, precision in STEPS:
        name = training.group_name(network, precision, training.Size.of(device, record.small))
        yield name, partial(time_steps, network, precision, device, record)
    for network in rows.NETWORKS:
        if device.type == "cuda":
            yield f"memory of {network}", partial(measure_memory, network, device, record)
        if profile:
            yield f"profile of {network}", partial(print_profile, network, device, record)


def time_shared(name: str, settings: Any, workers: int, device: torch.device, record: Record) -> None:
    group = f"{name}, several runs at once"
    row = share.time_shared(settings, workers, device, 2.0 if record.small else 8.0)
    record.put(group, record.rows.get(group, {}) | {f"{workers} at once": row}, {})


def share_tasks(device: torch.device, record: Record) -> Iterator[tuple[str, Task]]:
    for name, settings in share.networks(record.small).items():
        for workers in share.WORKERS:
            yield f"{name}, {workers} at once", partial(time_shared, name, settings, workers, device, record)


def one_line(error: Exception) -> str:
    """The type of an error and its first line that is not blank, at most 200 characters."""
    first = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


def run_part(part: str, tasks: Iterable[tuple[str, Task]], record: Record, limit: float) -> None:
    """Runs the tasks that the last call left of the part, or all of them. Starts none after `limit` seconds."""
    began = time.perf_counter()
    left = record.left.pop(part, None)
    waiting = [(name, task) for name, task in tasks if left is None or name in left]
    print(f"\n{part}:", flush=True)
    while waiting and time.perf_counter() - began < limit:
        name, task = waiting.pop(0)
        # A task that is repeated replaces its errors of last time.
        for error in [e for e in record.errors if e == name or e.startswith(f"{name}: ")]:
            del record.errors[error]
        try:
            task()
        except Exception as error:  # recorded, and reported by the exit code
            record.errors[name] = one_line(error)
        # Saved after every task, so that a run that is killed continues with the next one.
        if waiting:
            record.left[part] = [name for name, _ in waiting]
        else:
            record.left.pop(part, None)
        record.save()
    if waiting:
        print(f"  {len(waiting)} left after {limit:.0f} s: the same command goes on with them", flush=True)


def judge(record: Record, on_gpu: bool) -> None:
    """Records and prints for each target whether it is met."""
    print("\ntargets:")
    for group, row, figure, limit in TARGETS:
        measured = record.rows.get(group, {}).get(row, {}).get(figure)
        met = measured is not None and (measured >= -limit if limit < 0 else measured <= limit)
        words = "met" if met else "missed"
        verdict = "not judged on a CPU" if not on_gpu else "not measured" if measured is None else words
        what = f"{group}: {row}: {figure} {'>=' if limit < 0 else '<='} {abs(limit):,.4g}"
        record.targets[what] = {"measured": measured, "verdict": verdict}
        print(f"  {what:<96} {verdict}" + (f": {measured:,.3f}" if on_gpu and measured is not None else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true", help="sizes for a laptop")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:3], metavar="PART", help="|".join(PARTS))
    p.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DEVICE.json")
    p.add_argument("--cache", type=Path, metavar="FOLDER", help="keeps what Triton and torch compile between parts")
    p.add_argument("--limit", type=float, default=360, metavar="SECONDS", help="of a part (default: 360)")
    p.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", help="files or folders that are the checks")
    p.add_argument("--blocks", action="store_true", help="also time block sizes")
    p.add_argument("--profile", action="store_true", help="also list the kernels of a training step")
    args = p.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no CUDA device here; `--device cpu --small` runs the same on a CPU", file=sys.stderr)
        return 2
    if args.cache is not None:  # read by both libraries when they compile, here and in the processes of the checks
        os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve() / "triton")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(args.cache.resolve() / "inductor")
    facts = rows.environment(device) | {"small": args.small}
    name = facts["device"].lower().replace(" ", "-") + ("-small" if args.small else "")
    record = Record(args.json or ROOT / "bench" / "results" / f"{name}.json", facts)
    print(" ".join(f"{k}={v}" for k, v in facts.items()), flush=True)
    if "checks" in args.only:
        run_part("checks", check_tasks(args.tests, device, record), record, args.limit)
    tasks: dict[str, Iterator[tuple[str, Task]]] = {
        "kernels": kernel_tasks(device, record, args.blocks),
        "steps": step_tasks(device, record, args.profile),
        "share": share_tasks(device, record),
    }
    timed = [part for part in tasks if part in args.only]
    # A time of a kernel that computes something else means nothing.
    if timed and (record.failed or os.environ.get("TRITON_INTERPRET") == "1"):
        why = "a check failed on this commit" if record.failed else "kernels are interpreted"
        print(f"\nnothing is timed: {why}")
        timed = []
    for part in timed:
        run_part(part, tasks[part], record, args.limit)
    if timed:
        judge(record, device.type == "cuda")
        record.save()
    words = [result.partition(":")[0] for result in record.checks.values()]
    print(f"\nchecks: {words.count('passed')} passed, {words.count('failed')} failed, {words.count('skipped')} skipped")
    for line in record.failed:
        print(f"  {line}")
    for what, error in record.errors.items():
        print(f"  not timed: {what}: {error}")
    for part, left in record.left.items():
        print(f"  left of {part}: {', '.join(left)}")
    print(f"results: {record.file}")
    return 1 if record.failed or record.errors else 0


if __name__ == "__main__":
    # As a worker runs; on a GPU the host only launches.
    torch.set_num_threads(1)
    sys.exit(main())
