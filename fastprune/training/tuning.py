"""Which GPU options a training uses: chosen on the machine, by timing its captured step with and without each of them.

What a kernel gains depends on device, versions and shapes, and its bits differ from torch's by rounding. So each choice
is made once for a device type, versions and shape, and kept: by a process, or by all processes that share a folder.
"""

import hashlib
import json
import os
import secrets
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastprune.console import printable, version_of
from fastprune.files import flush
from fastprune.specs import GpuOptions

CHOICES = "choices"
"""The name of the folder of a store in which choices are kept."""

STEPS = 20
"""Replays of a captured step that are timed with an option, in turn with as many without."""

_GAIN = 0.01
"""An option is used if a step takes at least this fraction less with it: for less, other bits are not worth it."""

_APART = 0.25
"""By how much the length and the loss of the first step with an option may differ from those without.

Not the step itself: of an untrained ResNet-50 the gradients in bf16 and fp32 have nothing in common but their length,
which differs by up to 10 %, and the loss by 3 % (measured on a CPU). So this finds what is grossly wrong, no more.
"""

_WARM = 5
"""Steps before a replay is timed: a GraphedStep computes three eagerly, then captures; first replays are slow."""

Timing = tuple[float, float] | str
"""Milliseconds of a step without an option and with it, or why it cannot be used."""

Measure = Callable[[GpuOptions, GpuOptions], Timing]
"""measure(without, with): the Timing of the one option in which both differ."""


@dataclass(frozen=True)
class Choice:
    """The options to use, and the Timing of each that was tried."""

    options: GpuOptions
    timings: Mapping[str, Timing]

    def __str__(self) -> str:
        """In a line: "fused_norm on (1.950 ms a step, 2.100 without), fused_loss off (CompilationError: ...)"."""
        return ", ".join(self._about(name, on) for name, on in asdict(self.options).items())

    def _about(self, name: str, on: bool) -> str:
        timing = self.timings.get(name)
        said = f"{name} {'on' if on else 'off'}"
        if timing is None:
            return said
        if isinstance(timing, str):
            return f"{said} ({timing})"
        return f"{said} ({timing[1]:.3f} ms a step, {timing[0]:.3f} without)"

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Choice":
        """From `asdict`'s JSON. ValueError, TypeError, KeyError or AttributeError for anything else."""
        options = GpuOptions(**found["options"])
        if not all(isinstance(on, bool) for on in asdict(options).values()):
            raise ValueError("an option is neither true nor false")
        timings = {
            name: t if isinstance(t, str) else (float(t[0]), float(t[1])) for name, t in found["timings"].items()
        }
        return cls(options, timings)


def choose(names: Sequence[str], forced: Mapping[str, bool], measure: Measure) -> Choice:
    """Tries the options `names`, one after the other: each beside those that were found faster before it.

    forced: the options that are not tried, on or off; others that `names` lacks are off.
    """
    best, timings = GpuOptions(**forced), dict[str, Timing]()
    for name in names:
        candidate = replace(best, **{name: True})
        timings[name] = timing = measure(best, candidate)
        if not isinstance(timing, str) and timing[1] <= (1 - _GAIN) * timing[0]:
            best = candidate
    return Choice(best, timings)


def machine(device: torch.device) -> dict[str, Any]:
    """What of the machine a choice depends on: device type and versions, as JSON values."""
    versions: dict[str, Any] = {name: version_of(name) for name in ("fastprune", "triton")}
    versions |= {"torch": str(torch.__version__), "cudnn": torch.backends.cudnn.version()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "versions": versions}


class Choices:
    """One choice for each question, of this process or, with `folder`, of all processes that share it.

    A question is what a choice depends on, as JSON values. The folder is created when the first choice is kept.
    """

    # As with nodes in a store: no locks. Two processes may time the same, which costs a minute; the first to publish
    # wins.

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[str, Choice] = {}

    def get(self, question: Mapping[str, Any], make: Callable[[], Choice]) -> Choice:
        """The kept choice, else that of `make`, which is kept then. Prints a line when this process first has it, which
        also says if the folder cannot be written."""
        content = json.dumps(question, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()[:32]
        if key not in self._known:
            found = self._read(key, content)
            by = f" (kept in {self._folder})"
            if found is None:
                found, by = make(), ""
                try:
                    if self._folder is not None and not self._publish(key, content, found):
                        found, by = self._read(key, content) or found, " (another process was faster)"
                except OSError as error:  # a run that writes elsewhere needs no store
                    by = f" (not kept in {self._folder}: {error.strerror})"
            self._known[key] = found
            images = " x ".join(map(str, question.get("images", ())))
            print(printable(f"fastprune: GPU options for batches of {images}: {found}{by}"), file=sys.stderr)
        return self._known[key]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key

    def _read(self, key: str, question: str) -> Choice | None:
        """The published choice; None if there is none. A damaged one is removed, with a line."""
        if self._folder is None:
            return None
        path = self._path(key) / "choice.json"
        try:
            found = json.loads(path.read_bytes())
            if json.dumps(found["question"], sort_keys=True) != question:
                raise ValueError("it answers another question")
            return Choice.of(found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            why = printable(f"fastprune: {path} is damaged ({type(error).__name__}: {error}); options are timed anew")
            print(why, file=sys.stderr)
            shutil.rmtree(path.parent, ignore_errors=True)
            return None

    def _publish(self, key: str, question: str, choice: Choice) -> bool:
        """Whether this process was the first. OSError if the folder cannot be written."""
        path = self._path(key)
        # A folder, as a node in the store: a rename replaces no folder that has files, so that a choice never changes.
        aside = path.with_name(f".{key}.{secrets.token_hex(4)}")
        try:
            aside.mkdir(parents=True)
            content = {"question": json.loads(question), **asdict(choice)}
            (aside / "choice.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
            flush(aside / "choice.json")
            os.rename(aside, path)
        except OSError:
            if not (path / "choice.json").exists():
                raise
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        flush(path.parent)
        return True


class Rehearsal(Protocol):
    """Training steps on one batch by a copy of a Trainer, which leave the Trainer itself as it is."""

    def begin(self, options: GpuOptions) -> None:
        """Goes back to the Trainer's weights and to no momentum; from here on with these options."""

    def step(self) -> None:
        """A training step."""

    def changes(self) -> list[Tensor]:
        """What the steps since `begin` have changed, as vectors whose lengths hardly depend on rounding."""

    def close(self) -> None:
        """Frees the copy."""


class StepTimer:
    """A Measure: times the steps of a rehearsal. An option fails if its step does, or if it changes more or less than
    the step without it, beyond rounding.

    rehearse: makes a rehearsal. clock: runs a step, and gives the device's milliseconds.
    """

    def __init__(
        self, rehearse: Callable[[], Rehearsal], clock: Callable[[Callable[[], None]], float] | None = None
    ) -> None:
        self._rehearse, self._clock = rehearse, clock or device_milliseconds
        self._rehearsal: Rehearsal | None = None
        self._first: dict[GpuOptions, list[float]] = {}  # what the first step changes, with those that are captured

    def __call__(self, without: GpuOptions, added: GpuOptions) -> Timing:
        # The one place that takes an exception for an answer: an option that fails is no reason to end a run that does
        # not need it. What fails without it is the run's own fault, which its own first step would meet, too.
        try:
            rehearsal = self._rehearsal = self._rehearsal or self._rehearse()
        except Exception as error:
            return f"not timed, no copy of the model can be made: {_reason(error)}"
        try:
            expected = self._prepared(rehearsal, without)
        except torch.OutOfMemoryError as error:  # a copy needs a little more than the run
            self.close()
            return f"not timed: {_reason(error)}"
        try:
            found = self._prepared(rehearsal, added)
            # In fp16 a first step whose gradients overflow is skipped: then both lengths are zero. A NaN is no number.
            if not all(abs(a - b) <= _APART * b for a, b in zip(found, expected, strict=True)):
                return "its step differs by more than rounding"
            times: dict[GpuOptions, list[float]] = {without: [], added: []}
            for _ in range(STEPS):  # in turn, so that both see the same clock rate and the same neighbours
                for options, those in times.items():
                    rehearsal.begin(options)
                    those.append(self._clock(rehearsal.step))
            return statistics.median(times[without]), statistics.median(times[added])
        except Exception as error:
            # A capture that failed may leave its memory pool unusable.
            self.close()
            return _reason(error)

    def _prepared(self, rehearsal: Rehearsal, options: GpuOptions) -> list[float]:
        """Compiles and captures a step; returns the lengths of what the first one changes."""
        if options not in self._first:
            rehearsal.begin(options)
            rehearsal.step()
            lengths = [change.double().norm().item() for change in rehearsal.changes()]
            for _ in range(_WARM - 1):
                rehearsal.step()
            self._first[options] = lengths
        return self._first[options]

    def close(self) -> None:
        """Frees the rehearsal; the next call makes another."""
        self._first.clear()
        if self._rehearsal is not None:
            self._rehearsal.close()
        self._rehearsal = None


def device_milliseconds(step: Callable[[], None]) -> float:
    """Runs a step on the current CUDA device; the time that the device takes for it."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    step()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended))


def _reason(error: Exception) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])[:200]
