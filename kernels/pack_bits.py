"""Pack masks to one bit per weight, the format of files, and unpack them."""

import numpy as np
import torch
from torch import Tensor

from fastprune.kernels.dispatch import check_block, check_tensor, on_its_device, tl, triton, uses_triton


@on_its_device
def pack_bits(flags: Tensor, *, block: int = 1024) -> Tensor:
    """bool [n] to uint8 [ceil(n / 8)], first element in the lowest bit, unused bits 0. block: bytes per program."""
    check_tensor("flags", flags, flags, (torch.bool,))
    if uses_triton(flags):
        check_block(block)
        packed = torch.empty((flags.numel() + 7) // 8, dtype=torch.uint8, device=flags.device)
        if flags.numel():
            grid = (triton.cdiv(packed.numel(), block),)
            _pack_bits_kernel[grid](flags, packed, flags.numel(), BLOCK=block, num_warps=8)
        return packed
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


@on_its_device
def unpack_bits(packed: Tensor, n: int, *, block: int = 1024) -> Tensor:
    """uint8 [ceil(n / 8)] to bool [n], the inverse of pack_bits. ValueError if `packed` has another size."""
    check_tensor("packed", packed, packed, (torch.uint8,))
    if packed.numel() != (n + 7) // 8:
        raise ValueError(f"{n} bits need {(n + 7) // 8} bytes, got {packed.numel()}")
    if uses_triton(packed):
        check_block(block)
        flags = torch.empty(n, dtype=torch.bool, device=packed.device)
        if n:
            _unpack_bits_kernel[(triton.cdiv(packed.numel(), block),)](packed, flags, n, BLOCK=block, num_warps=8)
        return flags
    # A view of the bytes 0 and 1 as bool: astype would copy once more.
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little").view(np.bool_))


def pack_bits_reference(flags: Tensor) -> Tensor:
    """bool [n] to uint8 [ceil(n / 8)], first element in the lowest bit; the last byte is padded with zeros."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded * places).sum(1, dtype=torch.uint8)


def unpack_bits_reference(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] to bool [n]: the inverse of pack_bits."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & places).ne(0).view(-1)[:n]


@triton.jit
def _pack_bits_kernel(flags, packed, n, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = (tl.load(flags + i, mask=i < n, other=0) != 0).to(tl.int32)
    value = tl.sum(bit << tl.arange(0, 8)[None, :], 1)
    tl.store(packed + byte, value.to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def _unpack_bits_kernel(packed, flags, n, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(packed + byte, mask=byte * 8 < n, other=0).to(tl.int32)
    i = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bit = (value[:, None] >> tl.arange(0, 8)[None, :]) & 1
    tl.store(flags + i, bit.to(tl.int8), mask=i < n)
