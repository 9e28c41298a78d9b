"""checkpoint.pth: the state that train.py resumes from, in the format of torchvision's reference script.

    model.load_state_dict(torch.load("checkpoint.pth", weights_only=True)["model"])

    model      state dict of the plain torchvision model, +0 where pruned
    optimizer  state dict of torch.optim.SGD over model.parameters(), with momentum
    epoch      last finished epoch, from 0
    mask       None for dense, or bool tensors by parameter name: True keeps
    scaler     state of the gradient scaler with fp16, else empty
    compute    how it was computed: plain, dense or sparse; a resumed run goes on so
    args       flags of train.py

From a checkpoint of the reference script, model, optimizer and epoch are read; from a plain state dict, the weights.
Names may begin with "module." (DDP), weights may be under torch.nn.utils.prune ("_orig" and "_mask"). Zeros in the
weights of a file without an entry "mask" count as pruned.
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
from fastprune.pruning.masks import Mask, masks_of_zeros
from fastprune.specs import COMPUTES, OptimizerSpec
from fastprune.training.trainer import Trainer


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, checked against the model.

    state: for Trainer.load_state. epochs: number of finished epochs, None for plain weights. mask: on the CPU, None for
    dense. flags: those of the run that wrote it; empty if the file has none. taken: the mask is no entry of the file,
    its weights show it. compute: how it was computed, None if the file does not say.
    """

    state: dict[str, Tensor]
    epochs: int | None
    mask: Mask | None
    flags: dict[str, Any]
    taken: bool = False
    compute: str | None = None


def save_checkpoint(
    path: Path, trainer: Trainer, epochs: int, optimizer: OptimizerSpec, lr: float, flags: Mapping[str, Any]
) -> None:
    """Writes the state of `trainer` after `epochs` epochs to `path`, atomically.

    lr: recorded in the optimiser's parameter group; a resumed run takes its learning rate from the schedule.
    """
    state = trainer.state()
    mask = trainer_mask(trainer)
    content = {
        "model": trainer.state_dict(),
        "optimizer": _sgd_state(trainer, state, optimizer, lr),
        "epoch": epochs - 1,
        "mask": None if mask.kept == mask.total else mask.tensors(),
        "scaler": {k.removeprefix("scaler."): v.item() for k, v in state.items() if k.startswith("scaler.")},
        "compute": trainer.computed,
        "args": dict(flags),
    }
    replace_file(path, lambda p: torch.save(content, p))


def load_checkpoint(path: Path, trainer: Trainer, name: str) -> Checkpoint:
    """Reads a checkpoint for the trainer's model, torchvision's `name`; the trainer is not changed.

    InputError if the file is missing, damaged, no checkpoint, or of another model.
    """
    content = _read(path)
    # A plain state dict is itself the mapping of weights.
    model = content.get("model", content)
    if not isinstance(model, Mapping) or not model or not all(isinstance(v, Tensor) for v in model.values()):
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one as 'model'")
    plain = _plain_names(model)
    _check_fit(path, plain, trainer.model.state_dict(), name)
    state = trainer.state() | {f"model.{k}": v for k, v in plain.items()}
    state = {k: v for k, v in state.items() if k.startswith("model.")}
    try:
        state |= _momentum(content, trainer)
        state |= {f"scaler.{k}": torch.tensor(v, dtype=torch.float64) for k, v in content.get("scaler", {}).items()}
        epochs = int(content["epoch"]) + 1 if "epoch" in content and model is not content else None
        flags = content.get("args", {})
        # The reference script stores an argparse.Namespace, we a dict.
        flags = dict(flags if isinstance(flags, Mapping) else vars(flags))
        kept = content.get("mask") if model is not content else None
        mask = None if kept is None else fitting_mask(kept, trainer, path)
        if shown := "mask" not in content or model is content:
            zeros = masks_of_zeros({s.name: plain[s.name] for s in trainer.flat.segments})
            mask = None if zeros is None else Mask.from_tensors(zeros)
        compute = content.get("compute") if model is not content else None
        if compute not in (None, *COMPUTES):
            raise ValueError(f"computed by {compute!r}")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or foreign ({type(error).__name__}: {error})") from error
    return Checkpoint(state, epochs, mask, flags, shown and mask is not None, compute)


def trainer_mask(trainer: Trainer) -> Mask:
    """The trainer's present mask on the CPU; a trainer on the CPU shares its memory."""
    return Mask(trainer.flat.mask.cpu(), trainer.flat.segments)


def fitting_mask(tensors: Mapping[str, Tensor], trainer: Trainer, path: Path) -> Mask:
    """The mask of bool tensors by parameter name, read from `path`. InputError if they do not fit the trainer."""
    shapes = {s.name: tuple(s.shape) for s in trainer.flat.segments}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if given != shapes:
        raise InputError(f"{path} is a mask for another network: {_difference(given, shapes)}")
    # In the model's order, whatever the file's: the order decides offsets and positions.
    return Mask.from_tensors({name: tensors[name].bool() for name in shapes})


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Creates or replaces `path` atomically; the caller must be its only writer."""
    # A fixed temporary name, so that what a killed run left is overwritten by the next one and does not pile up.
    write_atomically(path, write, path.with_name(f".{path.name}.part"))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # "args" of the reference script
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    # torch.load raises each of these for a file that is cut off, damaged, or of another format.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path} is no checkpoint that loads with weights_only=True ({reason})") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one as 'model'")
    return content


def _plain_names(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict by the names of the plain model; weights under torch.nn.utils.prune are masked."""
    if all(name.startswith("module.") for name in model):
        model = {name.removeprefix("module."): value for name, value in model.items()}
    masks = {n.removesuffix("_mask"): m for n, m in model.items() if n.endswith("_mask") and f"{n[:-5]}_orig" in model}
    plain = {}
    for name, value in model.items():
        bare = name.removesuffix("_orig")
        if bare in masks and bare != name:
            plain[bare] = value * masks[bare]
        elif name.removesuffix("_mask") not in masks:
            plain[name] = value
    return plain


def _check_fit(path: Path, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    """InputError unless both state dicts have the same names and shapes. name: torchvision's, for the message."""
    there, here = ({k: tuple(v.shape) for k, v in state.items()} for state in (given, wanted))
    if there == here:
        return
    reshaped = [k for k in here if k in there and there[k] != here[k]]
    if there.keys() == here.keys() and len({k.rpartition(".")[0] for k in reshaped}) == 1:  # only the classifier
        k = reshaped[0]
        raise InputError(
            f"{path} is of a {name} for {there[k][0]} classes, but the data has {here[k][0]} ({k} differs)"
        )
    raise InputError(f"{path} is of another architecture than {name}: {_difference(there, here)}")


def _difference(there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> str:
    """The first tensor that differs, in words, and the number of further ones. there: the file's. here: the model's."""
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
    """The state dict of torch.optim.SGD over model.parameters() with the trainer's momentum."""
    names = [name for name, _ in trainer.model.named_parameters()]
    # From an SGD over empty parameters, so that the parameter group has every field of the installed torch.
    stand_ins = [torch.nn.Parameter(torch.empty(0)) for _ in names]
    described = torch.optim.SGD(
        stand_ins, lr, optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
    ).state_dict()
    buffers = {i: {"momentum_buffer": state[f"momentum.{name}"]} for i, name in enumerate(names)}
    return {"state": buffers, "param_groups": described["param_groups"]}


def _momentum(content: Mapping[str, Any], trainer: Trainer) -> dict[str, Tensor]:
    """The momentum in an SGD state dict, as entries of Trainer.state; empty without an optimizer in `content`.

    ValueError for momentum of another shape than its parameter.
    """
    # SGD numbers parameters in the order of model.parameters(); the Trainer has names.
    kept = content.get("optimizer", {}).get("state", {})
    buffers = {}
    for i, (name, p) in enumerate(trainer.model.named_parameters()):
        buffer = kept.get(i, {}).get("momentum_buffer")
        if buffer is not None:
            if buffer.shape != p.shape:
                raise ValueError(f"momentum of {name} has shape {list(buffer.shape)}, expected {list(p.shape)}")
            buffers[f"momentum.{name}"] = buffer
    return buffers
