"""From the command line to an entry point's main(): help, completion, one-line errors. Never imports torch."""

from __future__ import annotations

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

from engine import compare, resume, runs, sweep
from engine.config import (
    CONFIGS,
    GLOBAL_GROUPS,
    RUNS,
    as_typed,
    check,
    default_choices,
    find_yaml,
    group_options,
    no_such_option,
    read_settings,
)
from engine.errors import Interrupted, RequestError, RunError, did_you_mean, one_line

# After a parallel operation torch's threads (GNU OpenMP's) keep their cores busy for some 10 ms, waiting for the next.
# That is time taken from the workers that read images. A thirtieth of it bridges the gaps within a training step.
SPINS = "10000"


def launch(entry: str) -> NoReturn:
    """Answer the command line of the entry point `entry`, then call its `main(config)`; never returns.

    Help, TAB completion and every error in the configuration are answered here, before torch is imported. Exit codes:
    0, 2 for a wrong request, 1 for a failure at work, 130 for Ctrl-C, 143 for SIGTERM.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        try:
            print(help_text(entry, _directories_of(arguments), arguments))
        except RequestError as error:
            fail(error)
        sys.exit(0)
    if entry == "evaluate" and "--runs" in arguments:
        _compare([a for a in arguments if a != "--runs"])
    _check_flags()
    if entry in ("evaluate", "predict"):
        arguments = sys.argv[1:] = _without_experiment(arguments)
    if entry == "evaluate" and not any(a.startswith("dataset=") for a in arguments):
        # Settings of the checkpoint's own dataset: let them through, main() holds them against the checkpoint.
        sys.argv[1:] = ["++" + a if a.startswith("dataset.") else a for a in arguments]
    if entry != "train" and not {"-m", "--multirun"} & set(arguments):
        sys.argv[1:] = [_quoted_path(a) for a in sys.argv[1:]]
    try:
        if entry == "train":
            sys.argv[1:] = resume.with_choices_of_run(arguments)
    except RequestError as error:
        fail(error)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that we print it in one line
    try:
        hydra.main(config_path=str(CONFIGS), config_name=entry, version_base="1.3")(_job)()
        exit_code = 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        exit_code = 130
    except SystemExit as end:  # a run of its own that failed, or the end of an interrupted sweep
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        exit_code = _told(error, arguments, entry)
    sys.exit(sweep.finish(exit_code))


def _told(error: Exception, arguments: list[str], entry: str) -> int:
    """Say in one line what Hydra or one of its plugins raised, and with which exit code to leave."""
    if sweep.has_started():
        if isinstance(error, ValueError) and sweep.has_failures():
            return 0  # Optuna, which finds no best trial where all have failed; those were told
        print(f"error: the sweep: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return RunError.exit_code
    try:  # while composing Hydra, OmegaConf, PyYAML and the file system each raise their own
        message = _explain(error, arguments, entry)
    except RequestError as other:  # a file that would have been named in the explanation is the trouble itself
        message = str(other)
    print(f"error: {message}", file=sys.stderr)
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


def _compare(arguments: list[str]) -> NoReturn:
    """Print the table of all runs."""
    try:
        print(compare.command(arguments, RUNS))
        sys.exit(0)
    except RunError as error:
        fail(error)


def _quoted_path(argument: str) -> str:
    """`checkpoint=a (1),b=2.pt` quoted as Hydra wants it, so that a path can be typed or completed as it is."""
    name, _, value = argument.partition("=")
    if (
        name not in ("checkpoint", "images", "output")
        or value[:1] in ("", "[", "'", '"')
        or re.fullmatch(r"[\w./-]*", value)
    ):
        return argument
    escaped = value.replace("'", r"\'")
    return f"{name}='{escaped}'"


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


def _check_flags() -> None:
    """Refuse a command line whose `--flags` Hydra does not know; it would answer with a page of usage."""
    parser = get_args_parser()
    parser.error = lambda message: fail(RequestError(f"{message}; --help shows how"))  # type: ignore[method-assign]
    parser.parse_args()


def _job(config: DictConfig) -> Any:
    """One job: check its configuration, import its entry point (and with it torch), run it."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return sweep.run_job(config, _checked, _main)
    try:
        return _main(_checked(config))
    except RunError as error:
        fail(error)
    except KeyboardInterrupt:
        fail(RunError("interrupted"), 130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception:  # our own bug: the whole traceback
        traceback.print_exc()
        sys.exit(1)


def _checked(config: DictConfig) -> dict[str, Any]:
    """The plain checked data of a configuration, of a job that is running or of one that Hydra composed for later."""
    hydra_config = config.hydra if "hydra" in config else HydraConfig.get()
    directories = [Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path]
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    entry = str(hydra_config.job.name)
    plain = check(own, dict(hydra_config.runtime.choices), directories, entry)
    if _of_experiment and entry != "train":
        plain = _of_training(plain, directories)
    return resume.adopt(plain, hydra_config.overrides.task) if plain.get("resume") else plain


def _main(config: dict[str, Any]) -> Any:
    """Call main() of the entry point that is running; a run that does not come to its end is closed and marked so."""
    try:
        return importlib.import_module(HydraConfig.get().job.name).main(config)
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        runs.abandon("stopped" if stopped else "failed", one_line(error))
        raise


def fail(error: RunError, exit_code: int | None = None) -> NoReturn:
    """Print the error on one line of stderr and leave with its exit code."""
    print(f"error: {one_line(error, 1500)}", file=sys.stderr)
    sys.exit(error.exit_code if exit_code is None else exit_code)


def _explain(error: Exception, arguments: list[str], entry: str) -> str:
    """What Hydra says over several lines, in one, with the nearest valid name."""
    text = str(error)
    directories = _directories_of(arguments)
    groups = group_options(directories)
    if isinstance(error, yaml.YAMLError):
        return f"not valid YAML: {one_line(error)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not understood: {one_line(error).partition(' See http')[0]}; --help shows how"
    if "must be a string or a list" in text:
        for group in groups:
            if any(re.fullmatch(rf"{group}=(null|[-+.\de]+|true|false)", a, re.IGNORECASE) for a in arguments):
                return f"{group} has to be one of {', '.join(groups[group])}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        if group.startswith("hydra/"):
            return f"{group}={option}: no such option, or its plugin is not installed: {sweep.INSTALL}"
        return no_such_option(group, option, groups.get(group, []))
    if found := re.search(r"Could not override '([^']+)'", text):
        name = found[1].partition("@")[0]
        known = list(read_settings(find_yaml(directories, entry), directories=directories))
        known += [] if "." in name else groups
        chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
        for group, default in default_choices(find_yaml(directories, entry)).items():
            for option in str(chosen.get(group, default)).strip("[]").split(","):  # of a sweep or a list, each
                file = find_yaml(directories, f"{group}/{option.strip()}")
                if file.is_file():
                    known += read_settings(file, f"{group}.", directories, group)
        return f"there is no setting {name!r}{did_you_mean(name, known)}; --help lists them all"
    return f"the command line is not understood: {one_line(error)}"


def _directories_of(arguments: list[str]) -> list[Path]:
    """Our own, then the user's `--config-dir`, if any: Hydra takes the first file of a name in this order."""
    for place, argument in enumerate(arguments):
        if argument.startswith(("--config-dir", "-cd")):
            value = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
            return [CONFIGS, Path(value)]
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
    chosen = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in defaults)
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
