"""The Triton kernels compile to machine code for the GPUs that people have, without one: A100, H100, B200."""

import os

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastprune.kernels import bits, crop_triton, elementwise, select

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is no source")

F, B, L = "*fp32", "*i1", "*i64"
SGD = {
    "weight": F, "grad": F, "buffer": F, "mask": B, "copy": "*bf16", "n": "i64", "momentum": "fp32",
    "weight_decay": "fp32", "grad_scale": F, "found_inf": F,
}  # fmt: skip
SGD_ON = {"HAS_MASK": True, "HAS_COPY": True, "NESTEROV": True, "SCALED": True, "BLOCK": 2048}
WHERE = {"score": F, "mask": B, "tiles": L}
KNOWN = {"wanted": L, "state": L}
GATHER = {**WHERE, **KNOWN, "ranges": L, "room": "*i32"}
SEARCH = {**KNOWN, "room": "*i32", "ranges": L, "counts": L}
TIES = {**WHERE, "table": L, "state": L, "counts": L}
WRITE = {**WHERE, **KNOWN, "new": B, "table": L, "counts": L}
CROP = {"images": "*u8", "index": L, "boxes": "*i32", "flip": B, "table": F, "norm": F, "out": "*bf16", "H": "i32",
        "W": "i32"}  # fmt: skip
CASES = {
    "masked_cast": (elementwise._masked_cast, {"weight": F, "mask": B, "out": "*bf16", "n": "i64"}, {"BLOCK": 2048}),
    "masked_sgd": (elementwise._masked_sgd, {**SGD, "lr": "fp32"}, {**SGD_ON, "LR_ON_DEVICE": False}),
    "masked_sgd, rate on the device": (elementwise._masked_sgd, {**SGD, "lr": F}, {**SGD_ON, "LR_ON_DEVICE": True}),
    "bracket": (select._bracket, {"score": F, "mask": B, "ranges": L, **KNOWN}, {}),
    "gather": (select._gather, GATHER, {"AGAIN": False, "ALIGNED": True, "BLOCK": 4096}),
    "gather all, bf16": (
        select._gather,
        {**GATHER, "score": "*bf16"},
        {"AGAIN": True, "ALIGNED": False, "BLOCK": 4096},
    ),
    "search, first digit": (select._search, SEARCH, {"D": 0, "BLOCK": 4096}),
    "search, last digit": (select._search, SEARCH, {"D": 3, "BLOCK": 4096}),
    "settle": (select._settle, {**KNOWN, "counts": L, "out": "*i32"}, {}),
    "ties": (select._ties, TIES, {"D": 3, "DIGITS": 4, "ALIGNED": True, "BLOCK": 4096}),
    "write": (select._write, WRITE, {"DIGITS": 4, "ALIGNED": True, "BLOCK": 4096}),
    "pack": (bits._pack, {"bits": B, "packed": "*u8", "n": "i64"}, {"BLOCK": 1024}),
    "unpack": (bits._unpack, {"packed": "*u8", "bits": B, "n": "i64"}, {"BLOCK": 1024}),
    "segment counts": (bits._count, {"mask": B, "tiles": L, "counts": L}, {"BLOCK": 8192}),
    "crop": (crop_triton._crop, CROP, {"h": 64, "w": 60, "ROWS": 16, "COLUMNS": 64}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # a notice of one Triton version; either value is right
def test_compiles(name, capability, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, types, constants = CASES[name]
    names = kernel.arg_names
    assert {*types, *constants} == set(names)
    source = ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 1000
    assert f"sm_{capability}" in compiled.asm["ptx"]
