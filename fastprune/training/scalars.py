"""Scalars of trainings where people look at them: a CSV file, TensorBoard, Weights & Biases."""

# Standard library only at the top: the packages are optional, and the flags are read without them.

import csv
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fastprune.errors import InputError

LOGS = ("csv", "tensorboard", "wandb")

Values = Mapping[str, float | None]
"""By name; None where there is nothing to log."""


class ScalarLog(Protocol):
    """Receives the scalars of one training, step after step."""

    def add(self, step: int, values: Values) -> None:
        """The values after `step` steps (epochs, from 1)."""

    def close(self) -> None:
        """Writes what is not written yet."""


PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_logs(kinds: Iterable[str]) -> None:
    """InputError for a log, one of LOGS, whose package cannot be imported: found before hours of training."""
    for kind in kinds:
        try:
            if kind in PACKAGES:
                import_module(PACKAGES[kind])
        except ImportError as error:
            raise InputError(
                f"--log {kind} needs {kind}, which cannot be imported ({error}): run pip install 'fastprune[{kind}]'"
            ) from None


def open_log(kind: str, folder: Path, *, name: str, config: Mapping[str, Any], done: int = 0) -> ScalarLog:
    """The log `kind`, one of LOGS, in `folder`: metrics.csv, tensorboard/ or wandb/.

    name, config: of the training.  done: steps that a resumed training has done; later ones in the log are of no worth.
    InputError as of `check_logs`.
    """
    check_logs([kind])
    kinds: dict[str, Callable[..., ScalarLog]] = {"csv": _Csv, "tensorboard": _TensorBoard, "wandb": _Wandb}
    return kinds[kind](folder, name, config, done)


class _Csv:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        if done and self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as f:
                self._rows = [row for row in csv.DictReader(f) if int(row["epoch"]) <= done]

    def add(self, step: int, values: Values) -> None:
        self._rows.append({"epoch": step, **values})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        # Written whole: a column may be new since a resume, and a file of hundreds of lines is nothing.
        with self._path.open("w", newline="", encoding="utf-8") as f:
            rows = csv.DictWriter(f, columns, lineterminator="\n")
            rows.writeheader()
            rows.writerows(self._rows)

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        self._writer.add_text("command", "  \n".join(f"{key}: {value}" for key, value in config.items()), done)

    def add(self, step: int, values: Values) -> None:
        for name, value in _given(values):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], done: int) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # Without its own capture of the console, which the command prints for the user.
        settings = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(
            project="fastprune", name=name, dir=str(folder), config=dict(config), settings=settings, reinit="create_new"
        )

    def add(self, step: int, values: Values) -> None:
        self._run.log(dict(_given(values)), step=step)

    def close(self) -> None:
        self._run.finish()


def _given(values: Values) -> Iterable[tuple[str, float]]:
    return ((name, value) for name, value in values.items() if value is not None)
