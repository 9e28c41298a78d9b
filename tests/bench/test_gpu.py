"""bench/gpu.py on a CPU: what it checks, times, records and says; and that a failed check stops the timing."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import gpu, rows, share, training

CPU = torch.device("cpu")
SMALL = ("--device", "cpu", "--small")
CONFTEST = "from tests.conftest import pytest_addoption, pytest_configure\n"
MIXED = """
import pytest

@pytest.mark.timeout(5)
@pytest.mark.parametrize("x", [1, 2])
def test_right(x, request):
    plugins = request.config.pluginmanager
    assert not any(plugins.hasplugin(name) for name in ("benchmark", "timeout", "xdist", "hypothesispytest"))
    assert request.config.getoption("--device") == "cpu"

def test_wrong():
    raise ValueError("two of three differ\\nand more")

def test_not_here():
    pytest.skip("needs more")
"""


def run(file: Path, *arguments: str) -> tuple[int, dict]:
    code = gpu.main([*SMALL, "--json", str(file), *arguments])
    return code, json.loads(file.read_text())


@pytest.fixture
def tests(tmp_path) -> Path:
    """A folder for made-up tests."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    return tmp_path / "tests"


@pytest.fixture
def groups(monkeypatch):
    """The groups that are timed: three, of one quick row each."""
    rows_of = [rows.Row("sum", sum, ours=True, bytes=len)]
    made = [rows.Group(name, tuple(rows_of), lambda seed: [1, 2, 3]) for name in ("copy", "first", "second")]
    monkeypatch.setattr(rows, "kernel_groups", lambda *_: made)
    return made


def test_checks_are_recorded_and_one_that_fails_stops_the_timing(tests, groups, tmp_path, capsys):
    (tests / "test_mixed.py").write_text(MIXED)
    file = tmp_path / "new" / "gpu.json"
    code, result = run(file, "--only", "checks", "kernels", "--tests", str(tests))
    assert code == 1
    checks = {name.rpartition("::")[2]: outcome for name, outcome in result["checks"].items()}
    assert checks == {
        "test_right[1]": "passed",
        "test_right[2]": "passed",
        "test_wrong": "failed: ValueError: two of three differ",
        "test_not_here": "skipped: needs more",
    }
    assert not result["rows"]
    said = capsys.readouterr().out
    assert "nothing is timed: a check failed on this commit" in said
    assert "checks: 2 passed, 1 failed, 1 skipped" in said
    assert run(file, "--only", "kernels")[0] == 1
    assert not json.loads(file.read_text())["rows"]
    (tests / "test_mixed.py").write_text(MIXED.replace("raise", "assert"))
    code, result = run(file, "--only", "checks", "kernels", "--tests", str(tests))
    assert (code, list(result["rows"])) == (0, ["copy", "first", "second"])


def test_a_file_that_cannot_be_collected_is_a_failed_check(tests, tmp_path):
    (tests / "test_gone.py").write_text("import no_such_module\n")
    code, result = run(tmp_path / "gpu.json", "--only", "checks", "--tests", str(tests))
    assert code == 1
    assert list(result["checks"].values()) == ["failed: ModuleNotFoundError: No module named 'no_such_module'"]


def test_interpreted_kernels_are_not_timed(groups, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu.main([*SMALL, "--json", str(tmp_path / "gpu.json"), "--only", "kernels"])
    assert "nothing is timed: kernels are interpreted" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_a_part_that_ran_out_of_time_goes_on_where_it_stopped(groups, tmp_path, monkeypatch, capsys):
    file, clock = tmp_path / "gpu.json", iter(range(0, 10**6, 100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    code, result = run(file, "--only", "kernels", "--limit", "1000")
    assert code == 0
    done = list(result["rows"])
    assert done == ["copy"] or done == ["copy", "first"]
    assert result["left"] == {"kernels": ["copy", "first", "second"][len(done) :]}
    assert "the same command goes on with them" in capsys.readouterr().out
    code, result = run(file, "--only", "kernels", "--limit", "1e9")
    assert (list(result["rows"]), result["left"]) == (["copy", "first", "second"], {})


def test_results_of_another_commit_are_not_kept(groups, tmp_path):
    file = tmp_path / "gpu.json"
    run(file, "--only", "kernels")
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps(content | {"commit": "other", "checks": {"old": "failed: long ago"}, "rows": {"old": {}}})
    )
    code, result = run(file, "--only", "kernels")
    assert (code, result["checks"]) == (0, {})
    assert set(result["rows"]) == {"copy", "first", "second"}


def test_a_row_that_fails_costs_no_other(tmp_path, capsys):
    def wrong(given):
        raise ValueError("\n\ntwo of three differ\nand more")

    record = gpu.Record(tmp_path / "gpu.json", {"device": "x", "commit": "y", "small": True})
    record.copy_rate = 1e-6
    made = (rows.Row("broken", wrong), rows.Row("works", sum, ours=True, bytes=len, images=len))
    gpu.run_part(
        "kernels", [("g", lambda: gpu.time_group(rows.Group("g", made, lambda seed: [1]), CPU, record))], record, 9
    )
    assert record.errors == {"g: broken": "ValueError: two of three differ"}
    assert set(record.rows["g"]) == {"works"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_exit_code_is_2(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_ratios_follow_from_times():
    def facts(ms, ours=False, size=None, floor=None):
        return {"ms": ms, "ours": ours, "bytes": size, "images": 4, "floor": floor}

    found = {"ours": facts(2.0, True, 4e6), "theirs": facts(6.0), "read": facts(1.0, False, 2e6), "third": facts(3.0)}
    found["third"]["floor"] = "read"
    rows.compare(found, copy_rate=4.0)
    assert found["ours"]["gb_per_s"] == pytest.approx(2.0)
    assert found["ours"]["over_floor"] == pytest.approx(2.0)
    assert found["third"]["over_floor"] == 3.0
    assert "over_floor" not in found["theirs"]
    assert {name: f["over_ours"] for name, f in found.items()} == {"ours": 1, "theirs": 3, "read": 0.5, "third": 1.5}
    assert found["ours"]["images_per_s"] == 2000
    lines = list(rows.table("group", found))
    assert [line.split()[0] for line in lines] == ["group", "read", "ours", "third", "theirs"]


def test_targets_are_judged_by_what_was_measured(tmp_path, capsys):
    record = gpu.Record(tmp_path / "gpu.json", {"device": "x", "commit": "y", "small": True})
    record.rows = {
        "cast, resnet18": {"masked_cast to bf16": {"over_floor": 1.31}},
        "cast, resnet50": {"masked_cast to bf16": {"over_floor": 1.3}},
        "threshold, resnet18": {"w.abs().kthvalue(k)": {"over_ours": 19.9}},
        "threshold, resnet50": {"w.abs().kthvalue(k)": {"over_ours": 20.0}},
        "step of ResNet-18, 512 x 64 px, bf16": {training.MASKED: {"images_per_s": 149_999.0}},
    }
    gpu.judge(record, on_gpu=True)
    verdicts = [target["verdict"] for target in record.targets.values() if target["measured"] is not None]
    assert verdicts == ["missed", "met", "missed", "met", "missed"]
    assert {t["verdict"] for t in record.targets.values() if t["measured"] is None} == {"not measured"}
    gpu.judge(record, on_gpu=False)
    assert {t["verdict"] for t in record.targets.values()} == {"not judged on a CPU"}


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
    monkeypatch.setattr(torch.cuda, "graph", lambda *how, **more: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(rows.time, "perf_counter", lambda: next(clock))
    call, calls = rows.prepared(rows.Row("x", seen.append), [1, 2, 3], torch.device("cuda"))
    assert (seen, len(replayed)) == ([1, 2, 3, 1, 2, 3], 2)
    call()
    assert calls == 3 * 10
    assert (len(seen), len(replayed)) == (6, 12)
    clock = iter([0.0, 0.002])
    call, calls = rows.prepared(rows.Row("x", seen.append, waits=True), [1, 2, 3], torch.device("cuda"))
    call()
    assert (calls, len(seen), len(replayed)) == (30, 6 + 3 + 6 + 30, 12)


def test_each_target_is_about_a_row_that_is_timed():
    cuda = torch.device("cuda")
    names = {(group.name, row.what) for group in rows.kernel_groups(cuda) for row in group.rows if not row.cpu_only}
    size = training.Size.of(cuda, small=False)
    names |= {(training.group_name(n, p, size), w) for n, p in gpu.STEPS for w in (training.MASKED, training.DENSE)}
    names |= {(f"memory of {network}", training.MASKED) for network in rows.NETWORKS}
    assert {(group, row) for group, row, _, _ in gpu.TARGETS} <= names


@pytest.mark.slow
def test_all_rows_are_timed(tmp_path):
    code, result = run(tmp_path / "gpu.json", "--only", "kernels", "steps", "--blocks", "--profile", "--limit", "1e9")
    assert (code, result["errors"], result["left"]) == (0, {}, {})
    assert set(result["rows"]) == {
        *(group.name for group in rows.kernel_groups(CPU, small=True, blocks=True)),
        *(training.group_name(n, p, training.Size.of(CPU, small=True)) for n, p in gpu.STEPS),
    }
    for group in result["rows"].values():
        for row in group.values():
            assert row["ms"] > 0
            assert math.isfinite(row.get("over_floor", 1.0))
    assert result["torch"] == torch.__version__
    assert result["commit"]


@pytest.mark.slow
def test_runs_that_share_a_device_are_timed_together():
    (settings,) = share.networks(small=True).values()
    assert share.time_shared(settings, 2, CPU, window=0.5)["images_per_s"] > 0
