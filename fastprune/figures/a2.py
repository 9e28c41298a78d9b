"""Figure A2: ResNet-18 on Tiny ImageNet, masks found with three learning rates and at random, evaluated with two."""

from typing import Any

from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison
from fastprune.figures.points import Point, grid
from fastprune.specs import DataSpec
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings

PROTOCOL = Settings(
    model="resnet18",
    stem="imagenet",
    width=64,
    epochs=110,
    milestones=(80, 100),
    gamma=0.1,
    protocol_epochs=110,
    lr_find=(0.05, 0.2, 0.8),
    lr_eval=(0.5, 0.8),
)
PRESETS: dict[str, dict[str, Any]] = {}
UNUSED = ("prune_epochs", "sparsities")

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first, down to 0.8 ** 30."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_eval."""
    return {chr(ord("a") + i): Panel(f"LR_eval = {lr:g}") for i, lr in enumerate(settings.lr_eval)}


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find} | {"random": "random pruning"}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    return grid(settings, data, [*map(MaskRecipe, settings.lr_find), MaskRecipe(None)])


def claims(settings: Settings) -> list[Claim]:
    """What the caption says, of each panel."""
    eval_panels = tuple(panels(settings))

    def better(left: str, right: str) -> tuple[Comparison, ...]:
        return tuple(Comparison(p, "better", left, right, densities=MASKED) for p in eval_panels)

    similar = tuple(Comparison(p, "similar", "0.05", "0.2", densities=MASKED) for p in eval_panels)
    dense = tuple(Comparison("find", "better", "0.8", other, rounds=(0, 0)) for other in ("0.05", "0.2"))
    return [
        Claim("similar", "LR_find 0.05 and 0.2 are very similar", similar),
        Claim(
            "small-is-better", "LR_find 0.05 and 0.2 are better than 0.8", better("0.05", "0.8") + better("0.2", "0.8")
        ),
        Claim("best-dense", "0.8 trains the best dense network", dense),
        Claim("below-random", "LR_find 0.8 is worse than random pruning", better("random", "0.8")),
    ]
