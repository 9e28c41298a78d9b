"""Files of compiled networks: safetensors with kept weights, the gaps between them, and the program as JSON.

A kept weight's place is the number of pruned weights since the one before it, in storage order (OHWI), as a byte: 0 to
254 stand before a kept weight; 255 stands for 255 pruned weights without a kept one after them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.files import COMPILED, TENSORS, check_kind, read_tensors, write_atomically, write_tensors
from fastprune.sparse.program import (
    Add,
    BatchNorm,
    FusedConv,
    Linear,
    MaxPool,
    Mean,
    Norm,
    Op,
    Program,
    Relu,
    Torch,
    Value,
    inputs,
)

FORMAT = 1

_ESCAPE = 255

_OPS: dict[str, Any] = {op.__name__: op for op in (FusedConv, Norm, Relu, Add, MaxPool, Mean, Linear)}


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
    """Creates or replaces a file. weights: of the program, float32. dtype: float32 or float16, of kept weights and of
    dense ones with two dimensions or more; other tensors stay float32.

    InputError for another dtype, for a program with operations that run in torch, and if a weight exceeds float16.
    """
    path = Path(path)
    if dtype not in (torch.float32, torch.float16):
        raise InputError(f"a compiled network is saved in float32 or float16, not in {dtype}")
    if any(isinstance(op, Torch) for op in program.ops):
        what = program.unknown[0] if program.unknown else "an operation"
        raise InputError(f"{path}: a network with operations that run in torch cannot be saved ({what})")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in weights.items():
        if isinstance(weight, Kept):
            tensors[f"{name}:gaps"] = torch.from_numpy(encode(weight.places))
            tensors[f"{name}:kept"] = _cast(name, torch.from_numpy(weight.values), dtype)
            shapes[name] = weight.shape
        else:
            tensors[name] = _cast(name, weight, dtype if weight.dim() > 1 else torch.float32).contiguous()
    facts = {
        "format": FORMAT,
        "input": _plain(program.input),
        "output": _plain(program.output),
        "ops": [{"op": type(op).__name__, **_plain(op)} for op in program.ops],
        "pruned": shapes,
    }
    write_atomically(path, lambda aside: write_tensors(aside, tensors, facts))


def read(path: str | Path) -> tuple[Program, dict[str, Tensor | Kept]]:
    """The program and its weights, float32, of a file that `write` wrote. InputError for a damaged or foreign file."""
    path = Path(path)
    expected = "a compiled network, as compile.py --out NAME.fastprune and CompiledModel.save write it"
    tensors, facts = read_tensors(path, expected)
    check_kind(path, expected, COMPILED, TENSORS)
    try:
        if facts["format"] != FORMAT:
            raise InputError(f"{path}: written by another version of fastprune (format {facts['format']!r})")
        program = Program(tuple(map(_op, facts["ops"])), _value(facts["input"]), _value(facts["output"]))
        weights: dict[str, Tensor | Kept] = {}
        for name, shape in facts["pruned"].items():
            gaps, values = tensors.pop(f"{name}:gaps"), tensors.pop(f"{name}:kept")
            o, kh, kw, i = map(int, shape)
            places = decode(gaps.numpy())
            weights[name] = kept = Kept((o, kh, kw, i), places, values.float().numpy())
            # Lists of places are written without a check.
            inside = len(places) == len(values) and (len(places) == 0 or places[-1] < math.prod(kept.shape))
            if gaps.dtype != torch.uint8 or min(kept.shape) < 1 or not inside:
                raise ValueError(f"{name} has places outside its layer")
        weights |= {name: tensor.float() for name, tensor in tensors.items()}
        check(program, weights)
    except InputError:
        raise
    # Its checksum is right: it comes from another program, or from another version of this one.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: not a compiled network ({type(error).__name__}: {error})".splitlines()[0]) from error
    return program, weights


def check(program: Program, weights: Weights) -> None:
    """ValueError unless all values and weights have the shapes that kernels take for granted."""
    known = {program.input}

    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    def shape_of(name: str) -> tuple[int, ...]:
        weight = weights[name]
        if isinstance(weight, Tensor):
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
        assert not isinstance(op, Torch)
        expect(all(value in known for value in inputs(op)) and op.y not in known, f"{op} has unknown values")
        expect(op.y.batched and min(op.y.shape, default=0) > 0, f"{op} has an empty result")
        expect(op.y.number not in {value.number for value in known}, f"{op} writes a value again")
        known.add(op.y)
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
    return _made(_OPS[facts.pop("op")], facts)


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
    if set(facts) != {"number", "shape"}:
        raise ValueError("a value has unknown fields")
    return Value(int(facts["number"]), tuple(int(size) for size in facts["shape"]))


def _plain(record: Any) -> dict[str, Any]:
    """A value or an operation as JSON, without what all values of a file share."""
    if isinstance(record, Value):
        return {"number": record.number, "shape": record.shape}
    parts = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: _plain(part) if is_dataclass(part) else part for name, part in parts.items()}


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    cast = weight.to(dtype)
    if bool((cast.isinf() & ~weight.isinf()).any()):
        raise InputError(f"{name} has a weight of {weight.abs().max():.3g}, which float16 cannot hold: save in float32")
    return cast
