"""Figure A2 on real Tiny ImageNet images, through FFCV where it is installed, else through torchvision."""

import os
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastprune.cli import main
from fastprune.figures.results import read_csv

CLASSES = 6


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory) -> Path:
    """The first classes of the data set as distributed, from the folder or the archives that the environment names."""
    where = os.environ.get("FASTPRUNE_TINY_IMAGENET")
    if not where or not Path(where).is_dir():
        pytest.skip("FASTPRUNE_TINY_IMAGENET names no folder with Tiny ImageNet or its archives")
    whole, part = Path(where), tmp_path_factory.mktemp("tiny-imagenet")
    if archives := sorted(whole.glob("*.tar.gz")):
        whole = tmp_path_factory.mktemp("unpacked")
        for archive in archives:
            with tarfile.open(archive) as tar:
                tar.extractall(whole, filter="data")
    whole = next(p.parent for p in [*whole.glob("train"), *whole.glob("*/train")])
    kept = sorted(p.name for p in (whole / "train").iterdir())[:CLASSES]
    for wnid in kept:
        shutil.copytree(whole / "train" / wnid, part / "train" / wnid)
    (part / "val" / "images").mkdir(parents=True)
    lines = [
        line for line in (whole / "val" / "val_annotations.txt").read_text().splitlines() if line.split("\t")[1] in kept
    ]
    for line in lines:
        shutil.copy(whole / "val" / "images" / line.split("\t")[0], part / "val" / "images")
    (part / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return part


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_figure_on_real_images(tiny_imagenet, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    flags = ["--fig", "A2", "--data", str(tiny_imagenet), "--store", str(tmp_path / "store")]
    flags += ["--classes", str(CLASSES), "--train-per-class", "400", "--batch-size", "100", "--seeds", "1"]
    flags += ["--rounds", "1", "--epochs", "4", "--lr-find", "0.05", "--lr-eval", "0.05", "--workers", "2"]
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    expected = "ffcv" if find_spec("ffcv") else "torchvision"
    assert f"loader {expected}" in capsys.readouterr().out
    rows = {(r.series, r.round): r.y for r in read_csv(tmp_path / "out/A2/results.csv") if r.panel == "a"}
    assert rows["0.05", 0] > 2 / CLASSES  # twice chance: it has seen the images, with the right labels
    assert rows["0.05", 1] > 2 / CLASSES
    made = sorted(p.name for p in (tmp_path / "store" / "data").iterdir())
    assert len(made) == 2  # one data set, and which folders it is known by

    assert main([*flags, "--out", str(tmp_path / "torchvision"), "--loader", "torchvision"]) == 0
    assert "0 trainings run, 3 were in the store" in capsys.readouterr().out
