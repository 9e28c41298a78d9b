"""One thread, the device, and after the benchmarks a table: each against what a user would write and its floor."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import defaultdict
from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.rows import Group, Row, compare, copy_group, facts_of, prepared, table, time_row

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
    """Ratios within one run: pytest-benchmark's own table has the spread, there of `calls` calls."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if "calls" in bench.extra_info:
            facts = bench.extra_info | {"ms": 1e3 * bench.stats.median / bench.extra_info["calls"]}
            groups[bench.group][facts["what"]] = facts
    for name, found in groups.items():
        compare(found, next(iter(found.values()))["copy_gb_per_s"])
        terminalreporter.write_line("")
        for line in table(name, found):
            terminalreporter.write_line(line)


@lru_cache(maxsize=1)  # what is compared shares its buffers; the next group has its own
def inputs_of(make: Any, *arguments: Any) -> tuple[Group, list[Any]]:
    group = make(*arguments)
    return group, group.inputs(arguments[-1])


@pytest.fixture(scope="session")
def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy, read and written bytes counted."""
    group = copy_group(device)
    inputs = group.inputs(device)
    facts = time_row(group.rows[0], inputs, device, rounds=5)
    return facts["bytes"] / facts["ms"] / 1e6


@pytest.fixture
def measure(benchmark: Any, device: torch.device, copy_rate: float) -> Any:
    """measure(row, make, *arguments): the median of five rounds of a row of the group `make(*arguments, device)`."""

    def run(row: Row, make: Any, *arguments: Any) -> None:
        if row.cpu_only and device.type != "cpu":
            pytest.skip("computes on a CPU only")
        group, inputs = inputs_of(make, *arguments, device)
        function, calls = prepared(row, inputs, device)
        benchmark.group = group.name
        benchmark.extra_info.update(facts_of(row, inputs, calls), what=row.what, copy_gb_per_s=copy_rate)
        benchmark.pedantic(function, rounds=5, warmup_rounds=1)

    return run
