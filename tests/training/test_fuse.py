"""The graph with our batch norms against the network as it is, and which norms are replaced."""

import operator
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

from fastprune.kernels.batch_norm import batch_norm
from fastprune.kernels.batch_norm_pool import batch_norm_pool
from fastprune.specs import GpuOptions, ModelSpec
from fastprune.training import trainer as trainer_module
from fastprune.training.fuse import fuse
from fastprune.training.models import build
from fastprune.training.trainer import Trainer

OURS = {batch_norm: "norm", batch_norm_pool: "pool"}


class Rewritten:
    """A backend of torch.compile: `fuse`, and the graph as it then is, traced by autograd but not compiled."""

    def __init__(self) -> None:
        self.replaced: list[int] = []
        self.calls: Counter[str] = Counter()

    def __call__(self, module, inputs):
        from torch._dynamo.backends.registry import lookup_backend

        self.replaced.append(fuse(module))
        for node in module.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in OURS:
                self.calls[OURS[node.target]] += 1
                self.calls["residual"] += node.target is batch_norm and node.args[5] is not None
                self.calls["relu"] += node.target is batch_norm and node.args[8]
                self.calls["branches"] += node.target is batch_norm and node.args[9:] == (2,)
            self.calls["left"] += node.target is F.batch_norm
            self.calls["sum"] += node.target in (operator.add, operator.iadd)
        return lookup_backend("aot_eager")(module, inputs)


@pytest.fixture(autouse=True)
def forgets():
    """Compiled code of other tests is not reused, nor counted against torch's limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: nn.Module, call, images) -> list[torch.Tensor]:
    """Output, gradients and running statistics of one step, each as one vector."""
    model.zero_grad()
    out = call(images)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return [torch.cat([t.detach().flatten() for t in part]).double() for part in ([out], grads, statistics)]


def compare(make, size: int = 32) -> Rewritten:
    """Two steps of the network in float64, in float32, and rewritten."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, size, size, generator=g).contiguous(memory_format=torch.channels_last)
    backend, results = Rewritten(), []
    for dtype, compiled in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        torch.manual_seed(0)
        model = make().to(dtype=dtype, memory_format=torch.channels_last).train()
        call = torch.compile(model, backend=backend, dynamic=False) if compiled else model
        results.append([v for _ in range(2) for v in step(model, call, images.to(dtype))])
    assert len(backend.replaced) == 1, "one graph"
    for exact, plain, ours in zip(*results, strict=True):
        # As for a kernel, with ulps of float32; errors of the second step are those of the first's gradients, too.
        errors = [((got - exact).norm() / exact.norm()).item() for got in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 8 * torch.finfo(torch.float32).eps
    return backend


def short() -> nn.Module:
    """A ResNet of one block a stage."""
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def network(name: str, stem: str) -> Callable[[], nn.Module]:
    return lambda: build(ModelSpec(name, 10, stem=stem, width=8))


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        # Each block ends in a sum, whose result has two consumers but for the last block's. Norms that downsample have
        # no ReLU: three, or four of a ResNet-50.
        (short, {"norm": 11, "pool": 1, "relu": 8, "residual": 4, "branches": 3}),
        pytest.param(
            network("resnet18", "cifar"), {"norm": 20, "relu": 17, "residual": 8, "branches": 8}, marks=pytest.mark.slow
        ),
        pytest.param(
            network("resnet18", "imagenet"),
            {"norm": 19, "pool": 1, "relu": 16, "residual": 8, "branches": 7},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            network("resnet50", "imagenet"),
            {"norm": 52, "pool": 1, "relu": 48, "residual": 16, "branches": 15},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["short", "resnet18-cifar", "resnet18", "resnet50"],
)
def test_a_resnet_has_only_our_norms_and_computes_the_same(make, calls):
    backend = compare(make)
    assert backend.replaced == [sum(isinstance(m, nn.BatchNorm2d) for m in make().modules())]
    assert {name: n for name, n in backend.calls.items() if n} == calls


class Odd(nn.Module):
    """Norms that must stay, and what may be taken only in part."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(7))
        self.plain, self.shown, self.shared = (nn.BatchNorm2d(8) for _ in range(3))
        self.bare = nn.BatchNorm2d(8, affine=False)
        self.forgetful = nn.BatchNorm2d(8, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.last = nn.BatchNorm2d(8)

    def train(self, mode: bool = True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        x = F.relu(self.plain(self.convs[0](x)))
        for conv, norm in zip(self.convs[1:4], (self.bare, self.forgetful, self.frozen), strict=True):
            x = F.relu(norm(conv(x)))
        shown = self.shown(self.convs[4](x))  # used twice: no ReLU goes into it
        x = F.relu(shown) + shown.mean()
        # The same statistics twice, with a sum that comes after the second: the order of their updates matters.
        first, second = self.shared(self.convs[5](x)), self.shared(self.convs[6](x).mul(2))
        x = F.relu(second) + F.relu(first + x)
        return F.max_pool2d(F.relu(self.last(x)), 2).flatten(1)


def test_norms_of_other_kinds_stay_and_order_is_kept():
    backend = compare(Odd, 8)
    # plain, shown, shared twice and last
    assert backend.replaced == [5]
    assert backend.calls["left"] == 3
    assert backend.calls["relu"] == 3  # plain, last, and the second of those that share
    assert backend.calls["residual"] == 0


class Consumers(nn.Module):
    """A result that one consumer writes into, then three consumers, then a sum that writes into the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x))
        y = x * 2
        x.add_(1)
        x = F.relu(self.norms[1](y)) + x
        x = F.relu(self.norms[2](self.convs[2](x)))
        x = self.convs[3](x) + self.convs[4](x) + x
        y = x * 2
        x += self.norms[3](y)
        return F.relu(x)


class Changing(nn.Module):
    """The norm's input changes between the norm and the sum that follows. Autograd would not allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = x + 1
        y = self.norm(x)
        x.mul_(2)
        return F.relu(y + (x + 3))


def test_consumers_that_write_get_no_branch():
    backend = compare(Consumers, 8)
    assert backend.replaced == [4]
    assert backend.calls["branches"] == 0
    assert backend.calls["residual"] == 0


def test_a_norm_is_not_computed_later_than_its_input_is_valid():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(2, 8, 5, 5, generator=g).contiguous(memory_format=torch.channels_last)
    backend = Rewritten()
    with torch.no_grad():
        plain, ours = Changing()(images), torch.compile(Changing(), backend=backend)(images)
    assert backend.replaced == [1]
    assert backend.calls["residual"] == 0
    torch.testing.assert_close(ours, plain)


def test_other_dtypes_sizes_and_layouts_stay():
    flat = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    backend = Rewritten()
    torch.compile(flat, backend=backend)(torch.randn(2, 3, 6, 6))  # contiguous
    torch.compile(nn.Sequential(nn.BatchNorm1d(8)), backend=backend)(torch.randn(4, 8))
    double = nn.BatchNorm2d(8).double()
    images = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    torch.compile(double, backend=backend)(images.double())
    torch.compile(nn.BatchNorm2d(8).eval(), backend=backend)(images)
    assert backend.replaced == [0, 0, 0, 0]
    torch.compile(nn.BatchNorm2d(8), backend=backend)(images)
    assert backend.replaced[-1] == 1, "so the others could have been"


@pytest.mark.parametrize(("wanted", "name"), [(False, "inductor"), (True, "fused")])
def test_a_trainer_asks_its_options_for_the_backend(wanted, name, monkeypatch):
    """On a made-up device; the state that a checkpoint holds is the same."""
    asked = []
    monkeypatch.setattr(trainer_module, "uses_triton", lambda tensor: True)
    monkeypatch.setattr(torch, "compile", lambda network, *, backend, **_: asked.append(backend) or network)
    make = [build(ModelSpec("resnet18", 10, width=8)) for _ in range(2)]
    trainer = Trainer(make[0], compile=True, gpu_options=GpuOptions(fused_norm=wanted))
    Trainer(make[1], compile="aot_eager", gpu_options=GpuOptions(fused_norm=wanted))
    assert asked == [getattr(trainer_module, name), "aot_eager"]
    assert {type(m) for m in trainer.model.modules()} == {type(m) for m in make[1].modules()}
    assert trainer.state_dict().keys() == build(ModelSpec("resnet18", 10, width=8)).state_dict().keys()
