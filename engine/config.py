"""The configuration: composed by Hydra, checked against the YAML files, answered without torch.

A setting is stated once, in its YAML: the default is the value, the comment behind it gives type, range and meaning.

    dropout: 0.1   # float in [0, 1): share of activations set to zero while training

Checks, `--help` and the README's table are made from that line, for a user's own files too. Without such a comment the
type is the default's. This module never imports torch, so a wrong request is answered at once.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.errors import RequestError, did_you_mean, one_line, shortened

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
RUNS = Path("checkpoints")
GLOBAL_GROUPS = ("experiment", "hparams_search", "debug")  # their files set values anywhere (`@package _global_`)
LARGEST = 2**63 - 1  # an integer of 64 bits, which is what counts and indices become
LARGEST_FLOAT = 3.4e38  # of 32 bits, in which all arithmetic is done
LONGEST = 4096, 255  # bytes of a path and of a name in it, of any text that is typed
BUILT_GROUPS = ("model", "dataset", "optimizer", "scheduler", "criterion")  # their files name a class or function


# What other programs call a setting or group of ours.
_WORDS_ELSEWHERE = {
    "criterion": "loss criteria loss_fn",
    "model": "arch architecture net network",
    "dataset": "data",
    "optimizer": "optim opt",
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "wd",
    "scheduler": "lr_scheduler schedule sched",
    "batch_size": "bs bsz",
    "num_workers": "workers threads",
    "device": "gpu gpus cuda accelerator",
    "epochs": "max_epochs num_epochs n_epochs",
    "clip_grad_norm": "grad_clip gradient_clip_val",
    "dataset.train_transforms": "augmentation transforms transform",
    "dataset.root": "data_dir path",
    "name": "run_name output output_dir",
    "seed": "random_seed",
    "checkpoint": "ckpt ckpt_path weights model_path",
    "images": "image input source",
    "top_k": "k topk",
}
OTHER_WORDS = {word: ours for ours, words in _WORDS_ELSEWHERE.items() for word in words.split()}


# ---------------------------------------------------------------------------------------------------------------------
# Settings, read from the YAML files


_KINDS: dict[str, tuple[str, Any]] = {  # of a value that is no list, or of any list: in words, and in Python
    "int": ("an integer", int),
    "float": ("a number", (int, float)),
    "bool": ("true or false", bool),
    "str": ("text", (str, int, float)),
    "list": ("a list", list),
    "str or list of str": ("text or a list of texts", (str, int, float, list)),
    "str or list of 2 str": ("text or a list of 2 texts", (str, int, float, list)),
    "str or list of float": ("text or a list of numbers", (str, list)),
    "dict of float": ("a dictionary of numbers", dict),
    "any": ("a value", object),
}


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
        if self.kind.startswith("list of "):
            described = self.kind.replace("list of", "a list of").replace("int", "integers").replace("float", "numbers")
        else:
            described, _ = _KINDS[self.kind]
        return f"{described} {self.rule}".strip() + (" or null" if self.nullable else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value` is of this setting's type and in its range."""
        if value is None:
            return self.nullable
        if self.kind == "str or list of float":
            return isinstance(value, str) or replace(self, kind="list of float").accepts(value)
        if self.kind in ("str or list of str", "str or list of 2 str"):
            texts = value if isinstance(value, list) else [value]
            right_count = "2" not in self.kind or not isinstance(value, list) or len(value) == 2
            return right_count and all(
                isinstance(text, (str, int, float)) and not isinstance(text, bool) for text in texts
            )
        if self.kind.startswith("list of "):
            *count, kind = self.kind.removeprefix("list of ").split()
            one = replace(self, kind=kind, nullable=False)
            right_count = isinstance(value, list) and (not count or len(value) == int(count[0]))
            return right_count and all(one.accepts(item) for item in value)
        _, types = _KINDS[self.kind]
        if not isinstance(value, types):
            return False
        if self.kind == "dict of float":
            one = replace(self, kind="float", nullable=False)
            return all(map(one.accepts, value.values())) and all(isinstance(name, (str, int)) for name in value)
        if isinstance(value, bool):
            return self.kind in ("bool", "any")
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.kind in ("int", "float") and _limit_below(value):
            return False
        return not self.rule or _obeys(value, self.rule)


_COMMENT = re.compile(
    r"(?P<kind>int|float|bool|dict of float|str or list of (?:(?:2 )?str|float)|str"
    r"|list(?: of (?:\d+ )?(?:int|float|str))?)"
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
        tree = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        values: Any = OmegaConf.to_container(OmegaConf.create(text)) if tree else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RequestError(f"{file}: not valid YAML: {one_line(error)}") from None
    settings: dict[str, Setting] = {}
    if not isinstance(tree, yaml.MappingNode):
        return settings
    for parent in values.get("defaults") or []:
        if isinstance(parent, str) and parent != "_self_":
            name = parent.partition("@")[0]
            name = name[1:] if name.startswith("/") else f"{group}/{name}".lstrip("/")
            settings |= read_settings(find_yaml(directories, name), prefix, directories, group)
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, values: Any, path: str) -> None:
        for key, value in node.value:
            name = path + key.value
            if path == prefix and key.value in ("defaults", "hydra"):
                continue
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, values[key.value], name + ".")
            else:
                comment = lines[key.start_mark.line][key.end_mark.column :].partition(" #")[2].strip()
                settings[name] = _setting(name, values[key.value], comment, settings.get(name))

    walk(tree, values, prefix)
    return settings


def _setting(name: str, default: Any, comment: str, inherited: Setting | None) -> Setting:
    if found := _COMMENT.fullmatch(comment):
        rule = (found["rule"] or "").strip()
        return Setting(name, default, found["kind"], rule, bool(found["null"]), found["meaning"])
    if inherited:  # a file that builds on another changes the default, not the meaning
        return replace(inherited, default=default)
    kind = type(default).__name__
    if kind not in _KINDS or str(default).startswith("${"):
        kind = "any"
    return Setting(name, default, kind, "", default is None, comment)


def known_settings(entry: str, choices: dict[str, Any], directories: Sequence[Path] = (CONFIGS,)) -> dict[str, Setting]:
    """Every setting of an entry point, given the option chosen of each group (or several, or None)."""
    known = read_settings(find_yaml(directories, entry), directories=directories)
    for group, option in choices.items():
        for name in option if isinstance(option, list) else [option]:
            if name is not None and group not in GLOBAL_GROUPS:
                known |= read_settings(find_yaml(directories, f"{group}/{name}"), f"{group}.", directories, group)
    return known


def default_choices(entry: str, directories: Sequence[Path] = (CONFIGS,)) -> dict[str, Any]:
    """The groups of an entry point with the option that each has unless another is chosen."""
    defaults = yaml.safe_load(find_yaml(directories, entry).read_text(encoding="utf-8")).get("defaults", [])
    groups = {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}
    return {group: option for group, option in groups.items() if not group.startswith("override ")}


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
    config: DictConfig, choices: dict[str, Any], directories: Sequence[Path], entry: str, added: Collection[str] = ()
) -> dict[str, Any]:
    """The composed configuration as plain resolved data, after every setting was found known and its value valid.

    Args:
        config: as Hydra composed it.
        choices: the option chosen of every group.
        directories: where YAML files are looked for, the first one wins.
        entry: the name of the entry point and of its YAML (`train`).
        added: names typed with Hydra's `+`: of a group that is built they may be any keyword of what its `_target_`
            names, whose signature `engine.build.check_fit` reads once torch is there.

    Raises:
        RequestError: an unknown or missing setting, or a value of the wrong type or out of its range.
    """
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RequestError(f"the configuration cannot be resolved: {one_line(error)}") from None
    choices = {group: option for group, option in choices.items() if "/" not in group}
    if entry == "train":  # which Hydra does not list, as there may be several: `logger=[tensorboard,mlflow]`
        choices["logger"] = [str(name) for name in plain.get("logger") or {}]
    for group, default in default_choices(entry, directories).items():
        if default is not None and choices.get(group) is None:
            raise RequestError(f"{group} has to be one of {', '.join(group_options(directories).get(group, []))}")
    known = known_settings(entry, choices, directories)
    for group in BUILT_GROUPS:
        if choices.get(group) is not None and f"{group}._target_" not in known:
            file = find_yaml(directories, f"{group}/{choices[group]}")
            raise RequestError(f"{file}: names nothing to build; expected `_target_: ` and a class or function")

    chosen = [group for group in BUILT_GROUPS if choices.get(group) is not None]
    moved = [  # to another `_target_` than their YAML's, which has settings of its own; a data set's are not only its
        group
        for group in chosen
        if group != "dataset" and plain[group].get("_target_") != known[f"{group}._target_"].default
    ]
    keywords = {name for name in added if is_keyword(name) and name.partition(".")[0] in chosen}
    keywords = {name for name in keywords if name not in known or name.partition(".")[0] in moved}
    values = dict(leaves(plain, {*known, *keywords}))
    for name, value in values.items():
        if entry == "evaluate" and name.startswith("dataset.") and choices.get("dataset") is None:
            continue  # belongs to the dataset that the checkpoint names, and is checked against that
        if value == "???" and plain.get("resume"):
            continue  # the run that is resumed has it
        if name in keywords:
            check_keyword(name, value)
            continue
        check_value(name, value, known)
        if known[name].kind.startswith("str") and isinstance(value, (int, float)):
            put(plain, name, str(value))  # name=123 is text that looks like a number
    dataset, criterion = plain.get("dataset") or {}, plain.get("criterion") or {}
    if dataset.get("balance") and criterion.get("weight") == "balanced":
        raise RequestError(
            "dataset.balance=true and criterion.weight=balanced: each makes the classes count the same, both "
            "would turn that round; choose one"
        )
    for name in known:
        if name not in values and name.partition(".")[0] not in moved:
            raise RequestError(f"the setting {name!r} was taken out (~{name}); it is needed, set it to a value instead")
    return {**plain, "choices": choices}


def check_frozen(config: dict[str, Any]) -> None:
    """Refuse (RequestError) a configuration of training that lets go of what it does not hold."""
    if config["unfreeze_epoch"] is not None and not config["freeze"]:
        raise RequestError(
            f"unfreeze_epoch={config['unfreeze_epoch']}: nothing is frozen; say freeze= too, or unfreeze_epoch=null"
        )


def check_value(name: str, value: Any, known: dict[str, Setting]) -> None:
    """Raise a RequestError unless `name` is one of the `known` settings and `value` is valid for it."""
    setting = known.get(name)
    if setting is None:
        raise RequestError(no_such_setting(name, known))
    if value == "???":
        raise RequestError(f"{name} has to be given: {setting.meaning or setting.expected}")
    typed = f"{name}={shortened(as_typed(value))}"
    if not setting.accepts(value):
        why = ""
        if isinstance(value, (int, float)) and (most := _limit_below(value)):
            why = f", of at most {most}"
        elif setting.kind.startswith("list") and isinstance(value, (str, int, float)):
            why = f"; write {name}=[{shortened(as_typed(value))}]"
        raise RequestError(f"{typed}: expected {setting.expected}{why}")
    if trouble := _trouble_of(value):
        raise RequestError(f"{typed}: {trouble}")


def is_keyword(name: str) -> bool:
    """Whether a dotted name can be a keyword of what a group builds: `optimizer.amsgrad`, but not `model._target_`."""
    group, _, keyword = name.partition(".")
    return group in BUILT_GROUPS and re.fullmatch(r"[A-Za-z]\w*", keyword, re.ASCII) is not None


def check_keyword(name: str, value: Any) -> None:
    """Raise a RequestError unless `value`, of a keyword that no YAML describes, is plain data that a run can keep."""
    if not _is_plain(value):
        typed = shortened(as_typed(value))
        raise RequestError(f"{name}={typed}: expected a finite number, text, true, false, null or a list of these")
    if trouble := _trouble_of(value):
        raise RequestError(f"{name}={shortened(as_typed(value))}: {trouble}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return value != "???" and "${" not in value  # a run's files hold no interpolation
    return value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _limit_below(number: int | float) -> str:
    """The limit that a number exceeds, so that there is no room for it; infinity and NaN have room in a float."""
    if isinstance(number, int):
        return f"{LARGEST:,}" if abs(number) > LARGEST else ""
    return str(LARGEST_FLOAT) if LARGEST_FLOAT < abs(number) < math.inf else ""


def _trouble_of(value: Any) -> str:
    """Why a value cannot be kept in a run's files, nor a file be named so; empty where it is in order."""
    if isinstance(value, (list, dict)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(_trouble_of, parts)), "")
    if isinstance(value, (int, float)) and (most := _limit_below(value)):
        return f"holds a number beyond {most}"
    if not isinstance(value, str):
        return ""
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        return "not in UTF-8; expected text, or a file or folder that is renamed so"
    if b"\0" in encoded:
        return "holds a zero byte, which no name may"
    longest, longest_part = LONGEST
    if len(encoded) > longest or max(map(len, encoded.split(b"/"))) > longest_part:
        return f"too long; expected at most {longest:,} bytes, and {longest_part} between two slashes"
    return ""


def no_such_setting(name: str, known: Iterable[str]) -> str:
    """That there is no setting of this name; names the nearest, and all of its group where none is near."""
    known = [k for k in known if not k.endswith("_target_")]
    group, _, last = name.rpartition(".")
    siblings = [k for k in known if group and k.startswith(f"{group}.")]
    meant = OTHER_WORDS.get(last.lower().replace("-", "_"))
    if meant in known:
        near = f" (did you mean {meant}?)"
    elif siblings:  # near is what is near without the group's name, which all have in common
        found = did_you_mean(last, [k.rpartition(".")[2] for k in siblings])
        near = found.replace("did you mean ", f"did you mean {group}.").replace(" or ", f" or {group}.")
    else:
        near = did_you_mean(name, known)
    there_are = f"{group} has {', '.join(siblings)}" if siblings and not near else "--help lists them all"
    if siblings and is_keyword(name):
        there_are = there_are if not near else ""
        there_are += "; " * bool(there_are) + f"+{shortened(name)}=... adds a keyword of its class"
    return f"there is no setting {shortened(name)!r}{near}; {there_are}"


def leaves(tree: dict[Any, Any], whole: Container[str] = (), path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that a configuration holds, dictionaries of a name in `whole` as they are."""
    for key, value in tree.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and value and name not in whole:
            yield from leaves(value, whole, name + ".")
        else:
            yield name, value


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set what stands under a dotted name, as `leaves` gives it."""
    *path, last = name.split(".")
    for key in path:
        tree = tree.setdefault(key, {})
    tree[last] = value


def find_yaml(directories: Sequence[Path], name: str) -> Path:
    files = [directory / f"{name}.yaml" for directory in directories]
    return next(filter(os.path.isfile, files), CONFIGS / f"{name}.yaml")  # False where a name is too long, too


def as_typed(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, int) and abs(value) > LARGEST:
        return hex(value) if value.bit_length() > 256 else str(value)  # Python refuses to write out thousands of digits
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    there_is = ", ".join(options) or "none"
    others = f"; another one is a YAML file in configs/{group}/" if group in BUILT_GROUPS else ""
    return f"{group}={shortened(option)}: no such {group}{did_you_mean(option, options)}; there is {there_is}{others}"
