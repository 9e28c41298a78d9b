"""Mask: its file, its counts; nested and exact over rounds."""

import pytest
import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.kernels import pack_bits
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import magnitude_scores, random_scores
from fastprune.pruning.masks import Mask
from fastprune.specs import ModelSpec, n_to_prune
from fastprune.training.flat import FlatParams
from fastprune.training.models import build


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build(ModelSpec("resnet18", 10, "imagenet", 8))


def random_mask(model: nn.Module, keep: float = 0.5) -> Mask:
    g = torch.Generator().manual_seed(1)
    flat = {n: torch.rand(p.shape, generator=g) < keep for n, p in model.named_parameters() if p.dim() == 4}
    return Mask.from_tensors(flat)


def test_saved_mask_is_one_bit_a_weight_and_comes_back(tmp_path):
    mask = random_mask(tiny())
    mask.save(tmp_path / "mask.safetensors")
    back = Mask.load(tmp_path / "mask.safetensors")
    assert back.segments == mask.segments
    assert torch.equal(back.keep, mask.keep)
    assert (tmp_path / "mask.safetensors").stat().st_size < mask.total / 8 + 10_000
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "mask.safetensors")["conv1.weight"]
    assert torch.equal(stored, pack_bits(mask.tensors()["conv1.weight"].flatten()))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"junk"])
def test_a_damaged_mask_is_bad_input(tmp_path, content):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        Mask.load(tmp_path / "m")


def test_ratios_by_hand():
    mask = Mask.from_tensors(
        {"a": torch.tensor([[[[True, False, False, False]]]]), "b": torch.ones(1, 1, 1, 2, dtype=torch.bool)}
    )
    assert mask.layerwise_ratios() == {"a": 0.75, "b": 0.0}
    assert mask.density == 0.5
    assert mask.ratios_csv().splitlines() == ["layer,weights,kept,pruned_fraction", "a,4,1,0.75", "b,2,2,0.0"]


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_thirty_rounds_are_nested_and_exact(score):
    model = tiny()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights["conv1.weight"].zero_()  # ties
    mask, left = Mask.dense(FlatParams(model).segments), None
    for round in range(1, 31):
        left = mask.kept
        scores = magnitude_scores(weights, mask) if score == "magnitude" else random_scores(mask, 0, round)
        new = prune(scores, mask, 0.2)
        assert new.kept == left - n_to_prune(left, 0.2)
        assert not (new.keep & ~mask.keep).any()
        mask = new
    assert mask.density == pytest.approx(0.8**30, rel=0.01)


def test_random_scores_depend_on_seed_and_round_and_nothing_else():
    mask = Mask.dense(FlatParams(tiny()).segments)
    a = random_scores(mask, 3, 1)
    assert torch.equal(a, random_scores(mask, 3, 1))
    assert not torch.equal(a, random_scores(mask, 1, 3))
    first = mask.segments[0].view(a).flatten()[:3].tolist()
    assert first == [0.7400963480618715, 0.8483457319721872, 0.8133807586025494]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_out_of_range(fraction):
    mask = Mask.dense(FlatParams(tiny()).segments)
    with pytest.raises(ValueError, match="fraction"):
        prune(torch.zeros(mask.keep.shape), mask, fraction)
