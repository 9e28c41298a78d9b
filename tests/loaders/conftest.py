"""A small data set in each form: raw folders of the three layouts, a prepared folder, generated."""

import itertools
import shutil
import signal
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastprune.loaders.preparation import prepare
from fastprune.loaders.synthetic import SyntheticData

SMALL = SyntheticData(classes=3, train_per_class=20, val_per_class=6, size=16)
CATEGORIES = ("a/abbey", "b/bakery/shop", "b/ballroom", "y/yard")
ANIMALS = ("bird", "cat", "dog")


def heed_interrupts() -> None:
    """For a process to be: a shell's background job ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def ffcv() -> None:
    """Skips where it is not installed."""
    if find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")


@pytest.fixture
def no_ffcv(monkeypatch) -> None:
    monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)


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
def prepared_master(raw_master, tmp_path_factory) -> Path:
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
    """The same as a manifest of image files."""
    out = tmp_path_factory.mktemp("listed") / "small"
    prepare(raw_master, out, workers=1, beton=False, show=False)
    return out


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def mini_master(tmp_path_factory) -> Path:
    """MiniPlaces as the archive and the lists are: 24x16 JPEG files, one grey, val in mixed order, a test split without
    labels. Not to be changed.
    """
    root, rng = tmp_path_factory.mktemp("mini") / "miniplaces", np.random.default_rng(0)
    train = [(f"train/{name}/{n:08}.jpg", label) for label, name in enumerate(CATEGORIES) for n in range(1, 7)]
    labels = rng.permutation(np.repeat(np.arange(len(CATEGORIES)), 3)).tolist()
    val = [(f"val/{number:08}.jpg", label) for number, label in enumerate(labels, start=1)]
    for name in [*(name for name, _ in train + val), "test/00000001.jpg"]:
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, 24, 16).convert("L" if name.endswith("abbey/00000002.jpg") else "RGB").save(path)
    for split, entries in (("train", train), ("val", val)):
        (root / f"{split}.txt").write_text("".join(f"{name} {label}\n" for name, label in entries))
    (root / "categories.txt").write_text("".join(f"/{name} {label}\n" for label, name in enumerate(CATEGORIES)))
    return root


@pytest.fixture
def mini(mini_master, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(mini_master, tmp_path / "mini"))


SIZES = [(40, 60), (100, 75), (5, 50), (37, 4), (24, 24), (9, 11), (28, 28), (64, 200), (23, 25), (150, 149)]


def write_animals(root: Path, sizes: Sequence[tuple[int, int]], train: int = 7, val: int = 5) -> Path:
    """train/<class>/ and val/<class>/: mostly JPEG, colour, without subsampling, progressive, grey, CMYK; PNG, also
    with alpha; one in a subfolder; beside them what is no image.
    """
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(["rgb", "grey", "progressive", "cmyk", "png", "444", "alpha", "rgb"])
    turn = itertools.cycle(sizes)
    for split, number in (("train", train), ("val", val)):
        for name in ANIMALS:
            folder = root / split / name
            (folder / "more").mkdir(parents=True)
            for i in range(number):
                image, kind = picture(rng, *next(turn)), next(kinds)
                path = folder / ("more" if i == 1 else ".") / f"{i}.{'png' if kind in ('png', 'alpha') else 'JPEG'}"
                mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(kind, "RGB")
                image.convert(mode).save(path, progressive=kind == "progressive", subsampling=0 if kind == "444" else 2)
            (folder / "notes.txt").write_text("no image")
            (folder / "._0.JPEG").write_bytes(b"hidden")
    return root


@pytest.fixture(scope="session")
def varied_master(tmp_path_factory) -> Path:
    """An image folder of several sizes: 21 training and 15 validation images. Not to be changed."""
    return write_animals(tmp_path_factory.mktemp("varied") / "animals", SIZES)


@pytest.fixture
def varied(varied_master, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(varied_master, tmp_path / "animals"))


@pytest.fixture
def equal_sized(tmp_path) -> Path:
    """An image folder of one size."""
    return write_animals(tmp_path / "animals", [(24, 32)])
