"""lowered(): which convs become GEMMs, what they compute, and everything that must stay as it is."""

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastprune.pruning.layers import MaskedConv2d
from fastprune.training.flat import FlatParams
from fastprune.training.lower import lowered, overruns, pays


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(t: Tensor) -> Tensor:
    """As FlatParams stores a weight: inside a longer buffer."""
    A, B, H, W = t.shape
    buffer = torch.cat([torch.full((64,), torch.nan), t.permute(0, 2, 3, 1).flatten()])
    return buffer[64:].view(A, H, W, B).permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": channels_last,
    "contiguous": lambda t: t.contiguous(),
    "strided": lambda t: t.repeat_interleave(2, 3).repeat_interleave(2, 0)[::2, :, :, ::2],
    "sliced": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]],
    "expanded": lambda t: t[:, :, :1, :1].expand(t.shape),
}


def results(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, *how, **more) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.conv2d(leaves[0], leaves[1], None if bias is None else leaves[2], *how, **more)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def is_lowered(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_GemmsBackward"


class Conv(NamedTuple):
    """Arguments of a conv; `layouts` are those of x, weight and grad."""

    kernel: tuple[int, int]
    size: tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | str | tuple[int, ...]
    C: int = 24
    C_out: int = 33
    more_images: int = 0
    bias: bool = False
    layouts: tuple[str, str, str] = ("channels-last",) * 3

    @property
    def out(self) -> tuple[int, ...]:
        x, weight = (torch.empty(1, 1, *size, device="meta") for size in (self.size, self.kernel))
        return F.conv2d(x, weight, None, self.stride, self.padding).shape[2:]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, weight, bias and grad, of as many images as are worth it."""
        N = math.ceil(2**16 * math.prod(self.out) / (self.C * self.C_out)) + self.more_images
        shapes = (N, self.C, *self.size), (self.C_out, self.C, *self.kernel), (N, self.C_out, *self.out)
        x, weight, grad = (
            LAYOUTS[name](random(*s, seed=i)) for i, (name, s) in enumerate(zip(self.layouts, shapes, strict=True))
        )
        return x, weight, random(self.C_out, seed=3) if self.bias else None, grad


@st.composite
def convs(draw) -> Conv:
    """A conv that pays, of which x or weight is channels-last."""
    stride = draw(st.sampled_from([1, 2, (1, 2), (2, 1)]))
    padding = draw(st.sampled_from([0, 1, 2, 3, (0, 1), (3, 0), (1,), "valid", *(["same"] if stride == 1 else [])]))
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 7])) for _ in range(2))
    size = []
    for axis, k in enumerate(kernel):
        s = stride if isinstance(stride, int) else stride[axis]
        p = padding if isinstance(padding, int) else 0 if isinstance(padding, str) else (padding * 2)[axis]
        least = draw(st.integers(0, 4)) * s + (1 if padding == "same" else k - 2 * p)
        size.append(max(1, least + draw(st.integers(0, s - 1))))
    layouts = [draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(3)]
    layouts[draw(st.integers(0, 1))] = "channels-last"
    channels = draw(st.integers(16, 40)), draw(st.integers(30, 50))
    conv = Conv(
        kernel, tuple(size), stride, padding, *channels, draw(st.integers(0, 3)), draw(st.booleans()), tuple(layouts)
    )
    assume(math.prod(conv.out) <= 9)
    return conv


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(deadline=None, max_examples=60)
@given(convs())
@example(Conv((1, 1), (3, 3), 2, 1))  # as many outputs as inputs, at other positions
@example(Conv((1, 1), (1, 1), 1, (2, 0)))  # outputs that see padding only
@example(Conv((2, 2), (2, 2), 1, "same"))  # padding on one side
@example(Conv((3, 3), (1, 1), 1, 1, layouts=("contiguous", "channels-last", "expanded")))  # an x of both formats
@example(Conv((1, 1), (2, 2), 1, 0, layouts=("channels-last", "contiguous", "expanded")))  # a weight of both
def test_results_are_those_of_float64_and_strides_are_torchs(conv):
    tensors, how = conv.tensors(), (conv.stride, conv.padding)
    exact = results(*(t if t is None else t.double() for t in tensors), *how)
    by_torch = results(*tensors, *how)
    with lowered():
        ours = results(*tensors, *how)
    assert pays(tensors[0].shape, tensors[1].shape, *how, 1, 1)
    assert is_lowered(ours[0])
    for our, theirs, right in zip(ours, by_torch, exact, strict=True):
        assert our.stride() == theirs.stride()
        # A sum of 7 x 7 x 40 products, or of some thousands over a batch, has an error of sqrt(2000) x 2^-24 of itself.
        assert (our - right).abs().max() <= 4e-6 * right.abs().max()


@settings(deadline=None, max_examples=60)
@given(
    channels=st.tuples(st.integers(1, 7), st.integers(1, 20)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.sampled_from([2, 3, (1, 2), (2, 1), [2, 2], (2,)]),
    padding=st.sampled_from([0, (0, 0), (0,), "valid"]),
    batch=st.integers(0, 5),
    bias=st.booleans(),
    gemms=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3).filter(lambda names: "channels-last" in names[:2]),
)
def test_what_onednn_overruns_is_computed_without_a_stride(
    channels, size, stride, padding, batch, bias, gemms, layouts
):
    """Torch itself is asked in float64 only: in float32 such a step can end the process."""
    C, C_out = channels
    shape = F.conv2d(torch.empty(batch, 1, *size), torch.empty(C_out, 1, 1, 1), None, stride, padding).shape
    x, weight, grad = (
        LAYOUTS[name](random(*s, seed=i))
        for i, (name, s) in enumerate(zip(layouts, [(batch, C, *size), (C_out, C, 1, 1), shape], strict=True))
    )
    tensors = x, weight, random(C_out, seed=3) if bias else None, grad
    exact = results(*(t if t is None else t.double() for t in tensors), stride, padding)
    with lowered(gemms) as lowering:
        ours = results(*tensors, stride, padding)
    assert overruns(weight.shape, stride, padding, 1)
    for our, right in zip(ours, exact, strict=True):
        assert our.shape == right.shape
        torch.testing.assert_close(our.double(), right, rtol=1e-5, atol=1e-5)
    # Of a single channel or position torch may take both layouts for contiguous, which oneDNN has right.
    assert lowering.convs == 1 or min(C, math.prod(size)) == 1


@pytest.mark.parametrize(
    ("weight", "how"),
    [
        ((8, 8, 1, 1), (2, 0, 1)),  # a whole vector
        ((8, 4, 1, 1), (1, 0, 1)),
        ((8, 4, 1, 1), (2, 1, 1)),
        ((8, 4, 1, 1), (2, "same", 1)),
        ((8, 4, 1, 1), ((2, -1), 0, 1)),
        ((8, 4, 3, 1), (2, 0, 1)),
        ((8, 4, 1, 1), (2, 0, 2)),
        ((8, 4, 1), (2, 0, 1)),
    ],
)
def test_other_strided_convs_are_not_overrun(weight, how):
    assert not overruns(weight, *how)


def conv_3x3(size: int = 2, channels: int = 64, batch: int = 64, **settings) -> tuple[nn.Conv2d, Tensor]:
    """A conv and its input, channels-last, a conv that pays by default."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, **{"padding": 1} | settings)
    return conv.to(memory_format=torch.channels_last), channels_last(random(batch, channels, size, size))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poisoned", ["x", "weight", "grad"])
def test_a_value_that_is_not_finite_reaches_what_depends_on_it_and_nothing_else(poisoned, value):
    tensors = {"x": random(64, 64, 2, 2), "weight": random(64, 64, 3, 3), "grad": random(64, 64, 2, 2)}
    tensors[poisoned].view(-1)[[0, 77]] = value
    # How many of its terms are not finite: the same sums, of ones where a factor is not.
    ones = {name: torch.ones_like(t) for name, t in tensors.items()}
    ones[poisoned] = (~tensors[poisoned].isfinite()).float()
    terms = results(ones["x"], ones["weight"], None, ones["grad"], 1, 1)
    with lowered():
        ours = results(tensors["x"], channels_last(tensors["weight"]), None, tensors["grad"], 1, 1)
    dependent = {"x": (0, 2), "weight": (0, 1), "grad": (1, 2)}[poisoned]
    for i, (our, count) in enumerate(zip(ours, terms, strict=True)):
        assert torch.equal(~our.isfinite(), count > 0 if i in dependent else torch.zeros_like(our, dtype=torch.bool))


CONTIGUOUS = nn.Conv2d(64, 64, 3, padding=1)
PASSED_ON = {
    "a large map": lambda: conv_3x3(size=4),
    "too little work": lambda: conv_3x3(batch=4),
    "few channels": lambda: conv_3x3(channels=8, batch=4096),
    "groups": lambda: conv_3x3(groups=2),
    "dilation": lambda: conv_3x3(dilation=2, padding=2),
    "float64": lambda: tuple(t.double() for t in conv_3x3(bias=False)),
    "bfloat16": lambda: tuple(t.bfloat16() for t in conv_3x3(bias=False)),
    "contiguous": lambda: tuple(t.to(memory_format=torch.contiguous_format) for t in conv_3x3()),
    "contiguous, on one image": lambda: (CONTIGUOUS, channels_last(random(1, 64, 2, 2)).expand(64, 64, 2, 2)),
    "contiguous, on one channel": lambda: (CONTIGUOUS, random(64, 1, 2, 2).expand(64, 64, 2, 2)),
    "1x1, which has the strides of both formats": lambda: (nn.Conv2d(512, 512, 1), random(64, 512, 1, 1)),
    "one image": lambda: (conv_3x3(channels=512)[0], conv_3x3(channels=512)[1][0]),
    "no image": lambda: conv_3x3(batch=0),
    "a tensor of another class": lambda: (conv_3x3()[0], conv_3x3()[1].as_subclass(type("Image", (Tensor,), {}))),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_other_convs_stay_torchs_to_the_bit(name):
    conv, x = PASSED_ON[name]()

    def step() -> list[Tensor]:
        y = conv(x)
        assert not is_lowered(y)
        return [y, *torch.autograd.grad(y.square().sum(), list(conv.parameters()))]

    before = step()
    with lowered():
        inside = step()
    for a, b in zip(before, inside, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize(
    "transform",
    [
        torch.autocast("cpu"),
        partial(torch.compile, backend="aot_eager"),
        lambda conv: lambda x: vmap(conv)(torch.stack([x, -x])),
        lambda conv: torch.func.grad(lambda x: conv(x).square().sum()),
    ],
    ids=["autocast", "torch.compile", "vmap", "torch.func.grad"],
)
def test_transformed_convs_stay_torchs_to_the_bit(transform):
    conv, x = conv_3x3()
    transformed = transform(conv)
    before = transformed(x)
    with lowered():
        assert torch.equal(transformed(x), before)


@pytest.mark.parametrize(
    "change",
    [
        {"padding": -1, "weight": random(64, 64, 1, 1), "input": channels_last(random(64, 64, 4, 4))},
        {"padding": (1, 1, 1)},
        {"stride": (1, 1, 1)},
        {"stride": ()},
        {"padding": "all"},
        {"padding": "same", "stride": 2},
        {"stride": 0},
        {"padding": 0, "stride": 1},  # the kernel is larger than the map
        {"bias": torch.zeros(3)},
        {"bias": torch.zeros(64, dtype=torch.float64)},
        {"weight": torch.zeros(64, 32, 3, 3)},
        {"weight": torch.zeros(64, 4, 1, 1), "padding": 0, "stride": 2},
        {"weight": torch.zeros(64, 64, 3)},
        {"input": torch.zeros(64, 64)},
        {"input": None},
    ],
    ids=lambda change: " ".join(change),
)
def test_errors_are_torchs(change):
    conv, x = conv_3x3()
    arguments = {"input": x, "weight": conv.weight, "padding": 1} | change
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        F.conv2d(**arguments)
    with lowered(), pytest.raises(theirs.type) as ours:
        F.conv2d(**arguments)
    assert str(ours.value) == str(theirs.value)


def test_nothing_changes_outside():
    conv, x = conv_3x3()
    with lowered():
        with lowered():
            assert is_lowered(conv(x))
        assert is_lowered(conv(x))
        with ThreadPoolExecutor(1) as other_thread:
            assert not other_thread.submit(lambda: is_lowered(conv(x))).result()
    assert not is_lowered(conv(x))
    with pytest.raises(TypeError), lowered():
        conv(x, x)
    assert not is_lowered(conv(x))


def test_it_counts_what_it_lowers():
    conv, x = conv_3x3()
    with lowered() as lowering:
        conv(torch.cat([x, x, x, x, x], 2))
        assert lowering.convs == 0
        conv(conv(x))
    assert lowering.convs == 2


def test_modules_keep_their_classes_and_may_be_copied_and_called_by_name():
    class Padded(nn.Conv2d):
        pass

    kinds = [nn.Conv2d, MaskedConv2d, Padded]
    x = conv_3x3()[1]
    model = nn.Sequential(*(kind(64, 64, 3, padding=1) for kind in kinds)).to(memory_format=torch.channels_last)
    reflecting = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect").to(memory_format=torch.channels_last)
    weights = {name: torch.zeros_like(p, requires_grad=True) for name, p in model.named_parameters()}
    expected = model(x), reflecting(x)
    with lowered():
        for y, by_torch in zip((copy.deepcopy(model)(x), reflecting(x)), expected, strict=True):
            assert is_lowered(y)
            torch.testing.assert_close(y, by_torch)
        y = functional_call(model, weights, (x,))
        assert is_lowered(y)
        assert not y.any()
        assert [type(layer) for layer in model] == kinds


@pytest.mark.parametrize(("wanted", "gemms"), [("input", 8), ("weight", 8), ("bias", 0)])
def test_only_gradients_that_are_asked_for_are_computed(wanted, gemms):
    conv, x = conv_3x3()
    leaves = {"input": x, "weight": conv.weight, "bias": conv.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)

    class Counted(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func is torch.ops.aten.addmm_.default
            return func(*args, **(kwargs or {}))

    with lowered():
        y = conv(x)
    with Counted() as counted:
        y.sum().backward()
    assert counted.calls == gemms
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


@pytest.mark.parametrize("bias", [True, False])
def test_its_output_may_be_written_in_place(bias):
    """As by nn.ReLU(inplace=True) behind a conv without a norm (VGG, squeeze and excitation)."""
    found = []
    for how in (nullcontext, lowered):
        conv = nn.Conv2d(32, 64, 3, padding=1, bias=bias)
        with torch.no_grad():
            for number, p in enumerate(conv.parameters()):
                p.copy_(random(*p.shape, seed=number))
        with how():
            y = conv(channels_last(random(128, 32, 2, 2, seed=5)))
        assert is_lowered(y) == (how is lowered)
        y.relu_().sum().backward()
        found.append([y.detach(), *(p.grad for p in conv.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_no_graph_without_gradients():
    conv, x = conv_3x3()
    with lowered():
        with torch.no_grad():
            assert not conv(x).requires_grad
        with torch.inference_mode():
            assert conv(x).is_inference()


def test_a_second_derivative_is_an_error():
    conv, x = conv_3x3()
    with lowered():
        (grad,) = torch.autograd.grad(conv(x).square().sum(), conv.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_compute_the_same_gradients(reentrant):
    conv, x = conv_3x3()
    x.requires_grad_()
    with lowered():
        (by_hand,) = torch.autograd.grad(conv(x).square().sum(), x)
        checkpoint(conv, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, by_hand)


def test_resnet18_on_flat_parameters():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for module in list(model.modules()):
        if hasattr(module, "relu"):
            module.relu = nn.SiLU()  # smooth: rounding on the other side of ReLU's corner would not be a small error
    x, labels = channels_last(random(4, 3, 64, 64)), torch.arange(4)
    exact = copy.deepcopy(model).double()
    flat = FlatParams(model)

    def compute() -> list[Tensor]:
        loss = F.cross_entropy(model(x), labels)
        flat.backward(loss)
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    loss = F.cross_entropy(exact(x.double()), labels)
    right = [loss.detach(), *torch.autograd.grad(loss, list(exact.parameters()))]
    by_torch = compute()
    with lowered():
        ours = compute()
    for our, theirs, value in zip(ours, by_torch, right, strict=True):
        error, of_torch = ((t - value).norm() / value.norm() for t in (our, theirs))
        assert error <= 2 * of_torch + 2**-23
    assert not all(map(torch.equal, ours, by_torch))  # something was lowered


@pytest.mark.parametrize(
    ("x", "weight", "stride", "padding", "pays_"),
    [
        # ResNet-18 of width 64, batch 64: layer4, its first conv and its shortcut at 64x64, then at 32x32
        ((64, 512, 2, 2), (512, 512, 3, 3), 1, 1, True),
        ((64, 256, 4, 4), (512, 256, 3, 3), (2, 2), (1, 1), True),
        ((64, 256, 4, 4), (512, 256, 1, 1), [2, 2], [0, 0], True),
        ((64, 512, 1, 1), (512, 512, 3, 3), 1, "same", True),
        ((64, 256, 2, 2), (512, 256, 3, 3), 2, 1, True),
        # layer3 at 64x64, and the stem
        ((64, 256, 4, 4), (256, 256, 3, 3), 1, 1, False),
        ((64, 3, 64, 64), (64, 3, 7, 7), 2, 3, False),
        # layer4 of width 4
        ((64, 32, 2, 2), (32, 32, 3, 3), 1, 1, False),
        ((1024, 32, 2, 2), (32, 32, 3, 3), 1, 1, True),
    ],
)
def test_which_convs_pay(x, weight, stride, padding, pays_):
    assert pays(x, weight, stride, padding, 1, 1) is pays_
    assert not pays(x, weight, stride, padding, 2, 1)
    assert not pays(x, weight, stride, padding, 1, 2)
