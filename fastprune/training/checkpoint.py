"""checkpoint.pth: all that a run of train.py continues from, in torchvision's own terms.

    model.load_state_dict(torch.load("checkpoint.pth", weights_only=True)["model"])

    model      state dict of the plain torchvision model, +0 where pruned
    optimizer  state dict of torch.optim.SGD over model.parameters(): momentum
    epoch      the last one finished, from 0
    mask       None, or bool tensors by parameter name: True keeps
    scaler     of fp16, else empty
    args       the flags

Of the reference script's checkpoints, model, optimizer and epoch are read; of plain state dicts, the weights.
"""

import argparse
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.files import write_atomically
from fastprune.pruning.masks import Mask, plain_state_dict
from fastprune.specs import OptimizerSpec
from fastprune.training.trainer import Trainer


@dataclass(frozen=True)
class Checkpoint:
    """What was read, fitting the model. state: as Trainer.load_state takes it.  epochs: finished, or None for plain
    weights.  mask: None if dense.  flags: those that it was made with, if it says so."""

    state: dict[str, Tensor]
    epochs: int | None
    mask: Mask | None
    flags: dict[str, Any]


def save_checkpoint(
    path: Path, trainer: Trainer, epochs: int, optimizer: OptimizerSpec, lr: float, flags: Mapping[str, Any]
) -> None:
    """Replaces `path` by the state after `epochs` epochs, all or nothing. lr: for the record."""
    state = trainer.state()
    mask = trainer_mask(trainer)
    content = {
        "model": plain_state_dict(trainer.model),
        "optimizer": _sgd_state(trainer, state, optimizer, lr),
        "epoch": epochs - 1,
        "mask": None if mask.kept == mask.total else mask.tensors(),
        "scaler": {k.removeprefix("scaler."): v.item() for k, v in state.items() if k.startswith("scaler.")},
        "args": dict(flags),
    }
    replace_file(path, lambda p: torch.save(content, p))


def load_checkpoint(path: Path, trainer: Trainer, name: str) -> Checkpoint:
    """Reads a checkpoint for the trainer's model, torchvision's `name`. InputError if it is none or another's."""
    content = _read(path)
    model = content.get("model", content)
    if not isinstance(model, Mapping) or not model or not all(isinstance(v, Tensor) for v in model.values()):
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one as 'model'")
    _check_fit(path, model, trainer.model.state_dict(), name)
    state = trainer.state() | {f"model.{k}": v for k, v in model.items()}
    state = {k: v for k, v in state.items() if k.startswith("model.")}
    try:
        state |= _momentum(content, trainer)
        state |= {f"scaler.{k}": torch.tensor(v, dtype=torch.float64) for k, v in content.get("scaler", {}).items()}
        epochs = int(content["epoch"]) + 1 if "epoch" in content and model is not content else None
        flags = content.get("args", {})
        flags = dict(flags if isinstance(flags, Mapping) else vars(flags))
        kept = content.get("mask") if model is not content else None
        mask = None if kept is None else fitting_mask(kept, trainer, path)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or foreign ({type(error).__name__}: {error})") from error
    return Checkpoint(state, epochs, mask, flags)


def trainer_mask(trainer: Trainer) -> Mask:
    """The mask that holds now, on the CPU."""
    return Mask(trainer.flat.mask.cpu(), trainer.flat.segments)


def fitting_mask(tensors: Mapping[str, Tensor], trainer: Trainer, path: Path) -> Mask:
    """The mask of these bool tensors, in the order of the model's layers. InputError if its layers are others."""
    shapes = {s.name: tuple(s.shape) for s in trainer.flat.segments}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if given != shapes:
        raise InputError(f"{path} is a mask for another network: {_difference(given, shapes)}")
    return Mask.from_tensors({name: tensors[name].bool() for name in shapes})


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes `path` atomically, as its only writer."""
    write_atomically(path, write, path.with_name(f".{path.name}.part"))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the reference's "args"
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path} is no checkpoint that loads with weights_only=True ({reason})") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one as 'model'")
    return content


def _check_fit(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    there, here = ({k: tuple(v.shape) for k, v in state.items()} for state in (given, wanted))
    if there == here:
        return
    reshaped = [k for k in here if k in there and there[k] != here[k]]
    if there.keys() == here.keys() and len({k.rpartition(".")[0] for k in reshaped}) == 1:  # the classifier alone
        k = reshaped[0]
        raise InputError(
            f"{path} is of a {name} for {there[k][0]} classes, but the data has {here[k][0]} ({k} differs)"
        )
    raise InputError(f"{path} is of another architecture than {name}: {_difference(there, here)}")


def _difference(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> str:
    """The first thing that differs, and how many do."""
    odd = [k for k in here if there.get(k) != here[k]] + [k for k in there if k not in here]
    first = odd[0]
    if first not in there:
        what = f"{first} is missing"
    elif first not in here:
        what = f"{first} is unknown here"
    else:
        what = f"{first} is {list(there[first])} there and {list(here[first])} here"
    return what + (f", and {len(odd) - 1} more" if len(odd) > 1 else "")


def _sgd_state(trainer: Trainer, state: Mapping[str, Tensor], optimizer: OptimizerSpec, lr: float) -> dict[str, Any]:
    names = [name for name, _ in trainer.model.named_parameters()]
    stand_ins = [torch.nn.Parameter(torch.empty(0)) for _ in names]
    described = torch.optim.SGD(
        stand_ins, lr, optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
    ).state_dict()
    buffers = {i: {"momentum_buffer": state[f"momentum.{name}"]} for i, name in enumerate(names)}
    return {"state": buffers, "param_groups": described["param_groups"]}


def _momentum(content: Mapping[str, Any], trainer: Trainer) -> dict[str, Tensor]:
    """By parameter name, from SGD's state dict; nothing where there is none."""
    kept = content.get("optimizer", {}).get("state", {})
    buffers = {}
    for i, (name, p) in enumerate(trainer.model.named_parameters()):
        buffer = kept.get(i, {}).get("momentum_buffer")
        if buffer is not None:
            if buffer.shape != p.shape:
                raise ValueError(f"momentum of {name} has shape {list(buffer.shape)}")
            buffers[f"momentum.{name}"] = buffer
    return buffers
