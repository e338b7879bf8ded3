"""A run that was killed, stopped or damaged, and resumed, ends with the bits of a run that nobody disturbed."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from processes import run, start

from engine.command.resume import choices_of_run
from engine.config import CONFIGS
from engine.run import checkpoint
from engine.run.saver import Saver
from engine.run.state import Progress

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
    "cnn, every technique": [
        "model=cnn",
        "model.width=4",
        "optimizer=muon",
        "scheduler=one_cycle",
        "decay_norms=false",
        "epochs=3",
        "batch_size=32",
        "precision=bf16",
        "accumulate=3",
        "ema.decay=0.9",
        "mixup=0.4",
        "cutmix=1",
        "clip_grad_norm=1",
        "criterion.label_smoothing=0.1",
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
        rows = [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]
    best, last = (torch.load(directory / name, weights_only=True) for name in ("best.pt", "last.pt"))
    return {
        "summary": summary,
        "rows": rows,
        "best": best["model"],
        "last": last["model"],
        "optimizer": last["optimizer"],
        "step": last["step"],
    }


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
    for _ in range(kills):
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


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name != "cnn, every technique")) for name in RECIPES]
)
def test_killed_and_resumed_ends_the_same(tmp_path: Path, recipe: str) -> None:
    trial(tmp_path, RECIPES[recipe], repeats=1, seed=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_ends_the_same(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """In this process, where a kill would end the tests, too: told to stop in the second epoch."""
    small = [*RECIPES[recipe], *SAVING, "dataset.limit=400"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert call("train", *small).code == 0
    monkeypatch.chdir(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_in(patch, epoch=2, batch=3)
        assert call("train", *small).code == 143
    assert call("train", "resume=latest").code == 0
    assert same(result(tmp_path / "stopped"), result(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_ends_the_same_many_times(tmp_path: Path, recipe: str, workers: int) -> None:
    """With the five recipes and 0 and 2 workers, 70 runs; with workers the samples are read one by one."""
    arguments = [*RECIPES[recipe], f"num_workers={workers}"]
    if workers:
        arguments += ["dataset.train_transforms=[{RandomAffine:{degrees:10}}]"]
    trial(tmp_path, arguments, repeats=7, seed=2)


def test_resumed_from_every_step_ends_the_same(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the run's directory was at every moment at which last.pt had been written."""
    few = ["epochs=2", "dataset.limit=100", "batch_size=32", "model.hidden=[16]", "model.dropout=0.2"]
    kept: list[Path] = []
    write = checkpoint.write

    def write_and_keep(path: Path, state: dict[str, Any], **options: Any) -> None:
        write(path, state, **options)
        if path.name == "last.pt":
            kept.append(tmp_path / f"kept{len(kept)}")
            shutil.copytree(path.parent, kept[-1] / "checkpoints" / "run")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write_and_keep)
        assert call("train", *few, "name=run", "checkpoint.every_steps=1").code == 0
    expected = result(tmp_path)
    assert len(kept) == 2 * (4 + 1)  # every step, and the end of every epoch
    for step in kept:
        monkeypatch.chdir(step)
        assert call("train", "resume=checkpoints/run").code == 0
        assert same(result(step), expected), f"resumed at {step.name} it ended otherwise"


def test_resume_takes_the_file_latest_or_the_directory(call: Call, tmp_path: Path) -> None:
    assert call("train", "epochs=1", "name=run", "dataset.limit=200").code == 0
    for epochs, way in enumerate(("latest", "checkpoints/run/last.pt", "checkpoints/run"), start=2):
        answer = call("train", f"resume={way}", f"epochs={epochs}")
        assert answer.code == 0, answer.err
        assert f"epoch {epochs}/{epochs}" in answer.out
    rows = (tmp_path / "checkpoints/run/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3", "4"]


def test_a_change_that_ends_exactness_is_refused_with_the_list(call: Call, tmp_path: Path) -> None:
    assert call("train", "epochs=2", "name=run", "optimizer=adam", "dataset.limit=200").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints/run").rglob("*") if path.is_file()}
    refused = call("train", "resume=latest", "batch_size=32", "model=cnn", "optimizer.lr=0.01").error
    for difference in ("model mlp -> cnn", "batch_size 64 -> 32", "optimizer.lr 0.001 -> 0.01", "resume_changed=true"):
        assert difference in refused
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoints/run").rglob("*") if path.is_file()}
    accepted = call("train", "resume=latest", "optimizer.lr=0.01", "resume_changed=true", "epochs=3")
    assert accepted.code == 0, accepted.err
    last = torch.load(tmp_path / "checkpoints/run/last.pt", weights_only=True)
    assert last["config"]["optimizer"]["lr"] == 0.01
    assert "changed  optimizer.lr 0.001 -> 0.01" in accepted.out


def test_a_changed_thread_count_is_a_warning(call: Call, tmp_path: Path) -> None:
    assert call("train", "epochs=1", "name=run", "dataset.limit=200").code == 0
    path = tmp_path / "checkpoints/run/last.pt"
    saved = torch.load(path, weights_only=True)
    saved["environment"]["threads"] += 6
    torch.save(saved, path)
    answer = call("train", "resume=latest", "epochs=2")
    assert answer.code == 0
    assert "warning  threads" in answer.out


def test_damaged_last_is_reported_and_the_one_before_used(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("train", "epochs=2", "name=run", "checkpoint.every_steps=5", "dataset.limit=700").code == 0
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "damaged" / "checkpoints", symlinks=True)
    last = tmp_path / "damaged/checkpoints/run/last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    monkeypatch.chdir(tmp_path / "damaged")
    answer = call("train", "resume=latest")
    assert answer.code == 0, answer.err
    assert "last.pt: not a checkpoint, or a damaged one" in answer.out and "previous.pt" in answer.out
    assert same(result(tmp_path / "damaged"), result(tmp_path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_leaves_nobody_behind(tmp_path: Path, number: int, code: int) -> None:
    check_signal(tmp_path, number, code)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_twenty_times(tmp_path: Path, number: int, code: int) -> None:
    seconds = [check_signal(tmp_path / str(repeat), number, code) for repeat in range(20)]
    print(f"signal {number}: 20 of 20 saved, exit code {code}, nobody left behind, after at most {max(seconds):.1f} s")


def check_signal(tmp_path: Path, number: int, code: int) -> float:
    """Stop a run with workers by a signal to its group; returns how long it took to leave, in seconds."""
    recipe = ["epochs=500", "name=run", "num_workers=2", "dataset.train_transforms=[{RandomAffine:{degrees:10}}]"]
    command = start("train", *recipe, cwd=tmp_path)
    wait_for(lambda: "epoch   1/" in command.out)
    command.signal(number)
    began = time.monotonic()
    assert command.wait() == code, command.err
    seconds = time.monotonic() - began
    assert command.err.count("\n") == 1, command.err
    assert "resume=checkpoints/run" in command.err
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pid, 0)
    saved = torch.load(tmp_path / "checkpoints/run/last.pt", weights_only=True)
    assert f"epoch {saved['progress']['epoch']}, step {saved['progress']['batch']}" in command.err
    return seconds


def wait_for(condition: Any, timeout: float = 180) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("refusals", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_second_process_is_kept_out_and_told_by_whom(tmp_path: Path, refusals: int) -> None:
    command = start("train", "epochs=5000", "name=run", cwd=tmp_path / "one")
    wait_for(lambda: "epoch    1/" in command.out)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/checkpoints").symlink_to(tmp_path / "one/checkpoints")
    for _ in range(refusals):
        second = run("train", "resume=checkpoints/run", cwd=tmp_path / "two")
        assert second.wait() == 2
        assert f"in use by pid {command.pid} on " in second.err
    command.signal(signal.SIGKILL)
    command.wait()
    third = run("train", "resume=checkpoints/run", "epochs=1", cwd=tmp_path / "two")
    assert third.wait() == 0, third.err  # the lock of a process that is gone holds nobody up


def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(call: Call, tmp_path: Path) -> None:
    command = call("train", "epochs=9", "name=run", "optimizer.lr=1e8", "checkpoint.every_steps=1")
    assert command.code == 1
    assert command.err.count("\n") == 1
    assert "not a finite number any more, first in epoch 1, step" in command.err and "last.pt" in command.err
    saved = torch.load(tmp_path / "checkpoints/run/last.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert not (tmp_path / "checkpoints/run/best.pt").exists()


def fill_disk_after(size: str) -> None:
    """Let no file grow beyond `size` bytes, as on a disk that is full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    assert run("train", "epochs=1", "name=run", cwd=tmp_path).wait() == 0
    last = tmp_path / "checkpoints/run/last.pt"
    before = last.read_bytes()
    command = start("train", "resume=latest", "epochs=2", cwd=tmp_path, before=fill_disk_after, argument="100000")
    assert command.wait() == 1
    assert command.err.count("\n") == 1 and "cannot be written" in command.err, command.err
    assert last.read_bytes() == before
    assert not list((tmp_path / "checkpoints/run").glob(".*.pt.*"))


def test_same_seed_same_bits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("train", "epochs=2", "name=run", "model=cnn", "deterministic=true", cwd=tmp_path / name).wait() == 0
    assert same(result(tmp_path / "one"), result(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_and_a_read_only_file_system(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
    try:
        full = run("train", "epochs=5", "name=run", cwd=disk)
        assert full.wait() == 1
        assert "No space left on device" in full.err and full.err.count("\n") == 1
        assert torch.load(disk / "checkpoints/run/last.pt", weights_only=True)["progress"]["epoch"] >= 2
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "checkpoints").symlink_to(disk / "checkpoints")
        for arguments in (["name=other"], ["resume=checkpoints/run"]):
            refused = run("train", "epochs=1", *arguments, cwd=outside)
            assert refused.wait() == 2
            assert "Read-only file system" in refused.err and refused.err.count("\n") == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def stop_in(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Let runs in this process be told to stop after a step."""
    after_step = Saver.after_step

    def stop(self: Saver) -> None:
        self.signal = signal.SIGTERM if (self.progress.epoch, self.progress.batch) == (epoch, batch) else self.signal
        after_step(self)

    monkeypatch.setattr(Saver, "after_step", stop)


SCHEDULERS = {  # of a user's own, in a folder of YAML files
    "halves": "_target_: torch.optim.lr_scheduler.StepLR\nstep_size: 1\ngamma: 0.5\n",
    "cycle": "_target_: torch.optim.lr_scheduler.OneCycleLR\nmax_lr: 0.1\nanneal_strategy: linear\npct_start: 0.5\n"
    "div_factor: 10\ncycle_momentum: false\n",
}


@pytest.fixture
def own(tmp_path: Path) -> str:
    """`--config-dir` of a folder with these schedulers."""
    (tmp_path / "own" / "scheduler").mkdir(parents=True)
    for name, text in SCHEDULERS.items():
        (tmp_path / "own" / "scheduler" / f"{name}.yaml").write_text(text)
    return "--config-dir=own"


COSINE = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]


@pytest.mark.parametrize(
    ("scheduler", "change", "rates", "final"),
    [
        ("cosine", "batch_size=16", COSINE, 0.0),  # 4 steps an epoch become 10
        ("cosine", "limit_batches=2", COSINE, 0.0),
        ("cosine", "drop_last=true", COSINE, 0.0),  # 3 steps
        ("halves", "batch_size=16", [0.05, 0.025, 0.0125, 0.00625], 0.003125),
        ("halves", "scheduler.gamma=0.2", [0.05, 0.01, 0.002, 0.0004], 0.00008),
        # Linear from 0.01 to 0.1 in steps 0 to 19 of 40, then to 1e-6 in step 39.
        ("cycle", "batch_size=16", [0.01, None, 0.1 - (0.1 - 1e-6) / 20, 0.1 - (0.1 - 1e-6) * 11 / 20], None),
    ],
)
def test_a_schedule_goes_on_at_the_same_place_in_epochs(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    scheduler: str,
    change: str,
    rates: Any,
    final: Any,
) -> None:
    small = [own, f"scheduler={scheduler}", "dataset.limit=160", "model.hidden=[4]", "name=run"]
    stop_in(monkeypatch, epoch=2, batch=3)
    assert call("train", *small, "epochs=4", "batch_size=48").code == 143
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    answer = call("train", "resume=checkpoints/run", change, "resume_changed=true", own)
    assert answer.code == 0, answer.err
    assert "epoch 2 begins again from its first sample, with the weights of step 3" in answer.out
    rows = list(csv.DictReader((tmp_path / "checkpoints/run/metrics.csv").open()))
    for row, rate in zip(rows, rates, strict=True):
        assert rate is None or float(row["lr"]) == pytest.approx(rate, abs=1e-6)
    last = torch.load(tmp_path / "checkpoints/run/last.pt", weights_only=True)["optimizer"]["param_groups"][0]["lr"]
    assert final is None or last == pytest.approx(final, abs=1e-9)


def test_more_epochs_lengthen_a_schedule_of_torchs_that_counts_steps(call: Call, tmp_path: Path, own: str) -> None:
    small = ("dataset.limit=64", "batch_size=32", "model.hidden=[4]", "name=run")
    assert call("train", own, "scheduler=cycle", *small, "epochs=2").code == 0
    answer = call("train", "resume=latest", "epochs=4", own)
    assert answer.code == 0, answer.err
    rows = [float(row["lr"]) for row in csv.DictReader((tmp_path / "checkpoints/run/metrics.csv").open())]
    # Of 8 steps: 0.01, 0.04, 0.07, 0.1 and down to 1e-6 in four; epochs 3 and 4 begin with steps 4 and 6.
    assert rows[2:] == pytest.approx([0.075, 0.025], abs=1e-4)
    assert call("train", "resume=latest", "epochs=3", own).code == 0  # nothing left to do


def test_another_optimizer_does_not_take_over_what_it_cannot_use(call: Call, tmp_path: Path) -> None:
    small = ("dataset.limit=64", "model.hidden=[4]", "name=run")
    assert call("train", *small, "epochs=1").code == 0
    answer = call("train", "resume=latest", "optimizer=adam", "resume_changed=true", "epochs=2")
    assert answer.code == 0, answer.err
    assert "Adam begins without averages" in answer.out
    assert float(list(csv.DictReader((tmp_path / "checkpoints/run/metrics.csv").open()))[1]["lr"]) < 0.001


def test_the_best_epoch_and_the_count_since_it_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy counts, then the loss, then who came first; the state may be saved and restored in between."""
    from train import stop_early

    monkeypatch.setattr("train.log.info", lambda _: None)
    #        accuracy, loss, best epoch, epochs since
    epochs = [
        (0.50, 1.00, 1, 0),
        (0.40, 0.10, 1, 1),
        (0.50, 0.90, 3, 0),
        (0.50, 0.90, 3, 1),
        (0.50, 0.95, 3, 2),
        (0.49, 0.01, 3, 3),
        (0.51, 9.00, 7, 0),
    ]
    progress = Progress()
    for number, (accuracy, loss, best, since) in enumerate(epochs, start=1):
        row = {"epoch": progress.epoch, "val_accuracy": accuracy, "val_loss": loss}
        assert progress.end_epoch(row) == (best == number)
        assert (progress.best["epoch"], progress.epochs_since_best(), progress.epoch) == (best, since, number + 1)
        assert [stop_early(progress, patience) for patience in (None, 1, 2, 3, 4)] == [
            False,
            since >= 1,
            since >= 2,
            since >= 3,
            False,
        ]
        again = Progress()
        again.load_state_dict(progress.state_dict())
        progress = again


def test_what_changed_is_listed_with_both_values_and_the_ways_out(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "checkpoints" / "r"
    assert call("train", "name=r", "epochs=1", "dataset.limit=60", "model.hidden=[8]").code == 0
    said = call("train", "resume=checkpoints/r", "optimizer.lr=0.2", "model.hidden=[9]", "seed=3", "epochs=2").error
    assert said == (
        "checkpoints/r was started with other settings: model.hidden [8] -> [9], optimizer.lr 0.05 -> 0.2, "
        "seed 0 -> 3; leave them out, or accept with resume_changed=true that the result is no longer that of one run"
    )
    said = call("train", "resume=checkpoints/r", "optimizer=adam", "epochs=2").error
    assert "other settings: optimizer sgd -> adam; leave them out" in said
    assert len((run / "metrics.csv").read_text().splitlines()) == 2  # nothing was trained


def test_a_resumed_run_has_all_its_trackers(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=r", "epochs=1", "dataset.limit=60", "model.hidden=[8]").code == 0
    file = tmp_path / "checkpoints" / "r" / ".hydra" / "config.yaml"
    file.write_text(file.read_text().replace("  logger:\n  - csv\n", "  logger:\n  - csv\n  - wandb\n"))
    typed = choices_of_run(["resume=checkpoints/r", "model=mlp"], [CONFIGS])
    kept = ["criterion=cross_entropy", "dataset=digits", "logger=[csv,wandb]", "optimizer=sgd", "scheduler=cosine"]
    assert sorted(typed) == kept  # the model is typed
