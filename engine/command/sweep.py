"""Sweeps: many runs from one command line, under one directory, with one table at the end.

    python train.py -m name=rates optimizer.lr=0.1,0.01 seed=0,1,2

Hydra's sweeper chooses the jobs and its launcher runs them, one after the other or in processes of their own. Here is
what is around them: start() checks every job and makes the directory, run_job() runs one and reports its failure at
once, finish() draws up the table. A sweep of the same name goes on: what has finished is not run again.

    checkpoints/<sweep>/         sweep.json (command lines), jobs.jsonl (a line a finished or failed job),
                                 sweep.csv, sweep.png, study.db (Optuna's)
    checkpoints/<sweep>/<run>/   as any run's
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from engine import distributed, files, terminal
from engine.config import ROOT
from engine.errors import Interrupted, RequestError, RunError, counted, interrupt_behind, one_line, printable
from engine.run import compare, runs, trust

INSTALL = "pip install '.[sweep]'"
INSTALL_RAY = "pip install hydra-ray-launcher"  # not with the others: it wants an older cloudpickle than joblib
UNIMPORTANT = (*compare.NOT_COMPARED, "name", "resume", "resume_changed", "checkpoint", "device", "num_workers")
MOST_CHECKED = 500  # jobs whose configurations are composed and checked before the first one runs; 0.1 s each

# Where the plugins' own defaults do not serve a sweep of trainings: theirs, ours, why. What is set in a YAML or on the
# command line stays as it is set.
PLUGIN_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "sweeper.direction": ("minimize", "maximize"),  # main() returns an accuracy
    "sweeper.storage": (None, "sqlite:///{directory}/study.db"),  # so that an interrupted search can go on
    "sweeper.study_name": (None, "study"),
    "sweeper.max_failure_rate": (0.0, 1.0),  # a failed trial is told and counted, the others go on
    "sweeper.n_jobs": (2, "{at_once}"),  # as many trials proposed at once as the launcher runs
    "sweeper.sampler.seed": (None, 0),  # the same proposals every time
    "launcher.n_jobs": (-1, "{at_once}"),  # jobs, cores or GPUs, whichever are fewest
    "launcher.batch_size": ("auto", 1),  # a process gets its next job when it is free
}
# Ray's colours would be written out, and lines that it takes for the same are those of several jobs.
RAY_DEFAULTS = {"RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0"}


class Sweep(NamedTuple):
    """A sweep, as it was when this process started it."""

    directory: Path
    lines_before: int  # of jobs.jsonl

    def ended(self) -> list[dict[str, Any]]:
        """How jobs ended since then."""
        return [record for record in _journal(self.directory)[self.lines_before :] if record["state"] != "began"]

    def failed(self) -> list[dict[str, Any]]:
        """Those that failed."""
        return [record for record in self.ended() if record["state"] == "failed"]


started: Sweep | None = None  # once it got as far as its first job


def is_job() -> bool:
    """Whether this process runs a job of a sweep (and not a run of its own)."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


# ---------------------------------------------------------------------------------------------------------------------
# Before the first job


def start(config: DictConfig, check: Callable[[DictConfig], Any]) -> None:
    """Check what can be known of all jobs, make the sweep's directory or go on in it, and tell Hydra its name.

    Args:
        config: the configuration that all jobs begin from, with Hydra's part.
        check: checks the composed configuration of one job.

    Raises:
        RequestError: a job's configuration is wrong, an extra is missing, the name is taken; nothing was made.
    """
    global started
    if distributed.is_launched():
        raise RequestError(
            "torchrun starts the processes of one run, a sweep (-m, hparams_search=) starts runs; leave one of them out"
        )
    _check_installed(config)
    given = [str(text) for text in config.hydra.overrides.task]
    parameters = config.hydra.sweeper.get("params") or {}
    overrides = OverridesParser.create().parse_overrides([*(f"{key}={v}" for key, v in parameters.items()), *given])
    choices: dict[str, list[str]] = {}  # of each setting its values; the last time that it is typed counts
    for override in overrides:
        key = str(override.get_key_element())
        swept_values = _values(override) if override.is_sweep_override() else None
        choices[key] = [str(override.input_line)] if swept_values is None else [f"{key}={v}" for v in swept_values]
    swept = {str(override.get_key_element()).lstrip("+") for override in overrides if override.is_sweep_override()}
    if "name" in swept:
        raise RequestError("name: names the whole sweep, so it cannot be swept; the runs are named by what differs")
    optuna = str(config.hydra.sweeper._target_).endswith("OptunaSweeper")
    jobs: Iterable[Sequence[str]] = itertools.product(*choices.values())
    if optuna:  # which proposes values between the first and the last ones
        jobs = [[values[place] for values in choices.values()] for place in (0, -1)]
    for job in itertools.islice(jobs, MOST_CHECKED):
        check(GlobalHydra.instance().config_loader().load_sweep_config(config, list(job)))
    total = int(config.hydra.sweeper.n_trials) if optuna else math.prod(map(len, choices.values()))

    name = next((str(o.value()) for o in overrides if o.key_or_group == "name" and o.value() is not None), None)
    directory, made = _claim(Path(config.hydra.sweep.dir), name)
    settings = {"overrides": given, "varying": sorted(swept), "jobs": total, "first_number": 0}
    try:
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(directory)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={directory}")  # for jobs in processes of their own
            _set_defaults(config.hydra, directory, total)
            if optuna:
                settings["first_number"] = _continue_study(config.hydra.sweeper)
        files.write_json(directory / "sweep.json", settings)
    except BaseException:
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        raise

    started = Sweep(directory, len(_journal(directory)))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])  # jobs in processes of their own import from there
    # SIGTERM too, so that launchers take their processes down with them.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _interrupt)
    if "ray" in str(config.hydra.launcher._target_):
        os.environ.update({name: value for name, value in RAY_DEFAULTS.items() if name not in os.environ})
    if "submitit" in str(config.hydra.launcher._target_):
        threading.Thread(target=_tell_ends, args=(started,), daemon=True).start()
    left = f", {settings['first_number']} of them done" if settings["first_number"] else ""
    _say(f"sweep    {directory}, {counted(total, 'trial' if optuna else 'job')}{left}")


def _tell_ends(sweep: Sweep) -> None:
    """Tell how jobs end whose output goes to files of their own, until the program ends."""
    told = 0
    while True:
        time.sleep(2)
        for record in sweep.ended()[told:]:
            told += 1
            if record["state"] == "finished":
                _say(f"job {record['job']} ({' '.join(record['overrides'])}): finished, {record['run']}")
            else:
                _report(record, record["reason"])


def _check_installed(config: DictConfig) -> None:
    """Name the extra that a sweeper or launcher of Hydra's plugins needs."""
    for kind in ("sweeper", "launcher"):
        package, plugin, *_ = [*str(config.hydra[kind]._target_).split("."), ""]
        if package == "hydra_plugins":
            try:
                found = importlib.util.find_spec(f"hydra_plugins.{plugin}")
            except ModuleNotFoundError:  # no plugin at all
                found = None
            if found is None:
                raise RequestError(f"hydra/{kind}: needs {plugin.replace('_', '-')}, which is not installed: {INSTALL}")


def _values(override: Override) -> list[str]:
    """The values of a swept setting as they are typed; of an interval its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return [str(text) for text in override.sweep_string_iterator()]


def _claim(root: Path, name: str | None) -> tuple[Path, bool]:
    """The sweep's own directory, and whether it is new: mkdir succeeds for one process only, whenever they start."""
    base = name or f"sweep_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    runs.check_plain(base)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            directory = root / (base if number == 1 else f"{base}_{number}")
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                return directory, True
            if name is not None:
                break
        if (directory / "sweep.json").is_file() and not directory.is_symlink():
            trust.check_folder(directory)
            return directory, False  # the same sweep goes on
    except ValueError as error:
        raise RequestError(f"name={name}: {directory}: {one_line(error)}") from None
    except OSError as error:
        raise RequestError(f"the sweep's directory cannot be made in {root.resolve()}: {one_line(error)}") from None
    raise RequestError(f"name={name}: {directory} is taken; choose another name or remove it")


def _set_defaults(hydra: Any, directory: Path, total: int) -> None:
    """Set what PLUGIN_DEFAULTS names, in Optuna's and joblib's part of the configuration."""
    typed = [str(text).partition("=")[0] for text in hydra.overrides.hydra]
    at_once = _jobs_at_once(hydra, total)
    for name, (theirs, ours) in PLUGIN_DEFAULTS.items():
        if "submitit" in str(hydra.launcher._target_) and name.startswith("launcher."):
            continue
        value = OmegaConf.select(hydra, name, default="missing")
        if f"hydra.{name}" not in typed and getattr(value, "name", value) == theirs:
            value = at_once if ours == "{at_once}" else ours
            OmegaConf.update(hydra, name, value.format(directory=directory) if isinstance(value, str) else value)


def _jobs_at_once(hydra: Any, total: int) -> int:
    """How many jobs the launcher is to run side by side.

    joblib gives each process its share of the cores as threads, so that fewer processes than cores leave none idle.
    """
    if "joblib" in str(hydra.launcher._target_):
        import joblib

        if hydra.launcher.n_jobs == -1:
            return max(1, min(total, len(visible_gpus()) or joblib.cpu_count()))
        return int(joblib.effective_n_jobs(hydra.launcher.n_jobs))
    return min(total, 4) if re.search("submitit|ray", str(hydra.launcher._target_)) else 1


def _continue_study(sweeper: Any) -> int:
    """Count the trials that the stored study has, and ask Optuna for the rest only.

    Its sampler starts again from its seed and would propose what it proposed first, so the seed moves on with the
    trials. A trial that was cut off (it still counts as running) is not counted, so that one more takes its place.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)  # failures were told by run_job()
    if not sweeper.storage or not sweeper.study_name:
        return 0
    try:
        study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage)
    except KeyError:
        return 0
    except Exception as error:
        raise RequestError(f"hydra.sweeper.storage={sweeper.storage}: cannot be read ({one_line(error)})") from None
    trials = study.get_trials(deepcopy=False)
    done = sum(trial.state.is_finished() for trial in trials)
    sweeper.n_trials = max(0, sweeper.n_trials - done)
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += len(trials)
    return done


# ---------------------------------------------------------------------------------------------------------------------
# One job


def join_tasks() -> None:
    """Tell each task of a job that submitit started as several, a GPU each, which of them it is, as torchrun does.

    Not torchrun within the job: the launcher starts the tasks as it is, on every node, SLURM ends them together, and
    where a job was cut off the sweep goes on with it.
    """
    if is_job() and "submitit" in str(HydraConfig.get().launcher._target_):
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


_interrupted = False  # Python, or a library, may drop an exception that comes while it tidies up


def _interrupt(number: int, _: object) -> None:
    """Leave at once; where that is dropped on the way, before the next job trains."""
    global _interrupted
    _interrupted = True
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def run_job(
    config: DictConfig, check: Callable[[DictConfig], dict[str, Any]], main: Callable[[dict[str, Any]], Any]
) -> Any:
    """Run one job of a sweep; a failure is reported at once and recorded, and the sweep goes on.

    Args:
        config: the job's composed configuration.
        check: turns it into checked plain data.
        main: runs it.

    Returns:
        what `main` returned, or None where the job failed (Optuna then counts the trial as failed).

    Raises:
        SystemExit: the job was interrupted (130, 143); this ends the sweep.
    """
    hydra = HydraConfig.get()
    directory = Path(hydra.sweep.dir)
    settings = files.read_json(directory / "sweep.json")  # as start() wrote it
    number = int(hydra.job.num) + int(settings.get("first_number", 0))
    varying = [printable(text) for text in _varying(list(hydra.overrides.task), settings.get("varying", []))]
    label = terminal.label = f"job {number + 1}/{settings.get('jobs', '?')}"
    record: dict[str, Any] = {"job": number + 1, "overrides": varying}
    try:
        plain = check(config)
        record["configuration"] = _fingerprint(plain)

        def decided() -> tuple[dict[str, Any], str]:
            before = _before(directory, record["configuration"])
            return before, before.get("run") or _run_name(directory, number, varying)

        before, run = distributed.told_by_first(decided)  # of a job's tasks, which start one after the other
        if before.get("state") == "finished":
            _say(f"{label}  {' '.join(varying)}: finished before, {before['run']}")
            return before["value"]
        if before:  # stopped or killed: exactly where it was, as resume= would
            plain |= {"name": run, "resume": str(directory.parent / run), "changed": []}
        elif "name" in plain:
            plain["name"] = f"{directory.name}/{run}"
        record["run"] = plain.get("name")
        if _interrupted:
            raise KeyboardInterrupt
        _say(f"\n{label}  {' '.join(varying)}")
        _record(directory, record, state="began")
        _choose_gpu(number, str(plain.get("device", "")), str(hydra.launcher._target_))
        value = main(plain)
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"the result is not a number ({value})")
    except Interrupted as error:
        _record(directory, record, state="stopped", reason=one_line(error))
        _report(record, one_line(error))
        sys.exit(error.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        if code := interrupt_behind(error):
            _record(directory, record, state="stopped", reason="interrupted")
            sys.exit(code)
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        if kind:  # our own bug: the whole traceback
            traceback.print_exc()
        code = getattr(error, "exit_code", 1)
        _record(directory, record, state="failed", reason=kind + one_line(error), exit_code=code)
        _report(record, kind + one_line(error, 1500))
        return None
    finally:
        terminal.label = ""
    _record(directory, record, state="finished", value=value)
    return value


def _varying(overrides: list[str], names: list[str]) -> list[str]:
    """The overrides that tell this job from the others, without Hydra's + before a name."""
    plain = [text for text in (override.lstrip("+") for override in overrides) if not text.startswith("name=")]
    return [text for text in plain if text.partition("=")[0] in names] or plain


def _fingerprint(plain: dict[str, Any]) -> str:
    """Equal for equal configurations, whatever they are named, whoever is told, in whatever order they were typed."""
    choices = {group: name for group, name in plain["choices"].items() if group not in UNIMPORTANT}
    settings = {key: value for key, value in plain.items() if key not in UNIMPORTANT}
    content = json.dumps(settings | {"choices": choices}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _before(directory: Path, configuration: str) -> dict[str, Any]:
    """The last record of a run of this configuration that finished or can be continued, or an empty one.

    Only runs of the sweep's own directory count, whatever its jobs.jsonl names.
    """
    for record in reversed(_journal(directory)):
        sweep, _, own = (record.get("run") or "").partition("/")
        run, is_own = directory / own, sweep == directory.name and re.fullmatch(runs.PLAIN_NAME, own)
        if record.get("configuration") != configuration or not is_own or run.is_symlink():
            continue
        if (run / "summary.json").is_file():
            return record if record["state"] == "finished" else {}
        if record["state"] not in ("began", "stopped") or not (run / ".hydra" / "config.yaml").is_file():
            return {}
        try:
            trust.check_folder(run)
            trust.check_folder(run / ".hydra")
        except (OSError, ValueError):  # something in it leads elsewhere
            return {}
        return record
    return {}


def _run_name(directory: Path, number: int, varying: list[str]) -> str:
    """`03_lr-0.1_model-mlp`: nothing that a shell wants quoted, and a name of its own for a job that runs again."""
    parts = [f"{number + 1:02d}", *(_word(text) for text in varying)]
    base = "_".join(part for part in parts if part)[:80]
    names = (base if again == 1 else f"{base}_{again}" for again in itertools.count(1))
    return next(name for name in names if not (directory / name).exists())


def _word(override: str) -> str:
    name, _, value = override.partition("=")
    number = compare.as_number(value)
    if number is not None and "." in value and number != 0:
        value = f"{number:.4g}"  # Optuna's values have sixteen digits
    value = value.replace("e+", "e")
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{name.rpartition('.')[2]}-{value}").strip("-.")


def _choose_gpu(number: int, device: str, launcher: str) -> None:
    """Give each process of a parallel sweep a GPU of its own, where there are several.

    CUDA reads the variable once, when torch first uses it: so a process keeps the GPU of its first job, and the first
    jobs, whose numbers follow on each other, are on different ones.
    """
    if "joblib" not in launcher or "torch" in sys.modules or device not in ("auto", "cuda"):
        return
    gpus = visible_gpus()
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by number or name, without torch (which would take one)."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", done.stdout, re.MULTILINE)


def _report(record: dict[str, Any], reason: str) -> None:
    if not distributed.is_ours_to_tell(reason):
        return
    job = printable(f"job {record['job']} ({' '.join(record['overrides'])})")
    print(f"error: {job}: {printable(reason)}", file=sys.stderr, flush=True)


def _record(directory: Path, record: dict[str, Any], **result: Any) -> None:
    """Add a line to jobs.jsonl in one write, so that jobs that end together do not mix theirs."""
    if not distributed.is_first():
        return
    line = json.dumps(record | result, default=str) + "\n"
    with files.open_own(directory / "jobs.jsonl") as file:
        file.write(line.encode())


def _journal(directory: Path) -> list[dict[str, Any]]:
    """The records of jobs.jsonl; a line that a crash cut off, or that no sweep wrote, is passed over."""
    try:
        lines = files.read_text(directory / "jobs.jsonl").splitlines()
    except (OSError, ValueError):
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if _is_record(record)]


def _is_record(record: Any) -> bool:
    """Whether everything in a record is of the type that _record() writes."""
    if not isinstance(record, dict) or record.get("state") not in ("began", "finished", "failed", "stopped"):
        return False
    value, overrides, exit_code = record.get("value"), record.get("overrides"), record.get("exit_code", 1)
    return (
        isinstance(record.get("job"), int)
        and isinstance(overrides, list)
        and all(isinstance(text, str) for text in overrides)
        and all(isinstance(record.get(key) or "", str) for key in ("run", "reason", "configuration"))
        and (value is None or (isinstance(value, (int, float)) and math.isfinite(value)))
        and isinstance(exit_code, int)
        and (record["state"] != "failed" or "reason" in record)
    )


def _say(text: str) -> None:
    """Print at once; no job fails because nobody reads it, which is told at the end."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# After the last job


def finish(exit_code: int) -> int:
    """Print the table, write sweep.csv and draw sweep.png, if this process started a sweep.

    Args:
        exit_code: what the sweep itself came to: 0, or 130 and 143 where it was interrupted.

    Returns:
        the program's exit code: 1 with a failed job, 2 where no job could do what was asked.
    """
    global started, _interrupted
    if started is None:
        return exit_code
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory, ended, failed = started.directory, started.ended(), started.failed()
    started, _interrupted = None, False
    rows = [row for row in compare.read_runs(directory) if row["state"] == "finished"]
    if rows:
        print(f"\n{summary(directory, rows)}", flush=True)
    elif not any(directory.glob("*/.hydra")) and not (directory / "study.db").exists():  # nothing ran
        for name in ("sweep.json", "jobs.jsonl", "multirun.yaml"):
            (directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a launcher's logs are in it
            directory.rmdir()
    if failed:
        print(f"\n{len(failed)} of {counted(len(ended), 'job')} failed:", file=sys.stderr)
        for record in failed:
            _report(record, record["reason"])
    if exit_code and directory.is_dir():
        named = any(argument.startswith("name=") for argument in sys.argv)
        again = shlex.join(["python", *sys.argv, *([] if named else [f"name={directory.name}"])])
        message = "the sweep did not come to its end; what has finished is kept, the rest with"
        print(f"\n{message}: {again}", file=sys.stderr)
    if exit_code or not failed:
        return exit_code
    return 2 if not rows and all(record.get("exit_code") == 2 for record in failed) else 1


def summary(directory: Path, rows: list[dict[str, Any]]) -> str:
    """The table of a sweep's finished runs, best first, also written as sweep.csv and drawn as sweep.png.

    Where runs differ only in seed and fold, one row gives their mean and standard deviation.
    """
    repeated = [name for name in compare.differing(rows) if name in compare.REPEATED]
    shown = compare.mean_over(rows, *repeated) if repeated else rows
    best_by = compare.chosen_by(shown)
    shown = compare.sorted_by(shown, best_by)
    columns = [column for column in compare.shown_columns(shown, always=()) if column != "state"]
    best = compare.sorted_by(rows, best_by)[0]
    # A run's name begins with its job's number and goes on with what the columns say.
    short = [{**row, "run": str(row["run"]).partition("_")[0]} if "run" in row else row for row in shown]
    text = compare.table(short, columns, terminal.width())
    by = "validation accuracy" if best_by == "val_accuracy" else "training accuracy: there is no validation part"
    text += f"\n\nbest     {directory / best['run'] / 'best.pt'} (by {by})"
    try:
        files.write(directory / "sweep.csv", compare.csv_text(shown, columns))
        text += f"\ntable    {directory / 'sweep.csv'}"
    except RunError as error:
        text += f"\ntable    not written: {one_line(error)}"
    from engine.pictures import style, sweep  # NumPy takes its time

    if style.draw(directory / "sweep.png", sweep.sweep_figure, rows, shown, best_by, directory.name):
        text += f"\npicture  {directory / 'sweep.png'}"
    return text
