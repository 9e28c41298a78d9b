"""Opening image files: depths and modes of pixels, EXIF rotations; the same for every reader."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastprune.cli.prepare import main
from fastprune.errors import InputError
from fastprune.loaders import Crop, find_or_prepare, open_data, prepare
from fastprune.loaders.layout import scan
from fastprune.loaders.resize import resize_images
from fastprune.loaders.samples import folder_samples, has_rotation, open_rgb, read_image, rotation_line
from fastprune.loaders.synthetic import SyntheticData
from tests.loaders.conftest import write_animals

# From Python 3.12 on a fork beside threads is warned of; torch's DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
GREY = np.random.default_rng(0).integers(0, 256, (19, 23)).astype(np.uint8)
GREY[0, :2] = 0, 255


# 16 bits


@pytest.mark.parametrize("low", [0, 1, 254, 255])
@pytest.mark.parametrize(
    ("name", "dtype", "mode"),
    [
        ("x.png", "<u2", "I;16"),
        ("x.pgm", "<u2", "I"),
        ("x.tif", "<u2", "I;16"),
        ("x.tiff", ">u2", "I;16B"),
    ],
)
def test_16_bit_grey_is_its_8_bit_picture(name, dtype, mode, low, tmp_path):
    """Whatever the low byte of a value is; Pillow's own conversion would make it white."""
    Image.fromarray((GREY.astype(np.uint16) * 256 + low).astype(dtype)).save(tmp_path / name)
    Image.fromarray(GREY).save(tmp_path / "8.png")
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
        assert np.asarray(image.convert("RGB")).min() == min(low, 255)
    pixels = read_image(tmp_path / name)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (19, 23, 3))
    assert np.array_equal(pixels, read_image(tmp_path / "8.png"))


def test_16_bit_grey_at_the_ends(tmp_path):
    Image.fromarray(np.array([[0, 255, 256, 511, 65279, 65280, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 0, 1, 1, 254, 255, 255]


def test_a_pgm_file_of_10_bits_fills_the_scale(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P2 3 1 1023\n0 512 1023\n")
    assert read_image(tmp_path / "x.pgm")[0, :, 0].tolist() == [0, 128, 255]


def as_tiff(values: np.ndarray, tag: int = 0, before: int = 0, after: int = 0) -> bytes:
    """A TIFF file; the value of one of its tags replaced."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    entry = b"".join(n.to_bytes(size, "little") for n, size in ((tag, 2), (3, 2), (1, 4), (before, 2)))
    assert not tag or file.getvalue().count(entry) == 1
    return file.getvalue().replace(entry, entry[:-2] + after.to_bytes(2, "little"))


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (as_tiff(GREY / np.float32(255)), "F"),
        (as_tiff(GREY.astype(np.int32)), "I"),
        (as_tiff(GREY.astype(np.uint16), 262, 1, 0), "I;16"),
        (as_tiff(GREY.astype(np.uint16), 258, 16, 12), "I;16"),
    ],
    ids=["float", "32 bits", "0 is white", "12 bits"],
)
def test_values_of_unknown_scale_are_refused_in_one_line(content, mode, tmp_path):
    root = write_animals(tmp_path / "animals", [(16, 16)], train=2, val=2)
    path = root / "train/bird/0.tif"
    path.write_bytes(content)
    (root / "train/bird/0.JPEG").unlink()
    said = rf"cannot read .*{path} \(pixels of mode {mode} have no known full scale: convert the image to 8 bits\)"
    for refused in (
        lambda: prepare(root, tmp_path / "out", workers=1, show=False),
        lambda: resize_images(root, tmp_path / "out", 8, workers=1, show=False),
        lambda: list(any_size(root, tmp_path, "torchvision").train(seed=0, batch_size=6)),
    ):
        with pytest.raises(InputError, match=said) as caught:
            refused()
        assert "\n" not in str(caught.value)


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_are_converted_by_pillow(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    colour = np.random.default_rng(1).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    image = Image.fromarray(colour).convert(mode)
    image.save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
        assert np.array_equal(read_image(path), np.array(opened.convert("RGB")))
    assert open_rgb(path).mode == "RGB"
    if mode == "RGB":
        assert np.array_equal(read_image(path), colour)


def any_size(root: Path, store: Path, loader: str):
    place = find_or_prepare(root, store / "store", loader=loader, any_size=True, workers=1, show=False)
    return open_data(*place, loader=loader, crop=Crop(16, 20, 16, (0.0,) * 3, (1.0,) * 3), workers=0)


@pytest.fixture
def twins(tmp_path) -> tuple[Path, Path]:
    """An image folder of 8-bit grey PNG files, and the same in 16 bits."""
    rng, roots = np.random.default_rng(2), (tmp_path / "8", tmp_path / "16")
    for split, number in (("train", 3), ("val", 2)):
        for name in ("x", "y"):
            for root in roots:
                (root / split / name).mkdir(parents=True)
            for i in range(number):
                deep = rng.integers(0, 1 << 16, (24, 31)).astype(np.uint16)
                Image.fromarray((deep >> 8).astype(np.uint8)).save(roots[0] / split / name / f"{i}.png")
                Image.fromarray(deep).save(roots[1] / split / name / f"{i}.png")
    return roots


def test_a_data_set_of_16_bits_is_its_8_bit_twin_everywhere(twins, tmp_path):
    fingerprints = {prepare(root, tmp_path / "out" / root.name, workers=1, show=False).fingerprint for root in twins}
    assert len(fingerprints) == 1
    copies = [resize_images(root, tmp_path / "small" / root.name, 12, workers=1, show=False) for root in twins]
    for name in scan(copies[0]).files["train"]:
        assert np.array_equal(*(read_image(folder / name) for folder in copies))
    for split in ("train", "val"):
        shown = []
        for root in twins:
            source = any_size(root, tmp_path, "torchvision")
            batches = source.train(seed=0, batch_size=3) if split == "train" else source.val(batch_size=4)
            shown.append(torch.cat([images for images, _ in batches]))
        assert torch.equal(*shown)
        assert shown[0].unique().numel() > 100  # not white


def test_ffcv_reads_the_8_bit_twin(ffcv, twins, tmp_path):
    shown = [next(iter(any_size(root, tmp_path, "ffcv").val(batch_size=4)))[0] for root in twins]
    assert torch.equal(*shown)


# EXIF


def with_orientation(path: Path, value: object) -> None:
    """Saves a picture with this orientation; None: without EXIF data."""
    exif = Image.Exif()
    if value is not None:
        exif[ExifTags.Base.Orientation] = value
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 24, 3)).astype(np.uint8))
    picture.save(path, exif=exif, lossless=True)  # heeded by WebP alone


@pytest.mark.parametrize("value", [None, *range(10)])
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_an_exif_rotation_is_seen_and_not_applied(name, value, tmp_path):
    with_orientation(tmp_path / name, value)
    with_orientation(tmp_path / f"plain-{name}", None)
    samples = folder_samples(scan_of(tmp_path / name))["train"]
    pixels, rotated = samples.decode(0)
    assert rotated == (value in (2, 3, 4, 5, 6, 7, 8))
    assert np.array_equal(pixels, read_image(tmp_path / f"plain-{name}"))
    assert np.array_equal(pixels, samples.image(0))


def scan_of(path: Path):
    """The layout of a data set whose only images are links to `path`."""
    for split in ("train", "val"):
        folder = path.parent / "set" / split / "one"
        folder.mkdir(parents=True)
        (folder / path.name).symlink_to(path)
    return scan(path.parent / "set")


def test_pillow_itself_turns_tiff_files(tmp_path):
    with_orientation(tmp_path / "x.tif", 6)
    pixels, rotated = folder_samples(scan_of(tmp_path / "x.tif"))["train"].decode(0)
    assert pixels.shape == (24, 16, 3)
    assert not rotated


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_exif_data_hides_no_image(exif, tmp_path):
    with_orientation(tmp_path / "plain.jpg", None)
    with Image.open(tmp_path / "plain.jpg") as image:
        image.save(tmp_path / "x.png", exif=exif)
    pixels, rotated = folder_samples(scan_of(tmp_path / "x.png"))["train"].decode(0)
    assert np.array_equal(pixels, read_image(tmp_path / "plain.jpg"))
    assert not rotated


def test_an_orientation_of_another_type_is_none(tmp_path):
    image = Image.new("RGB", (2, 2))
    image.getexif()[ExifTags.Base.Orientation] = "6"
    assert not has_rotation(image)


@pytest.fixture
def phone(tmp_path) -> Path:
    """12 JPEG files of 24x16 pixels, three of them with a rotation, one with orientation 1."""
    root = tmp_path / "phone"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                rotated = {("train", "a", 1): 6, ("train", "b", 0): 1, ("train", "b", 2): 3, ("val", "b", 0): 8}
                with_orientation(root / split / name / f"{i}.jpg", rotated.get((split, name, i)))
    return root


def test_preparation_says_in_one_line_how_many_are_not_turned(phone, tmp_path, capsys):
    first = phone / "train/a/1.jpg"
    line = f"the EXIF rotation of 3 of 12 images is not applied (as in torchvision), first {first}\n"
    assert rotation_line([str(first)] * 3, 12) + "\n" == line
    for more in ([], ["--resize", "16"]):
        out = str(tmp_path / f"out{len(more)}")
        assert main(["--source", str(phone), "--out", out, "--workers", "2", *more]) == 0
        assert capsys.readouterr().err == line
        assert main(["--source", str(phone), "--out", out, "--workers", "2", *more]) == 0  # reads nothing
        assert capsys.readouterr().err == ""
    find_or_prepare(phone, tmp_path / "store", loader="torchvision", workers=1)
    assert capsys.readouterr().err == line


def test_without_rotations_and_without_show_nothing_is_said(phone, tmp_path, capsys):
    SyntheticData(classes=2, train_per_class=3, val_per_class=2, size=16).write_folder(tmp_path / "plain")
    prepare(tmp_path / "plain", tmp_path / "out", workers=1)
    assert "EXIF" not in capsys.readouterr().err
    prepare(phone, tmp_path / "quiet", workers=1, show=False)
    resize_images(phone, tmp_path / "quiet too", 16, workers=1, show=False)
    assert capsys.readouterr().err == ""


def test_tags_change_no_fingerprint(phone, tmp_path):
    made = [prepare(phone, tmp_path / "tagged", workers=1, show=False)]
    for path in phone.rglob("*.jpg"):
        with_orientation(path, None)
    made.append(prepare(phone, tmp_path / "plain", workers=1, show=False))
    assert made[0].fingerprint == made[1].fingerprint
