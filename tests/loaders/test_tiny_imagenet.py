"""On the real images, where FASTPRUNE_TINY_IMAGENET names the folder: unpacked, or holding its parts as *.tar.gz."""

import shutil
import time

import numpy as np
import pytest
import torch

from fastprune.loaders import choose_loader, find_or_prepare, open_data, prepare
from fastprune.loaders.layout import DISTRIBUTED, TINY_IMAGENET, scan
from fastprune.loaders.samples import read_image
from tests.conftest import CLASSES, unpack


@pytest.mark.usefixtures("ffcv")
def test_real_images_come_alike_through_ffcv_and_torchvision(few_classes, tmp_path):
    manifest, folder = find_or_prepare(few_classes, tmp_path, workers=2, show=False)
    assert (manifest.height, manifest.width, len(manifest.classes)) == (64, 64, CLASSES)
    assert manifest.train_per_class == (500,) * CLASSES
    assert manifest.val_per_class == (50,) * CLASSES
    assert choose_loader(manifest, folder).name == "ffcv"
    sources = [open_data(manifest, folder, loader=loader) for loader in ("ffcv", "torchvision")]
    whole = [source.val(batch_size=64) for source in sources]
    for (images, labels), (expected, their_labels) in zip(*whole, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, their_labels)
    runs = [source.train(seed=0, batch_size=512) for source in sources]
    tolerance = 4 * torch.finfo(torch.float32).eps * 64 / min(manifest.std)
    assert [len(run) for run in runs] == [3, 3]
    for run in runs:
        run.set_epoch(1)
    for (images, labels), (expected, their_labels) in zip(*runs, strict=True):
        assert torch.equal(labels, their_labels)
        assert (images - expected).abs().max() <= tolerance
        assert abs(float(images.mean())) < 0.2
        assert abs(float(images.std()) - 1) < 0.2


@pytest.mark.usefixtures("ffcv")
def test_real_images_are_resident_as_ffcv_reads_them(few_classes, tmp_path):
    """To the bit, filled from .beton files and from the image files."""
    by_ffcv = open_data(*find_or_prepare(few_classes, tmp_path, workers=2, show=False), loader="ffcv")
    for loader in ("ffcv", "torchvision"):
        place = find_or_prepare(few_classes, tmp_path, loader=loader, workers=2, show=False)
        resident = open_data(*place, loader="resident", workers=2)
        for mine, theirs in (
            (resident.train(seed=0, batch_size=500), by_ffcv.train(seed=0, batch_size=500)),
            (resident.val(batch_size=64), by_ffcv.val(batch_size=64)),
        ):
            for (images, labels), (expected, their_labels) in zip(mine, theirs, strict=True):
                assert torch.equal(images, expected)
                assert torch.equal(labels, their_labels)


def test_some_real_images_are_grey(few_classes):
    layout = scan(few_classes)
    grey = sum(bool(np.ptp(read_image(layout.root / name), axis=2).max() == 0) for name in layout.files["train"])
    assert grey > 0


@pytest.mark.slow
@pytest.mark.usefixtures("ffcv")
@pytest.mark.timeout(900)
def test_the_whole_data_set(given, tmp_path, capsys):
    root = unpack(given, tmp_path / "parts", "*.tar.gz")
    layout = scan(root)
    _, number, train, val = DISTRIBUTED[TINY_IMAGENET]
    assert layout.remark() is None
    began = time.perf_counter()
    manifest = prepare(root, tmp_path / "out", workers=2, show=False)
    taken = time.perf_counter() - began
    assert manifest.train_per_class == (train,) * number
    assert manifest.val_per_class == (val,) * number
    np.testing.assert_allclose(manifest.mean, (0.4802, 0.4481, 0.3975), atol=1e-4)  # as often published
    np.testing.assert_allclose(manifest.std, (0.2764, 0.2689, 0.2816), atol=1e-4)
    batches = open_data(manifest, tmp_path / "out", loader="ffcv").train(seed=0, batch_size=512)
    rates = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        began = time.perf_counter()
        for _ in batches:
            pass
        rates.append(batches.images / (time.perf_counter() - began))
    shutil.rmtree(tmp_path)
    with capsys.disabled():
        print(f"\n110,000 images prepared in {taken:.0f} s by 2 processes, augmented by FFCV at {max(rates):,.0f}/s")
