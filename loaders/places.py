"""From what a user calls the data to a prepared folder, found or made. Heavy imports only where something is made."""

import json
import os
import secrets
from dataclasses import replace
from pathlib import Path

from fastprune.errors import InputError
from fastprune.loaders.choice import LOADERS, ffcv_is_there, need_ffcv
from fastprune.loaders.layout import Layout, scan
from fastprune.loaders.manifest import FILE_NAME, Manifest, load_manifest, save_manifest
from fastprune.loaders.synthetic import SyntheticData

SOURCES = "sources.json"  # which image folders have been inspected, and what was found
Data = str | os.PathLike[str] | SyntheticData


def known(data: Data, store: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of `data` if it can be told without reading an image, else None. Writes nothing.

    data: as in `locate`. InputError where there is no such folder or it is no data set.
    """
    if isinstance(data, SyntheticData):
        return data.manifest()
    if data == "synthetic":
        return SyntheticData().manifest()
    if Path(data, FILE_NAME).exists():
        return load_manifest(data)
    layout = scan(data)
    root = Path(store, "data")
    if fingerprint := _remembered(root, layout, layout.listing()):
        for folder in (_folder(root, fingerprint, True), _folder(root, fingerprint, False)):
            if (folder / FILE_NAME).exists():
                return load_manifest(folder)
    return None


def locate(
    data: Data,
    store: str | os.PathLike[str],
    *,
    loader: str = "auto",
    workers: int | None = None,
    show: bool = True,
) -> tuple[Manifest, Path | None]:
    """Manifest and folder of `data`, ready for `open_data`; the folder is None for images generated in memory.

    data: a prepared folder; Tiny ImageNet or MiniPlaces as distributed; another image folder with images of one size;
    or SyntheticData ("synthetic" is its defaults).
    What a loader needs and is not there is made once, under `store`/data, named by the fingerprint: .beton files for
    ffcv, image files for generated data through torchvision.  loader: one of LOADERS; "auto" and "resident" make .beton
    files where ffcv is installed.  workers: processes that decode and write.  show: progress on stderr.  InputError
    where the data is not usable.
    """
    if loader not in LOADERS:
        raise InputError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    root = Path(store, "data")
    workers = workers or len(os.sched_getaffinity(0))
    if data == "synthetic":
        data = SyntheticData()
    if isinstance(data, SyntheticData):
        return _locate_synthetic(data, root, loader, workers, show)
    if loader == "synthetic":
        raise InputError(f"loader synthetic generates its images, it cannot read {data}: use --data synthetic")
    if Path(data, FILE_NAME).exists():
        return _check_prepared(Path(data), loader), Path(data)
    return _locate_raw(data, root, loader, workers, show)


def _check_prepared(folder: Path, loader: str) -> Manifest:
    manifest = load_manifest(folder)
    for split in ("train", "val") if loader != "torchvision" else ():
        name, _ = manifest.file(split)
        if name is not None:
            from fastprune.loaders.beton import check_beton

            check_beton(folder / name, manifest, split)
    return manifest


def _locate_synthetic(
    data: SyntheticData, root: Path, loader: str, workers: int, show: bool
) -> tuple[Manifest, Path | None]:
    manifest = data.manifest()
    if loader in ("auto", "resident", "synthetic"):
        return manifest, None
    from fastprune.loaders.publish import publish, writing
    from fastprune.loaders.samples import ArraySamples, digest

    beton = loader == "ffcv"
    if beton:
        need_ffcv()
    folder = _folder(root, data.fingerprint, beton)
    with writing(folder):
        if finished := _finished(folder, beton):
            return finished, folder
        arrays = {split: data.arrays(split) for split in ("train", "val")}
        samples = {split: ArraySamples(images, labels.tolist()) for split, (images, labels) in arrays.items()}
        digests = {split: [digest(image) for image in images] for split, (images, _) in arrays.items()}
        if not beton:
            data.write_folder(folder / "images", extension="png")
            manifest = replace(manifest, source="images", listing=scan(folder / "images").listing())
        return publish(folder, manifest, samples, digests, beton=beton, workers=workers, show=show), folder


def _locate_raw(
    data: str | os.PathLike[str], root: Path, loader: str, workers: int, show: bool
) -> tuple[Manifest, Path]:
    from fastprune.loaders.inspection import inspect
    from fastprune.loaders.publish import describe, publish, writing
    from fastprune.loaders.samples import folder_samples

    layout = scan(data)
    beton = loader == "ffcv" or (loader in ("auto", "resident") and ffcv_is_there())
    if beton:
        need_ffcv()
    with writing(root):
        listing = layout.listing()
        if fingerprint := _remembered(root, layout, listing):
            folder = _folder(root, fingerprint, beton)
            if finished := _finished(folder, beton):
                return _pointed(finished, folder, layout, listing), folder
        samples = folder_samples(layout)
        found = inspect(samples, workers=workers, list_folder=root, show=show)
        manifest = describe(layout, found, listing)
        folder = _folder(root, manifest.fingerprint, beton)
        with writing(folder):
            if finished := _finished(folder, beton):
                finished = _pointed(finished, folder, layout, listing)
            else:
                finished = publish(folder, manifest, samples, found.digests, beton=beton, workers=workers, show=show)
        _remember(root, layout, listing, manifest.fingerprint)
    return finished, folder


def _pointed(manifest: Manifest, folder: Path, layout: Layout, listing: str) -> Manifest:
    """The manifest in `folder` made to name `layout`: the same pixels may have come from elsewhere, now gone."""
    now = replace(manifest, name=layout.name, classes=layout.classes, source=str(layout.root), listing=listing)
    if now != manifest:
        save_manifest(now, folder)
    return now


def _folder(root: Path, fingerprint: str, beton: bool) -> Path:
    """Where the store keeps a data set: with .beton files, or as a manifest of image files."""
    return root / (fingerprint[:16] if beton else f"{fingerprint[:16]}-files")


def _finished(folder: Path, beton: bool) -> Manifest | None:
    from fastprune.loaders.publish import is_whole

    if (folder / FILE_NAME).exists() and is_whole(manifest := load_manifest(folder), folder, beton):
        return manifest
    return None


def _remembered(root: Path, layout: Layout, listing: str) -> str | None:
    """Fingerprint of a folder that was inspected before and has not changed since."""
    entry = _sources(root).get(str(layout.root))
    return entry["fingerprint"] if entry and entry["listing"] == listing else None


def _remember(root: Path, layout: Layout, listing: str, fingerprint: str) -> None:
    sources = _sources(root) | {str(layout.root): {"listing": listing, "fingerprint": fingerprint}}
    part = root / f".{SOURCES}.{secrets.token_hex(4)}"
    part.write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")
    os.replace(part, root / SOURCES)


def _sources(root: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((root / SOURCES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # only a memory: without it the images are read once more
        return {}
