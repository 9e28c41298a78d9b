"""`scripts/compile.py`: a trained network as a file to use elsewhere, or as a folder to share."""

# No import of torch at the top: --help and usage errors must answer at once.

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, Parser, checked, expanded, run_command, to_path
from fastprune.errors import InputError


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="compile.py",
        description="Write a trained network, of a checkpoint of train.py or of a store, to a file to use elsewhere. "
        "The format follows the file's name: "
        ".fastprune holds kept weights alone and is run by fastprune.sparse.load, .pth is a state dict for torch, "
        ".onnx is for ONNX Runtime and others. Pruned weights are zeros in the last two. With --format huggingface it "
        "writes a folder to share: model.safetensors, config.json and a model card.",
    )
    p.add_argument(
        "network",
        metavar="NETWORK",
        type=expanded,
        help="a checkpoint.pth of train.py, or the beginning of a training's key, as store.py ls shows it; a file that "
        "exists, and a name that ends in .pth, is a checkpoint",
    )
    p.add_argument("--store", type=to_path, metavar="DIR", help="the store of a key (default runs)")
    p.add_argument(
        "--ema", action="store_true", help="the weights of the checkpoint's moving average (train.py --model-ema)"
    )
    p.add_argument(
        "--out",
        type=to_path,
        required=True,
        metavar="PATH",
        help="NAME.fastprune, NAME.pth or NAME.onnx; with --format huggingface a new folder",
    )
    p.add_argument(
        "--format",
        choices=["file", "huggingface"],
        default="file",
        help="a file as the name of --out says (default), or a folder for `huggingface-cli upload`",
    )
    p.add_argument(
        "--license", metavar="ID", help="with --format huggingface: the license that the card names (default other)"
    )
    p.add_argument(
        "--size",
        type=checked(int, lambda n: n >= 1, "a whole number of 1 or more"),
        metavar="PIXELS",
        help="side of the images that it will see (default that of a checkpoint's validation images, 64 for a key; a "
        "state dict has none, a folder that of training)",
    )
    p.add_argument("--half", action="store_true", help="store kept weights in 16 bits (.fastprune)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 2 bad usage or bad input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        path = Path(args.network)
        from_file = path.is_file() or path.suffix == ".pth"
        if path.is_dir():
            raise InputError(f"{path} is a folder: name the checkpoint in it, such as {path / 'checkpoint.pth'}")
        if from_file and args.store is not None:
            raise InputError(f"--store is for the key of a training, but {path} is a file: leave --store out")
        if args.ema and not from_file:
            raise InputError(f"--ema is for a checkpoint of train.py, which {path} is not: leave it out")
        folder = args.format == "huggingface"
        if folder and (args.half or args.size is not None):
            raise InputError("--half and --size are for files, not for --format huggingface: leave them out")
        if not folder and args.license is not None:
            raise InputError("--license is for --format huggingface: add it, or leave --license out")
        from fastprune.study.deploy import check_file, check_place, deploy, of_checkpoint, of_node, share

        # Before the network is read, so that a mistake is told at once.
        if folder:
            check_place(args.out)
        else:
            check_file(args.out, args.half)
        network = of_checkpoint(path, args.ema) if from_file else of_node(args.store or Path("runs"), args.network)
        if folder:
            print(share(network, args.out, args.license or "other"))
        else:
            print(deploy(network, args.out, args.size, args.half))
        return DONE

    return run_command("compile.py", work)
