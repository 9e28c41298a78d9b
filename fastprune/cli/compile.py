"""`scripts/compile.py`: a published training's network as a file to use elsewhere, or as a folder to share."""

# No import of torch at the top: --help and usage errors must answer at once.

import argparse
from collections.abc import Sequence

from fastprune.cli.command import DONE, Parser, checked, run_command, to_path
from fastprune.errors import InputError


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="compile.py",
        description="Write the network of a training to a file to use elsewhere. The format follows the file's name: "
        ".fastprune holds kept weights alone and is run by fastprune.sparse.load, .pth is a state dict for torch, "
        ".onnx is for ONNX Runtime and others. Pruned weights are zeros in the last two. With --format huggingface it "
        "writes a folder to share: model.safetensors, config.json and a model card.",
    )
    p.add_argument("node", metavar="NODE", help="the beginning of a training's key, as store.py ls shows it")
    p.add_argument("--store", type=to_path, default="runs", metavar="DIR", help="the store (default runs)")
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
        help="side of the images that it will see (default 64; a state dict has none, a folder that of training)",
    )
    p.add_argument("--half", action="store_true", help="store kept weights in 16 bits (.fastprune)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 2 bad usage or bad input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        from fastprune.study.deploy import deploy, share

        if args.format == "huggingface":
            if args.half or args.size is not None:
                raise InputError("--half and --size are for files, not for --format huggingface: leave them out")
            print(share(args.store, args.node, args.out, args.license or "other"))
            return DONE
        if args.license is not None:
            raise InputError("--license is for --format huggingface: add it, or leave --license out")
        print(deploy(args.store, args.node, args.out, args.size or 64, args.half))
        return DONE

    return run_command("compile.py", work)
