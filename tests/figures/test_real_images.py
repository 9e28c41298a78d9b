"""Figure A2 on real Tiny ImageNet images, through FFCV where it is installed, else through torchvision."""

import os
from importlib.util import find_spec

import pytest

from fastprune.cli.reproduce import main
from fastprune.figures.results import read_csv
from tests.conftest import CLASSES


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_figure_on_real_images(few_classes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    flags = ["--fig", "A2", "--data", str(few_classes), "--store", str(tmp_path / "store")]
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
