"""From the command line to an entry point's main(): help, completion, one-line errors. Never imports torch."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine import terminal
from engine.command import resume, sweep, typed
from engine.config import (
    CONFIGS,
    GLOBAL_GROUPS,
    RUNS,
    Setting,
    as_typed,
    check,
    default_choices,
    find_yaml,
    group_options,
    no_such_option,
    no_such_setting,
    read_settings,
)
from engine.errors import RequestError, RunError, interrupt_behind, one_line, printable, shortened
from engine.run import compare, runs, trackers

# After a parallel operation torch's threads (GNU OpenMP's) keep their cores busy for some 10 ms, waiting for the next.
# That is time taken from the workers that read images. A thirtieth of it bridges the gaps within a training step.
SPINS = "10000"


LONGEST = 600  # characters of an error's line; of a longer one the end is kept too, which says what to do


def launch(entry: str) -> NoReturn:
    """Answer the command line of the entry point `entry`, then call its `main(config)`; never returns.

    Help, TAB completion and every error in the configuration are answered here, before torch is imported. Exit codes:
    0, 2 for a wrong request, 1 for a failure at work, 130 for Ctrl-C, 141 where nobody reads on, 143 for SIGTERM.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    os.environ["PYTHON_COLORS"] = "0"  # tracebacks in colours are made of what may not be sent to a terminal
    terminal.guard()
    try:
        exit_code = _answered(entry, sys.argv[1:])
    except SystemExit as end:  # a run of its own that failed, or the end of an interrupted sweep
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:
        if not terminal.is_cut_off(error):
            raise
        exit_code = 0  # until it is released
    sys.exit(terminal.release(_finished_sweep(exit_code)))


def _finished_sweep(exit_code: int) -> int:
    try:
        return sweep.finish(exit_code)
    except OSError as error:
        if not terminal.is_cut_off(error):
            raise
        return exit_code


def _answered(entry: str, arguments: list[str]) -> int:
    """The exit code of a command line, for which all was done but for the table of a sweep."""
    try:
        if {"-h", "--help"} & set(arguments):
            runs_table = entry == "evaluate" and "--runs" in arguments
            print(compare.USAGE if runs_table else help_text(entry, _directories_of(arguments), arguments))
            return 0
        if entry == "evaluate" and "--runs" in arguments:
            print(compare.command([a for a in arguments if a != "--runs"], RUNS, terminal.width()))
            return 0
        sys.argv[1:] = arguments = _as_hydra_wants_it(entry, arguments)
    except RunError as error:
        fail(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that we print it in one line
    try:
        hydra.main(config_path=str(CONFIGS), config_name=entry, version_base="1.3")(_job)()
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if terminal.is_cut_off(error):
            raise
        return _told(error, arguments, entry)
    return 0


def _as_hydra_wants_it(entry: str, arguments: list[str]) -> list[str]:
    """The command line with Hydra's own options first and what was typed as people do put as Hydra understands it.

    Raises:
        RequestError: it cannot be meant so.
    """
    directories = _directories_of(arguments)
    typed_options, overrides = _split(entry, arguments, directories)
    options = list(arguments)
    for override in overrides:
        options.remove(override)
    if typed_options.shell_completion or typed_options.hydra_help:
        return options + overrides
    for name, answer in typed.NOT_HERE.items():
        if getattr(typed_options, name) is not None:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(typed_options, name)!r}: cannot be set; {answer}")
    overrides = typed.as_meant(
        entry, overrides, lambda: known_names(entry, overrides, directories), group_options(directories)
    )
    if entry in ("evaluate", "predict"):
        overrides = _without_experiment(overrides)
    if entry == "evaluate" and not any(a.startswith("dataset=") for a in overrides):
        # Settings of the checkpoint's own dataset: let them through, main() holds them against the checkpoint.
        overrides = ["++" + a if a.startswith("dataset.") else a for a in overrides]
    if entry == "train":
        _, overrides = _split(entry, resume.with_choices_of_run(options + overrides, directories), directories)
    return options + overrides


def _split(entry: str, arguments: list[str], directories: list[Path]) -> tuple[argparse.Namespace, list[str]]:
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


def _told(error: Exception, arguments: list[str], entry: str) -> int:
    """Say in one line what Hydra or one of its plugins raised, and with which exit code to leave."""
    if code := interrupt_behind(error):
        print("error: interrupted", file=sys.stderr)
        return code
    if sweep.has_started():
        if isinstance(error, ValueError) and sweep.has_failures():
            return 0  # Optuna, which finds no best trial where all have failed; those were told
        print(f"error: the sweep: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return RunError.exit_code
    try:  # while composing Hydra, OmegaConf, PyYAML and the file system each raise their own
        message = _explain(error, arguments, entry)
    except RequestError as other:  # a file that would have been named in the explanation is the trouble itself
        message = str(other)
    print(f"error: {shortened(message, LONGEST)}", file=sys.stderr)
    return RequestError.exit_code


class SweepStart(Callback):
    """Named in the entry points' YAML; Hydra calls it before a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check all jobs and make the sweep's directory, or end the program."""
        try:
            sweep.start(config, _checked)
        except RunError as error:
            fail(error)
        except Exception as error:  # of which Hydra would only warn
            sys.exit(_told(error, sys.argv[1:], str(config.hydra.job.name)))


_of_experiment: list[str] = []  # the words that _without_experiment() took out


def _without_experiment(arguments: list[str]) -> list[str]:
    """The command line of evaluate.py or predict.py without `experiment=NAME` and the words about its model and data.

    An experiment sets what training has. It is composed with training's configuration, by _of_training().
    """
    global _of_experiment
    chosen = [a for a in arguments if re.fullmatch(r"experiment=(?!null$).+", a)]
    words = [a for a in arguments if re.match(r"[+~]*(model|dataset)[=.]", a)] if chosen else []
    _of_experiment = [*chosen, *words]
    return [a for a in arguments if a not in words and not a.startswith("experiment=")]


def _of_training(plain: dict[str, Any], directories: Sequence[Path]) -> dict[str, Any]:
    """A checked configuration with the model and the data that training has with the `experiment=` asked for.

    Raises:
        RequestError: there is no such experiment, or one of its settings is wrong.
    """
    try:
        composed = GlobalHydra.instance().config_loader().load_configuration("train", _of_experiment, RunMode.RUN)
    except Exception as error:  # Hydra, OmegaConf and PyYAML each raise their own
        raise RequestError(_explain(error, [*_of_experiment, *sys.argv[1:]], "train")) from None
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    found = check(own, dict(composed.hydra.runtime.choices), directories, "train")
    groups = ("model", "dataset", "experiment")
    choices = {**plain["choices"], **{group: found["choices"][group] for group in groups}}
    return {**plain, "model": found["model"], "dataset": found["dataset"], "choices": choices}


def _job(config: DictConfig) -> Any:
    """One job: check its configuration, import its entry point (and with it torch), run it."""
    terminal.guard()  # of a launcher's process, too
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.run_job(config, _checked, _main)
    try:
        checked = _checked(config)
        if "name" in checked:
            runs.check_name(checked)
        for name in typed.given_twice(HydraConfig.get().overrides.task):
            print(f"note: {printable(name)} is given twice, the last one counts", file=sys.stderr)
        return _main(checked)
    except RunError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(RunError("interrupted"), 130)
    except Exception as error:
        if terminal.is_cut_off(error):
            sys.exit(0)  # until it is released
        if code := interrupt_behind(error):
            fail(RunError("interrupted"), code)
        traceback.print_exc()  # our own bug: the whole traceback
        sys.exit(1)


def _checked(config: DictConfig) -> dict[str, Any]:
    """The plain checked data of a configuration, of a job that is running or of one that Hydra composed for later."""
    hydra_config = config.hydra if "hydra" in config else HydraConfig.get()
    directories = [Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path]
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    entry = str(hydra_config.job.name)
    plain = check(own, dict(hydra_config.runtime.choices), directories, entry)
    trackers.check_installed(plain["choices"].get("logger") or [])
    if _of_experiment and entry != "train":
        plain = _of_training(plain, directories)
    return resume.adopt(plain, hydra_config.overrides.task, directories) if plain.get("resume") else plain


def _main(config: dict[str, Any]) -> Any:
    """Call main() of the entry point that is running; a run that does not come to its end is closed and marked so."""
    if config.get("resume") and not sweep.is_job() and (told := runs.finished_before(config)):
        print(told)
        return None
    try:
        return importlib.import_module(HydraConfig.get().job.name).main(config)
    except BaseException as error:
        runs.abandon(error)
        raise


def fail(error: RunError, exit_code: int | None = None) -> NoReturn:
    """Print the error on one line of stderr and leave with its exit code."""
    print(f"error: {shortened(one_line(error, 10_000), LONGEST)}", file=sys.stderr)
    sys.exit(error.exit_code if exit_code is None else exit_code)


def _explain(error: Exception, arguments: list[str], entry: str) -> str:
    """What Hydra says over several lines, in one, with the nearest valid name."""
    text = str(error)
    directories = _directories_of(arguments)
    groups = group_options(directories)
    if isinstance(error, yaml.YAMLError):
        return f"not valid YAML: {one_line(error)}"
    if isinstance(error, OverrideParseException):
        reason = one_line(error).partition(" See http")[0]
        return f"{shortened(str(error.override))!r} is not understood: {reason}; --help shows how"
    if "must be a string or a list" in text:
        for group in groups:
            if any(
                re.fullmatch(rf"{group}=(null|[-+.\de]+|true|false|nan|[-+]?inf)", a, re.IGNORECASE) for a in arguments
            ):
                return f"{group} has to be one of {', '.join(groups[group])}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        if (top := group.partition("/")[0]) in groups:  # a path was typed
            group, option = top, f"{group}/{option}".partition("/")[2]
        if group.startswith("hydra/"):
            return f"{group}={option}: no such option, or its plugin is not installed: {sweep.INSTALL}"
        return no_such_option(group, option, groups.get(group, []))
    if found := re.search(r"Could not override '([^']+)'", text):
        name = found[1].partition("@")[0]
        known = known_names(entry, arguments, directories)
        return no_such_setting(name, known if "." not in name else [k for k in known if k not in groups])
    if found := re.search(
        r"Ambiguous value for argument '(.+?)'\n1\. |Sweep parameters '(.+?)' requires", text, re.DOTALL
    ):
        typed_value = found[1] or found[2]
        name, _, values = typed_value.partition("=")
        setting = known_names(entry, arguments, directories).get(name)
        takes_lists = setting is not None and "list" in setting.kind
        lists = f"; a list is typed {shortened(f'{name}=[{values}]')}" if takes_lists else ""
        return f"{shortened(typed_value)}: several values, one run each, need -m: python {entry}.py -m ...{lists}"
    return f"the command line is not understood: {one_line(error)}"


def known_names(entry: str, arguments: Sequence[str], directories: Sequence[Path]) -> dict[str, Setting | None]:
    """The names of all settings, with the options that the arguments choose, and of all groups.

    Raises:
        RequestError: a YAML file cannot be read.
    """
    file = find_yaml(directories, entry)
    groups = {group: option for group, option in default_choices(file).items() if not group.startswith("override ")}
    known: dict[str, Setting | None] = {**dict.fromkeys(groups), **read_settings(file, directories=directories)}
    chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
    for group, default in groups.items():
        for option in str(chosen.get(group, default)).strip("[]").split(","):  # of a sweep or a list, each
            own = find_yaml(directories, f"{group}/{option.strip()}")
            if os.path.isfile(own):
                known |= read_settings(own, f"{group}.", directories, group)
    return known


def _directories_of(arguments: list[str]) -> list[Path]:
    """Our own, then the user's `--config-dir`, if any: Hydra takes the first file of a name in this order."""
    for place, argument in enumerate(arguments):
        if argument.startswith(("--config-dir", "-cd")):
            value = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
            return [CONFIGS, Path(value)] if os.path.isdir(value) else [CONFIGS]  # which Hydra will say
    return [CONFIGS]


# ---------------------------------------------------------------------------------------------------------------------
# Help


def setting_rows(
    entry: str, directories: Sequence[Path] = (CONFIGS,), chosen: dict[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting of an entry point, with the options `chosen` or else the defaults."""
    file = find_yaml(directories, entry)
    settings = read_settings(file, directories=directories)
    for group, default in default_choices(file).items():
        option = (chosen or {}).get(group, default)
        if option is not None and group not in GLOBAL_GROUPS and not group.startswith("override "):
            settings |= read_settings(find_yaml(directories, f"{group}/{option}"), f"{group}.", directories, group)
    return [
        (s.name, as_typed(s.default), f"{s.meaning} ({s.expected})")
        for s in settings.values()
        if not s.name.endswith("_target_")
    ]


def help_text(entry: str, directories: Sequence[Path] = (CONFIGS,), arguments: Sequence[str] = ()) -> str:
    """What `--help` prints: usage, groups with their options, every setting, five examples.

    Group choices among the command line's `arguments` are shown instead of the defaults.

    Raises:
        RequestError: an option that is not there.
    """
    file = find_yaml(directories, entry)
    head = file.read_text(encoding="utf-8").split("\n\n")[0]
    about, _, examples = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("Examples:")
    defaults = default_choices(file)
    available = group_options(directories)
    chosen = dict(a.split("=", 1) for a in arguments if "=" in a and a.partition("=")[0] in defaults)
    for group, option in chosen.items():
        if option not in available[group]:
            raise RequestError(no_such_option(group, option, available[group]))
    groups = [
        f"  {group:<{10}} {', '.join(f'[{o}]' if o == defaults[group] else o for o in options)}"
        for group, options in available.items()
        if group in defaults
    ]
    rows = setting_rows(entry, directories, chosen)
    width = max(len(f"{name}={default}") for name, default, _ in rows if len(default) < 30)
    settings = [f"  {name + '=' + default:<{width}}  {meaning}" for name, default, meaning in rows]
    other = "; another option of a group may have others, `--help GROUP=OPTION` shows them" if groups else ""
    return "\n".join(
        [
            f"usage: python {entry}.py {'[GROUP=OPTION ...] ' if groups else ''}[SETTING=VALUE ...]",
            "",
            about.strip(),
            "",
            *(["Groups (GROUP=OPTION; the default in brackets):", *groups, ""] if groups else []),
            f"Settings (SETTING=DEFAULT{other}):",
            *settings,
            "",
            "Examples:",
            *(f"  {line}" for line in examples.strip().splitlines()),
            "",
            "Hydra's options: --cfg job (print the configuration), -m (several runs), --config-dir DIR, --hydra-help.",
        ]
    )
