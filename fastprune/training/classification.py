"""One call of train.py: data, model, mask, training, checkpoints. Under torchrun, one of several ranks."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.transforms import v2

from fastprune.console import bf16_advice
from fastprune.errors import InputError
from fastprune.loaders import Crop, DataSource, Manifest, find_or_prepare, open_data
from fastprune.pruning.masks import Mask
from fastprune.pruning.schedules import cubic, geometric_to
from fastprune.specs import GpuOptions, ScheduleSpec, check_gpu_options
from fastprune.training.about import About, History, Inputs, hardware
from fastprune.training.checkpoint import fitting_mask, load_checkpoint, replace_file, save_checkpoint, trainer_mask
from fastprune.training.models import build_model
from fastprune.training.request import PruneSchedule, TrainRequest, prune_schedule_of
from fastprune.training.scalars import ScalarLog, open_log
from fastprune.training.step import EpochMetrics, Evaluation, Snapshot
from fastprune.training.trainer import Batches, Trainer
from fastprune.training.tuning import CHOICES, Choices

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for images whose own are not known

_STORE = Path("runs")


Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixing(request: TrainRequest, classes: int) -> Mix | None:
    """The request's mixup and CutMix, one of which is drawn for each batch; None for neither."""
    ways: list[nn.Module] = []
    if request.mixup > 0:
        ways.append(v2.MixUp(alpha=request.mixup, num_classes=classes))
    if request.cutmix > 0:
        ways.append(v2.CutMix(alpha=request.cutmix, num_classes=classes))
    return v2.RandomChoice(ways) if ways else None


class Epochs:
    """Training batches whose epoch also seeds torch's generators, from (seed, epoch, rank): what a model draws itself
    (dropout, stochastic depth) does not depend on where a run was resumed, nor does what `mix` draws.

    mix: from images and labels of a batch to images and probabilities of classes (mixup), or None.
    """

    def __init__(self, batches: Any, seed: int, rank: int, mix: Mix | None = None) -> None:
        self._batches, self._seed, self._rank, self._mix = batches, seed, rank, mix

    def set_epoch(self, epoch: int) -> None:
        self._batches.set_epoch(epoch)
        words = np.random.SeedSequence([self._seed, epoch, self._rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._mix is None:
            return iter(self._batches)
        return (self._mix(images, labels) for images, labels in self._batches)


@dataclass(frozen=True)
class Images:
    """Opened data. inputs: validation images.  size: height and width of training images.  about: one line.  resized:
    whether by the crop flags."""

    source: DataSource
    inputs: Inputs
    size: tuple[int, int]
    about: str
    resized: bool

    def train(self, request: TrainRequest, rank: int, world_size: int, dtype: torch.dtype) -> Epochs:
        """Training batches of one rank."""
        batches = self.source.train(
            seed=request.seed,
            batch_size=request.optimizer.batch_size,
            rank=rank,
            world_size=world_size,
            dtype=dtype,
            # The reference repeats images only where ranks share them.
            repeats=request.repeats if world_size > 1 else 1,
        )
        return Epochs(batches, request.seed, rank, mixing(request, len(self.inputs.classes)))

    def val(self, batch_size: int, rank: int, world_size: int, dtype: torch.dtype) -> Any:
        """Validation batches of one rank."""
        return self.source.val(batch_size=batch_size, rank=rank, world_size=world_size, dtype=dtype)


def open_images(request: TrainRequest, device: torch.device, *, show: bool, local_world_size: int = 1) -> Images:
    """Finds, prepares where needed, and opens the data. InputError where it is not usable.

    show: progress on stderr.  local_world_size: processes that share the processors.
    """
    if request.data == "":
        raise InputError("--data-path is empty: give a folder of images, or 'synthetic'")
    workers = request.workers
    if workers is None:
        workers = min(16, max(1, len(os.sched_getaffinity(0)) // local_world_size))
    augment, loader = request.augment, request.loader
    if augment is not None and loader == "auto":
        loader = "torchvision"
    manifest, folder = find_or_prepare(request.data, request.store or _STORE, loader=loader, any_size=True, show=show)
    size = (manifest.height, manifest.width)
    crop = None
    if manifest.one_size:
        _check_flags(request, manifest)
        shown, mean, std = f"{size[0]} x {size[1]}, normalised by their own", manifest.mean, manifest.std
    else:
        crop = Crop(request.train_crop or 224, request.val_resize or 256, request.val_crop or 224, MEAN, STD)
        size, mean, std = (crop.train_crop, crop.train_crop), MEAN, STD
        shown = (
            f"cropped to {size[0]} x {size[1]} (validation: resized to {crop.val_resize}, cropped to {crop.val_crop}), "
            "normalised by ImageNet's"
        )
    source = open_data(
        manifest, folder, loader=loader, crop=crop, augment=augment, device=device, workers=workers, show=show
    )
    about = (
        f"{manifest.name}: {manifest.train_count} training and {manifest.val_count} validation images in "
        f"{len(manifest.classes)} classes, {shown} mean {_three(mean)} and std {_three(std)}, loader {source.loader} "
        f"({source.why})"
    )
    if augment is not None:
        about += f"\nNote: torchvision's transforms read the images, for {', '.join(augment.asked)}"
    if request.repeats > 1 and local_world_size == 1 and Ranks.from_environment().world_size == 1:
        about += "\nNote: --ra-sampler has no effect in one process, as in the reference"
    if not source.resumes and not request.test_only:
        about += "\nNote: FFCV's crops are not seeded, a resumed run differs; --loader torchvision resumes to the bit"
    inputs = Inputs(
        manifest.name,
        manifest.classes,
        *((crop.val_crop, crop.val_crop) if crop else size),
        mean,
        std,
        crop.val_resize if crop else None,
        augment.interpolation if augment else "bilinear",
    )
    return Images(source, inputs, size, about, resized=crop is not None)


def _check_flags(request: TrainRequest, manifest: Manifest) -> None:
    for flag, asked in (
        ("--train-crop-size", request.train_crop),
        ("--val-resize-size", request.val_resize),
        ("--val-crop-size", request.val_crop),
    ):
        if asked is not None and (asked, asked) != (manifest.height, manifest.width):
            raise InputError(
                f"{flag} {asked} does not fit {manifest.name}, whose images are used at their own {manifest.height} x "
                f"{manifest.width} pixels: leave the flag out, or give a folder with train/<class>/ and val/<class>/"
            )


def _three(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{v:.3f}' for v in values)})"


class TrainLog:
    """Prints an epoch: a line now and then while it lasts, and what it gave.

    so_far: the running sums of this process, a Snapshot: a line is printed once it can be read without waiting, and
    left out if a later one can. Losses in nats, accuracies in percent; in `loss: a (b)`, a is the mean since the last
    line and b that of the epoch. batches, batch_size: of each of `world_size` ranks; images/s are those of all.
    """

    def __init__(
        self,
        batches: int,
        batch_size: int,
        schedule: ScheduleSpec,
        *,
        every: int,
        so_far: Callable[[], Snapshot],
        epoch: int,
        world_size: int = 1,
    ) -> None:
        self._batches, self._schedule, self._every, self._so_far, self._world_size = (
            batches,
            schedule,
            every,
            so_far,
            world_size,
        )
        self._images = batches * batch_size * world_size
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._done = epoch, 0
        self._began = self._last = time.perf_counter()
        self._before = (Evaluation(0.0, 0.0, 0.0), 0)
        self._waiting: deque[tuple[int, Snapshot]] = deque()

    def batch(self, images: int) -> None:
        """To be called after each training batch."""
        number, self._done = self._done, self._done + 1
        if number % self._every == 0:
            self._waiting.append((number, self._so_far()))
        latest = None
        while self._waiting and self._waiting[0][1].is_ready():
            latest = self._waiting.popleft()
        if latest is not None:
            self._within(*latest)

    def _within(self, number: int, snapshot: Snapshot) -> None:
        now, (mean, seen) = time.perf_counter(), snapshot.result()
        before, old = self._before
        fresh = seen - old
        loss, accuracy, accuracy5 = (
            (m, (m * seen - b * old) / fresh) for m, b in zip(map(_number, mean), map(_number, before), strict=True)
        )
        left = (now - self._began) / (number + 1) * (self._batches - number - 1)
        rate = fresh * self._world_size / (now - self._last)
        lr = self._schedule.lr_at(self._epoch, number / self._batches)
        shown = f"{loss[1]:.4f} ({loss[0]:.4f})", _both(*accuracy), _both(*accuracy5)
        self._line(number, left, lr, rate, *shown)
        self._last, self._before = now, (mean, seen)

    def epoch(self, m: EpochMetrics) -> None:
        """To be called after each epoch."""
        accuracies = (f"{100 * _number(a):.3f}" for a in (m.train_accuracy, m.train_accuracy5))
        self._line(self._batches, 0.0, m.lr, m.images_per_second, f"{m.train_loss:.4f}", *accuracies)
        say(f"Epoch: [{self._epoch}] Total time: {clock(self._images / m.images_per_second)}")
        say_test(Evaluation(m.val_loss, m.val_accuracy, m.val_accuracy5))
        if m.ema_loss is not None and m.ema_accuracy is not None:
            say_test(Evaluation(m.ema_loss, m.ema_accuracy, m.ema_accuracy5), "EMA")
        self._begin(m.epoch)

    def _line(self, number: int, left: float, lr: float, rate: float, loss: str, acc1: str, acc5: str) -> None:
        width = len(str(self._batches))
        say(
            f"Epoch: [{self._epoch}]  [{number:{width}d}/{self._batches}]  eta: {clock(left)}  lr: {lr:.6g}  "
            f"img/s: {rate:.1f}  loss: {loss}  acc1: {acc1}  acc5: {acc5}"
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _both(mean: float, recent: float) -> str:
    return f"{100 * recent:.3f} ({100 * mean:.3f})"


def say_test(found: Evaluation, of: str = "") -> None:
    """The line of an evaluation."""
    say(f"Test: {of} Acc@1 {100 * found.accuracy:.3f} Acc@5 {100 * _number(found.accuracy5):.3f} loss {found.loss:.4f}")


def say(text: str) -> None:
    print(text, flush=True)


def clock(seconds: float) -> str:
    """0:01:23"""
    return str(timedelta(seconds=int(seconds)))


_RESULT = (
    *("data_path", "train_crop_size", "batch_size", "epochs", "opt", "lr", "momentum", "weight_decay"),
    *("label_smoothing", "lr_scheduler", "lr_step_size", "lr_gamma", "lr_min", "lr_warmup_epochs"),
    *("lr_warmup_method", "lr_warmup_decay", "amp", "amp_dtype", "seed"),
    *("norm_weight_decay", "bias_weight_decay", "transformer_embedding_decay", "clip_grad_norm"),
    *("mixup_alpha", "cutmix_alpha", "auto_augment", "ra_magnitude", "augmix_severity", "random_erase"),
    *("interpolation", "ra_sampler", "ra_reps", "model_ema", "model_ema_steps", "model_ema_decay"),
    *("prune_schedule", "prune_start_epoch", "prune_end_epoch"),
)
"""Flags that a run which is to continue to the bit must not change."""


class Ranks(NamedTuple):
    """This process among those that train together, as torchrun numbers them; local: on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun says."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "0101", strict=True)))


class Start(NamedTuple):
    """Where a run starts. epochs: that are done. compute, options: how they were computed, None for a new run. lines:
    what was done. history: of what led here."""

    epochs: int
    compute: str | None
    lines: list[str]
    history: History
    options: GpuOptions | None = None


def run(request: TrainRequest) -> bool:
    """Trains, or only tests, as asked; False if it diverged or ran out of memory. InputError for bad input."""
    ranks = Ranks.from_environment()
    device = choose_device(request, ranks)
    images = None
    try:
        with _process_group(device, ranks):
            images = open_images(request, device, show=ranks.rank == 0, local_world_size=ranks.local_world_size)
            return _run(request, images, device, ranks)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        size = f" or --train-crop-size (now {images.size[0]})" if images and images.resized else ""
        amp = ", or add --amp" if request.precision == "fp32" else ""
        return _failed(f"out of memory on {device}: lower --batch-size (now {request.optimizer.batch_size}){size}{amp}")


def _run(request: TrainRequest, images: Images, device: torch.device, ranks: Ranks) -> bool:
    model = build_model(request.model, request.weights, len(images.inputs.classes), images.size, request.seed)
    trainer = _trainer(model, device, request)
    try:
        return _trained(request, trainer, images, ranks)
    finally:
        trainer.close()


def _trainer(model: nn.Module, device: torch.device, request: TrainRequest) -> Trainer:
    """The trainer; its masks cover what --prune says. InputError if that is nothing, or the default is too little."""
    what = request.prune or "conv"
    named = what in ("conv", "all")
    try:
        trainer = Trainer(
            model,
            device=device,
            precision=request.precision,
            kinds=what if named else "all",
            include=None if named else what,
            compute=request.compute,
            gpu_options=request.gpu_options,
            choices=Choices((request.store or _STORE) / CHOICES),
        )
    except ValueError as error:
        more = "" if request.prune else "; --prune all covers other layers, too"
        raise InputError(f"--prune {what}: {error}{more}") from None
    if (
        request.compute == "sparse"
        and not request.test_only
        and (why := trainer.why_not_sparse(request.optimizer.name))
    ):
        raise InputError(f"--compute sparse is not possible here: {why}")
    covered, total = trainer.pruner.total, trainer.pruner.coverage.total
    if request.prune is None and request.sparsity and 2 * covered < total:
        raise InputError(
            f"--sparsity {request.sparsity} would prune convs only, {covered:,} of the {total:,} parameters of "
            f"{request.model}: add --prune all, or --prune conv if that is meant"
        )
    return trainer


def _trained(request: TrainRequest, trainer: Trainer, images: Images, ranks: Ranks) -> bool:
    start = prepare(trainer, request, ranks.world_size)
    batch_size = request.optimizer.batch_size
    val = images.val(batch_size, ranks.rank, ranks.world_size, trainer.images)
    first = ranks.rank == 0
    if first:
        say(f"Data {images.about}")
        sizes = _batches(batch_size, ranks.world_size)
        say(f"Model {request.model}, {request.precision} on {_name(trainer.device)}, {sizes}")
        if request.precision == "bf16" and trainer.device.type == "cpu" and (advice := bf16_advice("leave out --amp")):
            say(advice)
        for line in start.lines:
            say(line)
        if request.test_only and request.resume is None and request.weights is None:
            say("note: these weights are random: give --resume CHECKPOINT, or --weights NAME")
        say(_sparsity(trainer, request.prune))
    if request.test_only:
        averaged = request.ema is not None
        if averaged and trainer.ema is None:
            raise InputError("--test-only --model-ema tests an average that --resume must bring: the file has none")
        with _input_errors():
            found = trainer.evaluate(val, averaged=averaged)
        if first:
            say_test(found, "EMA" if averaged else "")
        return True
    train = images.train(request, ranks.rank, ranks.world_size, trainer.images)
    if first and (line := _dropped(len(train), images.source.manifest.train_count, request, ranks.world_size)):
        say(line)
    return _fit(trainer, train, val, request, start, ranks, images)


def _dropped(batches: int, count: int, request: TrainRequest, world_size: int) -> str:
    """A line on the images that an epoch of so many batches drops, "" where they are few. count: training images."""
    used = batches * request.optimizer.batch_size * world_size
    if request.repeats > 1 or not 0 < used < 0.9 * count:  # without any batch the Trainer says so
        return ""
    return (
        f"note: an epoch trains on {used} of the {count} images, others each time, as the last batch, which is not "
        "full, is dropped: a smaller --batch-size drops fewer"
    )


def _fit(
    trainer: Trainer,
    train: Epochs,
    val: Batches,
    request: TrainRequest,
    begin: Start,
    ranks: Ranks,
    images: Images,
) -> bool:
    start, before, past = begin.epochs, begin.compute, begin.history.with_command(request.command)
    kept = request.checkpoint if ranks.rank == 0 else None
    last = request.resume
    log: TrainLog | None = None
    scalars: list[ScalarLog] = []
    if ranks.rank == 0:
        log = TrainLog(
            len(train),
            request.optimizer.batch_size,
            request.schedule,
            every=request.print_freq,
            so_far=trainer.so_far,
            epoch=start,
            world_size=ranks.world_size,
        )
        if request.output is not None:
            name = f"{request.model} {request.output.name}"
            scalars = [
                open_log(kind, request.output, name=name, config=request.flags, done=start) for kind in request.log
            ]
    said, goes_on = "", None

    def on_batch(count: int) -> None:
        nonlocal said, goes_on
        assert log is not None
        if (how := trainer.described()) and how != said:  # the first batch under a mask has decided how it computes
            said = how
            say(how)
        if goes_on is not None and (line := trainer.resumed(goes_on)):
            print(f"train.py: {line}", file=sys.stderr)
        if goes_on is not None and begin.options and (line := trainer.resumed_options(begin.options)):
            print(f"train.py: {line}", file=sys.stderr)
        goes_on = None
        log.batch(count)

    def on_epoch(m: EpochMetrics) -> None:
        nonlocal last, past
        if log is not None:
            log.epoch(m)
        for each in scalars:
            each.add(m.epoch, _scalars(m, trainer))
        if kept is not None and not m.diverged:
            flags = {**request.flags, "ranks": ranks.world_size}
            past = past.after(len(train) * request.optimizer.batch_size * ranks.world_size, m.seconds, device)
            val_count = images.source.manifest.val_count
            about = About(images.inputs, past, val_count, m.val_accuracy, m.ema_accuracy, request.versions)
            save_checkpoint(kept, trainer, m.epoch, request.optimizer, m.lr, flags, about)
            last = kept

    device = hardware(str(trainer.device))
    if ranks.world_size > 1:
        device = f"{ranks.world_size} x {device}"
    if log is not None:
        if start >= request.schedule.epochs:
            say(
                f"note: {start} of {request.schedule.epochs} epochs are done, nothing is trained: raise --epochs, or "
                "prune (--sparsity) to begin a new run"
            )
        say("Start training")
    began = time.monotonic()
    try:
        for first, stop, sparsity in _phases(request, start):
            pruned = 0 if sparsity is None else _prune_to(trainer, sparsity)
            if kept is not None:
                _save_mask(kept, trainer)
            if pruned and log is not None:
                say(_sparsity(trainer, request.prune))
            # A changed mask decides anew, as it did in a run that was not interrupted; "plain" was asked for.
            decided = before if before == "plain" or (first == start and not pruned) else None
            goes_on = decided if first == start else None
            with _input_errors():
                history = trainer.fit(
                    train,
                    val,
                    request.optimizer,
                    request.schedule,
                    start=first,
                    stop=stop,
                    report=on_batch if log else None,
                    on_epoch=on_epoch,
                    compute=decided,
                    strict=decided is None,
                    ema=request.adjusted_ema(ranks.world_size),
                    gpu_options=begin.options,
                )
            if history and history[-1].diverged:
                break
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([f"--resume {last} continues"] if last else [])) from None
    finally:
        for each in scalars:
            each.close()
    if history and history[-1].diverged:
        good = f"the last good state is in {last}" if last else "no epoch before it was kept"
        return _failed(f"diverged in epoch {history[-1].epoch - 1} (loss {history[-1].train_loss:.4g}): {good}", ranks)
    if log is not None:
        say(f"Training time {clock(time.monotonic() - began)}")
    return True


def _phases(request: TrainRequest, start: int) -> Iterator[tuple[int, int, float | None]]:
    """(first epoch, end, sparsity at its beginning or None) of each part of the run that trains under one mask."""
    schedule, epochs = request.prune_schedule, request.schedule.epochs
    if schedule is None or start >= epochs:
        yield start, epochs, None
        return
    begins = sorted({start, *range(max(start, schedule.first), schedule.last + 1)})
    for begin, end in pairwise([*begins, epochs]):
        yield begin, end, sparsity_at(schedule, begin)


def sparsity_at(schedule: PruneSchedule, epoch: int) -> float | None:
    """The sparsity with which `epoch` begins, None before the first pruning."""
    rounds, number = schedule.last - schedule.first + 1, min(epoch, schedule.last) - schedule.first + 1
    if number < 1:
        return None
    if schedule.name == "geometric":
        return list(geometric_to(schedule.sparsity, rounds))[number - 1]
    return cubic(schedule.sparsity, number / rounds)


def _save_mask(checkpoint: Path, trainer: Trainer) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    mask = trainer_mask(trainer)
    if mask.kept < mask.total:
        replace_file(checkpoint.with_name("mask.safetensors"), mask.save)


def _prune_to(trainer: Trainer, sparsity: float) -> int:
    """Prunes to this sparsity, or not if it is reached; how many weights."""
    now = trainer_mask(trainer)
    count = max(0, round(sparsity * now.total) - (now.total - now.kept))
    return trainer.pruner.prune(n=count) if count else 0


def _scalars(m: EpochMetrics, trainer: Trainer) -> dict[str, float | None]:
    return {
        **{name: value for name, value in m.as_dict().items() if name != "epoch"},
        "density": trainer.pruner.density,
    }


def choose_device(request: TrainRequest, ranks: Ranks) -> torch.device:
    """The device asked for, else a GPU if there is one, this rank's own. InputError for one that is not there."""
    try:
        device = torch.device(request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"unknown --device {request.device}: choose cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"--device {request.device} is not supported: choose cuda, cuda:N or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device(
            "cuda", ranks.local_rank if device.index is None or ranks.world_size > 1 else device.index
        )
        if device.index is None or device.index >= count:
            raise InputError(f"there is no {device}: {count} GPUs are visible here; --device cpu trains without one")
        torch.cuda.set_device(device)
        if request.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no bf16: add --amp-dtype fp16")
    check_gpu_options(request.gpu_options, device.type)
    if request.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        torch.use_deterministic_algorithms(True)
    return device


def prepare(trainer: Trainer, request: TrainRequest, ranks: int = 1) -> Start:
    """Puts weights, momentum and mask where the run starts.

    A checkpoint goes on from its own epoch. Only where --sparsity or --mask ask for another mask than it has, a new run
    begins from its weights, at --start-epoch and without momentum.
    """
    lines, start, before, held, options = [], request.start_epoch, None, None, None
    # What pretrained weights have cost is not known.
    history = History.begun_from(None) if request.weights else History()
    if request.resume is not None:
        found = load_checkpoint(request.resume, trainer, request.model, request.optimizer)
        held, past = found.mask, found.about.history if found.about else None
        same = _is_held(request, trainer, held, found.flags)
        trainer.load_state(found.state, momentum=same)
        if held is not None:
            trainer.set_mask(held)
        if same and found.epochs is not None:
            start, before, history = found.epochs, found.compute, History.resumed(past)
            options = found.gpu_options
            lines.append(f"Resumed {request.resume}, {start} epochs done")
            changed = [n for n in _RESULT if n in found.flags and found.flags[n] != request.flags.get(n)]
            if request.ema is not None and trainer.ema is None and not request.test_only:
                lines.append(f"note: {request.resume} has no moving average: it begins here")
            if not request.test_only:
                lines += [f"note: --{n.replace('_', '-')} was {found.flags[n]} before" for n in changed]
        else:
            history = History.begun_from(past)
            lines.append(f"A new run from the weights in {request.resume}")
        if found.taken and held is not None:
            lines.append(f"note: {held.total - held.kept} weights of the file are zero: they stay pruned")
        others = found.flags.get("ranks", ranks)
        if same and others != ranks:
            each = request.optimizer.batch_size
            lines.append(
                f"note: {others} ranks before, {ranks} now: a step sees {each * ranks} images, not {each * others}"
            )
    if request.mask is not None:
        trainer.set_mask(fitting_mask(Mask.load(request.mask).tensors(), trainer, request.mask))
    elif request.sparsity is not None and request.prune_schedule is None:
        _prune(trainer, request.sparsity)
    return Start(start, before, lines, history, options)


def _is_held(request: TrainRequest, trainer: Trainer, held: Mask | None, flags: Mapping[str, Any]) -> bool:
    """Whether the checkpoint's mask is the one asked for. flags: of the run that wrote it."""
    if request.mask is not None:
        wanted = fitting_mask(Mask.load(request.mask).tensors(), trainer, request.mask)
        return held is not None and torch.equal(wanted.keep, held.keep)
    if request.prune_schedule is not None:
        # The run that it was, at whatever sparsity it has come to.
        return prune_schedule_of(flags) == request.prune_schedule
    if request.sparsity is not None:
        pruned = 0 if held is None else held.total - held.kept
        return pruned == round(request.sparsity * trainer.flat.total)
    return True


def _prune(trainer: Trainer, sparsity: float) -> None:
    """Prunes until round(sparsity x all) weights are gone. InputError if more are gone, or none would be left."""
    now = trainer_mask(trainer)
    goal, gone = round(sparsity * now.total), now.total - now.kept
    if goal < gone:
        raise InputError(f"--sparsity {sparsity} is less than the {gone / now.total:.4f} pruned already")
    if goal == now.total:
        raise InputError(f"--sparsity {sparsity} would prune all {now.total} weights")
    if goal > gone:
        trainer.pruner.prune(n=goal - gone)


def _sparsity(trainer: Trainer, prune: str | None) -> str:
    mask, kind = trainer_mask(trainer), "" if prune not in (None, "conv") else "conv "
    if mask.kept == mask.total:
        return f"Dense: {mask.total} {kind}weights"
    dead = [name for name, ratio in mask.layerwise_ratios().items() if ratio == 1.0]
    empty = f"; nothing is left of {', '.join(dead)}" if dead else ""
    return f"Sparsity {1 - mask.density:.4f}: {mask.kept} of {mask.total} {kind}weights are left{empty}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' if threads > 1 else ''})"


def _batches(batch_size: int, world_size: int) -> str:
    return f"batches of {batch_size}" + (f" on each of {world_size} ranks" if world_size > 1 else "")


@contextmanager
def _process_group(device: torch.device, ranks: Ranks) -> Iterator[None]:
    """The process group, where torchrun started several."""
    if ranks.world_size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _input_errors() -> Iterator[None]:
    """What the Trainer refuses is the user's to mend: labels outside the classes, no batch."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _failed(why: str, ranks: Ranks | None = None) -> bool:
    if ranks is None or ranks.rank == 0:
        print(f"train.py: {why}", file=sys.stderr)
    return False
