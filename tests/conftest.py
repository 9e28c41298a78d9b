"""Shared by all tests: one thread a process, and the real images where there are some."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import tarfile
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption("--device", default="cpu", help="where operations are tested: cpu (the default), cuda or cuda:1")
    # A machine with a GPU may lack the plug-ins that pyproject.toml sets up; what it says of them is then ignored.
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of pytest-timeout, which is not installed")
    if not pluginmanager.hasplugin("benchmark"):
        parser.addoption("--benchmark-disable", action="store_true", help="of pytest-benchmark, which is not installed")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("timeout(seconds): of pytest-timeout", "xdist_group(name): of pytest-xdist"):
        config.addinivalue_line("markers", marker)
    require_device(config.getoption("--device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test's random numbers do not depend on what ran before it in its process: it fails always, or never."""
    torch.manual_seed(0)


def require_device(name: str) -> None:
    """UsageError, one line, for a device that is not there: a run that skips all its tests would look green."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise pytest.UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and torch.cuda.device_count() <= int(index or 0):
        raise pytest.UsageError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    if kind == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(f"--device {name}: unset TRITON_INTERPRET, which is for tests on a CPU")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def no_options_are_timed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU options that a test does not force are off: to time them takes longer than most tests. Processes that a test
    starts do time them."""
    if not request.config.getoption("--device").startswith("cuda"):
        return
    from fastprune.specs import GpuOptions
    from fastprune.training import trainer
    from fastprune.training.tuning import Choice

    monkeypatch.setattr(trainer, "choose", lambda names, forced, measure: Choice(GpuOptions(**forced), {}))


VARIABLE = "FASTPRUNE_TINY_IMAGENET"
CLASSES = 4


@pytest.fixture(scope="session")
def given() -> Path:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"{VARIABLE} names no folder: {folder}")
    return Path(folder)


def unpack(given: Path, to: Path, *patterns: str) -> Path:
    """The data set's parts that match, unpacked; `given` itself where it is unpacked already."""
    archives = [archive for pattern in patterns for archive in sorted(given.glob(pattern))]
    for archive in archives:
        with tarfile.open(archive) as content:
            content.extractall(to, filter="data")
    return to if archives else given


@pytest.fixture(scope="session")
def few_classes(given, tmp_path_factory) -> Path:
    """The first classes of the real data set as a data set of its own."""
    root = unpack(given, tmp_path_factory.mktemp("parts"), "train-0.tar.gz", "val.tar.gz")
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    few = tmp_path_factory.mktemp("few") / "tiny-imagenet-200"
    wnids = sorted(path.name for path in (root / "train").iterdir())[:CLASSES]
    for wnid in wnids:
        shutil.copytree(root / "train" / wnid, few / "train" / wnid)
    (few / "val" / "images").mkdir(parents=True)
    lines = (root / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)
    lines = [line for line in lines if line.split("\t")[1] in wnids]
    (few / "val" / "val_annotations.txt").write_text("".join(lines))
    for line in lines:
        name = line.split("\t")[0]
        shutil.copy(root / "val" / "images" / name, few / "val" / "images" / name)
    return few


@pytest.fixture(scope="session")
def small_figure(tmp_path_factory) -> Path:
    """One small figure, made by one process: folders out and store."""
    from tests.small_figure import make

    return make(tmp_path_factory.mktemp("figure"))
