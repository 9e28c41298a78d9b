"""Does a warm worker grow? Many nodes through one Worker, and after each of them what the process holds.

    python bench/memory.py --data path/to/tiny-imagenet-200 [--nodes 200] [--loaders ffcv torchvision] [--structured]

For each loader a fresh process runs the nodes of a figure with small settings one after another: dense runs and masked
ones from initial and from late weights (with momentum), under several seeds and rates, prune steps by magnitude and at
random. With --structured: whole filters are chosen and every second node trains a network of another size, in a Trainer
of its own. On a CPU, one thread. Exit code 1 where the memory of a worker grew by more than 5 %.

Growth is the median of the last LAST nodes' resident memory over that of the LAST nodes after the first WARM, less one.
The first nodes import, compile, open the data and touch its pages, which a worker does once. Medians, because by how
much memory the allocator is ahead after a node depends on the node (a prune step reads a state, a training does not): a
single sample against a single sample would measure which kinds the two nodes are. The last column, the slope of a
straight line through the memory that no file backs, over all nodes after the first WARM, tells a leak which the
libraries' and images' constant share of a process hides.

Resident memory is VmRSS, summed over the process and the processes that it has started. Not the proportional set size:
what others on the machine share of the libraries would move it.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastprune.errors import InputError
from fastprune.figures.paper import A2
from fastprune.loaders import SyntheticData, find_or_prepare
from fastprune.specs import ChannelSelection, DataSpec, Rewind, Runnable
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.compute import Images, NodeComputer, WorkConfig
from fastprune.study.data import data_spec
from fastprune.study.graph import Graph
from fastprune.study.settings import Settings, preset

LOADERS = ("ffcv", "torchvision", "resident", "synthetic")
LIMIT = 0.05
WARM, LAST = 10, 20
MIB = 1 << 20
CLASSES, TRAIN, VAL = 4, 32, 10
SETTINGS = preset(A2.protocol, "smoke").override(
    rounds=3,
    fraction=0.5,
    epochs=2,
    batch_size=32,
    classes=CLASSES,
    train_per_class=TRAIN,
    val_per_class=VAL,
    rewind_epoch=1,
    image_size=32,
)
GENERATED = SyntheticData(CLASSES, TRAIN, VAL, SETTINGS.image_size)


class Sample(NamedTuple):
    """What a process and its children hold: resident memory and the part of it that no file backs (bytes), threads,
    open files. children: how many."""

    resident: int
    private: int
    threads: int
    files: int
    children: int


class Result(NamedTuple):
    """Of one worker. resident: median bytes after the first WARM nodes, and at the end; peak: the most after them.
    growth: a fraction. slope: bytes a node. first, last: the samples after node WARM and at the end."""

    nodes: int
    resident: tuple[float, float]
    peak: int
    growth: float
    slope: float
    first: Sample
    last: Sample


def sample() -> Sample:
    """Of this process, now."""
    parts, waiting = [], [os.getpid()]
    for pid in waiting:
        proc = Path("/proc", str(pid))
        try:
            fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            resident, private = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon"))
            tasks = [(task / "children").read_text() for task in (proc / "task").iterdir()]
            parts.append((resident, private, int(fields["Threads"]), len(list((proc / "fd").iterdir()))))
        except (OSError, KeyError):  # it has ended meanwhile
            continue
        waiting += [int(child) for children in tasks for child in children.split()]
    resident, private, threads, files = map(sum, zip(*parts, strict=True))
    return Sample(resident, private, threads, files, len(parts) - 1)


def chains_of_a_figure(settings: Settings, data: DataSpec, seed: int) -> Iterable[Runnable]:
    """Find runs, masks and evaluations of a seed, from the initial weights and from late ones."""
    low, high = settings.lr_find[0], settings.lr_find[-1]
    for rewind, sources in (
        ("init", (MaskRecipe(low), MaskRecipe(high), MaskRecipe(None))),
        ("late", (MaskRecipe(high),)),
    ):
        chains = Chains(replace(settings, rewind=rewind), data, seed)
        for source in sources:
            for round in range(settings.rounds + 1):
                yield chains.eval_run(source, round, low)


def structured_chains(settings: Settings, data: DataSpec, seed: int) -> Iterable[Runnable]:
    """A dense run, and nine networks cut out of it, fine-tuned."""
    chains = Chains(settings, data, seed)
    dense = chains.dense(settings.lr_find[0])
    for tenths in range(1, 10):
        mask = ChannelSelection(dense.final, tenths / 10)
        yield chains.train(settings.lr_eval[0], mask, Rewind(dense.final, 0, momentum=False))


def graph_of(data: DataSpec, count: int, *, structured: bool = False, settings: Settings = SETTINGS) -> Graph:
    """The first `count` nodes of as many seeds as that needs."""
    make = structured_chains if structured else chains_of_a_figure
    wanted: list[Runnable] = []
    seed = 0
    while len(nodes := Graph.of(wanted).nodes) < count:
        wanted += make(settings, data, seed)
        seed += 1
    return Graph.of(nodes[:count])


def run_nodes(config: WorkConfig, graph: Graph) -> list[Sample]:
    """All nodes through one worker; what this process holds after each. To be called in a process of its own."""
    worker, samples = NodeComputer(config), []
    for node in graph.nodes:
        worker.compute_node(node, graph.requested_outputs(node), lambda epoch, images: None)
        samples.append(sample())
    return samples


def in_fresh_process(config: WorkConfig, graph: Graph) -> list[Sample]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_nodes, config, graph).result()


def judge(samples: Sequence[Sample]) -> Result:
    """ValueError where there are too few."""
    if len(samples) < WARM + 2 * LAST:
        raise ValueError(f"{len(samples)} nodes, expected at least {WARM + 2 * LAST}")
    after = samples[WARM:]
    begin, end = (statistics.median(s.resident for s in part) for part in (after[:LAST], after[-LAST:]))
    line = statistics.linear_regression(range(len(after)), [s.private for s in after])
    peak = max(s.resident for s in after)
    return Result(len(samples), (begin, end), peak, end / begin - 1, line.slope, samples[WARM - 1], samples[-1])


HEADER = (
    f"{'loader':<14}{'nodes':>6}{'RSS begin':>11}{'end':>9}{'peak':>9} MiB{'growth':>9}{'threads':>12}{'files':>12}"
    f"{'private':>12}"
)


def row(loader: str, r: Result) -> str:
    """RSS in MiB, the medians that are judged; threads and files after node WARM and at the end; slope of what no file
    backs."""
    begin, end = (size / MIB for size in r.resident)
    threads, files = (f"{getattr(r.first, of)} -> {getattr(r.last, of)}" for of in ("threads", "files"))
    return (
        f"{loader:<14}{r.nodes:>6}{begin:>11.1f}{end:>9.1f}{r.peak / MIB:>9.1f}    {100 * r.growth:>+7.2f} %"
        f"{threads:>12}{files:>12}{r.slope / 1024:>+7.1f} kB a node"
    )


def measure(loader: str, data: str, store: Path, runs: Path, count: int, structured: bool) -> list[Sample]:
    """store: keeps prepared data; runs: an empty folder for what the nodes leave."""
    manifest, folder = find_or_prepare(GENERATED if "synthetic" in (loader, data) else data, store, loader=loader)
    images = {manifest.fingerprint: Images(manifest, folder, loader)}
    graph = graph_of(data_spec(manifest, SETTINGS), count, structured=structured)
    return in_fresh_process(WorkConfig(runs, images, checkpoint_epochs=1), graph)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="synthetic", help="a data set's folder (default: generated images)")
    p.add_argument("--nodes", type=int, default=200)
    p.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=LOADERS)
    p.add_argument("--structured", action="store_true", help="networks without filters, in place of masks")
    p.add_argument("--store", type=Path, help="keeps prepared data (default: a temporary folder)")
    args = p.parse_args(arguments)
    if args.nodes < WARM + 2 * LAST:
        p.error(f"--nodes: at least {WARM + 2 * LAST}, of which {WARM} are not counted")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # of the processes that are started
    grew = False
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for loader in args.loaders:
            runs = Path(folder, "runs", loader)
            try:
                samples = measure(loader, args.data, args.store or Path(folder), runs, args.nodes, args.structured)
            except InputError as error:
                print(f"memory.py: {error}", file=sys.stderr)
                return 2
            result = judge(samples)
            grew |= result.growth > LIMIT
            print(row(loader, result), flush=True)
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
