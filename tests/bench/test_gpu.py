"""bench/gpu.py on a CPU: what it checks, times, records and says; what breaks costs no more than itself."""

import json
import math
import multiprocessing as mp
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import checks, gpu, layers, rows, share, targets, timed, training
from bench.child import ROOT
from bench.record import Judged, Record, code, table
from fastprune.specs import Init, ModelSpec
from fastprune.training.trainer import Trainer
from tests.bench import fake_timed

CPU = torch.device("cpu")
SMALL = ("--device", "cpu", "--small")
FACTS = {"device": "x", "code": "y", "torch": "2", "triton": "3", "small": True}
# What a test file needs of the project's conftest.py, without importing torch.
CONFTEST = """
import pytest

def pytest_addoption(parser):
    parser.addoption("--device")
    parser.addini("timeout", "")
    parser.addoption("--benchmark-disable", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "timeout(seconds)")

@pytest.fixture
def device(request):
    return request.config.getoption("--device")
"""
REAL_CONFTEST = "from tests.conftest import device, pytest_addoption, pytest_configure\n"
MIXED = """
import pytest

@pytest.mark.timeout(5)
@pytest.mark.parametrize("x", [1, 2])
def test_right(x, request, device):
    plugins = request.config.pluginmanager
    assert not any(plugins.hasplugin(name) for name in ("benchmark", "timeout", "xdist", "hypothesispytest"))
    assert str(device) == "cpu"

def test_wrong():
    raise ValueError("two of three differ\\nand more")

def test_not_here():
    pytest.skip("needs more")
"""
BREAKING = """
import os, signal, sys, time
from types import SimpleNamespace

def test_first(device): ...

def test_without(): assert False, "does not concern a GPU"

def test_crash(device):
    os.kill(os.getpid(), signal.SIGSEGV)

def test_between(device): ...

def test_hang(device):
    time.sleep(600)

def test_breaks_the_device(device):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize))
    raise RuntimeError("an illegal memory access was encountered")

def test_last(device):
    assert "torch" not in sys.modules
"""
WAITING = """
import pathlib, time
HERE = pathlib.Path(__file__).parent

def test_a(device):
    (HERE / "a").open("a").write("x")

def test_b(device):
    (HERE / "b").touch()
    while not (HERE / "go on").exists():
        time.sleep(0.01)

def test_c(device): ...
"""


def run(file: Path, *arguments: str) -> tuple[int, dict]:
    exit_code = gpu.main([*SMALL, "--json", str(file), *arguments])
    return exit_code, json.loads(file.read_text())


@pytest.fixture
def tests(tmp_path) -> Path:
    """A folder for made-up tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    return tmp_path / "tests"


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    """The folder of tests/bench/fake_timed.py, which stands for the process that times."""
    command = [sys.executable, str(Path(fake_timed.__file__)), str(tmp_path)]
    monkeypatch.setattr(gpu, "timed_command", lambda *_: command)
    names(monkeypatch, "fine", "last")
    return tmp_path


def names(monkeypatch, *wanted: str, **seconds: float) -> None:
    """The tasks of all parts, as of fake_timed.NAMES."""
    assert set(wanted) <= set(fake_timed.NAMES)
    made = [timed.Task(name, lambda without: ({}, {}), seconds.get(name, 1.0)) for name in wanted]
    monkeypatch.setattr(timed, "tasks", lambda *_: made)


def seen(folder: Path) -> list[tuple[str, str]]:
    """(task, rows left out) in the order in which the fake was asked."""
    lines = (folder / "done").read_text().splitlines()
    return [re.fullmatch(r"\d+ (.*) ([^ ]*)", line).groups() for line in lines]  # type: ignore[union-attr, misc]


def test_checks_are_recorded_and_one_that_fails_stops_the_timing(tests, fakes, tmp_path, capsys):
    (real := tmp_path / "real").mkdir()
    (real / "conftest.py").write_text(REAL_CONFTEST)
    (real / "test_mixed.py").write_text(MIXED)
    paths = ("--jobs", "2", "--tests", str(tests), str(real))
    (tests / "test_gone.py").write_text("import no_such_module\n")
    file = tmp_path / "new" / "gpu.json"
    exit_code, result = run(file, "--only", "checks", "kernels", *paths)
    assert exit_code == 1
    gone, mixed = (result["checks"][os.path.relpath(f, ROOT)] for f in (tests / "test_gone.py", real / "test_mixed.py"))
    assert (mixed["passed"], mixed["skipped"], mixed["unfinished"]) == (2, {"needs more": 1}, [])
    assert mixed["failed"] == {"test_wrong": "ValueError: two of three differ"}
    assert gone["failed"] == {"": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert any("two of three differ" in text and "raise" in text for text in result["failures"].values())
    assert (result["rows"], len(result["left"]["checks"])) == ({}, 2)
    said = capsys.readouterr().out
    assert "nothing is timed: a check failed" in said
    last = said[said.rindex("summary:") :]
    assert last.startswith("summary: checks: 2 FAILED; 2 passed, 1 skipped; timed: 0 groups; targets: ")
    assert "1 x needs more" in last
    assert "real/test_mixed.py::test_wrong" in last
    assert result["summary"] in last
    assert next(iter(result)) == "summary"
    # Still so in a call that does not check.
    assert run(file, "--only", "kernels")[1]["rows"] == {}
    exit_code, result = run(file, "--only", "kernels", "--despite-failures")
    assert (exit_code, list(result["rows"])) == (1, ["fine", "last"])
    (tests / "test_gone.py").write_text("")
    (real / "conftest.py").write_text(CONFTEST)
    (real / "test_mixed.py").write_text(MIXED.replace("raise", "assert"))
    exit_code, result = run(file, "--only", "checks", "kernels", *paths)
    assert (exit_code, list(result["rows"]), result["failures"]) == (0, ["fine", "last"], {})
    assert result["summary"].startswith("checks: none failed; 3 passed, 1 skipped; timed: 2 groups; ")


def test_a_test_that_crashes_hangs_or_breaks_the_device_costs_no_other(tests):
    (tests / "test_breaking.py").write_text(BREAKING)
    outcomes: dict[str, checks.Outcome] = {}
    (name,) = checks.files([str(tests)])
    how = {"jobs": 1, "gib": 80.0, "until": time.monotonic() + 1000, "patience": 3.0}
    (file,) = checks.run([name], "cuda", outcomes, **how)
    found = outcomes[name]
    assert (found["passed"], found["unfinished"]) == (3, [])
    assert list(found["failed"]) == ["test_crash", "test_hang", "test_breaks_the_device"]
    assert found["failed"]["test_crash"] == "ended its process: signal SIGSEGV"
    assert found["failed"]["test_hang"] == "no end after 3 s"
    assert "illegal memory access" in found["failed"]["test_breaks_the_device"]
    assert "test_crash" in file.texts


def test_a_file_that_is_cut_goes_on_with_its_other_tests(tests, monkeypatch):
    (tests / "test_waiting.py").write_text(WAITING)
    names = checks.files([str(tests)])
    outcomes: dict[str, checks.Outcome] = {}
    # The deadline comes when the second test has begun, however long that takes.
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + 1000 * (tests / "b").exists(), sleep=lambda seconds: time.sleep(seconds)
    )
    monkeypatch.setattr(checks, "time", clock)
    how = {"jobs": 1, "gib": 80.0, "patience": 1e9}
    list(checks.run(names, "cpu", outcomes, until=clock.monotonic() + 500, **how))
    assert (outcomes[names[0]]["unfinished"], outcomes[names[0]]["passed"]) == (["test_a"], 1)
    (tests / "go on").touch()
    list(checks.run(names, "cpu", outcomes, until=clock.monotonic() + 500, **how))
    assert (outcomes[names[0]]["unfinished"], outcomes[names[0]]["passed"]) == ([], 3)
    assert (tests / "a").read_text() == "x"


def test_files_that_need_much_memory_take_turns(monkeypatch):
    together: list[set[str]] = []
    running: set[str] = set()

    class File:
        def __init__(self, name, device, outcome, patience):
            self.name, self._steps = name, 0
            running.add(name)
            together.append(set(running))

        def step(self):
            self._steps += 1
            return self._steps == 2

        def end(self):
            running.discard(self.name)

    needs = {"a": 36.0, "b": 34.0, "c": 4.0, "d": 4.0}
    monkeypatch.setattr(checks, "File", File)
    monkeypatch.setattr(checks, "gib_of", needs.get)
    done = list(checks.run(list(needs), "cuda", {}, jobs=3, gib=80.0, until=math.inf))
    assert {file.name for file in done} == set(needs)
    assert {"a", "c", "d"} in together
    assert not any({"a", "b"} <= names for names in together)
    monkeypatch.undo()
    assert checks.gib_of("tests/kernels/test_masked_sgd.py") == 36.0
    assert checks.gib_of("tests/training/test_flat.py") == checks.GIB


def test_the_checks_are_files_that_exist():
    found = checks.files(checks.TESTS)
    stems = [Path(file).stem for file in found]
    assert stems[: len(checks.FIRST)] == list(checks.FIRST)
    assert checks.expected(found, {}, jobs=8) <= gpu.LIMIT
    assert checks.expected(found[:1], {found[0]: checks.fresh() | {"seconds": 7.0}}, jobs=8) == 7.0
    assert checks.expected(["a", "b"], {}, jobs=1) == 2 * checks.OTHERS
    assert "tests/loaders/test_batches.py" in found


def test_interpreted_kernels_are_not_timed(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _, result = run(tmp_path / "gpu.json", "--only", "kernels")
    assert "nothing is timed: kernels are interpreted" in capsys.readouterr().out
    assert result["rows"] == {}


def test_what_breaks_costs_no_more_than_itself(fakes, tmp_path, monkeypatch, capsys):
    """A row or a task that raises, ends the process, breaks the device or hangs; then the same command goes on."""
    wanted = ("fine", "wrong row", "wrong", "crashing row", "crashing", "lost", "hanging row", "last")
    names(monkeypatch, *wanted)
    monkeypatch.setattr(gpu, "PATIENCE", 2.0)
    file = tmp_path / "gpu.json"
    exit_code, result = run(file, "--only", "kernels")
    assert exit_code == 1
    both, ours, theirs = ["ours", "theirs"], ["ours"], ["theirs"]
    assert {name: list(found) for name, found in result["rows"].items()} == {
        "fine": both,
        "wrong row": ours,
        "crashing row": ours,
        "lost": theirs,
        "hanging row": ours,
        "last": both,
    }
    assert result["errors"] == {
        "wrong row: theirs": "ValueError: no such thing",
        "wrong": "ValueError: no inputs",
        "crashing row: theirs": "ended its process: signal SIGKILL: ",
        "crashing": "ended its process: signal SIGSEGV: about to crash",
        "lost: ours": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "hanging row: theirs": "no end after 3 s",
    }
    assert result["rows"]["fine"]["theirs"]["over_ours"] == 3
    assert result["left"]["kernels"] == [name for name in wanted if name not in ("fine", "last")]
    said = capsys.readouterr().out
    assert said.count("summary: ") == len(wanted) + 1
    assert "6 ERRORS" in result["summary"]
    # The same command repeats what failed, and nothing else; and when nothing is left, all.
    names(monkeypatch, "fine", "last", "lost")
    (fakes / "done").unlink()
    _, result = run(file, "--only", "kernels")
    assert seen(fakes) == [("lost", ""), ("lost", "ours")]
    result["left"] = {}
    file.write_text(json.dumps(result))
    run(file, "--only", "kernels")
    assert [name for name, _ in seen(fakes)[2:]] == ["fine", "last", "lost", "lost"]


def test_a_task_that_cannot_end_in_time_is_not_begun(fakes, tmp_path, monkeypatch, capsys):
    names(monkeypatch, "fine", "slow", "last", slow=60.0)
    file = tmp_path / "gpu.json"
    _, result = run(file, "--only", "steps", "--limit", "50")
    assert (list(result["rows"]), result["left"]) == (["fine", "last"], {"steps": ["slow"]})
    said = capsys.readouterr().out
    assert "steps: 3 tasks, expected 1 minutes" in said
    assert "1 left: the same command goes on with them" in said
    (fakes / "go on").touch()
    _, result = run(file, "--only", "steps", "--limit", "100")
    assert (list(result["rows"]), result["left"]) == (["fine", "last", "slow"], {"steps": []})
    assert [name for name, _ in seen(fakes)] == ["fine", "last", "slow"]
    assert result["seconds"]["slow"] < 60
    # What once took longer than a part is tried where nothing else is left.
    file.write_text(json.dumps(result | {"seconds": {"slow": 1000.0}, "left": {"steps": ["slow"]}}))
    names(monkeypatch, "fine", "slow", "last")
    assert run(file, "--only", "steps", "--limit", "100")[1]["left"] == {"steps": []}


def test_a_task_at_the_end_of_its_part_is_cut_and_keeps_what_an_earlier_run_found(fakes, tmp_path, monkeypatch):
    names(monkeypatch, "slow")
    (fakes / "go on").touch()
    file = tmp_path / "gpu.json"
    run(file, "--only", "steps")
    (fakes / "go on").unlink()
    _, result = run(file, "--only", "steps", "--limit", "1.5")
    assert result["errors"] == {"slow": "the part's time was over"}
    assert (list(result["rows"]), result["left"]) == (["slow"], {"steps": ["slow"]})


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes that end with their parent need Linux")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_that_is_killed_leaves_what_it_found_and_goes_on(fakes, tmp_path, monkeypatch):
    names(monkeypatch, "fine", "slow", "last")
    file = tmp_path / "gpu.json"
    # A fork has the fakes, which a new process would not.
    process = mp.get_context("fork").Process(target=run, args=(file, "--only", "kernels"))
    process.start()
    end = time.monotonic() + 60
    while not (fakes / "slow").exists() or not (fakes / "slow").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    result = json.loads(file.read_text())
    assert result["summary"].startswith("checks: none run; timed: 1 groups; targets: ")
    assert result["summary"].endswith("left: 2 of kernels")
    assert (list(result["rows"]), result["left"]) == (["fine"], {"kernels": ["slow", "last"]})
    child = int((fakes / "slow").read_text())
    while alive(child):  # on a GPU it would disturb what is timed next
        assert time.monotonic() < end
        time.sleep(0.01)
    (fakes / "go on").touch()
    exit_code, result = run(file, "--only", "kernels")
    assert (exit_code, list(result["rows"]), result["left"]) == (0, ["fine", "slow", "last"], {"kernels": []})
    assert [name for name, _ in seen(fakes)] == ["fine", "slow", "slow", "last"]


def test_a_run_that_is_told_to_end_says_what_it_found(fakes, tmp_path, monkeypatch, capsys):
    names(monkeypatch, "fine", "last")
    shown = []

    def show(results, name):
        shown.append(name)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpu, "show", show)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "gpu.json", "--only", "kernels")
    assert (ended.value.code, shown) == (128 + signal.SIGTERM, ["fine"])
    assert "summary: checks: none run; timed: 1 groups" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["left"] == {"kernels": ["last"]}


def test_results_of_another_state_of_the_code_are_not_kept(fakes, tmp_path):
    file = tmp_path / "gpu.json"
    _, result = run(file, "--only", "kernels")
    assert result["code"] == code()
    file.write_text(json.dumps(result | {"rows": {"old": {}}}))
    assert "old" in run(file, "--only", "kernels")[1]["rows"]
    for name in ("code", "torch", "device"):
        file.write_text(json.dumps(result | {name: "other", "checks": {"old": checks.fresh()}, "rows": {"old": {}}}))
        exit_code, fresh = run(file, "--only", "kernels")
        assert (exit_code, fresh["checks"], set(fresh["rows"])) == (0, {}, {"fine", "last"})


def test_a_row_that_fails_costs_no_other():
    def wrong(given):
        raise ValueError("\n\ntwo of three differ\nand more")

    made = (rows.Row("broken", wrong), rows.Row("works", sum, ours=True, bytes=len, images=len), rows.Row("out", wrong))
    found, errors = timed.time_group(rows.Group("g", made, lambda seed: [1]), CPU, 2, frozenset({"out"}))
    assert errors == {"broken": "ValueError: two of three differ"}
    assert set(found) == {"works"}


def test_nothing_is_timed_on_a_device_that_is_lost(monkeypatch):
    def wrong(given=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timed, "device_lost", lambda: True)
    called = []
    made = (rows.Row("first", sum), rows.Row("broken", wrong), rows.Row("later", called.append))
    found, errors = timed.time_group(rows.Group("g", made, lambda seed: [1]), CPU, 2, frozenset())
    assert (found, list(errors), called) == ({}, ["broken"], [])
    ways = {
        "first": training.Way(lambda: 10),
        "broken": training.Way(wrong),
        "later": training.Way(lambda: called.append),
    }
    assert training.time_turns(ways, 2, broken=lambda: True)[0] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_exit_code_is_2(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_ratios_follow_from_times():
    def facts(ms, ours=False, size=None, floor=None):
        return {"ms": ms, "ours": ours, "bytes": size, "images": 4, "floor": floor}

    found = {"ours": facts(2.0, True, 4e6), "theirs": facts(6.0), "read": facts(1.0, False, 2e6), "third": facts(3.0)}
    found["third"]["floor"] = "read"
    rows.compare(found, 4.0, None)
    assert found["ours"]["gb_per_s"] == pytest.approx(2.0)
    assert found["ours"]["over_floor"] == pytest.approx(2.0)
    assert found["third"]["over_floor"] == 3.0
    assert "over_floor" not in found["theirs"]
    assert {name: f["over_ours"] for name, f in found.items()} == {"ours": 1, "theirs": 3, "read": 0.5, "third": 1.5}
    assert found["ours"]["images_per_s"] == 2000
    lines = list(rows.table("group", found))
    assert [line.split()[0] for line in lines] == ["group", "read", "ours", "third", "theirs"]


def test_the_floor_of_operations_and_bytes_is_the_longer_one():
    def facts(flop, size):
        return {"ours": False, "ms": 10.0, "flop": flop, "bytes": size}

    found = {"operations": facts(4e9, 1e6), "bytes": facts(1e9, 1.6e7)}
    rows.compare(found, 4.0, 1.0)  # GB/s, TFLOP/s: 4 and 0.25 ms, 1 and 4 ms
    assert [f["over_floor"] for f in found.values()] == pytest.approx([2.5, 2.5])
    unknown = {"operations": facts(4e9, 1e6)}
    rows.compare(unknown, 4.0, None)
    assert "over_floor" not in unknown["operations"]


def test_the_ceilings_are_what_floors_are_counted_at(tmp_path):
    record = Record(tmp_path / "gpu.json", FACTS)
    record.put(rows.COPY, {"one buffer to another": {"ours": True, "ms": 1.0, "bytes": 4e6}}, {})
    record.put(rows.PRODUCT, {"bf16": {"ours": True, "ms": 2.0, "bytes": 1e3, "flop": 4e9}}, {})
    assert (record.copy_rate, record.matrix_rate) == (4.0, 2.0)
    record.save()
    assert Record(tmp_path / "gpu.json", FACTS).matrix_rate == 2.0
    assert Record(tmp_path / "gpu.json", FACTS | {"code": "z"}).matrix_rate is None


def test_the_least_work_of_a_step(monkeypatch):
    """A network counted by hand: a conv of 3 to 4 channels on 8x8, and a layer of 4 to 5."""

    def build(spec):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )

    monkeypatch.setattr(training, "build", build)
    training.least_work.cache_clear()
    flop, moved = training.least_work("made up", training.Size(2, 8, 2))
    training.least_work.cache_clear()
    # Images need no gradient: the conv has one product less.
    assert flop == 2 * (2 * (3 * 9 * 4 * 64) + 3 * (4 * 5))
    maps = (2 * 4 * 64 + 2 * 3 * 64) + (2 * 5 + 3 * 4)
    assert moved == 2 * maps + 23 * (3 * 9 * 4 + 4 * 5 + 5) / 2


def judged(record: Record) -> dict[str, Judged]:
    return {f"{j.what}, {t.figure}": j for j, t in zip(record.judged(), targets.TARGETS, strict=True)}


def test_targets_are_judged_by_what_was_measured(tmp_path):
    record = Record(tmp_path / "gpu.json", FACTS)
    step = "step of ResNet-18, 512 x 64 px, bf16"
    record.rows = {
        "cast, resnet18": {"masked_cast to bf16": {"over_floor": 1.31, "ms": 0.0262}},
        "cast, resnet50": {"masked_cast to bf16": {"over_floor": 1.3, "ms": 0.052}},
        "threshold, resnet18": {"w.abs().kthvalue(k)": {"over_ours": 19.9}},
        "threshold, resnet50": {"w.abs().kthvalue(k)": {"over_ours": 20.0}},
        step: {training.MASKED: {"images_per_s": 149_999.0, "over_floor": 4.0}},
    }
    found = judged(record)
    verdicts = [j.verdict for j in found.values() if j.measured is not None]
    assert sorted(verdicts) == ["met", "met", "missed", "missed", "missed"]
    assert {j.verdict for j in found.values() if j.measured is None} == {"not measured"}
    cast = found["cast, resnet18: masked_cast to bf16, over_floor"]
    assert (cast.unit, cast.verdict) == ("us", "missed")
    assert (cast.floor, cast.measured, cast.limit) == pytest.approx((20.0, 26.2, 26.0))
    assert cast.predicted == pytest.approx((21.0, 23.0))
    rate = found[f"{step}: {training.MASKED}, images_per_s"]
    assert (rate.floor, rate.measured, rate.unit) == (599_996.0, 149_999.0, "images/s")
    line = next(line for line in table([rate]) if step in line)
    assert line.split()[-7:] == ["images/s", "599,996", "205,000-270,000", "149,999", ">=", "150,000", "missed"]
    record.facts = FACTS | {"device": "cpu x"}
    assert {j.verdict for j in judged(record).values()} == {"not judged on a CPU"}


def test_nothing_unmeasured_looks_measured(tmp_path):
    record = Record(tmp_path / "gpu.json", FACTS)
    header, *lines = table(record.judged())
    assert header.split() == ["target", "unit", "floor", "predicted", "measured", "limit", "verdict"]
    start, end = header.index("predicted") + len("predicted"), header.index("measured") + len("measured")
    assert {line[start:end].strip() for line in lines} == {"-"}
    assert all(line.endswith("not measured") for line in lines)


def test_what_is_said_last_fits_and_begins_with_the_summary(tmp_path):
    record = Record(tmp_path / "gpu.json", FACTS)
    for i in range(40):
        record.checks[f"tests/test_{i}.py"] = checks.fresh() | {
            "failed": {"test_x": "y" * 200},
            "skipped": {"z" * 200 + str(i): 1},
        }
        record.errors[f"group {i}: row"] = "w" * 200
        record.left[f"part {i}"] = ["v" * 100]
    lines = list(gpu.final(record))
    assert lines[0] == f"summary: {record.summary()}"
    assert "40 FAILED" in lines[0]
    assert sum(len(line) + 1 for line in lines) <= gpu.LONGEST
    assert any("failed: 32 more" in line for line in lines)


def test_predictions_are_those_of_the_notes():
    """One place: the table of NOTES.md is what bench/targets.py gives."""
    notes = (ROOT / "bench" / "NOTES.md").read_text()
    assert "\n".join(targets.lines()) in notes, "\n".join(["put this into bench/NOTES.md:", *targets.lines()])
    for target in targets.TARGETS:
        assert target.predicted[0] <= target.predicted[1]


def test_what_fails_to_train_costs_no_other_row():
    def wrong():
        raise ValueError("no such thing")

    ways = {training.MASKED: training.Way(lambda: 10), "broken": training.Way(wrong), "other": training.Way(lambda: 20)}
    found, errors = training.time_turns(ways, 3)
    assert set(found) == {training.MASKED, "other"}
    assert found[training.MASKED]["over_ours"] == 1
    assert found["other"]["images"] == 20
    assert errors == {"broken": "ValueError: no such thing"}


@pytest.mark.slow
def test_epochs_of_a_data_set_on_the_device():
    """What a GPU trains on, here at the size of a CPU: both read each batch of it once, the slower one at most 40."""
    size = training.Size(batch=16, side=32, images=400, width=8)
    ways = training.ways("resnet18", "fp32", CPU, size)
    assert {name: way.timed()[2] for name, way in ways.items()} == dict.fromkeys(ways, 400)
    assert len(ways) == 4


def test_a_row_on_a_gpu_is_a_graph_over_all_inputs(monkeypatch):
    """Acted out: what is captured runs once, and replays are as many as fill the time of a run."""
    seen: list[int] = []
    replayed = []

    class Graph:
        def replay(self) -> None:
            replayed.append(len(seen))

    clock = iter([0.0, 0.002])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    streams = []
    monkeypatch.setattr(rows, "side_stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(streams.append(stream)))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream, **how: nullcontext(streams.append(stream)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    call, calls = rows.prepared(rows.Row("x", seen.append), [1, 2, 3], torch.device("cuda"))
    assert (seen, len(replayed)) == ([1, 2, 3, 1, 2, 3], 2)
    assert streams == ["side"] * 2  # what is allocated for a stream is there when it is captured
    call()
    assert calls == 3 * 10
    assert (len(seen), len(replayed)) == (6, 12)
    clock = iter([0.0, 0.002])
    call, calls = rows.prepared(rows.Row("x", seen.append, waits=True), [1, 2, 3], torch.device("cuda"))
    call()
    assert (calls, len(seen), len(replayed)) == (30, 6 + 3 + 6 + 30, 12)


def test_each_target_is_about_a_row_that_is_timed():
    cuda = torch.device("cuda")
    groups = [*rows.kernel_groups(cuda, blocks=True), *layers.layer_groups(cuda)]
    known = {(group.name, row.what) for group in groups for row in group.rows if not row.cpu_only}
    tasks = [task.name for part in ("steps", "more") for task in timed.tasks(part, cuda, False, False)]
    for task in tasks:
        if task.startswith("gpu options, "):
            known |= {(task, name) for name in training.OPTIONS}
        elif not task.startswith("profile"):
            known |= {(task, name) for name in (training.MASKED, training.DENSE)}
    assert {(t.group, t.row) for t in targets.TARGETS} <= known
    kernels = [task.name for task in timed.tasks("kernels", cuda, False, True)]
    assert sorted(kernels) == sorted(group.name for group in groups)
    assert len({*kernels, *tasks}) == len(kernels) + len(tasks), "two tasks have one name"


def test_the_commands_for_a_gpu_take_their_arguments():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    commands = re.findall(r"^python bench/gpu.py ([^#]*)", page, re.MULTILINE)
    assert [gpu.parser().parse_args(words.split()).only for words in commands] == [["checks"], ["kernels"], ["steps"]]


def test_what_tells_most_comes_first_and_fits():
    cuda = torch.device("cuda")
    kernels, steps, more = (timed.tasks(part, cuda, False, False) for part in ("kernels", "steps", "more"))
    assert [task.name for task in kernels[:2]] == [rows.COPY, rows.PRODUCT]
    assert steps[0].name == "step of ResNet-18, 512 x 64 px, bf16"
    for part in (kernels, steps):
        assert sum(task.seconds for task in part) <= gpu.LIMIT
    assert all(task.seconds <= gpu.LIMIT for task in more)


def test_no_trainer_times_its_options_itself(monkeypatch):
    """It would do so in the first turn, on a copy that counts as its memory."""

    def timed_itself(*args):
        raise AssertionError("options are chosen")

    monkeypatch.setattr(Trainer, "_choice", timed_itself)
    size = training.Size.of(CPU, small=True)
    trainers = [
        training.trainer_of(Init(ModelSpec("resnet18", 200, width=8), 0), CPU, "fp32", n) for n in training.OPTIONS
    ]
    for trainer in trainers:
        trainer._tunes = True
        training.epoch_of(trainer, [], size)
        assert trainer._options(torch.empty(1), torch.empty(1), 0.1) == trainer.gpu_options
    assert [trainer.gpu_options for trainer in trainers] == list(training.OPTIONS.values())


def test_options_are_timed_alone_together_and_not_at_all():
    assert list(training.OPTIONS)[:2] == [training.NONE, training.ALL]
    used = {name: [f for f, on in vars(options).items() if on] for name, options in training.OPTIONS.items()}
    alone = list(used)[2:]
    assert used == {training.NONE: [], training.ALL: alone, **{name: [name] for name in alone}}


def test_gradients_of_layers_and_their_flat_copy_give_the_same_step():
    group = rows.operation_group(rows.SCATTERED, "resnet18", CPU, small=True)
    made = [group.make(0) for _ in group.rows]
    for row, weights in zip(group.rows, made, strict=True):
        # Drawn at first use, here by both in one order.
        assert len({id(t) for t in (weights.weight, weights.momentum, weights.mask, weights.half_grads)}) == 4
        row.call(weights)
    ours, copied = made
    assert torch.equal(ours.weight, copied.weight)
    # What lies between layers is not written.
    assert all(torch.equal(s.view(ours.half), s.view(copied.half)) for s in ours.segments)
    assert not torch.equal(ours.weight, group.make(0).weight)


@pytest.mark.parametrize("way", [layers.EAGER, pytest.param(layers.COMPILED, marks=pytest.mark.slow)])
def test_layers_compute_the_same_in_all_ways(way):
    assert {shape.pooled for shape in layers.SHAPES} == {shape.residual for shape in layers.SHAPES} == {True, False}
    for shape in layers.SHAPES:
        for direction in (layers.FORWARD, layers.BOTH):
            layer = layers.layer_group(shape, direction, CPU, small=True).make(0)
            expected, found = layer.call(layers.OURS, direction), layer.call(way, direction)
            gradients = 4 if shape.residual else 3
            assert len(found) == (gradients if direction == layers.BOTH else len(layer.grads))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.float().abs().max().item())


def test_both_losses_are_the_same():
    group = layers.loss_group(CPU)
    ours, torchs = group.make(0), group.make(0)
    gradients = [row.call(given).float() for row, given in zip(group.rows, (ours, torchs), strict=True)]
    # bf16 rounds to one part in 256 at most.
    torch.testing.assert_close(*gradients, rtol=1 / 128, atol=0.0)
    torch.testing.assert_close(ours.sums.sums, torchs.sums.sums, rtol=1e-6, atol=0.0)


def test_the_bytes_of_a_layer():
    """Of the maps that it reads and writes, counted from the tensors themselves."""
    for shape in layers.SHAPES:
        layer = layers.Layer(shape, 2, CPU, 0)
        out = [t.nbytes for t in layer.grads]
        maps = [layer.x.nbytes, *([layer.residual.nbytes] if layer.residual is not None else [])]
        forward = sum(maps) + out[0]
        # ReLU's mask follows from x, but after a residual from the result.
        backward = sum(out) + layer.x.nbytes + (out[0] if shape.residual else 0) + sum(maps)
        assert shape.bytes[layers.FORWARD] * layer.x.numel() == forward
        assert shape.bytes[layers.BOTH] * layer.x.numel() == forward + backward


@pytest.mark.slow
def test_all_rows_are_timed(tmp_path):
    exit_code, result = run(tmp_path / "gpu.json", "--only", "kernels", "steps", "--blocks", "--limit", "1e9")
    assert (exit_code, result["errors"], set(map(tuple, result["left"].values()))) == (0, {}, {()})
    tasks = [task for part in ("kernels", "steps") for task in timed.tasks(part, CPU, True, True)]
    assert set(result["rows"]) == {task.name for task in tasks}
    for group in result["rows"].values():
        for row in group.values():
            assert row["ms"] >= 0
            assert math.isfinite(row.get("over_floor", 1.0))
    assert result["torch"] == torch.__version__
    assert result["commit"]


@pytest.mark.slow
def test_runs_that_share_a_device_are_timed_together():
    (settings,) = share.networks(small=True).values()
    assert share.time_shared(settings, 2, CPU, window=0.5)["images_per_s"] > 0
