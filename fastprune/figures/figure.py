"""A figure is data: the settings of its protocol, its panels with their series, and what it claims.

Figures are found by name in a registry; a module of the user's own can add to it (`--figure-module`). Standard library
only, so that planning starts at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, Literal, NamedTuple

from fastprune.errors import InputError
from fastprune.figures.claims import Accuracy, Claim, Kind
from fastprune.study.chains import MaskRecipe
from fastprune.study.settings import Settings, flag_of

MASKED = (0.001, 0.8)
"""Densities over which masks are compared: every round from the first, down to 0.8 ** 30."""

ROUNDS = frozenset({"lr_eval", "rounds", "fraction", "criterion", "allocation", "rewind", "rewind_epoch"})
"""Settings that matter where weights are pruned round by round and the masks evaluated."""
_NOT_IN_ALL = ROUNDS | {"prune_epochs", "sparsities"}


@dataclass(frozen=True)
class Series:
    """A line of a panel: networks whose masks `recipe` finds, trained with `lr_eval`.

    name: in results.csv; "" in a panel whose lines are the layers of one run. label: in the legend. dense: which run
    stands at sparsity 0, the dense one with lr_eval, or that with the recipe's own rate as it was pruned.
    """

    name: str
    label: str
    recipe: MaskRecipe
    lr_eval: float | None = None
    dense: Literal["eval", "find"] = "eval"


@dataclass(frozen=True)
class Panel:
    """x, y: names of axes (axes.py); what stands on x decides what the panel's points are (points.py).

    settings: of its runs. find: the panel in results.csv that has the runs which find its masks, None where another
    panel has them. rate: the LR_find that all its series share, None where they differ. marks: places on the x axis
    with a thin line, explained by marks_label.
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


class Rates(NamedTuple):
    """Learning rates by role, as their series are named. Of fewer than three rates there is no middle one, of one rate
    neither a lowest nor a highest: the role's own name then stands for it, and finds no results."""

    lowest: str
    middle: str
    highest: str

    @classmethod
    def of(cls, rates: Sequence[float]) -> "Rates":
        rising = [f"{rate:g}" for rate in sorted(rates)]
        middle = rising[(len(rising) - 1) // 2] if len(rising) > 2 else "middle"
        return cls(rising[0], middle, rising[-1]) if len(rising) > 1 else cls("lowest", middle, "highest")


@dataclass(frozen=True)
class Roles:
    """What claims speak of under some settings, so that a preset with other rates keeps them."""

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
        """All LR_find as their series are named, the lowest first."""
        return [f"{rate:g}" for rate in sorted(self.settings.lr_find)]

    def panel(self, rate: str) -> str:
        """The panel that has one LR_find, or the rate itself where there is none."""
        return next((p.id for p in self.panels if p.rate is not None and f"{p.rate:g}" == rate), rate)

    def masks(
        self, kind: Kind, left: str, right: str, panel: str | None = None, densities: tuple[float, float] = MASKED
    ) -> tuple[Accuracy, ...]:
        """Masks compared, in one panel or in each that mixes rates."""
        panels = [p.id for p in self.panels if p.rate is None] if panel is None else [panel]
        return tuple(Accuracy(p, kind, left, right, densities=densities) for p in panels)

    def dense(self, left: str, *others: str, panel: str = "find") -> tuple[Accuracy, ...]:
        """The dense network of one series better than those of others."""
        return tuple(Accuracy(panel, "better", left, other, rounds=(0, 0)) for other in others)


@dataclass(frozen=True)
class Figure:
    """protocol: what the paper asks for. presets: what the figure changes of the presets, by their names. uses: the
    settings it takes among those that not all figures take. exactly: settings that must have so many values. layers:
    whether its series are a network's layers, shown by a colour bar."""

    name: str
    protocol: Settings
    panels: Callable[[Settings], tuple[Panel, ...]]
    claims: Callable[[Roles], Sequence[Claim]]
    uses: frozenset[str] = ROUNDS
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exactly: Mapping[str, int] = field(default_factory=dict)
    layers: bool = False

    def ignores(self, setting: str) -> bool:
        return setting in _NOT_IN_ALL - self.uses

    def panels_of(self, settings: Settings) -> tuple[Panel, ...]:
        """Its panels in reading order. InputError for a number of values that it cannot draw."""
        for name, count in self.exactly.items():
            if (given := len(getattr(settings, name))) != count:
                raise InputError(f"figure {self.name} takes {count} {flag_of(name)}, not {given}")
        return self.panels(settings)

    def claims_of(self, settings: Settings) -> list[Claim]:
        return list(self.claims(Roles(settings, self.panels_of(settings))))

    def labels(self, settings: Settings) -> dict[str, str]:
        """By name of a series its label, in the legend's order."""
        named = (s for panel in self.panels_of(settings) for s in panel.series if s.name)
        return {s.name: s.label for s in named}


FIGURES: dict[str, Figure] = {}
"""By name; the paper's, ours, and a user's."""


def register(figure: Figure) -> Figure:
    """Makes the figure known to `--fig`. ValueError for a name that another figure has."""
    if figure.name in FIGURES or figure.name == "all":
        raise ValueError(f"there is a figure {figure.name!r} already")
    FIGURES[figure.name] = figure
    return figure


def load(name: str) -> Figure:
    """The figure of that name. InputError for an unknown one."""
    if name not in FIGURES:
        raise InputError(f"unknown figure {name!r}: choose one of {', '.join(FIGURES)}, or all")
    return FIGURES[name]


# ---- panels that figures share --------------------------------------------------------------------------------------

Recipes = Callable[[Settings], Sequence[MaskRecipe]]


def find_rates(settings: Settings) -> list[MaskRecipe]:
    """A recipe for each LR_find."""
    return [MaskRecipe(lr) for lr in settings.lr_find]


def with_random(settings: Settings) -> list[MaskRecipe]:
    """A recipe for each LR_find, and the random baseline."""
    return [*find_rates(settings), MaskRecipe(None)]


def evaluated(recipes: Recipes) -> Callable[[Settings], tuple[Panel, ...]]:
    """Panels a, b, ...: one for each LR_eval, with a series for each recipe."""

    def panels(settings: Settings) -> tuple[Panel, ...]:
        return tuple(
            Panel(id, f"LR_eval = {lr:g}", settings, tuple(Series(r.name, r.label, r, lr) for r in recipes(settings)))
            for id, lr in zip(ascii_lowercase, settings.lr_eval, strict=False)
        )

    return panels
