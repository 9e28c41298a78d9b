"""One command on a CUDA machine, without network or FFCV: checks every operation, times it, trains a few rounds.

    PYTHONPATH=. python bench/gpu_suite.py [--json FILE]   (or make test-gpu)

Prints a short table and exits with 1 if a check failed. `--device cpu --small` runs the same on a laptop. Times are
medians of CUDA events; nothing is timed before all checks pass.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune
from fastprune.figures import load
from fastprune.kernels import crop_flip_normalize, keep_top, masked_cast, masked_sgd_, reference
from fastprune.kernels.crop_reference import crop_flip_normalize_reference
from fastprune.masks import Mask
from fastprune.models import build
from fastprune.pruning import prune, random_scores
from fastprune.reproduce import run
from fastprune.request import Request
from fastprune.settings import preset
from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.train import Trainer


class Suite:
    """Collects checks and timings; `device` and `small` decide where and how large."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small
        self.checks: dict[str, bool] = {}
        self.timings: dict[str, dict[str, Any]] = {}
        self.generator = torch.Generator(device).manual_seed(0)

    def check(self, name: str, ok: bool) -> None:
        self.checks[name] = bool(ok)
        print(f"  {'ok  ' if ok else 'FAIL'} {name}", flush=True)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def milliseconds(self, function: Callable[[], Any], repeats: int = 20) -> float:
        """Median time of one call, after three that warm up."""
        for _ in range(3):
            function()
        times = []
        for _ in range(3 if self.small else repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                function()
                times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)

    def time(self, name: str, function: Callable[[], Any], **facts: float) -> float:
        """Times and prints; `bytes` gives GB/s, `images` gives images/s."""
        ms = self.milliseconds(function)
        row: dict[str, Any] = {"ms": ms}
        text = f"  {name:<52} {ms:9.3f} ms"
        if "bytes" in facts:
            row["gb_per_s"] = facts["bytes"] / ms / 1e6
            text += f" {row['gb_per_s']:10,.0f} GB/s"
        if "images" in facts:
            row["images_per_s"] = 1e3 * facts["images"] / ms
            text += f" {row['images_per_s']:10,.0f} images/s"
        self.timings[name] = row
        print(text, flush=True)
        return ms


def check_kernels(s: Suite) -> None:
    n = 10_007
    weight, grad, momentum = s.randn(n), s.randn(n), s.randn(n)
    mask = s.randn(n) > -0.3
    weight[5], mask[5] = float("nan"), False
    out = torch.full((n,), float("nan"), device=s.device, dtype=torch.bfloat16)
    masked_cast(weight, mask, out)
    s.check("masked_cast equals its meaning", torch.equal(out, reference.masked_cast(weight, mask, torch.bfloat16)))
    weight[5] = 0.0
    hyper: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False}
    exact = reference.masked_sgd(weight.double(), grad.double(), momentum.double(), mask, **hyper)
    plain = reference.masked_sgd(weight, grad, momentum, mask, **hyper)
    w, m = weight.clone(), momentum.clone()
    masked_sgd_(w, grad.clone(), m, mask, **hyper)
    for name, got, exact_one, plain_one in zip(("weight", "momentum"), (w, m), exact, plain, strict=True):
        error, allowed = ((t.double() - exact_one).abs().max().item() for t in (got, plain_one))
        bound = 2 * allowed + torch.finfo(torch.float32).eps * exact_one.abs().max().item()
        s.check(f"masked_sgd_ {name} against float64", error <= bound)
    s.check("masked_sgd_ leaves +0 where pruned", not bool(w[~mask].any()) and not bool(torch.signbit(w[~mask]).any()))
    scores = s.randn(n).abs().mul_(8).round_()  # many ties
    new = keep_top(scores, mask, 3000)
    expected = reference.keep_top(scores.cpu(), mask.cpu(), 3000)
    s.check("keep_top prunes exactly n, ties by position", torch.equal(new.cpu(), expected))
    images = torch.randint(256, (8, 21, 17, 3), dtype=torch.uint8, device=s.device)
    boxes = torch.tensor(
        [[0, 0, 21, 17], [3, 2, 9, 11], [0, 0, 1, 1], [20, 16, 1, 1]], dtype=torch.int32, device=s.device
    )
    index = torch.tensor([0, 7, 3, 3], device=s.device)
    flip = torch.tensor([False, True, True, False], device=s.device)
    mean, std = (0.48, 0.45, 0.4), (0.28, 0.27, 0.28)
    out = torch.full((4, 3, 21, 17), float("nan"), device=s.device).to(memory_format=torch.channels_last)
    crop_flip_normalize(images, index, boxes, flip, mean, std, out)
    twin = crop_flip_normalize_reference(images, index, boxes, flip, mean, std, 21, 17, dtype=torch.float64)
    s.check("crop_flip_normalize against float64", (out - twin).abs().max().item() < 1e-5)


def check_training(s: Suite) -> None:
    """A masked run by the Trainer against plain PyTorch, on this device in fp32."""
    spec = ModelSpec("resnet18", 10, width=16)
    images, labels = s.randn(32, 3, 64, 64), torch.arange(32, device=s.device) % 10
    torch.manual_seed(0)
    ours = Trainer(build(spec), device=s.device)
    torch.manual_seed(0)
    theirs = build(spec).to(s.device).to(memory_format=torch.channels_last).train()
    dense = Mask.dense(ours.flat.segments)
    mask = prune(random_scores(dense, 0, 1), dense, 0.8)
    ours.set_mask(Mask(mask.keep.to(s.device), mask.segments))
    named, keep = dict(theirs.named_parameters()), {k: v.to(s.device) for k, v in mask.tensors().items()}
    sgd = torch.optim.SGD(named.values(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for name, kept in keep.items():
        named[name].data[~kept] = 0
    losses = []
    for _ in range(3):
        sgd.zero_grad()
        loss = F.cross_entropy(theirs(images.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        sgd.step()
        for name, kept in keep.items():
            named[name].data[~kept] = 0
        losses.append(loss.item())
    batches = [(images, labels)]
    history = ours.fit(batches, batches, OptimizerSpec(32), ScheduleSpec(0.05, 3, (), 0.1))
    error = max(abs(m.train_loss - loss) for m, loss in zip(history, losses, strict=True))
    s.check(f"masked training equals plain PyTorch (loss within {error:.1e})", error < 2e-3)
    s.check("pruned weights are +0 in the model", all(not named_[~k].any() for named_, k in _convs(ours.model, keep)))


def _convs(model: nn.Module, keep: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    named = dict(model.named_parameters())
    return [(named[name].detach(), kept) for name, kept in keep.items()]


def check_rounds(s: Suite) -> None:
    """Figure A2 at a small size through the whole engine, twice: the second call trains nothing."""
    settings = preset(load("A2").PROTOCOL, "smoke").override(seeds=1, rounds=2, epochs=2, train_per_class=100)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        request = Request(
            "A2", "smoke", settings, "synthetic", root / "out", root / "store", device=str(s.device), workers=1
        )
        s.check("a small figure A2 runs", run(request) == 0)
        csv = (root / "out" / "results.csv").read_bytes()
        published = {path: path.stat().st_mtime_ns for path in root.glob("store/nodes/*/*/node.json")}
        run(request)
        again = {path: path.stat().st_mtime_ns for path in root.glob("store/nodes/*/*/node.json")}
        s.check("the second call trains nothing", len(published) > 20 and again == published)
        s.check("and gives the same results.csv", (root / "out" / "results.csv").read_bytes() == csv)


def time_kernels(s: Suite) -> None:
    n = 100_000 if s.small else 23_454_912
    weight, grad, momentum = s.randn(n), s.randn(n), s.randn(n)
    mask = s.randn(n) > -0.8
    copy = torch.empty(n, device=s.device, dtype=torch.bfloat16)
    s.time("copy (the floor's rate)", lambda: grad.copy_(weight), bytes=8 * n)
    s.time("one read: vector_norm(w, 1)", lambda: torch.linalg.vector_norm(weight, 1), bytes=4 * n)
    s.time("masked_cast to bf16", lambda: masked_cast(weight, mask, copy), bytes=7 * n)
    hyper: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    s.time("masked_sgd_", lambda: masked_sgd_(weight, grad, momentum, mask, copy, **hyper), bytes=23 * n)
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    sgd = torch.optim.SGD([parameter], **hyper, fused=True)
    s.time("torch.optim.SGD, fused, dense", sgd.step, bytes=20 * n)
    scores = weight.abs()
    s.time("keep_top, 20 %", lambda: keep_top(scores, mask, int(0.2 * mask.sum())))
    s.time("torch.kthvalue", lambda: torch.kthvalue(scores, int(0.2 * n)))


def time_steps(s: Suite) -> None:
    """Whole training steps in bf16 on resident batches: images/s, and masked over dense."""
    batch, size, steps = (16, 32, 1) if s.small else (512, 64, 10)
    for name in ("resnet18", "resnet50"):
        trainer = Trainer(build(ModelSpec(name, 200)), device=s.device, precision="bf16")
        images = s.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        batches = [(images, torch.arange(batch, device=s.device) % 200)] * steps

        def epoch(trainer: Trainer = trainer, batches: Any = batches) -> None:
            trainer.fit(batches, batches[:1], OptimizerSpec(batch), ScheduleSpec(0.01, 1, (), 0.1))

        dense = s.time(f"{name} dense, {steps} steps of {batch} x {size} px", epoch, images=batch * steps)
        everything = Mask.dense(trainer.flat.segments)
        trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
        masked = s.time(f"{name} masked", epoch, images=batch * steps)
        s.timings[f"{name} masked"]["over_dense"] = masked / dense
        print(f"  {name} masked over dense: {masked / dense:.3f}", flush=True)


def environment(s: Suite) -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        return done.stdout.strip()

    cuda = s.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(s.device) if cuda else f"cpu ({platform.machine()})",
        "fastprune": fastprune.__version__,
        "commit": git("rev-parse", "--short", "HEAD") or "unknown",
        "changed": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(__import__("triton"), "__version__", None),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true", help="sizes for a CPU")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    args = p.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_suite.py: no CUDA device here (--device cpu --small runs the same on a CPU)", file=sys.stderr)
        return 2
    suite = Suite(args.device, args.small)
    facts = environment(suite)
    print(" ".join(f"{k}={v}" for k, v in facts.items()), "checks:", sep="\n", flush=True)
    for check in (check_kernels, check_training, check_rounds):
        check(suite)
    if all(suite.checks.values()):
        print("times:")
        time_kernels(suite)
        time_steps(suite)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "checks": suite.checks, "timings": suite.timings}, indent=1) + "\n")
    failed = [name for name, ok in suite.checks.items() if not ok]
    print(
        f"{len(suite.checks) - len(failed)} checks passed, {len(failed)} failed" + "".join(f"\n  {f}" for f in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
