"""Time of the parts of a round of iterative magnitude pruning, beside the same rounds in plain PyTorch.

    python bench/rounds.py --rounds 5 --epochs 1 --model resnet18 --size 64 --batch 128 --train 2000 --out FOLDER

A round: train with the present mask and evaluate after each epoch; store; prune; rewind to the initial weights.
fastprune uses one Trainer for all rounds and its own loaders, and stores what the run store keeps (weights, momentum,
metrics, a bit mask, all flushed to disk). Plain PyTorch is bench/plain.py: `mask * weight` in the forward pass,
torch.optim.SGD, kthvalue, load_state_dict, torch.save, a new DataLoader each round over images decoded beforehand.
Writes rounds.json, rounds.png and rounds.pdf. Exit code 2 for bad input.

With --masks it measures what a training step costs in each round, plain, dense and sparse (bench/step_cost.py).

Parts: "loading" is the time that a loop waits for its loader; "steps" and "evaluation" are the rest of their epochs.
"compilation" is a difference: the first time of steps, evaluation, loading and pruning, less the median of their later
times. "other" is the rest of the round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import plain, step_cost
from bench.rows import environment
from fastprune.errors import InputError
from fastprune.figures.style import COLORS, RC, RED
from fastprune.files import write_tensors
from fastprune.loaders import SyntheticData, find_or_prepare, open_data
from fastprune.loaders.batches import select
from fastprune.loaders.catalog import Data
from fastprune.loaders.manifest import Manifest, Subset
from fastprune.loaders.samples import ArraySamples, Samples, folder_samples
from fastprune.pruning.masks import Mask
from fastprune.specs import DataSpec, Init, ModelSpec, OptimizerSpec, Prune, ScheduleSpec, Train
from fastprune.store import RunStore, write_csv
from fastprune.training.models import build, initial_model
from fastprune.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS = "fastprune", "plain PyTorch"
# Part: colour and hatch. Lightness alternates, so that neighbours differ in grey as well.
_STYLES = {
    "steps": (COLORS[0], ""),
    "evaluation": (COLORS[4], "///"),
    "loading": (COLORS[1], "..."),
    "pruning": (RED, "xxx"),
    "rewinding": (COLORS[2], "\\\\\\"),
    "storing": (COLORS[3], "---"),
    "compilation": ("#dddddd", "ooo"),
    "other": ("#ffffff", ""),
}
PARTS = tuple(_STYLES)
# The lower axes leave these out: beside them the parts that differ most between the loops could not be seen.
_LARGE = ("steps", "evaluation", "compilation")
_SMALL = tuple(part for part in PARTS if part not in _LARGE)
_RC = RC | {"hatch.linewidth": 0.5}
# Parts in which torch, Triton, numba or FFCV compile at first use.
COMPILED = ("steps", "evaluation", "loading", "pruning")


@dataclass(frozen=True)
class Work:
    """The settings of both loops."""

    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    rounds: int
    fraction: float
    precision: str
    device: str


@dataclass
class Row:
    """One round of one loop. who: OURS or THEIRS. seconds: by part; their sum is `wall`. cpu: processor seconds of this
    process. kept: weights after pruning. images: trained on. loss, accuracy: of the last epoch. stored: bytes on disk.
    """

    who: str
    round: int
    seconds: dict[str, float]
    wall: float
    cpu: float
    kept: int
    images: int
    loss: float
    accuracy: float
    stored: int


class Clock:
    """Records seconds by part."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.events: dict[str, list[float]] = defaultdict(list)

    def now(self) -> float:
        # Kernels run asynchronously: without a wait the time of a part would count for the part that waits next.
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = self.now()
        yield
        self.events[part].append(self.now() - began)


class Timed(plain.Wrapped):
    """Batches that record the time their consumer waits for them. waits: seconds, one entry an epoch."""

    def __init__(self, batches: Any) -> None:
        super().__init__(batches)
        self.images, self.waits = 0, list[float]()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Without waiting for the device, unlike Clock: between batches that would take away the overlap of loading with
        # computing, which is what a loader is for.
        began, waited, self.images = time.perf_counter(), 0.0, 0
        for images, labels in self.batches:
            waited += time.perf_counter() - began
            self.images += len(labels)
            yield images, labels
            began = time.perf_counter()
        self.waits.append(waited + time.perf_counter() - began)


Loaders = Callable[[], tuple[Any, Any]]  # gives (train, val): iterables of batches


class Ours:
    """The loop by fastprune: one Trainer and one pair of loaders for all rounds."""

    def __init__(self, work: Work, batches: Loaders) -> None:
        self.work = work
        self.train, self.val = batches()
        # As torch computes, so that both loops prune the same weights; what the other ways cost, --masks shows.
        self.trainer = Trainer(
            initial_model(Init(work.model, 0)), device=work.device, precision=work.precision, compute="plain"
        )
        self.trainer.save_rewind_point()
        self.node: Prune | None = None

    def round(self, clock: Clock, folder: Path) -> tuple[int, int, float, float]:
        """(weights kept, images trained on, loss, accuracy)."""
        w, trainer, store = self.work, self.trainer, RunStore(folder)
        train, val = Timed(self.train), Timed(self.val)
        # fit trains and evaluates in one call. Its own times and the waits for the loaders split it into parts.
        began = clock.now()
        history = trainer.fit(train, val, w.optimizer, w.schedule)
        whole, stepping = clock.now() - began, 0.0
        for m, wait, val_wait in zip(history, train.waits, val.waits, strict=True):
            training = train.images / m.images_per_second
            clock.events["steps"].append(training - wait)
            clock.events["evaluation"].append(m.seconds - training - val_wait)
            clock.events["loading"].append(wait + val_wait)
            stepping += m.seconds
        clock.events["steps"][-1] += whole - stepping  # set-up and checks around the epochs
        node = Train(w.data, Init(w.model, 0), self.node, w.optimizer, w.schedule, w.schedule.epochs, 0, w.precision)
        with clock("storing"):
            state = f"state-{w.schedule.epochs}.safetensors"
            store.publish(
                node,
                asdict(history[-1]),
                {},
                {
                    "metrics.csv": lambda p: write_csv(p, [m.as_dict() for m in history]),
                    state: lambda p: write_tensors(p, trainer.state()),
                },
            )
        with clock("pruning"):
            mask = trainer.prune(w.fraction)
            kept = mask.kept
        self.node = Prune(node.final, self.node, w.fraction, "magnitude", "global", 0)
        with clock("storing"):
            files: dict[str, Any] = {
                "mask.safetensors": mask.save,
                "layers.csv": lambda p: p.write_text(mask.ratios_csv()),
            }
            store.publish(self.node, {"kept": kept}, {}, files)
        with clock("rewinding"):
            trainer.rewind()
        return kept, train.images * len(history), history[-1].train_loss, history[-1].val_accuracy

    def mask(self) -> dict[str, Tensor]:
        """By parameter name: bool, True keeps."""
        return Mask(self.trainer.flat.mask, self.trainer.flat.segments).tensors()


class Theirs:
    """The loop in plain PyTorch."""

    def __init__(self, work: Work, batches: Loaders) -> None:
        self.work, self.batches = work, batches
        # On a CPU torch's default optimiser, which fastprune's equals to the bit: both loops prune the same weights. On
        # a GPU the fused one, which is faster.
        self.plain = plain.Plain(
            initial_model(Init(work.model, 0)),
            device=work.device,
            precision=work.precision,
            fused=True if work.device.startswith("cuda") else None,
            sgd=work.optimizer,
            lr=work.schedule.lr,
        )
        self.plain.save_rewind_point()

    def round(self, clock: Clock, folder: Path) -> tuple[int, int, float, float]:
        w, loop, history = self.work, self.plain, []
        # New loaders each round, as a script that trains a round per call makes them; the time counts as loading.
        began = clock.now()
        train, val = (Timed(batches) for batches in self.batches())
        building = clock.now() - began
        for epoch in range(w.schedule.epochs):
            for group in loop.sgd.param_groups:
                group["lr"] = w.schedule.lr_at(epoch)
            began = clock.now()
            loss, _, images = loop.train(train)
            between = clock.now()
            _, accuracy, _ = loop.evaluate(val)
            ended = clock.now()
            clock.events["steps"].append(between - began - train.waits[-1])
            clock.events["evaluation"].append(ended - between - val.waits[-1])
            clock.events["loading"].append(train.waits[-1] + val.waits[-1] + building)
            building = 0.0
            history.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy})
        with clock("pruning"):
            kept = loop.prune(w.fraction)
        with clock("storing"):
            state = {"model": loop.model.state_dict(), "optimizer": loop.sgd.state_dict(), "history": history}
            torch.save(state, folder / "round.pt")
        with clock("rewinding"):
            loop.rewind(w.schedule.lr)
        return kept, images * w.schedule.epochs, loss, accuracy

    def mask(self) -> dict[str, Tensor]:
        """As Ours.mask."""
        buffers = dict(self.plain.model.named_buffers())
        return {f"{n.removesuffix('.mask')}.weight": b > 0 for n, b in buffers.items() if n.endswith(".mask")}


def measure(work: Work, ours: Ours, theirs: Theirs, folder: Path, show: Callable[[Row], None]) -> list[Row]:
    """The rows of all rounds of both loops. folder: for stored files. show: is called with each row once measured."""
    # In turns, round by round: load on the machine affects both alike, and ratios hold.
    loops: tuple[tuple[str, Ours | Theirs], ...] = ((OURS, ours), (THEIRS, theirs))
    rows: list[Row] = []
    events: dict[str, dict[str, list[float]]] = {who: defaultdict(list) for who, _ in loops}
    for number in range(work.rounds):
        for who, loop in loops:
            clock = Clock(work.device)
            # On the disk of --out, not in /tmp, which may be memory: flushing is part of what storing costs.
            with tempfile.TemporaryDirectory(dir=folder) as stored:
                began, cpu = clock.now(), time.process_time()
                kept, images, loss, accuracy = loop.round(clock, Path(stored))
                wall, cpu = clock.now() - began, time.process_time() - cpu
                size = sum(path.stat().st_size for path in Path(stored).rglob("*") if path.is_file())
            seconds = {part: sum(clock.events[part]) for part in PARTS if part in clock.events}
            for part in COMPILED:
                events[who][part] += clock.events[part]
            rows.append(Row(who, number, seconds, wall, cpu, kept, images, loss, accuracy, size))
            show(rows[-1])
    for who, _ in loops:
        tell_compilation(next(row for row in rows if row.who == who), events[who])
    for row in rows:
        row.seconds = {part: row.seconds.get(part, 0.0) for part in PARTS}
        row.seconds["other"] = row.wall - sum(row.seconds.values())
    return rows


def tell_compilation(first: Row, events: dict[str, list[float]]) -> None:
    """Moves the excess of each part's first time over the median of the later ones to "compilation", in `first`."""
    # By difference, because compilers run inside the first call, where no clock can separate them.
    first.seconds["compilation"] = 0.0
    for part, times in events.items():
        excess = max(0.0, times[0] - statistics.median(times[1:])) if len(times) > 1 else 0.0
        first.seconds[part] -= excess
        first.seconds["compilation"] += excess


def header() -> str:
    return (
        f"{'round':<20}"
        + "".join(f"{part:>12}" for part in PARTS)
        + f"{'wall':>10}{'cpu':>10}{'images/s':>10}{'kept':>12}"
    )


def line(row: Row) -> str:
    """A line of the table. images/s: training images over the wall time of the round."""
    cells = "".join(f"{row.seconds[p]:12.3f}" if p in row.seconds else " " * 12 for p in PARTS)
    last = f"{row.wall:10.2f}{row.cpu:10.2f}{row.images / row.wall:10,.0f}{row.kept:12,}"
    return f"{row.round:>4}  {row.who:<14}{cells}{last}"


def medians(rows: Sequence[Row], who: str) -> dict[str, float]:
    """Median seconds of the rounds after the first: by part, "wall" and "cpu"."""
    # Without round 0, which pays for compilation and for first touches of memory and files.
    later = [row for row in rows if row.who == who and row.round > 0]
    found = {part: statistics.median(row.seconds[part] for row in later) for part in PARTS}
    return found | {name: statistics.median(getattr(row, name) for row in later) for name in ("wall", "cpu")}


def decoded(manifest: Manifest, folder: Path | None, subset: Subset) -> dict[str, tuple[Tensor, list[int]]]:
    """By split (images uint8 [n, 3, H, W], labels): those that fastprune's loaders serve."""
    # Decoded before the clock starts: the comparison is with a user who already avoids decoding JPEGs in each epoch.
    samples: dict[str, Samples]
    if manifest.synthetic is not None:
        arrays = {split: SyntheticData(**manifest.synthetic).arrays(split) for split in ("train", "val")}
        samples = {split: ArraySamples(images, labels.tolist()) for split, (images, labels) in arrays.items()}
    else:
        from fastprune.loaders.choice import unchanged_source

        samples = dict(folder_samples(unchanged_source(manifest, folder)))
    result = {}
    for split, part in samples.items():
        labels = torch.tensor(part.labels)
        chosen = select(labels.numpy(), subset.classes, subset.per_class(split)).tolist()
        images = torch.stack([torch.tensor(part.image(i)).permute(2, 0, 1) for i in chosen]).contiguous()
        result[split] = (images, labels[chosen].tolist())
    return result


def open_both(args: argparse.Namespace, store: Path) -> tuple[DataSpec, Loaders, Loaders]:
    """(data, loaders of fastprune, loaders of plain PyTorch). InputError if the data is not there."""
    each, val_each = (max(1, n // args.classes) for n in (args.train, args.val))
    data: Data = SyntheticData(args.classes, each, val_each, args.size) if args.data == "synthetic" else args.data
    manifest, folder = find_or_prepare(data, store)
    classes = min(args.classes, len(manifest.classes))
    subset = Subset(classes, each, val_each)
    source = open_data(manifest, folder, loader=args.loader, device=args.device, show=True)
    dtype = plain.LOW[args.precision] or torch.float32
    images = decoded(manifest, folder, subset)
    spec = DataSpec(
        manifest.name, manifest.fingerprint, classes, each, val_each, *(len(images[s][1]) for s in ("train", "val"))
    )

    def ours() -> tuple[Any, Any]:
        how: Any = {"batch_size": args.batch, "subset": subset, "dtype": dtype}
        return source.train(seed=0, **how), source.val(**how)

    def theirs() -> tuple[Any, Any]:
        pin = args.device.startswith("cuda")
        norm = (manifest.mean, manifest.std)
        return plain.loaders(images["train"], images["val"], args.batch, norm, workers=args.workers, pin=pin)

    return spec, ours, theirs


def summary(rows: Sequence[Row]) -> str:
    """Lines: medians of the rounds after the first, and the ratio of plain PyTorch to fastprune."""
    ours, theirs = medians(rows, OURS), medians(rows, THEIRS)
    lines = [f"{'median after round 0':<24}{OURS:>14}{THEIRS:>16}{'ratio':>9}"]
    for part in (*PARTS, "wall", "cpu"):
        if part not in ("compilation", "other"):
            ratio = f"{theirs[part] / ours[part]:9.2f}" if ours[part] > 0 else ""
            lines.append(f"  {part:<22}{ours[part]:12.4f} s{theirs[part]:14.4f} s{ratio}")
    return "\n".join(lines)


def save(args: argparse.Namespace, rows: list[Row], facts: dict[str, Any]) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    content = facts | {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    content |= {"rounds": [asdict(row) for row in rows], "medians": {w: medians(rows, w) for w in (OURS, THEIRS)}}
    (args.out / "rounds.json").write_text(json.dumps(content, indent=1) + "\n")
    title = (
        f"{args.model}, width {args.width}, {args.size} px, batch {args.batch}, {rows[0].images:,} images a round, "
        f"{args.precision}\n{facts['device']}, torch {facts['torch']}"
    )
    draw([asdict(row) for row in rows], (OURS, THEIRS), title, args.out / "rounds")


def draw(rows: Sequence[Mapping[str, Any]], names: tuple[str, str], title: str, path: Path) -> None:
    """Writes `path`.png and `path`.pdf: stacked bars of the seconds of each round, by part.

    rows: with who (one of the two names), round, seconds (by part).
    """
    # Imported here: only drawing needs matplotlib.
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rounds = sorted({row["round"] for row in rows})
    with style.context(["default", _RC]):
        figure = Figure(figsize=(max(6.4, 0.32 * len(rounds)), 6.4), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for ax, parts, what in (
            (axes[0], PARTS, "a whole round"),
            (axes[1], _SMALL, "without steps, evaluation and compilation"),
        ):
            _bars(ax, rows, names, parts)
            ax.set_ylabel("Time (s)")
            ax.set_title(what, loc="left")
            ax.margins(y=0.06)
            ax.set_ylim(bottom=0)
        axes[1].set_xlabel(f"Round (left bar {names[0]}, right bar {names[1]})")
        axes[1].set_xticks(rounds)
        figure.suptitle(title)
        patches = [Patch(facecolor=c, hatch=h, edgecolor="black", linewidth=0.5) for c, h in _STYLES.values()]
        figure.legend(patches, PARTS, loc="outside lower center", ncols=4, handlelength=2.6, handleheight=1.4)
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".pdf"))


def _bars(ax: "Axes", rows: Sequence[Mapping[str, Any]], names: tuple[str, str], parts: Sequence[str]) -> None:
    width = 0.38
    for row in rows:
        x = row["round"] + (-0.5 if row["who"] == names[0] else 0.5) * (width + 0.03)
        bottom = 0.0
        for part in parts:
            color, hatch = _STYLES[part]
            height = max(0.0, row["seconds"][part])  # "other" is a difference, and may be just below zero
            ax.bar(x, height, width, bottom, color=color, hatch=hatch, edgecolor="black", linewidth=0.5)
            bottom += height


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="at least 2")
    p.add_argument("--epochs", type=int, default=1, help="in each round")
    p.add_argument("--model", default="resnet18")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--size", type=int, default=64, help="pixels, of generated images")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--train", type=int, default=2000, help="training images")
    p.add_argument("--val", type=int, default=500, help="validation images")
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--fraction", type=float, default=0.2, help="pruned of what remains in each round")
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    p.add_argument("--data", default="synthetic", help="a data set's folder, or synthetic")
    p.add_argument("--store", type=Path, help="folder for prepared data (default: --out)")
    p.add_argument("--loader", default="auto", help="of fastprune")
    p.add_argument("--workers", type=int, default=None, help="of the plain DataLoader (default: 8 on a GPU, else 0)")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    p.add_argument(
        "--masks", type=Path, help="kept counts of a find run: measure only what steps cost, by bench/step_cost.py"
    )
    p.add_argument("--repeats", type=int, default=5, help="with --masks: steps of each way and round")
    args = p.parse_args(arguments)
    if args.rounds < 2:
        p.error("--rounds: at least 2, since compilation is the difference between rounds")
    if args.workers is None:
        args.workers = 8 if args.device.startswith("cuda") else 0
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    facts = environment(torch.device(args.device))
    if args.masks is not None:
        step_cost.run(args, facts)
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data, ours, theirs = open_both(args, args.store or args.out)
        model = ModelSpec(args.model, data.classes, width=args.width)
        with torch.device("meta"):
            build(model)  # an unknown name is an input error; allocates nothing
    except (InputError, OSError) as error:
        print(f"rounds.py: {error}", file=sys.stderr)
        return 2
    schedule = ScheduleSpec(args.lr, args.epochs)
    optimizer = OptimizerSpec(args.batch)
    work = Work(model, data, optimizer, schedule, args.rounds, args.fraction, args.precision, args.device)
    print(" ".join(f"{k}={v}" for k, v in facts.items()), header(), sep="\n", flush=True)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        rows = measure(work, Ours(work, ours), Theirs(work, theirs), Path(folder), lambda r: print(line(r), flush=True))
    print("with compilation as a part of its own:", header(), *map(line, rows), summary(rows), sep="\n")
    save(args, rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
