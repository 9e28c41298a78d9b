"""Figure A5: ResNet-50 on Tiny ImageNet: how far the LPR at epoch n is from that at the end of training.

Read from the dense runs that the other figures train anyway.
"""

from dataclasses import replace
from itertools import pairwise

from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Flattens, SmallerStart
from fastprune.figures.points import LprPoint, dense_histories
from fastprune.specs import DataSpec
from fastprune.study.settings import Settings

PROTOCOL = replace(resnet50.PROTOCOL, lr_find=(0.05, 0.1, 0.2, 0.5))
PRESETS = resnet50.PRESETS
UNUSED = ("rounds", "lr_eval", "allocation", "rewind", "rewind_epoch", "prune_epochs", "sparsities")


def panels(settings: Settings) -> dict[str, Panel]:
    """The one panel."""
    decays = settings.schedule(1.0).milestones
    return {"a": Panel("", x="epoch", y="distance", marks=tuple(map(float, decays)), marks_label="LR decays")}


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find}


def points(settings: Settings, data: DataSpec) -> list[LprPoint]:
    """A line for each LR_find."""
    return [LprPoint("a", f"{lr:g}", seed, lr, history) for seed, lr, history in dense_histories(settings, data)]


def claims(settings: Settings) -> list[Claim]:
    """What the caption says: of two neighbours the smaller rate starts at a smaller distance; all flatten at the first
    decay (epoch 70 of 110)."""
    names = list(series(settings))
    decay = settings.scaled("milestones", settings.milestones[0]) if settings.milestones else 0
    return [
        Claim(
            "small-starts-near",
            "The smaller LR_find, the smaller the distance at the start",
            tuple(SmallerStart("a", small, large) for small, large in pairwise(names)),
        ),
        Claim(
            "flattens", "Every line flattens where the LR first decays", tuple(Flattens("a", n, decay) for n in names)
        ),
    ]
