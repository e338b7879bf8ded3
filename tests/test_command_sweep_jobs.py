"""What is around the jobs of a sweep, part by part and without training: start, names, records, going on, the table."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from engine.command import sweep
from engine.config import ROOT
from engine.errors import Interrupted, RequestError, RunError
from engine.pictures import style

BASIC = "hydra._internal.core_plugins.basic_{0}.Basic"
OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a sweep leaves in its process is put back."""
    monkeypatch.setattr(sweep, "started", None)
    monkeypatch.setattr(sweep, "_interrupted", sweep._interrupted)
    monkeypatch.setenv("PYTHONPATH", "")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def hydra_part(tmp_path: Path, *typed: str, sweeper: str = BASIC, launcher: str = BASIC, **more: Any) -> DictConfig:
    return OmegaConf.create(
        {
            "overrides": {"task": list(typed), "hydra": []},
            "sweep": {"dir": str(tmp_path / "checkpoints")},
            "sweeper": {"_target_": sweeper, "params": None, "n_trials": 7, **more},
            "launcher": {"_target_": launcher, "n_jobs": -1, "batch_size": "auto"},
        }
    )


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[list[str]], DictConfig]]:
    """Start a sweep; the jobs that were checked, and its configuration."""
    loader = SimpleNamespace(load_sweep_config=lambda config, job: job)
    hydra = SimpleNamespace(instance=lambda: SimpleNamespace(config_loader=lambda: loader))
    monkeypatch.setattr(sweep, "GlobalHydra", hydra)
    monkeypatch.setattr(sweep, "_check_installed", lambda config: None)

    def run(*typed: str, check: Callable[[Any], None] | None = None, **settings: Any) -> tuple[Any, DictConfig]:
        checked: list[Any] = []
        config = OmegaConf.create({"hydra": hydra_part(tmp_path, *typed, **settings)})
        sweep.start(config, check or checked.append)
        return checked, config.hydra

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Before the first job


def test_all_jobs_are_checked_and_the_sweep_is_described(
    begin: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ("name=s", "optimizer.lr=0.1,0.2", "seed=0,1", "epochs=3")
    checked, hydra = begin(*typed)
    assert checked == [
        ["name=s", f"optimizer.lr={lr}", f"seed={seed}", "epochs=3"] for lr in ("0.1", "0.2") for seed in (0, 1)
    ]
    directory = tmp_path / "checkpoints" / "s"
    assert json.loads((directory / "sweep.json").read_text()) == {
        "overrides": list(typed),
        "varying": ["optimizer.lr", "seed"],
        "jobs": 4,
        "first_number": 0,
    }
    assert capsys.readouterr().out == f"sweep    {directory}, 4 jobs\n"
    assert hydra.sweep.dir == str(directory) and list(hydra.overrides.hydra) == [f"hydra.sweep.dir={directory}"]
    assert sweep.started == (directory, 0)
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is sweep._interrupt


def test_the_last_time_that_a_setting_is_typed_counts(begin: Callable[..., Any]) -> None:
    checked, _ = begin("seed=0,1", "model=mlp", "seed=5", params={"seed": "2,3", "epochs": "1,2"})
    assert [sorted(job) for job in checked] == [
        ["epochs=1", "model=mlp", "seed=5"],
        ["epochs=2", "model=mlp", "seed=5"],
    ]


def test_at_most_500_jobs_are_checked_before_the_first_one(
    begin: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    checked, _ = begin("seed=range(600)")
    assert checked == [[f"seed={number}"] for number in range(500)]
    assert capsys.readouterr().out.endswith(", 600 jobs\n")


def test_of_a_search_its_ends_are_checked(
    begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sweep, "_continue_study", lambda sweeper: 2)
    checked, _ = begin("name=s", "seed=0,1,2", sweeper=OPTUNA, params={"lr": "interval(0.001, 0.5)"})
    assert checked == [["lr=0.001", "name=s", "seed=0"], ["lr=0.5", "name=s", "seed=2"]]
    assert capsys.readouterr().out.endswith("/s, 7 trials, 2 of them done\n")
    described = json.loads((tmp_path / "checkpoints" / "s" / "sweep.json").read_text())
    assert (described["jobs"], described["first_number"], described["varying"]) == (7, 2, ["lr", "seed"])


@pytest.mark.parametrize("name", ["name=a,b", "name='a b'", "name=latest"])
def test_a_name_that_cannot_be_makes_nothing(begin: Callable[..., Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"^name"):
        begin("seed=0,1", name)
    assert list(tmp_path.iterdir()) == [] and sweep.started is None


def test_without_a_name_the_time_is_one(
    begin: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    for typed in ([], ["name=null"]):
        begin("seed=0,1", *typed)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["sweep_now", "sweep_now_2"]


def test_a_wrong_job_makes_nothing_and_a_sweep_that_goes_on_stays(begin: Callable[..., Any], tmp_path: Path) -> None:
    def wrong(job: list[str]) -> None:
        if "seed=1" in job:
            raise RequestError("seed=1: wrong")

    with pytest.raises(RequestError, match="wrong"):
        begin("name=s", "seed=0,1", check=wrong)
    assert list(tmp_path.iterdir()) == []
    directory = tmp_path / "checkpoints" / "s"
    with pytest.MonkeyPatch.context() as now:
        now.setattr(sweep, "_set_defaults", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin("name=s", "seed=0,1")
        assert not directory.exists()
    begin("name=s", "seed=0,1")
    (directory / "jobs.jsonl").write_text(json.dumps(RECORD | {"state": "began"}) + "\n" + json.dumps(RECORD) + "\n")
    with pytest.MonkeyPatch.context() as now:
        now.setattr(sweep, "_set_defaults", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin("name=s", "seed=0,1")
    begin("name=s", "seed=0,1,2")
    assert sweep.started == (directory, 2) and sweep.started.ended() == []


def test_jobs_in_processes_of_their_own_import_from_here(
    begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/a", "", str(ROOT), "/b"]))
    begin("seed=0,1")
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/a", "/b"])


@pytest.mark.parametrize(("launcher", "told"), [(SUBMITIT, 1), (BASIC, 0), (JOBLIB, 0)])
def test_ends_are_told_of_jobs_whose_output_goes_elsewhere(
    begin: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, launcher: str, told: int
) -> None:
    threads: list[Any] = []
    thread = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(sweep, "threading", SimpleNamespace(Thread=lambda **of: threads.append(of) or thread))
    begin("seed=0,1", launcher=launcher)
    assert threads == [{"target": sweep._tell_ends, "args": (sweep.started,), "daemon": True}] * told


def test_each_end_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        {"state": "began"},
        {"state": "finished", "run": "s/01"},
        {"state": "failed", "reason": "because"},
        None,
    ]

    def later(_: float) -> None:
        if not steps:
            raise EOFError
        if step := steps.pop(0):
            sweep._record(tmp_path, {"job": 1, "overrides": ["seed=0", "lr=1"]}, **step)

    monkeypatch.setattr(time, "sleep", later)
    with pytest.raises(EOFError):
        sweep._tell_ends(sweep.Sweep(tmp_path, 0))
    assert capsys.readouterr() == ("job 1 (seed=0 lr=1): finished, s/01\n", "error: job 1 (seed=0 lr=1): because\n")


@pytest.mark.parametrize(
    ("kind", "target", "missing"),
    [("sweeper", OPTUNA, "hydra-optuna-sweeper"), ("launcher", JOBLIB, "hydra-joblib-launcher"),
     ("launcher", BASIC, ""), ("sweeper", "mine.hydra_plugins.Sweeper", ""), ("sweeper", "Sweeper", "")],
)  # fmt: skip
def test_an_extra_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: str, missing: str
) -> None:
    asked: list[str] = []

    def no_plugins(name: str) -> None:
        asked.append(name)
        raise ModuleNotFoundError

    config = OmegaConf.create({"hydra": {"sweeper": {"_target_": "a.b"}, "launcher": {"_target_": "a.b"}}})
    config.hydra[kind]._target_ = target
    for find in (no_plugins, lambda name: None):
        monkeypatch.setattr(sweep.importlib.util, "find_spec", find)
        if missing:
            with pytest.raises(RequestError, match=rf"^hydra/{kind}: needs {missing}, which is not installed: pip "):
                sweep._check_installed(config)
        else:
            sweep._check_installed(config)
    assert asked == ([f"hydra_plugins.{missing.replace('-', '_')}"] if missing else [])
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: object())
    sweep._check_installed(config)


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("x=1,2", ["1", "2"]),
        ("x=range(1,4)", ["1", "2", "3"]),
        ("x=range(3)", ["0", "1", "2"]),
        ("x=interval(0.1,0.5)", ["0.1", "0.5"]),
        ("x=tag(log,interval(1,5))", ["1.0", "5.0"]),
        ("x=choice(a,'b c')", ["a", "b\\ c"]),
        ("x=[1,2],[3]", ["[1,2]", "[3]"]),
    ],
)
def test_the_values_of_a_swept_setting(typed: str, values: list[str]) -> None:
    assert sweep._values(OverridesParser.create().parse_overrides([typed])[0]) == values


def test_a_name_belongs_to_one_sweep(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "checkpoints"
    assert sweep._claim(root, "s") == (root / "s", True)
    with pytest.raises(RequestError, match=r"^name=s: .*/s is taken; choose another name or remove it$"):
        sweep._claim(root, "s")  # it may be anything
    (root / "s" / "sweep.json").write_text("{}")
    assert sweep._claim(root, "s") == (root / "s", False)
    (root / "link").symlink_to("s")
    with pytest.raises(RequestError, match="is taken"):
        sweep._claim(root, "link")
    (root / "s" / "jobs.jsonl").symlink_to("elsewhere")
    with pytest.raises(RequestError, match=r"^name=s: .*/s: jobs\.jsonl is a link"):
        sweep._claim(root, "s")
    assert [path.name for path in sorted(root.iterdir())] == ["link", "s"]
    (tmp_path / "a-file").touch()
    with pytest.raises(RequestError, match=r"the sweep's directory cannot be made in .*/a-file/x: .*Not a directory"):
        sweep._claim(tmp_path / "a-file" / "x", "s")


def test_sweeps_of_the_same_second_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    assert [sweep._claim(tmp_path, None)[0].name for _ in range(3)] == ["sweep_now", "sweep_now_2", "sweep_now_3"]


# ---------------------------------------------------------------------------------------------------------------------
# Plugins


def search(tmp_path: Path, launcher: str = BASIC) -> DictConfig:
    """The part of the configuration that Optuna's sweeper has, with its defaults."""
    optuna = {"direction": "minimize", "storage": None, "study_name": None, "max_failure_rate": 0.0, "n_jobs": 2}
    return hydra_part(tmp_path, sweeper=OPTUNA, launcher=launcher, **optuna, sampler={"seed": None})


def test_a_search_has_the_defaults_of_trainings(tmp_path: Path) -> None:
    hydra = search(tmp_path)
    sweep._set_defaults(hydra, tmp_path, 7)
    sweeper = hydra.sweeper
    assert (sweeper.direction, sweeper.study_name, sweeper.sampler.seed) == ("maximize", "study", 0)
    assert sweeper.storage == f"sqlite:///{tmp_path}/study.db" and sweeper.max_failure_rate == 1.0
    assert sweeper.n_jobs == 1  # one after the other


def test_what_is_set_or_typed_stays(tmp_path: Path) -> None:
    hydra = search(tmp_path)
    hydra.overrides.hydra = ["hydra.sweeper.direction=minimize", "hydra.sweeper.study_name=null"]
    hydra.sweeper.update({"storage": "sqlite:///mine.db", "n_jobs": 5, "sampler": {"seed": 3}})
    sweep._set_defaults(hydra, tmp_path, 7)
    sweeper = hydra.sweeper
    assert (sweeper.direction, sweeper.study_name, sweeper.storage) == ("minimize", None, "sqlite:///mine.db")
    assert (sweeper.n_jobs, sweeper.sampler.seed) == (5, 3)
    plain = OmegaConf.create(
        {"overrides": {"hydra": []}, "sweeper": {"_target_": BASIC}, "launcher": {"_target_": BASIC}}
    )
    before = OmegaConf.to_container(plain)
    sweep._set_defaults(plain, tmp_path, 7)
    assert OmegaConf.to_container(plain) == before  # Hydra's own take none of them


def test_a_launcher_gets_as_many_jobs_as_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    hydra = search(tmp_path, JOBLIB)
    sweep._set_defaults(hydra, tmp_path, 7)
    assert (hydra.launcher.n_jobs, hydra.launcher.batch_size, hydra.sweeper.n_jobs) == (3, 1, 3)
    hydra = search(tmp_path, SUBMITIT)  # whose settings of these names mean something else
    sweep._set_defaults(hydra, tmp_path, 7)
    assert (hydra.launcher.n_jobs, hydra.launcher.batch_size, hydra.sweeper.n_jobs) == (-1, "auto", 4)


@pytest.mark.parametrize(
    ("launcher", "n_jobs", "total", "gpus", "at_once"),
    [
        (BASIC, -1, 9, "0,1", 1),
        (SUBMITIT, -1, 9, "", 4),
        (SUBMITIT, -1, 3, "", 3),
        (JOBLIB, -1, 9, "0,1", 2),
        (JOBLIB, -1, 1, "0,1", 1),
        (JOBLIB, -1, 9, "", 6),  # cores
        (JOBLIB, -1, 5, "", 5),
        (JOBLIB, -1, 0, "", 1),
        (JOBLIB, 3, 9, "0,1", 3),
        (JOBLIB, 1, 9, "0,1", 1),
    ],
)
def test_how_many_jobs_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, n_jobs: int, total: int, gpus: str, at_once: int
) -> None:
    joblib = pytest.importorskip("joblib")
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    hydra = hydra_part(tmp_path, launcher=launcher)
    hydra.launcher.n_jobs = n_jobs
    assert sweep._jobs_at_once(hydra, total) == at_once


class Optuna(ModuleType):
    """Stands for Optuna, with a study of the given trials."""

    def __init__(self, trials: list[bool] | Exception) -> None:
        super().__init__("optuna")
        self.trials, self.asked = trials, []
        self.logging = SimpleNamespace(WARNING=30, set_verbosity=lambda level: None)

    def load_study(self, **asked: str) -> Any:
        self.asked.append(asked)
        if isinstance(self.trials, Exception):
            raise self.trials
        states = [SimpleNamespace(is_finished=lambda done=done: done) for done in self.trials]
        return SimpleNamespace(get_trials=lambda deepcopy: [SimpleNamespace(state=state) for state in states])


def test_a_search_goes_on_with_the_trials_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(trials: Any, **settings: Any) -> tuple[int, int, Any]:
        optuna = Optuna(trials)
        monkeypatch.setitem(sys.modules, "optuna", optuna)
        sweeper = {
            "storage": "sqlite:///a.db",
            "study_name": "study",
            "n_trials": 7,
            "sampler": {"seed": 3},
            **settings,
        }
        config = OmegaConf.create(sweeper)
        done = sweep._continue_study(config)
        named = config.storage and config.study_name
        assert optuna.asked == ([{"study_name": "study", "storage": "sqlite:///a.db"}] if named else [])
        return done, config.n_trials, config.sampler.get("seed")

    assert left([]) == (0, 7, 3)
    assert left([True, True, False]) == (2, 5, 6)  # the third was cut off: one takes its place, with a seed of its own
    assert left([True] * 7) == (7, 0, 10) and left([True] * 9) == (9, 0, 12)
    assert left([True], sampler={}) == (1, 6, None) and left([True], sampler={"seed": None}) == (1, 6, None)
    assert left([True], sampler={"seed": 0}) == (1, 6, 1)
    assert left(KeyError("no study")) == (0, 7, 3)
    assert left([True], storage=None) == left([True], study_name=None) == (0, 7, 3)
    with pytest.raises(
        RequestError, match=r"^hydra\.sweeper\.storage=sqlite:///a\.db: cannot be read \(no such host\)$"
    ):
        left(OSError("no such host"))


# ---------------------------------------------------------------------------------------------------------------------
# One job

RECORD = {"job": 1, "overrides": ["seed=0"], "configuration": "x", "run": "s/01", "state": "finished", "value": 0.5}
PLAIN = {
    "name": "s",
    "seed": 0,
    "resume": None,
    "device": "auto",
    "choices": {"model": "mlp", "logger": "csv"},
    "logger": {"csv": {}},
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run one job of the sweep s, of a `main` that is a function."""
    directory = tmp_path / "s"
    directory.mkdir()
    settings = {"varying": ["seed"], "jobs": 3, "first_number": 0}

    def run(main: Callable[[dict[str, Any]], Any], number: int = 0, seed: int = 0, **described: Any) -> Any:
        (directory / "sweep.json").write_text(json.dumps(settings | described) if described.get("jobs", 3) else "{")
        overrides = SimpleNamespace(task=["name=s", f"+seed={seed}", "epochs=1"])
        own = {"num": number}, {"dir": str(directory)}, {"_target_": BASIC}
        parts = [SimpleNamespace(**part) for part in own]
        hydra = SimpleNamespace(overrides=overrides, job=parts[0], sweep=parts[1], launcher=parts[2])
        monkeypatch.setattr(sweep, "HydraConfig", SimpleNamespace(get=lambda: hydra))
        return sweep.run_job(OmegaConf.create({"seed": seed}), lambda config: {**PLAIN, "seed": config.seed}, main)

    return run


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "jobs.jsonl").read_text().splitlines()]


def test_a_job_is_named_run_and_recorded(
    job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = []

    def main(plain: dict[str, Any]) -> float:
        labels.append((sweep.terminal.label, plain["name"], plain["resume"]))
        return 0.75

    assert job(main, 1, seed=4) == 0.75
    assert job(main, 1, seed=5, first_number=2, jobs=5) == 0.75
    assert labels == [("job 2/3", "s/02_seed-4", None), ("job 4/5", "s/04_seed-5", None)]
    assert sweep.terminal.label == ""
    assert capsys.readouterr().out == "\njob 2/3  seed=4\n\njob 4/5  seed=5\n"
    began, finished = records(tmp_path / "s")[:2]
    assert finished == {**began, "state": "finished", "value": 0.75} and began["state"] == "began"
    assert (began["job"], began["overrides"], began["run"]) == (2, ["seed=4"], "s/02_seed-4")
    assert len(began["configuration"]) == 16


def test_a_job_runs_though_its_sweep_is_not_described(
    job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(lambda plain: 0.75, 1, jobs=None)
    assert capsys.readouterr().out == "\njob 2/?  seed=0 epochs=1\n"
    assert records(tmp_path / "s")[0]["run"] == "s/02_seed-0_epochs-1"


def test_a_finished_job_is_not_run_again_and_keeps_its_value(
    job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(lambda plain: 0.75)
    run = tmp_path / "s" / "01_seed-0"
    run.mkdir()
    (run / "summary.json").touch()
    capsys.readouterr()
    before = records(tmp_path / "s")
    assert job(lambda plain: 1 / 0, number=2) == 0.75
    assert capsys.readouterr() == ("job 3/3  seed=0: finished before, s/01_seed-0\n", "")
    assert records(tmp_path / "s") == before and sweep.terminal.label == ""
    assert job(lambda plain: 0.5, seed=1) == 0.5  # another one is


@pytest.mark.parametrize("state", ["began", "stopped"])
def test_a_stopped_job_goes_on_where_it_was(job: Callable[..., Any], tmp_path: Path, state: str) -> None:
    job(lambda plain: 0.75)
    (tmp_path / "s" / "01_seed-0" / ".hydra").mkdir(parents=True)
    (tmp_path / "s" / "01_seed-0" / ".hydra" / "config.yaml").touch()
    began = records(tmp_path / "s")[0]
    (tmp_path / "s" / "jobs.jsonl").write_text(json.dumps({**began, "state": state}) + "\n")
    asked: list[dict[str, Any]] = []
    job(asked.append, number=2)
    assert asked == [{**PLAIN, "name": "s/01_seed-0", "resume": str(tmp_path / "s" / "01_seed-0"), "changed": []}]
    assert {record["run"] for record in records(tmp_path / "s")} == {"s/01_seed-0"}


@pytest.mark.parametrize(
    ("error", "reason", "exit_code"),
    [
        (RunError("it broke"), "it broke", 1),
        (RequestError("it is wrong"), "it is wrong", 2),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero", 1),
        (math.nan, "the result is not a number (nan)", 1),
        (math.inf, "the result is not a number (inf)", 1),
    ],
)
def test_a_job_that_fails_is_told_at_once_and_noted(
    job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Any, reason: str, exit_code: int
) -> None:
    def main(plain: dict[str, Any]) -> float:
        if isinstance(error, Exception):
            raise error
        return error

    assert job(main) is None
    last = records(tmp_path / "s")[-1]
    assert (last["state"], last["reason"], last["exit_code"]) == ("failed", reason, exit_code)
    *traced, told = capsys.readouterr().err.splitlines()
    assert told == f"error: job 1 (seed=0): {reason}" and bool(traced) == isinstance(error, ZeroDivisionError)
    assert sweep.terminal.label == ""


def as_cause() -> Exception:
    error = ValueError("while composing")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (Interrupted("stopped, saved", 143), 143, "error: job 1 (seed=0): stopped, saved\n"),
        (KeyboardInterrupt(), 130, ""),
        (as_cause(), 130, ""),
    ],
)
def test_a_job_that_is_interrupted_ends_the_sweep(
    job: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    exit_code: int,
    told: str,
) -> None:
    def main(plain: dict[str, Any]) -> float:
        raise error

    with pytest.raises(SystemExit) as end:
        job(main)
    assert end.value.code == exit_code and capsys.readouterr().err == told
    assert [record["state"] for record in records(tmp_path / "s")] == ["began", "stopped"]
    assert sweep.terminal.label == ""


def test_an_interrupt_that_was_dropped_stops_the_next_job(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, error, code in ((signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)):
        monkeypatch.setattr(sweep, "_interrupted", False)
        with pytest.raises(error) as raised:
            sweep._interrupt(number, None)
        assert getattr(raised.value, "code", None) == code
        with pytest.raises(SystemExit) as end:
            job(lambda plain: 1 / 0)
        assert end.value.code == 130
    assert {record["state"] for record in records(tmp_path / "s")} == {"stopped"}


def test_the_overrides_that_tell_jobs_apart() -> None:
    typed = ["name=s", "+seed=1", "++optimizer.lr=0.1", "epochs=3", "namely=1"]
    assert sweep._varying(typed, ["seed", "optimizer.lr"]) == ["seed=1", "optimizer.lr=0.1"]
    assert sweep._varying(typed, ["seed2"]) == ["seed=1", "optimizer.lr=0.1", "epochs=3", "namely=1"]


def test_configurations_are_the_same_whatever_they_are_named() -> None:
    same = {
        "logger": {},
        "device": "cpu",
        "name": "other",
        "resume": "x",
        "resume_changed": True,
        "num_workers": 3,
        "checkpoint": {},
        "hparams_search": 1,
    }
    turned = dict(reversed({**PLAIN, **same}.items()))
    turned["choices"] = {"logger": "wandb", "hparams_search": "mlp", "model": "mlp"}
    assert sweep._fingerprint(turned) == sweep._fingerprint(PLAIN) and len(sweep._fingerprint(PLAIN)) == 16
    others = [{**PLAIN, "seed": 1}, {**PLAIN, "more": 1}, {**PLAIN, "choices": {"model": "cnn"}}, {"choices": {}}]
    assert len({sweep._fingerprint(plain) for plain in (PLAIN, *others)}) == 5


def test_which_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "s"

    def before(*lines: dict[str, Any]) -> Any:
        (directory / "jobs.jsonl").write_text("".join(json.dumps(RECORD | line) + "\n" for line in lines))
        return sweep._before(directory, "x").get("job")

    for name in ("01", "02", "03"):
        (directory / name / ".hydra").mkdir(parents=True)
        (directory / name / ".hydra" / "config.yaml").touch()
    (directory / "01" / "summary.json").touch()
    assert before() is None and before({"configuration": "y"}) is None
    assert before({}) == 1 and before({}, {"configuration": "y", "job": 2}) == 1
    assert before({}, {"job": 2}) == 2  # the last one counts
    assert before({"state": "failed", "reason": "", "value": None}) is None  # it came to an end, which was not noted
    assert before({"state": "began"}) is None
    for state, goes_on in (("began", 3), ("stopped", 3), ("finished", None), ("failed", None)):
        assert before({"job": 3, "run": "s/02", "state": state, "reason": ""}) == goes_on, state
    (directory / "02" / "train.log").symlink_to("elsewhere")
    (directory / "03" / ".hydra" / "link").symlink_to("elsewhere")
    for name in ("02", "03", "04"):
        assert before({"run": f"s/{name}", "state": "began"}) is None, name
    for name in ("02/train.log", "03/.hydra/link"):
        (directory / name).unlink()
    assert before({"run": "s/03", "state": "began"}) == 1

    def locked(folder: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(sweep.trust, "check_folder", locked)
    assert before({"run": "s/03", "state": "began"}) is None


@pytest.mark.parametrize(
    "run", ["../..", "..", "cut", "cut/..", "other/01", "cut/link", "cut/a/b", "/etc", "cut/gone", 3, None, ["cut/01"]]
)
def test_only_runs_of_the_sweep_itself_go_on(tmp_path: Path, run: Any) -> None:
    directory = tmp_path / "cut"
    for name in ("cut/01", "other/01", "cut/a/b", "."):
        (tmp_path / name / ".hydra").mkdir(parents=True)
        (tmp_path / name / ".hydra" / "config.yaml").touch()
    (directory / "link").symlink_to("../other/01")
    good = {"job": 1, "overrides": ["seed=0"], "configuration": "x", "state": "began", "run": "cut/01"}
    lines = [json.dumps(record) for record in (good, {**good, "run": run})]
    (directory / "jobs.jsonl").write_text("\n".join(lines) + "\n")
    assert sweep._before(directory, "x").get("run") == ("cut/01" if run != "cut/gone" else None)


@pytest.mark.parametrize(
    "line",
    [
        "{", "3", "[]", "null", "{}", 5000 * "[", '{"state": "failed"}',
        '{"job": 1, "overrides": "seed=0", "state": "began"}', '{"job": 1, "overrides": [], "state": "ended"}',
        '{"job": "1", "overrides": [], "state": "began"}', '{"job": 1, "overrides": [3], "state": "finished"}',
        '{"job": 1, "overrides": [], "state": "finished", "value": NaN}', '{"job": 1, "overrides": [], "state": 7}',
        '{"job": 1, "overrides": [], "state": "finished", "value": "1"}',
        '{"job": 1, "overrides": [], "state": "failed", "reason": ["x"]}', "\x00\udcff",
        '{"job": 1, "overrides": [], "state": "failed"}', '{"job": 1, "overrides": [], "state": "began", "run": 3}',
        '{"job": 1, "overrides": [], "state": "failed", "reason": "x", "exit_code": null}',
    ],
)  # fmt: skip
def test_a_line_that_no_sweep_wrote_is_passed_over(tmp_path: Path, line: str) -> None:
    ended = {"state": "failed", "reason": "because", "exit_code": 1}
    good = {"job": 1, "overrides": ["seed=0"], "configuration": "x"}
    goods = [good | ended, good | {"state": "finished", "value": 1}, good | {"state": "finished", "value": None}]
    content = f"{line}\n" + "".join(json.dumps(record) + "\n" for record in goods)
    (tmp_path / "jobs.jsonl").write_bytes(content.encode(errors="replace"))
    assert sweep._journal(tmp_path) == goods
    (tmp_path / "jobs.jsonl").write_bytes(b"\xff\n" + content.encode(errors="replace"))
    assert sweep._journal(tmp_path) == []  # no text
    (tmp_path / "jobs.jsonl").unlink()
    os.mkfifo(tmp_path / "jobs.jsonl")
    assert sweep._journal(tmp_path) == []


def test_names_of_runs(tmp_path: Path) -> None:
    assert sweep._run_name(tmp_path, 2, ["optimizer.lr=0.1", "model=mlp"]) == "03_lr-0.1_model-mlp"
    assert sweep._run_name(tmp_path, 99, []) == "100"
    assert sweep._run_name(tmp_path, 0, ["=", "seed=1"]) == "01_seed-1"
    for name in ("01_seed-1", "01_seed-1_2"):
        (tmp_path / name).mkdir()
    assert sweep._run_name(tmp_path, 0, ["seed=1"]) == "01_seed-1_3"
    name = sweep._run_name(tmp_path, 0, ["seed=1", "x=" + "1" * 200])
    assert len(name) == 80 and name.startswith("01_seed-1_x-111")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("lr=0.30000000000000004", "lr-0.3"),
        ("lr=0.012345678", "lr-0.01235"),
        ("lr=12345.678", "lr-1.235e04"),
        ("lr=1e+30", "lr-1e30"),
        ("lr=1e-05", "lr-1e-05"),
        ("lr=0.0", "lr-0.0"),
        ("lr=1.0", "lr-1"),
        ("lr=-1.0", "lr-1"),
        ("n=123456", "n-123456"),
        ("h=[512, 512]", "h-512-512"),
        ("a.b='x y'", "b-x-y"),
        ("path=/a/b=c,d", "path-a-b-c-d"),
        ("x=-1", "x-1"),
        ("v=1.2.3", "v-1.2.3"),
        ("x=", "x"),
    ],
)
def test_names_are_safe_to_paste(override: str, word: str) -> None:
    assert sweep._word(override) == word
    assert word and not set(word) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")


def test_gpus_are_dealt_out_to_parallel_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def chosen(number: int, device: str = "auto", launcher: str = JOBLIB, gpus: str = "2,5,7") -> str:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        sweep._choose_gpu(number, device, launcher)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert [chosen(number) for number in range(4)] == ["2", "5", "7", "2"]
    assert chosen(1, "cuda") == "5" and chosen(3, gpus="4,6") == "6"
    assert chosen(1, "cuda:2") == "2,5,7", "a device that was named is the user's choice"
    assert chosen(1, launcher=BASIC) == "2,5,7" and chosen(1, gpus=" 3 ") == " 3 " and chosen(1, gpus="") == ""
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    assert chosen(1) == "2,5,7", "torch has read the variable before"


def test_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 0, GPU-1f ,,")
    assert sweep.visible_gpus() == ["0", "GPU-1f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 11: NVIDIA H100 (UUID: GPU-2)\n  MIG GPU 3: x\n"

    def answered(answer: Any) -> list[str]:
        def run(command: list[str], **settings: Any) -> Any:
            assert command == ["nvidia-smi", "-L"] and settings["capture_output"] and settings["text"]
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(stdout=answer)

        monkeypatch.setattr(subprocess, "run", run)
        return sweep.visible_gpus()

    assert answered(listed) == ["0", "11"] and answered("No devices found.\n") == []
    for error in (FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 20)):
        assert answered(error) == []


def test_nobody_reading_fails_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stdout", Closed())
    sweep._say("text")


def test_what_is_said_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(text)))  # a pipe
    sweep._say("text")
    assert text.getvalue() == b"text\n"


# ---------------------------------------------------------------------------------------------------------------------
# After the last job


def row(run: str, lr: float, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    settings = {"model": "mlp", "dataset": "digits", "optimizer.lr": lr, "seed": seed}
    results = {"val_accuracy": accuracy, "train_accuracy": 0.9, "test_accuracy": 0.5, "val_loss": 1.0, "test_loss": 1.0}
    return {"run": run, "state": "finished", **results, "best_epoch": 1, "epoch": 1, "seconds": 2.0, **settings, **more}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The pictures that were asked for; none is drawn."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(style, "draw", lambda path, *of: asked.append((path, *of)) or True)
    monkeypatch.setattr(sweep.terminal, "width", lambda: 100)
    return asked


def csv_rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "sweep.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_seeds_are_one_row_of_mean_and_deviation_best_first(tmp_path: Path, drawn: list[tuple[Any, ...]]) -> None:
    rows = [row("01_a", 0.1, 0, 0.5), row("02_b", 0.1, 1, 0.7), row("03_c", 0.2, 0, 0.8), row("04_d", 0.2, 1, 0.9)]
    table, rest = sweep.summary(tmp_path, rows).split("\n\n")
    lines = [line.split() for line in table.splitlines() if set(line) - set(" -─")]
    assert [word for word in lines[0] if word != "±"][:2] == ["lr", "runs"] and "state" not in lines[0]
    assert "0.8500 ± 0.0707" in table and "0.6000 ± 0.1414" in table and table.index("0.8500") < table.index("0.6000")
    assert rest.splitlines() == [
        f"best     {tmp_path}/04_d/best.pt (by validation accuracy)",
        f"table    {tmp_path}/sweep.csv",
        f"picture  {tmp_path}/sweep.png",
    ]
    first, second = csv_rows(tmp_path)
    assert float(first["val_accuracy"]) == pytest.approx(0.85) and first["runs"] == "2"
    assert float(second["val_accuracy_std"]) == pytest.approx(0.2 / 2**0.5)  # of two with n - 1
    ((path, _, of, shown, best_by, name),) = drawn
    assert (path, of, len(shown), best_by, name) == (tmp_path / "sweep.png", rows, 2, "val_accuracy", tmp_path.name)


def test_without_seeds_each_run_is_a_row_by_its_number(
    tmp_path: Path, drawn: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("01_lr-0.1", 0.1, 0, None, train_accuracy=0.6), row("02_lr-0.2", 0.2, 0, None, train_accuracy=0.7)]
    monkeypatch.setattr(style, "draw", lambda *_: False)

    def full(*_: Any) -> None:
        raise RunError("no space")

    monkeypatch.setattr(sweep.files, "write", full)
    table, rest = sweep.summary(tmp_path, rows).split("\n\n")
    cells = [line.split()[:2] for line in table.splitlines()]
    assert cells[0] == ["run", "lr"] and cells[-2:] == [["02", "0.2"], ["01", "0.1"]]
    assert rest.splitlines() == [
        f"best     {tmp_path}/02_lr-0.2/best.pt (by training accuracy: there is no validation part)",
        "table    not written: no space",
    ]


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of a sweep of these rows and records."""
    directory = tmp_path / "s"
    directory.mkdir()
    monkeypatch.setattr(sweep, "summary", lambda directory, rows: f"table of {[row['run'] for row in rows]}")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=0,1"])

    def run(rows: list[dict[str, Any]], *ended: dict[str, Any], exit_code: int = 0, before: int = 0) -> int:
        for name in ("sweep.json", "multirun.yaml"):
            (directory / name).touch()
        lines = [json.dumps(RECORD | record) + "\n" for record in ended]
        (directory / "jobs.jsonl").write_text("".join(lines)) if lines else (directory / "jobs.jsonl").unlink()
        monkeypatch.setattr(sweep.compare, "read_runs", lambda root: rows)
        sweep.started = sweep.Sweep(directory, before)
        sweep._interrupted = True
        return sweep.finish(exit_code)

    return run


FAILED = {"state": "failed", "reason": "because", "exit_code": 1}
WRONG = {"state": "failed", "reason": "wrong", "exit_code": 2}


def test_a_sweep_ends_with_its_table(
    ends: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.finish(0) == 0 and sweep.finish(130) == 130 and capsys.readouterr() == ("", "")
    rows = [{"run": "01", "state": "finished"}, {"run": "02", "state": "failed"}, {"run": "03", "state": "finished"}]
    signal.signal(signal.SIGTERM, sweep._interrupt)
    assert ends(rows, {}) == 0
    assert capsys.readouterr() == ("\ntable of ['01', '03']\n", "") and (tmp_path / "s" / "sweep.json").exists()
    assert sweep.started is None and sweep._interrupted is False
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("rows", "ended", "exit_code"),
    [
        (1, [{}, FAILED], 1),
        (1, [{}, WRONG], 1),
        (0, [WRONG, WRONG], 2),
        (0, [FAILED, WRONG], 1),
        (0, [WRONG, FAILED], 1),
        (0, [FAILED], 1),
        (0, [{"state": "failed", "reason": ""}], 1),
        (1, [{}], 0),
    ],
)
def test_the_exit_code_says_what_failed(
    ends: Callable[..., int], rows: int, ended: list[dict[str, Any]], exit_code: int
) -> None:
    assert ends([{"run": "01", "state": "finished"}] * rows, *ended) == exit_code


def test_what_failed_is_told_again_at_the_end(ends: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    old, began = FAILED | {"reason": "long ago"}, {"state": "began"}
    ended = [old, began, {}, began, FAILED | {"job": 2}, began, WRONG | {"job": 3}]
    assert ends([{"run": "01", "state": "finished"}], *ended, before=1) == 1
    assert capsys.readouterr().err.splitlines() == [
        "",
        "2 of 3 jobs failed:",
        "error: job 2 (seed=0): because",
        "error: job 3 (seed=0): wrong",
    ]


def test_where_nothing_ran_nothing_stays_but_what_others_made(ends: Callable[..., int], tmp_path: Path) -> None:
    directory = tmp_path / "s"
    for kept in ("01/.hydra/config.yaml", "study.db"):
        (directory / kept).parent.mkdir(parents=True, exist_ok=True)
        (directory / kept).touch()
        assert ends([], WRONG) == 2 and (directory / "sweep.json").exists(), kept
        (directory / kept).unlink()
    (directory / "01" / ".hydra").rmdir()
    (directory / "01").rename(directory / ".submitit")
    assert ends([], WRONG) == 2 and [path.name for path in directory.iterdir()] == [".submitit"]
    (directory / ".submitit").rmdir()
    assert ends([], WRONG) == 2 and not directory.exists()


def test_a_stopped_sweep_says_how_it_goes_on(
    ends: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"run": "01", "state": "finished"}]
    assert ends(rows, {}, FAILED, exit_code=130) == 130
    assert capsys.readouterr().err.endswith("the rest with: python train.py -m seed=0,1 name=s\n")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "name=s", "x='a b'"])
    assert ends(rows, {}, exit_code=143) == 143
    assert capsys.readouterr().err.endswith("""the rest with: python train.py -m name=s 'x='"'"'a b'"'"''\n""")
    assert ends([], exit_code=2) == 2  # before its first job
    assert capsys.readouterr().err == "" and not (tmp_path / "s").exists()
