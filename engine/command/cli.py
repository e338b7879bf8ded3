"""From the command line to an entry point's main(): help, completion, one-line errors. Never imports torch."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine import build, distributed, process, terminal
from engine.command import resume, sweep, typed
from engine.command.help import directories_of, explained, help_text, known_names
from engine.config import CONFIGS, RUNS, check, check_frozen, group_options
from engine.errors import Interrupted, RequestError, RunError, interrupt_behind, one_line, printable, shortened
from engine.run import compare, runs, trackers

LONGEST = 600  # characters of an error's line; of a longer one the end is kept too, which says what to do
OF_SEVERAL = ("train", "evaluate", "predict")  # entry points that several processes can share
OF_EXPERIMENT = "WORDS_OF_EXPERIMENT"  # in the environment, which a launcher's processes have too


def launch(entry: str) -> NoReturn:
    """Answer the command line of the entry point `entry`, then call its `main(config)`; never returns.

    Help, TAB completion and every error in the configuration are answered here, before torch is imported. Exit codes:
    0, 2 for a wrong request, 1 for a failure at work, 130 for Ctrl-C, 141 where nobody reads on, 143 for SIGTERM.
    """
    os.environ["PYTHON_COLORS"] = "0"  # tracebacks in colours are made of what may not be sent to a terminal
    terminal.guard()
    exit_code = distributed.ended()
    if exit_code is not None:  # for good, and that was told before torchrun started the processes anew
        sys.exit(terminal.release(exit_code))
    exit_code = 0
    with terminal.until_cut_off():
        try:
            _answer(entry, sys.argv[1:])
        except SystemExit as end:  # a run of its own that failed, or the end of an interrupted sweep
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    with terminal.until_cut_off():
        exit_code = sweep.finish(exit_code)
    exit_code = terminal.release(exit_code)
    distributed.leave(exit_code)
    sys.exit(exit_code)


def _answer(entry: str, arguments: list[str]) -> None:
    """Do what a command line asks for, all but the table of a sweep; leaves with an exit code where it fails."""
    runs_table = entry == "evaluate" and "--runs" in arguments
    try:
        if {"-h", "--help"} & set(arguments):
            print(compare.USAGE if runs_table else help_text(entry, directories_of(arguments), arguments))
            return
        if runs_table:
            print(compare.command([a for a in arguments if a != "--runs"], RUNS, terminal.width()))
            return
        sys.argv[1:] = arguments = _as_hydra_wants_it(entry, arguments)
    except RunError as error:
        fail(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that we print it in one line
    try:
        hydra.main(config_path=str(CONFIGS), config_name=entry, version_base="1.3")(_job)()
    except (Exception, KeyboardInterrupt) as error:
        if terminal.is_cut_off(error):
            raise
        if isinstance(error, ValueError) and sweep.started and sweep.started.failed() and not interrupt_behind(error):
            return  # Optuna, which finds no best trial where all have failed; those were told
        fail(_as_ours(error, arguments, entry))


def _as_hydra_wants_it(entry: str, arguments: list[str]) -> list[str]:
    """The command line with Hydra's own options first and what was typed as people do put as Hydra understands it."""
    directories = directories_of(arguments)
    typed_options, overrides = _split(entry, arguments, directories)
    options = list(arguments)
    for override in overrides:
        options.remove(override)
    if typed_options.shell_completion or typed_options.hydra_help:
        return options + overrides
    for name, answer in typed.NOT_HERE.items():
        if getattr(typed_options, name) is not None:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(typed_options, name)!r}: cannot be set; {answer}")
    known = functools.cache(lambda: known_names(entry, arguments, directories))  # reads files, so only where it matters
    overrides = typed.as_meant(entry, overrides, known, group_options(directories))
    overrides = [word for override in overrides for word in typed.removed(override, known)]
    if entry in typed.OF_CHECKPOINTS:
        overrides = _without_experiment(overrides)
    if entry == "evaluate" and not any(a.startswith("dataset=") for a in overrides):
        # Settings of the checkpoint's own dataset: let them through, main() holds them against the checkpoint.
        overrides = ["++" + a if a.startswith("dataset.") else a for a in overrides]
    if entry == "train":
        overrides = resume.choices_of_run(options + overrides, directories) + overrides
    return options + overrides


def _split(entry: str, arguments: list[str], directories: Sequence[Path]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's own options that were typed, and the rest; an option that Hydra does not know is no page of usage."""
    if sys.version_info >= (3, 14):
        # There argparse checks help texts while a parser is built, and one of Hydra's is made only when it is shown
        # (facebookresearch/hydra#3121). Hydra builds a parser of its own after this one.
        argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        if unknown and unknown in arguments:
            after = arguments[arguments.index(unknown) + 1 :]
            meant = typed.without_dashes(unknown, after, known_names(entry, arguments, directories))
            message = f"{shortened(unknown)}: {meant}" if meant else message
        raise RequestError(f"{message}; --help shows how" if "--help" not in message else message)

    parser.error = refuse  # type: ignore[method-assign]
    found = parser.parse_intermixed_args(arguments)
    return found, list(found.overrides or [])


def _as_ours(error: BaseException, arguments: list[str], entry: str) -> RunError:
    """What Hydra, one of its plugins or what they use has raised, as what this program says of it."""
    if isinstance(error, RunError):
        return error
    if code := interrupt_behind(error):
        return Interrupted("interrupted", code)
    if sweep.started:
        return RunError(f"the sweep: {type(error).__name__}: {one_line(error)}")
    try:  # while composing Hydra, OmegaConf, PyYAML and the file system each raise their own
        return RequestError(explained(error, arguments, entry))
    except RequestError as other:  # a file that would have been named in the explanation is the trouble itself
        return other


def fail(error: RunError) -> NoReturn:
    """Print the error on one line of stderr and leave with its exit code; of several processes one prints."""
    line = shortened(one_line(error, 10_000), LONGEST)
    is_for_good = isinstance(error, (RequestError, Interrupted))
    if distributed.is_ours_to_tell(line, error.exit_code if is_for_good else None):
        print(f"error: {line}", file=sys.stderr)
    sys.exit(error.exit_code)


class SweepStart(Callback):
    """Named in the entry points' YAML; Hydra calls it before a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check all jobs and make the sweep's directory, or end the program."""
        try:
            sweep.start(config, _checked)
        except Exception as error:  # of which Hydra would only warn
            fail(_as_ours(error, sys.argv[1:], str(config.hydra.job.name)))


def _without_experiment(arguments: list[str]) -> list[str]:
    """A command line about a checkpoint without `experiment=NAME` and the words about its model and data.

    An experiment sets what training has. It is composed with training's configuration, by _of_training().
    """
    chosen = [a for a in arguments if re.fullmatch(r"experiment=(?!null$).+", a)]
    words = [a for a in arguments if re.match(r"[+~]*(model|dataset)[=.]", a)] if chosen else []
    os.environ[OF_EXPERIMENT] = json.dumps([*chosen, *words])
    return [a for a in arguments if a not in words and not a.startswith("experiment=")]


def _of_training(plain: dict[str, Any], words: list[str], directories: Sequence[Path]) -> dict[str, Any]:
    """A checked configuration with the model and the data that training has where these words are typed."""
    try:
        composed = GlobalHydra.instance().config_loader().load_configuration("train", words, RunMode.RUN)
    except Exception as error:  # Hydra, OmegaConf and PyYAML each raise their own
        raise RequestError(explained(error, [*words, *sys.argv[1:]], "train")) from None
    chosen, added = dict(composed.hydra.runtime.choices), typed.added(words)
    found = check(_without_hydra(composed), chosen, directories, "train", added)
    groups = ("model", "dataset", "experiment")
    choices = {**plain["choices"], **{group: found["choices"][group] for group in groups}}
    return {**plain, "model": found["model"], "dataset": found["dataset"], "choices": choices}


def _without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _overrides(hydra_config: Any) -> list[str]:
    """The command line as it was typed; an interpolation in it is not looked up."""
    words: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [str(word) for word in words]


def _job(config: DictConfig) -> Any:
    """One job: check its configuration, import its entry point (and with it torch), run it."""
    sweep.join_tasks()
    terminal.guard()  # of a launcher's process, too
    if sweep.is_job():
        return sweep.run_job(config, _checked, _main)
    try:
        if distributed.world_size() > 1 and (entry := HydraConfig.get().job.name) not in OF_SEVERAL:
            raise RequestError(f"{entry}.py is one process; start it without torchrun")
        checked = _checked(config)
        if "name" in checked and not distributed.is_launched():  # which may go on with the run that has the name
            runs.check_name(checked)
        twice = typed.given_twice(_overrides(HydraConfig.get())) if distributed.is_first() else []
        for name in twice:
            print(f"note: {printable(name)} is given twice, the last one counts", file=sys.stderr)
        return _main(checked)
    except RunError as error:
        fail(error)
    except (Exception, KeyboardInterrupt) as error:
        if terminal.is_cut_off(error):
            sys.exit(0)  # until it is released
        if code := interrupt_behind(error):
            fail(Interrupted("interrupted", code))
        if distributed.is_ours_to_tell(one_line(error)):
            traceback.print_exc()  # our own bug: the whole traceback
        sys.exit(1)


def _checked(config: DictConfig) -> dict[str, Any]:
    """The plain checked data of a configuration, of a job that is running or of one that Hydra composed for later."""
    hydra_config = config.hydra if "hydra" in config else HydraConfig.get()
    directories = [Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path]
    entry = str(hydra_config.job.name)
    overrides = _overrides(hydra_config)
    plain = check(
        _without_hydra(config), dict(hydra_config.runtime.choices), directories, entry, typed.added(overrides)
    )
    trackers.check_installed(plain["choices"].get("logger") or [])
    if entry in typed.OF_CHECKPOINTS and (words := json.loads(os.environ.get(OF_EXPERIMENT, "[]"))):
        plain = _of_training(plain, words, directories)
    plain = resume.adopt(plain, overrides, directories) if plain.get("resume") else plain
    if entry == "train":
        check_frozen(plain)
    elif (plain.get("dataset") or {}).get("match_model"):
        raise RequestError("dataset.match_model=true: for train.py; what it sets is kept in checkpoints")
    if plain["choices"].get("dataset"):  # else the checkpoint has the other settings of its data set
        build.check_folds(plain["dataset"].get("folds"), plain["dataset"].get("fold"))
    return plain


def _main(config: dict[str, Any]) -> Any:
    """Call main() of the entry point that is running; a run that does not come to its end is closed and marked so."""
    if config.get("resume") and (told := runs.finished_before(config)):
        print(told)
        return None
    process.spin()
    process.keep_memory()
    gc.disable()  # what imports make stays: to search it for garbage takes a tenth of their time
    try:
        program = importlib.import_module(HydraConfig.get().job.name)
        if HydraConfig.get().job.name != "train":  # whose first optimizer imports as much again
            gc.enable()
        words = [*_overrides(HydraConfig.get()), *json.loads(os.environ.get(OF_EXPERIMENT, "[]"))]
        build.check_fit(config, typed.added(words), [word.partition("=")[0].lstrip("+") for word in words])
        result = program.main(config)
        distributed.finish()
        return result
    except BaseException as error:
        runs.abandon(ours := distributed.as_ours(error))
        if ours is not error:
            raise ours from error
        raise
    finally:
        gc.enable()
