"""torchvision's ResNets, with a stem and a width option."""

import torch
from torch import nn
from torchvision.models import resnet

from fastprune.errors import InputError
from fastprune.specs import Init, ModelSpec

_RESNETS: dict[str, tuple[type[resnet.BasicBlock | resnet.Bottleneck], list[int]]] = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}


def build(spec: ModelSpec) -> nn.Module:
    """The network of `spec`, initialised from torch's global generator as torchvision initialises it.

    At width 64 with the ImageNet stem it is torchvision's own network, draw for draw. InputError for an unknown name.
    """
    if spec.name not in _RESNETS:
        raise InputError(f"unknown model {spec.name!r}: choose one of {', '.join(_RESNETS)}")
    block, layers = _RESNETS[spec.name]
    model = resnet.ResNet(block, layers, num_classes=spec.classes)
    if spec.width == 64 and spec.stem == "imagenet":
        return model
    model.inplanes = width = spec.width
    if spec.stem == "small":
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
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def initial_model(init: Init) -> nn.Module:
    """The network with the initial weights that `init.seed` draws on the CPU; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init.seed)
        return build(init.model)
