"""What --data may be, and what is made of it, once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastprune.errors import InputError
from fastprune.loaders import (
    Crop,
    SyntheticData,
    catalog,
    choice,
    choose_loader,
    find_or_prepare,
    load_manifest,
    open_data,
    peek,
)
from fastprune.loaders.choice import LoaderChoice, without_ffcv

DATA = SyntheticData(classes=2, train_per_class=5, val_per_class=2, size=8)
needs_ffcv = pytest.mark.usefixtures("ffcv")


def untouched(monkeypatch):
    """From here on nothing may be decoded or written."""
    monkeypatch.setattr("fastprune.loaders.preparation.read_data_set", None)
    monkeypatch.setattr(SyntheticData, "write_folder", None)


def test_generated_images_need_no_folder(tmp_path):
    store = tmp_path / "store"
    for loader in ("auto", "synthetic"):
        assert find_or_prepare(DATA, store, loader=loader) == (DATA.manifest(), None)
        assert choose_loader(DATA.manifest(), None, loader).name == "synthetic"
    assert find_or_prepare("synthetic", store) == (SyntheticData().manifest(), None)
    assert peek(DATA, store) == DATA.manifest()
    assert not store.exists()


def test_generated_images_as_files_once(tmp_path, monkeypatch):
    manifest, folder = find_or_prepare(DATA, tmp_path, loader="torchvision", show=False)
    assert folder == tmp_path / "data" / f"{DATA.fingerprint[:16]}-files"
    assert manifest.fingerprint == DATA.fingerprint
    untouched(monkeypatch)
    assert find_or_prepare(DATA, tmp_path, loader="torchvision", show=False) == (manifest, folder)
    assert open_data(manifest, folder).loader == "torchvision"


@needs_ffcv
def test_generated_images_as_beton_once(tmp_path, monkeypatch):
    manifest, folder = find_or_prepare(DATA, tmp_path, loader="ffcv", workers=1, show=False)
    assert folder == tmp_path / "data" / DATA.fingerprint[:16]
    untouched(monkeypatch)
    assert find_or_prepare(DATA, tmp_path, loader="ffcv", show=False) == (manifest, folder)
    assert choose_loader(manifest, folder) == LoaderChoice("ffcv", "the fastest available")


@needs_ffcv
def test_a_raw_folder_is_converted_once(raw, tmp_path, monkeypatch):
    store = tmp_path / "store"
    assert peek(raw, store) is None
    assert not store.exists()
    manifest, folder = find_or_prepare(raw, store, workers=2, show=False)
    assert folder == store / "data" / manifest.fingerprint[:16]
    assert {path.name for path in folder.iterdir()} == {"train.beton", "val.beton", "manifest.json"}
    assert {path.name for path in (store / "data").iterdir()} == {folder.name, "sources.json"}
    untouched(monkeypatch)
    assert find_or_prepare(raw, store, show=False) == (manifest, folder)
    assert peek(raw, store) == manifest
    os.utime(raw / "train/synthetic0/images/synthetic0_0000000.JPEG", ns=(9, 9))
    with pytest.raises(TypeError):  # wants to decode again
        find_or_prepare(raw, store, show=False)


@needs_ffcv
def test_a_damaged_file_in_the_store_is_named_and_a_lost_one_made_again(raw, tmp_path):
    store = tmp_path / "store"
    manifest, folder = find_or_prepare(raw, store, workers=1, show=False)
    (folder / "val.beton").write_bytes(b"short")
    with pytest.raises(InputError, match=r"val\.beton is truncated .* remove it"):
        find_or_prepare(raw, store, show=False)
    (folder / "val.beton").unlink()
    again, _ = find_or_prepare(raw, store, workers=1, show=False)
    assert again.fingerprint == manifest.fingerprint
    assert open_data(again, folder).loader == "ffcv"


@pytest.mark.usefixtures("no_ffcv")
def test_without_ffcv_a_raw_folder_is_read_as_it_is(raw, tmp_path, monkeypatch):
    store = tmp_path / "store"
    manifest, folder = find_or_prepare(raw, store, workers=1, show=False)
    assert folder == store / "data" / f"{manifest.fingerprint[:16]}-files"
    assert {path.name for path in folder.iterdir()} == {"manifest.json"}
    choice = choose_loader(manifest, folder)
    assert choice == LoaderChoice("torchvision", "not ffcv: there are no .beton files")
    untouched(monkeypatch)
    assert find_or_prepare(raw, store, show=False) == (manifest, folder)
    with pytest.raises(InputError, match="ffcv needs ffcv, which is not installed"):
        find_or_prepare(raw, store, loader="ffcv", show=False)


@pytest.fixture
def broken_ffcv(ffcv, monkeypatch) -> Iterator[None]:
    """As where OpenCV is gone: its compiled part cannot be loaded."""

    def load(path: str) -> None:
        assert Path(path).name.startswith("_libffcv.")
        raise OSError("libopencv_core.so.4.6: cannot open shared object file")

    monkeypatch.setattr(choice, "CDLL", load)
    choice._broken.cache_clear()
    yield
    choice._broken.cache_clear()


@pytest.mark.usefixtures("broken_ffcv")
def test_where_ffcv_is_broken_auto_says_so_and_takes_the_next(raw, tmp_path):
    store = tmp_path / "store"
    manifest, folder = find_or_prepare(raw, store, workers=1, show=False)
    why = "is installed, but cannot be imported (libopencv_core.so.4.6: cannot open shared object file)"
    assert choose_loader(manifest, folder).name == "torchvision"
    assert without_ffcv() == why
    prepared = replace(manifest, train_file="train.beton", val_file="val.beton")
    assert choose_loader(prepared, folder) == LoaderChoice("torchvision", f"not ffcv: ffcv {why}")
    with pytest.raises(
        InputError, match=r"^loader ffcv needs ffcv, which is installed, but cannot be imported .*setup\.sh"
    ):
        find_or_prepare(raw, store, loader="ffcv", show=False)
    with pytest.raises(InputError, match=r"loader ffcv cannot be used: ffcv is installed, but cannot"):
        choose_loader(prepared, folder, "ffcv")


def test_a_prepared_folder_is_taken_as_it_is(prepared_master, tmp_path):
    store = tmp_path / "store"
    manifest, folder = find_or_prepare(prepared_master, store, show=False)
    assert (manifest, folder) == (load_manifest(prepared_master), prepared_master)
    assert peek(prepared_master, store) == manifest
    assert choose_loader(manifest, folder).name == "ffcv"
    assert choose_loader(manifest, folder, "torchvision") == LoaderChoice("torchvision", "asked for")
    assert not store.exists()


def test_the_same_images_have_one_fingerprint_by_every_way(prepared_master, listed_master):
    assert load_manifest(prepared_master).fingerprint == load_manifest(listed_master).fingerprint


def test_a_loader_that_cannot_work_is_an_error(listed_master, tmp_path, monkeypatch):
    manifest = load_manifest(listed_master)
    for loader, expected in (("ffcv", "no .beton files"), ("synthetic", "is not generated"), ("tape", "unknown")):
        with pytest.raises(InputError, match=expected):
            open_data(manifest, listed_master, loader=loader)
    gone = replace(manifest, source=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"the image folder .*gone is gone"):
        choose_loader(gone, listed_master, "torchvision")
    with pytest.raises(InputError, match="no loader can read the data"):
        choose_loader(gone, listed_master)
    with pytest.raises(InputError, match="unknown loader"):
        find_or_prepare(DATA, tmp_path, loader="tape")
    with pytest.raises(InputError, match="use --data synthetic"):
        find_or_prepare(listed_master, tmp_path, loader="synthetic")


def test_auto_without_ffcv_takes_the_image_files(prepared_master, no_ffcv):
    manifest = load_manifest(prepared_master)
    assert choose_loader(manifest, prepared_master) == LoaderChoice("torchvision", "not ffcv: ffcv is not installed")
    with pytest.raises(InputError, match="ffcv is not installed"):
        choose_loader(manifest, prepared_master, "ffcv")


@pytest.mark.parametrize("ask", [peek, find_or_prepare])
def test_no_data_is_one_line(ask, tmp_path):
    for folder, expected in ((tmp_path / "nowhere", "no such data folder"), (tmp_path, "is empty")):
        with pytest.raises(InputError, match=expected):
            ask(folder, tmp_path / "x" / "store")
    assert not (tmp_path / "x").exists()


def test_a_lost_memory_of_sources_only_costs_time(raw, tmp_path):
    first = find_or_prepare(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    (tmp_path / "store" / "data" / catalog.SOURCES).write_text("no json")
    assert find_or_prepare(raw, tmp_path / "store", loader="torchvision", workers=1, show=False) == first
    assert list(json.loads((tmp_path / "store" / "data" / catalog.SOURCES).read_text())) == [str(raw.resolve())]


def test_generated_images_of_another_version_are_refused(monkeypatch):
    manifest = DATA.manifest()
    monkeypatch.setattr("fastprune.loaders.synthetic.VERSION", 99)
    with pytest.raises(InputError, match="another version"):
        open_data(manifest, None)


@pytest.mark.usefixtures("no_ffcv")
def test_a_store_that_cannot_be_written(raw, tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match="cannot write to"):
        find_or_prepare(raw, tmp_path / "store", show=False)
    shutil.rmtree(raw)


# Images of several sizes


@needs_ffcv
def test_a_folder_of_several_sizes_is_prepared_once_and_once_more_when_images_change(varied, tmp_path, monkeypatch):
    store = tmp_path / "store"
    manifest, folder = find_or_prepare(varied, store, any_size=True, workers=2, show=False)
    assert (manifest.height, manifest.width, manifest.classes) == (0, 0, ("bird", "cat", "dog"))
    assert {path.name for path in folder.iterdir()} == {"train.beton", "val.beton", "manifest.json"}
    with monkeypatch.context() as patch:
        untouched(patch)
        assert find_or_prepare(varied, store, any_size=True, show=False) == (manifest, folder)
        assert find_or_prepare(folder, store, any_size=True, show=False) == (manifest, folder)
    assert choose_loader(manifest, folder).name == "ffcv"
    with pytest.raises(InputError, match="resident cannot be used: its images differ in size"):
        choose_loader(manifest, folder, "resident")
    for ask in (peek, find_or_prepare):
        with pytest.raises(InputError, match=r"differ in size: make them equal with scripts/prepare\.py --resize"):
            ask(folder, store)
    (varied / "train/cat/0.JPEG").unlink()
    again, other = find_or_prepare(varied, store, any_size=True, workers=2, show=False)
    assert again.train_count == manifest.train_count - 1
    assert other != folder


@pytest.mark.parametrize("loader", ["auto", "torchvision"])
def test_a_folder_of_several_sizes_is_read_as_it_is(varied, tmp_path, loader, monkeypatch):
    if loader == "auto":
        monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)
    (varied / "val/cat/0.JPEG").write_bytes(b"not opened yet")
    manifest, folder = find_or_prepare(varied, tmp_path / "store", loader=loader, any_size=True)
    assert (manifest.one_size, manifest.train_count, manifest.val_count) == (False, 21, 15)
    assert choose_loader(manifest, folder, loader).name == "torchvision"
    assert not (tmp_path / "store").exists()


def test_images_of_one_size_as_they_are_distributed_keep_it(raw, mini, tmp_path):
    for folder, size in ((raw, (16, 16)), (mini, (24, 16))):
        found = find_or_prepare(folder, tmp_path, loader="torchvision", any_size=True, workers=1, show=False)[0]
        assert (found.height, found.width) == size


def test_several_sizes_where_one_is_needed(varied, tmp_path):
    with pytest.raises(InputError, match=r"varying size.*prepare\.py --source DIR --out DIR --resize N"):
        find_or_prepare(varied, tmp_path / "store", loader="torchvision", workers=1, show=False)


def test_unreadable_images_are_named_before_anything_is_published(varied, tmp_path, ffcv):
    (varied / "val/cat/0.JPEG").write_bytes((varied / "val/cat/0.JPEG").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cannot read 1 of 36 images: .*val/cat/0\.JPEG \("):
        find_or_prepare(varied, tmp_path / "store", any_size=True, workers=2, show=False)
    assert not (tmp_path / "store").exists()


def test_the_same_images_elsewhere_are_read_from_there(mini, tmp_path):
    """In turn: what the store remembers of one folder must not name the other, which may be gone."""
    other = tmp_path / "other"
    shutil.copytree(mini, other)
    for folder in (mini, other, mini, other):
        manifest, where = find_or_prepare(folder, tmp_path / "store", loader="torchvision", workers=1, show=False)
        assert manifest.source == str(folder.resolve())
        assert peek(folder, tmp_path / "store") == load_manifest(where) == manifest
    shutil.rmtree(mini)
    assert next(iter(open_data(manifest, where).val(batch_size=12)))[0].shape == (12, 3, 24, 16)


# Files that FFCV wrote


@pytest.fixture(scope="session")  # a group's tests need not follow each other
def theirs(ffcv, varied_master, tmp_path_factory):
    """train_500_0.50_90.ffcv and val_500_0.50_90.ffcv, as FFCV's ImageNet example writes them."""
    code = (
        "import sys; from pathlib import Path; from torchvision.datasets import ImageFolder\n"
        "from ffcv.writer import DatasetWriter; from ffcv.fields import IntField, RGBImageField\n"
        "for split in ('train', 'val'):\n"
        "    images = ImageFolder(sys.argv[1] + '/' + split, is_valid_file=lambda p: p.endswith(('.png', '.JPEG')) and "
        "'/._' not in p)\n"
        "    field = RGBImageField(write_mode='proportion', max_resolution=500, compress_probability=0.5)\n"
        "    path = sys.argv[2] + f'/{split}_500_0.50_90.ffcv'\n"
        "    DatasetWriter(path, {'image': field, 'label': IntField()}, num_workers=1).from_indexed_dataset(images)\n"
    )
    out = tmp_path_factory.mktemp("theirs")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, varied_master, out], check=True, capture_output=True)
    return out


@pytest.mark.xdist_group("theirs")  # their files are written once
def test_files_that_ffcv_wrote_are_found_by_file_or_folder(theirs, tmp_path):
    found = [find_or_prepare(path, tmp_path, any_size=True) for path in (theirs, *theirs.iterdir())]
    assert found == [found[0]] * 3
    manifest, folder = found[0]
    assert (folder, manifest.classes, manifest.one_size) == (theirs, ("0", "1", "2"), False)
    assert (manifest.train_per_class, manifest.val_per_class) == ((7, 7, 7), (5, 5, 5))
    source = open_data(manifest, folder, crop=Crop(12, 14, 12, (0.5,) * 3, (0.25,) * 3))
    assert source.loader == "ffcv"
    images, labels = next(iter(source.val(batch_size=15)))
    assert images.shape == (15, 3, 12, 12)
    assert labels.tolist() == sorted([0, 1, 2] * 5)
    assert len(list(source.train(seed=0, batch_size=5))) == 4


def copy_of(folder, goal):
    return Path(shutil.copytree(folder, goal))


BAD = {
    "no val": (lambda d: next(d.glob("val*")).unlink(), r"needs one val\*\.beton beside .*, it holds none"),
    "two val": (
        lambda d: [next(d.glob("val*")).rename(d / "val_a.ffcv"), shutil.copy(d / "val_a.ffcv", d / "val_b.ffcv")],
        "it holds val_a.ffcv, val_b.ffcv",
    ),
    "truncated": (lambda d: next(d.glob("val*")).write_bytes(b"\2\0" + bytes(100)), "truncated|not a .beton file"),
    "gone": (lambda d: shutil.rmtree(d), "no such data folder|no such file"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.xdist_group("theirs")  # their files are written once
def test_pairs_of_files_that_are_none(name, theirs, tmp_path):
    folder = copy_of(theirs, tmp_path / "copy")
    spoil, expected = BAD[name]
    spoil(folder)
    for path in (folder, folder / "train_500_0.50_90.ffcv"):
        with pytest.raises(InputError, match=expected) as caught:
            find_or_prepare(path, tmp_path, any_size=True)
        assert "\n" not in str(caught.value)


@pytest.mark.xdist_group("theirs")  # their files are written once
def test_files_of_ffcv_need_ffcv(theirs, tmp_path, no_ffcv):
    with pytest.raises(InputError, match="not ffcv: ffcv is not installed; not torchvision: there are no image files"):
        choose_loader(*find_or_prepare(theirs, tmp_path, any_size=True))
