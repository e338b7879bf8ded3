"""Trackers: what they are told arrives, what is missing is said, and one that fails costs nothing but itself."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from engine.run import trackers

SHORT = ("epochs=2", "dataset.limit=60", "model.hidden=[8]", "name=run")
CONFIG: dict[str, Any] = {
    "choices": {"model": "mlp", "dataset": "digits", "logger": ["csv"]},
    "model": {"_target_": "models.mlp.MLP", "hidden": [8]},
    "optimizer": {"lr": 0.1},
    "name": None,
}
ROW = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": None, "val_accuracy": None, "lr": 0.1}
SUMMARY = {"test_accuracy": 0.9, "test_loss": 0.3, "val_accuracy": 0.8, "device": "cpu"}


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where an extra is not installed."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install '.[{package}]'")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_one_is_named_with_the_install_command(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    said = call("train", *SHORT, f"logger=[csv,{name}]").error
    assert said == f"logger={name}: {name} is not installed: pip install '.[{name}]'"
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("logger=tensorbord", "no such logger (did you mean tensorboard?)"),
        ("logger=[csv,tensorbord]", "no such logger (did you mean tensorboard?)"),
        ("logger.mlflow.uri=x", "there is no setting 'logger.mlflow.uri'"),
        ("++logger.tensorboard.dir=x", "there is no setting 'logger.tensorboard.dir'"),
    ],
)
def test_a_wrong_choice_is_one_line(call: Call, typed: str, said: str) -> None:
    assert said in call("train", *SHORT, typed).error


def test_none_is_needed(call: Call, tmp_path: Path) -> None:
    assert call("train", *SHORT, "logger=[]").code == 0
    assert (tmp_path / "checkpoints" / "run" / "metrics.csv").is_file()


class Broken:
    """A tracker that fails from its second call on."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def epoch(self, row: dict[str, Any]) -> None:
        """Works once."""
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("the server\nis gone")

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """Never reached."""
        raise AssertionError


def test_one_that_fails_is_reported_once_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []

    class Working(Broken):
        def epoch(self, row: dict[str, Any]) -> None:
            told.append("epoch")

        def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
            told.append(f"end {summary and summary['test_accuracy']}")

    monkeypatch.setattr(trackers, "KINDS", {"broken": Broken, "working": Working})
    said: list[str] = []
    monkeypatch.setattr(trackers.log, "info", said.append)
    several = trackers.Trackers({**CONFIG, "logger": {"csv": {}, "broken": {}, "working": {}}}, tmp_path)
    for _ in range(3):
        several.epoch(ROW)
    several.finish(SUMMARY)
    several.finish(None)
    assert told == ["epoch"] * 3 + ["end 0.9"]
    assert said == ["tracker  broken failed and is left out from here on: ConnectionError: the server is gone"]


def test_they_are_closed_when_a_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Kind(Broken):
        def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
            told.append(summary)

    monkeypatch.setattr(trackers, "KINDS", {"kind": Kind})
    with pytest.raises(ValueError), trackers.Trackers({**CONFIG, "logger": {"kind": {}}}, tmp_path):
        raise ValueError
    assert told == [None]


NO_RECORDS = ["no JSON", '["wandb"]', '{"wandb": {"x": 1}}', "FIFO"]
NO_RECORDS += [json.dumps({"wandb": name}) for name in ("../../up", "a/../../up", "a\n", "", "a" * 65)]


@pytest.mark.parametrize("content", NO_RECORDS)
def test_a_damaged_list_of_records_begins_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    file = tmp_path / "trackers.json"
    os.mkfifo(file) if content == "FIFO" else file.write_text(content)
    said: list[str] = []
    monkeypatch.setattr(trackers.log, "info", said.append)
    assert trackers._remembered(tmp_path, "wandb", lambda: "new") == ("new", False)
    assert trackers._remembered(tmp_path, "wandb", lambda: "newer") == ("new", True)
    assert trackers._remembered(tmp_path, "mlflow", lambda: "other") == ("other", False)
    assert json.loads(file.read_text()) == {"wandb": "new", "mlflow": "other"}
    assert len(said) == 1 and "trackers.json is damaged" in said[0]


def test_hyperparameters_are_flat_and_without_what_is_none() -> None:
    found = trackers.hyperparameters({**CONFIG, "logger": {"csv": {}}})
    assert found == {"model": "mlp", "dataset": "digits", "model.hidden": [8], "optimizer.lr": 0.1}


@needs("tensorboard")
def test_tensorboard_has_scalars_pictures_and_hyperparameters(call: Call, tmp_path: Path) -> None:
    from matplotlib.image import imsave
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("train", *SHORT, "logger=tensorboard").code == 0
    directory = tmp_path / "checkpoints" / "run"
    events = EventAccumulator(str(directory)).Reload()
    assert [event.step for event in events.Scalars("accuracy/val")] == [1, 2]
    summary = json.loads((directory / "summary.json").read_text())
    assert events.Scalars("result/test_accuracy")[0].value == pytest.approx(summary["test_accuracy"])
    assert "_hparams_/session_start_info" in events.summary_metadata

    imsave(str(tmp_path / "curves.png"), [[0.0, 1.0], [1.0, 0.0]])
    again = trackers.Trackers({**CONFIG, "logger": {"tensorboard": {"pictures": True}}}, tmp_path, next_epoch=3)
    again.epoch({**ROW, "epoch": 3})
    again.finish(SUMMARY)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["curves"] and events.Images("curves")[0].step == 3


@needs("mlflow")
def test_mlflow_lists_the_run_from_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from matplotlib.image import imsave

    directory = tmp_path / "checkpoints" / "run"
    directory.mkdir(parents=True)
    imsave(str(directory / "curves.png"), [[0.0, 1.0], [1.0, 0.0]])
    uri = f"sqlite:///{tmp_path}/checkpoints/mlflow.db"
    settings = {"uri": uri, "artifacts": "checkpoints/art", "experiment": "trial", "pictures": True}
    config = {**CONFIG, "logger": {"mlflow": settings}}
    trackers.Trackers(config, directory).epoch(ROW)  # stopped here, and resumed:
    several = trackers.Trackers(config, directory, next_epoch=2)
    several.epoch({**ROW, "epoch": 2})
    several.finish(SUMMARY)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert [(run.info.run_name, run.info.status) for run in found] == [("run", "FINISHED")]
    assert found[0].data.metrics["test_accuracy"] == 0.9 and found[0].data.params["model.hidden"] == "[8]"
    assert [metric.step for metric in client.get_metric_history(found[0].info.run_id, "train_loss")] == [1, 2]
    assert [file.path for file in client.list_artifacts(found[0].info.run_id)] == ["curves.png"]
    assert not (tmp_path / "mlruns").exists()


@needs("mlflow")
def test_mlflow_keeps_no_store_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("run"), "info", said.append)
    settings = {"uri": "mlruns", "artifacts": "a", "experiment": "e", "pictures": False}
    trackers.Trackers({**CONFIG, "logger": {"mlflow": settings}}, tmp_path)
    assert len(said) == 1 and "expected a database such as sqlite:///" in said[0]


@needs("wandb")
def test_wandb_writes_its_offline_run(call: Call, tmp_path: Path) -> None:
    answer = call("train", *SHORT, "logger=wandb")
    assert answer.code == 0 and "tracker" not in answer.out
    found = list((tmp_path / "checkpoints" / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == 1 and found[0].stat().st_size > 500
