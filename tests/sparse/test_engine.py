"""Trainings on kept weights alone: as the dense ones, resumed to the bit, and true to weights and masks of others."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.pruning.allocation import prune
from fastprune.pruning.masks import Mask
from fastprune.sparse import choice, cost
from fastprune.specs import EmaSpec, Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.models import initial_model
from fastprune.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("lanes")  # compiled once, in one process

SGD = OptimizerSpec(batch_size=16, momentum=0.9, weight_decay=1e-3)
SCHEDULE = ScheduleSpec(lr=0.05, epochs=3, milestones=(2,), gamma=0.1)


class Net(nn.Module):
    """Two blocks with batch norm; the second conv has a bias."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        if frozen:
            for p in (self.norm1.weight, self.norm2.bias, self.fc.bias):
                p.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.fc((x + self.norm2(self.conv2(x))).relu().mean((2, 3)))


class Varied(nn.Module):
    """With operations of torch between layers: a grouped conv with a mask, other activations, dropout, a VGG's head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.drop, self.conv2 = nn.Dropout(0.2), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(24, 12), nn.SiLU(), nn.Dropout(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        x = self.drop(x + self.norm2(self.grouped(x)).relu())
        return self.head(F.adaptive_avg_pool2d(F.silu(self.conv2(x)), (2, 2)).flatten(1))


class Batches:
    """Three batches an epoch, the last of an odd size, which depend on the epoch alone."""

    def __init__(self, seed: int = 0, sizes: tuple[int, ...] = (32, 32, 5), image: int = 8) -> None:
        self.seed, self.sizes, self.image, self.epoch = seed, sizes, image, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        torch.manual_seed(self.epoch)  # for dropout
        for size in self.sizes:
            labels = torch.randint(4, (size,), generator=g)
            images = torch.randn(size, 3, self.image, self.image, generator=g)
            yield images + labels.view(-1, 1, 1, 1) / 2, labels


TRAIN, VAL = Batches(), Batches(9)


def trainer(
    compute: str = "sparse",
    model: nn.Module | None = None,
    fraction: float = 0.7,
    make: Callable[[], nn.Module] = Net,
    **other,
) -> Trainer:
    if model is None:
        torch.manual_seed(0)
        model = make()
    made = Trainer(model, compute=compute, **other)
    made.prune(fraction)
    return made


def fit(t: Trainer, **other) -> list:
    return t.fit(TRAIN, VAL, SGD, other.pop("schedule", SCHEDULE), **other)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def check_pruned(t: Trainer) -> None:
    """Pruned weights and momentum are exactly +0."""
    for buffer in (t.flat.weight, t.flat.momentum):
        pruned = buffer[~t.flat.mask]
        assert not pruned.any()
        assert not pruned.signbit().any()


def check_alike(one: Trainer, other: Trainer, limit: float = 2e-3) -> None:
    """Rounding grows in training: after nine steps a weight is off by 1e-4 of the largest of its layer."""
    other_state = other.state()
    for name, value in one.state().items():
        off = (value.double() - other_state[name].double()).abs().max()
        assert off <= limit * max(value.double().abs().max().item(), 1e-2), name


# Against dense trainings


@pytest.mark.parametrize(("make", "nesterov"), [(Net, False), (Net, True), (Varied, False)])
def test_a_training_is_the_plain_one(make, nesterov):
    """Dropout included, which draws as in torch."""
    optimizer = OptimizerSpec(16, 0.9, 1e-3, nesterov, 0.1)
    both = [trainer(compute, make=make) for compute in ("sparse", "plain")]
    histories = [t.fit(TRAIN, VAL, optimizer, SCHEDULE) for t in both]
    assert [t.computed for t in both] == ["sparse", "plain"]
    for ours, theirs in zip(*histories, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-3)
        assert ours.lr == theirs.lr
    check_alike(*both)
    check_pruned(both[0])


def test_a_rate_of_dropout_that_changes_counts_as_in_a_plain_training():
    losses = []
    for compute in ("sparse", "plain"):
        t = trainer(compute, make=Varied)

        def change(metrics, t=t) -> None:
            t.model.drop.p = 0.8 - metrics.epoch / 4

        losses += [[m.train_loss for m in fit(t, on_epoch=change)]]
        t.model.drop.p = 0.0  # between trainings, too
        losses[-1] += [m.train_loss for m in fit(t)]
        assert t.computed == compute
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)


def test_clipping_other_decays_and_a_moving_average_are_the_plain_ones():
    optimizer = OptimizerSpec(16, 0.9, 1e-3, other_decays=(("norm", 0.5), ("bias", 0.1)), clip_grad_norm=0.1)
    both = [trainer(compute) for compute in ("sparse", "plain")]
    histories = [t.fit(TRAIN, VAL, optimizer, SCHEDULE, ema=EmaSpec(0.5, 2)) for t in both]
    assert [t.computed for t in both] == ["sparse", "plain"]
    for ours, theirs in zip(*histories, strict=True):
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-3)
        assert ours.ema_loss == pytest.approx(theirs.ema_loss, rel=1e-3)
        assert ours.ema_loss != ours.val_loss
    check_alike(*both)  # the average, too
    check_pruned(both[0])


def test_a_resnet_and_layers_of_all_kinds():
    both = []
    for compute in ("sparse", "plain"):
        model = initial_model(Init(ModelSpec("resnet18", 4, width=4), 0))
        made = Trainer(model, compute=compute, kinds=("conv", "linear"))
        assert "fc.weight" in {s.name for s in made.flat.segments}
        made.prune(0.8)
        both.append(made)
    images = Batches(image=32)
    # Layers with maps of one position see five numbers a channel in each third batch, so rounding grows with the rate:
    # 0.02 has parted the losses by 1e-3 on one CPU, 0.005 by 1e-7. Weights are not compared.
    losses = [[m.train_loss for m in t.fit(images, images, SGD, ScheduleSpec(0.005, 2))] for t in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    check_pruned(both[0])


def test_each_engine_goes_on_from_the_others_weights():
    mixed, plain = trainer(), trainer("plain")
    fit(plain)
    fit(mixed, stop=1)
    fit(mixed, start=1, stop=2, compute="plain")
    assert mixed.computed == "plain"
    fit(mixed, start=2)
    assert mixed.computed == "sparse"
    check_alike(mixed, plain)


def test_a_training_that_diverges_is_recorded_by_both():
    for compute in ("sparse", "plain"):
        t = trainer(compute)
        history = fit(t, schedule=ScheduleSpec(1e6, 3, (), 0.1))
        assert (t.computed, history[-1].diverged, len(history) < 3) == (compute, True, True)
        t.load_state({name: torch.zeros_like(value) for name, value in t.state().items()})


def test_a_nan_in_the_data_is_divergence():
    batches = list(TRAIN)
    batches[1][0][3, 1, 2, 2] = torch.nan
    history = trainer().fit(batches, VAL, SGD, SCHEDULE)
    assert len(history) == 1
    assert history[0].diverged


@pytest.mark.parametrize("sizes", [(1,), (17, 3), (15, 16, 33)], ids=str)
def test_batches_of_any_size(sizes):
    both = [trainer(compute) for compute in ("sparse", "plain")]
    batches = Batches(3, sizes)
    losses = [t.fit(batches, batches, SGD, ScheduleSpec(0.01, 2))[-1].train_loss for t in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_frozen_parameters_stay():
    both = []
    for compute in ("sparse", "plain"):
        torch.manual_seed(0)
        model = Net(frozen=True)
        before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        both.append(trainer(compute, model))
        fit(both[-1])
        for name, p in before.items():
            assert torch.equal(model.get_parameter(name), p)
    check_alike(*both)


def test_nothing_kept():
    t = trainer(fraction=1.0)
    history = fit(t)
    assert t.computed == "sparse"
    assert not history[-1].diverged
    check_pruned(t)


def test_a_loss_that_ignores_the_logits():
    t = trainer(loss=lambda logits, labels: torch.zeros((), requires_grad=True))
    before = t.state()
    t.fit(TRAIN, VAL, OptimizerSpec(16, 0.0, 0.0), SCHEDULE)
    after = t.state()
    assert_same(*({n: v for n, v in s.items() if n.endswith(("weight", "bias"))} for s in (before, after)))


# Weights, momentum and masks: one truth


def test_pull_and_push_change_nothing():
    t = trainer()
    fit(t)
    before, mask = t.state(), t.flat.mask.clone()
    assert t._chooser is not None
    engine = t._chooser.choose(images := next(iter(TRAIN))[0], len(images), forced=True)
    assert not isinstance(engine, str)
    engine.pull()
    engine._ahead = True
    engine.push()
    assert_same(t.state(), before)
    assert torch.equal(t.flat.mask, mask)


def test_steps_are_pushed_once_and_nothing_after():
    """What others write after a push is newer than what the engine has."""
    t = trainer()
    fit(t, stop=1)
    engine = t._chooser.choose(images := next(iter(TRAIN))[0], len(images), forced=True)
    engine.pull()
    t.flat.weight.mul_(2.0)
    expected = t.flat.weight.clone()
    engine.push()
    assert torch.equal(t.flat.weight, expected)


CHANGES: dict[str, Callable[[Trainer], object]] = {
    "prune": lambda t: t.prune(0.3),
    "other mask": lambda t: t.set_mask(prune(torch.rand(t.flat.mask.shape, generator=torch.Generator().manual_seed(1)),
                                             Mask.dense(t.flat.segments), 0.6)),
    "denser": lambda t: t.set_mask(None),
    "weights": lambda t: t.model.conv2.weight.data.mul_(0.5),
    "rewind": lambda t: t.rewind(),
    "state": lambda t: t.load_state(t.first),  # type: ignore[attr-defined]
    "mask in place": lambda t: next(iter(t.pruner.masks.values()))[:, 1:].fill_(False),
}  # fmt: skip


def prepared(compute: str) -> Trainer:
    t = trainer(compute)
    t.first = t.state()  # type: ignore[attr-defined]
    t.save_rewind_point()
    return t


@pytest.mark.parametrize("when", ["between", "last epoch", "each epoch", "batch"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_others_count_as_in_a_plain_training(change, when):
    """Between trainings, in on_epoch and in on_batch."""
    trained = []
    for compute in ("sparse", "plain"):
        t, apply = prepared(compute), CHANGES[change]
        seen: list[int] = []

        def on_epoch(metrics, t=t, apply=apply) -> None:
            check_pruned(t)
            if when == "each epoch" or metrics.epoch == 2:
                apply(t)

        def on_batch(images: int, t=t, apply=apply, seen=seen) -> None:
            seen.append(images)
            if len(seen) == 4:
                apply(t)

        fit(
            t,
            stop=2,
            on_epoch=on_epoch if "epoch" in when else None,
            on_batch=on_batch if when == "batch" else None,
        )
        if when == "between":
            apply(t)
            fit(t, start=2)
        if (change, when) != ("mask in place", "last epoch"):  # nothing has read the mask since
            check_pruned(t)
        assert t.computed == compute
        trained.append(t)
    assert torch.equal(trained[0].flat.mask, trained[1].flat.mask)
    check_alike(*trained, limit=1e-2)


@pytest.mark.parametrize(
    "when",
    ["on_epoch", "on_batch"],
)
def test_an_evaluation_within_a_training_is_of_the_present_weights(when):
    t, found = trainer(), []

    def change(_: object) -> None:
        t.prune(0.5)
        found.append((t.evaluate(VAL)[0], torch_loss(t.model)))

    fit(t, stop=1, **{when: change})
    for ours, exact in found:
        assert ours == pytest.approx(exact, rel=1e-5)


def torch_loss(model: nn.Module) -> float:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        losses = [(F.cross_entropy(model(x), y, reduction="sum").item(), len(y)) for x, y in VAL]
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


def test_an_interrupted_epoch_leaves_what_was_trained():
    steps: list[int] = []

    def stop(_: int) -> None:
        steps.append(1)
        if len(steps) == 2:
            raise Stop

    t = trainer()
    with pytest.raises(Stop):
        fit(t, report=stop)
    interrupted = t.state()
    check_pruned(t)
    # Two steps, seen by on_batch, which gets the weights of the moment.
    again, states = trainer(), []
    fit(again, on_batch=lambda _: states.append(again.state()), stop=1)
    assert_same(interrupted, states[1])
    fit(t)
    assert t.computed == "sparse"


@pytest.mark.parametrize("where", ["on_batch", "on_epoch"])
def test_an_interrupt_after_a_change_leaves_the_change(where):
    t = trainer()

    def stop(_: object) -> None:
        t.prune(0.5)
        raise Stop

    with pytest.raises(Stop):
        fit(t, **{where: stop})
    check_pruned(t)
    assert t.pruner.kept == round(0.3 * t.pruner.total) - round(0.5 * round(0.3 * t.pruner.total))


def test_an_interrupt_while_lists_are_made_leaves_the_weights(monkeypatch):
    """Between a tape and its values there is a moment at which all of them are 0."""
    t = trainer()
    fit(t, stop=1)
    before = t.state()
    t.prune(0.5)
    expected = t.state()
    select = torch.index_select

    def interrupted(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(torch, "index_select", interrupted)
    with pytest.raises(Stop):
        fit(t, start=1)
    monkeypatch.setattr(torch, "index_select", select)
    assert_same(t.state(), expected)
    assert before.keys() == expected.keys()
    monkeypatch.setattr("fastprune.sparse.engine.Tape", interrupted)
    t.prune(0.5)
    expected = t.state()
    with pytest.raises(Stop):
        fit(t, start=1)
    assert_same(t.state(), expected)


# Resuming, threads, processes


@pytest.mark.parametrize("make", [Net, Varied])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(make):
    whole, states = trainer(make=make), []
    history = fit(whole, on_epoch=lambda m: states.append(whole.state()))
    mask = Mask(whole.flat.mask.clone(), whole.flat.segments)
    torch.manual_seed(7)
    resumed = Trainer(make(), compute="sparse")
    resumed.load_state(states[0])
    resumed.set_mask(mask)
    rest = fit(resumed, start=1)
    assert_same(resumed.state(), whole.state())
    assert [(m.train_loss, m.val_loss) for m in rest] == [(m.train_loss, m.val_loss) for m in history[1:]]


@pytest.mark.parametrize("make", [Net, Varied])
def test_a_warm_trainer_is_a_new_one_to_the_bit(make):
    """No state is left of trainings before: not in buffers, not in lists of another mask, not of larger batches."""
    new, warm = trainer(make=make), trainer(make=make)
    start, mask = new.state(), Mask(new.flat.mask.clone(), new.flat.segments)
    fit(new)
    warm.prune(0.6)
    warm.fit(Batches(4, (80, 3)), VAL, SGD, ScheduleSpec(1e6, 1))  # diverges: NaN in all its buffers
    warm.load_state(start)
    warm.set_mask(mask)
    fit(warm)
    assert_same(warm.state(), new.state())


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("make", [Net, Varied])
def test_threads_change_no_bit(make, threads):
    states = []
    for number in (1, 2, 3):
        threads(number)
        t = trainer(make=make)
        fit(t, stop=1)
        states.append(t.state())
        t.close()
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_threads_may_change_between_epochs(threads):
    one, changed = trainer(), trainer()
    fit(one)
    fit(changed, on_epoch=lambda m: threads(1 + m.epoch % 2))
    assert_same(one.state(), changed.state())
    changed.close()


def test_trainings_with_new_masks_leave_no_threads_and_no_memory(threads):
    gc.collect()
    gc.disable()
    try:
        threads(3)
        before, t, tapes = threading.active_count(), trainer(), []
        for _ in range(4):
            t.prune(0.2)
            fit(t, stop=1)
            tapes.append(weakref.ref(t._chooser._made[1].tape))
        assert [ref() is None for ref in tapes] == [True] * 3 + [False]
        assert threading.active_count() == before + 2
        t.close()
        assert threading.active_count() == before
        assert tapes[-1]() is None
        fit(t, stop=1)  # goes on after `close`
        left = weakref.ref(t.flat), weakref.ref(t._chooser._made[1].tape)
        t.close()
        del t
        assert [ref() for ref in left] == [None, None]
    finally:
        gc.enable()


def test_a_trainer_closed_within_a_training_goes_on():
    one, closed = trainer(), trainer()
    fit(one)
    fit(closed, on_epoch=lambda m: closed.close())
    assert_same(one.state(), closed.state())


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        states = {}
        for compute in ("sparse", "plain"):
            t = trainer(compute)
            halves = [(x[16 * rank : 16 * rank + 16], y[16 * rank : 16 * rank + 16]) for x, y in Batches(0, (32, 32))]
            t.fit(halves, halves, SGD, SCHEDULE)
            assert t.computed == compute
            states[compute] = t.state()
        torch.save(states, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients(tmp_path):
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first["sparse"], second["sparse"])
    for name, value in first["plain"].items():
        off = (value.double() - first["sparse"][name].double()).abs().max()
        assert off <= 2e-3 * max(value.double().abs().max().item(), 1e-2), name


# What it can not compute


class Counted(nn.Module):
    """With a batch norm of vectors, whose counter torch's operation does not raise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm1d(9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x).relu().mean((2, 3))))


class Tokens(nn.Module):
    """What torch gives is no map, and another layer is computed before torch reads it again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 9, 3, padding=1), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        tokens = x.flatten(2).softmax(2)
        return self.fc((tokens * x.mean((2, 3))[:, :, None]).sum(2))


class Signs(nn.Module):
    """What torch gives are maps, but not of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.fc = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(9, 9, 1), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        positive = x > 0
        return self.fc((self.other(x) * positive).mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 9, 3), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.flatten(2)).relu().mean(2))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(self.conv(x)).relu().mean((2, 3)))


class PerPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm of vectors": (Counted, r"does not know aten.batch_norm \(not of maps\)"),
    "tokens": (Tokens, "does not know aten.softmax before other layers"),
    "signs": (Signs, "does not know aten.gt before other layers"),
    "sequences": (Sequence, r"does not know masks of 3 dimensions \(conv.weight\)"),
    "used twice": (Twice, "conv.weight is used 2 times in the forward"),
    "per pixel": (PerPixel, "does not know the shape of the output"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_the_engine_does_not_know(what):
    make, reason = UNSUPPORTED[what]
    t = trainer(model=make())
    with pytest.raises(ValueError, match=reason) as caught:
        fit(t)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("compute='sparse' is not possible here: ")


def test_pruned_biases_are_not_known():
    t = trainer(kinds=("conv", "bias"))
    with pytest.raises(ValueError, match=r"does not know masks of 1 dimensions \(conv2.bias\)"):
        fit(t)


def test_auto_computes_densely_what_the_engine_does_not_know(monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST", 0)
    t = trainer("auto", Counted())
    fit(t, stop=1)
    assert t.computed == "dense"
    assert "does not know aten.batch_norm" in t.reason


@pytest.mark.parametrize(
    ("other", "reason"), [({"precision": "bf16"}, "precision bf16"), ({"compile": "eager"}, "compiled")], ids=str
)
def test_sparse_is_float32_in_python(other, reason):
    t = trainer(**other)
    with pytest.raises(ValueError, match=f"not possible here: {reason}"):
        fit(t)


def test_auto_says_why_it_computes_densely():
    t = trainer("auto")
    fit(t, stop=1)
    assert (t.computed, t.reason) == ("dense", "a training of 9 steps is too short")
    t = trainer("auto", fraction=0.1)
    fit(t, stop=1)
    assert (t.computed, t.reason) == ("dense", "at density 0.90 dense is cheaper")


def test_auto_computes_sparsely_where_that_pays(monkeypatch):
    monkeypatch.setattr(choice, "_FEWEST", 0)
    monkeypatch.setattr(cost, "SECONDS_TO_START", 0.0)
    monkeypatch.setattr(cost, "estimate", lambda program, keep, images: (1.0, 2.0))
    t = trainer("auto")
    fit(t, stop=1)
    assert (t.computed, t.reason) == ("sparse", "")
    monkeypatch.setattr(cost, "estimate", lambda program, keep, images: (2.0, 1.0))
    fit(t, stop=1)
    assert (t.computed, t.reason) == ("dense", "at density 0.30 dense is cheaper")


def test_an_unknown_compute_is_refused():
    with pytest.raises(ValueError, match="unknown compute 'quick': choose one of auto, dense, sparse, plain"):
        Trainer(Net(), compute="quick")
    t = trainer()
    with pytest.raises(ValueError, match="unknown compute 'quick': choose one of auto, dense, sparse, plain"):
        fit(t, compute="quick")


def test_training_may_change_the_size_of_images():
    """The first image of another size decides anew; weights and momentum go on."""
    batches = [*Batches(0, (5,)), *Batches(0, (5,), 16), *Batches(0, (5,))]
    ours, plain = trainer(), trainer("plain")
    [m], [n] = (t.fit(batches, VAL, SGD, SCHEDULE, stop=1) for t in (ours, plain))
    assert ours.computed == "sparse"
    assert m.train_loss == pytest.approx(n.train_loss, rel=1e-3)
    check_pruned(ours)


def test_validation_may_have_other_sizes():
    """As plain trainings: networks with a mean over all positions take any."""
    histories = [t.fit(TRAIN, Batches(9, image=16), SGD, SCHEDULE) for t in (trainer(), trainer("plain"))]
    assert histories[0][-1].val_loss == pytest.approx(histories[1][-1].val_loss, rel=1e-3)
