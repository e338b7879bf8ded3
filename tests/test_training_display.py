"""What a run shows of an epoch: every figure of the bar and of the line that follows it, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine import terminal
from engine.training import display
from engine.training.display import Bar, duration, epoch_line
from engine.training.metrics import Tally


def count(tally: Tally, right: int, wrong: int, loss: float) -> None:
    """A step of samples of two classes, all of the second."""
    logits = torch.tensor([[0.0, 1.0]] * right + [[1.0, 0.0]] * wrong)
    tally.add(torch.tensor(loss), logits, torch.ones(right + wrong, dtype=torch.int64))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what time it is for the bar."""

    def at(seconds: float) -> None:
        monkeypatch.setattr(display.time, "perf_counter", lambda: seconds)

    at(100.0)
    return at


def test_the_bar_of_an_epoch_that_goes_on_in_its_middle(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Loss and accuracy are of all samples, 20 before and 60 now; the rate is of the 60 alone, in 2 seconds."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0125)
    tally = Tally(torch.device("cpu"))
    count(tally, 5, 15, 4.0)
    bar = Bar("epoch 2/3", 9, 1, tally, optimizer)
    assert bar.bar is not None
    count(tally, 15, 15, 2.0)
    clock(100.1)
    bar.update()
    assert bar.bar.n == 1 and not bar.bar.postfix  # to read the tally waits for the device
    count(tally, 28, 2, 1.0)
    clock(102.0)
    bar.update()
    assert bar.bar.n == 3
    assert bar.bar.postfix == "loss 2.1250, accuracy 60.00%, lr 0.013, 30 images/s"  # (20 * 4 + 30 * 2 + 30) / 80
    bar.close()
    assert " 33%|" in capfd.readouterr().err


def test_no_bar_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    tally = Tally(torch.device("cpu"))
    bar = Bar("epoch 1/1", 1, 0, tally, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    count(tally, 1, 0, 1.0)
    bar.update()
    bar.close()
    assert capfd.readouterr() == ("", "")


def row(epoch: int, seconds: float, **changes: Any) -> dict[str, Any]:
    figures = {"train_loss": 0.12344, "train_accuracy": 0.98764, "val_loss": 0.5, "val_accuracy": 0.75, "lr": 0.0125}
    return {"epoch": epoch, "seconds": seconds, "images_per_second": 12345.6, **figures, **changes}


def test_the_line_of_an_epoch() -> None:
    """Epochs of 2 and of 4 seconds: ten more would take 30."""
    rows = [row(1, 2.0), row(2, 4.0)]
    assert epoch_line(rows[1], 12, rows) == (
        "epoch  2/12   train loss 0.1234 accuracy 98.76%   val loss 0.5000 accuracy 75.00%   lr 0.013   "
        "4.0 s, 12,346 images/s   30.0 s left"
    )
    alone = row(12, 3.0, val_loss=None, val_accuracy=None)
    assert epoch_line(alone, 12, [*rows, alone]) == (
        "epoch 12/12   train loss 0.1234 accuracy 98.76%   lr 0.013   3.0 s, 12,346 images/s"
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (8.26, "8.3 s"), (60, "1:00"), (245.4, "4:05"), (3599.6, "1:00:00"), (3845, "1:04:05")],
)
def test_seconds_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
