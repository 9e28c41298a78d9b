"""Memory growth of a warm worker: computes many nodes in one process and reads its memory after each.

    python bench/memory.py --data path/to/tiny-imagenet-200 [--nodes 200] [--loaders ffcv torchvision] [--structured]

For each loader a new process computes the nodes of a figure with small settings, one after another: dense and masked
runs from initial and from late weights (with momentum), with several seeds and learning rates; prune steps by magnitude
and at random. --structured: nodes remove whole filters, and every second node trains a network of another size. On a
CPU, one thread. Exit code 1 if the memory of a worker grew by more than 5 %, 2 for bad input.

Resident memory is VmRSS, summed over the process and the processes that it started. Growth is the median over the last
20 nodes divided by the median over nodes 11 to 30, less one. The last column is the slope over all nodes after the
tenth of anonymous memory (RssAnon), fitted by least squares.
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
# The first nodes import, compile, open the data and touch its pages. A worker does that once, so it is no growth.
WARM, LAST = 10, 20
MIB = 1 << 20
CLASSES, TRAIN, VAL = 4, 32, 10
# Small nodes: a leak grows with the number of nodes, and a few hundred must be affordable.
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
    """Of a process and its children: resident and anonymous memory (bytes), numbers of threads and of open files.

    children: the number of them.
    """

    resident: int
    private: int
    threads: int
    files: int
    children: int


class Result(NamedTuple):
    """Of one worker. resident: median bytes of the first and of the last LAST nodes after node WARM. peak: bytes, the
    maximum after node WARM. growth: a fraction. slope: of anonymous memory, bytes a node. first, last: the samples
    after node WARM and after the last node.
    """

    nodes: int
    resident: tuple[float, float]
    peak: int
    growth: float
    slope: float
    first: Sample
    last: Sample


def sample() -> Sample:
    """The present state of this process, from /proc (Linux only)."""
    parts, waiting = [], [os.getpid()]
    for pid in waiting:
        proc = Path("/proc", str(pid))
        try:
            fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            # Not the proportional set size: it changes when another process maps or unmaps the same libraries.
            resident, private = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon"))
            tasks = [(task / "children").read_text() for task in (proc / "task").iterdir()]
            parts.append((resident, private, int(fields["Threads"]), len(list((proc / "fd").iterdir()))))
        except (OSError, KeyError):  # the process has ended since it was listed
            continue
        waiting += [int(child) for children in tasks for child in children.split()]
    resident, private, threads, files = map(sum, zip(*parts, strict=True))
    return Sample(resident, private, threads, files, len(parts) - 1)


def chains_of_a_figure(settings: Settings, data: DataSpec, seed: int) -> Iterable[Runnable]:
    """Find runs, prune steps and evaluations of a seed, rewound to initial weights and to late ones."""
    # Every kind of node that a worker computes: a leak may be in one kind only.
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
    """A dense run, and nine smaller networks made by removing its filters, fine-tuned."""
    chains = Chains(settings, data, seed)
    dense = chains.dense(settings.lr_find[0])
    for tenths in range(1, 10):
        mask = ChannelSelection(dense.final, tenths / 10)
        # Each has convs of other shapes: oneDNN compiles and caches code for every new one.
        yield chains.train(settings.lr_eval[0], mask, Rewind(dense.final, 0, momentum=False))


def graph_of(data: DataSpec, count: int, *, structured: bool = False, settings: Settings = SETTINGS) -> Graph:
    """A graph of `count` nodes: the chains of as many seeds as that takes, cut after the last."""
    make = structured_chains if structured else chains_of_a_figure
    wanted: list[Runnable] = []
    seed = 0
    while len(nodes := Graph.of(wanted).nodes) < count:
        wanted += make(settings, data, seed)
        seed += 1
    return Graph.of(nodes[:count])


def run_nodes(config: WorkConfig, graph: Graph) -> list[Sample]:
    """Computes all nodes; a sample after each. Call it in a new process."""
    worker, samples = NodeComputer(config), []
    for node in graph.nodes:
        worker.compute_node(node, graph.requested_outputs(node), lambda *_: None)
        samples.append(sample())
    return samples


def in_fresh_process(config: WorkConfig, graph: Graph) -> list[Sample]:
    # Spawned, not forked: a fork would inherit the memory that the loader before it left.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_nodes, config, graph).result()


def judge(samples: Sequence[Sample]) -> Result:
    """ValueError if there are fewer than WARM + 2 * LAST samples."""
    if len(samples) < WARM + 2 * LAST:
        raise ValueError(f"{len(samples)} nodes, expected at least {WARM + 2 * LAST}")
    after = samples[WARM:]
    # Medians: how much free memory the allocator holds after a node depends on its kind (a prune step reads a state, a
    # training does not). Two single samples would compare two kinds.
    begin, end = (statistics.median(s.resident for s in part) for part in (after[:LAST], after[-LAST:]))
    # Anonymous memory alone: libraries and images are a large constant share, in which a small leak does not show.
    line = statistics.linear_regression(range(len(after)), [s.private for s in after])
    peak = max(s.resident for s in after)
    return Result(len(samples), (begin, end), peak, end / begin - 1, line.slope, samples[WARM - 1], samples[-1])


HEADER = (
    f"{'loader':<14}{'nodes':>6}{'RSS begin':>11}{'end':>9}{'peak':>9} MiB{'growth':>9}{'threads':>12}{'files':>12}"
    f"{'private':>12}"
)


def row(loader: str, r: Result) -> str:
    """A line of the table: RSS in MiB; threads and files after node WARM and at the end; slope of anonymous memory."""
    begin, end = (size / MIB for size in r.resident)
    threads, files = (f"{getattr(r.first, of)} -> {getattr(r.last, of)}" for of in ("threads", "files"))
    return (
        f"{loader:<14}{r.nodes:>6}{begin:>11.1f}{end:>9.1f}{r.peak / MIB:>9.1f}    {100 * r.growth:>+7.2f} %"
        f"{threads:>12}{files:>12}{r.slope / 1024:>+7.1f} kB a node"
    )


def measure(loader: str, data: str, store: Path, runs: Path, count: int, structured: bool) -> list[Sample]:
    """Samples of a new worker. store: folder for prepared data. runs: an empty folder, the run store of the nodes."""
    manifest, folder = find_or_prepare(GENERATED if "synthetic" in (loader, data) else data, store, loader=loader)
    images = {manifest.fingerprint: Images(manifest, folder, loader)}
    graph = graph_of(data_spec(manifest, SETTINGS), count, structured=structured)
    return in_fresh_process(WorkConfig(runs, images, checkpoint_epochs=1), graph)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="synthetic", help="a data set's folder (default: generated images)")
    p.add_argument("--nodes", type=int, default=200)
    p.add_argument("--loaders", nargs="+", default=list(LOADERS), choices=LOADERS)
    p.add_argument("--structured", action="store_true", help="remove filters in place of masking weights")
    p.add_argument("--store", type=Path, help="keeps prepared data (default: a temporary folder)")
    args = p.parse_args(arguments)
    if args.nodes < WARM + 2 * LAST:
        p.error(f"--nodes: at least {WARM + 2 * LAST}, of which {WARM} are not counted")
    # For the child processes: this one read them when it imported torch.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
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
