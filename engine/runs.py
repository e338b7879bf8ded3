"""A run and its directory checkpoints/<run>/: never shared by two runs, nothing in it half-written."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from engine.config import ROOT, RUNS
from engine.errors import RequestError, one_line

COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds", "images_per_second")

log = logging.getLogger("run")  # to the terminal and to train.log


def check_name(name: str | None) -> None:
    """Refuse a run name that is taken, or that would have to be quoted in a shell.

    Raises:
        RequestError: the name cannot be used.
    """
    if name is None:
        return
    sweep, _, own = name.rpartition("/")
    in_sweep = sweep and (RUNS / sweep / "sweep.json").is_file()  # a sweep's runs are named sweep/run
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", own if in_sweep else name) or name == "latest":
        raise RequestError(f"name={name}: expected letters, digits, dots, dashes and underscores (and not 'latest')")
    if (RUNS / name).exists():
        raise RequestError(f"name={name}: {RUNS / name} is taken; choose another name or remove it")


def create(config: dict[str, Any]) -> Path:
    """Make the run's own directory, with .hydra/ in it, and point checkpoints/latest to it.

    Raises:
        RequestError: the name is taken or nothing can be written there.
    """
    name = config["name"]
    base = name or f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config['choices']['model']}_{config['choices']['dataset']}"
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        directory = _claim(base, own_name=name is not None)
        hydra_directory = directory / ".hydra"
        hydra_directory.mkdir()
        runtime = HydraConfig.get()
        OmegaConf.save(OmegaConf.create(config), hydra_directory / "config.yaml")
        OmegaConf.save(OmegaConf.create({"hydra": runtime}), hydra_directory / "hydra.yaml")
        OmegaConf.save(runtime.overrides.task, hydra_directory / "overrides.yaml")
        _point_latest(directory)
    except OSError as error:
        raise RequestError(f"the run directory cannot be made in {RUNS.resolve()}: {one_line(error)}") from None
    return directory


def _claim(base: str, own_name: bool) -> Path:
    """mkdir succeeds for one process only, so whoever made the directory has it to itself."""
    number = 1
    while True:
        directory = RUNS / (base if number == 1 else f"{base}_{number}")
        try:
            directory.mkdir()
            return directory
        except FileExistsError:
            if own_name:
                raise RequestError(f"name={base}: {directory} is taken; choose another name or remove it") from None
            number += 1


def _point_latest(directory: Path) -> None:
    temporary = RUNS / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(directory.relative_to(RUNS))
    os.replace(temporary, RUNS / "latest")


def newest() -> Path:
    """The newest run's directory.

    Raises:
        RequestError: there is none yet.
    """
    latest = RUNS / "latest"
    if not latest.is_dir():
        raise RequestError(f"there is no run in {RUNS.resolve()} yet; train one, or say checkpoint=PATH")
    return RUNS / latest.resolve().relative_to(RUNS.resolve())


def start_log(file: Path) -> None:
    """Send the log to standard output and, with times, to a file."""
    stop_log()
    log.setLevel(logging.DEBUG)
    log.propagate = False
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


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Write metrics.csv from the rows of all epochs, so that it cannot have a row twice or miss one."""
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    rows.writeheader()
    for row in history:
        rows.writerow({key: _rounded(key, value) for key, value in row.items()})
    write_text(path, text.getvalue())


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
