"""Whole networks on a tape against autograd in float64: loss, all gradients, statistics; any batch, any structure."""

import copy
import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.sparse.conv import tile_vectors
from fastprune.sparse.planes import Threads
from fastprune.sparse.program import (
    Add,
    Conv,
    Linear,
    MaxPool,
    Mean,
    Name,
    Norm,
    Program,
    Relu,
    Torch,
    Value,
    fuse,
    lower,
    map_leaves,
)
from fastprune.sparse.tape import Tape
from fastprune.specs import ModelSpec
from fastprune.training.models import build

pytestmark = pytest.mark.xdist_group("lanes")  # compiled once, in one process

LIMIT = 1e-4
"""Allowed error of a gradient, relative in norm; float32 in torch is off by 1e-6 to 4e-5."""

SGD = {"momentum": 0.9, "weight_decay": 1e-3, "lr": 0.05}


class Plain(nn.Module):
    """Convs with bias, without batch norm, with pooling and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.hidden, self.fc = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = self.conv2(x).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


class Shared(nn.Module):
    """Values with several readers: pre-activation, a sum of a value with itself, a conv that two operations read, a
    value that a conv, a batch norm and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.down = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.last, self.fc = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())  # read by norm1 and by the sum
        x = x + x
        y = self.conv3(x)
        x = self.norm3(y) + y.relu() + x  # x: read by conv3 and here, y: by norm3 and a ReLU
        x = F.max_pool2d(x, 3, 1, 1) + x
        return self.fc((self.last(x) + self.down(x)).relu().mean((2, 3)))


class Ends(nn.Module):
    """A batch norm of the images, its own input as its residual, a norm whose sum nothing follows, no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm2, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.norm0(x))
        x = self.norm1(x) + x
        y = self.conv2(x)
        x = self.norm2(y) + x
        return self.conv3(x.relu() + y).mean((2, 3))


class Mixed(nn.Module):
    """What torch computes between layers with kernels: a grouped conv with a mask, layers with weights and without,
    several results, a frozen weight, a constant, sizes; a gradient that comes from both sides, and one that ends."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.gate, self.scale = nn.Linear(16, 16), nn.Parameter(torch.ones(16, 1, 1))
        self.frozen = nn.Parameter(torch.full((16, 1, 1), 0.5), requires_grad=False)
        self.conv2, self.hidden = nn.Conv2d(16, 6, 3, padding=1), nn.Linear(24, 24, bias=False)
        self.norm3, self.fc = nn.BatchNorm1d(24, track_running_stats=False), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = F.silu(self.norm1(self.conv1(x)))
        y = self.norm2(self.grouped(x)).relu()
        x = torch.cat((x, y), 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None] * self.scale + self.frozen
        y = F.gelu(self.conv2(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).view(6, 1, 1)
        x = F.adaptive_avg_pool2d(y + x.detach()[:, :6], (2, 2)).view(batch, -1)
        return self.fc(self.norm3(self.hidden(x)).tanh())


def resnet(name: str, width: int, stem: str = "imagenet") -> nn.Module:
    return build(ModelSpec(name, 4, stem, width))


MODELS = {
    "resnet18": lambda: resnet("resnet18", 4),
    "cifar stem": lambda: resnet("resnet18", 4, "cifar"),
    "plain": Plain,
    "shared": Shared,
    "ends": Ends,
    "mixed": Mixed,
}
SIZES = {"resnet18": 32, "cifar stem": 32}
COVERED = {"plain": {"hidden.weight"}, "mixed": {"hidden.weight"}}
"""Linear layers with masks."""


class Run:
    """A model with masks on a tape, and its copy in float64 in torch."""

    def __init__(
        self,
        model: nn.Module,
        size: int = 8,
        density: float = 0.3,
        linear: Sequence[str] = (),
        threads: int = 1,
        program: Program | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.model = model
        for name, p in model.named_parameters():
            if p.dim() == 1 and "weight" in name:
                p.data += 0.3 * torch.randn(p.shape, generator=g)
            elif p.dim() == 1:
                p.data = 0.3 * torch.randn(p.shape, generator=g)
        self.parameters = dict(model.named_parameters())
        covered = [n for n, p in self.parameters.items() if p.dim() == 4 or n in linear]
        self.masks = {}
        for name in covered:
            p = self.parameters[name]
            self.masks[name] = torch.rand(p.shape, generator=g) < density
            p.data.mul_(self.masks[name])
        self.exact = copy.deepcopy(model).double()
        self.program = program or fuse(lower(model, torch.zeros(2, 3, size, size), train=True))
        self.gradients = {
            n: torch.full_like(p, torch.nan)
            for n, p in self.parameters.items()
            if n not in self.masks and p.requires_grad
        }
        keep = {n: self._stored(m).contiguous().numpy() for n, m in self.masks.items()}
        self.tape = Tape(self.program, self.parameters | dict(model.named_buffers()), self.gradients, keep, threads)
        for name, span in self.tape.spans.items():
            self.tape.values[span] = self._stored(self.parameters[name].detach())[torch.from_numpy(keep[name])]
        self.size, self.g, self.keep = size, g, keep
        self.momentum: dict[str, Tensor] = {}

    @staticmethod
    def _stored(weight: Tensor) -> Tensor:
        """[O, KH, KW, I]"""
        return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight[:, None, None]

    def kept(self, name: str, weight: Tensor) -> Tensor:
        return self._stored(weight)[torch.from_numpy(self.keep[name])]

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(4, (images,), generator=self.g)
        x = torch.randn(images, 3, self.size, self.size, generator=self.g)
        return x + labels.view(-1, 1, 1, 1) / 2, labels

    def step(self, images: int) -> None:
        """Forward and backward of both; compares."""
        x, labels = self.batch(images)
        with torch.no_grad():
            logits = self.tape.forward(x.contiguous(memory_format=torch.channels_last), True)
        loss = F.cross_entropy(logits.requires_grad_(), labels)
        with torch.no_grad():
            self.tape.backward(torch.autograd.grad(loss, logits)[0])
        with torch.no_grad():
            exact = F.cross_entropy(self.exact.train()(x.double()), labels)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        self.exact.zero_grad()
        F.cross_entropy(self.chosen(x.double()), labels).backward()
        for name, p in self.exact.named_parameters():
            assert p.grad is not None or not p.requires_grad
            if p.grad is None:
                continue
            if name in self.keep:
                got, expected = self.tape.kept_gradients[self.tape.spans[name]], self.kept(name, p.grad)
            else:
                got, expected = self.gradients[name], p.grad
            error = (got.double() - expected).norm().item() / max(expected.norm().item(), 1e-6)
            assert error <= LIMIT, (name, error)
        self.check_statistics()
        self.check_borders()

    def chosen(self, x: Tensor) -> Tensor:
        """The copy's output, but with the tape's choice of maxima and of what is positive.

        Rounding turns some unit of a network on or off in one batch of ten, in torch as here, which changes gradients
        by a hundredth: all else can then be compared exactly. A choice may differ where both values are about equal.
        """
        known = dict(self.exact.named_parameters()) | dict(self.exact.named_buffers())
        known |= {name: tensor.double() for name, tensor in self.program.constants.items()}
        values = {self.program.input.number: x}

        def of(name: str | None) -> Tensor | None:
            return None if name is None else known[name]

        def positive(x: Tensor, y: Value) -> Tensor:
            return selected(x, self.tape.batch(self.tape.value(y)).view(x.shape) > 0, torch.zeros_like(x))

        def selected(one: Tensor, which: Tensor, other: Tensor) -> Tensor:
            better, worse = torch.where(which, one, other), torch.where(which, other, one)
            assert (worse - better).max() <= 1e-4 * max(1.0, one.abs().max().item())
            return better

        def pooled(x: Tensor, op: MaxPool, places: Tensor) -> Tensor:
            (height, width), (kw, (sh, sw), (ph, pw)) = op.y.shape[1:], (op.kernel[1], op.stride, op.padding)
            tap = places[: self.tape.blocks].permute(0, 4, 1, 2, 3).flatten(0, 1)[: len(x)].long()
            rows = torch.arange(height)[:, None] * sh + tap // kw - ph
            columns = torch.arange(width) * sw + tap % kw - pw
            found = x.flatten(2).gather(2, (rows * x.shape[3] + columns).flatten(2)).view(tap.shape)
            return selected(
                found, torch.ones_like(tap, dtype=torch.bool), F.max_pool2d(x, op.kernel, op.stride, op.padding)
            )

        op: Any

        def argument(leaf: Any) -> Any:
            return (
                known[leaf.name] if isinstance(leaf, Name) else values[leaf.number] if isinstance(leaf, Value) else leaf
            )

        for op in self.program.ops:
            if isinstance(op, Torch):
                args, kwargs = map_leaves(argument, (op.args, op.kwargs))
                values[op.y.number] = op.target(*args, **kwargs)
                continue
            x = values[op.x.number]
            match op:
                case Conv():
                    y = F.conv2d(x, known[op.weight], of(op.bias), op.stride, op.padding)
                case Linear():
                    y = F.linear(x, known[op.weight], of(op.bias))
                case Norm():
                    norm = op.batch_norm
                    y = F.batch_norm(x, None, None, of(norm.weight), of(norm.bias), True, 0.0, norm.eps)
                    y = y if op.residual is None else y + values[op.residual.number]
                    if op.pool is not None:  # of what is positive; a maximum of 0 is no choice
                        y = pooled(y.relu(), op.pool, self.tape._places[op.y.number])
                    elif op.relu:
                        y = positive(y, op.y)
                case Relu():
                    y = positive(x, op.y)
                case Add():
                    y = x + values[op.other.number]
                case MaxPool():
                    y = pooled(x, op, self.tape._places[op.y.number])
                case Mean():
                    y = x.mean((2, 3))
            values[op.y.number] = y
        return values[self.program.output.number]

    def check_statistics(self) -> None:
        for name, buffer in self.exact.named_buffers():
            got = self.model.get_buffer(name)
            if got.dtype == torch.int64:
                assert got == buffer
            else:
                assert (got.double() - buffer).abs().max() <= 1e-5 * buffer.abs().max(), name

    def check_borders(self) -> None:
        """Kernels write nothing but the inside: the taps of a conv read zeros around it, at every step."""
        free = [b for buffers in self.tape._free.values() for b in buffers]
        for buffer in [*self.tape._values.values(), *free]:
            b = buffer.plane.border
            around = buffer.tensor.clone()
            around[:, :, b : b + buffer.plane.height, b : b + buffer.plane.width] = 0
            assert not around.any()

    def evaluate(self, images: int) -> None:
        """Where torch computes nothing: its operations are those of training."""
        if any(isinstance(op, Torch) for op in self.program.ops):
            return
        x, _ = self.batch(images)
        with torch.no_grad():
            exact = self.exact.eval()(x.double())
            got = self.tape.forward(x, False)
        assert (got.double() - exact).abs().max() <= LIMIT * exact.abs().max()

    @torch.no_grad()
    def sgd(self) -> None:
        """A step of both. The copy goes on with the tape's weights: what rounding does to a training grows."""
        ours = [("kept", self.tape.values, self.tape.kept_gradients)]
        ours += [(n, self.parameters[n].data, g) for n, g in self.gradients.items()]
        for name, weight, gradient in ours:
            buffer = self.momentum.setdefault(name, torch.zeros_like(weight))
            buffer.mul_(SGD["momentum"]).add_(gradient + SGD["weight_decay"] * weight)
            weight.sub_(SGD["lr"] * buffer)
        for name, p in self.exact.named_parameters():
            if name in self.keep:
                self._stored(p)[torch.from_numpy(self.keep[name])] = self.tape.values[self.tape.spans[name]].double()
            else:
                p.copy_(self.parameters[name])


@cache
def program_of(name: str) -> Program:
    size = SIZES.get(name, 8)
    return fuse(lower(MODELS[name](), torch.zeros(2, 3, size, size), train=True))


def run_of(name: str, **other) -> Run:
    torch.manual_seed(1)
    model, size = MODELS[name](), SIZES.get(name, 8)
    return Run(model, size, linear=sorted(COVERED.get(name, ())), program=program_of(name), **other)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_autograds_whatever_the_batch(name):
    """Batches that grow, shrink and are no multiple of sixteen; evaluation in between; weights that change."""
    run = run_of(name)
    for images in (17, 5, 64, 17, 64):
        run.step(images)
        run.sgd()
        run.evaluate(33)
    run.tape.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["resnet50", "resnet34", "cifar resnet50", "vgg"])
def test_larger_networks(name):
    torch.manual_seed(1)
    if name == "vgg":
        layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                  nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)]  # fmt: skip
        run = Run(nn.Sequential(*layers), 48)
    else:
        stem = "cifar" if name.startswith("cifar") else "imagenet"
        run = Run(resnet(name.removeprefix("cifar "), 4, stem), 64 if stem == "imagenet" else 24)
    for images in (64, 17, 64):
        run.step(images)
        run.sgd()
    run.evaluate(20)


def check_networks_of_avx2() -> None:
    """For a process that computes with a smaller instruction set: see test_conv.py."""
    for name in ("shared", "plain"):
        run_of(name).step(17)


def test_the_structures_are_those_meant():
    """Else the tests above would show less than they say."""
    plain, shared, ends, resnet18 = (program_of(name).ops for name in ("plain", "shared", "ends", "resnet18"))
    assert [type(op) for op in plain].count(Linear) == 2
    assert any(isinstance(op, MaxPool) for op in plain)
    assert any(isinstance(op, Add) and op.x == op.other for op in shared)
    assert any(isinstance(op, Norm) and op.residual == op.x for op in ends)
    assert any(isinstance(op, Norm) and op.pool for op in resnet18)
    assert any(isinstance(op, Norm) and op.residual and op.relu for op in resnet18)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("name", ["plain", "shared"])
def test_nothing_and_everything_kept(name, density):
    run = run_of(name, density=density)
    for _ in range(2):
        run.step(17)
        run.sgd()
    run.evaluate(5)


def test_the_same_bits_with_any_number_of_threads():
    results = []
    for threads in (1, 2, 3, 5):
        run = run_of("shared", threads=threads)
        for images in (33, 5):
            run.step(images)
            run.sgd()
        results.append(
            [run.tape.values.clone(), run.tape.kept_gradients, *run.gradients.values(), *run.model.buffers()]
        )
        run.tape.close()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def torchs_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def wide() -> nn.Module:
    """512 features and ten classes: of 17 images torch's library computes this product otherwise with two threads."""
    layers = nn.Conv2d(3, 512, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("make", "size", "images"), [(Plain, 32, 100), (wide, 4, 17)], ids=["large maps", "wide"])
def test_torchs_own_threads_change_no_bit(make, size, images, torchs_threads):
    """Sums over large maps (of the gradient of a conv's bias) and products of linear layers run in torch."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        run = Run(make(), size, threads=threads)
        x, labels = run.batch(images)
        with torch.no_grad():
            logits = run.tape.forward(x, True)
            run.tape.backward((logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / images)
        results.append([logits, run.tape.kept_gradients, *run.gradients.values()])
        run.tape.close()
        assert torch.get_num_threads() == threads
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_frozen_parameters_get_no_gradient():
    torch.manual_seed(1)
    model = Shared()
    for p in (model.norm1.weight, model.norm1.bias, model.norm2.bias, model.fc.weight, model.conv2.bias):
        p.requires_grad = False
    run = Run(model)
    assert not {"norm1.weight", "norm1.bias", "norm2.bias", "fc.weight", "conv2.bias"} & run.gradients.keys()
    before = model.norm1.weight.clone()
    run.step(17)
    assert torch.equal(model.norm1.weight, before)


def test_nan_in_one_image_reaches_the_loss_as_in_torch():
    for name in ("plain", "shared"):
        run = run_of(name)
        x, labels = run.batch(17)
        x[3, 1, 2, 2] = torch.nan
        with torch.no_grad():
            got = run.tape.forward(x, True)
            exact = run.exact.train()(x.double())
        assert torch.equal(got.isnan(), exact.isnan())
        assert F.cross_entropy(got, labels).isnan()


def test_a_nan_gradient_reaches_all_layers_as_in_torch():
    run = run_of("plain")
    x, labels = run.batch(17)
    x[3] = torch.nan
    with torch.no_grad():
        logits = run.tape.forward(x, True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits.requires_grad_(), labels), logits)
    with torch.no_grad():
        run.tape.backward(gradient)
    F.cross_entropy(run.exact(x.double()), labels).backward()
    for name, p in run.exact.named_parameters():
        got = run.tape.kept_gradients[run.tape.spans[name]] if name in run.keep else run.gradients[name]
        expected = run.kept(name, p.grad) if name in run.keep else p.grad
        assert torch.equal(got.isnan(), expected.isnan()), name


def test_images_that_do_not_fit_are_refused():
    run = run_of("shared")
    for images in (torch.zeros(4, 3, 9, 9), torch.zeros(4, 1, 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"takes images of 3 x 8 x 8 in float32, got \d x \d x \d in float"):
            run.tape.forward(images, False)


def test_one_class_and_one_channel():
    """Layouts in which a value is a view of a buffer: logits must stay as they are at the next step."""
    torch.manual_seed(1)
    run = Run(nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(1, 1)), density=1.0)  # fmt: skip
    x, _ = run.batch(16)
    with torch.no_grad():
        first = run.tape.forward(x, True)
        kept = first.clone()
        run.tape.forward(x + 1, True)
    assert torch.equal(first, kept)
    assert (first.double() - run.exact(x.double())).abs().max() < 1e-6


def test_buffers_are_made_once():
    run = run_of("shared")
    run.step(33)
    size, values = run.tape.nbytes(), {n: b.address for n, b in run.tape._values.items()}
    for images in (17, 33, 5):
        run.step(images)
    assert run.tape.nbytes() == size
    assert {n: b.address for n, b in run.tape._values.items()} == values
    assert len({b.address for free in run.tape._free.values() for b in free}) == sum(map(len, run.tape._free.values()))


def test_a_tape_goes_with_its_last_user_and_its_threads_with_it():
    gc.collect()
    gc.disable()
    try:
        before = threading.active_count()
        run = run_of("shared", threads=3)
        run.step(17)
        assert threading.active_count() == before + 2
        left = [weakref.ref(run.tape), weakref.ref(next(iter(run.tape._values.values())).tensor)]
        del run
        assert [ref() for ref in left] == [None, None]
        while threading.active_count() > before:  # they end by themselves; pytest's time limit ends the test
            time.sleep(0.01)
    finally:
        gc.enable()


# Threads


def test_ranges_cover_all_and_errors_come_back():
    threads = Threads(3)
    seen = np.zeros(10, int)

    def count(thread: int, first: int, last: int) -> None:
        seen[first:last] += 1

    threads.channels(10, count)
    threads.ranges([0, 0, 4, 10], count)
    assert (seen == 2).all()
    threads.channels(1, count)
    threads.channels(2, count)
    with pytest.raises(ZeroDivisionError):
        threads.channels(10, lambda thread, first, last: 1 // (2 - thread))
    threads.close()


def test_an_interrupt_waits_for_all_threads():
    """Their kernels write to memory that is freed or reused afterwards."""
    threads, go, done = Threads(2), threading.Event(), []

    def run(thread: int, first: int, last: int) -> None:
        if thread == 0:
            go.set()
            raise KeyboardInterrupt
        go.wait()
        time.sleep(0.2)
        done.append(thread)

    with pytest.raises(KeyboardInterrupt):
        threads.channels(4, run)
    assert done == [1]
    threads.close()


def test_tiles_of_this_machine():
    assert tile_vectors() in (6, 16)
