"""Two ranks over gloo against one process that computes the same: each half of a batch with its own statistics."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastprune.pruning.masks import Mask
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

SPEC = ModelSpec("resnet18", 4, "imagenet", 8)
SGD = OptimizerSpec(batch_size=4, momentum=0.9, weight_decay=1e-3)
SCHEDULE = ScheduleSpec(0.1, 2, (1,), 0.1)


def batches(rank: int | None) -> list[tuple[Tensor, Tensor]]:
    """Three batches of 8 images, or one rank's half of each."""
    g = torch.Generator().manual_seed(0)
    rows = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    every = [(torch.randn(8, 3, 32, 32, generator=g), torch.randint(4, (8,), generator=g)) for _ in range(3)]
    return [(images[rows], labels[rows]) for images, labels in every]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        trainer = Trainer(initial_model(Init(SPEC, 0)))
        history = []
        for _ in range(2):  # train, prune, train on
            history += trainer.fit(batches(rank), batches(rank), SGD, SCHEDULE)
            trainer.prune(0.5)
        state = trainer.state() | {"keep": trainer.flat.mask}
        facts = [(m.train_loss, m.train_accuracy, m.val_loss) for m in history]
        torch.save((state, facts), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def one_process() -> tuple[dict[str, Tensor], list[float], Tensor]:
    """Plain PyTorch: two networks that share nothing but averaged gradients."""
    halves = [initial_model(Init(SPEC, 0)).to(memory_format=torch.channels_last).train() for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=1e-3, foreach=False) for m in halves]
    twin = Trainer(copy.deepcopy(halves[0]))  # for its flat layout and its prune step, which other tests hold
    losses, keep = [], Mask.dense(twin.flat.segments)
    for _ in range(2):
        for epoch in range(2):
            total = 0.0
            for number in range(3):
                for rank, model in enumerate(halves):
                    model.zero_grad()
                    images, labels = batches(rank)[number]
                    loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
                    loss.backward()
                    total += loss.item() * 4
                for a, b in zip(*(m.parameters() for m in halves), strict=True):
                    mean = (a.grad + b.grad) / 2
                    a.grad, b.grad = mean, mean.clone()
                for optimizer in optimizers:
                    optimizer.param_groups[0]["lr"] = SCHEDULE.lr_at(epoch)
                    optimizer.step()
                hold(halves, optimizers, keep)
            losses.append(total / 24)
            for a, b in zip(*(m.buffers() for m in halves), strict=True):
                b.copy_(a)
        twin.load_state({f"model.{k}": v for k, v in halves[0].state_dict().items()})
        twin.set_mask(keep)
        keep = twin.prune(0.5)
        hold(halves, optimizers, keep)
    return halves[0].state_dict(), losses, keep.keep.clone()


def hold(models, optimizers, mask: Mask) -> None:
    for model, optimizer in zip(models, optimizers, strict=True):
        named = dict(model.named_parameters())
        for name, kept in mask.tensors().items():
            p = named[name]
            p.data[~kept] = 0.0
            if p in optimizer.state:
                optimizer.state[p]["momentum_buffer"][~kept] = 0.0


def test_two_ranks_are_one_process_to_the_bit(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    (first, facts), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert facts == other
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    state, losses, keep = one_process()
    assert torch.equal(first["keep"], keep)
    for name, value in state.items():
        assert torch.equal(value, first[f"model.{name}"]), name
    assert [f[0] for f in facts] == losses
