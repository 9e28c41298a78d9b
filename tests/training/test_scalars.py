"""Where metrics go: a CSV file, TensorBoard, Weights & Biases offline; and what says that a package is missing."""

import csv
import sys
from pathlib import Path

import pytest

from fastprune.errors import InputError
from fastprune.study.logs import log_folder, log_training
from fastprune.training.scalars import open_log
from tests.fake_store import GRAPH, TRAIN, put_all

ROWS = {1: {"loss": 2.0, "accuracy": 0.25, "top5": None}, 2: {"loss": 1.5, "accuracy": 0.5, "top5": 0.75}}


def write(kind: str, folder: Path, rows: dict[int, dict], done: int = 0) -> None:
    log = open_log(kind, folder, name="run", config={"lr": 0.1, "layers": ["a"]}, done=done)
    for epoch, values in rows.items():
        log.add(epoch, values)
    log.close()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_csv_goes_on_where_a_run_was_resumed(tmp_path):
    write("csv", tmp_path, {**ROWS, 3: {"loss": 9.0, "accuracy": 0.0, "top5": 0.0}})
    write("csv", tmp_path, {3: {"loss": 1.0, "accuracy": 0.75, "top5": 1.0, "density": 0.1}}, done=2)
    with (tmp_path / "metrics.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert rows == [
        {"epoch": "1", "loss": "2.0", "accuracy": "0.25", "top5": "", "density": ""},
        {"epoch": "2", "loss": "1.5", "accuracy": "0.5", "top5": "0.75", "density": ""},
        {"epoch": "3", "loss": "1.0", "accuracy": "0.75", "top5": "1.0", "density": "0.1"},
    ]
    write("csv", tmp_path, {1: {"loss": 3.0}})  # a new run
    assert (tmp_path / "metrics.csv").read_text() == "epoch,loss\n1,3.0\n"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    write("tensorboard", tmp_path, {**ROWS, 3: {"loss": 9.0}})
    write("tensorboard", tmp_path, {3: {"loss": 1.0}}, done=2)
    assert events(tmp_path / "tensorboard") == {
        "loss": [(1, 2.0), (2, 1.5), (3, 1.0)],  # what a killed run wrote beyond its checkpoint is purged
        "accuracy": [(1, 0.25), (2, 0.5)],
        "top5": [(2, 0.75)],
    }


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write("wandb", tmp_path, ROWS)
    wandb.teardown()  # its service writes the file, and may do so after a run has finished: waits for the service's end
    [run] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for word in (b"loss", b"accuracy", b"top5", b"layers"):
        assert word in content
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"--log {kind} needs {kind}, .*: run pip install 'fastprune\[{kind}\]'"):
        open_log(kind, tmp_path, name="run", config={})


def test_each_training_of_a_store_is_logged_once(tmp_path):
    pytest.importorskip("tensorboard")
    store = put_all(tmp_path)
    for _ in range(2):
        for node in GRAPH.trainings:
            log_training(store, GRAPH, ["tensorboard"], node)
    folder = log_folder(store, "tensorboard")
    assert {p.name for p in folder.iterdir()} == {node.key[:16] for node in GRAPH.trainings}
    assert events(folder / TRAIN.key[:16] / "tensorboard") == {"val_accuracy": [(1, 0.5), (2, 0.5)]}
