"""What is built from the tree: the wheel and the sdist are complete, and one top-level package is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# The fixture that builds is shared, so these tests go to one worker.
pytestmark = pytest.mark.xdist_group("packaging")
PARTS = ["fastprune", "kernels", "loaders", "tests", "scripts", "bench", "docs"]


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_under(folder: Path, part: str) -> set[str]:
    """Paths below `folder`, links followed, without what running the code leaves."""
    return {
        str((Path(where) / name).relative_to(folder))
        for where, _, names in os.walk(folder / part, followlinks=True)
        for name in names
        if "__pycache__" not in where and not name.endswith(".pyc")
    }


def files_in_wheel(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


@dataclass(frozen=True)
class Built:
    source: Path
    sdist: Path
    wheel: Path
    """Built from the sdist."""
    wheel_of_tree: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A copy of the tree (nothing is left in the real one), built through an sdist and once more without it."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, symlinks=True, ignore=skip)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", folder / "dist", cwd=source)
    run(*build, "--wheel", "--outdir", folder / "direct", cwd=source)
    return Built(
        source,
        next((folder / "dist").glob("*.tar.gz")),
        next((folder / "dist").glob("*.whl")),
        next((folder / "direct").glob("*.whl")),
    )


def test_wheel_is_the_package_and_nothing_else(built: Built) -> None:
    expected = files_under(built.source, "fastprune")
    assert {
        "fastprune/kernels/__init__.py",
        "fastprune/loaders/__init__.py",
        "fastprune/figures/__init__.py",
    } < expected
    assert files_in_wheel(built.wheel) == expected
    assert files_in_wheel(built.wheel_of_tree) == expected


def test_sdist_is_the_tree(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist}
    for part in PARTS:
        assert files_under(built.source, part) <= members.keys()
    assert {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"} <= members.keys()
    assert members["fastprune/kernels/__init__.py"].isfile()
    assert members["fastprune/kernels"].isdir()


def test_installed_wheel_imports_from_where_it_is(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--offline", "--no-deps"]
    run(*install, "--target", target, built.wheel, cwd=tmp_path)
    top = {path.name for path in target.iterdir() if path.name[0] != "." and path.suffix != ".dist-info"}
    # One package to import; the command beside it is what pyproject.toml's [project.scripts] names.
    assert top - {"bin"} == {"fastprune"}
    assert [path.name for path in (target / "bin").iterdir()] == ["fastprune"]
    said = run(target / "bin" / "fastprune", "--version", cwd=tmp_path, PYTHONPATH=str(target))
    assert said.startswith("fastprune ")
    code = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]))"
    packages = ["fastprune", "fastprune.kernels", "fastprune.loaders"]
    where = run(sys.executable, "-c", code, *packages, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert where == [str(target.joinpath(*package.split("."), "__init__.py")) for package in packages]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}


def test_constraints_pin_every_declared_dependency_within_its_bounds() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = config["project"]
    declared = [*config["build-system"]["requires"], *project["dependencies"]]
    declared += [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = pins()
    for requirement in map(Requirement, declared):
        version = str(pinned[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_constraints_are_exact_and_name_no_host() -> None:
    for pin in pins().values():
        assert pin.url is None
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), str(pin)
