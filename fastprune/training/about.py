"""What a checkpoint says of its training beside its state: images, accuracy and cost, for a model card."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch


def hardware(device: str) -> str:
    """What a device of torch is: "NVIDIA H100" or "cpu (x86_64, AVX2)", as rounding depends on a CPU's vectors."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


@dataclass(frozen=True)
class Inputs:
    """The images of a network, and how they are prepared for it.

    data: name of the data set. classes: names by label. height, width: in pixels. mean, std: per channel, as fractions
    of full scale. resize: shorter side before the centre crop, in pixels; None where both sides are resized.
    interpolation: of resizing, by torchvision's name.
    """

    data: str
    classes: tuple[str, ...]
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Cost:
    """trainings, images that they saw, seconds that they took together, devices. complete: whether that is all of it;
    a file that a training began from may not say what it cost."""

    trainings: int
    images: int
    seconds: float
    devices: tuple[str, ...]
    complete: bool = True

    def after(self, images: int, seconds: float, device: str) -> "Cost":
        """With an epoch more."""
        devices = tuple(dict.fromkeys([*self.devices, device]))
        return replace(self, images=self.images + images, seconds=self.seconds + seconds, devices=devices)


@dataclass(frozen=True)
class History:
    """cost: of a training. whole_cost: with all that led to it. commands: that computed both, in order."""

    cost: Cost = Cost(1, 0, 0.0, ())
    whole_cost: Cost = Cost(1, 0, 0.0, ())
    commands: tuple[str, ...] = ()

    @classmethod
    def resumed(cls, before: "History | None") -> "History":
        """Of a training that goes on. before: its own until now, None if its checkpoint has none."""
        partly = Cost(1, 0, 0.0, (), complete=False)
        return cls(partly, partly) if before is None else before

    @classmethod
    def begun_from(cls, before: "History | None") -> "History":
        """Of a training that begins with the weights of another. before: of that one, None if nothing is known."""
        if before is None:
            return cls(whole_cost=replace(cls.whole_cost, complete=False))
        whole = replace(before.whole_cost, trainings=before.whole_cost.trainings + 1)
        return cls(whole_cost=whole, commands=before.commands)

    def with_command(self, command: str) -> "History":
        """command: of this process. That of a run which was killed and repeated is there once."""
        known = not command or self.commands[-1:] == (command,)
        return self if known else replace(self, commands=(*self.commands, command))

    def after(self, images: int, seconds: float, device: str) -> "History":
        """With an epoch more."""
        epoch = images, seconds, device
        return replace(self, cost=self.cost.after(*epoch), whole_cost=self.whole_cost.after(*epoch))


class About(NamedTuple):
    """accuracy, ema_accuracy: top-1 on the `val_count` validation images after the last epoch, in [0, 1], of the
    weights and of their moving average (None without one). versions: name -> version, of what computed the epoch."""

    inputs: Inputs
    history: History
    val_count: int
    accuracy: float
    ema_accuracy: float | None
    versions: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """As values that torch.load reads with weights_only=True."""
        # Measured values may be numpy's floats, and torch's version is a class of its own: subclasses do not load.
        moments = {name: tuple(map(float, getattr(self.inputs, name))) for name in ("mean", "std")}
        return self._asdict() | {
            "inputs": asdict(self.inputs) | moments,
            "history": asdict(self.history),
            "versions": {name: str(version) for name, version in self.versions.items()},
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "About":
        """From what `plain` gave. KeyError, TypeError or ValueError for anything else."""
        history = plain["history"]
        cost, whole = (Cost(**history[name]) for name in ("cost", "whole_cost"))
        averaged = plain["ema_accuracy"]
        return cls(
            Inputs(**plain["inputs"]),
            History(cost, whole, tuple(map(str, history["commands"]))),
            int(plain["val_count"]),
            float(plain["accuracy"]),
            None if averaged is None else float(averaged),
            {str(name): str(version) for name, version in plain["versions"].items()},
        )
