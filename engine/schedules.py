"""Learning-rate schedules: the rate as a function of the step, so there is nothing to lose and nothing to be off by."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0) -> LambdaLR:
    """`optimizer.lr` throughout, after a linear rise over `warmup_epochs`."""
    warmup = warmup_epochs * steps_per_epoch
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))


def cosine(
    optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0, final: float = 0.0
) -> LambdaLR:
    """From `optimizer.lr` to `final` times it along half a cosine (SGDR, arXiv:1608.03983, equation 5, one period).

    The learning rate first rises linearly over `warmup_epochs`, the cosine takes the steps that remain.
    """
    warmup = warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)
