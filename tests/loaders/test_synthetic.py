"""Generated images: pinned bytes, and an identity that needs no pixels."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from fastprune.errors import InputError
from fastprune.loaders.batches import open_data
from fastprune.loaders.catalog import find_or_prepare
from fastprune.loaders.layout import scan
from fastprune.loaders.samples import read_image
from fastprune.loaders.synthetic import VERSION, SyntheticData

DATA = SyntheticData(classes=4, train_per_class=6, val_per_class=3, size=20, seed=5)
PINNED = (
    1,
    "dba6c6b3e42e523a3abcfa96390810415b4a486b029632bada4ad6d4ea01512f",
    "5d55bc8761636e5d148ed9d0af07e6b10e73003db49ac8f359a12a61f05da300",
)


def test_pixels_are_pinned_to_the_version():
    """Another digest is another data set: raise VERSION, which changes the fingerprint, and pin the new one."""
    pixels = hashlib.sha256(DATA.arrays("train")[0].tobytes() + DATA.arrays("val")[0].tobytes()).hexdigest()
    assert (VERSION, pixels, DATA.fingerprint) == PINNED


def test_shapes_labels_and_manifest():
    manifest = DATA.manifest()
    for split, each in (("train", 6), ("val", 3)):
        images, labels = DATA.arrays(split)
        assert images.shape == (4 * each, 20, 20, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert labels.tolist() == sorted(labels)
        assert np.bincount(labels).tolist() == [each] * 4
        assert manifest.count(split) == 4 * each
    assert (manifest.height, manifest.width) == (20, 20)
    assert SyntheticData(**manifest.synthetic) == DATA


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sizes_of_the_data_sets(size, tmp_path):
    """Those that smoke figures may take: in memory, and the same from files."""
    data = SyntheticData(classes=2, train_per_class=4, val_per_class=2, size=size)
    source = open_data(*find_or_prepare(data, tmp_path))
    batches = source.train(seed=0, batch_size=4), source.val(batch_size=4)
    assert [len(part) for part in batches] == [2, 1]
    for part in batches:
        for images, labels in part:
            assert images.shape == (4, 3, size, size)
            assert 0.5 < float(images.std()) < 2, "normalised by the manifest"
            assert set(labels.tolist()) <= {0, 1}
    images, _ = data.arrays("train")
    assert len({image.tobytes() for image in images}) == 8
    files = open_data(*find_or_prepare(data, tmp_path, loader="torchvision", workers=1, show=False))
    both = [one.val(batch_size=3) for one in (files, source)]
    for (images, labels), (expected, their_labels) in zip(*both, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, their_labels)


def test_the_first_images_do_not_depend_on_how_many_there_are():
    fewer = SyntheticData(classes=1, train_per_class=2, val_per_class=1, size=20, seed=5)
    more = SyntheticData(classes=1, train_per_class=700, val_per_class=1, size=20, seed=5)
    assert np.array_equal(fewer.arrays("train")[0], more.arrays("train")[0][:2])


def test_no_two_images_are_alike_and_every_parameter_counts():
    images = np.concatenate([DATA.arrays("train")[0], DATA.arrays("val")[0]])
    assert len({image.tobytes() for image in images}) == len(images)
    others = [SyntheticData(**{**DATA.manifest().synthetic, name: 7}) for name in DATA.manifest().synthetic]
    assert len({data.fingerprint for data in [DATA, *others]}) == 6


@pytest.mark.parametrize("bad", [{"classes": 0}, {"size": -1}, {"seed": -1}, {"train_per_class": 2.5}], ids=str)
def test_bad_parameters(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SyntheticData(**bad)


def test_the_folder_holds_the_same_images_in_the_same_order(tmp_path):
    DATA.write_folder(tmp_path, extension="png")
    layout = scan(tmp_path)
    assert layout.classes == DATA.manifest().classes
    for split in ("train", "val"):
        images, labels = DATA.arrays(split)
        assert list(layout.labels[split]) == labels.tolist()
        assert all(
            np.array_equal(read_image(tmp_path / name), image)
            for name, image in zip(layout.files[split], images, strict=True)
        )


@pytest.mark.slow
def test_a_small_network_learns_some_but_not_all():
    """Three epochs of 2,000 augmented images: far from chance (10 %) and far from everything."""
    torch.manual_seed(0)
    source = open_data(SyntheticData().manifest(), None)
    widths = (3, 16, 32, 64, 64)
    layers = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (torch.nn.Conv2d(a, b, 3, stride=1 + (a > 3), padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10))
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train = source.train(seed=0, batch_size=64)
    for epoch in range(3):
        train.set_epoch(epoch)
        for images, labels in train:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in source.val(batch_size=100))
    assert 0.35 < right / 500 < 0.9
