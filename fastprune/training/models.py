"""Networks: torchvision's ResNets with a choice of stem and width, and any model of torchvision or timm by name."""

import copy
import difflib

import torch
import torchvision
from torch import nn
from torchvision.models import resnet

from fastprune.errors import InputError
from fastprune.specs import Init, ModelSpec

NETWORKS: dict[str, tuple[type[resnet.BasicBlock | resnet.Bottleneck], list[int]]] = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}
"""By name: block and blocks of each stage."""


def build(spec: ModelSpec) -> nn.Module:
    """The network of `spec`, initialised by torchvision's rules (He et al., 2015) from torch's global generator.

    With width 64 and the ImageNet stem it equals torchvision's network draw for draw. InputError for an unknown name.
    """
    if spec.name not in NETWORKS:
        raise InputError(f"unknown model {spec.name!r}: choose one of {', '.join(NETWORKS)}")
    block, layers = NETWORKS[spec.name]
    model = resnet.ResNet(block, layers, num_classes=spec.classes)
    if spec.width == 64 and spec.stem == "imagenet":
        return model
    # torchvision's ResNet has no argument for the width of its first stage, so all layers are made again. `inplanes` is
    # where _make_layer reads and writes the channels that the next block gets.
    model.inplanes = width = spec.width
    if spec.stem == "cifar":
        model.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.layer1 = model._make_layer(block, width, layers[0])
    model.layer2 = model._make_layer(block, 2 * width, layers[1], stride=2)
    model.layer3 = model._make_layer(block, 4 * width, layers[2], stride=2)
    model.layer4 = model._make_layer(block, 8 * width, layers[3], stride=2)
    model.fc = nn.Linear(8 * width * block.expansion, spec.classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # As torchvision's constructor does, which initialised the layers that were replaced.
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def initial_model(init: Init) -> nn.Module:
    """The network with the initial weights of `init.seed`, drawn on the CPU; torch's generator is not advanced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init.seed)
        return build(init.model)


# In training mode these return the logits of several classifiers; the Trainer's loss takes those of one.
_AUXILIARY = ("googlenet", "inception_v3")


def build_model(name: str, asked: str | None, classes: int, size: tuple[int, int] | None, seed: int) -> nn.Module:
    """torchvision's or timm's classification model `name` (timm/NAME) for `classes` classes, on the CPU; torch's
    generator is not advanced.

    asked: name of pretrained weights, or None to initialise from `seed`. size: (height, width) in pixels, None not to
    try them. InputError if there is no such model or weights, if the weights cannot be downloaded, or if the model is
    not supported or takes no images of this size.
    """
    if name.startswith("timm/"):
        model = _timm_model(name.removeprefix("timm/"), asked, classes, seed)
        if size is not None:
            try_size(model, name, size)
        return model
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or ["resnet18", "resnet50"]
        raise InputError(f"torchvision has no model {name}: did you mean {' or '.join(close)}? (timm's: timm/NAME)")
    if name in _AUXILIARY:
        raise InputError(f"{name} is not supported: it trains auxiliary classifiers too")
    weights = None if asked is None else _weights(name, asked, classes)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = torchvision.models.get_model(name, weights=weights, num_classes=classes)
    except (OSError, RuntimeError) as error:
        if weights is None:  # nothing was downloaded: a bug, not bad input
            raise
        raise InputError(
            f"cannot fetch {weights} ({' '.join(str(error).split())}): fetch {weights.url} elsewhere and give the file "
            "with --resume"
        ) from None
    if size is not None:
        try_size(model, name, size)
    return model


def _timm_model(name: str, asked: str | None, classes: int, seed: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError(f"--model timm/{name} needs timm, which is not installed: run pip install timm") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3) or ["resnet18", "vit_tiny_patch16_224"]
        raise InputError(f"timm has no model {name}: did you mean {' or '.join(f'timm/{n}' for n in close)}?")
    full = name
    if asked is not None:
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{name}.*")]
        if asked != "DEFAULT" and asked not in tags:
            raise InputError(f"timm/{name} has no weights {asked}: choose one of {', '.join(['DEFAULT', *tags])}")
        full = name if asked == "DEFAULT" else f"{name}.{asked}"
        trained = timm.get_pretrained_cfg_value(full, "num_classes")
        if trained != classes:
            raise InputError(f"--weights {asked} are for {trained} classes, but the data has {classes}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(full, pretrained=asked is not None, num_classes=classes)
    except (OSError, RuntimeError) as error:
        if asked is None:  # nothing was downloaded: a bug, not bad input
            raise
        raise InputError(
            f"cannot fetch the weights of timm/{full} ({' '.join(str(error).split())}): fetch them elsewhere and give "
            "the file with --resume"
        ) from None


def _weights(name: str, asked: str, classes: int) -> torchvision.models.WeightsEnum:
    known = torchvision.models.get_model_weights(name)
    found = known.__members__.get(asked.removeprefix(f"{known.__name__}."))
    if found is None:
        raise InputError(f"{name} has no weights {asked}: choose one of {', '.join(known.__members__)}")
    trained = len(found.meta["categories"])
    if trained != classes:
        raise InputError(f"--weights {asked} are for {trained} classes, but the data has {classes}")
    return found


def try_size(model: nn.Module, name: str, size: tuple[int, int]) -> None:
    """InputError if the network takes no images of this size (height, width)."""
    # On the meta device, which computes shapes only: a size that cannot work is found before any data is read.
    shapes = copy.deepcopy(model).to("meta").eval()
    try:
        with torch.no_grad():
            shapes(torch.empty(2, 3, *size, device="meta"))
    except NotImplementedError:  # an operation without shape inference: the first batch will tell
        return
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{name} takes no images of {size[0]} x {size[1]} pixels: {reason}") from None
