"""Disks that are full or read-only, files that are not as they were written: one line, nothing lost, nothing run."""

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest

from fastprune.cli.reproduce import main
from fastprune.cli.store import main as store_main
from tests.small_figure import TINY, folders, published, results

FIGURE = [*TINY, "--device", "cpu", "--workers", "1"]


@pytest.fixture
def disk(tmp_path):
    """A small disk of memory; call it to mount it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")

    mount("size=3m")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=False)


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith(("reproduce.py:", "store.py:"))]
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_line_and_what_is_there_stays(small_figure, tmp_path, disk, capsys, workers, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for variable in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"):  # how much of the disk these take is another matter
        monkeypatch.setenv(variable, str(tmp_path / "caches"))
    folder, remount = disk
    where = ["--out", str(tmp_path / "out"), "--store", str(folder / "store"), "--workers", workers]
    assert main([*FIGURE, *where, "--checkpoint-seconds", "0"]) == 2
    assert "No space left" in one_line(capsys)
    done = published(folder / "store")
    assert len(done) < 30
    assert done or workers == "2"  # two trainings at once may fill it before either is published
    assert store_main(["verify", "--store", str(folder / "store")]) == 0
    capsys.readouterr()
    remount("size=50m")
    assert main([*FIGURE, *where]) == 0
    assert done.items() <= published(folder / "store").items()
    assert results(tmp_path) == results(small_figure)


def test_a_disk_that_is_read_only_is_one_line(small_figure, tmp_path, disk, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    folder, remount = disk
    remount("size=50m")
    shutil.copytree(small_figure / "store", folder / "store")
    remount("ro")
    assert main([*FIGURE, "--out", str(tmp_path / "out"), "--store", str(folder / "store")]) == 2
    assert "Read-only" in one_line(capsys)
    assert store_main(["verify", "--store", str(folder / "store")]) == 0
    assert store_main(["ls", "--store", str(folder / "store")]) == 0


@pytest.fixture
def copy(small_figure, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    shutil.copytree(small_figure / "store", tmp_path / "store")
    return tmp_path


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = content.index(b"node.json") - 20 if path.name == "SHA256SUMS" else len(content) // 2
    if how == "cut":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def a_state_that_is_read(store: Path) -> Path:
    """And the mask that was made of it taken away, so that it has to be made again."""
    for mask in sorted(store.glob("nodes/*/*/mask.safetensors")):
        source = json.loads((mask.parent / "node.json").read_text())["spec"]["source"]
        if isinstance(source, dict) and "node" in source:
            shutil.rmtree(mask.parent)
            return next((store / "nodes" / source["node"][:2] / source["node"]).glob("state-*.safetensors"))
    raise AssertionError("no mask was made of a trained network")


def a_mask_that_is_read(store: Path) -> Path:
    """And the runs that leave no weights taken away, among them all those that evaluate it."""
    for metrics in store.glob("nodes/*/*/metrics.csv"):
        if not list(metrics.parent.glob("state-*")):
            shutil.rmtree(metrics.parent)
    return max(store.glob("nodes/*/*/mask.safetensors"))


PRODUCTS = {
    "node.json": lambda store: next(store.glob("nodes/*/*/node.json")),
    "SHA256SUMS": lambda store: next(store.glob("nodes/*/*/SHA256SUMS")),
    "state": a_state_that_is_read,
    "mask": a_mask_that_is_read,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flip"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_corrupt_product_is_one_line_and_can_be_made_again(small_figure, copy, capsys, product, how):
    path = PRODUCTS[product](copy / "store")
    damage(path, how)
    before = published(copy / "store")
    assert main([*FIGURE, *folders(copy)]) == 2
    said = one_line(capsys)
    assert str(path.parent) in said
    assert f"delete the folder {path.parent} to recompute the node" in said
    assert before.items() <= published(copy / "store").items()
    assert store_main(["verify", "--store", str(copy / "store")]) == 1
    assert str(path.parent) in capsys.readouterr().out
    shutil.rmtree(path.parent)
    assert main([*FIGURE, *folders(copy)]) == 0
    assert results(copy) == results(small_figure)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_pickle_in_place_of_a_product_is_not_run(copy, capsys, product, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(copy / "ran"))
    path = PRODUCTS[product](copy / "store")
    path.write_bytes(pickle.dumps(Payload()))
    assert main([*FIGURE, *folders(copy)]) == 2
    assert str(path) in one_line(capsys)
    assert store_main(["verify", "--store", str(copy / "store")]) == 1
    assert not (copy / "ran").exists()


def test_a_pickle_in_place_of_a_checkpoint_is_not_run(small_figure, copy, capfd, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(copy / "ran"))
    for path in list((copy / "store").glob("nodes/*/*/metrics.csv"))[:3]:
        checkpoint = copy / "store/partial" / f"{path.parent.name}.checkpoint.safetensors"
        checkpoint.write_bytes(pickle.dumps(Payload()))
        shutil.rmtree(path.parent)
    assert main([*FIGURE, *folders(copy)]) == 0
    assert capfd.readouterr().err.count("unusable checkpoint") == 3
    assert not (copy / "ran").exists()
    assert results(copy) == results(small_figure)


def test_a_store_of_a_later_version_is_one_line(tmp_path, capsys):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/store.json").write_text('{"format": 99}\n')
    for call in (main, [*FIGURE, *folders(tmp_path)]), (store_main, ["ls", "--store", str(tmp_path / "store")]):
        assert call[0](call[1]) == 2
        assert "format 99" in one_line(capsys)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
