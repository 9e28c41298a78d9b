"""From images of several sizes to images of one, with prepare.py --resize."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune.cli.prepare import main
from fastprune.errors import InputError
from fastprune.loaders import find_or_prepare, load_manifest, open_data, prepare
from fastprune.loaders.layout import scan
from fastprune.loaders.resize import MARKER, _class_folders, resize_images, resized
from fastprune.loaders.samples import read_image
from fastprune.loaders.synthetic import SyntheticData
from tests.loaders.conftest import ANIMALS, CATEGORIES, heed_interrupts

ROOT = Path(__file__).resolve().parents[2]


def test_resized_by_hand():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # the middle square
    assert np.array(resized(Image.fromarray(wide), 4)).min() == 200
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    small = np.array(resized(Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8)), 2))
    assert np.abs(small.astype(int) - 127).max() <= 2  # antialiased: a mean, not a sample


@pytest.mark.parametrize("shape", [(16, 16), (48, 32), (20, 40), (9, 30), (17, 90)])
def test_resized_as_torchvision_does(shape):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8))
    ours = torch.from_numpy(np.array(resized(image, 16))).permute(2, 0, 1).double()
    if shape == (16, 16):
        assert np.array_equal(resized(image, 16), image)
    if 16 * max(shape) / min(shape) % 2 == 0:  # else torchvision rounds the longer side or the corner, which moves it
        theirs = F.center_crop(
            F.resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), 16, antialias=True), [16, 16]
        )
        assert (ours - theirs).abs().max() <= 2  # each rounds to whole numbers twice


def visible(path: str) -> bool:
    return path.endswith((".png", ".JPEG")) and "/._" not in path


def test_from_several_sizes_to_batches(varied_master, tmp_path, capsys):
    out, store = tmp_path / "out", tmp_path / "store"
    command = ["--source", str(varied_master), "--out", str(out), "--resize", "32", "--workers", "2"]
    assert main(command) == 0
    manifest, _ = find_or_prepare(out, store, show=False)
    assert (manifest.name, manifest.height, manifest.width, manifest.source) == ("animals-32", 32, 32, "animals-32")
    assert (manifest.classes, manifest.train_count, manifest.val_count) == (ANIMALS, 21, 15)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    out.rename(tmp_path / "moved")
    manifest, where = find_or_prepare(tmp_path / "moved", store, show=False)
    files = find_or_prepare(where / "animals-32", store, loader="torchvision", workers=2, show=False)
    assert files[0].fingerprint == manifest.fingerprint
    for split in ("train", "val"):  # what is read is what `resized` makes of the originals, in ImageFolder's order
        pictures = []
        for path, _ in ImageFolder(str(varied_master / split), is_valid_file=visible).samples:
            with Image.open(path) as image:
                pictures.append(np.array(resized(image.convert("RGB"), 32)))
        copies = [read_image(path) for path, _ in ImageFolder(str(where / "animals-32" / split)).samples]
        assert np.array_equal(pictures, copies)
    for place, loader in (((manifest, where), "resident"), ((manifest, where), "torchvision"), (files, "torchvision")):
        images, labels = next(iter(open_data(*place, loader=loader).val(batch_size=15)))
        assert images.shape == (15, 3, 32, 32)
        assert labels.tolist() == sorted([0, 1, 2] * 5)


@pytest.mark.parametrize("kind", ["miniplaces", "tiny-imagenet-200"])
def test_data_sets_of_one_size_are_resized_too(kind, raw_master, mini_master, tmp_path):
    """To half, and where they are square to their own size, which changes no pixel."""
    source = mini_master if kind == "miniplaces" else raw_master
    plain = find_or_prepare(source, tmp_path / "store", loader="torchvision", workers=1, show=False)[0]
    for size in (8, 16):
        folder = resize_images(source, tmp_path / f"out{size}", size, workers=1, show=False)
        assert folder.name == f"{kind}-{size}"
        manifest = find_or_prepare(folder, tmp_path / "store", loader="torchvision", workers=1, show=False)[0]
        assert (manifest.height, manifest.train_per_class) == (size, plain.train_per_class)
    layout = scan(folder)
    if kind == "miniplaces":
        names = [f"{label:05d} {name.replace('/', ' ')}" for label, name in enumerate(CATEGORIES)]
        assert list(layout.classes) == names
    else:
        for ours, theirs in zip(layout.files["train"], scan(source).files["train"], strict=True):
            assert np.array_equal(read_image(folder / ours), read_image(source / theirs))


def test_classes_that_are_numbered_otherwise_keep_their_numbers():
    names = _class_folders(("b/x", "a", "c", "d"))
    assert names == sorted(names) == ["00000 b x", "00001 a", "00002 c", "00003 d"]


def test_sizes_and_sources_do_not_mix(varied, tmp_path):
    small, large = (resize_images(varied, tmp_path / "out", size, workers=1, show=False) for size in (12, 16))
    assert small != large
    (varied / "train" / "cat" / "0.JPEG").unlink()
    with pytest.raises(InputError, match="holds other images"):
        resize_images(varied, tmp_path / "out", 16, workers=1, show=False)
    (small / MARKER).write_text("{}")
    with pytest.raises(InputError, match="holds other images"):
        resize_images(varied, tmp_path / "out", 12, workers=1, show=False)


def test_a_finished_folder_takes_no_other_size_and_no_other_images(varied, tmp_path, capsys):
    out, other = tmp_path / "out", Path(shutil.copytree(varied, tmp_path / "other"))
    prepare(resize_images(varied, out, 16, workers=1, show=False), out, workers=1, show=False)
    before = sorted(out.rglob("*"))
    for source, size in ((varied, "12"), (other, "16")):
        assert main(["--source", str(source), "--out", str(out), "--resize", size, "--workers", "1"]) == 2
        line = capsys.readouterr().err
        assert line == f"prepare.py: {out} already holds animals-16, 16x16: choose another --out, or remove it\n"
    assert sorted(out.rglob("*")) == before


def test_unreadable_images_are_one_line_and_leave_no_copies(varied, tmp_path):
    (varied / "train" / "cat" / "0.JPEG").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read 1 of 36 images: .*cat/0\.JPEG") as caught:
        resize_images(varied, tmp_path / "out", 16, workers=2, show=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    (varied / "val" / "dog" / "3.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot read 2 of 36 images, first .*; all are in .*unreadable\.txt"):
        resize_images(varied, tmp_path / "out", 16, workers=2, show=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unreadable.txt"]


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGINT, id="interrupted", marks=pytest.mark.slow),
    ],
)
def test_stopped_while_resizing_it_is_made_anew(signum, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    SyntheticData(classes=2, train_per_class=1500, val_per_class=2, size=24).write_folder(raw)
    command = [sys.executable, str(ROOT / "scripts/prepare.py"), "--source", raw, "--workers", "2", "--resize"]
    running = subprocess.Popen(
        [*command, "12", "--out", out], stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=heed_interrupts
    )
    part = out / ".tiny-imagenet-200-12.unfinished"
    while not list(part.glob("train/*/*9.png")):
        assert running.poll() is None
        time.sleep(0.002)
    (os.killpg if signum == signal.SIGINT else os.kill)(running.pid, signum)
    assert running.wait() == (130 if signum == signal.SIGINT else -signum)
    assert out.exists() == (signum == signal.SIGKILL)
    assert not (out / "tiny-imagenet-200-12").exists()
    subprocess.run([*command, "12", "--out", out], check=True, capture_output=True)
    assert not list(out.glob(".*"))
    manifest = load_manifest(out)
    assert (manifest.height, manifest.train_count) == (12, 3000)
