"""Figure `structured`: ResNet-50 on Tiny ImageNet, whole filters removed in one shot by |gamma|, then fine-tuned.

The appendix's recipe, with LR_find for pre-training and LR_eval for fine-tuning apart. At 0 stands the pre-trained
network itself.
"""

from typing import Any

from fastprune.errors import InputError
from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison
from fastprune.figures.points import Point
from fastprune.specs import ChannelSelection, DataSpec, Rewind
from fastprune.study.chains import Chains
from fastprune.study.settings import Settings

PROTOCOL = Settings(
    model="resnet50",
    stem="imagenet",
    width=64,
    epochs=200,
    milestones=(),
    gamma=1.0,
    protocol_epochs=200,
    lr_find=(0.05, 0.1, 0.5),
    lr_eval=(0.1,),
    batch_size=256,
    weight_decay=5e-5,
    nesterov=True,
    label_smoothing=0.1,
    decay="cosine",
    warmup_epochs=5,
    sparsities=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {**resnet50.PRESETS["smoke"], "sparsities": (0.3, 0.6, 0.9)},
    "quick": {"epochs": 20, "sparsities": (0.3, 0.6, 0.9)},
}
UNUSED = ("rounds", "fraction", "allocation", "rewind", "rewind_epoch", "prune_epochs")


def panels(settings: Settings) -> dict[str, Panel]:
    """The same networks over four measures of what was removed."""
    return {
        "a": Panel("Filters", x="filters"),
        "b": Panel("Parameters", x="parameters"),
        "c": Panel("Operations", x="flops"),
        "d": Panel("Latency", x="latency"),
    }


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every network, in each panel."""
    if len(settings.lr_eval) != 1:
        raise InputError("figure structured fine-tunes with one --lr-eval")
    found = []
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        for lr_find in settings.lr_find:
            dense = chains.dense(lr_find)
            for round, sparsity in enumerate((0.0, *settings.sparsities)):
                filters = ChannelSelection(dense.final, sparsity)
                node, lr = dense, lr_find
                if round > 0:
                    lr = settings.lr_eval[0]
                    node = chains.train(lr, filters, Rewind(dense.final, 0, momentum=False))
                found += [
                    Point(panel, f"{lr_find:g}", seed, round, lr_find, lr, node, x=shown.x, filters=filters)
                    for panel, shown in panels(settings).items()
                ]
    return found


def claims(settings: Settings) -> list[Claim]:
    """Ours: the appendix gives the recipe, but no figure."""
    rounds = (1, len(settings.sparsities))
    dense = tuple(Comparison("a", "better", "0.5", other, rounds=(0, 0)) for other in ("0.05", "0.1"))
    masks = tuple(Comparison("a", "better", other, "0.5", rounds=rounds) for other in ("0.05", "0.1"))
    return [
        Claim("best-dense", "LR_find 0.5 trains the best dense network", dense),
        Claim("small-is-better", "LR_find 0.05 and 0.1 choose better filters than 0.5", masks),
    ]
