"""Augmentations of torchvision's reference script: the same draws by hand, and images that ranks see at once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize, v2
from torchvision.transforms import functional as F

from fastprune.errors import InputError
from fastprune.loaders import Crop, SyntheticData, find_or_prepare, open_data
from fastprune.loaders.augment import crop_boxes, epoch_order, flips, sample_seeds
from fastprune.loaders.batches import Batches
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import Manifest
from fastprune.loaders.transforms import POLICIES, Augment

# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CROP = Crop(24, 28, 24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BICUBIC = InterpolationMode.BICUBIC


def finished(policy, mean, std) -> v2.Compose:
    """The reference's transforms after crop and flip, in its order."""
    steps = [policy, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=mean, std=std)]
    return v2.Compose([*steps, v2.RandomErasing(p=0.5)])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_several_sizes_are_augmented_as_by_the_reference(workers, varied_master):
    augment = Augment("ra", magnitude=5, erase=0.5, interpolation="bicubic")
    place = find_or_prepare(varied_master, "unused", loader="torchvision", any_size=True)
    source = open_data(*place, loader="torchvision", crop=CROP, augment=augment, workers=workers)
    train = source.train(seed=5, batch_size=4)
    train.set_epoch(2)
    positions = epoch_order(5, 2, 21)[:20]
    crop = RandomResizedCrop(24, interpolation=BICUBIC)
    after = finished(v2.RandAugment(magnitude=5, interpolation=BICUBIC), CROP.mean, CROP.std)
    expected, files = [], scan(varied_master).files["train"]
    for position, word, flip in zip(positions, sample_seeds(5, 2, positions), flips(5, 2, positions), strict=True):
        with (
            torch.random.fork_rng(devices=[]),
            Image.open(varied_master / files[position]) as f,
        ):
            torch.manual_seed(int(word))
            image = crop(f.convert("RGB"))
            expected.append(after(F.hflip(image) if flip else image))
    state = torch.get_rng_state()
    images = torch.cat([images for images, _ in train])
    assert torch.equal(images, torch.stack(expected))
    assert torch.equal(torch.get_rng_state(), state)
    with Image.open(varied_master / scan(varied_master).files["val"][0]) as f:
        whole = CenterCrop(24)(Resize(28, BICUBIC)(f.convert("RGB")))
    first = next(iter(source.val(batch_size=1)))[0][0]
    torch.testing.assert_close(first, F.normalize(F.to_tensor(whole), CROP.mean, CROP.std), rtol=1e-5, atol=1e-5)


def test_images_of_one_size_keep_their_boxes_and_flips(raw_master, tmp_path):
    augment = Augment("ta_wide", erase=0.5)
    place = find_or_prepare(raw_master, tmp_path, loader="torchvision", show=False)
    source = open_data(*place, loader="torchvision", augment=augment)
    m, train = source.manifest, source.train(seed=1, batch_size=5)
    after = finished(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), m.mean, m.std)
    table, files = train.table(), scan(raw_master).files["train"]
    boxes, mirrored = crop_boxes(1, 0, table.samples, m.height, m.width)
    seeds = sample_seeds(1, 0, table.samples)
    found = torch.cat([images for images, _ in train])
    for image, position, box, flip, word in zip(found, table.samples, boxes, mirrored, seeds, strict=True):
        with torch.random.fork_rng(devices=[]), Image.open(raw_master / files[position]) as f:
            torch.manual_seed(int(word))
            picture = F.resized_crop(f.convert("RGB"), *box.tolist(), [m.height, m.width])
            assert torch.equal(image, after(F.hflip(picture) if flip else picture))
    with pytest.raises(ValueError, match="loader synthetic knows no --auto-augment ta_wide"):
        open_data(SyntheticData().manifest(), None, augment=augment)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_of_torchvision(policy):
    image = Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3))
    torch.manual_seed(0)
    made = Augment(policy).after_crop(CROP.mean, CROP.std)(image)
    assert made.shape == (3, 20, 20)
    assert made.dtype == torch.float32
    torch.manual_seed(0)
    kinds = {"ra": v2.RandAugment, "ta_wide": v2.TrivialAugmentWide, "augmix": v2.AugMix}
    known = kinds[policy] if policy in kinds else lambda **how: v2.AutoAugment(v2.AutoAugmentPolicy(policy), **how)
    drawn = known(interpolation=InterpolationMode.BILINEAR)(image)
    torch.testing.assert_close(made, F.normalize(F.to_tensor(drawn), CROP.mean, CROP.std), rtol=1e-6, atol=1e-6)


def test_what_is_asked_beyond_a_crop():
    assert Augment().asked == ()
    everything = Augment("augmix", severity=2, erase=0.25, interpolation="nearest")
    assert everything.asked == ("--auto-augment augmix", "--random-erase 0.25", "--interpolation nearest")
    with pytest.raises(InputError, match="unknown --auto-augment x: choose one of ra, ta_wide"):
        Augment("x")


@pytest.mark.parametrize(("ranks", "repeats"), [(2, 3), (4, 3), (1, 2)])
def test_repeated_images_go_to_ranks_at_once_with_crops_of_their_own(ranks, repeats):
    """By the words of the reference's sampler: each index so often in turn, every ranks-th for a rank, a whole 256."""
    n, batch = 600, 10
    reader = SimpleNamespace(labels={"train": np.zeros(1000, np.int64)}, device=torch.device("cpu"))
    manifest = SyntheticData(size=16).manifest()
    assert isinstance(manifest, Manifest)
    samples = np.arange(300, 300 + n)
    order = samples[epoch_order(7, 4, n)]
    listed = [sample for sample in order for _ in range(repeats)]
    turns = [turn for _ in order for turn in range(repeats)]
    seen = set()
    for rank in range(ranks):
        batches = Batches(reader, manifest, "train", samples, batch, 7, rank=rank, world_size=ranks, repeats=repeats)
        batches.set_epoch(4)
        table = batches.table()
        count = 512 // ranks // batch
        assert len(batches) == count
        assert batches.images == len(table.samples) == count * batch
        assert table.samples.tolist() == listed[rank::ranks][: count * batch]
        seen |= set(zip(table.samples.tolist(), map(tuple, table.crop_boxes.tolist()), strict=True))
        own = np.array(turns[rank::ranks][: count * batch]) == 0
        boxes, mirrored = crop_boxes(7, 4, table.samples[own], 16, 16)  # the first turn is drawn as without repetition
        assert np.array_equal(table.crop_boxes[own], boxes)
        assert np.array_equal(table.flips[own], mirrored)
    assert len(seen) > 0.9 * ranks * (512 // ranks // batch) * batch  # hardly any crop comes twice


@pytest.mark.parametrize("loader", ["synthetic", "resident", pytest.param("ffcv", marks=pytest.mark.slow)])
def test_fast_loaders_read_repeated_images(loader, tmp_path, request):
    if loader == "ffcv":
        request.getfixturevalue("ffcv")
    data = SyntheticData(classes=2, train_per_class=130, val_per_class=1, size=16)
    source = open_data(*find_or_prepare(data, tmp_path, loader=loader, show=False), loader=loader)
    expected = open_data(*find_or_prepare(data, tmp_path, show=False, loader="synthetic"))
    share = {"seed": 0, "batch_size": 32, "rank": 1, "world_size": 2, "repeats": 3}
    for (images, labels), (theirs, their_labels) in zip(source.train(**share), expected.train(**share), strict=True):
        assert torch.equal(images, theirs)
        assert torch.equal(labels, their_labels)
    with pytest.raises(InputError, match="--ra-sampler reads whole 256 of the 260 training images, less than a batch"):
        source.train(**share | {"batch_size": 129})
