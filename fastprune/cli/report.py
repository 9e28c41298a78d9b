"""`scripts/report.py`: writes figures and their page again from a store, without computing anything."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastprune.cli.command import DONE, Parser, add_figure_module, run_command, to_path
from fastprune.study.plugins import load_modules


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,
        prog="report.py",
        description="Write figures and the page index.html again from a store, without training or reading images.",
    )
    p.add_argument("--store", type=to_path, default=Path("runs"), metavar="DIR", help="the store (default runs)")
    p.add_argument(
        "--out", type=to_path, default=Path("results"), metavar="DIR", help="folder for figures (default results)"
    )
    p.add_argument(
        "--fig",
        nargs="+",
        default=[],
        metavar="NAME",
        help="these figures only, by name, or by the name of a record in the store's figures/ (default: the last of "
        "each)",
    )
    add_figure_module(p)
    p.add_argument("--open", action="store_true", help="show the page in a browser")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 2 bad usage or bad input, 130 interrupted."""

    def work() -> int:
        args = parser().parse_args(argv)
        from fastprune.figures.reproduce import report

        load_modules(args.figure_module)
        report(args.store, args.out, args.fig, show=args.open)
        return DONE

    return run_command("report.py", work, "the same command continues")
