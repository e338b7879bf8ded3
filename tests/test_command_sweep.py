"""Sweeps: one directory, one table, nothing lost with a job that fails or a sweep that is stopped."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from conftest import ROOT, Call
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from engine.command import sweep
from engine.command.help import explained
from engine.errors import RunError
from engine.run import compare

SMALL = ("epochs=1", "dataset.limit=60", "model.hidden=[8]")


def needs(plugin: str) -> pytest.MarkDecorator:
    """Skip where a plugin of Hydra's is not installed."""
    try:
        missing = importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
    except ModuleNotFoundError:
        missing = True
    return pytest.mark.skipif(missing, reason=f"{plugin} is not installed: {sweep.INSTALL}")


def ended(directory: Path) -> list[dict[str, Any]]:
    """How the jobs of a sweep ended, in order."""
    records = [json.loads(line) for line in (directory / "jobs.jsonl").read_text().splitlines()]
    return [record for record in records if record["state"] != "began"]


def results(directory: Path) -> dict[str, Any]:
    """The numbers of a sweep's runs, by the end of their names."""
    summaries = {file.parent.name: json.loads(file.read_text()) for file in directory.glob("*/summary.json")}
    return {name: [s[key] for key in ("val_loss", "test_loss", "test_accuracy")] for name, s in summaries.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Directory, table, picture


@pytest.mark.pictures
def test_a_sweep_is_one_directory_and_ends_with_its_table(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "name=rates", "optimizer.lr=1e-3,0.5", "seed=0,1", *SMALL)
    assert answer.code == 0, answer.err
    directory = tmp_path / "checkpoints" / "rates"
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    assert names == {"01_lr-0.001_seed-0", "02_lr-0.001_seed-1", "03_lr-0.5_seed-0", "04_lr-0.5_seed-1"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.is_symlink()] == ["rates"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "04_lr-0.5_seed-1"

    with (directory / "sweep.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["runs"] for row in rows] == ["2", "2"] and rows[0]["val_accuracy_std"]
    assert float(rows[0]["val_accuracy"]) >= float(rows[1]["val_accuracy"])
    assert "±" in answer.out and "job 1/4  optimizer.lr=0.001 seed=0" in answer.out
    assert (directory / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_folds_end_with_their_mean_and_are_evaluated_on_what_they_validated(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "name=folds", "dataset.folds=2", "dataset.fold=0,1", *SMALL)
    assert answer.code == 0, answer.err
    directory = tmp_path / "checkpoints" / "folds"
    summaries = [json.loads((directory / f"0{n + 1}_fold-{n}" / "summary.json").read_text()) for n in (0, 1)]
    with (directory / "sweep.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    for key in ("val_accuracy", "test_accuracy"):
        values = [summary[key] for summary in summaries]
        assert float(row[key]) == pytest.approx(statistics.fmean(values)) and row["runs"] == "2"
        assert float(row[f"{key}_std"]) == pytest.approx(statistics.stdev(values))
    listed = call("evaluate", "--runs", "run=folds/*", "mean=fold", "output=runs.csv")
    assert listed.code == 0 and f"{float(row['val_accuracy']):.4f} ± " in listed.out
    checkpoint = directory / "02_fold-1" / "best.pt"
    again = call("evaluate", f"checkpoint={checkpoint}", "split=val", "output=val.json")
    assert again.code == 0, again.err
    found = json.loads((tmp_path / "val.json").read_text())
    assert found["accuracy"] == pytest.approx(summaries[1]["val_accuracy"], abs=1e-6)
    assert found["samples"] == int(re.search(r"val (\d+) ", summaries[1]["data"])[1])  # type: ignore[index]
    other = call("evaluate", f"checkpoint={checkpoint}", "split=val", "dataset.fold=2", "output=val.json")
    assert other.error == "dataset.fold=2: expected 0 to 1, as dataset.folds=2"


def test_the_same_command_goes_on_with_what_has_not_finished(call: Call, tmp_path: Path) -> None:
    assert call("train", "-m", "name=grow", "seed=0,1", *SMALL).code == 0
    answer = call("train", "-m", *SMALL, "seed=0,1,2", "name=grow")
    assert answer.code == 0 and answer.out.count("finished before") == 2
    assert [record["overrides"] for record in ended(tmp_path / "checkpoints" / "grow")][2:] == [["seed=2"]]
    assert len(results(tmp_path / "checkpoints" / "grow")) == 3


def test_a_stopped_run_goes_on_where_it_was(call: Call, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints" / "cut"
    assert call("train", "-m", "name=cut", "seed=0,1", *SMALL).code == 0
    before = results(directory)
    (directory / "02_seed-1" / "summary.json").unlink()  # as if killed after its last epoch
    journal = (directory / "jobs.jsonl").read_text().splitlines()
    (directory / "jobs.jsonl").write_text("\n".join(journal[:-1]) + "\n")
    answer = call("train", "-m", "name=cut", "seed=0,1", *SMALL)
    assert answer.code == 0 and "resumed" in answer.out and "finished before" in answer.out
    assert results(directory) == before


def test_a_sweep_that_cannot_start_leaves_nothing(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RunError("no space")

    monkeypatch.setattr(sweep.files, "write_json", full)
    answer = call("train", "-m", "name=s", "seed=0,1")
    assert answer.code == 1 and answer.err == "error: no space\n"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_evaluate_sweeps_too(call: Call, tmp_path: Path) -> None:
    assert call("train", "name=run", *SMALL).code == 0
    answer = call("evaluate", "-m", "split=val,test")
    assert answer.code == 0 and answer.out.count("accuracy") >= 2


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["optimizer.lr=abc"], "optimizer.lr=abc: expected a number > 0"),
        (["optimizer.lr=0.1,abc"], "optimizer.lr=abc: expected a number > 0"),
        (["optimizer.lrr=0.1,0.2"], "there is no setting 'optimizer.lrr' (did you mean optimizer.lr"),
        (["model=mlp,cnnn"], "model=cnnn: no such model (did you mean cnn?)"),
        (["dataset.fold=0,1,5", "dataset.folds=5"], "dataset.fold=5: expected 0 to 4, as dataset.folds=5"),
        (["dataset.fold=0,1"], "dataset.fold=0: of how many? set dataset.folds too"),
        (
            ["dataset.balance=true", "criterion.weight=balanced", "seed=0,1"],
            "dataset.balance=true and criterion.weight=",
        ),
        (["name=a,b"], "name: names the whole sweep"),
        (["name='a b'"], "name=a b: expected letters"),
        (["hydra.sweep.dir=/tmp/x", "seed=1,2"], "a sweep is named by name=NAME"),
        (["hydra/launcher=jobli"], "hydra/launcher=jobli: no such option, or its plugin is not installed"),
    ],
)
def test_a_wrong_value_is_one_line_and_leaves_nothing(call: Call, tmp_path: Path, typed: list[str], said: str) -> None:
    assert said in call("train", "-m", *SMALL, *typed).error
    assert not (tmp_path / "checkpoints").exists()


def test_a_taken_name_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "mine").mkdir(parents=True)
    assert "name=mine: checkpoints/mine is taken" in call("train", "-m", "name=mine", "seed=1,2").error


def test_a_failing_job_is_named_and_the_others_go_on(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "name=some", "optimizer.lr=0.1,1e30,0.2", *SMALL, "epochs=3")
    assert answer.code == 1
    told = [line for line in answer.err.splitlines() if line.startswith("error: job 2 (optimizer.lr=1e")]
    assert len(told) == 2 and "not a finite number" in told[0], "when it failed, and at the end"
    assert "1 of 3 jobs failed" in answer.err
    directory = tmp_path / "checkpoints" / "some"
    assert [record["state"] for record in ended(directory)] == ["finished", "failed", "finished"]
    assert len((directory / "sweep.csv").read_text().splitlines()) == 3
    row = next(row for row in compare.read_runs(directory) if row["run"].startswith("02"))
    assert row["state"] == "failed" and "not a finite number" in row["reason"]


def test_where_all_jobs_are_wrong_nothing_stays(call: Call, tmp_path: Path) -> None:
    answer = call("train", "-m", "seed=0,1", "dataset=mnist", "dataset.root=nowhere.txt/x", "device=cuda:99")
    assert answer.code == 2 and answer.err.count("error: job 1 (seed=0)") == 2
    assert list((tmp_path / "checkpoints").iterdir()) == []


def start_and_stop(tmp_path: Path, arguments: list[str], number: int, after: int) -> tuple[int, str]:
    """Run train.py until `after` jobs have ended, send the signal, and return exit code and output."""
    journal = tmp_path / "checkpoints" / "s" / "jobs.jsonl"
    command, until = processes.start("train", *arguments, cwd=tmp_path), time.monotonic() + 180
    while not journal.is_file() or len(ended(journal.parent)) < after:
        assert command.process.is_alive() and time.monotonic() < until, command.out + command.err
        time.sleep(0.02)
    command.signal(number)
    return command.wait(), command.out + command.err


def test_a_stopped_sweep_shows_what_it_has_and_how_to_go_on(tmp_path: Path) -> None:
    arguments = ["-m", "name=s", "epochs=1,100000", "dataset.limit=200"]  # the second does not end by itself
    code, out = start_and_stop(tmp_path, arguments, signal.SIGINT, after=1)
    assert code == 130, out
    assert "the rest with: python" in out and "name=s" in out
    assert (tmp_path / "checkpoints" / "s" / "sweep.csv").is_file()


@pytest.mark.parametrize("place", ["listconfig.ListConfig", "dictconfig.DictConfig"])
def test_ctrl_c_between_two_jobs_is_no_failure(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    # Interrupted while it fills a list, OmegaConf looks up attributes of what is not there yet: an error of its own.
    compose, sweep_directory = ConfigLoaderImpl._load_configuration_impl, tmp_path / "checkpoints" / "s"

    def interrupted(self: Any, *_: Any) -> None:
        self._get_flag("readonly")
        raise KeyboardInterrupt

    def composed(*arguments: Any, **named: Any) -> Any:
        if (sweep_directory / "jobs.jsonl").exists() and ended(sweep_directory):
            with monkeypatch.context() as now:
                now.setattr(f"omegaconf.{place}._set_item_impl", interrupted)
                return compose(*arguments, **named)
        return compose(*arguments, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", composed)
    answer = call("train", "-m", "name=s", "seed=0,1", *SMALL)
    assert answer.code == 130 and "ConfigComposition" not in answer.err, answer.err
    assert [record["state"] for record in ended(sweep_directory)] == ["finished"]
    assert "the rest with: python" in answer.err


def test_a_ctrl_c_that_is_dropped_on_the_way_stops_the_sweep(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose, sweep_directory = ConfigLoaderImpl._load_configuration_impl, tmp_path / "checkpoints" / "s"

    def composed(*arguments: Any, **named: Any) -> Any:
        if (sweep_directory / "jobs.jsonl").exists() and ended(sweep_directory):
            with contextlib.suppress(KeyboardInterrupt):  # as Python does where it finalizes an object
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0)
        return compose(*arguments, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", composed)
    answer = call("train", "-m", "name=s", "seed=0,1", *SMALL)
    assert answer.code == 130 and "the rest with: python" in answer.err
    assert [record["state"] for record in ended(sweep_directory)] == ["finished", "stopped"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_was_killed_before_its_end_was_noted_keeps_its_value(call: Call, tmp_path: Path) -> None:
    assert call("train", "-m", "name=s", "seed=0,1", *SMALL).code == 0
    journal = tmp_path / "checkpoints" / "s" / "jobs.jsonl"
    *before, last = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(before))
    assert call("train", "-m", "name=s", "seed=0,1", *SMALL).code == 0
    assert ended(journal.parent)[-1]["value"] == json.loads(last)["value"]  # what a sweeper is told, not null


# ---------------------------------------------------------------------------------------------------------------------
# Hydra's plugins


@needs("hydra_joblib_launcher")
@pytest.mark.slow
def test_twelve_parallel_runs_give_the_numbers_of_one_by_one(process: Call, tmp_path: Path) -> None:
    grid = (
        "optimizer.lr=0.1,0.01",
        "model=mlp,cnn",
        "seed=0,1,2",
        "epochs=2",
        "dataset.limit=300",
        "model.dropout=0.1",
    )
    same = {"OMP_NUM_THREADS": "1"}  # the last bits of a sum depend on how many threads made it
    assert process("train", "-m", "name=serial", *grid, **same).code == 0
    assert process("train", "-m", "name=parallel", *grid, "hydra/launcher=joblib", **same).code == 0
    serial = results(tmp_path / "checkpoints" / "serial")
    assert len(serial) == 12 and serial == results(tmp_path / "checkpoints" / "parallel")


@needs("hydra_joblib_launcher")
@pytest.mark.slow
def test_parallel_jobs_fail_one_by_one(process: Call, tmp_path: Path) -> None:
    answer = process("train", "-m", "name=par", "optimizer.lr=0.1,1e30", *SMALL, "epochs=3", "hydra/launcher=joblib")
    assert answer.code == 1 and "error: job 2 (optimizer.lr=1e30)" in answer.err.replace("1e+30", "1e30")
    assert sorted(record["state"] for record in ended(tmp_path / "checkpoints" / "par")) == ["failed", "finished"]


@needs("hydra_optuna_sweeper")
def test_a_search_that_was_killed_goes_on_with_the_rest(call: Call, tmp_path: Path) -> None:
    import optuna

    search = ["name=s", "hparams_search=mlp", "hydra.sweeper.n_trials=5", "epochs=1", "dataset.limit=60"]
    code, _ = start_and_stop(tmp_path, search, signal.SIGKILL, after=2)
    assert code == -signal.SIGKILL
    answer = call("train", *search)
    assert answer.code == 0, answer.err
    assert re.search("5 trials, [1-4] of them done", answer.out)
    study = optuna.load_study("study", f"sqlite:///{tmp_path}/checkpoints/s/study.db")
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    assert len(finished) == 5 and study.direction.name == "MAXIMIZE"
    assert len({trial.params["optimizer.lr"] for trial in finished}) == 5, "none twice"


@needs("hydra_optuna_sweeper")
def test_a_search_in_which_all_fail_says_so(call: Call) -> None:
    trials = ("hparams_search=mlp", "hydra.sweeper.n_trials=2", "optimizer.lr=1e30")
    answer = call("train", *trials, *SMALL, "epochs=3")
    assert answer.code == 1 and "2 of 2 jobs failed" in answer.err and "Traceback" not in answer.err


@needs("hydra_optuna_sweeper")
def test_a_wrong_value_in_a_search_is_one_line(call: Call, tmp_path: Path) -> None:
    assert "epochs=0: expected an integer" in call("train", "hparams_search=cnn", "epochs=0").error
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "'.[sweep]'"), ("ray", "hydra-ray-launcher")])
def test_what_to_install_for_a_launcher(launcher: str, extra: str) -> None:
    said = explained(ValueError(f"Could not find 'hydra/launcher/{launcher}'"), [], "train")
    assert said == f"hydra/launcher={launcher}: no such option, or its plugin is not installed: pip install {extra}"


@needs("hydra_submitit_launcher")
@pytest.mark.slow
def test_submitit_runs_two_jobs(process: Call, tmp_path: Path) -> None:
    answer = process("train", "-m", "name=sub", "seed=0,1", *SMALL, "hydra/launcher=submitit_local")
    assert answer.code == 0, answer.err
    assert len(results(tmp_path / "checkpoints" / "sub")) == 2 and "±" in answer.out


@needs("hydra_submitit_launcher")
@pytest.mark.slow
def test_the_tasks_of_a_job_train_one_run_and_go_on_where_all_were_killed(process: Call, tmp_path: Path) -> None:
    """As SLURM kills them; the jobs' processes have the folder of their logs in their command lines."""
    words = ["-m", "name=tasks", "seed=0,1", "epochs=60", "dataset.limit=60", "model=cnn", "model.width=4"]
    words += ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    command = [sys.executable, ROOT / "train.py", *words]
    directory = tmp_path / "checkpoints" / "tasks"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while len(list(directory.glob("*/metrics.csv"))) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
        members = [first.pid, *(int(line.split()[0]) for line in listed.splitlines() if f"{directory}/" in line)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none tells of the others
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
    answer = process("train", *words)
    assert answer.code == 0, answer.err
    assert len(ended(directory)) == len(results(directory)) == 2  # one record a job, one run
    for run in directory.glob("*/summary.json"):
        log = (run.parent / "train.log").read_text()
        assert "2 processes" in log and "resumed  in epoch" in log
        assert len((run.parent / "metrics.csv").read_text().splitlines()) == 61


@needs("hydra_ray_launcher")
@pytest.mark.slow
def test_ray_runs_three_jobs_of_which_one_fails(process: Call, tmp_path: Path) -> None:
    rates = "optimizer.lr=0.1,0.01,1e30"
    answer = process("train", "-m", "name=ray", rates, *SMALL, "epochs=3", "hydra/launcher=ray", HOME=str(tmp_path))
    assert answer.code == 1 and "1 of 3 jobs failed" in answer.err
    assert len(results(tmp_path / "checkpoints" / "ray")) == 2
