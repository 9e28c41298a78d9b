"""Any classification network of torchvision, by name."""

import copy
import difflib

import torch
import torchvision
from torch import nn

from fastprune.errors import InputError
from fastprune.flat import prunable

_AUXILIARY = ("googlenet", "inception_v3")


def build_model(name: str, asked: str | None, classes: int, size: tuple[int, int], seed: int) -> nn.Module:
    """torchvision's model `name`, with the weights `asked` for or as `seed` initialises it; torch's generator is left
    as it was. InputError where it cannot be had, or takes no images of this size (height, width)."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or ["resnet18", "resnet50"]
        raise InputError(f"torchvision has no model {name}: did you mean {' or '.join(close)}?")
    if name in _AUXILIARY:
        raise InputError(f"{name} is not supported: it trains auxiliary classifiers too")
    weights = None if asked is None else _weights(name, asked, classes)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = torchvision.models.get_model(name, weights=weights, num_classes=classes)
    except (OSError, RuntimeError) as error:
        if weights is None:
            raise
        raise InputError(
            f"cannot fetch {weights} ({' '.join(str(error).split())}): fetch {weights.url} elsewhere and give the file "
            "with --resume"
        ) from None
    try:
        convs = prunable(model)
    except ValueError as error:
        raise InputError(f"{name} is not supported: {error}") from None
    if not convs:
        raise InputError(f"{name} is not supported: it has no conv layer, there is nothing to prune")
    _try_size(model, name, size)
    return model


def _weights(name: str, asked: str, classes: int) -> torchvision.models.WeightsEnum:
    known = torchvision.models.get_model_weights(name)
    found = known.__members__.get(asked.removeprefix(f"{known.__name__}."))
    if found is None:
        raise InputError(f"{name} has no weights {asked}: choose one of {', '.join(known.__members__)}")
    trained = len(found.meta["categories"])
    if trained != classes:
        raise InputError(f"--weights {asked} are for {trained} classes, but the data has {classes}")
    return found


def _try_size(model: nn.Module, name: str, size: tuple[int, int]) -> None:
    """InputError where the network takes no images of this size. Computes shapes only."""
    shapes = copy.deepcopy(model).to("meta").eval()
    try:
        with torch.no_grad():
            shapes(torch.empty(2, 3, *size, device="meta"))
    except NotImplementedError:  # an operation whose shapes are not known in advance
        return
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name} takes no images of {size[0]} x {size[1]} pixels: {reason}") from None
