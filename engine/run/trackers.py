"""Trackers: TensorBoard, MLflow and Weights & Biases, each imported only when chosen (`logger=[tensorboard,mlflow]`).

A run calls epoch() after every epoch and finish() at its end; it never waits for a tracker's success: one that raises
is reported once and left out from there on. metrics.csv is the run's own and needs no tracker.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from engine import files
from engine.config import leaves
from engine.distributed import is_first
from engine.errors import RequestError, one_line
from engine.terminal import log


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not there, before anything else is imported.

    Raises:
        RequestError: with the command that installs the missing one.
    """
    for name in names:
        if name in KINDS and importlib.util.find_spec(name) is None:
            raise RequestError(f"logger={name}: {name} is not installed: pip install '.[{name}]'")


class Tracker(Protocol):
    """What each of them can do; every method may raise."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Take the row of metrics of an epoch."""

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """Take the result, None where the run did not come to one, and close."""


class Trackers:
    """The chosen trackers of a run, behind one epoch() and one finish()."""

    def __init__(self, config: dict[str, Any], directory: Path, next_epoch: int = 1) -> None:
        """Start the chosen trackers.

        Args:
            config: the run's checked configuration; `config["logger"]` has each tracker's settings under its name.
            directory: the run's directory.
            next_epoch: the first epoch that will be told; later than 1 where a run is resumed.
        """
        self.directory = directory
        chosen = (config.get("logger") or {}) if is_first() else {}
        self.settings: dict[str, dict[str, Any]] = {name: chosen[name] or {} for name in KINDS if name in chosen}
        self.trackers: dict[str, Tracker] = {}
        for name, settings in self.settings.items():
            tracker = self._try(name, KINDS[name], config, settings, directory, next_epoch)
            if tracker is not None:
                self.trackers[name] = tracker

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the trackers of a run that fails or is stopped."""
        if kind is not None:
            self.finish(None)

    def epoch(self, row: dict[str, Any]) -> None:
        """Tell all trackers an epoch's row of metrics."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.epoch, row)

    def finish(self, summary: dict[str, Any] | None = None) -> None:
        """Tell all trackers the result, None where the run failed or was stopped, and close them; once only."""
        for name, tracker in list(self.trackers.items()):
            pictures = sorted(self.directory.glob("*.png")) if self.settings[name].get("pictures") else []
            self._try(name, tracker.finish, summary, pictures)
        self.trackers.clear()

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # whatever a tracker does, the run goes on
            log.info(f"tracker  {name} failed and is left out from here on: {type(error).__name__}: {one_line(error)}")
            self.trackers.pop(name, None)


def hyperparameters(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as one level of names and values, with the option chosen of each group."""
    left_out = ("choices", "logger", "name")
    flat = dict(leaves({key: value for key, value in config.items() if key not in left_out}, ("lr_scale",)))
    choices = {group: name for group, name in config["choices"].items() if isinstance(name, str)}
    return choices | {name: value for name, value in flat.items() if not name.endswith("_target_")}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if name != "epoch" and value is not None}


def _results(summary: dict[str, Any] | None) -> dict[str, float]:
    """What a run came to, under names that no epoch's metric has."""
    summary = summary or {}
    keys = {"test_accuracy": "test_accuracy", "test_loss": "test_loss", "best_val_accuracy": "val_accuracy"}
    return _numbers({name: summary.get(key) for name, key in keys.items()})


def _remembered(directory: Path, name: str, new: Callable[[], str]) -> tuple[str, bool]:
    """The identity that a tracker gave this run, so that a resumed run goes on in the same record.

    One that cannot be read, or is none, is made anew.

    Returns:
        the identity, and whether it is there from before.
    """
    file = directory / "trackers.json"
    pattern = r"[A-Za-z0-9_-]{1,64}"  # it becomes part of file names
    found = files.read_json(file).items()
    known = {key: value for key, value in found if isinstance(value, str) and re.fullmatch(pattern, value)}
    if name in known:
        return known[name], True
    if file.exists() and not known:
        log.info(f"tracker  {name} begins a new record: {file} is damaged and does not name the one before")
    known[name] = new()
    files.write_json(file, known)
    return known[name], False


def _run_name(directory: Path) -> str:
    """`sweep/run` for a run of a sweep, else `run`."""
    in_sweep = (directory.parent / "sweep.json").is_file()
    return f"{directory.parent.name}/{directory.name}" if in_sweep else directory.name


class TensorBoard:
    """Event files in the run directory; `tensorboard --logdir checkpoints` finds all runs."""

    def __init__(self, config: dict[str, Any], settings: dict[str, Any], directory: Path, next_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run had written of the epochs that are done again, TensorBoard leaves out.
        self.writer = SummaryWriter(directory, purge_step=next_epoch if next_epoch > 1 else None)
        self.hyperparameters = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in hyperparameters(config).items()
        }
        self.last_epoch = next_epoch - 1

    def epoch(self, row: dict[str, Any]) -> None:
        """Scalars, training and validation under one heading."""
        for name, value in _numbers(row).items():
            part, _, rest = name.partition("_")
            self.writer.add_scalar(f"{rest}/{part}" if part in ("train", "val") else f"run/{name}", value, row["epoch"])
        self.writer.flush()
        self.last_epoch = row["epoch"]

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """The pictures, and the hyperparameters with what came out."""
        for file in pictures:
            from matplotlib.image import imread

            self.writer.add_image(file.stem, imread(file)[..., :3], self.last_epoch, dataformats="HWC")
        if summary is not None:
            results = {f"result/{name}": value for name, value in _results(summary).items()}
            self.writer.add_hparams(self.hyperparameters, results, run_name=".", global_step=self.last_epoch)
        self.writer.close()


class MLflow:
    """A run in MLflow's database. Its store of plain files is refused: it errors from Python 3.13 on."""

    def __init__(self, config: dict[str, Any], settings: dict[str, Any], directory: Path, next_epoch: int) -> None:
        if "://" not in settings["uri"] or settings["uri"].startswith("file:"):
            raise ValueError(f"uri={settings['uri']}: expected a database such as sqlite:///checkpoints/mlflow.db")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked to send anything anywhere
        from mlflow.entities import Metric, Param

        logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells every table of a new database
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.metric = Metric
        self.client, experiment = _patiently(lambda: _open_mlflow(settings))

        def create() -> str:
            return str(self.client.create_run(experiment, run_name=_run_name(directory)).info.run_id)

        self.run, known = _remembered(directory, "mlflow", create)
        if known:
            self.client.update_run(self.run, status="RUNNING")
        else:
            params = [Param(name, str(value)[:6000]) for name, value in hyperparameters(config).items()]
            self.client.log_batch(self.run, params=params)

    def epoch(self, row: dict[str, Any]) -> None:
        """All metrics of the epoch in one transaction."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run, [self.metric(name, v, now, row["epoch"]) for name, v in _numbers(row).items()])

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """The result, the pictures and how the run ended."""
        for name, value in _results(summary).items():
            self.client.log_metric(self.run, name, value)
        for file in pictures:
            self.client.log_artifact(self.run, str(file))
        self.client.set_terminated(self.run, "FAILED" if summary is None else "FINISHED")


def _open_mlflow(settings: dict[str, Any]) -> tuple[Any, str]:
    """A client, and the number of the experiment, made where it is new."""
    from mlflow.tracking import MlflowClient

    scheme, _, file = settings["uri"].partition(":///")
    if scheme == "sqlite":
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=settings["uri"])
    found = client.get_experiment_by_name(settings["experiment"])
    if found is not None:
        return client, found.experiment_id
    folder = Path(settings["artifacts"]).resolve()
    return client, client.create_experiment(settings["experiment"], artifact_location=folder.as_uri())


def _patiently(call: Callable[[], Any], attempts: int = 5) -> Any:
    """Try again after a moment: jobs of a sweep that start together may all find a database without tables."""
    for attempt in range(1, attempts):
        try:
            return call()
        except Exception:
            time.sleep(0.5 * attempt)
    return call()


class WandB:
    """A run in <run>/wandb/, offline unless mode=online."""

    def __init__(self, config: dict[str, Any], settings: dict[str, Any], directory: Path, next_epoch: int) -> None:
        import wandb

        identity, known = _remembered(directory, "wandb", lambda: uuid.uuid4().hex[:8])
        self.wandb = wandb
        self.run = wandb.init(
            mode=settings["mode"],
            project=settings["project"],
            entity=settings["entity"],
            name=_run_name(directory),
            id=identity,
            resume="allow" if known and settings["mode"] == "online" else None,
            config=hyperparameters(config),
            dir=directory,
            reinit="finish_previous",
            settings=wandb.Settings(console="off", silent=True),
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """All metrics of the epoch as one step."""
        self.run.log(_numbers(row), step=row["epoch"])

    def finish(self, summary: dict[str, Any] | None, pictures: list[Path]) -> None:
        """The result, the pictures and how the run ended."""
        self.run.summary.update(_results(summary))
        if pictures:
            self.run.log({file.stem: self.wandb.Image(str(file)) for file in pictures})
        self.run.finish(exit_code=1 if summary is None else 0)


# By the package that each needs, which is also its name in `logger=` and the extra that installs it.
KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
