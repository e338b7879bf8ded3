"""A run that was killed, stopped or damaged, and resumed, ends with the bits of a run that nobody disturbed."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run, start

RECIPES = {
    "mlp, momentum, dropout": ["model.dropout=0.3", "epochs=4"],
    "mlp, Adam, warm-up": ["optimizer=adam", "scheduler.warmup_epochs=1.5", "epochs=4", "batch_size=100"],
    "cnn, augmentation": [
        "model=cnn",
        "model.width=4",
        "epochs=3",
        "scheduler=constant",
        "scheduler.warmup_epochs=1",
        "dataset.train_transforms=[{RandomCrop:{size:8,padding:1}},RandomHorizontalFlip]",
    ],
    "cnn, AdamW, clipping, early stopping": [
        "model=cnn",
        "model.width=4",
        "optimizer=adamw",
        "epochs=4",
        "clip_grad_norm=1",
        "early_stopping.patience=1",
    ],
}
SAVING = ["name=run", "checkpoint.every_steps=4"]


def finish(cwd: Path) -> None:
    """Resume the run until it is done; start it if it never got as far as a directory."""
    command = run("train", "resume=checkpoints/run", cwd=cwd)
    assert command.wait() == 0, command.err


def result(cwd: Path) -> dict[str, Any]:
    """Everything that has to be the same."""
    directory = cwd / "checkpoints" / "run"
    summary = json.loads((directory / "summary.json").read_text())
    summary.pop("seconds")
    with (directory / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]
    best, last = (torch.load(directory / name, weights_only=True) for name in ("best.pt", "last.pt"))
    return {"summary": summary, "rows": rows, "best": best["model"], "last": last["model"], "optimizer": last["optimizer"]}


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, through dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def disturb(cwd: Path, recipe: list[str], seconds: float, kills: int, draw: random.Random) -> None:
    """Start a run, kill it at random moments, resume it each time, and let it finish."""
    for kill in range(kills):
        started = (cwd / "checkpoints" / "run").exists()
        command = start("train", *(["resume=checkpoints/run"] if started else [*recipe, *SAVING]), cwd=cwd)
        time.sleep(draw.uniform(0, seconds))
        command.signal(signal.SIGKILL)
        command.wait()
    if (cwd / "checkpoints" / "run").exists():
        finish(cwd)
    else:
        assert run("train", *recipe, *SAVING, cwd=cwd).wait() == 0


def trial(tmp_path: Path, recipe: list[str], repeats: int, seed: int) -> None:
    began = time.monotonic()
    whole = run("train", *recipe, *SAVING, cwd=tmp_path / "whole")
    seconds = time.monotonic() - began
    assert whole.wait() == 0, whole.err
    expected = result(tmp_path / "whole")
    draw = random.Random(seed)
    for repeat in range(repeats):
        cwd = tmp_path / f"disturbed{repeat}"
        disturb(cwd, recipe, seconds, draw.randint(1, 3), draw)
        assert same(result(cwd), expected), f"repeat {repeat} ended otherwise"
        shutil.rmtree(cwd)


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_ends_the_same(tmp_path: Path, recipe: str) -> None:
    trial(tmp_path, RECIPES[recipe], repeats=1, seed=1)
