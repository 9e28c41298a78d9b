"""Whole models and training: right on this device, waiting for nothing, the captured step the same as the plain one."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu_speed import Around, resident
from bench.gpu_tools import FLOATS, NAN, Check, bits, mask_of, require
from bench.plain import LOW
from fastprune.figures import load
from fastprune.figures.reproduce import FigureRequest, Request, run
from fastprune.loaders import Batches
from fastprune.pruning.allocation import prune
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.masks import Mask, MaskedConv2d, attach, layout, prunable
from fastprune.specs import Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.study.settings import preset
from fastprune.training.models import build, initial_model
from fastprune.training.trainer import Trainer

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
    settings = preset(load("A2").protocol, "smoke").override(seeds=1, **size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        figure = FigureRequest(load("A2"), "smoke", settings, "synthetic", root / "out")
        request = Request((figure,), root / "store", device=str(s.device), workers=1)
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


def loop(s: Suite, precision: str, steps: int, **how: Any) -> tuple[Trainer, Batches]:
    """A Trainer of a small ResNet-18, and `steps` different batches an epoch from memory of the device."""
    if s.interpreted:
        raise SkipTest("interpreted kernels would take minutes")
    batch = 16
    source = resident(s, steps * batch, 32, classes=4)
    trainer = Trainer(
        initial_model(Init(ModelSpec("resnet18", 10, width=8 if s.small else 64), 0)),
        device=s.device,
        precision=precision,
        **how,
    )
    return trainer, source.train(seed=0, batch_size=batch, dtype=LOW[precision] or torch.float32)


def fit(trainer: Trainer, batches: Any, epoch: int, lr: float = 0.01, val: Any = None) -> None:
    """One epoch."""
    val = [next(iter(batches))] if val is None else val
    trainer.fit(batches, val, OptimizerSpec(16), ScheduleSpec(lr, 1 << 20), start=epoch, stop=epoch + 1)


def check_no_waiting(s: Suite) -> str:
    """From the first batch of an epoch to its last nothing waits for the device: torch forbids it meanwhile."""
    for precision in ("fp32", "bf16", "fp16"):
        # What compiles is bf16 alone: three would take minutes.
        trainer, batches = loop(s, precision, 10, compile=None if precision == "bf16" else False)
        everything = Mask.dense(trainer.flat.segments)
        trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
        val = [next(iter(batches))]
        fit(trainer, batches, 0, val=val)  # compiles and captures
        if s.cuda:
            with forbidden():
                try:
                    torch.ones(1, device=s.device).item()
                except RuntimeError:
                    pass
                else:
                    raise AssertionError("torch did not notice that .item() waits")
        fit(trainer, Around(batches, forbidden if s.cuda else nullcontext), 1, val=val)
    if not s.cuda:
        raise SkipTest("a CPU waits for nothing")
    return "fp32, bf16 and fp16"


@contextmanager
def forbidden() -> Iterator[None]:
    """Within, waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_captured(s: Suite) -> str:
    """Ten steps of which seven are replayed against ten eager ones, on different batches: how far the weights part,
    over how far they went."""
    notes = []
    # One wrong batch, or a rate or mask of the wrong step, parts them by a third or so.
    for precision, limit in (("fp32", 5e-3), ("bf16", 1e-1)):
        ends = []
        with exact_convs():
            for graph in (None, False):
                trainer, batches = loop(s, precision, 10, graph=graph, compile=False)
                start = trainer.flat.weight.clone()
                fit(trainer, batches, 0)
                ends.append(trainer.flat.weight - start)
        apart = relative(ends[:1], ends[1:])
        require(apart <= limit, f"{precision}: {apart:.1e} apart")
        notes.append(f"{precision} {apart:.1e}")
    return "apart by " + ", ".join(notes)


def check_capture_follows(s: Suite) -> str:
    """After the capture, a new learning rate, a smaller mask and a rewind hold from the next step on."""
    trainer, batches = loop(s, "bf16", 10)
    flat = trainer.flat
    trainer.save_rewind_point()
    start = flat.weight.clone()
    fit(trainer, batches, 0)
    before = flat.weight.clone()
    require((before - start).norm() > 0, "training changed nothing")
    fit(trainer, batches, 1, lr=0.0)
    require(torch.equal(bits(flat.weight), bits(before)), "at rate 0 the weights changed: the old rate was used")
    captured = len(trainer._graphed)
    trainer.prune(0.5)
    fit(trainer, batches, 2)
    require(not bits(flat.weight[~flat.mask]).any(), "a pruned weight is not +0: the old mask was used")
    require(not bits(flat.momentum[~flat.mask]).any(), "the momentum of a pruned weight is not +0")
    assert flat.half is not None
    require(not bits(flat.half[~flat.mask]).any(), "the low-precision copy of a pruned weight is not +0")
    mask, shape = flat.mask.clone(), trainer.flat.segments
    trainer.rewind()
    expected = torch.where(mask, start, 0.0)
    require(torch.equal(bits(flat.weight), bits(expected)), "rewound to other weights")
    require(not bits(flat.momentum).any(), "there is momentum after rewinding")
    fit(trainer, batches, 0)
    require(len(trainer._graphed) == captured, "a step was captured again")

    fresh, _ = loop(s, "bf16", 10, graph=False)
    fresh.set_mask(Mask(mask, shape))
    fit(fresh, batches, 0)
    apart = relative([flat.weight - expected], [fresh.flat.weight - expected])
    require(apart <= 0.1, f"a rewound run and a fresh one are {apart:.1e} apart")
    return f"a rewound run and a fresh, eager one are apart by {apart:.1e}"


def check_scaler(s: Suite) -> str:
    """fp16, captured: a step with infinite gradients changes no weight and halves the scale; the next is taken."""
    trainer, batches = loop(s, "fp16", 6, compile=False)
    fit(trainer, batches, 0)
    every = list(batches)
    buffers = (trainer.flat.weight, trainer.flat.momentum, trainer.flat.other_params, trainer.flat.other_momentum)
    require(all(b.isfinite().all() for b in buffers), "weights are not finite after ordinary steps")
    scale = 2.0**80  # beyond fp16 whatever the loss
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": scale, "_growth_tracker": 0})
    before = [b.clone() for b in buffers]
    fit(trainer, every[:1], 1, val=every[:1])
    same = all(torch.equal(bits(a), bits(b)) for a, b in zip(before, buffers, strict=True))
    require(same, "a step with infinite gradients was taken")
    require(trainer.scaler.get_scale() == scale / 2, f"the scale went from 2^80 to {trainer.scaler.get_scale():.3g}")
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**10})
    fit(trainer, every[:1], 2, val=every[:1])
    require(trainer.scaler.get_scale() == 2.0**10, "the scale fell although the gradients were finite")
    require(not torch.equal(before[0], buffers[0]), "a step with finite gradients was not taken")
    require(all(b.isfinite().all() for b in buffers), "a weight is not finite")
    return ""


CHECKS: dict[str, Check] = {
    "MaskedConv2d under autocast": check_conv,
    "torch.compile of an attached model": check_compile,
    "training equals plain PyTorch": check_training,
    "an epoch waits for nothing": check_no_waiting,
    "captured steps equal eager ones": check_captured,
    "a captured step follows rate, mask and rewind": check_capture_follows,
    "a captured fp16 step skips infinite gradients": check_scaler,
    "figure A2, small, twice": check_rounds,
}
