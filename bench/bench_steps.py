"""Benchmark of a training step, masked and dense, and of the throughput of loaders, on one core.

    FASTPRUNE_TINY_IMAGENET=path/to/tiny-imagenet-200 make bench ARGS="bench/bench_steps.py [--device cuda]"

Prints medians of wall time and of processor time, with ratios. pytest-benchmark's own table has fastprune's row only.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets, transforms

from bench.training import DENSE, MASKED, SPARSITY, Size, Turns, Way, group_name, medians, ways
from fastprune.loaders import find_or_prepare, open_data

TURNS = 7
REAL = "FASTPRUNE_TINY_IMAGENET"
# Of Tiny ImageNet: 40 classes, 20,000 images. torchvision reads 2,500 of them: it is some 30 times slower.
CLASSES, TAKEN = 40, 2500


@pytest.mark.parametrize(
    ("network", "precision"),
    [
        pytest.param("resnet18", "fp32", id="fp32"),
        pytest.param("resnet18", "bf16", id="bf16"),
        pytest.param("resnet50", "bf16", id="resnet50-bf16"),
    ],
)
def test_step(network: str, precision: str, device: torch.device, benchmark: Any, capsys: Any) -> None:
    """Networks of full width. Target: masked over dense at most 1.05."""
    if network == "resnet50" and device.type == "cpu":
        pytest.skip("takes minutes on a CPU")
    size = Size.of(device, small=False)
    compared = ways(network, precision, device, size)
    turns: Turns = {name: [] for name in compared}

    # The ways take turns within one run, so that load on the machine hits all alike: ratios hold where times do not.
    # pytest-benchmark times one function, so the others run in its set-up.
    def others() -> None:
        for name, way in compared.items():
            if name != MASKED:
                turns[name].append(way.timed())
        compared[MASKED].before()  # sets the mask, here outside the measured time

    def masked() -> None:
        turns[MASKED].append(Way(compared[MASKED].call).timed())

    benchmark.group = group_name(network, precision, size)
    benchmark.pedantic(masked, setup=others, rounds=TURNS, warmup_rounds=1)
    images = {name: each[0][2] for name, each in turns.items()}
    # The warm-up turn compiles. Medians, because a turn that another process interrupts is an outlier.
    found = medians({name: each[-TURNS:] for name, each in turns.items()})
    wall, cpu = (found[MASKED][i] / found[DENSE][i] for i in (0, 1))
    benchmark.extra_info.update(what=MASKED, images=images, medians=found, masked_over_dense=[wall, cpu])
    with capsys.disabled():
        print(f"\n{benchmark.group}, {SPARSITY:.0%} pruned: masked over dense {wall:.3f} (processor time {cpu:.3f})")
        show(found, DENSE, images)


def show(found: dict[str, tuple[float, float]], base: str, images: dict[str, int]) -> None:
    """Prints a table. images: by name, in one turn. Ratios are to `base`, per image."""
    # Per image, since a turn of torchvision reads fewer of them. Processor time excludes waits for a busy core.
    print(f"  {'':<44}{'wall':>10}{'x':>7}{'processor':>12}{'x':>7}{'images/s':>12}{'a core':>10}")
    for name, (wall, cpu) in found.items():
        ratios = [t / found[base][i] * images[base] / images[name] for i, t in enumerate((wall, cpu))]
        print(
            f"  {name:<44}{1e3 * wall:7.1f} ms{ratios[0]:7.2f}{1e3 * cpu:9.1f} ms{ratios[1]:7.2f}"
            f"{images[name] / wall:12,.0f}{images[name] / cpu:10,.0f}"
        )


@contextmanager
def one_core() -> Iterator[None]:
    """Pins this thread, and the threads that it starts, to one core; no effect where the system cannot (macOS)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    # FFCV reads and decodes in threads of its own: without the pin it would have more cores than torchvision.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def real(tmp_path_factory: Any) -> Path:
    """A folder laid out as Tiny ImageNet with its first CLASSES classes."""
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
    """Reads all batches; the number of images."""
    return sum(len(labels) for _, labels in batches)


def test_loaders(real: Path, tmp_path: Path, device: torch.device, benchmark: Any, capsys: Any) -> None:
    """Random crops and flips of real images, 64x64. Target: FFCV at 20 times the rate of torchvision's ImageFolder."""
    if device.type != "cpu":
        pytest.skip("loaders work on a CPU")
    pytest.importorskip("ffcv")
    folder, theirs = (
        "torchvision's ImageFolder",
        transforms.Compose(
            [
                transforms.RandomResizedCrop(64),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4802, 0.4481, 0.3975), (0.2764, 0.2689, 0.2816)),
            ]
        ),
    )
    usual = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(real / "train"), theirs), 500, shuffle=True, drop_last=True, num_workers=0
    )  # in this process: on one core worker processes only add copies
    manifest, prepared = find_or_prepare(real, tmp_path, show=False)
    ours = {
        name: open_data(manifest, prepared, loader=name).train(seed=0, batch_size=500) for name in ("ffcv", "resident")
    }
    images = {name: batches.images for name, batches in ours.items()} | {folder: TAKEN}
    times: Turns = {name: [] for name in images}
    epochs = iter(range(1000))

    def once(name: str) -> None:
        ours[name].set_epoch(next(epochs))
        times[name].append(Way(lambda: consume(ours[name])).timed())

    def others() -> None:
        once("resident")
        times[folder].append(Way(lambda: consume(islice(usual, TAKEN // 500))).timed())

    benchmark.group = f"loader, {len(usual.dataset):,} real images, 64 px, one core"  # type: ignore[arg-type]
    for name in ours:
        once(name)  # numba compiles the crop and FFCV its pipeline: seconds, once a process
    for turns in times.values():
        turns.clear()
    with one_core():
        benchmark.pedantic(once, args=("ffcv",), setup=others, rounds=5)
    found = medians(times)
    rate = {name: [images[name] / t for t in found[name]] for name in found}
    ratios = [rate["ffcv"][i] / rate[folder][i] for i in (0, 1)]
    benchmark.extra_info.update(what="ffcv", images=images["ffcv"], images_per_second=rate, ratio=ratios)
    with capsys.disabled():
        print(f"\n{benchmark.group}: FFCV over ImageFolder {ratios[0]:.1f} (processor time {ratios[1]:.1f})")
        show(found, "ffcv", images)
