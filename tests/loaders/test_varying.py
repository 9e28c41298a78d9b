"""Images that vary in size: both loaders against torchvision, against each other, and against what can go wrong."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.datasets import ImageFolder

from fastprune.errors import InputError
from fastprune.loaders.augment import boxes, epoch_order
from fastprune.loaders.samples import read_image
from fastprune.loaders.varying import VaryingSource, open_varying
from fastprune.loaders.varying_folder import scan_images

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW: dict[str, Any] = {"train_crop": 24, "val_resize": 28, "val_crop": 24, "mean": MEAN, "std": STD}
# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SIZES = [(40, 60), (100, 75), (1, 50), (37, 1), (24, 24), (9, 11), (28, 28), (64, 200), (23, 25), (150, 149)]
# torch places taps in float32: an error of about size * eps of a pixel, times a contrast of 255.
GREY_LEVELS = 200 * torch.finfo(torch.float32).eps * 255


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_images(root: Path, per_class: dict[str, int], classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """Mostly JPEG: colour, without subsampling, progressive, grey, CMYK; PNG, also with alpha; one in a subfolder."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(["rgb", "grey", "progressive", "cmyk", "png", "444", "alpha", "rgb"])
    sizes = itertools.cycle(SIZES)
    for split, number in per_class.items():
        for name in classes:
            folder = root / split / name
            (folder / "more").mkdir(parents=True)
            for i in range(number):
                image, kind = picture(rng, *next(sizes)), next(kinds)
                path = folder / ("more" if i == 1 else ".") / f"{i}.{'png' if kind in ('png', 'alpha') else 'JPEG'}"
                mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(kind, "RGB")
                image.convert(mode).save(path, progressive=kind == "progressive", subsampling=0 if kind == "444" else 2)
            (folder / "notes.txt").write_text("no image")
            (folder / "._0.JPEG").write_bytes(b"hidden")
    return root


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    """21 training and 15 validation images. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("images") / "data", {"train": 7, "val": 5})


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def copy(master, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(master, tmp_path / "data"))


LOADERS: dict[str, dict[str, Any]] = {
    "torchvision": {"loader": "torchvision"},
    "torchvision in 2 processes": {"loader": "torchvision", "workers": 2},
    "ffcv": {"loader": "ffcv"},
    "ffcv in 3 threads": {"loader": "ffcv", "threads": 3},
}


@pytest.fixture(params=LOADERS, scope="module")
def source(request, master, cache) -> VaryingSource:
    options = LOADERS[request.param]
    if options["loader"] == "ffcv":
        request.getfixturevalue("ffcv")
    return open_varying(master, **VIEW, **options, cache=cache)


@pytest.fixture(scope="module")
def plain(master) -> VaryingSource:
    return open_varying(master, **VIEW, loader="torchvision")


def same(batches, others) -> bool:
    return all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(batches, others, strict=True))


def grey_levels(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in 255ths of full scale."""
    return float(((a - b).abs() * torch.tensor(STD).reshape(1, 3, 1, 1)).max() * 255)


# What the batches are


def test_training_is_torchvisions_on_our_boxes(source, master):
    images = ImageFolder(str(master), allow_empty=True)
    files = scan_images(master).files["train"]
    train = source.train(seed=5, batch_size=4)
    train.set_epoch(2)
    order = epoch_order(5, 2, 21)
    assert np.array_equal(train.samples(), order[:20])
    for number, (batch, labels) in enumerate(train):
        positions = order[4 * number : 4 * number + 4]
        expected = []
        for position in positions:
            pixels = images.loader(str(master / files[position]))
            whole = F.to_tensor(pixels)
            (box,), (flip,) = boxes(5, 2, np.array([position]), *whole.shape[1:])
            crop = F.resized_crop(whole, *box.tolist(), [24, 24], antialias=True)
            expected.append(F.normalize(F.hflip(crop) if flip else crop, MEAN, STD))
        assert grey_levels(batch, torch.stack(expected)) <= GREY_LEVELS
        assert labels.tolist() == (positions // 7).tolist()
        assert (batch.shape, batch.dtype, labels.dtype) == ((4, 3, 24, 24), torch.float32, torch.int64)
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_both_loaders_agree(ffcv, plain, master, cache):
    """To the last bit where the libraries that decode agree, as builds of libjpeg-turbo do; else within two levels."""
    from fastprune.loaders.varying_jpeg import decode_jpeg

    alike = True
    for name in itertools.chain(*scan_images(master).files.values()):
        pixels = decode_jpeg(np.fromfile(master / name, np.uint8))
        alike &= pixels is None or np.array_equal(pixels, read_image(master / name))
    fast = open_ffcv(master, cache)
    train, expected = fast.train(seed=2, batch_size=10), plain.train(seed=2, batch_size=10)
    pairs = [*zip(train, expected, strict=True), *zip(fast.val(), plain.val(), strict=True)]
    assert len(pairs) == 3
    for (images, labels), (theirs, their_labels) in pairs:
        assert torch.equal(labels, their_labels)
        assert torch.equal(images, theirs) if alike else grey_levels(images, theirs) <= 2


def test_validation_is_torchvisions(source, master):
    files = scan_images(master).files["val"]
    batches = list(source.val(batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == sorted([0, 1, 2] * 5)
    expected = []
    for name in files:
        whole = F.to_tensor(read_image(master / name))
        expected.append(F.normalize(F.center_crop(F.resize(whole, [28], antialias=True), [24, 24]), MEAN, STD))
    assert grey_levels(torch.cat([images for images, _ in batches]), torch.stack(expected)) <= GREY_LEVELS


def test_files_and_labels_are_imagefolders(master):
    ours = scan_images(master)
    for split in ("train", "val"):
        visible = ImageFolder(str(master / split), is_valid_file=lambda path: "/._" not in path and "notes" not in path)
        assert ours.classes == tuple(visible.classes)
        assert [str(ours.root / name) for name in ours.files[split]] == [path for path, _ in visible.samples]
        assert list(ours.labels[split]) == visible.targets


def test_an_epoch_does_not_depend_on_what_was_read_before(source):
    train = source.train(seed=0, batch_size=6)
    for epoch in range(3):
        train.set_epoch(epoch)
        straight = list(train)
    resumed = source.train(seed=0, batch_size=6)
    resumed.set_epoch(2)
    assert same(straight, list(resumed))
    resumed.set_epoch(1)
    assert not same(straight, list(resumed))


def test_workers_and_threads_change_no_bit(source, plain, master, cache):
    alone = plain if source.loader == "torchvision" else open_varying(master, **VIEW, loader="ffcv", cache=cache)
    for batch_size in (2, 5, 21):
        assert same(source.train(seed=1, batch_size=batch_size), alone.train(seed=1, batch_size=batch_size))
        assert same(source.val(batch_size=batch_size), alone.val(batch_size=batch_size))


def test_batches_are_memory_of_their_own(source):
    first, *_ = kept = list(source.train(seed=0, batch_size=3))
    copies = [(images.clone(), labels.clone()) for images, labels in kept]
    first[0].zero_()
    first[1].fill_(-1)
    assert same(kept[1:], copies[1:])


def test_two_runs_at_once_do_not_mix(source):
    runs = [source.train(seed=0, batch_size=3), source.val(batch_size=2)]
    alone = [list(run) for run in runs]
    mixed = [[], []]
    for step in itertools.zip_longest(*runs):
        for kept, batch in zip(mixed, step, strict=True):
            kept += [batch] if batch is not None else []
    assert all(same(a, b) for a, b in zip(alone, mixed, strict=True))


# Shards


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_of_training_make_the_global_batches(source, ranks):
    whole = list(source.train(seed=4, batch_size=3 * ranks))
    parts = [source.train(seed=4, batch_size=3, shard=(rank, ranks)) for rank in range(ranks)]
    assert {len(part) for part in parts} == {21 // (3 * ranks)} == {len(whole)}
    for (images, labels), *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([piece for piece, _ in pieces]))
        assert torch.equal(labels, torch.cat([piece for _, piece in pieces]))


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_shards_of_validation_cover_it_once(source, ranks):
    ((whole, labels),) = source.val(batch_size=15)
    for rank in range(ranks):
        part = source.val(batch_size=2, shard=(rank, ranks))
        pieces = list(part)
        assert len(part) == len(pieces)
        assert part.images == len(labels[rank::ranks]) == sum(len(y) for _, y in pieces)
        if pieces:
            assert torch.equal(torch.cat([x for x, _ in pieces]), whole[rank::ranks])
            assert torch.equal(torch.cat([y for _, y in pieces]), labels[rank::ranks])


def test_requests_that_cannot_be(source, master):
    assert (source.count("train"), source.count("val"), source.classes) == (21, 15, ("ant", "bee", "cat"))
    for bad, expected in [
        (lambda: source.train(batch_size=22), "22 on 1 ranks is larger than the 21"),
        (lambda: source.train(batch_size=8, shard=(0, 3)), "8 on 3 ranks is larger"),
        (lambda: source.val(batch_size=0), "batch size is 0"),
        (lambda: source.val(shard=(2, 2)), "shard 2 of 2"),
        (lambda: open_varying(master, **VIEW | {"val_crop": 29}), "val_crop 29 is larger than val_resize 28"),
        (lambda: open_varying(master, **VIEW | {"train_crop": 0}), "train_crop is 0"),
        (lambda: open_varying(master, **VIEW | {"std": (1, 0, 1)}), "three positive"),
        (lambda: open_varying(master, **VIEW | {"mean": (1, 0)}), "each of three channels"),
        (lambda: open_varying(master, **VIEW, loader="dali"), "unknown loader 'dali'"),
        (lambda: open_varying(master, **VIEW, threads=0), "0 threads"),
    ]:
        with pytest.raises(InputError, match=expected) as caught:
            bad()
        assert "\n" not in str(caught.value)


# Nothing left behind


def test_an_abandoned_epoch_leaves_no_thread_and_no_process(source):
    before = set(threading.enumerate())
    for _ in range(3):
        for _ in source.train(seed=0, batch_size=2):
            break
    started = set(threading.enumerate()) - before
    # Only a loader's own: the test runner starts threads of its own when it likes.
    names = ("ffcv", "torch", "fastprune", "concurrent")
    assert not [t for t in started if type(t).__module__.startswith(names)]
    assert not multiprocessing.active_children()


def test_an_abandoned_epoch_is_not_read_to_its_end(ffcv, master, cache, monkeypatch):
    """FFCV's thread would go on as long as somebody takes its batches."""
    import fastprune.loaders.varying_ffcv as module

    source = open_varying(master, **VIEW, loader="ffcv", cache=cache)
    made, requests = [], module.requests
    monkeypatch.setattr(module, "requests", lambda *given: made.append(1) or requests(*given))
    for _ in source.train(seed=0, batch_size=1):
        break
    assert len(made) <= 1 + module.AHEAD + 2  # taken, ready, in the making, and begun while it was being told


def test_random_states_and_thread_numbers_are_left_alone(source):
    torch.set_num_threads(2)
    try:
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        assert len(list(source.train(seed=0, batch_size=8))) + len(list(source.val(batch_size=8))) == 4
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# What can be wrong with a folder


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


BAD_FOLDERS = {
    "gone": (lambda root: shutil.rmtree(root), "no such data folder"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "has no folder val: expected"),
    "no classes": (lambda root: empty(root / "train"), "no class folders in"),
    "a class missing in val": (lambda root: shutil.rmtree(root / "val" / "bee"), r"first bee \(in train only\)"),
    "a class missing in train": (lambda root: shutil.rmtree(root / "train" / "cat"), r"first cat \(in val only\)"),
    "an empty class": (
        lambda root: [path.unlink() for path in (root / "train" / "ant").rglob("*.*") if path.is_file()],
        "no images in .*train/ant",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name, copy):
    spoil, expected = BAD_FOLDERS[name]
    spoil(copy)
    with pytest.raises(InputError, match=expected) as caught:
        open_varying(copy, **VIEW)
    assert "\n" not in str(caught.value)


BROKEN = {
    "empty": b"",
    "no image": b"<html>not found</html>" * 20,
    "half a JPEG": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_unreadable_image_is_named(request, loader, name, copy, tmp_path):
    options = LOADERS[loader]
    if options["loader"] == "ffcv":
        request.getfixturevalue("ffcv")
    path = copy / "val" / "bee" / "0.JPEG"
    content = BROKEN[name]
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        list(open_varying(copy, **VIEW, **options, cache=tmp_path / "cache").val(batch_size=4))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*/*"))


# .beton files


def open_ffcv(folder: Path, cache: Path) -> VaryingSource:
    return open_varying(folder, **VIEW, loader="ffcv", cache=cache)


def test_jpegs_are_kept_as_they_are_and_the_rest_as_pixels(ffcv, master, cache):
    from fastprune.loaders.varying_beton import RAW, read_table
    from fastprune.loaders.varying_cache import cache_folder

    open_ffcv(master, cache)
    images = scan_images(master)
    for split in ("train", "val"):
        table = read_table(cache_folder(images, cache) / f"{split}.beton")
        content = table.path.read_bytes()
        raw = 0
        for i, name in enumerate(images.files[split]):
            start = int(table.images["pointer"][i])
            stored, pixels = content[start : start + int(table.sizes[i])], read_image(master / name)
            assert (table.images["height"][i], table.images["width"][i]) == pixels.shape[:2]
            if table.images["mode"][i] == RAW:
                assert stored == pixels.tobytes()
                raw += 1
            else:
                assert stored == (master / name).read_bytes()
        assert raw == sum("png" in name or mode(master / name) == "CMYK" for name in images.files[split])


def mode(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_ffcvs_own_decoder_reads_the_files(ffcv, master, cache):
    """In a process of its own: FFCV changes types of numba for all code compiled later."""
    from fastprune.loaders.varying_cache import cache_folder

    open_ffcv(master, cache)
    code = (
        "import sys; from ffcv.loader import Loader; from ffcv.fields.rgb_image import CenterCropRGBImageDecoder\n"
        "from ffcv.fields.basics import IntDecoder\n"
        "pipelines = {'image': [CenterCropRGBImageDecoder((8, 8), 1.0)], 'label': [IntDecoder()], 'index': None}\n"
        "loader = Loader(sys.argv[1], batch_size=15, num_workers=1, os_cache=True, pipelines=pipelines)\n"
        "for images, labels in loader: print(images.shape, labels.reshape(-1).tolist())\n"
    )
    path = cache_folder(scan_images(master), cache) / "val.beton"
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == f"(15, 8, 8, 3) {sorted([0, 1, 2] * 5)}"


def test_files_are_written_once_and_again_when_images_change(ffcv, copy, tmp_path):
    cache = tmp_path / "cache"
    open_ffcv(copy, cache)
    (first,) = cache.iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert sorted(times) == ["train.beton", "val.beton", "varying.json"]
    assert json.loads((first / "varying.json").read_text())["listing"] == scan_images(copy).listing
    open_ffcv(copy, cache)
    assert times == {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    picture(np.random.default_rng(1), 30, 30).save(copy / "train" / "ant" / "new.png")
    assert open_ffcv(copy, cache).count("train") == 22
    assert len(list(cache.iterdir())) == 2


def test_which_loader_auto_is(ffcv, copy, tmp_path, monkeypatch):
    assert open_varying(copy, **VIEW).loader == "torchvision"
    assert open_varying(copy, **VIEW, cache=tmp_path / "cache").loader == "ffcv"
    assert open_varying(copy, **VIEW, loader="ffcv").loader == "ffcv"
    assert (tmp_path / ".fastprune").is_dir()
    assert open_varying(copy, **VIEW).loader == "ffcv"
    import fastprune.loaders.varying as module

    monkeypatch.setattr(module, "ffcv_is_there", lambda: False)
    assert open_varying(copy, **VIEW, cache=tmp_path / "cache").loader == "torchvision"


BAD_FILES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated"),
    "nearly empty": (lambda path: path.write_bytes(path.read_bytes()[:10]), "truncated"),
    "foreign": (lambda path: path.write_bytes(b"\x1f\x8b" * 5000), "no .beton file"),
    "gone": (lambda path: path.unlink(), "No such file"),
    "of another split": (lambda path: shutil.copy(other(path), path), "holds other images"),
    "without its tables": (lambda path: overwrite(path, 3200, bytes(400)), "is damaged"),
}


def other(path: Path) -> Path:
    return path.with_name("val.beton" if path.name == "train.beton" else "train.beton")


def overwrite(path: Path, position: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_found_on_opening(ffcv, name, split, master, cache, tmp_path):
    open_ffcv(master, cache)
    spoilt = Path(shutil.copytree(cache, tmp_path / "cache"))
    spoil, expected = BAD_FILES[name]
    (path,) = spoilt.glob(f"*/{split}.beton")
    spoil(path)
    with pytest.raises(InputError, match=expected) as caught:
        open_ffcv(master, spoilt)
    assert "\n" not in str(caught.value)


def test_a_json_of_other_images_is_refused(ffcv, master, cache, tmp_path):
    open_ffcv(master, cache)
    spoilt = Path(shutil.copytree(cache, tmp_path / "cache"))
    (path,) = spoilt.glob("*/varying.json")
    for content in ("{", "[]", path.read_text().replace('"listing": "', '"listing": "0')):
        path.write_text(content)
        with pytest.raises(InputError, match=r"varying\.json"):
            open_ffcv(master, spoilt)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_damaged_image_is_named_while_reading(ffcv, threads, master, cache, tmp_path):
    from fastprune.loaders.varying_beton import JPEG, read_table

    open_ffcv(master, cache)
    spoilt = Path(shutil.copytree(cache, tmp_path / "cache"))
    (path,) = spoilt.glob("*/val.beton")
    table = read_table(path)
    bad = int(np.flatnonzero(table.images["mode"] == JPEG)[2])
    overwrite(path, int(table.images["pointer"][bad]), bytes(200))
    source = open_varying(master, **VIEW, loader="ffcv", cache=spoilt, threads=threads)
    with pytest.raises(InputError, match=f"image {bad} in .*val.beton is damaged"):
        list(source.val(batch_size=5))
    assert len(list(source.train(batch_size=5))) == 4


def test_an_error_in_ffcvs_thread_is_raised_here(ffcv, master, cache, monkeypatch):
    import fastprune.loaders.varying_ffcv as module

    source = open_ffcv(master, cache)

    def fail(*given):
        raise RuntimeError("out of boxes")

    monkeypatch.setattr(module, "requests", fail)
    with pytest.raises(RuntimeError, match="out of boxes"):
        list(source.train(batch_size=5))


def test_a_disk_that_takes_nothing(ffcv, master, tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        cache = tmp_path / "file" / "cache"
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        cache = tmp_path / "locked" / "cache"
    with pytest.raises(InputError, match="cannot write to"):
        open_ffcv(master, cache)
