"""Choose the loader that reads a data set, from its files and the packages installed. Standard library only."""

from collections.abc import Callable
from ctypes import CDLL
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fastprune.console import printable
from fastprune.errors import InputError
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.manifest import Manifest

LOADERS = ("auto", "resident", "ffcv", "torchvision", "synthetic")
# What "auto" tries on a CPU, fastest first. Resident is left out: each worker process would hold its own copy of the
# images (2.2 GB instead of 1.0 for Tiny ImageNet, bench/NOTES.md).
_UNASKED = ("synthetic", "ffcv", "torchvision")


class LoaderChoice(NamedTuple):
    """Name of a loader, and the reason for the choice in a few words."""

    name: str
    why: str


def choose_loader(
    manifest: Manifest, folder: Path | None, loader: str = "auto", *, device: str = "cpu", copies: int = 1
) -> LoaderChoice:
    """Return `loader` if it can read the data; for "auto" the first of synthetic, ffcv and torchvision that can.

    If `device` is a GPU, "auto" prefers resident if the images fit into half of the device's free memory.
    copies: processes that share the device, each with its own copy of the images.  InputError if no loader can read
    the data.  No file is opened, and nothing but torch (for a GPU) is imported.
    """
    if loader != "auto":
        if loader not in _OBSTACLES:
            raise InputError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
        if obstacle := _OBSTACLES[loader](manifest, folder):
            raise InputError(f"loader {loader} cannot be used: {obstacle}")
        return LoaderChoice(loader, "asked for")
    passed: list[str] = []
    if device.startswith("cuda"):
        fits, why = _room(manifest, device, copies)
        if obstacle := _resident_obstacle(manifest, folder) or (None if fits else why):
            passed.append(f"not resident: {obstacle}")
        else:
            return LoaderChoice("resident", why)
    for name in _UNASKED:
        obstacle = _OBSTACLES[name](manifest, folder)
        if obstacle is None:
            return LoaderChoice(name, "; ".join(passed) or "the fastest available")
        # Omitted, because a remark that real images are not generated tells the user nothing.
        if name != "synthetic":
            passed.append(f"not {name}: {obstacle}")
    raise InputError(f"no loader can read the data in {folder}: {'; '.join(passed)}")


def ffcv_is_there() -> bool:
    """Whether FFCV is installed and can be loaded."""
    return without_ffcv() is None


def without_ffcv() -> str | None:
    """Why FFCV cannot be used, in a few words, or None. Loads its compiled part, if it is installed."""
    spec = find_spec("ffcv")
    if spec is None:
        return "is not installed"
    return _broken(tuple(spec.submodule_search_locations or ()))


@cache
def _broken(folders: tuple[str, ...]) -> str | None:
    # It is compiled against OpenCV and libjpeg-turbo, one of which may be gone or another. To load that part takes 10
    # ms; to import FFCV takes seconds, which a process that hands the reading to others need not spend.
    try:
        for folder in folders:
            for part in Path(folder).glob("_libffcv*"):
                CDLL(str(part))
    except OSError as error:
        return f"is installed, but cannot be imported ({printable(error)})"
    return None


def need_ffcv() -> None:
    """InputError if FFCV cannot be used."""
    if why := without_ffcv():
        raise InputError(f"loader ffcv needs ffcv, which {why}: run scripts/setup.sh, or use --loader torchvision")


def source_folder(manifest: Manifest, folder: Path | None) -> Path | None:
    """The image folder that the data was prepared from, or None if the manifest names none."""
    if manifest.source is None:
        return None
    # Joining keeps an absolute source as it is; a relative one moves together with the folder.
    return Path(manifest.source) if folder is None else folder / manifest.source


def unchanged_source(manifest: Manifest, folder: Path | None) -> Layout:
    """Scan the source folder. InputError if its files have changed since they were prepared."""
    source = source_folder(manifest, folder)
    assert source is not None
    layout = scan(source)
    # Without a fingerprint no image has been read, so there is nothing to compare with.
    if manifest.fingerprint and layout.listing() != manifest.listing:
        raise InputError(f"the files in {source} have changed since they were prepared: prepare the data again")
    return layout


def pixel_bytes(manifest: Manifest) -> int:
    """Memory that the images of both splits take as uint8, in bytes."""
    return (manifest.train_count + manifest.val_count) * manifest.height * manifest.width * 3


def _room(manifest: Manifest, device: str, copies: int) -> tuple[bool, str]:
    """Whether `copies` of the images fit into half of the GPU's free memory, and a phrase that says so."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # The other half is for the network, its activations and captured graphs, which are allocated later.
    fits = 2 * copies * pixel_bytes(manifest) <= free
    times = f"{copies} x " if copies > 1 else ""
    images = f"{times}{pixel_bytes(manifest) / 1e9:.2f} GB of images"
    return fits, f"{images} {'fit into' if fits else 'are more than'} half of the {free / 1e9:.1f} GB free on {device}"


def _resident_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    if folder is None:
        return _synthetic_obstacle(manifest, folder)
    if not manifest.one_size:
        return "its images differ in size"
    return None if manifest.train_file is not None else _torchvision_obstacle(manifest, folder)


def _synthetic_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    if manifest.synthetic is None:
        return f"{manifest.name} is not generated"
    return None if folder is None else f"{folder} holds files"


def _ffcv_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    if folder is None or manifest.train_file is None:
        return "there are no .beton files"
    why = without_ffcv()
    return None if why is None else f"ffcv {why}"


def _torchvision_obstacle(manifest: Manifest, folder: Path | None) -> str | None:
    source = source_folder(manifest, folder)
    if source is None:
        return "there are no image files"
    return None if source.is_dir() else f"the image folder {source} is gone"


_OBSTACLES: dict[str, Callable[[Manifest, Path | None], str | None]] = {
    "resident": _resident_obstacle,
    "synthetic": _synthetic_obstacle,
    "ffcv": _ffcv_obstacle,
    "torchvision": _torchvision_obstacle,
}
