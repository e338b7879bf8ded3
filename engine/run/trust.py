"""What may be taken from a file that somebody else may have made: a checkpoint, or the directory of a run.

A file is data. What it names is looked up in what is here, and nowhere else:

    an option of a group   in configs/; it is built by the `_target_` that the YAML here gives
    a model without YAML   a class that a file of models/ defines, or a classification model of torchvision
    an added keyword       of such a model only: plain data that its own signature takes, named in no YAML
    a value                held against the YAML here as if it were typed, and taken if it is a number, true, false,
                           null, one of the texts that the YAML lists, or (but for a data set) a plain word
    transforms             lists of names and plain arguments; `engine.data.transforms.parse_transforms` knows the names
    a model's name         `model.name` may be two words and a dot, as timm's are: looked up in a library's list
    patterns               any text in `freeze` and `lr_scale`: they are compared with the names of parameters, no more

Everything else -- paths, addresses, names to import, where a tracker sends to -- comes from the command line or from
here. Only a configuration that was typed here counts as typed: it is signed with a key that this program keeps for its
user, as Jupyter signs the notebooks whose output it trusts. Its names are looked up all the same.

Never imports torch, until a model without YAML is looked up.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import inspect
import itertools
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import files
from engine.build import locate, refusal
from engine.config import (
    CONFIGS,
    ROOT,
    Setting,
    as_typed,
    check_keyword,
    check_value,
    find_yaml,
    group_options,
    is_keyword,
    leaves,
    no_such_setting,
    put,
    read_settings,
)
from engine.errors import RequestError, one_line, printable, shortened

# Never from a file, whatever their kind: they decide where something is sent, read or written, or how much is read.
NEVER = ("logger", "device", "num_workers", "num_threads", "dataset.cache", "init_from")
LISTS_OF_TEXT = ("dataset.train_transforms", "dataset.eval_transforms", "dataset.classes", "freeze", "lr_scale")
WORD = re.compile(r"[\w+ -]{1,64}(\.\d[\w+-]{0,16})*")  # no path, no address and no name that could be imported
NAME = re.compile(r"\w{1,100}(\.\w{1,100})?")
MOST_ITEMS = 1000  # of a list, and of all lists within it
MOST = 1_000_000  # a number of layers, neurons or pixels
MOST_BATCH = 1 << 24  # numbers of a batch of images; 64 MB as floats, and many times that within a model
MOST_WORK = 1 << 30  # steps of the arithmetic of the transforms of one image


# ---------------------------------------------------------------------------------------------------------------------
# What was typed here


def _key(make: bool) -> bytes | None:
    """The key of this user; None where there is none and none can be made, and then nothing counts as typed here."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    with contextlib.suppress(OSError, RuntimeError):
        if not data.is_absolute():  # counts as none (XDG Base Directory)
            data = Path.home() / ".local" / "share"
        file = data / "image-classifier-training" / "key"
        if make and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f".key-{os.getpid()}-{secrets.token_hex(8)}")
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
                opened.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):
                os.link(draft, file)  # one process succeeds, the others take its key
            draft.unlink()
        return files.read_bytes(file, 1024) or None
    return None


def signature(config: dict[str, Any] | str, make_key: bool = True) -> str:
    """The sign, under this user's key, that a configuration was typed here; empty where no key can be kept."""
    text = config if isinstance(config, str) else json.dumps(config, sort_keys=True)
    key = _key(make_key)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest() if key else ""


def is_ours(config: dict[str, Any] | str, sign: Any) -> bool:
    """Whether a configuration (or its file's text) bears this user's signature."""
    try:
        ours = signature(config, make_key=False)
        return ours != "" and hmac.compare_digest(ours, str(sign))
    except (TypeError, ValueError):  # it holds what no configuration does
        return False


SIGNATURE = "# signature: "  # the last line of a run's config.yaml


def with_signature(text: str) -> str:
    """The text of a run's configuration with its signature below."""
    return f"{text}{SIGNATURE}{signature(text)}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Names


def choices(chosen: dict[str, Any], where: Path, directories: Sequence[Path] = (CONFIGS,)) -> dict[str, Any]:
    """The options that a file names, once each is known to be one of its group here; RequestError if one is not."""
    known = group_options(directories)
    for group, option in chosen.items():
        for name in option if isinstance(option, list) and group == "logger" else [option]:
            if group not in known or (option is not None and name not in known[group]):
                raise RequestError(
                    f"{where}: it names {_brief(group)}={_brief(option)}, which configs/ does not have; "
                    "put its YAML there, or name another on the command line"
                )
    return dict(chosen)


def target_of(group: str, config: dict[str, Any], where: Path) -> tuple[Any, dict[str, Setting] | None]:
    """What builds a group of a file's configuration, and the settings that its YAML has; None for a model without.

    Raises:
        RequestError: it is neither an option here nor a model that is here.
    """
    option, named = config["choices"].get(group), config[group].get("_target_")
    if isinstance(option, str) and option in group_options().get(group, []):
        known = read_settings(find_yaml([CONFIGS], f"{group}/{option}"), f"{group}.", group=group)
        own = known[f"{group}._target_"].default
        if named == own:
            return locate(str(own), f"{group}._target_"), known
    if group == "model" and isinstance(named, str):
        found = _class_of_models(named, where) or _classifier_of_torchvision(named)
        if found is not None:
            return found, None
    raise RequestError(
        f"{where}: its {group} is {_brief(option)} ({_brief(named)}), which is none of this program's; "
        f"put it into {'models/ and ' * (group == 'model')}configs/{group}/"
    )


def _class_of_models(name: str, where: Path) -> Any:
    """A class that a file of models/ itself defines; what that file has only imported does not count."""
    from torch import nn

    module = name.rpartition(".")[0]
    if not re.fullmatch(r"models(\.\w+){2,}", name) or not (ROOT / f"{module.replace('.', '/')}.py").is_file():
        return None
    found = locate(name, f"{where}: model")
    return found if inspect.isclass(found) and issubclass(found, nn.Module) and found.__module__ == module else None


def _classifier_of_torchvision(name: str) -> Any:
    if not name.startswith("torchvision.models."):
        return None
    from torchvision import models

    last = name.rpartition(".")[2]
    if last not in models.list_models(module=models):
        return None
    builder = models.get_model_builder(last)
    return builder if name in (f"torchvision.models.{last}", f"{builder.__module__}.{last}") else None


# ---------------------------------------------------------------------------------------------------------------------
# Values


def settings_of(
    group: str, config: dict[str, Any], where: Path, *, ours: bool, typed: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """What builds a group that a checkpoint describes, and the settings to build it with.

    Args:
        group: model or dataset.
        config: the checkpoint's configuration.
        where: its file, for messages.
        ours: whether that configuration was typed here.
        typed: settings of the group from the command line, which go before.

    Raises:
        RequestError: what it names is not here, or a value is wrong or may not come from a file.
    """
    target, known = target_of(group, config, where)
    typed = {f"{group}.{name}": value for name, value in (typed or {}).items()}
    own = dict(leaves(config[group], known or {}, f"{group}."))
    result = {name: setting.default for name, setting in (known or {}).items()}
    known = known or {name: _any(name) for name in {**own, **typed}}
    refused = []
    for name, value in {**own, **typed}.items():
        if name.endswith("._target_"):
            continue
        try:
            if is_added := name not in known and is_keyword(name):
                _check_added(name, value, target, known, is_typed=name in typed)
            else:
                check_value(name, value, known)
        except RequestError as error:
            raise error if name in typed else RequestError(f"{where}: {error}") from None
        setting = _any(name) if is_added else known[name]
        may = is_model_here(config[group].get("_target_"), where) if is_added and group == "model" else not is_added
        if name in typed or ours or (may and is_data(setting, value)):
            result[name] = value
        elif name not in result or result[name] == "???":
            refused.append(f"{name}={_brief(value)}")
        else:
            print(f"{name} is {_brief(result[name])} as here, not {_brief(value)} as in {printable(str(where))}")
    if refused:
        raise RequestError(
            f"{where}: {', '.join(refused[:5])}: paths, addresses and names are not taken from a file that was not "
            "made here; say them on the command line"
        )
    built: dict[str, Any] = {group: {}}
    for name, value in result.items():
        put(built, name, value)
    return target, built[group]


def _any(name: str) -> Setting:
    return Setting(name, None, "any", "", True, "")


def _check_added(name: str, value: Any, target: Any, known: Iterable[str], *, is_typed: bool) -> None:
    """Raise a RequestError unless a name that no YAML has is a keyword of what is built, and its value plain data."""
    group, _, keyword = name.partition(".")
    if told := refusal(target, group, keyword):
        raise RequestError(no_such_setting(name, known) if is_typed else f"its {group} {told}")
    check_keyword(name, value)


def is_model_here(name: Any, where: Path) -> bool:
    """Whether a dotted name means a model that could be built without YAML, whatever keywords it gets."""
    if not isinstance(name, str):
        return False
    return (_class_of_models(name, where) or _classifier_of_torchvision(name)) is not None


def evaluation_of(
    config: dict[str, Any], shape: Sequence[int], where: Path, batch_size: int | None, *, ours: bool
) -> dict[str, Any]:
    """How a checkpoint that may be anybody's is evaluated: batch_size, seed and eval_transforms.

    Args:
        config: the checkpoint's configuration.
        shape: its model's (channels, height, width).
        where: its file, for messages.
        batch_size: from the command line, or None.
        ours: whether the configuration was typed here.

    Raises:
        RequestError: a value is not valid, or the work would be endless.
    """
    known = read_settings(CONFIGS / "train.yaml") | read_settings(CONFIGS / "dataset" / "_base.yaml", "dataset.")
    own: dict[str, Any] = {"batch_size": config.get("batch_size"), "seed": config.get("seed")}
    own["dataset.eval_transforms"] = config["dataset"].get("eval_transforms")
    for name, value in own.items():
        if not known[name].accepts(value) or not (ours or name == "seed" or is_data(known[name], value)):
            raise RequestError(f"{where}: its {name} is {_brief(value)}; expected {known[name].expected}")
    if not ours:
        largest = _largest(shape, own["dataset.eval_transforms"], where)
        fitting = max(1, MOST_BATCH // largest)
        if batch_size is None and own["batch_size"] > fitting:
            instead = f"batches of {fitting} instead of {own['batch_size']}, as it was made elsewhere"
            print(f"{printable(str(where))}: {instead}; batch_size= takes others", file=sys.stderr)
            own["batch_size"] = fitting
    own["batch_size"] = batch_size or own["batch_size"]
    return {name.rpartition(".")[2]: value for name, value in own.items()}


def _largest(shape: Sequence[int], transforms: list[Any], where: Path) -> int:
    """The numbers of an image on its way through a stranger's transforms, which may not be long at work on it."""
    sizes = [(key, item) for key, item in _items(transforms) if type(item) is int]
    side = max((item for _, item in sizes), default=1)
    window = max((item for key, item in sizes if key == "kernel_size"), default=1)
    largest = shape[0] * max(shape[1] * shape[2], side * side)
    if len(transforms) * largest * window * window > MOST_WORK:
        raise RequestError(f"{where}: its dataset.eval_transforms are long at work on images of {side} pixels; refused")
    return largest


def is_data(setting: Setting, value: Any) -> bool:
    """Whether a value, already found valid, may come from a file of somebody else."""
    if value == setting.default and value != "???":
        return True
    if setting.name == "dataset.max_pixels":
        return value <= setting.default  # less than here does no harm
    if any(setting.name == name or setting.name.startswith(f"{name}.") for name in NEVER):
        return False
    if setting.name in LISTS_OF_TEXT:
        return _is_small(value, text=re.compile(r".{0,200}", re.DOTALL))
    if setting.rule.startswith("one of "):
        return True
    if setting.name == "model.name" and isinstance(value, str) and NAME.fullmatch(value):
        return True
    return _is_small(value, text=None if setting.name.startswith("dataset.") or "." not in setting.name else WORD)


def _is_small(value: Any, text: re.Pattern[str] | None) -> bool:
    """Numbers, true, false, null, such texts, and lists and dictionaries of them, of a size that people write."""
    items = [item for _, item in itertools.islice(_items(value), MOST_ITEMS + 1)]
    return len(items) <= MOST_ITEMS and all(
        (text is not None and text.fullmatch(item) is not None)
        if isinstance(item, str)
        else item is None or (isinstance(item, (int, float)) and abs(item) <= MOST)
        for item in items
    )


def _items(value: Any, under: Any = None) -> Iterator[tuple[Any, Any]]:
    """What lists and dictionaries hold at any depth, keys among it, and None for each of them; before it the last key.

    The last of which it is a value, or in the list that is: (kernel_size, 3) for `{"kernel_size": [3]}`.
    """
    if isinstance(value, dict):
        yield under, None
        for key, item in value.items():
            yield under, key
            yield from _items(item, key)
    elif isinstance(value, (list, tuple)):
        yield under, None
        for item in value:
            yield from _items(item, under)
    else:
        yield under, value


def _brief(value: Any) -> str:
    return shortened(as_typed(value), 60)


# ---------------------------------------------------------------------------------------------------------------------
# A run's directory


def read_run_config(directory: Path) -> tuple[dict[str, Any], bool]:
    """The configuration of a run that is to be resumed, as plain data, and whether it was typed here.

    Raises:
        RequestError: the file is damaged, or something in the directory is no file of its own, so that writing there
            would write elsewhere.
    """
    file = directory / ".hydra" / "config.yaml"
    try:
        check_folder(directory)
        check_folder(file.parent)
        text = files.read_text(file)
        config = parse_config(text)
        if interpolates(config):
            raise ValueError("it has an interpolation, ${...}; a run stores resolved values")
    except (OSError, ValueError) as error:
        raise RequestError(f"{file}: not a run's configuration ({one_line(error)})") from None
    signed, _, sign = text.rpartition(SIGNATURE)
    return config, is_ours(signed, sign.strip())


def check_folder(folder: Path) -> None:
    """Refuse a folder that is to be written into if something in it is no file of its own.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds a link, by which writing there would write elsewhere, a FIFO or a device.
    """
    for entry in os.scandir(folder):
        try:
            kind = entry.stat(follow_symlinks=False).st_mode
        except FileNotFoundError:  # a running program has just put it in the place of another
            continue
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or (entry.name == ".hydra" and stat.S_ISREG(kind)):
            raise ValueError(f"{printable(entry.name)} is a link or no file; put the file itself there")


def parse_config(text: str) -> dict[str, Any]:
    """A run's config.yaml, whose `choices` are sure to name an option, several or none of each group.

    Raises:
        ValueError: it is no run's configuration.
    """
    config = files.parse_yaml(text)
    if not isinstance(config, dict) or not isinstance(config.get("choices"), dict):
        raise ValueError("it names no choices")
    for group, choice in config["choices"].items():
        names = choice if isinstance(choice, list) else [choice]
        if not isinstance(group, str) or not all(name is None or isinstance(name, str) for name in names):
            raise ValueError(f"its choice of {_brief(group)} is no name")
    return config


def interpolates(value: Any) -> bool:
    """Whether a text anywhere in it has an interpolation, `${...}`, by which a file could read the environment."""
    return any(isinstance(item, str) and "${" in item for _, item in _items(value))


def taken_over(
    here: dict[str, Any], own: dict[str, Any], typed: Iterable[str], where: Path, known: dict[str, Setting], ours: bool
) -> tuple[dict[str, Any], list[str]]:
    """The values of a run that is resumed, by dotted name, that take the place of those composed here.

    Args:
        here: the configuration composed from the YAML here and the command line.
        own: the run's, of the same groups' options.
        typed: names of settings, or of groups of them, that the command line sets.
        where: the run's directory, for messages.
        known: the settings that there are.
        ours: whether the run's configuration was typed here.

    Keywords that the run's command line added are taken where it was typed here, as what builds their group is not
    known without torch. Another `_target_` than the YAML's is never taken.

    Returns:
        the values, and what differs but is not taken from a file, as it is typed: `name=value`.

    Raises:
        RequestError: a value is not valid.
    """
    typed = tuple(typed)
    before, now = dict(leaves(own, known)), dict(leaves(here, known))
    taken, left = {}, []

    def is_typed(name: str) -> bool:
        return any(name == other or name.startswith(f"{other}.") for other in typed)

    def is_moved(name: str) -> bool:
        target = f"{name.partition('.')[0]}._target_"
        return before.get(target) != now.get(target) and not is_typed(target)

    for name, value in now.items():
        if ours and is_moved(name) and name.endswith("_target_") and name in before:
            left.append(f"{name}={_brief(before[name])}")
        if ours and is_moved(name) and name not in before:
            left.append(f"~{name}")
        if is_typed(name) or name not in before or name.endswith("_target_") or before[name] == value:
            continue
        try:
            check_value(name, before[name], known)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if ours or is_data(known[name], before[name]):
            taken[name] = before[name]
        else:
            left.append(f"{name}={_brief(before[name])}")
    for name in before:
        if name in known or name in now or not is_keyword(name) or is_typed(name):
            continue
        try:
            check_keyword(name, before[name])
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None
        if ours and not is_moved(name):
            taken[name] = before[name]
        else:
            left.append(f"+{name}={_brief(before[name])}")
    return taken, left
