"""Any image folder: at one size as it is, at several after --resize."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune.cli.prepare_data import main
from fastprune.errors import InputError
from fastprune.loaders import choose_loader, load_manifest, locate, open_data, prepare
from fastprune.loaders.layout import recognised, scan
from fastprune.loaders.places import known
from fastprune.loaders.resize import MARKER, resize_images, resized
from fastprune.loaders.synthetic import SyntheticData

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CLASSES = ("bird", "cat", "dog", "elk")


def write(root: Path, sizes=((24, 24),), train: int = 7, val: int = 3) -> Path:
    """Images of noise that tells the class, of `sizes` (height, width) in turn."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                folder = root / split / name / ("more" if i % 3 == 2 else "")
                folder.mkdir(parents=True, exist_ok=True)
                height, width = sizes[(label + i) % len(sizes)]
                pixels = noise.integers(0, 128, (height, width, 3)) + 40 * label
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "animals")


@pytest.fixture
def varied(tmp_path) -> Path:
    return write(tmp_path / "animals", ((24, 24), (40, 20), (17, 90)))


def test_it_is_read_as_torchvision_reads_it(folder):
    layout = scan(folder)
    assert (layout.name, layout.classes, recognised(folder)) == ("animals", CLASSES, None)
    for split in ("train", "val"):
        theirs = ImageFolder(str(folder / split))
        assert [str(layout.root / name) for name in layout.files[split]] == [path for path, _ in theirs.samples]
        assert list(layout.labels[split]) == theirs.targets
    assert layout.remark() is None


@pytest.mark.parametrize("loader", ["torchvision", "ffcv", "resident"])
def test_each_loader_reads_it_raw(folder, loader, tmp_path, request):
    if loader == "ffcv":
        request.getfixturevalue("ffcv")
    store = tmp_path / "store"
    manifest, where = locate(folder, store, loader=loader, workers=2, show=False)
    assert (manifest.height, manifest.width, manifest.train_count, manifest.val_count) == (24, 24, 28, 12)
    assert known(folder, store) == manifest
    choice = choose_loader(manifest, where, loader, device="cpu", copies=1)
    source = open_data(manifest, where, loader=choice.name, device="cpu", show=False)
    images = torch.cat([x for x, _ in source.val(batch_size=5)])
    pixels = [np.array(Image.open(path).convert("RGB")) for path, _ in ImageFolder(str(folder / "val")).samples]
    expected = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (manifest.mean, manifest.std))
    torch.testing.assert_close(images.double(), (expected - mean) / std, rtol=1e-5, atol=1e-5)


def test_lists_beside_it_change_nothing(folder):
    """As ImageNet has them elsewhere: below the split, and not to be taken for MiniPlaces'."""
    before = scan(folder)
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("bird/0.jpg 0\n")
    assert recognised(folder) is None
    assert scan(folder) == before


def test_a_class_named_as_tiny_imagenets_folder(folder):
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "images")
    assert recognised(folder) is None
    assert scan(folder).classes == ("bird", "dog", "elk", "images")
    for split in ("train", "val"):
        for name in ("bird", "dog", "elk"):
            shutil.rmtree(folder / split / name)
    assert recognised(folder) is None
    assert scan(folder).classes == ("images",)


def test_tiny_imagenet_with_val_sorted_into_classes(raw):
    """Many tools want it so; the file of labels may stay."""
    layout = scan(raw)
    for name, label in zip(layout.files["val"], layout.labels["val"], strict=True):
        goal = raw / "val" / layout.classes[label]
        goal.mkdir(exist_ok=True)
        (raw / name).rename(goal / Path(name).name)
    (raw / "val" / "images").rmdir()
    assert recognised(raw) is None
    found = scan(raw)
    assert (found.classes, found.files["train"]) == (layout.classes, layout.files["train"])
    assert found.labels["val"] == tuple(sorted(layout.labels["val"]))


def test_names_that_are_not_utf_8(folder):
    os.rename(folder / "val/cat/0.jpg", os.fsencode(folder / "val/cat") + b"/\xff.jpg")
    assert len(scan(folder).listing()) == 64


def test_several_sizes_say_what_to_do(varied, tmp_path, capsys):
    for ask in (
        lambda: locate(varied, tmp_path / "store", loader="torchvision", workers=1, show=False),
        lambda: prepare(varied, tmp_path / "out", workers=2, beton=False, show=False),
    ):
        with pytest.raises(InputError, match=r"varying size.*prepare_data\.py --source DIR --out DIR --resize N") as no:
            ask()
        assert "\n" not in str(no.value)
    assert not (tmp_path / "out").exists()


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


def test_from_several_sizes_to_batches_of_every_loader(tmp_path, ffcv, capsys):
    """Raw, prepared, and prepared from a copy of the prepared images: one fingerprint, the same batches."""
    raw = write(tmp_path / "animals", ((40, 60), (33, 50), (64, 48), (35, 35), (20, 24)), train=60, val=20)
    out, store = tmp_path / "out", tmp_path / "store"
    command = ["--source", str(raw), "--out", str(out), "--resize", "32", "--workers", "2"]
    assert main(command) == 0
    manifest, where = locate(out, store, show=False)
    assert (manifest.name, manifest.height, manifest.width, manifest.source) == ("animals-32", 32, 32, "animals-32")
    assert (manifest.classes, manifest.train_count, manifest.val_count) == (CLASSES, 240, 80)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p != out} == {
        p: t for p, t in before.items() if p != out
    }
    out.rename(tmp_path / "moved")
    manifest, where = locate(tmp_path / "moved", store, show=False)
    files = locate(where / "animals-32", store, loader="torchvision", workers=2, show=False)
    assert files[0].fingerprint == manifest.fingerprint
    for split in ("train", "val"):  # what is read is what `resized` makes of the originals, in ImageFolder's order
        pictures = []
        for path, _ in ImageFolder(str(raw / split)).samples:
            with Image.open(path) as image:
                pictures.append(np.array(resized(image.convert("RGB"), 32)))
        copies = [np.array(Image.open(path)) for path, _ in ImageFolder(str(where / "animals-32" / split)).samples]
        assert np.array_equal(pictures, copies)
    reference = open_data(manifest, where, loader="ffcv")
    slack = 4 * torch.finfo(torch.float32).eps * 32 / min(manifest.std)  # see tests/kernels/test_crop.py
    for loader, place, tolerance in (
        ("resident", (manifest, where), 0),
        ("resident", files, 0),
        ("torchvision", (manifest, where), slack),
        ("torchvision", files, slack),
    ):
        source = open_data(*place, loader=loader, workers=2)
        for ours, theirs in (
            (source.train(seed=3, batch_size=50), reference.train(seed=3, batch_size=50)),
            (source.val(batch_size=50), reference.val(batch_size=50)),
        ):
            for batches in (ours, theirs):
                batches.set_epoch(2)
            for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
                assert images.shape[1:] == (3, 32, 32)
                assert torch.equal(labels, expected_labels)
                assert (images - expected).abs().max() <= tolerance, loader


def test_without_ffcv_the_copies_are_what_is_read(varied, tmp_path, monkeypatch):
    monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)
    out = tmp_path / "out"
    assert main(["--source", str(varied), "--out", str(out), "--resize", "16", "--workers", "1"]) == 0
    manifest, where = locate(out, tmp_path / "store", show=False)
    assert manifest.train_file is None
    source = open_data(manifest, where)
    assert source.loader == "torchvision"
    assert next(iter(source.val(batch_size=5)))[0].shape == (5, 3, 16, 16)


def test_once_ffcv_is_there_the_same_command_adds_its_files(varied, tmp_path, ffcv):
    command = ["--source", str(varied), "--out", str(tmp_path / "out"), "--resize", "16", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)
        assert main(command) == 0
    before = load_manifest(tmp_path / "out")
    assert main(command) == 0
    after = load_manifest(tmp_path / "out")
    assert after.fingerprint == before.fingerprint
    assert (before.train_file, after.train_file) == (None, "train.beton")


@pytest.mark.parametrize("kind", ["miniplaces", "tiny-imagenet-200"])
def test_data_sets_of_one_size_are_resized_too(kind, raw_master, tmp_path):
    """To half, and to their own size, which changes no pixel."""
    source = raw_master
    if kind == "miniplaces":
        source = tmp_path / "mini"
        names = ("b/bar", "a/attic", "c/cave/inner")  # not sorted
        for split in ("train", "val"):
            lines = []
            for label, name in enumerate(names):
                path = source / "images" / split / (name if split == "train" else "") / f"0000000{label + 1}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (40 * label, 0, 99)).save(path)
                lines.append(f"{path.relative_to(source / 'images')} {label}\n")
            (source / f"{split}.txt").write_text("".join(lines))
    plain = locate(source, tmp_path / "store", loader="torchvision", workers=1, show=False)[0]
    for size in (8, 16):
        folder = resize_images(source, tmp_path / f"out{size}", size, workers=1, show=False)
        assert folder.name == f"{kind}-{size}"
        manifest = locate(folder, tmp_path / "store", loader="torchvision", workers=1, show=False)[0]
        assert (manifest.height, manifest.train_per_class) == (size, plain.train_per_class)
    if kind == "miniplaces":  # in both splits the images are in order of their labels
        assert manifest.fingerprint == plain.fingerprint
        assert scan(folder).classes == ("00000 b bar", "00001 a attic", "00002 c cave inner")


def test_the_same_images_have_the_same_fingerprint(varied, tmp_path):
    found = []
    for name, size in (("a", 16), ("b", 16), ("c", 12)):
        folder = resize_images(varied, tmp_path / name, size, workers=2, show=False)
        found.append(locate(folder, tmp_path / "store", loader="torchvision", workers=1, show=False)[0].fingerprint)
    assert found[0] == found[1] != found[2]


def test_sizes_and_sources_do_not_mix(varied, tmp_path):
    small, large = (resize_images(varied, tmp_path / "out", size, workers=1, show=False) for size in (12, 16))
    assert small != large
    (varied / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(InputError, match="holds other images"):
        resize_images(varied, tmp_path / "out", 16, workers=1, show=False)
    (small / MARKER).write_text("{}")
    with pytest.raises(InputError, match="holds other images"):
        resize_images(varied, tmp_path / "out", 12, workers=1, show=False)


def test_a_finished_folder_takes_no_other_size_and_no_other_images(varied, tmp_path, capsys):
    out, other = tmp_path / "out", write(tmp_path / "other")
    prepare(resize_images(varied, out, 16, workers=1, show=False), out, workers=1, beton=False, show=False)
    before = sorted(out.rglob("*"))
    for source, size in ((varied, "12"), (other, "16")):
        assert main(["--source", str(source), "--out", str(out), "--resize", size, "--workers", "1"]) == 2
        line = capsys.readouterr().err
        assert line == f"prepare_data.py: {out} already holds animals-16, 16x16: choose another --out, or remove it\n"
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_stopped_while_resizing_it_is_made_anew(signum, tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    SyntheticData(classes=2, train_per_class=1500, val_per_class=2, size=24).write_folder(raw)
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "--source", raw, "--workers", "2", "--resize"]
    running = subprocess.Popen([*command, "12", "--out", out], stderr=subprocess.DEVNULL)
    part = out / ".tiny-imagenet-200-12.unfinished"
    while not list(part.glob("train/*/*9.png")):
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signum)
    assert running.wait() == (130 if signum == signal.SIGINT else -signum)
    assert out.exists() == (signum == signal.SIGKILL)
    assert not (out / "tiny-imagenet-200-12").exists()
    found = []
    for folder in (out, tmp_path / "new"):
        subprocess.run([*command, "12", "--out", folder], check=True, capture_output=True)
        found.append(load_manifest(folder))
        assert not list(folder.glob(".*"))
    assert found[0].fingerprint == found[1].fingerprint
    assert (found[0].height, found[0].train_count) == (12, 3000)


def test_unreadable_images_are_one_line_and_leave_no_copies(varied, tmp_path):
    (varied / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read 1 of 40 images: .*cat/0\.jpg") as caught:
        resize_images(varied, tmp_path / "out", 16, workers=2, show=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    (varied / "val" / "dog" / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot read 2 of 40 images, first .*; all are in .*unreadable\.txt"):
        resize_images(varied, tmp_path / "out", 16, workers=2, show=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unreadable.txt"]


def test_classes_that_are_numbered_otherwise_keep_their_numbers(tmp_path):
    layout = scan(write(tmp_path / "animals"))
    mixed = replace(layout, classes=("b/x", "a", "c", "d"))
    from fastprune.loaders.resize import _class_folders

    names = _class_folders(mixed.classes)
    assert names == sorted(names) == ["00000 b x", "00001 a", "00002 c", "00003 d"]


BAD = {
    "no val": (lambda root: shutil.rmtree(root / "val"), "has no folder val: expected train/<class>/ and val/<class>/"),
    "no classes in val": (lambda root: empty(root / "val"), "no class folders in .*val"),
    "no classes in train": (lambda root: empty(root / "train"), "no class folders in .*train"),
    "a class in val only": (lambda root: shutil.rmtree(root / "train" / "cat"), "first cat .in val only"),
    "a class in train only": (lambda root: shutil.rmtree(root / "val" / "dog"), "disagree on 1 classes, first dog"),
    "an empty class": (lambda root: empty(root / "train" / "elk"), "no images in"),
    "a class without val images": (lambda root: empty(root / "val" / "elk"), "no images in"),
}


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_one_line(folder, what, tmp_path):
    spoil, says = BAD[what]
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        scan(folder)
    assert "\n" not in str(caught.value)


def test_sizes_that_make_no_sense(folder, tmp_path, capsys):
    for size in ("0", "7", "9999"):
        assert main(["--source", str(folder), "--out", str(tmp_path / "out"), "--resize", size]) == 2
        assert "--resize is" in capsys.readouterr().err


def test_the_marker_is_plain(varied, tmp_path):
    folder = resize_images(varied, tmp_path / "out", 16, workers=1, show=False)
    assert json.loads((folder / MARKER).read_text())["size"] == 16
