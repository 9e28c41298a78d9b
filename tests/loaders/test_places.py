"""What --data may be, and what is made of it, once."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from fastprune.errors import InputError
from fastprune.loaders import SyntheticData, choose_loader, known, load_manifest, locate, open_data, places
from fastprune.loaders.choice import LoaderChoice

DATA = SyntheticData(classes=2, train_per_class=5, val_per_class=2, size=8)
needs_ffcv = pytest.mark.usefixtures("ffcv")


@pytest.fixture
def no_ffcv(monkeypatch):
    monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)


def untouched(monkeypatch):
    """From here on nothing may be decoded or written."""
    for name in ("inspect", "write_betons", "publish"):
        monkeypatch.setattr(f"fastprune.loaders.publish.{name}", None)
    monkeypatch.setattr("fastprune.loaders.inspection.inspect", None)


def test_generated_images_need_no_folder(tmp_path):
    store = tmp_path / "store"
    for loader in ("auto", "synthetic"):
        assert locate(DATA, store, loader=loader) == (DATA.manifest(), None)
        assert choose_loader(DATA.manifest(), None, loader).name == "synthetic"
    assert locate("synthetic", store) == (SyntheticData().manifest(), None)
    assert known(DATA, store) == DATA.manifest()
    assert not store.exists()


def test_generated_images_as_files_once(tmp_path, monkeypatch):
    manifest, folder = locate(DATA, tmp_path, loader="torchvision", show=False)
    assert folder == tmp_path / "data" / f"{DATA.fingerprint[:16]}-files"
    assert manifest.fingerprint == DATA.fingerprint
    untouched(monkeypatch)
    monkeypatch.setattr(SyntheticData, "write_folder", None)
    assert locate(DATA, tmp_path, loader="torchvision", show=False) == (manifest, folder)
    assert open_data(manifest, folder).loader == "torchvision"


@needs_ffcv
def test_generated_images_as_beton_once(tmp_path, monkeypatch):
    manifest, folder = locate(DATA, tmp_path, loader="ffcv", workers=1, show=False)
    assert folder == tmp_path / "data" / DATA.fingerprint[:16]
    untouched(monkeypatch)
    assert locate(DATA, tmp_path, loader="ffcv", show=False) == (manifest, folder)
    assert choose_loader(manifest, folder) == LoaderChoice("ffcv", "the fastest here")


@needs_ffcv
def test_a_raw_folder_is_converted_once(raw, tmp_path, monkeypatch):
    store = tmp_path / "store"
    assert known(raw, store) is None
    assert not store.exists()
    manifest, folder = locate(raw, store, workers=2, show=False)
    assert folder == store / "data" / manifest.fingerprint[:16]
    assert {path.name for path in folder.iterdir()} == {"train.beton", "val.beton", "manifest.json"}
    assert {path.name for path in (store / "data").iterdir()} == {folder.name, "sources.json"}
    untouched(monkeypatch)
    assert locate(raw, store, show=False) == (manifest, folder)
    assert known(raw, store) == manifest
    os.utime(raw / "train/synthetic0/images/synthetic0_0000000.JPEG", ns=(9, 9))
    with pytest.raises(TypeError):  # wants to decode again
        locate(raw, store, show=False)


@needs_ffcv
def test_a_damaged_file_in_the_store_is_named_and_a_lost_one_made_again(raw, tmp_path):
    store = tmp_path / "store"
    manifest, folder = locate(raw, store, workers=1, show=False)
    (folder / "val.beton").write_bytes(b"short")
    with pytest.raises(InputError, match=r"val\.beton is truncated .* remove it"):
        locate(raw, store, show=False)
    (folder / "val.beton").unlink()
    again, _ = locate(raw, store, workers=1, show=False)
    assert again.fingerprint == manifest.fingerprint
    assert open_data(again, folder).loader == "ffcv"


@pytest.mark.usefixtures("no_ffcv")
def test_without_ffcv_a_raw_folder_is_read_as_it_is(raw, tmp_path, monkeypatch):
    store = tmp_path / "store"
    manifest, folder = locate(raw, store, workers=1, show=False)
    assert folder == store / "data" / f"{manifest.fingerprint[:16]}-files"
    assert {path.name for path in folder.iterdir()} == {"manifest.json"}
    choice = choose_loader(manifest, folder)
    assert choice == LoaderChoice("torchvision", "not ffcv: there are no .beton files")
    untouched(monkeypatch)
    assert locate(raw, store, show=False) == (manifest, folder)
    with pytest.raises(InputError, match="ffcv, which is not installed"):
        locate(raw, store, loader="ffcv", show=False)


def test_a_prepared_folder_is_taken_as_it_is(prepared_master, tmp_path):
    store = tmp_path / "store"
    manifest, folder = locate(prepared_master, store, show=False)
    assert (manifest, folder) == (load_manifest(prepared_master), prepared_master)
    assert known(prepared_master, store) == manifest
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
        locate(DATA, tmp_path, loader="tape")
    with pytest.raises(InputError, match="use --data synthetic"):
        locate(listed_master, tmp_path, loader="synthetic")


def test_auto_without_ffcv_takes_the_image_files(prepared_master, no_ffcv):
    manifest = load_manifest(prepared_master)
    assert choose_loader(manifest, prepared_master) == LoaderChoice("torchvision", "not ffcv: ffcv is not installed")
    with pytest.raises(InputError, match="ffcv is not installed"):
        choose_loader(manifest, prepared_master, "ffcv")


@pytest.mark.parametrize("ask", [known, locate])
def test_no_data_is_one_line(ask, tmp_path):
    for folder, expected in ((tmp_path / "nowhere", "no such data folder"), (tmp_path, "is empty")):
        with pytest.raises(InputError, match=expected):
            ask(folder, tmp_path / "x" / "store")
    assert not (tmp_path / "x").exists()


def test_a_lost_memory_of_sources_only_costs_time(raw, tmp_path):
    first = locate(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    (tmp_path / "store" / "data" / places.SOURCES).write_text("no json")
    assert locate(raw, tmp_path / "store", loader="torchvision", workers=1, show=False) == first
    assert list(json.loads((tmp_path / "store" / "data" / places.SOURCES).read_text())) == [str(raw.resolve())]


def test_generated_images_of_another_version_are_refused(monkeypatch):
    manifest = DATA.manifest()
    monkeypatch.setattr("fastprune.loaders.synthetic.VERSION", 99)
    with pytest.raises(InputError, match="another version"):
        open_data(manifest, None)


@pytest.mark.usefixtures("no_ffcv")
def test_a_store_that_cannot_be_written(raw, tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(InputError, match="cannot write to"):
        locate(raw, tmp_path / "store", show=False)
    shutil.rmtree(raw)
