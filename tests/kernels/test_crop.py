"""crop_flip_normalize against its reference in float64, and against torchvision on float tensors."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as V1
import torchvision.transforms.v2.functional as V2

from fastprune.kernels.crop import crop_flip_normalize, crop_flip_normalize_reference
from fastprune.kernels.dispatch import INTERPRETED
from tests.kernels.inputs import (
    EDGE,
    FLOATS,
    NAN,
    SHORT,
    WHOLE,
    assert_as_exact,
    far_zeros,
    little_memory,
    require_memory,
)

MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)
UNIT = (0.0,) * 3, (1.0,) * 3
EPS = torch.finfo(torch.float32).eps
SIZES = [(64, 64), (63, 65), (1, 1), (1, 7), (5, 2), (33, 128)]


def random_images(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """The first two are the whole image, the third is one pixel in the last corner."""
    rng = np.random.default_rng(seed)
    box_h, box_w = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    top, left = rng.integers(0, height - box_h + 1), rng.integers(0, width - box_w + 1)
    boxes = torch.from_numpy(np.stack([top, left, box_h, box_w], 1).astype(np.int32))
    boxes[:2] = torch.tensor([0, 0, height, width])
    boxes[2:3] = torch.tensor([height - 1, width - 1, 1, 1])
    return boxes


def random_batch(count: int, height: int, width: int, number: int = 5) -> tuple[torch.Tensor, ...]:
    """images, index, crop_boxes, flip; of the two whole images the second is mirrored."""
    flip = torch.from_numpy(np.random.default_rng(2).random(count) < 0.5)
    flip[:2] = torch.tensor([False, True])[:count]
    index = torch.from_numpy(np.random.default_rng(1).integers(0, number, count))
    return random_images(number, height, width), index, random_boxes(count, height, width), flip


def nans(count: int, height: int, width: int, dtype: torch.dtype = torch.float32, device="cpu") -> torch.Tensor:
    out = torch.empty((count, 3, height, width), dtype=dtype, memory_format=torch.channels_last, device=device)
    return out.fill_(NAN)


def crop(batch, size, device, mean=MEAN, std=STD, dtype=torch.float32, **options) -> torch.Tensor:
    """The crops that the device under test makes, on the CPU; batch: images, index, crop_boxes, flip."""
    images, index, crop_boxes, flip = (t.to(device) for t in batch)
    out = nans(len(index), size[0], size[1], dtype, device)
    assert crop_flip_normalize(images, index, crop_boxes, flip, mean, std, out, **WHOLE | options) is out
    return out.cpu()


def crop_one(image, box, flip, size, device, mean=MEAN, std=STD) -> torch.Tensor:
    """Crop of a single image, float32 [3, h, w]."""
    batch = image[None], torch.tensor([0]), torch.tensor([box], dtype=torch.int32), torch.tensor([flip])
    return crop(batch, size, device, mean, std)[0]


def assert_near_reference(got, batch, size):
    exact = crop_flip_normalize_reference(*batch, MEAN, STD, *size, torch.float64)
    plain = crop_flip_normalize_reference(*batch, MEAN, STD, *size)
    if got.dtype == torch.float32:
        assert_as_exact(got, plain, exact)
        return
    # Half an ulp of the value, a whole one where the interpreter truncates, beside float32's error.
    ulps = 1.0 if INTERPRETED else 0.5
    single = 2 * (plain - exact).abs().max() + EPS * exact.abs().max()
    bound = ulps * torch.finfo(got.dtype).eps * (exact.abs() + single) + single
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_the_reference(size, device):
    batch = random_batch(40, *size)
    assert_near_reference(crop(batch, size, device), batch, size)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("size", [(63, 65), (33, 128)], ids=str)
def test_short_floats(size, dtype, device):
    """As exact as they can be, and the rounded float32; more than a CPU crops at once."""
    batch = random_batch(17, *size)
    short = crop(batch, size, device, dtype=dtype)
    assert_near_reference(short, batch, size)
    single = crop(batch, size, device)
    if INTERPRETED and dtype == torch.bfloat16:  # truncates: one ulp, there only
        assert ((short - single).abs() <= torch.finfo(dtype).eps * single.abs()).all()
    else:
        assert torch.equal(short, single.to(dtype))


@pytest.mark.parametrize("side", [1, 7, 63, 64, 65, 2000])
@pytest.mark.parametrize("tall", [True, False], ids=["column", "row"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_row_and_one_column(side, tall, dtype, device):
    """Whole, enlarged from a part and from one pixel, each also mirrored."""
    size, part = (side, 1) if tall else (1, side), side // 2 + 1
    boxes = [[0, 0, side, 1], [side - part, 0, part, 1], [side - 1, 0, 1, 1]]
    crop_boxes = torch.tensor([b if tall else [b[1], b[0], b[3], b[2]] for b in boxes] * 2, dtype=torch.int32)
    batch = random_images(2, *size), torch.tensor([0, 1, 1, 0, 0, 1]), crop_boxes, torch.arange(6) < 3
    assert_near_reference(crop(batch, size, device, dtype=dtype), batch, size)


@pytest.mark.parametrize("block", [32, 128, 1024])
def test_the_block_size_changes_nothing(block, device):
    batch, size = random_batch(3, 9, 40), (12, 40)
    assert torch.equal(crop(batch, size, device, block=block), crop(batch, size, device, block=1 << 14))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_torchvision_enlarges_alike(size, device):
    """In torchvision the place of a pixel is rounded to float32: off by an ulp of the width, in x and y, and as much
    again in the weights, times a full step of brightness.
    """
    height, width = size
    image, boxes = random_images(1, height, width)[0], random_boxes(25, height, width, seed=3)
    batch = image[None], torch.zeros(25, dtype=torch.int64), boxes, torch.zeros(25, dtype=torch.bool)
    ours = crop(batch, size, device, *UNIT)
    planes = image.permute(2, 0, 1).float() / 255.0
    for antialias in (False, True):
        for one, box in zip(ours, boxes.tolist(), strict=True):
            theirs = V2.resized_crop(planes, *box, [height, width], antialias=antialias)
            assert (one - theirs).abs().max() <= 4 * EPS * max(height, width, 2)


@pytest.mark.parametrize("size", [(64, 64), (5, 2), (1, 1)], ids=str)
def test_whole_images_are_torchvisions_to_the_last_bit(size, device):
    image = random_images(1, *size)[0]
    planes = V1.convert_image_dtype(image.permute(2, 0, 1), torch.float32)
    for flip in (False, True):
        theirs = V1.normalize(V1.hflip(planes) if flip else planes, MEAN, STD)
        assert torch.equal(crop_one(image, [0, 0, *size], flip, size, device), theirs)


def test_a_box_of_the_outputs_size_is_a_copy(device):
    image = random_images(1, 9, 8)[0]
    theirs = V1.normalize(V1.convert_image_dtype(image[2:7, 1:5].permute(2, 0, 1), torch.float32), MEAN, STD)
    assert torch.equal(crop_one(image, [2, 1, 5, 4], False, (5, 4), device), theirs)


def test_by_hand(device):
    """Two pixels, 0 and 255, over four: at -1/4, 1/4, 3/4 and 5/4 of the way, clamped."""
    image = torch.tensor([[[0, 0, 0], [255, 255, 255]]], dtype=torch.uint8)
    row = crop_one(image, [0, 0, 1, 2], False, (1, 4), device, *UNIT)
    torch.testing.assert_close(row, torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(3, 1, 4))
    mirrored = crop_one(image, [0, 0, 1, 2], True, (1, 4), device, *UNIT)
    assert torch.equal(mirrored, row.flip(2))


@pytest.mark.parametrize("number", [0, 1])
def test_no_batch(number, device):
    batch = random_images(number, 4, 4), torch.empty(0).long(), torch.empty((0, 4)).int(), torch.empty(0).bool()
    assert crop(batch, (4, 4), device).shape == (0, 3, 4, 4)


BAD = {
    "index beyond the images": {"index": torch.tensor([5])},
    "index negative": {"index": torch.tensor([-1])},
    "index int32": {"index": torch.tensor([0], dtype=torch.int32)},
    "box outside": {"crop_boxes": torch.tensor([[0, 5, 8, 4]], dtype=torch.int32)},
    "box negative": {"crop_boxes": torch.tensor([[-1, 0, 4, 4]], dtype=torch.int32)},
    "box empty": {"crop_boxes": torch.tensor([[0, 0, 0, 4]], dtype=torch.int32)},
    "box int64": {"crop_boxes": torch.tensor([[0, 0, 8, 8]])},
    "boxes of another count": {"crop_boxes": torch.tensor([[0, 0, 8, 8]] * 2, dtype=torch.int32)},
    "flip uint8": {"flip": torch.tensor([1], dtype=torch.uint8)},
    "images float": {"images": random_images(2, 8, 8).float()},
    "images NCHW": {"images": random_images(2, 8, 8).permute(0, 3, 1, 2).contiguous()},
    "images strided": {"images": random_images(2, 8, 16)[:, :, ::2]},
    "out contiguous": {"out": torch.full((1, 3, 8, 8), NAN)},
    "out float64": {"out": nans(1, 8, 8, torch.float64)},
    "out smaller than the box": {"out": nans(1, 8, 7)},
    "another device": {"index": torch.zeros(1, dtype=torch.int64, device="meta")},
    "std zero": {"std": (0.1, 0.0, 0.1)},
    "two means": {"mean": (0.1, 0.2)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(name):
    arguments = {
        "images": random_images(2, 8, 8),
        "index": torch.tensor([1]),
        "crop_boxes": torch.tensor([[0, 0, 8, 8]], dtype=torch.int32),
        "flip": torch.tensor([False]),
        "mean": MEAN,
        "std": STD,
        "out": nans(1, 8, 8),
    }
    crop_flip_normalize(**arguments)
    arguments = arguments | {"out": nans(1, 8, 8)} | BAD[name]
    with pytest.raises(ValueError, match=r"\w") as caught:
        crop_flip_normalize(**arguments)
    assert "\n" not in str(caught.value)
    assert arguments["out"].isnan().all()


@pytest.mark.usefixtures("plain_memory")
def test_from_images_beyond_2_to_31_bytes(device):
    require_memory(4 if device.type == "cuda" else 1, device)
    side, number = 64, EDGE // (3 * 64**2) + 3
    few = random_images(2, side, side)
    boxes = torch.tensor([[0, 0, 64, 64], [0, 0, 64, 64], [5, 7, 40, 57]], dtype=torch.int32)
    batch = few, torch.tensor([1, 0, 1]), boxes, torch.tensor([False, False, True])
    expected = crop(batch, (side, side), device)
    with little_memory(device):
        images = far_zeros(number, side, side, 3, dtype=torch.uint8, device=device)
        images[-2:] = few.to(device)
        there = images, batch[1] + number - 2, batch[2], batch[3]
        assert torch.equal(crop(there, (side, side), device), expected)
    assert expected.std() > 0.1
