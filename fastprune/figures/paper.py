"""Figures A1 to A6 of the paper's appendix, with the claims of their captions."""

# Where a caption is silent or contradicts itself, a comment here names the reading that was chosen.

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

from fastprune.figures.claims import Claim, FirstAgainstOthers, Flattens, Hardly, MoreMovement, SmallerStart
from fastprune.figures.figure import (
    ROUNDS,
    Figure,
    Panel,
    Roles,
    Series,
    evaluated,
    find_rates,
    middle_of,
    register,
    with_random,
)
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings

# Protocols of section A.1: one per pair of model and data set.
RESNET18 = Settings(
    model="resnet18",
    stem="imagenet",
    width=64,
    epochs=110,
    protocol_epochs=110,
    milestones=(80, 100),
    gamma=0.1,
)
RESNET50 = replace(RESNET18, model="resnet50", milestones=(70, 85, 100), gamma=0.2)
MINIPLACES = replace(RESNET50, dataset="miniplaces", epochs=120, protocol_epochs=120, milestones=(80, 110, 115))
SMALLER: dict[str, dict[str, Any]] = {
    # ResNet-50 costs more per image than ResNet-18. With images of half the side, half the batch size and fewer images,
    # its smoke run takes as long and reaches a similar accuracy.
    "smoke": {"image_size": 32, "train_per_class": 128, "val_per_class": 30, "batch_size": 64},
}
FIRST = "conv1"
"""The layer that A4's caption calls the first."""


def _a1_panels(settings: Settings) -> tuple[Panel, ...]:
    """One panel per LR_eval with all LR_find; then one panel for the middle LR_find with all LR_eval."""
    by_eval = evaluated(find_rates)(settings)
    # The caption says "LR_eval = 0.1 is the best" of panels that hold LR_eval constant: read as LR_find = 0.1.
    middle = middle_of(settings.lr_find)
    series = tuple(Series(f"LR_eval {lr:g}", f"LR_eval = {lr:g}", MaskRecipe(middle), lr) for lr in settings.lr_eval)
    last = ascii_lowercase[len(by_eval)]
    # find=None: panels a to c list these find runs already.
    return (*by_eval, Panel(last, f"LR_find = {middle:g}", settings, series, find=None, rate=middle))


def _a1_claims(r: Roles) -> Sequence[Claim]:
    f, lr = r.find, r.eval
    last = r.panels[-1].id
    low, middle, high = (f"LR_eval {rate}" for rate in lr)
    best = (*r.masks("better", f.middle, f.lowest), *r.masks("better", f.middle, f.highest))
    until = [c for other in (low, middle) for c in r.masks("better", high, other, last, densities=(0.01, 0.8))]
    beyond = r.masks("better", middle, high, last, densities=(0.001, 0.01))
    not_dense = (*r.dense(f.highest, f.lowest, f.middle), *r.masks("better", f.middle, f.highest))
    return [
        Claim("best-find", f"LR_find {f.middle} is the best at every LR_eval", best),
        Claim("best-eval", f"With LR_find {f.middle}, LR_eval {lr.highest} is the best until 99 % sparsity", until),
        # The caption says "very high sparsity levels" without a number; 99 % is our reading.
        Claim("sparse-eval", f"From 99 % sparsity on, LR_eval {lr.middle} is better than {lr.highest}", beyond),
        Claim(
            "not-the-dense-best",
            f"{f.highest} trains the best dense network, and {f.middle} finds better masks",
            not_dense,
        ),
    ]


def _a2_claims(r: Roles) -> Sequence[Claim]:
    # The caption lists LR_find 0.5, then speaks of 0.8 three times; the protocol below has 0.8.
    low, middle, high = r.find
    better = (*r.masks("better", low, high), *r.masks("better", middle, high))
    return [
        Claim("similar", f"LR_find {low} and {middle} are very similar", r.masks("similar", low, middle)),
        Claim("small-is-better", f"LR_find {low} and {middle} are better than {high}", better),
        Claim("best-dense", f"{high} trains the best dense network", r.dense(high, low, middle)),
        Claim("below-random", f"LR_find {high} is worse than random pruning", r.masks("better", "random", high)),
    ]


def _a3_claims(r: Roles) -> Sequence[Claim]:
    low, middle, high = r.find
    larger = (*r.masks("better", middle, low), *r.masks("better", high, middle))
    return [Claim("larger-is-better", "Pruned locally, the larger LR_find, the better", larger)]


def _a4_panels(settings: Settings) -> tuple[Panel, ...]:
    """One panel per LR_find, with one line per layer."""
    return tuple(
        Panel(id, f"LR_find = {lr:g}", settings, (Series("", "", MaskRecipe(lr)),), x="epoch", y="ratio", rate=lr)
        for id, lr in zip(ascii_lowercase, settings.lr_find, strict=False)
    )


def _a4_claims(r: Roles) -> Sequence[Claim]:
    low, _, high = r.find
    small, large = r.panel(low), r.panel(high)
    stays = (Hardly(small, FIRST), FirstAgainstOthers(small, FIRST))
    return [
        Claim(
            "large-moves",
            f"At {high} the ratios move more during training than at {low}",
            [MoreMovement(large, small, FIRST)],
        ),
        Claim("small-stays", f"At {low} they hardly move, except the first layer", stays),
    ]


def _a5_panels(settings: Settings) -> tuple[Panel, ...]:
    series = tuple(Series(r.name, r.label, r) for r in find_rates(settings))
    marks = tuple(map(float, settings.schedule(1.0).milestones))
    return (Panel("a", "", settings, series, x="epoch", y="distance", marks=marks, marks_label="LR decays"),)


def _a5_claims(r: Roles) -> Sequence[Claim]:
    s = r.settings
    decay = s.scaled("milestones", s.milestones[0]) if s.milestones else 0
    nearer = [SmallerStart("a", small, large) for small, large in pairwise(r.rising)]
    flatten = [Flattens("a", name, decay) for name in r.rising]
    claims = [Claim("flattens", "Every line flattens where the LR first decays", flatten)]
    if nearer:
        claims.insert(
            0, Claim("small-starts-near", "The smaller LR_find, the smaller the distance at the start", nearer)
        )
    return claims


def _a6_panels(settings: Settings) -> tuple[Panel, ...]:
    """One panel per LR_find, with one series per epoch at which the find runs stop.

    Series are named by the protocol's epochs (20, 50, 70, 110), also where a shorter run scales them.
    """

    def series(lr: float) -> tuple[Series, ...]:
        stops = zip(settings.prune_epochs, settings.stops, strict=True)
        return tuple(
            Series(
                str(epoch),
                f"pruned at epoch {stop}",
                # Not `epochs` itself: None makes the node equal to the full find run that other figures train, too.
                MaskRecipe(lr, None if stop == settings.epochs else stop),
                settings.lr_eval[0],
                dense="find",
            )
            for epoch, stop in stops
        )

    return tuple(
        Panel(id, f"LR_find = {lr:g}", settings, series(lr), find=f"find-{id}", rate=lr)
        for id, lr in zip(ascii_lowercase, settings.lr_find, strict=False)
    )


def _a6_claims(r: Roles) -> Sequence[Claim]:
    low, _, high = r.find
    small, large = r.panel(low), r.panel(high)
    bad = [c for panel in (small, large) for c in r.masks("better", "110", "20", panel)]
    early = [c for stop in ("50", "70") for c in r.masks("better", stop, "110", large)]
    # The caption says "also performs well"; judged as at most one point worse than pruning at the end.
    well = r.masks("not worse", "70", "110", small)
    dense = [c for panel in (small, large) for c in r.dense("110", "20", "50", "70", panel=panel)]
    return [
        Claim("too-early", "Pruning at epoch 20 is bad", bad),
        Claim("early-is-better", f"For LR_find {high}, pruning at 50 or 70 beats pruning at 110", early),
        Claim("early-does-well", f"For LR_find {low}, pruning at 70 does as well", well),
        Claim("not-converged", "The dense networks at 20, 50 and 70 are far from converged", dense),
    ]


A1 = Figure(
    "A1",
    replace(MINIPLACES, lr_find=(0.02, 0.1, 0.5), lr_eval=(0.02, 0.1, 0.5)),
    _a1_panels,
    _a1_claims,
    presets=SMALLER,
)
A2 = Figure(
    "A2",
    replace(RESNET18, lr_find=(0.05, 0.2, 0.8), lr_eval=(0.5, 0.8)),
    evaluated(with_random),
    _a2_claims,
    presets={"cpu": {"lr_eval": (0.1,)}},  # panel b alone: 0.8 at a batch of 512
)
A3 = Figure(
    "A3",
    replace(RESNET50, allocation="local", lr_find=(0.1, 0.2, 0.5), lr_eval=(0.2, 0.5)),
    evaluated(find_rates),
    _a3_claims,
    presets=SMALLER,
)
# A4 and A5 train nothing that is not trained anyway: they read the LPR history of dense runs of other figures.
A4 = Figure(
    "A4",
    replace(RESNET50, lr_find=(0.5, 0.05)),
    _a4_panels,
    _a4_claims,
    uses=frozenset({"fraction"}),
    presets=SMALLER,
    layers=True,
)
A5 = Figure(
    "A5",
    replace(RESNET50, lr_find=(0.05, 0.1, 0.2, 0.5)),
    _a5_panels,
    _a5_claims,
    uses=frozenset({"fraction"}),
    presets=SMALLER,
)
A6 = Figure(
    "A6",
    replace(RESNET50, lr_find=(0.05, 0.2), lr_eval=(0.5,), prune_epochs=(20, 50, 70, 110)),
    _a6_panels,
    _a6_claims,
    uses=ROUNDS | {"prune_epochs"},
    presets=SMALLER,
    exactly={"lr_eval": 1},
)
PAPER = tuple(register(figure).name for figure in (A1, A2, A3, A4, A5, A6))
