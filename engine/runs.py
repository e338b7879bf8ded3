"""A run and its directory checkpoints/<run>/: never shared by two runs, nothing in it half-written."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from engine import files
from engine.config import ROOT, RUNS
from engine.errors import RequestError, RunError, one_line

COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")

log = logging.getLogger("run")  # to the terminal and to train.log


def check_name(config: dict[str, Any]) -> None:
    """Refuse the name of a new run if it is taken, or would have to be quoted in a shell.

    Raises:
        RequestError: the name cannot be used.
    """
    name = config["name"]
    if name is None or config["resume"]:
        return
    sweep, _, own = name.rpartition("/")
    in_sweep = sweep and (RUNS / sweep / "sweep.json").is_file()  # a sweep's runs are named sweep/run
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", own if in_sweep else name) or name == "latest":
        raise RequestError(f"name={name}: expected letters, digits, dots, dashes and underscores (and not 'latest')")
    if (RUNS / name).exists():
        raise RequestError(f"name={name}: {RUNS / name} is taken; choose another name or remove it")


def create(config: dict[str, Any]) -> Path:
    """Make the run's own directory, with .hydra/ in it, and point checkpoints/latest to it.

    The directory appears under its name complete, and renaming onto one that is there fails: whoever succeeds has it to
    itself, whatever starts in the same second, and a run killed before that leaves nothing to continue.

    Raises:
        RequestError: the name is taken or nothing can be written there.
    """
    name = config["name"]
    draft = None
    base = name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config['choices']['model']}_{config['choices']['dataset']}"
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        draft = RUNS / f".new-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        (draft / ".hydra").mkdir(parents=True)
        runtime = HydraConfig.get()
        OmegaConf.save(OmegaConf.create(config), draft / ".hydra" / "config.yaml")
        OmegaConf.save(OmegaConf.create({"hydra": runtime}), draft / ".hydra" / "hydra.yaml")
        OmegaConf.save(runtime.overrides.task, draft / ".hydra" / "overrides.yaml")
        lock(draft)
        directory = _claim(draft, base, own_name=name is not None)
        _locks[directory] = _locks.pop(draft)
        _point_latest(directory)
    except OSError as error:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        raise RequestError(f"the run directory cannot be made in {RUNS.resolve()}: {one_line(error)}") from None
    return directory


def reopen(config: dict[str, Any]) -> Path:
    """The directory of the run that is resumed, locked.

    Raises:
        RequestError: it is in use.
    """
    directory = Path(config["resume"])
    try:
        lock(directory)
        for torn in directory.glob(".*.pt.*"):  # what a kill left of a file that was being written
            torn.unlink()
        (directory / "end.json").unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{directory}: cannot be written to ({one_line(error)}); copy it to where it can") from None
    return directory


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps of its configuration: everything but how it was resumed."""
    own = {key: value for key, value in config.items() if key != "changed"}
    return own | {"resume": None, "resume_changed": False}


def save_config(directory: Path, config: dict[str, Any]) -> None:
    """Make the configuration that a resumed run goes on with the run's own."""
    files.write(directory / ".hydra" / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(own_config(config))))


def close(directory: Path) -> None:
    """End a run that is finished: its log and its lock."""
    stop_log()
    _locks.pop(directory).close()


def abandon(state: str, reason: str) -> None:
    """Close what this process has open of a run that failed or was stopped, and note that in its end.json.

    The traceback of what is being handled goes to train.log, where it is not just a line for the user.
    """
    error = sys.exc_info()[1]
    if error is not None and not (isinstance(error, RunError) and error.__cause__ is None):
        log.debug("".join(traceback.format_exception(error)))
    for directory in list(_locks):
        with contextlib.suppress(RunError):  # a full disk, for instance, which is what is being reported
            files.write_json(directory / "end.json", {"state": state, "reason": reason})
        close(directory)


def _claim(draft: Path, base: str, own_name: bool) -> Path:
    number = 1
    while True:
        directory = RUNS / (base if number == 1 else f"{base}_{number}")
        try:
            draft.rename(directory)
            return directory
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if own_name:
                shutil.rmtree(draft)
                raise RequestError(f"name={base}: {directory} is taken; choose another name or remove it") from None
            number += 1


def _point_latest(directory: Path) -> None:
    temporary = RUNS / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(directory.relative_to(RUNS))
    os.replace(temporary, RUNS / "latest")


_locks: dict[Path, Any] = {}  # kept open: closing a file gives its lock up


def lock(directory: Path) -> None:
    """Keep every other process out of a run's directory until this one ends, however it ends.

    A POSIX record lock: the kernel drops it with the process, so there are no stale ones, and a loader's worker that
    outlives its parent does not hold it.

    Raises:
        RequestError: another process has it; says which.
    """
    file = (directory / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RequestError(f"{directory} is in use by {holder}; wait for it, or stop it first") from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    _locks[directory] = file


def find(run: str) -> Path:
    """The directory of a run named by `resume=`: a directory, a file in it, or `latest`.

    Raises:
        RequestError: there is no such run.
    """
    directory = newest() if run == "latest" else Path(run)
    if directory.is_file() or (directory.suffix == ".pt" and not directory.exists()):
        directory = directory.parent
    if not (directory / ".hydra" / "config.yaml").is_file():
        example = newest() if (RUNS / "latest").is_dir() else RUNS / "<run>"
        raise RequestError(f"resume={run}: no run there; expected a run's directory such as {example}, or latest")
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration of a run, as plain data.

    Raises:
        RequestError: the file is damaged.
    """
    file = directory / ".hydra" / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config["choices"], dict):
            raise ValueError("it names no choices")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not a run's configuration ({one_line(error)})") from None
    return config


def newest() -> Path:
    """The newest run's directory.

    Raises:
        RequestError: there is none yet.
    """
    latest = RUNS / "latest"
    if not latest.is_dir():
        raise RequestError(f"there is no run in {RUNS.resolve()} yet; train one, or say checkpoint=PATH")
    return RUNS / latest.resolve().relative_to(RUNS.resolve())


def newest_best() -> Path:
    """best.pt of the newest run, which evaluation and prediction take when no checkpoint is named.

    Raises:
        RequestError: there is no run yet, or it was stopped before its first epoch was done.
    """
    directory = newest()
    if not (directory / "best.pt").is_file():
        raise RequestError(
            f"{directory} has no best.pt: no epoch of it was finished; go on with python train.py resume={directory}, "
            "or say checkpoint=PATH"
        )
    return directory / "best.pt"


def start_log(file: Path) -> None:
    """Send the log to standard output and, with times, to a file."""
    stop_log()
    logging.raiseExceptions = False  # a full disk is told by what is lost, not by every line of the log
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.disabled = False  # Hydra's set-up of logging disables the loggers that were there before it
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO)
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(terminal)
    log.addHandler(to_file)


def stop_log() -> None:
    """Close the log's files; what comes after a run does not belong into its log."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = True


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Write metrics.csv from the rows of all epochs, so that it cannot have a row twice or miss one."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    for row in history:
        rows.writerow({key: _rounded(key, value) for key, value in row.items()})
    files.write(path, text.getvalue())


def _rounded(key: str, value: Any) -> Any:
    if value is None:
        return ""
    return round(value, 3 if key in ("seconds", "images_per_second") else 6) if isinstance(value, float) else value


def environment() -> dict[str, Any]:
    """What a repetition needs to know of the machine: versions, processor, git commit."""
    versions = {}
    for package in ("torch", "torchvision", "hydra-core", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {
        "python": platform.python_version(),
        **versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
