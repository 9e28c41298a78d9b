"""Figure A6: ResNet-50 on Tiny ImageNet, pruning early: in every round the find run stops before it has converged.

The first round's runs are snapshots of the dense one. At sparsity 0 stands that network after so many epochs.
"""

from dataclasses import replace

from fastprune.errors import InputError
from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison, Kind
from fastprune.figures.points import Point, evaluation_panel, find_panel
from fastprune.specs import DataSpec
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.settings import Settings

PROTOCOL = replace(resnet50.PROTOCOL, lr_find=(0.05, 0.2), lr_eval=(0.5,), prune_epochs=(20, 50, 70, 110))
PRESETS = resnet50.PRESETS
UNUSED = ("sparsities",)

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_find."""
    return {chr(ord("a") + i): Panel(f"LR_find = {lr:g}") for i, lr in enumerate(settings.lr_find)}


def series(settings: Settings) -> dict[str, str]:
    """Series, by the protocol's epochs -> label, in the legend's order."""
    stops = zip(settings.prune_epochs, settings.stops, strict=True)
    return {str(epoch): f"pruned at epoch {stop}" for epoch, stop in stops}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    found = []
    if len(settings.lr_eval) > 1:
        raise InputError("figure A6 evaluates with one --lr-eval")
    lr_eval, names = settings.lr_eval[0], list(series(settings))
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        for panel, lr_find in zip(panels(settings), settings.lr_find, strict=True):
            # At the end is the chain that other figures have as well.
            sources = [MaskRecipe(lr_find, None if stop == settings.epochs else stop) for stop in settings.stops]
            found += find_panel(chains, sources, names, f"find-{panel}")
            for point in evaluation_panel(panel, chains, sources, lr_eval, names):
                if point.round == 0:
                    stop = settings.stops[names.index(point.series)]
                    point = replace(point, lr_eval=lr_find, node=chains.dense(lr_find), epoch=stop)
                found.append(point)
    return found


def claims(settings: Settings) -> list[Claim]:
    """What the caption says: panel a is LR_find 0.05, b is 0.2."""

    def masks(panel: str, kind: Kind, left: str, right: str) -> Comparison:
        return Comparison(panel, kind, left, right, densities=MASKED)

    bad = (masks("a", "better", "110", "20"), masks("b", "better", "110", "20"))
    early = (masks("b", "better", "50", "110"), masks("b", "better", "70", "110"))
    dense = [Comparison(p, "better", "110", stop, rounds=(0, 0)) for p in "ab" for stop in ("20", "50", "70")]
    return [
        Claim("too-early", "Pruning at epoch 20 is bad", bad),
        Claim("early-is-better", "For LR_find 0.2, pruning at 50 or 70 beats pruning at 110", early),
        Claim(
            "early-does-well", "For LR_find 0.05, pruning at 70 does as well", (masks("a", "not worse", "70", "110"),)
        ),
        Claim("not-converged", "The dense networks at 20, 50 and 70 are far from converged", tuple(dense)),
    ]
