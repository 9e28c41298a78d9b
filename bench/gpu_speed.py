"""How fast training is, end to end from a data set that lies on the device, beside plain PyTorch; and its memory."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.plain import DeviceBatches, Plain
from fastprune.loaders import DataSource, SyntheticData
from fastprune.loaders.memory_reader import MemoryReader
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import build
from fastprune.training.trainer import Trainer

if TYPE_CHECKING:
    from bench.gpu_suite import Suite

RATES = {"resnet18": 150_000, "resnet50": 50_000}
MASKED_OVER_DENSE, BYTES_A_WEIGHT = 1.02, 7
SPARSITY, CLASSES = 0.8, 200
PLAIN_STEPS = 40  # in an epoch of what is slower
PROFILED = 5
SCHEDULE = ScheduleSpec(0.01, 1 << 20)

Epoch = Callable[[], tuple[float, int]]
"""Trains an epoch; (seconds, images)."""


class Around:
    """Batches that are read, and trained on, inside the context that `enter` makes."""

    def __init__(self, batches: Any, enter: Callable[[], AbstractContextManager[Any]]) -> None:
        self.batches, self.enter = batches, enter

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with self.enter():
            yield from self.batches


def resident(s: Suite, number: int, side: int, classes: int = CLASSES) -> DataSource:
    """A data set of random pixels on the device, `number` images in `classes` classes, behind the resident loader; the
    same each time."""
    manifest = SyntheticData(classes, number // classes, 1, side).manifest()
    g = torch.Generator(s.device).manual_seed(0)
    shape = (manifest.train_count, side, side, 3)
    images = torch.randint(256, shape, dtype=torch.uint8, device=s.device, generator=g)
    labels = np.arange(classes)
    given = {"train": np.repeat(labels, number // classes), "val": labels}
    return DataSource(manifest, "resident", MemoryReader(manifest, {"train": images, "val": images[:classes]}, given))


def masks(trainer: Trainer) -> tuple[Mask, Mask]:
    """(dense, pruned at random), on the device."""
    dense = Mask.dense(trainer.flat.segments)
    pruned = prune(random_scores(dense, 0, 1), dense, SPARSITY)
    device = trainer.flat.mask.device
    return Mask(dense.keep.to(device), dense.segments), Mask(pruned.keep.to(device), pruned.segments)


def ours(s: Suite, trainer: Trainer, batches: Any, mask: Mask | None) -> Epoch:
    """Seconds of training alone, from drawing the epoch's crops to its loss on the host."""
    val, epochs = [next(iter(batches))], itertools.count()

    def epoch() -> tuple[float, int]:
        trainer.set_mask(mask)
        number = next(epochs)
        sgd = OptimizerSpec(batches.batch_size)
        (m,) = trainer.fit(batches, val, sgd, SCHEDULE, start=number, stop=number + 1)
        return batches.images / m.images_per_second, batches.images

    return epoch


def theirs(loop: Plain, batches: DeviceBatches) -> Epoch:
    def epoch() -> tuple[float, int]:
        began = time.perf_counter()
        images = loop.train(batches)[2]  # waits for the device
        return time.perf_counter() - began, images

    return epoch


def by_turns(s: Suite, ways: dict[str, Epoch], base: str) -> None:
    """Adds a row for each way: medians of epochs that take turns, so that clocks and neighbours treat all alike."""
    from bench.gpu_suite import line, one_line

    found: dict[str, list[tuple[float, int]]] = {}
    for name, epoch in ways.items():
        try:
            for _ in range(1 if s.small else 2):  # compiles, captures, chooses algorithms
                epoch()
            found[name] = []
        except Exception as error:  # a row that fails must not cost the others
            s.errors[name] = one_line(error)
            print(f"  {name:<58} not timed: {s.errors[name]}", flush=True)
    for _ in range(2 if s.small else 7):
        for name in found:
            found[name].append(ways[name]())
    for name, epochs in found.items():
        rates = [images / seconds for seconds, images in epochs]
        seconds, images = statistics.median(t for t, _ in epochs), epochs[0][1]
        row = {"how": "epochs by turns", "ms": 1e3 * seconds, "images": images, "images_per_s": images / seconds}
        s.timings[name] = row | {"spread": (max(rates) - min(rates)) / statistics.median(rates)}
        if base in s.timings:
            s.timings[name]["over_ours"] = s.timings[base]["images_per_s"] / s.timings[name]["images_per_s"]
        print(line(name, s.timings[name]), flush=True)
    s.save()


def peak(s: Suite, make: Callable[[], Trainer | Plain], batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Most bytes at once, of tensors ("allocated") and asked of the driver ("reserved"), of a loop made and run."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    loop = make()
    if isinstance(loop, Plain):
        loop.train(batches)
    else:
        loop.fit(batches, batches[:1], OptimizerSpec(len(batches[0][1])), SCHEDULE, stop=1)
    after = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {name: b - a for name, a, b in zip(("allocated", "reserved"), before, after, strict=True)}


def compare_memory(s: Suite, name: str, spec: ModelSpec, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Judges the peak of a masked Trainer against a dense plain loop with the fused optimiser."""

    def masked() -> Trainer:
        trainer = Trainer(build(spec), device=s.device, precision="bf16")
        trainer.set_mask(masks(trainer)[1])
        return trainer

    what = f"{name}: memory of a masked run at most a dense fused-SGD run's and {BYTES_A_WEIGHT} bytes a weight"
    if not s.cuda:
        masked()
        judge(s, what, None, BYTES_A_WEIGHT)
        return
    weights = sum(p.numel() for p in build(spec).parameters() if p.dim() == 4)
    plain = peak(s, lambda: Plain(build(spec), device=s.device, precision="bf16", masked=False), batches)
    mine = peak(s, masked, batches)
    for who, bytes in ((f"{name} masked", mine), (f"{name} plain PyTorch dense", plain)):
        row = {f"{kind}_gb": size / 1e9 for kind, size in bytes.items()}
        s.timings.setdefault(who, {}).update(row)
        print(f"  {who:<58} " + ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in bytes.items()))
    judge(s, what, (mine["allocated"] - plain["allocated"]) / weights, BYTES_A_WEIGHT)


def time_steps(s: Suite, profiled: bool = False) -> None:
    """Trainings from resident images with augmentation: bf16 dense and masked, fp16, and plain PyTorch's."""
    number, side, batch = (200, 32, 16) if s.small else (100_000, 64, 512)
    source = resident(s, number, side)
    norm = (source.manifest.mean, source.manifest.std)
    planes = source._reader._images["train"].permute(0, 3, 1, 2)
    labels = torch.from_numpy(source._reader.labels["train"]).to(s.device)
    slow = DeviceBatches(planes, labels, batch, norm, 2 if s.small else PLAIN_STEPS)
    print(f"  {number:,} images of {side} px on the device, batch {batch}, {SPARSITY:.0%} pruned where masked")
    for name, rate in RATES.items():
        torch.compiler.reset()
        spec = ModelSpec(name, CLASSES, width=8 if s.small else 64)
        trainer = Trainer(build(spec), device=s.device, precision="bf16")
        dense, pruned = masks(trainer)
        train = source.train(seed=0, batch_size=batch, dtype=torch.bfloat16)
        half = Trainer(build(spec), device=s.device, precision="fp16")
        halves = source.train(seed=0, batch_size=batch, dtype=torch.float16)
        loops = {}
        for words, compile in (("", False), (" and torch.compile", True if s.cuda else "aot_eager")):
            loops[words] = Plain(build(spec), device=s.device, precision="bf16", compile=compile)
            for conv, keep in zip(loops[words].convs, pruned.tensors().values(), strict=True):
                conv.mask.copy_(keep)
        by_turns(
            s,
            {
                f"{name} masked": ours(s, trainer, train, pruned),
                f"{name} dense": ours(s, trainer, train, dense),
                f"{name} masked, fp16": ours(s, half, halves, masks(half)[1]),
                **{f"{name} plain PyTorch, mask * weight{w}": theirs(loop, slow) for w, loop in loops.items()},
            },
            f"{name} masked",
        )
        if profiled:
            print_kernels(s, trainer, list(islice(train, PROFILED)))
        masked, unmasked = (s.timings.get(f"{name} {kind}", {}).get("images_per_s") for kind in ("masked", "dense"))
        judge(s, f"{name}: at least {rate:,} images/s, masked", masked, -rate)
        over = unmasked / masked if masked and unmasked else None
        judge(s, f"{name}: masked over dense at most {MASKED_OVER_DENSE}", over, MASKED_OVER_DENSE)
        few = list(islice(train, 1 if s.small else 6))
        del trainer, half, loops  # their memory is not to count
        compare_memory(s, name, spec, few)
        s.save()


def judge(s: Suite, what: str, measured: float | None, limit: float) -> None:
    """Records and prints whether the target is met: at most `limit`, or at least -limit if that is negative."""
    met = measured is not None and (measured >= -limit if limit < 0 else measured <= limit)
    verdict = "not judged on a CPU" if not s.cuda else "not measured" if measured is None else "met" * met or "missed"
    s.targets[what] = {"measured": measured, "verdict": verdict}
    print(f"  {what}: {verdict}" + (f", {measured:,.3f}" if s.cuda and measured is not None else ""), flush=True)


def print_kernels(s: Suite, trainer: Trainer, batches: list[tuple[Tensor, Tensor]], most: int = 15) -> None:
    """What the device spends a training step on."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * s.cuda]
    profiles: list[Any] = []

    def enter() -> Any:
        profiles.append(profile(activities=activities))
        return profiles[-1]

    trainer.fit(Around(batches, enter), batches[:1], OptimizerSpec(len(batches[0][1])), SCHEDULE, stop=1)
    events = [e for e in profiles[0].key_averages() if not s.cuda or e.device_type == DeviceType.CUDA]
    spent = {e: (e.self_device_time_total if s.cuda else e.self_cpu_time_total) / 1e3 / len(batches) for e in events}
    total = sum(spent.values()) or math.nan
    print(f"  {total:.3f} ms a step in {'kernels' if s.cuda else 'operations'}:")
    for e in sorted(spent, key=lambda e: -spent[e])[:most]:
        print(f"    {spent[e]:8.3f} ms {spent[e] / total:6.1%} {e.count / len(batches):6.1f} x  {e.key[:90]}")
