"""Files that are truncated, foreign or not what the manifest says are found without FFCV, in one line."""

import subprocess
import sys

import numpy as np
import pytest

from fastprune.errors import InputError
from fastprune.loaders.beton import FIELD, FIELDS, HEADER, PAGE, BetonWriter, check_beton, read_beton, sample_type
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import load_manifest
from fastprune.loaders.samples import JPEG, RAW, Stored, folder_samples, read_chunk, read_image

ROW = sample_type(FIELDS.values()).itemsize
TABLE = HEADER.itemsize + 3 * FIELD.itemsize  # where the table of samples begins


def stored(beton, i: int) -> bytes:
    start = int(beton.images["pointer"][i])
    return beton.path.read_bytes()[start : start + int(beton.sizes[i])]


def test_a_good_file_is_what_was_written(prepared_master, raw_master):
    manifest = load_manifest(prepared_master)
    for split, samples in folder_samples(scan(raw_master)).items():
        beton = check_beton(prepared_master / manifest.file(split)[0], manifest, split)
        assert beton.raw_size == (16, 16)
        assert beton.labels.tolist() == list(samples.labels)
        assert all(stored(beton, i) == samples.image(i).tobytes() for i in range(len(samples)))


def test_jpeg_files_are_kept_as_they_are_and_the_rest_as_pixels(varied_master, tmp_path):
    samples = folder_samples(scan(varied_master))["train"]
    with BetonWriter(tmp_path / "x.beton", samples.labels) as writer:
        for image in read_chunk(samples, "files").stored:
            writer.add(image)
        writer.finish()
    beton = read_beton(tmp_path / "x.beton")
    assert beton.raw_size is None
    modes = set()
    for i in range(len(samples)):
        pixels, jpeg = read_image(samples.name(i)), beton.images["mode"][i] == JPEG
        modes.add((samples.name(i).endswith(".png"), bool(jpeg)))
        assert (beton.images["height"][i], beton.images["width"][i]) == pixels.shape[:2]
        with open(samples.name(i), "rb") as file:
            assert stored(beton, i) == (file.read() if jpeg else pixels.tobytes())
    assert modes == {(True, False), (False, True), (False, False)}, "PNG, JPEG and CMYK"


def test_images_lie_within_a_page_or_begin_one(tmp_path):
    sizes = [PAGE // 2, PAGE // 2, 3, PAGE, 2 * PAGE + 3, 6]
    with BetonWriter(tmp_path / "x.beton", [0] * len(sizes)) as writer:
        for number, size in enumerate(sizes):
            writer.add(Stored(JPEG, 1, 1, np.full(size, number, np.uint8)))
        writer.finish()
    beton = read_beton(tmp_path / "x.beton")
    begins, ends = beton.images["pointer"].astype(int), beton.images["pointer"].astype(int) + beton.sizes - 1
    assert all(first // PAGE == last // PAGE or first % PAGE == 0 for first, last in zip(begins, ends, strict=True))
    assert [stored(beton, i) for i in range(len(sizes))] == [bytes([i]) * size for i, size in enumerate(sizes)]


def test_the_layout_is_ffcvs(prepared_master, ffcv):
    """Our description of the tables against FFCV's own."""
    code = (
        "import sys; from ffcv import reader, types; r = reader.Reader(sys.argv[1])\n"
        "print(types.HeaderType.itemsize, types.FieldDescType.itemsize, r.metadata.dtype.itemsize, r.page_size)\n"
        "print(*r.handlers); print(*r.metadata['f1']); print(*r.metadata['f0']['data_ptr'])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, prepared_master / "train.beton"]
    sizes, names, labels, pointers = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    beton = read_beton(prepared_master / "train.beton")
    assert sizes == f"{HEADER.itemsize} {FIELD.itemsize} {ROW} {PAGE}"
    assert names == "image label index"
    assert labels.split() == [str(label) for label in beton.labels]
    assert pointers.split() == [str(pointer) for pointer in beton.images["pointer"]]


def test_what_the_disk_changes_is_found_after_writing(tmp_path, monkeypatch):
    def write(spoil):
        with BetonWriter(tmp_path / "x.beton", [0, 1]) as writer:
            for _ in range(2):
                writer.add(Stored(RAW, 2, 2, np.arange(12, dtype=np.uint8)))
            monkeypatch.setattr("fastprune.loaders.beton.os.fsync", lambda handle: spoil())
            writer.finish()

    def spoil_pixels():
        patch(int(read_beton(tmp_path / "x.beton").images["pointer"][1]) + 5, b"\0\1\2")(tmp_path / "x.beton")

    with pytest.raises(OSError, match=r"image 1 in .* is not what was written"):
        write(spoil_pixels)
    with pytest.raises(OSError, match="holds other labels than were written"):
        write(lambda: patch(TABLE + 16, b"\7")(tmp_path / "x.beton"))


def patch(offset: int, content: bytes):
    def change(path):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(content)

    return change


def cut(keep):
    def change(path):
        with open(path, "r+b") as file:
            file.truncate(keep if keep >= 0 else path.stat().st_size + keep)

    return change


def last_image_field(offset: int, value: int):
    """Overwrite 8 bytes in the last row of the table of 60 samples."""
    return patch(TABLE + 59 * ROW + offset, value.to_bytes(8, "little", signed=True))


BAD = {
    "empty": (cut(0), "truncated or not a .beton"),
    "only part of the header": (cut(10), "truncated or not a .beton"),
    "only the header": (cut(HEADER.itemsize), "truncated or not a .beton"),
    "cut in the tables": (cut(TABLE + 7), "truncated or damaged"),
    "cut in the pixels": (cut(1 << 21), "truncated or damaged"),
    "last byte missing": (cut(-1), "truncated or damaged"),
    "last row missing": (cut(-24), "truncated or damaged"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated or damaged"),
    "foreign": (lambda path: path.write_bytes(b"PK\3\4" * 1000), "not a .beton file"),
    "text": (lambda path: path.write_text("no such thing\n" * 100), "not a .beton file"),
    "format 3": (patch(0, b"\3"), "not a .beton file of FFCV's format 2"),
    "one field": (patch(2, b"\1"), "has the fields image, not"),
    "field renamed": (patch(HEADER.itemsize + 1, b"picture"), "has the fields picture, label, index"),
    "field of another type": (patch(HEADER.itemsize, b"\3"), "not an RGB image"),
    "custom field": (patch(HEADER.itemsize + 2 * FIELD.itemsize, b"\xff"), "not an RGB image"),
    "never finished": (patch(16, bytes(8)), "truncated or damaged"),
    "another size in one row": (last_image_field(1, 5), "is damaged"),
    "unknown mode": (patch(TABLE, b"\2"), "is damaged"),
    "pointer beyond the end": (last_image_field(5, 1 << 40), "is damaged"),
    "pointer into the header": (last_image_field(5, 3), "is damaged"),
    "compressed": (patch(TABLE, b"\0"), "not the file that its manifest describes"),
    "other labels": (last_image_field(16, 0), "not the file that its manifest describes"),
    "label out of range": (last_image_field(16, 3), "not the file that its manifest describes"),
    "label negative": (last_image_field(16, -1), "not the file that its manifest describes"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(name, prepared):
    spoil, expected = BAD[name]
    path = prepared / "train.beton"
    spoil(path)
    with pytest.raises(InputError, match=expected) as caught:
        check_beton(path, load_manifest(prepared), "train")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_other_split_is_not_this_one(prepared_master):
    with pytest.raises(InputError, match="not the file that its manifest describes"):
        check_beton(prepared_master / "val.beton", load_manifest(prepared_master), "train")
