"""Figure A1: ResNet-50 on MiniPlaces, masks found with three learning rates, evaluated with the same three."""

from dataclasses import replace

from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison
from fastprune.figures.points import Point, evaluation_panel, grid
from fastprune.specs import DataSpec
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.settings import Settings

PROTOCOL = replace(
    resnet50.PROTOCOL,
    dataset="miniplaces",
    epochs=120,
    milestones=(80, 110, 115),
    protocol_epochs=120,
    lr_find=(0.02, 0.1, 0.5),
    lr_eval=(0.02, 0.1, 0.5),
)
PRESETS = resnet50.PRESETS
UNUSED = ("prune_epochs", "sparsities")

BEST = 0.1
"""LR_find of the panel that compares LR_eval, the best according to the caption."""
MASKED, DENSER, SPARSER = (0.001, 0.8), (0.01, 0.8), (0.001, 0.01)
"""Densities: all rounds from the first; until and from "very high sparsity", read as 99 %."""


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each LR_eval with all LR_find; then one for LR_find 0.1 (or the middle one) with all LR_eval."""
    titles = [f"LR_eval = {lr:g}" for lr in settings.lr_eval] + [f"LR_find = {_best(settings):g}"]
    return {chr(ord("a") + i): Panel(title) for i, title in enumerate(titles)}


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find} | {
        _evaluated(lr): f"LR_eval = {lr:g}" for lr in settings.lr_eval
    }


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    found = grid(settings, data, [*map(MaskRecipe, settings.lr_find)])
    *_, last = panels(settings)
    best = [MaskRecipe(_best(settings))]
    for seed in range(settings.seeds):
        chains = Chains(settings, data, seed)
        for lr_eval in settings.lr_eval:
            found += evaluation_panel(last, chains, best, lr_eval, [_evaluated(lr_eval)])
    return found


def claims(settings: Settings) -> list[Claim]:
    """What the caption says."""
    *by_eval, last = panels(settings)
    best = [Comparison(p, "better", "0.1", other, densities=MASKED) for p in by_eval for other in ("0.02", "0.5")]
    dense = [Comparison("find", "better", "0.5", other, rounds=(0, 0)) for other in ("0.02", "0.1")]
    masks = [Comparison(p, "better", "0.1", "0.5", densities=MASKED) for p in by_eval]
    until = [Comparison(last, "better", _evaluated(0.5), _evaluated(other), densities=DENSER) for other in (0.02, 0.1)]
    beyond = [Comparison(last, "better", _evaluated(0.1), _evaluated(0.5), densities=SPARSER)]
    return [
        Claim("best-find", "LR_find 0.1 is the best at every LR_eval", tuple(best)),
        Claim("best-eval", "With LR_find 0.1, LR_eval 0.5 is the best until 99 % sparsity", tuple(until)),
        Claim("sparse-eval", "From 99 % sparsity on, LR_eval 0.1 is better than 0.5", tuple(beyond)),
        Claim("not-the-dense-best", "0.5 trains the best dense network, and 0.1 finds better masks", (*dense, *masks)),
    ]


def _best(settings: Settings) -> float:
    return BEST if BEST in settings.lr_find else settings.lr_find[len(settings.lr_find) // 2]


def _evaluated(lr: float) -> str:
    return f"LR_eval {lr:g}"
