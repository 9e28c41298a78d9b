"""Figure `transplant`, ours: do a large LR_find's weights with a small one's layerwise ratios do as well?

The paper's abstract says that the layerwise pruning ratios mediate the effect of LR_find. Here the chain of one rate is
pruned, round by round, by the ratios that the other finds: within each layer its own smallest weights go, how many the
other's mask says.
"""

from dataclasses import replace

from fastprune.errors import InputError
from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison, Kind
from fastprune.figures.points import Point, grid
from fastprune.specs import DataSpec
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings

PROTOCOL = replace(resnet50.PROTOCOL, lr_find=(0.05, 0.5), lr_eval=(0.5,))
PRESETS = resnet50.PRESETS
UNUSED = ("prune_epochs", "sparsities")

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_eval."""
    return {chr(ord("a") + i): Panel(f"LR_eval = {lr:g}") for i, lr in enumerate(settings.lr_eval)}


def _sources(settings: Settings) -> list[MaskRecipe]:
    if len(settings.lr_find) != 2:
        raise InputError("figure transplant takes two --lr-find, the small one first")
    small, large = settings.lr_find
    return [
        MaskRecipe(small),
        MaskRecipe(large),
        MaskRecipe(large, ratios_of=small),
        MaskRecipe(small, ratios_of=large),
    ]


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    labels = {}
    for s in _sources(settings):
        ratios = "" if s.ratios_of is None else f", ratios of {s.ratios_of:g}"
        labels[s.name] = f"LR_find = {s.lr:g}{ratios}"
    return labels


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    return grid(settings, data, _sources(settings))


def claims(settings: Settings) -> list[Claim]:
    """Ours: if ratios mediate, they carry the difference over to the other rate's weights, both ways."""
    small, large, large_by_small, small_by_large = (s.name for s in _sources(settings))

    def each(kind: Kind, left: str, right: str) -> tuple[Comparison, ...]:
        return tuple(Comparison(p, kind, left, right, densities=MASKED) for p in panels(settings))

    return [
        Claim("small-is-better", f"LR_find {small} is better than {large}", each("better", small, large)),
        Claim("ratios-help", f"{large} is better with {small}'s ratios", each("better", large_by_small, large)),
        Claim(
            "ratios-suffice", f"With them, {large} does as well as {small}", each("not worse", large_by_small, small)
        ),
        Claim("ratios-harm", f"{small} is worse with {large}'s ratios", each("better", small, small_by_large)),
    ]
