"""The resident loader: filled from anything, the same batches to the bit, chosen where it fits, errors of one line."""

import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastprune.errors import InputError
from fastprune.loaders import Subset, SyntheticData, choose_loader, load_manifest, locate, open_data
from fastprune.loaders import source as source_module
from fastprune.loaders.beton import check_beton
from fastprune.loaders.ffcv_reader import FfcvReader, checked_files, whole_images
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.resident_reader import empty_images, fill_from_betons, fill_from_samples
from fastprune.loaders.samples import folder_samples, read_image
from fastprune.loaders.source import Batches

DATA = SyntheticData(classes=4, train_per_class=15, val_per_class=5, size=16, seed=1)
WAYS = {"generated": "resident", "from beton": "ffcv", "from image files": "torchvision"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Place = tuple[Manifest, Path | None]


@pytest.fixture(params=WAYS, scope="module")
def place(request, tmp_path_factory) -> Place:
    """DATA as each loader keeps it; the image files are lossless."""
    if WAYS[request.param] == "ffcv":
        request.getfixturevalue("ffcv")
    return locate(DATA, tmp_path_factory.mktemp("place"), loader=WAYS[request.param], workers=1, show=False)


def poisoned(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Memory for both splits that no image left like this."""
    shape = (manifest.height, manifest.width, 3)
    return {split: torch.full((manifest.count(split), *shape), 0xA5, dtype=torch.uint8) for split in ("train", "val")}


def same(batches: Batches, expected: Batches) -> None:
    assert len(batches) == len(expected) > 0
    for (images, labels), (theirs, their_labels) in zip(batches, expected, strict=True):
        assert torch.equal(images, theirs)
        assert images.stride() == theirs.stride()
        assert torch.equal(labels, their_labels)


# The same batches


@pytest.mark.parametrize("subset", [Subset(), Subset(3, 9, 3)], ids=["whole", "subset"])
@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_batches_are_those_of_the_other_loaders_to_the_bit(place, subset, batch_size):
    resident = open_data(*place, loader="resident", workers=2)
    assert resident.loader == "resident"
    assert resident.device == torch.device("cpu")
    others = [open_data(DATA.manifest(), None, loader="synthetic")]
    others += [open_data(*place, loader="ffcv")] if place[0].train_file else []
    for other in others:
        train, expected = (s.train(seed=3, batch_size=batch_size, subset=subset) for s in (resident, other))
        for epoch in (0, 5):
            train.set_epoch(epoch)
            expected.set_epoch(epoch)
            same(train, expected)
        val, expected = (s.val(batch_size=batch_size, subset=subset) for s in (resident, other))
        same(val, expected)
        assert len(list(val)[-1][1]) == (val.images % batch_size or batch_size)


def test_each_batch_is_new_memory(place):
    batches = [images for images, _ in open_data(*place, loader="resident").val(batch_size=7)]
    kept = [images.clone() for images in batches]
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))
    assert len({images.data_ptr() for images in batches}) == 3


def test_the_next_epoch_is_drawn_while_the_device_is_busy(monkeypatch):
    """With a device that only pretends: what is drawn after an epoch is what the next one reads."""
    reader = SimpleNamespace(
        device=torch.device("meta"),
        labels={"train": np.repeat(np.arange(4), 15)},
        images=lambda split, table, batch_size, dtype: (torch.empty(0) for _ in range(3)),
    )
    monkeypatch.setattr(source_module, "on_device", lambda values, device: torch.from_numpy(values))
    batches, fresh = (Batches(reader, DATA.manifest(), "train", np.arange(60), 20, 0) for _ in range(2))
    for epoch in (0, 1, 2, 7):
        batches.set_epoch(epoch)
        fresh.set_epoch(epoch)
        assert all(np.array_equal(a, b) for a, b in zip(batches.table(), fresh.table(), strict=True))
        assert torch.cat([labels for _, labels in batches]).tolist() == (fresh.table().samples // 15).tolist()
    monkeypatch.setattr(source_module, "boxes", None)  # nothing is left to draw
    batches.set_epoch(8)
    assert len(batches.table().samples) == 60


# Filling


@pytest.mark.usefixtures("ffcv")
def test_beton_files_are_read_as_ffcv_reads_them(prepared_master):
    manifest = load_manifest(prepared_master)
    files = checked_files(manifest, prepared_master)
    images, arrived = poisoned(manifest), []
    fill_from_betons(images, files, workers=3, done=arrived.append)
    assert sum(arrived) == 78
    reader = FfcvReader(manifest, files)
    for split, file in files.items():
        with whole_images(reader._loader(split), np.arange(len(file)), len(file)) as batches:
            assert np.array_equal(images[split].numpy(), next(batches))


def test_images_may_lie_anywhere_in_the_file(prepared_master, monkeypatch):
    """Out of order, some of them neighbours, in pieces of three images: each goes where it belongs."""
    monkeypatch.setattr("fastprune.loaders.resident_reader.AT_ONCE", 3 * 16 * 16 * 3)
    manifest = load_manifest(prepared_master)
    file = check_beton(prepared_master / "train.beton", manifest)
    order = np.array([5, 6, 7, 2, 40, 41, 0, 59, 3, 4])
    straight, mixed = poisoned(manifest), torch.full((10, 16, 16, 3), 0xA5, dtype=torch.uint8)
    fill_from_betons(straight, {"train": file}, workers=1, done=print)
    part = replace(file, labels=file.labels[order], pointers=file.pointers[order])
    fill_from_betons({"train": mixed}, {"train": part}, workers=2, done=print)
    assert torch.equal(mixed, straight["train"][torch.from_numpy(order)])


def test_beton_files_need_no_ffcv(prepared_master, monkeypatch):
    monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    source = open_data(load_manifest(prepared_master), prepared_master, loader="resident")
    assert [len(labels) for _, labels in source.val(batch_size=10)] == [10, 8]


def test_image_files_are_decoded_by_processes(raw_master):
    """JPEG; in pieces of 200, so the second process has nothing to do in val."""
    layout = scan(raw_master)
    samples = folder_samples(layout)
    images = {split: torch.full((len(part), 16, 16, 3), 0xA5, dtype=torch.uint8) for split, part in samples.items()}
    arrived: list[int] = []
    fill_from_samples(images, samples, workers=2, done=arrived.append)
    assert sum(arrived) == 78
    for split, names in layout.files.items():
        assert all(np.array_equal(a, read_image(raw_master / b)) for a, b in zip(images[split], names, strict=True))


def test_progress_is_shown_where_it_is_wanted(place, capsys):
    open_data(*place, loader="resident", workers=1)
    assert capsys.readouterr().err == ""
    open_data(*place, loader="resident", workers=1, show=True)
    said = capsys.readouterr().err
    assert ("images to cpu: 100%" in said) == (place[1] is not None)


def test_opening_leaves_no_thread(place):
    before = set(threading.enumerate())
    source = open_data(*place, loader="resident", workers=3)
    for batches in (source.train(seed=0, batch_size=7), source.val(batch_size=7)):
        next(iter(batches))
        list(batches)
    for thread in set(threading.enumerate()) - before:
        if not type(thread).__module__.startswith("tqdm"):  # it keeps one for all bars
            thread.join(timeout=5)
            assert not thread.is_alive(), thread


# What cannot be read


@pytest.mark.parametrize("workers", [1, 3])
def test_a_file_that_shrinks_while_it_is_read(prepared, workers):
    manifest = load_manifest(prepared)
    files = checked_files(manifest, prepared)
    with open(prepared / "val.beton", "r+b") as file:
        file.truncate(int(files["val"].pointers[3]) + 100)
    with pytest.raises(InputError, match=r"val\.beton is truncated: remove it"):
        fill_from_betons(poisoned(manifest), files, workers, print)
    (prepared / "train.beton").unlink()
    with pytest.raises(InputError, match=r"cannot read .*train\.beton: No such file"):
        fill_from_betons(poisoned(manifest), files, workers, print)


def test_changed_image_files_are_refused(raw, tmp_path):
    manifest, folder = locate(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    image = sorted((raw / "val" / "images").iterdir())[0]
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(InputError, match="have changed since they were prepared"):
        open_data(manifest, folder, loader="resident")


SPOIL = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), r"cannot read \S+{} \(.+\)"),
    "larger": (lambda path: Image.new("RGB", (17, 16)).save(path), r"\S+{} has another size than before"),
}


@pytest.mark.parametrize("name", SPOIL)
@pytest.mark.parametrize("split", ["train", "val"])
def test_spoilt_images_are_named(name, split, raw, tmp_path):
    manifest, folder = locate(raw, tmp_path / "store", loader="torchvision", workers=1, show=False)
    spoil, expected = SPOIL[name]
    image = sorted((raw / split).rglob("*.JPEG"))[-1]
    spoil(image)
    manifest = replace(manifest, listing=scan(raw).listing())
    with pytest.raises(InputError) as caught:
        open_data(manifest, folder, loader="resident", workers=2)
    assert re.fullmatch(expected.format(re.escape(image.name)) + ": prepare the data again", str(caught.value))


def test_images_that_do_not_fit():
    huge = replace(DATA.manifest(), height=1 << 20, width=1 << 20)
    with pytest.raises(InputError, match=r"the images take [0-9.]+ GB, which cpu does not have free"):
        empty_images(huge, "train", torch.device("cpu"))


# Which loader is chosen


@pytest.fixture
def free(monkeypatch):
    """Sets what a GPU has free."""
    return lambda count: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, 10 * count))


NEEDED = 80 * 16 * 16 * 3


def test_on_a_gpu_auto_is_resident_where_it_fits(place, free):
    manifest, folder = place
    free(2 * NEEDED)
    choice = choose_loader(manifest, folder, device="cuda:1")
    assert choice.name == "resident"
    assert choice.why == "0.00 GB of images fit into half of the 0.0 GB free on cuda:1"
    usual = choose_loader(manifest, folder)
    assert usual.name in ("synthetic", "ffcv", "torchvision")
    assert choose_loader(manifest, folder, device="cuda:1", copies=2).name == usual.name
    free(2 * NEEDED - 1)
    choice = choose_loader(manifest, folder, device="cuda:1")
    assert choice.name == usual.name
    assert choice.why.startswith("not resident: 0.00 GB of images are more than half of the 0.0 GB free on cuda:1")


def test_on_a_cpu_it_is_taken_when_asked_for(place):
    manifest, folder = place
    assert choose_loader(manifest, folder).name != "resident"
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


def test_it_asks_for_the_same_files_as_auto(raw, tmp_path):
    """.beton files where FFCV is there to write them, for several processes fill from them; nothing for generated."""
    assert locate(DATA, tmp_path / "store", loader="resident") == (DATA.manifest(), None)
    assert not (tmp_path / "store").exists()
    found = locate(raw, tmp_path / "store", loader="resident", workers=1, show=False)
    assert locate(raw, tmp_path / "store", show=False) == found


# On a GPU


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_nothing_waits_and_the_batches_are_the_same(place, dtype):
    """Training pixels within the rounding of another processor, all else exactly."""
    gpu, cpu = (open_data(*place, loader="resident", device=device, workers=2) for device in ("cuda", "cpu"))
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


@needs_gpu
def test_a_gpu_holds_the_bytes_of_the_files(place):
    gpu, cpu = (open_data(*place, loader="resident", device=device) for device in ("cuda", "cpu"))
    for split in ("train", "val"):
        assert torch.equal(gpu._reader._images[split].cpu(), cpu._reader._images[split])
