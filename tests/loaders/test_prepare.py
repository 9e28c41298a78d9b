"""From a folder to .beton files: what comes out, what is refused, and what a full disk or a kill leaves."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastprune.cli.prepare import main
from fastprune.errors import InputError
from fastprune.loaders import preparation, samples
from fastprune.loaders.beton import check_beton
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import load_manifest
from fastprune.loaders.preparation import prepare, read_data_set
from fastprune.loaders.samples import LIST_NAME, folder_samples, in_processes, read_image
from fastprune.loaders.synthetic import SyntheticData
from tests.loaders.conftest import heed_interrupts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare.py")]
FILES = {"train.beton", "val.beton", "manifest.json"}


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def with_mark(mark: str) -> list[int]:
    """Processes whose environment holds `mark`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for_the_end(mark: str) -> None:
    while with_mark(mark):  # pytest's own limit ends it
        time.sleep(0.02)


# What comes out


def test_a_prepared_folder(prepared_master, raw_master):
    manifest, layout = load_manifest(prepared_master), scan(raw_master)
    assert contents(prepared_master) == FILES
    assert manifest.classes == layout.classes
    assert manifest.train_per_class == layout.per_class("train")
    assert manifest.source == str(raw_master.resolve())
    pixels = np.stack([read_image(raw_master / name) for name in layout.files["train"]]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_files_do_not_depend_on_the_number_of_processes(
    workers, prepared_master, raw_master, tmp_path, monkeypatch
):
    monkeypatch.setattr(samples, "CHUNK", 7)
    prepare(raw_master, tmp_path / "out", workers=workers, show=False)
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (prepared_master / name).read_bytes()


def test_a_second_call_does_nothing(prepared, raw_master, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    monkeypatch.setattr(preparation, "read_data_set", None)  # would be called to decode anything
    assert prepare(raw_master, prepared, show=False) == load_manifest(prepared)
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_the_same_images_elsewhere_are_recognised_and_others_refused(prepared, raw, monkeypatch):
    monkeypatch.setattr(preparation, "BetonWriter", None)  # would be called to write anything
    os.utime(raw / scan(raw).files["train"][0], ns=(5, 5))
    manifest = prepare(raw, prepared, workers=1, show=False)
    assert manifest.source == str(raw.resolve())
    assert load_manifest(prepared) == manifest
    Image.new("RGB", (16, 16)).save(raw / scan(raw).files["train"][0])
    with pytest.raises(InputError, match="already holds other images"):
        prepare(raw, prepared, workers=1, show=False)
    assert load_manifest(prepared) == manifest


def test_a_lost_file_is_made_again(prepared, raw_master):
    before = (prepared / "val.beton").read_bytes()
    (prepared / "val.beton").unlink()
    prepare(raw_master, prepared, workers=1, show=False)
    assert (prepared / "val.beton").read_bytes() == before


def test_the_fingerprint_is_of_labels_pixels_and_order(raw, tmp_path):
    def fingerprint():
        data = folder_samples(scan(raw))
        return read_data_set(data, tmp_path, "nothing", list_folder=raw, workers=1, show=False).fingerprint

    original = fingerprint()
    files = scan(raw).files
    image = raw / files["train"][3]
    image.write_bytes(image.read_bytes() + b"a comment after the end")
    assert fingerprint() == original
    Image.fromarray(read_image(image) ^ 1).save(image.with_suffix(".png"))
    image.unlink()
    changed = fingerprint()
    assert changed != original
    first, second = raw / files["val"][0], raw / files["val"][1]
    first.rename(raw / "x")
    second.rename(first)
    (raw / "x").rename(second)
    assert fingerprint() not in (original, changed)


def test_grey_images_become_rgb(raw):
    image = raw / scan(raw).files["train"][0]
    Image.open(image).convert("L").save(image)
    pixels = read_image(image)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[..., :1] == pixels).all()


@pytest.mark.parametrize("named", [[], ["--dataset", "miniplaces"]], ids=["seen", "named"])
def test_the_command(named, mini_master, tmp_path, capsys):
    command = [*named, "--source", str(mini_master), "--workers", "1", "--out", str(tmp_path / "out")]
    for before in ("", "already there: "):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{before}{tmp_path}/out: 24 train and 12 val images of 4 classes, 24x16")


# What is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_one_truncated_image_is_named(raw, tmp_path, capsys):
    image = raw / scan(raw).files["train"][25]
    truncate(image)
    assert main(["--source", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    assert f"cannot read 1 of 78 images: {image.resolve()}" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_all_unreadable_images_are_listed(raw, tmp_path):
    files = scan(raw).files
    broken = [raw / files["train"][2], raw / files["train"][40], raw / files["val"][0]]
    truncate(broken[0])
    broken[1].write_bytes(b"")
    broken[2].write_text("no image")
    with pytest.raises(InputError, match=r"cannot read 3 of 78 images, first .*all are in") as caught:
        prepare(raw, tmp_path / "out", workers=2, show=False)
    assert "\n" not in str(caught.value)
    listed = (tmp_path / "out" / LIST_NAME).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == sorted(str(path.resolve()) for path in broken)
    assert contents(tmp_path / "out") == {LIST_NAME}


@pytest.mark.parametrize("beton", [True, False])
def test_images_of_varying_size_are_refused(beton, raw, tmp_path):
    odd = raw / scan(raw).files["val"][3]
    Image.new("RGB", (16, 20)).save(odd)
    with pytest.raises(InputError, match=r"varying size .* has 16x16 pixels, .* has 20x16; .* --resize N") as caught:
        prepare(raw, tmp_path / "out", workers=1, beton=beton, show=False)
    assert str(odd.resolve()) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "x"], "--source is missing"),
        (["--source", "x"], "--out"),
        (["--source", "x", "--out", "y", "--dataset", "mnist"], "mnist"),
        (["--source", "x", "--out", "y", "--workers", "0"], "--workers: 0 is not"),
        (["--source", "x", "--out", "y", "--workers", "many"], "many"),
        (["--source", "x", "--out", "y", "--resize", "7"], "--resize: 7 is not"),
        (["--source", "/no/such/folder", "--out", "y"], "no such data folder: /no/such/folder"),
        (["--dataset", "miniplaces", "--download", "--out", "y"], "--download supports Tiny ImageNet only"),
        (["--dataset", "miniplaces", "--source", "RAW", "--out", "y"], "holds tiny-imagenet-200: omit --dataset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line(arguments, expected, raw_master, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(raw_master) if word == "RAW" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert contents(tmp_path) == set()


def test_another_version_or_a_damaged_manifest_in_out(raw_master, listed_master, tmp_path):
    out = Path(shutil.copytree(listed_master, tmp_path / "out"))
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="is of version 2, this fastprune reads 1"):
        prepare(raw_master, out, show=False)
    (out / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"cannot read .*manifest\.json"):
        prepare(raw_master, out, show=False)


def test_out_is_a_file_or_below_one(raw_master, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="cannot write to"):
            prepare(raw_master, out, show=False)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, or a skip where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_read_only_out(raw_master, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for out in (small_disk, small_disk / "new"):
        with pytest.raises(InputError, match="Read-only file system"):
            prepare(raw_master, out, show=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(raw_master, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission denied"):
        prepare(raw_master, tmp_path / "out", show=False)


def test_too_little_room_is_known_before_writing(tmp_path, small_disk, monkeypatch):
    SyntheticData(classes=2, train_per_class=20, val_per_class=2, size=32).write_folder(tmp_path / "raw")
    monkeypatch.setattr(preparation, "BetonWriter", None)
    with pytest.raises(InputError, match=r"has 0 MB free, the .beton files take 0 MB: make room"):
        prepare(tmp_path / "raw", small_disk / "out", workers=1, show=False)
    assert contents(small_disk) == set()


def test_a_disk_that_fills_meanwhile(raw_master, small_disk):
    """There is room for the pixels of 60 + 18 images of 16x16, but not for the tables beside."""
    with pytest.raises(InputError, match="No space left on device") as caught:
        prepare(raw_master, small_disk / "out", workers=2, show=False)
    assert "\n" not in str(caught.value)
    assert contents(small_disk) == set()


def test_a_file_size_limit(raw_master, tmp_path):
    """The other way in which a write falls short: the kernel takes a part of it and says so only in a number."""
    command = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *SCRIPT, "--source", raw_master, "--out"]
    done = subprocess.run([*command, tmp_path / "out", "--workers", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# Processes, and what a kill leaves


def double(number: int) -> int:
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 99:
        time.sleep(600)
    return 2 * number


def test_results_come_in_order():
    assert list(in_processes(double, ((n,) for n in range(20, 60)), 3)) == [2 * n for n in range(20, 60)]


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(InputError, match="a process that reads images was killed: try again with fewer workers"):
        list(in_processes(double, ((n,) for n in range(20)), 2))


@pytest.mark.parametrize(
    ("signum", "moment"),
    [
        pytest.param(signal.SIGKILL, "writing", id="killed-writing"),
        pytest.param(signal.SIGINT, "reading", id="interrupted-reading"),
        pytest.param(signal.SIGKILL, "reading", id="killed-reading", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "writing", id="interrupted-writing", marks=pytest.mark.slow),
    ],
)
def test_stopped_it_leaves_no_data_set_and_no_process(moment, signum, tmp_path):
    raw, out, mark = tmp_path / "raw", tmp_path / "out", uuid.uuid4().hex
    SyntheticData(classes=2, train_per_class=4000, val_per_class=10, size=8).write_folder(raw)
    command = [*SCRIPT, "--source", raw, "--out", out, "--workers", "2"]
    environment = {**os.environ, "MARK": mark}
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=heed_interrupts
    )
    awaited = out / ".lock" if moment == "reading" else out / preparation.UNFINISHED / "train.beton"
    while not awaited.exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    # An interrupt from a terminal reaches the whole group.
    (os.killpg if signum == signal.SIGINT else os.kill)(running.pid, signum)
    running.wait()
    said = running.stderr.read().decode()
    running.stderr.close()
    assert running.returncode == (-signum if signum == signal.SIGKILL else 130)
    assert "Traceback" not in said
    assert not (out / "manifest.json").exists()
    wait_for_the_end(mark)
    if signum == signal.SIGINT:
        assert not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert contents(out) == FILES
    assert len(check_beton(out / "train.beton", load_manifest(out), "train")) == 8000


def test_two_at_once_make_one(raw_master, tmp_path):
    command = [*SCRIPT, "--source", raw_master, "--out", tmp_path / "out", "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({output.removeprefix("already there: ") for output in outputs}) == 1
    assert contents(tmp_path / "out") == FILES
