"""`scripts/prepare_data.py`: from the command line to a prepared folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, Parser, run_command
from fastprune.errors import InputError
from fastprune.loaders import miniplaces
from fastprune.loaders.choice import ffcv_is_there
from fastprune.loaders.layout import FOLDER_NAME, recognised
from fastprune.loaders.manifest import FILE_NAME, Manifest

DATASETS = {"tiny-imagenet": FOLDER_NAME, "miniplaces": miniplaces.NAME}

_BY_HAND = (
    "--download fetches Tiny ImageNet only. MiniPlaces: unpack http://miniplaces.csail.mit.edu/data/data.tar.gz, put "
    "train.txt, val.txt and categories.txt out of data/ of https://github.com/CSAILVision/miniplaces beside images/, "
    "and give that folder as --source"
)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="prepare_data.py",
        description="Turn an image folder into train.beton, val.beton and a manifest. A second call does nothing.",
    )
    p.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        help="what the folder holds (default: seen from what is there; any other has train/<class>/ and val/<class>/)",
    )
    p.add_argument("--source", type=Path, metavar="DIR", help="the folder as distributed, or one that contains it")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the prepared data set goes")
    p.add_argument(
        "--download",
        action="store_true",
        help="fetch Tiny ImageNet into --source (default: OUT/raw) from its official address, unless it is there",
    )
    p.add_argument(
        "--resize",
        type=int,
        metavar="N",
        help="first make N x N images of them, which stay in OUT as PNG files: the shorter side to N, antialiased, "
        "then the middle. For images of several sizes; without ffcv, torchvision reads those files",
    )
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a processor)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 2 bad usage or input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        if args.workers is not None and args.workers < 1:
            raise InputError(f"--workers is {args.workers}, expected 1 or more")
        if args.resize is not None and not 8 <= args.resize <= 1024:
            raise InputError(f"--resize is {args.resize}, expected 8 to 1024")
        if args.source is None and not args.download:
            raise InputError("--source is missing: name the image folder, or give --download to fetch it")
        existed = (args.out / FILE_NAME).exists()
        manifest = _run(args)
        print(("already there: " if existed else "") + _summary(manifest, args.out))
        return DONE

    return run_command("prepare_data.py", work, "nothing was published, the same command starts again")


def _run(args: argparse.Namespace) -> Manifest:
    from fastprune.loaders.download import fetch_tiny_imagenet
    from fastprune.loaders.publish import prepare
    from fastprune.loaders.resize import resize_images

    source = args.source or args.out / "raw"
    if args.download and args.dataset == "miniplaces":
        raise InputError(_BY_HAND)
    if args.download:
        fetch_tiny_imagenet(source)
    found = recognised(source)
    if args.dataset and found and found != DATASETS[args.dataset]:
        raise InputError(f"--dataset is {args.dataset}, but {source} holds {found}: leave --dataset away")
    if args.resize is None:
        return prepare(source, args.out, workers=args.workers)
    source = resize_images(source, args.out, args.resize, workers=args.workers)
    return prepare(source, args.out, workers=args.workers, beton=ffcv_is_there())


def _summary(manifest: Manifest, out: Path) -> str:
    megabytes = ((manifest.train_bytes or 0) + (manifest.val_bytes or 0)) / 1e6
    return (
        f"{out}: {manifest.train_count:,} train and {manifest.val_count:,} val images of {len(manifest.classes)} "
        f"classes, {manifest.height}x{manifest.width}, {megabytes:,.0f} MB, fingerprint {manifest.fingerprint[:16]}"
    )
