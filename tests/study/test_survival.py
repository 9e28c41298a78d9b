"""Killed at any moment, a run that is continued ends bit for bit as if nothing had happened, and does nothing twice."""

import os
import signal
import time

import pytest

from fastprune.cli.store import main as store_main
from tests import crash_run
from tests.small_figure import products

MOMENTS = 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The store of a run that nobody disturbed, and the number of its reports of progress."""
    root = tmp_path_factory.mktemp("whole")
    mine, theirs = crash_run.CONTEXT.Pipe()
    process = crash_run.start(root, pipe=theirs)
    theirs.close()  # a child that dies unheard is the end of the pipe
    _, reports = mine.recv()
    process.join()
    assert process.exitcode == 0
    return root, reports


def continued(root, whole) -> None:
    """Continues a killed run, and holds it against the undisturbed one."""
    before = crash_run.published(root)
    mine, theirs = crash_run.CONTEXT.Pipe()
    process = crash_run.start(root, pipe=theirs)
    theirs.close()  # a child that dies unheard is the end of the pipe
    done, _ = mine.recv()
    process.join()
    assert process.exitcode == 0
    assert not before.keys() & set(done), "trained again"
    after = crash_run.published(root)
    assert before.items() <= after.items(), "written again"
    assert products(root) == products(whole)
    assert store_main(["gc", "--store", str(root)]) == 0
    assert store_main(["verify", "--store", str(root)]) == 0
    left = [p for name in ("tmp", "partial", "leases", "logs") for p in (root / name).iterdir()]
    assert left == list(root.rglob(".*")) == []


@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
def test_killed_at_any_moment_it_ends_the_same(whole, tmp_path, moment):
    """Moments by the work that is done: seconds are not the same twice."""
    root, reports = whole
    mine, theirs = crash_run.CONTEXT.Pipe()
    process = crash_run.start(tmp_path, pipe=theirs, report=reports * moment // (MOMENTS + 1))
    theirs.close()
    assert mine.recv() == "now"
    time.sleep(0.007 * (moment % 5))  # anywhere in a step, or in what follows it
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    continued(tmp_path, root)


@pytest.mark.parametrize("point", crash_run.POINTS)
def test_killed_at_a_chosen_point_it_ends_the_same(whole, tmp_path, point):
    process = crash_run.start(tmp_path, die_at=point)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was to die there"
    continued(tmp_path, whole[0])


def test_killed_again_and_again_it_ends_the_same(whole, tmp_path):
    """At a new place each time: it gets on, however short its lives are."""
    root, reports = whole
    for deaths in range(100):
        process = crash_run.start(tmp_path, report=reports // 8 + 7 * deaths)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert deaths >= 3
    continued(tmp_path, root)
