"""One thread, and after the benchmarks a table: each against what a user would write and against its floor."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import defaultdict
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ratios within one run: pytest-benchmark's own table has the spread."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = defaultdict(list)
    for bench in session.benchmarks if session else ():
        groups[bench.group or ""].append(bench)
    for name, benches in groups.items():
        ours = [b for b in benches if b.extra_info.get("ours")]
        if not ours:
            continue
        terminalreporter.write_line(f"\n{name}")
        for b in sorted(benches, key=lambda b: b.stats.median):
            size, images = b.extra_info.get("bytes"), b.extra_info.get("images")
            text = f"{size / b.stats.median / 1e9:8.1f} GB/s" if size else " " * 13
            if any(other.extra_info.get("images") for other in benches):
                text += f"{images / b.stats.median:12,.0f} images/s" if images else " " * 21
            ratio = b.stats.median / ours[0].stats.median
            terminalreporter.write_line(
                f"  {b.extra_info['what']:<56}{1e3 * b.stats.median:10.2f} ms {text}  {ratio:7.2f} x"
            )


@pytest.fixture
def measure(benchmark: Any) -> Any:
    """measure(group, what, function, ours=False, bytes=None, images=None): the median of five rounds.

    ours: the others' times are given over this one's. bytes, images: that one call moves or makes, for the rates.
    """

    def run(
        group: str,
        what: str,
        function: Any,
        *,
        ours: bool = False,
        bytes: int | None = None,
        images: int | None = None,
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(what=what, ours=ours, bytes=bytes, images=images)
        benchmark.pedantic(function, rounds=5, warmup_rounds=1)

    return run
