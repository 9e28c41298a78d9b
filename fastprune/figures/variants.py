"""Figure `variants`, ours after Section 3.2 of the paper: does the effect of LR_find outlast warmup and rewinding?"""

from dataclasses import replace

from fastprune.errors import InputError
from fastprune.figures import resnet50
from fastprune.figures.axes import Panel
from fastprune.figures.claims import Claim, Comparison
from fastprune.figures.points import Point, evaluation_panel, find_panel
from fastprune.figures.report import count_of
from fastprune.specs import DataSpec
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.settings import Settings, check

PROTOCOL = replace(resnet50.PROTOCOL, lr_find=(0.05, 0.2, 0.5), lr_eval=(0.5,))
PRESETS = resnet50.PRESETS
UNUSED = ("prune_epochs", "sparsities", "rewind")

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first."""
WARMUP_EPOCHS = 5
"""Of the protocol's 110, where none are asked for."""


def variants(settings: Settings) -> dict[str, Settings]:
    """Panel -> settings: to the initial weights, without and with warmup; late; learning rate; fine-tuning."""
    if len(settings.lr_eval) != 1:
        raise InputError("figure variants evaluates with one --lr-eval")
    plain = replace(settings, warmup_epochs=0, rewind="init")
    warm = replace(settings, warmup_epochs=settings.warmup_epochs or WARMUP_EPOCHS, rewind="init")
    return {
        "a": plain,
        "b": check(warm),
        "c": check(replace(plain, rewind="late")),
        "d": replace(plain, rewind="lr"),
        "e": replace(plain, rewind="finetune"),
    }


def panels(settings: Settings) -> dict[str, Panel]:
    """One for each variant."""
    warm, late = (variants(settings)[p] for p in "bc")
    return {
        "a": Panel("Initial weights"),
        "b": Panel(f"Warmup ({count_of(warm.schedule(1.0).warmup_epochs, 'epoch')})"),
        "c": Panel(f"Late rewinding (epoch {late.late_epoch})"),
        "d": Panel("Learning rate rewinding"),
        "e": Panel("Fine-tuning"),
    }


def series(settings: Settings) -> dict[str, str]:
    """Series -> label, in the legend's order."""
    return {f"{lr:g}": f"LR_find = {lr:g}" for lr in settings.lr_find}


def points(settings: Settings, data: DataSpec) -> list[Point]:
    """Every point of the figure, and the find runs."""
    found = []
    sources = [MaskRecipe(lr) for lr in settings.lr_find]
    for panel, variant in variants(settings).items():
        for seed in range(settings.seeds):
            chains = Chains(variant, data, seed)
            found += find_panel(chains, sources, panel=f"find-{panel}")
            found += evaluation_panel(panel, chains, sources, settings.lr_eval[0])
    return found


def claims(settings: Settings) -> list[Claim]:
    """Ours: in each variant a smaller LR_find than 0.5 finds better masks."""
    return [
        Claim(
            f"small-is-better-{panel}",
            f"{shown.title}: LR_find 0.05 and 0.2 are better than 0.5",
            tuple(Comparison(panel, "better", lr, "0.5", densities=MASKED) for lr in ("0.05", "0.2")),
        )
        for panel, shown in panels(settings).items()
    ]
