"""The manifest: what goes in comes out, and what cannot be read is one line."""

import json
from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.loaders.manifest import Manifest, Subset, load_manifest, save_manifest

MANIFEST = Manifest(
    name="made up",
    fingerprint="ab" * 32,
    classes=("a", "b", "c"),
    train_per_class=(5, 2, 3),
    val_per_class=(1, 1, 0),
    height=8,
    width=9,
    mean=(0.1, 0.2, 1 / 3),
    std=(0.25, 0.25, 0.25),
    train_file="train.beton",
    train_bytes=100,
    val_file="val.beton",
    val_bytes=50,
    source="/somewhere",
    listing="cd" * 32,
)


@pytest.mark.parametrize(
    "manifest",
    [MANIFEST, replace(MANIFEST, synthetic={"classes": 3}, source=None), replace(MANIFEST, height=0, width=0)],
    ids=["files", "synthetic", "several sizes"],
)
def test_round_trip(manifest, tmp_path):
    save_manifest(manifest, tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_counts():
    assert (MANIFEST.train_count, MANIFEST.val_count) == (10, 2)
    assert (MANIFEST.count("train"), MANIFEST.count("val")) == (10, 2)
    assert MANIFEST.file("val") == ("val.beton", 50)


def test_subsets_count_without_reading():
    assert Subset().count(MANIFEST, "train") == 10
    assert Subset(classes=2).count(MANIFEST, "train") == 7
    assert Subset(classes=2, train_per_class=3).count(MANIFEST, "train") == 5
    assert Subset(val_per_class=1).count(MANIFEST, "val") == 2
    for subset in (Subset(classes=4), Subset(classes=0), Subset(train_per_class=0), Subset(val_per_class=-1)):
        with pytest.raises(InputError):
            subset.count(MANIFEST, "train")


def spoil(**changes):
    def change(content):
        content.update(changes)
        return content

    return change


BAD = {
    "other version": (spoil(version=99), "version 99"),
    "no version": (lambda c: {k: v for k, v in c.items() if k != "version"}, "version None"),
    "a list": (lambda c: [1, 2], "version None"),
    "missing field": (lambda c: {k: v for k, v in c.items() if k != "std"}, "std"),
    "unknown field": (spoil(colour="red"), "colour"),
    "short fingerprint": (spoil(fingerprint="ab"), "fingerprint"),
    "counts of another length": (spoil(train_per_class=[1, 2]), "train_per_class"),
    "negative count": (spoil(val_per_class=[1, 2, -3]), "val_per_class"),
    "no deviation": (spoil(std=[0, 1, 1]), "std"),
    "not a number": (spoil(mean=[None, 1, 1]), "damaged"),
    "half a size": (spoil(height=0), "height"),
    "file elsewhere": (spoil(train_file="../train.beton"), "train_file"),
    "file without size": (spoil(val_bytes=None), "val_file"),
    "classes twice": (spoil(classes=["a", "a", "b"]), "classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    change, expected = BAD[name]
    save_manifest(MANIFEST, tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=expected) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_or_no_json(tmp_path):
    with pytest.raises(InputError, match=r"prepare\.py"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1,\n')
    with pytest.raises(InputError) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)
