"""Scripts as people type them: with a Python that lacks the packages, with and without .venv beside them."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("reproduce.py", "train.py", "store.py", "prepare.py", "doctor.py")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python without packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without .venv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "here" / "scripts")
    for name in ("fastprune", "kernels", "loaders"):
        (tmp_path / "here" / name).symlink_to(ROOT / name)
    return tmp_path / "here"


def run(python: Path, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), str(script), *arguments], capture_output=True, text=True, cwd=script.parent)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_environment_one_line_names_make_setup(script, bare, checkout):
    done = run(bare, checkout / "scripts" / script, "--help")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{script}: {bare} lacks torch: run `make setup` in {checkout}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_an_environment_it_goes_on_there_and_says_so(script, bare, checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    # Through the link this Python does not find its packages: what it is told to find them by stands in for a venv.
    (checkout / ".venv" / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (checkout / ".venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    done = run(bare, checkout / "scripts" / script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{script}: {bare} lacks torch: continuing with {checkout / '.venv' / 'bin' / 'python'}\n"
    assert f"usage: {script}" in done.stdout


def test_an_unfinished_environment_does_not_call_itself(bare, checkout):
    (checkout / ".venv").symlink_to(bare.parents[1])
    done = run(checkout / ".venv" / "bin" / "python", checkout / "scripts" / "reproduce.py", "--fig", "A2")
    assert done.returncode == 2
    assert "run `make setup`" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_eight_lines(script):
    lines = [line for line in (ROOT / "scripts" / script).read_text().splitlines() if line.strip()]
    assert len(lines) <= 8
