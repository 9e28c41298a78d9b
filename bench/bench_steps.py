"""A training step, masked and dense, and images a second from loaders, on one core.

    FASTPRUNE_TINY_IMAGENET=path/to/tiny-imagenet-200 make bench ARGS=bench/bench_steps.py

Those that are compared take turns, so that a busy neighbour hits all of them, and each is given with its wall time and
the time that its threads had a core, which a neighbour changes less. pytest-benchmark's own table shows ours only.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets, transforms

from bench.plain import Plain
from fastprune.loaders import locate, open_data
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

BATCH, SIZE, SPARSITY, TURNS = 32, 64, 0.8, 7
INIT = Init(ModelSpec("resnet18", 200), 0)
MASKED, DENSE = "Trainer, masked", "Trainer, dense"
PLAIN, PRODUCT = "plain PyTorch, dense", "plain PyTorch, mask * weight"
REAL = "FASTPRUNE_TINY_IMAGENET"
CLASSES, TAKEN = 40, 2500
"""Of Tiny ImageNet: 20,000 images through our loaders, and as many as that through torchvision, which is slow."""

Times = dict[str, list[tuple[float, float]]]
"""Wall and processor seconds of each turn."""


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def medians(times: Times) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds."""
    return {name: tuple(map(statistics.median, zip(*turns, strict=True))) for name, turns in times.items()}


def steps(precision: str) -> Mapping[str, Callable[[], Any]]:
    """What is compared: each call is one training step on the same batch."""
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    batch = (images, torch.arange(BATCH))
    trainers = {name: Trainer(initial_model(INIT), precision=precision) for name in (MASKED, DENSE)}
    everything = Mask.dense(trainers[DENSE].flat.segments)
    mask = prune(random_scores(everything, 0, 1), everything, SPARSITY)
    trainers[MASKED].set_mask(mask)
    loops = {name: Plain(initial_model(INIT), precision=precision, masked=name == PRODUCT) for name in (PLAIN, PRODUCT)}
    for conv, keep in zip(loops[PRODUCT].convs, mask.tensors().values(), strict=True):
        conv.mask.copy_(keep)
    schedule, sgd = ScheduleSpec(0.01, 1), OptimizerSpec(BATCH)
    for trainer in trainers.values():
        trainer.fit([batch], [batch], sgd, schedule)  # sets the optimiser, and compiles
    ours = {name: partial(t._epoch, [batch], schedule, 0, None) for name, t in trainers.items()}
    return ours | {name: partial(loop.train, [batch]) for name, loop in loops.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step(precision: str, benchmark: Any, capsys: Any) -> None:
    """ResNet-18 of full width. The target: masked over dense at most 1.05."""
    ways = steps(precision)
    times: Times = {name: [] for name in ways}

    def others() -> None:
        for name in (DENSE, PLAIN, PRODUCT):
            times[name].append(timed(ways[name]))

    def masked() -> None:
        times[MASKED].append(timed(ways[MASKED]))

    benchmark.group = f"step of ResNet-18, {BATCH} x {SIZE} px, {precision}"
    benchmark.pedantic(masked, setup=others, rounds=TURNS, warmup_rounds=1)
    found = medians({name: turns[-TURNS:] for name, turns in times.items()})  # without the warm-up
    wall, cpu = (found[MASKED][i] / found[DENSE][i] for i in (0, 1))
    benchmark.extra_info.update(what=MASKED, ours=True, images=BATCH, medians=found, masked_over_dense=[wall, cpu])
    with capsys.disabled():
        print(f"\n{benchmark.group}, {SPARSITY:.0%} pruned: masked over dense {wall:.3f} (processor time {cpu:.3f})")
        show(found, DENSE, BATCH)


def show(found: dict[str, tuple[float, float]], base: str, images: int | dict[str, int]) -> None:
    """images: of one turn, by name if they differ; times are then for each image."""
    count = {name: images[name] if isinstance(images, dict) else images for name in found}
    print(f"  {'':<40}{'wall':>10}{'x':>7}{'processor':>12}{'x':>7}{'images/s':>12}{'a core':>10}")
    for name, (wall, cpu) in found.items():
        ratios = [t / found[base][i] * count[base] / count[name] for i, t in enumerate((wall, cpu))]
        print(
            f"  {name:<40}{1e3 * wall:7.1f} ms{ratios[0]:7.2f}{1e3 * cpu:9.1f} ms{ratios[1]:7.2f}"
            f"{count[name] / wall:12,.0f}{count[name] / cpu:10,.0f}"
        )


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and those that it starts, on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def real(tmp_path_factory: Any) -> Path:
    """The first classes of Tiny ImageNet as a data set of its own."""
    given = Path(os.environ.get(REAL, ""))
    if REAL not in os.environ or not (given / "train").is_dir():
        pytest.skip(f"{REAL} names no unpacked Tiny ImageNet")
    few = tmp_path_factory.mktemp("few") / given.name
    wnids = sorted(path.name for path in (given / "train").iterdir())[:CLASSES]
    for wnid in wnids:
        shutil.copytree(given / "train" / wnid, few / "train" / wnid)
    (few / "val" / "images").mkdir(parents=True)
    lines = (given / "val" / "val_annotations.txt").read_text().splitlines(keepends=True)
    lines = [line for line in lines if line.split("\t")[1] in wnids]
    (few / "val" / "val_annotations.txt").write_text("".join(lines))
    for line in lines:
        name = line.split("\t")[0]
        shutil.copy(given / "val" / "images" / name, few / "val" / "images" / name)
    return few


def consume(batches: Iterable[Any]) -> int:
    """Images in them."""
    return sum(len(labels) for _, labels in batches)


def test_loaders(real: Path, tmp_path: Path, benchmark: Any, capsys: Any) -> None:
    """Random crops and flips of real images at 64x64. The target: FFCV 20 times torchvision's ImageFolder."""
    pytest.importorskip("ffcv")
    folder, theirs = (
        "torchvision's ImageFolder",
        transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)),
            ]
        ),
    )
    usual = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(real / "train"), theirs), 500, shuffle=True, drop_last=True, num_workers=0
    )
    manifest, prepared = locate(real, tmp_path, show=False)
    ours = {
        name: open_data(manifest, prepared, loader=name).train(seed=0, batch_size=500) for name in ("ffcv", "resident")
    }
    images = {name: batches.images for name, batches in ours.items()} | {folder: TAKEN}
    times: Times = {name: [] for name in images}
    epochs = iter(range(1000))

    def once(name: str) -> None:
        ours[name].set_epoch(next(epochs))
        times[name].append(timed(lambda: consume(ours[name])))

    def others() -> None:
        once("resident")
        times[folder].append(timed(lambda: consume(islice(usual, TAKEN // 500))))

    benchmark.group = f"loader, {len(usual.dataset):,} real images, {SIZE} px, one core"  # type: ignore[arg-type]
    for name in ours:
        once(name)  # compiles
    for turns in times.values():
        turns.clear()
    with one_core():
        benchmark.pedantic(once, args=("ffcv",), setup=others, rounds=5)
    found = medians(times)
    rate = {name: [images[name] / t for t in found[name]] for name in found}
    ratios = [rate["ffcv"][i] / rate[folder][i] for i in (0, 1)]
    benchmark.extra_info.update(what="ffcv", ours=True, images=images["ffcv"], images_per_second=rate, ratio=ratios)
    with capsys.disabled():
        print(f"\n{benchmark.group}: FFCV over ImageFolder {ratios[0]:.1f} (processor time {ratios[1]:.1f})")
        show(found, "ffcv", images)
