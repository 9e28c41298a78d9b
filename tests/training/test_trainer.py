"""The Trainer against plain PyTorch, and what a state brings back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import magnitude_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training.flat import FlatParams
from fastprune.training.models import build, initial_model
from fastprune.training.trainer import Trainer
from tests.fakes import Epochs

SPEC = ModelSpec("resnet18", 4, "imagenet", 8)
SGD = OptimizerSpec(batch_size=8, momentum=0.9, weight_decay=1e-3)
SCHEDULE = ScheduleSpec(lr=0.1, epochs=4, milestones=(2, 3), gamma=0.1)


def initial_state(seed: int = 0) -> dict[str, torch.Tensor]:
    return {f"model.{k}": v for k, v in initial_model(Init(SPEC, seed)).state_dict().items()}


def trainer(precision: str = "fp32", device="cpu", compute: str = "auto") -> Trainer:
    made = Trainer(build(SPEC), device=device, precision=precision, compile=False, compute=compute)
    made.load_state(initial_state())
    return made


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_width_64_is_torchvisions_network_draw_for_draw():
    import torchvision

    torch.manual_seed(5)
    theirs = torchvision.models.resnet18(num_classes=7)
    ours = initial_model(Init(ModelSpec("resnet18", 7), 5))
    assert same(theirs.state_dict(), ours.state_dict())


def test_initial_model_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initial_model(Init(SPEC, 9))
    assert torch.equal(torch.rand(3), expected)


def plain_loop(model: nn.Module, train, mask: dict[str, torch.Tensor], schedule=SCHEDULE) -> list[float]:
    """SGD with masks as anyone would write it: weights and momentum times the mask after each step; loss by epoch."""
    model.to(memory_format=torch.channels_last).train()
    named = dict(model.named_parameters())
    sgd = torch.optim.SGD(named.values(), lr=schedule.lr, momentum=SGD.momentum, weight_decay=SGD.weight_decay)
    decay = torch.optim.lr_scheduler.MultiStepLR(sgd, schedule.milestones, schedule.gamma)
    losses = []
    for name, keep in mask.items():
        named[name].data[~keep] = 0
    for epoch in range(schedule.epochs):
        train.set_epoch(epoch)
        for images, labels in train:
            sgd.zero_grad()
            loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            sgd.step()
            for name, keep in mask.items():
                named[name].data[~keep] = 0
                sgd.state[named[name]]["momentum_buffer"][~keep] = 0
        losses.append(loss.item())
        decay.step()
    return losses


def test_a_masked_run_on_the_device_is_plain_pytorchs(device, monkeypatch):
    """Three steps in float32, compiled on a GPU; on a CPU the next test wants more."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # A low rate: an untrained ResNet enlarges rounding. Weights 1e-6 apart give losses that differ by 2e-5 in the third
    # step, by 0.03 at a rate of 0.05; without momentum by 0.03 at this one (measured on a CPU).
    spec, schedule = ModelSpec("resnet18", 10, width=16), ScheduleSpec(5e-4, 3, (), 0.1)
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 64, 64, generator=g).to(device), torch.arange(32, device=device) % 10

    class Batch(list):
        def set_epoch(self, epoch: int) -> None: ...

    ours = Trainer(initial_model(Init(spec, 0)), device=device)
    theirs = initial_model(Init(spec, 0)).to(device)
    dense = Mask.dense(ours.flat.segments)
    mask = prune(torch.rand(dense.keep.shape, generator=g), dense, 0.8)
    ours.set_mask(mask)
    keep = {name: kept.to(device) for name, kept in mask.tensors().items()}
    batch = Batch([(images, labels)])
    history = ours.fit(batch, batch, SGD, schedule)
    losses = plain_loop(theirs, batch, keep, schedule)
    assert [m.train_loss for m in history] == pytest.approx(losses, abs=1e-3)
    for name, kept in keep.items():
        pruned = ours.model.get_parameter(name).detach()[~kept]
        assert not pruned.any()
        assert not torch.signbit(pruned).any()


@pytest.mark.parametrize("compute", ["plain", "dense"])
def test_a_network_whose_shortcut_onednn_overruns_trains_as_contiguous(compute):
    """Width 4: the shortcut of its second stage has four channels and a stride. Contiguous, oneDNN has it right."""
    spec = ModelSpec("resnet18", 4, "imagenet", 4)
    ours, theirs = Trainer(initial_model(Init(spec, 0)), compute=compute), initial_model(Init(spec, 0))
    g = torch.Generator().manual_seed(1)
    batch = torch.randn(8, 3, 64, 64, generator=g), torch.arange(8) % 4
    ours.fit([batch], [batch], SGD, ScheduleSpec(lr=0.1, epochs=1))
    theirs.train()
    F.cross_entropy(theirs(batch[0]), batch[1]).backward()
    for name in ("layer2.0.downsample.0.weight", "layer1.0.conv1.weight"):
        weight = theirs.get_parameter(name)
        expected = weight - 0.1 * (weight.grad + SGD.weight_decay * weight)
        torch.testing.assert_close(ours.model.get_parameter(name), expected, rtol=1e-3, atol=1e-5)


def test_imp_in_thirty_lines_of_plain_pytorch_finds_the_same_masks_and_weights():
    ours, initial = trainer(compute="plain"), initial_state()
    mask = Mask.dense(ours.flat.segments)
    theirs_keep: dict[str, torch.Tensor] = {}
    for _ in range(4):
        ours.load_state(initial)
        ours.set_mask(mask)
        ours.fit(Epochs(), Epochs(9), SGD, SCHEDULE)
        weights = {k.removeprefix("model."): v for k, v in ours.state().items()}
        mask = prune(magnitude_scores(weights, mask), mask, 0.5)

        theirs = initial_model(Init(SPEC, 0))
        plain_loop(theirs, Epochs(), theirs_keep)
        convs = {n: p.detach() for n, p in theirs.named_parameters() if p.dim() == 4}
        keep = {n: theirs_keep.get(n, torch.ones_like(w, dtype=torch.bool)) for n, w in convs.items()}
        every = torch.cat([convs[n].abs().flatten().masked_fill(~keep[n].flatten(), math.inf) for n in convs])
        n_prune = round(0.5 * sum(int(k.sum()) for k in keep.values()))
        gone = torch.zeros(every.numel(), dtype=torch.bool)
        gone[every.argsort(stable=True)[:n_prune]] = True
        parts = gone.split([w.numel() for w in convs.values()])
        theirs_keep = {n: keep[n] & ~p.view(convs[n].shape) for n, p in zip(convs, parts, strict=True)}

        for name, value in theirs.state_dict().items():
            assert torch.equal(value, weights[name]), name
        for name, kept in mask.tensors().items():
            assert torch.equal(kept, theirs_keep[name]), name


def test_pruned_weights_and_momentum_are_positive_zero_after_every_step(device):
    t = trainer(device=device)
    mask = prune(
        magnitude_scores(t.flat.packed(t.flat.weight), Mask.dense(t.flat.segments)), Mask.dense(t.flat.segments), 0.7
    )
    t.set_mask(mask)
    kept = mask.keep.to(device)
    pruned = ~kept
    seen = 0

    def look(_: int) -> None:
        nonlocal seen
        seen += 1
        for buffer in (t.flat.weight, t.flat.momentum):
            assert not buffer[pruned].any()
            assert not torch.signbit(buffer[pruned]).any()
            assert buffer[kept].any()

    t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, on_batch=look)
    assert seen == 12
    state = t.state()
    for name, keep in mask.tensors().items():
        for kind in ("model", "momentum"):
            assert not state[f"{kind}.{name}"][~keep].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("at", [1, 3])
def test_resumed_is_uninterrupted_bit_for_bit(precision, at):
    mask = prune(torch.rand(Mask.dense(trainer().flat.segments).keep.shape), Mask.dense(trainer().flat.segments), 0.3)
    whole = trainer(precision)
    whole.set_mask(mask)
    expected = whole.fit(Epochs(), Epochs(9), SGD, SCHEDULE)
    first = trainer(precision)
    first.set_mask(mask)
    got = first.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=at)
    second = trainer(precision)
    second.load_state(copy.deepcopy(first.state()))
    second.set_mask(mask)
    got += second.fit(Epochs(), Epochs(9), SGD, SCHEDULE, start=at)
    assert same(second.state(), whole.state())
    assert [(m.epoch, m.lr, m.train_loss, m.val_accuracy) for m in got] == [
        (m.epoch, m.lr, m.train_loss, m.val_accuracy) for m in expected
    ]


def test_a_used_trainer_equals_a_fresh_one():
    used, fresh = trainer(), trainer()
    used.set_mask(prune(torch.rand(used.flat.weight.shape), Mask.dense(used.flat.segments), 0.5))
    used.fit(Epochs(3), Epochs(9), SGD, SCHEDULE)
    used.load_state(initial_state())
    used.set_mask(None)
    for t in (used, fresh):
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE)
    assert same(used.state(), fresh.state())


def test_rewinding_restores_weights_statistics_and_momentum(device):
    t = trainer(device=device)
    initial = t.state()
    t.fit(Epochs(), Epochs(9), SGD, SCHEDULE)
    changed = t.state()
    for kind in ("model.conv1.weight", "model.bn1.running_mean", "model.fc.bias", "momentum.conv1.weight"):
        assert not torch.equal(initial[kind], changed[kind])
    t.load_state(initial)
    assert same(t.state(), initial)
    t.load_state(changed, momentum=False)
    assert not t.flat.momentum.any()
    assert torch.equal(t.state()["model.bn1.running_var"], changed["model.bn1.running_var"])


def test_divergence_is_recorded_and_ends_the_run(device):
    t = trainer(device=device)
    history = t.fit(Epochs(), Epochs(9), SGD, ScheduleSpec(1e30, 4, (), 0.1))
    assert history[-1].diverged
    assert len(history) < 4


def test_warmup_rises_from_zero_within_the_epochs():
    schedule = ScheduleSpec(lr=0.4, epochs=10, milestones=(5,), gamma=0.1, warmup_epochs=2)
    assert [schedule.lr_at(0), schedule.lr_at(0, 0.5), schedule.lr_at(1, 0.5)] == pytest.approx([0.0, 0.1, 0.3])
    assert [schedule.lr_at(2), schedule.lr_at(4), schedule.lr_at(5)] == pytest.approx([0.4, 0.4, 0.04])


def test_schedules_are_torchs():
    """Epoch by epoch, as torch's schedulers give them; a linear warmup from a fraction, at the epochs' starts."""
    lr, epochs, warm = 0.5, 12, 3
    optimizer = torch.optim.lr_scheduler
    cases = {
        ScheduleSpec(lr, epochs, (4, 8), 0.3): lambda o: optimizer.MultiStepLR(o, [4, 8], 0.3),
        ScheduleSpec(lr, epochs, decay="cosine", lr_min=0.01): lambda o: optimizer.CosineAnnealingLR(o, epochs, 0.01),
        ScheduleSpec(lr, epochs, gamma=0.9, decay="exponential"): lambda o: optimizer.ExponentialLR(o, 0.9),
        ScheduleSpec(lr, epochs, (), 0.9, warm, "cosine", 0.01, "linear", 0.1): lambda o: optimizer.SequentialLR(
            o,
            [optimizer.LinearLR(o, 0.1, 1.0, warm), optimizer.CosineAnnealingLR(o, epochs - warm, 0.01)],
            milestones=[warm],
        ),
        ScheduleSpec(lr, epochs, (), 0.9, warm, "exponential", 0.0, "constant", 0.1): lambda o: optimizer.SequentialLR(
            o, [optimizer.ConstantLR(o, 0.1, warm), optimizer.ExponentialLR(o, 0.9)], milestones=[warm]
        ),
    }
    for schedule, make in cases.items():
        sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
        theirs, scheduler = [], make(sgd)
        for _ in range(epochs):
            theirs.append(sgd.param_groups[0]["lr"])
            sgd.step()
            scheduler.step()
        assert [schedule.lr_at(e) for e in range(epochs)] == pytest.approx(theirs), schedule
    with pytest.raises(ValueError, match="unknown decay 'cos': choose one of multistep, cosine, exponential"):
        ScheduleSpec(lr, epochs, decay="cos")


def test_a_loader_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        trainer().fit([], Epochs(), SGD, SCHEDULE)


@pytest.mark.parametrize(("number", "label"), [(0, 4), (2, 7), (1, -1)])
def test_labels_outside_the_classes_are_refused(number, label):
    batches = list(Epochs())
    batches[number][1][3] = label
    with pytest.raises(ValueError, match=r"labels reach from -?\d to \d, but the network has 4 classes"):
        trainer().fit(batches, Epochs(9), SGD, SCHEDULE)


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    t = trainer()
    monkeypatch.setattr(t.model, "forward", full)
    message = "out of memory on cpu with batches of 8 x 3 x 32 x 32 in fp32: lower the batch size or the image size, or"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE)


def test_a_state_of_another_model_is_refused():
    state = initial_state()
    state["model.conv1.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="conv1"):
        trainer().load_state(state)


BREAKERS = {
    "assign": lambda m: m.load_state_dict(m.state_dict() | {"conv1.weight": m.conv1.weight.clone()}, assign=True),
    "to dtype": lambda m: m.double(),
    "new parameter": lambda m: setattr(m.fc, "bias", nn.Parameter(torch.zeros(4))),
    "zero_grad": lambda m: m.zero_grad(set_to_none=True),
}


@pytest.mark.parametrize("how", BREAKERS)
def test_broken_aliasing_is_noticed(how):
    t = trainer()
    BREAKERS[how](t.model)
    with pytest.raises(RuntimeError, match="no view of the flat buffer"):
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE)


def test_flat_layout():
    flat = FlatParams(build(SPEC))
    model_convs = {n: p for n, p in build(SPEC).named_parameters() if p.dim() == 4}
    assert [s.name for s in flat.segments] == list(model_convs)
    assert flat.total == sum(p.numel() for p in model_convs.values()) == int(flat.mask.sum())
    assert all(s.offset % 64 == 0 for s in flat.segments)
    assert len(flat.other_segments) == len(list(build(SPEC).parameters())) - len(model_convs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_thirty_rounds_compile_once(precision):
    """Compiled for each shape of training and evaluation once; new masks, rates and hyperparameters compile nothing."""
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    counters.clear()
    plain = trainer(precision, compute="plain")
    compiled = Trainer(build(SPEC), precision=precision, compile="aot_eager")
    compiled.load_state(initial_state())
    for made in (plain, compiled):
        made.save_rewind_point()
        made.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1)
    assert same(plain.state(), compiled.state())
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for round in range(3):
            compiled.prune(0.5)
            compiled.rewind()
            schedule = ScheduleSpec(lr=0.1 / (round + 1), epochs=1, milestones=(), gamma=0.1, warmup_epochs=round % 2)
            compiled.fit(Epochs(), Epochs(9), OptimizerSpec(8, 0.8, 1e-2, True, 0.1), schedule)
    assert counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_how_a_training_computes_is_said_where_there_was_a_choice():
    for precision, compute, says in (
        ("fp32", "auto", "computes densely: a training of 12 steps is too short"),
        ("bf16", "auto", "computes densely: precision bf16"),
        ("fp32", "plain", ""),
    ):
        t = trainer(precision, compute=compute)
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1)
        assert t.described() == ""  # dense
        t.prune(0.8)
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1)
        assert t.described() == says


def test_a_training_goes_on_as_before_or_as_it_can():
    t = trainer("bf16", compute="plain")
    before = t.state()
    with pytest.raises(ValueError, match="compute='sparse' is not possible here: precision bf16"):
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1, compute="sparse")
    assert same(t.state(), before)
    t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1, compute="sparse", strict=False)
    assert t.resumed("sparse") == "computed sparse until its checkpoint, plain from here (precision bf16)"
    with pytest.raises(ValueError, match="unknown compute 'fast': choose one of auto, "):
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, compute="fast")
    for asked, says in (("auto", ""), ("dense", ""), ("sparse", "goes on dense, as until its checkpoint, not sparse")):
        t = trainer(compute=asked)
        t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1, compute="dense", strict=False)
        assert (t.computed, t.resumed("dense")) == ("dense", says)
    t = trainer("bf16", compute="dense")  # where dense is plain, neither contradicts the other
    t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1, compute="plain", strict=False)
    assert t.resumed("plain") == ""


def test_marked_weights_and_statistics_come_back(device):
    t = trainer("fp16", device)
    t.save_rewind_point()
    initial = t.state()
    t.fit(Epochs(), Epochs(9), SGD, SCHEDULE, stop=1)
    mask = t.prune(0.5)
    assert mask.kept == mask.total - round(0.5 * mask.total)
    t.rewind()
    after = t.state()
    for name, keep in mask.tensors().items():
        initial[f"model.{name}"] = torch.where(keep.cpu(), initial[f"model.{name}"], 0.0)
    assert same(after, initial)


class Segmenter(nn.Module):
    """Logits per pixel, [B, 3, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


def test_labels_per_pixel():
    """An image counts with the fraction of its labelled pixels that is right."""
    model = Segmenter()
    with torch.no_grad():
        model.conv.weight.copy_(torch.eye(3)[:, :, None, None])
        model.conv.bias.zero_()
    made = Trainer(model)
    images = F.one_hot(torch.tensor([[[0, 1], [2, 0]], [[1, 1], [1, 1]]]), 3).permute(0, 3, 1, 2).float()
    labels = torch.tensor(
        [
            [[0, 1], [0, -100]],
            [
                [
                    1,
                    1,
                ],
                [2, 2],
            ],
        ]
    )
    loss, accuracy, top5 = made.evaluate([(images, labels)])
    assert accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert top5 is None
    assert loss == pytest.approx(F.cross_entropy(model(images), labels).item())
    with pytest.raises(ValueError, match="labels reach from 0 to 7"):
        Trainer(Segmenter()).evaluate([(images, torch.tensor([[[0, 1], [7, 0]], [[1, 1], [1, 1]]]))])


def test_labels_that_are_probabilities():
    """As mixup gives them: the right class is the most likely one."""
    made = trainer()
    images = torch.randn(8, 3, 32, 32)
    classes, mixed = torch.arange(8) % 4, torch.full((8, 4), 0.1)
    mixed[torch.arange(8), classes] = 0.7
    exact, accuracy, _ = made.evaluate([(images, classes)])
    loss, same_accuracy, _ = made.evaluate([(images, mixed)])
    assert accuracy == same_accuracy
    made.model.eval()
    logits = made.model(images.to(memory_format=torch.channels_last))
    assert loss == pytest.approx(F.cross_entropy(logits, mixed).item(), rel=1e-6)
    assert loss != exact
    history = made.fit([(images, mixed)], [(images, classes)], SGD, ScheduleSpec(0.01, 1))
    assert history[0].train_loss == pytest.approx(F.cross_entropy(_train_logits(images), mixed).item(), rel=1e-5)


def _train_logits(images):
    return trainer().model.train()(images.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_of_the_users(precision):
    """Twice the loss at half the rate makes the same step; label smoothing is the loss's own matter."""
    batch = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    ours = trainer(precision)
    other = Trainer(build(SPEC), precision=precision, loss=lambda logits, labels: 2 * F.cross_entropy(logits, labels))
    other.load_state(initial_state())
    plain = OptimizerSpec(8, momentum=0.0, weight_decay=0.0)
    ours.fit(batch, batch, plain, ScheduleSpec(0.1, 1))
    smoothed = OptimizerSpec(8, momentum=0.0, weight_decay=0.0, label_smoothing=0.3)
    history = other.fit(batch, batch, smoothed, ScheduleSpec(0.05, 1))
    for (name, a), b in zip(ours.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = 2 * F.cross_entropy(_train_logits(batch[0][0]), batch[0][1]).item()
    assert history[0].train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [(lambda out: {"out": out}, "the model returns dict"), (lambda out: out.sum(1), "the model returns 1 dimensions")],
)
def test_outputs_that_are_no_logits_are_refused(wrap, words):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(SPEC)

        def forward(self, x):
            return wrap(self.inner(x))

    with pytest.raises(ValueError, match=words):
        Trainer(Wrapped()).evaluate([(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])


def test_a_warm_up_needs_a_length():
    batch = (torch.randn(4, 3, 32, 32), torch.arange(4))
    with pytest.raises(ValueError, match="needs a length"):
        trainer().fit(iter([batch]), [batch], SGD, ScheduleSpec(0.1, 2, warmup_epochs=1))
    trainer().fit(iter([batch]), [batch], SGD, ScheduleSpec(0.1, 1))
