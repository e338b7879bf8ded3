"""Learning-rate schedules: the rate as a function of the step, so there is nothing to lose and nothing to be off by."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from engine.build import build, locate
from engine.errors import RequestError


class Schedule:
    """Sets the learning rate before each step to the optimizer's own times `factor(steps done so far)`."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.optimizer, self.factor = optimizer, factor
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.start(0)

    def step(self) -> None:
        """After a step of the optimizer: the rate for the next."""
        self.start(self.steps + 1)

    def start(self, steps: int) -> None:
        """Be where so many steps of this run lead to."""
        self.steps, factor = steps, self.factor(steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def state_dict(self) -> dict[str, Any]:
        """The number of steps is all there is to know."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, along this run's curve, which may be longer than the one it was saved on."""
        self.start(state["steps"])


# `optimizer.lr` times a share, which is a function of the step (the number of steps done before it). Each takes the
# optimizer, total_steps of the whole run and steps_per_epoch (both >= 1), then its settings, which its YAML explains.


def constant(optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0) -> Schedule:
    """`optimizer.lr` throughout, after a linear rise over `warmup_epochs`."""
    return _warmed_up(optimizer, warmup_epochs * steps_per_epoch, lambda step: 1.0)


def cosine(
    optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0, final: float = 0.0
) -> Schedule:
    """From `optimizer.lr` to `final` times it along half a cosine (SGDR, arXiv:1608.03983, equation 5, one period).

    The learning rate first rises linearly over `warmup_epochs`, the cosine takes the steps that remain.
    """
    warmup = warmup_epochs * steps_per_epoch
    return _warmed_up(optimizer, warmup, lambda step: _along_cosine(1.0, final, _way(step, warmup, total_steps)))


def linear(
    optimizer: Optimizer, total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0, final: float = 0.0
) -> Schedule:
    """From `optimizer.lr` to `final` times it along a line, over the steps that remain after the warm-up."""
    warmup = warmup_epochs * steps_per_epoch
    return _warmed_up(optimizer, warmup, lambda step: final + (1 - final) * (1 - _way(step, warmup, total_steps)))


def step(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    every_epochs: float = 10,
    milestones: Sequence[float] | None = None,
    gamma: float = 0.1,
) -> Schedule:
    """`optimizer.lr` times `gamma` after every `every_epochs`, or at `milestones` in their place.

    Both count epochs from the beginning of the run, its warm-up among them.
    """

    def drops(step: int) -> int:
        epochs = (step + 1e-6) / steps_per_epoch  # a millionth of a step, as 0.3 / 0.1 is less than 3
        return math.floor(epochs / every_epochs) if milestones is None else sum(m <= epochs for m in milestones)

    return _warmed_up(optimizer, warmup_epochs * steps_per_epoch, lambda step: gamma ** drops(step))


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float | None = None,
    rise: float = 0.3,
    initial: float = 0.04,
    final: float = 4e-6,
) -> Schedule:
    """Up from `initial` times `optimizer.lr` to the whole of it, then down to `final` times it at the last step.

    The 1cycle policy (Smith and Topin, arXiv:1708.07120) in the shape in which it is used: two halves of cosines, not
    three lines. The values are those of torch's OneCycleLR, whose `max_lr` is `optimizer.lr`; the momentum stays.

    Args:
        warmup_epochs: epochs of the rise, in place of its share in `rise`.
        rise: share of the steps, 0 to 1; the last of them is the peak.
    """
    top = rise * total_steps - 1 if warmup_epochs is None else warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < top:
            return _along_cosine(initial, 1.0, step / top)
        return _along_cosine(1.0, final, _way(step, max(top, 0.0), total_steps - 1))

    return Schedule(optimizer, factor)


def _warmed_up(optimizer: Optimizer, warmup: float, factor: Callable[[int], float]) -> Schedule:
    """`factor`, after a linear rise to `optimizer.lr` over so many steps."""
    return Schedule(optimizer, lambda step: (step + 1) / (warmup + 1) if step < warmup else factor(step))


def _way(step: int, start: float, end: float) -> float:
    """The share of the way from `start` to `end` at a step from `start` on; 1 beyond the end."""
    return min(1.0, (step - start) / max(1.0, end - start))


def _along_cosine(start: float, end: float, way: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * way)) / 2


class EveryEpoch:
    """One of torch's schedulers that count epochs, stepped where the epoch ends though it is called at every step.

    Args:
        scheduler: has step(), state_dict() and load_state_dict().
        steps_per_epoch: 1 for a scheduler that counts steps itself.
    """

    def __init__(self, scheduler: Any, steps_per_epoch: int) -> None:
        self.scheduler, self.steps_per_epoch, self.steps = scheduler, steps_per_epoch, 0

    def step(self) -> None:
        """After a step of the optimizer."""
        self.steps += 1
        if self.steps % self.steps_per_epoch == 0:
            self.scheduler.step()

    def start(self, steps: int) -> None:
        """From the beginning, with the optimizer's own learning rate, to where so many steps of this run lead to.

        A scheduler may compute a rate from the one before, so it takes every step.
        """
        self.steps = steps
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before the optimizer's
            for _ in range(steps // self.steps_per_epoch):
                self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own, and the step."""
        return {"steps": self.steps, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.steps = state["steps"]
        self.scheduler.load_state_dict(state["scheduler"])


def build_schedule(settings: dict[str, Any], optimizer: Optimizer, epochs: int, steps_per_epoch: int) -> Any:
    """The schedule a configuration names; one that takes `total_steps` is stepped every step, others every epoch.

    Raises:
        RequestError: it does not fit its settings, follows a metric, or sets rates without regard to lr_scale.
    """
    target = locate(settings["_target_"], "scheduler._target_")
    if target is ReduceLROnPlateau:
        raise RequestError(
            "scheduler: ReduceLROnPlateau follows a metric; choose one that follows the epoch or the step"
        )
    total = epochs * steps_per_epoch
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = build(
        settings, "scheduler", optimizer, target=target, total_steps=total, steps_per_epoch=steps_per_epoch
    )
    if any("lr_scale" in group for group in optimizer.param_groups):
        factors = [group["lr"] / rate for group, rate in zip(optimizer.param_groups, rates, strict=True)]
        if max(factors) - min(factors) > 1e-6 * max(factors):
            raise RequestError(
                f"lr_scale: {settings['_target_']} sets every learning rate to values of its own; choose a scheduler "
                "that multiplies them, such as one_cycle, or leave lr_scale out"
            )
    if isinstance(schedule, Schedule):
        return schedule
    return EveryEpoch(schedule, 1 if "total_steps" in inspect.signature(target).parameters else steps_per_epoch)
