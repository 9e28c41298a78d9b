"""All figures in one call, as small as they go: what they share, and that they agree with one another."""

import csv
import json
import os
import shutil
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from fastprune.cli.reproduce import main
from fastprune.figures import FIGURES
from fastprune.figures.results import read_csv

COMMON = [
    *("--seeds 1 --epochs 4 --classes 3 --train-per-class 8 --val-per-class 4 --batch-size 12").split(),
    *("--image-size 32 --width 4 --workers 2 --device cpu").split(),
]
TINY = ["--fig", "all", *COMMON, "--rounds", "2", "--fraction", "0.5", "--sparsities", "0.5", "0.8"]
TINY_OF = {"A4": [*COMMON, "--fraction", "0.5"], "structured": [*COMMON, "--sparsities", "0.5", "0.8"]}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("all figures")]


def folders(root) -> list[str]:
    return ["--out", str(root / "out"), "--store", str(root / "store")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("all")
    environment = dict(os.environ)
    try:
        assert main([*TINY, *folders(root)]) == 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return root


def rows_of(root, name: str):
    return read_csv(root / "out" / name / "results.csv")


def node(root, key: str) -> dict:
    return json.loads((root / "store" / "nodes" / key[:2] / key / "node.json").read_text())


def mask_of(root, row) -> dict:
    """The result of the prune step under whose mask the row's network was trained."""
    return node(root, node(root, row.node)["spec"]["mask"])["result"]


def test_every_figure_is_there(finished):
    commands = []
    for name in FIGURES:
        out = finished / "out" / name
        assert {p.name for p in out.iterdir()} == {"figure.png", "figure.pdf", "results.csv", "summary.json"}
        summary = json.loads((out / "summary.json").read_text())
        assert summary["cost"]["nodes"] > 0
        commands.append(summary["cost"]["command"])
        assert {claim["verdict"] for claim in summary["claims"]} == {"undecided"}
    assert not list((finished / "store" / "partial").iterdir())
    assert commands == [commands[0]] * len(FIGURES)
    assert commands[0]["figures"] == list(FIGURES)


def test_the_last_ratios_of_a4_are_those_of_the_first_masks(finished):
    """A6's chain that stops at the end prunes the same dense run; no layer may differ by a single weight."""
    first = next(r for r in rows_of(finished, "A6") if (r.panel, r.series, r.round) == ("a", "110", 1))
    ratios = mask_of(finished, first)["layerwise_ratios"]
    shown = {r.series: r.y for r in rows_of(finished, "A4") if r.panel == "b" and r.round == 4}
    assert shown == {name.removesuffix(".weight"): ratio for name, ratio in ratios.items()}
    early = next(r for r in rows_of(finished, "A6") if (r.panel, r.series, r.round) == ("a", "20", 1))
    shown = {r.series: r.y for r in rows_of(finished, "A4") if r.panel == "b" and r.round == 1}
    assert shown == {n.removesuffix(".weight"): r for n, r in mask_of(finished, early)["layerwise_ratios"].items()}


def test_a5_is_the_distance_of_a4(finished):
    ratios = defaultdict(dict)
    for r in rows_of(finished, "A4"):
        if r.panel == "a":
            ratios[r.round][r.series] = r.y
    shown = {r.round: r.y for r in rows_of(finished, "A5") if r.series == "0.5"}
    assert shown.keys() == ratios.keys() == set(range(5))
    for epoch, distance in shown.items():
        by_hand = sum(abs(ratios[epoch][n] - ratios[4][n]) for n in ratios[4]) / len(ratios[4])
        assert distance == pytest.approx(by_hand, abs=1e-12)
    assert shown[4] == 0.0


def test_a6_at_sparsity_0_is_the_dense_network_after_so_many_epochs(finished):
    dense = [r for r in rows_of(finished, "A6") if r.panel == "b" and r.round == 0]
    assert len({r.node for r in dense}) == 1
    path = finished / "store" / "nodes" / dense[0].node[:2] / dense[0].node / "metrics.csv"
    with path.open(newline="") as f:
        by_epoch = {int(row["epoch"]): float(row["val_accuracy"]) for row in csv.DictReader(f)}
    # 20, 50, 70 and 110 of 110 epochs are 1, 2, 3 and 4 of 4.
    assert {r.series: r.y for r in dense} == {
        "20": by_epoch[1], "50": by_epoch[2], "70": by_epoch[3], "110": by_epoch[4],
    }  # fmt: skip
    found = [r for r in rows_of(finished, "A6") if r.panel == "find-a" and r.series == "20"]
    assert {r.round: node(finished, r.node)["spec"]["stop"] for r in found} == {0: 4, 1: 1}


def test_transplanted_ratios_are_the_donors(finished):
    rows = {(r.series, r.round): r for r in rows_of(finished, "transplant") if r.panel == "a" and r.round > 0}
    for round in (1, 2):
        for taker, donor in (("0.5 by 0.05", "0.05"), ("0.05 by 0.5", "0.5")):
            mine, theirs = mask_of(finished, rows[taker, round]), mask_of(finished, rows[donor, round])
            assert mine["layerwise_ratios"] == theirs["layerwise_ratios"]
            assert mine["kept"] == theirs["kept"]
            assert rows[taker, round].x == rows[donor, round].x


def test_local_masks_take_the_same_of_each_layer(finished):
    row = next(r for r in rows_of(finished, "A3") if r.panel == "a" and r.round == 1)
    ratios = mask_of(finished, row)["layerwise_ratios"]
    assert set(ratios.values()) == {0.5}


def test_structured_networks_are_smaller(finished):
    rows = rows_of(finished, "structured")
    for panel in "bcd":
        sizes = {r.round: r.x for r in rows if (r.panel, r.series) == (panel, "0.1")}
        assert len(sizes) == 3
        if panel != "d":
            assert sizes[0] > sizes[1] > sizes[2] > 0
    removed = {r.round: r.x for r in rows if (r.panel, r.series) == ("a", "0.1")}
    note = json.loads((finished / "out/structured/summary.json").read_text())["drawing"]["note"]
    assert "groups of filters keeps at least one; by rank none would stay in" in note
    assert "A latency is the median of 60 ratios to it, timed in turn; half of them lie within" in note
    assert removed == {0: 0.0, 1: pytest.approx(0.5, abs=0.01), 2: pytest.approx(0.8, abs=0.01)}


def test_a_figure_alone_finds_its_runs_and_the_plan_says_so(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = {p: p.stat().st_mtime_ns for p in finished.glob("store/nodes/*/*/*")}
    assert main([*TINY, *folders(finished), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "; 0 to do" in said
    assert "shared" in said
    for name in ("A4", "structured"):
        assert main(["--fig", name, *TINY_OF[name], "--out", str(tmp_path), "--store", str(finished / "store")]) == 0
        assert "0 trainings run" in capsys.readouterr().out
        same = [(root / name / "results.csv").read_bytes() for root in (tmp_path, finished / "out")]
        assert same[0] == same[1]
    assert {p: p.stat().st_mtime_ns for p in finished.glob("store/nodes/*/*/*")} == before


def test_a_damaged_selection_says_what_to_delete(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    store = tmp_path / "store"
    shutil.copytree(finished / "store", store)
    tuned = next(r for r in rows_of(finished, "structured") if r.round == 1)
    chosen = node(finished, tuned.node)["spec"]["mask"]
    (store / "nodes" / chosen[:2] / chosen / "channels.json").write_text("{}")
    shutil.rmtree(store / "nodes" / tuned.node[:2] / tuned.node)
    command = ["--fig", "structured", *TINY_OF["structured"], "--out", str(tmp_path / "out"), "--store", str(store)]
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "channels.json" in said
    assert "delete the folder" in said


def test_a_dense_run_that_diverges_shows_everywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    command = ["--fig", "A4", "A5", "structured", *COMMON, "--fraction", "0.5", "--sparsities", "0.5"]
    assert main([*command, "--lr-find", "0.05", "1e30", *folders(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "diverged" in said
    ratios = [r for r in rows_of(tmp_path, "A4") if r.panel == "b"]
    assert {r.round for r in ratios if r.y is not None} == {0}  # the initial weights have ratios
    assert all(r.diverged for r in ratios if r.round > 0)
    assert all(r.diverged for r in rows_of(tmp_path, "A5") if r.series == "1e+30")
    assert not any(r.diverged for r in rows_of(tmp_path, "A5") if r.series == "0.05")
    tuned = [r for r in rows_of(tmp_path, "structured") if r.series == "1e+30"]
    assert len(tuned) == 8
    assert all(r.diverged for r in tuned)


def test_two_data_sets_in_one_call(tmp_path, capsys, monkeypatch):
    """A1 on MiniPlaces and A3 on another folder, both of files, through one worker; a second call reads no image."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    noise, places = np.random.default_rng(0), tmp_path / "places"
    animals = tmp_path / "animals"
    for split, count in (("train", 24), ("val", 6)):
        lines = []
        for i in range(count):
            below = f"train/{'abc'[i % 3]}" if split == "train" else "val"
            for path in (places / "images" / below / f"{i:08d}.jpg", animals / split / "xyz"[i % 3] / f"{i}.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
            lines.append(f"{below}/{i:08d}.jpg {i % 3}\n")
        (places / f"{split}.txt").write_text("".join(lines))
    (places / "categories.txt").write_text("/a 0\n/b 1\n/c 2\n")
    command = ["--fig", "A1", "A3", "--data", str(animals), "--miniplaces", str(places), "--loader", "torchvision"]
    command += [
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--batch-size",
        "12",
        "--width",
        "4",
        "--workers",
        "1",
        "--rounds",
        "1",
    ]
    command += ["--device", "cpu", "--classes", "3", "--lr-find", "0.1", "--lr-eval", "0.1", *folders(tmp_path)]
    assert main([*command, "--plan"]) == 0
    assert "on miniplaces (3 classes, 24 images)" in capsys.readouterr().out
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "on miniplaces (3 classes, 24 images)" in said
    assert "on animals (3 classes, 24 images)" in said
    assert "ResNet-50 on MiniPlaces" in said
    nodes = [json.loads(path.read_text()) for path in tmp_path.glob("store/nodes/*/*/node.json")]
    assert len({n["spec"]["data"]["fingerprint"] for n in nodes if n["kind"] == "train"}) == 2
    for name in ("A1", "A3"):  # locally each small layer rounds for itself
        pruned = [r.x for r in rows_of(tmp_path, name) if r.round == 1]
        assert pruned == pytest.approx([0.2] * len(pruned), abs=1e-4 if name == "A1" else 5e-3)
    assert main([*command, "--plan"]) == 0
    assert "; 0 to do" in capsys.readouterr().out
