"""The optimiser step on a CPU: torch's own operations, so that a run equals one of torch.optim.SGD to the bit."""

import torch
from torch import Tensor


def step(
    weight: Tensor, grad: Tensor, buffer: Tensor, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    """torch.optim.SGD's update with the bits of its default implementation; mutates weight and buffer, spoils grad."""
    if momentum and weight.numel() % 64 == 0 and torch.get_num_threads() == 1:
        # torch's fused pass, less than half the time. What does not fill a vector it computes with other rounding: not
        # for such sizes, nor where threads cut the buffer anywhere.
        torch._fused_sgd_(
            [weight], [grad], [buffer], weight_decay=weight_decay, momentum=momentum, lr=lr, dampening=0.0,
            nesterov=nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip
        return
    # The same operations in the same order.
    if weight_decay:
        grad.add_(weight, alpha=weight_decay)
    buffer.mul_(momentum).add_(grad)
    update = grad.add_(buffer, alpha=momentum) if nesterov else buffer
    weight.add_(update, alpha=-lr)
