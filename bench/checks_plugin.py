"""The plug-in of pytest that bench/checks.py loads: each test's outcome is sent when it is known.

So a process that crashes or hangs costs the test that ran, and no other. With FASTPRUNE_BENCH_DONE, a JSON file of test
ids, those are left out. On a GPU so are tests without the `device` fixture: they are the same on every machine.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.child import attach, device_lost, send

DONE = "FASTPRUNE_BENCH_DONE"
LONGEST = 3000  # characters of a failure's text: its end says what went wrong


def short(nodeid: str) -> str:
    """A test's name within its file."""
    return nodeid.partition("::")[2]


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]


class Reporter:
    """Sends "begun", "ended" with an outcome and its reason, and "finished"."""

    def __init__(self, config: pytest.Config) -> None:
        self._on_cpu = str(config.getoption("--device")) == "cpu"
        self._done = set(json.loads(Path(os.environ[DONE]).read_text())) if os.environ.get(DONE) else set()
        self._worst: dict[str, str] = {}  # of the test that runs

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [
            item
            for item in items
            if (self._on_cpu or "device" in getattr(item, "fixturenames", ())) and short(item.nodeid) not in self._done
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = str(report.longrepr)
            # The text is a traceback, whose lines of the error begin with E.
            why = next((line[1:].strip() for line in text.splitlines() if line.startswith("E ")), first_line(text))
            send(ended="", outcome="failed", why=why, text=text[-LONGEST:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._worst = {"outcome": "passed"}
        send(begun=short(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._worst["outcome"] != "failed":  # the first error of a test, not one of its end
            text = str(report.longrepr)
            crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", text)
            self._worst = {"outcome": "failed", "why": first_line(crash), "text": text[-LONGEST:]}
        elif report.skipped and self._worst["outcome"] == "passed":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.wasxfail
            self._worst = {"outcome": "skipped", "why": first_line(str(why).removeprefix("Skipped: "))}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        send(ended=short(nodeid), **self._worst)
        if self._worst["outcome"] == "failed" and device_lost():
            # All later tests of this process would fail with this one's error.
            os._exit(1)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        send(finished=int(exitstatus))


def pytest_configure(config: Any) -> None:
    attach()
    config.pluginmanager.register(Reporter(config))
