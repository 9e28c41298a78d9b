"""Three figures beyond the appendix: `transplant`, `variants` (Section 3.2 of the paper) and `structured`."""

from collections.abc import Sequence
from dataclasses import replace

from fastprune.figures.claims import Accuracy, Claim
from fastprune.figures.figure import ROUNDS, Figure, Panel, Roles, Series, evaluated, find_rates, register
from fastprune.figures.paper import RESNET50, SMALLER
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings, check

WARMUP_EPOCHS = 5
"""Length of the warmup variant in epochs of 110, unless --warmup-epochs is given. The appendix names none."""


def _transplanted(settings: Settings) -> list[MaskRecipe]:
    """Four recipes: the two LR_find, and each of them with the layerwise ratios that the other finds.

    A transplanted mask prunes in each layer as many weights as the donor's mask, the smallest of its own run.
    """
    small, large = settings.lr_find
    return [
        MaskRecipe(small),
        MaskRecipe(large),
        MaskRecipe(large, ratios_of=small),
        MaskRecipe(small, ratios_of=large),
    ]


def _transplant_claims(r: Roles) -> Sequence[Claim]:
    # The abstract says that layerwise ratios causally mediate the effect of LR_find. If they do, transplanting them
    # helps the worse rate and harms the better one.
    small, large, large_by_small, small_by_large = (s.name for s in r.panels[0].series)
    return [
        Claim("small-is-better", f"LR_find {small} is better than {large}", r.masks("better", small, large)),
        Claim("ratios-help", f"{large} is better with {small}'s ratios", r.masks("better", large_by_small, large)),
        Claim(
            "ratios-suffice",
            f"With them, {large} does as well as {small}",
            r.masks("not worse", large_by_small, small),
        ),
        Claim("ratios-harm", f"{small} is worse with {large}'s ratios", r.masks("better", small, small_by_large)),
    ]


def _variant_panels(settings: Settings) -> tuple[Panel, ...]:
    """One panel per variant: initial weights, warmup, late rewinding, learning rate rewinding, fine-tuning."""
    plain = replace(settings, warmup_epochs=0, rewind="init")
    # check: the variants change settings after the command line was checked.
    warm = check(replace(settings, warmup_epochs=settings.warmup_epochs or WARMUP_EPOCHS, rewind="init"))
    late = check(replace(plain, rewind="late"))
    epochs = warm.schedule(1.0).warmup_epochs
    variants = {
        "a": ("Initial weights", plain),
        "b": (f"Warmup ({epochs} epoch{'' if epochs == 1 else 's'})", warm),
        "c": (f"Late rewinding (epoch {late.late_epoch})", late),
        "d": ("Learning rate rewinding", replace(plain, rewind="lr")),
        "e": ("Fine-tuning", replace(plain, rewind="finetune")),
    }
    series = tuple(Series(r.name, r.label, r, settings.lr_eval[0]) for r in find_rates(settings))
    # Rewinding changes the find runs, so each variant lists its own.
    return tuple(Panel(id, title, s, series, find=f"find-{id}") for id, (title, s) in variants.items())


def _variant_claims(r: Roles) -> Sequence[Claim]:
    low, middle, high = r.find
    return [
        Claim(
            f"small-is-better-{panel.id}",
            f"{panel.title}: LR_find {low} and {middle} are better than {high}",
            [c for small in (low, middle) for c in r.masks("better", small, high, panel.id)],
        )
        for panel in r.panels
    ]


def _structured_panels(settings: Settings) -> tuple[Panel, ...]:
    """The same networks in four panels, over filters removed, parameters, FLOPs and latency."""
    measures = {"filters": "Filters", "parameters": "Parameters", "flops": "Operations", "latency": "Latency"}
    series = tuple(Series(r.name, r.label, r, settings.lr_eval[0], dense="find") for r in find_rates(settings))
    return tuple(
        Panel(id, title, settings, series, x=x, find=None)
        for id, (x, title) in zip("abcd", measures.items(), strict=True)
    )


def _structured_claims(r: Roles) -> Sequence[Claim]:
    low, middle, high = r.find
    # By rounds, not densities: the x axis of panel a is the fraction of filters removed. Round 0 removes none.
    rounds = (1, len(r.settings.sparsities))
    masks = [Accuracy("a", "better", other, high, rounds=rounds) for other in (low, middle)]
    return [
        Claim("best-dense", f"LR_find {high} trains the best dense network", r.dense(high, low, middle, panel="a")),
        Claim("small-is-better", f"LR_find {low} and {middle} choose better filters than {high}", masks),
    ]


TRANSPLANT = Figure(
    "transplant",
    replace(RESNET50, lr_find=(0.05, 0.5), lr_eval=(0.5,)),
    evaluated(_transplanted),
    _transplant_claims,
    presets=SMALLER,
    exactly={"lr_find": 2},
)
VARIANTS = Figure(
    "variants",
    replace(RESNET50, lr_find=(0.05, 0.2, 0.5), lr_eval=(0.5,)),
    _variant_panels,
    _variant_claims,
    uses=ROUNDS - {"rewind"},
    presets=SMALLER,
    exactly={"lr_eval": 1},
)
# Training as in section A.1. The appendix names neither networks, sparsities nor learning rates; these are our choice.
STRUCTURED = Figure(
    "structured",
    replace(
        RESNET50,
        epochs=200,
        protocol_epochs=200,
        milestones=(),
        gamma=1.0,
        decay="cosine",
        warmup_epochs=5,
        lr_find=(0.05, 0.1, 0.5),
        lr_eval=(0.1,),
        batch_size=256,
        weight_decay=5e-5,
        nesterov=True,
        label_smoothing=0.1,
        sparsities=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
    _structured_panels,
    _structured_claims,
    uses=frozenset({"lr_eval", "sparsities"}),
    presets={
        "smoke": {**SMALLER["smoke"], "sparsities": (0.3, 0.6, 0.9)},
        "quick": {"epochs": 20, "sparsities": (0.3, 0.6, 0.9)},
    },
    exactly={"lr_eval": 1},
)
EXTRA = tuple(register(figure).name for figure in (TRANSPLANT, VARIANTS, STRUCTURED))
