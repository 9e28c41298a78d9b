"""Accuracy of fastprune against plain PyTorch: short trainings on real images, over several seeds.

    python bench/parity.py --data path/to/tiny-imagenet-200 --store DIR [--classes 20 --epochs 8 --seeds 3]

Trains the same network with the same hyperparameters by each route: fastprune's Trainer with the named loader, or a
plain PyTorch loop on torchvision's ImageFolder with torchvision's random crops and flips. Prints the validation
accuracy of each seed, their mean and standard deviation. Exit code 2 for bad input. With --computes it compares ways to
compute instead, under a mask of --density:

    python bench/parity.py --data DIR --store DIR --computes plain dense sparse --density 0.1
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data import Subset as Part
from torchvision import datasets, transforms

from fastprune.errors import InputError
from fastprune.loaders import Subset, find_or_prepare, open_data
from fastprune.loaders.manifest import Manifest
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

PLAIN = "plain PyTorch"


def ours(args: argparse.Namespace, source: Any, spec: ModelSpec, seed: int, compute: str = "auto") -> float:
    """Validation accuracy in [0, 1] after the last epoch."""
    # A batch depends on seed and epoch, not on the loader: on a CPU all loaders give the same accuracy to the bit.
    trainer = Trainer(initial_model(Init(spec, seed)), device=args.device, precision=args.precision, compute=compute)
    if args.density < 1:
        trainer.prune(1 - args.density)
    part = Subset(args.classes)
    train = source.train(seed=seed, batch_size=args.batch, subset=part)
    val = source.val(batch_size=args.batch, subset=part)
    return trainer.fit(train, val, OptimizerSpec(args.batch), schedule(args))[-1].val_accuracy


def plain(args: argparse.Namespace, manifest: Manifest, spec: ModelSpec, seed: int) -> float:
    """The same in plain PyTorch. Order and crops are torch's own draws, so accuracies agree only in distribution."""
    torch.manual_seed(1000 + seed)
    normal = [transforms.ToTensor(), transforms.Normalize(manifest.mean, manifest.std)]
    crop = [transforms.RandomResizedCrop(manifest.height), transforms.RandomHorizontalFlip()]
    root = Path(args.data)
    train_set = datasets.ImageFolder(str(root / "train"), transforms.Compose([*crop, *normal]))
    # ImageFolder numbers the classes that it finds; the manifest has its own order. Labels go from one to the other.
    index = {name: i for i, name in enumerate(train_set.classes)}
    first = list(manifest.classes[: args.classes])
    chosen = {index[name]: i for i, name in enumerate(first)}
    kept = [i for i, label in enumerate(train_set.targets) if label in chosen]
    train = DataLoader(Part(train_set, kept), args.batch, shuffle=True, drop_last=True)
    wanted = {name: i for i, name in enumerate(first)}
    # Tiny ImageNet has its validation images in one folder, their classes in a file: ImageFolder cannot read that.
    lines = (line.split("\t") for line in (root / "val/val_annotations.txt").read_text().splitlines())
    val = [(root / "val/images" / file, wanted[label]) for file, label, *_ in lines if label in wanted]
    whole = transforms.Compose(normal)
    model = initial_model(Init(spec, seed)).to(memory_format=torch.channels_last).to(args.device)
    # Constants, not the defaults of OptimizerSpec: a wrong default there must show as another accuracy.
    sgd = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.MultiStepLR(sgd, list(schedule(args).milestones), 0.1)
    for _ in range(args.epochs):
        model.train()
        for images, labels in train:
            labels = torch.tensor([chosen[int(label)] for label in labels])
            sgd.zero_grad()
            F.cross_entropy(forward(args, model, images), labels.to(args.device)).backward()
            sgd.step()
        rates.step()
    model.eval()
    hits = 0
    with torch.no_grad():
        for start in range(0, len(val), args.batch):
            part = val[start : start + args.batch]
            images = torch.stack([whole(datasets.folder.default_loader(str(path))) for path, _ in part])
            hits += sum((forward(args, model, images).argmax(1).cpu() == torch.tensor([y for _, y in part])).tolist())
    return hits / len(val)


def forward(args: argparse.Namespace, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits, float32 [n, classes]."""
    images = images.to(args.device, memory_format=torch.channels_last)
    kind = torch.device(args.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=args.precision == "bf16"):
        return model(images).float()


def schedule(args: argparse.Namespace) -> ScheduleSpec:
    # Drops at 5/8 and 7/8 of the epochs: at a high rate the accuracy of a single epoch says little.
    return ScheduleSpec(args.lr, args.epochs, (args.epochs * 5 // 8, args.epochs * 7 // 8), 0.1)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="Tiny ImageNet, as distributed")
    p.add_argument("--store", type=Path, required=True, help="folder for prepared data")
    p.add_argument("--routes", nargs="+", default=["resident", "ffcv", PLAIN], help="loaders, or 'plain PyTorch'")
    p.add_argument("--computes", nargs="+", metavar="WAY", help="plain, dense, sparse: compare these, one loader")
    p.add_argument("--density", type=float, default=1.0, help="kept weights, of largest initial magnitude (ours only)")
    p.add_argument("--classes", type=int, default=20)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=0.1)
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    try:
        manifest, folder = find_or_prepare(args.data, args.store)
        spec = ModelSpec("resnet18", args.classes, width=args.width)
        print(f"{manifest.name}, {args.classes} classes, {args.epochs} epochs, {args.precision}, {args.device}")
        for route in args.computes or args.routes:
            began, found = time.perf_counter(), []
            for seed in range(args.seeds):
                if args.computes:
                    source = open_data(manifest, folder, loader=args.routes[0])
                    found.append(ours(args, source, spec, seed, route))
                elif route == PLAIN:
                    found.append(plain(args, manifest, spec, seed))
                else:
                    found.append(ours(args, open_data(manifest, folder, loader=route), spec, seed))
            # One seed has no standard deviation.
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            each = " ".join(f"{a:.4f}" for a in found)
            seconds = (time.perf_counter() - began) / len(found)
            print(
                f"{route:<16}{each}   {statistics.mean(found):.4f} +- {spread:.4f}   {seconds:.0f} s each", flush=True
            )
    except InputError as error:
        print(f"parity.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
