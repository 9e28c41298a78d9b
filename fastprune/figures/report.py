"""What a run leaves in its folder, and the plain summary on the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastprune.errors import InputError
from fastprune.figures.claims import Claim, Verdict, judge
from fastprune.figures.draw import Drawing, density_curves
from fastprune.figures.results import Row, curve, read_csv, write_atomic, write_csv

CSV, SUMMARY = "results.csv", "summary.json"


@dataclass(frozen=True)
class Report:
    """A finished figure: rows, how they are drawn, what is claimed, and what it took.

    decisive: False where the preset only shows the machinery. facts: what else belongs into summary.json (settings,
    data, cost, environment), plain values by name.
    """

    figure: str
    rows: Sequence[Row]
    drawing: Drawing
    claims: Sequence[Claim]
    decisive: bool
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdicts(self) -> list[Verdict]:
        chance = self.drawing.chance
        assert chance is not None, "claims about accuracy need the accuracy of guessing"
        return [judge(claim, self.rows, chance=chance, decisive=self.decisive) for claim in self.claims]


def write_all(report: Report, folder: Path) -> list[Path]:
    """Writes results.csv, summary.json, figure.png and figure.pdf, each atomically; returns their paths.

    InputError where the folder cannot be written.
    """
    write_csv(folder / CSV, report.rows)
    summary = {
        "figure": report.figure,
        "claims": [asdict(verdict) for verdict in report.verdicts],
        "drawing": asdict(report.drawing),
        **report.facts,
    }
    write_atomic(folder / SUMMARY, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    return [folder / CSV, folder / SUMMARY, *density_curves(report.rows, report.drawing, folder)]


def redraw(folder: Path, default: Drawing) -> list[Path]:
    """Draws again from results.csv, as summary.json says it was drawn, or as `default` where that is gone."""
    rows = read_csv(folder / CSV)
    drawing = default
    if (folder / SUMMARY).exists():
        try:
            drawing = Drawing(**json.loads((folder / SUMMARY).read_text())["drawing"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / SUMMARY} is damaged ({error!r}): delete it to draw without it") from error
    return list(density_curves(rows, drawing, folder))


def terminal_summary(report: Report) -> str:
    """Per panel a few rounds of each series, then the claims: plain text, at most 100 columns."""
    lines = []
    for panel, title in report.drawing.panels.items():
        lines += ["", f"{panel}) {title}: top-1 accuracy in %, mean and standard deviation over seeds"]
        lines += _table(report, panel)
    lines += ["", "Claims of the caption:"]
    for verdict in report.verdicts:
        effect = ""
        if verdict.effect is not None:
            effect = f"{verdict.effect:+.1f} points"
            if verdict.interval is not None:
                effect += f", 95 % interval {verdict.interval[0]:+.1f} to {verdict.interval[1]:+.1f}"
        lines.append(f"  {verdict.verdict:<10} {verdict.text}")
        lines += [f"  {'':<10} {text}" for text in (effect, verdict.why) if text]
    return "\n".join(lines)


def _table(report: Report, panel: str) -> list[str]:
    names = list(report.drawing.series)
    curves = {name: {p.round: p for p in curve(report.rows, panel, name, report.drawing.chance)} for name in names}
    rounds = sorted({number for points in curves.values() for number in points})
    if len(rounds) > 6:
        rounds = sorted({rounds[round(i * (len(rounds) - 1) / 5)] for i in range(6)})
    lines = [f"  {'remaining':>10}  " + "".join(f"{name:>14}" for name in names)]
    for number in rounds:
        density = next(points[number].x for points in curves.values() if number in points)
        cells = []
        for name in names:
            point = curves[name].get(number)
            text = "-" if point is None or point.mean is None else f"{100 * point.mean:.1f}"
            if point is not None and point.std is not None:
                text += f" ± {100 * point.std:4.1f}"
            if point is not None and point.diverged:
                text += f" ({point.diverged}x)"
            cells.append(f"{text:>14}")
        lines.append(f"  {density:>10.4f}  " + "".join(cells))
    return lines
