"""Iterative magnitude pruning, the whole method in one file: train, prune, rewind, repeat.

    python examples/imp.py                                    # generated images, two minutes on a CPU core
    python examples/imp.py --data DIR --epochs 90 --lr 0.1    # DIR/train/<class>/ and DIR/val/<class>/

Each round prunes 20 % of the conv weights that are left, the smallest magnitudes over all layers, and trains the
rest from the initial weights (Frankle and Carbin, 2019).
"""

import argparse
import copy

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms as t

import fastprune


def generated(count: int) -> Dataset:
    """Noise over one pattern for each of ten classes."""
    patterns = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 10
    return TensorDataset(patterns[labels] + torch.randn(count, 3, 32, 32), labels)


def folder(path: str, *crop: object) -> Dataset:
    return torchvision.datasets.ImageFolder(path, t.Compose([*crop, t.ToTensor()]))


def train(pruner: fastprune.Pruner, data: Dataset, epochs: int, lr: float, device: str) -> None:
    # After each step pruned weights, and their momentum, are exactly 0.
    model = pruner.model
    optimizer = fastprune.MaskedSGD(model.parameters(), pruner, lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True, drop_last=True):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Dataset, device: str) -> float:
    model.eval()
    batches = [(model(x.to(device)).argmax(1) == y.to(device)).float() for x, y in DataLoader(data, batch_size=64)]
    return torch.cat(batches).mean().item()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="a folder of images (default: generated ones)")
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    torch.manual_seed(0)
    train_set, val_set, classes = generated(640), generated(160), 10
    if args.data:
        train_set = folder(f"{args.data}/train", t.RandomResizedCrop(224), t.RandomHorizontalFlip())
        val_set, classes = folder(f"{args.data}/val", t.Resize(256), t.CenterCrop(224)), len(train_set.classes)
    model = torchvision.models.resnet18(num_classes=classes).to(args.device)
    pruner, initial = fastprune.Pruner(model, kinds="conv"), copy.deepcopy(model.state_dict())
    for round in range(args.rounds + 1):
        if round:
            pruner.prune(0.2)
        model.load_state_dict(initial)  # rewind
        pruner.apply()  # pruned weights are 0 again
        train(pruner, train_set, args.epochs, args.lr, args.device)
        print(f"round {round}: density {pruner.density:.3f}, accuracy {accuracy(model, val_set, args.device):.3f}")


if __name__ == "__main__":
    main()
