"""Find or create the prepared folder of the data that a user names."""

import json
import os
from dataclasses import replace
from pathlib import Path

from fastprune.errors import InputError
from fastprune.files import write_atomically
from fastprune.loaders.choice import LOADERS, ffcv_is_there, need_ffcv
from fastprune.loaders.layout import DISTRIBUTED, SPLITS, Layout, scan
from fastprune.loaders.manifest import FILE_NAME, Manifest, load_manifest, save_manifest
from fastprune.loaders.synthetic import SyntheticData

SUFFIXES = (".beton", ".ffcv")
SOURCES = "sources.json"  # image folders that have been read: listing and fingerprint of each
Data = str | os.PathLike[str] | SyntheticData


def peek(data: Data, store: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of `data` if it is known without reading an image, else None. Writes nothing.

    data: as in `find_or_prepare`.  InputError if the folder is missing or is not a data set of images of one size.
    """
    # `--plan` calls this: it needs the fingerprint for the keys, but must not decode a data set.
    if isinstance(data, SyntheticData):
        return data.manifest()
    if data == "synthetic":
        return SyntheticData().manifest()
    if Path(data, FILE_NAME).exists():
        return _of_one_size(load_manifest(data))
    layout = scan(data)
    root = Path(store, "data")
    if fingerprint := _remembered(root, layout, layout.listing()):
        for keep in ("pixels", "nothing"):
            if (_folder(root, fingerprint, keep) / FILE_NAME).exists():
                return load_manifest(_folder(root, fingerprint, keep))
    return None


def find_or_prepare(
    data: Data,
    store: str | os.PathLike[str],
    *,
    loader: str = "auto",
    any_size: bool = False,
    workers: int | None = None,
    show: bool = True,
) -> tuple[Manifest, Path | None]:
    """Return manifest and folder of `data`, ready for `open_data`. The folder is None for images generated in memory.

    data: a prepared folder; Tiny ImageNet or MiniPlaces as distributed; another image folder with images of one size;
    or SyntheticData ("synthetic" means its defaults).  Files that a loader needs and that are missing are written once
    to `store`/data, in a folder named by the fingerprint: .beton files for ffcv, image files for generated data that
    torchvision reads.  loader: one of LOADERS; "auto" and "resident" write .beton files if ffcv is installed.

    any_size: images of folders other than Tiny ImageNet and MiniPlaces may differ in size and are cropped when they are
    read.  `data` may then also be a .beton file without a manifest (train* or val*), or the folder that holds both.
    The manifest has height and width 0, and torchvision reads the folder directly: nothing is written.
    workers: processes that decode, by default one per available processor.  show: progress on stderr.  InputError if
    the data cannot be used.
    """
    if loader not in LOADERS:
        raise InputError(f"unknown loader {loader!r}: choose one of {', '.join(LOADERS)}")
    root = Path(store, "data")
    workers = workers or len(os.sched_getaffinity(0))
    if data == "synthetic":
        data = SyntheticData()
    if isinstance(data, SyntheticData):
        return _find_synthetic(data, root, loader, workers, show)
    if loader == "synthetic":
        raise InputError(f"loader synthetic generates its images, it cannot read {data}: use --data synthetic")
    path = Path(data)
    if any_size and path.suffix in SUFFIXES and (path.parent / FILE_NAME).exists():
        path = path.parent
    if (path / FILE_NAME).exists():
        return _check_prepared(path, loader, any_size), path
    if any_size and (path.suffix in SUFFIXES or _holds_betons(path)):
        return _find_betons(path)
    layout = scan(path)
    if any_size and layout.name not in DISTRIBUTED:
        if loader == "resident":
            raise InputError(
                f"loader resident needs images of one size, but {path} is read with crops: use another loader"
            )
        if loader == "torchvision" or (loader == "auto" and not ffcv_is_there()):
            return unread(layout), layout.root
        return _find_folder(layout, root, "files", workers, show)
    # The resident loader fills its memory from .beton files in 0.5 s, from JPEG files in 30 s (Tiny ImageNet).
    beton = loader == "ffcv" or (loader in ("auto", "resident") and ffcv_is_there())
    return _find_folder(layout, root, "pixels" if beton else "nothing", workers, show)


def _of_one_size(manifest: Manifest) -> Manifest:
    if not manifest.one_size:
        raise InputError(
            f"the images of {manifest.name} differ in size: make them equal with scripts/prepare.py --resize N"
        )
    return manifest


def _check_prepared(folder: Path, loader: str, any_size: bool) -> Manifest:
    """The manifest of a prepared folder. InputError if images differ in size and must not, or a file is damaged."""
    manifest = load_manifest(folder)
    if not any_size:
        _of_one_size(manifest)
    # torchvision reads the source folder, so the .beton files need not be present.
    for split in SPLITS if loader != "torchvision" else ():
        name, _ = manifest.file(split)
        if name is not None:
            # Imported here, as it needs numpy: this module is loaded to plan, too.
            from fastprune.loaders.beton import check_beton

            check_beton(folder / name, manifest, split)
    return manifest


def _find_synthetic(
    data: SyntheticData, root: Path, loader: str, workers: int, show: bool
) -> tuple[Manifest, Path | None]:
    manifest = data.manifest()
    if loader in ("auto", "resident", "synthetic"):
        return manifest, None
    from fastprune.loaders.preparation import publish, read_data_set, unfinished, writing
    from fastprune.loaders.samples import ArraySamples

    keep = "pixels" if loader == "ffcv" else "nothing"
    if loader == "ffcv":
        need_ffcv()
    folder = _folder(root, data.fingerprint, keep)
    with writing(folder):
        if finished := _finished(folder, keep):
            return finished, folder
        with unfinished(folder) as part:
            if keep == "pixels":
                arrays = {split: data.arrays(split) for split in SPLITS}
                samples = {split: ArraySamples(images, labels.tolist()) for split, (images, labels) in arrays.items()}
                read_data_set(samples, part, keep, list_folder=root, workers=workers, show=show)
            else:
                # Lossless, so that torchvision reads the pixels that the fingerprint stands for.
                data.write_folder(folder / "images", extension="png")
                manifest = replace(manifest, source="images", listing=scan(folder / "images").listing())
            return publish(part, folder, manifest), folder


def _find_folder(layout: Layout, root: Path, keep: str, workers: int, show: bool) -> tuple[Manifest, Path]:
    """Manifest and folder in the store of a scanned folder, prepared if necessary. keep: see `read_data_set`."""
    from fastprune.loaders.preparation import describe, publish, read_data_set, unfinished, writing
    from fastprune.loaders.samples import folder_samples

    if keep != "nothing":
        need_ffcv()
    with writing(root):
        listing = layout.listing()
        if fingerprint := _remembered(root, layout, listing):
            folder = _folder(root, fingerprint, keep)
            if finished := _finished(folder, keep):
                return _pointed(finished, folder, layout, listing), folder
        with unfinished(root) as part:
            found = read_data_set(folder_samples(layout), part, keep, list_folder=root, workers=workers, show=show)
            manifest = describe(layout, found, listing)
            folder = _folder(root, manifest.fingerprint, keep)
            # Another source with the same pixels may have been prepared before.
            folder.mkdir(exist_ok=True)
            if finished := _finished(folder, keep):
                manifest = _pointed(finished, folder, layout, listing)
            else:
                manifest = publish(part, folder, manifest)
        _remember(root, layout, listing, manifest.fingerprint)
    return manifest, folder


def unread(layout: Layout) -> Manifest:
    """The manifest of an image folder that is read directly: without fingerprint, mean 0 and standard deviation 1."""
    # Preparation is skipped, so no image has been decoded to compute them.
    return Manifest(
        name=layout.name,
        fingerprint="",
        classes=layout.classes,
        train_per_class=layout.per_class("train"),
        val_per_class=layout.per_class("val"),
        height=0,
        width=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        source=str(layout.root),
    )


def _betons(folder: Path, split: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{split}*") if path.suffix in SUFFIXES) if folder.is_dir() else []


def _holds_betons(folder: Path) -> bool:
    # A folder train/ means an image folder, even if .beton files lie beside it.
    return bool(_betons(folder, "train")) and not (folder / "train").is_dir()


def _find_betons(path: Path) -> tuple[Manifest, Path]:
    """Manifest and folder of .beton files that FFCV's own writer made; no image is read.

    path: the train file, the val file, or their folder.  The other file has the same name with train and val
    exchanged, or is the only one of its split.  InputError if it is ambiguous or missing, or labels are out of range.
    """
    import numpy as np

    from fastprune.loaders.beton import read_beton

    if not path.exists():
        raise InputError(f"no such file: {path}")
    folder = path if path.is_dir() else path.parent
    files = {}
    for split, other in (SPLITS, SPLITS[::-1]):
        held = _betons(folder, split)
        if path in held:
            held = [path]
        elif folder / path.name.replace(other, split, 1) in held:
            held = [folder / path.name.replace(other, split, 1)]
        if len(held) != 1:
            names = ", ".join(file.name for file in held) or "none"
            raise InputError(
                f"{folder} needs one {split}*.beton beside {path.name}, it holds {names}: name the files train.beton "
                "and val.beton, or give a folder that scripts/prepare.py made"
            )
        files[split] = read_beton(held[0])
    counts = {}
    classes = int(max(file.labels.max() for file in files.values())) + 1
    for split, file in files.items():
        # More classes than images means that the labels are something else: do not allocate their counts.
        if file.labels.min() < 0 or classes > len(files["train"]):
            raise InputError(
                f"{file.path} has labels from {file.labels.min()} to {classes - 1} for {len(file)} images, expected 0, "
                "1, 2 and so on"
            )
        counts[split] = tuple(np.bincount(file.labels, minlength=classes).tolist())
    width = len(str(classes - 1))
    return Manifest(
        name=folder.resolve().name,
        fingerprint="",
        classes=tuple(f"{label:0{width}}" for label in range(classes)),
        train_per_class=counts["train"],
        val_per_class=counts["val"],
        height=0,
        width=0,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        train_file=files["train"].path.name,
        train_bytes=files["train"].path.stat().st_size,
        val_file=files["val"].path.name,
        val_bytes=files["val"].path.stat().st_size,
    ), folder


def _pointed(manifest: Manifest, folder: Path, layout: Layout, listing: str) -> Manifest:
    """Save the manifest in `folder` with `layout` as its source, and return it."""
    # The same pixels may have been prepared from another folder that was removed since.
    now = replace(manifest, name=layout.name, classes=layout.classes, source=str(layout.root), listing=listing)
    if now != manifest:
        save_manifest(now, folder)
    return now


def _folder(root: Path, fingerprint: str, keep: str) -> Path:
    """The folder of a data set in the store: .beton files of pixels or of JPEG files, or a manifest only."""
    return root / (fingerprint[:16] + {"pixels": "", "nothing": "-files", "files": "-jpeg"}[keep])


def _finished(folder: Path, keep: str) -> Manifest | None:
    """The manifest of a complete folder, else None. InputError if a file is truncated or another one."""
    from fastprune.loaders.preparation import is_complete

    if (folder / FILE_NAME).exists() and is_complete(manifest := load_manifest(folder), folder, keep != "nothing"):
        return manifest
    return None


def _remembered(root: Path, layout: Layout, listing: str) -> str | None:
    """Fingerprint of a folder that was read before, or None if it was not or has changed since."""
    entry = _sources(root).get(str(layout.root))
    return entry["fingerprint"] if entry and entry["listing"] == listing else None


def _remember(root: Path, layout: Layout, listing: str, fingerprint: str) -> None:
    sources = _sources(root) | {str(layout.root): {"listing": listing, "fingerprint": fingerprint}}
    content = json.dumps(sources, indent=1) + "\n"
    write_atomically(root / SOURCES, lambda path: path.write_text(content, encoding="utf-8"))


def _sources(root: Path) -> dict[str, dict[str, str]]:
    try:
        return json.loads((root / SOURCES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Only a cache: without it the images are decoded once more.
        return {}
