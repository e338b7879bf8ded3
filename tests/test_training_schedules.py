"""Learning rates: from the formula by hand at the first, last and boundary steps; torch's own against torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, StepLR

from engine.errors import RequestError
from engine.training.schedules import Schedule, build_schedule, constant, cosine

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
