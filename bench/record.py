"""The JSON file of what a device gave: checks, times and targets of one state of the code, and what is left to do."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rows
from bench.checks import Outcome
from bench.child import ROOT
from bench.targets import TARGETS, Target

SAME = ("device", "code", "torch", "triton", "small")
"""Facts that must be equal for results to stand in one file: a ratio of two programs would mean nothing."""
FAILURES = 30
"""Failed tests whose tracebacks are kept."""


def code() -> str:
    """A hash of the product's Python files: 12 hex digits. Without git, as where only the working tree is copied to."""
    found = hashlib.sha256()
    for folder in ("fastprune", "kernels", "loaders"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:12]


class Record:
    """The results so far.

    checks: outcomes by test file. failures: ends of tracebacks by test. rows: figures by group and row. errors: a line
    for each row that could not be timed. seconds: by task how long it took. left: by part the tasks that are to be
    done yet; those that failed or were cut last.
    """

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        """Goes on from what the file holds of the same SAME facts; ignores others."""
        self.file, self.facts = file, facts
        before = json.loads(file.read_text()) if file.exists() else {}
        if any(before.get(name) != facts[name] for name in SAME):
            before = {}
        self.copy_rate: float | None = before.get("copy_gb_per_s")
        self.matrix_rate: float | None = before.get("matrix_tflop_per_s")
        self.checks: dict[str, Outcome] = before.get("checks", {})
        self.failures: dict[str, str] = before.get("failures", {})
        self.rows: dict[str, dict[str, dict[str, Any]]] = before.get("rows", {})
        self.errors: dict[str, str] = before.get("errors", {})
        self.seconds: dict[str, float] = before.get("seconds", {})
        self.left: dict[str, list[str]] = before.get("left", {})

    def save(self) -> None:
        """Replaces the file: the summary first, then facts, targets and what went wrong, then all figures."""
        content = {"summary": self.summary(), **self.facts}
        content |= {"copy_gb_per_s": self.copy_rate, "matrix_tflop_per_s": self.matrix_rate}
        content |= {"targets": [judged.as_dict() for judged in self.judged()]}
        content |= {name: getattr(self, name) for name in ("errors", "left", "failures", "checks", "rows", "seconds")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a run that is killed while it writes leaves the file of before.
        aside = self.file.with_name(f".{self.file.name}")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(self.file)

    def begin(self, part: str, names: Sequence[str]) -> list[str]:
        """Those of the tasks `names` that are left of a part; all, where none of them is."""
        left = self.left.get(part, [])
        todo = [name for name in left if name in names] or list(names)
        self.left[part] = todo + [name for name in left if name not in todo]
        return list(todo)

    def done(self, part: str, name: str, *, well: bool) -> None:
        """Takes a task off those that are left; unless it went well, it is put last."""
        self.left[part].remove(name)
        if not well:
            self.left[part].append(name)

    def checked(self, file: str, texts: dict[str, str]) -> None:
        """Replaces the tracebacks of a test file."""
        kept = {test: text for test, text in self.failures.items() if not test.startswith(f"{file}::")}
        kept |= {f"{file}::{test}": text for test, text in texts.items()}
        self.failures = dict(list(kept.items())[:FAILURES])

    def put(self, group: str, found: dict[str, dict[str, Any]], errors: dict[str, str]) -> None:
        """Replaces the rows of a group, to which it adds rates and ratios, and the errors of those that failed."""
        if group == rows.COPY and found:
            self.copy_rate = max(f["bytes"] / f["ms"] / 1e6 for f in found.values())
        if group == rows.PRODUCT and found:
            self.matrix_rate = max(f["flop"] / f["ms"] / 1e9 for f in found.values())
        rows.compare(found, self.copy_rate, self.matrix_rate)
        self.rows.pop(group, None)
        if found:
            self.rows[group] = found
        self.fail(group, errors)

    def fail(self, group: str, errors: dict[str, str]) -> None:
        """Replaces the errors of a group, by row, "" for the whole; rows of an earlier run stay."""
        for error in self.errors_of(group):
            del self.errors[error]
        self.errors |= {f"{group}: {row}" if row else group: why for row, why in errors.items()}

    def errors_of(self, group: str) -> dict[str, str]:
        return {what: why for what, why in self.errors.items() if what == group or what.startswith(f"{group}: ")}

    @property
    def failed(self) -> list[str]:
        """A line for each failed test."""
        return [
            f"{file}{'::' if test else ''}{test}: {why}"
            for file, found in self.checks.items()
            for test, why in found["failed"].items()
        ]

    @property
    def skipped(self) -> dict[str, int]:
        """Numbers of skipped tests by reason, the most frequent first."""
        reasons: dict[str, int] = {}
        for found in self.checks.values():
            for why, number in found["skipped"].items():
                reasons[why] = reasons.get(why, 0) + number
        return dict(sorted(reasons.items(), key=lambda item: -item[1]))

    def judged(self) -> list["Judged"]:
        return [Judged.of(target, self) for target in TARGETS]

    def summary(self) -> str:
        """One line: what was found, worst first, and what is left."""
        passed = sum(found["passed"] for found in self.checks.values())
        words = []
        if self.checks:
            words.append(f"checks: {len(self.failed)} FAILED" if self.failed else "checks: none failed")
            words.append(f"{passed} passed, {sum(self.skipped.values())} skipped")
        else:
            words.append("checks: none run")
        words.append(f"timed: {len(self.rows)} groups" + (f", {len(self.errors)} ERRORS" if self.errors else ""))
        verdicts = [judged.verdict for judged in self.judged()]
        counts = {word: verdicts.count(word) for word in dict.fromkeys(verdicts)}
        words.append("targets: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
        left = ", ".join(f"{len(names)} of {part}" for part, names in self.left.items() if names)
        return "; ".join([*words, f"left: {left or 'nothing'}"])


@dataclass(frozen=True)
class Judged:
    """A target beside what was measured, all in `unit`; None where that is not known.

    floor: no version is faster: bytes or operations at the rates measured on this device.
    """

    what: str
    unit: str
    floor: float | None
    predicted: tuple[float, float]
    measured: float | None
    limit: float
    at_least: bool
    verdict: str

    @classmethod
    def of(cls, target: Target, record: Record) -> "Judged":
        facts = record.rows.get(target.group, {}).get(target.row, {})
        value, over = facts.get(target.figure), facts.get("over_floor")
        met = value is not None and (value >= target.limit if target.at_least else value <= target.limit)
        on_gpu = not record.facts["device"].startswith("cpu")
        verdict = (
            "not judged on a CPU" if not on_gpu else "not measured" if value is None else "met" if met else "missed"
        )
        unit, floor, scale = target.unit, None, 1.0
        if target.figure == "over_floor":
            floor = 1.0
            if value is not None:  # then as times, which tell more than multiples of a floor
                unit, scale = "us", 1e3 * facts["ms"] / value
        elif target.figure == "images_per_s" and value is not None and over is not None:
            floor = value * over
        return cls(
            f"{target.group}: {target.row}",
            unit,
            None if floor is None else floor * scale,
            (target.predicted[0] * scale, target.predicted[1] * scale),
            None if value is None else value * scale,
            target.limit * scale,
            target.at_least,
            verdict,
        )

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def number(value: float | None) -> str:
    """Three digits or more; "-" for what is not known."""
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(judged: Sequence[Judged]) -> Iterable[str]:
    """Lines: the targets, each with its floor, prediction, measurement, limit and verdict."""
    width = max(len(j.what) for j in judged)
    yield f"{'target':<{width}} {'unit':<9}{'floor':>9}{'predicted':>18}{'measured':>10}{'limit':>11}  verdict"
    for j in judged:
        predicted, sign = "-".join(map(number, j.predicted)), ">=" if j.at_least else "<="
        cells = f"{number(j.floor):>9}{predicted:>18}{number(j.measured):>10}{f'{sign} {number(j.limit)}':>11}"
        yield f"{j.what:<{width}} {j.unit:<9}{cells}  {j.verdict}"
