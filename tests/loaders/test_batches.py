"""The same batches from every loader; nothing kept, nothing disturbed, nothing leaked; images of several sizes."""

import itertools
import random
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastprune.errors import InputError
from fastprune.loaders import Crop, Subset, SyntheticData, choose_loader, find_or_prepare, load_manifest, open_data
from fastprune.loaders import batches as module
from fastprune.loaders.augment import crop_boxes, epoch_order, flips, sample_seeds
from fastprune.loaders.batches import Batches, DataSource, select
from fastprune.loaders.beton import manifest_files, read_beton
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.readers.memory import empty_images, fill_from_betons, fill_from_samples
from fastprune.loaders.samples import folder_samples, read_image

ROOT = Path(__file__).resolve().parents[2]
DATA = SyntheticData(classes=4, train_per_class=15, val_per_class=5, size=16, seed=1)
# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Way(NamedTuple):
    """How images come to a loader: `kept` is the loader they are kept for."""

    kept: str
    loader: str
    workers: int = 0


ONE_SIZE = {
    "generated": Way("synthetic", "synthetic"),
    "resident, generated": Way("synthetic", "resident"),
    "resident from beton": Way("ffcv", "resident", 3),
    "resident from files": Way("torchvision", "resident", 2),
    "ffcv": Way("ffcv", "ffcv"),
    "torchvision": Way("torchvision", "torchvision"),
    "torchvision in 2 processes": Way("torchvision", "torchvision", 2),
}
ANY_SIZE = {
    "torchvision, cropping": Way("torchvision", "torchvision"),
    "torchvision, cropping in 2 processes": Way("torchvision", "torchvision", 2),
    "ffcv, cropping": Way("ffcv", "ffcv"),
}
CROP = Crop(24, 28, 24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def opened(request, store, varied_master):
    """Opens a way's data set, once."""
    kept: dict[str, DataSource] = {}

    def open_way(name: str) -> DataSource:
        if name not in kept:
            way, crop = (ONE_SIZE[name], None) if name in ONE_SIZE else (ANY_SIZE[name], CROP)
            if "ffcv" in way:
                request.getfixturevalue("ffcv")
            data = varied_master if crop else DATA
            place = find_or_prepare(data, store, loader=way.kept, any_size=crop is not None, workers=2, show=False)
            kept[name] = open_data(*place, loader=way.loader, crop=crop, workers=way.workers)
        return kept[name]

    return open_way


@pytest.fixture(params=ONE_SIZE)
def source(request, opened) -> DataSource:
    return opened(request.param)


@pytest.fixture(params=[*ONE_SIZE, *ANY_SIZE])
def any_source(request, opened) -> DataSource:
    return opened(request.param)


@pytest.fixture
def reference(opened) -> DataSource:
    return opened("generated")


def same(batches, others) -> bool:
    return all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(batches, others, strict=True))


# The same batches


@pytest.mark.parametrize("subset", [Subset(), Subset(2, 9, 3)], ids=["whole", "subset"])
def test_all_loaders_agree(source, reference, subset):
    """To the bit, but for torchvision's rounding of places in training (see tests/kernels/test_crop.py)."""
    slack = 4 * torch.finfo(torch.float32).eps * 16 / min(source.manifest.std)
    tolerance = slack if source.loader == "torchvision" else 0
    for batch_size in (1, 7):
        train, expected = (s.train(seed=3, batch_size=batch_size, subset=subset) for s in (source, reference))
        for epoch in (0, 5):
            train.set_epoch(epoch)
            expected.set_epoch(epoch)
            for (images, labels), (theirs, their_labels) in zip(train, expected, strict=True):
                assert torch.equal(labels, their_labels)
                assert (images - theirs).abs().max() <= tolerance
                assert images.stride() == theirs.stride()
        assert same(*(s.val(batch_size=batch_size, subset=subset) for s in (source, reference)))


def test_a_batch_is_what_its_table_says(reference):
    """The table itself against augment.py, over a subset: boxes belong to stored positions."""
    train = reference.train(seed=7, batch_size=5, subset=Subset(classes=3, train_per_class=4))
    train.set_epoch(2)
    samples, crops, mirrored, seeds = train.table()
    kept = np.array([15 * label + i for label in range(3) for i in range(4)])
    assert np.array_equal(samples, kept[epoch_order(7, 2, 12)][:10])
    whole_crops, whole_flips = crop_boxes(7, 2, np.arange(60), 16, 16)
    assert np.array_equal(crops, whole_crops[samples])
    assert np.array_equal(mirrored, whole_flips[samples])
    assert seeds is None
    assert torch.cat([labels for _, labels in train]).tolist() == (samples // 15).tolist()


def test_shapes_types_and_lengths(any_source):
    train, val = any_source.train(seed=0, batch_size=8), any_source.val(batch_size=8)
    for batches, split in ((train, "train"), (val, "val")):
        size = 16 if any_source.manifest.one_size else CROP.size(split)
        count = any_source.manifest.count(split)
        kept = list(batches)
        lengths = [8] * (count // 8) + ([count % 8] if split == "val" and count % 8 else [])
        assert [len(labels) for _, labels in kept] == lengths
        assert (len(batches), batches.images) == (len(lengths), sum(lengths))
        for images, labels in kept:
            assert images.shape == (len(labels), 3, size, size)
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.cat([labels for _, labels in kept]).tolist() == sorted([*range(len(any_source.manifest.classes))] * 5)


def test_an_epoch_does_not_depend_on_what_was_read_before(any_source):
    """For FFCV's own crops that is true of labels only, and said."""
    assert any_source.resumes == (any_source.manifest.one_size or any_source.loader == "torchvision")
    train = any_source.train(seed=0, batch_size=10)
    for epoch in range(3):
        train.set_epoch(epoch)
        straight = list(train)
    resumed = any_source.train(seed=0, batch_size=10)
    resumed.set_epoch(2)
    again = list(resumed)
    assert torch.equal(torch.cat([y for _, y in straight]), torch.cat([y for _, y in again]))
    assert same(straight, again) == any_source.resumes
    resumed.set_epoch(1)
    assert not same(straight, list(resumed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_float32_rounded(any_source, dtype):
    pairs = [(any_source.val(batch_size=8, dtype=dtype), any_source.val(batch_size=8))]
    if any_source.resumes:
        pairs += [tuple(any_source.train(seed=1, batch_size=7, dtype=kind) for kind in (dtype, torch.float32))]
    for short, full in pairs:
        for (images, labels), (expected, their_labels) in zip(short, full, strict=True):
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, expected.to(dtype))
            assert torch.equal(labels, their_labels)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        any_source.train(seed=1, batch_size=7, dtype=torch.float64)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(any_source, world_size):
    """Batches of 3 a rank and of 3 x ranks in all; every ranks-th image of val."""
    whole = any_source.train(seed=4, batch_size=3 * world_size)
    parts = [any_source.train(seed=4, batch_size=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batches in (whole, *parts):
        batches.set_epoch(3)
    assert [len(part) for part in parts] == [len(whole)] * world_size
    assert [part.images for part in parts] == [3 * len(whole)] * world_size
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(labels, torch.cat([share for _, share in shares]))
        if any_source.resumes:
            assert torch.equal(images, torch.cat([share for share, _ in shares]))
    images, labels = next(iter(any_source.val(batch_size=20)))
    for rank in range(world_size):
        part = any_source.val(batch_size=4, rank=rank, world_size=world_size)
        mine = list(part)
        assert (len(mine), part.images) == (len(part), len(labels[rank::world_size]))
        assert torch.equal(torch.cat([x for x, _ in mine]), images[rank::world_size])
        assert torch.equal(torch.cat([y for _, y in mine]), labels[rank::world_size])
    assert list(any_source.val(batch_size=4, subset=Subset(1, None, 1), rank=1, world_size=2)) == []


def test_two_runs_at_once_do_not_mix_and_batches_are_memory_of_their_own(any_source):
    runs = [any_source.train(seed=0, batch_size=10), any_source.val(batch_size=6)]
    alone = [[(images.clone(), labels.clone()) for images, labels in run] for run in runs]
    mixed = [[], []]
    for step in itertools.zip_longest(*runs):
        for kept, batch in zip(mixed, step, strict=True):
            kept += [batch] if batch is not None else []
    for a, b, exact in zip(alone, mixed, (any_source.resumes, True), strict=True):
        assert [y.tolist() for _, y in a] == [y.tolist() for _, y in b]
        assert same(a, b) or not exact
    assert len({images.data_ptr() for images, _ in (*mixed[0], *mixed[1])}) == sum(map(len, mixed))


def test_nothing_is_left_and_nothing_disturbed(any_source):
    """Threads after an epoch that is stopped early; random states and torch's number of threads."""
    torch.set_num_threads(2)
    before = set(threading.enumerate())
    try:
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        for batches in (any_source.train(seed=0, batch_size=4), any_source.val(batch_size=4)):
            next(iter(batches))
            list(batches)
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])
        assert states[2] == random.getstate()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    # Only a loader's own: the test runner starts threads of its own when it likes.
    names = ("ffcv", "torch", "fastprune", "concurrent")
    assert not [t for t in set(threading.enumerate()) - before if type(t).__module__.startswith(names)]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["ffcv", "resident"])
def test_memory_does_not_grow(prepared_master, ffcv, loader):
    """Anonymous memory of a process over 150 epochs, the first 30 of which may warm up."""
    code = (
        "import re, sys, threading\n"
        "from pathlib import Path\n"
        "from fastprune.loaders import load_manifest, open_data\n"
        "def used(): return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "folder = Path(sys.argv[1])\n"
        "source = open_data(load_manifest(folder), folder, loader=sys.argv[2])\n"
        "train, val = source.train(seed=0, batch_size=20), source.val(batch_size=8)\n"
        "for epoch in range(150):\n"
        "    train.set_epoch(epoch)\n"
        "    batches = len(list(train)) + len(list(val))\n"
        "    next(iter(train))\n"
        "    if epoch == 30: print(used(), threading.active_count())\n"
        "print(used(), threading.active_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, prepared_master, loader], capture_output=True, text=True, cwd=ROOT, check=True
    )
    (warm, threads), (end, threads_after) = [map(int, line.split()) for line in done.stdout.splitlines()]
    assert threads_after == threads
    assert end - warm < 8 * 1024, f"{(end - warm) / 1024} MiB more after 120 epochs"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6), st.integers(1, 5))
def test_select_keeps_the_first_of_each(labels, classes, per_class):
    expected, seen = [], dict.fromkeys(range(6), 0)
    for position, label in enumerate(labels):
        seen[label] += 1
        if label < classes and seen[label] <= per_class:
            expected.append(position)
    assert select(np.array(labels, np.int64), classes, per_class).tolist() == expected


def test_the_next_epoch_is_drawn_while_the_device_is_busy(monkeypatch):
    """With a device that only pretends: what is drawn after an epoch is what the next one reads."""
    reader = SimpleNamespace(
        device=torch.device("meta"),
        labels={"train": np.repeat(np.arange(4), 15)},
        images=lambda split, table, batch_size, dtype: (torch.empty(0) for _ in range(3)),
    )
    monkeypatch.setattr(module, "on_device", lambda values, device: torch.from_numpy(values))
    batches, fresh = (Batches(reader, DATA.manifest(), "train", np.arange(60), 20, 0) for _ in range(2))
    for epoch in (0, 1, 2, 7):
        batches.set_epoch(epoch)
        fresh.set_epoch(epoch)
        assert all(np.array_equal(a, b) for a, b in zip(batches.table()[:3], fresh.table()[:3], strict=True))
        assert torch.cat([labels for _, labels in batches]).tolist() == (fresh.table().samples // 15).tolist()
    monkeypatch.setattr(module, "crop_boxes", None)  # nothing is left to draw
    batches.set_epoch(8)
    assert len(batches.table().samples) == 60


# Images of several sizes


def by_hand(root: Path, seed: int, epoch: int, positions) -> list[torch.Tensor]:
    """torchvision's reference transforms, seeded for each sample."""
    from torchvision.transforms import RandomResizedCrop

    files, made = scan(root).files["train"], []
    draws = zip(positions, sample_seeds(seed, epoch, positions), flips(seed, epoch, positions), strict=True)
    for position, word, flip in draws:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(word))
            with Image.open(root / files[position]) as image:
                crop = RandomResizedCrop(24)(image.convert("RGB"))
        made.append(F.normalize(F.to_tensor(F.hflip(crop) if flip else crop), CROP.mean, CROP.std))
    return made


def test_training_is_torchvisions_own(opened, varied_master):
    train = opened("torchvision, cropping").train(seed=5, batch_size=4)
    train.set_epoch(2)
    order = epoch_order(5, 2, 21)
    for number, (images, labels) in enumerate(train):
        positions = order[4 * number : 4 * number + 4]
        torch.testing.assert_close(images, torch.stack(by_hand(varied_master, 5, 2, positions)), rtol=1e-5, atol=1e-5)
        assert labels.tolist() == (positions // 7).tolist()
    assert same(train, opened("torchvision, cropping in 2 processes").train(seed=5, batch_size=4)) is False
    other = opened("torchvision, cropping in 2 processes").train(seed=5, batch_size=4)
    other.set_epoch(2)
    assert same(train, other)


def test_validation_is_torchvisions_own(opened, varied_master):
    made = []
    for name in scan(varied_master).files["val"]:
        with Image.open(varied_master / name) as image:
            whole = image.convert("RGB")
        made.append(F.normalize(F.to_tensor(F.center_crop(F.resize(whole, [28]), [24, 24])), CROP.mean, CROP.std))
    images, _ = next(iter(opened("torchvision, cropping").val(batch_size=15)))
    torch.testing.assert_close(images, torch.stack(made), rtol=1e-5, atol=1e-5)


def test_ffcv_crops_the_same_images(opened):
    """Its resampling is OpenCV's, by area: validation agrees on the whole, not in each pixel."""
    fast, slow = (next(iter(opened(f"{name}, cropping").val(batch_size=15))) for name in ("ffcv", "torchvision"))
    assert torch.equal(fast[1], slow[1])
    for a, b in zip(fast[0], slow[0], strict=True):
        a, b = (F.resize(image, [6], antialias=True).flatten() for image in (a, b))
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9


def test_ffcv_crops_at_random_and_mirrors_as_said(tmp_path, ffcv):
    """An image whose columns brighten from left to right: the sign of its slope tells whether it was mirrored."""
    ramp = np.repeat(np.linspace(20, 235, 96).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "ramps" / name).mkdir(parents=True)
        for i in range(16):
            Image.fromarray(ramp).save(tmp_path / "ramps" / name / f"{i}.png")
    place = find_or_prepare(tmp_path / "ramps", tmp_path / "store", any_size=True, workers=1, show=False)
    train = open_data(*place, loader="ffcv", crop=CROP, workers=2).train(seed=1, batch_size=32)
    ((images, _),) = train
    columns = images.mean(dim=(1, 2))
    mirrored = (columns[:, 0] > columns[:, -1]).numpy()
    order = epoch_order(1, 0, 32)
    assert np.array_equal(mirrored, flips(1, 0, order))
    assert len({round(float(contrast), 3) for contrast in (columns[:, 0] - columns[:, -1]).abs()}) > 20


# Filling memory


def poisoned(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Memory for both splits that no image left like this."""
    shape = (manifest.height, manifest.width, 3)
    return {split: torch.full((manifest.count(split), *shape), 0xA5, dtype=torch.uint8) for split in ("train", "val")}


def test_images_may_lie_anywhere_in_the_file(prepared_master, raw_master, monkeypatch):
    """Out of order, some of them neighbours, in pieces of three images: each goes where it belongs."""
    monkeypatch.setattr("fastprune.loaders.readers.memory.AT_ONCE", 3 * 16 * 16 * 3)
    file = read_beton(prepared_master / "train.beton")
    order = np.array([5, 6, 7, 2, 40, 41, 0, 59, 3, 4])
    mixed = torch.full((10, 16, 16, 3), 0xA5, dtype=torch.uint8)
    part = replace(file, labels=file.labels[order], images=file.images[order], sizes=file.sizes[order])
    fill_from_betons({"train": mixed}, {"train": part}, workers=2, done=print)
    samples = folder_samples(scan(raw_master))["train"]
    assert np.array_equal(mixed.numpy(), np.stack([samples.image(i) for i in order]))


def test_image_files_are_decoded_by_processes(raw_master, listed_master, monkeypatch):
    monkeypatch.setattr("fastprune.loaders.samples.CHUNK", 7)
    samples = folder_samples(scan(raw_master))
    images, arrived = poisoned(load_manifest(listed_master)), []
    fill_from_samples(images, samples, workers=3, done=arrived.append)
    assert sum(arrived) == 78
    for split, part in samples.items():
        assert all(np.array_equal(image, read_image(part.name(i))) for i, image in enumerate(images[split]))


def test_beton_files_need_no_ffcv(prepared_master, no_ffcv, monkeypatch):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    source = open_data(load_manifest(prepared_master), prepared_master, loader="resident")
    assert [len(labels) for _, labels in source.val(batch_size=10)] == [10, 8]


# What cannot be read


def test_requests_that_cannot_be(any_source, reference):
    count = any_source.manifest.train_count
    for ask, expected in (
        (lambda: any_source.train(seed=0, batch_size=count + 1), f"{count + 1} is larger than the {count} training"),
        (lambda: any_source.train(seed=0, batch_size=count, world_size=2), f"{count} on each of 2 ranks is larger"),
        (lambda: any_source.val(batch_size=0), "batch size is 0"),
        (lambda: any_source.val(batch_size=1, subset=Subset(classes=9)), "9 classes requested"),
        (lambda: Crop(24, 28, 29, CROP.mean, CROP.std), "--val-crop-size 29 is larger than --val-resize-size 28"),
        (lambda: Crop(0, 28, 24, CROP.mean, CROP.std), "less than 1 pixel"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            ask()
        assert "\n" not in str(caught.value)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="ranks count from 0"):
            any_source.train(seed=0, batch_size=1, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="crop is required"):
        open_data(reference.manifest, None, crop=CROP)


BAD = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated"),
    "foreign": (lambda path: path.write_bytes(b"\x1f\x8b" * 5000), "not a .beton file"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("loader", ["ffcv", "resident"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_found_on_opening(name, split, loader, prepared, ffcv):
    spoil, expected = BAD[name]
    spoil(prepared / f"{split}.beton")
    for attempt in (
        lambda: open_data(load_manifest(prepared), prepared, loader=loader),
        lambda: find_or_prepare(prepared, prepared / "store", loader=loader),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_shrinks_while_it_is_read(prepared, workers):
    manifest = load_manifest(prepared)
    files = manifest_files(manifest, prepared)
    with open(prepared / "val.beton", "r+b") as file:
        file.truncate(int(files["val"].images["pointer"][3]) + 100)
    with pytest.raises(InputError, match=r"val\.beton is truncated: remove it"):
        fill_from_betons(poisoned(manifest), files, workers, print)
    (prepared / "train.beton").unlink()
    with pytest.raises(InputError, match=r"cannot read .*train\.beton: No such file"):
        fill_from_betons(poisoned(manifest), files, workers, print)


SPOIL = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), r"cannot read \S+{} \(.+\)"),
    "larger": (lambda path: Image.new("RGB", (17, 16)).save(path), r"\S+{} has changed its size"),
}


@pytest.mark.parametrize("loader", ["resident", "torchvision", "torchvision in a process"])
@pytest.mark.parametrize("name", SPOIL)
def test_spoilt_images_are_named(name, loader, raw, tmp_path):
    manifest, folder = find_or_prepare(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    spoil, expected = SPOIL[name]
    image = sorted((raw / "val").rglob("*.JPEG"))[-1]
    spoil(image)
    with pytest.raises(InputError, match="have changed since they were prepared"):
        open_data(manifest, folder, loader=loader.split()[0])
    manifest = replace(manifest, listing=scan(raw).listing())
    with pytest.raises(InputError) as caught:
        list(open_data(manifest, folder, loader=loader.split()[0], workers="process" in loader).val(batch_size=5))
    assert re.fullmatch(expected.format(re.escape(image.name)) + ": prepare the data again", str(caught.value))


@pytest.mark.parametrize("workers", [0, 1])
def test_spoilt_images_of_several_sizes_are_named(workers, varied, tmp_path):
    (varied / "val/cat/0.JPEG").write_bytes(b"<html>not found</html>")
    place = find_or_prepare(varied, tmp_path, loader="torchvision", any_size=True)
    source = open_data(*place, loader="torchvision", crop=CROP, workers=workers)
    with pytest.raises(InputError, match=r"cannot read \S+val/cat/0\.JPEG \(.*\): replace it or remove it") as caught:
        list(source.val(batch_size=4))
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit():
    huge = replace(DATA.manifest(), height=1 << 20, width=1 << 20)
    with pytest.raises(InputError, match=r"the images take [0-9.]+ GB, which cpu does not have free"):
        empty_images(huge, "train", torch.device("cpu"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ffcv_failing_in_its_thread_is_an_error_here(opened, monkeypatch):
    source = opened("ffcv")
    list(source.val(batch_size=20))
    from ffcv.loader.epoch_iterator import EpochIterator

    def fail(*args):
        raise OSError("unreadable")

    monkeypatch.setattr(EpochIterator, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="reading thread failed"):
        list(source.train(seed=0, batch_size=20))


def test_a_broken_ffcv_is_an_error_and_no_fallback(prepared_master, ffcv, monkeypatch):
    source = open_data(load_manifest(prepared_master), prepared_master)
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(InputError, match=r"cannot be imported .*: install it again, or use the loader torchvision"):
        next(iter(source.val(batch_size=4)))


# Which loader is chosen


@pytest.fixture
def free(monkeypatch):
    """Sets what a GPU has free."""
    return lambda count: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, 10 * count))


NEEDED = 80 * 16 * 16 * 3


@pytest.mark.parametrize("way", ["generated", "ffcv", "torchvision"])
def test_on_a_gpu_auto_is_resident_where_it_fits(way, opened, store, free):
    opened(way)
    manifest, folder = find_or_prepare(DATA, store, loader=ONE_SIZE[way].kept, show=False)
    free(2 * NEEDED)
    choice = choose_loader(manifest, folder, device="cuda:1")
    assert choice == ("resident", "0.00 GB of images fit into half of the 0.0 GB free on cuda:1")
    usual = choose_loader(manifest, folder)
    assert usual.name == ONE_SIZE[way].kept
    assert choose_loader(manifest, folder, device="cuda:1", copies=2).name == usual.name
    free(2 * NEEDED - 1)
    choice = choose_loader(manifest, folder, device="cuda:1")
    assert choice.name == usual.name
    assert choice.why.startswith("not resident: 0.00 GB of images are more than half of the 0.0 GB free on cuda:1")
    assert choose_loader(manifest, folder, "resident") == ("resident", "asked for")
    assert choose_loader(manifest, folder, "resident", device="cuda").name == "resident"  # the GPU is not asked


def test_nothing_to_fill_it_from(listed_master, tmp_path, free):
    free(1 << 40)
    gone = replace(load_manifest(listed_master), source=str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"loader resident cannot be used: the image folder .*gone is gone"):
        choose_loader(gone, listed_master, "resident")
    with pytest.raises(InputError, match=r"no loader can .*: not resident: the image folder .*gone is gone; not ffcv"):
        choose_loader(gone, listed_master, device="cuda")
    with pytest.raises(InputError, match="is not generated"):
        choose_loader(gone, None, "resident")


def test_the_words_count_in_gigabytes(free):
    free(80_000_000_000)
    many = replace(DATA.manifest(), train_per_class=(30_000,) * 4, val_per_class=(500,) * 4, height=64, width=64)
    assert choose_loader(many, None, device="cuda").why == "1.50 GB of images fit into half of the 80.0 GB free on cuda"
    assert choose_loader(many, None, device="cuda", copies=30).why.startswith("not resident: 30 x 1.50 GB of images")


# On a GPU


@pytest.mark.parametrize("way", ["generated", "ffcv", "torchvision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_nothing_waits_and_the_batches_are_the_same(way, dtype, device, store, opened):
    """Training pixels within the rounding of another processor, all else exactly."""
    if device.type == "cpu":
        pytest.skip("a CPU waits for nothing")
    opened(way)
    place = find_or_prepare(DATA, store, loader=ONE_SIZE[way].kept, show=False)
    gpu, cpu = (open_data(*place, loader="resident", device=where, workers=2) for where in (str(device), "cpu"))
    assert gpu.device.type == "cuda"
    for split, tolerance in (("train", 4 * torch.finfo(dtype).eps * 16 / min(gpu.manifest.std)), ("val", 0.0)):
        seed = {"seed": 3} if split == "train" else {}
        ours, theirs = (getattr(source, split)(batch_size=7, dtype=dtype, **seed) for source in (gpu, cpu))
        list(ours)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = list(ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for (images, labels), (expected, their_labels) in zip(batches, theirs, strict=True):
            assert images.is_cuda
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert (images.cpu().float() - expected.float()).abs().max() <= tolerance
            assert torch.equal(labels.cpu(), their_labels)
    for split in ("train", "val"):
        assert torch.equal(gpu._reader._images[split].cpu(), cpu._reader._images[split])
