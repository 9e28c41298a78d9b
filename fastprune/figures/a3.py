"""Figure A3: ResNet-50 on Tiny ImageNet, local pruning: every layer by the same fraction."""

from dataclasses import replace

from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison
from fastprune.figures.points import Point, grid
from fastprune.specs import DataSpec
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings

PROTOCOL = replace(resnet50.PROTOCOL, allocation="local", lr_find=(0.1, 0.2, 0.5), lr_eval=(0.2, 0.5))
PRESETS = resnet50.PRESETS
UNUSED = ("prune_epochs", "sparsities")

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_eval."""
    return {chr(ord("a") + i): Panel(f"LR_eval = {lr:g}") for i, lr in enumerate(settings.lr_eval)}


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    return grid(settings, data, [*map(MaskRecipe, settings.lr_find)])


def claims(settings: Settings) -> list[Claim]:
    """What the caption says, of each panel: each LR_find is better than the next smaller one."""
    larger = [
        Comparison(p, "better", left, right, densities=MASKED)
        for p in panels(settings)
        for left, right in (("0.2", "0.1"), ("0.5", "0.2"))
    ]
    return [Claim("larger-is-better", "Pruned locally, the larger LR_find, the better", tuple(larger))]
