"""A run's directory: its name, making it, its lock, finding it, its log and tables, and what an end leaves."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from engine.errors import Interrupted, RequestError, RunError
from engine.run import runs, trust

RUNS = Path("checkpoints")


def config_of(name: str | None = "run", **settings: Any) -> dict[str, Any]:
    choices = {"model": "mlp", "dataset": "digits"}
    common = {"name": name, "resume": None, "resume_changed": False, "epochs": 20, "early_stopping": {"patience": None}}
    return {**common, "choices": choices, **settings}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder without runs, and what Hydra tells of a job; no run stays open."""
    monkeypatch.chdir(tmp_path)
    told = {"overrides": {"task": ["name=run", "epochs=20"]}, "job": {"name": "train"}}
    monkeypatch.setattr(runs.HydraConfig, "get", lambda: OmegaConf.create(told))
    yield
    for directory in list(runs._locks):
        runs.close(directory)


def names(root: Path = RUNS) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def held(directory: Path) -> bool:
    """Whether another process is kept out of a run's directory."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    lock = directory / ".lock"
    return subprocess.run([sys.executable, "-ISc", code, lock], capture_output=True).returncode != 0


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name", ["a", "7", "A-b_c.d", "2026-01-31_12-00-00_mlp", "later", "x" * 200])
def test_a_name_that_needs_no_quotes(name: str) -> None:
    runs.check_plain(name)
    runs.check_name(config_of(name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("latest", "name=latest: expected letters, digits, dots, dashes and underscores (and not 'latest')"),
        ("-x", "name=-x: expected letters"),
        (".x", "name=.x: expected letters"),
        ("", "name=: expected letters"),
        ("a b", "name=a b: expected letters"),
        ("a\n", "name=a\\n: expected letters"),
        ("sweep/b", "name=sweep/b: expected letters"),
        ("x" * 201, "expected at most 200 characters, there are 201"),
        ("x" * 3000, "expected at most 200 characters, there are 3000"),
    ],
)
def test_a_name_that_is_refused(name: str, said: str) -> None:
    for check in (runs.check_plain, lambda name: runs.check_name(config_of(name))):
        with pytest.raises(RequestError) as error:
            check(name)
        assert said in str(error.value) and len(str(error.value)) < 160
    runs.check_name(config_of(name, resume="checkpoints/run"))  # the run has its name


def test_the_longest_name_can_be_made_twice_in_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "x" * (200 - len("_mlp_digits")))
    assert [len(runs.create(config_of(None)).name) for _ in range(2)] == [200, 202]


def test_a_sweep_names_its_runs() -> None:
    (RUNS / "sweep").mkdir(parents=True)
    with pytest.raises(RequestError, match="name=sweep/b: expected letters"):
        runs.check_name(config_of("sweep/b"))  # a folder that is no sweep
    (RUNS / "sweep" / "sweep.json").write_text("[]")
    runs.check_name(config_of("sweep/b"))
    for name in ("sweep/-b", "sweep/latest", "sweep/a/b"):
        with pytest.raises(RequestError, match="expected letters"):
            runs.check_name(config_of(name))
    (RUNS / "sweep" / "b").mkdir()
    with pytest.raises(RequestError, match=r"^name=sweep/b: checkpoints/sweep/b is taken; choose another name"):
        runs.check_name(config_of("sweep/b"))


# ---------------------------------------------------------------------------------------------------------------------
# Making one


def test_a_new_run_is_whole_locked_and_the_latest() -> None:
    config = config_of(changed=["x"])
    directory = runs.create(config)
    assert directory == RUNS / "run" and names() == ["latest", "run"]  # and no draft
    assert (names(directory), names(directory / ".hydra")) == (
        [".hydra", ".lock"],
        ["config.yaml", "hydra.yaml", "overrides.yaml"],
    )
    saved, ours = trust.read_run_config(directory)
    assert ours and saved == config_of()
    assert yaml.safe_load((directory / ".hydra/overrides.yaml").read_text()) == ["name=run", "epochs=20"]
    assert yaml.safe_load((directory / ".hydra/hydra.yaml").read_text())["hydra"]["job"] == {"name": "train"}
    assert os.readlink(RUNS / "latest") == "run" and held(directory)
    assert list(runs._locks) == [directory]
    second = runs.create(config_of("second"))
    assert os.readlink(RUNS / "latest") == "second" and held(directory) and held(second)
    runs.close(directory)
    assert not held(directory) and held(second)


def test_a_name_is_of_the_time_model_and_data_and_numbered_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda form: {"%Y-%m-%d_%H-%M-%S": "2026-01-31_12-00-00"}.get(form, "now"))
    base = "2026-01-31_12-00-00_mlp_digits"
    RUNS.mkdir()
    (RUNS / f"{base}_2").write_text("a file")
    made = [runs.create(config_of(None)).name for _ in range(3)]
    assert made == [base, f"{base}_3", f"{base}_4"] and names() == [
        base,
        f"{base}_2",
        f"{base}_3",
        f"{base}_4",
        "latest",
    ]


@pytest.mark.parametrize("file", [False, True])
def test_a_name_that_was_taken_meanwhile_is_refused_and_nothing_stays(file: bool) -> None:
    taken = RUNS / "run"
    taken.mkdir(parents=True)
    (taken / "theirs").touch()
    if file:
        (taken / "theirs").unlink()
        taken.rmdir()
        taken.write_text("theirs")
    with pytest.raises(RequestError, match=r"^name=run: checkpoints/run is taken; choose another name or remove it$"):
        runs.create(config_of())
    assert names() == ["run"] and (file or names(taken) == ["theirs"])


def test_runs_that_are_made_at_once_have_a_directory_each() -> None:
    barrier, made = threading.Barrier(8), []

    def make(number: int) -> None:
        draft = RUNS / f".new-{number}"
        draft.mkdir(parents=True)
        (draft / "number").write_text(str(number))
        barrier.wait()
        made.append((runs._claim(draft, "run", own_name=False), number))

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path, _ in made) == ["run", *(f"run_{n}" for n in range(2, 9))] == names()
    assert all((path / "number").read_text() == str(number) for path, number in made)


def test_where_no_directory_can_be_made_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    RUNS.write_text("a file")
    with pytest.raises(RequestError, match=f"^the run directory cannot be made in {tmp_path}/checkpoints: .*Not a dir"):
        runs.create(config_of())
    RUNS.unlink()
    with pytest.raises(RequestError, match=r"cannot be made in .*surrogates not allowed"):  # a text that is no UTF-8
        runs.create(config_of(None, choices={"model": "\ud800", "dataset": "digits"}))
    assert names() == []

    def refuse(draft: Path, directory: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    gc.collect()  # or files that an earlier test has left open would be closed in between
    files = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RequestError, match=r"cannot be made in .*Permission denied"):
        runs.create(config_of(None))
    assert names() == [] and runs._locks == {} and len(os.listdir("/dev/fd")) == files


def test_where_latest_cannot_be_a_link_it_is_told_and_the_run_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(link: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert runs.create(config_of()) == RUNS / "run" and names() == ["run"]
    assert "note: checkpoints/latest cannot be made to lead to the newest run (" in capsys.readouterr().out
    (RUNS / "latest").write_text("mine")
    runs.create(config_of("other"))
    said = capsys.readouterr().out
    assert said.startswith("note: checkpoints/latest is a folder or file of its own") and said.count("note") == 1
    assert (RUNS / "latest").read_text() == "mine"


def test_a_link_that_a_kill_left_half_made_is_in_nobodys_way(capsys: pytest.CaptureFixture[str]) -> None:
    RUNS.mkdir()
    (RUNS / f".latest-{os.getpid()}").symlink_to("gone")
    runs.create(config_of())
    assert os.readlink(RUNS / "latest") == "run" and names() == ["latest", "run"] and capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Going on with one


def made(name: str = "run", **settings: Any) -> Path:
    """A run that is not open."""
    directory = runs.create(config_of(name, **settings))
    runs.close(directory)
    return directory


def test_a_run_that_goes_on_is_locked_and_rid_of_what_a_kill_left() -> None:
    directory = made()
    kept = ["best.pt", "last.pt", "previous.pt", "metrics.csv", "train.log", ".own.pt", "mine.pt.1"]
    for name in [*kept, ".last.pt.123", ".best.pt.9.keep", "end.json"]:
        (directory / name).touch()
    assert runs.reopen({"resume": str(directory)}) == directory
    assert names(directory) == sorted([*kept, ".hydra", ".lock"]) and held(directory)
    runs.close(directory)
    assert runs.reopen({"resume": str(directory)}) == directory  # with nothing to be rid of


def test_a_run_that_cannot_be_written_to_is_refused() -> None:
    directory = made()
    (directory / ".lock").unlink()
    (directory / ".lock").symlink_to("elsewhere")
    with pytest.raises(RequestError, match=r"^checkpoints/run: cannot be written to \(.*\); copy it to where it can$"):
        runs.reopen({"resume": str(directory)})
    assert not Path("elsewhere").exists() and runs._locks == {}


def test_a_lock_keeps_others_out_says_who_has_it_and_ends_with_its_process() -> None:
    directory = made()
    (directory / ".lock").write_text("pid 1 on a machine with quite a long name since before " + "x" * 100)
    runs.lock(directory)
    said = (directory / ".lock").read_text()
    assert said.startswith(f"pid {os.getpid()} on ") and len(said) < 100 and "x" * 9 not in said
    runs.close(directory)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-ISc", code, str(directory / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RequestError) as error:
            runs.reopen({"resume": str(directory)})
        assert str(error.value) == f"checkpoints/run is in use by {said}; wait for it, or stop it first"
        assert (directory / ".lock").read_text() == said
        (directory / ".lock").write_text("")
        with pytest.raises(RequestError, match="is in use by another process; wait"):
            runs.lock(directory)
        assert runs._locks == {}
        other.kill()
    runs.lock(directory)


def finished(**summary: Any) -> tuple[Path, dict[str, Any]]:
    """A run that has finished, and the configuration with which it is resumed."""
    directory = made()
    told = {"test_accuracy": 0.9125, "test_loss": 0.3, "best_epoch": 7, **summary}
    (directory / "summary.json").write_text(json.dumps({name: value for name, value in told.items() if value != ""}))
    for name in ("best.pt", "last.pt"):
        with zipfile.ZipFile(directory / name, "w") as archive:
            archive.writestr("data", b"0123456789" * 10)
    return directory, config_of(resume=str(directory), changed=[])


def test_a_run_that_has_finished_says_what_it_came_to() -> None:
    _, config = finished()
    assert runs.finished_before(config) == (
        "checkpoints/run finished before: test accuracy 91.25%, loss 0.3000 (weights of epoch 7); "
        "epochs=N goes on to more than 20"
    )


def test_a_run_of_which_more_is_asked_has_not_finished() -> None:
    _, config = finished()
    for asked in ({"epochs": 21}, {"epochs": 19}, {"early_stopping": {"patience": 3}}, {"changed": ["seed 0 -> 1"]}):
        assert runs.finished_before({**config, **asked}) == ""
    assert runs.finished_before({**config, "device": "cpu"}) != ""


@pytest.mark.parametrize(
    "summary", [{"test_accuracy": ""}, {"test_loss": None}, {"best_epoch": "seven"}, {"best_epoch": 7.5}]
)
def test_a_run_whose_results_are_lost_has_not_finished(summary: dict[str, Any]) -> None:
    assert runs.finished_before(finished(**summary)[1]) == ""


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_a_run_with_a_damaged_checkpoint_has_not_finished(name: str) -> None:
    directory, config = finished()
    content = bytearray((directory / name).read_bytes())
    content[content.index(b"0123456789")] ^= 1
    (directory / name).write_bytes(content)
    assert runs.finished_before(config) == ""
    (directory / name).unlink()
    assert runs.finished_before(config) == ""
    (directory / "summary.json").unlink()
    assert runs.finished_before(config) == ""


def test_what_a_run_keeps_of_its_configuration_says_not_how_it_was_resumed() -> None:
    config = config_of(resume="checkpoints/run", resume_changed=True, changed=["x"], seed=3)
    assert runs.own_config(config) == config_of(seed=3)
    assert config["changed"] == ["x"] and config["resume"] == "checkpoints/run"


# ---------------------------------------------------------------------------------------------------------------------
# Ends


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (Interrupted("stopped by Ctrl-C in epoch 3", 130), "stopped", "stopped by Ctrl-C in epoch 3"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (RunError("a full\ndisk"), "failed", "a full disk"),
        (ValueError("a bug"), "failed", "a bug"),
    ],
)
def test_a_run_that_did_not_come_to_its_end_says_why(error: BaseException, state: str, reason: str) -> None:
    one, other = runs.create(config_of("one")), made("other")
    runs.reopen({"resume": str(other)})
    runs.abandon(error)
    for directory in (one, other):
        assert json.loads((directory / "end.json").read_text()) == {"state": state, "reason": reason}
        assert not held(directory)
    assert runs._locks == {} and runs._made == set() and os.readlink(RUNS / "latest") == "other"


def test_a_refused_run_is_taken_away_if_it_was_made_for_it() -> None:
    runs.create(config_of("new"))
    runs.abandon(RequestError("no"))
    assert names() == []  # and no link to it
    shutil.rmtree(runs.create(config_of("new")))
    runs.abandon(RequestError("no"))
    assert names() == []  # whoever took it away
    old = made("old")
    runs.create(config_of("new"))
    runs.reopen({"resume": str(old)})
    runs.abandon(RequestError("no"))
    assert names() == ["old"] and json.loads((old / "end.json").read_text()) == {"state": "failed", "reason": "no"}
    (RUNS / "latest").symlink_to("old")
    runs.reopen({"resume": str(old)})
    runs.abandon(RequestError("no"))
    assert names() == ["latest", "old"]  # nothing is missing, so the link stays


def test_the_traceback_of_what_is_more_than_a_line_goes_to_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    def logged(error: BaseException) -> str:
        directory = runs.create(config_of(None))
        runs.start_log(directory / "train.log")
        runs.abandon(error)
        return (directory / "train.log").read_text()

    cause = RunError("out of memory")
    cause.__cause__ = MemoryError("at 0x7f")
    assert "ValueError: a bug" in logged(ValueError("a bug")) and "MemoryError: at 0x7f" in logged(cause)
    assert logged(RunError("a full disk")) == "" == capsys.readouterr().out


def test_an_end_on_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise RunError("No space left on device")

    directory = runs.create(config_of())
    monkeypatch.setattr("engine.files.write_json", full)
    runs.abandon(RunError("No space left on device"))
    assert runs._locks == {} and not held(directory)


# ---------------------------------------------------------------------------------------------------------------------
# Finding one


def put(name: str, second: int) -> Path:
    """A run that was started in a second."""
    file = RUNS / name / ".hydra" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (second, second))
    return RUNS / name


def test_a_run_is_named_by_its_directory_a_file_in_it_or_latest() -> None:
    run = put("run", 1)
    (run / "last.pt").touch()
    for name in ("checkpoints/run", "checkpoints/run/", "checkpoints/run/last.pt", "checkpoints/run/best.pt", "latest"):
        assert runs.find(name) == run, name
    assert runs.find(str(run.resolve() / "last.pt")) == run.resolve()
    for name in ("run", "checkpoints", "checkpoints/run/best", "checkpoints/run/a.txt", "no/last.pt", "x" * 5000):
        with pytest.raises(RequestError) as error:
            runs.find(name)
        said = str(error.value)
        assert said.endswith(": no run there; expected a run's directory such as checkpoints/run, or latest")
        assert len(said) < 200


def test_where_there_is_no_run_it_is_said() -> None:
    for root in (None, RUNS):
        if root:
            root.mkdir()
        with pytest.raises(RequestError, match=r"such as checkpoints/<run>, or latest$"):
            runs.find("nothing")
        with pytest.raises(RequestError, match=f"^there is no run in {RUNS.resolve()} yet; train one"):
            runs.find("latest")
        with pytest.raises(RequestError, match=r"^there is no run in "):
            runs.newest_best()


def test_runs_are_listed_as_they_were_started_those_of_sweeps_among_them(tmp_path: Path) -> None:
    assert runs.all_directories(RUNS) == []
    late, early, between = put("a", 30), put("b", 10), put("sweep/c", 20)
    put("sweep/too/deep", 5)
    (RUNS / "empty").mkdir()
    (RUNS / "latest").symlink_to("a")
    (RUNS / "other-sweep").symlink_to("sweep")
    (RUNS / "sweep" / "again").symlink_to("c")
    assert runs.all_directories(RUNS) == [early, between, late]
    root = tmp_path / "elsewhere"
    root.symlink_to(RUNS)  # the folder of the runs itself may be a link
    assert runs.all_directories(root) == [root / "b", root / "sweep/c", root / "a"]
    with pytest.raises(RequestError, match="such as checkpoints/a, or latest"):
        runs.find("nothing")


def test_latest_that_leads_elsewhere_or_nowhere_is_not_followed(tmp_path: Path) -> None:
    old, new = put("old", 1), put("new", 2)
    (RUNS / "latest").symlink_to("old")
    assert runs.newest() == old  # which was resumed since
    (RUNS / "latest").unlink()
    (RUNS / "latest").symlink_to("gone")
    assert runs.newest() == new
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "best.pt").touch()
    (RUNS / "latest").unlink()
    (RUNS / "latest").symlink_to(outside)
    assert runs.newest() == new
    (RUNS / "bare").mkdir()
    (RUNS / "bare" / "best.pt").touch()
    (RUNS / "latest").unlink()
    (RUNS / "latest").symlink_to("bare")
    assert runs.newest() == RUNS / "bare"  # a checkpoint that was put there
    (RUNS / "latest").unlink()
    (RUNS / "latest").symlink_to("empty")
    (RUNS / "empty").mkdir()
    assert runs.newest() == new


def test_the_best_weights_of_the_newest_run() -> None:
    run = put("run", 1)
    with pytest.raises(RequestError, match=r"^checkpoints/run has no best.pt: .* train.py resume=checkpoints/run, or"):
        runs.newest_best()
    (run / "best.pt").touch()
    assert runs.newest_best() == run / "best.pt"


# ---------------------------------------------------------------------------------------------------------------------
# The log, the table, the machine


def test_the_log_tells_the_terminal_less_than_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger(runs.log.name).disabled = True  # as Hydra leaves it
    root_saw: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = root_saw.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        runs.start_log(Path("one.log"))
        runs.start_log(Path("two.log"))  # ends the first
        runs.log.debug("the model")
        runs.log.info("epoch 1")
        assert root_saw == [] and not logging.raiseExceptions
        runs.stop_log()
        assert runs.log.handlers == [] and runs.log.propagate and not runs.log.disabled
        runs.log.info("later")
        assert [record.getMessage() for record in root_saw] == ["later"]
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "epoch 1\n"
    first, second = Path("two.log").read_text().splitlines()
    assert first.endswith(" the model") and second.endswith(" epoch 1") and second[:2] == "20"
    assert Path("one.log").read_text() == ""
    runs.start_log(Path("two.log"))  # a run that goes on
    runs.log.info("epoch 2")
    assert len(Path("two.log").read_text().splitlines()) == 3
    with pytest.raises(RequestError, match=r"^nowhere/train.log: cannot be written \(.*No such file"):
        runs.start_log(Path("nowhere/train.log"))


def test_metrics_by_hand() -> None:
    row = {
        "epoch": 1,
        "train_loss": 2.34567891,
        "train_accuracy": 0.1234564,
        "val_loss": None,
        "val_accuracy": None,
        "lr": 0.00000249,
        "seconds": 1.23456,
        "images_per_second": 1000.00049,
    }
    other = {**row, "epoch": 2, "val_loss": 1.0, "val_accuracy": 0.5, "lr": 0.05, "seconds": 2.0}
    runs.write_metrics(Path("metrics.csv"), [])
    head = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds,images_per_second\n"
    assert Path("metrics.csv").read_text() == head
    runs.write_metrics(Path("metrics.csv"), [row, other])
    assert Path("metrics.csv").read_bytes().decode() == (
        f"{head}1,2.345679,0.123456,,,2e-06,1.235,1000.0\n2,2.345679,0.123456,1.0,0.5,0.05,2.0,1000.0\n"
    )


def test_what_is_kept_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError, version

    import numpy
    import torch

    def told(package: str) -> str:
        if package == "torchvision":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(runs, "version", told)
    found = runs.environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["numpy"] == numpy.__version__
    assert found["torchvision"] == "unknown" and found["hydra-core"].startswith("1.")
    assert found["machine"] == f"{os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores"
    assert list(found)[-1] == "git_commit"


def test_the_commit_and_whether_it_is_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *own, *words], cwd=root, check=True, capture_output=True, text=True).stdout

    root = tmp_path / "program"
    root.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(runs, "ROOT", root)
    assert runs.environment()["git_commit"] is None  # no repository
    git("init", "-q")
    assert runs.environment()["git_commit"] is None  # no commit in it
    (root / "train.py").write_text("one")
    git("add", "train.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    (root / "mine.yaml").write_text("a file that git does not know")
    assert len(commit) == 40 and runs.environment()["git_commit"] == commit
    (root / "train.py").write_text("two")
    assert runs.environment()["git_commit"] == f"{commit} with changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.environment()["git_commit"] is None  # no git
