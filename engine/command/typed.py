"""The command line as people type it: what is taken as meant, and what is answered with how to type it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

from engine.config import GLOBAL_GROUPS, OTHER_WORDS, as_typed, no_such_setting
from engine.errors import RequestError, shortened
from engine.files import parse_yaml

PATHS = ("checkpoint", "images", "output")  # settings whose values are often completed by the shell, not written

OF_CHECKPOINTS = ("evaluate", "predict", "export")  # entry points that take a checkpoint
OF_WEIGHTS = (".pt", ".pth", ".safetensors")  # endings of its file

# What Hydra would take, and do something odd with or nothing: pattern of the argument, the answer.
ANSWERS = (
    (r"hydra\.(run\.dir|output_subdir)=.*", "a run is named by name=NAME, and all it makes is in checkpoints/NAME/"),
    (r"hydra\.sweep\.(dir|subdir)=.*", "a sweep is named by name=NAME and its runs are in checkpoints/NAME/"),
    (r"hydra\.job\.(name|config_name)=.*", "it is the program's own name; a run is named by name=NAME"),
    (r"hydra\.job\.chdir=.*", "paths are relative to the folder that the program is started in"),
    (r"hydra\.callbacks(\.sweep.*)?(=.*)?", "sweeps need it"),
)

# Of Hydra's own options.
NOT_HERE = {
    "config_name": "there is one file of this program's settings; others are added by --config-dir DIR",
    "config_path": "there is one folder of this program's settings; another is added by --config-dir DIR",
    "experimental_rerun": "a run goes on with resume=DIR",
}


def as_meant(
    entry: str, arguments: Sequence[str], known: Callable[[], Iterable[str]], options: dict[str, list[str]]
) -> list[str]:
    """The command line with files that were typed without a setting's name put where they belong.

    Args:
        entry: the entry point (`predict`).
        arguments: the command line without options such as --cfg.
        known: tells the names of all settings and groups; asked only where it matters, as it reads files.
        options: of each group.

    Raises:
        RequestError: it cannot be meant as it was typed; says how to type it.
    """
    arguments = list(arguments)
    _check_spaces(arguments)
    _check_brackets(arguments)
    for argument in arguments:
        for pattern, answer in ANSWERS:
            if re.fullmatch(pattern, argument.lstrip("+~"), re.DOTALL):
                raise RequestError(f"{shortened(argument)}: cannot be set; {answer}")
    files = [argument for argument in arguments if _is_file(entry, argument, known)]
    names = set(files)
    given = [argument for argument in arguments if argument not in names] + _named(entry, files)
    if files and (twice := given_twice(given)):
        raise RequestError(f"{twice[0]} is given twice: {shortened(files[0])} is taken for it; leave one out")
    for argument in given:
        if "=" not in argument and not argument.startswith("~"):
            raise RequestError(f"{shortened(argument)!r} is not understood: {_bare(argument, known(), options)}")
    given = [_with_braces(argument) for argument in given]
    return given if entry == "train" else [_quoted_path(argument) for argument in given]


def _with_braces(argument: str) -> str:
    """`dataset.train_transforms=[RandomCrop: {size: 8}]`, as a YAML file has it, with the braces that Hydra wants."""
    name, _, value = argument.partition("=")
    if not name.endswith("_transforms") or not re.search(r"[\[,]\s*\w+\s*:", value):
        return argument
    try:
        listed = parse_yaml(re.sub(r":(?=[^\s])", ": ", value))
    except ValueError:
        return argument
    return f"{name}={_for_hydra(listed)}" if isinstance(listed, list) else argument


def _for_hydra(value: Any) -> str:
    """Plain data in Hydra's grammar."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_for_hydra(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_for_hydra, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[\w./-]+", value):
        return _quoted(value)
    return as_typed(value)


def given_twice(arguments: Iterable[str]) -> list[str]:
    """The names that are set more than once; the last one counts."""
    names = [argument.partition("=")[0].lstrip("+") for argument in arguments if not argument.startswith("~")]
    return list(dict.fromkeys(name for name in names if names.count(name) > 1))


def added(overrides: Iterable[str]) -> list[str]:
    """The names that are set with Hydra's `+` or `++`, which adds what no YAML has."""
    return [override.partition("=")[0].lstrip("+") for override in overrides if override.startswith("+")]


def removed(override: str, known: Callable[[], dict[str, Any]]) -> list[str]:
    """`~model.small_images` as Hydra wants it, which finds nothing to take out where the value is null."""
    name = override[1:]
    setting = known().get(name) if override.startswith("~") and "." in name else None
    return [f"{name}=0", override] if setting is not None and setting.default is None else [override]


def _quoted_path(argument: str) -> str:
    """`checkpoint=a (1),b=2.pt` quoted as Hydra wants it, so that a path can be typed or completed as it is.

    Plain paths between commas are several checkpoints, unless a file is called so.
    """
    name, _, value = argument.partition("=")
    if name == "checkpoint" and re.fullmatch(r"[\w./-]+(,[\w./-]+)+", value) and not os.path.exists(value):
        return argument
    if name not in PATHS or value[:1] in ("", "[", "'", '"') or re.fullmatch(r"[\w./-]*", value):
        return argument
    return f"{name}={_quoted(value)}"


def _quoted(text: str) -> str:
    """Between single quotes; those within it, and backslashes before one, written as Hydra's grammar has them."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


# ---------------------------------------------------------------------------------------------------------------------
# Files without a name before them


def _is_file(entry: str, argument: str, known: Callable[[], Iterable[str]]) -> bool:
    """Whether an argument is a path to evaluate, predict or export, and no setting."""
    if entry not in OF_CHECKPOINTS or argument.startswith("~") or not argument:
        return False
    if os.path.exists(argument):
        return argument.partition("=")[0] not in known()
    if "=" in argument:
        return False
    if entry == "predict" and has_magic(argument):
        return True
    if Path(argument).suffix[1:].isalnum() or "/" in argument:
        raise RequestError(f"{shortened(argument)}: no such file")
    return False


def _named(entry: str, files: Sequence[str]) -> list[str]:
    """The settings that paths stand for: a checkpoint, and of predict.py images."""
    weights = [file for file in files if entry != "predict" or Path(file).suffix in OF_WEIGHTS]
    images = [file for file in files if file not in weights]
    most = 2 if entry == "evaluate" else 1  # two are compared
    if len(weights) > most:
        taken = "one checkpoint is evaluated, or two are compared" if most == 2 else "one checkpoint is taken"
        raise RequestError(f"{taken} at a time, there are {len(weights)}: -m checkpoint=A.pt,B.pt")
    listed = ",".join(_quoted(_in_run(file)) for file in weights)
    named = [f"checkpoint=[{listed}]" if len(weights) == 2 else f"checkpoint={listed}"] if weights else []
    if images:
        listed = ",".join(map(_quoted, images))
        named.append(f"images={listed}" if len(images) == 1 else f"images=[{listed}]")
    return named


def _in_run(path: str) -> str:
    """Of a run's directory its best.pt."""
    best = os.path.join(path, "best.pt")
    return best if os.path.exists(best) else path


def _bare(argument: str, known: Iterable[str], options: dict[str, list[str]]) -> str:
    """How an argument without = may have been meant."""
    groups = [group for group, names in options.items() if argument in names]
    groups = [group for group in groups if group not in GLOBAL_GROUPS] or groups
    if groups:
        return f"did you mean {' or '.join(f'{group}={argument}' for group in groups)}?"
    if argument in known:
        return f"it needs a value: {argument}=VALUE"
    if Path(argument).suffix == ".pt":
        return f"did you mean resume={shortened(argument)}?"
    if os.path.isdir(argument):
        return f"did you mean dataset=image_folder dataset.root={shortened(argument)}?"
    return "expected SETTING=VALUE or GROUP=OPTION; --help lists them"


# ---------------------------------------------------------------------------------------------------------------------
# What a shell, or another program's habits, made of a setting


def _check_spaces(arguments: Sequence[str]) -> None:
    """Refuse `epochs = 3`, `epochs =3` and `epochs= 3`, of which the shell makes several arguments."""
    for place, argument in enumerate(arguments):
        after = arguments[place + 1 : place + 2]
        if argument.startswith("=") and place:
            name, words = arguments[place - 1], [argument[1:]] if argument != "=" else after
        elif argument.endswith("=") and argument != "=" and after and "=" not in after[0]:
            name, words = argument[:-1], after
        else:
            continue
        if "=" not in name:
            raise RequestError(
                f"{name}: there may be no spaces around the =; type {shortened(name)}={shortened(''.join(words))}"
            )


_PAIRS = {")": "(", "]": "[", "}": "{"}


def _left_open(text: str) -> bool:
    """Whether brackets of a value are not closed, or closed but not opened; those between quotes do not count."""
    stack = []
    for character in re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", text):
        if character in _PAIRS.values():
            stack.append(character)
        elif character in _PAIRS and (not stack or stack.pop() != _PAIRS[character]):
            return True
    return bool(stack)


def _check_brackets(arguments: Sequence[str]) -> None:
    """Refuse `model.hidden=[64`, and a list that the shell took apart at its spaces."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if not value or (name in PATHS and not value.startswith("[")) or not _left_open(value):
            continue
        for end in range(place + 2, len(arguments) + 1):
            whole = " ".join(arguments[place:end])
            if not _left_open(whole):
                raise RequestError(f"{name}: the shell takes it apart at its spaces; put it in quotes: '{whole}'")
        raise RequestError(f"{shortened(argument)!r} is not understood: its brackets do not close")


def without_dashes(argument: str, after: Sequence[str], known: Iterable[str]) -> str | None:
    """How an option that Hydra does not know is typed as a setting: `--lr 0.1` as `optimizer.lr=0.1`, if it is one.

    Args:
        argument: `--lr` or `--lr=0.1`.
        after: the arguments after it.
        known: the names of all settings and groups.
    """
    known = list(known)
    name, equals, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not equals and after and not after[0].startswith("-") and "=" not in after[0]:
        value = after[0]
    meant = name if name in known else OTHER_WORDS.get(name)
    if meant not in known:
        ending = [k for k in known if k.rpartition(".")[2] == name]
        meant = ending[0] if len(ending) == 1 else None
    if meant is None:
        return no_such_setting(name, known) if "did you mean" in no_such_setting(name, known) else None
    return f"settings are typed without dashes: {meant}={shortened(value) or 'VALUE'}"
