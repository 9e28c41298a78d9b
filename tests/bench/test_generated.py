"""The step that inductor generates for a GPU, counted: no atomics, few launches, few bytes."""

import ast

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from bench.generated import H100, Step, count, grad, roles, table
from fastprune.specs import GpuOptions, ModelSpec
from fastprune.training import trainer as trainer_module
from fastprune.training.models import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),  # by torch 2.11, where inductor is imported
    pytest.mark.xdist_group("generated"),  # traced once, in one process
]
NORMS = 3
OURS = GpuOptions(fused_norm=True, gradient_table=True, fused_loss=True)


def small() -> nn.Module:
    """A stem and a block of an ImageNet ResNet."""
    stem = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, BasicBlock(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16))


@pytest.fixture(scope="module")
def steps() -> dict[bool, Step]:
    """By whether our kernels are used."""
    return {options == OURS: count(small, 8, 32, options=options) for options in (GpuOptions(), OURS)}


@pytest.mark.parametrize("ours", [False, True], ids=["inductor", "ours"])
def test_a_generated_step_has_no_atomic_additions(steps, ours):
    step = steps[ours]
    assert step.count(kind="generated") >= 5
    assert step.atomics == 0
    assert "tl.atomic_add" not in "".join(step.code.values())


def test_convs_gemms_and_our_kernels_are_counted(steps):
    for step in steps.values():
        # The images need no gradient: one conv fewer backward.
        assert [step.count(part=part, kind="conv") for part in ("forward", "backward")] == [3, 5]
        assert [step.count(part=part, kind="gemm") for part in ("forward", "backward")] == [1, 2]
    rest = {ours: [x for x in step.launches if x.part == "rest"] for ours, step in steps.items()}
    own = {ours: [x.name for x in launches if x.kind == "own"] for ours, launches in rest.items()}
    # The optimiser, on weights and on the rest.
    assert own[False] == ["_masked_sgd_kernel"] * 2
    assert own[True] == ["_cross_entropy_kernel", "_masked_sgd_scattered_kernel", "_masked_sgd_kernel"]
    assert [steps[False].count(part=part, kind="own") for part in ("forward", "backward")] == [0, 0]
    assert [steps[True].count(part=part, kind="own") for part in ("forward", "backward")] == [2 * NORMS] * 2
    assert not any("batch_norm" in launch.name for launch in steps[True].launches if launch.kind == "generated")


def test_bytes_are_those_of_the_arguments(steps):
    """The optimiser's: weight and momentum read and written, gradient, mask, and the copy in bf16."""
    weights = sum(m.weight.numel() for m in small().modules() if isinstance(m, nn.Conv2d))
    padded = -(-weights // 64) * 64
    launch = next(x for x in steps[False].launches if x.name == "_masked_sgd_kernel")
    assert abs(launch.bytes - 23 * padded) <= 23 * 64 * NORMS + 8
    # The stem's statistics read its map once, and write mean and deviation; both running ones are read.
    statistics = next(x for x in steps[True].launches if x.name == "fastprune::batch_statistics")
    assert statistics.bytes == 8 * 16 * 16 * 16 * 2 + 4 * 16 * 4


@pytest.mark.slow
def test_torch_s_own_backend_is_found_out(monkeypatch):
    """So the count of atomics can fail."""
    if torch.__version__ < "2.15":
        pytest.skip("torch decomposes max pooling since 2.15")
    from torch._inductor.compile_fx import compile_fx

    monkeypatch.setattr(trainer_module, "inductor", compile_fx)
    assert count(small, 8, 32).atomics == 1


def test_roles_of_parameters():
    source = """
def k(a, b, c, d, e, f, n):
    at = b + 3 * n
    x = tl.load(a + n, mask=n > tl.load(at)) + tl.load(tl.multiple_of(e[1], 16) + n)
    tl.atomic_add(c + 2, x)
    helper(n, f, x)
"""
    helper = "def helper(x, to, value):\n    tl.store(to + x, value)\n"
    (kernel,) = ast.parse(source).body
    assert roles(kernel, {"helper": helper}) == ({"a", "b", "c", "e"}, {"c", "f"})


def test_gradients_in_python_are_torch_s():
    """Used twice, unused, not a leaf, expanded, and of another dtype."""
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 4, generator=g).requires_grad_() for _ in range(3))
    inner = a * 2
    out = [(inner @ b.T + inner.sum()).relu(), (inner.double() + a[0]).sum()]
    wanted, seeds = [a, b, c, inner], [torch.randn_like(t) for t in out]
    expected = torch.autograd.grad(out, wanted, seeds, allow_unused=True, retain_graph=True)
    got = grad(out, wanted, seeds)
    assert got[2] is expected[2] is None
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_made_up_device_is_gone_afterwards(steps):
    assert H100.major == 9
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    assert torch.autograd.grad is not grad
    assert "atomic additions" in table(steps[True])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resnet_18_moves_at_most_2_gigabytes_in_at_most_190_launches():
    """Batch 512, 64x64, bf16: bench/NOTES.md. Inductor alone needs more of both."""
    step = count(lambda: build(ModelSpec("resnet18", 200)), 512, 64, options=OURS)
    assert step.atomics == 0
    assert step.count() <= 190
    assert step.network_bytes <= 2.0e9
    assert step.count(part="forward", kind="own") == step.count(part="backward", kind="own") == 2 * 20
    plain = count(lambda: build(ModelSpec("resnet18", 200)), 512, 64)
    assert plain.atomics == 0
    assert plain.count() > 1.3 * step.count()
    assert plain.network_bytes > 1.3 * step.network_bytes
