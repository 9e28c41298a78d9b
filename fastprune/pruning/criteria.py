"""Criteria: why a weight is pruned. A criterion scores weights, and the lowest scores are pruned first.

Magnitude and random scores are built in. A user's module registers others by `register_criterion`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.pruning.masks import Mask

Scores = Callable[[Mapping[str, Tensor], Mask], Mapping[str, Tensor]]
"""(weights, present mask) -> scores. Weights: float32 by parameter name, logical shape. Scores: the same names and
shapes, finite and >= 0; higher scores are kept."""


@dataclass(frozen=True)
class Criterion:
    """A criterion that a user registered. version: part of the key of every mask that the criterion chooses."""

    name: str
    # The store does not see a change of code: without a new version it would reuse masks that the old code chose.
    version: int
    scores: Scores


CRITERIA: dict[str, Criterion] = {}
"""Registered criteria by name; the built-in "magnitude" and "random" are not among them."""


def register_criterion(name: str, version: int) -> Callable[[Scores], Scores]:
    """Decorator: registers a `Scores` function as `--criterion NAME`. ValueError for a name in use.

    version: a whole number, to be raised when the function computes other scores.
    """
    if name in CRITERIA or name in ("magnitude", "random"):
        raise ValueError(f"a criterion {name!r} is registered already: choose another name")

    def add(scores: Scores) -> Scores:
        CRITERIA[name] = Criterion(name, version, scores)
        return scores

    return add


def criterion(name: str) -> Criterion:
    """The registered criterion `name`. InputError for an unknown one."""
    if name not in CRITERIA:
        known = ", ".join(["magnitude", *sorted(CRITERIA)])
        raise InputError(f"unknown criterion {name!r}: choose one of {known}, or give its module by --figure-module")
    return CRITERIA[name]


def magnitude_scores(weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """|weight|: float32 [n] in the mask's storage order, on its device. weights: by parameter name, logical shape."""
    return flat_scores({s.name: weights[s.name].abs() for s in mask.segments}, mask)


def flat_scores(scores: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """Scores by parameter name in logical shape, as float32 [n] in the mask's storage order and on its device.

    ValueError if scores of a layer are missing or have another shape than its weight.
    """
    # Zeros in the padding decide nothing: the mask is False there, and only kept elements are ranked.
    flat = torch.zeros(mask.keep.shape, device=mask.keep.device)
    for s in mask.segments:
        if s.name not in scores or tuple(scores[s.name].shape) != s.shape:
            raise ValueError(f"no scores of {s.name} of shape {s.shape}: give one score for each weight of each layer")
        s.view(flat).copy_(scores[s.name])
    return flat


def user_scores(used: Criterion, weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
    """A registered criterion's scores, in the form of `flat_scores`. ValueError if any is negative, NaN or inf."""
    flat = flat_scores(used.scores(weights, mask), mask)
    # The selection orders scores by their bits, which is the order of the numbers for non-negative floats only.
    if not (flat.isfinite() & (flat >= 0)).all():
        raise ValueError(f"criterion {used.name} gives negative or non-finite scores: return finite scores >= 0")
    return flat


def random_scores(mask: Mask, seed: int, round: int) -> Tensor:
    """Independent uniform scores: float64 [n] in [0, 1), in the mask's storage order, on the CPU wherever the mask is.

    The score of a weight depends on (seed, round) and its logical position alone.
    """
    # Philox's raw stream, because numpy fixes its values for good, unlike those of its distributions. The upper 53 bits
    # fill a float64 exactly, and are the same on every device: float32 would have ties, and prune other weights.
    raw = np.random.Philox(key=np.array([seed, round], dtype=np.uint64)).random_raw(mask.total)
    drawn = torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    scores = torch.zeros(mask.keep.shape, dtype=torch.float64)
    for s in mask.segments:
        s.view(scores).copy_(drawn[s.position : s.position + s.numel].view(s.shape))
    return scores
