"""Whole models and training: right on this device, and then how fast a step is."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_tools import FLOATS, NAN, Check, bits, mask_of, require
from fastprune.figures import load
from fastprune.flat import layout, prunable
from fastprune.masks import Mask, MaskedConv2d, attach
from fastprune.models import build
from fastprune.pruning import prune, random_scores
from fastprune.reproduce import run
from fastprune.request import Request
from fastprune.settings import preset
from fastprune.specs import ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.train import Trainer

if TYPE_CHECKING:
    from bench.gpu_suite import Suite


@contextmanager
def exact_convs() -> Iterator[None]:
    """cuDNN computes float32 convs in float32, not in TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm."""
    difference = torch.stack([(a.double() - b.double()).norm() for a, b in zip(got, expected, strict=True)]).norm()
    return (difference / torch.stack([b.double().norm() for b in expected]).norm()).item()


def check_conv(s: Suite) -> str:
    """A masked conv under autocast, with NaN in the weights that it prunes, against a conv whose weights are zeros."""
    errors = []
    for kind in FLOATS[1:] if s.cuda else FLOATS[1:2]:
        plain = nn.Conv2d(32, 64, 3, padding=1).to(s.device).to(memory_format=torch.channels_last)
        layer = MaskedConv2d.wrap(nn.Conv2d(32, 64, 3, padding=1)).to(s.device).to(memory_format=torch.channels_last)
        layer.load_state_dict(plain.state_dict())
        mask = mask_of(s, plain.weight.numel(), 0.3).view(plain.weight.shape).to(s.device)
        layer.set_mask(mask)
        layer.weight.data[~mask] = NAN
        plain.weight.data[~mask] = 0.0
        results = []
        x, grad = s.randn(4, 32, 20, 20), s.randn(4, 64, 20, 20)
        for module in (layer, plain):
            inputs = x.to(memory_format=torch.channels_last).clone().requires_grad_()
            with torch.autocast(s.device.type, kind):
                out = module(inputs)
            out.backward(grad.to(kind))
            results.append([out.detach(), inputs.grad, module.weight.grad])
        results[1][2] = torch.where(mask, results[1][2], 0.0)
        require(not results[0][2][~mask].any(), "a pruned weight has a gradient")
        errors.append(relative(*results))
        require(errors[-1] <= (2e-2 if s.interpreted else 4e-3), f"{kind}: off by {errors[-1]:.1e} of the norm")
    return f"off by at most {max(errors):.1e} of the norm"


def check_compile(s: Suite) -> str:
    """An attached ResNet-18, forward and backward, compiled whole against eager, in float32."""
    if s.interpreted:
        raise SkipTest("a compiled model does not run interpreted kernels")
    model = build(ModelSpec("resnet18", 10, width=8 if s.small else 64))
    dense = Mask.dense(layout(prunable(model)))
    mask = prune(random_scores(dense, 0, 1), dense, 0.8)
    attach(model, mask).to(s.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images, labels = s.randn(8, 3, 64, 64).to(memory_format=torch.channels_last), torch.arange(8, device=s.device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if s.cuda else "aot_eager")
    results = []
    with exact_convs():
        for call in (compiled, model):
            model.zero_grad()
            logits = call(images)
            F.cross_entropy(logits, labels).backward()
            results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.compiler.reset()
    for name, keep in mask.tensors().items():
        grad = model.get_parameter(name).grad
        require(grad is not None and not grad[~keep.to(s.device)].any(), f"{name}: a pruned weight has a gradient")
    forward, backward = relative(results[0][:1], results[1][:1]), relative(results[0][1:], results[1][1:])
    note = f"logits off by {forward:.1e} of the norm, gradients by {backward:.1e}"
    require(forward <= 1e-4 and backward <= 1e-3, note)
    return note


def check_training(s: Suite) -> str:
    """A masked run by the Trainer against plain PyTorch, on this device in float32."""
    if s.interpreted:
        raise SkipTest("interpreted kernels would take minutes")
    spec = ModelSpec("resnet18", 10, width=16)
    images, labels = s.randn(32, 3, 64, 64), torch.arange(32, device=s.device) % 10
    torch.manual_seed(0)
    ours = Trainer(build(spec), device=s.device)
    torch.manual_seed(0)
    theirs = build(spec).to(s.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    dense = Mask.dense(ours.flat.segments)
    mask = prune(random_scores(dense, 0, 1), dense, 0.8)
    ours.set_mask(mask)
    named, keep = dict(theirs.named_parameters()), {k: v.to(s.device) for k, v in mask.tensors().items()}
    sgd = torch.optim.SGD(named.values(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    with exact_convs():
        for _ in range(3):
            for name, kept in keep.items():
                named[name].data[~kept] = 0
            sgd.zero_grad()
            loss = F.cross_entropy(theirs(images.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        history = ours.fit([(images, labels)], [(images, labels)], OptimizerSpec(32), ScheduleSpec(0.05, 3, (), 0.1))
    error = max(abs(m.train_loss - loss) for m, loss in zip(history, losses, strict=True))
    require(error < 2e-3, f"losses differ by {error:.1e}")
    for name, kept in keep.items():
        require(not bits(ours.model.get_parameter(name).detach()[~kept]).any(), f"{name}: pruned is not +0")
    return f"losses within {error:.1e}"


def check_rounds(s: Suite) -> str:
    """Figure A2 at a small size through the whole engine, twice: the second call trains nothing."""
    if s.interpreted:
        raise SkipTest("interpreted kernels would take hours")
    size = {"rounds": 2, "epochs": 1 if s.small else 2, "train_per_class": 20 if s.small else 100}
    settings = preset(load("A2").PROTOCOL, "smoke").override(seeds=1, **size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        request = Request(
            "A2", "smoke", settings, "synthetic", root / "out", root / "store", device=str(s.device), workers=1
        )
        seen = []
        for _ in range(2):
            said = io.StringIO()
            with redirect_stdout(said):
                code = run(request)
            require(code == 0, f"exit code {code}, last said: {said.getvalue().strip().splitlines()[-1:]}")
            nodes = {path: path.stat().st_mtime_ns for path in root.glob("store/nodes/*/*/node.json")}
            seen.append((nodes, (root / "out" / "results.csv").read_bytes()))
        require(len(seen[0][0]) > 20, f"only {len(seen[0][0])} nodes in the store")
        require(seen[0][0] == seen[1][0], "the second call trained something")
        require(seen[0][1] == seen[1][1], "the second call gave another results.csv")
        return f"{len(seen[0][0])} nodes"


CHECKS: dict[str, Check] = {
    "MaskedConv2d under autocast": check_conv,
    "torch.compile of an attached model": check_compile,
    "training equals plain PyTorch": check_training,
    "figure A2, small, twice": check_rounds,
}


def time_steps(s: Suite) -> None:
    """Whole training steps in bf16 on resident batches: images/s, and masked over dense."""
    batch, size, steps = (16, 32, 1) if s.small else (512, 64, 10)
    for name in ("resnet18", "resnet50"):
        trainer = Trainer(build(ModelSpec(name, 200)), device=s.device, precision="bf16")
        images = s.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        batches = [(images, torch.arange(batch, device=s.device) % 200)] * steps

        def epoch(trainer: Trainer = trainer, batches: Any = batches) -> None:
            trainer.fit(batches, batches[:1], OptimizerSpec(batch), ScheduleSpec(0.01, 1, (), 0.1))

        ours = f"{name} dense, {steps} steps of {batch} x {size} px"
        dense = s.time(ours, epoch, images=batch * steps)
        everything = Mask.dense(trainer.flat.segments)
        trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
        masked = s.time(f"{name} masked", epoch, images=batch * steps)
        if masked / dense > 0:  # both were measured
            s.timings[f"{name} masked"]["over_dense"] = masked / dense
            print(f"  {name} masked over dense: {masked / dense:.3f}", flush=True)
