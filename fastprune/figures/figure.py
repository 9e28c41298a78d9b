"""A figure is data: the settings of its protocol, its panels with their series, and its claims.

A registry maps names to figures. A user's module can add figures to it (`--figure-module`).
"""

# Standard library only: `--plan` imports this module and must start without the seconds that importing torch takes.

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase
from typing import Any, Literal, NamedTuple

from fastprune.errors import InputError
from fastprune.figures.claims import Accuracy, Claim, Kind
from fastprune.specs import ChannelSelection, DataSpec, LprHistory, Prune, Rewind, Train
from fastprune.study.chains import Chains, MaskRecipe
from fastprune.study.graph import Graph
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
    LPR after an epoch, any other a network with fewer filters (see `points_of`). settings: those of its runs. find: the
    id under which results.csv lists the find runs of this panel; None where another panel lists them. rate: the LR_find
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


# ---- from panels to points, and to the graph of their runs ----------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """The accuracy of one trained network in one panel.

    lr_find: None for the random baseline. epoch: the epoch after which accuracy is read; None: the last. x: name of the
    horizontal axis (axes.py). selection: the channels that a structured network keeps; None for unstructured pruning.
    """

    panel: str
    series: str
    seed: int
    round: int
    lr_find: float | None
    lr_eval: float
    node: Train
    epoch: int | None = None
    x: str = "density"
    selection: ChannelSelection | None = None

    def label(self, source: str) -> str:
        """The name of the run for the user. source: of its masks, see `source_of`."""
        role = "find" if self.panel.startswith("find") else f"eval {self.lr_eval:g}"
        place = f"round {self.round}" if self.selection is None else _filters(self.selection)
        return f"{role} · {source} · seed {self.seed} · {place}"

    @property
    def wanted(self) -> tuple[Train | ChannelSelection, ...]:
        """The nodes that must be published before this point can be drawn."""
        return (self.node,) if self.selection is None else (self.node, self.selection)


@dataclass(frozen=True)
class LprPoint:
    """The LPR history of one dense run in one panel.

    series: None: one line per layer, its LPR (A4). A name: one line of that name, the distance from the LPR at the end,
    which is the mean over layers of the absolute difference (A5).
    """

    panel: str
    series: str | None
    seed: int
    lr_find: float
    history: LprHistory

    def label(self, source: str) -> str:
        """The name of the run for the user, whatever its `source`."""
        return f"dense · LR {self.lr_find:g} · seed {self.seed}"

    @property
    def node(self) -> Train:
        return self.history.node

    @property
    def wanted(self) -> tuple[LprHistory]:
        return (self.history,)


AnyPoint = Point | LprPoint


def points_of(figure: Figure, settings: Settings, data: DataSpec) -> list[AnyPoint]:
    """All points of the figure, for every seed: those of its panels, and one per find run."""
    panels = figure.panels_of(settings)
    found: list[AnyPoint] = []
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        # Panels with equal settings share one builder, which remembers the masks that it has built.
        chains = {panel.settings: Chains(panel.settings, data, seed) for panel in panels}
        points = [point for panel in panels for point in find_points(panel, chains[panel.settings])]
        # Panels that share find runs list them under the same find panel; results.csv allows one row per point.
        found += list({(p.panel, p.series, p.round): p for p in points}.values())
        for panel in panels:
            for series in panel.series:
                found += _points(panel, series, chains[panel.settings])
    return found


def _points(panel: Panel, series: Series, chains: Chains) -> Iterator[AnyPoint]:
    """The points of one series: prune rounds, epochs of a dense run, or one-shot structured networks, by the x axis."""
    if panel.x == "density":
        return _eval_points(panel, series, chains)
    if panel.x == "epoch":
        return _lpr_points(panel, series, chains)
    return _channel_points(panel, series, chains)


def find_points(panel: Panel, chains: Chains) -> Iterator[Point]:
    """One point per find run of the panel, rounds 0 to `rounds` - 1."""
    for series in panel.series:
        recipe = series.recipe
        if panel.x == "density" and panel.find is not None and recipe.lr is not None:
            # The mask of the last round is evaluated, but no find run trains under it.
            for round in range(chains.settings.rounds):
                state = chains.find_state(recipe, round)
                yield Point(
                    panel.find, series.name, chains.seed, round, recipe.lr, recipe.lr, state.node, epoch=state.epoch
                )


def _eval_points(panel: Panel, series: Series, chains: Chains) -> Iterator[Point]:
    recipe, lr_eval = series.recipe, series.lr_eval
    assert lr_eval is not None
    for round in range(chains.settings.rounds + 1):
        # A6 shows at 0 % sparsity the dense network as it was pruned, after `stop` epochs with LR_find.
        if round == 0 and series.dense == "find":
            assert recipe.lr is not None
            node = chains.dense(recipe.lr)
            yield Point(
                panel.id, series.name, chains.seed, 0, recipe.lr, recipe.lr, node, epoch=recipe.stop or node.stop
            )
        else:
            node = chains.eval_run(recipe, round, lr_eval)
            yield Point(panel.id, series.name, chains.seed, round, recipe.lr, lr_eval, node)


def _lpr_points(panel: Panel, series: Series, chains: Chains) -> Iterator[LprPoint]:
    lr = series.recipe.lr
    assert lr is not None
    history = LprHistory(chains.dense(lr), chains.settings.fraction)
    yield LprPoint(panel.id, series.name or None, chains.seed, lr, history)


def _channel_points(panel: Panel, series: Series, chains: Chains) -> Iterator[Point]:
    lr_find, lr_eval = series.recipe.lr, series.lr_eval
    assert lr_find is not None
    assert lr_eval is not None
    dense = chains.dense(lr_find)
    for round, sparsity in enumerate((0.0, *chains.settings.sparsities)):
        selection = ChannelSelection(dense.final, sparsity)
        node, lr = dense, lr_find
        # At 0 % stands the pre-trained network itself: fine-tuning a network with all of its filters prunes nothing.
        if round > 0:
            node, lr = chains.train(lr_eval, selection, Rewind(dense.final, 0, momentum=False)), lr_eval
        yield Point(panel.id, series.name, chains.seed, round, lr_find, lr, node, x=panel.x, selection=selection)


def build_graph(figure: Figure, settings: Settings, data: DataSpec) -> tuple[list[AnyPoint], Graph]:
    """The points of the figure, and the graph of all nodes that they need, labelled for progress and error messages."""
    points = points_of(figure, settings, data)
    panels = figure.panels_of(settings)
    sources = {(id, s.name): source_of(p, s, settings) for p in panels for s in p.series for id in (p.id, p.find)}
    labels: dict[str, str] = {}
    for point in points:
        source = sources[point.panel, point.series or ""]
        # A run that several points share keeps the label of the first.
        labels.setdefault(point.node.key, f"{figure.name} {point.label(source)}")
        if not isinstance(point, Point):
            continue
        about = f"{source} · seed {point.seed}"
        if isinstance(mask := point.node.mask, Prune):
            labels.setdefault(mask.key, f"{figure.name} prune · {about} · round {mask.round}")
        if point.selection is not None:
            labels.setdefault(point.selection.key, f"{figure.name} filters · {about} · {_filters(point.selection)}")
    return points, Graph.of((w for p in points for w in p.wanted), labels)


def source_of(panel: Panel, series: Series, settings: Settings) -> str:
    """How the masks of a series are found, for the user. settings: those of the figure."""
    # The name of a series will not do: it is a rate in most figures, but an epoch in A6.
    parts = [series.recipe.label.replace(" = ", " ")]
    if series.label not in ("", series.recipe.label):
        parts.append(series.label.replace(" = ", " "))
    # Panels of other settings have equal series: the variants.
    if panel.settings != settings:
        parts.append(panel.title)
    return " · ".join(parts)


def _filters(selection: ChannelSelection) -> str:
    return f"{100 * selection.fraction:g} % of filters removed"
