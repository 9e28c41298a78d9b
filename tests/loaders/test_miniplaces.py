"""MiniPlaces as distributed, with generated images: order and labels, the same by every way, one line for bad input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastprune.cli.prepare_data import main
from fastprune.errors import InputError
from fastprune.loaders import Subset, choose_loader, known, load_manifest, locate, open_data, prepare
from fastprune.loaders.inspection import inspect
from fastprune.loaders.layout import DISTRIBUTED, FOLDER_NAME, recognised, scan
from fastprune.loaders.miniplaces import list_folders
from fastprune.loaders.samples import folder_samples

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("a/abbey", "b/bakery/shop", "b/ballroom", "y/yard")
TRAIN, VAL = 6, 3  # images a class
# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
needs_ffcv = pytest.mark.usefixtures("ffcv")


def write_miniplaces(root: Path, height: int = 16, width: int = 16) -> Path:
    """As the archive and the lists are: JPEG files, val in mixed order, a test split without labels, objects/."""
    rng = np.random.default_rng(height)

    def image(name):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
        picture.convert("L" if name.endswith("abbey/00000002.jpg") else "RGB").save(path)

    train, val = [], []
    for label, name in enumerate(CLASSES):
        train += [(f"train/{name}/{number:08}.jpg", label) for number in range(1, TRAIN + 1)]
    for number, label in enumerate(rng.permutation(np.repeat(np.arange(len(CLASSES)), VAL)).tolist(), start=1):
        val.append((f"val/{number:08}.jpg", label))
    for name in [name for name, _ in train + val] + ["test/00000001.jpg"]:
        image(name)
    for split, entries in (("train", train), ("val", val)):
        (root / f"{split}.txt").write_text("".join(f"{name} {label}\n" for name, label in entries))
    (root / "categories.txt").write_text("".join(f"/{name} {label}\n" for label, name in enumerate(CLASSES)))
    (root / "objects").mkdir()
    return root


@pytest.fixture(scope="session")
def master(tmp_path_factory) -> Path:
    """Images of 16x16. Not to be changed."""
    return write_miniplaces(tmp_path_factory.mktemp("mini") / "miniplaces")


@pytest.fixture
def mini(master, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(master, tmp_path / "mini"))


def change(path, edit):
    path.write_text("".join(f"{line}\n" for line in edit(path.read_text().splitlines())))


def move_lists(source, goal):
    goal.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.txt"):
        shutil.move(path, goal)


def fingerprint(folder, tmp_path):
    return inspect(folder_samples(scan(folder)), workers=1, list_folder=tmp_path, show=False).fingerprint


# Order, labels, places


def test_order_and_labels_are_the_lists(master):
    layout = scan(master)
    assert layout.name == recognised(master) == "miniplaces"
    assert layout.classes == CLASSES
    for split in ("train", "val"):
        lines = [line.split() for line in (master / f"{split}.txt").read_text().splitlines()]
        assert layout.files[split] == tuple(f"images/{name}" for name, _ in lines)
        assert layout.labels[split] == tuple(int(label) for _, label in lines)
    assert layout.per_class("train") == (TRAIN,) * len(CLASSES)
    assert layout.per_class("val") == (VAL,) * len(CLASSES)


def test_the_order_of_the_lines_and_the_names_of_the_classes_do_not_matter(mini, tmp_path):
    before, print_before = scan(mini), fingerprint(mini, tmp_path)
    for name in ("train.txt", "val.txt", "categories.txt"):
        change(mini / name, lambda lines: [*lines[::-1], "", "  "])
    assert scan(mini) == before
    (mini / "categories.txt").unlink()
    assert scan(mini) == before, "the folders are named as the categories are"
    assert scan(mini).listing() == before.listing()
    (mini / "categories.txt").write_text("".join(f"/x/{label} {label}\n" for label in range(len(CLASSES))))
    assert scan(mini).classes == ("x/0", "x/1", "x/2", "x/3")
    assert fingerprint(mini, tmp_path) == print_before


def test_labels_are_the_lists_and_not_the_folders(mini, tmp_path):
    before = fingerprint(mini, tmp_path)
    moved = "train/a/abbey/00000001.jpg"
    change(mini / "train.txt", lambda lines: [line.replace(f"{moved} 0", f"{moved} 3") for line in lines])
    layout = scan(mini)
    assert dict(zip(layout.files["train"], layout.labels["train"], strict=True))[f"images/{moved}"] == 3
    assert list(layout.labels["train"]) == sorted(layout.labels["train"])
    assert fingerprint(mini, tmp_path) != before


@pytest.mark.parametrize("number", range(4))
def test_places_of_the_lists(number, mini, master):
    folder = list_folders(mini)[number]
    if folder != mini:
        move_lists(mini, folder)
    assert scan(mini).files == scan(master).files
    assert scan(mini).classes == CLASSES


@pytest.mark.parametrize("number", [0, 1])
def test_copies_without_the_folder_images(number, mini, master, tmp_path):
    print_before = fingerprint(mini, tmp_path)
    for split in ("train", "val"):
        shutil.move(mini / "images" / split, mini / split)
    shutil.rmtree(mini / "images")
    if number:
        move_lists(mini, list_folders(mini)[number])
    assert recognised(mini) == "miniplaces"
    layout, before = scan(mini), scan(master)
    assert (layout.name, layout.classes, layout.labels) == ("miniplaces", CLASSES, before.labels)
    assert layout.files["val"] == tuple(name.removeprefix("images/") for name in before.files["val"])
    assert fingerprint(mini, tmp_path) == print_before
    (list_folders(mini)[number] / "val.txt").unlink()
    with pytest.raises(InputError, match=r"missing .*val\.txt: .* holds only the train list"):
        scan(mini)
    (list_folders(mini)[number] / "train.txt").unlink()
    assert recognised(mini) is None
    with pytest.raises(InputError, match=r"no class folders in .*val: expected val/<class>/"):
        scan(mini)


def test_the_first_place_counts(mini, master):
    shutil.copytree(mini, mini / "development_kit" / "data", ignore=shutil.ignore_patterns("images", "objects"))
    change(mini / "development_kit" / "data" / "val.txt", lambda lines: lines[:4])
    assert scan(mini).files == scan(master).files


@pytest.mark.parametrize("kit", [False, True], ids=["lists in data", "kit beside data"])
def test_the_folder_above_data_will_do(kit, mini, master, tmp_path):
    """A clone of the repository, where the archive was unpacked in data/."""
    clone = tmp_path / "clone"
    clone.mkdir()
    shutil.move(mini, clone / "data")
    if kit:
        move_lists(clone / "data", clone / "development_kit" / "data")
    layout = scan(clone)
    assert layout.files == scan(master).files
    assert layout == scan(clone / "data")


def test_what_the_lists_do_not_name_is_not_read(mini):
    before = scan(mini)
    (mini / "images/train/a/abbey/00009999.jpg").write_bytes(b"no image")
    shutil.rmtree(mini / "images/test")
    shutil.rmtree(mini / "objects")
    assert scan(mini) == before


def test_a_remark_where_counts_are_not_as_distributed(master):
    assert DISTRIBUTED["miniplaces"][1:] == (100, 1000, 100)
    remark = scan(master).remark()
    assert remark is not None
    assert "4 classes with 6 train, 3 val images each, not the 100 classes with 1000 and 100 of MiniPlaces" in remark


def test_what_is_recognised(master, raw_master, tmp_path):
    assert recognised(raw_master) == recognised(raw_master.parent) == FOLDER_NAME
    assert recognised(tmp_path) is None
    for folder in ("train/ant", "val/ant"):
        (tmp_path / folder).mkdir(parents=True)
    assert recognised(tmp_path) is None, "an ordinary image folder"
    assert recognised(tmp_path / "nowhere") is None


# What is wrong


def edit(name, old, new):
    """Replaces the first `old` of a list."""

    def spoil(mini):
        text = (mini / name).read_text()
        assert old in text
        (mini / name).write_text(text.replace(old, new, 1))

    return spoil


def add(name, line):
    return lambda mini: change(mini / name, lambda lines: [*lines, line])


def without(name):
    return lambda mini: (mini / name).unlink()


def without_images_of(split):
    return lambda mini: shutil.rmtree(mini / "images" / split)


def no_categories_and(*steps):
    return lambda mini: [step(mini) for step in (without("categories.txt"), *steps)]


BAD = {
    "no lists": (lambda mini: move_lists(mini, mini / "else"), "no train.txt and val.txt for the images in"),
    "no train list": (without("train.txt"), r"missing .*/train\.txt: .* holds only the val list"),
    "no val list": (without("val.txt"), r"missing .*/val\.txt: .* holds only the train list"),
    "no train images": (without_images_of("train"), "neither Tiny ImageNet .* nor MiniPlaces"),
    "no val images": (
        without_images_of("val"),
        r"val\.txt names 12 images .* not in .*, first val/00000001\.jpg",
    ),
    "an image is missing": (without("images/train/b/ballroom/00000003.jpg"), "1 images that are not in .*00000003"),
    "a folder for an image": (
        edit("train.txt", "abbey/00000001.jpg", "abbey"),
        r"not in .*, first train/a/abbey",
    ),
    "a file for a folder": (edit("train.txt", "a/abbey/00000001.jpg", "a/abbey/00000001.jpg/x"), "1 images .* not in"),
    "empty list": (lambda mini: (mini / "val.txt").write_text("\n"), r"val\.txt names no images"),
    "binary list": (lambda mini: (mini / "train.txt").write_bytes(b"\xff\xfe\x00"), r"cannot read .*train\.txt"),
    "a list is a folder": (lambda mini: [without("categories.txt")(mini), (mini / "categories.txt").mkdir()], "cannot"),
    "no class": (
        edit("train.txt", "00000002.jpg 0", "00000002.jpg"),
        r"train\.txt, line 2: expected a name and",
    ),
    "three columns": (edit("val.txt", "00000003.jpg ", "00000003.jpg 1 "), r"val\.txt, line 3: expected .*\.jpg 0"),
    "a word": (edit("train.txt", "00000001.jpg 0", "00000001.jpg zero"), "line 1: class 'zero' is no whole number"),
    "negative": (edit("train.txt", "00000001.jpg 0", "00000001.jpg -1"), "class '-1' is no whole number"),
    "a fraction": (edit("train.txt", "00000001.jpg 0", "00000001.jpg 0.0"), "class '0.0' is no whole number"),
    "many digits": (edit("train.txt", "00000001.jpg 0", "00000001.jpg " + "9" * 5000), "is no whole number"),
    "other digits": (edit("train.txt", "00000001.jpg 0", "00000001.jpg ²"), "is no whole number"),
    "above": (
        edit("train.txt", "00000001.jpg 0", "00000001.jpg 4"),
        r"of class 4, .*categories\.txt are 0 to 3",
    ),
    "above in val": (add("val.txt", "val/00000013.jpg 4"), r"val\.txt, line 13: val/00000013.jpg is of class 4"),
    "above in val without names": (
        no_categories_and(add("val.txt", "val/00000013.jpg 4")),
        r"line 13: .* class 4, but the classes of .*train\.txt are 0 to 3",
    ),
    "class without image": (add("categories.txt", "/z/zoo 4"), r"no image of 1 of 5 classes .* first class 4"),
    "gap": (
        no_categories_and(edit("train.txt", "train/y/yard/00000006.jpg 3", "train/y/yard/00000006.jpg 5")),
        r"no image of 1 of 6 classes .*train\.txt.*, first class 4",
    ),
    "outside": (
        edit("train.txt", "train/a/", "train/../../a/"),
        r"'train/\.\./\.\./a/.*' is no path below train/",
    ),
    "beside": (edit("train.txt", "train/a/", "../a/"), "is no path below train/"),
    "absolute": (edit("train.txt", "train/a/", "/train/a/"), "is no path below train/"),
    "same by another name": (add("train.txt", "train/./a/abbey/00000001.jpg 0"), "is no path below train/"),
    "null byte": (edit("train.txt", "train/a/", "train/\0a/"), "is no path below train/"),
    "backslashes": (edit("train.txt", "train/a/abbey/", "train\\a\\abbey\\"), "is no path below train/"),
    "val in train": (add("train.txt", "val/00000001.jpg 0"), r"train\.txt, line 25: 'val/00000001\.jpg' is no path"),
    "test in val": (add("val.txt", "test/00000001.jpg 0"), "is no path below val/"),
    "twice": (add("train.txt", "train/a/abbey/00000001.jpg 0"), "line 25: .* is listed twice, first in line 1"),
    "category twice": (add("categories.txt", "/z/zoo 3"), r"categories\.txt, line 5: class 3 .* is there twice"),
    "name twice": (add("categories.txt", "/a/abbey 4"), "name '/a/abbey' is there twice"),
    "no name": (edit("categories.txt", "/a/abbey", "/"), "is there twice, or is empty"),
    "category missing": (edit("categories.txt", "/a/abbey 0\n", ""), "names 3 classes, but not class 0"),
    "no categories": (lambda mini: (mini / "categories.txt").write_text(""), "names no classes"),
    "category by word": (edit("categories.txt", "abbey 0", "abbey zero"), r"categories\.txt, line 1: class 'zero'"),
    "folders of two classes": (
        no_categories_and(edit("train.txt", "train/a/abbey/00000001.jpg 0", "train/a/abbey/00000001.jpg 1")),
        "do not tell the classes apart: put categories.txt",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name, mini, tmp_path):
    spoil, expected = BAD[name]
    spoil(mini)
    with pytest.raises(InputError, match=expected) as caught:
        scan(mini)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=expected):
        locate(mini, tmp_path / "store", show=False)
    assert not (tmp_path / "store").exists()


def test_images_that_cannot_be_used_are_one_line(mini, tmp_path):
    image = mini / "images/val/00000002.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot read 1 of 36 images: .*val/00000002\.jpg"):
        locate(mini, tmp_path / "store", workers=1, show=False)
    Image.new("RGB", (20, 16)).save(image)
    with pytest.raises(InputError, match=r"varying size .* 16x16 pixels, .*val/00000002\.jpg has 16x20"):
        locate(mini, tmp_path / "store", workers=1, show=False)


# Preparation and loaders


@pytest.fixture(scope="module", params=[(128, 128), (48, 40)], ids=["128x128", "48x40"])
def sized(request, tmp_path_factory) -> Path:
    return write_miniplaces(tmp_path_factory.mktemp("sized") / "miniplaces", *request.param)


@needs_ffcv
def test_every_loader_gives_the_same_batches_raw_and_prepared(sized, tmp_path):
    """To the bit, but for torchvision's rounding of places in training (see tests/kernels/test_crop.py)."""
    store = tmp_path / "store"
    assert known(sized, store) is None
    files = locate(sized, store, loader="torchvision", workers=2, show=False)
    betons = locate(sized, store, loader="ffcv", workers=2, show=False)
    prepare(sized, tmp_path / "out", workers=1, show=False)
    by_hand = locate(tmp_path / "out", store)
    assert known(sized, store) == betons[0]
    assert len({manifest.fingerprint for manifest, _ in (files, betons, by_hand)}) == 1
    assert by_hand[0].name == "miniplaces"
    assert by_hand[0].classes == CLASSES
    size = (by_hand[0].height, by_hand[0].width)
    assert choose_loader(*betons).name == "ffcv"
    reference = open_data(*betons, loader="ffcv")
    others = {
        "prepared by hand": open_data(*by_hand),
        "resident": open_data(*betons, loader="resident"),
        "resident from files": open_data(*files, loader="resident", workers=2),
        "torchvision": open_data(*files, loader="torchvision", workers=2),
    }
    for name, source in others.items():
        slack = 4 * torch.finfo(torch.float32).eps * max(size) / min(by_hand[0].std) if name == "torchvision" else 0
        for subset in (Subset(), Subset(classes=3, train_per_class=4, val_per_class=2)):
            for split, tolerance in (("train", slack), ("val", 0)):
                options = {"batch_size": 5, "subset": subset} | ({"seed": 2} if split == "train" else {})
                both = [getattr(one, split)(**options) for one in (source, reference)]
                for batches in both:
                    batches.set_epoch(3)
                for (images, labels), (expected, their_labels) in zip(*both, strict=True):
                    assert images.shape[1:] == (3, *size)
                    assert torch.equal(labels, their_labels)
                    assert (images - expected).abs().max() <= tolerance, (name, split)


@needs_ffcv
def test_a_subset_is_of_the_first_images_of_each_class(master, tmp_path):
    source = open_data(*locate(master, tmp_path, workers=1, show=False))
    train = source.train(seed=0, batch_size=6, subset=Subset(classes=3, train_per_class=2))
    names = sorted(scan(master).files["train"][sample] for sample in train.table().samples)
    assert names == [f"images/train/{name}/{number:08}.jpg" for name in CLASSES[:3] for number in (1, 2)]


def test_changed_files_are_seen(mini, tmp_path):
    place = locate(mini, tmp_path / "store", loader="torchvision", workers=1, show=False)
    assert place[0].source == str(mini.resolve())
    open_data(*place)
    os.utime(mini / "images/val/00000001.jpg", ns=(1, 1))
    with pytest.raises(InputError, match="have changed since they were prepared"):
        open_data(*place)
    again = locate(mini, tmp_path / "store", loader="torchvision", workers=1, show=False)
    assert again[0].fingerprint == place[0].fingerprint
    open_data(*again)


def test_the_same_images_elsewhere_are_read_from_there(mini, tmp_path):
    """In turn: what the store remembers of one folder must not name the other, which may be gone."""
    other = Path(shutil.copytree(mini, tmp_path / "other"))
    for folder in (mini, other, mini, other):
        manifest, where = locate(folder, tmp_path / "store", loader="torchvision", workers=1, show=False)
        assert manifest.source == str(folder.resolve())
        assert known(folder, tmp_path / "store") == load_manifest(where) == manifest
        if folder == other:
            open_data(manifest, where)
    shutil.rmtree(mini)
    assert next(iter(open_data(manifest, where).val(batch_size=12)))[0].shape == (12, 3, 16, 16)


@needs_ffcv
def test_the_script_prepares_it_named_or_not(master, tmp_path):
    for out, named in (("one", []), ("two", ["--dataset", "miniplaces"])):
        command = [sys.executable, ROOT / "scripts/prepare_data.py", *named, "--source", master, "--workers", "1"]
        done = subprocess.run([*command, "--out", tmp_path / out], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "24 train and 12 val images of 4 classes, 16x16" in done.stdout
    assert load_manifest(tmp_path / "one") == load_manifest(tmp_path / "two")


def test_the_wrong_name_and_a_download_are_one_line(master, raw_master, tmp_path, capsys):
    for arguments, expected in (
        (["--dataset", "tiny-imagenet", "--source", str(master)], "--dataset is tiny-imagenet, but "),
        (["--dataset", "miniplaces", "--source", str(raw_master)], "holds tiny-imagenet-200: leave --dataset away"),
        (["--dataset", "miniplaces", "--download"], "--download fetches Tiny ImageNet only"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert expected in error
    assert not (tmp_path / "out").exists()
