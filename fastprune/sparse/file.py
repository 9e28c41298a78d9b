"""Files of compiled networks: safetensors with kept weights, the gaps between them, and the program as JSON.

A kept weight's place is the number of pruned weights since the one before it, as a byte: 0 to 254 stand before a kept
weight; 255 stands for 255 pruned weights without a kept one after them. The order is OHWI for layers that are computed
from kept weights ("pruned"), and that of the tensor for others, whose zeros only take no space ("pruned flat").
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from fastprune.errors import InputError
from fastprune.files import COMPILED, TENSORS, check_kind, read_tensors, write_atomically, write_tensors
from fastprune.sparse.program import (
    Add,
    BatchNorm,
    FusedConv,
    Linear,
    MaxPool,
    Mean,
    Name,
    Norm,
    Op,
    Program,
    Relu,
    Torch,
    Value,
    inputs,
    map_leaves,
    names,
)

FORMAT = 2
"""1, which is read, too, has no operations of torch."""

_ESCAPE = 255

_OPS: dict[str, Any] = {op.__name__: op for op in (FusedConv, Norm, Relu, Add, MaxPool, Mean, Linear)}

# What torch.export does with sizes and tuples, beside operations of torch.
_PYTHON: dict[str, Any] = {
    f.__name__: f
    for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
        operator.pow, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        torch.sym_float, torch.sym_int, torch.sym_ite, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_sum,
    )
}  # fmt: skip

# What torch.export leaves of modules, although it is not public.
_INTERNAL = {
    "_conj", "_convolution", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax", "_native_multi_head_attention",
    "_neg_view", "_softmax", "_to_copy", "_transformer_encoder_layer_fwd", "_trilinear", "_unsafe_view", "_weight_norm",
}  # fmt: skip

_RESULTS = {"Tensor", "List[Tensor]", "int", "float", "bool", "number"}

_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64,
}  # fmt: skip

# Arguments of torch's own types, by the name of the type.
_TYPES: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


@dataclass(frozen=True)
class Kept:
    """The kept weights of a layer. shape: [O, KH, KW, I] as stored. places: int64 [kept], rising, of the kept weights
    in storage order; values: float32 [kept]."""

    shape: tuple[int, int, int, int]
    places: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, weight: Tensor) -> "Kept":
        """weight: float32 [O, I, KH, KW] or [O, I]."""
        stored = weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()[:, None, None, :]
        flat = stored.reshape(-1).numpy()
        places = np.flatnonzero(flat)
        o, kh, kw, i = stored.shape
        return cls((o, kh, kw, i), places, flat[places])

    @property
    def density(self) -> float:
        return len(self.places) / max(1, math.prod(self.shape))

    def dense(self) -> Tensor:
        """float32 [O, I, KH, KW], or [O, I] of a kernel of one tap."""
        flat = np.zeros(math.prod(self.shape), np.float32)
        flat[self.places] = self.values
        return torch.from_numpy(flat.reshape(self.shape)).permute(0, 3, 1, 2)

    @property
    def mask(self) -> np.ndarray:
        """bool [O, KH, KW, I]."""
        mask = np.zeros(math.prod(self.shape), bool)
        mask[self.places] = True
        return mask.reshape(self.shape)


Weights = Mapping[str, Tensor | Kept]


def encode(places: np.ndarray) -> np.ndarray:
    """Gaps between rising places as bytes, uint8. places: int64."""
    gaps = np.diff(places, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    out = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return out


def decode(codes: np.ndarray) -> np.ndarray:
    """The places, int64, that `encode` made uint8 `codes` of."""
    kept = codes != _ESCAPE
    return (np.cumsum(codes, dtype=np.int64) + np.cumsum(kept))[kept] - 1


def write(path: str | Path, program: Program, weights: Weights, dtype: torch.dtype) -> None:
    """Creates or replaces a file. weights: of the program. dtype: float32 or float16, of kept weights and of dense ones
    in float32 with two dimensions or more; other tensors stay as they are. A zero of those is +0 in the file.

    InputError for another dtype, for a program with operations that are not public ones of torch, for tensors of a type
    or name that a file cannot hold, and if a weight exceeds float16.
    """
    path = Path(path)
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"a compiled network is saved in float32 or float16, not in {dtype}")
    ops = [_plain_op(op) for op in program.ops]
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    flat_shapes: dict[str, tuple[int, ...]] = {}

    for name, tensor in (*program.constants.items(), *((n, t) for n, t in weights.items() if isinstance(t, Tensor))):
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise _foreign(f"{name} in {tensor.dtype}, {tensor.layout}")
    if odd := next((name for name in (*program.constants, *weights) if ":" in name), None):
        raise _foreign(f"a tensor by the name {odd}")

    def put_kept(name: str, places: np.ndarray, values: np.ndarray) -> None:
        tensors[f"{name}:gaps"] = torch.from_numpy(encode(places))
        tensors[f"{name}:kept"] = _cast(name, torch.from_numpy(values), dtype)

    for name, weight in weights.items():
        if isinstance(weight, Kept):
            put_kept(name, weight.places, weight.values)
            shapes[name] = weight.shape
        elif weight.dtype == torch.float32 and weight.dim() > 1:
            flat = weight.reshape(-1).numpy()
            places = np.flatnonzero(flat)
            if len(encode(places)) + len(places) * dtype.itemsize < len(flat) * dtype.itemsize:
                put_kept(name, places, flat[places])
                flat_shapes[name] = tuple(weight.shape)
            else:
                tensors[name] = _cast(name, weight, dtype).contiguous()
        else:
            tensors[name] = weight.contiguous()
    facts = {
        "format": FORMAT,
        "input": _plain(program.input),
        "output": _plain(program.output),
        "ops": ops,
        "pruned": shapes,
        "pruned flat": flat_shapes,
        "constants": list(program.constants),
    }
    # Constants may share memory, which safetensors refuses.
    for name, tensor in program.constants.items():
        tensors[f"{name}:constant"] = tensor.detach().clone(memory_format=torch.contiguous_format)
    write_atomically(path, lambda aside: write_tensors(aside, tensors, facts))


def read(path: str | Path) -> tuple[Program, dict[str, Tensor | Kept]]:
    """The program and its weights, float32, of a file that `write` wrote. InputError for a damaged or foreign file.

    Operations of torch are public ones that by their schema change no tensor, and open no file. That keeps accidents
    out; it is no protection from a file that was made to do harm.
    """
    path = Path(path)
    expected = "a compiled network, as compile.py --out NAME.fastprune and CompiledModel.save write it"
    tensors, facts = read_tensors(path, expected)
    check_kind(path, expected, COMPILED, TENSORS)
    try:
        if facts["format"] not in (1, FORMAT):
            raise InputError(f"{path}: written by another version of fastprune (format {facts['format']!r})")
        constants = {name: tensors.pop(f"{name}:constant") for name in facts.get("constants", [])}
        program = Program(tuple(map(_op, facts["ops"])), _value(facts["input"]), _value(facts["output"]), constants)
        weights: dict[str, Tensor | Kept] = {}

        def pop_kept(name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
            gaps, values = tensors.pop(f"{name}:gaps"), tensors.pop(f"{name}:kept")
            places = decode(gaps.numpy())
            # Lists of places are written without a check.
            inside = len(places) == len(values) and (len(places) == 0 or places[-1] < math.prod(shape))
            if gaps.dtype != torch.uint8 or min(shape) < 1 or not inside:
                raise ValueError(f"{name} has places outside its layer")
            return places, values.float().numpy()

        for name, shape in facts["pruned"].items():
            o, kh, kw, i = map(int, shape)
            weights[name] = Kept((o, kh, kw, i), *pop_kept(name, (o, kh, kw, i)))
        for name, shape in facts.get("pruned flat", {}).items():
            places, values = pop_kept(name, tuple(map(int, shape)))
            weights[name] = weight = torch.zeros(*map(int, shape))
            weight.view(-1).numpy()[places] = values
        weights |= {n: tensor.float() if tensor.dtype == torch.float16 else tensor for n, tensor in tensors.items()}
        check(program, weights)
    except InputError:
        raise
    # Its checksum is right: it comes from another program, or from another version of this one.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: not a compiled network ({type(error).__name__}: {error})".splitlines()[0]) from error
    return program, weights


def check(program: Program, weights: Weights) -> None:
    """ValueError unless all values and weights have the shapes and types that kernels take for granted.

    What an operation in torch gives is known only when it ran: `CompiledModel` checks it before a kernel reads it.
    """
    known, tensors = {program.input}, {**program.constants, **weights}

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    def shape_of(name: str) -> tuple[int, ...]:
        weight = weights[name]
        if isinstance(weight, Tensor):
            expect(weight.dtype == torch.float32, f"{name} is {weight.dtype}")
            return tuple(weight.shape)
        o, kh, kw, i = weight.shape
        return o, i, kh, kw

    def vector(name: str | None, size: int) -> None:
        expect(name is None or shape_of(name) == (size,), f"{name} does not have the shape [{size}]")

    def window(op: FusedConv | MaxPool) -> tuple[int, ...]:
        sizes = list(zip(op.x.shape[1:], op.kernel, op.stride, op.padding, strict=True))
        expect(all(k > 0 and s > 0 and p >= 0 for _, k, s, p in sizes), f"{op} has sizes below 1")
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)

    expect(len(program.input.shape) == 3, "the input is no image")
    for op in program.ops:
        expect(all(value in known for value in inputs(op)) and op.y not in known, f"{op} has unknown values")
        expect(op.y.number not in {value.number for value in known}, f"{op} writes a value again")
        known.add(op.y)
        if isinstance(op, Torch):
            for read in names(op):
                expect(isinstance(tensors[read], Tensor), f"{op.name} reads {read}, which is in lists")
            continue
        for value in (*inputs(op), op.y):
            sizes = value.shape
            expect(
                value.batched and value.plain and len(sizes) in (1, 3) and min(sizes) > 0,
                f"{op} has values that are no maps",
            )
        x, y = op.x.shape, op.y.shape
        match op:
            case FusedConv():
                expect(
                    len(x) == 3 and shape_of(op.weight) == (y[0], x[0], *op.kernel), f"{op.weight} has another shape"
                )
                expect(y[1:] == window(op), f"{op.weight} has a result of another size")
                expect(op.residual is None or op.residual.shape == y, f"{op.weight} has a residual of another shape")
                vector(op.bias, y[0])
            case Linear():
                (o, i, *taps) = shape_of(op.weight)
                expect((o, i) == (*y, *x) and set(taps) <= {1}, f"{op.weight} has another shape")
                vector(op.bias, o)
            case MaxPool():
                expect(y == (x[0], *window(op)), f"{op} has a result of another size")
                expect(all(2 * p <= k for p, k in zip(op.padding, op.kernel, strict=True)), f"{op} has a large padding")
            case Mean():
                expect(len(x) == 3 and y == x[:1], f"{op} has a result of another size")
            case Norm():
                norm, pool = op.batch_norm, op.pool
                for name in (norm.weight, norm.bias, norm.mean, norm.var):
                    vector(name, x[0])
                expect(len(x) == 3 and (pool is None or op.residual is None), f"{norm.mean} has another shape")
                expect(op.residual is None or op.residual.shape == y, f"{norm.mean} has a residual of another shape")
                size = x if pool is None else (x[0], *window(replace(pool, x=op.x)))
                expect(y == size, f"{norm.mean} has a result of another size")
            case Add():
                expect(op.other.shape == x == y, f"{op} has values of other shapes")
            case _:
                expect(x == y, f"{op} has a result of another shape")
    expect(program.output in known, "the output is not computed")


def _op(facts: Mapping[str, Any]) -> Op:
    facts = dict(facts)
    kind = facts.pop("op")
    if kind == Torch.__name__:
        target, args, kwargs = facts["target"], map(_argument, facts["args"]), facts["kwargs"]
        made = {name: _argument(value) for name, value in kwargs.items()}
        return Torch(_target(target), tuple(args), made, _value(facts["y"]), str(facts["name"]))
    return _made(_OPS[kind], facts)


def _foreign(what: str) -> InputError:
    return InputError(f"a .fastprune file cannot hold this network, which needs {what}: write .onnx or .pth")


def _may_run(target: Any) -> bool:
    """Whether a file may name an operation: a public one of torch that gives tensors or numbers, by its schema changes
    nothing, and opens no file."""
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    name = target._schema.name.removeprefix("aten::")
    results = {str(result.type) for result in target._schema.returns}
    if (name.startswith("_") and name not in _INTERNAL) or not results or not results <= _RESULTS:
        return False
    return all(argument.name != "filename" for argument in target._schema.arguments)


def _target(name: str) -> Any:
    if name in _PYTHON:
        return _PYTHON[name]
    space, packet, overload = name.split(".")
    target = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if space != "aten" or not _may_run(target):
        raise ValueError(f"torch {torch.__version__} has no operation {name}")
    return target


def _plain_op(op: Op) -> dict[str, Any]:
    """An operation as JSON. InputError for one of torch that a file cannot hold."""
    if not isinstance(op, Torch):
        return {"op": type(op).__name__, **_plain(op)}
    known = _PYTHON.get(getattr(op.target, "__name__", "")) is op.target
    if not known and not _may_run(op.target):
        raise _foreign(f"{op.name}, which is no public operation of torch")
    args, kwargs = map_leaves(lambda leaf: _plain_argument(leaf, op), (op.args, op.kwargs))
    target = op.target.__name__ if known else str(op.target)
    return {"op": "Torch", "target": target, "args": args, "kwargs": kwargs, "y": _plain(op.y), "name": op.name}


def _plain_argument(leaf: Any, op: Torch) -> Any:
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return leaf
    if isinstance(leaf, Value):
        return {"value": _plain(leaf)}
    if isinstance(leaf, Name):
        return {"name": leaf.name}
    if isinstance(leaf, torch.device):
        return {"device": str(leaf)}
    for name, kind in _TYPES.items():
        if isinstance(leaf, kind):
            return {name: str(leaf).removeprefix("torch.")}
    raise _foreign(f"{op.name} with an argument of type {type(leaf).__name__}")


def _argument(plain: Any) -> Any:
    """What `_plain_argument` made JSON of, in lists as tuples."""
    if isinstance(plain, list):
        return tuple(map(_argument, plain))
    if not isinstance(plain, dict):
        return plain
    ((kind, what),) = plain.items()
    if kind == "value":
        return _value(what)
    if kind == "name":
        return Name(str(what))
    if kind == "device":
        return torch.device(what)
    made = getattr(torch, what)
    if not isinstance(made, _TYPES[kind]):
        raise TypeError(f"{what!r} is no {kind} of torch")
    return made


def _made(kind: Any, facts: Mapping[str, Any]) -> Any:
    """A record of the JSON that `_plain` gives."""
    if set(facts) != {f.name for f in fields(kind)}:
        raise ValueError(f"{kind.__name__} has the fields {', '.join(map(str, facts))}")
    return kind(**{name: _field(name, value) for name, value in facts.items()})


def _field(name: str, value: Any) -> Any:
    if name in ("x", "y", "other", "residual"):
        return None if value is None and name == "residual" else _value(value)
    if name in ("kernel", "stride", "padding"):
        first, second = value
        return int(first), int(second)
    if name in ("batch_norm", "pool"):
        return None if value is None else _made(BatchNorm if name == "batch_norm" else MaxPool, value)
    if name in ("relu", "eps", "momentum"):
        kind = bool if name == "relu" else float
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {value!r}")
        return value
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}")
    return value


def _value(facts: Mapping[str, Any]) -> Value:
    if not {"number", "shape"} <= set(facts) <= {"number", "shape", "plain"}:
        raise ValueError("a value has unknown fields")
    number, shape = int(facts["number"]), facts["shape"]
    if shape is None:
        return Value(number, (), False)
    return Value(number, tuple(int(size) for size in shape), plain=bool(facts.get("plain", True)))


def _plain(record: Any) -> dict[str, Any]:
    """A value or an operation as JSON, without what all values of a file share."""
    if isinstance(record, Value):
        shape = record.shape if record.batched else None
        return {"number": record.number, "shape": shape} | ({} if record.plain else {"plain": False})
    parts = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: _plain(part) if is_dataclass(part) else part for name, part in parts.items()}


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if bool((cast.isinf() & ~weight.isinf()).any()):
        raise InputError(f"{name} has a weight of {weight.abs().max():.3g}, which float16 cannot hold: save in float32")
    return cast
