"""pack_bits and unpack_bits."""

import pytest
import torch

from fastprune.kernels import pack_bits, unpack_bits
from fastprune.kernels.pack_bits import pack_bits_reference, unpack_bits_reference
from tests.kernels.inputs import FAR, chunks, far_drawn, random_mask, require_gpu_memory


def test_the_first_element_is_the_lowest_bit(device):
    flags = torch.tensor([True, False, False, True, *[False] * 5, True], device=device)
    assert pack_bits(flags).tolist() == [9, 2]


@pytest.mark.parametrize("density", [1.0, 0.0, 0.6, 0.01])
@pytest.mark.parametrize("block", [64, 1024])
def test_round_trip(n, density, block, device):
    flags = random_mask(n, density)
    packed = pack_bits(flags.to(device), block=block)
    assert torch.equal(packed.cpu(), pack_bits_reference(flags))
    if n % 8:
        packed[-1] |= 255 << n % 8 & 255  # what no element has may be anything
    assert torch.equal(unpack_bits(packed, n, block=block).cpu(), flags)
    assert torch.equal(unpack_bits_reference(packed.cpu(), n), flags)


@pytest.mark.parametrize("block", [1, 2, 4096])
def test_the_block_size_changes_nothing(block, device):
    flags = random_mask(500, 0.7).to(device)
    packed = pack_bits(flags, block=block)
    assert torch.equal(packed, pack_bits_reference(flags))
    assert torch.equal(unpack_bits(packed, 500, block=block), flags)


BAD = {
    "too few bytes": lambda: unpack_bits(torch.zeros(1, dtype=torch.uint8), 9),
    "flags of another dtype": lambda: pack_bits(torch.zeros(4)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_value_errors(what):
    with pytest.raises(ValueError, match=r"\S"):
        BAD[what]()


def test_round_trip_beyond_2_to_31_elements(device):
    require_gpu_memory(8, device)
    flags = far_drawn(6, torch.bool, device)
    packed = pack_bits(flags)
    unpacked = unpack_bits(packed, FAR)
    for part in chunks():
        assert torch.equal(packed[part.start // 8 : (part.stop + 7) // 8], pack_bits_reference(flags[part]))
        assert torch.equal(unpacked[part], flags[part])
