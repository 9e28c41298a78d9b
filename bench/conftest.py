"""Fixtures of the benchmarks, and the table that follows them, with ratios to the floor and to fastprune."""

import os

# Read when OpenMP loads, so before torch. Threads that spin between calls would take the core from what is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import defaultdict
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.rows import Group, Row, compare, copy_group, facts_of, prepared, table, time_row

# Runs use one thread a process, and one thread varies less than several that wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benchmarks compute: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: there is no CUDA device here")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Writes a table a group. pytest-benchmark's own table has the spread, there of `calls` calls."""
    # Ratios of medians within one run are what compares across machines and days; absolute times do not.
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if "calls" in bench.extra_info:
            facts = bench.extra_info | {"ms": 1e3 * bench.stats.median / bench.extra_info["calls"]}
            groups[bench.group][facts["what"]] = facts
    for name, found in groups.items():
        compare(found, next(iter(found.values()))["copy_gb_per_s"], None)
        terminalreporter.write_line("")
        for line in table(name, found):
            terminalreporter.write_line(line)


# Rows of a group run one after another on the same inputs. Only one group is kept: ResNet-50's buffers take over 1 GB.
@lru_cache(maxsize=1)
def inputs_of(make: Any, *arguments: Any) -> tuple[Group, list[Any]]:
    group = make(*arguments)
    return group, group.inputs(arguments[-1])


@pytest.fixture(scope="session")
def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy; bytes that are read and bytes that are written count."""
    # Floors of bytes are counted at this rate, not at the data sheet's, which no kernel reaches.
    group = copy_group(device)
    inputs = group.inputs(device)
    facts = time_row(group.rows[0], inputs, device, rounds=5)
    return facts["bytes"] / facts["ms"] / 1e6


@pytest.fixture
def measure(benchmark: Any, device: torch.device, copy_rate: float) -> Any:
    """measure(row, make, *arguments) times a row of the group `make(*arguments, device)` in five rounds."""

    def run(row: Row, make: Any, *arguments: Any) -> None:
        if row.cpu_only and device.type != "cpu":
            pytest.skip("computes on a CPU only")
        group, inputs = inputs_of(make, *arguments, device)
        function, calls = prepared(row, inputs, device)
        benchmark.group = group.name
        benchmark.extra_info.update(facts_of(row, inputs, calls), what=row.what, copy_gb_per_s=copy_rate)
        benchmark.pedantic(function, rounds=5, warmup_rounds=1)

    return run
