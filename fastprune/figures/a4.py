"""Figure A4: ResNet-50 on Tiny ImageNet: the LPR if the dense network were pruned at epoch n, for two LR_find.

Read from the dense runs that the other figures train anyway.
"""

from dataclasses import replace

from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, FirstAgainstOthers, Hardly, MoreMovement
from fastprune.figures.points import LprPoint, dense_histories
from fastprune.specs import DataSpec
from fastprune.study.settings import Settings

PROTOCOL = replace(resnet50.PROTOCOL, lr_find=(0.5, 0.05))
PRESETS = resnet50.PRESETS
UNUSED = ("rounds", "lr_eval", "allocation", "rewind", "rewind_epoch", "prune_epochs", "sparsities")
LAYERS = True
FIRST = "conv1"
"""The first layer."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_find."""
    return {
        chr(ord("a") + i): Panel(f"LR_find = {lr:g}", x="epoch", y="ratio") for i, lr in enumerate(settings.lr_find)
    }


def series(settings: Settings) -> dict[str, str]:
    """The layers, as they are found in the results."""
    return {}


def points(settings: Settings, data: DataSpec) -> list[LprPoint]:
    """A line for each layer."""
    panel = dict(zip(settings.lr_find, panels(settings), strict=True))
    histories = dense_histories(settings, data)
    return [LprPoint(panel[lr], None, seed, lr, history) for seed, lr, history in histories]


def claims(settings: Settings) -> list[Claim]:
    """What the caption says; panel a is LR_find 0.5, b is 0.05."""
    return [
        Claim(
            "large-moves", "At 0.5 the ratios move more during training than at 0.05", (MoreMovement("a", "b", FIRST),)
        ),
        Claim(
            "small-stays",
            "At 0.05 they hardly move, except the first layer",
            (Hardly("b", FIRST), FirstAgainstOthers("b", FIRST)),
        ),
    ]
