"""Any image folder: at one size as it is, at several after --resize."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune.errors import InputError
from fastprune.loaders import choose_loader, locate, open_data
from fastprune.loaders.layout import recognised, scan
from fastprune.loaders.places import known
from fastprune.loaders.prepare_cli import main
from fastprune.loaders.resize import MARKER, resize_images, resized

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


def test_several_sizes_say_what_to_do(varied, tmp_path, capsys):
    with pytest.raises(InputError, match=r"varying size.*prepare_data\.py --resize N") as caught:
        locate(varied, tmp_path / "store", workers=1, show=False)
    assert "\n" not in str(caught.value)


def test_resized_by_hand():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # the middle square
    assert np.array(resized(Image.fromarray(wide), 4)).min() == 200
    checks = np.indices((8, 8)).sum(0) % 2 * 255
    small = np.array(resized(Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8)), 2))
    assert np.abs(small.astype(int) - 127).max() <= 2  # antialiased: a mean, not a sample


def test_resized_prepared_and_read(varied, tmp_path, ffcv, capsys):
    out = tmp_path / "out"
    command = ["--source", str(varied), "--out", str(out), "--resize", "16", "--workers", "2"]
    assert main(command) == 0
    manifest, where = locate(out, tmp_path / "store", show=False)
    assert (manifest.name, manifest.height, manifest.width) == ("animals-16", 16, 16)
    assert manifest.classes == CLASSES
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    batches = {}
    for loader in ("ffcv", "resident"):
        source = open_data(manifest, where, loader=loader, device="cpu", show=False)
        train = source.train(seed=0, batch_size=6)
        train.set_epoch(1)
        batches[loader] = torch.cat([x for x, _ in train])
    assert torch.equal(batches["ffcv"], batches["resident"])
    first = ImageFolder(str(varied / "train")).samples[0][0]
    with Image.open(first) as image:
        expected = np.array(resized(image.convert("RGB"), 16))
    copy = np.array(Image.open(out / "animals-16" / "train" / "bird" / "00000000.png"))
    assert np.array_equal(copy, expected)


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


def test_an_unreadable_image_is_one_line_and_leaves_nothing(varied, tmp_path):
    (varied / "train" / "cat" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read .*0\.jpg") as caught:
        resize_images(varied, tmp_path / "out", 16, workers=2, show=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_classes_that_are_numbered_otherwise_keep_their_numbers(tmp_path):
    layout = scan(write(tmp_path / "animals"))
    mixed = replace(layout, classes=("b/x", "a", "c", "d"))
    from fastprune.loaders.resize import _class_folders

    names = _class_folders(mixed.classes)
    assert names == sorted(names) == ["00000 b x", "00001 a", "00002 c", "00003 d"]


BAD = {
    "no val": (lambda root: shutil.rmtree(root / "val"), "holds neither"),
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
