"""A figure is data: the settings of its protocol, its panels with their series, and its claims.

A registry maps names to figures. A user's module can add figures to it (`--figure-module`).
"""

# Standard library only: `--plan` imports this module and must start without the seconds that importing torch takes.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, Literal, NamedTuple

from fastprune.errors import InputError
from fastprune.figures.claims import Accuracy, Claim, Kind
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings, flag_of

MASKED = (0.001, 0.8)
"""Range of densities over which masks are compared: from round 1 (0.8) to round 30 (0.8 ** 30, about 0.001)."""

ROUNDS = frozenset({"lr_eval", "rounds", "fraction", "criterion", "allocation", "rewind", "rewind_epoch"})
"""Settings that only a figure with prune rounds and eval runs uses."""
# A setting that is missing here affects every figure; one that is here is refused where no chosen figure uses it.
_NOT_IN_ALL = ROUNDS | {"prune_epochs", "sparsities"}


@dataclass(frozen=True)
class Series:
    """One line of a panel: the networks that `lr_eval` trains under the masks of `recipe`.

    name: in results.csv; "" in a panel whose lines are the layers of one run. label: in the legend. lr_eval: None where
    no network is evaluated (A4, A5). dense: which dense network is the point at sparsity 0. "eval": the one trained
    with lr_eval; "find": the one trained with the recipe's LR_find, after the epoch at which it was pruned.
    """

    name: str
    label: str
    recipe: MaskRecipe
    lr_eval: float | None = None
    dense: Literal["eval", "find"] = "eval"


@dataclass(frozen=True)
class Panel:
    """One panel of a figure.

    x, y: names of axes in axes.py. x also decides what a point is: "density" a network after a prune round, "epoch" the
    LPR after an epoch, any other a network with fewer filters (points.py). settings: those of its runs. find: the id
    under which results.csv lists the find runs of this panel; None where another panel lists them. rate: the LR_find
    that all series share; None where they differ. marks: x values at which a thin vertical line is drawn; marks_label
    explains it.
    """

    id: str
    title: str
    settings: Settings
    series: tuple[Series, ...]
    x: str = "density"
    y: str = "accuracy"
    find: str | None = "find"
    rate: float | None = None
    marks: tuple[float, ...] = ()
    marks_label: str = ""


def middle_of(rates: Sequence[float]) -> float:
    """The rate in the middle, of an even number the lower one."""
    return sorted(rates)[(len(rates) - 1) // 2]


class Rates(NamedTuple):
    """Learning rates by role, written as the names of their series.

    Two rates have no middle one; a single rate has no role at all. A missing role is the role's own name ("middle").
    """

    lowest: str
    middle: str
    highest: str

    @classmethod
    def of(cls, rates: Sequence[float]) -> "Rates":
        rising = [f"{rate:g}" for rate in sorted(rates)]
        # No series is called "middle": a claim about a missing role finds no results and is judged undecided.
        # Of an even number of rates, the lower of the two in the middle.
        middle = f"{middle_of(rates):g}" if len(rising) > 2 else "middle"
        return cls(rising[0], middle, rising[-1]) if len(rising) > 1 else cls("lowest", middle, "highest")


@dataclass(frozen=True)
class Roles:
    """What a figure's claims refer to: learning rates by role and panels, under given settings."""

    # Claims never name a rate by value, so that they keep their meaning under `--lr-find` and `--lr-eval`.

    settings: Settings
    panels: tuple[Panel, ...]

    @property
    def find(self) -> Rates:
        return Rates.of(self.settings.lr_find)

    @property
    def eval(self) -> Rates:
        return Rates.of(self.settings.lr_eval)

    @property
    def rising(self) -> list[str]:
        """All LR_find, the lowest first, written as the names of their series."""
        return [f"{rate:g}" for rate in sorted(self.settings.lr_find)]

    def panel(self, rate: str) -> str:
        """Id of the panel whose series all have the LR_find `rate`; `rate` itself where there is none."""
        return next((p.id for p in self.panels if p.rate is not None and f"{p.rate:g}" == rate), rate)

    def masks(
        self, kind: Kind, left: str, right: str, panel: str | None = None, densities: tuple[float, float] = MASKED
    ) -> tuple[Accuracy, ...]:
        """Comparisons of the masks of two series, in `panel`, or in every panel whose series differ in LR_find."""
        panels = [p.id for p in self.panels if p.rate is None] if panel is None else [panel]
        return tuple(Accuracy(p, kind, left, right, densities=densities) for p in panels)

    def dense(self, left: str, *others: str, panel: str = "find") -> tuple[Accuracy, ...]:
        """Comparisons that say: the dense network of `left` is more accurate than that of each of `others`."""
        return tuple(Accuracy(panel, "better", left, other, rounds=(0, 0)) for other in others)


@dataclass(frozen=True)
class Figure:
    """One figure.

    protocol: the paper's settings. panels, claims: functions of the settings in effect. uses: which of the settings
    that not every figure uses this one does. presets: by preset, the settings that this figure changes in it. exactly:
    by setting, how many values it must have. layers: whether the series are the layers of one network, which a colour
    bar explains.
    """

    name: str
    protocol: Settings
    # Functions, since panels, series and claims follow the rates and epochs that the command line may change.
    panels: Callable[[Settings], tuple[Panel, ...]]
    claims: Callable[[Roles], Sequence[Claim]]
    uses: frozenset[str] = ROUNDS
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exactly: Mapping[str, int] = field(default_factory=dict)
    layers: bool = False

    def ignores(self, setting: str) -> bool:
        """Whether the figure does not use this setting."""
        return setting in _NOT_IN_ALL - self.uses

    def panels_of(self, settings: Settings) -> tuple[Panel, ...]:
        """The panels in reading order. InputError where a setting has more or fewer values than `exactly` says."""
        for name, count in self.exactly.items():
            if (given := len(getattr(settings, name))) != count:
                raise InputError(f"{flag_of(name)}: {given} given, figure {self.name} needs exactly {count}")
        return self.panels(settings)

    def claims_of(self, settings: Settings) -> list[Claim]:
        return list(self.claims(Roles(settings, self.panels_of(settings))))

    def labels(self, settings: Settings) -> dict[str, str]:
        """Series name -> legend label, in the order of the legend."""
        named = (s for panel in self.panels_of(settings) for s in panel.series if s.name)
        return {s.name: s.label for s in named}


FIGURES: dict[str, Figure] = {}
"""Name -> figure. fastprune's own come first; a user's module appends to them."""


def register(figure: Figure) -> Figure:
    """Adds a figure to FIGURES, so that `--fig` finds it; returns it. ValueError if the name is taken, or is "all"."""
    if figure.name in FIGURES or figure.name == "all":
        raise ValueError(f"the figure name {figure.name!r} is already taken: choose another name")
    FIGURES[figure.name] = figure
    return figure


def load(name: str) -> Figure:
    """The figure of that name. InputError where there is none."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}, or all")
    return FIGURES[name]


# ---- panels that figures share --------------------------------------------------------------------------------------

Recipes = Callable[[Settings], Sequence[MaskRecipe]]


def find_rates(settings: Settings) -> list[MaskRecipe]:
    """One recipe per LR_find."""
    return [MaskRecipe(lr) for lr in settings.lr_find]


def with_random(settings: Settings) -> list[MaskRecipe]:
    """One recipe per LR_find, and the random baseline."""
    return [*find_rates(settings), MaskRecipe(None)]


def evaluated(recipes: Recipes) -> Callable[[Settings], tuple[Panel, ...]]:
    """A function that makes panels a, b, ...: one per LR_eval, with one series per recipe."""

    def panels(settings: Settings) -> tuple[Panel, ...]:
        return tuple(
            Panel(id, f"LR_eval = {lr:g}", settings, tuple(Series(r.name, r.label, r, lr) for r in recipes(settings)))
            for id, lr in zip(ascii_lowercase, settings.lr_eval, strict=False)
        )

    return panels
