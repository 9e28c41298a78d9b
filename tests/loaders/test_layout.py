"""Scanning the three layouts: order and labels, and one line for what is wrong."""

import os
import shutil
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from fastprune.errors import InputError
from fastprune.loaders import find_or_prepare
from fastprune.loaders.layout import ANNOTATIONS, DISTRIBUTED, MINIPLACES, TINY_IMAGENET, recognised, scan
from tests.loaders.conftest import ANIMALS, CATEGORIES


def change(path, edit):
    """Rewrites the lines of a list."""
    path.write_text("".join(f"{line}\n" for line in edit(path.read_text().splitlines())))


# Order and labels


def test_tiny_imagenets_train_is_as_image_folder_reads_it(raw):
    for class_folder in (raw / "train").iterdir():  # so that order by name and by number differ
        for number, path in enumerate(sorted((class_folder / "images").iterdir())):
            path.rename(path.with_name(f"{class_folder.name}_{number}.JPEG"))
    layout = scan(raw)
    theirs = ImageFolder(str(raw / "train"))
    assert list(layout.classes) == theirs.classes
    assert [str(layout.root / name) for name in layout.files["train"]] == [path for path, _ in theirs.samples]
    assert list(layout.labels["train"]) == theirs.targets
    assert layout.per_class("train") == (20, 20, 20)


def test_tiny_imagenets_val_is_labelled_by_its_annotations_in_order_of_names(raw):
    expected = dict(line.split("\t")[:2] for line in (raw / ANNOTATIONS).read_text().splitlines())
    change(raw / ANNOTATIONS, lambda lines: lines[::-1])
    layout = scan(raw)
    assert list(layout.files["val"]) == sorted(layout.files["val"])
    for name, label in zip(layout.files["val"], layout.labels["val"], strict=True):
        assert layout.classes[label] == expected[os.path.basename(name)]


def test_the_folder_above_and_missing_extras_will_do(raw, tmp_path):
    layout = scan(raw)
    (raw / "wnids.txt").unlink()
    (raw / "train" / ".DS_Store").write_text("")
    (raw / "train" / layout.classes[0] / f"{layout.classes[0]}_boxes.txt").write_text("")
    (raw / "val" / "images" / "Thumbs.db").write_text("")
    above = tmp_path / "above"
    above.mkdir()
    shutil.move(raw, above / TINY_IMAGENET)
    assert recognised(above) == TINY_IMAGENET
    assert scan(above).files == layout.files


@pytest.mark.parametrize("part", ["images", "images/train", "images/val", "images/train/a"])
def test_a_part_of_miniplaces_names_the_whole(mini, part):
    with pytest.raises(InputError, match=f"{part} is a part of a data set: give the whole, {mini}$"):
        scan(mini / part)


def test_a_folder_called_images_beside_a_list_is_one_like_any_other(varied, tmp_path):
    images = Path(shutil.copytree(varied, tmp_path / "images"))
    (tmp_path / "train.txt").write_text("a list of somebody's own\n")
    assert scan(images).files == scan(varied).files


def test_miniplaces_is_as_its_lists_say(mini):
    layout = scan(mini)
    assert layout.name == recognised(mini) == MINIPLACES
    assert layout.classes == CATEGORIES
    for split in ("train", "val"):
        lines = [line.split() for line in (mini / f"{split}.txt").read_text().splitlines()]
        assert layout.files[split] == tuple(f"images/{name}" for name, _ in lines)
        assert layout.labels[split] == tuple(int(label) for _, label in lines)
    for name in ("train.txt", "val.txt", "categories.txt"):
        change(mini / name, lambda lines: [*lines[::-1], "", "  "])
    shutil.rmtree(mini / "images" / "test")
    (mini / "images/train/a/abbey/00009999.jpg").write_bytes(b"no image, and not listed")
    assert scan(mini) == layout
    moved = "train/a/abbey/00000001.jpg"
    change(mini / "train.txt", lambda lines: [line.replace(f"{moved} 0", f"{moved} 3") for line in lines])
    relabelled = scan(mini)
    assert dict(zip(relabelled.files["train"], relabelled.labels["train"], strict=True))[f"images/{moved}"] == 3
    assert list(relabelled.labels["train"]) == sorted(relabelled.labels["train"])


def test_any_other_folder_is_as_image_folder_reads_it(varied):
    layout = scan(varied)
    assert (layout.name, layout.classes, recognised(varied)) == ("animals", ANIMALS, None)
    for split in ("train", "val"):
        theirs = ImageFolder(str(varied / split), is_valid_file=lambda path: "/._" not in path and "notes" not in path)
        assert [str(layout.root / name) for name in layout.files[split]] == [path for path, _ in theirs.samples]
        assert list(layout.labels[split]) == theirs.targets
    assert layout.remark() is None
    for split in ("train", "val"):  # as ImageNet has them elsewhere
        (varied / f"{split}.txt").write_text("bird/0.JPEG 0\n")
    assert scan(varied) == layout


def test_what_looks_like_tiny_imagenet_and_is_not(raw, varied):
    for split in ("train", "val"):
        (varied / split / "cat").rename(varied / split / "images")
    assert scan(varied).classes == ("bird", "dog", "images")
    layout = scan(raw)
    for name, label in zip(layout.files["val"], layout.labels["val"], strict=True):
        goal = raw / "val" / layout.classes[label]
        goal.mkdir(exist_ok=True)
        (raw / name).rename(goal / Path(name).name)
    (raw / "val" / "images").rmdir()  # sorted into classes, as many tools want it
    assert recognised(raw) is None
    assert scan(raw).labels["val"] == tuple(sorted(layout.labels["val"]))


def test_the_listing_changes_with_any_file(raw):
    before = scan(raw).listing()
    assert scan(raw).listing() == before
    os.utime(raw / scan(raw).files["train"][7], ns=(1, 1))
    after = scan(raw).listing()
    assert after != before
    change(raw / ANNOTATIONS, lambda lines: [lines[0].replace("synthetic0", "synthetic1"), *lines[1:]])
    assert scan(raw).listing() not in (before, after)


def test_names_that_are_not_utf_8(varied):
    os.rename(varied / "val/cat/0.JPEG", os.fsencode(varied / "val/cat") + b"/\xff.jpg")
    assert len(scan(varied).listing()) == 64


def test_links_are_followed_as_by_image_folder(varied, tmp_path):
    """A link to a file; two links to one folder outside; a link to another class; one that leads nowhere."""
    pool = tmp_path / "pool"
    shutil.copytree(varied / "val/dog", pool / "deep")
    (varied / "train/cat/linked.jpg").symlink_to(varied / "train/dog/0.JPEG")
    for name in ("first", "second"):
        (varied / "train/cat" / name).symlink_to(pool)
    (varied / "train/bird/dogs").symlink_to("../dog")
    (varied / "train/bird/nowhere").symlink_to("gone")
    layout = scan(varied)
    theirs = ImageFolder(
        str(varied / "train"), is_valid_file=lambda path: "/._" not in path and path.endswith((".JPEG", ".png", ".jpg"))
    )
    assert [str(layout.root / name) for name in layout.files["train"]] == [path for path, _ in theirs.samples]
    assert layout.per_class("train") == (7 + 7, 7 + 1 + 2 * 5, 7)


LOOPS = {
    "to itself": {"train/cat/more/loop": "."},
    "to the class": {"train/cat/more/loop": ".."},
    "to the split": {"train/cat/loop": ".."},
    "to the root, absolute": {"val/dog/loop": "ROOT"},
    "a class": {"train/all": ".", "val/all": "."},
    "of two classes": {"train/cat/a": "../dog", "train/dog/b": "../cat"},
    "by way of another folder": {"train/cat/a": "ROOT/pool", "pool/b": "ROOT/train/cat"},
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_links_is_one_line(name, varied, tmp_path):
    """Followed until the system refuses, it would give each image 41 times."""
    (varied / "pool").mkdir()
    for link, target in LOOPS[name].items():
        (varied / link).symlink_to(target.replace("ROOT", str(varied.resolve())))
    for ask in (lambda: scan(varied), lambda: find_or_prepare(varied, tmp_path / "store", any_size=True, show=False)):
        with pytest.raises(InputError, match=r"is a link to .*, which contains it: remove the link") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_link_to_a_file_that_is_gone_is_named(varied):
    (varied / "train/cat/linked.jpg").symlink_to("gone.jpg")
    with pytest.raises(InputError, match=r"cannot read the data folder .*/train/cat/linked\.jpg: No such file"):
        scan(varied).listing()


def test_counts_other_than_distributed_are_remarked(raw, mini_master):
    assert DISTRIBUTED[MINIPLACES][1:] == (100, 1000, 100)
    for folder, said in ((raw, "3 classes with 20 train, 6 val"), (mini_master, "4 classes with 6 train, 3 val")):
        remark = scan(folder).remark()
        assert remark is not None
        assert said in remark
        assert "\n" not in remark


# What is wrong


def empty(path):
    def spoil(root):
        shutil.rmtree(root / path)
        (root / path).mkdir()

    return spoil


def without(path):
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def edit(name, old, new):
    """Replaces the first `old` of a list."""

    def spoil(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return spoil


def add(name, line):
    return lambda root: change(root / name, lambda lines: [*lines, line])


def write(name, content):
    return lambda root: (root / name).write_bytes(content)


def rename(old, new):
    return lambda root: (root / old).rename(root / new)


def as_gifs(path):
    """Gives each image below a folder the name of a GIF."""

    def spoil(root):
        for image in [*(root / path).rglob("*.JPEG"), *(root / path).rglob("*.png")]:
            image.rename(image.with_suffix(".GIF"))

    return spoil


ACCEPTED = r"images are read from \.jpg, \.jpeg, \.png, \.ppm, \.bmp, \.pgm, \.tif, \.tiff, \.webp$"


def become_a_file(root):
    shutil.rmtree(root)
    root.write_text("")


BAD = {
    "raw": {
        "missing": (without("."), "no such data folder"),
        "a file": (become_a_file, "not a folder"),
        "empty": (empty("."), "is empty"),
        "no train": (without("train"), "holds neither Tiny ImageNet .* nor MiniPlaces"),
        "no classes": (empty("train"), "no class folders"),
        "class without images": (empty("train/synthetic1/images"), "no images in .*synthetic1"),
        "GIFs": (
            as_gifs("train/synthetic1"),
            rf"no images in .*/train/synthetic1/images, only other files \(20 \.gif\): convert them, {ACCEPTED}",
        ),
        "GIFs in val": (
            as_gifs("val"),
            rf"no images in .*/val/images, only other files \(18 \.gif\): convert them, {ACCEPTED}",
        ),
        "class without folder": (without("train/synthetic1/images"), "missing folder"),
        "wnids disagree": (add("wnids.txt", "n01"), r"n01 \(wnids.txt only\)"),
        "wnids lack one": (edit("wnids.txt", "synthetic0", ""), r"synthetic0 \(train only\)"),
        "no annotations": (without(ANNOTATIONS), "missing .*val_annotations.txt"),
        "binary annotations": (write(ANNOTATIONS, b"\xff\xfe\x00"), "cannot read"),
        "annotated file missing": (without("val/images/val_0000003.JPEG"), "names 1 images .* first val_0000003"),
        "image not annotated": (rename("val/images/val_0000003.JPEG", "val/images/x.JPEG"), "names 1 images"),
        "unknown class": (edit(ANNOTATIONS, "synthetic2", "n99"), "line 13"),
        "twice": (lambda root: change(root / ANNOTATIONS, lambda lines: [*lines, lines[0]]), "annotated twice"),
        "no tab": (add(ANNOTATIONS, "val_1.JPEG n01"), "line 19: expected"),
        "no val images": (lambda root: [empty("val/images")(root), write(ANNOTATIONS, b"")(root)], "no images"),
    },
    "varied": {
        "no val": (without("val"), "has no folder val: expected train/<class>/ and val/<class>/"),
        "no classes in val": (empty("val"), "no class folders in .*val"),
        "no classes in train": (empty("train"), "no class folders in .*train"),
        "a class in val only": (without("train/cat"), r"first cat \(in val only\)"),
        "a class in train only": (without("val/dog"), "disagree on 1 classes, first dog"),
        "an empty class": (empty("train/bird"), "no images in .*train/bird: unpack the data set again, or remove"),
        "hidden files": (
            lambda root: [empty("val/cat")(root), write("val/cat/._0.jpg", b"")(root)],
            "no images in .*val/cat: unpack the data set again",
        ),
        "no extension": (
            lambda root: [empty("val/cat")(root), write("val/cat/x", b"")(root)],
            r"\(1 without extension\): convert them",
        ),
        "GIFs": (
            as_gifs("train/bird"),
            rf"no images in .*/train/bird, only other files \(7 \.gif, 1 \.txt\): convert them, {ACCEPTED}",
        ),
        "a class without val images": (empty("val/bird"), "no images in .*val/bird"),
    },
    "mini": {
        "no train list": (without("train.txt"), r"missing .*/train\.txt: put train\.txt, val\.txt and categories\.txt"),
        "no val list": (without("val.txt"), r"missing .*/val\.txt: put"),
        "no categories": (without("categories.txt"), r"missing .*/categories\.txt: put"),
        "no train images": (without("images/train"), "neither Tiny ImageNet .* nor MiniPlaces"),
        "no val images": (without("images/val"), r"val\.txt names 12 images .* not in .*, first val/00000001\.jpg"),
        "an image is missing": (without("images/train/b/ballroom/00000003.jpg"), "1 images that are not in .*00000003"),
        "a folder for an image": (edit("train.txt", "abbey/00000001.jpg", "abbey"), "not in .*, first train/a/abbey"),
        "empty list": (write("val.txt", b"\n"), r"val\.txt names no images"),
        "binary list": (write("train.txt", b"\xff\xfe\x00"), r"cannot read .*train\.txt"),
        "no class": (edit("train.txt", "00000002.jpg 0", "00000002.jpg"), r"train\.txt, line 2: expected a name and"),
        "three columns": (edit("val.txt", "00000003.jpg ", "00000003.jpg 1 "), r"val\.txt, line 3: expected .*\.jpg 0"),
        "a word": (edit("train.txt", "00000001.jpg 0", "00000001.jpg zero"), "line 1: class 'zero' is no whole number"),
        "negative": (edit("train.txt", "00000001.jpg 0", "00000001.jpg -1"), "class '-1' is no whole number"),
        "many digits": (edit("train.txt", "00000001.jpg 0", "00000001.jpg " + "9" * 5000), "is no whole number"),
        "other digits": (edit("train.txt", "00000001.jpg 0", "00000001.jpg ²"), "is no whole number"),
        "above": (edit("train.txt", "00000001.jpg 0", "00000001.jpg 4"), r"of class 4, .*categories\.txt are 0 to 3"),
        "above in val": (add("val.txt", "val/00000013.jpg 4"), r"val\.txt, line 13: val/00000013.jpg is of class 4"),
        "class without image": (add("categories.txt", "/z/zoo 4"), r"no image of 1 of the 5 classes .* first class 4"),
        "outside": (edit("train.txt", "train/a/", "train/../../a/"), r"'train/\.\./\.\./a/.*' is no path below train/"),
        "absolute": (edit("train.txt", "train/a/", "/train/a/"), "is no path below train/"),
        "same by another name": (add("train.txt", "train/./a/abbey/00000001.jpg 0"), "is no path below train/"),
        "null byte": (edit("train.txt", "train/a/", "train/\0a/"), "is no path below train/"),
        "val in train": (
            add("train.txt", "val/00000001.jpg 0"),
            r"train\.txt, line 25: 'val/0.* is no path below",
        ),
        "twice": (add("train.txt", "train/a/abbey/00000001.jpg 0"), "line 25: .* is listed twice"),
        "category twice": (add("categories.txt", "/z/zoo 3"), r"categories\.txt, line 5: class 3 .* is listed twice"),
        "name twice": (add("categories.txt", "/a/abbey 4"), "name '/a/abbey' is listed twice"),
        "no name": (edit("categories.txt", "/a/abbey", "/"), "is listed twice, or is empty"),
        "category missing": (edit("categories.txt", "/a/abbey 0\n", ""), "names 3 classes, but not class 0"),
        "empty categories": (write("categories.txt", b""), "names no classes"),
    },
}


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout, table in BAD.items() for name in table])
def test_bad_folders_are_one_line(layout, name, request, tmp_path):
    root = request.getfixturevalue(layout)
    spoil, expected = BAD[layout][name]
    spoil(root)
    for ask in (lambda: scan(root), lambda: find_or_prepare(root, tmp_path / "store", any_size=True, show=False)):
        with pytest.raises(InputError, match=expected) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()
