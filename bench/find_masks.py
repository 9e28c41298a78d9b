"""Finds the masks that the benchmarks of sparse training use: a find run on real images, kept counts by filter.

    python bench/find_masks.py --model resnet18 --data DIR --out bench/masks/resnet18.npz

31 rounds of iterative magnitude pruning from the same initial weights, 20 % of what is left a round, 500 steps each.
Which weights of a filter are kept does not matter to what a step costs, how many does: for each layer and round the
number of kept weights of each filter is stored (a few hundred kB), and `masks` draws masks with these numbers. The same
command continues a run that was stopped. Exit code 2 for bad input.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.files import read_tensors, write_atomically, write_tensors
from fastprune.loaders import find_or_prepare, open_data
from fastprune.loaders.batches import Subset
from fastprune.pruning.masks import Mask
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

ROUNDS, FRACTION, STEPS = 31, 0.2, 500


class First:
    """The first batches of an epoch, another epoch at each pass."""

    def __init__(self, batches: Any, number: int) -> None:
        self.batches, self.number, self.epoch = batches, number, 0

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(self.epoch)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(iter(self.batches), self.number)


def masks(path: Path, segments: Sequence[Any], round_: float) -> Mask:
    """A mask with the counts of a round: kept weights of each filter at random places, from a fixed seed.

    Between rounds, and for a network of another width, densities are interpolated filter by filter.
    """
    generator, found = np.random.default_rng(0), {}
    with np.load(path) as stored:
        sizes = stored["sizes"]
        for s, size in zip(segments, sizes, strict=True):
            counts = stored[s.name]
            low, part = int(round_), round_ - int(round_)
            density = counts[low] / size
            if part:  # density falls by a factor a round
                density = density ** (1 - part) * (counts[low + 1] / size) ** part
            density = density[np.arange(s.shape[0]) * len(density) // s.shape[0]]
            kept = np.rint(density * np.prod(s.shape[1:])).astype(np.int64)
            order = generator.random((s.shape[0], int(np.prod(s.shape[1:])))).argsort(1).argsort(1)
            found[s.name] = torch.from_numpy(order < kept[:, None]).view(s.shape)
    return Mask.from_tensors(found)


def find(args: argparse.Namespace) -> None:
    manifest, folder = find_or_prepare(args.data, args.store)
    source = open_data(manifest, folder, loader=args.loader, device="cpu", show=True)
    subset = Subset(len(manifest.classes))
    train = First(source.train(seed=0, batch_size=args.batch, subset=subset, dtype=torch.float32), args.steps)
    val = First(source.val(batch_size=args.batch, subset=subset, dtype=torch.float32), 20)
    spec = ModelSpec(args.model, len(manifest.classes), width=args.width)
    trainer = Trainer(initial_model(Init(spec, 0)), compute=args.compute)
    trainer.save_rewind_point()
    partial = args.out.with_suffix(".part.safetensors")
    counts: dict[str, list[np.ndarray]] = {s.name: [] for s in trainer.flat.segments}
    if partial.exists():
        stored, _ = read_tensors(partial)
        mask = Mask.from_tensors({n: stored[n].bool() for n in counts})
        trainer.set_mask(mask)
        counts = {n: list(stored[f"counts.{n}"].numpy()) for n in counts}
    for number in range(len(next(iter(counts.values()))), ROUNDS):
        mask = Mask(trainer.flat.mask, trainer.flat.segments)
        for name, keep in mask.tensors().items():
            counts[name].append(keep.flatten(1).sum(1).numpy().astype(np.int32))
        trainer.rewind()
        began, train.epoch = time.perf_counter(), number
        [m] = trainer.fit(train, val, OptimizerSpec(args.batch), ScheduleSpec(args.lr, 1))
        print(
            f"round {number:2}  density {mask.kept / mask.total:.4f}  {trainer.computed:<6}  loss {m.train_loss:.3f}  "
            f"accuracy {m.val_accuracy:.3f}  {time.perf_counter() - began:.0f} s  {trainer.reason}",
            flush=True,
        )
        trainer.prune(FRACTION)
        tensors = {n: k.clone() for n, k in Mask(trainer.flat.mask, trainer.flat.segments).tensors().items()}
        tensors |= {f"counts.{n}": torch.from_numpy(np.stack(c)) for n, c in counts.items()}
        write_tensors(partial, tensors, {})
    sizes = [int(np.prod(s.shape[1:])) for s in trainer.flat.segments]
    write_atomically(args.out, lambda p: save(p, counts, sizes), args.out.with_suffix(".tmp.npz"))
    partial.unlink()


def save(path: Path, counts: dict[str, list[np.ndarray]], sizes: Sequence[int]) -> None:
    """Writes the counts int32 [rounds, filters] by layer, and "sizes": weights of a filter of each layer."""
    arrays: dict[str, Any] = {name: np.stack(rows) for name, rows in counts.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, sizes=np.array(sizes), **arrays)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="resnet18")
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--steps", type=int, default=STEPS, help="in each round")
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--compute", default="auto")
    p.add_argument("--loader", default="auto")
    p.add_argument("--data", required=True)
    p.add_argument("--store", type=Path, default=Path("runs"), help="folder for prepared data")
    p.add_argument("--out", type=Path, required=True)
    return p.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        find(args)
    except (InputError, OSError) as error:
        print(f"find_masks.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
