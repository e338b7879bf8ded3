"""The best epoch and early stopping, for histories whose answer can be read off; the state of a run in between."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

import train
from engine.run import state as run_state
from engine.run.state import EveryRandomStates, Progress, RandomStates

# A history is a list of (validation accuracy, validation loss), an epoch each, or (None, None) without validation.
History = list[tuple[float | None, float | None]]


def row_of(epoch: int, accuracy: float | None, loss: float | None) -> dict[str, Any]:
    """As train.py makes it; training gets better and better, which must not count."""
    row: dict[str, Any] = {"epoch": epoch, "train_loss": 1 / epoch, "train_accuracy": epoch / 100, "lr": 0.1}
    return {**row, "val_loss": loss, "val_accuracy": accuracy, "seconds": 1.0, "images_per_second": 10.0}


def end_epochs(history: History, progress: Progress | None = None) -> tuple[Progress, list[bool]]:
    progress = progress or Progress()
    better = []
    for accuracy, loss in history:
        progress.begin_epoch(lr=0.1)
        progress.batch += 7
        better.append(bool(progress.end_epoch(row_of(progress.epoch, accuracy, loss))))
    return progress, better


BEST: dict[str, tuple[History, int]] = {
    "one": ([(0.5, 1.0)], 1),
    "rising": ([(0.5, 1.0), (0.6, 0.9), (0.7, 0.8)], 3),
    "falling": ([(0.7, 0.8), (0.6, 0.9), (0.5, 1.0)], 1),
    "a peak": ([(0.5, 1.0), (0.9, 0.4), (0.8, 0.3), (0.8, 0.5)], 2),  # accuracy decides, not the loss
    "accuracy over loss": ([(0.8, 0.1), (0.9, 9.0), (0.8, 0.01)], 2),
    "a tie goes to the lower loss, later": ([(0.9, 0.5), (0.9, 0.4)], 2),
    "a tie goes to the lower loss, earlier": ([(0.9, 0.4), (0.9, 0.5)], 1),
    "equal in both: the first": ([(0.8, 0.3), (0.9, 0.4), (0.9, 0.4), (0.9, 0.4)], 2),
    "nothing right yet": ([(0.0, 2.0), (0.0, 3.0), (0.0, 1.0)], 3),
    "without validation: the last": ([(None, None)] * 4, 4),
}


@pytest.mark.parametrize("name", BEST)
def test_the_best_epoch(name: str) -> None:
    history, best = BEST[name]
    progress, better = end_epochs(history)
    assert progress.best["epoch"] == best and progress.best == row_of(best, *history[best - 1])
    assert max(epoch for epoch, one in enumerate(better, 1) if one) == best  # the one whose weights were kept last
    assert better[0] is True
    assert progress.epoch == len(history) + 1 and progress.batch == 0
    assert [row["epoch"] for row in progress.history] == list(range(1, len(history) + 1))
    assert progress.epochs_since_best() == len(history) - best


def test_without_validation_the_last_epoch_is_the_best_however_training_went() -> None:
    progress = Progress()
    for epoch, (loss, accuracy) in enumerate(((0.5, 0.8), (0.1, 0.9), (0.3, 0.7)), start=1):
        row = {**row_of(epoch, None, None), "train_loss": loss, "train_accuracy": accuracy}
        assert progress.end_epoch(row) and progress.best == row


def test_each_epoch_is_told_whether_it_is_better() -> None:
    history: History = [(0.5, 1.0), (0.4, 0.1), (0.5, 0.9), (0.5, 0.9), (0.6, 5.0), (0.6, 6.0)]
    assert end_epochs(history)[1] == [True, False, True, False, True, False]
    assert end_epochs([(None, None)] * 3)[1] == [True, True, True]


# An epoch that brings the best so far is marked +, another -. Training stops when `patience` epochs in a row were -.
#              history           patience: after which epoch it stops
STOPS: list[tuple[str, dict[int | None, int]]] = [
    ("+-----", {1: 2, 2: 3, 3: 4, 5: 6, 6: 6, None: 6}),
    ("++++++", {1: 6, 2: 6, None: 6}),
    ("+-+--+-+---", {1: 2, 2: 5, 3: 11, 4: 11}),
    ("++--+---+", {1: 3, 2: 4, 3: 8, 4: 9}),
    ("+", {1: 1}),
]


def as_history(marks: str) -> History:
    history: History = []
    accuracy = 0.1
    for mark in marks:
        accuracy += 0.05 * (mark == "+")
        history.append((accuracy if mark == "+" else accuracy - 0.05, 1.0))
    return history


def stops_after(history: History, patience: int | None, resumed: bool) -> int:
    """The epoch after which train.py's loop ends; `resumed`: every epoch starts from what the last one saved."""
    progress = Progress()
    while progress.epoch <= len(history) and not train.stop_early(progress, patience):
        end_epochs([history[progress.epoch - 1]], progress)
        if resumed:
            state = copy.deepcopy(progress.state_dict())
            progress = Progress()
            progress.load_state_dict(state)
    return progress.epoch - 1


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("marks", "patience", "expected"), [(marks, *case) for marks, cases in STOPS for case in cases.items()]
)
def test_training_stops_after_so_many_epochs_without_a_better_one(
    marks: str, patience: int | None, expected: int, resumed: bool
) -> None:
    assert stops_after(as_history(marks), patience, resumed) == expected


def test_equal_epochs_are_no_better_and_without_validation_nothing_stops() -> None:
    assert stops_after([(0.5, 1.0)] * 9, 3, resumed=False) == 4
    assert stops_after([(0.5, 1.0), (0.5, 0.9), (0.5, 0.8), (0.5, 0.8)], 1, resumed=False) == 4
    assert stops_after([(None, None)] * 9, 1, resumed=False) == 9
    assert train.stop_early(Progress(), 1) is False and Progress().epochs_since_best() == 0


def test_a_resumed_run_remembers_the_best() -> None:
    first, _ = end_epochs([(0.9, 0.2), (0.5, 0.9)])
    first.begin_epoch(lr=0.03)
    first.batch = 5
    second = Progress()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert (second.epoch, second.batch, second.lr) == (3, 5, 0.03)
    assert second.best["epoch"] == 1 and second.epochs_since_best() == 1
    second, better = end_epochs([(0.8, 0.1), (0.9, 0.3), (0.9, 0.1)], second)
    assert better == [False, False, True] and second.best["epoch"] == 5
    assert len(first.history) == 2  # the state that was saved is not the list that goes on


def test_the_state_is_data(tmp_path: Any) -> None:
    progress, _ = end_epochs([(0.9, 0.2)])
    torch.save(progress.state_dict(), tmp_path / "state.pt")
    second = Progress()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.history == progress.history and second.best == progress.best


def test_the_clock_of_an_epoch_stands_while_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress()
    now[0] = 110.0
    progress.begin_epoch(lr=0.5)
    progress.batch, now[0] = 3, 114.0
    assert progress.seconds == 4.0
    state = progress.state_dict()
    now[0] = 9000.0
    later = Progress()
    later.load_state_dict(state)
    later.begin_epoch(lr=0.1)  # goes on: neither its clock nor its learning rate begin anew
    now[0] = 9003.0
    assert later.seconds == 7.0 and later.lr == 0.5
    later.end_epoch(row_of(1, 0.5, 1.0))
    later.begin_epoch(lr=0.1)
    assert later.seconds == 0.0 and later.lr == 0.1


def test_all_generators_go_on_where_they_were_saved(tmp_path: Any) -> None:
    def draw() -> list[float]:
        normal = np.random.standard_normal(3).tolist()  # an odd number: NumPy keeps the second of a pair
        return [*torch.rand(2).tolist(), *normal, random.random(), random.gauss(0, 1)]

    draw()
    torch.save(RandomStates().state_dict(), tmp_path / "states.pt")
    expected = draw()
    assert draw() != expected
    RandomStates().load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected


def test_random_states_of_devices_that_came_or_went_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    restored: list[int] = []
    monkeypatch.setattr("engine.run.state.log.info", said.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, number: restored.append(number))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    states = RandomStates()
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: None)
    state = {key: value for key, value in states.state_dict().items() if key != "cuda"}
    for saved, here in ((2, 2), (3, 1), (0, 2), (0, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: here)
        states.load_state_dict({**state, **({"cuda": [None] * saved} if saved else {})})
    states.load_state_dict({**state, "mps": None})
    assert restored == [0, 1, 0]
    assert said == [
        "warning  random states not restored: those of cuda:1, cuda:2, not in this machine; dropout may differ",
        "warning  random states not restored: those of cuda:0, cuda:1, not saved; dropout may differ",
        "warning  random states not restored: those of mps, not in this machine; dropout may differ",
    ]


def test_the_generators_of_devices_that_are_here_are_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, number: restored.append((number, state)))
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: restored.append(("mps", state)))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["first", "second"])
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "own")
    for cards, mps in ((2, False), (0, True), (0, False)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda cards=cards: cards > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        state = RandomStates().state_dict()
        assert (state.get("cuda"), state.get("mps")) == (["first", "second"] if cards else None, "own" if mps else None)
        RandomStates().load_state_dict(state)
        RandomStates().load_state_dict({key: state[key] for key in ("torch", "numpy", "python")})
    assert restored == [(0, "first"), (1, "second"), ("mps", "own")]


def test_a_run_on_the_cpu_of_a_machine_with_gpus_leaves_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for the state of a GPU's generator takes some of its memory, and fails where another has it to itself."""
    said: list[str] = []
    monkeypatch.setattr("engine.run.state.log.info", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("a GPU was asked"))
    state = RandomStates().state_dict()
    RandomStates().load_state_dict(state)
    assert "cuda" not in state and said == []


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 1), (2, None)])
def test_of_several_processes_each_gets_its_own_random_states(
    monkeypatch: pytest.MonkeyPatch, rank: int, expected: int | None
) -> None:
    """Saved by two; a third, which there was not, goes on with its own."""
    draws, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(RandomStates().state_dict())
        draws.append(torch.rand(3))
    monkeypatch.setattr(run_state, "gathered", lambda _: states)
    saved = EveryRandomStates().state_dict()
    monkeypatch.setattr(run_state, "rank", lambda: rank)
    torch.manual_seed(9)
    own = torch.rand(3)
    torch.manual_seed(9)
    EveryRandomStates().load_state_dict(saved)
    assert torch.equal(torch.rand(3), own if expected is None else draws[expected])
