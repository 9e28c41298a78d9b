"""Criteria: why a weight is pruned. A criterion scores weights, and the lowest scores are pruned first.

For a Pruner a criterion is a function from weights by name to scores by name: `random`, `lamp`, `taylor`, `Movement`,
`snip`, `grasp`, `synflow`, or a user's own. For the figures' prune steps, which need the same scores on every machine,
there are magnitude, random and what a user's module registers by `register_criterion`.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.pruning.masks import Mask

Scores = Callable[[Mapping[str, Tensor], Mask], Mapping[str, Tensor]]
"""(weights, present mask) -> scores. Weights: float32 by parameter name, logical shape. Scores: the same names and
shapes, finite and >= 0; higher scores are kept."""


@dataclass(frozen=True)
class RegisteredCriterion:
    """A criterion that a user registered. version: part of the key of every mask that the criterion chooses."""

    name: str
    # The store does not see a change of code: without a new version it would reuse masks that the old code chose.
    version: int
    scores: Scores


Weights = Mapping[str, nn.Parameter]
"""The weights that are ranked, by parameter name, with their gradients of now."""

ScoreFunction = Callable[[Weights], Mapping[str, Tensor]]

Criterion = Literal["magnitude", "random", "lamp", "taylor"] | ScoreFunction | Mapping[str, Tensor]
"""What `Pruner.prune` takes: a name, a function from weights to scores, or scores. Scores are finite floats by name, of
the weights' shapes; they may be negative, and larger ones stay."""

CRITERIA: dict[str, RegisteredCriterion] = {}
"""Registered criteria by name; the built-in "magnitude" and "random" are not among them."""


def register_criterion(name: str, version: int) -> Callable[[Scores], Scores]:
    """Decorator: registers a `Scores` function as `--criterion NAME`. ValueError for a name in use.

    version: a whole number, to be raised when the function computes other scores.
    """
    if name in CRITERIA or name in ("magnitude", "random"):
        raise ValueError(f"a criterion {name!r} is registered already: choose another name")

    def add(scores: Scores) -> Scores:
        CRITERIA[name] = RegisteredCriterion(name, version, scores)
        return scores

    return add


def criterion(name: str) -> RegisteredCriterion:
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


def user_scores(used: RegisteredCriterion, weights: Mapping[str, Tensor], mask: Mask) -> Tensor:
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
    drawn = uniform(stream(seed, round), (mask.total,))
    scores = torch.zeros(mask.keep.shape, dtype=torch.float64)
    for s in mask.segments:
        s.view(scores).copy_(drawn[s.position : s.position + s.numel].view(s.shape))
    return scores


def stream(seed: int, number: int) -> np.random.Philox:
    """Random bits that depend on (seed, number) alone. ValueError for a seed outside [0, 2^64)."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected a whole number from 0 to 2^64 - 1")
    return np.random.Philox(key=np.array([seed, number], dtype=np.uint64))


def uniform(source: np.random.Philox, shape: tuple[int, ...]) -> Tensor:
    """The next uniform numbers of a `stream`: float64 in [0, 1) of a shape, in logical order, on the CPU."""
    # Philox's raw stream, because numpy fixes its values for good, unlike those of its distributions. The upper 53 bits
    # fill a float64 exactly, and are the same on every device: float32 would have ties, and prune other weights.
    raw = source.random_raw(prod(shape))
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53).view(shape)


# For a Pruner


def scores_of(criterion: Criterion, weights: Weights) -> dict[str, Tensor] | None:
    """The criterion's scores, by parameter name, on each weight's device; None for magnitude, which the selection takes
    from the weights as it reads them.

    ValueError for an unknown name, for missing scores, other shapes, integers, NaN and inf.
    """
    if isinstance(criterion, str):
        if criterion == "magnitude":
            return None
        if criterion not in _NAMED:
            raise ValueError(
                f"unknown criterion {criterion!r}: choose magnitude, {', '.join(_NAMED)}, or give a function"
            )
        criterion = _NAMED[criterion]
    with torch.no_grad():
        found = criterion(weights) if callable(criterion) else criterion
    if not isinstance(found, Mapping):
        raise ValueError(f"a criterion gives scores by parameter name, not a {type(found).__name__}")
    scores = {}
    for name, weight in weights.items():
        score = found.get(name)
        if not isinstance(score, Tensor) or score.shape != weight.shape or not score.is_floating_point():
            raise ValueError(f"no scores of {name}: give a tensor of floats of shape {tuple(weight.shape)}")
        scores[name] = score.detach().to(weight.device)
        if not bool(scores[name].isfinite().all()):
            raise ValueError(f"scores of {name} are NaN or inf")
    return scores


def random(seed: int | None = None) -> ScoreFunction:
    """Independent uniform scores, others at each call. seed: None draws one from torch's generator."""
    start = int(torch.randint(2**62, ())) if seed is None else seed
    calls = itertools.count()
    stream(start, 0)  # a seed that cannot be is an error here already

    def scores(weights: Weights) -> dict[str, Tensor]:
        source = stream(start, next(calls))
        return {name: uniform(source, tuple(weight.shape)) for name, weight in weights.items()}

    return scores


def lamp(weights: Weights) -> dict[str, Tensor]:
    """LAMP scores (Lee et al., 2021): w^2 over the sum of all squares in its layer that are not smaller; float64.

    Ties in w^2 are ordered by position, the first counts as the smallest.
    """
    scores = {}
    for name, weight in weights.items():
        square = weight.detach().double().reshape(-1).square()
        ranked, order = square.sort(stable=True)
        # The sum over weights of this rank and above.
        at_least = ranked.flip(0).cumsum(0).flip(0)
        score = torch.empty_like(square)
        score[order] = torch.where(at_least == 0, 0.0, ranked / at_least)
        scores[name] = score.view(weight.shape)
    return scores


def taylor(weights: Weights) -> dict[str, Tensor]:
    """|w x gradient|: the first-order change of the loss without the weight (Molchanov et al., 2019).

    Reads `.grad`, which a backward pass has left, over one batch or several. ValueError where there is none. Scores of
    half-precision weights are float32, here and in the functions below.
    """
    return {name: _product(weight, _gradient(name, weight)).abs() for name, weight in weights.items()}


class Movement:
    """Movement scores (Sanh et al., 2020): minus the sum of w x gradient over calls of `update`.

    Call `update()` once after each backward pass: weights that move away from 0 score high. `clear()` starts anew.
    Frozen layers are left out; ValueError for a layer without gradient, and nothing is added then.
    """

    def __init__(self, weights: Callable[[], Weights]) -> None:
        """weights: `pruner.weights`."""
        self._weights = weights
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        products = {n: _product(w, _gradient(n, w)) for n, w in self._weights().items() if w.requires_grad}
        for name, product in products.items():
            self._sums[name] = self._sums[name] - product if name in self._sums else -product

    def clear(self) -> None:
        self._sums.clear()

    def __call__(self, weights: Weights) -> dict[str, Tensor]:
        if missing := [name for name in weights if name not in self._sums]:
            raise ValueError(f"no movement of {missing[0]} yet: call update() after backward passes")
        return dict(self._sums)


def snip(loss: Callable[[], Tensor]) -> ScoreFunction:
    """SNIP scores (Lee et al., 2019): |w x gradient| of a loss at the present weights. Leaves `.grad` as it is.

    loss: gives a scalar loss of the model, for example `lambda: F.cross_entropy(model(images), labels)`. ValueError if
    it depends on none of the weights.
    """

    def scores(weights: Weights) -> dict[str, Tensor]:
        with torch.enable_grad():
            grads = _gradients(loss(), weights)
        return {n: _product(w, g).abs() for (n, w), g in zip(weights.items(), grads, strict=True)}

    return scores


def grasp(loss: Callable[[], Tensor]) -> ScoreFunction:
    """GraSP scores (Wang et al., 2020): w x (Hessian x gradient); the weights that carry the gradient flow stay.

    loss: as in `snip`. It is differentiated twice. ValueError if its gradient depends on none of the weights.
    """

    # The paper removes the highest -w x Hg; here larger scores stay.
    def scores(weights: Weights) -> dict[str, Tensor]:
        with torch.enable_grad():
            grads = _gradients(loss(), weights, create_graph=True)
            flow = torch.stack([(g * g.detach()).sum() for g in grads if g is not None]).sum()
            products = _gradients(flow, weights)
        return {n: _product(w, h) for (n, w), h in zip(weights.items(), products, strict=True)}

    return scores


def synflow(model: nn.Module, example: Tensor) -> ScoreFunction:
    """SynFlow scores (Tanaka et al., 2020): |w x dR/dw|, R the sum of the outputs of the network of |w| for ones.

    Without data, and made for many rounds (the paper's 100, see `schedules.geometric_to`): in one it prunes layers
    whole. model: gives one tensor. example: an input, of which shape, dtype and device count. R grows with the depth:
    if it is too large for the dtype, ValueError; a float64 example makes the whole pass float64, as the paper's code
    does. During the call the model is in eval mode and its parameters and buffers are their magnitudes; all is
    restored, also after an error.
    """

    def scores(weights: Weights) -> dict[str, Tensor]:
        state = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        saved = [tensor.data for tensor in state]
        modes = {module: module.training for module in model.modules()}
        try:
            model.eval()
            for tensor in state:
                tensor.data = tensor.detach().abs().to(torch.promote_types(tensor.dtype, example.dtype))
            with torch.enable_grad():
                total = model(torch.ones_like(example)).sum()
                grads = _gradients(total, weights)
            if not bool(total.isfinite()):
                raise ValueError(f"SynFlow's sum of outputs is {total.item()}: give the example in float64")
            return {n: _product(w, g).abs() for (n, w), g in zip(weights.items(), grads, strict=True)}
        finally:
            for tensor, data in zip(state, saved, strict=True):
                tensor.data = data
            for module, training in modes.items():
                module.training = training

    return scores


_NAMED: dict[str, Callable[[Weights], Mapping[str, Tensor]]] = {
    "random": lambda weights: random()(weights),
    "lamp": lamp,
    "taylor": taylor,
}


def _gradient(name: str, weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        raise ValueError(f"{name} has no gradient: run loss.backward() before")
    return weight.grad.detach().to_dense() if weight.grad.is_sparse else weight.grad.detach()


def _gradients(output: Tensor, weights: Weights, create_graph: bool = False) -> tuple[Tensor | None, ...]:
    """Gradients of a scalar by the weights, None for a weight that it does not depend on; ValueError if for all."""
    # Scores of 0 everywhere would prune by position.
    found: tuple[Tensor | None, ...] = ()
    if output.requires_grad:
        found = torch.autograd.grad(output, list(weights.values()), create_graph=create_graph, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError("the scores depend on none of the weights: is the model another one than the Pruner's?")
    return found


def _product(weight: nn.Parameter, gradient: Tensor | None) -> Tensor:
    """w x gradient, in float32 or float64; zeros for a weight that the loss does not depend on."""
    # In half precision products overflow, or round to 0 and tie, and sums over steps stand still.
    wide = torch.promote_types(weight.dtype, torch.float32)
    if gradient is None:
        return torch.zeros_like(weight, dtype=wide)
    return weight.detach().to(wide) * gradient.detach().to(wide)
