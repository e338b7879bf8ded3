"""The table of all runs: read from made run directories, without torch and without training."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Call

from engine import compare, runs
from engine.errors import RunError


def make_run(
    root: Path, name: str, test: float | None = None, val: float = 0.5, end: str = "", **settings: Any
) -> Path:
    """A run's directory as training leaves it; without `test` it did not come to its end."""
    directory = root / name
    (directory / ".hydra").mkdir(parents=True)
    model = settings.pop("model", "mlp")
    own = {"mlp": {"hidden": [8], "dropout": 0.0}, "cnn": {"width": 4, "dropout": 0.0}}[model]
    config: dict[str, Any] = {
        "choices": {"model": model, "dataset": "digits", "optimizer": "sgd", "experiment": None, "logger": ["csv"]},
        "model": {"_target_": f"models.{model}", **own},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": settings.pop("lr", 0.1)},
        "logger": {"csv": {}},
        "name": name,
        "seed": 0,
        **settings,
    }
    (directory / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    rows = ["epoch,train_loss,val_loss,val_accuracy,seconds", f"1,1.0,1.0,{val - 0.1},2.0", f"2,0.9,0.9,{val},2.0"]
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    if test is not None:
        summary = {"test_accuracy": test, "val_accuracy": val, "best_epoch": 2, "seconds": 4.0}
        (directory / "summary.json").write_text(json.dumps(summary))
    if end:
        (directory / "end.json").write_text(json.dumps({"state": end, "reason": "because"}))
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Runs of every state, some of them in a sweep."""
    root = tmp_path / "checkpoints"
    make_run(root, "first", test=0.81, val=0.8)
    make_run(root, "killed", val=0.3)
    make_run(root, "broken", val=0.2, end="failed", lr=9.0)
    for seed, accuracy in enumerate((0.6, 0.7, 0.8)):
        make_run(root, f"rates/0{seed}", test=accuracy, val=accuracy, lr=0.01, seed=seed)
    make_run(root, "rates/wide", test=0.9, val=0.9, model="cnn", lr=0.01)
    (root / "latest").symlink_to("rates/wide")
    (root / "rates" / "sweep.json").write_text("{}")
    return root


def shown(root: Path, *arguments: str) -> list[str]:
    """The runs of the table, from its top."""
    lines = compare.command(arguments, root).splitlines()
    return [line.split()[0] for line in lines[1:] if line and not line.startswith("written")]


def test_all_runs_are_listed_once_best_first_with_what_differs(root: Path) -> None:
    text = compare.command([], root)
    assert text.splitlines()[0].split() == [
        "run", "state", "model", "dataset", "lr", "seed", "best_epoch", "val_accuracy", "test_accuracy", "seconds",
    ]  # fmt: skip
    assert shown(root) == ["rates/wide", "first", "rates/02", "rates/01", "rates/00", "killed", "broken"]
    assert "width" not in text and "logger" not in text, "what only one model has is no difference"


def test_states_are_told_apart(root: Path) -> None:
    held = make_run(root, "held")
    other_process = (
        "import sys; from pathlib import Path; from engine import runs; runs.lock(Path(sys.argv[1])); input()"
    )
    command = [sys.executable, "-c", other_process, str(held)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        while not (held / ".lock").is_file() or not (held / ".lock").read_text():
            assert process.poll() is None
        states = {row["run"]: row["state"] for row in compare.read_runs(root)}
        process.communicate(b"\n")
    assert states["held"] == "running" and states["first"] == "finished"
    assert states["killed"] == "stopped" and states["broken"] == "failed"
    assert {row["run"]: row["state"] for row in compare.read_runs(root)}["held"] == "stopped"


@pytest.mark.parametrize(
    ("typed", "runs_shown"),
    [
        (["model=cnn"], ["rates/wide"]),
        (["model=cnn,mlp", "run=rates/*", "seed=0"], ["rates/wide", "rates/00"]),
        (["state!=finished"], ["killed", "broken"]),
        (["val_accuracy>0.7", "val_accuracy<=0.8"], ["first", "rates/02"]),
        (["lr=1e-2", "sort=seed", "model=mlp"], ["rates/00", "rates/01", "rates/02"]),
        (["optimizer.lr=0.01", "sort=-seed", "model=mlp"], ["rates/02", "rates/01", "rates/00"]),
        (["sort=test_accuracy", "state=finished", "model=mlp"], ["first", "rates/02", "rates/01", "rates/00"]),
        (["hidden=[8]", "state=failed"], ["broken"]),
    ],
)
def test_rows_are_filtered_and_sorted_by_any_column(root: Path, typed: list[str], runs_shown: list[str]) -> None:
    assert shown(root, *typed) == runs_shown


def test_mean_over_seeds(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    text = compare.command(["run=rates/*", "mean=seed", f"output={file}"], root)
    assert "0.7000 ± 0.1000" in text
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["model"] for row in rows] == ["cnn", "mlp"] and rows[1]["runs"] == "3"
    assert float(rows[1]["val_accuracy_std"]) == pytest.approx(0.1) and rows[0]["val_accuracy_std"] == ""


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("optimizr.lr=1", "no run has a column 'optimizr.lr' (did you mean optimizer.lr"),
        ("sort=vall_accuracy", "no run has a column 'vall_accuracy' (did you mean val_accuracy"),
        ("dropout", "expected COLUMN=VALUE"),
        ("val_accuracy>high", "'high' is not a number"),
        ("mean=sed", "no run has a column 'sed' (did you mean seed"),
        ("output=.", "output=.: cannot be written"),
    ],
)
def test_a_wrong_request_is_one_line(call: Call, root: Path, typed: str, said: str) -> None:
    assert said in call("evaluate", "--runs", typed).error


def test_no_runs_yet(call: Call) -> None:
    assert "there is no run in" in call("evaluate", "--runs").error


def test_what_cannot_be_read_is_left_out(root: Path) -> None:
    (make_run(root, "damaged") / ".hydra" / "config.yaml").write_text("{")
    (make_run(root, "odd") / "summary.json").write_text("[")
    states = {row["run"]: row["state"] for row in compare.read_runs(root)}
    assert "damaged" not in states and states["odd"] == "stopped"


def test_the_command_answers_without_torch(process: Call, root: Path) -> None:
    answer = process("evaluate", "--runs", "model=cnn", PYTHONPROFILEIMPORTTIME="1")
    assert answer.code == 0 and "rates/wide" in answer.out
    assert not any(line.split("|")[-1].strip() == "torch" for line in answer.err.splitlines())


def test_a_run_that_fails_says_so_afterwards(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "run")
    runs.lock(directory)
    runs.abandon(RunError("the loss is not a number"))
    row = compare.read_run(directory, tmp_path)
    assert row is not None and (row["state"], row["reason"]) == ("failed", "the loss is not a number")
