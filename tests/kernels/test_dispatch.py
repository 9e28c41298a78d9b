"""What runs where: devices, streams, graphs; compiled code on disk; a machine without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from fastprune import kernels
from fastprune.kernels.dispatch import INTERPRETED, check_block, compiled
from fastprune.kernels.masked_cast import _zero_pruned_loop
from tests.conftest import require_device
from tests.kernels.inputs import captured, far_zeros, little_memory, odd_layout, random_mask

ROOT = Path(__file__).resolve().parents[2]


def test_fresh_memory_is_poisoned(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for fresh in (torch.empty(5, dtype=dtype, device=device), torch.empty_like(torch.zeros(5, dtype=dtype))):
            assert fresh.isnan().all()
    for kind in (torch.uint8, torch.int32, torch.int64):
        for fresh in (torch.empty(5, dtype=kind, device=device), torch.empty_like(torch.zeros(5, dtype=kind))):
            assert (fresh == torch.iinfo(kind).max).all()
    assert torch.empty(5, dtype=torch.bool, device=device).all()
    for module in ("crop", "keep_top", "masked_cast", "pack_bits", "segment_counts", "segments"):
        poisoned = sys.modules[f"fastprune.kernels.{module}"].np
        assert (poisoned.empty(5, np.uint32) == 2**32 - 1).all()
        assert poisoned.empty_like(np.zeros(5, bool)).all()
        assert np.isnan(poisoned.empty(5)).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="what is really used is read from /proc")
def test_a_far_buffer_takes_memory_only_where_it_is_written():
    here = torch.device("cpu")

    def write(elements):
        with little_memory(here, 2**20):
            buffer = far_zeros(2**31, dtype=torch.uint8, device=here)
            buffer[:elements] = 1

    write(1000)
    with pytest.raises(AssertionError):
        write(2**22)


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda:x", ""])
def test_a_device_that_is_not_there_ends_the_run(name):
    with pytest.raises(pytest.UsageError, match="--device") as caught:
        require_device(name)
    assert "\n" not in str(caught.value)


def operations(device):
    """name: (a call that returns what the operation makes of its inputs, the inputs). Random, on the device."""
    n, segments = 2000, odd_layout(2000)
    size = segments[-1].span.stop
    weight, mask = torch.randn(n).to(device), random_mask(n, 0.6).to(device)
    flags, packed = random_mask(size, 0.5).to(device), torch.randint(256, (n // 8,), dtype=torch.uint8).to(device)
    images = torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8).to(device)
    index, flip = torch.tensor([2, 0], device=device), torch.tensor([True, False], device=device)
    boxes = torch.tensor([[0, 0, 8, 8], [1, 2, 5, 6]], dtype=torch.int32, device=device)
    cropped = torch.empty((2, 3, 8, 8), device=device, memory_format=torch.channels_last)
    short, state, grad = torch.empty(n, dtype=torch.float16, device=device), weight.clone(), weight.clone()

    def step():
        state.copy_(weight)
        grad.copy_(weight)
        kernels.masked_sgd_(state, grad, torch.zeros_like(weight), mask, lr=0.5, momentum=0.5)
        return state

    return {
        "masked_cast": (lambda: kernels.masked_cast(weight, mask, short), [weight, mask]),
        "masked_weight": (lambda: kernels.masked_weight(weight, mask, torch.float16), [weight, mask]),
        "masked_sgd_": (step, [weight, mask]),
        "kth_smallest_magnitude": (lambda: kernels.kth_smallest_magnitude(weight, mask, 300), [weight, mask]),
        "segment_counts": (lambda: kernels.segment_counts(flags, segments), [flags]),
        "pack_bits": (lambda: kernels.pack_bits(flags), [flags]),
        "unpack_bits": (lambda: kernels.unpack_bits(packed, n), [packed]),
        "crop_flip_normalize": (
            lambda: kernels.crop_flip_normalize(images, index, boxes, flip, (0.5,) * 3, (0.5,) * 3, cropped),
            [images],
        ),
    }


OPERATIONS = list(operations("cpu"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_graph_reads_its_inputs_anew(name, device):
    """Captured once and replayed on other inputs in the same memory, on a GPU: nothing waits for the host."""
    if device.type != "cuda":
        pytest.skip("needs CUDA graphs: pytest --device cuda")
    call, inputs = operations(device)[name]
    made = []
    replay = captured(lambda: made.append(call()), device)
    fresh = operations(device)[name][1]
    for old, new in zip(inputs, fresh, strict=True):
        old.copy_(new)
    replay()
    got = made[-1].clone()
    assert torch.equal(got, call())


@pytest.mark.parametrize("name", [*OPERATIONS, "keep_top"])
def test_on_another_stream_and_from_another_device(name, device):
    """On the stream that is current, and on the tensors' device where another is current."""
    if device.type != "cuda":
        pytest.skip("needs CUDA streams: pytest --device cuda")

    def call_of(where):
        torch.manual_seed(0)
        if name != "keep_top":
            return operations(where)[name][0]
        score, mask = torch.rand(2000).to(where), random_mask(2000, 0.6).to(where)
        return lambda: kernels.keep_top(score, mask, 500)

    expected = call_of(device)().clone()
    call, side = call_of(device), torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        got = call().clone()
    side.synchronize()
    assert torch.equal(got, expected)
    if torch.cuda.device_count() > 1:
        other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
        assert torch.equal(call_of(other)().cpu(), expected.cpu())


@pytest.mark.parametrize("block", [0, -4, 3])
def test_a_block_is_a_power_of_two(block):
    with pytest.raises(ValueError, match="power of two"):
        check_block(block)


@pytest.mark.parametrize("given", [True, False])
def test_compiled_code_is_kept_only_where_told(given, tmp_path, monkeypatch):
    folder = tmp_path / "numba"
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(folder) if given else "")
    loop = compiled.__wrapped__(_zero_pruned_loop)  # anew, without the memory of this process
    loop(np.ones(4, np.uint32), np.ones(4, bool), np.uint32(0))
    assert type(loop._cache).__name__ == ("FunctionCache" if given else "NullCache")
    assert bool(list(folder.rglob("*.nbi"))) is given


@pytest.mark.skipif(INTERPRETED, reason="the same with and without the interpreter")
def test_without_triton_the_cpu_paths_work(tmp_path):
    """In a process in which Triton cannot be imported; without a folder for it, numba writes nothing into its home."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastprune.kernels import *
from fastprune.kernels.dispatch import HAS_TRITON, uses_triton
weight, mask = torch.tensor([3.0, -1.0, 2.0, 0.5]), torch.tensor([True, True, True, False])
assert not HAS_TRITON and not uses_triton(weight)
assert masked_cast(weight, mask, torch.empty(4)).tolist() == [3.0, -1.0, 2.0, 0.0]
assert masked_weight(weight, mask, torch.float16).tolist() == [3.0, -1.0, 2.0, 0.0]
assert kth_smallest_magnitude(weight, mask, 2) == 2.0
segments = [Segment("a", (2, 2), 0, 0)]
assert keep_top(weight.abs(), mask, 1, segments).tolist() == [True, False, True, False]
assert segment_counts(mask, segments).tolist() == [3]
assert unpack_bits(pack_bits(mask), 4).tolist() == mask.tolist()
masked_sgd_(weight, torch.ones(4), torch.zeros(4), mask, lr=1.0)
assert weight.tolist() == [2.0, -2.0, 1.0, 0.0]
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path / "home")}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "home").exists()
