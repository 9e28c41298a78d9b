"""From a folder to .beton files: what comes out, what is refused, and what a full disk or a kill leaves."""

import importlib
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

from fastprune.cli.prepare_data import main
from fastprune.errors import InputError
from fastprune.loaders import inspection, publish
from fastprune.loaders.beton import check_beton
from fastprune.loaders.inspection import inspect
from fastprune.loaders.layout import scan
from fastprune.loaders.manifest import load_manifest
from fastprune.loaders.publish import prepare
from fastprune.loaders.samples import folder_samples, read_image
from fastprune.loaders.synthetic import SyntheticData
from fastprune.loaders.writer import write_betons

needs_ffcv = pytest.mark.usefixtures("ffcv")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]


def one_line(text: str) -> str:
    """The last line, where a script says what is wrong; progress bars come before it."""
    assert text.endswith("\n")
    return text.replace("\r", "\n").splitlines()[-1]


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


def nothing_left(shared: set[str], mark: str | None = None) -> None:
    """Wait until only `shared` is in shared memory (other tests may use it too), and no process holds `mark`."""
    deadline = time.monotonic() + 30
    while (left := set(os.listdir("/dev/shm")) - shared) or (mark and with_mark(mark)):
        assert time.monotonic() < deadline, f"left behind: {left}, {mark and with_mark(mark)}"
        time.sleep(0.05)


# What comes out


@needs_ffcv
def test_a_prepared_folder(prepared_master, raw_master):
    manifest, layout = load_manifest(prepared_master), scan(raw_master)
    assert contents(prepared_master) == {"train.beton", "val.beton", "manifest.json"}
    assert manifest.classes == layout.classes
    assert manifest.train_per_class == layout.per_class("train")
    assert manifest.source == str(raw_master.resolve())
    pixels = np.stack([read_image(raw_master / name) for name in layout.files["train"]]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=(0, 1, 2)), rtol=1e-9)


@needs_ffcv
def test_a_second_call_does_nothing(prepared, raw_master, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    monkeypatch.setattr(publish, "inspect", None)  # would be called to decode anything
    assert prepare(raw_master, prepared, show=False) == load_manifest(prepared)
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@needs_ffcv
def test_the_same_images_elsewhere_are_recognised_and_others_refused(prepared, raw, monkeypatch):
    monkeypatch.setattr(publish, "write_betons", None)  # would be called to write anything
    os.utime(raw / scan(raw).files["train"][0], ns=(5, 5))
    manifest = prepare(raw, prepared, show=False)
    assert manifest.source == str(raw.resolve())
    assert load_manifest(prepared) == manifest
    Image.new("RGB", (16, 16)).save(raw / scan(raw).files["train"][0])
    with pytest.raises(InputError, match="already holds other images"):
        prepare(raw, prepared, show=False)
    assert load_manifest(prepared) == manifest


@needs_ffcv
def test_a_lost_file_is_made_again(prepared, raw_master):
    before = check_beton(prepared / "val.beton").labels
    (prepared / "val.beton").unlink()
    prepare(raw_master, prepared, workers=1, show=False)
    assert np.array_equal(check_beton(prepared / "val.beton").labels, before)


def test_the_fingerprint_is_of_labels_pixels_and_order(raw):
    def fingerprint():
        return inspect(folder_samples(scan(raw)), workers=1, list_folder=raw, show=False).fingerprint

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
    inspect(folder_samples(scan(raw)), workers=2, list_folder=raw, show=False)


# What is refused


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_one_truncated_image_is_named(raw, tmp_path, capsys):
    image = raw / scan(raw).files["train"][25]
    truncate(image)
    assert main(["--source", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
    message = one_line(capsys.readouterr().err)
    assert f"cannot read 1 of 78 images: {image.resolve()}" in message
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
    listed = (tmp_path / "out" / inspection.LIST_NAME).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == sorted(str(path.resolve()) for path in broken)
    assert contents(tmp_path / "out") == {inspection.LIST_NAME}


def test_images_of_varying_size_are_refused(raw, tmp_path):
    odd = raw / scan(raw).files["val"][3]
    Image.new("RGB", (16, 20)).save(odd)
    with pytest.raises(InputError, match=r"varying size .* has 16x16 pixels, .* has 20x16") as caught:
        prepare(raw, tmp_path / "out", workers=1, show=False)
    assert str(odd.resolve()) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_without_ffcv_one_line_says_what_to_do(raw_master, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastprune.loaders.choice.find_spec", lambda name: None)
    assert main(["--source", str(raw_master), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ffcv, which is not installed" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "x"], "--source is missing"),
        (["--source", "x"], "--out"),
        (["--source", "x", "--out", "y", "--dataset", "mnist"], "mnist"),
        (["--source", "x", "--out", "y", "--workers", "0"], "--workers is 0"),
        (["--source", "x", "--out", "y", "--workers", "many"], "many"),
        (["--source", "/no/such/folder", "--out", "y"], "no such data folder: /no/such/folder"),
    ],
    ids=["no source", "no out", "dataset", "zero workers", "word", "missing folder"],
)
def test_bad_usage_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert contents(tmp_path) == set()


def test_another_version_or_a_damaged_manifest_in_out(raw_master, listed_master, tmp_path):
    out = Path(shutil.copytree(listed_master, tmp_path / "out"))
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="is of version 2, this fastprune reads 1"):
        prepare(raw_master, out, beton=False, show=False)
    (out / "manifest.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"cannot read .*manifest\.json"):
        prepare(raw_master, out, beton=False, show=False)


def test_out_is_a_file_or_below_one(raw_master, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="cannot write to"):
            prepare(raw_master, out, beton=False, show=False)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB, or a skip where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_read_only_out(raw_master, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for out in (small_disk, small_disk / "new"):
        with pytest.raises(InputError, match="Read-only file system"):
            prepare(raw_master, out, beton=False, show=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_out_without_permission(raw_master, tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission denied"):
        prepare(raw_master, tmp_path / "out", beton=False, show=False)


@needs_ffcv
def test_too_little_room_is_known_before_writing(raw_master, small_disk, monkeypatch):
    monkeypatch.setattr(publish, "write_betons", None)
    with pytest.raises(InputError, match=r"has 3 MB free, the .beton files take \d+ MB"):
        prepare(raw_master, small_disk / "out", workers=1, show=False)
    assert contents(small_disk) == set()


@needs_ffcv
def test_a_disk_that_fills_meanwhile(raw_master, small_disk, monkeypatch):
    """FFCV's writer would wait for ever for its dead worker."""
    monkeypatch.setattr(publish, "estimated_bytes", lambda *size: 0)
    shared = set(os.listdir("/dev/shm"))
    with pytest.raises(InputError, match="No space left on device") as caught:
        prepare(raw_master, small_disk / "out", workers=2, show=False)
    assert "\n" not in str(caught.value)
    assert contents(small_disk) == set()
    nothing_left(shared)


@needs_ffcv
def test_a_file_size_limit(raw_master, tmp_path):
    """The other way in which a write falls short: the kernel takes a part of it and says so only in a number."""
    command = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *SCRIPT, "--source", raw_master, "--out"]
    done = subprocess.run([*command, tmp_path / "out", "--workers", "1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "cannot write" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()


@needs_ffcv
def test_a_writer_that_cannot_read_its_images_does_not_hang(raw, tmp_path):
    samples = folder_samples(scan(raw))["train"]
    (raw / samples.files[50]).unlink()
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        write_betons({tmp_path / "x.beton": samples}, height=16, width=16, workers=2, show=False)


@needs_ffcv
def test_a_writer_whose_process_is_killed_does_not_hang(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "class Deadly:\n"
        "    labels = [0] * 8\n"
        "    def __len__(self): return 8\n"
        "    def image(self, i): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    samples = importlib.import_module("deadly").Deadly()
    with pytest.raises(RuntimeError, match=r"died \(exit code -9\)"):
        write_betons({tmp_path / "x.beton": samples}, height=16, width=16, workers=1, show=False)


# What a kill leaves


@needs_ffcv
@pytest.mark.parametrize(
    ("moment", "signum"),
    [("reading", signal.SIGKILL), ("writing", signal.SIGKILL), ("writing", signal.SIGINT)],
    ids=["killed while reading", "killed while writing", "interrupted while writing"],
)
def test_killed_it_leaves_no_data_set_and_no_process(moment, signum, tmp_path):
    raw, out, mark = tmp_path / "raw", tmp_path / "out", uuid.uuid4().hex
    SyntheticData(classes=2, train_per_class=4000, val_per_class=10, size=8).write_folder(raw)
    command = [*SCRIPT, "--source", raw, "--out", out, "--workers", "2"]
    shared = set(os.listdir("/dev/shm"))
    running = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "MARK": mark})
    awaited = out / ".lock" if moment == "reading" else out / publish.UNFINISHED / "train.beton"
    while not awaited.exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.002)
    running.send_signal(signum)
    running.wait()
    running.stderr.close()
    assert running.returncode == (-signum if signum == signal.SIGKILL else 130)
    assert not (out / "manifest.json").exists()
    nothing_left(shared, mark)
    if signum == signal.SIGINT:
        assert not out.exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert contents(out) == {"train.beton", "val.beton", "manifest.json"}
    assert len(check_beton(out / "train.beton", load_manifest(out), "train")) == 8000


@needs_ffcv
def test_two_at_once_make_one(raw_master, tmp_path):
    command = [*SCRIPT, "--source", raw_master, "--out", tmp_path / "out", "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("writing .beton" in errors for _, errors in outputs) == 1
    assert contents(tmp_path / "out") == {"train.beton", "val.beton", "manifest.json"}
