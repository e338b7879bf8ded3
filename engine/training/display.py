"""What a run shows while it trains: a bar on a terminal, nothing but one line an epoch elsewhere."""

from __future__ import annotations

import time
from typing import Any

from torch.optim import Optimizer
from tqdm import tqdm

from engine import terminal
from engine.training.metrics import Tally

REFRESH = 0.25  # seconds; reading the tally waits for the device


class Bar:
    """The bar of an epoch on stderr: loss, accuracy, learning rate, images/s; silent if that is no terminal."""

    def __init__(self, title: str, total: int, done: int, tally: Tally, optimizer: Optimizer) -> None:
        self.bar = None
        if terminal.is_terminal():
            layout = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=f"{terminal.label}  {title}".strip(),
                leave=False,
                dynamic_ncols=True,
                mininterval=0,
                bar_format=layout,
            )
        self.tally, self.optimizer = tally, optimizer
        self.steps = 0  # not told to tqdm yet
        self.began, self.before = time.perf_counter(), tally.samples
        self.next = self.began + REFRESH

    def update(self) -> None:
        """Count a step."""
        if self.bar is None:
            return
        self.steps += 1
        now = time.perf_counter()
        if now >= self.next:
            loss, accuracy = self.tally.read_own()
            rate = (self.tally.samples - self.before) / (now - self.began)
            lr = self.optimizer.param_groups[0]["lr"]
            text = f"loss {loss:.4f}, accuracy {accuracy:.2%}, lr {lr:.2g}, {rate:,.0f} images/s"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.steps)
            self.steps, self.next = 0, now + REFRESH

    def close(self) -> None:
        """Take the bar off the screen; the epoch's line follows."""
        if self.bar is not None:
            self.bar.close()


def epoch_line(row: dict[str, Any], epochs: int, history: list[dict[str, Any]]) -> str:
    """An epoch in one line of the log: what metrics.csv says of it, and how long the rest will take."""
    val = "" if row["val_loss"] is None else f"   val loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}"
    left = (epochs - row["epoch"]) * sum(r["seconds"] for r in history) / len(history)
    rest = f"   {duration(left)} left" if left >= 1 else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}   train loss {row['train_loss']:.4f} accuracy "
        f"{row['train_accuracy']:.2%}{val}   lr {row['lr']:.2g}   {duration(row['seconds'])}, "
        f"{row['images_per_second']:,.0f} images/s{rest}"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.3 s, 4:05 or 1:04:05."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02.0f}" if hours else f"{minutes}:{seconds:02.0f}"
