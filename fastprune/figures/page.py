"""index.html: all figures of a results folder on one page that needs no network, no server and no other file."""

import json
import math
import re
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import fastprune
from fastprune.console import duration
from fastprune.errors import InputError
from fastprune.figures.claims import SIMILAR_POINTS
from fastprune.figures.drawing import figure_svg
from fastprune.figures.figure import FIGURES
from fastprune.figures.report import panel_table, recorded_drawing
from fastprune.figures.results import Row, depth_key, natural_key, read_csv, write_output
from fastprune.store.listing import Found, Listing, computed
from fastprune.study.settings import Settings

if TYPE_CHECKING:
    from jinja2 import Template

    from fastprune.study.progress import Live

NAME = "index.html"


@dataclass(frozen=True)
class Results:
    """The results of one figure. summary: as in summary.json. files: names of files in its folder that the page links;
    empty while the figure is computed."""

    rows: Sequence[Row]
    summary: Mapping[str, Any]
    files: Sequence[str] = ()

    @property
    def name(self) -> str:
        return str(self.summary["figure"])

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """The results in a figure's folder. InputError if a file is missing or damaged."""
        path = folder / "summary.json"
        try:
            summary = json.loads(path.read_bytes())
            summary["figure"], summary["cost"], summary["environment"], summary["panels"], summary["claims"]
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}; run the figure again") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged or foreign: run the figure again") from error
        names = ("figure.pdf", "figure.png", "results.csv", "summary.json")
        return cls(read_csv(folder / "results.csv"), summary, [name for name in names if (folder / name).is_file()])


def results_in(out: Path) -> dict[str, Results]:
    """The results of each figure in a results folder, by name of the figure. InputError if a file is damaged."""
    folders = sorted((path.parent for path in out.glob("*/summary.json")), key=lambda p: natural_key(p.name))
    return {folder.name: Results.read(folder) for folder in folders}


def write_page(out: Path, figures: Iterable[Results], store: Path | None, live: "Live | None" = None) -> Path:
    """Writes `out`/index.html; returns its path. store: where the trainings of the figures are recorded; None: the page
    tells only what the results do. live: the state of a run that goes on. InputError where `out` cannot be written."""
    path = out / NAME
    write_output(path, page(figures, store, live).encode())
    return path


def page(figures: Iterable[Results], store: Path | None, live: "Live | None" = None) -> str:
    """The page as text. Arguments as of write_page."""
    figures = list(figures)
    listing = Listing(store) if store is not None and (store / "store.json").is_file() else None
    shown = [_Shown.of(results, listing) for results in figures]
    return _template().render(
        figures=shown,
        runs=_runs(figures, listing),
        live=live,
        written=time.strftime("%d %B %Y, %H:%M"),
        version=fastprune.__version__,
        css=_part("page.css"),
        js=_part("page.js"),
    )


@cache
def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


@cache
def _template() -> "Template":
    # Here, because `--plan` imports this module, too, and must start at once.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    # autoescape: names of data sets and of a user's series are text, whatever characters they have.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "percent": lambda x, digits=2: "" if x is None else f"{100 * x:.{digits}f}",
        "significant": lambda x: "" if x is None else f"{x:.3g}",
        "signed": lambda x: "" if x is None else f"{x:+.2f}",
        "duration": lambda x: "" if x is None else duration(x),
        # "<" alone could end the script element that holds the data.
        "data": lambda x: Markup(json.dumps(x, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
        "strip": strip,
        "filled": filled,
    }
    return environment.from_string(_part("page.html"))


# ---- one figure -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """What the template shows of one figure. rounds: the cost of each, see _costs. ratios: see _ratios."""

    results: Results
    svg: str
    table: str
    rounds: list[dict[str, Any]]
    ratios: dict[str, Any] | None
    command: str

    @classmethod
    def of(cls, results: Results, listing: Listing | None) -> "_Shown":
        summary = results.summary
        drawing = summary["drawing"]
        tables = [panel_table(letter, summary["panels"].get(letter, []), drawing) for letter in drawing["panels"]]
        return cls(
            results,
            inline(figure_svg(results.rows, recorded_drawing(summary))),
            "\n\n".join(tables),
            _costs(results, listing),
            _ratios(results, listing),
            command_of(summary),
        )

    @property
    def reach(self) -> float:
        """Half the width of the axis that all comparisons share: every difference and the margin are on it. An interval
        may end outside."""
        parts = [part for claim in self.results.summary["claims"] for part in claim["parts"]]
        values = [abs(value) for part in parts for value in part["differences"].values()]
        return 1.15 * max([2 * SIMILAR_POINTS, *values])

    @property
    def longest(self) -> float:
        """The longest mean time of a round's trainings, in seconds."""
        return float(max(cost["mean"] for cost in self.rounds))

    @property
    def settings(self) -> dict[str, Any]:
        return used_settings(self.results.summary)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many claims hold, fail or are undecided; those that occur."""
        counts = dict.fromkeys(("holds", "fails", "undecided"), 0)
        for claim in self.results.summary["claims"]:
            counts[claim["verdict"]] += 1
        return {verdict: count for verdict, count in counts.items() if count}


def used_settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """By name, the settings that had an effect on a figure; epochs as its trainings used them, scaled."""
    given, unused = summary["settings"], {"by_hand", "protocol_epochs"}
    figure = FIGURES.get(str(summary["figure"]))
    if figure is not None:  # a user's module may not be loaded here
        unused |= {name for name in given if figure.ignores(name)}
    if summary["data"].get("name") != "synthetic":
        unused.add("image_size")
    try:
        kept: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
        s = Settings(**kept)
    except TypeError:  # another version wrote them
        return {name: value for name, value in given.items() if name not in unused}
    schedule = s.schedule(1.0)
    scaled = {
        "milestones": schedule.milestones,
        "warmup_epochs": schedule.warmup_epochs,
        "prune_epochs": s.stops,
        "rewind_epoch": s.late_epoch,
    }
    unused |= {"rewind_epoch"} if s.rewind != "late" else set()
    unused |= {"milestones"} if s.decay != "multistep" else set()
    unused |= {"gamma"} if s.decay == "cosine" else set()
    return {name: scaled.get(name, value) for name, value in given.items() if name not in unused}


def filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that say something: not None, and not empty."""
    return {name: value for name, value in values.items() if value is not None and value not in ("", (), [], {})}


def command_of(summary: Mapping[str, Any]) -> str:
    """The command that repeats a figure: the one that made it, where it is recorded."""
    made = str(summary["cost"].get("command", {}).get("line") or "")
    if made:
        return f"python scripts/{made}" if made.startswith("reproduce.py") else made
    return shlex.join(
        ["python", "scripts/reproduce.py", "--fig", str(summary["figure"]), "--preset", str(summary["preset"])]
    )


def inline(svg: str) -> str:
    """A drawing of matplotlib as an element of a page that is light or dark: black becomes the text's colour, and greys
    the page's own. Series keep their colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # The size comes from the viewBox and the page's style.
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", svg)
    svg = re.sub(r"(fill|stroke): #(?:333333|666666|808080)", r"\1: var(--muted)", svg)
    # Text has no colour of its own in the file where it is black.
    return svg.replace("<svg ", '<svg class="plot" role="img" fill="currentColor" ', 1)


def strip(part: Mapping[str, Any], reach: float) -> str:
    """A picture of the differences over seeds of one comparison, as an SVG element: a dot a seed, the mean and its
    interval, 0, and for "similar" and "not worse" the margin. reach: the difference at each end of the axis."""
    from markupsafe import Markup, escape

    width, height, middle = 220, 26, 13.0
    effect, interval = part["effect"], part["interval"]
    if effect is None:
        return ""

    def at(points: float) -> str:
        inside = max(-reach, min(reach, points))
        return f"{width / 2 + inside / reach * (width / 2 - 6):.1f}"

    kind = part["comparison"]["kind"]
    low, high = (at(-SIMILAR_POINTS), at(SIMILAR_POINTS if kind == "similar" else reach))
    shapes = []
    if kind in ("similar", "not worse"):
        span = float(high) - float(low)
        shapes.append(f'<rect class="margin" x="{low}" y="2" width="{span:.1f}" height="{height - 4}"/>')
    shapes.append(f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="2" y2="{height - 2}"/>')
    if interval is not None:
        shapes.append(
            f'<line class="interval" x1="{at(interval[0])}" x2="{at(interval[1])}" y1="{middle}" y2="{middle}"/>'
        )
    shapes += [f'<circle cx="{at(value)}" cy="{middle}" r="3.2"/>' for value in part["differences"].values()]
    shapes.append(f'<line class="mean" x1="{at(effect)}" x2="{at(effect)}" y1="6" y2="{height - 6}"/>')
    seeds = ", ".join(f"seed {seed}: {value:+.2f}" for seed, value in part["differences"].items())
    label = escape(f"{part['text']}: mean {effect:+.2f} {part['unit']}; {seeds}")
    return Markup(
        f'<svg class="strip" viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>'
        f"{''.join(shapes)}</svg>"
    )


# ---- its runs -------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One trained network, as a line of the table. role: "find", "eval" or "dense". series: labels, of all panels that
    show it. seconds, rate, how, where, at: as the store records them; None or empty where it does not."""

    key: str
    figures: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    series: set[str] = field(default_factory=set)
    lr: float | None = None
    seed: int = 0
    round: int | None = None
    density: float | None = None
    accuracy: float | None = None
    diverged: bool = False
    dead: int = 0
    epochs: int | None = None
    seconds: float | None = None
    rate: float | None = None
    how: str = ""
    where: str = ""


def role_of(row: Row) -> str:
    if row.panel.startswith("find"):
        return "find"
    return "dense" if row.lr_eval is None else "eval"


def _runs(figures: Sequence[Results], listing: Listing | None) -> list[_Run]:
    runs: dict[str, _Run] = {}
    for results in figures:
        labels, panels = results.summary["drawing"]["series"], results.summary["drawing"]["panels"]
        for row in results.rows:
            run = runs.setdefault(row.node, _Run(row.node))
            run.figures.add(results.name)
            run.roles.add(role_of(row))
            if row.lr_eval is not None or row.panel.startswith("find"):
                run.series.add(labels.get(row.series, row.series))
            run.seed, run.diverged = row.seed, run.diverged or row.diverged
            run.lr = row.lr_find if role_of(row) != "eval" else row.lr_eval
            axes = panels.get(row.panel, {"x": "density", "y": "accuracy"})
            if axes["y"] == "accuracy":
                run.accuracy, run.round = row.y, row.round
                run.dead = max(run.dead, row.dead)
            if axes["x"] == "density":
                run.density = row.x
    for run in runs.values():
        found = listing.by_key.get(run.key) if listing is not None else None
        if found is not None:
            _add_recorded(run, found, listing.record(found))  # type: ignore[union-attr]
    return sorted(runs.values(), key=lambda run: (run.round or 0, run.seed, sorted(run.roles), run.lr or 0, run.key))


def _add_recorded(run: _Run, found: Found, record: Mapping[str, Any]) -> None:
    if "corrupt" in record:
        return
    run.lr, run.seed, run.epochs, run.diverged = record["lr"], record["seed"], record["epochs"], record["diverged"]
    run.accuracy, run.seconds, run.rate = record["accuracy"], record["seconds"], record["images_per_second"]
    run.round, run.density = record["round"], record["density"]
    run.how = computed(found.provenance)
    host = found.provenance.get("host")
    run.where = record["device"] + (f" on {host}" if host else "")


def _costs(results: Results, listing: Listing | None) -> list[dict[str, Any]]:
    """By round: its trainings, their mean and whole time, the longest mean of all rounds, and how they computed."""
    if listing is None:
        return []
    by_round: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for key in {row.node for row in results.rows}:
        if (found := listing.by_key.get(key)) is not None:
            record = listing.record(found)
            if record.get("round") is not None and record.get("seconds") is not None:
                by_round[record["round"]].append((record, computed(found.provenance)))
    costs = []
    for number, trainings in sorted(by_round.items()):
        records = [record for record, _ in trainings]
        densities = [r["density"] for r in records if r["density"] is not None]
        costs.append(
            {
                "round": number,
                "trainings": len(trainings),
                "density": fmean(densities) if densities else None,
                "mean": fmean(r["seconds"] for r in records),
                "whole": math.fsum(r["seconds"] for r in records),
                "how": ", ".join(sorted({way for _, way in trainings if way})),
            }
        )
    return costs if len(costs) > 1 else []


def _ratios(results: Results, listing: Listing | None) -> dict[str, Any] | None:
    """Layerwise pruning ratios by round, layer and series, a mean over seeds; None where there are none.

    {"layers": names, "series": labels, "rounds": [{"round", "density", "ratios": [[by series] by layer]}]}; a ratio is
    None where a series has no mask.
    """
    if listing is None:
        return None
    labels = results.summary["drawing"]["series"]
    found: dict[int, dict[str, dict[str, dict[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    densities: dict[int, dict[str, float]] = defaultdict(dict)
    for row in results.rows:
        node = listing.by_key.get(row.node)
        mask = listing.by_key.get(str(node.spec.get("mask"))) if node is not None and node.kind == "train" else None
        # Runs that find a mask train under the mask of the round before: the same masks, of which one is enough.
        if mask is None or mask.kind != "prune" or role_of(row) != "eval":
            continue
        found[row.round][row.series][mask.key] = mask.result["layerwise_ratios"]
        densities[row.round][mask.key] = float(mask.result["density"])
    if not found:
        return None
    present = {series for by_series in found.values() for series in by_series}
    series = [name for name in labels if name in present]
    series += sorted(present - set(series), key=natural_key)
    layers = list(next(iter(next(iter(next(iter(found.values())).values())).values())))
    layers.sort(key=depth_key)
    rounds = []
    for number, by_series in sorted(found.items()):
        table = [
            [_mean([ratios.get(layer) for ratios in by_series.get(name, {}).values()]) for name in series]
            for layer in layers
        ]
        rounds.append({"round": number, "density": fmean(densities[number].values()), "ratios": table})
    return {
        "layers": [layer.removesuffix(".weight") for layer in layers],
        "series": [labels.get(name, name) for name in series],
        "rounds": rounds,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 5) if known else None
