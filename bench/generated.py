"""The training step that torch.compile generates for a GPU, counted on a machine without one: launches and bytes.

    python bench/generated.py --network resnet18 --batch 512 --size 64 --precision bf16

The device is made up: tensors have shapes, strides and a device "cuda", but no memory (FakeTensorMode), and its
properties are those of an H100, with which an H200 shares its processor. A Trainer makes one step on it. Inductor
generates its code, which runs line by line with kernels that only record their arguments. So what is counted is what
would be launched, in its order, and nothing is compiled, timed or computed.

A conv counts as one launch, its backward as one for each gradient. What cuDNN adds (a conversion, a memset) is unknown
here, and so is whether inductor pads GEMMs, which it decides by timing. Bytes are those of a kernel's tensor arguments,
each read once or written once. Those of convs and GEMMs are not counted.
"""

import argparse
import ast
import inspect
import math
import re
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.utils
import torch.utils._triton
from torch import Tensor, nn
from torch._inductor.constant_folding import ConstantFolder
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if not __package__:  # run as a file: `bench` then is importable from the folder above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.plain import LOW
from fastprune.pruning import pruner
from fastprune.pruning.pruner import Pruner
from fastprune.specs import GpuOptions, ModelSpec, OptimizerSpec
from fastprune.training.flat import FlatParams
from fastprune.training.models import NETWORKS, build
from fastprune.training.trainer import Trainer

PARTS = ("forward", "backward", "rest")
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    gcnArchName="",
    uuid="made up",
)


@dataclass(frozen=True)
class Launch:
    """One node of a step's graph.

    part: one of PARTS.  kind: "generated", "own", "conv", "gemm" or "torch".  bytes: read and written; 0 of convs and
    GEMMs.  atomics: atomic additions in the source of a Triton kernel.
    """

    part: str
    kind: str
    name: str
    bytes: int = 0
    atomics: int = 0


@dataclass
class Step:
    """What a step launches, in order, and the source of its generated code by part."""

    launches: list[Launch] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)

    def count(self, **wanted: str) -> int:
        """Launches; count(part="forward", kind="conv"): of these only."""
        return len(self._select(wanted))

    def bytes(self, **wanted: str) -> int:
        """Bytes read and written, selected likewise."""
        return sum(launch.bytes for launch in self._select(wanted))

    @property
    def network_bytes(self) -> int:
        """Bytes of forward and backward, without convs and GEMMs."""
        return self.bytes(part="forward") + self.bytes(part="backward")

    @property
    def atomics(self) -> int:
        """Atomic additions in the generated kernels' sources."""
        return sum(launch.atomics for launch in self.launches if launch.kind == "generated")

    def _select(self, wanted: dict[str, str]) -> list[Launch]:
        return [x for x in self.launches if all(getattr(x, name) == value for name, value in wanted.items())]


class Recorder(TorchDispatchMode):
    """Records torch's operations that launch something, while `on`, and what else is given to `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.part, self.on = Step(), "rest", False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else torch.compile runs uncompiled within it

    def add(self, kind: str, name: str, bytes: int = 0, atomics: int = 0, launches: int = 1) -> None:
        """Launches of one kind; the bytes are those of all."""
        if self.on:
            rest = [Launch(self.part, kind, name)] * (launches - 1)
            self.step.launches += [Launch(self.part, kind, name, bytes, atomics), *rest][:launches]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.on:
            return result
        name, given = func._schema.name, _tensors((args, kwargs))
        if name == "aten::convolution":
            self.add("conv", name)
        elif name == "aten::convolution_backward":
            self.add("conv", name, launches=sum(args[-1][:2]))
            self.add("torch", "bias gradient", launches=args[-1][2])
        elif name in _GEMMS:
            self.add("gemm", name)
        elif name == "aten::_foreach_copy_":
            self.add("torch", name, _size(given), launches=_copies(*args[:2]))
        elif name == "aten::nll_loss_backward":
            self.add("torch", name, _size([*given, result]), launches=2)  # zeros first
        elif name.startswith("fastprune::"):
            self.add("own", name, _size([*given, *_tensors(result)]))
        elif name == "aten::copy_" and _same(*given[:2]):
            pass  # torch returns at once
        elif name not in _NO_LAUNCH and not func.is_view and any(t.is_cuda for t in _tensors(result)):
            self.add("torch", name, _size([*given, *_tensors(result)]))
        return result


_GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_NO_LAUNCH = {
    f"aten::{name}"
    for name in "empty empty_like empty_strided new_empty new_empty_strided detach lift_fresh set_ resize_ "
    "_reshape_alias _unsafe_view is_same_size".split()
}


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _size(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors; the same one given twice counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same view of the same memory."""
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return places[0] == places[1]


def _copies(into: Sequence[Tensor], of: Sequence[Tensor]) -> int:
    """Launches of torch._foreach_copy_: one for 64 tensors or 320 chunks of 65,536 elements, or one a tensor where
    dtypes or strides do not fit."""
    one = {(a.dtype, b.dtype) for a, b in zip(into, of, strict=True)}
    if len(one) > 1 or any(a.stride() != b.stride() for a, b in zip(into, of, strict=True)):
        return len(into)
    chunks = sum(math.ceil(t.numel() / 65536) for t in into)
    return max(math.ceil(len(into) / 64), math.ceil(chunks / 320))


# Generated code, run with kernels that record


class _Kernels:
    """Stands for AsyncCompile in generated code."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def triton(self, name: str, source: str, **_: Any) -> Any:
        return SimpleNamespace(run=lambda *args, **_: record(self._recorder, source, args))

    def wait(self, scope: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"generated code asks for a kernel of kind {name}, which is not counted here")


def record(recorder: Recorder, source: str, args: Sequence[Any], helpers: Mapping[str, str] | None = None) -> None:
    """Records the launch of a Triton kernel, generated or ours. helpers: sources of functions that it may call."""
    kernel = _functions(source)[-1]
    read, written = roles(kernel, helpers or {})
    given = dict(zip(_parameters(kernel), args, strict=False))
    bytes = sum(_size(_tensors([given.get(name) for name in names])) for names in (read, written))
    recorder.add("generated" if helpers is None else "own", kernel.name, bytes, source.count("tl.atomic_add"))


def _source(kernel: Any) -> str:
    return textwrap.dedent(inspect.getsource(kernel.fn))


def _functions(source: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def _parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args]


def roles(function: ast.FunctionDef, helpers: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """The parameters of a Triton function whose memory it reads, and those whose memory it writes, on any path."""
    found: dict[str, set[str]] = {"load": set(), "store": set()}
    stands_for: dict[str, str] = {}

    def base(at: Any) -> str:
        """The parameter that an address was computed from: the first name in it."""
        while not isinstance(at, ast.Name):
            parts = {ast.BinOp: "left", ast.Subscript: "value"}
            if isinstance(at, ast.Call) and at.args:
                at = at.args[0]
            elif type(at) in parts:
                at = getattr(at, parts[type(at)])
            else:
                return ""
        return stands_for.get(at.id, at.id)

    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(to := node.targets[0], ast.Name):
            stands_for[to.id] = base(node.value)
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in ("load", "store") or name.startswith("atomic_"):
            for what in ("load", "store") if name.startswith("atomic_") else (name,):
                found[what].add(base(node.args[0]))
        elif name in helpers:
            helper = _functions(helpers[name])[-1]
            passed = dict(zip(_parameters(helper), node.args, strict=False))
            for what, names in zip(("load", "store"), roles(helper, helpers), strict=True):
                found[what] |= {base(passed[n]) for n in names if n in passed}
    known = set(_parameters(function))
    return found["load"] & known, found["store"] & known


def _module(graph: GraphLowering, recorder: Recorder) -> Any:
    """GraphLowering.compile_to_module: the generated code, with kernels that record."""
    code = graph.codegen()[0].value
    part = "backward" if graph.is_backward else "forward"
    recorder.step.code[part] = code
    # As it is, but for what needs memory or a driver.
    code = re.sub(r"^from torch\._C import _cuda_getCurrentRawStream as get_raw_stream$", "", code, flags=re.M)
    code = re.sub(r"^async_compile = AsyncCompile\(\)$", "", code, flags=re.M)
    code = re.sub(r"^(empty_strided_cuda|reinterpret_tensor|assert_\w+) = .*$", "", code, flags=re.M)
    space: dict[str, Any] = {
        "__name__": f"generated_{part}",
        "async_compile": _Kernels(recorder),
        "get_raw_stream": lambda index: 0,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda"),
        "reinterpret_tensor": lambda t, size, stride, offset=0: t.as_strided(size, stride, t.storage_offset() + offset),
        "assert_size_stride": lambda *args: None,
        "assert_size_stride_grouped": lambda *args: None,
        "assert_alignment": lambda *args: None,
    }
    exec(compile(code, f"generated {part}", "exec"), space)
    call = space["call"]

    def run(args: list[Any]) -> Any:
        before, recorder.part = recorder.part, part
        try:
            return call(args)
        finally:
            recorder.part = before

    return SimpleNamespace(call=run, __file__=f"generated {part}")


# A made-up device


def grad(outputs: Any, inputs: Sequence[Tensor], grad_outputs: Any = None, **_: Any) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad in Python, of nothing that needs a second derivative: torch's engine asks a driver for
    streams. A gradient that is not there is None."""
    outputs, grad_outputs = ([t] if isinstance(t, Tensor) else t for t in (outputs, grad_outputs))
    seeds = [torch.ones_like(t) for t in outputs] if grad_outputs is None else grad_outputs
    leaves = {id(t) for t in inputs if t.grad_fn is None}
    places = {(t.grad_fn, t.output_nr) for t in inputs if t.grad_fn is not None}
    of_leaf: dict[int, Tensor] = {}
    of_place: dict[tuple[Any, int], Tensor] = {}
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)  # by node: gradients of its outputs

    def arrive(node: Any, number: int, g: Tensor) -> None:
        meta = node._input_metadata[number]
        if g.shape != meta.shape:
            g = g.sum_to_size(meta.shape)
        if g.dtype != meta.dtype:
            g = g.to(meta.dtype)
        arrived[node][number] = arrived[node][number] + g if number in arrived[node] else g

    order = _in_order([t.grad_fn for t in outputs if t.grad_fn is not None], leaves, {n for n, _ in places})
    needed = set(order)
    with torch.no_grad():
        for t, seed in zip(outputs, seeds, strict=True):
            if t.grad_fn in needed and seed is not None:
                arrive(t.grad_fn, t.output_nr, seed)
        for node in order:
            given = arrived.pop(node, {})
            of_place |= {(node, i): g for i, g in given.items() if (node, i) in places}
            if hasattr(node, "variable"):
                of_leaf |= {id(node.variable): g for g in given.values()}
            elif given and any(following in needed for following, _ in node.next_functions):
                every = [given.get(i) for i in range(len(node._input_metadata))]
                by_python = isinstance(node, torch.autograd.function.BackwardCFunction)
                found = node.apply(*every) if by_python else node(*every)
                for (following, number), g in zip(node.next_functions, _tuple(found), strict=False):
                    if following in needed and g is not None:
                        arrive(following, number, g)
    return tuple(of_leaf.get(id(t)) if t.grad_fn is None else of_place.get((t.grad_fn, t.output_nr)) for t in inputs)


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _in_order(roots: Sequence[Any], leaves: set[int], ends: set[Any]) -> list[Any]:
    """The nodes between `roots` and leaves (by id) or ends, each before those that get gradients from it."""
    order: list[Any] = []
    needed: dict[Any, bool] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        following = [n for n, _ in node.next_functions if n is not None]
        if left:
            own = node in ends or id(getattr(node, "variable", None)) in leaves
            needed[node] = own or any(needed[n] for n in following)
            if needed[node]:
                order.append(node)
        elif node not in needed:
            needed[node] = False
            stack.append((node, True))
            stack += [(n, False) for n in following if n not in needed]
    return order[::-1]


class _OnCpu(TorchDispatchMode):
    """Makes on a CPU what is to be made on a GPU: the numbers that inductor folds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _folded(folder: Any, *args: Any) -> Any:
    """UniformValueConstantFolder.run"""
    with _OnCpu():
        return ConstantFolder.run(folder, *args)


def _forget() -> None:
    """Clears what torch has compiled, and what it remembers of the device."""
    torch._dynamo.reset()
    DeviceProperties.create.cache_clear()
    for module in (torch.utils._triton, torch._inductor.utils):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def made_up_device(recorder: Recorder) -> Iterator[None]:
    """Within it "cuda" is an H100 without memory: operations yield shapes, and Triton kernels record their launch."""
    import triton
    from torch._dynamo import device_interface
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device=None: 0
    )

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        jitted = {name: f for name, f in kernel.fn.__globals__.items() if isinstance(f, triton.runtime.jit.JITFunction)}
        record(recorder, _source(kernel), args, {name: _source(f) for name, f in jitted.items()})

    def moved(model: nn.Module, device: Any, memory_format: torch.memory_format) -> nn.Module:
        # Module.to exchanges what is within each parameter, which fake ones refuse.
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    kept = memory_format if p.dim() == 4 else torch.preserve_format
                    module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device, memory_format=kept))
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else torch.empty(b.shape, dtype=b.dtype, device=device)
        return model

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_name": lambda device=None: H100.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False,
        "device": lambda index: nullcontext(),
        "_DeviceGuard": lambda index: nullcontext(),
        "set_device": lambda index: None,
        "mem_get_info": lambda device=None: (H100.total_memory, H100.total_memory),
    }
    interface = device_interface.CudaInterface
    made_up: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        *((interface, name, staticmethod(cuda[name])) for name in "device_count current_device set_device".split()),
        *((interface, name, staticmethod(cuda[name])) for name in "get_device_properties synchronize".split()),
        (torch.accelerator, "is_available", lambda: False),  # Dynamo asks it for streams
        (triton.runtime.driver, "_active", driver),
        (triton.runtime.jit.JITFunction, "run", launch),
        (torch.autograd, "grad", grad),
        (GraphLowering, "compile_to_module", lambda graph: _module(graph, recorder)),
        (UniformValueConstantFolder, "run", _folded),
        (FakeTensorMode, "avoid_device_init", True),
        (torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None),
        # Without a driver the choice would be a conv of torch's own, which has another memory format.
        (torch._C, "_select_conv_backend", lambda *args, **_: vars(torch._C)["_ConvBackend"].Cudnn),
        (nn.Module, "to", moved),
        # What asks for addresses and values.
        (Tensor, "data_ptr", lambda t: t.untyped_storage()._cdata + 16 * t.storage_offset()),
        (pruner, "masks_of_zeros", lambda weights: None),
        (Pruner, "kept", property(lambda self: self.total)),
        (FlatParams, "check_aliased", lambda flat: None),
    ]
    contexts: list[Any] = [
        *(mock.patch.object(*one) for one in made_up),
        mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [H100]}),
        mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}),
        torch._inductor.config.patch(compile_threads=1, shape_padding=False),
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ]
    _forget()
    try:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch's own, of no use
            yield
    finally:
        _forget()


# A step


class Counted(Trainer):
    """A Trainer that makes one step on a made-up device."""

    recorder: Recorder

    def step(self, images: Tensor, labels: Tensor, optimizer: OptimizerSpec) -> None:
        """One step with a batch in another place, from which it is copied first, as in a replayed graph."""
        self._classes = -1  # known: the labels have no values to check
        self._smoothing = optimizer.label_smoothing
        self._hyper = {name: getattr(optimizer, name) for name in ("name", "momentum", "weight_decay", "nesterov")}
        self._hyper |= {"lr": self._lr, "decays": None, "clip_grad_norm": optimizer.clip_grad_norm}
        self.flat.begin(optimizer.name)
        self.model.train()
        with self._deciding("plain"):
            self._begin(images, math.inf)
            batch = images.clone(memory_format=torch.preserve_format), labels.clone()
            self._train_step(*batch)  # compiles
            with self.recorder:
                self.recorder.on = True
                for there, here in zip(batch, (images, labels), strict=True):
                    there.copy_(here)
                self._train_step(*batch)
                self.recorder.on = False


def count(
    make: Callable[[], nn.Module],
    batch: int,
    size: int,
    precision: str = "bf16",
    options: GpuOptions | None = None,
    optimizer: OptimizerSpec | None = None,
) -> Step:
    """The step of a Trainer's network on a GPU. make: the network.  batch: images.  size: of an image, in pixels."""
    recorder = Recorder()
    with made_up_device(recorder):
        trainer = Counted(make(), device="cuda:0", precision=precision, graph=False, gpu_options=options)
        trainer.recorder = recorder
        images = torch.empty(batch, 3, size, size, dtype=trainer.images, device="cuda")
        labels = torch.empty(batch, dtype=torch.int64, device="cuda")
        trainer.step(images.contiguous(memory_format=torch.channels_last), labels, optimizer or OptimizerSpec(batch))
    return recorder.step


def table(step: Step) -> str:
    """Launches and bytes by part and kind, as text."""
    lines = [f"{'part':10}{'kind':12}{'launches':>9}{'MB':>9}"]
    for part in PARTS:
        for kind in sorted({launch.kind for launch in step._select({"part": part})}):
            bytes = step.bytes(part=part, kind=kind)
            lines.append(f"{part:10}{kind:12}{step.count(part=part, kind=kind):9}{bytes / 1e6:9.1f}")
    lines.append(f"{'all':22}{step.count():9}{step.bytes() / 1e6:9.1f}")
    lines.append(f"forward and backward move {step.network_bytes / 1e9:.2f} GB; {step.atomics} atomic additions")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description="counts the training step that torch.compile generates for an H100")
    names = [option.name for option in fields(GpuOptions)]
    p.add_argument("--network", choices=NETWORKS, default="resnet18")
    p.add_argument("--stem", choices=("imagenet", "cifar"), default="imagenet")
    p.add_argument("--classes", type=int, default=200)
    p.add_argument("--batch", type=int, default=512, help="images")
    p.add_argument("--size", type=int, default=64, help="of an image, in pixels")
    p.add_argument("--precision", choices=LOW, default="bf16")
    p.add_argument("--own", nargs="*", default=(), metavar="NAME", choices=names, help=f"our own kernels: {names}")
    p.add_argument("--list", action="store_true", help="print each launch")
    p.add_argument("--code", action="store_true", help="print the generated code")
    args = p.parse_args(argv)
    spec = ModelSpec(args.network, args.classes, stem=args.stem)
    options = GpuOptions(**dict.fromkeys(args.own, True))
    step = count(lambda: build(spec), args.batch, args.size, args.precision, options)
    if args.code:
        print(*step.code.values(), sep="\n")
    if args.list:
        for launch in step.launches:
            print(f"{launch.part:10}{launch.kind:10}{launch.bytes / 1e6:9.2f} MB  {launch.name}")
    print(table(step))


if __name__ == "__main__":
    main()
