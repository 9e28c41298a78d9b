"""Prune steps and filter selections as the store keeps them: what is read, chosen and written."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import structured
from fastprune.errors import InputError
from fastprune.flat import layout, prunable
from fastprune.latency import latency
from fastprune.masks import Mask
from fastprune.models import build
from fastprune.pruning import magnitude_scores, prune, prune_to_ratios, random_scores
from fastprune.specs import SCORES, Filters, Init, Prune, Ratios, StateRef, n_to_prune
from fastprune.store import RunStore, write_csv
from fastprune.tensors import read_tensors
from fastprune.train import Trainer

_LATENCY_BATCH = 64
_HUGE = 1e30

Chosen = tuple[dict[str, Any], dict[str, Callable[[Path], Any]]]
"""A node's result, and its files by name with the functions that write them."""


def read_mask(store: RunStore, node: Prune) -> Mask:
    """The mask of a published prune step. InputError, saying what to do, if it is damaged."""
    path = store.mask(node)
    with _to_be_made_again(path):
        return Mask.load(path)


def read_state(store: RunStore, ref: StateRef, *, momentum: bool = False) -> dict[str, Tensor]:
    """Weights and batch-norm statistics ("model.NAME") of a published run, and its momentum ("momentum.NAME")."""
    state: dict[str, Tensor] = {}
    for what in ("state", "momentum") if momentum else ("state",):
        path = store.state(ref, what)
        if path is None:
            raise RuntimeError(f"training {ref.node.key} has no {what} after epoch {ref.epoch}")
        with _to_be_made_again(path):
            state |= read_tensors(path)[0]
    return state


def _foreign(store: RunStore, ref: StateRef | Init, why: str) -> Exception:
    path = None if isinstance(ref, Init) else store.state(ref)
    return ValueError(why) if path is None else store.damaged(path, why)


def load_start(store: RunStore, trainer: Trainer, ref: StateRef, *, momentum: bool) -> None:
    """Puts the trainer where a published run was. InputError where that is another network's."""
    state = read_state(store, ref, momentum=momentum)
    try:
        trainer.load_state(state, momentum=momentum)
    except ValueError as error:
        raise _foreign(store, ref, str(error)) from error


def choose_weights(store: RunStore, node: Prune, state: dict[str, Tensor]) -> Chosen:
    """The mask of a prune step; `state` is that of its source."""
    if node.prior is not None:
        mask = read_mask(store, node.prior)
    else:
        with torch.device("meta"):
            model = build(node.model)
        mask = Mask.dense(layout(prunable(model)))
    if node.score not in SCORES:
        raise ValueError(f"cannot prune by score {node.score!r}")
    if node.score == "random":
        scores = random_scores(mask, node.seed, node.round)
    else:
        weights = _model_state(state)
        for s in mask.segments:
            if s.name not in weights or tuple(weights[s.name].shape) != s.shape:
                raise _foreign(store, node.source, f"no {s.name} of shape {s.shape} in it")
        scores = magnitude_scores(weights, mask)
    if isinstance(node.allocation, Ratios):
        new = prune_to_ratios(scores, mask, read_mask(store, node.allocation.mask).layerwise_ratios())
        if mask.kept - new.kept != n_to_prune(mask.kept, node.fraction):
            raise ValueError("the ratios are those of a mask of another sparsity")
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


def choose_filters(store: RunStore, node: Filters, image_size: int, device: str) -> Chosen:
    """The filters that stay, and what the smaller network costs beside the whole one: parameters, FLOPs of one image,
    and milliseconds for a batch, measured in turn here and now."""
    state = read_state(store, node.source)
    model = _with_weights(node, state)
    groups = structured.channel_groups(model, image_size)
    scores = structured.gamma_scores(groups, _model_state(state))
    # A pre-training that diverged has a selection as well, so that its fine-tuning can show that it diverged.
    scores = {name: torch.nan_to_num(s, nan=_HUGE, posinf=_HUGE) for name, s in scores.items()}
    selection = structured.select(groups, scores, node.fraction)
    small = structured.remove(_with_weights(node, state), selection, image_size)
    kept = structured.kept_filters(selection, groups)
    channels = sum(group.channels for group in groups)
    removed = channels - sum(map(len, selection.kept.values()))
    filters = {name: group.channels for group in groups for name in group.convs}
    before, after = (structured.cost(m, image_size) for m in (model, small))
    times = latency({"whole": model, "small": small}, image_size, _LATENCY_BATCH, device)
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
        "latency_ms": times["small"],
        "latency_whole_ms": times["whole"],
        "latency_batch": _LATENCY_BATCH,
    }

    def layers(path: Path) -> None:
        write_csv(path, [{"layer": name, "filters": n, "kept": kept[name]} for name, n in filters.items()])

    described = json.dumps(selection.as_dict(), indent=1, sort_keys=True) + "\n"
    return result, {"filters.json": lambda p: p.write_text(described), "layers.csv": layers}


def smaller(store: RunStore, node: Filters, state: dict[str, Tensor], image_size: int) -> nn.Module:
    """The network of `state` without the filters that a published selection removes. InputError if it is damaged."""
    path = store.filters(node)
    try:
        selection = structured.Selection.from_dict(json.loads(path.read_text()))
        return structured.remove(_with_weights(node, state), selection, image_size)
    except (OSError, ValueError) as error:
        raise store.damaged(path, error) from error


def _with_weights(node: Filters, state: dict[str, Tensor]) -> nn.Module:
    model = build(node.model)
    model.load_state_dict(_model_state(state))
    return model


def _model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}


@contextmanager
def _to_be_made_again(path: Path) -> Iterator[None]:
    """Says what to do about a damaged file of a published node."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; delete the folder {path.parent} to make it again") from error
