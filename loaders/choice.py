"""Which loader reads a data set, by what is there. Standard library only."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastprune.errors import InputError
from fastprune.loaders.manifest import Manifest

LOADERS = ("auto", "ffcv", "torchvision", "synthetic")


class LoaderChoice(NamedTuple):
    """A loader's name, and in a few words why it was chosen."""

    name: str
    why: str


def choose_loader(manifest: Manifest, folder: Path | None, loader: str = "auto") -> LoaderChoice:
    """`loader` itself where it can read the data, or for "auto" the first that can of synthetic, ffcv and torchvision.

    InputError where none can. Nothing is imported or opened: a broken installation of ffcv is an error when it is used,
    never a reason to take another loader unasked.
    """
    if loader != "auto":
        if loader not in _OBSTACLES:
            raise InputError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
        if obstacle := _OBSTACLES[loader](manifest, folder):
            raise InputError(f"loader {loader} cannot be used: {obstacle}")
        return LoaderChoice(loader, "asked for")
    passed: list[str] = []
    for name, look in _OBSTACLES.items():
        obstacle = look(manifest, folder)
        if obstacle is None:
            return LoaderChoice(name, "; ".join(passed) if name == "torchvision" else "the fastest here")
        if name != "synthetic":
            passed.append(f"not {name}: {obstacle}")
    raise InputError(f"no loader can read the data in {folder}: {'; '.join(passed)}")


def ffcv_is_there() -> bool:
    """Whether FFCV is installed; it is not imported."""
    return find_spec("ffcv") is not None


def need_ffcv() -> None:
    """InputError where FFCV is not installed."""
    if not ffcv_is_there():
        raise InputError(
            ".beton files need ffcv, which is not installed here: install it (README.md says how), or give the image "
            "folder itself to reproduce.py, which then reads it with torchvision"
        )


def source_folder(manifest: Manifest, folder: Path | None) -> Path | None:
    """The image folder that the data was made from, if the manifest names one."""
    if manifest.source is None:
        return None
    return Path(manifest.source) if folder is None else folder / manifest.source


def _synthetic_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    if manifest.synthetic is None:
        return f"{manifest.name} is not generated"
    return None if folder is None else f"{folder} holds files"


def _ffcv_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    if folder is None or manifest.train_file is None:
        return "there are no .beton files"
    return None if ffcv_is_there() else "ffcv is not installed"


def _torchvision_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    source = source_folder(manifest, folder)
    if source is None:
        return "there are no image files"
    return None if source.is_dir() else f"the image folder {source} is gone"


_OBSTACLES: dict[str, Callable[[Manifest, Path | None], str | None]] = {
    "synthetic": _synthetic_obstacle,
    "ffcv": _ffcv_obstacle,
    "torchvision": _torchvision_obstacle,
}
