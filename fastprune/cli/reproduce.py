"""`scripts/reproduce.py`: command-line arguments to a request for figures."""

# No import of torch at the top: --help, --plan and usage errors must answer at once.

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastprune.cli.command import (
    COMPUTE_HELP,
    DONE,
    FAILED,
    GPU_OPTIONS_HELP,
    Parser,
    add_figure_module,
    checked,
    expanded,
    gpu_options,
    run_command,
    to_path,
)
from fastprune.errors import InputError
from fastprune.figures import EXTRA, FIGURES, PAPER, load
from fastprune.figures.reproduce import FigureRequest, Request, plan, redraw, run
from fastprune.loaders.choice import LOADERS
from fastprune.specs import COMPUTES, forced_options
from fastprune.study.plugins import load_modules
from fastprune.study.settings import PRESETS, Settings, flag_of, flags, preset
from fastprune.training.scalars import LOGS


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,  # an abbreviation in a user's script would break when a flag is added
        prog="reproduce.py",
        description="Reproduce a figure of the paper on learning rates for global magnitude pruning.",
        epilog="By default, a small run on generated images shows that everything works. For the paper's figure: "
        "--preset paper --data DIR (Tiny ImageNet). To continue an interrupted run, rerun the same command.",
    )
    p.add_argument(
        "--fig",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"figures to reproduce: {', '.join(PAPER)} of the paper; {', '.join(EXTRA)}; or all",
    )
    add_figure_module(p)
    p.add_argument(
        "--preset", default="smoke", metavar="NAME", help=f"size of the study: {', '.join(PRESETS)} (default smoke)"
    )
    p.add_argument(
        "--data",
        type=expanded,
        metavar="DIR",
        help="Tiny ImageNet, raw or prepared; 'synthetic': generated images (smoke's default)",
    )
    p.add_argument(
        "--miniplaces",
        type=expanded,
        metavar="DIR",
        help="MiniPlaces, for figure A1 (default: --data, if synthetic or for A1 alone)",
    )
    p.add_argument(
        "--out", type=to_path, default=Path("results"), metavar="DIR", help="folder for figures (default results)"
    )
    p.add_argument(
        "--store", type=to_path, default=Path("runs"), metavar="DIR", help="folder for trained runs (default runs)"
    )
    p.add_argument("--open", action="store_true", help="show the page of results in a browser while it fills")
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--plan",
        action="store_true",
        help="print what would run and what it would cost (with --workers N: on so many), without running it",
    )
    what.add_argument("--redraw", action="store_true", help="draw again from results.csv, without a store")
    p.add_argument(
        "--images-per-second",
        type=_rate,
        metavar="R",
        help="with --plan: assume this training rate of a run instead of the measured one",
    )

    p.add_argument(
        "--gpus",
        type=_positive,
        nargs="+",
        metavar="N",
        help="with --plan: simulate the time on each number of GPUs",
    )

    run = p.add_argument_group("how it runs (changes no result)")
    run.add_argument(
        "--loader", choices=LOADERS, default="auto", help="how images are read (default: the fastest available)"
    )
    run.add_argument("--compute", choices=COMPUTES, default="auto", help=COMPUTE_HELP)
    run.add_argument("--gpu-options", type=gpu_options, default="auto", metavar="WHICH", help=GPU_OPTIONS_HELP)
    run.add_argument("--device", help="cpu, cuda (every GPU) or cuda:N (default: every GPU, else the CPU)")
    run.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="runs at once, spread over the GPUs (default: one per GPU, or per CPU core up to 8; on Ray all that fit)",
    )
    run.add_argument(
        "--executor",
        choices=["local", "ray"],
        default="local",
        help="run on this machine (default) or on a Ray cluster",
    )
    run.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="HOST:PORT of a Ray cluster; auto: the cluster of this machine; local: a new one (default: auto or local)",
    )
    run.add_argument(
        "--gpus-per-run",
        type=_share,
        metavar="F",
        help="on Ray: GPUs per run; 0.25 puts four runs on each GPU, 0 runs on CPUs (default 1)",
    )
    run.add_argument(
        "--checkpoint-seconds",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds between checkpoints of a run (default 60)",
    )
    run.add_argument(
        "--log",
        nargs="+",
        choices=LOGS,
        default=[],
        help="where the metrics of each training's epochs go when it has ended, in --store: tensorboard/ or wandb/, a "
        "run each (online if you are logged in; WANDB_MODE=offline); csv is always written, with its node",
    )
    run.add_argument("--checkpoint-epochs", type=_positive, metavar="N", help="write a checkpoint also every N epochs")

    h = p.add_argument_group("hyperparameters (default: the paper's protocol, changed by --preset)")
    # Derived from the settings, so that a setting cannot lack its flag, bounds or help.
    for name, (kind, several, flag) in flags().items():
        how: dict[str, Any] = {"help": flag.help}
        if kind is bool:
            # None, not False: an absent flag must not override the protocol.
            how |= {"action": "store_true", "default": None}
        else:
            how |= {"type": kind, "metavar": flag.metavar, "nargs": "+" if several else None}
            how |= {"choices": flag.choices} if flag.choices else {}
        h.add_argument(flag_of(name), **how)
    return p


_positive = checked(int, lambda n: n >= 1, "a whole number of 1 or more")

_rate = checked(float, lambda x: x > 0, "a rate above 0")

_seconds = checked(float, lambda x: x >= 0, "a number of seconds")

# Ray counts resources in units of 0.0001.
_share = checked(float, lambda x: x == 0 or 0.0001 <= x <= 1, "a share of a GPU, 0.0001 to 1 (0: a CPU core)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 1 a run failed, 2 bad usage or bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        return _main(parser().parse_args(arguments), shlex.join(["reproduce.py", *arguments]))

    return run_command("reproduce.py", work, "the same command continues")


def _main(args: argparse.Namespace, command: str) -> int:
    for flag in ("ray_address", "gpus_per_run"):
        if getattr(args, flag) is not None and args.executor != "ray":
            raise InputError(f"--{flag.replace('_', '-')} requires --executor ray")
    if args.gpus is not None and not args.plan:
        raise InputError("--gpus requires --plan; to choose the GPUs of a run, use --device and --workers")
    if args.executor == "ray" and args.device is not None:
        raise InputError("--device cannot be used with --executor ray: use --gpus-per-run")
    request = Request(
        figures=_figures(args),
        store=args.store,
        loader=args.loader,
        compute=args.compute,
        gpu_options=forced_options(args.gpu_options),
        device=args.device,
        workers=args.workers,
        checkpoint_seconds=args.checkpoint_seconds,
        checkpoint_epochs=args.checkpoint_epochs,
        images_per_second=args.images_per_second,
        planned_gpus=tuple(args.gpus or ()),
        ray=args.executor == "ray",
        ray_address=args.ray_address,
        gpus_per_run=args.gpus_per_run,
        modules=_modules(args),
        log=tuple(name for name in dict.fromkeys(args.log) if name != "csv"),
        command=command,
        open=args.open,
    )
    if args.redraw:
        redraw(request)
    elif args.plan:
        plan(request)
    elif not run(request):
        return FAILED
    return DONE


def _figures(args: argparse.Namespace) -> tuple[FigureRequest, ...]:
    # Before any name is looked up: the modules may register the figures that --fig names.
    load_modules(args.figure_module)
    by_case = {name.lower(): name for name in FIGURES}
    asked = [name if name in FIGURES else by_case.get(name.lower(), name) for name in args.fig]
    names = (*PAPER, *EXTRA) if "all" in args.fig else tuple(dict.fromkeys(asked))
    given = {name: getattr(args, name) for name in flags()}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if v is not None}
    chosen = [load(name) for name in names]
    # With several figures, a flag needs only one that uses it: --fig A2 A6 --prune-epochs 20 is meaningful.
    for setting in given:
        if all(figure.ignores(setting) for figure in chosen):
            raise InputError(f"figure {', '.join(names)} does not use {flag_of(setting)}: remove it")
    figures = []
    for figure in chosen:
        used = {k: v for k, v in given.items() if not figure.ignores(k)}
        settings = preset(figure.protocol, args.preset, figure.presets).override(**used)
        data = _data(args, settings, len(names))
        figures.append(FigureRequest(figure, args.preset, settings, data, args.out / figure.name))
    return tuple(figures)


def _modules(args: argparse.Namespace) -> tuple[str, ...]:
    """The user's modules, with absolute paths, since workers may have another working directory."""
    return tuple(str(Path(m).resolve()) if m.endswith(".py") else m for m in args.figure_module)


def _data(args: argparse.Namespace, settings: Settings, count: int) -> str | None:
    """The data of one figure: a folder, "synthetic" or None. count: how many figures are requested."""
    data: str | None = "synthetic" if args.data is None and args.preset == "smoke" else args.data
    if settings.dataset != "miniplaces":
        return data
    if args.miniplaces is not None:
        return str(args.miniplaces)
    # --data is Tiny ImageNet where other figures are requested, too; A1 alone may be given MiniPlaces by either flag.
    return data if data == "synthetic" or count == 1 else None
