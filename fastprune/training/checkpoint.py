"""checkpoint.pth: the state that train.py resumes from, in the format of torchvision's reference script.

    model.load_state_dict(torch.load("checkpoint.pth", weights_only=True)["model"])

    model      state dict of the plain torchvision model, +0 where pruned
    optimizer  state dict of torch.optim's SGD, AdamW or RMSprop over the model's parameters, in the reference's groups
    model_ema  with a moving average, state dict of its torch.optim.swa_utils.AveragedModel
    epoch      last finished epoch, from 0
    mask       None for dense, or bool tensors by parameter name: True keeps
    scaler     state of the gradient scaler with fp16, else empty
    compute    how it was computed: plain, dense or sparse; a resumed run goes on so
    gpu_options  on a GPU, the options it was made with, as --gpu-options takes them; a resumed run goes on with them
    args       flags of train.py
    about      images, accuracy, cost, commands and versions of the training: fastprune.training.about, as plain values

From a checkpoint of the reference script, model, optimizer, model_ema and epoch are read; from a plain state dict, the
weights. Names may begin with "module." (DDP), weights may be under torch.nn.utils.prune ("_orig" and "_mask"). Zeros
in the weights of a file without an entry "mask" count as pruned.
"""

import argparse
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.files import check_kind, write_atomically
from fastprune.pruning.masks import Mask, masks_of_zeros
from fastprune.specs import COMPUTES, GpuOptions, OptimizerSpec
from fastprune.training.about import About
from fastprune.training.flat import decay_groups
from fastprune.training.models import build_model
from fastprune.training.request import CHECKPOINT, other_decays
from fastprune.training.trainer import Trainer

# The state of torch.optim's optimisers by parameter -> the entries of Trainer.state; "step" is one for all.
_STATES = {
    "sgd": {"momentum_buffer": "momentum"},
    "adamw": {"exp_avg": "momentum", "exp_avg_sq": "square"},
    "rmsprop": {"momentum_buffer": "momentum", "square_avg": "square"},
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, checked against the model.

    state: for Trainer.load_state. epochs: number of finished epochs, None for plain weights. mask: on the CPU, None for
    dense. flags: those of the run that wrote it; empty if the file has none. taken: the mask is no entry of the file,
    its weights show it. compute, about, gpu_options: how it was computed, and more on it; None if the file does not
    say.
    """

    state: dict[str, Tensor]
    epochs: int | None
    mask: Mask | None
    flags: dict[str, Any]
    taken: bool = False
    compute: str | None = None
    about: About | None = None
    gpu_options: GpuOptions | None = None


def save_checkpoint(
    path: Path,
    trainer: Trainer,
    epochs: int,
    optimizer: OptimizerSpec,
    lr: float,
    flags: Mapping[str, Any],
    about: About,
) -> None:
    """Writes the state of `trainer` after `epochs` epochs to `path`, atomically.

    lr: recorded in the optimiser's parameter group; a resumed run takes its learning rate from the schedule.
    """
    state = trainer.state()
    mask = trainer_mask(trainer)
    content = {
        "model": trainer.state_dict(),
        "optimizer": _optimizer_state(trainer, state, optimizer, lr),
        "epoch": epochs - 1,
        "mask": None if mask.kept == mask.total else mask.tensors(),
        "scaler": {k.removeprefix("scaler."): v.item() for k, v in state.items() if k.startswith("scaler.")},
        "compute": trainer.computed,
        "args": dict(flags),
        "about": about.plain(),
    }
    if trainer.recorded_options is not None:
        content["gpu_options"] = trainer.recorded_options
    if trainer.ema is not None:
        averaged = {f"module.{name}": t for name, t in trainer.state_dict(averaged=True).items()}
        content["model_ema"] = {"n_averaged": state["ema"], **averaged}
    replace_file(path, lambda p: torch.save(content, p))


def load_checkpoint(path: Path, trainer: Trainer, name: str, optimizer: OptimizerSpec) -> Checkpoint:
    """Reads a checkpoint for the trainer's model `name`; the trainer is not changed.

    The optimiser's state is read if it is of the same optimiser.

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
        flags = _flags(content)
        state |= _optimizer_entries(content, trainer, replace(optimizer, other_decays=other_decays(flags)))
        if "model_ema" in content and model is not content:
            state |= _average(content["model_ema"], trainer)
        state |= {f"scaler.{k}": torch.tensor(v, dtype=torch.float64) for k, v in content.get("scaler", {}).items()}
        epochs = int(content["epoch"]) + 1 if "epoch" in content and model is not content else None
        kept = content.get("mask") if model is not content else None
        mask = None if kept is None else fitting_mask(kept, trainer, path)
        if shown := "mask" not in content or model is content:
            zeros = masks_of_zeros({s.name: plain[s.name] for s in trainer.flat.segments})
            mask = None if zeros is None else Mask.from_tensors(zeros)
        compute = content.get("compute") if model is not content else None
        if compute not in (None, *COMPUTES):
            raise ValueError(f"computed by {compute!r}")
        about = _about(content)
        text = content.get("gpu_options") if model is not content else None
        options = None if text is None else GpuOptions.of(text)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or foreign ({type(error).__name__}: {error})") from error
    return Checkpoint(state, epochs, mask, flags, shown and mask is not None, compute, about, options)


@dataclass(frozen=True)
class TrainedModel:
    """The network of a checkpoint on the CPU, in evaluation mode.

    name: torchvision's, or timm/NAME. epochs: number of finished epochs. size: (height, width) of the images that it
    was validated on, None if the file does not say. covered: names of the weights that masks cover, None if the file
    has no mask. flags: those of the run that wrote it. about: None if the file has none.
    """

    model: nn.Module
    name: str
    epochs: int
    size: tuple[int, int] | None
    covered: tuple[str, ...] | None
    flags: dict[str, Any]
    about: About | None


def load_model(path: Path, *, averaged: bool = False) -> TrainedModel:
    """Reads the network of a checkpoint of train.py. averaged: with the weights of its moving average.

    InputError if the file is missing or damaged, if it does not say of which model it is, or has no average.
    """
    content = _read(path)
    if "model" not in content:
        raise InputError(f"{path} is no checkpoint of train.py, with weights as 'model' and flags as 'args'")
    if averaged and "model_ema" not in content:
        raise InputError(f"{path} has no moving average: leave --ema out, or train with --model-ema")
    try:
        kept = content["model_ema" if averaged else "model"].items()
        weights = _plain_names({n: t for n, t in kept if n != "n_averaged"})
        # Without a record: all networks end with their classifier.
        last = [len(t) for t in weights.values() if t.dim() > 0][-1]
        flags, about = _flags(content), _about(content)
        epochs, mask = int(content.get("epoch", -1)) + 1, content.get("mask")
        covered = None if mask is None else tuple(mask)
        side = flags.get("val_crop_size")
        size = (about.inputs.height, about.inputs.width) if about else None if side is None else (int(side), int(side))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged or foreign ({type(error).__name__}: {error})") from error
    name = flags.get("model")
    if not isinstance(name, str):
        raise InputError(f"{path} does not say of which model it is ('args' has no 'model'): load it in Python instead")
    model = build_model(name, None, len(about.inputs.classes) if about else last, None, 0)
    _check_fit(path, weights, model.state_dict(), name)
    model.load_state_dict(weights)
    return TrainedModel(model.eval(), name, epochs, size, covered, flags, about)


def _flags(content: Mapping[str, Any]) -> dict[str, Any]:
    flags = content.get("args", {})
    # The reference script stores an argparse.Namespace, we a dict.
    return dict(flags if isinstance(flags, Mapping) else vars(flags))


def _about(content: Mapping[str, Any]) -> About | None:
    """KeyError, TypeError or ValueError if it is damaged."""
    return About.of(content["about"]) if "about" in content else None


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
    check_kind(path, *CHECKPOINT)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # "args" of the reference script
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name the file in it, such as {path / 'checkpoint.pth'}") from None
    # torch.load raises each of these for a file that is cut off, damaged, or of another format.
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's text recommends to load it unsafely
            reason = "torch.save wrote no such file"
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


def _optimizer_state(
    trainer: Trainer, state: Mapping[str, Tensor], optimizer: OptimizerSpec, lr: float
) -> dict[str, Any]:
    """The state dict of torch.optim's optimiser over the reference's groups of parameters, with the trainer's state."""
    groups = list(decay_groups(trainer.model, optimizer))
    # From an optimiser over empty parameters, so that the groups have every field of the installed torch.
    stand_ins = [
        {"params": [torch.nn.Parameter(torch.empty(0)) for _ in names], "weight_decay": decay}
        for decay, names in groups
    ]
    made: torch.optim.Optimizer
    if optimizer.name == "sgd":
        made = torch.optim.SGD(
            stand_ins, lr, optimizer.momentum, weight_decay=optimizer.weight_decay, nesterov=optimizer.nesterov
        )
    elif optimizer.name == "adamw":
        made = torch.optim.AdamW(stand_ins, lr, weight_decay=optimizer.weight_decay)
    else:
        made = torch.optim.RMSprop(
            stand_ins, lr, 0.9, 0.0316, weight_decay=optimizer.weight_decay, momentum=optimizer.momentum
        )
    held = dict(_STATES[optimizer.name])
    if optimizer.name == "rmsprop" and optimizer.momentum == 0:
        del held["momentum_buffer"]
    # Of each parameter its own: torch counts in place.
    steps = {"step": lambda: state["steps"].clone()} if optimizer.name != "sgd" else {}
    buffers = {
        i: {key: make() for key, make in steps.items()} | {key: state[f"{kind}.{name}"] for key, kind in held.items()}
        for i, name in enumerate(_names(trainer, optimizer))
    }
    return {"state": buffers, "param_groups": made.state_dict()["param_groups"]}


def _names(trainer: Trainer, optimizer: OptimizerSpec) -> Iterator[str]:
    """The trained parameters' names in the order in which the reference's optimiser numbers them."""
    return (name for _, names in decay_groups(trainer.model, optimizer) for name in names)


def _optimizer_entries(content: Mapping[str, Any], trainer: Trainer, optimizer: OptimizerSpec) -> dict[str, Tensor]:
    """The state in a state dict of `optimizer`, as entries of Trainer.state; empty without one, or for another's.

    ValueError for tensors of another shape than their parameter.
    """
    # torch numbers parameters; the Trainer has names.
    kept = content.get("optimizer", {}).get("state", {})
    there = {key for one in kept.values() for key in one}
    if {"adamw": "exp_avg", "rmsprop": "square_avg"}.get(optimizer.name, "momentum_buffer") not in there:
        return {}
    if optimizer.name == "sgd" and "square_avg" in there:
        return {}
    entries: dict[str, Tensor] = {}
    shapes = dict(trainer.model.named_parameters())
    for i, name in enumerate(_names(trainer, optimizer)):
        for key, kind in _STATES[optimizer.name].items():
            buffer = kept.get(i, {}).get(key)
            if buffer is not None:
                if buffer.shape != shapes[name].shape:
                    raise ValueError(
                        f"{kind} of {name} has shape {list(buffer.shape)}, expected {list(shapes[name].shape)}"
                    )
                entries[f"{kind}.{name}"] = buffer
        if "step" in kept.get(i, {}):
            entries["steps"] = torch.as_tensor(kept[i]["step"], dtype=torch.float32)
    return entries


def _average(kept: Mapping[str, Any], trainer: Trainer) -> dict[str, Tensor]:
    """The entries of Trainer.state for the moving average in the state dict of an AveragedModel. ValueError for another
    network's."""
    named = {name.removeprefix("module."): t for name, t in kept.items() if name != "n_averaged"}
    wanted = {name: t.shape for name, t in trainer.model.state_dict().items()}
    if {name: t.shape for name, t in named.items()} != wanted:
        raise ValueError("model_ema is of another network")
    # Buffers that a state dict leaves out have no history: they are the model's.
    left = {name: b.detach().clone() for name, b in trainer.model.named_buffers() if name not in named}
    return {"ema": torch.as_tensor(kept["n_averaged"]), **{f"ema.{name}": t for name, t in (named | left).items()}}
