"""Schedules: when weights go. One shot is a single `Pruner.prune`; the others are here.

geometric, cubic and Gradual say how much; SET and RigL move weights at constant sparsity.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastprune.pruning.allocation import Allocation
from fastprune.pruning.criteria import Criterion, stream, uniform
from fastprune.pruning.pruner import Pruner


def geometric(fraction: float, rounds: int) -> Iterator[float]:
    """Sparsities after each round that prunes the same fraction of what is left: 1 - (1 - fraction)^round.

    For `pruner.prune(to=sparsity)`, round by round (Frankle and Carbin, 2019: 0.2). ValueError for a fraction outside
    [0, 1) or fewer than one round.
    """
    if not 0 <= fraction < 1 or rounds < 1:
        raise ValueError(f"fraction is {fraction} and rounds {rounds}, expected [0, 1) and 1 or more")
    return (1 - (1 - fraction) ** round for round in range(1, rounds + 1))


def geometric_to(sparsity: float, rounds: int) -> Iterator[float]:
    """As `geometric`, with the fraction that ends at `sparsity` after so many rounds (SynFlow uses 100)."""
    if not 0 <= sparsity < 1 or rounds < 1:
        raise ValueError(f"sparsity is {sparsity} and rounds {rounds}, expected [0, 1) and 1 or more")
    # The last one as it was given: 1 - (1 - 0.9) is another float, and may round to another number of weights.
    return (1 - (1 - sparsity) ** (round / rounds) if round < rounds else sparsity for round in range(1, rounds + 1))


def cubic(sparsity: float, progress: float, initial: float = 0.0) -> float:
    """The sparsity of gradual pruning (Zhu and Gupta, 2017) after the fraction `progress` of it: fast at first."""
    return sparsity + (initial - sparsity) * (1 - min(max(progress, 0.0), 1.0)) ** 3


class Gradual:
    """Gradual pruning (Zhu and Gupta, 2017): call `step()` once after each optimiser step.

    After step t, where t - begin is a multiple of `every`, and after step `end`, prunes to the sparsity
    final + (initial - final) (1 - (t - begin) / (end - begin))^3. Steps count from 1, so that a training of `end` steps
    ends at `final`. initial: by default the Pruner's of now. ValueError for steps or sparsities out of order.
    """

    def __init__(
        self,
        pruner: Pruner,
        final: float,
        *,
        begin: int,
        end: int,
        every: int = 100,
        initial: float | None = None,
        criterion: Criterion = "magnitude",
        allocation: Allocation = "global",
    ) -> None:
        self.initial = pruner.sparsity if initial is None else initial
        if not 0 <= self.initial <= final <= 1:
            raise ValueError(f"sparsity goes from {self.initial} to {final}, expected 0 <= initial <= final <= 1")
        if not 0 <= begin < end or every < 1:
            raise ValueError(f"begin is {begin}, end {end}, every {every}: expected 0 <= begin < end and every >= 1")
        self.pruner, self.final, self.begin, self.end, self.every = pruner, final, begin, end, every
        self.criterion, self.allocation = criterion, allocation
        self.steps = 0
        """Calls of `step` so far; set it after a resume."""

    def sparsity(self, step: int) -> float:
        """The sparsity that holds from `step` on, if it is one at which weights are pruned."""
        return cubic(self.final, (step - self.begin) / (self.end - self.begin), self.initial)

    def step(self) -> bool:
        """Counts a step, and prunes if it is due. Whether masks have changed."""
        self.steps += 1
        late = self.steps - self.begin
        if late < 0 or self.steps > self.end or (late % self.every and self.steps != self.end):
            return False
        # Never below what is pruned already: rounding, or a model that came sparser.
        to = max(self.sparsity(self.steps), self.pruner.sparsity)
        return self.pruner.prune(to=to, criterion=self.criterion, allocation=self.allocation) > 0


class _DropAndGrow:
    def __init__(self, pruner: Pruner, fraction: float, every: int, end: int) -> None:
        if not 0 < fraction <= 1 or every < 1 or end < 1:
            raise ValueError(f"fraction is {fraction}, every {every}, end {end}: expected (0, 1], and 1 or more")
        self.pruner, self.fraction, self.every, self.end = pruner, fraction, every, end
        self.steps = 0
        """Calls of `step` so far; set it after a resume."""

    def _is_due(self, step: int) -> bool:
        return 0 < step < self.end and step % self.every == 0


class SET(_DropAndGrow):
    """Sparse evolutionary training (Mocanu et al., 2018): call `step()` once after each optimiser step.

    Every `every` steps before `end`, each layer loses `fraction` of its kept weights, those of lowest magnitude, and
    gets as many at random. What is drawn depends on seed and step alone, also after a resume. seed: None draws one from
    torch's generator.
    """

    def __init__(self, pruner: Pruner, fraction: float = 0.3, *, every: int, end: int, seed: int | None = None) -> None:
        super().__init__(pruner, fraction, every, end)
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        stream(self.seed, 0)  # a seed that cannot be is an error here already

    def step(self) -> bool:
        """Counts a step, and moves weights if it is due. Whether masks have changed."""
        self.steps += 1
        if not self._is_due(self.steps):
            return False
        drawn = stream(self.seed, self.steps)
        return self.pruner.drop_and_grow(self.fraction, lambda name, weight: uniform(drawn, tuple(weight.shape))) > 0


class RigL(_DropAndGrow):
    """RigL (Evci et al., 2020): call `step()` after each backward pass, and skip the optimiser's step if it is true.

    Every `every` steps before `end`, each layer loses a fraction of its kept weights, those of lowest magnitude, and
    gets as many where the gradient is largest. The fraction falls as fraction / 2 x (1 + cos(pi step / end)). The
    dense gradients are of the last backward pass; the Pruner copies them in the steps that need them.
    """

    def __init__(self, pruner: Pruner, fraction: float = 0.3, *, every: int = 100, end: int) -> None:
        super().__init__(pruner, fraction, every, end)

    @property
    def steps(self) -> int:
        """Calls of `step` so far; set it after a resume."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps
        self.pruner.dense_grad = self._is_due(steps + 1)

    def step(self) -> bool:
        """Counts a step, and moves weights if it is due; whether it was."""
        self.steps += 1
        due = self._is_due(self.steps)
        if due:
            fraction = self.fraction / 2 * (1 + math.cos(math.pi * self.steps / self.end))
            self.pruner.drop_and_grow(fraction, self._gradient)
        self.pruner.dense_grads.clear()
        return due

    def _gradient(self, name: str, weight: nn.Parameter) -> Tensor:
        if name not in self.pruner.dense_grads:
            raise ValueError(f"{name} has no gradient: call step() after the backward pass and before zero_grad()")
        return self.pruner.dense_grads[name].abs()
