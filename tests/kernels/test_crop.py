"""crop_flip_normalize against its meaning in float64, and against torchvision on float tensors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as V1
import torchvision.transforms.v2.functional as V2
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.kernels.crop import crop_flip_normalize
from fastprune.kernels.crop_reference import crop_flip_normalize_reference

MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)
EPS = torch.finfo(torch.float32).eps
SIZES = [(64, 64), (63, 65), (1, 1), (1, 7), (5, 2), (33, 128)]


def random_images(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def random_boxes(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    tall, wide = rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    return torch.from_numpy(np.stack([top, left, tall, wide], 1).astype(np.int32))


def poisoned(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.empty((count, 3, height, width), dtype=dtype, memory_format=torch.channels_last)
    return out.fill_(float("nan"))


def one(image: torch.Tensor, box: list[int], flip: bool, size: tuple[int, int], mean=MEAN, std=STD) -> torch.Tensor:
    """Crop of a single image, float32 [3, h, w]."""
    boxes = torch.tensor([box], dtype=torch.int32)
    out = poisoned(1, *size)
    return crop_flip_normalize(image[None], torch.tensor([0]), boxes, torch.tensor([flip]), mean, std, out)[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_the_reference(size):
    height, width = size
    images, boxes = random_images(5, height, width), random_boxes(40, height, width)
    index = torch.from_numpy(np.random.default_rng(1).integers(0, 5, 40))
    flip = torch.from_numpy(np.random.default_rng(2).random(40) < 0.5)
    out = poisoned(40, height, width)
    assert crop_flip_normalize(images, index, boxes, flip, MEAN, STD, out) is out
    exact = crop_flip_normalize_reference(images, index, boxes, flip, MEAN, STD, height, width, torch.float64)
    single = crop_flip_normalize_reference(images, index, boxes, flip, MEAN, STD, height, width)
    ulp = EPS * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (single - exact).abs().max() + ulp


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_torchvision_enlarges_alike(size, antialias):
    """In torchvision the place of a pixel is rounded to float32: off by an ulp of the width, in x and y, and as much
    again in the weights, times a full step of brightness."""
    height, width = size
    image, boxes = random_images(1, height, width)[0], random_boxes(25, height, width, seed=3)
    planes = image.permute(2, 0, 1).float() / 255.0
    for box in boxes.tolist():
        theirs = V2.resized_crop(planes, *box, [height, width], antialias=antialias)
        ours = one(image, box, False, size, (0.0,) * 3, (1.0,) * 3)
        assert (ours - theirs).abs().max() <= 4 * EPS * max(height, width, 2)


@pytest.mark.parametrize("size", [(64, 64), (5, 2), (1, 1)], ids=str)
def test_whole_images_are_torchvisions_to_the_last_bit(size):
    image = random_images(1, *size)[0]
    planes = V1.convert_image_dtype(image.permute(2, 0, 1), torch.float32)
    for flip in (False, True):
        theirs = V1.normalize(V1.hflip(planes) if flip else planes, MEAN, STD)
        assert torch.equal(one(image, [0, 0, *size], flip, size), theirs)


def test_a_box_of_the_outputs_size_is_a_copy():
    image = random_images(1, 9, 8)[0]
    theirs = V1.normalize(V1.convert_image_dtype(image[2:7, 1:5].permute(2, 0, 1), torch.float32), MEAN, STD)
    assert torch.equal(one(image, [2, 1, 5, 4], False, (5, 4)), theirs)


def test_by_hand():
    """Two pixels, 0 and 255, over four: at -1/4, 1/4, 3/4 and 5/4 of the way, clamped."""
    image = torch.tensor([[[0, 0, 0], [255, 255, 255]]], dtype=torch.uint8)
    row = one(image, [0, 0, 1, 2], False, (1, 4), (0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(row, torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(3, 1, 4))
    mirrored = one(image, [0, 0, 1, 2], True, (1, 4), (0.0,) * 3, (1.0,) * 3)
    assert torch.equal(mirrored, row.flip(2))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_box_stays_within_its_pixels_and_mirrors(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - tall)), data.draw(st.integers(0, width - wide))
    size = (tall + data.draw(st.integers(0, 6)), wide + data.draw(st.integers(0, 6)))
    image = random_images(1, height, width, seed=data.draw(st.integers(0, 99)))[0]
    crop = one(image, [top, left, tall, wide], False, size, (0.0,) * 3, (1.0,) * 3)
    inside = image[top : top + tall, left : left + wide].float() / 255.0
    assert crop.min() >= inside.min() - EPS
    assert crop.max() <= inside.max() + EPS
    assert torch.equal(one(image, [top, left, tall, wide], True, size, (0.0,) * 3, (1.0,) * 3), crop.flip(2))
    # Without antialiasing: with it, torch 2.15 repeats the first row where the output is one pixel wide.
    theirs = V2.resized_crop(image.permute(2, 0, 1).float() / 255.0, top, left, tall, wide, list(size), antialias=False)
    assert (crop - theirs).abs().max() <= 4 * EPS * max(*size, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_floats_are_the_rounded_float32(dtype):
    images, boxes, flip = random_images(3, 8, 8), random_boxes(3, 8, 8), torch.tensor([True, False, True])
    single, short = poisoned(3, 8, 8), poisoned(3, 8, 8, dtype)
    for out in (single, short):
        crop_flip_normalize(images, torch.arange(3), boxes, flip, MEAN, STD, out)
    if os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.bfloat16:  # truncates: one ulp, there only
        assert ((short - single).abs() <= torch.finfo(dtype).eps * single.abs()).all()
    else:
        assert torch.equal(short, single.to(dtype))


def test_no_batch():
    empty = torch.empty(0, dtype=torch.int64)
    boxes = torch.empty((0, 4), dtype=torch.int32)
    out = poisoned(0, 4, 4)
    assert crop_flip_normalize(random_images(1, 4, 4), empty, boxes, empty.bool(), MEAN, STD, out).shape == (0, 3, 4, 4)
    assert crop_flip_normalize(random_images(0, 4, 4), empty, boxes, empty.bool(), MEAN, STD, out).shape == (0, 3, 4, 4)


BAD = {
    "index beyond the images": {"index": torch.tensor([5])},
    "index negative": {"index": torch.tensor([-1])},
    "index int32": {"index": torch.tensor([0], dtype=torch.int32)},
    "box outside": {"boxes": torch.tensor([[0, 5, 8, 4]], dtype=torch.int32)},
    "box negative": {"boxes": torch.tensor([[-1, 0, 4, 4]], dtype=torch.int32)},
    "box empty": {"boxes": torch.tensor([[0, 0, 0, 4]], dtype=torch.int32)},
    "box int64": {"boxes": torch.tensor([[0, 0, 8, 8]])},
    "boxes of another count": {"boxes": torch.tensor([[0, 0, 8, 8]] * 2, dtype=torch.int32)},
    "flip uint8": {"flip": torch.tensor([1], dtype=torch.uint8)},
    "images float": {"images": random_images(2, 8, 8).float()},
    "images NCHW": {"images": random_images(2, 8, 8).permute(0, 3, 1, 2).contiguous()},
    "images strided": {"images": random_images(2, 8, 16)[:, :, ::2]},
    "out contiguous": {"out": torch.full((1, 3, 8, 8), float("nan"))},
    "out float64": {"out": poisoned(1, 8, 8, torch.float64)},
    "out smaller than the box": {"out": poisoned(1, 8, 7)},
    "another device": {"index": torch.zeros(1, dtype=torch.int64, device="meta")},
    "std zero": {"std": (0.1, 0.0, 0.1)},
    "two means": {"mean": (0.1, 0.2)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(name):
    arguments = {
        "images": random_images(2, 8, 8),
        "index": torch.tensor([1]),
        "boxes": torch.tensor([[0, 0, 8, 8]], dtype=torch.int32),
        "flip": torch.tensor([False]),
        "mean": MEAN,
        "std": STD,
        "out": poisoned(1, 8, 8),
    }
    crop_flip_normalize(**arguments)
    arguments = arguments | {"out": poisoned(1, 8, 8)} | BAD[name]
    with pytest.raises(ValueError, match=r"\w") as caught:
        crop_flip_normalize(**arguments)
    assert "\n" not in str(caught.value)
    assert arguments["out"].isnan().all()


@pytest.mark.parametrize("given", [True, False])
def test_compiled_code_is_kept_only_where_told(given, tmp_path):
    code = (
        "import torch; from fastprune.kernels.crop import crop_flip_normalize as crop, _crop_flip_normalize as loop;"
        "from fastprune.kernels.jit import compiled;"
        "crop(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([0]), torch.tensor([[0, 0, 2, 2]]).int(),"
        "torch.tensor([True]), (0.5,) * 3, (0.5,) * 3, torch.empty(1, 3, 2, 2, memory_format=torch.channels_last));"
        "print(type(compiled(loop)._cache).__name__)"
    )
    folder = tmp_path / "numba"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": str(tmp_path / "home")}
    for name in ("NUMBA_CACHE_DIR", "TRITON_INTERPRET"):
        environment.pop(name, None)
    if given:
        environment["NUMBA_CACHE_DIR"] = str(folder)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("FunctionCache" if given else "NullCache")
    assert bool(list(folder.rglob("*.nbi"))) is given
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_same():
    images, boxes = random_images(4, 16, 16), random_boxes(4, 16, 16)
    flip, out = torch.tensor([True, False] * 2), poisoned(4, 16, 16)
    crop_flip_normalize(images, torch.arange(4), boxes, flip, MEAN, STD, out)
    there = poisoned(4, 16, 16).cuda()
    moved = [t.cuda() for t in (images, torch.arange(4), boxes, flip)]
    crop_flip_normalize(*moved, MEAN, STD, there)
    assert (there.cpu() - out).abs().max() <= 64 * EPS
