"""However a run is killed, and whatever runs beside it: the store ends the same, and nothing published is computed
again."""

import functools
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprune.cli.store import main as store_main
from fastprune.store.gc import collect
from fastprune.store.lease import read_holder
from fastprune.store.run_store import RunStore
from tests.crash_run import CONTEXT, KINDS, LEASE_SECONDS, published, start
from tests.small_figure import NODES, command, products, results

MOMENTS = 12


@functools.cache
def undisturbed(kind: str, step: int = 0) -> tuple[dict[str, bytes], int, int]:
    """The products of a run that nothing disturbs, and how many operations and training steps it takes."""
    with tempfile.TemporaryDirectory() as folder:
        _, _, operations, steps = finished(start_with_pipe(Path(folder), kind, step=step))
        return products(Path(folder)), operations, steps


def start_with_pipe(root: Path, kind: str, **how):
    mine, theirs = CONTEXT.Pipe()
    process = start(root, kind, pipe=theirs, **how)
    theirs.close()  # a child that dies unheard is the end of the pipe
    return process, mine


def finished(started) -> tuple[list[str], list[str], int, int]:
    process, pipe = started
    said = pipe.recv()
    process.join()
    assert process.exitcode == 0
    return said


def check_complete(root: Path, expected: dict[str, bytes]) -> None:
    assert products(root) == expected
    # gc leaves young files whose writer it does not know: a temporary store.json, a lease that was half written.
    for path in (*root.glob(".store.json.*"), *(root / "leases").iterdir()):
        os.utime(path, (0, 0))
    assert collect(RunStore(root), seconds=LEASE_SECONDS).left == []
    assert store_main(["verify", "--store", str(root)]) == 0
    left = [p for name in ("tmp", "partial", "leases", "logs") for p in (root / name).iterdir()]
    assert left == list(root.rglob(".*")) == []


def check_crash(kind: str, point: float, torn: bool, beside: bool) -> None:
    expected, operations, _ = undisturbed(kind)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dying = start(root, kind, kill_at=int(point * operations), torn=torn)
        if not beside:
            dying.join()
            assert dying.exitcode == -signal.SIGKILL
            before = published(root)
        other = start_with_pipe(root, kind)
        done, again, *_ = finished(other)
        dying.join()
        assert dying.exitcode in (0, -signal.SIGKILL)  # beside another it may end without coming that far
        assert again == []
        if not beside:
            assert not before.keys() & set(done)
            assert before.items() <= published(root).items()
        check_complete(root, expected)


CRASHES = given(
    kind=st.sampled_from(KINDS),
    point=st.floats(0, 1, exclude_max=True),
    torn=st.booleans(),
    beside=st.booleans(),
)
QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(QUIET, max_examples=3, derandomize=True)
@CRASHES
def test_a_crash_at_any_operation_changes_nothing(kind, point, torn, beside):
    check_crash(kind, point, torn, beside)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(QUIET, max_examples=40)
@CRASHES
def test_many_crashes_change_nothing(kind, point, torn, beside):
    check_crash(kind, point, torn, beside)


@pytest.mark.parametrize(
    "moment", [pytest.param(i, marks=pytest.mark.slow if i > 1 else ()) for i in range(1, MOMENTS + 1)]
)
def test_killed_from_outside_at_any_moment_it_ends_the_same(tmp_path, moment):
    """Moments by the work that is done: seconds are not the same twice."""
    expected, _, steps = undisturbed("late", step=-1)
    process, pipe = start_with_pipe(tmp_path, "late", step=max(1, steps * moment // (MOMENTS + 1)))
    assert pipe.recv() == "now"
    time.sleep(0.007 * (moment % 5))  # anywhere in a step, or in what follows it
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _, again, *_ = finished(start_with_pipe(tmp_path, "late", step=-1))
    assert again == []
    check_complete(tmp_path, expected)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(tmp_path):
    """At a new place each time: it gets on, however short its lives are."""
    expected, _, steps = undisturbed("late", step=-1)
    for deaths in range(100):
        process = start(tmp_path, "late", step=steps // 8 + 7 * deaths)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    assert deaths >= 3
    check_complete(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_three_processes_on_one_store_one_is_killed(small_figure, tmp_path):
    """Each trains, and the others finish what was the killed one's."""
    store = tmp_path / "store"
    arguments = [command(tmp_path / str(i), "--device", "cpu", "--workers", "1", store=store) for i in range(3)]
    processes = [subprocess.Popen(a, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for a in arguments]
    while not (mine := [k for k, h in holders(store).items() if h == processes[0].pid]) or len(published(store)) < 3:
        assert processes[0].poll() is None
        time.sleep(0.02)
    processes[0].kill()
    before = published(store)
    _, *said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes[1:]] == [0, 0], said
    assert before.items() <= published(store).items()
    assert len(published(store)) == NODES
    assert products(store) == products(small_figure / "store")
    assert {results(tmp_path / str(i)) for i in (1, 2)} == {results(small_figure)}
    takeovers = [line for _, err in said for line in err.splitlines() if "taken over" in line]
    assert all(f"process {processes[0].pid} on" in line for line in takeovers)
    assert len(takeovers) == 1 or set(mine) <= before.keys()


def holders(store: Path) -> dict[str, int]:
    """By key of each leased node, the process that holds it."""
    found = {path.name: read_holder(path) for path in store.glob("leases/[0-9a-f]*")}
    return {key: holder.pid for key, holder in found.items() if holder is not None}
