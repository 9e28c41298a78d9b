"""`scripts/train.py`: the flags of torchvision's reference classification script, and a few for pruning.

A flag of the reference that is not supported is accepted only with its default value.
"""

# No import of torch at the top: --help and usage errors must answer at once.

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastprune.cli.command import (
    COMPUTE_HELP,
    DONE,
    FAILED,
    GPU_OPTIONS_HELP,
    Parser,
    checked,
    close_to,
    expanded,
    gpu_options,
    run_command,
    to_path,
)
from fastprune.errors import InputError
from fastprune.loaders.choice import LOADERS
from fastprune.loaders.transforms import INTERPOLATIONS, POLICIES, Augment
from fastprune.specs import COMPUTES, EmaSpec, OptimizerSpec, ScheduleSpec, forced_options
from fastprune.training.request import (
    PRUNE_SCHEDULES,
    PruneSchedule,
    TrainRequest,
    check_paths,
    other_decays,
    prune_schedule_of,
)
from fastprune.training.scalars import LOGS

# The reference's names in lower case, as it compares them, -> those of ScheduleSpec.
SCHEDULERS = {"steplr": "multistep", "cosineannealinglr": "cosine", "exponentiallr": "exponential"}

OPTIMIZERS = ("sgd", "sgd_nesterov", "adamw", "rmsprop")

# Accepted at the default, so that a command line of the reference that spells out defaults works unchanged.
UNSUPPORTED: dict[str, tuple[Any, Callable[[str], Any], str]] = {
    "--cache-dataset": (False, bool, "--loader ffcv keeps the images as .beton files"),
    "--sync-bn": (False, bool, "each rank normalises its own batch"),
    "--world-size": (1, int, "torchrun sets the number of ranks"),
    "--dist-url": ("env://", str, "torchrun sets the address"),
    "--backend": ("PIL", str, "the loader is chosen with --loader"),
    "--use-v2": (False, bool, "the loader is chosen with --loader"),
}
"""Flag -> (the reference's default, its type, why no other value is supported)."""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        allow_abbrev=False,  # an abbreviation in a user's script would break when a flag is added
        prog="train.py",
        description="Train a torchvision model, dense or under a pruning mask, with the flags of torchvision's "
        "reference classification script.",
        epilog="Several GPUs: torchrun --nproc_per_node N scripts/train.py ...; -b is the batch size per GPU.",
    )
    # Defaults are the reference's, except --workers (16 there) and --device (cuda there), which follow the machine.
    p.add_argument(
        "--data-path",
        required=True,
        type=expanded,
        metavar="DIR",
        help="folder with train/<class>/ and val/<class>/, images of any size; the folder or a file of FFCV's "
        ".beton files; Tiny ImageNet, MiniPlaces or a prepared folder, used at its own image size; or 'synthetic': "
        "generated images",
    )
    p.add_argument(
        "--model",
        default="resnet18",
        metavar="NAME",
        help="name in torchvision.models, or timm/NAME, if timm is installed (default resnet18)",
    )
    p.add_argument(
        "--weights",
        metavar="NAME",
        help="pretrained weights to start from, by torchvision's name; with timm/NAME its tag, or DEFAULT",
    )
    p.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda if available)")
    p.add_argument(
        "-b", "--batch-size", type=_count, default=32, metavar="N", help="images per step and rank (default 32)"
    )
    p.add_argument("--epochs", type=_count, default=90, metavar="N", help="total number of epochs (default 90)")
    p.add_argument(
        "-j", "--workers", type=_whole, metavar="N", help="processes that load images (default: one per core)"
    )
    p.add_argument("--opt", default="sgd", metavar="NAME", help=f"optimiser: {', '.join(OPTIMIZERS)} (default sgd)")
    p.add_argument("--lr", type=_positive, default=0.1, metavar="LR", help="peak learning rate (default 0.1)")
    p.add_argument(
        "--momentum", type=_fraction, default=0.9, metavar="M", help="momentum of sgd and rmsprop (default 0.9)"
    )
    p.add_argument(
        "--wd",
        "--weight-decay",
        type=_number,
        default=1e-4,
        metavar="W",
        dest="weight_decay",
        help="weight decay (default 0.0001)",
    )
    for name, what in (
        ("norm", "of normalisation layers"),
        ("bias", "of biases"),
        ("transformer-embedding", "of the embeddings of vision transformers"),
    ):
        flag = f"--{name}-decay" if "embedding" in name else f"--{name}-weight-decay"
        p.add_argument(flag, type=_number, metavar="W", help=f"weight decay {what} (default: --weight-decay)")
    p.add_argument("--clip-grad-norm", type=_positive, metavar="N", help="largest norm of a gradient (default: none)")
    p.add_argument(
        "--label-smoothing", type=_fraction, default=0.0, metavar="S", help="label smoothing of the loss (default 0)"
    )
    for name in ("mixup", "cutmix"):
        p.add_argument(
            f"--{name}-alpha",
            type=_number,
            default=0.0,
            metavar="A",
            help=f"{name} of each batch, with a Beta(A, A); with both, one of the two is drawn (default 0: none)",
        )
    p.add_argument("--auto-augment", metavar="NAME", help=f"augmentation: {', '.join(POLICIES)} (default: none)")
    p.add_argument("--ra-magnitude", type=_whole, default=9, metavar="N", help="magnitude of ra (default 9)")
    p.add_argument("--augmix-severity", type=_count, default=3, metavar="N", help="severity of augmix (default 3)")
    p.add_argument(
        "--random-erase",
        type=_fraction,
        default=0.0,
        metavar="P",
        help="probability that a part of a training image is erased (default 0)",
    )
    p.add_argument(
        "--interpolation",
        default="bilinear",
        metavar="NAME",
        help=f"resizing: {', '.join(INTERPOLATIONS)} (default bilinear)",
    )
    p.add_argument(
        "--ra-sampler", action="store_true", help="repeated augmentation: ranks see an image at once, augmented anew"
    )
    p.add_argument("--ra-reps", type=_count, default=3, metavar="N", help="repetitions of --ra-sampler (default 3)")
    p.add_argument(
        "--model-ema", action="store_true", help="keep, test and save a moving average of weights and statistics"
    )
    p.add_argument(
        "--model-ema-steps", type=_count, default=32, metavar="N", help="steps between its updates (default 32)"
    )
    p.add_argument(
        "--model-ema-decay",
        type=_fraction,
        default=0.99998,
        metavar="D",
        help="its decay, which the reference adjusts to batch size and epochs (default 0.99998)",
    )
    p.add_argument(
        "--lr-scheduler", default="steplr", metavar="NAME", help=f"decay: {', '.join(SCHEDULERS)} (default steplr)"
    )
    p.add_argument(
        "--lr-step-size", type=_count, default=30, metavar="N", help="steplr: epochs between decays (default 30)"
    )
    p.add_argument("--lr-gamma", type=_number, default=0.1, metavar="G", help="factor of each decay (default 0.1)")
    p.add_argument(
        "--lr-min", type=_number, default=0.0, metavar="LR", help="last rate of cosineannealinglr (default 0)"
    )
    p.add_argument("--lr-warmup-epochs", type=_whole, default=0, metavar="N", help="warmup epochs (default 0)")
    p.add_argument(
        "--lr-warmup-method",
        default="constant",
        metavar="NAME",
        help="constant (default), or linear, which rises per batch (in the reference per epoch)",
    )
    p.add_argument(
        "--lr-warmup-decay", type=_number, default=0.01, metavar="F", help="first factor of the warmup (default 0.01)"
    )
    p.add_argument(
        "--print-freq",
        type=_count,
        default=10,
        metavar="N",
        help="batches between lines of output (default 10); on a GPU fewer where it falls behind",
    )
    p.add_argument(
        "--output-dir",
        default=".",
        type=expanded,
        metavar="DIR",
        help="folder for checkpoint.pth and mask.safetensors (default .); '': none",
    )
    p.add_argument(
        "--resume",
        type=expanded,
        default="",
        metavar="FILE",
        help="continue from this checkpoint, or start from these plain weights",
    )
    p.add_argument(
        "--start-epoch",
        type=_whole,
        default=0,
        metavar="N",
        help="first epoch, unless a checkpoint is resumed (default 0)",
    )
    p.add_argument("--test-only", action="store_true", help="only validate, without training")
    p.add_argument("--amp", action="store_true", help="mixed precision, in bf16 (see --amp-dtype)")
    p.add_argument(
        "--use-deterministic-algorithms", action="store_true", help="fail rather than use a nondeterministic operation"
    )
    for name, default, what in (
        ("val-resize", 256, "shorter side of validation images"),
        ("val-crop", 224, "side of their centre crop"),
        ("train-crop", 224, "side of the random crop in training"),
    ):
        p.add_argument(
            f"--{name}-size", type=_count, metavar="PIXELS", help=f"{what}, for an image folder (default {default})"
        )

    own = p.add_argument_group("not in the reference")
    own.add_argument(
        "--seed", type=_whole, default=0, metavar="N", help="seed of initial weights, data order and crops (default 0)"
    )
    pruned = own.add_mutually_exclusive_group()
    pruned.add_argument(
        "--sparsity",
        type=_sparsity,
        metavar="S",
        help="before training, prune weights by global magnitude until this fraction is zero. With --resume, the "
        "checkpoint's weights are pruned and training starts at the first epoch, unless already this sparse",
    )
    pruned.add_argument("--mask", type=to_path, metavar="FILE", help="train under the mask in this mask.safetensors")
    own.add_argument(
        "--prune-schedule",
        choices=PRUNE_SCHEDULES,
        default="once",
        help="when --sparsity is reached: once before training (default), or in steps at the start of epochs, by equal "
        "fractions of what is left (geometric) or fast first (cubic, Zhu and Gupta)",
    )
    own.add_argument(
        "--prune-start-epoch",
        type=_whole,
        metavar="N",
        help="epoch that begins with the schedule's first pruning (default 0)",
    )
    own.add_argument(
        "--prune-end-epoch",
        type=_whole,
        metavar="N",
        help="epoch that begins with its last one (default: three quarters of --epochs)",
    )
    own.add_argument(
        "--prune",
        metavar="WHAT",
        help="layers whose weights masks cover: conv (default), all (convs, linear, attention, recurrent layers), or a "
        "pattern of layer names such as 'features.*'",
    )
    own.add_argument("--amp-dtype", choices=["bf16", "fp16"], help="precision of --amp (default bf16)")
    own.add_argument(
        "--loader", choices=LOADERS, default="auto", help="how images are read (default: the fastest available)"
    )
    own.add_argument("--compute", choices=COMPUTES, default="auto", help=COMPUTE_HELP)
    own.add_argument("--gpu-options", type=gpu_options, default="auto", metavar="WHICH", help=GPU_OPTIONS_HELP)
    own.add_argument(
        "--store", type=to_path, metavar="DIR", help="folder for prepared images, in its data/ (default runs)"
    )

    own.add_argument(
        "--log",
        nargs="+",
        choices=LOGS,
        default=[],
        help="where metrics of each epoch go, in --output-dir: metrics.csv, tensorboard/, wandb/ (online if you are "
        "logged in; WANDB_MODE=offline)",
    )

    rest = p.add_argument_group("flags of the reference that are accepted only with their default value")
    for flag, (default, kind, why) in UNSUPPORTED.items():
        if kind is bool:
            rest.add_argument(flag, action="store_true", help=why)
        else:
            rest.add_argument(flag, type=kind, default=default, metavar="X", help=why)
    return p


_count = checked(int, lambda n: n >= 1, "a whole number of 1 or more")

_whole = checked(int, lambda n: 0 <= n < 1 << 31, "a whole number of 0 or more")

_number = checked(float, lambda x: x >= 0, "a number of 0 or more")

_positive = checked(float, lambda x: x > 0, "a number above 0")

_fraction = checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")

_sparsity = checked(float, lambda x: 0 <= x < 1, "a fraction: 0 or more, and less than 1")


def request_of(args: argparse.Namespace) -> TrainRequest:
    """The request of the parsed flags. InputError for flags that contradict each other or are not supported."""
    _refuse_unsupported(args)
    scheduler, warmup = args.lr_scheduler.lower(), args.lr_warmup_method.lower()
    if scheduler not in SCHEDULERS:
        raise InputError(f"unknown --lr-scheduler {args.lr_scheduler}: choose one of {', '.join(SCHEDULERS)}")
    if warmup not in ("linear", "constant"):
        raise InputError(f"unknown --lr-warmup-method {args.lr_warmup_method}: choose linear or constant")
    if args.amp_dtype and not args.amp:
        raise InputError("--amp-dtype requires --amp")
    name = args.opt.lower()
    nesterov = name == "sgd_nesterov"
    if nesterov and args.momentum == 0:
        raise InputError("--opt sgd_nesterov requires --momentum above 0")
    if args.log and not args.output_dir:
        raise InputError("--log requires --output-dir")
    augment = Augment(
        args.auto_augment, args.ra_magnitude, args.augmix_severity, args.random_erase, args.interpolation.lower()
    )
    if augment.asked and args.loader not in ("auto", "torchvision"):
        raise InputError(
            f"--loader {args.loader} cannot do {', '.join(augment.asked)}, which torchvision's transforms do: leave "
            "--loader out, or choose torchvision"
        )
    # The reference chains warmup and decay (SequentialLR), so its decay counts epochs from the end of the warmup.
    steps = range(args.lr_warmup_epochs + args.lr_step_size, args.epochs, args.lr_step_size)
    # For the checkpoint, which must load with weights_only=True and so holds plain values only.
    plain = {n: str(value) if isinstance(value, Path) else value for n, value in vars(args).items()}
    return TrainRequest(
        data=args.data_path,
        model=args.model,
        optimizer=OptimizerSpec(
            args.batch_size,
            args.momentum,
            args.weight_decay,
            nesterov,
            args.label_smoothing,
            name.removesuffix("_nesterov"),
            other_decays(plain),
            args.clip_grad_norm,
        ),
        schedule=ScheduleSpec(
            args.lr,
            args.epochs,
            milestones=tuple(steps) if scheduler == "steplr" else (),
            gamma=args.lr_gamma,
            warmup_epochs=args.lr_warmup_epochs,
            decay=SCHEDULERS[scheduler],
            lr_min=args.lr_min,
            warmup=warmup,
            warmup_start=args.lr_warmup_decay,
        ),
        weights=args.weights or None,
        device=args.device,
        precision=(args.amp_dtype or "bf16") if args.amp else "fp32",
        train_crop=args.train_crop_size,
        val_resize=args.val_resize_size,
        val_crop=args.val_crop_size,
        loader=args.loader,
        workers=args.workers,
        store=args.store,
        seed=args.seed,
        resume=Path(args.resume) if args.resume else None,
        start_epoch=args.start_epoch,
        sparsity=args.sparsity,
        prune=args.prune,
        mask=args.mask,
        output=Path(args.output_dir) if args.output_dir else None,
        test_only=args.test_only,
        print_freq=args.print_freq,
        deterministic=args.use_deterministic_algorithms,
        compute=args.compute,
        gpu_options=forced_options(args.gpu_options),
        ema=EmaSpec(args.model_ema_decay, args.model_ema_steps) if args.model_ema else None,
        mixup=args.mixup_alpha,
        cutmix=args.cutmix_alpha,
        augment=augment if augment.asked else None,
        repeats=args.ra_reps if args.ra_sampler else 1,
        prune_schedule=_prune_schedule(args),
        log=tuple(dict.fromkeys(args.log)),
        flags=plain,
    )


def _prune_schedule(args: argparse.Namespace) -> PruneSchedule | None:
    if args.prune_schedule == "once":
        for flag, value in (("start", args.prune_start_epoch), ("end", args.prune_end_epoch)):
            if value is not None:
                raise InputError(f"--prune-{flag}-epoch requires --prune-schedule geometric or cubic")
    elif args.sparsity is None:
        raise InputError(f"--prune-schedule {args.prune_schedule} requires --sparsity, at which it ends")
    found = prune_schedule_of(vars(args))
    if found is not None and not found.first <= found.last < args.epochs:
        raise InputError(
            f"--prune-schedule runs from epoch {found.first} to {found.last}: expected two epochs from 0 to "
            f"{args.epochs - 1}, in order"
        )
    return found


def _refuse_unsupported(args: argparse.Namespace) -> None:
    # All of them in one message, so that a user does not find them one by one.
    refused = []
    for flag, (default, _, why) in UNSUPPORTED.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        # As text, in any case: "--interpolation Bilinear" and "--backend pil" are the default, too.
        if value != default and str(value).lower() != str(default).lower():
            refused.append(f"{flag} is not supported: {why}")
    if args.opt.lower() not in OPTIMIZERS:
        near = close_to(args.opt.lower(), OPTIMIZERS)
        refused.append(f"--opt {args.opt} is not supported: choose one of {', '.join(OPTIMIZERS)}{near}")
    if refused:
        raise InputError("; ".join(refused))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 done, 1 diverged or out of memory, 2 bad usage or bad input, 130 interrupted."""

    def work() -> int:
        given = list(sys.argv[1:] if argv is None else argv)
        request = request_of(parser().parse_args(given))
        check_paths(request)
        from fastprune.study.provenance import versions
        from fastprune.training.classification import run

        request = replace(request, command=shlex.join(["train.py", *given]), versions=versions())
        return DONE if run(request) else FAILED

    return run_command("train.py", work)
