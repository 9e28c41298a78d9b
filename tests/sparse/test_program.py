"""Programs: what lower, fuse and fold give computes what the model computes, for any batch; and nothing is touched."""

import copy
import functools
import gc
import pickle
import random
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

from fastprune.sparse.program import (
    Add,
    BatchNorm,
    Conv,
    FusedConv,
    Linear,
    MaxPool,
    Mean,
    Norm,
    Program,
    Relu,
    Torch,
    Unsupported,
    Value,
    evaluate,
    fold,
    fuse,
    inputs,
    lower,
    names,
)
from fastprune.specs import ModelSpec
from fastprune.training.models import build


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def draw(model: nn.Module) -> nn.Module:
    """The model in float64, with batch norms that differ from the identity; every fourth scale is negative."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(0, 0.5, generator=generator)
            if module.weight is not None:
                module.weight.data[::4] *= -1
    return model.double()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def output(model: nn.Module, x: Tensor, train: bool = False) -> Tensor:
    """Of a copy, as training changes statistics. x is copied, too."""
    with torch.no_grad():
        torch.manual_seed(3)
        return copy.deepcopy(model).train(train)(x.clone())


def check(program: Program, tensors: dict[str, Tensor], x: Tensor, want: Tensor, train: bool = False) -> None:
    before = {name: tensor.clone() for name, tensor in tensors.items() if tensor.dim() < 2}  # statistics, and others
    with torch.no_grad():
        torch.manual_seed(3)
        got = evaluate(program, tensors, x.clone(), train)
    # The same operations in another order, in float64.
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-12 * want.abs().max()
    assert got.shape[1:] == program.output.shape
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def check_form(program: Program, tensors: dict[str, Tensor]) -> None:
    """Each value is written once, before it is read, and read by something; names are those of the tensors."""
    written = {program.input.number}
    read = {program.output.number}
    for op in program.ops:
        assert all(value.number in written for value in inputs(op))
        assert op.y.number not in written
        written.add(op.y.number)
        read |= {value.number for value in inputs(op)}
    assert read >= written - {program.input.number}
    assert {name for op in program.ops for name in names(op)} <= {*tensors, *program.constants}


def kinds(program: Program) -> Counter[str]:
    return Counter(type(op).__name__ for op in program.ops)


class Masked(nn.Conv2d):
    """A user's conv, whose weight is computed in the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (self.weight > 0), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """A user's conv, whose weight is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cnn(nn.Module):
    """Without batch norm; with biases, an even kernel, padding in words and before the conv."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 5, stride=(2, 1), padding=(1, 2))
        self.b = nn.Conv2d(8, 8, (3, 1), padding="same")
        self.c = nn.Conv2d(8, 6, 2, padding=1, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.pad(x, (1, 1, 2, 2))))
        x = F.max_pool2d(torch.relu(self.b(x)), 3, 2)
        x = self.c(x).contiguous()
        return F.relu(self.fc(F.avg_pool2d(x, x.shape[2:]).squeeze(-1).squeeze(-1)))


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def tied() -> nn.Module:
    model = sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model[4].weight = model[1].weight
    return model


def small_vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers([8, "M", 16, "M", 32, "M", 64, "M", 64, "M"], batch_norm=True)
    pool = nn.AdaptiveAvgPool2d((2, 3))
    return nn.Sequential(features, pool, nn.Flatten(), nn.Linear(64 * 6, 16), nn.ReLU(True), nn.Linear(16, 7))


def small_mobilenet() -> nn.Module:
    settings = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return torchvision.models.MobileNetV2(num_classes=7, inverted_residual_setting=settings, dropout=0.0)


def small_densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 3), 8, num_classes=7)


def cifar_resnet(name: str = "resnet18") -> nn.Module:
    return build(ModelSpec(name, 7, "cifar", 8))


MODELS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=7), (33, 47)),
    "cifar resnet18": (cifar_resnet, (9, 8)),
    "small vgg": (small_vgg, (32, 33)),
    "mobilenet": (small_mobilenet, (32, 30)),
    "densenet": (small_densenet, (32, 32)),
    "cnn": (Cnn, (17, 14)),
    "tied": (tied, (5, 5)),
    "dropout": (
        lambda: sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.4), nn.ReLU(True), nn.Dropout2d(inplace=True)),
        (7, 6),
    ),
    "own convs": (lambda: sequential(Masked(3, 8, 3), nn.BatchNorm2d(8), Scaled(8, 8, 3), nn.BatchNorm2d(8)), (9, 8)),
    "weight norm": (lambda: sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU()), (7, 6)),
    "other convs": (
        lambda: sequential(
            nn.Conv2d(3, 8, 3, padding=2, padding_mode="circular"),
            nn.Conv2d(8, 8, 3, dilation=2),
            nn.ConvTranspose2d(8, 8, 3),
            nn.Conv2d(8, 8, 2, padding="same"),
            nn.Unflatten(1, (8, 1)),
            nn.Conv3d(8, 8, 1),
            nn.Flatten(1, 2),
            nn.BatchNorm2d(8, affine=False),
        ),
        (9, 8),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.ReLU6(True),
            nn.BatchNorm2d(8, eps=1e-3, momentum=0.3),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
        ),
        (9, 8),
    ),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(num_classes=7, dropout=0.0), (32, 32)),
    "resnet34": (lambda: torchvision.models.resnet34(num_classes=7), (33, 40)),
    "cifar resnet50": (lambda: cifar_resnet("resnet50"), (9, 8)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=7), (32, 32)),
    "densenet121": (lambda: torchvision.models.densenet121(num_classes=7), (32, 32)),
}
SLOW = ("vgg11_bn", "resnet34", "cifar resnet50", "mobilenet_v2", "densenet121")


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return draw(MODELS[name][0]())


@functools.cache
def program_of(name: str, train: bool) -> Program:
    return lower(model_of(name), images(1, 3, *MODELS[name][1]), train=train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MODELS])
def test_equals_the_model(name, train):
    model, program = model_of(name), program_of(name, train)
    tensors = tensors_of(model)
    x = images(3, 3, *MODELS[name][1])
    want = output(model, x, train)
    for made in (program, fuse(program)):
        check_form(made, tensors)
        check(made, tensors, x, want, train)
    if not train:
        folded, kept = fold(program, tensors)
        for made in (folded, fuse(folded)):
            check_form(made, kept)
            check(made, kept, x, want)
        assert "Conv" not in kinds(folded)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", ["cifar resnet18", "densenet", "mobilenet", "small vgg"])
def test_other_batches_than_the_example(name, batch):
    x = images(batch, 3, *MODELS[name][1], seed=batch)
    check(program_of(name, False), tensors_of(model_of(name)), x, output(model_of(name), x))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_resnet18_in_full(train):
    program = fuse(program_of("resnet18", train))
    assert program.unknown == []
    assert kinds(program) == {"Conv": 20, "Norm": 20, "Mean": 1, "Linear": 1}
    first, norm = program.ops[:2]
    assert first == Conv(program.input, first.y, "conv1.weight", None, (7, 7), (2, 2), (3, 3))
    assert (norm.x, norm.residual, norm.relu) == (first.y, None, True)
    assert norm.pool == MaxPool(norm.pool.x, norm.y, (3, 3), (2, 2), (1, 1))
    assert norm.batch_norm == BatchNorm(
        *(first.y, norm.batch_norm.y, "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"),
        *("bn1.num_batches_tracked" if train else None, 0.1, 1e-5),
    )
    norms = [op for op in program.ops if isinstance(op, Norm)]
    assert sum(op.residual is not None for op in norms) == 8
    bare = [op.batch_norm.mean for op in norms if not op.relu]
    assert bare == [f"layer{i}.0.bn2.running_mean" for i in (2, 3, 4)]
    # The two norms of a block whose shortcut is a conv: the shortcut's is the later one.
    late = next(op for op in norms if op.batch_norm.mean == "layer2.0.downsample.1.running_mean")
    assert late.relu
    assert late.residual == next(op.y for op in norms if op.batch_norm.mean == "layer2.0.bn2.running_mean")


@pytest.mark.slow
def test_resnet50_in_full():
    program = lower(torchvision.models.resnet50(), torch.zeros(2, 3, 64, 64), train=True)
    assert kinds(fuse(program)) == {"Conv": 53, "Norm": 53, "Mean": 1, "Linear": 1}
    assert fuse(program).ops[1].pool is not None


def test_folded_resnet18():
    model = model_of("resnet18")
    folded, tensors = fold(program_of("resnet18", False), tensors_of(model))
    assert kinds(folded) == {"FusedConv": 20, "MaxPool": 1, "Mean": 1, "Linear": 1}
    assert sum(op.relu for op in folded.ops if isinstance(op, FusedConv)) == 17
    assert set(tensors) == {name for op in folded.ops for name in names(op)}
    assert tensors["fc.weight"] is model.fc.weight


UNKNOWN = {
    "resnet18": [],
    "cifar resnet18": [],
    "cnn": [],
    "tied": [],
    "small vgg": ["aten.adaptive_avg_pool2d", "aten.flatten"],
    "mobilenet": ["aten.hardtanh", "aten.conv2d (in groups)"],
    "densenet": ["aten.cat", "aten.avg_pool2d"],
    "dropout": ["aten.dropout (p=0.4)", "aten.feature_dropout (p=0.5)"],
    "own convs": [
        "aten.gt",
        "aten.mul",
        "aten.conv2d (weight or bias computed in the forward)",
    ],
    "weight norm": ["aten._weight_norm", "aten.conv2d (weight or bias computed in the forward)"],
    "other convs": [
        "aten.pad",
        "aten.conv2d (dilated)",
        "aten.conv_transpose2d",
        "aten.conv2d (padding of one side)",
        "aten.unflatten",
        "aten.conv3d",
        "aten.flatten",
    ],
    "norms": [
        "aten.batch_norm (without running statistics)",
        "aten.hardtanh",
        "aten.max_pool2d (ceil_mode)",
        "aten.batch_norm (not of maps)",
    ],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_has_reasons(name):
    assert program_of(name, True).unknown == UNKNOWN[name]


def test_dropout_is_gone_in_evaluation():
    assert kinds(program_of("dropout", False)) == {"Conv": 1, "Relu": 1, "Mean": 1, "Linear": 1}


def test_own_cnn_in_full():
    program = program_of("cnn", False)
    assert kinds(program) == {"Conv": 3, "Relu": 3, "MaxPool": 1, "Mean": 1, "Linear": 1}
    a, b, c = (op for op in program.ops if isinstance(op, Conv))
    assert a == Conv(program.input, a.y, "a.weight", "a.bias", (5, 5), (2, 1), (3, 3))  # with what F.pad added
    assert (b.kernel, b.stride, b.padding) == ((3, 1), (1, 1), (1, 0))
    assert (c.kernel, c.padding, c.bias) == ((2, 2), (1, 1), None)
    folded, _ = fold(program, tensors_of(model_of("cnn")))
    assert kinds(folded) == {"FusedConv": 3, "MaxPool": 1, "Mean": 1, "Linear": 1}
    assert folded.ops[-1].relu


def test_tied_weights_have_the_first_name():
    convs = [op.weight for op in program_of("tied", True).ops if isinstance(op, Conv)]
    assert convs == ["0.weight", "1.weight", "1.weight"]
    folded, _ = fold(program_of("tied", False), tensors_of(model_of("tied")))
    assert len({op.weight for op in folded.ops if isinstance(op, FusedConv)}) == 3


def test_shared_modules():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(self.bn(self.conv(x))))

    model, x = draw(Twice()), images(3, 3, 6, 5)
    program = lower(model, x, train=True)
    assert [op.count for op in program.ops if isinstance(op, BatchNorm)] == ["bn.num_batches_tracked"] * 2
    check(program, tensors_of(model), x, output(model, x, train=True), train=True)
    folded, kept = fold(lower(model, x, train=False), tensors_of(model))
    check(folded, kept, x, output(model, x))


# Memory


class Forward(nn.Module):
    def __init__(self, forward, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.0)
        self.register_buffer("seen", torch.zeros(channels))
        self.offset = torch.tensor([[[0.5]]])
        self.function = forward

    def forward(self, x: Tensor):
        return self.function(self, x)


def relu_is_read_again(m, x):
    y = m.bn(m.conv(x))
    z = F.relu_(y)
    return m.conv2(z) + y


def relu_after_a_read(m, x):
    y = m.bn(m.conv(x))
    before = y * 1
    return m.pool(F.relu_(y)) + m.pool(before)


def copy_before_relu(m, x):
    y = m.bn(m.conv(x))
    before = y.clone()
    y.relu_()
    return y + before


def relu_through_dropout(m, x):
    y = m.bn(m.conv(x))
    F.relu_(m.drop(y))
    return m.conv2(y) + y


def view_of_a_dropout(m, x):
    y = m.bn(m.conv(x))
    flat = F.dropout2d(m.drop(y), 0.0, inplace=True).flatten(1)
    flat.relu_()
    return flat.view(y.shape) + 1


def add_in_place(m, x):
    y = m.bn(m.conv(x))
    z = m.bn2(m.conv2(y))
    z += y
    y.relu_()
    return z + y


def add_to_itself(m, x):
    y = m.bn(m.conv(x))
    return F.relu_(y.add_(y))


def relu_of_the_input(m, x):
    y = m.conv(x)
    F.relu_(x)
    return y + m.conv(x)


def relu_of_a_view(m, x):
    return m.conv(x).flatten(1).relu_()


def write_through_a_view(m, x):
    y = m.bn(m.conv(x))
    part = y[:, :2]
    part.relu_()
    return part.mean((2, 3))


def view_and_back(m, x):
    y = m.bn(m.conv(x))
    return F.relu_(y.flatten(1).view(y.shape)) + y


def half_of_a_result(m, x):
    a, b = m.bn(m.conv(x)).chunk(2, 1)
    return torch.cat((a, F.relu(b)), 1).permute(0, 2, 3, 1).flatten(1)


def constants(m, x):
    y = m.conv(x) + m.offset + torch.tensor(2.0)
    return y.mul_(torch.tensor([2.0]).detach()) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def sizes(m, x):
    return m.conv(x).reshape(x.size(0) * 4, -1).relu().view(x.size(0), -1) / x.shape[0]


def unused(m, x):
    m.bn2(m.conv2(m.conv(x)))
    return m.bn(m.conv(x))


def norm_is_read_twice(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y) + m.pool(F.relu(m.conv2(y))).mean()


def residual_then_pool(m, x):
    return m.pool(F.relu(m.bn2(m.conv2(x[:, :1].expand(-1, 4, -1, -1))) + m.conv(x)))


MEMORY = [
    relu_is_read_again,
    relu_after_a_read,
    copy_before_relu,
    relu_through_dropout,
    view_of_a_dropout,
    add_in_place,
    add_to_itself,
    relu_of_the_input,
    relu_of_a_view,
    write_through_a_view,
    view_and_back,
    half_of_a_result,
    constants,
    sizes,
    unused,
    norm_is_read_twice,
    residual_then_pool,
]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("forward", MEMORY)
def test_order_and_memory(forward, train):
    model, x = draw(Forward(forward)), images(3, 3, 6, 4)
    program, tensors, want = lower(model, x, train=train), tensors_of(model), output(model, x, train)
    for made in (program, fuse(program)):
        check_form(made, tensors)
        check(made, tensors, x, want, train)
    if not train:
        folded, kept = fold(program, tensors)
        check_form(folded, kept)
        check(folded, kept, x, want)


def view_of_a_changed_value(m, x):
    y = m.conv(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


def value_of_a_changed_view(m, x):
    y = m.conv(x)
    y[:, :2] += 1
    return y


def changed_buffer(m, x):
    y = m.conv(x)
    m.seen.mul_(0.9).add_(y.detach().mean((0, 2, 3)))
    return y


def changed_view_of_a_parameter(m, x):
    with torch.no_grad():
        m.conv.weight[0].zero_()
    return m.conv(x)


def part_without_gradient(m, x):
    with torch.no_grad():
        y = m.conv(x)
    return m.conv2(y)


def control_flow(m, x):
    if x.sum() > 0:
        return m.conv(x)
    return x


def fixed_batch(m, x):
    return m.conv(x).view(2, -1)


def drawn(m, x):
    return m.conv(x) * random.random()


def sum_of_all(m, x):
    return m.conv(x).sum()


UNSUPPORTED = [
    (view_of_a_changed_value, "in place and reads it by another view"),
    (value_of_a_changed_view, "in place and reads it by another view"),
    (changed_buffer, "the forward changes seen in place"),
    (changed_view_of_a_parameter, "another mode|in place"),
    (part_without_gradient, "another mode"),
    (control_flow, r"control flow depends on data: if x.sum\(\) > 0: \(.*test_program.py:\d+\)"),
    (fixed_batch, "the model fixes the batch size"),
    (drawn, "draws from Python's or numpy's generator"),
    (sum_of_all, "does not have the batch as its first dimension"),
    (lambda m, x: {"a": m.conv(x)}, "other than one tensor"),
    (lambda m, x: (m.conv(x), m.conv(x)), "other than one tensor"),
    (lambda m, x: None, "other than one tensor"),
    (lambda m, x: m.conv(x[:, :2]), "cannot be exported: .*channels"),
]


@pytest.mark.parametrize(("forward", "message"), UNSUPPORTED)
def test_unsupported_in_one_line(forward, message, capfd):
    model = Forward(forward)
    model.bn.eval()
    with pytest.raises(Unsupported, match=f"^.*{message}.*$") as caught:
        lower(model, torch.zeros(1, 3, 6, 4), train=True)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert model.training
    assert not model.bn.training


def test_any_signature_that_takes_images():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Conv2d(3, 4, 3)

        def forward(self, *args, scale=None, **kwargs):
            return self.module(*args, **kwargs)

    (op,) = lower(Wrapper(), torch.zeros(2, 3, 6, 4), train=True).ops
    assert op.weight == "module.weight"


def test_weights_under_torchs_pruning():
    model = Forward(lambda m, x: m.conv2(m.conv(x)))
    prune.l1_unstructured(model.conv, "weight", 0.5)
    weight = model.conv.weight
    program = lower(model, torch.zeros(2, 3, 6, 4), train=True)
    assert program.unknown == ["aten.mul", "aten.conv2d (weight or bias computed in the forward)"]
    assert model.conv.weight is weight


def test_two_inputs_are_unsupported():
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(Unsupported, match=r"^the model cannot be exported: missing a required argument: 'y'$"):
        lower(Two(), torch.zeros(2, 3, 6, 4), train=False)


def test_average_over_all_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    with pytest.raises(Unsupported, match=r"^1 averages over all batches \(momentum=None\)"):
        lower(model, torch.zeros(2, 3, 6, 4), train=True)
    assert kinds(lower(model, torch.zeros(2, 3, 6, 4), train=False)) == {"Conv": 1, "BatchNorm": 1}


def test_statistics_that_evaluation_would_change():
    def forward(m, x):
        return F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, training=True)

    with pytest.raises(Unsupported, match=r"^the forward changes bn.running_mean in place$"):
        lower(Forward(forward), torch.zeros(2, 3, 6, 4), train=False)


def test_gradient_that_stops():
    """In evaluation detach plays no part; in training it is an operation that an engine does not know."""
    model = Forward(lambda m, x: m.conv2(m.conv(x).detach()))
    x = torch.zeros(2, 3, 6, 4)
    assert lower(model, x, train=True).unknown == ["aten.detach"]
    assert kinds(lower(model, x, train=False)) == {"Conv": 2}
    weight = Forward(lambda m, x: F.conv2d(x, m.conv.weight.detach(), m.conv.bias))
    assert lower(weight, x, train=True).unknown == [
        "aten.detach",
        "aten.conv2d (weight or bias computed in the forward)",
    ]


def test_frozen_batch_norm():
    class Frozen(Forward):
        def train(self, mode: bool = True):
            super().train(mode)
            self.bn.eval()
            return self

    model = Frozen(lambda m, x: m.bn2(m.conv2(m.bn(m.conv(x)))))
    x = torch.zeros(2, 3, 6, 4)
    assert lower(model, x, train=True).unknown == ["aten.batch_norm (in evaluation mode)"]
    assert lower(model, x, train=False).unknown == []


def every_gradient(m, x):
    y = F.relu_(m.bn(m.conv(x)))
    z = m.drop(m.bn2(m.conv2(y))).add_(y)
    return m.pool(F.relu_(z + z)).mean((2, 3))


def test_gradients_are_the_models():
    model, x = draw(Forward(every_gradient)), images(3, 3, 6, 4)
    model.train()
    evaluate(fuse(lower(model, x, train=True)), tensors_of(model), x, True).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        # conv's bias before a batch norm has no gradient but rounding: all are compared by the largest.
        assert (got[name] - parameter.grad).abs().max() <= 1e-12 * model.conv.weight.grad.abs().max(), name


# The model


def test_the_model_is_left_as_it_was():
    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.BatchNorm2d(8))
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            return self.net(x + torch.rand(()) * random.randint(1, 1))

    model, x = Notes(), torch.randn(2, 3, 6, 5)
    model(x).sum().backward()
    model.net[1].eval()
    model.net[0].weight.requires_grad_(False)
    model.calls = 7

    def everything() -> list[object]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
        generators = [torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())]
        return [*(t.tolist() for t in tensors), flags, model.calls, id(model.last), generators, torch.is_grad_enabled()]

    before, objects = everything(), [id(p) for p in [*model.parameters(), *model.buffers()]]
    for train in (True, False):
        with pytest.raises(Unsupported, match="Python's"):  # randint
            lower(model, x, train=train)
        assert everything() == before
    lower(model.net, x, train=True)
    assert everything() == before
    assert [id(p) for p in [*model.parameters(), *model.buffers()]] == objects


def test_the_same_program_each_time_and_under_any_mode():
    model, x = Forward(relu_is_read_again), torch.zeros(4, 3, 6, 4)
    first = lower(model, x, train=True)
    with torch.no_grad():
        assert lower(model, x[:1], train=True) == first
    with torch.inference_mode():
        assert lower(model, x.to(memory_format=torch.channels_last), train=True) == first
    assert lower(model.eval(), x, train=True) == first


def test_the_model_can_be_freed():
    model = Forward(constants)
    program = lower(model, torch.zeros(2, 3, 6, 4), train=True)
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None
    assert list(program.constants.values())


def test_views_of_one_buffer_are_parameters():
    """As a Trainer's weights are."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    flat = torch.zeros(4 * 27 + 16)
    model[0].weight.data, model[1].weight.data = flat[: 4 * 27].view(4, 3, 3, 3), flat[4 * 27 :].view(4, 4, 1, 1)
    program = lower(model, torch.zeros(2, 3, 6, 4), train=True)
    assert [op.weight for op in program.ops if isinstance(op, Conv)] == ["0.weight", "1.weight"]


# Fusing and folding, by hand

MAP = (2, 4, 4)


def values(count: int) -> list[Value]:
    return [Value(i, MAP) for i in range(count)]


def conv(x: Value, y: Value, name: str = "w") -> Conv:
    return Conv(x, y, name, None, (1, 1), (1, 1), (0, 0))


def norm(x: Value, y: Value, name: str = "bn") -> BatchNorm:
    return BatchNorm(x, y, None, None, f"{name}.mean", f"{name}.var", None, 0.1, 1e-5)


def test_fuse_by_hand():
    v = values(6)
    b = norm(v[0], v[1])
    relu, pool = Relu(v[1], v[2]), MaxPool(v[2], v[3], (2, 2), (2, 2), (0, 0))
    assert fuse(Program((b, relu, pool), v[0], v[3])).ops == (Norm(v[0], v[3], b, None, True, pool),)
    # The output is in the middle of the chain.
    assert fuse(Program((b, relu, pool), v[0], v[2])).ops == (Norm(v[0], v[2], b, None, True, None), pool)
    # A second reader.
    add = Add(v[2], v[1], v[4])
    assert fuse(Program((b, relu, add), v[0], v[4])).ops == (Norm(v[0], v[1], b, None, False, None), relu, add)
    # Residuals of both sides, without pool.
    for add in (Add(v[1], v[0], v[2]), Add(v[0], v[1], v[2])):
        relu, pool = Relu(v[2], v[3]), MaxPool(v[3], v[4], (2, 2), (2, 2), (0, 0))
        want = (Norm(v[0], v[3], b, v[0], True, None), pool)
        assert fuse(Program((b, add, relu, pool), v[0], v[4])).ops == want
    # Twice the same.
    add = Add(v[1], v[1], v[2])
    assert fuse(Program((b, add), v[0], v[2])).ops == (Norm(v[0], v[1], b, None, False, None), add)


def test_fuse_two_norms_by_hand():
    v = values(7)
    a, b = norm(v[0], v[1], "a"), norm(v[0], v[2], "b")
    relu = Relu(v[3], v[4])
    for add in (Add(v[1], v[2], v[3]), Add(v[2], v[1], v[3])):
        assert fuse(Program((a, b, add, relu), v[0], v[4])).ops == (
            Norm(v[0], v[1], a, None, False, None),
            Norm(v[0], v[4], b, v[1], True, None),
        )
    # The later one is read elsewhere, too: then the Add is the earlier one's.
    add, other = Add(v[1], v[2], v[3]), Add(v[4], v[2], v[5])
    assert fuse(Program((a, b, add, relu, other), v[0], v[5])).ops == (
        Norm(v[0], v[2], b, None, False, None),
        Norm(v[0], v[4], a, v[2], True, None),
        other,
    )


def test_fold_by_hand():
    v = values(6)
    program = Program((conv(v[0], v[1]), norm(v[1], v[2]), Add(v[0], v[2], v[3]), Relu(v[3], v[4])), v[0], v[4])
    weight = torch.tensor([[1.0, 0.0], [-0.0, 3.0]])[:, :, None, None]
    tensors = {"w": weight, "bn.mean": torch.tensor([2.0, 4.0]), "bn.var": torch.tensor([4.0, 0.25]) - 1e-5}
    folded, made = fold(program, tensors)
    (op,) = folded.ops
    assert op == FusedConv(v[0], v[4], "w@2", "w@2.bias", (1, 1), (1, 1), (0, 0), v[0], True)
    assert set(made) == {"w@2", "w@2.bias"}
    torch.testing.assert_close(made["w@2"][:, :, 0, 0], torch.tensor([[0.5, 0.0], [0.0, 6.0]]))
    torch.testing.assert_close(made["w@2.bias"], torch.tensor([-1.0, -8.0]))
    assert tensors["w"] is weight


def test_zeros_stay_zeros():
    model = draw(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)))
    masks = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in ("0.weight", "2.weight")}
    for name, mask in masks.items():
        model.get_parameter(name).data.masked_fill_(~mask, 0)
    model.float()
    model[1].weight.data[0], model[1].running_var[1] = 1e20, -1e-5  # a scale without bounds: 1 / 0
    folded, tensors = fold(lower(model, torch.zeros(2, 3, 8, 8), train=False), tensors_of(model))
    assert kinds(folded) == {"FusedConv": 1, "Torch": 1, "Mean": 1, "Linear": 1}
    for name, mask in masks.items():
        (new,) = (tensor for key, tensor in tensors.items() if key.startswith(name) and tensor.dim() == 4)
        assert new.dtype == torch.float32
        assert not new[~mask].any()
        assert not torch.signbit(new[~mask]).any()
        assert new[mask].all()


def test_folding_rounds_once():
    model = draw(sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).float()
    program = lower(model, torch.zeros(2, 3, 8, 8), train=False)
    _, single = fold(program, tensors_of(model))
    _, double = fold(program, tensors_of(copy.deepcopy(model).double()))
    for name, tensor in single.items():
        assert torch.equal(tensor, double[name].float())


def test_lowered_in_float32_for_any_precision():
    model, x = Forward(relu_is_read_again), images(3, 3, 6, 4)
    program = lower(model, x.float(), train=False)
    draw(model)
    check(program, tensors_of(model), x, output(model, x))


def test_known_operations_only_where_they_fit():
    """What looks like a known operation but has other types, shapes or arguments runs in torch."""
    forwards = [
        lambda m, x: m.conv(x) + m.conv(x).mean((2, 3), keepdim=True),
        lambda m, x: torch.add(m.conv(x), m.conv(x), alpha=2),
        lambda m, x: m.conv(x) + torch.ones(4, 6, 4),
        lambda m, x: F.relu(m.conv(x).flatten(2)),
        lambda m, x: F.max_pool2d(m.conv(x), 2, dilation=2),
        lambda m, x: m.conv(x).mean(1),
        lambda m, x: F.linear(m.conv(x), x.new_ones(2, 4)),
        lambda m, x: m.conv(F.pad(x, (1, 0, 1, 0))),
        lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=2.0)),
        lambda m, x: F.relu(m.conv(x).long()),
        lambda m, x: m.conv(x).float() + m.conv(x).long(),
    ]
    x = images(3, 3, 6, 4)
    for forward in forwards:
        model = draw(Forward(forward))
        program = lower(model, x, train=False)
        assert any(isinstance(op, Torch) for op in program.ops)
        got = evaluate(program, tensors_of(model), x, False)
        torch.testing.assert_close(got, output(model, x), rtol=1e-12, atol=1e-12)


def test_mean_in_many_words():
    forwards = [
        lambda m, x: x.mean((2, 3)),
        lambda m, x: x.mean((-1, -2), keepdim=True).view(x.shape[0], -1),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.size(0), 3),
        lambda m, x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
        lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
        lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)),
        lambda m, x: F.avg_pool2d(x, (6, 4)).view(-1, 3),
        lambda m, x: m.drop(F.avg_pool2d(x, (6, 4))).view(-1, 3).contiguous(),
    ]
    x = images(3, 3, 6, 4)
    for forward in forwards:
        program = lower(Forward(forward), x, train=False)
        assert program.ops == (Mean(program.input, program.output),)
        check(program, {}, x, x.mean((2, 3)))
    # A map of one position is its mean.
    program = lower(Forward(lambda m, x: x.flatten(1)), images(2, 3, 1, 1), train=False)
    assert program.ops == (Mean(program.input, program.output),)
    # Where the map itself is read, too, the pooling stays torch's.
    excite = lower(Forward(lambda m, x: x * F.adaptive_avg_pool2d(x, 1)), x, train=False)
    assert excite.unknown == ["aten.adaptive_avg_pool2d", "aten.mul"]


def test_linear_and_vectors():
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(True), nn.Linear(5, 3, bias=False))
    program = lower(model, torch.zeros(2, 3, 6, 4), train=True)
    flat, first, relu, last = program.ops
    assert isinstance(flat, Torch)
    assert (flat.name, flat.y.shape) == ("aten.flatten", (72,))
    assert first == Linear(flat.y, first.y, "1.weight", "1.bias")
    assert relu == Relu(first.y, relu.y)
    assert last == Linear(relu.y, program.output, "3.weight", None)
