"""Vectors of sixteen images: their operations lane by lane, and the way of images into their layout and back."""

import numpy as np
import pytest
import torch

from fastprune.kernels import lanes as L
from fastprune.kernels.dispatch import INTERPRETED, compiled
from tests.kernels.inputs import INF, NAN, assert_same_bits

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="no Triton here"),
    pytest.mark.xdist_group("lanes"),  # compiled once, in one process
]

NAMES = [
    "add", "sub", "fused", "relu", "where_positive", "where_equal", "maximum", "place", "first_lanes", "chosen",
    "total",
]  # fmt: skip


@compiled
def _every_operation(x, y, z, count, out):
    a, b, c = L.load(x), L.load(y), L.load(z)
    L.store(a + b, out)
    L.store(a - b, out + L.BYTES)
    L.store(a * b + c, out + 2 * L.BYTES)
    L.store(L.relu(a), out + 3 * L.BYTES)
    L.store(L.where_positive(a, c), out + 4 * L.BYTES)
    L.store(L.where_equal(a, b, c), out + 5 * L.BYTES)
    best, place = L.larger(a, L.splat(np.float32(1)), b, L.splat(np.float32(2)))
    L.store(best, out + 6 * L.BYTES)
    L.store(place, out + 7 * L.BYTES)
    L.store(L.first_lanes(count), out + 8 * L.BYTES)
    L.store(L.chosen(L.first_lanes(count), a), out + 9 * L.BYTES)
    L.store(L.splat(L.total(c)), out + 10 * L.BYTES)


def operate(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, count: int = 5) -> dict[str, torch.Tensor]:
    out = torch.empty(len(NAMES), 16)
    _every_operation(x.data_ptr(), y.data_ptr(), z.data_ptr(), count, out.data_ptr())
    return dict(zip(NAMES, out, strict=True))


def special() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.5, -2.0, 3.0, 1e-45, 4.0, NAN, 2.0, 7.0, -7.0, 3e38, -1e-40])
    y = torch.tensor([1.0, INF, 0.0, -0.0, 0.0, NAN, -2.0, 2.0, 0.0, 4.0, NAN, 5.0, -7.0, 7.0, 3e38, 1e-40])
    return x, y, torch.arange(1.0, 17.0)


def test_operations_are_torchs():
    x, y, z = special()
    got = operate(x, y, z)
    zero = torch.zeros(16)
    expected = {
        "add": x + y,
        "sub": x - y,
        "fused": (x.double() * y.double() + z.double()).float(),
        "relu": torch.where(x < 0, zero, x),
        "where_positive": torch.where(x <= 0, zero, z),  # as torch's threshold_backward: NaN passes
        "where_equal": torch.where(x == y, z, zero),
        "first_lanes": (torch.arange(16) < 5).float(),
        "chosen": torch.where(torch.arange(16) < 5, x, zero),
        "total": z.sum().expand(16),
    }
    for name, value in expected.items():
        assert_same_bits(got[name], value)


def test_of_two_the_first_maximum_stays_and_nan_wins():
    x, y, z = special()
    got = operate(x, y, z)
    _, place = torch.max_pool1d_with_indices(torch.stack([x, y]).t()[:, None], 2)
    assert_same_bits(got["maximum"], torch.where(place[:, 0, 0] == 0, x, y))
    assert got["place"].tolist() == (place[:, 0, 0] + 1).tolist()


def test_multiply_and_add_round_once():
    x = torch.full((16,), 1 + 2**-12)
    fused = operate(x, x, torch.full((16,), -(1 + 2**-11)))["fused"]
    assert fused.tolist() == [2.0**-24] * 16


@pytest.mark.parametrize("count", [0, 1, 15, 16])
def test_lanes_are_counted(count):
    x, y, z = special()
    assert operate(x, y, z, count)["first_lanes"].tolist() == [1.0] * count + [0.0] * (16 - count)


def test_a_sum_of_lanes_rounds_as_a_tree():
    z = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1000
    exact = z.double().sum().item()
    # Four additions one after another, each rounds by half an ulp of at most the sum of magnitudes.
    allowed = 4 * 2**-24 * z.abs().double().sum().item()
    assert operate(z, z, z)["total"][0].item() == pytest.approx(exact, abs=allowed)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("border", [0, 1, 3])
@pytest.mark.parametrize("channels", [3, 16, 37])
@pytest.mark.parametrize("batch", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_go_in_and_come_back(layout, batch, channels, border):
    x = LAYOUTS[layout](torch.randn(batch, channels, 5, 2, generator=torch.Generator().manual_seed(batch)))
    blocks = L.blocks_of(batch)
    lanes = torch.full((blocks, channels, 5 + 2 * border, 2 + 2 * border, 16), NAN)
    L.to_lanes(x, lanes)
    inner = lanes[:, :, border : border + 5, border : border + 2]
    assert_same_bits(L.from_lanes(inner, batch), x)
    beyond = L.from_lanes(inner, 16 * blocks)[batch:]
    assert_same_bits(beyond, torch.zeros_like(beyond))
    inner.fill_(NAN)
    assert lanes.isnan().all()  # the border is not written


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 2, 2), (2, 3, 1, 1)])
def test_what_comes_back_is_new_memory(shape):
    lanes = torch.zeros(*shape, 16)
    found = L.from_lanes(lanes, 16 * shape[0])
    assert found.is_contiguous(memory_format=torch.channels_last)
    found.fill_(1)
    assert not lanes.any()


def test_blocks_of_images():
    assert [L.blocks_of(n) for n in (1, 16, 17, 100)] == [1, 1, 2, 7]


def test_addresses_are_those_of_the_first_element():
    tensor, array = torch.zeros(8), np.zeros(8, np.float32)
    assert L.address(tensor[2:]) == tensor.data_ptr() + 8
    assert L.address(array[2:]) == array.ctypes.data + 8
