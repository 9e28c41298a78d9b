"""The Triton kernels compile to machine code for the GPUs that people have, without one: A100, H100, B200."""

import re
from typing import Any

import pytest

from fastprune.kernels.batch_norm import (
    _gradient_sums_kernel,
    _input_gradient_kernel,
    _normalise_kernel,
    _statistics_kernel,
)
from fastprune.kernels.batch_norm_pool import _normalise_and_pool_kernel, _pool_input_gradient_kernel
from fastprune.kernels.crop import _crop_kernel
from fastprune.kernels.cross_entropy import _cross_entropy_kernel
from fastprune.kernels.dispatch import INTERPRETED
from fastprune.kernels.keep_top import (
    _bracket_kernel,
    _gather_kernel,
    _search_kernel,
    _settle_kernel,
    _ties_kernel,
    _write_kernel,
)
from fastprune.kernels.masked_cast import _masked_cast_kernel
from fastprune.kernels.masked_sgd import _masked_sgd_kernel, _masked_sgd_scattered_kernel
from fastprune.kernels.pack_bits import _pack_bits_kernel, _unpack_bits_kernel
from fastprune.kernels.segment_counts import _segment_counts_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is no source")

F, B, L = "*fp32", "*i1", "*i64"
SGD = {
    "weight": F, "grad": F, "buffer": F, "mask": B, "copy": "*bf16", "n": "i64", "momentum": "fp32",
    "weight_decay": "fp32", "grad_scale": F, "found_inf": F,
}  # fmt: skip
SGD_ON = {"HAS_MASK": True, "HAS_COPY": True, "NESTEROV": True, "SCALED": True, "BLOCK": 2048}
SCATTERED = {**{name: type for name, type in SGD.items() if name not in ("grad", "n")}, "tiles": L}
WHERE = {"score": F, "mask": B, "tiles": L}
KNOWN = {"wanted": L, "state": L}
GATHER = {**WHERE, **KNOWN, "ranges": L, "candidates": "*i32"}
SEARCH = {**KNOWN, "candidates": "*i32", "ranges": L, "counts": L}
TIES = {**WHERE, "table": L, "state": L, "counts": L}
WRITE = {**WHERE, **KNOWN, "new": B, "table": L, "counts": L}
CROP = {"images": "*u8", "index": L, "crop_boxes": "*i32", "flip": B, "table": F, "norm": F, "out": "*bf16", "H": "i32",
        "W": "i32"}  # fmt: skip
NORM = {"mean": F, "rstd": F, "weight": F, "bias": F}
GRADIENTS = {"dweight": F, "dbias": F}
STATISTICS = {"x": "*bf16", "running_mean": F, "running_var": F, "mean": F, "rstd": F, "partial": F,
              "counter": "*i32", "N": "i32", "momentum": "fp32", "eps": "fp32"}  # fmt: skip
NORMALISE = {"x": "*bf16", "residual": "*bf16", "y": "*bf16", **NORM, "N": "i32"}
SUMS = {**dict.fromkeys(["dy", "second", "x", "y", "g"], "*bf16"), **NORM, **GRADIENTS, "partial": F,
        "counter": "*i32", "N": "i32"}  # fmt: skip
INPUT = {**dict.fromkeys(["g", "x", "dx"], "*bf16"), **NORM, **GRADIENTS, "N": "i32"}
POOL = {"x": "*bf16", "y": "*bf16", "chosen": "*bf16", "place": "*i8", **NORM, "windows": "i32"}
POOL_INPUT = {"dy": "*bf16", "place": "*i8", "x": "*bf16", "dx": "*bf16", "mean": F, "rstd": F, "weight": F,
              **GRADIENTS, "windows": "i32", "N": "i32"}  # fmt: skip
REDUCTION, ELEMENTWISE = {"ROWS": 128, "COLUMNS": 32}, {"ROWS": 64, "COLUMNS": 64}
IMAGENET = {"C": 64, "H": 32, "W": 32, "ROWS": 32, "COLUMNS": 64}
LOSS = {"logits": "*bf16", "labels": L, "gradient": "*bf16", "scale": F, "partial": "*fp64", "arrived": "*i32",
        "sums": "*fp64", "programs": "i32", "rows": "i32", "classes": "i32", "stride": "i32",
        "smoothing": "fp32"}  # fmt: skip
LOSS_ON = {"GRADIENT": True, "SCALED": True, "SMOOTHS": True}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "statistics": (_statistics_kernel, STATISTICS, {"C": 72, "EVEN": False, **REDUCTION}),
    "normalise": (
        _normalise_kernel,
        NORMALISE,
        {"C": 64, "RESIDUAL": True, "RELU": True, "EVEN": True, **ELEMENTWISE},
    ),
    "gradient sums, residual, two branches": (
        _gradient_sums_kernel,
        SUMS,
        {"C": 64, "TWO": True, "FROM_X": False, "FROM_Y": True, "KEEP": True, "EVEN": True, **REDUCTION},
    ),
    "gradient sums, ReLU's mask from x, uneven": (
        _gradient_sums_kernel,
        SUMS,
        {"C": 8, "TWO": True, "FROM_X": True, "FROM_Y": False, "KEEP": True, "EVEN": False, **REDUCTION},
    ),
    "input gradient": (_input_gradient_kernel, INPUT, {"C": 64, "FROM_X": True, "EVEN": True, **ELEMENTWISE}),
    "normalise and pool": (_normalise_and_pool_kernel, POOL, IMAGENET),
    "pool input gradient": (_pool_input_gradient_kernel, POOL_INPUT, IMAGENET),
    "masked_cast": (_masked_cast_kernel, {"weight": F, "mask": B, "out": "*bf16", "n": "i64"}, {"BLOCK": 2048}),
    "masked_sgd": (_masked_sgd_kernel, {**SGD, "lr": "fp32"}, {**SGD_ON, "LR_ON_DEVICE": False}),
    "masked_sgd, rate on the device": (_masked_sgd_kernel, {**SGD, "lr": F}, {**SGD_ON, "LR_ON_DEVICE": True}),
    "masked_sgd_scattered, 53 layers": (
        _masked_sgd_scattered_kernel,
        {**SCATTERED, "grads": ("*bf16",) * 53, "lr": F},
        {**SGD_ON, "LR_ON_DEVICE": True, "COUNT": 53, "ALIGNED": True},
    ),
    "masked_sgd_scattered, one layer of any size": (
        _masked_sgd_scattered_kernel,
        {**SCATTERED, "grads": (F,), "lr": "fp32"},
        {**SGD_ON, "LR_ON_DEVICE": False, "COUNT": 1, "ALIGNED": False},
    ),
    "bracket": (_bracket_kernel, {"score": F, "mask": B, "ranges": L, **KNOWN}, {}),
    "gather": (_gather_kernel, GATHER, {"ALL": False, "ALIGNED": True, "BLOCK": 4096}),
    "gather all, bf16": (
        _gather_kernel,
        {**GATHER, "score": "*bf16"},
        {"ALL": True, "ALIGNED": False, "BLOCK": 4096},
    ),
    "search, first digit": (_search_kernel, SEARCH, {"D": 0, "BLOCK": 4096}),
    "search, last digit": (_search_kernel, SEARCH, {"D": 3, "BLOCK": 4096}),
    "settle": (_settle_kernel, {**KNOWN, "counts": L, "out": "*i32"}, {}),
    "ties": (_ties_kernel, TIES, {"D": 3, "DIGITS": 4, "ALIGNED": True, "BLOCK": 4096}),
    "write": (_write_kernel, WRITE, {"DIGITS": 4, "ALIGNED": True, "BLOCK": 4096}),
    "pack": (_pack_bits_kernel, {"flags": B, "packed": "*u8", "n": "i64"}, {"BLOCK": 1024}),
    "unpack": (_unpack_bits_kernel, {"packed": "*u8", "flags": B, "n": "i64"}, {"BLOCK": 1024}),
    "segment counts": (_segment_counts_kernel, {"mask": B, "tiles": L, "counts": L}, {"BLOCK": 8192}),
    "cross_entropy, 200 classes": (_cross_entropy_kernel, LOSS, {**LOSS_ON, "ROWS": 4, "COLUMNS": 256}),
    "cross_entropy, most classes, no gradient": (
        _cross_entropy_kernel,
        {**LOSS, "logits": F, "gradient": F},
        {"GRADIENT": False, "SCALED": False, "SMOOTHS": False, "ROWS": 1, "COLUMNS": 1 << 14},
    ),
    "crop": (_crop_kernel, CROP, {"h": 64, "w": 60, "ROWS": 16, "COLUMNS": 64}),
}


# Kernels whose programs walk over elements, and not over tiles with 64-bit starts.
FLAT = ["masked_cast", *(name for name in CASES if name.startswith("masked_sgd")), "pack", "unpack", "crop"]
NORMS = [name for name in CASES if "mean" in CASES[name][1]]
# Second forms of a kernel: compiled quickly for one GPU, for the others with the slow tests.
SECOND = [
    "gradient sums, ReLU's mask from x, uneven",
    "masked_sgd_scattered, one layer of any size",
    "cross_entropy, most classes, no gradient",
]


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=[pytest.mark.slow] if name in SECOND and capability != 90 else [])
        for name in CASES
        for capability in (80, 90, 100)
    ],
)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # a notice of one Triton version; either value is right
def test_compiles(name, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel, types, constants = CASES[name]
    names = kernel.arg_names
    assert {*types, *constants} == set(names)
    source = triton.compiler.ASTSource(
        kernel,
        {n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 1000
    assert f"sm_{capability}" in compiled.asm["ptx"]
    # No atomic operation but a counter's, whose order changes no result.
    counters = len(re.findall(r"\batom\.", compiled.asm["ptx"]))
    if name in NORMS:
        assert counters == ("counter" in types)
        assert not re.search(r"\bred\.(?!async)", compiled.asm["ptx"])
    if name in FLAT:
        assert_counts_in_64_bits(compiled.asm["ttir"])


def assert_counts_in_64_bits(text):
    """In 32 bits program x block wraps beyond 2^31 elements. Of crop it is the image's: pixels of one image are few."""
    programs = re.findall(r"(%\w+) = tt\.get_program_id x : i32", text)
    assert programs
    for program in programs:
        uses = [line for line in text.splitlines() if re.search(rf"[ (,]{program}\b(?! =)", line.split("=", 1)[-1])]
        assert uses
        assert all(re.search(rf"arith\.extsi {program} : i32 to i64", line) for line in uses), uses
