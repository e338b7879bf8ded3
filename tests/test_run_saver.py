"""When a run is saved, looked at and left, what it says then, and where it goes on."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.errors import Interrupted, RequestError, RunError
from engine.run import checkpoint, saver
from engine.run.saver import Saver, check_saved, state_names
from engine.run.state import Progress
from engine.training.metrics import Tally
from engine.training.schedules import constant

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.001}
TRY = "try a lower learning rate (optimizer.lr), or clip_grad_norm=1"


class Curve:
    """A schedule that remembers what it was told."""

    def __init__(self) -> None:
        self.steps, self.told = 0, list[Any]()

    def start(self, steps: int) -> None:
        self.steps = steps
        self.told.append(("start", steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.told.append(("load", state["steps"]))


def saver_of(
    directory: Path, minutes: float | None = None, steps: int | None = None, seed: int = 0, **settings: Any
) -> Saver:
    """Of a run of a linear model and a recorded schedule; settings change its configuration, data or environment."""
    config: dict[str, Any] = {"epochs": 4, "batch_size": 8, "optimizer": SGD, "model": {}, "dataset": {}, "choices": {}}
    about: dict[str, Any] = {"format": 1, "classes": ["a", "b"], "input_shape": [1, 1, 3], "data": "1 sample"}
    about["environment"] = {"python": "3", "threads": 2, "git_commit": "abc"}
    for name, value in settings.items():
        (about if name in about else config)[name] = value
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[config["optimizer"]["_target_"].rpartition(".")[2]](
        model.parameters(), **{name: value for name, value in config["optimizer"].items() if name != "_target_"}
    )
    parts = {"model": model, "optimizer": optimizer, "scheduler": Curve()}
    parts |= {"tally": Tally(torch.device("cpu")), "progress": Progress()}
    return Saver(directory, {**about, "config": config}, parts, minutes, steps)


def step(saver: Saver, loss: float = 1.0) -> None:
    """A step of training, all but the call of the saver."""
    saver.optimizer.zero_grad()
    saver.parts["model"](torch.ones(2, 3)).sum().backward()
    saver.optimizer.step()
    saver.parts["scheduler"].steps += 1
    saver.tally.add(torch.tensor(loss), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    saver.progress.batch += 1


def end_epoch(saver: Saver, accuracy: float = 0.5, loss: float = 1.0) -> bool:
    """The end of an epoch, all but the call of the saver."""
    row = dict.fromkeys(saver_columns(), 1.0) | {"epoch": saver.progress.epoch}
    saver.tally.reset()
    return saver.progress.end_epoch({**row, "val_accuracy": accuracy, "val_loss": loss})


def saver_columns() -> tuple[str, ...]:
    return ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the log."""
    lines: list[str] = []
    monkeypatch.setattr("engine.run.saver.log.info", lines.append)
    return lines


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds."""
    time = [1000.0]
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


Written = list[tuple[str, int, int]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """The files that are written, and of which epoch and step they are; nothing comes to the disk."""
    files: Written = []

    def write(path: Path, state: dict[str, Any], keep: Path | None = None) -> None:
        progress = state.get("progress", {"epoch": state.get("epoch"), "batch": 0})
        files.append((path.name, progress["epoch"], progress["batch"]))
        assert keep is None or (path.name, keep) == ("last.pt", path.with_name("previous.pt"))

    monkeypatch.setattr(saver.checkpoint, "write", write)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# When


def test_a_run_is_saved_every_so_many_minutes(tmp_path: Path, now: list[float], written: Written) -> None:
    saver = saver_of(tmp_path, minutes=2)
    for second in (1000.0, 1060.0, 1119.9, 1120.0, 1121.0, 1239.9, 1240.5, 1360.4, 1360.5):
        now[0] = second
        step(saver)
        saver.after_step()
    assert written == [("last.pt", 1, 4), ("last.pt", 1, 7), ("last.pt", 1, 9)]
    now[0] = 1400.0
    end_epoch(saver)
    saver.save_epoch(best=False)  # from here on the time counts
    for second in (1500.0, 1519.0, 1520.0):
        now[0] = second
        step(saver)
        saver.after_step()
    assert written[3:] == [("last.pt", 2, 0), ("last.pt", 2, 3)]


def test_a_run_is_saved_every_so_many_steps(tmp_path: Path, now: list[float], written: Written) -> None:
    saver = saver_of(tmp_path, steps=3)
    for _ in range(7):
        step(saver)
        saver.after_step()
        now[0] += 10**7  # without every_minutes no time counts
    assert written == [("last.pt", 1, 3), ("last.pt", 1, 6)]


def test_a_run_is_saved_by_time_and_by_steps_or_by_neither(tmp_path: Path, now: list[float], written: Written) -> None:
    both, neither = saver_of(tmp_path, minutes=0.5, steps=4), saver_of(tmp_path)
    for _ in range(8):
        now[0] += 16
        for one in (both, neither):
            step(one)
            one.after_step()
    assert [batch for _, _, batch in written] == [2, 4, 6, 8]


def test_a_loss_that_is_no_number_is_found_within_a_second_or_before_it_is_saved(
    tmp_path: Path, now: list[float], written: Written
) -> None:
    saver = saver_of(tmp_path)
    for second, loss in ((1000.0, 1.0), (1000.5, 1.0), (1000.6, math.nan), (1000.9, 1.0)):
        now[0] = second
        step(saver, loss)
        saver.after_step()
    now[0] = 1001.0
    step(saver)
    with pytest.raises(RunError) as error:
        saver.after_step()
    assert str(error.value) == (
        "the loss is not a finite number any more, first in epoch 1, step 3; no checkpoint was saved yet; " + TRY
    )
    for every in ({"steps": 1}, {"minutes": 1e-9}):
        saver = saver_of(tmp_path, **every)  # type: ignore[arg-type]
        now[0] += 0.1
        step(saver, math.inf)
        with pytest.raises(RunError, match="first in epoch 1, step 1"):
            saver.after_step()
    assert written == []


def test_the_device_is_waited_for_once_a_second_at_most(tmp_path: Path, now: list[float], written: Written) -> None:
    now[0] = 3.0
    saver, looked = saver_of(tmp_path), list[float]()
    saver.tally.first_bad_step = lambda: looked.append(now[0])
    for second in [3 + eighth / 8 for eighth in range(28)] + [12.5, 13.0, 14.25, 15.0]:
        now[0] = second
        saver.after_step()
    assert looked == [4.0, 5.0, 6.0, 12.5, 14.25]


def test_best_is_written_before_last_which_names_it(tmp_path: Path, written: Written) -> None:
    saver = saver_of(tmp_path)
    for accuracy in (0.5, 0.4, 0.6):
        step(saver)
        saver.save_epoch(end_epoch(saver, accuracy))
    assert written == [("best.pt", 1, 0), ("last.pt", 2, 0), ("last.pt", 3, 0), ("best.pt", 3, 0), ("last.pt", 4, 0)]


def test_what_the_files_hold(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    weights: list[Tensor] = []
    for accuracy in (0.5, 0.7, 0.6):
        step(saver)
        saver.save_epoch(end_epoch(saver, accuracy))
        weights.append(saver.parts["model"].weight.detach().clone())
    best, last, previous = (checkpoint.read(tmp_path / f"{name}.pt") for name in ("best", "last", "previous"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    assert best.keys() == {*saver.about, "model", "epoch", "metrics"}
    assert (best["epoch"], best["metrics"]["val_accuracy"], best["classes"]) == (2, 0.7, ["a", "b"])
    assert last.keys() == previous.keys() == {*saver.about, *saver.parts}
    assert (last["progress"]["epoch"], previous["progress"]["epoch"]) == (4, 3)
    for saved, epoch in ((best, 2), (last, 3), (previous, 2)):
        assert torch.equal(saved["model"]["weight"], weights[epoch - 1])


# ---------------------------------------------------------------------------------------------------------------------
# Told to stop


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_signal_waits_for_the_end_of_the_step(
    tmp_path: Path, written: Written, number: int, name: str, code: int
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as error, saver_of(tmp_path) as saver:
        step(saver)
        saver.after_step()
        signal.raise_signal(number)
        step(saver)
        assert written == []
        saver.after_step()
    assert error.value.exit_code == code
    assert str(error.value) == (
        f"stopped by {name} in epoch 1, step 2; continue with: python train.py resume={tmp_path}"
    )
    assert written == [("last.pt", 1, 2)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_between_two_epochs_nothing_is_saved_again(tmp_path: Path, written: Written) -> None:
    saver = saver_of(tmp_path)
    step(saver)
    saver.save_epoch(end_epoch(saver))
    saver.signal = signal.SIGTERM
    with pytest.raises(Interrupted, match="stopped by SIGTERM in epoch 2, step 0; continue"):
        next(saver.until_stopped(["a batch of the test"]))
    assert written == [("best.pt", 1, 0), ("last.pt", 2, 0)]


def test_an_evaluation_is_left_between_two_batches(tmp_path: Path, written: Written) -> None:
    saver = saver_of(tmp_path)
    assert list(saver.until_stopped("abc")) == ["a", "b", "c"]
    step(saver)
    seen = []
    with pytest.raises(Interrupted):
        for batch in saver.until_stopped("abc"):
            seen.append(batch)
            saver.signal = signal.SIGINT if batch == "b" else None
    assert seen == ["a", "b"] and written == [("last.pt", 1, 1)]


def test_a_state_that_is_bad_is_not_saved_when_told_to_stop(tmp_path: Path, written: Written) -> None:
    saver = saver_of(tmp_path)
    step(saver, math.nan)
    saver.signal = signal.SIGINT
    with pytest.raises(RunError, match="the loss is not a finite number"):
        saver.after_step()
    assert written == []


def test_a_second_signal_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with saver_of(tmp_path) as saver:
        signal.raise_signal(signal.SIGTERM)
        assert codes == [] and saver.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert codes == [143, 130]


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    before, ended = signal.getsignal(signal.SIGINT), list[str]()

    def train() -> None:
        with saver_of(tmp_path):
            ended.append("within")
        ended.append("after")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ended == ["within", "after"] and signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


def spoilt(what: str, value: float) -> Callable[[Saver], None]:
    def spoil(saver: Saver) -> None:
        if what == "rate":
            saver.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": value})
        elif what == "weight":
            saver.parts["model"].bias.data[1] = value
        else:
            saver.parts["model"].register_buffer("mean", torch.tensor([0.0, value]))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "val_loss", "what"),
    [
        (spoilt("rate", math.nan), None, "the learning rate"),
        (spoilt("rate", math.inf), 1.0, "the learning rate"),
        (spoilt("weight", math.nan), None, "a weight"),
        (spoilt("weight", -math.inf), 0.5, "a weight"),
        (spoilt("buffer", math.inf), None, "a weight"),
        (lambda _: None, math.nan, "the validation loss"),
        (lambda _: None, math.inf, "the validation loss"),
    ],
)
def test_what_is_not_finite_any_more_is_named(
    tmp_path: Path, spoil: Callable[[Saver], None], val_loss: float | None, what: str
) -> None:
    saver = saver_of(tmp_path)
    for _ in range(2):
        step(saver)
    for fine in (None, 0.0, 2.5):
        saver.check_finite(fine)
    spoil(saver)
    with pytest.raises(RunError) as error:
        saver.check_finite(val_loss)
    assert str(error.value) == (
        f"{what} is not a finite number any more, first in epoch 1, step 2; no checkpoint was saved yet; {TRY}"
    )


def test_the_first_bad_loss_goes_before_what_follows_from_it(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    saver.save_epoch(end_epoch(saver))
    for loss in (1.0, math.nan, math.inf):
        step(saver, loss)
    spoilt("weight", math.nan)(saver)
    with pytest.raises(RunError) as error:
        saver.check_finite(math.nan)
    assert str(error.value) == (
        "the loss is not a finite number any more, first in epoch 2, step 2; "
        f"the last good checkpoint is {tmp_path}/last.pt; {TRY}"
    )


def test_a_test_loss_that_is_no_number(tmp_path: Path) -> None:
    saver = saver_of(tmp_path)
    for accuracy in (0.5, 0.4):
        end_epoch(saver, accuracy)
    saver.check_test_loss(0.0)
    with pytest.raises(RunError) as error:
        saver.check_test_loss(math.inf)
    assert str(error.value) == (
        f"the test loss is not a finite number, with the weights of epoch 1 in {tmp_path}/best.pt; {TRY}"
    )


def test_memory_that_runs_out_names_the_step_and_what_to_try(tmp_path: Path) -> None:
    before, cause = signal.getsignal(signal.SIGINT), MemoryError()
    with pytest.raises(RunError) as error, saver_of(tmp_path) as saver:
        step(saver)
        raise cause
    assert str(error.value) == (
        "epoch 1, step 2: out of memory with batch_size=8; try batch_size=4; no checkpoint was saved yet"
    )
    assert error.value.__cause__ is cause and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyError), saver_of(tmp_path):  # another error is as it was
        raise KeyError("x")


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def stopped(directory: Path, epochs_done: int = 1, steps: int = 2, **settings: Any) -> Saver:
    """A run of which last.pt was saved after so many epochs (of 3 steps) and steps."""
    saver = saver_of(directory, **settings)
    for _ in range(epochs_done):
        for _ in range(3):
            step(saver)
        saver.save_epoch(end_epoch(saver))
    for _ in range(steps):
        step(saver, loss=2.0)
    saver._save_last()
    return saver


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def state(saver: Saver) -> dict[str, Any]:
    return {name: copy.deepcopy(part.state_dict()) for name, part in saver.parts.items()}


def test_every_part_goes_on_where_it_was(tmp_path: Path, said: list[str]) -> None:
    first, again = stopped(tmp_path), saver_of(tmp_path, seed=1)
    assert not same(state(first)["model"], state(again)["model"])
    again.restore([], steps_per_epoch=3)
    assert same(state(first), state(again)) and again.parts["scheduler"].told == [("load", 5)]
    assert said == ["resumed  in epoch 2, after 2 steps"]
    assert again.tally.read() == (2.0, 0.5)


def test_a_run_of_which_nothing_was_saved_begins(tmp_path: Path, said: list[str]) -> None:
    saver = saver_of(tmp_path)
    before = state(saver)
    saver.restore(["seed 0 -> 1"], steps_per_epoch=3)
    assert same(state(saver), before) and said == ["resumed  from the beginning: nothing had been saved yet"]


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_the_one_before_is_taken_where_last_is_damaged(tmp_path: Path, said: list[str], damage: str) -> None:
    stopped(tmp_path)
    last = tmp_path / "last.pt"
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:100])
    saver = saver_of(tmp_path)
    saver.restore([], steps_per_epoch=3)
    assert (saver.progress.epoch, saver.progress.batch) == (2, 0)
    assert said[0].startswith(f"{last}: ") and said[0].endswith(
        f": going on from {tmp_path}/previous.pt, the one before"
    )
    assert said[1:] == ["resumed  in epoch 2, after 0 steps"]
    (tmp_path / "previous.pt").write_bytes(b"")
    with pytest.raises(RequestError, match=r"previous.pt: not a checkpoint, or a damaged one"):
        saver.restore([], steps_per_epoch=3)


def test_a_first_last_without_one_before(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path, epochs_done=0)
    assert not (tmp_path / "previous.pt").exists()
    saver = saver_of(tmp_path)
    saver.restore([], steps_per_epoch=3)
    assert saver.progress.batch == 2 and said == ["resumed  in epoch 1, after 2 steps"]


def test_more_epochs_lead_the_schedule_anew_to_the_same_step(tmp_path: Path, said: list[str]) -> None:
    first = stopped(tmp_path)
    saver = saver_of(tmp_path, epochs=9, optimizer={**SGD, "lr": 0.5})
    saver.restore([], steps_per_epoch=100)
    assert saver.parts["scheduler"].told == [("start", 5)] and saver.progress.batch == 2
    assert saver.optimizer.param_groups[0]["lr"] == 0.5  # from which the schedule starts
    assert same(state(saver)["optimizer"]["state"], state(first)["optimizer"]["state"])
    assert said == ["resumed  in epoch 2, after 2 steps"] and saver.tally.samples == 4


def test_changed_settings_begin_the_epoch_again_with_the_weights_as_they_are(tmp_path: Path, said: list[str]) -> None:
    first = stopped(tmp_path, epochs_done=2)
    saver = saver_of(tmp_path, optimizer={**SGD, "lr": 0.02, "momentum": 0.5, "weight_decay": 0.25})
    saver.restore(["optimizer.lr 0.1 -> 0.02", "batch_size 8 -> 4"], steps_per_epoch=7)
    assert saver.parts["scheduler"].told == [("start", 14)]  # two epochs of this run's 7 steps
    assert (saver.progress.epoch, saver.progress.batch, saver.tally.samples) == (3, 0, 0)
    group = saver.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], len(group["params"])) == (0.02, 0.5, 0.25, 2)
    assert group["params"][0] is saver.parts["model"].weight
    assert same(state(saver)["model"], state(first)["model"])
    assert same(state(saver)["optimizer"]["state"], state(first)["optimizer"]["state"])
    assert said == [
        "changed  optimizer.lr 0.1 -> 0.02, batch_size 8 -> 4; "
        "epoch 3 begins again from its first sample, with the weights of step 2",
        "resumed  in epoch 3, after 0 steps",
    ]


def test_changed_settings_between_two_epochs(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path, steps=0)
    saver = saver_of(tmp_path)
    saver.restore(["seed 0 -> 1"], steps_per_epoch=3)
    assert said[0] == "changed  seed 0 -> 1; epoch 2 is next" and saver.parts["scheduler"].told == [("start", 3)]


@pytest.mark.parametrize(("epochs", "told"), [(1, []), (2, [("start", 5)]), (3, [("start", 5)])])
def test_fewer_epochs_than_were_trained_lead_no_schedule_beyond_its_end(
    tmp_path: Path, said: list[str], epochs: int, told: list[Any]
) -> None:
    stopped(tmp_path)  # in epoch 2
    saver = saver_of(tmp_path, epochs=epochs)
    saver.restore([], steps_per_epoch=3)
    assert saver.parts["scheduler"].told == told


def test_a_real_schedule_goes_on_from_the_optimizers_own_rate(tmp_path: Path, said: list[str]) -> None:
    first = saver_of(tmp_path)
    first.parts["scheduler"] = constant(first.optimizer, 40, 10, warmup_epochs=1)  # (step + 1) / 11 of the rate
    for _ in range(4):
        step(first)
    first.parts["scheduler"].start(4)
    first._save_last()
    again = saver_of(tmp_path, epochs=9)
    again.parts["scheduler"] = constant(again.optimizer, 90, 10, warmup_epochs=1)
    again.restore([], steps_per_epoch=10)
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 5 / 11)


def test_what_another_optimizer_keeps_is_not_taken_over(tmp_path: Path, said: list[str]) -> None:
    first = stopped(tmp_path)
    saver = saver_of(tmp_path, optimizer=ADAM)
    saver.restore(["optimizer sgd -> adam"], steps_per_epoch=3)
    assert saver.optimizer.state_dict()["state"] == {} and saver.optimizer.param_groups[0]["lr"] == 0.001
    assert same(state(saver)["model"], state(first)["model"])
    assert said[0] == "changed  Adam begins without averages: those saved are another kind's"
    assert said[1].startswith("changed  optimizer sgd -> adam; epoch 2 begins again")


def test_an_optimizer_that_finds_all_it_needs_takes_it_over(tmp_path: Path, said: list[str]) -> None:
    first = stopped(tmp_path)
    saver = saver_of(tmp_path, optimizer={**SGD, "momentum": 0.5})
    saver.restore(["optimizer.momentum 0.9 -> 0.5"], steps_per_epoch=3)
    assert same(state(saver)["optimizer"]["state"], state(first)["optimizer"]["state"])
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    stopped(nothing, epochs_done=0, steps=0)  # nothing kept yet, which fits every optimizer
    saver_of(nothing, optimizer=ADAM).restore(["optimizer sgd -> adam"], steps_per_epoch=3)
    saver_of(tmp_path, optimizer={**SGD, "momentum": 0.0}).restore(["as asked"], steps_per_epoch=3)  # which needs none
    assert not [line for line in said if "begins without averages" in line]


def test_what_optimizers_keep() -> None:
    assert state_names(SGD) == {"momentum_buffer"}
    assert state_names(ADAM) == {"step", "exp_avg", "exp_avg_sq"}
    assert state_names({"_target_": "torch.optim.Adagrad", "lr": 0.1}) == {"step", "sum"}


def test_other_data_is_refused_unless_that_was_accepted(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path)
    saver = saver_of(tmp_path, data="2 samples")
    before = state(saver)
    with pytest.raises(RequestError) as error:
        saver.restore([], steps_per_epoch=3)
    assert str(error.value) == (
        f"{tmp_path}: the data is another than it was started with: 1 sample -> 2 samples; "
        "resume_changed=true goes on all the same"
    )
    assert same(state(saver), before)
    saver.restore(["as asked"], steps_per_epoch=3)
    assert saver.progress.epoch == 2


def test_another_machine_is_a_warning_and_another_commit_is_none(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path)
    here = {"python": "4", "threads": 2, "git_commit": "def", "device": "cpu"}
    saver_of(tmp_path, environment=here).restore([], steps_per_epoch=3)
    assert said[0] == (
        "warning  python 3 -> 4, device None -> cpu since the run was saved: the last bits may come out differently"
    )
    said.clear()
    saver_of(tmp_path, environment={"python": "3", "threads": 2, "git_commit": "def"}).restore([], steps_per_epoch=3)
    assert said == ["resumed  in epoch 2, after 2 steps"]


def test_a_state_of_another_model_does_not_fit(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path, epochs_done=0, steps=0)
    saver = saver_of(tmp_path)
    saver.parts["model"] = nn.Linear(5, 2)
    with pytest.raises(RequestError, match=r"last.pt: does not fit this run \(.*size mismatch for weight"):
        saver.restore([], steps_per_epoch=3)


@pytest.mark.parametrize("kind", [KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError])
def test_whatever_a_part_says_of_a_state_is_one_line(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def load(state: dict[str, Any]) -> None:
        raise kind("no such\ngroup")

    stopped(tmp_path)
    saver = saver_of(tmp_path)
    monkeypatch.setattr(saver.optimizer, "load_state_dict", load)
    with pytest.raises(RequestError) as error:
        saver.restore([], steps_per_epoch=3)
    assert str(error.value).startswith(f"{tmp_path}/last.pt: does not fit this run (") and "\n" not in str(error.value)


def test_memory_that_runs_out_while_a_state_is_loaded(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(state: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    stopped(tmp_path)
    saver = saver_of(tmp_path)
    monkeypatch.setattr(saver.optimizer, "load_state_dict", load)
    with pytest.raises(RunError) as error:
        saver.restore([], steps_per_epoch=3)
    assert type(error.value) is RunError
    assert str(error.value) == f"{tmp_path}/last.pt: out of memory with batch_size=8; try batch_size=4"


# ---------------------------------------------------------------------------------------------------------------------
# A last.pt that no run writes

LARGE = 2**63 - 1
ROW = {name: 1.0 for name in saver_columns()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], nn.Module]:
    """A last.pt in epoch 3 and its model."""
    saver = stopped(tmp_path_factory.mktemp("run"), epochs_done=2)
    return checkpoint.read(saver.last), saver.parts["model"]


def changed(saved: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    for name, value in changes.items():
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        target: Any = saved
        for key in path:
            target = target[key]
        target[last] = value
    return saved


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A test that fails leaves no handler behind."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"progress.batch": 0, "scheduler.steps": 0, "tally.correct": 0},
        {"progress.batch": LARGE, "scheduler.steps": LARGE, "tally.correct": LARGE},
        {"progress.history": [], "progress.best": {}, "progress.epoch": 1},
        {"progress.history.0.val_loss": None, "progress.history.1.val_accuracy": None},
        {"progress.history.0.val_loss": 7},
        {"optimizer.state.0.step": torch.tensor(7.0), "optimizer.state.0.note": "text"},
        {"optimizer.state.0.momentum_buffer": None},
    ],
    ids=lambda changes: next(iter(changes), "nothing"),
)
def test_a_state_that_a_run_may_write(run: tuple[dict[str, Any], nn.Module], changes: dict[str, Any]) -> None:
    saved, model = run
    check_saved(changed(saved, changes), model)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": None}, "its data and environment are no descriptions"),
    ({"environment": "x"}, "its data and environment are no descriptions"),
    *(
        ({name: value}, "its counts of epochs and steps are")
        for name in ("progress.epoch", "progress.batch", "scheduler.steps", "tally.correct")
        for value in (-1, LARGE + 1, 1.0, True)
    ),
    ({"progress.history.0": "x"}, "a row of its metrics is x"),
    ({"progress.history.1": {**ROW, "more": 1}}, "a row of its metrics is"),
    ({"progress.history.1.lr": math.nan}, "a row of its metrics is"),
    ({"progress.history.1.lr": True}, "a row of its metrics is"),
    ({"progress.history.1.lr": "0.1"}, "a row of its metrics is"),
    ({"progress.best": {"epoch": 1}}, "a row of its metrics is"),
    ({"progress.best": {**ROW, "lr": math.inf}}, "a row of its metrics is"),
    ({"progress.epoch": 2}, "it is in epoch 2, after 2 rows of metrics"),
    ({"progress.epoch": 4}, "it is in epoch 4, after 2 rows of metrics"),
    ({"progress.history.1.epoch": 1}, "it is in epoch 3, after 2 rows of metrics"),
    ({"progress.history.0.epoch": 0}, "it is in epoch 3, after 2 rows of metrics"),
    ({"progress.best": {}}, "its best epoch is none of its epochs"),
    ({"progress.best": ROW}, "its best epoch is none of its epochs"),
    ({"progress.history": [], "progress.epoch": 1}, "its best epoch is none of its epochs"),
    ({"progress.seconds": math.nan}, "its seconds and learning rate are no numbers"),
    ({"progress.lr": math.inf}, "its seconds and learning rate are no numbers"),
    ({"progress.lr": None}, "its seconds and learning rate are no numbers"),
    ({"tally.losses": torch.zeros(1, 2)}, "its losses and batches are not as many"),
    ({"tally.losses": torch.zeros(3)}, "its losses and batches are not as many"),
    ({"tally.losses": torch.zeros(1, 2), "tally.sizes": torch.zeros(1, 2)}, "its losses and batches are not as many"),
    ({"optimizer.state.1.momentum_buffer": torch.zeros(3)}, "momentum_buffer of its optimizer is [3], not [2]"),
    (
        {"optimizer.state.0.momentum_buffer": torch.zeros(3, 2)},
        "momentum_buffer of its optimizer is [3, 2], not [2, 3]",
    ),
    ({"optimizer.state.0.momentum_buffer": torch.zeros(0)}, "momentum_buffer of its optimizer is [0], not [2, 3]"),
]


@pytest.mark.parametrize(("changes", "why"), WRONG)
def test_a_state_that_no_run_writes(run: tuple[dict[str, Any], nn.Module], changes: dict[str, Any], why: str) -> None:
    saved, model = run
    with pytest.raises(ValueError) as error:
        check_saved(changed(saved, changes), model)
    assert why in str(error.value) and len(str(error.value)) < 160


def test_a_state_that_no_run_writes_is_refused_before_anything_is_loaded(tmp_path: Path, said: list[str]) -> None:
    stopped(tmp_path)
    whole, saver = checkpoint.read(tmp_path / "last.pt"), saver_of(tmp_path, seed=1)
    before = state(saver)
    for name, value in (("progress", {}), ("progress", 7), ("optimizer", {"state": []}), ("data", None)):
        checkpoint.write(tmp_path / "last.pt", {**whole, name: value})
        with pytest.raises(RequestError, match=r"last.pt: holds no run that can go on \("):
            saver.restore([], steps_per_epoch=3)
    assert same(state(saver), before)
