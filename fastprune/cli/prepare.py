"""`scripts/prepare.py`: from image files to a prepared data set."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, Parser, checked, run_command, to_path
from fastprune.errors import InputError
from fastprune.loaders.layout import MINIPLACES, TINY_IMAGENET, recognised
from fastprune.loaders.manifest import FILE_NAME, Manifest

DATASETS = {"tiny-imagenet": TINY_IMAGENET, "miniplaces": MINIPLACES}

# MiniPlaces comes in two parts, an archive of images and lists in a repository, so --download does not fetch it.
_BY_HAND = (
    "--download supports Tiny ImageNet only. For MiniPlaces, unpack http://miniplaces.csail.mit.edu/data/data.tar.gz, "
    "put train.txt, val.txt and categories.txt from data/ of https://github.com/CSAILVision/miniplaces beside "
    "images/, and give that folder as --source"
)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="prepare.py",
        description="Turn an image folder into train.beton, val.beton and a manifest. If they exist, nothing is done.",
    )
    p.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        help="data set in the folder (default: recognised by its files, else train/<class>/ and val/<class>/)",
    )
    p.add_argument(
        "--source", type=to_path, metavar="DIR", help="image folder as distributed, or a folder that contains it"
    )
    p.add_argument("--out", type=to_path, required=True, metavar="DIR", help="folder for the prepared data set")
    p.add_argument(
        "--download",
        action="store_true",
        help="download Tiny ImageNet from its official address into --source (default: OUT/raw), unless it is there",
    )
    p.add_argument(
        "--resize",
        type=checked(int, lambda n: 8 <= n <= 1024, "a number of pixels from 8 to 1024"),
        metavar="N",
        help="make all images N x N first: resize the shorter side to N (antialiased), crop the centre. Figures "
        "require it if images differ in size. The PNG files stay in OUT",
    )
    p.add_argument(
        "--workers",
        type=checked(int, lambda n: n >= 1, "a whole number of 1 or more"),
        metavar="N",
        help="processes (default: one per core)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 2 bad usage or bad input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        if args.source is None and not args.download:
            raise InputError("--source is missing: give the image folder, or --download to fetch Tiny ImageNet")
        # The manifest is written last: where it is, the data set is complete.
        existed = (args.out / FILE_NAME).exists()
        manifest = _run(args)
        print(("already there: " if existed else "") + _summary(manifest, args.out))
        return DONE

    return run_command("prepare.py", work, "no data set was written; rerun the command to start again")


def _run(args: argparse.Namespace) -> Manifest:
    # Here, so that --help and usage errors need neither numpy nor torch.
    from fastprune.loaders.download import fetch_tiny_imagenet
    from fastprune.loaders.preparation import prepare
    from fastprune.loaders.resize import resize_images

    source = args.source or args.out / "raw"
    if args.download and args.dataset == "miniplaces":
        raise InputError(_BY_HAND)
    if args.download:
        fetch_tiny_imagenet(source)
    found = recognised(source)
    if args.dataset and found != DATASETS[args.dataset]:
        held = found or "another layout"
        raise InputError(f"--dataset is {args.dataset}, but {source} holds {held}: omit --dataset")
    if args.resize is not None:
        source = resize_images(source, args.out, args.resize, workers=args.workers)
    return prepare(source, args.out, workers=args.workers)


def _summary(manifest: Manifest, out: Path) -> str:
    megabytes = ((manifest.train_bytes or 0) + (manifest.val_bytes or 0)) / 1e6
    return (
        f"{out}: {manifest.train_count:,} train and {manifest.val_count:,} val images of {len(manifest.classes)} "
        f"classes, {manifest.height}x{manifest.width}, {megabytes:,.0f} MB, fingerprint {manifest.fingerprint[:16]}"
    )
