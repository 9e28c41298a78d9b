"""Compiled networks: outputs of the model in evaluation mode, for any batch, density and number of threads."""

import copy
import subprocess
import sys
import threading
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastprune.sparse
from fastprune import InputError
from fastprune.sparse import compile
from fastprune.specs import ModelSpec
from fastprune.training.models import build

# Of the maximum of the output. A sum of n products in float32 is off by some sqrt(n) * 6e-8 of its size, and Winograd's
# transforms of the first layer by at most 4e-6; later layers average.
CLOSE = 1e-5


def pruned(model: nn.Module, density: float, seed: int = 0) -> nn.Module:
    """In evaluation mode, with batch norms that are not the identity; all weights of convs and linear layers but those
    of the first and the last layer are pruned at random."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(-1.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    for layer in layers[1:-1]:
        weight = layer.weight.data
        weight *= torch.rand(weight.shape, generator=generator) < density
    return model.eval()


def resnet(name: str = "resnet18", width: int = 8, stem: str = "imagenet") -> nn.Module:
    torch.manual_seed(3)
    return build(ModelSpec(name=name, classes=10, stem=stem, width=width))


class Small(nn.Module):
    """Convs with biases and without batch norm, a pre-activation, several readers of a value, a stem in a group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(12)
        self.side = nn.Conv2d(12, 12, (3, 1), padding=(1, 0), bias=False)
        self.inner = nn.Conv2d(12, 6, 1)
        self.hidden = nn.Linear(6 * 2, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.relu(self.first(x)))
        x = x + self.side(F.relu(self.norm(x)))
        x = F.max_pool2d(F.relu(x), 2) + F.max_pool2d(x, 2)
        x = self.inner(x)
        return self.head(F.relu(self.hidden(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def images(batch: int, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def check(model: nn.Module, compiled: fastprune.sparse.CompiledModel, x: Tensor) -> None:
    want = copy.deepcopy(model).double()(x.double())
    got = compiled(x)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


@cache
def compiled_resnet() -> tuple[nn.Module, fastprune.sparse.CompiledModel]:
    model = pruned(resnet(), 0.2)
    return model, compile(model, images(2))


@pytest.mark.parametrize("batch", [1, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 16, 40))])
def test_resnet18(batch):
    check(*compiled_resnet(), images(batch))


@pytest.mark.parametrize("size", [32, 64])
def test_few_images_may_be_any_number(size):
    """Pixels instead of images in a vector: the same results at all batches, whatever the rule says."""
    model = pruned(resnet(), 0.2)
    compiled = compile(model, images(2, size))
    for few in (0, 20):
        compiled._few_images = few
        check(model, compiled, images(1, size))
        check(model, compiled, images(17, size))


def test_a_batch_after_a_larger_one():
    model, compiled = compiled_resnet()
    for batch in (33, 2, 33, 5):
        check(model, compiled, images(batch))


@pytest.mark.slow
def test_resnet50():
    model = pruned(resnet("resnet50"), 0.1)
    compiled = compile(model, images(2))
    check(model, compiled, images(18))
    compiled._few_images = 5
    check(model, compiled, images(5))


@pytest.mark.slow
@pytest.mark.parametrize("size", [33, 64])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_other_sizes(name, stem, size):
    model = pruned(resnet(name, stem=stem), 0.1)
    compiled = compile(model, images(1, size))
    for batch in (1, 20):
        check(model, compiled, images(batch, size))


@pytest.mark.parametrize("density", [0.01, 0.5, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.0, 1.0))])
def test_densities(density):
    model = pruned(resnet(), density)
    check(model, compile(model, images(1)), images(17))


def test_layers_pruned_whole_and_one_kept_weight():
    model = pruned(resnet(), 0.3)
    model.layer1[0].conv1.weight.data.zero_()
    model.layer2[0].downsample[0].weight.data.zero_()
    one = model.layer2[1].conv2.weight.data.zero_()
    one[5, 3, 1, 2] = 2
    model.fc.weight.data.zero_()
    model.fc.weight.data[3, 7] = 1
    check(model, compile(model, images(1)), images(18))


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_own_cnn(density):
    torch.manual_seed(1)
    model = pruned(Small(), density)
    check(model, compile(model, images(1, 17)), images(19, 17))


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    ("kernel", "padding"), [(7, 3), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((5, 2), (6, 0), (8, 3)))]
)
def test_winograd_stem(kernel, padding, pooled):
    """The first layer's own kernel, with and without the pooling that follows."""
    torch.manual_seed(1)
    size = 2 * 15 + kernel - 2 * padding  # for 16 x 16 outputs
    first = [nn.Conv2d(3, 12, kernel, 2, padding), nn.ReLU()] + [nn.MaxPool2d(3, 2, 1)] * pooled
    model = pruned(nn.Sequential(*first, nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1)), 0.3)
    compiled = compile(model, images(1, size))
    check(model, compiled, images(19, size))
    assert [step.what for step in compiled._steps] == ["convert", "FusedConv", "FusedConv", "FusedConv", "convert"]


def test_a_result_takes_the_memory_of_what_is_added():
    """Where nothing else reads it: not in the first block, whose input is read again."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.convs = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 1, 3, 1))
            self.last = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d, e = self.convs
            x = self.first(x)
            y = F.relu(x + b(a(x)))
            y = c(y) + y
            z = F.relu(d(y) + e(y))
            return self.last(z + x)

    torch.manual_seed(1)
    model = pruned(Blocks(), 0.4)
    check(model, compile(model, images(1, 16)), images(33, 16))


def test_mobilenet_runs_groups_in_torch():
    torch.manual_seed(1)
    model = pruned(torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25), 0.3)
    compiled = compile(model, images(1))
    check(model, compiled, images(5))
    assert any("groups" in name for name in compiled.in_torch)


def test_transformer_runs_in_torch():
    torch.manual_seed(1)
    model = Transformer().eval()
    compiled = compile(model, images(1))
    check(model, compiled, images(5))


def test_a_pruned_weight_that_torch_reads_too():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, stride=2)
            self.twice = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.first(x).flatten(2).transpose(1, 2)).mean(1))

    torch.manual_seed(1)
    model = Tied().eval()
    model.twice.weight.data *= torch.rand(8, 8) < 0.3
    check(model, compile(model, images(1, 9)), images(5, 9))


def test_operations_in_torch_stay_there():
    torch.manual_seed(1)
    dense = pruned(Small(), 1.0)
    compiled = compile(dense, images(1, 17))
    assert not [step.what for step in compiled._steps if step.what == "convert"]


def test_the_output_is_new_memory():
    model = nn.Sequential(nn.Flatten()).eval()
    x = images(3, 4)
    got = compile(model, x)(x)
    x.zero_()
    assert got.abs().min() > 0


def test_no_images():
    assert compiled_resnet()[1](images(0)).shape == (0, 10)


def test_nan_stays_nan():
    _, compiled = compiled_resnet()
    x = images(20)
    want = compiled(x)
    x[4, 0, 7, 7] = torch.nan
    x[17, 2] = torch.nan
    got = compiled(x)
    bad = [4, 17]
    assert got[bad].isnan().any(1).all()
    good = [i for i in range(20) if i not in bad]
    assert torch.equal(got[good], want[good])
    assert torch.equal(compiled(images(20)), want)


def test_results_do_not_depend_on_threads():
    _, compiled = compiled_resnet()
    x, before = images(20), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_threads_may_call():
    _, compiled = compiled_resnet()
    batches = [images(n) for n in (3, 17, 5, 20)]
    want, got = [compiled(x) for x in batches], [Tensor()] * 4

    def call(i: int) -> None:
        for _ in range(5):
            got[i] = compiled(batches[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, want))


def test_the_model_is_left_as_it_was():
    model = pruned(resnet(), 0.2).train()
    before = copy.deepcopy(model.state_dict())
    compiled = compile(model, images(2))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    want = compiled(images(3))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(compiled(images(3)), want)


def test_memory_is_used_again():
    """A chain of twelve equal layers needs two values of their shape."""
    torch.manual_seed(1)
    layers = [layer for _ in range(12) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model = pruned(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 8, 3, padding=1)), 0.2)
    compiled = compile(model, images(1, 8))
    compiled(images(2, 8))
    assert sum(len(free) for free in compiled._call._free.values()) <= 4
    before = {id(b) for free in compiled._call._free.values() for b in free}
    compiled(images(3, 8))
    assert {id(b) for free in compiled._call._free.values() for b in free} == before


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (images(2).double(), "float64"),
        (images(2, 16), r"\[2, 3, 16, 16\]"),
        (images(2)[0], r"\[3, 32, 32\]"),
    ],
)
def test_bad_images(x, what):
    with pytest.raises(InputError, match=rf"images must be float32 \[B, 3, 32, 32\] on a CPU, got .*{what}"):
        compiled_resnet()[1](x)


def test_bad_models():
    with pytest.raises(InputError, match=r"compile takes float32 on a CPU: 0\.weight is torch\.float64 on cpu"):
        compile(nn.Sequential(nn.Conv2d(3, 4, 1)).double(), images(1))
    with pytest.raises(InputError, match=r"an example float32 \[B, C, H, W\], got torch.float32 \[3, 32, 32\]"):
        compile(nn.Sequential(nn.Conv2d(3, 4, 1)), images(1)[0])

    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match="the model cannot be compiled: the forward's control flow depends on data"):
        compile(Fickle(), images(1))


def test_importing_the_package_does_not_import_numba():
    code = "import sys, fastprune.sparse as s; dir(s); print({'torch', 'numba'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"
    assert callable(fastprune.sparse.compile)
    with pytest.raises(AttributeError, match=r"module 'fastprune\.sparse' has no attribute 'nothing'"):
        _ = fastprune.sparse.nothing
