"""The Pruner on many models: all of torchvision's in number, the smallest of each family, and others, in full."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams

from fastprune import Pruner

CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
CLASSIFIERS = [name for name in CLASSIFIERS if not name.startswith("quantized_")]


def build(name: str, **kwargs: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        kwargs |= {"aux_logits": False, "init_weights": False}
    model = torchvision.models.get_model(name, **kwargs)
    if name.startswith("vit"):  # whose head starts at 0, so that a prune after one step leaves nothing of it
        nn.init.normal_(model.heads.head.weight)
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_torchvision_classifier_is_counted(name, monkeypatch):
    widths = BlockParams.from_init_params

    def on_the_cpu(*args, **kwargs):  # regnets compute their widths with tensors, whose values they need
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", on_the_cpu)
    with torch.device("meta"):
        model = build(name)
    pruner = Pruner(model, verbose=False)
    # Counted by the names and dimensions that torchvision gives, not by the classes of the layers.
    expected = {
        n: p.numel()
        for n, p in model.named_parameters()
        if p.dim() >= 2 and n.rpartition(".")[2] in ("weight", "in_proj_weight")
    }
    assert list(pruner.names) == list(expected)
    assert pruner.total == pruner.kept == sum(expected.values())
    assert pruner.coverage.total == sum(p.numel() for p in model.parameters())
    assert pruner.total > 0.9 * pruner.coverage.total


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(1, 8), self.block(8, 16)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), self.block(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        return self.out(self.last(torch.cat([first, self.up(self.down2(F.max_pool2d(first, 2)))], 1)))


class Tagger(nn.Module):
    """A tag for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class CausalTransformer(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(61, 16), nn.Parameter(torch.randn(8, 16) * 0.1)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 61, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.layers(self.embedding(tokens) + self.positions[:length], mask=mask, is_causal=True))


def tokens(vocabulary: int) -> Tensor:
    return torch.arange(16).view(2, 8) * 7 % vocabulary


# By name: the model, and an input of it.
OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "UNet": (UNet, lambda: torch.randn(2, 1, 8, 8)),
    "LSTM tagger": (Tagger, lambda: tokens(50)),
    "causal transformer": (CausalTransformer, lambda: tokens(61)),
}

# The smallest of each family of torchvision, with the side of an input that it takes.
SMALLEST = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "googlenet": 64,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_x_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "vgg11_bn": 64,
    "vit_b_32": 64,
}


def test_every_family_is_there():
    def modules(names):
        return {torchvision.models.get_model_builder(name).__module__ for name in names}

    assert modules(SMALLEST) == modules(CLASSIFIERS)


def target_of(out: Tensor) -> Tensor:
    """Labels of class 1, for each row, pixel or token."""
    if out.dim() == 4:
        return torch.ones(out.shape[0], *out.shape[2:], dtype=torch.int64)
    return torch.ones(out.shape[:-1].numel(), dtype=torch.int64)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    torch.manual_seed(1)  # dropout, stochastic depth
    model.train()
    optimizer.zero_grad()
    out = model(x)
    F.cross_entropy(out.flatten(0, -2) if x.dtype == torch.int64 else out, target_of(out)).backward()
    optimizer.step()


def check_zeros(pruner: Pruner, model: nn.Module) -> None:
    for name, mask in pruner.masks.items():
        pruned = model.get_parameter(name).detach()[~mask]
        assert not pruned.any(), name
        assert not torch.signbit(pruned).any(), name


@torch.no_grad()
def out_of(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def in_full(make: Callable[[], nn.Module], x: Tensor, path) -> None:
    """Prunes to 90 %, trains, exports, copies, saves and resumes, finalises."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    pruner = Pruner(model, verbose=False)
    pruner.attach(optimizer)
    take_step(model, optimizer, x)  # momentum of all weights
    total, expected = pruner.total, round(0.9 * pruner.total)
    already = total - pruner.kept
    assert pruner.prune(to=0.9) == expected - already
    assert total - pruner.kept == expected
    assert sum(int((w == 0).sum()) for w in pruner.weights().values()) == expected
    before = {name: w.detach().clone() for name, w in pruner.weights().items()}
    take_step(model, optimizer, x)
    check_zeros(pruner, model)
    assert any(not torch.equal(w, before[name]) for name, w in pruner.weights().items())
    out = out_of(model, x)
    assert out.isfinite().all()

    exported = torch.export.export(model, (x,)).module()
    # With gradients, as it was traced: without, attention takes another path.
    torch.testing.assert_close(exported(x), model(x))
    for name, mask in pruner.masks.items():
        assert torch.equal(exported.get_parameter(name) != 0, mask & (pruner.weights()[name] != 0))

    other, twin = copy.deepcopy((pruner, optimizer))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    content = torch.load(path, weights_only=True)
    resumed = make()
    resumed_optimizer = torch.optim.SGD(resumed.parameters(), lr=1e-3, momentum=0.9)
    third = Pruner(resumed, verbose=False)
    third.attach(resumed_optimizer)
    resumed.load_state_dict(content["model"])
    resumed_optimizer.load_state_dict(content["optimizer"])
    del content
    assert torch.equal(out_of(resumed, x), out)
    for one, one_optimizer in ((pruner, optimizer), (other, twin), (third, resumed_optimizer)):
        take_step(one.model, one_optimizer, x)
        check_zeros(pruner, one.model)
        assert one.kept == total - expected
    for p, q, r in zip(model.parameters(), other.model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)

    out = out_of(model, x)
    assert pruner.finalize() is model
    assert torch.equal(out_of(model, x), out)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert "fastprune.masks" not in optimizer.state_dict()


# An LSTM's list of its weights; the dense model's export says it, too.
@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights:UserWarning")
@pytest.mark.parametrize("name", OWN)
def test_own_models_in_full(name, tmp_path):
    make, example = OWN[name]
    in_full(make, example(), tmp_path / "checkpoint.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_of_each_family_in_full(name, tmp_path):
    kwargs: dict[str, Any] = {"num_classes": 10}
    if name == "vit_b_32":
        kwargs["image_size"] = 64
    side = SMALLEST[name]
    in_full(lambda: build(name, **kwargs), torch.randn(2, 3, side, side), tmp_path / "checkpoint.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("resnetv2_50", 64), ("vit_tiny_patch16_224", 64)])
def test_timms_models_in_full(name, size, tmp_path):
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": size} if name.startswith("vit") else {}
    make = lambda: timm.create_model(name, num_classes=10, **kwargs)  # noqa: E731
    in_full(make, torch.randn(2, 3, size, size), tmp_path / "checkpoint.pt")
