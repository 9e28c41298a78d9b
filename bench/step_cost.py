"""What a training step costs in each round of pruning: plain, dense and sparse (Trainer's `compute`), interleaved.

    python bench/rounds.py --masks bench/masks/resnet18.npz --out FOLDER

Times are minima of processor time over a few steps in one process, the three ways in turns; masks have the kept counts
by filter of a find run on real images (bench/find_masks.py). Writes step_cost.json, step_cost.png and step_cost.pdf.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.find_masks import masks
from fastprune.figures.style import COLORS, GREY, RC, RED
from fastprune.specs import Init, ModelSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

WAYS = ("plain", "dense", "sparse")


class Stepper:
    """Training steps of one network on one batch, computed one way."""

    def __init__(self, model: nn.Module, way: str, images: Tensor, labels: Tensor) -> None:
        self.trainer = Trainer(model, compute=way)
        self.batch = images, labels
        trainer = self.trainer
        trainer._hyper = {"lr": trainer._lr, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
        trainer._hyper |= {"name": "sgd", "decays": None, "clip_grad_norm": None}
        trainer._lr.fill_(1e-3)
        trainer.save_rewind_point()

    def start(self, mask: Any) -> None:
        """The beginning of a training under `mask`, with its first step."""
        trainer = self.trainer
        trainer.rewind()
        trainer.set_mask(mask)
        trainer._compute, trainer._asked_now = None, trainer._asked
        trainer.model.train()
        trainer._begin(self.batch[0], float("inf"))
        self()

    def __call__(self) -> float:
        """Seconds of one step: processor time with one thread, else wall time."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        self.trainer._run(self.trainer._train_step, *self.batch)
        return clock() - began


def measure(
    model: ModelSpec, size: int, batch: int, path: Path, rounds: Sequence[float], repeats: int
) -> list[dict[str, float]]:
    """For each round {"round", "density", and seconds a step by way}, shown as they come."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, model.classes, (batch,), generator=generator)
    steppers = {way: Stepper(initial_model(Init(model, 0)), way, images, labels) for way in WAYS}
    rows = []
    for number in rounds:
        mask = masks(path, steppers["plain"].trainer.flat.segments, number)
        for stepper in steppers.values():
            stepper.start(mask)
        times = dict.fromkeys(WAYS, float("inf"))
        for _ in range(repeats):
            for way, stepper in steppers.items():
                times[way] = min(times[way], stepper())
        rows.append({"round": number, "density": mask.kept / mask.total, **times})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Mapping[str, float]) -> str:
    plain = row["plain"]
    cells = "".join(f"  {way} {row[way] * 1e3:7.1f} ms ({row[way] / plain:.3f})" for way in WAYS)
    return f"round {row['round']:4.1f}  density {row['density']:.4f}{cells}"


def summary(rows: Sequence[Mapping[str, float]]) -> str:
    """The sums over all rounds, as parts of plain: each way, and the cheaper of dense and sparse."""
    plain = sum(row["plain"] for row in rows)
    sums = {way: sum(row[way] for row in rows) / plain for way in WAYS}
    best = sum(min(row["dense"], row["sparse"]) for row in rows) / plain
    cells = ", ".join(f"{way} {part:.3f}" for way, part in sums.items())
    return f"all {len(rows)} rounds, as a part of plain: {cells}, the cheaper in each round {best:.3f}"


def draw(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Writes `path`.png and `path`.pdf: milliseconds a step by round."""
    from matplotlib import style
    from matplotlib.figure import Figure

    looks = {"plain": (GREY, ":", "o"), "dense": (COLORS[0], "--", "s"), "sparse": (RED, "-", "D")}
    with style.context(["default", RC]):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        ax = figure.subplots()
        x = [row["round"] for row in rows]
        for way, (color, dashes, marker) in looks.items():
            y = [row[way] * 1e3 for row in rows]
            ax.plot(x, y, color=color, linestyle=dashes, marker=marker, markersize=3, label=way)
        ax.fill_between(x, [min(row["dense"], row["sparse"]) * 1e3 for row in rows], color=RED, alpha=0.08, linewidth=0)
        ax.set_ylim(bottom=0)
        ax.set_xlim(x[0], x[-1])
        ax.set_xlabel("Pruning round")
        ax.set_ylabel("Training step (ms)")
        above = ax.secondary_xaxis("top")
        ticks = [row for row in rows if row["round"] in (0, 5, 10, 15, 20, 25, 30)]
        above.set_xticks([row["round"] for row in ticks], [f"{row['density']:.2g}" for row in ticks])
        above.set_xlabel("Density")
        above.spines["top"].set_visible(False)
        ax.set_title(title)
        ax.legend()
        figure.savefig(path.with_suffix(".png"))
        figure.savefig(path.with_suffix(".pdf"))


def run(args: argparse.Namespace, facts: Mapping[str, Any]) -> None:
    model = ModelSpec(args.model, 200, width=args.width)
    rounds = [i * 30 / (args.rounds - 1) for i in range(args.rounds)]
    rows = measure(model, args.size, args.batch, args.masks, rounds, args.repeats)
    print(summary(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {**facts, "settings": settings, "rows": rows, "summary": summary(rows)}
    (args.out / "step_cost.json").write_text(json.dumps(content, indent=1) + "\n")
    threads = torch.get_num_threads()
    title = (
        f"{args.model}, width {args.width}, {args.size} px, batch {args.batch}, fp32, "
        f"{threads} thread{'s' * (threads > 1)}\n{facts['device']}, torch {facts['torch']}"
    )
    draw(rows, title, args.out / "step_cost")
