"""Files of compiled networks: exact, small, and refused in one line if anything is wrong with them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fastprune import InputError
from fastprune.files import file_kind, read_tensors, write_tensors
from fastprune.pruning.masks import Mask
from fastprune.sparse import CompiledModel, compile, load
from fastprune.sparse.file import Kept, decode, encode
from fastprune.specs import ModelSpec
from fastprune.training.models import build


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_gaps_come_back(gaps):
    places = np.cumsum(np.array(gaps, np.int64) + 1) - 1
    codes = encode(places)
    assert codes.dtype == np.uint8
    assert np.array_equal(decode(codes), places)


@pytest.mark.parametrize(
    ("places", "codes"),
    [
        ([], []),
        ([0], [0]),
        ([0, 1, 3], [0, 0, 1]),
        ([254], [254]),
        ([255], [255, 0]),
        ([256, 257], [255, 1, 0]),
        ([509, 510], [255, 254, 0]),
        ([510], [255, 255, 0]),
    ],
)
def test_codes(places, codes):
    assert encode(np.array(places, np.int64)).tolist() == codes
    assert decode(np.array(codes, np.uint8)).tolist() == places


def test_kept_weights_come_back():
    weight = torch.arange(24.0).view(2, 3, 2, 2)
    weight[:, 1] = 0
    kept = Kept.of(weight)
    assert kept.shape == (2, 2, 2, 3)
    assert torch.equal(kept.dense(), weight)
    assert np.array_equal(kept.mask, (weight != 0).permute(0, 2, 3, 1).numpy())
    assert kept.density == 15 / 24


def pruned(width: int = 8, density: float = 0.05) -> nn.Module:
    torch.manual_seed(3)
    model = build(ModelSpec(name="resnet18", classes=10, width=width)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not model.conv1:
            module.weight.data *= torch.rand(module.weight.shape) < density
    return model


@cache
def compiled() -> CompiledModel:
    return compile(pruned(), torch.zeros(1, 3, 32, 32))


IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_float32_is_exact(tmp_path):
    compiled().save(tmp_path / "net")
    again = load(tmp_path / "net")
    assert again.program == compiled().program
    assert torch.equal(again(IMAGES), compiled()(IMAGES))
    again.save(tmp_path / "second")
    assert torch.equal(load(str(tmp_path / "second"))(IMAGES), compiled()(IMAGES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "second"]


def test_float16_is_rounded(tmp_path):
    compiled().save(tmp_path / "net", dtype=torch.float16)
    want, got = compiled()(IMAGES), load(tmp_path / "net")(IMAGES)
    # A weight is off by at most 2**-11 of itself, and so is a layer's result; there are 21 layers.
    assert 0 < (got - want).abs().max() <= 21 * 2**-11 * want.abs().max()


def test_pre_activations_and_pools_come_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()
    )  # fmt: skip
    model[-1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.ReLU())
    model[3].weight.data[:, 1] = 0
    made = compile(model.eval(), IMAGES)
    made.save(tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")(IMAGES), made(IMAGES))


class Attention(nn.Module):
    """Operations of torch with all kinds of arguments: words, lists, types, devices, tuples, sizes and infinity;
    constants, and buffers of other types than float32."""

    def __init__(self) -> None:
        super().__init__()
        self.where: Tensor
        self.patch = nn.Conv2d(3, 16, 2, stride=2, groups=1)
        self.mix = nn.Conv2d(16, 16, 3, padding="same", groups=4)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 5)
        self.bias = nn.Parameter(torch.randn(9))
        self.register_buffer("where", torch.arange(81).view(9, 9) % 9)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.relu(self.patch(x)))
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * self.scale + self.bias[self.where]
        later = torch.arange(9, device=x.device)[:, None] < torch.arange(9, dtype=torch.int32)
        scores = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = F.gelu(x + scores @ v, approximate="tanh")
        x = x.reshape(x.shape[0] * 3, 3, 16).sum(1).view(x.shape[0], -1, 16)
        x = torch.where(x > torch.tensor([0.1, 0.2] * 8), x.to(torch.float64), 0).float()
        return self.head(x.contiguous(memory_format=torch.contiguous_format).mean(1))


def attention(density: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    model = Attention().eval()
    for layer in (model.mix, model.qkv):
        layer.weight.data *= torch.rand(layer.weight.shape) < density
    return model


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand(module.weight.shape) < 0.2
    return model


def concatenated() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(8, (2, 3), 8, num_classes=7).eval()
    return model.to(memory_format=torch.channels_last)


def with_lstm() -> nn.Module:
    """Rows of the image as a sequence."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(18, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x.transpose(1, 2).flatten(2))[1][0][-1]

    torch.manual_seed(0)
    return Rows().eval()


@pytest.mark.parametrize(
    ("make", "size"), [(attention, 6), (mobilenet, 32), (with_lstm, 6), pytest.param(concatenated, 32, id="densenet")]
)
def test_operations_in_torch_come_back(tmp_path, make, size):
    made = compile(make(), torch.zeros(1, 3, size, size))
    assert made.in_torch
    made.save(tmp_path / "net")
    again = load(tmp_path / "net")
    assert again.program == made.program
    assert again.in_torch == made.in_torch
    for batch in (1, 5, 17):
        x = torch.randn(batch, 3, size, size)
        assert torch.equal(again(x), made(x))
    again.save(tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == (tmp_path / "net").read_bytes()


def test_operations_in_torch_in_float16(tmp_path):
    model = attention()
    made = compile(model, torch.zeros(1, 3, 6, 6))
    made.save(tmp_path / "half", dtype=torch.float16)
    x = torch.randn(3, 3, 6, 6)
    # A weight is off by at most 2**-11 of itself; scores of the softmax pass that on about once.
    assert 0 < (load(tmp_path / "half")(x) - made(x)).abs().max() <= 8 * 2**-11 * made(x).abs().max()
    tensors, _ = read_tensors(tmp_path / "half")
    assert {name: tensors[name].dtype for name in ("where", "scale", "bias", "qkv.bias", "qkv.weight:kept")} == {
        "where": torch.int64, "scale": torch.float32, "bias": torch.float32, "qkv.bias": torch.float32,
        "qkv.weight:kept": torch.float16,
    }  # fmt: skip


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.79, 0.81, 1.0])
def test_zeros_of_layers_in_torch_take_no_space(tmp_path, density):
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=2), nn.Flatten()).eval()
    torch.manual_seed(1)
    weight = model[0].weight
    weight.data *= torch.rand(weight.shape) < density
    made = compile(model, torch.zeros(1, 64, 5, 5))
    made.save(tmp_path / "net")
    kept = int(weight.count_nonzero())
    # A kept weight takes five bytes, gaps above 254 one more; a dense one takes four. Metadata take a few kilobytes.
    least = min(5 * kept + weight.numel() // 255, 4 * weight.numel())
    assert least - weight.numel() // 255 <= (tmp_path / "net").stat().st_size <= least + 4096
    x = torch.randn(3, 64, 5, 5)
    assert torch.equal(load(tmp_path / "net")(x), made(x))


@torch.library.custom_op("fastprune_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operations_of_others_are_refused(tmp_path):
    class Theirs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return doubled(x)

    made = compile(Theirs().eval(), IMAGES)
    assert torch.equal(made(IMAGES), 2 * IMAGES)
    with pytest.raises(
        InputError, match=r"needs fastprune_tests\.doubled, which is no public operation of torch: write"
    ):
        made.save(tmp_path / "net")
    assert not list(tmp_path.iterdir())


def dense_bytes(model: nn.Module) -> int:
    return sum(4 * p.numel() for p in model.parameters())


def check_sizes(model: nn.Module, size: int, folder: Path, limit: float = 0.08) -> None:
    made = compile(model, torch.zeros(1, 3, size, size))
    made.save(folder / "full")
    made.save(folder / "half", dtype=torch.float16)
    full, half = ((folder / name).stat().st_size for name in ("full", "half"))
    assert full <= limit * dense_bytes(model)
    # Of a kept weight, 4 bytes of 5 become 2.
    assert half <= 0.65 * full


def test_size_at_95_percent(tmp_path):
    check_sizes(pruned(width=32), 32, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_size_of_whole_networks(tmp_path, name):
    torch.manual_seed(0)
    model = build(ModelSpec(name=name, classes=200)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module is not model.conv1:
            module.weight.data *= torch.rand(module.weight.shape) < 0.05
    # The last layer of ResNet-50, which is dense here, has 1.7 % of the weights.
    check_sizes(model, 64, tmp_path, 0.08 if name == "resnet18" else 0.085)


def test_a_large_weight_in_float16(tmp_path):
    model = pruned()
    model.fc.weight.data[0, 0] = 1e5
    with pytest.raises(InputError, match=r"fc.weight has a weight of 1e\+05, which float16 cannot hold"):
        compile(model, IMAGES).save(tmp_path / "net", dtype=torch.float16)
    with pytest.raises(InputError, match=r"saved in float32 or float16, not in torch\.bfloat16"):
        compiled().save(tmp_path / "net", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def refused(path: Path, match: str = "missing, corrupt or foreign|not one of fastprune's") -> None:
    with pytest.raises(InputError, match=match) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def changed(path: Path, made: CompiledModel, change: Callable[[dict[str, Tensor], dict], None]) -> Path:
    """A file of the network with changed content and a right checksum."""
    made.save(path)
    tensors, facts = read_tensors(path)
    facts = json.loads(json.dumps(facts))
    change(tensors, facts)
    write_tensors(path, tensors, facts)
    return path


def test_damaged_files(tmp_path):
    path = tmp_path / "net"
    refused(path, "missing")
    compiled().save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for end in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        refused(path)
    for place in rng.integers(0, len(content), 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :])
        refused(path)
    path.write_bytes(content + b"0")
    refused(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "net"
    save_file({"a": torch.zeros(3)}, path)
    refused(path, "a safetensors file, but not one of fastprune's")
    write_tensors(path, {"a": torch.zeros(3)}, {"epoch": 3})
    refused(path, "not a compiled network")
    write_tensors(path, {"a": torch.zeros(3)}, None)
    refused(path, "not a compiled network")
    path.write_bytes(b"PK\x03\x04" * 100)
    refused(path)


def test_files_of_another_kind_are_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    torch.save({"model": {}}, tmp_path / "checkpoint.pth")
    Mask.from_tensors({"weight": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "mask.safetensors")
    for name, kind in (
        ("photo.png", "a PNG image"),
        ("photo.jpg", "a JPEG image"),
        ("checkpoint.pth", r"a file of torch\.save"),
        ("mask.safetensors", "a mask of fastprune"),
    ):
        refused(
            tmp_path / name, rf"{name} is {kind}, expected a compiled network, as compile\.py --out NAME\.fastprune"
        )
    compiled().save(tmp_path / "net")
    for name, kind in (
        ("photo.png", "a PNG image"),
        ("checkpoint.pth", r"a file of torch\.save"),
        ("net", "a compiled network of fastprune"),
    ):
        with pytest.raises(InputError, match=rf"{name} is {kind}, expected a mask \(mask\.safetensors\)"):
            Mask.load(tmp_path / name)
    assert file_kind(tmp_path / "net") == "a compiled network of fastprune"
    assert file_kind(tmp_path / "nothing") is None


LAYER = "layer1.0.conv1.weight@"


def escapes(tensors: dict[str, Tensor], facts: dict) -> None:
    """One escape more: the places move beyond the layer's end."""
    name = next(name for name in tensors if name.startswith(LAYER) and name.endswith(":gaps"))
    tensors[name] = torch.cat([torch.full((10,), 255, dtype=torch.uint8), tensors[name]])


def too_few(tensors: dict[str, Tensor], facts: dict) -> None:
    name = next(name for name in tensors if name.startswith(LAYER) and name.endswith(":kept"))
    tensors[name] = tensors[name][:-1].clone()


def no_weight(tensors: dict[str, Tensor], facts: dict) -> None:
    del tensors["fc.bias"]


def wrong_bias(tensors: dict[str, Tensor], facts: dict) -> None:
    tensors["fc.bias"] = torch.zeros(11)


def wrong_format(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["format"] = 7


def wrong_size(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][3]["y"]["shape"] = [8, 9, 8]


def unknown_value(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][3]["x"]["number"] = 12345


def unknown_op(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][3]["op"] = "Torch"


def unknown_field(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][3]["groups"] = 1


def no_stride(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][0]["stride"] = [0, 2]


def negative_layer(tensors: dict[str, Tensor], facts: dict) -> None:
    name = next(name for name in facts["pruned"] if name.startswith(LAYER))
    facts["pruned"][name] = [-8, 3, -3, 8]


def twice(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["ops"][3]["y"] = facts["ops"][2]["y"]


def no_output(tensors: dict[str, Tensor], facts: dict) -> None:
    facts["output"]["number"] = 999


@pytest.mark.parametrize(
    "change",
    [
        escapes, too_few, no_weight, wrong_bias, wrong_format, wrong_size, unknown_value, unknown_op, unknown_field,
        no_stride, negative_layer, twice, no_output,
    ],
)  # fmt: skip
def test_files_with_a_right_checksum_and_wrong_content(tmp_path, change):
    refused(
        changed(tmp_path / "net", compiled(), change),
        "written by another version" if change is wrong_format else "not a compiled network",
    )


def put(what: str, value: object):
    """Puts a value into the first operation of torch."""

    def change(tensors: dict[str, Tensor], facts: dict) -> None:
        next(op for op in facts["ops"] if op["op"] == "Torch")[what] = value

    change.__name__ = f"{what} {value}"
    return change


def reads_lists(tensors: dict[str, Tensor], facts: dict) -> None:
    """Torch reads the weight of a layer in lists."""
    put("args", [{"name": next(iter(facts["pruned"]))}])(tensors, facts)


def first_before_a_kernel(facts: dict) -> dict:
    """The first operation of torch whose result a conv over kept weights reads."""
    read = {op["x"]["number"] for op in facts["ops"] if op["op"] == "FusedConv" and op["weight"] in facts["pruned"]}
    return next(op for op in facts["ops"] if op["op"] == "Torch" and op["y"]["number"] in read)


def change_value(facts: object, number: int, **changes: object) -> None:
    """Of a value, wherever it stands."""
    for part in facts.values() if isinstance(facts, dict) else facts if isinstance(facts, list) else ():
        change_value(part, number, **changes)
    if isinstance(facts, dict) and facts.get("number") == number:
        facts.update(changes)


def no_maps(tensors: dict[str, Tensor], facts: dict) -> None:
    """A kernel reads what is said to be no map."""
    change_value(facts, first_before_a_kernel(facts)["y"]["number"], shape=None)


def no_floats(tensors: dict[str, Tensor], facts: dict) -> None:
    change_value(facts, first_before_a_kernel(facts)["y"]["number"], plain=False)


def integers(tensors: dict[str, Tensor], facts: dict) -> None:
    name = next(op for op in facts["ops"] if op["op"] == "FusedConv")["bias"]
    tensors[name] = tensors[name].long()


def outside(tensors: dict[str, Tensor], facts: dict) -> None:
    """One escape more, in a layer that torch computes."""
    name = next(iter(facts["pruned flat"]))
    tensors[f"{name}:gaps"] = torch.cat([torch.full((999,), 255, dtype=torch.uint8), tensors[f"{name}:gaps"]])


@cache
def compiled_mobilenet() -> CompiledModel:
    return compile(mobilenet(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "change",
    [
        put("target", "aten.hardtanh_.default"), put("target", "aten.relu.out"), put("target", "aten.no_such.default"),
        put("target", "aten.from_file.default"), put("target", "aten.save.default"),
        put("target", "aten.manual_seed.default"), put("target", "aten._no_grad_embedding_renorm_.default"),
        put("target", "aten._sparse_coo_tensor_unsafe.default"), put("target", "aten.set_grad_enabled.default"),
        put("target", "aten.linear"),
        put("target", "prims.convert_element_type.default"), put("target", "system"), put("target", 3),
        put("args", [{"name": "no such weight"}]), put("args", [{"dtype": "load"}]),
        put("args", [{"dtype": "strided"}]), put("args", [{"device": "nowhere"}]), put("args", [{"module": "os"}]),
        put("args", [{}]), put("args", None),
        put("args", [{"value": {"number": 12345, "shape": [3]}}]), put("kwargs", [3]), put("y", None),
        reads_lists, no_maps, no_floats, integers, outside,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_operations_in_torch_that_no_file_has(tmp_path, change):
    refused(changed(tmp_path / "net", compiled_mobilenet(), change), "not a compiled network")


@pytest.mark.parametrize(
    ("give", "kwargs", "got"),
    [
        ("aten.sum.default", {}, r"the shape \[\]"),
        ("aten.isnan.default", {}, r"bool in torch\.strided on cpu"),
        ("aten.empty_like.default", {"device": {"device": "meta"}}, r"float32 in torch\.strided on meta"),
        ("aten.unbind.int", {}, "tuple|list"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_torch_gives_is_checked_before_a_kernel_reads_it(tmp_path, give, kwargs, got):

    def change(_: dict[str, Tensor], facts: dict) -> None:
        first = first_before_a_kernel(facts)
        first.update(target=give, args=first["args"][:1], kwargs=kwargs)

    net = load(changed(tmp_path / "net", compiled_mobilenet(), change))
    for batch in (1, 20):
        with pytest.raises(InputError, match=f"gives ({got}), and the program says float32"):
            net(torch.zeros(batch, 3, 32, 32))


class Turned(nn.Module):
    """A complex buffer, as of rotary embeddings; a minus that torch leaves for later; a result in float64."""

    def __init__(self, turns: Tensor) -> None:
        super().__init__()
        self.turns: Tensor
        self.register_buffer("turns", turns)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.view_as_real(torch.complex(x, x) * self.turns)[..., 1].float()
        return self.conv(torch.fft.fft2(x).conj().imag).mean((2, 3)).double()


def test_complex_numbers(tmp_path):
    torch.manual_seed(0)
    model = Turned(torch.polar(torch.ones(6), torch.arange(6.0))).eval()
    model.conv.weight.data *= torch.rand(model.conv.weight.shape) < 0.5
    made = compile(model, torch.zeros(1, 3, 6, 6))
    made.save(tmp_path / "net")
    for batch in (1, 17):
        x = torch.randn(batch, 3, 6, 6)
        assert torch.equal(load(tmp_path / "net")(x), made(x))
        assert (made(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    with pytest.raises(InputError, match=r"turns in torch\.complex128"):
        compile(Turned(model.turns.to(torch.complex128)).eval(), torch.zeros(1, 3, 6, 6)).save(tmp_path / "net")


def test_names_that_a_file_uses_itself(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterDict({"w": torch.zeros(4, 4), "w:kept": torch.ones(4)})

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :4] @ self.weights["w"]).sin() * self.weights["w:kept"]

    with pytest.raises(InputError, match=r"a tensor by the name weights\.w:kept"):
        compile(Named().eval(), torch.zeros(1, 3, 6, 6)).save(tmp_path / "net")


def test_files_of_format_1(tmp_path):
    """Without operations of torch."""
    compiled().save(tmp_path / "net")
    tensors, facts = read_tensors(tmp_path / "net")
    assert facts.pop("constants") == []
    assert facts.pop("pruned flat") == {}
    write_tensors(tmp_path / "net", tensors, facts | {"format": 1})
    assert torch.equal(load(tmp_path / "net")(IMAGES), compiled()(IMAGES))
