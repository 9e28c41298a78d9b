"""A small data set in each form: raw folder, prepared folder, generated."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastprune.loaders.publish import prepare
from fastprune.loaders.synthetic import SyntheticData

SMALL = SyntheticData(classes=3, train_per_class=20, val_per_class=6, size=16)


@pytest.fixture(scope="session")
def ffcv() -> None:
    """Skips where it is not installed."""
    if find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")


@pytest.fixture(scope="session")
def raw_master(tmp_path_factory) -> Path:
    """SMALL as JPEG files in Tiny ImageNet's layout. Not to be changed."""
    folder = tmp_path_factory.mktemp("raw") / "tiny-imagenet-200"
    SMALL.write_folder(folder)
    return folder


@pytest.fixture
def raw(raw_master, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(raw_master, tmp_path / "raw"))


@pytest.fixture(scope="session")
def prepared_master(ffcv, raw_master, tmp_path_factory) -> Path:
    """The same with .beton files. Not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "small"
    prepare(raw_master, out, workers=2, show=False)
    return out


@pytest.fixture
def prepared(prepared_master, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(prepared_master, tmp_path / "prepared"))


@pytest.fixture(scope="session")
def listed_master(raw_master, tmp_path_factory) -> Path:
    """The same as a manifest of image files, which needs no ffcv."""
    out = tmp_path_factory.mktemp("listed") / "small"
    prepare(raw_master, out, workers=1, beton=False, show=False)
    return out
