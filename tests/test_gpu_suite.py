"""The suite for a CUDA machine, run on a CPU: whole, interpreted, and what its exit code and verdicts say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_checks, gpu_far, gpu_steps, gpu_suite, gpu_times

ROOT = Path(__file__).resolve().parents[1]
OPS = (
    "masked_cast masked_sgd_ kth_smallest_magnitude keep_top segment_counts pack_bits unpack_bits masked_weight "
    "crop_flip_normalize"
).split()


def suite(tmp_path: Path, *arguments: str, **environment: str) -> dict:
    """What it wrote; it must exit with 0."""
    file = tmp_path / "suite.json"
    command = [sys.executable, "bench/gpu_suite.py", "--device", "cpu", "--small", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def missing(names: dict) -> list[str]:
    return [op for op in OPS if not any(op in name for name in names)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_on_a_cpu(tmp_path):
    result = suite(tmp_path, TRITON_INTERPRET="0")
    assert all(result["checks"].values())
    assert not missing(result["checks"])
    assert not missing(result["timings"])
    assert not result["errors"]
    assert all(row["ms"] > 0 for row in result["timings"].values())
    assert {target["verdict"] for target in result["targets"].values()} == {"not judged on a CPU"}
    assert result["torch"] == torch.__version__
    assert result["commit"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interpreted_kernels_pass_the_checks(tmp_path):
    result = suite(tmp_path, "--only", "checks", TRITON_INTERPRET="1")
    assert all(result["checks"].values())
    assert not missing(result["checks"])
    assert not result["timings"]
    assert set(result["skipped"]) >= set(gpu_steps.CHECKS) - {"MaskedConv2d under autocast"}


@pytest.mark.slow
def test_runs_that_share_a_device_are_timed_merge_graphs(tmp_path):
    result = suite(tmp_path, "--only", "share", TRITON_INTERPRET="0")
    assert not result["errors"]
    assert [name.rpartition(", ")[2] for name in result["timings"]] == ["1 at once", "2 at once", "4 at once"]
    assert all(row["images_per_s"] > 0 for row in result["timings"].values())


@pytest.fixture
def checks(monkeypatch):
    """The checks that the suite runs, to be filled."""
    mine = {}
    monkeypatch.setattr(gpu_checks, "CHECKS", mine)
    monkeypatch.setattr(gpu_far, "CHECKS", {})
    monkeypatch.setattr(gpu_steps, "CHECKS", {})
    return mine


def wrong(s):
    raise ValueError("\n\ntwo of three differ\nand more")


def test_a_check_that_fails_makes_the_exit_code_1_and_nothing_is_timed(checks, tmp_path, capsys):
    checks.update({"first": lambda s: None, "second": wrong, "third": lambda s: "as it should be"})
    file = tmp_path / "new" / "suite.json"
    assert gpu_suite.main(["--device", "cpu", "--small", "--json", str(file)]) == 1
    result = json.loads(file.read_text())
    assert result["checks"] == {"first": True, "second": False, "third": True}
    assert result["errors"] == {"second": "ValueError: two of three differ"}
    assert not result["timings"]
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert "third: as it should be" in said
    assert "2 checks passed, 1 failed, 0 skipped" in said


def test_only_what_was_asked_for_runs(checks):
    checks["wrong"] = wrong
    assert gpu_suite.main(["--device", "cpu", "--small", "--only", "checks"]) == 1
    del checks["wrong"]
    assert gpu_suite.main(["--device", "cpu", "--small", "--only", "checks"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_exit_code_is_2(capsys):
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_row_that_fails_costs_no_other(capsys):
    s = gpu_suite.Suite("cpu", small=True)
    s.copy_rate = 1e-3
    assert math.isnan(s.time("broken", lambda: wrong(s)))
    assert s.time("works", [lambda: sum(range(100))] * 3, bytes=10, images=2, scale=2.0) > 0
    assert set(s.timings) == {"works"}
    row = s.timings["works"]
    assert row["over_floor"] == pytest.approx(row["ms"] / (10 / 1e-3 / 1e6))
    assert s.errors == {"broken": "ValueError: two of three differ"}


def test_targets_are_judged_by_what_was_measured(capsys):
    s = gpu_suite.Suite("cpu", small=True)
    s.cuda = True
    s.timings = {
        "resnet50 masked_cast to bf16": {"ms": 1.0, "over_floor": 1.29},
        "resnet18 masked_cast to bf16": {"ms": 1.0, "over_floor": 1.31},
        "resnet50 w.abs().kthvalue(k)": {"ms": 1.0, "over_ours": 20.5},
        "resnet18 w.abs().kthvalue(k)": {"ms": 1.0, "over_ours": 19.5},
        "crop_flip_normalize 512 x 64 px": {"ms": 1.0, "over_floor": 1.9},
    }
    gpu_times.targets(s)
    verdicts = {name: target["verdict"] for name, target in s.targets.items()}
    assert verdicts.pop("resnet50: masked_cast within 1.3 of the floor") == "met"
    assert verdicts.pop("resnet18: masked_cast within 1.3 of the floor") == "missed"
    assert verdicts.pop("resnet50: threshold 20 x faster than kthvalue") == "met"
    assert verdicts.pop("resnet18: threshold 20 x faster than kthvalue") == "missed"
    assert verdicts.pop("crop at 64 px within 2 of the floor") == "met"
    assert set(verdicts.values()) == {"not measured"}


@pytest.mark.parametrize("name", gpu_far.CHECKS)
def test_what_is_checked_beyond_2_to_31_holds_at_a_smaller_size(name, monkeypatch):
    monkeypatch.setattr(gpu_far, "EDGE", 1 << 18)
    monkeypatch.setattr(gpu_far, "FAR", (1 << 18) + 4099)
    monkeypatch.setattr(gpu_far, "CHUNK", 1 << 15)
    monkeypatch.setattr(gpu_far, "room", lambda s, gib: None)
    gpu_far.CHECKS[name](gpu_suite.Suite("cpu", small=True))


def test_a_wrong_kernel_is_found(monkeypatch):
    s = gpu_suite.Suite("cpu", small=True)
    right = gpu_checks.masked_cast
    monkeypatch.setattr(gpu_checks, "masked_cast", lambda w, m, out: right(w, m, out).mul_(1.0))  # -0 and +0 stay
    gpu_checks.check_cast(s)
    monkeypatch.setattr(gpu_checks, "masked_cast", lambda w, m, out: out.copy_(w * m))  # a product, not a select
    with pytest.raises(AssertionError, match="differ"):
        gpu_checks.check_cast(s)
    monkeypatch.setattr(gpu_checks, "masked_cast", lambda w, m, out: right(w[:-1], m[:-1], out[:-1]))
    with pytest.raises(AssertionError, match="first"):
        gpu_checks.check_cast(s)
