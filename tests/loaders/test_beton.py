"""Files that are truncated, foreign or not what the manifest says are found without FFCV, in one line."""

import numpy as np
import pytest

from fastprune.errors import InputError
from fastprune.loaders.beton import FIELD, HEADER, SAMPLE, check_beton, estimated_bytes, verify_pixels
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import load_manifest
from fastprune.loaders.samples import digest, folder_samples

TABLE = HEADER.itemsize + 3 * FIELD.itemsize  # where the table of samples begins


def test_a_good_file_is_what_was_written(prepared_master, raw_master):
    manifest = load_manifest(prepared_master)
    for split, samples in folder_samples(scan(raw_master)).items():
        name, size = manifest.file(split)
        beton = check_beton(prepared_master / name, manifest, split)
        assert beton.labels.tolist() == list(samples.labels)
        assert size <= estimated_bytes(len(samples), 16, 16, workers=2)
        verify_pixels(beton, samples.labels, [digest(samples.image(i)) for i in range(len(samples))])


def test_the_layout_is_ffcvs(prepared_master):
    """Our description of the tables against FFCV's own."""
    types = pytest.importorskip("ffcv.types")
    reader = pytest.importorskip("ffcv.reader").Reader(str(prepared_master / "train.beton"))
    assert types.HeaderType.itemsize == HEADER.itemsize
    assert types.FieldDescType.itemsize == FIELD.itemsize
    assert reader.metadata.dtype.itemsize == SAMPLE.itemsize
    beton = check_beton(prepared_master / "train.beton")
    assert np.array_equal(reader.metadata["f1"], beton.labels)
    assert np.array_equal(reader.metadata["f0"]["data_ptr"], beton.pointers)


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
    return patch(TABLE + 59 * SAMPLE.itemsize + offset, value.to_bytes(8, "little", signed=True))


BAD = {
    "empty": (cut(0), "truncated or no .beton"),
    "only part of the header": (cut(10), "truncated or no .beton"),
    "only the header": (cut(HEADER.itemsize), "truncated or damaged"),
    "cut in the tables": (cut(TABLE + 7), "truncated or damaged"),
    "cut in the pixels": (cut(1 << 21), "truncated or damaged"),
    "last byte missing": (cut(-1), "truncated or damaged"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated or damaged"),
    "foreign": (lambda path: path.write_bytes(b"PK\3\4" * 1000), "no .beton file"),
    "text": (lambda path: path.write_text("no such thing\n" * 100), "no .beton file"),
    "format 3": (patch(0, b"\3"), "no .beton file of FFCV's format 2"),
    "two fields": (patch(2, b"\2"), "2 fields, expected 3"),
    "field renamed": (patch(HEADER.itemsize + 1, b"picture"), "its fields are not image, label, index"),
    "field of another type": (patch(HEADER.itemsize, b"\3"), "its fields are not"),
    "never finished": (patch(16, bytes(8)), "truncated or damaged"),
    "another size in one row": (last_image_field(1, 5), "damaged, or not raw images"),
    "compressed": (patch(TABLE, b"\0"), "damaged, or not raw images"),
    "pointer beyond the end": (last_image_field(5, 1 << 40), "damaged, or not raw images"),
    "pointer into the header": (last_image_field(5, 3), "damaged, or not raw images"),
    "out of order": (last_image_field(24, 3), "damaged, or not raw images"),
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


def test_changed_pixels_and_labels_are_found_after_writing(prepared, raw_master):
    samples = folder_samples(scan(raw_master))["train"]
    digests = [digest(samples.image(i)) for i in range(len(samples))]
    beton = check_beton(prepared / "train.beton")
    with pytest.raises(OSError, match="other labels"):
        verify_pixels(beton, [0] * 60, digests)
    patch(int(beton.pointers[17]) + 5, b"\0\1\2\3")(prepared / "train.beton")
    with pytest.raises(OSError, match="image 17"):
        verify_pixels(beton, samples.labels, digests)
