"""The configuration: composed by Hydra, checked against the YAML files, answered without torch.

A setting is stated once, in its YAML: the default is the value, the comment behind it gives type, range and meaning.

    dropout: 0.1   # float in [0, 1): share of activations set to zero while training

Checks, `--help` and the README's table are made from that line, for a user's own files too. Without such a comment the
type is the default's. This module never imports torch, so a wrong request is answered at once.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import compare, sweep, trackers
from engine.errors import RequestError, RunError, did_you_mean, one_line

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RUNS = Path("checkpoints")
GLOBAL_GROUPS = (
    "experiment",
    "hparams_search",
    "debug",
)  # their files set values anywhere (`# @package _global_`), none of their own


# ---------------------------------------------------------------------------------------------------------------------
# Settings, read from the YAML files


@dataclass(frozen=True)
class Setting:
    """One setting of a YAML file.

    Attributes:
        name: dotted, as typed on the command line (`optimizer.lr`).
        default: the value in the file.
        kind: "int", "float", "bool", "str", "list" or "any".
        rule: its range as written (`>= 1`, `in [0, 1)`, `one of a, b`), or "".
        nullable: whether `null` is a value.
        meaning: what it does and its unit.
    """

    name: str
    default: Any
    kind: str
    rule: str
    nullable: bool
    meaning: str

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
        return f"{words.get(self.kind, 'a value')} {self.rule}".strip() + (" or null" if self.nullable else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of this setting's type and in its range."""
        if value is None:
            return self.nullable
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": (str, int, float), "list": list}
        if self.kind in kinds and not isinstance(value, kinds[self.kind]):  # type: ignore[arg-type]
            return False
        if isinstance(value, bool) and self.kind != "bool":
            return self.kind == "any"
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not self.rule or _obeys(value, self.rule)


_COMMENT = re.compile(
    r"(?P<kind>int|float|bool|str|list)(?P<rule> (?:>=|>|in|one of) ?[^:]*?)?(?P<null> or null)?: (?P<meaning>.+)"
)


def _obeys(value: Any, rule: str) -> bool:
    if rule.startswith("one of "):
        return str(value) in re.split(r", | or ", rule.removeprefix("one of "))
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return False
    if rule.startswith("in "):
        low, high = (float(end) for end in rule[4:-1].split(","))
        return all(
            (v > low or (rule[3] == "[" and v == low)) and (v < high or (rule[-1] == "]" and v == high)) for v in values
        )
    operator, bound = rule.split()
    return all(v > float(bound) or (operator == ">=" and v == float(bound)) for v in values)


def read_settings(file: Path, prefix: str = "") -> dict[str, Setting]:
    """The settings of one YAML file and of the files of the same group that its `defaults` list names.

    Args:
        file: the YAML file.
        prefix: where its values stand in the whole configuration, `"optimizer."` for instance.

    Raises:
        RequestError: the file cannot be read as YAML.
    """
    text = file.read_text(encoding="utf-8")
    try:
        tree = yaml.compose(text)
        values = OmegaConf.to_container(OmegaConf.create(text)) if tree else {}
    except yaml.YAMLError as error:
        raise RequestError(f"{file}: not valid YAML: {one_line(error)}") from None
    settings: dict[str, Setting] = {}
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, values: Any, path: str) -> None:
        for key, value in node.value:
            name = path + key.value
            if name in (prefix + "defaults", prefix + "hydra") and path == prefix:
                if key.value == "defaults":
                    for parent in yaml.safe_load(yaml.serialize(value)):
                        if isinstance(parent, str) and parent != "_self_":
                            settings.update(read_settings(file.parent / f"{parent}.yaml", prefix))
            elif isinstance(value, yaml.MappingNode) and value.value:
                walk(value, values[key.value], name + ".")
            else:
                comment = lines[key.start_mark.line][key.end_mark.column :].partition(" #")[2].strip()
                settings[name] = _setting(name, values[key.value], comment, settings.get(name))

    if isinstance(tree, yaml.MappingNode):
        walk(tree, values, prefix)
    return settings


def _setting(name: str, default: Any, comment: str, inherited: Setting | None) -> Setting:
    found = _COMMENT.fullmatch(comment)
    if found:
        rule = (found["rule"] or "").strip()
        return Setting(name, default, found["kind"], rule, bool(found["null"]), found["meaning"])
    if inherited:  # a file that builds on another changes the default, not the meaning
        return Setting(name, default, inherited.kind, inherited.rule, inherited.nullable, inherited.meaning)
    kind = type(default).__name__ if type(default) in (int, float, bool, str, list) else "any"
    if isinstance(default, str) and default.startswith("${"):
        kind = "any"
    return Setting(name, default, kind, "", default is None, comment)


def group_options(directories: Iterable[Path] = (CONFIGS,)) -> dict[str, list[str]]:
    """The groups and their options: `{"model": ["cnn", "mlp", ...], ...}`. Names that begin with _ are for defaults."""
    options: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.glob("*/**/*.yaml"):
            group = file.parent.relative_to(directory).as_posix()
            if not file.name.startswith("_") and not group.startswith("hydra"):
                options.setdefault(group, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(options.items())}


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check(
    config: DictConfig, choices: dict[str, str | None], directories: Sequence[Path], entry: str
) -> dict[str, Any]:
    """The composed configuration as plain resolved data, after every setting was found known and its value valid.

    Args:
        config: as Hydra composed it.
        choices: the option chosen of every group.
        directories: where YAML files are looked for, the first one wins.
        entry: the name of the entry point and of its YAML (`train`).

    Raises:
        RequestError: an unknown or missing setting, or a value of the wrong type or out of its range.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RequestError(f"the configuration cannot be resolved: {one_line(error)}") from None
    assert isinstance(plain, dict)
    known = read_settings(_find(directories, entry))
    choices = {group: option for group, option in choices.items() if "/" not in group}  # not Hydra's own
    choices |= _list_choices(config, entry)
    for group, option in choices.items():
        if option is not None and group not in GLOBAL_GROUPS:
            for name in option if isinstance(option, list) else [option]:
                known |= read_settings(_find(directories, f"{group}/{name}"), f"{group}.")

    for name, value in _leaves(plain, known):
        setting = known.get(name)
        if setting is None:
            if entry != "train" and name.startswith("dataset.") and choices.get("dataset") is None:
                continue  # belongs to the dataset that the checkpoint names, and is checked against that
            raise RequestError(f"there is no setting {name!r}{did_you_mean(name, known)}")
        if value == "???":
            raise RequestError(f"{name} has to be given: {setting.meaning or setting.expected}")
        if not setting.accepts(value):
            raise RequestError(f"{name}={_typed(value)}: expected {setting.expected}")
    for name in known:
        if OmegaConf.select(config, name, default=...) is ...:
            raise RequestError(f"the setting {name!r} was taken out (~{name}); it is needed, set it to a value instead")
    trackers.check_installed(choices.get("logger") or [])
    return {**{str(key): value for key, value in plain.items()}, "choices": choices}


def _list_choices(config: DictConfig, entry: str) -> dict[str, Any]:
    """Of the groups that take several options at once (`logger=[tensorboard,mlflow]`) the chosen ones.

    Hydra does not list them among its choices; each option's values stand under the option's own name.
    """
    return {"logger": [str(name) for name in config.get("logger") or {}]} if entry == "train" else {}


def _leaves(tree: dict[Any, Any], known: dict[str, Setting], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and name not in known:
            yield from _leaves(value, known, name + ".")
        else:
            yield name, value


def _find(directories: Sequence[Path], name: str) -> Path:
    return next((d / f"{name}.yaml" for d in directories if (d / f"{name}.yaml").is_file()), CONFIGS / f"{name}.yaml")


def _typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to main()


def launch(entry: str) -> NoReturn:
    """Answer the command line of the entry point `entry`, then call its `main(config)`; never returns.

    Help, TAB completion and every error in the configuration are answered here, before torch is imported. Exit codes: 0,
    2 for a wrong request, 1 for a failure at work, 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text(entry, _directories_of(arguments)))
        sys.exit(0)
    if entry == "evaluate" and "--runs" in arguments:
        _compare([a for a in arguments if a != "--runs"])
    if entry != "train" and not any(a.startswith("dataset=") for a in arguments):
        # Settings of the checkpoint's own dataset: let them through, main() holds them against the checkpoint.
        sys.argv[1:] = ["++" + a if a.startswith("dataset.") else a for a in arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what it would print, so that we print it in one line
    try:
        hydra.main(config_path=str(CONFIGS), config_name=entry, version_base="1.3")(_job)()
        exit_code = 0
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        exit_code = 130
    except SystemExit as end:  # a run of its own that failed, or the end of an interrupted sweep
        exit_code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        exit_code = _told(error, arguments, entry)
    sys.exit(sweep.finish(exit_code))


def _compare(arguments: list[str]) -> NoReturn:
    """Print the table of all runs."""
    try:
        print(compare.command(arguments, RUNS))
        sys.exit(0)
    except RunError as error:
        fail(error)


def _told(error: Exception, arguments: list[str], entry: str) -> int:
    """Say in one line what Hydra or one of its plugins raised, and with which exit code to leave."""
    if sweep.has_started():
        if isinstance(error, ValueError) and sweep.has_failures():
            return 0  # Optuna, which finds no best trial where all have failed; those were told
        print(f"error: the sweep: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError)):
        print(f"error: {_explain(error, arguments, entry)}", file=sys.stderr)
        return RequestError.exit_code
    traceback.print_exc()
    return 1


class SweepStart(Callback):
    """Named in the entry points' YAML; Hydra calls it before a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check all jobs and make the sweep's directory, or end the program."""
        entry = str(config.hydra.job.name)
        try:
            sweep.start(config, _checked)
        except RunError as error:
            fail(error)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            fail(RequestError(_explain(error, sys.argv[1:], entry)))
        except Exception:  # our own bug, which Hydra would only warn of
            traceback.print_exc()
            sys.exit(1)


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
    except Exception:  # our own bug: the whole traceback
        traceback.print_exc()
        sys.exit(1)


def _checked(config: DictConfig) -> dict[str, Any]:
    """The plain checked data of a configuration, from one that Hydra composed or is running."""
    runtime = config.hydra if "hydra" in config else HydraConfig.get()
    directories = [Path(s.path) for s in runtime.runtime.config_sources if s.schema == "file" and s.path]
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return check(own, dict(runtime.runtime.choices), directories, str(runtime.job.name))


def _main(config: dict[str, Any]) -> Any:
    """Call main() of the entry point that is running."""
    return importlib.import_module(HydraConfig.get().job.name).main(config)


def fail(error: RunError, exit_code: int | None = None) -> NoReturn:
    """Print the error on one line of stderr and leave with its exit code."""
    print(f"error: {one_line(error, 1500)}", file=sys.stderr)
    sys.exit(error.exit_code if exit_code is None else exit_code)


def _explain(error: Exception, arguments: list[str], entry: str) -> str:
    """What Hydra says over several lines, in one, with the nearest valid name."""
    text = str(error)
    directories = _directories_of(arguments)
    groups = group_options(directories)
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        if group.startswith("hydra/"):
            return f"{group}={option}: no such option, or its plugin is not installed: {sweep.INSTALL}"
        options = groups.get(group, [])
        near = did_you_mean(option, options)
        return f"{group}={option}: no such {group}{near}; there is {', '.join(options) or 'none'}"
    if found := re.search(r"Could not override '([^']+)'", text):
        name = found[1].partition("@")[0]
        known = [*groups, *read_settings(_find(directories, entry))]
        chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
        for group, default in _default_choices(_find(directories, entry)).items():
            options = str(chosen.get(group, default)).strip("[]").split(",")
            for file in (_find(directories, f"{group}/{option.strip()}") for option in options):
                if not file.is_file():
                    continue
                known += read_settings(file, f"{group}.")
        return f"there is no setting {name!r}{did_you_mean(name, known)}; --help lists them all"
    return f"the command line is not understood: {one_line(error)}"


def _default_choices(file: Path) -> dict[str, Any]:
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}


def _directories_of(arguments: list[str]) -> list[Path]:
    """The user's `--config-dir`, if any, before our own."""
    for place, argument in enumerate(arguments):
        if argument.startswith(("--config-dir", "-cd")):
            value = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
            return [Path(value), CONFIGS]
    return [CONFIGS]


# ---------------------------------------------------------------------------------------------------------------------
# Help


def setting_rows(entry: str, directories: Sequence[Path] = (CONFIGS,)) -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting of an entry point, with the options that are chosen by default."""
    file = _find(directories, entry)
    settings = read_settings(file)
    for group, option in _default_choices(file).items():
        if option is not None and not group.startswith("override "):
            settings |= read_settings(_find(directories, f"{group}/{option}"), f"{group}.")
    return [
        (s.name, _typed(s.default), f"{s.meaning} ({s.expected})")
        for s in settings.values()
        if not s.name.endswith("_target_")
    ]


def help_text(entry: str, directories: Sequence[Path] = (CONFIGS,)) -> str:
    """What `--help` prints: usage, groups with their options, every setting, five examples."""
    file = _find(directories, entry)
    head = file.read_text(encoding="utf-8").split("\n\n")[0]
    about, _, examples = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("Examples:")
    defaults = _default_choices(file)
    groups = [
        f"  {group:<{10}} {', '.join(f'[{o}]' if o == defaults[group] else o for o in options)}"
        for group, options in group_options(directories).items()
        if group in defaults
    ]
    rows = setting_rows(entry, directories)
    width = max(len(f"{name}={default}") for name, default, _ in rows if len(default) < 30)
    settings = [f"  {name + '=' + default:<{width}}  {meaning}" for name, default, meaning in rows]
    return "\n".join(
        [
            f"usage: python {entry}.py [GROUP=OPTION ...] [SETTING=VALUE ...]",
            "",
            about.strip(),
            "",
            "Groups (GROUP=OPTION; the default in brackets):",
            *groups,
            "",
            "Settings (SETTING=DEFAULT; another option of a group may have others, `GROUP=OPTION --cfg job` shows them):",
            *settings,
            "",
            "Examples:",
            *(f"  {line}" for line in examples.strip().splitlines()),
            "",
            "Hydra's own options: --cfg job (print the configuration), -m (several runs), --config-dir DIR, --hydra-help.",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# From the configuration to objects


def locate(target: str, option: str) -> Any:
    """The class or function that a dotted name in a YAML means.

    Raises:
        RequestError: nothing of that name can be imported.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise RequestError(f"{option}={target}: its module needs {error.name!r}, which is not installed") from None
        for part in parts[cut:]:
            if not hasattr(found, part):
                near = did_you_mean(part, [n for n in vars(found) if not n.startswith("_")])
                raise RequestError(f"{option}={target}: {module_name} has no {part!r}{near}")
            found = getattr(found, part)
        return found
    raise RequestError(f"{option}={target}: no such module; expected a dotted name such as models.mlp.MLP")


def build(
    settings: dict[str, Any], group: str, *arguments: Any, target: Callable[..., Any] | None = None, **given: Any
) -> Any:
    """Call what `_target_` names with the group's settings.

    Args:
        settings: the group's plain settings with `_target_`.
        group: its name, for messages.
        arguments: passed first, by position.
        target: used in place of `_target_`, where that was already resolved.
        given: passed by name, those that the target takes by that name.

    Raises:
        RequestError: the target takes other settings than those, or refuses a value.
    """
    callee = target or locate(str(settings["_target_"]), f"{group}._target_")
    own = {key: value for key, value in settings.items() if key != "_target_"}
    name = settings["_target_"]
    try:
        signature = inspect.signature(callee)
    except (TypeError, ValueError):
        signature = None
    if signature:
        takes = set(signature.parameters)
        given = {key: value for key, value in given.items() if key in takes or key == "num_classes"}
        try:
            signature.bind(*arguments, **given, **own)
        except TypeError as error:
            raise RequestError(f"{group}: {name} does not fit its YAML: {one_line(error)}") from None
    try:
        return callee(*arguments, **given, **own)
    except (TypeError, ValueError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        raise RequestError(f"{group}: {name} refuses its settings: {one_line(error)} ({where})") from error
