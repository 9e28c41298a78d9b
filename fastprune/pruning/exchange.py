"""Masks from elsewhere: tensors and arrays of 0 and 1, plain state dicts, open_lth's mask.pth, safetensors files; and
masks for torch.nn.utils.prune."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from fastprune.errors import InputError, kind_of
from fastprune.files import SAVED, SEAL, file_kind
from fastprune.pruning.masks import Mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
else:
    Array = np.ndarray

Model = TypeVar("Model", bound=nn.Module)

Masks = Mask | Mapping[str, Tensor] | Mapping[str, Array] | str | PathLike[str]
"""A Mask; tensors or arrays of 0 and 1 by parameter name; or the path of a file of tensors, see `read_masks`."""


def named_masks(masks: Masks, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """bool tensors by parameter name, of the given shapes, in their order.

    Names may have the suffix "_mask" (torch.nn.utils.prune) and the prefix "module." (DDP). Other entries, such as
    biases in a state dict, are ignored. ValueError if a layer is missing or has another shape, for values other than 0
    and 1, and for a mask that prunes a weight of another name. InputError for a file that cannot be read.
    """
    if isinstance(masks, (str, PathLike)):
        masks = read_masks(Path(masks))
    given = masks.tensors() if isinstance(masks, Mask) else masks
    if not isinstance(given, Mapping):
        raise ValueError(f"masks are a dict by parameter name, a Mask or a path, not {kind_of(given)}")
    if not given and shapes:
        raise ValueError(f"there are no masks: give a tensor of 0 and 1 for each of {', '.join(list(shapes)[:4])}, ...")
    found, used = {}, set()
    for name, shape in shapes.items():
        source = _source(name, given, shapes)
        if source is None:
            raise ValueError(f"there is no mask of {name}; there are {', '.join(map(str, list(given)[:4]))}, ...")
        used.add(source)
        found[name] = _bool(name, given[source], shape)
    for other in (name for name in given if name not in used):
        # Left out in silence, weights that were pruned would be trained.
        if isinstance(masks, Mask) or _prunes(other, given[other]):
            raise ValueError(
                f"there is a mask of {other}, but only these are pruned: {', '.join(list(shapes)[:4])}, ..."
            )
    return found


def _source(name: str, given: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
    """The entry that masks the parameter, None if there is none."""
    for candidate in (f"{name}_mask", name, f"module.{name}_mask", f"module.{name}"):
        if candidate in given and (candidate == name or candidate not in shapes):
            return candidate
    return None


def _prunes(name: str, value: Any) -> bool:
    """Whether an entry is by its name and values the mask of a weight, and not of ones only."""
    if "weight" not in str(name).rpartition(".")[2] or not isinstance(value, (Tensor, np.ndarray)) or value.ndim < 2:
        return False
    tensor = _tensor(name, value)
    return bool(((tensor == 0) | (tensor == 1)).all()) and not bool((tensor == 1).all())


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        value = np.array(value, order="C")  # a copy: torch refuses some strides, and warns of memory that is read-only
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        of = f" of {value.dtype}" if isinstance(value, np.ndarray) else ""
        raise ValueError(
            f"the mask of {name} is {kind_of(value)}{of}: give a bool tensor, or one of 0 and 1"
        ) from error


def _bool(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    tensor = _tensor(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"the mask of {name} has shape {tuple(tensor.shape)}, its weight {shape}")
    if tensor.dtype == torch.bool:
        return tensor
    keep = tensor != 0
    if not bool((tensor == keep.to(tensor.dtype)).all()):
        other = tensor[tensor != keep.to(tensor.dtype)].flatten()[0].item()
        raise ValueError(f"the mask of {name} has the value {other:g}: masks are 0 and 1")
    return keep


def read_masks(path: Path) -> Mask | dict[str, Tensor]:
    """The masks in a file: ours, another safetensors file of tensors, or a dict of tensors that torch.save wrote.

    No code of the file is run. InputError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        # The header of a safetensors file is JSON; its length before it could begin like any other format.
        return _safetensors(path) if start[8:] == b"{" else _saved_by_torch(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _safetensors(path: Path) -> Mask | dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as content:
            if SEAL not in (content.metadata() or {}):
                return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, it is no dict
    except SafetensorError as error:
        raise InputError(f"{path}: a damaged safetensors file ({error})") from error
    return Mask.load(path)


def _saved_by_torch(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:  # by its name, torch.load would take x.safetensors for that format
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # for junk torch.load raises any, AssertionError and struct.error among them
        kind = file_kind(path)
        what = type(error).__name__ if kind in (None, SAVED) else f"it is {kind}"
        raise InputError(
            f"{path}: no file of masks, neither safetensors nor tensors that torch.save wrote ({what})"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise InputError(f"{path}: holds no dict of tensors by parameter name")
    return content


def to_torch_prune(model: Model, masks: Mapping[str, Tensor] | Mapping[str, Array]) -> Model:
    """Puts masks (of 0 and 1, by parameter name) under torch.nn.utils.prune's hooks, in place; returns the model.

    Its parameters then have the suffix "_orig", as torch does it: a Pruner of the model is to be finalised before. A
    new Pruner takes the masks over. ValueError for a name, shape or value that does not fit; nothing is changed then.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in masks if name not in known]:
        raise ValueError(f"the model has no parameter {unknown[0]}")
    found = named_masks(masks, {name: tuple(known[name].shape) for name in masks})
    for name, mask in found.items():
        # In all layers that share the weight: one without the hook would use and train what the others prune.
        for module in list(model.modules()):
            for own in [n for n, parameter in module._parameters.items() if parameter is known[name]]:
                torch_prune.custom_from_mask(module, own, mask.to(known[name].device))
    return model
