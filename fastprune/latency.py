"""How long networks take for a batch, measured side by side."""

import copy
import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def latency(
    models: Mapping[str, nn.Module],
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:
    """Milliseconds for the forward pass of a batch [batch_size, 3, image_size, image_size], by name: the median.

    Copies of the models are measured, on `device`, in eval mode, channels-last and under inference_mode, in each
    model's own dtype (no autocast), eagerly (no compilation, no CUDA graph), with torch's settings as they are. The
    batch lies on the device already and is the same for all. After `warmup` passes of each model, every model runs once
    in each of `repeats` rounds, and each round begins with another one, so that a device that warms up or a neighbour
    slows all of them alike. On CUDA the time is that between two events around the pass on an idle device: it includes
    the gaps where the host is slower to launch than the device to compute. On a CPU it is wall-clock time. torch's
    generators are left as they are. ValueError for another kind of device, and without a repeat.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"latency can be measured on cpu and cuda, not on {device.type}")
    if repeats < 1:
        raise ValueError("latency needs at least one repeat")
    images = torch.rand(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    ready: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, model in models.items():
        dtype = next(model.parameters()).dtype
        batch = images.to(device, dtype, memory_format=torch.channels_last)
        ready[name] = copy.deepcopy(model).eval().to(device).to(memory_format=torch.channels_last), batch
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with torch.inference_mode():
        for model, batch in ready.values():
            for _ in range(warmup):
                model(batch)
        for repeat in range(repeats):
            first = repeat % len(names) if names else 0
            for name in names[first:] + names[:first]:
                times[name].append(_milliseconds(*ready[name], device))
    return {name: statistics.median(measured) for name, measured in times.items()}


def _milliseconds(model: nn.Module, batch: Tensor, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        model(batch)
        return 1000.0 * (time.perf_counter() - start)
    stream = torch.cuda.current_stream(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record(stream)
    model(batch)
    after.record(stream)
    torch.cuda.synchronize(device)
    return before.elapsed_time(after)
