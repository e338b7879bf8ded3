"""`resume=`: the configuration that a run continues with. Never imports torch."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from engine import runs
from engine.errors import RequestError

# What may change without changing the weights of the epochs that were planned.
FREE = (
    "epochs",
    "device",
    "num_workers",
    "name",
    "resume",
    "resume_changed",
    "checkpoint",
    "early_stopping",
    "logger",
    "hparams_search",
)


def with_choices_of_run(arguments: list[str]) -> list[str]:
    """The command line with the resumed run's choice of each group put in, where none was typed.

    So its settings can be typed as for the run itself: `resume=latest optimizer.betas=[0.9,0.95]` of a run with Adam.

    Raises:
        RequestError: there is no such run.
    """
    run = _value(arguments, "resume")
    if run in (None, "null", ""):
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise RequestError("resume= continues one run; it does not go with -m")
    choices = runs.read_config(runs.find(str(run)))["choices"]
    return [
        f"{group}={choice if isinstance(choice, str) else f'[{chr(44).join(choice)}]'}"
        for group, choice in choices.items()
        if choice and group != "hparams_search" and not _value(arguments, group)  # a search starts runs of its own
    ] + arguments


def _value(arguments: Iterable[str], name: str) -> str | None:
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"{name}=")), None)


def adopt(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The resumed run's configuration, changed where the command line says so.

    Args:
        config: composed from today's YAML files and the command line.
        overrides: the command line, with the run's choices put in.

    Returns:
        the run's own configuration with what was typed in its place; `changed` lists what ends exactness.

    Raises:
        RequestError: there are such differences, and not `resume_changed=true`.
    """
    directory = runs.find(config["resume"])
    own = runs.read_config(directory)
    result = {key: copy.deepcopy(own.get(key, value)) for key, value in config.items()}
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+~")
        if name in own["choices"]:
            if own["choices"][name] == config["choices"].get(name):
                continue
            if name not in config:
                raise RequestError(f"{override}: cannot be changed when resuming; set its values one by one")
        *path, last = name.split(".")
        source, target = config, result
        for key in path:
            source, target = source[key], target[key]
        target[last] = source[last]
    result |= {
        "resume": str(directory),
        "resume_changed": config["resume_changed"],
        "choices": config["choices"],
        "changed": [],
    }
    _keep_targets(result, config)

    groups = [g for g, choice in config["choices"].items() if g not in FREE and own["choices"].get(g) != choice]
    changed = [f"{group} {own['choices'].get(group)} -> {config['choices'][group]}" for group in groups]
    before, after = _flat(own), _flat({key: value for key, value in result.items() if key != "changed"})
    changed += [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if name.split(".")[0] not in (*FREE, *groups, "choices") and before.get(name) != after.get(name)
    ]
    if changed and not config["resume_changed"]:
        raise RequestError(
            f"{directory} was started with other settings: {', '.join(changed)}; leave them out, "
            "or accept with resume_changed=true that the result is no longer that of one run"
        )
    return {**result, "changed": changed or ["as asked"] * config["resume_changed"]}


def _keep_targets(result: dict[str, Any], config: dict[str, Any]) -> None:
    """What is built is named by the YAML files here, never by a file in a run's directory."""
    for group, settings in config.items():
        if isinstance(settings, dict) and "_target_" in settings:
            result[group]["_target_"] = settings["_target_"]


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat
