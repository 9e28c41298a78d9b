"""`doctor`: each thing that it looks at, as it is, as it would be missing, and broken."""

from types import SimpleNamespace

import pytest
import torch

from fastprune.cli import doctor
from fastprune.cli.command import BAD_INPUT, DONE, FAILED
from fastprune.cli.doctor import BROKEN, MISSING, OK, main
from fastprune.loaders import SyntheticData


def test_what_is_here_is_a_line_each(tmp_path, capsys):
    folder = tmp_path / "tiny-imagenet-200"
    SyntheticData(classes=2, train_per_class=5, val_per_class=2, size=8).write_folder(folder)
    code = main(["--store", str(tmp_path / "new" / "runs"), "--data", str(folder)])
    first, *lines = [line for line in capsys.readouterr().out.splitlines() if "mend it: " not in line]
    assert first.startswith("fastprune ")
    assert [line.split()[1] for line in lines] == ["CPU", "GPU", "FFCV", "Ray", "disk", "data"]
    assert code == (FAILED if any(line.split()[0] == BROKEN for line in lines) else DONE)
    assert lines[0].split()[0] == OK
    assert lines[1].split()[0] == (OK if torch.cuda.is_available() else MISSING)
    assert "10 images to train and 4 to validate, not prepared yet" in lines[-1]
    assert not (tmp_path / "new").exists()


def test_a_data_set_that_cannot_be_read_is_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ffcv", lambda: doctor.Finding("FFCV", OK, "of seconds to import"))
    assert main(["--data", str(tmp_path / "none")]) == FAILED
    assert f"  broken   data  no such data folder: {tmp_path}/none\n" in capsys.readouterr().out
    found = doctor.images("synthetic", tmp_path)
    assert (found.state, "prepared" in found.says) == (OK, True)
    assert doctor.images(None, tmp_path).state == MISSING


@pytest.mark.parametrize(("here", "mend"), [("ffcv", "scripts/setup.sh"), ("ray", "fastprune[ray]")])
def test_what_is_missing_names_what_it_is_for_and_what_mends_it(monkeypatch, here, mend):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = getattr(doctor, here)()
    assert found.state == MISSING
    assert mend in found.mend


def test_ffcv_that_cannot_be_imported_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    answers = {
        "Traceback ...\nImportError: libturbojpeg.so.0: cannot open": "ImportError: libturbojpeg.so.0: cannot open",
        "": "imported: exit code -11",
    }
    for error, expected in answers.items():
        done = SimpleNamespace(returncode=-11, stderr=error)
        monkeypatch.setattr(doctor.subprocess, "run", lambda *command, done=done, **how: done)
        found = doctor.ffcv()
        assert found.state == BROKEN
        assert found.says.endswith(expected)


def test_a_build_of_torch_for_cpus_is_told_from_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build for CPUs" in doctor.gpu().says
    assert "--torch-backend" in doctor.gpu().mend
    assert "--preset cpu fits" in doctor.gpu().says
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert doctor.gpu().says.startswith("torch sees none: --preset cpu fits")
    assert doctor.gpu().mend == ""


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2e8))
    found = doctor.disk(tmp_path / "later")
    assert (found.state, found.says.split(" free")[0]) == (MISSING, "0.2 GB")


def test_bad_usage_is_one_line(capsys):
    assert main(["--dta", "x"]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
