"""Learning rates: from the formula by hand at the first, last and boundary steps; torch's own against torch."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LinearLR, MultiStepLR, OneCycleLR, StepLR

from engine.config import CONFIGS, group_options
from engine.errors import RequestError
from engine.training import schedules
from engine.training.schedules import Schedule, build_schedule, constant, cosine, linear, one_cycle

LR = 0.8


def optimizer(*rates: float) -> SGD:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates or (LR,)]
    return SGD(groups)


def rates_of(make: Callable[[Optimizer], Any], steps: int) -> list[float]:
    """The learning rate of every step, and what it is after the last."""
    used = optimizer()
    schedule = make(used)
    rates = []
    for _ in range(steps):
        rates.append(used.param_groups[0]["lr"])
        used.step()
        schedule.step()
    return [*rates, used.param_groups[0]["lr"]]


# ---------------------------------------------------------------------------------------------------------------------
# Ours, in shares of `optimizer.lr`

# Warm-up over w steps: step i (from 0) has (i + 1) / (w + 1), so the first that is at the full rate is step w.
# Cosine over n steps, w of them warm-up: step i >= w has final + (1 - final) * (1 + cos(pi * (i - w) / (n - w))) / 2.
# A line over n steps, w of them warm-up: 1 - (1 - final) * (i - w) / (n - w).
# One cycle of n steps with its peak at step p: before it initial + (1 - initial) * (1 - cos(pi * i / p)) / 2, then
# final + (1 - final) * (1 + cos(pi * (i - p) / (n - 1 - p))) / 2. The peak is the last step of the rise, as in torch.
COS_45 = (1 + math.sqrt(0.5)) / 2  # 0.853553, a quarter of the way
TABLE = {
    "constant": (constant, 8, 4, {}, [1] * 9),
    "constant, an epoch of warm-up": (constant, 8, 4, {"warmup_epochs": 1}, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
    "constant, half an epoch": (constant, 8, 4, {"warmup_epochs": 0.5}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1]),
    "constant, warm-up of 1.5 steps": (constant, 4, 3, {"warmup_epochs": 0.5}, [0.4, 0.8, 1, 1, 1]),
    "constant, warm-up to the end": (constant, 4, 4, {"warmup_epochs": 1}, [0.2, 0.4, 0.6, 0.8, 1]),
    "cosine": (cosine, 4, 2, {}, [1, COS_45, 0.5, 1 - COS_45, 0]),
    "cosine to a tenth": (cosine, 4, 2, {"final": 0.1}, [1, 0.1 + 0.9 * COS_45, 0.55, 0.1 + 0.9 * (1 - COS_45), 0.1]),
    "cosine to the same": (cosine, 4, 2, {"final": 1}, [1, 1, 1, 1, 1]),
    "cosine after an epoch of warm-up": (
        cosine,
        8,
        4,
        {"warmup_epochs": 1},
        [0.2, 0.4, 0.6, 0.8, 1, COS_45, 0.5, 1 - COS_45, 0],
    ),
    "cosine after an epoch of warm-up, to a half": (
        cosine,
        6,
        2,
        {"warmup_epochs": 1, "final": 0.5},
        [1 / 3, 2 / 3, 1, 0.5 + 0.5 * COS_45, 0.75, 0.5 + 0.5 * (1 - COS_45), 0.5],
    ),
    # 2.5 steps of warm-up: steps 0 to 2 rise by 1 / 3.5; step 3 is (3 - 2.5) / (4.5 - 2.5) = 1/4 of the way of 2 steps.
    "cosine after part of a step": (
        cosine,
        5,
        5,
        {"warmup_epochs": 0.5},
        [1 / 3.5, 2 / 3.5, 3 / 3.5, (1 + math.cos(math.pi * 0.2)) / 2, (1 + math.cos(math.pi * 0.6)) / 2, 0],
    ),
    "cosine of one step": (cosine, 1, 1, {}, [1, 0]),
    "cosine, all of it warm-up": (cosine, 3, 3, {"warmup_epochs": 1}, [0.25, 0.5, 0.75, 1]),
    "cosine, more warm-up than epochs": (cosine, 3, 3, {"warmup_epochs": 2}, [1 / 7, 2 / 7, 3 / 7, 4 / 7]),
    "linear": (linear, 4, 2, {}, [1, 0.75, 0.5, 0.25, 0]),
    "linear to a fifth": (linear, 4, 2, {"final": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
    "linear after half an epoch of warm-up": (
        linear,
        6,
        4,
        {"warmup_epochs": 0.5, "final": 0.2},
        [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2],
    ),
    "linear after part of a step": (linear, 3, 1, {"warmup_epochs": 0.5}, [1 / 1.5, 1 - 0.5 / 2.5, 1 - 1.5 / 2.5, 0]),
    "linear, more warm-up than epochs": (linear, 2, 2, {"warmup_epochs": 2}, [0.2, 0.4, 0.6]),
    "step, every second epoch": (schedules.step, 5, 1, {"every_epochs": 2}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
    "step, halved every half epoch": (
        schedules.step,
        6,
        4,
        {"every_epochs": 0.5, "gamma": 0.5},
        [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125],
    ),
    # 0.1 epochs of thirty steps are three steps, whatever 0.1 is in binary.
    "step, every tenth of an epoch": (
        schedules.step,
        9,
        30,
        {"every_epochs": 0.1, "gamma": 0.5},
        [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125],
    ),
    "step at milestones": (
        schedules.step,
        8,
        2,
        {"milestones": [1, 2.5], "every_epochs": 0.5},
        [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01],
    ),
    "step between two steps": (schedules.step, 3, 2, {"milestones": [0.75]}, [1, 1, 0.1, 0.1]),
    "step without milestones": (schedules.step, 3, 1, {"milestones": [], "every_epochs": 1}, [1, 1, 1, 1]),
    "step after warm-up": (
        schedules.step,
        8,
        4,
        {"warmup_epochs": 0.75, "every_epochs": 1},
        [0.25, 0.5, 0.75, 1, 0.1, 0.1, 0.1, 0.1, 0.01],
    ),
    "step, dropped where the warm-up ends": (
        schedules.step,
        5,
        4,
        {"warmup_epochs": 1, "every_epochs": 1},
        [0.2, 0.4, 0.6, 0.8, 0.1, 0.1],
    ),
    # 0.3 of ten steps: 0, 1 and 2, the last at the peak; then seven steps from 2 to 9.
    "one cycle": (
        one_cycle,
        10,
        5,
        {"initial": 0.2, "final": 0.1},
        [0.2, 0.6, 1, *(0.55 + 0.45 * math.cos(math.pi * n / 7) for n in range(1, 7)), 0.1, 0.1],
    ),
    "one cycle, near zero": (one_cycle, 4, 2, {"rise": 0.5}, [0.04, 1, 0.500002, 4e-6, 4e-6]),
    "one cycle, an epoch of rise": (
        one_cycle,
        7,
        2,
        {"warmup_epochs": 1, "rise": 0.9, "final": 0},
        [0.04, 0.52, 1, COS_45, 0.5, 1 - COS_45, 0, 0],
    ),
    "one cycle, peak between two steps": (  # of 1.5 steps up and 2.5 down: 1/1.5 = 2/3, then 0.5/2.5 = 1/5 and 3/5
        one_cycle,
        5,
        1,
        {"warmup_epochs": 1.5, "initial": 0, "final": 0},
        [0, 0.75, (1 + math.cos(math.pi / 5)) / 2, (1 + math.cos(math.pi * 3 / 5)) / 2, 0, 0],
    ),
    "one cycle without rise": (one_cycle, 5, 5, {"warmup_epochs": 0, "final": 0}, [1, COS_45, 0.5, 1 - COS_45, 0, 0]),
    "one cycle with a rise of no step": (one_cycle, 3, 3, {"rise": 0, "final": 0}, [1, 0.5, 0, 0]),
    "one cycle, all of it rise": (one_cycle, 3, 3, {"rise": 1, "initial": 0.2, "final": 0}, [0.2, 0.6, 1, 0]),
    "one cycle, more rise than epochs": (one_cycle, 1, 1, {"warmup_epochs": 2, "initial": 0}, [0, 0.5]),
    "one cycle of one step": (one_cycle, 1, 1, {"final": 0}, [1, 0]),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_rate_of_every_step(name: str) -> None:
    make, total, steps_per_epoch, settings, expected = TABLE[name]
    assert len(expected) == total + 1
    rates = rates_of(lambda used: make(used, total, steps_per_epoch, **settings), total)
    assert rates == pytest.approx([LR * share for share in expected], abs=1e-12)


def test_a_cosine_stays_down_beyond_its_end() -> None:
    rates = rates_of(lambda used: cosine(used, 4, 2, final=0.25), 8)
    assert rates[4:] == pytest.approx([0.2] * 5)


def test_every_group_keeps_its_own_rate() -> None:
    used = optimizer(0.8, 0.02)
    schedule = cosine(used, 4, 2, warmup_epochs=0)
    assert [group["lr"] for group in used.param_groups] == pytest.approx([0.8, 0.02])
    schedule.step()
    schedule.step()
    assert [group["lr"] for group in used.param_groups] == pytest.approx([0.4, 0.01])


@pytest.mark.parametrize("done", range(9))
def test_a_schedule_goes_on_from_its_state(done: int) -> None:
    *_, expected = TABLE["cosine after an epoch of warm-up"]
    first = cosine(optimizer(), 8, 4, warmup_epochs=1)
    for _ in range(done):
        first.step()
    assert first.state_dict() == {"steps": done}
    used = optimizer()
    second = cosine(used, 8, 4, warmup_epochs=1)
    second.load_state_dict(first.state_dict())
    for share in expected[done:]:
        assert used.param_groups[0]["lr"] == pytest.approx(LR * share, abs=1e-12)
        second.step()


def test_a_longer_run_goes_on_along_its_own_curve() -> None:
    """After 2 of 4 steps a cosine is at a half; of a run of 8 that is a quarter of the way."""
    first = cosine(optimizer(), 4, 2)
    first.step()
    first.step()
    used = optimizer()
    cosine(used, 8, 2).load_state_dict(first.state_dict())
    assert used.param_groups[0]["lr"] == pytest.approx(LR * COS_45)


def test_no_schedule_rises_after_its_end() -> None:
    for make in (cosine, linear, schedules.step, one_cycle):
        rates = rates_of(lambda used, make=make: make(used, 6, 3, warmup_epochs=1), 12)
        assert rates[6:] == sorted(rates[6:], reverse=True) and rates[-1] >= 0, make.__name__


# ---------------------------------------------------------------------------------------------------------------------
# Ours against torch's


@pytest.mark.parametrize(("total", "rise"), [(20, 0.25), (40, 0.3), (37, 0.3), (7, 0.5), (100, 0.9)])
@pytest.mark.parametrize(("div_factor", "final_div_factor"), [(25, 1e4), (10, 100)])
def test_one_cycle_is_torchs(total: int, rise: float, div_factor: float, final_div_factor: float) -> None:
    shares = {"initial": 1 / div_factor, "final": 1 / div_factor / final_div_factor}
    rates = rates_of(lambda used: one_cycle(used, total, 5, rise=rise, **shares), total - 1)
    settings = {"pct_start": rise, "div_factor": div_factor, "final_div_factor": final_div_factor}
    torchs = rates_of(lambda used: OneCycleLR(used, LR, total_steps=total, cycle_momentum=False, **settings), total - 1)
    assert len(rates) == total and rates == pytest.approx(torchs, abs=1e-12)


def test_one_cycle_has_torchs_settings_unless_others_are_asked_for() -> None:
    rates = rates_of(lambda used: one_cycle(used, 40, 5), 39)
    assert rates == pytest.approx(rates_of(lambda used: OneCycleLR(used, LR, total_steps=40), 39), abs=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.3])
def test_linear_is_torchs(final: float) -> None:
    rates = rates_of(lambda used: linear(used, 8, 3, final=final), 10)
    torchs = rates_of(lambda used: LinearLR(used, start_factor=1.0, end_factor=final, total_iters=8), 10)
    assert rates == pytest.approx(torchs, abs=1e-12)


def test_steps_are_torchs() -> None:
    rates = rates_of(lambda used: schedules.step(used, 20, 4, every_epochs=2, gamma=0.3), 20)
    assert rates == pytest.approx(plain(lambda used: StepLR(used, 2, gamma=0.3), 5, 4))
    rates = rates_of(lambda used: schedules.step(used, 20, 4, milestones=[1, 3], gamma=0.3), 20)
    assert rates == pytest.approx(plain(lambda used: MultiStepLR(used, [1, 3], gamma=0.3), 5, 4))


# ---------------------------------------------------------------------------------------------------------------------
# torch's own


def plain(make: Callable[[Optimizer], Any], epochs: int, steps: int, each_step: bool = False) -> list[float]:
    """torch's scheduler used as its documentation says: after every epoch, or after every step."""
    used = optimizer()
    scheduler = make(used)
    rates = []
    for _ in range(epochs):
        for _ in range(steps):
            rates.append(used.param_groups[0]["lr"])
            used.step()
            if each_step:
                scheduler.step()
        if not each_step:
            scheduler.step()
    return [*rates, used.param_groups[0]["lr"]]


EPOCHS, STEPS = 5, 4
TORCH: dict[str, tuple[type, dict[str, Any]]] = {
    "StepLR": (StepLR, {"step_size": 2, "gamma": 0.5}),
    "ExponentialLR": (ExponentialLR, {"gamma": 0.9}),
    "CosineAnnealingLR": (CosineAnnealingLR, {"T_max": 4}),
}


def settings_of(name: str) -> dict[str, Any]:
    return {"_target_": f"torch.optim.lr_scheduler.{name}", **TORCH[name][1]}


def test_a_step_schedule_by_hand() -> None:
    """Halved after every second epoch of four steps: epochs 1 and 2 at 0.8, 3 and 4 at 0.4, 5 at 0.2."""
    rates = rates_of(lambda used: build_schedule(settings_of("StepLR"), used, EPOCHS, STEPS), EPOCHS * STEPS)
    assert rates == pytest.approx([0.8] * 8 + [0.4] * 8 + [0.2] * 4 + [0.2])


@pytest.mark.parametrize("name", TORCH)
def test_a_schedule_of_torch_is_stepped_where_an_epoch_ends(name: str) -> None:
    kind, settings = TORCH[name]
    rates = rates_of(lambda used: build_schedule(settings_of(name), used, EPOCHS, STEPS), EPOCHS * STEPS)
    assert rates == plain(lambda used: kind(used, **settings), EPOCHS, STEPS)
    assert len(set(rates)) > 2


def test_a_schedule_of_torch_that_takes_total_steps_is_stepped_every_step() -> None:
    settings = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.5, "pct_start": 0.25}
    rates = rates_of(lambda used: build_schedule(settings, used, EPOCHS, STEPS), EPOCHS * STEPS - 1)
    expected = plain(lambda used: OneCycleLR(used, 1.5, total_steps=20, pct_start=0.25), 1, 19, each_step=True)
    assert rates == expected and max(rates) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 9, 19])
@pytest.mark.parametrize("name", TORCH)
def test_a_schedule_of_torch_goes_on_within_an_epoch(name: str, done: int) -> None:
    expected = plain(lambda used: TORCH[name][0](used, **TORCH[name][1]), EPOCHS, STEPS)
    before = optimizer()
    first = build_schedule(settings_of(name), before, EPOCHS, STEPS)
    for _ in range(done):
        before.step()
        first.step()
    after = optimizer()
    second = build_schedule(settings_of(name), after, EPOCHS, STEPS)
    after.load_state_dict(copy.deepcopy(before.state_dict()))  # a run restores its optimizer before its schedule
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rates = []
    for _ in range(done, EPOCHS * STEPS):
        rates.append(after.param_groups[0]["lr"])
        after.step()
        second.step()
    assert [*rates, after.param_groups[0]["lr"]] == expected[done:]


# ---------------------------------------------------------------------------------------------------------------------
# From the configuration


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_the_configuration_names_a_schedule_of_the_whole_run(name: str) -> None:
    settings = {"_target_": f"engine.training.schedules.{name}", "warmup_epochs": 2}
    used = optimizer()
    schedule = build_schedule(settings, used, epochs=4, steps_per_epoch=5)
    assert type(schedule) is Schedule
    rates = rates_of(lambda other: build_schedule(settings, other, 4, 5), 20)
    assert rates[0] == pytest.approx(LR / 11)  # the first of ten steps of warm-up
    assert rates[9] == pytest.approx(LR * 10 / 11) and rates[10] == pytest.approx(LR)
    assert rates[15] == pytest.approx(LR if name == "constant" else LR / 2)  # in the middle of the ten that remain
    assert rates[20] == pytest.approx(LR if name == "constant" else 0, abs=1e-12)


@pytest.mark.parametrize("name", group_options()["scheduler"])
def test_a_file_of_settings_has_the_defaults_of_its_function(name: str) -> None:
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "scheduler" / f"{name}.yaml"))
    function = getattr(schedules, name)
    assert settings.pop("_target_") == f"engine.training.schedules.{name}"
    of_the_run = ("optimizer", "total_steps", "steps_per_epoch")
    parameters = inspect.signature(function).parameters.values()
    assert settings == {p.name: p.default for p in parameters if p.name not in of_the_run}


def test_a_schedule_that_follows_a_metric_is_refused() -> None:
    settings = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
    with pytest.raises(RequestError, match="ReduceLROnPlateau follows a metric"):
        build_schedule(settings, optimizer(), 2, 3)
    with pytest.raises(RequestError, match="scheduler"):
        build_schedule({"_target_": "engine.training.schedules.cosine", "warmup": 1}, optimizer(), 2, 3)


@pytest.mark.parametrize(("steps", "rate"), [(0, 0.8), (3, 0.8), (4, 0.08), (7, 0.08), (8, 0.008), (9, 0.008)])
def test_a_schedule_of_torch_started_at_a_step(steps: int, rate: float) -> None:
    """Ten times less after every epoch of four steps, counted from the beginning whatever the rate is now."""
    used = optimizer()
    schedule = build_schedule({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.1}, used, 5, 4)
    schedule.start(steps)
    assert used.param_groups[0]["lr"] == pytest.approx(rate) and schedule.state_dict()["steps"] == steps
    for _ in range(4):
        used.step()
        schedule.step()
    assert used.param_groups[0]["lr"] == pytest.approx(rate / 10)
