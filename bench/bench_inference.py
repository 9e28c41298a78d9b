"""Benchmark of inference with pruned networks, compiled and beside other engines, on one core.

    make bench ARGS=bench/bench_inference.py

Masks are uniform, at random, with a dense stem; batch norm is folded for all. Prints the least processor time of each
engine and its ratio to ONNX Runtime. SparseProp is timed where it is installed.
"""

import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from bench.bench_steps import one_core
from fastprune import sparse
from fastprune.specs import ModelSpec
from fastprune.training.models import build

TURNS, CALLS = 5, 3
OURS, TORCH, ORT, PROP = "fastprune", "torch, channels-last", "ONNX Runtime", "SparseProp"

# Against ONNX Runtime: at least so many times faster.
TARGETS: dict[tuple[str, int, int], dict[float, float | None]] = {
    ("resnet18", 64, 64): {0.1: 6.0, 0.05: 8.0, 0.01: 12.0},
    ("resnet50", 64, 64): {0.1: 5.0, 0.05: 6.0, 0.01: 10.0},
    ("resnet50", 224, 1): {0.1: None, 0.05: None, 0.01: None},
}

Engine = Callable[[Tensor], Tensor]


def pruned(name: str, density: float) -> nn.Module:
    """In evaluation mode, with batch norms that keep the size of values as a trained network's do."""
    generator = torch.Generator().manual_seed(0)
    model = build(ModelSpec(name=name, classes=200)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
        if isinstance(module, nn.Conv2d) and module is not model.conv1:
            weight = module.weight.data
            weight *= (torch.rand(weight.shape, generator=generator) < density) / density**0.5
    return model


def of_torch(model: nn.Module, example: Tensor) -> Engine:
    folded = fuse(fx.symbolic_trace(model)).to(memory_format=torch.channels_last)
    return lambda x: folded(x.to(memory_format=torch.channels_last))


def of_onnx(model: nn.Module, example: Tensor) -> Engine:
    import onnxruntime  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    assert program is not None
    content = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def of_sparseprop(model: nn.Module, example: Tensor) -> Engine:
    from sparseprop.modules import swap_modules_with_sparse  # type: ignore[import-not-found]

    found: Engine = swap_modules_with_sparse(model, example, verbose=False)
    return found


def timed(engine: Engine, x: Tensor) -> float:
    """Least processor time of some calls: the first finds another engine's data in the cache."""
    found = []
    for _ in range(CALLS):
        start = time.process_time()
        engine(x)
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.parametrize("density", [0.1, 0.05, 0.01])
@pytest.mark.parametrize(("network", "size", "batch"), list(TARGETS), ids=lambda value: str(value))
@torch.no_grad()
def test_inference(
    network: str, size: int, batch: int, density: float, device: Any, benchmark: Any, capsys: Any
) -> None:
    """Networks of full width. Targets: `TARGETS`."""
    if device.type != "cpu":
        pytest.skip("compiled networks run on a CPU")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = pruned(network, density)
    engines: dict[str, Engine] = {OURS: sparse.compile(model, x), ORT: of_onnx(model, x), TORCH: of_torch(model, x)}
    if find_spec("sparseprop"):
        engines[PROP] = of_sparseprop(model, x)
    want = engines[ORT](x)
    for name, engine in engines.items():
        assert (engine(x) - want).abs().max() <= 1e-4 * want.abs().max(), name
    times: dict[str, list[float]] = {name: [] for name in engines}

    def once(name: str) -> None:
        times[name].append(timed(engines[name], x))

    # The engines take turns within one run, so that load on the machine hits all alike.
    def others() -> None:
        for name in engines:
            if name != OURS:
                once(name)

    benchmark.group = f"inference, {network}, {size}x{size}, batch {batch}"
    with one_core():
        benchmark.pedantic(once, args=(OURS,), setup=others, rounds=TURNS, warmup_rounds=1)
    best = {name: 1e3 * min(each) for name, each in times.items()}
    target = TARGETS[network, size, batch][density]
    benchmark.extra_info.update(what=OURS, density=density, best=best, ratio=best[ORT] / best[OURS], target=target)
    with capsys.disabled():
        aim = f", target {target:.0f}" if target else ""
        print(f"\n{benchmark.group}, density {density}: {best[ORT] / best[OURS]:.1f} times ONNX Runtime{aim}")
        for name, ms in best.items():
            print(f"  {name:<24}{ms:8.1f} ms{best[ORT] / ms:7.2f}")
