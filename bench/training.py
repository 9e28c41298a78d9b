"""The timed training steps, shared by all suites: the Trainer, masked and dense, and plain PyTorch.

A way is one implementation of the step; the ways take turns. On a CPU a turn is one step on one batch. On a GPU it is
an epoch of a data set on the device, from the drawing of its crops until its loss is on the host.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.plain import LOW, DeviceBatches, Plain, Wrapped
from fastprune.loaders import DataSource, SyntheticData
from fastprune.loaders.choice import LoaderChoice
from fastprune.loaders.readers.memory import MemoryReader
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import GpuOptions, Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import build, initial_model
from fastprune.training.trainer import Trainer

# Round 7 at 20 % a round. The value hardly matters: unstructured sparsity leaves the work of a step as it is.
SPARSITY, CLASSES = 0.8, 200
MASKED, DENSE = "Trainer, masked", "Trainer, dense"
PLAIN, PRODUCT = "plain PyTorch, dense", "plain PyTorch, mask * weight"
COMPILED = "plain PyTorch, mask * weight, torch.compile"
PLAIN_STEPS = 40  # an epoch of the plain loops on a GPU: they are slower, and time on the machine is scarce
SCHEDULE = ScheduleSpec(0.01, 1 << 20)  # a constant rate, and more epochs than any benchmark takes

NONE, ALL = "none", "all"
OPTIONS: dict[str, GpuOptions] = {
    NONE: GpuOptions(),
    ALL: GpuOptions(**{f.name: True for f in fields(GpuOptions)}),
    **{f.name: GpuOptions(**{f.name: True}) for f in fields(GpuOptions)},
}
"""By name: none of a step's options for a GPU, all, each alone."""


@dataclass(frozen=True)
class Size:
    """side: pixels. images: in the data set; equal to `batch`: one fixed batch. width: of the network."""

    batch: int
    side: int
    images: int
    width: int = 64

    @classmethod
    def of(cls, device: torch.device, small: bool) -> "Size":
        """The size for a device. small: for a quick check on any machine."""
        # On a CPU a step takes 0.3 s, beside which loading is nothing: one fixed batch. On a GPU crops and launches
        # count: an epoch of a data set as large as Tiny ImageNet.
        if small:
            return cls(16, 32, 16 if device.type == "cpu" else 200, 8)
        return cls(32, 64, 32) if device.type == "cpu" else cls(512, 64, 100_000)


@dataclass(frozen=True)
class Way:
    """call: trains for a turn, waits for the device, returns the number of images. before: runs untimed before it."""

    call: Callable[[], int]
    before: Callable[[], None] = field(default=lambda: None)

    def timed(self) -> tuple[float, float, int]:
        """(wall seconds, processor seconds, images) of a turn."""
        self.before()
        wall, cpu = time.perf_counter(), time.process_time()
        images = self.call()
        return time.perf_counter() - wall, time.process_time() - cpu, images


class Around(Wrapped):
    """Batches that are read and trained on inside a new context of `enter` for each epoch."""

    def __init__(self, batches: Any, enter: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__(batches)
        self.enter = enter

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator stays in the context while its consumer works on what it yielded.
        with self.enter():
            yield from self.batches


def resident(device: torch.device, number: int, side: int, classes: int = CLASSES) -> DataSource:
    """Random images on the device, the same at each call: `number`, rounded down to a multiple of `classes`."""
    manifest = SyntheticData(classes, number // classes, 1, side).manifest()
    g = torch.Generator(device).manual_seed(0)
    shape = (manifest.train_count, side, side, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=g)
    labels = np.arange(classes)
    given = {"train": np.repeat(labels, number // classes), "val": labels}
    choice = LoaderChoice("resident", "asked for")
    return DataSource(manifest, choice, MemoryReader(manifest, {"train": images, "val": images[:classes]}, given))


def trainer_of(init: Init, device: torch.device, precision: str, options: str = NONE) -> Trainer:
    """With OPTIONS: a Trainer that chose them itself would time them first, on a copy."""
    return Trainer(initial_model(init), device=device, precision=precision, gpu_options=OPTIONS[options])


def masks(trainer: Trainer) -> tuple[Mask, Mask]:
    """(dense, pruned at random) masks on the Trainer's device."""
    # At random: the time of a step does not depend on which weights are pruned, and no training is needed first.
    dense = Mask.dense(trainer.flat.segments)
    pruned = prune(random_scores(dense, 0, 1), dense, SPARSITY)
    device = trainer.flat.mask.device
    return Mask(dense.keep.to(device), dense.segments), Mask(pruned.keep.to(device), pruned.segments)


def data(device: torch.device, precision: str, size: Size) -> tuple[Any, Any]:
    """(batches for the Trainer, batches for plain PyTorch): one batch for both, or one data set, augmented by each."""
    if size.images == size.batch:
        images = torch.randn(size.batch, 3, size.side, size.side).contiguous(memory_format=torch.channels_last)
        return (batch := [(images, torch.arange(size.batch) % CLASSES)]), batch
    source = resident(device, size.images, size.side)
    reader = source._reader
    planes, labels = reader._images["train"].permute(0, 3, 1, 2), torch.from_numpy(reader.labels["train"]).to(device)
    norm = (source.manifest.mean, source.manifest.std)
    ours = source.train(seed=0, batch_size=size.batch, dtype=LOW[precision] or torch.float32)
    return ours, DeviceBatches(planes, labels, size.batch, norm, PLAIN_STEPS)


def epoch_of(trainer: Trainer, batches: Any, size: Size) -> Callable[[], int]:
    """A function that trains for an epoch and returns the number of images."""
    trainer.fit([], [], OptimizerSpec(size.batch), SCHEDULE, stop=0)  # no epoch: sets up the optimiser
    epochs = itertools.count()

    def epoch() -> int:
        number = next(epochs)
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(number)
        # Not fit: that would evaluate after each epoch, and compile for it.
        with trainer._deciding("auto"):
            return trainer._epoch(batches, SCHEDULE, number, None, None, None)[1]

    return epoch


def trainer_ways(trainer: Trainer, batches: Any, size: Size) -> dict[str, Way]:
    """The ways MASKED and DENSE."""
    # One Trainer for both. Dense is a mask of ones: the ratio then shows what sparsity costs, not what masks cost; the
    # latter is the ratio to plain PyTorch.
    epoch = epoch_of(trainer, batches, size)
    dense, pruned = masks(trainer)
    return {
        MASKED: Way(epoch, lambda: trainer.set_mask(pruned)),
        DENSE: Way(epoch, lambda: trainer.set_mask(dense)),
    }


def plain_way(loop: Plain, batches: Any, mask: Mask) -> Way:
    """A way that trains `loop` for an epoch; if it is masked, with `mask`."""
    for conv, keep in zip(loop.convs, mask.tensors().values(), strict=bool(loop.convs)):
        conv.mask.copy_(keep)
    return Way(lambda: loop.train(batches)[2])


def ways(network: str, precision: str, device: torch.device, size: Size) -> dict[str, Way]:
    """The ways by name, the Trainer's first. fp16: the Trainer's only."""
    init = Init(ModelSpec(network, CLASSES, width=size.width), 0)
    how: dict[str, Any] = {"device": device, "precision": precision}
    batches, theirs = data(device, precision, size)
    trainer = trainer_of(init, device, precision)
    found = trainer_ways(trainer, batches, size)
    if precision != "fp16":
        pruned = masks(trainer)[1]
        for name in (PLAIN, PRODUCT):
            loop = Plain(initial_model(init), masked=name != PLAIN, **how)
            found[name] = plain_way(loop, theirs, pruned)
    return found


def compiled_ways(network: str, precision: str, device: torch.device, size: Size) -> dict[str, Way]:
    """MASKED and COMPILED."""
    # Apart from the others, because its compilation takes as long as all of them. On a GPU only: on a CPU the convs,
    # most of a step, are oneDNN's either way.
    init = Init(ModelSpec(network, CLASSES, width=size.width), 0)
    how: dict[str, Any] = {"device": device, "precision": precision}
    batches, theirs = data(device, precision, size)
    trainer = trainer_of(init, device, precision)
    found = {MASKED: trainer_ways(trainer, batches, size)[MASKED]}
    loop = Plain(initial_model(init), masked=True, compile=device.type == "cuda", **how)
    return found | {COMPILED: plain_way(loop, theirs, masks(trainer)[1])}


def option_ways(network: str, precision: str, device: torch.device, size: Size) -> dict[str, Way]:
    """The Trainer, masked, with each of OPTIONS."""
    found, init = {}, Init(ModelSpec(network, CLASSES, width=size.width), 0)
    for name in OPTIONS:
        batches, _ = data(device, precision, size)
        trainer = trainer_of(init, device, precision, name)
        trainer.set_mask(masks(trainer)[1])
        found[name] = Way(epoch_of(trainer, batches, size))
    return found


def group_name(network: str, precision: str, size: Size) -> str:
    return f"step of {network.replace('resnet', 'ResNet-')}, {size.batch} x {size.side} px, {precision}"


Turns = dict[str, list[tuple[float, float, int]]]


def medians(turns: Turns) -> dict[str, tuple[float, float]]:
    """By way the medians of (wall seconds, processor seconds) of a turn."""
    return {name: tuple(statistics.median(t[i] for t in each) for i in (0, 1)) for name, each in turns.items()}  # type: ignore[misc]


def time_turns(
    compared: dict[str, Way],
    turns: int,
    begin: Callable[[str], None] = lambda name: None,
    broken: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(a row for each way, an error line for each that failed). `turns` are timed, after two untimed ones.

    Times are also given over those of the first way. begin: is called before a way's turn. broken: whether the device
    can no longer be used; ends it.
    """
    # Compilation, graph capture and cuDNN's choice of algorithms happen in the first two turns.
    found: Turns = {}
    errors: dict[str, str] = {}

    def turn(name: str) -> tuple[float, float, int] | None:
        begin(name)
        try:
            return compared[name].timed()
        except Exception as error:  # recorded: the other ways can still be timed
            errors[name] = one_line(error)
            found.pop(name, None)
            return None

    for name in compared:
        if turn(name) is not None and turn(name) is not None:
            found[name] = []
        elif broken():
            return {}, errors
    # In turns, so that clock rates and load on the machine affect all ways alike.
    for _ in range(turns):
        for name in list(found):
            if (timed := turn(name)) is not None:
                found[name].append(timed)
            elif broken():
                return {}, errors
    rows = {}
    for name, each in found.items():
        seconds, images = medians(found)[name][0], each[0][2]
        rates = [count / wall for wall, _, count in each]
        rows[name] = {
            "ours": name == next(iter(compared)),
            "ms": 1e3 * seconds,
            "images": images,
            "images_per_s": images / seconds,
            "spread": (max(rates) - min(rates)) / statistics.median(rates),
        }
    ours = next((row for row in rows.values() if row["ours"]), None)
    if ours is not None:
        # Of rates, not of times: an epoch of the plain loops has fewer images.
        for row in rows.values():
            row["over_ours"] = ours["images_per_s"] / row["images_per_s"]
    return rows, errors


def one_line(error: BaseException) -> str:
    """The type of an error and its first line that is not blank, at most 200 characters."""
    first = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


@cache
def least_work(network: str, size: Size) -> tuple[float, float]:
    """(operations, bytes) of an image's share of a step in bf16, of which no implementation needs fewer.

    Operations of the convs and the last layer, forward and backward. Bytes of their maps, each read or written once
    where it is used, as if all else were computed on the way, and of the optimiser's pass.
    """
    moved = 0.0
    with torch.device("meta"):
        model = build(ModelSpec(network, CLASSES, width=size.width))
        images = torch.empty(size.batch, 3, size.side, size.side)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal moved
        # Forward reads the input and writes the output. Backward reads the output's gradient and the input, and writes
        # the input's gradient, but for images.
        moved += 2 * (2 * output.numel() + (2 if inputs[0] is images else 3) * inputs[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    # Weight, momentum and gradient read; weight, momentum and copy written; a mask.
    moved += 23 * sum(p.numel() for p in model.parameters())
    return counter.get_total_flops() / size.batch, moved / size.batch


def extra_memory(network: str, size: Size, device: torch.device) -> float:
    """Peak memory of a masked Trainer less that of a dense plain loop with the fused optimiser, in bytes a conv weight.

    CUDA only. Both in bf16, from construction to the end of an epoch of six batches.
    """
    init = Init(ModelSpec(network, CLASSES, width=size.width), 0)
    # The same batches, made beforehand: data and crops must not count on either side.
    batches = list(islice(data(device, "bf16", size)[0], 6))
    how: dict[str, Any] = {"device": device, "precision": "bf16"}

    def ours() -> Any:
        trainer = trainer_of(init, device, "bf16")
        trainer.set_mask(masks(trainer)[1])
        epoch_of(trainer, batches, size)()
        return trainer

    def theirs() -> Any:
        loop = Plain(initial_model(init), masked=False, **how)
        loop.train(batches)
        return loop

    def peak(run: Callable[[], Any]) -> int:
        gc.collect()  # a network of the run before may be held by a cycle
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before

    weights = sum(p.numel() for p in initial_model(init).parameters() if p.dim() == 4)
    return (peak(ours) - peak(theirs)) / weights


def profiled(network: str, size: Size, device: torch.device, options: str, most: int = 25) -> dict[str, dict[str, Any]]:
    """The `most` kernels that take the most time of a masked step in bf16, operations on a CPU, and all together: ms,
    share of the time and launches a step."""
    trainer = trainer_of(Init(ModelSpec(network, CLASSES, width=size.width), 0), device, "bf16", options)
    trainer.set_mask(masks(trainer)[1])
    batches: Sequence[Any] = list(islice(data(device, "bf16", size)[0], 5))
    on_gpu, profiles = device.type == "cuda", []

    def enter() -> Any:
        profiles.append(profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]))
        return profiles[-1]

    epoch_of(trainer, batches, size)()  # compiles and captures
    epoch_of(trainer, Around(batches, enter), size)()
    events = [e for e in profiles[0].key_averages() if not on_gpu or e.device_type == DeviceType.CUDA]
    spent = {e: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3 / len(batches) for e in events}
    total, launches = sum(spent.values()), sum(e.count for e in events) / len(batches)
    found = {"all of a step": {"ours": False, "ms": total, "share": 1.0, "launches": launches}}
    for e in sorted(spent, key=lambda e: -spent[e])[:most]:
        share = spent[e] / total if total else 0.0  # none where the profiler saw no kernel
        found[e.key[:90]] = {"ours": False, "ms": spent[e], "share": share, "launches": e.count / len(batches)}
    return found
