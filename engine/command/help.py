"""What can be typed: the answer to --help, and to a command line that Hydra does not understand."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.errors import OverrideParseException

from engine.command.sweep import INSTALL, INSTALL_RAY
from engine.config import (
    CONFIGS,
    Setting,
    as_typed,
    default_choices,
    find_yaml,
    group_options,
    known_settings,
    no_such_option,
    no_such_setting,
)
from engine.errors import RequestError, one_line, shortened


def help_text(entry: str, directories: Sequence[Path] = (CONFIGS,), arguments: Sequence[str] = ()) -> str:
    """What `--help` prints: usage, groups with their options, every setting, five examples.

    Group choices among the command line's `arguments` are shown instead of the defaults.

    Raises:
        RequestError: an option that is not there.
    """
    head = find_yaml(directories, entry).read_text(encoding="utf-8").split("\n\n")[0]
    about, _, examples = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("Examples:")
    defaults = default_choices(entry, directories)
    available = group_options(directories)
    chosen = dict(a.split("=", 1) for a in arguments if "=" in a and a.partition("=")[0] in defaults)
    for group, option in chosen.items():
        if option not in available[group]:
            raise RequestError(no_such_option(group, option, available[group]))
    groups = [
        f"  {group:<10} {', '.join(f'[{o}]' if o == defaults[group] else o for o in options)}\n"
        for group, options in available.items()
        if group in defaults
    ]
    rows = setting_rows(entry, directories, chosen)
    width = max(len(f"{name}={default}") for name, default, _ in rows if len(default) < 30)
    settings = [f"  {name + '=' + default:<{width}}  {meaning}\n" for name, default, meaning in rows]
    other = "; another option of a group may have others, `--help GROUP=OPTION` shows them" if groups else ""
    shown_groups = ["Groups (GROUP=OPTION; the default in brackets):\n", *groups, "\n"] if groups else []
    return f"""\
usage: python {entry}.py {"[GROUP=OPTION ...] " if groups else ""}[SETTING=VALUE ...]

{about.strip()}

{"".join(shown_groups)}Settings (SETTING=DEFAULT{other}):
{"".join(settings)}
Examples:
{textwrap.indent(examples.strip(), "  ")}

Hydra's options: --cfg job (print the configuration), -m (several runs), --config-dir DIR, --hydra-help."""


def setting_rows(
    entry: str, directories: Sequence[Path] = (CONFIGS,), chosen: dict[str, str] | None = None
) -> list[tuple[str, str, str]]:
    """Name, default and meaning of every setting of an entry point, with the options `chosen` or else the defaults."""
    settings = known_settings(entry, default_choices(entry, directories) | (chosen or {}), directories)
    return [
        (s.name, as_typed(s.default), f"{s.meaning} ({s.expected})")
        for s in settings.values()
        if not s.name.endswith("_target_")
    ]


def known_names(entry: str, arguments: Sequence[str], directories: Sequence[Path]) -> dict[str, Setting | None]:
    """The names of all settings, with the options that the arguments choose, and of all groups.

    Raises:
        RequestError: a YAML file cannot be read.
    """
    typed = dict(a.split("=", 1) for a in arguments if "=" in a)
    groups = default_choices(entry, directories)
    there = {}
    for group, default in groups.items():
        options = str(typed.get(group, default)).strip("[]").split(",")  # of a sweep or a list, each
        there[group] = [o.strip() for o in options if os.path.isfile(find_yaml(directories, f"{group}/{o.strip()}"))]
    return {**dict.fromkeys(groups), **known_settings(entry, there, directories)}


def directories_of(arguments: Sequence[str]) -> list[Path]:
    """Our own, then the user's `--config-dir`, if any: Hydra takes the first file of a name in this order."""
    for place, argument in enumerate(arguments):
        if argument.startswith(("--config-dir", "-cd")):
            value = argument.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
            return [CONFIGS, Path(value)] if os.path.isdir(value) else [CONFIGS]  # which Hydra will say
    return [CONFIGS]


def explained(error: BaseException, arguments: list[str], entry: str) -> str:
    """What Hydra says over several lines, in one, with the nearest valid name."""
    text = str(error)
    directories = directories_of(arguments)
    groups = group_options(directories)
    if isinstance(error, yaml.YAMLError):
        return f"not valid YAML: {one_line(error)}"
    if isinstance(error, OverrideParseException):
        reason = one_line(error).partition(" See http")[0]
        return f"{shortened(str(error.override))!r} is not understood: {reason}; --help shows how"
    if "must be a string or a list" in text:
        no_name = re.compile(r"(\w+)=(null|[-+.\de]+|true|false|nan|[-+]?inf)", re.IGNORECASE)
        for group in (found[1] for found in map(no_name.fullmatch, arguments) if found and found[1] in groups):
            return f"{group} has to be one of {', '.join(groups[group])}"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = found.groups()
        if (top := group.partition("/")[0]) in groups:  # a path was typed
            group, option = top, f"{group}/{option}".partition("/")[2]
        if group.startswith("hydra/"):
            install = INSTALL_RAY if option == "ray" else INSTALL
            return f"{group}={option}: no such option, or its plugin is not installed: {install}"
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
