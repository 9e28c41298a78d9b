"""A whole figure from the command line: what it leaves, what it survives, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastprune.cli.reproduce import main
from fastprune.cli.store import main as store_main
from fastprune.figures.figure import build_graph
from fastprune.figures.paper import A2
from fastprune.figures.results import read_csv
from fastprune.specs import DataSpec
from fastprune.study.settings import preset
from tests import small_figure
from tests.small_figure import folders

TINY = [*small_figure.TINY, "--workers", "1", "--device", "cpu"]


def published(root: Path) -> dict[str, int]:
    return small_figure.published(root / "store")


def command(root: Path, *more: str) -> list[str]:
    return small_figure.command(root, "--device", "cpu", *more)


@pytest.fixture(scope="module")
def finished(request):
    return request.getfixturevalue("small_figure")


def test_what_a_run_leaves(finished):
    out = finished / "out" / "A2"
    assert {p.name for p in out.iterdir()} == {"figure.png", "figure.pdf", "results.csv", "summary.json"}
    rows = read_csv(out / "results.csv")
    assert {(r.panel, r.series) for r in rows} == {
        *((p, s) for p in "ab" for s in ("0.05", "0.2", "0.8", "random")),
        *(("find", s) for s in ("0.05", "0.2", "0.8")),
    }
    assert len(rows) == 2 * 4 * 3 + 3 * 2
    assert {r.x for r in rows if r.round == 0} == {1.0}
    total = next(iter((finished / "store").glob("nodes/*/*/layers.csv"))).read_text().splitlines()[1:]
    weights = sum(int(line.split(",")[1]) for line in total)
    left = weights - round(0.8 * weights)
    assert {r.x for r in rows if r.round == 1} == {left / weights}
    assert {r.x for r in rows if r.round == 2} == {(left - round(0.8 * left)) / weights}
    summary = json.loads((out / "summary.json").read_text())
    cost, images = summary["cost"], small_figure.TRAININGS * 2 * 72  # two epochs of three classes of 24 images
    assert {name: cost[name] for name in ("nodes", "trained", "images")} == {
        **{"nodes": small_figure.NODES, "trained": small_figure.TRAININGS, "images": images},
    }
    assert not {"images_per_s", "wall_s"} & cost.keys()
    assert cost["command"].keys() == {"figures", "images_per_s", "line", "wall_s"}
    assert cost["command"]["figures"] == ["A2"]
    assert summary["environment"]["compute"] == {"dense": small_figure.TRAININGS}  # too short to be sparse
    assert {c["verdict"] for c in summary["claims"]} == {"undecided"}
    assert [c["id"] for c in summary["claims"]] == [c.id for c in A2.claims_of(preset(A2.protocol, "smoke"))]


def test_threads_are_those_of_the_trainings(finished, tmp_path, monkeypatch):
    """And not those of the process that draws, which has as many as torch chose."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert main([*TINY, *folders(tmp_path, finished / "store")]) == 0
    assert json.loads((tmp_path / "out/A2/summary.json").read_text())["environment"]["threads"] == 1


def test_the_resident_loader_gives_the_same_figure(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main([*TINY, *folders(tmp_path), "--loader", "resident"]) == 0
    assert "loader resident (asked for)" in capsys.readouterr().out
    assert published(tmp_path).keys() == published(finished).keys()
    assert (tmp_path / "out/A2/results.csv").read_bytes() == (finished / "out/A2/results.csv").read_bytes()
    nodes = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("nodes/*/*/node.json")]
    assert {node["provenance"]["loader"] for node in nodes if node["kind"] == "train"} == {"resident"}


def test_find_and_eval_at_one_rate_are_one_run(finished):
    rows = read_csv(finished / "out" / "A2" / "results.csv")
    find = {r.round: r.node for r in rows if (r.panel, r.series) == ("find", "0.8")}
    evaluated = {r.round: r.node for r in rows if (r.panel, r.series) == ("b", "0.8")}
    assert find.items() <= evaluated.items()
    assert len({r.node for r in rows}) == 3 * 2 + 1 + 4 * 2 + 3 * 2 + 1


def test_the_second_call_trains_nothing(finished, capsys):
    before = published(finished)
    csv = (finished / "out/A2/results.csv").read_bytes()
    assert main([*TINY, *folders(finished)]) == 0
    assert published(finished) == before
    assert (finished / "out/A2/results.csv").read_bytes() == csv


@pytest.mark.slow
def test_metrics_of_each_training_are_logged_of_those_in_the_store_too(finished, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    shutil.copytree(finished / "store", tmp_path / "store")
    capsys.readouterr()
    assert main([*TINY, *folders(tmp_path), "--log", "csv", "tensorboard"]) == 0
    assert f"metrics of each training: {tmp_path}/store/tensorboard\n" in capsys.readouterr().out
    assert published(tmp_path).keys() == published(finished).keys()
    runs = list((tmp_path / "store/tensorboard").glob("*/tensorboard/events.*"))
    assert len(runs) == small_figure.TRAININGS
    # A new one, trained here, is logged when it has ended.
    assert main([*TINY, *folders(tmp_path), "--log", "tensorboard", "--fig", "A2", "--rounds", "3"]) == 0
    assert len(list((tmp_path / "store/tensorboard").iterdir())) > small_figure.TRAININGS
    assert store_main(["verify", str(tmp_path / "store")]) == 0


def test_all_that_a_figure_leaves_is_needed_and_whole(finished, capsys):
    before = published(finished)
    for call in (["gc", "--unneeded"], ["verify"], ["ls"]):
        assert store_main([*call, "--store", str(finished / "store")]) == 0
    assert published(finished) == before
    record = json.loads(next((finished / "store/figures").iterdir()).read_text())
    assert record["figure"] == "A2"
    assert set(record["nodes"]) == before.keys()
    assert "--fig A2 --seeds 1" in record["command"]


def test_smoke_says_what_it_is_and_how_to_get_the_real_one(finished, capsys):
    main([*TINY, *folders(finished)])
    said = capsys.readouterr().out
    assert "machinery" in said
    assert "--preset paper" in said
    assert "loader synthetic" in said


def test_redraw_needs_results_alone(finished, tmp_path, capsys):
    out = tmp_path / "A2"
    out.mkdir()
    for name in ("results.csv", "summary.json"):
        (out / name).write_bytes((finished / "out/A2" / name).read_bytes())
    assert main(["--fig", "A2", "--redraw", "--out", str(tmp_path), "--store", str(tmp_path / "none")]) == 0
    for name in ("figure.png", "figure.pdf"):
        assert (out / name).read_bytes() == (finished / "out/A2" / name).read_bytes()
    assert not (tmp_path / "none").exists()


def test_redraw_without_the_summary_claims_nothing_it_does_not_know(finished, tmp_path, capsys):
    out = tmp_path / "A2"
    out.mkdir()
    (out / "results.csv").write_bytes((finished / "out/A2/results.csv").read_bytes())
    for preset_name in ("smoke", "paper"):
        assert main(["--fig", "A2", "--redraw", "--preset", preset_name, "--out", str(tmp_path)]) == 0
    assert {p.name for p in out.iterdir()} == {"results.csv", "figure.png", "figure.pdf"}
    pdf = (out / "figure.pdf").read_bytes()
    main(["--fig", "A2", "--redraw", "--out", str(tmp_path)])
    assert (out / "figure.pdf").read_bytes() == pdf


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_written_elsewhere(finished, tmp_path):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    environment |= {"HOME": str(home), "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "tmp").mkdir()
    subprocess.run(command(tmp_path, "--workers", "2"), cwd=cwd, env=environment, check=True, capture_output=True)
    assert {p.name for p in tmp_path.iterdir()} == {"home", "cwd", "tmp", "out", "store"}
    for folder in (home, cwd, tmp_path / "tmp"):
        assert list(folder.rglob("*")) == []
    assert (tmp_path / "out/A2/results.csv").read_bytes() == (finished / "out/A2/results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_and_started_again_it_ends_the_same(finished, tmp_path):
    """SIGKILL to the whole process group, at moments spread over the work, two workers."""
    expected = (finished / "out/A2/results.csv").read_bytes()
    done: dict[str, int] = {}
    arguments = command(tmp_path, "--workers", "2", "--checkpoint-seconds", "0")
    for kill in range(4):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        target = len(done) + 1 + kill % 3
        deadline = time.monotonic() + 100
        while len(published(tmp_path)) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = published(tmp_path)
        assert now.items() >= done.items()
        done = now
    assert 0 < len(done) < 30
    subprocess.run(arguments, check=True, capture_output=True)
    now = published(tmp_path)
    assert now.items() >= done.items()
    assert (tmp_path / "out/A2/results.csv").read_bytes() == expected


@pytest.mark.slow
def test_when_the_master_alone_is_killed_its_workers_end(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not published(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait()
    for _ in range(100):
        alive = [
            c for c in children if Path(f"/proc/{c}").exists() and " Z " not in Path(f"/proc/{c}/stat").read_text()
        ]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


def hears_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would whatever the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def said_until_its_end(process: subprocess.Popen) -> str:
    """What it wrote to stderr. Fails, with all of it, if the process goes on for long."""
    try:
        return process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it goes on, having said: {process.communicate()[1]}")


@pytest.mark.slow
def test_an_interrupt_is_130_and_continues(finished, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_interrupts,
    )
    while not published(tmp_path):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = said_until_its_end(process)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("reproduce.py: interrupted")
    assert "Traceback" not in said


def children(process: subprocess.Popen) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def workers(process: subprocess.Popen) -> list[str]:
    """The worker processes among its children: multiprocessing keeps a resource tracker too."""
    return [c for c in children(process) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(finished, tmp_path):
    """Both of them, whatever they are doing: one of the two soon has nothing to do."""
    process = subprocess.Popen(
        command(tmp_path, "--workers", "2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(published(tmp_path)) < 2:
        time.sleep(0.02)
    for pid in workers(process):
        os.kill(int(pid), signal.SIGKILL)
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert (tmp_path / "out/A2/results.csv").read_bytes() == (finished / "out/A2/results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.1, 4.0, 8.0])
def test_an_interrupt_from_the_terminal_is_one_line_at_any_moment(tmp_path, wait):
    """A terminal sends it to every process of the group, starting workers too."""
    arguments = command(tmp_path, "--workers", "2", "--epochs", "50")
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hears_interrupts,
    )
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    said = said_until_its_end(process)
    assert process.returncode in (130, -signal.SIGINT)  # the interpreter itself may still be starting
    assert "Traceback" not in said or process.returncode == -signal.SIGINT


BAD = {
    "one class": ([*TINY, "--classes", "1"], "--classes is 1"),
    "nothing pruned": ([*TINY, "--fraction", "0.000002"], "would prune nothing"),
    "all pruned": ([*TINY, "--fraction", "0.99", "--rounds", "9"], "would prune all"),
    "empty data": (["--fig", "A2", "--data", ""], "--data is empty"),
    "odd device": (["--fig", "A2", "--device", "cuda:²"], "unknown device"),
    "abbreviated": (["--fig", "A2", "--seed", "3"], "--seed"),
    "both": (["--fig", "A2", "--plan", "--redraw"], "--redraw"),
    "seconds": (["--fig", "A2", "--checkpoint-seconds", "nan"], "--checkpoint-seconds"),
    "two lines": (["--fig", "A2", "--data", "a\nb"], "a b"),
    "figure": (["--fig", "A9"], "unknown figure 'A9'"),
    "preset": (["--fig", "A2", "--preset", "huge"], "unknown preset 'huge'"),
    "flag": (["--fig", "A2", "--bogus"], "--bogus"),
    "no figure": ([], "--fig"),
    "number": (["--fig", "A2", "--seeds", "many"], "--seeds"),
    "seeds": (["--fig", "A2", "--seeds", "0"], "--seeds is 0"),
    "fraction": (["--fig", "A2", "--fraction", "1.5"], "--fraction is 1.5"),
    "rate": (["--fig", "A2", "--lr-find", "-1"], "--lr-find"),
    "workers": (["--fig", "A2", "--workers", "0"], "--workers"),
    "precision": (["--fig", "A2", "--precision", "int8"], "--precision"),
    "compute": (["--fig", "A2", "--compute", "fast"], "--compute"),
    "sparse bf16": ([*TINY, "--compute", "sparse", "--precision", "bf16"], "in fp32, not bf16: add --precision fp32"),
    "sparse plan": ([*TINY, "--compute", "sparse", "--device", "cuda:0", "--plan"], "on a CPU, not on cuda:0"),
    "device": (["--fig", "A2", "--device", "tpu"], "unknown device 'tpu'"),
    "no such gpu": (["--fig", "A2", "--device", "cuda:99"], "--device cuda:99"),
    "batch": ([*TINY, "--batch-size", "100"], "a batch of 100 is more than"),
    "folder": (["--fig", "A2", "--data", "/nowhere"], "/nowhere"),
    "preset needs data": (["--fig", "A2", "--preset", "paper"], "--data"),
    "loader": (["--fig", "A2", "--loader", "dali"], "--loader"),
    "out": (["--fig", "A2", "--out", "/proc/out"], "/proc/out"),
    "store": (["--fig", "A2", "--store", "/proc/store"], "/proc/store"),
    "redraw": (["--fig", "A2", "--redraw"], "results.csv"),
    "unused": (["--fig", "A2", "--sparsities", "0.5"], "figure A2 does not use --sparsities"),
    "rewind": (["--fig", "A2", "--rewind", "lr"], "--rewind lr: the random baseline"),
    "two data sets": (["--fig", "A1", "A2", "--preset", "paper", "--data", "/"], "--miniplaces"),
    "stops": (["--fig", "A6", "--prune-epochs", "3", "2"], "--prune-epochs"),
    "scaled stops": (["--fig", "A6", "--epochs", "2"], "find runs of 2 epochs would stop after epochs 1 1 1 2"),
    "default out": (["--fig", "A2", "--out", "/proc/out"], "cannot write to /proc/out/A2 "),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_2(what, tmp_path, capsys, monkeypatch):
    arguments, expected = BAD[what]
    for flag, name in (("--out", "out"), ("--store", "store")):
        if flag not in arguments:
            arguments = [*arguments, flag, str(tmp_path / name)]
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert len(said.splitlines()) == 1


def test_a_store_of_another_version(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text('{"format": 99}')
    for plan in ([], ["--plan"]):
        assert main([*TINY, *folders(tmp_path), *plan]) == 2
        assert "format 99" in capsys.readouterr().err


def test_a_diverged_rate_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main([*TINY, *folders(tmp_path), "--rounds", "1", "--lr-find", "1e30", "--lr-eval", "0.5"]) == 0
    rows = read_csv(tmp_path / "out/A2/results.csv")
    assert [r.diverged for r in rows if r.panel == "find"] == [True]
    assert not any(r.diverged for r in rows if r.panel == "a")


def test_every_node_has_a_name():
    data = DataSpec("x", "f", 10, None, None, 1000, 100)
    _, graph = build_graph(A2, preset(A2.protocol, "smoke"), data)
    labels = [graph.label(n) for n in graph.nodes]
    assert len(set(labels)) == len(labels)
    assert all("seed" in label and "round" in label for label in labels)
