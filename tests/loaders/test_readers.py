"""The same batches from every loader; nothing kept, nothing disturbed, nothing leaked."""

import itertools
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.errors import InputError
from fastprune.loaders import Subset, SyntheticData, load_manifest, locate, open_data
from fastprune.loaders.augment import boxes, epoch_order
from fastprune.loaders.beton import check_beton
from fastprune.loaders.source import DataSource, select

ROOT = Path(__file__).resolve().parents[2]
DATA = SyntheticData(classes=4, train_per_class=15, val_per_class=5, size=16, seed=1)
# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
LOADERS = {"synthetic": 0, "resident": 0, "ffcv": 0, "torchvision": 0, "torchvision in 2 processes": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(params=LOADERS, scope="module")
def source(request, store) -> DataSource:
    loader = request.param.split()[0]
    if loader == "ffcv":
        request.getfixturevalue("ffcv")
    manifest, folder = locate(DATA, store, loader=loader, workers=1, show=False)
    return open_data(manifest, folder, loader=loader, workers=LOADERS[request.param])


@pytest.fixture(scope="module")
def reference() -> DataSource:
    return open_data(DATA.manifest(), None)


@pytest.mark.parametrize("subset", [Subset(), Subset(2, 9, 3)], ids=["whole", "subset"])
def test_all_loaders_agree(source, reference, subset):
    """Training pixels within torchvision's rounding of places (see tests/kernels/test_crop.py), all else exactly."""
    tolerance = 4 * torch.finfo(torch.float32).eps * 16 / min(source.manifest.std)
    train = source.train(seed=3, batch_size=8, subset=subset)
    expected = reference.train(seed=3, batch_size=8, subset=subset)
    for epoch in (0, 5):
        train.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert all(np.array_equal(a, b) for a, b in zip(train.table(), expected.table(), strict=True))
        for (images, labels), (theirs, their_labels) in zip(train, expected, strict=True):
            assert torch.equal(labels, their_labels)
            assert (images - theirs).abs().max() <= tolerance
            assert images.shape == (8, 3, 16, 16)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
    val, expected = (s.val(batch_size=8, subset=subset) for s in (source, reference))
    for (images, labels), (theirs, their_labels) in zip(val, expected, strict=True):
        assert torch.equal(labels, their_labels)
        assert torch.equal(images, theirs)


def test_a_batch_is_what_its_table_says(reference):
    """The table itself against augment.py, over a subset: boxes belong to stored positions."""
    train = reference.train(seed=7, batch_size=5, subset=Subset(classes=3, train_per_class=4))
    train.set_epoch(2)
    samples, crops, flips = train.table()
    kept = np.array([15 * label + i for label in range(3) for i in range(4)])
    assert np.array_equal(samples, kept[epoch_order(7, 2, 12)][:10])
    whole_crops, whole_flips = boxes(7, 2, np.arange(60), 16, 16)
    assert np.array_equal(crops, whole_crops[samples])
    assert np.array_equal(flips, whole_flips[samples])
    assert torch.cat([labels for _, labels in train]).tolist() == (samples // 15).tolist()


def test_lengths(source):
    train, val = source.train(seed=0, batch_size=16), source.val(batch_size=16)
    assert (len(train), len(list(train)), train.images) == (3, 3, 48)
    assert (len(val), [len(labels) for _, labels in val], val.images) == (2, [16, 4], 20)
    assert torch.cat([labels for _, labels in val]).tolist() == sorted([0, 1, 2, 3] * 5)


def test_an_epoch_does_not_depend_on_what_was_read_before(source):
    train = source.train(seed=0, batch_size=20)
    for epoch in range(3):
        train.set_epoch(epoch)
        straight = list(train)
    resumed = source.train(seed=0, batch_size=20)
    resumed.set_epoch(2)
    assert all(torch.equal(a, b) and torch.equal(y, z) for (a, y), (b, z) in zip(straight, list(resumed), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_float32_rounded(source, dtype):
    for short, full in (
        (source.train(seed=1, batch_size=20, dtype=dtype), source.train(seed=1, batch_size=20)),
        (source.val(batch_size=8, dtype=dtype), source.val(batch_size=8)),
    ):
        for (images, labels), (expected, their_labels) in zip(short, full, strict=True):
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, expected.to(dtype))
            assert torch.equal(labels, their_labels)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        source.train(seed=1, batch_size=20, dtype=torch.float64)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_what_one_process_sees(source, ranks):
    """11 for each rank: 60 images are 2 batches of 22, or 1 of 33, and a rest that is dropped."""
    whole = source.train(seed=4, batch_size=11 * ranks)
    parts = [source.train(seed=4, batch_size=11, shard=(rank, ranks)) for rank in range(ranks)]
    for batches in (whole, *parts):
        batches.set_epoch(3)
    assert [len(part) for part in parts] == [len(whole)] * ranks
    assert [part.images for part in parts] == [11 * len(whole)] * ranks
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(images, torch.cat([share for share, _ in shares]))
        assert torch.equal(labels, torch.cat([share for _, share in shares]))


def test_ranks_share_the_validation_samples(source):
    images, labels = next(iter(source.val(batch_size=20)))
    for rank in range(3):
        part = source.val(batch_size=4, shard=(rank, 3))
        mine = list(part)
        assert len(mine) == len(part) == 2
        assert part.images == len(labels[rank::3])
        assert torch.equal(torch.cat([x for x, _ in mine]), images[rank::3])
        assert torch.equal(torch.cat([y for _, y in mine]), labels[rank::3])
    assert list(source.val(batch_size=4, subset=Subset(1, None, 1), shard=(1, 2))) == []


def test_shards_that_cannot_be(source):
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="ranks count from 0"):
            source.train(seed=0, batch_size=1, shard=shard)
    with pytest.raises(InputError, match="batch size 21 on each of 3 ranks is larger than the 60 training images"):
        source.train(seed=0, batch_size=21, shard=(0, 3))


def test_two_runs_at_once_do_not_mix(source):
    runs = [source.train(seed=0, batch_size=10), source.train(seed=1, batch_size=6)]
    alone = [list(run) for run in runs]
    mixed = [[], []]
    for step in itertools.zip_longest(*runs):
        for kept, batch in zip(mixed, step, strict=True):
            kept += [batch] if batch is not None else []
    for a, b in zip(alone, mixed, strict=True):
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(a, b, strict=True))


def test_stopping_early_leaves_no_thread(source):
    before = set(threading.enumerate())
    for _ in range(3):
        for _ in source.train(seed=0, batch_size=4):
            break
    # Only a loader's own: the test runner starts threads of its own when it likes.
    started = set(threading.enumerate()) - before
    assert not [t for t in started if type(t).__module__.startswith(("ffcv", "torch", "fastprune"))]


def test_random_states_and_threads_are_left_alone(source):
    torch.set_num_threads(2)
    try:
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        for _ in source.train(seed=0, batch_size=8):
            pass
        for _ in source.val(batch_size=8):
            pass
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])
        assert states[2] == random.getstate()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_sizes_that_cannot_be(source):
    with pytest.raises(InputError, match="batch size 61 is larger than the 60 training images"):
        source.train(seed=0, batch_size=61)
    with pytest.raises(InputError, match="batch size is 0"):
        source.val(batch_size=0)
    with pytest.raises(InputError, match="9 classes asked for"):
        source.val(batch_size=1, subset=Subset(classes=9))
    assert len(source.val(batch_size=1000)) == 1


@pytest.mark.parametrize("loader", ["ffcv", "resident"])
def test_memory_does_not_grow(prepared_master, loader):
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


# FFCV


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ffcv_failing_in_its_thread_is_an_error_here(prepared_master, monkeypatch):
    iterator = pytest.importorskip("ffcv.loader.epoch_iterator").EpochIterator
    source = open_data(load_manifest(prepared_master), prepared_master, loader="ffcv")

    def fail(*args):
        raise OSError("unreadable")

    monkeypatch.setattr(iterator, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match="reading thread failed"):
        list(source.train(seed=0, batch_size=20))


BAD = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated"),
    "foreign": (lambda path: path.write_bytes(b"\x1f\x8b" * 5000), "no .beton file"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("loader", ["ffcv", "resident"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_found_on_opening(name, split, loader, prepared):
    spoil, expected = BAD[name]
    spoil(prepared / f"{split}.beton")
    for attempt in (
        lambda: open_data(load_manifest(prepared), prepared, loader=loader),
        lambda: locate(prepared, prepared / "store", loader=loader),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_broken_ffcv_is_an_error_and_no_fallback(prepared, monkeypatch):
    source = open_data(load_manifest(prepared), prepared)
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(InputError, match=r"cannot be imported .*: install it again, or use the loader torchvision"):
        next(iter(source.val(batch_size=4)))


def test_ffcv_reads_labels_of_the_file(prepared_master):
    source = open_data(load_manifest(prepared_master), prepared_master)
    labels = torch.cat([labels for _, labels in source.val(batch_size=7)])
    assert labels.tolist() == check_beton(prepared_master / "val.beton").labels.tolist()


# torchvision


def test_changed_and_broken_image_files(raw, tmp_path):
    manifest, folder = locate(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    image = sorted((raw / "val" / "images").iterdir())[0]
    sources = [open_data(manifest, folder, workers=workers) for workers in (0, 1)]
    image.write_bytes(image.read_bytes()[:100])
    for source in sources:
        with pytest.raises(InputError, match=re.escape(f"cannot read {image.resolve()}")) as caught:
            list(source.val(batch_size=4))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="have changed since they were prepared"):
        open_data(manifest, folder)
