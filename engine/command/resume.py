"""`resume=`: the configuration that a run continues with. Never imports torch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.config import as_typed, check_value, known_settings, leaves, put
from engine.errors import RequestError, shortened
from engine.run import runs, trust

# What may change without changing the weights of the epochs that were planned.
FREE = (
    "epochs", "early_stopping", "device", "num_workers", "name", "resume", "resume_changed", "checkpoint", "logger",
    "hparams_search",
)  # fmt: skip

ELSEWHERE = "paths, addresses, names and added keywords are not taken from a run that was made elsewhere"


def choices_of_run(arguments: list[str], directories: Sequence[Path]) -> list[str]:
    """The resumed run's choice of each group that a command line leaves open, as they are typed.

    So its settings can be typed as for the run itself: `resume=latest optimizer.betas=[0.9,0.95]` of a run with Adam.

    Args:
        arguments: the command line.
        directories: where YAML files are looked for.

    Raises:
        RequestError: there is no such run, or it names an option that is not there.
    """
    run = _value(arguments, "resume")
    if run in (None, "null", ""):
        return []
    if {"-m", "--multirun"} & set(arguments):
        raise RequestError("resume= continues one run; it does not go with -m")
    directory = runs.find(str(run))
    own, _ = trust.read_run_config(directory)
    return [
        f"{group}={choice if isinstance(choice, str) else f'[{chr(44).join(choice)}]'}"
        for group, choice in trust.choices(own["choices"], directory, directories).items()
        if choice and group != "hparams_search" and not _value(arguments, group)  # a search starts runs of its own
    ]


def _value(arguments: Iterable[str], name: str) -> str | None:
    return next((a.partition("=")[2] for a in arguments if a.startswith(f"{name}=")), None)


def adopt(config: dict[str, Any], overrides: Iterable[str], directories: Sequence[Path]) -> dict[str, Any]:
    """The resumed run's configuration, changed where the command line says so.

    Args:
        config: composed from today's YAML files and the command line, and checked.
        overrides: the command line, with the run's choices put in.
        directories: where YAML files are looked for.

    Returns:
        the run's own configuration with what was typed in its place; `changed` lists what ends exactness.

    Raises:
        RequestError: there are such differences, and not `resume_changed=true`.
    """
    directory = runs.find(config["resume"])
    own, ours = trust.read_run_config(directory)
    choices, own_choices = config["choices"], own["choices"]
    groups = [group for group, choice in choices.items() if own_choices.get(group) != choice]
    typed = [override.partition("=")[0].lstrip("+~") for override in overrides]
    for name in typed:
        if name in groups and name not in config:
            raise RequestError(f"{name}=: cannot be changed when resuming; set its values one by one")
    typed = [name for name in typed if name not in choices] + groups
    known = known_settings("train", choices, directories)
    result = {key: copy.deepcopy(value) for key, value in config.items() if key != "choices"}
    own = {key: value for key, value in own.items() if key != "choices"}
    taken, left = trust.taken_over(result, own, typed, directory, known, ours)
    for name, value in taken.items():
        put(result, name, value)
    result |= {"resume": str(directory), "resume_changed": config["resume_changed"]}

    before, after = dict(leaves(own, known)), dict(leaves(result, known))
    for name, value in after.items():
        if value == "???":
            if asked := next((text for text in left if text.startswith(f"{name}=")), None):
                raise RequestError(f"{directory}: say {asked}: {ELSEWHERE}")
            check_value(name, value, known)

    groups = [group for group in groups if group not in FREE]
    changed = [f"{group} {own_choices.get(group)} -> {choices[group]}" for group in groups]
    absent = object()

    def value_of(values: dict[str, Any], name: str) -> Any:  # null where the file is older than the setting
        return values.get(name, None if name in known else absent)

    names = sorted(before.keys() | after.keys())
    differing = [name for name in names if value_of(before, name) != value_of(after, name)]
    not_free = [name for name in differing if name.split(".")[0] not in (*FREE, *groups)]
    changed += [f"{name} {_brief(before, name)} -> {_brief(after, name)}" for name in not_free]
    if result["init_from"] and "init_from" in not_free and runs.is_saved(str(directory)):
        raise RequestError(
            f"init_from={_brief(result, 'init_from')}: {directory} goes on with the weights that it has; "
            "leave init_from out, or begin another run with it"
        )
    from_file = [text for text in left if text.partition("=")[0].lstrip("+~") in not_free]
    if changed and not config["resume_changed"]:
        why = "what builds a group is not taken from a file" if ours else ELSEWHERE
        way_out = f"say {' '.join(from_file)} ({why})" if from_file else "leave them out"
        raise RequestError(
            f"{directory} was started with other settings: {shortened(', '.join(changed), 600)}; {way_out}, "
            "or accept with resume_changed=true that the result is no longer that of one run"
        )
    if told := [text for text in left if text not in from_file and not text.startswith("name=")]:
        print(f"not taken from {directory}, which was made elsewhere: {shortened(', '.join(told), 600)}")
    return {**result, "choices": choices, "changed": changed or ["as asked"] * config["resume_changed"]}


def _brief(values: dict[str, Any], name: str) -> str:
    return shortened(as_typed(values[name]), 60) if name in values else "none"
