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
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import compare, sweep, trackers
from engine.errors import Interrupted, RequestError, RunError, did_you_mean, one_line

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RUNS = Path("checkpoints")
GLOBAL_GROUPS = ("experiment", "hparams_search", "debug")  # their files set values anywhere (`@package _global_`)
BUILT_GROUPS = ("model", "dataset", "optimizer", "scheduler", "criterion")  # their files name a class or function


# ---------------------------------------------------------------------------------------------------------------------
# Settings, read from the YAML files


@dataclass(frozen=True)
class Setting:
    """One setting of a YAML file.

    Attributes:
        name: dotted, as typed on the command line (`optimizer.lr`).
        default: the value in the file.
        kind: "int", "float", "bool", "str", "list" or "any"; a list may say more: "list of int", "list of 2 float".
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
        described = words.get(self.kind, "a value")
        if self.kind == "str or list of str":
            described = "text or a list of texts"
        elif self.kind.startswith("list of "):
            described = self.kind.replace("list of", "a list of").replace("int", "integers").replace("float", "numbers")
        return f"{described} {self.rule}".strip() + (" or null" if self.nullable else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of this setting's type and in its range."""
        if value is None:
            return self.nullable
        if self.kind == "str or list of str":
            texts = value if isinstance(value, list) else [value]
            return all(isinstance(v, (str, int, float)) and not isinstance(v, bool) for v in texts)
        if self.kind.startswith("list of "):
            *count, kind = self.kind.removeprefix("list of ").split()
            one = Setting(self.name, None, kind, self.rule, False, "")
            right_count = isinstance(value, list) and (not count or len(value) == int(count[0]))
            return right_count and all(one.accepts(item) for item in value)
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": (str, int, float), "list": list}
        if self.kind in kinds and not isinstance(value, kinds[self.kind]):  # type: ignore[arg-type]
            return False
        if isinstance(value, bool) and self.kind != "bool":
            return self.kind == "any"
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not self.rule or _obeys(value, self.rule)


_COMMENT = re.compile(
    r"(?P<kind>int|float|bool|str or list of str|str|list(?: of (?:\d+ )?(?:int|float|str))?)"
    r"(?P<rule> (?:>=|>|in|one of) ?[^:]*?)?(?P<null> or null)?: (?P<meaning>.+)"
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


def read_settings(
    file: Path, prefix: str = "", directories: Sequence[Path] = (CONFIGS,), group: str = ""
) -> dict[str, Setting]:
    """The settings of one YAML file and of the files of the same group that its `defaults` list names.

    Args:
        file: the YAML file.
        prefix: where its values stand in the whole configuration, `"optimizer."` for instance.
        directories: where the files named in `defaults` are looked for, the first one wins.
        group: the group that the file is in, empty for an entry point's own.

    Raises:
        RequestError: the file cannot be read as YAML.
    """
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text)
        values = OmegaConf.to_container(OmegaConf.create(text)) if tree else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
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
                            name = parent.partition("@")[0]
                            name = name[1:] if name.startswith("/") else f"{group}/{name}".lstrip("/")
                            settings.update(read_settings(_find(directories, name), prefix, directories, group))
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


def check(config: DictConfig, choices: dict[str, Any], directories: Sequence[Path], entry: str) -> dict[str, Any]:
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
    choices = {group: option for group, option in choices.items() if "/" not in group} | _list_choices(config, entry)
    known = read_settings(_find(directories, entry), directories=directories)
    for group, default in _default_choices(_find(directories, entry)).items():
        if default is not None and not group.startswith("override ") and choices.get(group) is None:
            raise RequestError(f"{group} has to be one of {', '.join(group_options(directories).get(group, []))}")
    for group, option in choices.items():
        for name in option if isinstance(option, list) else [option]:
            if name is None or group in GLOBAL_GROUPS:
                continue
            file = _find(directories, f"{group}/{name}")
            own = read_settings(file, f"{group}.", directories, group)
            if group in BUILT_GROUPS and f"{group}._target_" not in own:
                raise RequestError(f"{file}: names nothing to build; expected `_target_: ` and a class or function")
            known |= own

    for name, value in _leaves(plain, known):
        if entry == "evaluate" and name.startswith("dataset.") and choices.get("dataset") is None:
            continue  # belongs to the dataset that the checkpoint names, and is checked against that
        check_value(name, value, known)
        if known[name].kind == "str" and isinstance(value, (int, float)):
            OmegaConf.update(config, name, str(value))  # name=123 is text that looks like a number
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    for name in known:
        if OmegaConf.select(config, name, default=...) is ...:
            raise RequestError(f"the setting {name!r} was taken out (~{name}); it is needed, set it to a value instead")
    trackers.check_installed(choices.get("logger") or [])
    return {**{str(key): value for key, value in plain.items()}, "choices": choices}


def _list_choices(config: DictConfig, entry: str) -> dict[str, Any]:
    """Of the group that takes several options at once (`logger=[tensorboard,mlflow]`) the chosen ones.

    Hydra does not list them among its choices; each option's values stand under the option's own name.
    """
    return {"logger": [str(name) for name in config.get("logger") or {}]} if entry == "train" else {}


def check_value(name: str, value: Any, known: dict[str, Setting]) -> None:
    """Raise a RequestError unless `name` is one of the `known` settings and `value` is valid for it."""
    setting = known.get(name)
    if setting is None:
        raise RequestError(f"there is no setting {name!r}{did_you_mean(name, known)}")
    if value == "???":
        raise RequestError(f"{name} has to be given: {setting.meaning or setting.expected}")
    if not setting.accepts(value):
        raise RequestError(f"{name}={_typed(value)}: expected {setting.expected}")


def known_settings(group: str, option: str, values: dict[str, Any]) -> dict[str, Setting]:
    """The settings of an option of a group, from its YAML where that is still there, else from the `values` it had."""
    known = {f"{group}.{key}": _setting(f"{group}.{key}", value, "", None) for key, value in values.items()}
    if option in group_options().get(group, []):
        known |= read_settings(_find([CONFIGS], f"{group}/{option}"), f"{group}.", group=group)
    return known


def _leaves(tree: dict[Any, Any], known: dict[str, Setting], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and value and name not in known:
            yield from _leaves(value, known, name + ".")
        else:
            yield name, value


def _find(directories: Sequence[Path], name: str) -> Path:
    return next((d / f"{name}.yaml" for d in directories if (d / f"{name}.yaml").is_file()), CONFIGS / f"{name}.yaml")


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line to main()


def launch(entry: str) -> NoReturn:
    """Answer the command line of the entry point `entry`, then call its `main(config)`; never returns.

    Help, TAB completion and every error in the configuration are answered here, before torch is imported. Exit codes:
    0, 2 for a wrong request, 1 for a failure at work, 130 for Ctrl-C, 143 for SIGTERM.
    """
    from engine import resume

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
    from engine import resume

    hydra_config = config.hydra if "hydra" in config else HydraConfig.get()
    directories = [Path(s.path) for s in hydra_config.runtime.config_sources if s.schema == "file" and s.path]
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    plain = check(own, dict(hydra_config.runtime.choices), directories, str(hydra_config.job.name))
    return resume.adopt(plain, hydra_config.overrides.task) if plain.get("resume") else plain


def _main(config: dict[str, Any]) -> Any:
    """Call main() of the entry point that is running; a run that does not come to its end is closed and marked so."""
    from engine import runs

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
        return _no_such_option(group, option, groups.get(group, []))
    if found := re.search(r"Could not override '([^']+)'", text):
        name = found[1].partition("@")[0]
        known = list(read_settings(_find(directories, entry), directories=directories))
        known += [] if "." in name else groups
        chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
        for group, default in _default_choices(_find(directories, entry)).items():
            for option in str(chosen.get(group, default)).strip("[]").split(","):  # of a sweep or a list, each
                file = _find(directories, f"{group}/{option.strip()}")
                if file.is_file():
                    known += read_settings(file, f"{group}.", directories, group)
        return f"there is no setting {name!r}{did_you_mean(name, known)}; --help lists them all"
    return f"the command line is not understood: {one_line(error)}"


def _no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    return f"{group}={option}: no such {group}{did_you_mean(option, options)}; there is {', '.join(options) or 'none'}"


def _default_choices(file: Path) -> dict[str, Any]:
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    return {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}


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
    file = _find(directories, entry)
    settings = read_settings(file, directories=directories)
    for group, default in _default_choices(file).items():
        option = (chosen or {}).get(group, default)
        if option is not None and group not in GLOBAL_GROUPS and not group.startswith("override "):
            settings |= read_settings(_find(directories, f"{group}/{option}"), f"{group}.", directories, group)
    return [
        (s.name, _typed(s.default), f"{s.meaning} ({s.expected})")
        for s in settings.values()
        if not s.name.endswith("_target_")
    ]


def help_text(entry: str, directories: Sequence[Path] = (CONFIGS,), arguments: Sequence[str] = ()) -> str:
    """What `--help` prints: usage, groups with their options, every setting, five examples.

    Group choices among the command line's `arguments` are shown instead of the defaults.

    Raises:
        RequestError: an option that is not there.
    """
    file = _find(directories, entry)
    head = file.read_text(encoding="utf-8").split("\n\n")[0]
    about, _, examples = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("Examples:")
    defaults = _default_choices(file)
    available = group_options(directories)
    chosen = dict(a.split("=", 1) for a in arguments if a.partition("=")[0] in defaults)
    for group, option in chosen.items():
        if option not in available[group]:
            raise RequestError(_no_such_option(group, option, available[group]))
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
        except Exception as error:
            raise RequestError(f"{option}={target}: {module_name} cannot be imported: {_cause(error)}") from error
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
    if "_target_" not in settings:
        raise RequestError(f"{group}: names nothing to build; expected `_target_: ` and a class or function")
    callee = target or locate(str(settings["_target_"]), f"{group}._target_")
    if not callable(callee):
        raise RequestError(f"{group}._target_={settings['_target_']}: expected a class or function")
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
    except RunError:
        raise
    except Exception as error:
        raise RequestError(f"{group}: {name} refuses its settings: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """An exception of somebody else's code in one line, with the place where it was raised."""
    if isinstance(error, SyntaxError):
        return one_line(error)  # says its own place
    at = traceback.extract_tb(error.__traceback__)[-1]
    kind = "" if isinstance(error, (TypeError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)} ({Path(at.filename).name}:{at.lineno})"
