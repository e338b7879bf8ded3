"""train.py, part by part and as a whole on a few samples: what it sets up, tells, keeps and returns."""

from __future__ import annotations

import csv
import gc
import json
import logging
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer, Call
from torch import nn

import train
from engine.data.splits import Split
from engine.errors import RequestError
from engine.run import runs
from engine.run.saver import Saver
from engine.run.state import Progress
from engine.training.metrics import Tally
from engine.training.optimizers import build_optimizer

CPU = torch.device("cpu")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the log, those of its file only after a #."""
    lines: list[str] = []
    monkeypatch.setattr("train.log.info", lines.append)
    monkeypatch.setattr("train.log.debug", lambda text: lines.append(f"# {text}"))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What prepare_device sets is put back."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_before")
def test_deterministic_algorithms_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (True, False):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        assert train.prepare_device("cpu", asked, None) == CPU
        assert torch.are_deterministic_algorithms_enabled() is asked
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.usefixtures("as_before")
def test_a_later_run_of_the_process_may_be_deterministic_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS reads the setting once, at its first use, when the first run of a sweep may not need it."""
    monkeypatch.setattr("train.choose_device", torch.device)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    train.prepare_device("cuda", False, None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    train.prepare_device("cuda", False, None)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's


def splits_of(**sizes: int) -> dict[str, Split]:
    draw = torch.Generator().manual_seed(0)
    splits = {}
    for name, size in sizes.items():
        images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=draw)
        splits[name] = Split((images, torch.arange(size) % 3), torch.arange(size), 3)
    return splits


def config_of(**settings: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"batch_size": 4, "seed": 5, "num_workers": 0, "limit_batches": None}
    config |= {"shuffle": True, "drop_last": True, "dataset": {"train_transforms": [], "eval_transforms": []}}
    config |= {"choices": {"model": "mlp", "dataset": "digits"}, "deterministic": False, "precision": "fp32"}
    config |= {"accumulate": 1, "mixup": None, "cutmix": None, "decay_norms": True}
    config["optimizer"] = {"_target_": "torch.optim.SGD", "lr": 0.1}
    return {**config, **settings}


def test_only_training_is_shuffled_transformed_as_training_and_without_its_rest() -> None:
    dataset = {
        "train_transforms": [{"Normalize": {"mean": [0.5], "std": [0.25]}}],
        "eval_transforms": [{"Normalize": {"mean": [0.0], "std": [0.5]}}],
    }
    splits = splits_of(train=10, val=6, test=7, zoo=5)  # a name on either side of the others
    batches = train.batches_of(splits, config_of(dataset=dataset), CPU)
    assert {name: len(of) for name, of in batches.items()} == {"train": 2, "val": 2, "test": 2, "zoo": 2}
    for name, split in splits.items():
        found = torch.cat([images for images, _ in batches[name].epoch(1)])
        images = split.part[0].float() / 255
        expected = (images - 0.5) / 0.25 if name == "train" else images / 0.5
        if name == "train":
            assert not torch.allclose(found, expected[:8]) and found.min() < 0
        else:
            assert torch.allclose(found, expected, atol=1e-6), name
    plain = train.batches_of(splits, config_of(shuffle=False, drop_last=False, limit_batches=2, batch_size=3), CPU)
    assert [len(labels) for _, labels in plain["train"].epoch(1)] == [3, 3]
    assert torch.cat([labels for _, labels in plain["train"].epoch(1)]).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("shares", [(None, None), (0.2, None), (None, 1.0), (0.2, 1.0)])
def test_one_of_the_two_mixings_is_enough_and_only_training_is_mixed(shares: tuple[float | None, ...]) -> None:
    config = config_of(mixup=shares[0], cutmix=shares[1])
    batches = train.batches_of(splits_of(train=10, val=6, test=7), config, CPU)
    mixed = {name: any(labels.ndim == 2 for _, labels in of.epoch(1)) for name, of in batches.items()}
    assert mixed == {"train": shares != (None, None), "val": False, "test": False}


@pytest.mark.parametrize("phase", ["train", "eval"])
def test_training_and_test_images_of_other_shapes_are_refused(phase: str) -> None:
    dataset: dict[str, Any] = {"train_transforms": [], "eval_transforms": []}
    dataset[f"{phase}_transforms"] = [{"Resize": {"size": [6, 5]}}]
    shapes = ("[1, 6, 5]", "[1, 8, 8]") if phase == "train" else ("[1, 8, 8]", "[1, 6, 5]")
    with pytest.raises(RequestError) as error:
        train.batches_of(splits_of(train=10, test=7), config_of(dataset=dataset), CPU)
    assert str(error.value) == (
        f"images come out as {shapes[0]} for training and {shapes[1]} for testing; "
        "make dataset.train_transforms and eval_transforms agree"
    )


def test_a_row_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress, tally = Progress(), Tally(CPU)
    progress.begin_epoch(lr=0.25)
    logits = torch.eye(3)
    tally.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 0]))  # two of three are right
    tally.add(torch.tensor(3.0), logits[:1], torch.tensor([0]))
    now[0] = 100.5
    assert train.row_of(progress, tally) == {
        "epoch": 1,
        "train_loss": 1.5,  # (3 samples of 1 + 1 of 3) / 4
        "train_accuracy": 0.75,
        "val_loss": None,
        "val_accuracy": None,
        "lr": 0.25,
        "seconds": 0.5,
        "images_per_second": 8.0,
    }


def test_memory_is_frozen_inside_only() -> None:
    gc.unfreeze()
    with train.frozen_memory():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), train.frozen_memory():
        raise KeyError("x")
    assert gc.get_freeze_count() == 0


def test_early_stopping_needs_a_validation_part() -> None:
    with_val, without = splits_of(train=2, val=2), splits_of(train=2)
    for patience, splits in ((None, with_val), (None, without), (1, with_val)):
        train.check_early_stopping(patience, splits)
    with pytest.raises(RequestError, match=r"^early_stopping.patience=1: there is no validation part"):
        train.check_early_stopping(1, without)


def test_stopping_early_says_since_when(said: list[str]) -> None:
    progress = Progress()
    for epoch, accuracy in enumerate((0.5, 0.6, 0.1, 0.2), start=1):
        progress.end_epoch({"epoch": epoch, "val_accuracy": accuracy, "val_loss": 1.0})
    assert [train.stop_early(progress, patience) for patience in (None, 3, 2)] == [False, False, True]
    assert said == ["stopped early: nothing better than epoch 2 for 2 epochs"]


def test_a_summary_by_hand() -> None:
    progress = Progress()
    for epoch, (accuracy, loss, seconds) in enumerate(((0.5, 2.0, 1.23444), (0.75, 1.0, 2.0001)), start=1):
        progress.end_epoch({"epoch": epoch, "val_accuracy": accuracy, "val_loss": loss, "seconds": seconds})
    progress.end_epoch({"epoch": 3, "val_accuracy": 0.5, "val_loss": 1.5, "seconds": 1.0})
    about = {"config": {"seed": 7}, "data": "3 samples", "environment": {"python": "3", "git_commit": None}}
    assert train.summarise(progress, about, 0.5, 0.25) == {
        "test_accuracy": 0.25,
        "test_loss": 0.5,
        "best_epoch": 2,
        "val_accuracy": 0.75,
        "val_loss": 1.0,
        "epochs": 3,
        "seconds": 4.235,
        "seed": 7,
        "data": "3 samples",
        "python": "3",
        "git_commit": None,
    }


def described(said: list[str], splits: dict[str, Split], name: str = "cpu", **settings: Any) -> list[str]:
    said.clear()
    trained_with, directory = settings.pop("trained_with", None), Path("checkpoints/run")
    config, device = config_of(**{"dataset": {"val_fraction": 0.1}, "model": {}, **settings}), torch.device(name)
    precision = {"auto": "bf16"}.get(config["precision"], config["precision"])
    model = nn.Linear(1000, 3)
    optimizer = build_optimizer(config["optimizer"], model, config["decay_norms"])
    train.describe(config, model, optimizer, splits, (3, 8, 9), device, precision, directory, trained_with)
    return said


def test_what_is_about_to_be_trained(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    whole = splits_of(train=1200, val=6, test=7)
    common = [
        "model    mlp, 3,003 parameters",
        "data     digits, 1,200 train, 6 val, 7 test, images 3x8x9, 3 classes",
        "device   cpu",
        "run      checkpoints/run",
    ]
    parameters = "# Linear(in_features=1000, out_features=3, bias=True)\nweight [3, 1000]\nbias [3]"
    assert described(said, whole) == [*common, parameters]
    assert described(said, whole, "cuda:1")[2] == "device   cuda:1 (card 1)"
    assert described(said, whole, "cuda:1", precision="auto")[2] == "device   cuda:1 (card 1), bf16"
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": 0.1}
    shares = "updates  weight decay on 99.9 % of the parameters"  # not on 3 of 3,003
    assert described(said, whole, decay_norms=False, optimizer=sgd) == [common[0], shares, *common[1:], parameters]
    mixed = "mixed    a training image is right with the class of its larger share"
    for technique in ("mixup", "cutmix"):
        assert described(said, whole, **{technique: 0.5}) == [*common, parameters, mixed]
    loss = "loss     MSELoss in training, plain cross-entropy in validation and test"
    assert described(said, whole, trained_with="MSELoss") == [*common, parameters, loss]
    named = described(said, whole, model={"name": "resnet50"})[0]
    assert named == "model    mlp resnet50, 3,003 parameters"
    slow = "deterministic=true: PyTorch's deterministic algorithms only, which can be several times slower on a GPU"
    assert described(said, whole, deterministic=True) == [*common, slow, parameters]
    none = splits_of(train=1200, test=7)
    for fraction, reason in ((0, "dataset.val_fraction=0"), (0.1, "the samples cannot be divided")):
        lines = described(said, none, dataset={"val_fraction": fraction})
        assert lines[4] == f"no validation part ({reason}): the last epoch counts as the best"
        assert len(lines) == 6 and lines[1] == "data     digits, 1,200 train, 7 test, images 3x8x9, 3 classes"


# ---------------------------------------------------------------------------------------------------------------------
# The whole


SMALL = ("dataset.limit=80", "model.hidden=[4]", "batch_size=16", "device=cpu", "name=run")  # 5 steps an epoch
RUN = Path("checkpoints/run")


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What main() returned."""
    values: list[float] = []
    real = train.main
    monkeypatch.setattr(train, "main", lambda config: values.append(real(config)) or values[-1])
    return values


def rows(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / RUN / "metrics.csv").open()))


def ended_well(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    assert runs._locks == {} and gc.get_freeze_count() == 0
    assert logging.getLogger(runs.log.name).handlers == []
    return answer.out.splitlines()


def test_a_run_tells_keeps_and_returns_the_same(call: Call, tmp_path: Path, returned: list[float]) -> None:
    # The learning rate rises until nothing is learned, so the first epoch is the best.
    worse = ("optimizer.lr=6", "scheduler.warmup_epochs=30", "dataset.limit=400")
    lines = ended_well(call("train", *SMALL, "epochs=3", "model.hidden=[16]", "batch_size=8", *worse))
    summary, table = json.loads((tmp_path / RUN / "summary.json").read_text()), rows(tmp_path)
    assert " ".join(line.split()[0] for line in lines) == "model data device run epoch epoch epoch test again"
    best = max(table, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
    assert returned == [summary["val_accuracy"]] and str(round(returned[0], 6)) == best["val_accuracy"]
    assert (summary["best_epoch"], summary["epochs"], len(table)) == (int(best["epoch"]), 3, 3)
    assert summary["best_epoch"] < 3
    assert lines[-2] == (
        f"test     accuracy {summary['test_accuracy']:.2%}, loss {summary['test_loss']:.4f} "
        f"(weights of epoch {summary['best_epoch']})"
    )
    assert lines[-1] == "again    python evaluate.py checkpoint=checkpoints/run/best.pt"
    names = ".hydra .lock best.pt curves.png last.pt metrics.csv previous.pt summary.json train.log"
    assert " ".join(sorted(path.name for path in (tmp_path / RUN).iterdir())) == names


def test_without_validation_the_last_training_accuracy_is_returned(
    call: Call, tmp_path: Path, returned: list[float]
) -> None:
    small = ("model.hidden=[16]", "batch_size=4", "optimizer.lr=0.2", "device=cpu", "name=run")
    lines = ended_well(call("train", "debug=overfit", *small, "epochs=4"))
    table = rows(tmp_path)
    accuracies = [float(row["train_accuracy"]) for row in table]
    assert len(accuracies) == 4 and accuracies[3] not in accuracies[:3]  # or any of them might be told
    assert returned == accuracies[3:] and table[3]["val_accuracy"] == ""
    assert lines[4] == "no validation part (dataset.val_fraction=0): the last epoch counts as the best"
    assert lines[-2] == (
        f"by heart {returned[0]:.2%} of the 16 training samples: 100 % is right, "
        "and the accuracy on the test set means nothing here"
    )


def test_training_ends_early(call: Call, tmp_path: Path) -> None:
    still = ("optimizer.lr=1e-30", "early_stopping.patience=2", "epochs=9")  # nothing changes, so the first is the best
    lines = ended_well(call("train", *SMALL, *still))
    assert len(rows(tmp_path)) == 3 and lines[-3] == "stopped early: nothing better than epoch 1 for 2 epochs"
    assert "(weights of epoch 1)" in lines[-2]


def test_a_run_that_goes_on_after_its_last_epoch_counts_anew(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, began = (*SMALL, "scheduler=constant"), list[int]()

    class Noted(train.Trackers):
        def __init__(self, *given: Any, next_epoch: int) -> None:
            began.append(next_epoch)
            super().__init__(*given, next_epoch=next_epoch)

    monkeypatch.setattr(train, "Trackers", Noted)
    ended_well(call("train", *recipe, "epochs=2"))
    whole = rows(tmp_path)[1]
    (tmp_path / RUN).rename(tmp_path / "whole")
    ended_well(call("train", *recipe, "epochs=1"))
    ended_well(call("train", "resume=checkpoints/run", "epochs=2"))
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert rows(tmp_path)[1][name] == whole[name], name
    assert began == [1, 1, 2]  # the epoch that trackers are told of first


def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (*SMALL, "epochs=3", "model.dropout=0.3", "clip_grad_norm=0.5")
    ended_well(call("train", *recipe))
    whole, table = torch.load(tmp_path / RUN / "last.pt", weights_only=True), rows(tmp_path)
    (tmp_path / RUN).rename(tmp_path / "whole")
    after_step = Saver.after_step

    def stop(saver: Saver) -> None:
        if (saver.progress.epoch, saver.progress.batch) == (2, 3):
            saver.signal = signal.SIGTERM
        after_step(saver)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", stop)
        answer = call("train", *recipe)
    assert answer.code == 143 and "stopped by SIGTERM in epoch 2, step 3;" in answer.err
    lines = ended_well(call("train", "resume=checkpoints/run"))
    assert next(line for line in lines if line.startswith(("resumed", "epoch"))) == "resumed  in epoch 2, after 3 steps"
    again = torch.load(tmp_path / RUN / "last.pt", weights_only=True)
    assert all(torch.equal(tensor, again["model"][name]) for name, tensor in whole["model"].items())
    same = [name for name in table[0] if name not in ("seconds", "images_per_second")]
    assert [[row[name] for name in same] for row in rows(tmp_path)] == [[row[name] for name in same] for row in table]
    # Nothing is left to do: tables that a kill lost are written, and no epoch is trained.
    (tmp_path / RUN / "metrics.csv").unlink()
    (tmp_path / RUN / "summary.json").unlink()
    lines = ended_well(call("train", "resume=checkpoints/run", "epochs=2"))
    assert len(rows(tmp_path)) == 3 and not [line for line in lines if line.startswith("epoch")]
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["epochs"] == 3
    assert "epochs: 2\n" in (tmp_path / RUN / ".hydra" / "config.yaml").read_text()  # what was typed is kept
    ended_well(call("train", "resume=checkpoints/run", "epochs=4"))
    assert len(rows(tmp_path)) == 4


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_result_that_is_no_number_is_not_kept(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    """The first evaluation is the validation's, the second the test's."""
    real, calls = train.evaluate, list[int]()

    def evaluate(*arguments: Any) -> Any:
        loss, confusion = real(*arguments)
        calls.append(1)
        return (math.nan if len(calls) == evaluation else loss), confusion

    monkeypatch.setattr(train, "evaluate", evaluate)
    answer = call("train", *SMALL, "epochs=1")
    what = "the validation loss is not a finite number any more" if evaluation == 1 else "the test loss is not a finite"
    assert answer.code == 1 and answer.err.startswith(f"error: {what}") and answer.err.count("\n") == 1
    kept = {path.name for path in (tmp_path / RUN).iterdir()}
    assert "summary.json" not in kept and ("best.pt" in kept) is ("metrics.csv" in kept) is (evaluation == 2)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_signal_during_an_evaluation_is_met_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    real, calls = train.evaluate, list[int]()

    def evaluate(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == evaluation:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluate)
    answer = call("train", *SMALL, "epochs=1")
    place = "epoch 1, step 5" if evaluation == 1 else "epoch 2, step 0"
    assert answer.code == 143 and f"stopped by SIGTERM in {place};" in answer.err
    assert len(calls) == evaluation and not (tmp_path / RUN / "summary.json").exists()
    lines = ended_well(call("train", "resume=checkpoints/run"))
    assert len(rows(tmp_path)) == 1 and lines[-1].startswith("again")
