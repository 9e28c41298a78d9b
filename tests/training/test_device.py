"""What holds on a device: an epoch waits for nothing, the captured step is the eager one, masked models compile."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.plain import LOW
from bench.training import OPTIONS, Around, resident
from fastprune.pruning.allocation import prune
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.criteria import random_scores
from fastprune.pruning.layers import MaskedConv2d, mask_layers
from fastprune.pruning.masks import Mask, layout
from fastprune.pruning.pruner import Pruner
from fastprune.specs import GpuOptions, Init, ModelSpec, OptimizerSpec, ScheduleSpec
from fastprune.training import flat
from fastprune.training.models import build, initial_model
from fastprune.training.trainer import Trainer

BATCH, STEPS = 16, 10
# A rate at which ten steps stay near their start. First steps of an untrained ResNet are chaotic: weights that differ
# by 1e-6 have moved 0.9 of their way apart after ten steps in float32 at 0.01, 0.03 at this rate (measured on a CPU).
LR = 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # torch.compile recommends what is not exact
    pytest.mark.filterwarnings("ignore:.* does not have a deterministic implementation"),
]


class Stale(Trainer):
    """From the fourth training step on it repeats something of that step, as a wrongly captured graph would."""

    what = "nothing"

    def __init__(self, *args, graph=None, **kwargs):
        super().__init__(*args, graph=graph, **kwargs)
        self._replays, self._steps, self._kept = graph is not False, 0, None

    def _train_step(self, images, labels):
        self._steps += 1
        mask = self.flat.mask
        if self._replays and self._steps >= 4:
            if self._kept is None:
                self._kept = {"batch": (images, labels), "rate": self._lr.clone(), "mask": mask.clone()}
            if self.what == "batch":
                images, labels = self._kept["batch"]
            if self.what == "rate":
                self._lr.copy_(self._kept["rate"])
            if self.what == "mask":
                self.flat.mask = self._kept["mask"]
        super()._train_step(images, labels)
        self.flat.mask = mask


def loop(device, precision: str, steps: int = STEPS, make: type[Trainer] = Trainer, **how):
    """A Trainer of a small ResNet-18, and `steps` different batches an epoch from memory of the device."""
    source = resident(device, steps * BATCH, 32, classes=4)
    width = 64 if device.type == "cuda" else 8
    model = initial_model(Init(ModelSpec("resnet18", 10, width=width), 0))
    trainer = make(model, device=device, precision=precision, **how)
    return trainer, source.train(seed=0, batch_size=BATCH, dtype=LOW[precision] or torch.float32)


def fit(trainer: Trainer, batches, epoch: int, lr: float = LR, val=None) -> None:
    """One epoch."""
    val = [next(iter(batches))] if val is None else val
    trainer.fit(batches, val, OptimizerSpec(BATCH), ScheduleSpec(lr, 1 << 20), start=epoch, stop=epoch + 1)


def relative(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm."""
    difference = torch.stack([(a.double() - b.double()).norm() for a, b in zip(got, expected, strict=True)]).norm()
    return (difference / torch.stack([b.double().norm() for b in expected]).norm()).item()


def bits(tensor: Tensor) -> Tensor:
    """As integers: +0 and -0 differ."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.fixture(autouse=True)
def exact_convs(monkeypatch):
    """cuDNN computes float32 convs in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def same_algorithms(monkeypatch) -> Iterator[None]:
    """A captured step and an eager one use the same algorithms of cuDNN: the former does not search for faster ones.
    In bf16 two algorithms give gradients that are 0.2 to 0.4 apart."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # max pooling has none
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def forbidden() -> Iterator[None]:
    """Within, waiting for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("precision", "options"), [("fp32", "none"), ("bf16", "none"), ("bf16", "all"), ("fp16", "none"), ("fp16", "all")]
)
def test_an_epoch_waits_for_nothing(device, precision, options):
    """From its first batch to its last; what compiles is bf16 alone, for three would take minutes."""
    if device.type == "cpu":
        pytest.skip("a CPU waits for nothing")
    compile = None if precision == "bf16" else False
    trainer, batches = loop(device, precision, compile=compile, gpu_options=OPTIONS[options])
    everything = Mask.dense(trainer.flat.segments)
    trainer.set_mask(prune(random_scores(everything, 0, 1), everything, 0.8))
    val = [next(iter(batches))]
    fit(trainer, batches, 0, val=val)  # compiles and captures
    with forbidden(), pytest.raises(RuntimeError):
        torch.ones(1, device=device).item()
    fit(trainer, Around(batches, forbidden), 1, val=val)


def captured_equals_eager(device, precision: str, make: type[Trainer]) -> None:
    """Ten steps, seven of them replayed, against ten eager ones on the same batches."""
    ends = []
    for graph in (None, False):
        trainer, batches = loop(device, precision, make=make, graph=graph, compile=False)
        start = trainer.flat.weight.clone()
        fit(trainer, batches, 0)
        ends.append(trainer.flat.weight - start)
    # How far the weights part over how far they went: one wrong batch, rate or mask parts them by a third or so.
    apart = relative(ends[:1], ends[1:])
    assert apart <= 0.1, f"{apart:.1e} apart"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_equal_eager_ones(device, precision, same_algorithms):
    if device.type == "cpu":
        pytest.skip("a CPU captures no graph")
    captured_equals_eager(device, precision, Trainer)


def capture_follows(device, make: type[Trainer]) -> None:
    trainer, batches = loop(device, "bf16", make=make)
    flat = trainer.flat
    trainer.save_rewind_point()
    start = flat.weight.clone()
    fit(trainer, batches, 0)
    before = flat.weight.clone()
    assert (before - start).norm() > 0
    fit(trainer, batches, 1, lr=0.0)
    assert torch.equal(bits(flat.weight), bits(before)), "the old rate was used"
    captured = len(trainer._graphed)
    trainer.prune(0.5)
    fit(trainer, batches, 2)
    for buffer in (flat.weight, flat.momentum, flat.half):
        assert not bits(buffer[~flat.mask]).any(), "the old mask was used"
    mask = Mask(flat.mask.clone(), flat.segments)
    trainer.rewind()
    expected = torch.where(mask.keep, start, 0.0)
    assert torch.equal(bits(flat.weight), bits(expected))
    assert not bits(flat.momentum).any()
    fit(trainer, batches, 0)
    assert len(trainer._graphed) == captured, "a step was captured again"

    fresh, _ = loop(device, "bf16", make=make, graph=False)
    fresh.set_mask(mask)
    fit(fresh, batches, 0)
    assert relative([flat.weight - expected], [fresh.flat.weight - expected]) <= 0.1


def test_a_captured_step_follows_rate_mask_and_rewind(device, same_algorithms):
    """After the capture they hold from the next step on, and nothing is captured again."""
    capture_follows(device, Trainer)


@pytest.mark.parametrize(
    ("check", "what", "message"),
    [
        (captured_equals_eager, "batch", "apart"),
        (capture_follows, "rate", "the old rate was used"),
        (capture_follows, "mask", "the old mask was used"),
    ],
    ids=["batch", "rate", "mask"],
)
def test_a_step_that_replays_wrongly_is_found(check, what, message, monkeypatch):
    """Acted out on a CPU: the checks can fail, and do not where nothing is wrong."""
    arguments = (torch.device("cpu"), *["fp32"] * (check is captured_equals_eager), Stale)
    check(*arguments)
    monkeypatch.setattr(Stale, "what", what)
    with pytest.raises(AssertionError, match=message):
        check(*arguments)


def skips_infinite_gradients(device, options: GpuOptions | None = None) -> None:
    trainer, batches = loop(device, "fp16", 6, compile=False, gpu_options=options)
    fit(trainer, batches, 0)
    every = list(batches)
    buffers = (trainer.flat.weight, trainer.flat.momentum, trainer.flat.other_params, trainer.flat.other_momentum)
    assert all(b.isfinite().all() for b in buffers)
    scale = 2.0**80  # beyond fp16 whatever the loss
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": scale, "_growth_tracker": 0})
    before = [b.clone() for b in buffers]
    fit(trainer, every[:1], 1, val=every[:1])
    for a, b in zip(before, buffers, strict=True):
        assert torch.equal(bits(a), bits(b)), "a step with infinite gradients was taken"
    assert trainer.scaler.get_scale() == scale / 2
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**10})
    fit(trainer, every[:1], 2, val=every[:1])
    assert trainer.scaler.get_scale() == 2.0**10
    assert not torch.equal(before[0], buffers[0])
    assert all(b.isfinite().all() for b in buffers)


@pytest.mark.parametrize("options", ["none", "all"])
def test_a_captured_fp16_step_skips_infinite_gradients(device, options):
    """It changes no weight and halves the scale; the next one is taken."""
    if device.type == "cpu" and options == "all":
        pytest.skip("the same on a CPU")
    skips_infinite_gradients(device, OPTIONS[options])


def test_a_scaler_that_takes_every_step_is_found(monkeypatch):
    def careless(optimizer):
        """Beyond a scale of 2^40; before the check reaches that, ordinary steps look for their own."""
        found = optimizer.found_inf * (optimizer.grad_scale < 2.0**40)
        return {"grad_scale": optimizer.grad_scale, "found_inf": found}

    monkeypatch.setattr(flat, "scaling", careless)
    with pytest.raises(AssertionError, match="infinite gradients was taken"):
        skips_infinite_gradients(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_masked_conv_under_autocast_is_a_conv_whose_weights_are_zeros(device, dtype):
    """With NaN in the weights that are pruned, which must reach neither the output nor a gradient."""
    g = torch.Generator().manual_seed(0)
    plain, layer = (
        conv.to(device, memory_format=torch.channels_last)
        for conv in (nn.Conv2d(32, 64, 3, padding=1), MaskedConv2d(32, 64, 3, padding=1))
    )
    layer.load_state_dict(plain.state_dict(), strict=False)
    mask = (torch.rand(plain.weight.shape, generator=g) < 0.3).to(device)
    layer.mask.copy_(mask)
    layer.weight.data[~mask] = torch.nan
    plain.weight.data[~mask] = 0.0
    x, grad = (torch.randn(4, c, 20, 20, generator=g).to(device) for c in (32, 64))
    results = []
    for module in (layer, plain):
        inputs = x.to(memory_format=torch.channels_last).clone().requires_grad_()
        with torch.autocast(device.type, dtype):
            out = module(inputs)
        out.backward(grad.to(dtype))
        results.append([out.detach(), inputs.grad, module.weight.grad])
    results[1][2] = torch.where(mask, results[1][2], 0.0)
    assert not results[0][2][~mask].any()
    assert relative(*results) <= 4e-3


def test_a_model_of_masked_layers_compiles_whole(device):
    """Forward and backward of a ResNet-18 in float32, compiled with fullgraph against eager."""
    on_gpu = device.type == "cuda"
    model = build(ModelSpec("resnet18", 10, width=64 if on_gpu else 8))
    dense = Mask.dense(layout(conv_weights(model)))
    mask = prune(random_scores(dense, 0, 1), dense, 0.8)
    mask_layers(model)
    Pruner(model, kinds="conv", verbose=False).set_masks(mask)
    model.to(device, memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=g).to(device, memory_format=torch.channels_last)
    labels = torch.arange(8, device=device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
    results = []
    for call in (compiled, model):
        model.zero_grad()
        logits = call(images)
        F.cross_entropy(logits, labels).backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.compiler.reset()
    for name, keep in mask.tensors().items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        assert not grad[~keep.to(device)].any(), name
    assert relative(results[0][:1], results[1][:1]) <= 1e-4
    assert relative(results[0][1:], results[1][1:]) <= 1e-3
