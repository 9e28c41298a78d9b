"""Computes one node and publishes it. A NodeComputer stays warm: it keeps Trainers and open data sets between nodes."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.files import read_tensors, write_tensors
from fastprune.loaders import DataSource, Subset, open_data
from fastprune.loaders.manifest import Manifest
from fastprune.pruning import channels as structured
from fastprune.pruning.allocation import prune, prune_to_ratios
from fastprune.pruning.channels import latency
from fastprune.pruning.coverage import conv_weights
from fastprune.pruning.criteria import criterion, magnitude_scores, random_scores, user_scores
from fastprune.pruning.masks import Mask, layout
from fastprune.specs import (
    COMPUTES,
    ChannelSelection,
    DataSpec,
    GpuOptions,
    Init,
    ModelSpec,
    Prune,
    Ratios,
    Rewind,
    Runnable,
    StateRef,
    Train,
    check_gpu_options,
    n_to_prune,
)
from fastprune.store import RequestedOutputs, RunStore, lpr_name, write_csv
from fastprune.study.plugins import load_modules
from fastprune.study.provenance import environment
from fastprune.training.models import build, initial_model
from fastprune.training.step import EpochMetrics
from fastprune.training.trainer import Trainer
from fastprune.training.tuning import CHOICES, Choices


class Report(Protocol):
    """Called with (epochs of the schedule done, training images since the last call, how the training computes)."""

    def __call__(self, epoch: int, images: int, how: str = "", /) -> None: ...


Files = dict[str, Callable[[Path], Any]]
"""A node's files: name -> function that writes the file at a given path."""


@dataclass(frozen=True)
class Images:
    """The images of a data set: manifest, folder (None: generated) and loader ("auto": each worker chooses one)."""

    manifest: Manifest
    folder: Path | None
    loader: str


@dataclass(frozen=True)
class WorkConfig:
    """What a worker needs beside the node.

    images: by fingerprint. threads: intra-op threads on a CPU. show: progress on stderr while a data set is opened. A
    run writes a checkpoint at the first end of an epoch `checkpoint_seconds` after the last one, and every
    `checkpoint_epochs` epochs. modules: the user's own, imported first. compute: of the Trainers; a resumed run goes on
    as until its checkpoint. gpu_options: those that are forced on or off, by name; of the others, a resumed run has
    what its checkpoint was made with.
    """

    # No field may change a result: none of them is in a node's key.
    store: Path
    images: Mapping[str, Images]
    device: str = "cpu"
    threads: int = 1
    show: bool = False
    checkpoint_seconds: float = 60.0
    checkpoint_epochs: int | None = None
    modules: tuple[str, ...] = ()
    compute: str = "auto"
    gpu_options: Mapping[str, bool] = field(default_factory=dict)


@dataclass
class _Progress:
    """The epochs that a run has completed: their metrics and, by fraction, the LPR at each epoch.

    begin: the epoch of the schedule at which the run starts. parts: a dict for each earlier process that computed a
    part of it: {"from", "to": epochs, and its environment}.
    """

    begin: int
    history: list[EpochMetrics] = field(default_factory=list)
    histories: dict[float, list[dict[str, float]]] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.begin + len(self.history)

    @property
    def before(self) -> str | None:
        """How the run was computed until its checkpoint; None without one, or if an older version wrote it."""
        return self.parts[-1].get("compute") if self.parts else None

    @property
    def options(self) -> GpuOptions | None:
        """The GPU options that the checkpoint was made with; None without one, or without a GPU."""
        text = self.parts[-1].get("gpu_options") if self.parts else None
        return None if text is None else GpuOptions.of(text)

    def lpr_history(self, trainer: Trainer) -> None:
        """Appends the LPR that a prune of the present weights would give. The trainer is not changed."""
        for fraction, rows in self.histories.items():
            rows.append({"epoch": self.epoch, **trainer.preview_prune(fraction).layerwise_ratios()})

    def facts(self, where: dict[str, Any]) -> dict[str, Any]:
        """The progress as JSON values, for a checkpoint. where: the environment of this process."""
        histories = [[fraction, rows] for fraction, rows in self.histories.items()]
        return {
            "history": [m.as_dict() for m in self.history],
            "histories": histories,
            "parts": self.parts_with(where),
        }

    def parts_with(self, where: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts, with that of this process."""
        begin = self.parts[-1]["to"] if self.parts else self.begin
        return [*self.parts, {"from": begin, "to": self.epoch, **where}]

    @classmethod
    def of(cls, begin: int, facts: Any) -> "_Progress":
        """The progress that `facts` gave. ValueError, TypeError or KeyError if it is none."""
        histories = {float(fraction): list(rows) for fraction, rows in facts["histories"]}
        parts = [{**part, "to": int(part["to"])} for part in facts["parts"]]
        progress = cls(begin, [EpochMetrics(**m) for m in facts["history"]], histories, parts)
        if progress.before not in (None, *COMPUTES):
            raise ValueError(f"computed by {progress.before!r}")
        _ = progress.options  # raises for unknown ones
        return progress


class NodeComputer:
    """Computes nodes one after another in this process."""

    def __init__(self, config: WorkConfig) -> None:
        load_modules(config.modules)
        self.config = config
        self.store = RunStore(config.store)
        self._choices = Choices(config.store / CHOICES)
        # oneDNN keeps compiled code for the last 1,024 shapes of convs. Each channel selection brings about 60 new
        # shapes, so that the memory of a warm worker would grow with each.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
        if config.device == "cpu":
            torch.set_num_threads(config.threads)
        elif ":" in config.device:
            torch.cuda.set_device(config.device)  # Triton and CUDA graphs use the current device
        self._sources: dict[str, DataSource] = {}
        self._trainers: dict[tuple[ModelSpec, str], Trainer] = {}
        self._initial: dict[str, dict[str, Tensor]] = {}

    def compute_node(self, node: Runnable, outputs: RequestedOutputs, report: Report) -> tuple[dict[str, Any], int]:
        """Computes and publishes a node whose parents are published; returns (result, epochs computed here).

        outputs: what a training run stores beside its metrics. InputError if a parent is corrupt.
        """
        if isinstance(node, Train):
            return self._train(node, outputs, report)
        began = time.perf_counter()
        made = environment(None, [self.config.device])
        if isinstance(node, Prune):
            source = node.source
            state = self._initial_state(source) if isinstance(source, Init) else read_state(self.store, source)
            result, files = choose_weights(self.store, node, state, self.config.device)
        else:
            manifest = self.config.images[node.source.node.data.fingerprint].manifest
            # Latencies are provenance, not result: they depend on the machine.
            result, files, times = choose_channels(self.store, node, manifest.height, self.config.device)
            made |= times
        made |= _cost(time.perf_counter() - began, None)
        self.store.publish(node, result, made, files)
        return result, 0

    def _train(self, node: Train, outputs: RequestedOutputs, report: Report) -> tuple[dict[str, Any], int]:
        with self._trainer(node) as trainer:
            progress = self._start(trainer, node, outputs)
            epochs_before = progress.epoch
            report(progress.epoch, 0)
            if progress.epoch < node.stop:
                self._fit(trainer, node, outputs, progress, report)
            return self._publish(node, outputs, progress, trainer), progress.epoch - epochs_before

    def _fit(
        self, trainer: Trainer, node: Train, outputs: RequestedOutputs, progress: _Progress, report: Report
    ) -> None:
        """Trains the remaining epochs; appends them to `progress`, writes checkpoints and outputs of passed epochs."""
        saved_at, before, options = time.monotonic(), progress.before, progress.options
        how: str | None = None

        def on_batch(images: int) -> None:
            nonlocal how
            if how is None:  # the first batch has decided how the run computes
                how = trainer.described()
                if before is not None and (line := trainer.resumed(before)):
                    print(f"training {node.key[:8]} {line}", file=sys.stderr)
                if options is not None and (line := trainer.resumed_options(options)):
                    print(f"training {node.key[:8]} {line}", file=sys.stderr)
            report(progress.epoch, images, how)

        def on_epoch(metrics: EpochMetrics) -> None:
            nonlocal saved_at
            progress.history.append(metrics)
            report(progress.epoch, 0)
            if metrics.diverged:  # the run ends here: its last state is published, NaN or not
                return
            progress.lpr_history(trainer)
            if metrics.epoch == node.stop:  # the last state is published from the trainer, without a copy
                return
            # Before the checkpoint: one that has passed an epoch whose output is missing could not be used.
            for what in _asked(outputs, metrics.epoch):
                self.store.save_partial(node, f"{what}-{metrics.epoch}", _writer(trainer, what))
            often = self.config.checkpoint_epochs
            if time.monotonic() - saved_at >= self.config.checkpoint_seconds or (often and metrics.epoch % often == 0):
                facts = progress.facts(self._environment(node, trainer))
                self.store.save_partial(node, "checkpoint", lambda p: write_tensors(p, trainer.state(), facts))
                saved_at = time.monotonic()

        train, val = self._batches(node, trainer.images)
        trainer.fit(
            train,
            val,
            node.optimizer,
            node.schedule,
            start=progress.epoch,
            stop=node.stop,
            report=on_batch,
            on_epoch=on_epoch,
            compute=before,
            strict=before is None,
            gpu_options=options,
        )

    def _publish(self, node: Train, outputs: RequestedOutputs, progress: _Progress, trainer: Trainer) -> dict[str, Any]:
        history, last = progress.history, progress.history[-1]
        metrics, times = zip(*(m.parts() for m in history), strict=True)
        files: Files = {
            "metrics.csv": lambda p: write_csv(p, list(metrics)),
            "times.csv": lambda p: write_csv(p, list(times)),
        }
        for fraction, rows in progress.histories.items():
            files[lpr_name(fraction)] = partial(write_csv, rows=rows)
        for epoch in sorted({*outputs.weights, *outputs.momentum}):
            for what in _asked(outputs, epoch):
                if epoch < last.epoch:
                    passed = self.store.partial_path(node, f"{what}-{epoch}")
                    files[f"{what}-{epoch}.safetensors"] = partial(shutil.copyfile, passed)
                else:  # a run that diverged earlier publishes its last state in place of the epoch's
                    files[f"{what}-{last.epoch}.safetensors"] = _writer(trainer, what)
        # JSON has no NaN, and a diverged run has neither accuracy nor loss to compare.
        result = {
            "epochs": last.epoch,
            "diverged": last.diverged,
            "accuracy": None if last.diverged else last.val_accuracy,
            "loss": last.val_loss if math.isfinite(last.val_loss) else None,
        }
        rate = sum(m.images_per_second for m in history) / len(history)
        seconds = sum(m.seconds for m in history)
        where = self._environment(node, trainer)
        made = {**where, **_cost(seconds, rate)}
        if progress.parts:
            made["parts"] = progress.parts_with(where)
        self.store.publish(node, result, made, files)
        self.store.drop_partial(node)
        return result

    def _start(self, trainer: Trainer, node: Train, outputs: RequestedOutputs) -> _Progress:
        """Loads the checkpoint, or else the start of the run, into the trainer; returns the completed epochs."""
        progress = self._resume(trainer, node, outputs)
        if progress is None:
            progress = _Progress(node.begin, histories={fraction: [] for fraction in outputs.histories})
            # The smaller network of a channel selection holds its start already: it was cut from trained weights.
            if not isinstance(node.mask, ChannelSelection):
                self._load_start(trainer, node.start)
            progress.lpr_history(trainer)
        # After the weights: setting the mask zeroes pruned weights and momentum.
        if isinstance(node.mask, Prune):
            trainer.set_mask(read_mask(self.store, node.mask))
        return progress

    def _load_start(self, trainer: Trainer, start: Init | Rewind) -> None:
        """Loads weights, batch-norm statistics and, if the rewind restores it, momentum into the trainer."""
        if isinstance(start, Init):
            trainer.load_state(self._initial_state(start), momentum=False)
        else:
            load_start(self.store, trainer, start.state, momentum=start.momentum)

    def _resume(self, trainer: Trainer, node: Train, outputs: RequestedOutputs) -> _Progress | None:
        """Loads the checkpoint into the trainer; None if there is none that can be used."""
        path = self.store.partial_path(node, "checkpoint")
        if not path.exists():
            return None
        try:
            state, facts = read_tensors(path)
            progress = _Progress.of(node.begin, facts)
            # Another figure may have started the run with fewer outputs: a checkpoint past an output that it did not
            # store is of no use, and the run starts from its beginning.
            for epoch in (e for e in {*outputs.weights, *outputs.momentum} if e <= progress.epoch):
                for what in _asked(outputs, epoch):
                    if not (passed := self.store.partial_path(node, f"{what}-{epoch}")).exists():
                        return None
                    read_tensors(passed)  # raises if its checksum does not match
            if not set(outputs.histories) <= set(progress.histories):
                return None
            trainer.load_state(state)
        except (TypeError, ValueError, KeyError) as error:
            print(f"unusable checkpoint {path} ({error}); the run starts from its beginning", file=sys.stderr)
            return None
        return progress

    @contextmanager
    def _trainer(self, node: Train) -> Iterator[Trainer]:
        """A Trainer of the node's network: a warm one, or for a smaller network a new one, closed at exit."""
        # The smaller network belongs to this node alone: kept warm, it would hold memory for no later node.
        if isinstance(node.mask, ChannelSelection):
            assert isinstance(node.start, Rewind)
            model = smaller(self.store, node.mask, read_state(self.store, node.start.state), self._size(node.data))
            trainer = self._new_trainer(model, node)
            try:
                yield trainer
            finally:
                trainer.close()
            return
        which = node.model, node.precision
        if which not in self._trainers:
            self._trainers[which] = self._new_trainer(build(node.model), node)
        yield self._trainers[which]

    def _new_trainer(self, model: nn.Module, node: Train) -> Trainer:
        check_gpu_options(self.config.gpu_options, self.config.device)
        trainer = Trainer(
            model,
            device=self.config.device,
            precision=node.precision,
            compute=self.config.compute,
            gpu_options=self.config.gpu_options,
            choices=self._choices,
        )
        if self.config.compute == "sparse" and trainer.not_sparse:  # holds for all nodes: the run ends
            raise InputError(f"--compute sparse is not possible here: {trainer.not_sparse}")
        return trainer

    def _initial_state(self, init: Init) -> dict[str, Tensor]:
        if init.key not in self._initial:  # only the last is kept: the chains of one seed share it
            state = initial_model(init).state_dict()
            self._initial = {init.key: {f"model.{name}": tensor for name, tensor in state.items()}}
        return self._initial[init.key]

    def _size(self, data: DataSpec) -> int:
        return self.config.images[data.fingerprint].manifest.height

    def _batches(self, node: Train, dtype: torch.dtype) -> tuple[Any, Any]:
        data, batch_size = node.data, node.optimizer.batch_size
        if data.fingerprint not in self._sources:
            c, found = self.config, self.config.images[data.fingerprint]
            self._sources[data.fingerprint] = open_data(
                found.manifest, found.folder, loader=found.loader, device=c.device, show=c.show
            )
        source = self._sources[data.fingerprint]
        subset = Subset(data.classes, data.train_per_class, data.val_per_class)
        how = {"batch_size": batch_size, "subset": subset, "dtype": dtype}
        return source.train(seed=node.seed, **how), source.val(**how)

    def _loader(self, node: Train) -> str | None:
        """The loader in use; None if no data was opened."""
        source = self._sources.get(node.data.fingerprint)
        return None if source is None else source.loader

    def _environment(self, node: Train, trainer: Trainer) -> dict[str, Any]:
        how = {"compute": trainer.computed} | ({"not_sparse": trainer.reason} if trainer.reason else {})
        if trainer.recorded_options is not None:
            how["gpu_options"] = trainer.recorded_options
        return environment(self._loader(node), [self.config.device]) | how


def _cost(seconds: float, rate: float | None) -> dict[str, Any]:
    return {"wall_seconds": seconds, "images_per_second": rate, "at": time.time()}


def _asked(outputs: RequestedOutputs, epoch: int) -> list[str]:
    """Which of "state" and "momentum" is stored after `epoch`."""
    return [what for what, epochs in (("state", outputs.weights), ("momentum", outputs.momentum)) if epoch in epochs]


def _writer(trainer: Trainer, what: str) -> Callable[[Path], Any]:
    """A function that writes the trainer's "state" (weights, batch-norm statistics) or its "momentum"."""

    def write(path: Path) -> None:
        state = trainer.state().items()
        write_tensors(path, {k: t for k, t in state if k.startswith("model.") == (what == "state")})

    return write


_LATENCY_BATCH = {"cpu": 8, "cuda": 64}
"""Images. Few on a CPU, so that rounds are short; more on a GPU, which a small batch leaves waiting for its host."""

_HUGE = 1e30
"""A score in place of NaN or infinity: finite, and larger than any that a network reaches."""


def read_mask(store: RunStore, node: Prune) -> Mask:
    """The mask of a published prune step. InputError if it is corrupt."""
    path = store.mask(node)
    with _to_be_made_again(path):
        return Mask.load(path)


def read_state(store: RunStore, ref: StateRef, *, momentum: bool = False) -> dict[str, Tensor]:
    """Weights and batch-norm statistics ("model.NAME") of a published run, with its momentum ("momentum.NAME") on
    request. InputError if a file is corrupt, RuntimeError if the run has not stored it."""
    state: dict[str, Tensor] = {}
    for what in ("state", "momentum") if momentum else ("state",):
        path = store.state(ref, what)
        if path is None:
            raise RuntimeError(f"training {ref.node.key} has no {what} after epoch {ref.epoch}")
        with _to_be_made_again(path):
            state |= read_tensors(path)[0]
    return state


def _foreign(store: RunStore, ref: StateRef | Init, why: str) -> Exception:
    """The error to raise for a state that does not fit the network."""
    # Initial weights are computed, not read: if they do not fit, no file is corrupt.
    path = None if isinstance(ref, Init) else store.state(ref)
    return ValueError(why) if path is None else store.corrupt(path, why)


def load_start(store: RunStore, trainer: Trainer, ref: StateRef, *, momentum: bool) -> None:
    """Loads a state of a published run into the trainer. InputError if it belongs to another network."""
    state = read_state(store, ref, momentum=momentum)
    try:
        trainer.load_state(state, momentum=momentum)
    except ValueError as error:
        raise _foreign(store, ref, str(error)) from error


def choose_weights(
    store: RunStore, node: Prune, state: dict[str, Tensor], device: str = "cpu"
) -> tuple[dict[str, Any], Files]:
    """(result, files) of a prune step; the mask is chosen on `device`. state: that of the step's source."""
    if node.prior is not None:
        mask = read_mask(store, node.prior)
    else:
        with torch.device("meta"):  # only names and shapes are needed
            model = build(node.model)
        mask = Mask.dense(layout(conv_weights(model)))
    # Random scores are float64, and select the same weights on each machine: they are drawn and sorted on the CPU.
    if node.criterion != "random":
        mask = Mask(mask.keep.to(device), mask.segments)
    scores = _scores(store, node, mask, state)
    if isinstance(node.allocation, Ratios):
        new = prune_to_ratios(scores, mask, read_mask(store, node.allocation.mask).layerwise_ratios())
        # Allocations can be compared at equal sparsity only.
        if mask.kept - new.kept != n_to_prune(mask.kept, node.fraction):
            raise ValueError("the layerwise ratios are of a mask with another sparsity")
    else:
        new = prune(scores, mask, node.fraction, node.allocation)
    ratios = new.layerwise_ratios()
    result = {
        "round": node.round,
        "total": new.total,
        "kept": new.kept,
        "density": new.density,
        "layerwise_ratios": ratios,
        "dead": sum(ratio == 1.0 for ratio in ratios.values()),
    }
    return result, {"mask.safetensors": new.save, "layers.csv": lambda p: p.write_text(new.ratios_csv())}


def _scores(store: RunStore, node: Prune, mask: Mask, state: dict[str, Tensor]) -> Tensor:
    """The score of each weight, in the mask's storage order, on the mask's device."""
    if node.criterion == "random":
        return random_scores(mask, node.seed, node.round)
    weights = _model_state(state)
    for s in mask.segments:
        if s.name not in weights or tuple(weights[s.name].shape) != s.shape:
            raise _foreign(store, node.source, f"it has no {s.name} of shape {s.shape}")
    if node.criterion == "magnitude":
        return magnitude_scores(weights, mask)
    if isinstance(node.criterion, str):
        raise ValueError(f"cannot prune by criterion {node.criterion!r}")
    # A user's module may have changed since the figure was planned, or differ between machines.
    used = criterion(node.criterion.name)
    if used.version != node.criterion.version:
        raise InputError(
            f"criterion {used.name} has version {used.version}, the mask requires {node.criterion.version}; "
            "import the same --figure-module in all processes of a run"
        )
    return user_scores(used, weights, mask)


def choose_channels(
    store: RunStore, node: ChannelSelection, image_size: int, device: str
) -> tuple[dict[str, Any], Files, dict[str, Any]]:
    """(result, files, provenance) of a channel selection.

    The result gives the numbers of filters, and parameters and FLOPs per image of the smaller and the dense network.
    The provenance gives the milliseconds of a batch for both networks, measured in turn on `device`, and their ratio
    with its quartiles over rounds.
    """
    state = read_state(store, node.source)
    model = _with_weights(node, state)
    groups = structured.channel_groups(model, image_size)
    scores = structured.gamma_scores(groups, _model_state(state))
    # A run that diverged gets a selection, too: its fine-tuning then appears in the figure as diverged, not as missing.
    scores = {name: torch.nan_to_num(s, nan=_HUGE, posinf=_HUGE) for name, s in scores.items()}
    selection = structured.select(groups, scores, node.fraction)
    small = structured.remove(_with_weights(node, state), selection, image_size)
    kept = structured.kept_filters(selection, groups)
    channels = sum(group.channels for group in groups)
    removed = channels - sum(map(len, selection.kept.values()))
    filters = {name: group.channels for group in groups for name in group.layers}
    before, after = (structured.cost(m, image_size) for m in (model, small))
    batch = _LATENCY_BATCH[torch.device(device).type]
    times = latency({"whole": model, "small": small}, image_size, batch, device)
    result = {
        "fraction": node.fraction,
        "channels": channels,
        "removed": removed,
        "removed_fraction": removed / channels,
        "filters": sum(filters.values()),
        "filters_kept": sum(kept.values()),
        "groups": len(groups),
        "spared": list(selection.spared),
        "layerwise_ratios": {name: 1.0 - kept[name] / n for name, n in filters.items()},
        "parameters": after.parameters,
        "parameters_whole": before.parameters,
        "flops": after.flops,
        "flops_whole": before.flops,
    }
    small_times, whole_times = times["small"], times["whole"]
    measured = {
        "latency_ms": small_times.ms,
        "latency_whole_ms": whole_times.ms,
        "latency_relative": small_times.relative,
        "latency_quartiles": list(small_times.quartiles),
        "latency_rounds": small_times.rounds,
        "latency_batch": batch,
    }

    def layers(path: Path) -> None:
        write_csv(path, [{"layer": name, "filters": n, "kept": kept[name]} for name, n in filters.items()])

    described = json.dumps(selection.as_dict(), indent=1, sort_keys=True) + "\n"
    return result, {"channels.json": lambda p: p.write_text(described), "layers.csv": layers}, measured


def smaller(store: RunStore, node: ChannelSelection, state: dict[str, Tensor], image_size: int) -> nn.Module:
    """The network of `state` without the filters that a published selection removes. InputError if that is corrupt."""
    path = store.channels(node)
    try:
        selection = structured.Selection.from_dict(json.loads(path.read_text()))
        return structured.remove(_with_weights(node, state), selection, image_size)
    except (OSError, ValueError) as error:
        raise store.corrupt(path, error) from error


def _with_weights(node: ChannelSelection, state: dict[str, Tensor]) -> nn.Module:
    model = build(node.model)
    model.load_state_dict(_model_state(state))
    return model


def _model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}


@contextmanager
def _to_be_made_again(path: Path) -> Iterator[None]:
    """Adds to an InputError on a published node's file what to do."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete the folder {path.parent} to recompute the node") from error
