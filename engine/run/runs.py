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

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from engine import files, terminal
from engine.config import ROOT, RUNS
from engine.distributed import from_first, is_first, recalled, remember, world_size
from engine.errors import Interrupted, RequestError, RunError, one_line, shortened
from engine.run import trust
from engine.terminal import log

PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # needs no quoting in a shell
LONGEST_NAME = 200  # characters of a run's name; the file system allows 255, and a number may be added
COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")


def check_name(config: dict[str, Any]) -> None:
    """Refuse (RequestError) the name of a new run if it is taken, or would have to be quoted in a shell."""
    name = config["name"]
    if name is None or config["resume"] or not is_first():
        return
    sweep, _, own = name.rpartition("/")
    in_sweep = sweep and (RUNS / sweep / "sweep.json").is_file()  # a sweep's runs are named sweep/run
    check_plain(own if in_sweep else name)
    if (RUNS / name).exists():
        raise RequestError(f"name={name}: {RUNS / name} is taken; choose another name or remove it")


def check_plain(name: str) -> None:
    """Refuse (RequestError) a name of a run or sweep that would have to be quoted in a shell, or is too long."""
    if not re.fullmatch(PLAIN_NAME, name) or name == "latest":
        allowed = "letters, digits, dots, dashes and underscores (and not 'latest')"
        raise RequestError(f"name={shortened(name)}: expected {allowed}")
    if len(name) > LONGEST_NAME:
        raise RequestError(f"name={shortened(name)}: expected at most {LONGEST_NAME} characters, there are {len(name)}")


def going_on(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration; where torchrun has started the processes of a run anew, to go on with the run."""
    known = recalled("run")
    return config if known is None else {**config, "resume": known, "changed": []}


def opened(config: dict[str, Any]) -> Path:
    """The directory of a run that begins or goes on, opened by the first process, with its log; told to all."""

    def open_it() -> Path:
        directory = reopen(config) if config["resume"] else create(config)
        remember("run", str(directory))
        return directory

    directory = from_first(open_it)
    start_log(directory / "train.log")
    return directory


def create(config: dict[str, Any]) -> Path:
    """Make the run's own directory, with .hydra/ in it, and point checkpoints/latest to it.

    The directory appears under its name complete, and renaming onto one that is there fails: whoever succeeds has it to
    itself, whatever starts in the same second, and a run killed before that leaves nothing to continue.

    Raises:
        RequestError: the name is taken or nothing can be written there.
    """
    name = config["name"]
    draft = RUNS / f".new-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    base = name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config['choices']['model']}_{config['choices']['dataset']}"
    try:
        (draft / ".hydra").mkdir(parents=True)
        runtime = HydraConfig.get()
        save_config(draft, config)
        OmegaConf.save(OmegaConf.create({"hydra": runtime}), draft / ".hydra" / "hydra.yaml")
        OmegaConf.save(runtime.overrides.task, draft / ".hydra" / "overrides.yaml")
        lock(draft)
        directory = _claim(draft, base, own_name=name is not None)
        _locks[directory] = _locks.pop(draft)
        _made.add(directory)
        _point_latest(directory)
    except (OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        _locks.pop(draft, io.StringIO()).close()
        shutil.rmtree(draft, ignore_errors=True)
        raise RequestError(f"the run directory cannot be made in {RUNS.resolve()}: {one_line(error)}") from None
    return directory


def reopen(config: dict[str, Any]) -> Path:
    """The directory of the run that is resumed, locked; RequestError if it is in use."""
    directory = Path(config["resume"])
    try:
        lock(directory)
        for torn in directory.glob(".*.pt.*"):  # what a kill left of a file that was being written
            torn.unlink()
        (directory / "end.json").unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{directory}: cannot be written to ({one_line(error)}); copy it to where it can") from None
    return directory


def is_saved(directory: str | None) -> bool:
    """Whether a run that is resumed, None for a new one, has anything to go on from but its configuration."""
    return directory is not None and any((Path(directory) / name).exists() for name in ("last.pt", "previous.pt"))


def finished_before(config: dict[str, Any]) -> str:
    """What a resumed run came to, where it has finished, is whole, and no more is asked of it; else an empty text."""
    directory = Path(config["resume"])
    summary, (own, _) = files.read_json(directory / "summary.json"), trust.read_run_config(directory)
    if config["changed"] or any(config[key] != own.get(key) for key in ("epochs", "early_stopping")):
        return ""
    try:
        test = f"test accuracy {summary['test_accuracy']:.2%}, loss {summary['test_loss']:.4f}"
        epoch = f"weights of epoch {summary['best_epoch']:d}"
    except (KeyError, TypeError, ValueError):
        return ""  # it has not finished, or its results are lost
    if not all(_is_whole(directory / name) for name in ("best.pt", "last.pt")):
        return ""  # it is mended by what resuming does
    return f"{directory} finished before: {test} ({epoch}); epochs=N goes on to more than {own['epochs']}"


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's checksums are right, without torch."""
    try:
        with files.open_regular(checkpoint) as file, files.open_archive(file) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged one raises anything
        return False


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps of its configuration: everything but how it was resumed."""
    own = {key: value for key, value in config.items() if key != "changed"}
    return own | {"resume": None, "resume_changed": False}


def save_config(directory: Path, config: dict[str, Any]) -> None:
    """Write the configuration that a run begins or goes on with, and the sign that it was typed here."""
    text = OmegaConf.to_yaml(OmegaConf.create(own_config(config)))
    files.write(directory / ".hydra" / "config.yaml", trust.with_signature(text))


def close(directory: Path) -> None:
    """End a run that is finished: its log and its lock."""
    stop_log()
    if lock := _locks.pop(directory, None):  # of several processes only the first has it
        lock.close()
    _made.discard(directory)


def abandon(error: BaseException) -> None:
    """Close what this process has open of a run that did not come to its end, and note why in its end.json.

    After a wrong request nothing stays: a directory that this process made is taken away. The traceback of what is more
    than a line for the user goes to train.log.
    """
    stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
    end = {"state": "stopped" if stopped else "failed", "reason": one_line(error)}
    if not (isinstance(error, RunError) and error.__cause__ is None):
        log.debug("".join(traceback.format_exception(error)))
    for directory in list(_locks):
        refused = isinstance(error, RequestError) and directory in _made
        if not refused:
            with contextlib.suppress(RunError):  # a full disk, for instance, which is what is being reported
                files.write_json(directory / "end.json", end)
        close(directory)
        if refused:
            shutil.rmtree(directory, ignore_errors=True)
            if (RUNS / "latest").is_symlink() and not (RUNS / "latest").exists():
                (RUNS / "latest").unlink()


def _claim(draft: Path, base: str, own_name: bool) -> Path:
    number = 1
    while True:
        directory = RUNS / (base if number == 1 else f"{base}_{number}")
        try:
            return draft.rename(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if own_name:
                shutil.rmtree(draft)
                raise RequestError(f"name={base}: {directory} is taken; choose another name or remove it") from None
            number += 1


def _point_latest(directory: Path) -> None:
    """Lead checkpoints/latest to a run; without it the newest is found all the same, so that no run fails for it."""
    latest, temporary = RUNS / "latest", RUNS / f".latest-{os.getpid()}"
    if latest.exists() and not latest.is_symlink():
        print(f"note: {latest} is a folder or file of its own and no link to the newest run; it is left as it is")
        return
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(directory.relative_to(RUNS))
        os.replace(temporary, latest)
    except OSError as error:  # some file systems have no links
        print(f"note: {latest} cannot be made to lead to the newest run ({one_line(error)})")


_made: set[Path] = set()  # directories of runs that this process made, and did not find
_locks: dict[Path, Any] = {}  # kept open: closing a file gives its lock up


def lock(directory: Path) -> None:
    """Keep every other process out of a run's directory until this one ends, however it ends.

    A POSIX record lock: the kernel drops it with the process, so there are no stale ones, and a loader's worker that
    outlives its parent does not hold it.

    Raises:
        RequestError: another process has it; says which.
    """
    file = files.open_own(directory / ".lock", "a+")
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
    """The directory of a run named by `resume=` (itself, a file in it, `latest`); RequestError if there is none."""
    directory = newest() if run == "latest" else Path(run)
    if os.path.isfile(directory) or (directory.suffix == ".pt" and not os.path.exists(directory)):
        directory = directory.parent
    if not os.path.exists(directory / ".hydra" / "config.yaml"):
        example = next(iter(all_directories(RUNS)[-1:]), RUNS / "<run>")
        raise RequestError(
            f"resume={shortened(run)}: no run there; expected a run's directory such as {example}, or latest"
        )
    return directory


def all_directories(root: Path) -> list[Path]:
    """The directories of all runs below `root`, in sweeps too, in the order in which they were started or resumed.

    `latest` is a link to one of them. Where copying made a folder of it (some archives do), it is one of them once
    more, and counts only if there is nothing else.
    """
    found = []
    for file in (file for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/.hydra/config.yaml")):
        directory = file.parent.parent
        if not directory.is_symlink() and (directory.parent == root or not directory.parent.is_symlink()):
            with contextlib.suppress(OSError):  # it was removed just now
                found.append((file.stat().st_mtime, str(directory), directory))
    directories = [directory for *_, directory in sorted(found)]
    return [d for d in directories if d != root / "latest"] or directories


def newest() -> Path:
    """The directory that `latest` leads to, or where that is gone the newest run's; RequestError if there is none."""
    latest = RUNS / "latest"
    if latest.is_symlink() and any((latest / name).exists() for name in (".hydra/config.yaml", "best.pt")):
        with contextlib.suppress(ValueError):  # it leads to somewhere else
            return RUNS / latest.resolve().relative_to(RUNS.resolve())
    if directories := all_directories(RUNS):
        return directories[-1]
    raise RequestError(f"there is no run in {RUNS.resolve()} yet; train one, or say checkpoint=PATH")


def newest_best() -> Path:
    """best.pt of the newest run, for want of a checkpoint that is named; RequestError if there is none yet."""
    directory = newest()
    if not (directory / "best.pt").is_file():
        raise RequestError(
            f"{directory} has no best.pt: no epoch of it was finished; go on with python train.py resume={directory}, "
            "or say checkpoint=PATH"
        )
    return directory / "best.pt"


class _Safe(logging.Formatter):
    """Lines of a file that people show on their terminals: control characters are written out."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal.escaped(super().format(record))


def start_log(file: Path) -> None:
    """Send the log to standard output and, with times, to a file; RequestError if that cannot be opened."""
    stop_log()
    logging.raiseExceptions = False  # a full disk is told by what is lost, not by every line of the log
    log.propagate = False
    log.disabled = False  # Hydra's set-up of logging disables the loggers that were there before it
    if not is_first():
        log.addHandler(logging.NullHandler())
        return
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setLevel(logging.INFO)
    log.addHandler(to_terminal)
    try:
        to_file = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RequestError(f"{file}: cannot be written ({one_line(error)})") from None
    to_file.setFormatter(_Safe("%(asctime)s %(message)s"))
    log.addHandler(to_file)


def stop_log() -> None:
    """Close the log's files; what comes after a run does not belong into its log."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
    log.disabled = False  # Hydra disables what it did not configure


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Write metrics.csv from the rows of all epochs, so that it cannot have a row twice or miss one."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    for row in history:
        rows.writerow({key: _rounded(key, value) for key, value in row.items()})
    files.write(path, text.getvalue())


def _rounded(key: str, value: Any) -> Any:
    return round(value, 3 if key in ("seconds", "images_per_second") else 6) if isinstance(value, float) else value


def environment() -> dict[str, Any]:
    """What a repetition needs to know of the machine: versions, processor, git commit."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "hydra-core", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    found["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if world_size() > 1:
        found["processes"] = world_size()
    return {**found, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
