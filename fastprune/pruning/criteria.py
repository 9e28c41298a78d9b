"""Criteria: why a weight goes. Each gives scores, the lowest of which go first. A user's module can register more."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.pruning.masks import Mask

Scores = Callable[[Mapping[str, Tensor], Mask], Mapping[str, Tensor]]
"""From weights by parameter name (float32, logical shape) and the present mask to scores of the same names and shapes:
finite and not negative, the larger stays."""


@dataclass(frozen=True)
class Criterion:
    """A user's criterion. version: a whole number that goes into the key of each mask that it chooses: raise it when
    the function computes something else."""

    name: str
    version: int
    scores: Scores


CRITERIA: dict[str, Criterion] = {}
"""By name, those that users have registered; "magnitude" and "random" are built in."""


def register_criterion(name: str, version: int) -> Callable[[Scores], Scores]:
    """A decorator that makes a function known as `--criterion NAME`. ValueError for a name that is taken."""
    if name in CRITERIA or name in ("magnitude", "random"):
        raise ValueError(f"there is a criterion {name!r} already")

    def add(scores: Scores) -> Scores:
        CRITERIA[name] = Criterion(name, version, scores)
        return scores

    return add


def criterion(name: str) -> Criterion:
    """The user's criterion of that name. InputError for an unknown one."""
    if name not in CRITERIA:
        known = ", ".join(["magnitude", *sorted(CRITERIA)])
        raise InputError(f"unknown criterion {name!r}: choose one of {known}, or name its --figure-module")
    return CRITERIA[name]


def magnitude_scores(weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """|weight|, float32 in the mask's storage order and on its device; weights by parameter name in logical shape."""
    return flat_scores({s.name: weights[s.name].abs() for s in mask.segments}, mask)


def flat_scores(scores: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """Scores by parameter name in logical shape, as float32 in the mask's storage order and on its device.

    ValueError for scores that are missing or of another shape.
    """
    flat = torch.zeros(mask.keep.shape, device=mask.keep.device)
    for s in mask.segments:
        if s.name not in scores or tuple(scores[s.name].shape) != s.shape:
            raise ValueError(f"no scores of {s.name} of shape {s.shape}")
        s.view(flat).copy_(scores[s.name])
    return flat


def user_scores(used: Criterion, weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """What a user's criterion gives, checked, as `flat_scores`. ValueError for scores that are negative or not finite:
    the selection orders their bits."""
    flat = flat_scores(used.scores(weights, mask), mask)
    if not (flat.isfinite() & (flat >= 0)).all():
        raise ValueError(f"criterion {used.name} gives scores that are negative or not finite")
    return flat


def random_scores(mask: Mask, seed: int, round: int) -> Tensor:
    """Independent uniform float64 in [0, 1) for each weight, drawn by logical position from (seed, round) alone.

    On the CPU, wherever the mask is: the same bits for every device. Philox's raw stream, whose values numpy fixes for
    good, unlike those of its distributions.
    """
    raw = np.random.Philox(key=np.array([seed, round], dtype=np.uint64)).random_raw(mask.total)
    drawn = torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    scores = torch.zeros(mask.keep.shape, dtype=torch.float64)
    for s in mask.segments:
        s.view(scores).copy_(drawn[s.position : s.position + s.numel].view(s.shape))
    return scores
