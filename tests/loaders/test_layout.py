"""Scanning the folder as distributed: order and labels as torchvision's ImageFolder, and one line for what is wrong."""

import os
import shutil

import pytest
from torchvision.datasets import ImageFolder

from fastprune.errors import InputError
from fastprune.loaders.layout import scan

ANNOTATIONS = "val/val_annotations.txt"


def rewrite(path, change):
    path.write_text(change(path.read_text()))


def test_order_and_labels_are_image_folders(raw):
    for class_folder in (raw / "train").iterdir():  # so that order by name and by number differ
        for number, path in enumerate(sorted((class_folder / "images").iterdir())):
            path.rename(path.with_name(f"{class_folder.name}_{number}.JPEG"))
    layout = scan(raw)
    theirs = ImageFolder(str(raw / "train"))
    assert list(layout.classes) == theirs.classes
    assert [str(layout.root / name) for name in layout.files["train"]] == [path for path, _ in theirs.samples]
    assert list(layout.labels["train"]) == theirs.targets
    assert layout.per_class("train") == (20, 20, 20)


def test_val_labels_come_from_the_annotations_in_order_of_names(raw):
    path = raw / "val" / "val_annotations.txt"
    expected = dict(line.split("\t")[:2] for line in path.read_text().splitlines())
    rewrite(path, lambda text: "".join(reversed(text.splitlines(keepends=True))))
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
    shutil.move(raw, above / "tiny-imagenet-200")
    assert scan(above).files == layout.files


def test_the_listing_changes_with_any_file(raw):
    before = scan(raw).listing()
    assert scan(raw).listing() == before
    image = raw / scan(raw).files["train"][7]
    os.utime(image, ns=(1, 1))
    after = scan(raw).listing()
    assert after != before
    rewrite(raw / "val" / "val_annotations.txt", lambda text: text.replace("synthetic0", "synthetic1", 1))
    assert scan(raw).listing() != after


def test_counts_other_than_distributed_are_remarked(raw):
    remark = scan(raw).remark()
    assert remark is not None
    assert "3 classes with 20 train, 6 val" in remark
    assert "\n" not in remark


def empty(raw):
    shutil.rmtree(raw)
    raw.mkdir()


def make_a_file(raw):
    shutil.rmtree(raw)
    raw.write_text("")


def empty_train(raw):
    empty(raw / "train")


def empty_class(raw):
    empty(raw / "train/synthetic1/images")


def empty_val(raw):
    empty(raw / "val" / "images")
    (raw / ANNOTATIONS).write_text("")


def name_a_missing_file(raw):
    next((raw / "val" / "images").iterdir()).unlink()


def copy_an_image(raw):
    image = next((raw / "val" / "images").iterdir())
    shutil.copy(image, image.with_name("val_more.JPEG"))


BAD = {
    "missing": (shutil.rmtree, "no such data folder"),
    "a file": (make_a_file, "not a folder"),
    "empty": (empty, "is empty"),
    "no train": (lambda raw: shutil.rmtree(raw / "train"), "holds neither Tiny ImageNet .* nor MiniPlaces"),
    "no classes": (empty_train, "no class folders"),
    "class without images": (empty_class, "no images in .*synthetic1"),
    "class without folder": (lambda raw: shutil.rmtree(raw / "train/synthetic1/images"), "missing folder"),
    "wnids disagree": (lambda raw: rewrite(raw / "wnids.txt", lambda t: t + "n01\n"), r"n01 \(wnids.txt only\)"),
    "wnids lack one": (lambda raw: rewrite(raw / "wnids.txt", lambda t: t[11:]), r"synthetic0 \(train only\)"),
    "no annotations": (lambda raw: (raw / ANNOTATIONS).unlink(), "missing .*val_annotations.txt"),
    "binary annotations": (lambda raw: (raw / ANNOTATIONS).write_bytes(b"\xff\xfe\x00"), "cannot read"),
    "annotated file missing": (name_a_missing_file, "names 1 images that are not in .*, first val_"),
    "image not annotated": (copy_an_image, "1 images in .* are not in .*, first val_more.JPEG"),
    "unknown class": (lambda raw: rewrite(raw / ANNOTATIONS, lambda t: t.replace("synthetic2", "n99", 1)), "line 13"),
    "twice": (lambda raw: rewrite(raw / ANNOTATIONS, lambda t: t + t.splitlines()[0] + "\n"), "annotated twice"),
    "no tab": (lambda raw: rewrite(raw / ANNOTATIONS, lambda t: t + "val_1.JPEG n01\n"), "line 19: expected"),
    "no val images": (empty_val, "no images"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name, raw):
    spoil, expected = BAD[name]
    spoil(raw)
    with pytest.raises(InputError, match=expected) as caught:
        scan(raw)
    assert "\n" not in str(caught.value)
