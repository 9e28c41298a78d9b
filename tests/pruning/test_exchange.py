"""Masks from and to elsewhere: tensors, arrays, state dicts, files of others, torch.nn.utils.prune."""

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fastprune import InputError, Mask, Pruner, to_torch_prune
from fastprune.files import write_tensors
from fastprune.pruning.exchange import named_masks, read_masks


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def pruner_of(model: nn.Module, **options: Any) -> Pruner:
    return Pruner(model, verbose=False, **options)


def some_masks(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=g) < 0.4 for name, w in pruner_of(model).weights().items()}


def assert_taken(pruner: Pruner, masks: dict[str, Tensor]) -> None:
    """The Pruner has these masks, and its model's pruned weights are +0."""
    assert list(pruner.masks) == list(masks)
    for name, weight in pruner.weights().items():
        assert torch.equal(pruner.masks[name], masks[name])
        assert not weight[~masks[name]].any()
        assert not weight[~masks[name]].signbit().any()


FORMS = {
    "a Mask": Mask.from_tensors,
    "bool": dict,
    "uint8": lambda masks: {n: m.byte() for n, m in masks.items()},
    "int": lambda masks: {n: m.int() for n, m in masks.items()},
    "float": lambda masks: {n: m.float() for n, m in masks.items()},
    "bf16": lambda masks: {n: m.bfloat16() for n, m in masks.items()},
    "minus zeros": lambda masks: {n: torch.where(m, 1.0, -0.0) for n, m in masks.items()},
    "channels-last": lambda masks: {
        n: m.to(memory_format=torch.channels_last) if m.dim() == 4 else m for n, m in masks.items()
    },
    "another order": lambda masks: dict(reversed(masks.items())),
    "numpy bool": lambda masks: {n: m.numpy() for n, m in masks.items()},
    "numpy float64": lambda masks: {n: m.double().numpy() for n, m in masks.items()},
    "numpy, read-only": lambda masks: {n: np.broadcast_to(m.numpy(), m.shape) for n, m in masks.items()},
    "numpy, backwards": lambda masks: {n: np.flip(np.flip(m.numpy(), 0).copy(), 0) for n, m in masks.items()},
    "numpy, Fortran": lambda masks: {n: np.asfortranarray(m.numpy()) for n, m in masks.items()},
    "lists": lambda masks: {n: m.int().tolist() for n, m in masks.items()},
    "DDP's names": lambda masks: {f"module.{n}": m for n, m in masks.items()},
    "torch's names": lambda masks: {f"{n}_mask": m.float() for n, m in masks.items()},
    "both": lambda masks: {f"module.{n}_mask": m.float() for n, m in masks.items()},
    "with other entries": lambda masks: {
        **masks, "0.bias": torch.ones(4), "1.running_mean": torch.zeros(4), "1.num_batches_tracked": torch.tensor(3),
        "attn.bias": torch.ones(1, 1, 4, 4).tril(), "optimizer": None, "7.weight": torch.ones(2, 2),
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_masks_in_every_form(form):
    model = net()
    masks = some_masks(model)
    pruner = pruner_of(model)
    given = FORMS[form](masks)
    kept = copy.deepcopy(given)
    pruner.set_masks(given)
    assert_taken(pruner, masks)
    for name, mask in pruner.masks.items():
        mask.logical_not_()
        other = (kept.tensors() if isinstance(kept, Mask) else kept).get(name)
        if isinstance(other, Tensor):  # what was given is not the Pruner's own memory
            assert torch.equal((given.tensors() if isinstance(given, Mask) else given)[name], other)


def test_a_state_dict_under_torchs_hooks():
    """As it stands, with weight_orig, weight_mask, biases and statistics."""
    model, other = net(), net()
    masks = some_masks(model)
    for name, mask in masks.items():
        torch_prune.custom_from_mask(other.get_submodule(name.partition(".")[0]), "weight", mask)
    pruner = pruner_of(model)
    pruner.set_masks(other.state_dict())
    assert_taken(pruner, masks)


def test_a_buffer_named_mask_goes_before_the_weight_itself():
    model = net()
    masks = some_masks(model)
    pruner = pruner_of(model)
    pruner.set_masks({**model.state_dict(), **{f"{n}_mask": m for n, m in masks.items()}})
    assert_taken(pruner, masks)


def test_a_model_whose_own_names_look_like_others():
    """A submodule named `module`, and a parameter `w_mask`."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.module.w_mask = nn.Parameter(torch.ones(2, 3))

    class Own(nn.Linear):
        pass

    model = Odd()
    pruner = pruner_of(model)
    assert pruner.names == ("module.weight", "head.weight")
    pruner.prune(0.5)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    for form in (masks, Mask.from_tensors(masks), {f"module.{name}": mask for name, mask in masks.items()}):
        other = pruner_of(Odd())
        other.set_masks(form)
        assert_taken(other, masks)
    shapes = {"w": (2,), "w_mask": (3,)}
    found = named_masks({"w": torch.ones(2), "w_mask": torch.zeros(3)}, shapes)
    assert {name: mask.tolist() for name, mask in found.items()} == {"w": [True] * 2, "w_mask": [False] * 3}


# What does not fit

ONE = torch.ones(4, 2, 3, 3)
LINEAR = torch.ones(3, 64)
BAD: dict[str, tuple[Any, str]] = {
    "soft": ({"0.weight": ONE, "4.weight": LINEAR * 0.3}, r"the mask of 4\.weight has the value 0\.3: masks are 0 and"),
    "two": ({"0.weight": ONE.long() * 2, "4.weight": LINEAR}, r"0\.weight has the value 2:"),
    "minus one": ({"0.weight": -ONE, "4.weight": LINEAR}, r"0\.weight has the value -1:"),
    "NaN": ({"0.weight": ONE, "4.weight": LINEAR * torch.nan}, r"4\.weight has the value nan"),
    "numpy, soft": ({"0.weight": ONE.numpy(), "4.weight": np.full((3, 64), 0.25)}, r"4\.weight has the value 0\.25"),
    "a missing layer": ({"0.weight": ONE}, r"there is no mask of 4\.weight; there are 0\.weight"),
    "empty": ({}, r"there are no masks: give a tensor of 0 and 1 for each of 0\.weight"),
    "other names": ({"conv": ONE, "fc": LINEAR}, r"no mask of 0\.weight; there are conv, fc"),
    "another shape": (
        {"0.weight": ONE, "4.weight": LINEAR.mT},
        r"4\.weight has shape \(64, 3\), its weight \(3, 64\)",
    ),
    "flat": ({"0.weight": ONE.flatten(), "4.weight": LINEAR}, r"shape \(72,\), its weight \(4, 2, 3, 3\)"),
    "a Mask of one layer more": (
        Mask.from_tensors({"0.weight": ONE > 0, "4.weight": LINEAR > 0, "5.weight": LINEAR > 0}),
        r"there is a mask of 5\.weight, but only these are pruned: 0\.weight, 4\.weight",
    ),
    "a layer more that is pruned": (
        {"0.weight": ONE, "4.weight": LINEAR, "5.weight": torch.eye(4)},
        r"there is a mask of 5\.weight",
    ),
    "a layer more under torch's names": (
        {"0.weight": ONE, "4.weight": LINEAR, "5.weight_orig": torch.eye(4) / 2, "5.weight_mask": torch.eye(4)},
        r"there is a mask of 5\.weight_mask",
    ),
    "text": ({"0.weight": ONE, "4.weight": "ones"}, r"the mask of 4\.weight is the str 'ones': give a bool"),
    "nothing": ({"0.weight": ONE, "4.weight": None}, r"the mask of 4\.weight is None: give a bool tensor"),
    "a list": ([ONE, LINEAR], "masks are a dict by parameter name, a Mask or a path, not a list"),
    "no masks": (None, "a Mask or a path, not None"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_changes_nothing(what):
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.3)
    before, old = copy.deepcopy(model.state_dict()), copy.deepcopy(dict(pruner.masks))
    masks, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        pruner.set_masks(masks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(old[name], mask) for name, mask in pruner.masks.items())


def test_masks_of_layers_that_a_pruner_of_convs_leaves_out_are_not_lost_in_silence():
    model = net()
    masks = some_masks(model)
    with pytest.raises(ValueError, match=r"there is a mask of 4\.weight, but only these are pruned: 0\.weight"):
        pruner_of(model, kinds="conv").set_masks(masks)
    dense = {**masks, "4.weight": torch.ones(3, 64)}
    pruner = pruner_of(model, kinds="conv")
    pruner.set_masks(dense)
    assert torch.equal(pruner.masks["0.weight"], masks["0.weight"])


def test_a_mask_is_made_of_bools_only():
    with pytest.raises(ValueError, match=r"the mask of b has dtype torch\.float32, expected bool"):
        Mask.from_tensors({"a": torch.ones(2, dtype=torch.bool), "b": torch.tensor([0.3, 1.0])})


def test_ratios_of_a_layer_without_weights():
    mask = Mask.from_tensors({"a": torch.ones(0, 3, dtype=torch.bool), "b": torch.tensor([True, False])})
    assert mask.layerwise_ratios() == {"a": 0.0, "b": 0.5}


# Files


def save_legacy(masks: dict[str, Tensor], path: Path) -> None:
    torch.save({n: m.int() for n, m in masks.items()}, path, _use_new_zipfile_serialization=False)


FILES = {
    "ours": lambda masks, path: Mask.from_tensors(masks).save(path),
    "safetensors of bytes": lambda masks, path: safetensors.torch.save_file(
        {n: m.byte() for n, m in masks.items()}, path
    ),
    "safetensors with metadata": lambda masks, path: safetensors.torch.save_file(
        {f"{n}_mask": m.half() for n, m in masks.items()}, path, {"format": "pt", "made by": "another"}
    ),
    "open_lth": lambda masks, path: torch.save({n: m.int() for n, m in masks.items()}, path),
    "torch.save of floats": lambda masks, path: torch.save({n: m.float() for n, m in masks.items()}, path),
    "torch.save before 1.6": save_legacy,
}  # fmt: skip


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("file", FILES)
def test_files_of_ours_and_of_others(file, kind, tmp_path):
    """By a str and a Path, whatever the file is called."""
    model = net()
    masks = some_masks(model)
    for name in ("mask.pth", "mask.safetensors", "mask"):
        path = kind(tmp_path / name)
        FILES[file](masks, Path(path))
        for take in (Pruner.set_masks, Pruner.load):
            pruner = pruner_of(net())
            take(pruner, path)
            assert_taken(pruner, masks)


def test_open_lths_file_with_its_own_names(tmp_path):
    """Its Mask.save writes {name: int tensor} of all convs and linear layers that it prunes, by torch.save."""
    model = net()
    masks = some_masks(model)
    (tmp_path / "main").mkdir()
    torch.save({n: m.cpu().int() for n, m in masks.items()}, tmp_path / "main" / "mask.pth")
    pruner = pruner_of(model)
    pruner.load(tmp_path / "main" / "mask.pth")
    assert_taken(pruner, masks)


def test_save_and_load_take_str_and_path(tmp_path):
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.7)
    pruner.save(str(tmp_path / "a"))
    pruner.mask.save(str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(Mask.load(str(tmp_path / "a")).keep, Mask.load(tmp_path / "b").keep)
    assert (tmp_path / "a").stat().st_size < pruner.total / 8 + 1000
    other = pruner_of(net(1))
    other.load(str(tmp_path / "a"))
    assert_taken(other, dict(pruner.masks))


def test_numpys_archive_is_a_mapping(tmp_path):
    model = net()
    masks = some_masks(model)
    np.savez(tmp_path / "masks.npz", **{n: m.numpy() for n, m in masks.items()})
    pruner = pruner_of(model)
    with np.load(tmp_path / "masks.npz") as arrays:
        pruner.set_masks(arrays)
    assert_taken(pruner, masks)


def test_a_header_as_long_as_other_formats_begin(tmp_path):
    """safetensors begin with the length of their header, which may spell a zip file's PK, or a pickle's start."""
    model = net()
    masks = some_masks(model)
    plain = safetensors.torch.save({n: m.byte() for n, m in masks.items()})
    length = int.from_bytes(plain[:8], "little")
    for wanted in (b"PK", b"\x80\x02"):
        target = int.from_bytes(wanted, "little")
        padded = plain[8 : 8 + length] + b" " * (target - length)
        (tmp_path / "m").write_bytes(target.to_bytes(8, "little") + padded + plain[8 + length :])
        assert (tmp_path / "m").read_bytes().startswith(wanted)
        pruner = pruner_of(net())
        pruner.load(tmp_path / "m")
        assert_taken(pruner, masks)


def a_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return content.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def of_other_facts() -> bytes:
    path = Path("facts")
    write_tensors(path, {"0.weight": torch.ones(2)}, {"weights": 1})
    return path.read_bytes()


NO_MASKS = {
    "empty": (lambda: b"", "no file of masks"),
    "text": (lambda: b"0 1 0 1 1 0\n", "no file of masks"),
    "zeros": (lambda: b"\x00" * 100, "no file of masks"),
    "a zip": (a_zip, "no file of masks"),
    "half a zip": (lambda: saved({"a": torch.ones(9)})[:200], "no file of masks"),
    "half an old pickle": (
        lambda: saved({"a": torch.ones(9)}, _use_new_zipfile_serialization=False)[:60],
        "no file of masks",
    ),
    "code": (lambda: saved({"a": Path("x")}), "no file of masks"),
    "a list": (lambda: saved([torch.ones(2)]), "holds no dict of tensors"),
    "a checkpoint": (lambda: saved({"model": {"0.weight": torch.ones(2)}, "epoch": 3}), "holds no dict of tensors"),
    "numbers as names": (lambda: saved({0: torch.ones(2)}), "holds no dict of tensors"),
    "half of safetensors": (lambda: safetensors.torch.save({"a": torch.ones(9)})[:-5], "a damaged safetensors file"),
    "JSON": (lambda: b"\x10\x00\x00\x00\x00\x00\x00\x00{nothing at all}", "a damaged safetensors file"),
    "an image": (lambda: b"\x89PNG\r\n\x1a\n" * 9, r"no file of masks, .* \(it is a PNG image\)"),
    "our file of something else": (of_other_facts, "not a mask that fastprune wrote"),
}


@pytest.mark.parametrize("what", NO_MASKS)
def test_files_that_hold_no_masks_are_bad_input_in_one_line(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = NO_MASKS[what]
    (tmp_path / "m").write_bytes(content())
    pruner = pruner_of(net())
    with pytest.raises(InputError, match=words) as error:
        pruner.load("m")
    assert str(error.value).startswith("m: ")
    assert "\n" not in str(error.value)
    assert pruner.kept == pruner.total


def test_a_changed_bit_in_our_file_is_found(tmp_path):
    mask = Mask.from_tensors(some_masks(net()))
    mask.save(tmp_path / "m")
    content = bytearray((tmp_path / "m").read_bytes())
    content[-1] ^= 1
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        read_masks(tmp_path / "m")


def test_another_good_safetensors_file_is_not_called_damaged(tmp_path):
    """It is no fastprune mask for Mask.load, and masks like any other for a Pruner."""
    masks = some_masks(net())
    safetensors.torch.save_file({n: m.byte() for n, m in masks.items()}, tmp_path / "m")
    with pytest.raises(InputError, match=r"a safetensors file, but not one of fastprune's"):
        Mask.load(tmp_path / "m")
    found = read_masks(tmp_path / "m")
    assert isinstance(found, dict)
    assert all(torch.equal(found[name], mask.byte()) for name, mask in masks.items())


def test_soft_values_in_a_file(tmp_path):
    torch.save({"0.weight": ONE, "4.weight": LINEAR * 0.3}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"the mask of 4\.weight has the value 0\.3"):
        pruner_of(net()).load(tmp_path / "m")


def test_no_file_and_a_folder(tmp_path):
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=rf"cannot be read \({words}"):
            pruner_of(net()).load(path)


# torch.nn.utils.prune


def test_to_torchs_hooks_and_back():
    model = net()
    pruner = pruner_of(model)
    pruner.prune(0.6)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    weights = {name: w.detach().clone() for name, w in pruner.weights().items()}
    images = torch.randn(2, 2, 6, 6)
    model.eval()
    expected = model(images)
    assert to_torch_prune(pruner.finalize(), masks) is model
    assert torch_prune.is_pruned(model)
    assert sorted(n for n, _ in model.named_parameters() if "weight" in n) == [
        "0.weight_orig",
        "1.weight",
        "4.weight_orig",
    ]
    assert torch.equal(model[0].weight_mask, masks["0.weight"].float())
    assert torch.equal(model(images), expected)
    again = pruner_of(model)
    assert_taken(again, masks)
    assert not torch_prune.is_pruned(model)
    assert all(torch.equal(w.detach(), weights[name]) for name, w in again.weights().items())
    assert torch.equal(model(images), expected)


class Language(nn.Module):
    """Attention, a recurrent layer, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.lstm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.lstm(self.attention(x, x, x, need_weights=False)[0])[0])


def under_torchs_hooks(**options: Any) -> tuple[Language, dict[str, Tensor], Tensor, Tensor]:
    """(model, its masks, tokens, the outputs for them before)."""
    torch.manual_seed(0)
    model = Language()
    pruner = pruner_of(model, **options)
    pruner.prune(0.5)
    tokens = torch.randint(10, (2, 5))
    expected = model(tokens)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    pruner.finalize()
    return to_torch_prune(model, masks), masks, tokens, expected


def test_to_torchs_hooks_of_attention_and_recurrent_layers_and_back():
    model, masks, tokens, expected = under_torchs_hooks(exclude=["embedding", "head"])
    assert list(masks) == [f"attention.{n}" for n in ("in_proj_weight", "out_proj.weight")] + [
        f"lstm.weight_{n}_l0" for n in ("ih", "hh")
    ]
    assert torch.equal(model(tokens), expected)
    again = pruner_of(model, exclude=["embedding", "head"])
    assert_taken(again, masks)
    assert torch.equal(model(tokens), expected)
    assert not torch_prune.is_pruned(model)


def test_to_torchs_hooks_of_a_weight_that_layers_share():
    """A step of plain SGD moves none of the pruned weights, through none of the layers."""
    model, masks, tokens, expected = under_torchs_hooks()
    assert torch.equal(model(tokens), expected)
    assert model.head.weight_orig is model.embedding.weight_orig
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(tokens).square().sum().backward()
    optimizer.step()
    model(tokens)
    for module in (model.head, model.embedding):
        assert not module.weight[~masks["embedding.weight"]].any()
        assert module.weight[masks["embedding.weight"]].all()


def test_from_torchs_hooks_of_a_weight_that_layers_share():
    model, masks, tokens, expected = under_torchs_hooks()
    again = pruner_of(model)
    assert_taken(again, masks)
    assert not torch_prune.is_pruned(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), expected)


def test_to_torchs_hooks_with_masks_that_do_not_fit_changes_nothing():
    model = net()
    masks: dict[str, Any] = some_masks(model)
    before = copy.deepcopy(model.state_dict())
    for bad, words in [
        ({"5.weight": torch.ones(2)}, r"the model has no parameter 5\.weight"),
        ({"4.weight": torch.ones(64, 3)}, r"4\.weight has shape \(64, 3\)"),
        ({"4.weight": LINEAR * 0.3}, r"4\.weight has the value 0\.3"),
    ]:
        with pytest.raises(ValueError, match=words):
            to_torch_prune(model, masks | bad)
        assert not torch_prune.is_pruned(model)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    to_torch_prune(model, {"4.weight": masks["4.weight"].numpy()})
    assert torch.equal(model[4].weight_mask, masks["4.weight"].float())


def test_masks_under_torchs_hooks_of_some_layers_are_taken_over():
    """Masks of biases stay torch's: the Pruner does not cover them."""
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", 30)
    torch_prune.random_unstructured(model[4], "bias", 1)
    mask = model[0].weight_mask.bool()
    pruner = pruner_of(model)
    assert_taken(pruner, {"0.weight": mask, "4.weight": torch.ones(3, 64, dtype=torch.bool)})
    assert not hasattr(model[0], "weight_orig")
    assert hasattr(model[4], "bias_orig")
