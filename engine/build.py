"""From settings to objects: what a `_target_` names is found and called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from engine.errors import RequestError, RunError, cause, did_you_mean, one_line, shortened

EXTRAS = ("timm",)  # modules that an extra of the same name installs


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
            way_out = f": pip install '.[{error.name}]'" if error.name in EXTRAS else ""
            raise RequestError(
                f"{option}={target}: its module needs {error.name!r}, which is not installed{way_out}"
            ) from None
        except Exception as error:
            raise RequestError(f"{option}={target}: {module_name} cannot be imported: {cause(error)}") from error
        for part in parts[cut:]:
            if not hasattr(found, part):
                with suppress(Exception):
                    return importlib.import_module(target)  # a module, which need not have been imported yet
                near = did_you_mean(part, [n for n in vars(found) if not n.startswith("_")])
                raise RequestError(f"{option}={target}: {module_name} has no {part!r}{near}")
            found = getattr(found, part)
        return found
    raise RequestError(f"{option}={target}: no such module; expected a dotted name such as models.mlp.MLP")


# What the program hands to what it builds: so many arguments by position, and those of these names that it takes.
GIVEN: dict[str, tuple[int, tuple[str, ...]]] = {
    "dataset": (0, ()),
    "model": (0, ("input_shape", "num_classes", "read_weights")),
    "criterion": (0, ("class_counts",)),
    "optimizer": (1, ()),
    "scheduler": (1, ("total_steps", "steps_per_epoch")),
}


def check_fit(config: dict[str, Any], added: Collection[str], typed: Collection[str]) -> None:
    """Hold the settings of every group against the signature of what it builds, before anything is read or made.

    Args:
        config: the checked configuration.
        added: dotted names of keywords that no YAML has.
        typed: dotted names of the settings on the command line.

    Raises:
        RequestError: a keyword that is not taken, naming the nearest, or a setting that is missing.
    """
    for group, (count, names) in GIVEN.items():
        settings = config.get(group)
        if not isinstance(settings, dict) or "_target_" not in settings:
            continue
        callee = _callee(settings, group)
        for key in settings:
            if f"{group}.{key}" in added and (told := refusal(callee, group, key)):
                raise RequestError(f"{group}: {settings['_target_']} {told}")
        if group != "dataset":  # some of whose settings are for others
            way_out = f"{group}._target_" in typed
            _fitting(callee, settings, group, [None] * count, dict.fromkeys(names), way_out)


def refusal(callee: Callable[..., Any], group: str, key: str) -> str:
    """Why a keyword cannot be handed to what a group builds (`takes no 'amsgard' ...`), or an empty text."""
    signature = _signature(callee)
    if signature is None:
        return ""
    count, names = GIVEN[group]
    parameters = list(signature.parameters.values())
    by_name = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_position = [p.name for p in parameters[:count] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = [*by_position, *(name for name in names if name in by_name or name == "num_classes")]
    if key in given:
        return f"gets {key!r} from the program; leave it out"
    if key in by_name or any(p.kind == p.VAR_KEYWORD for p in parameters):
        return ""
    takes = [name for name in by_name if name not in given]
    return f"takes no {shortened(key)!r}" + (did_you_mean(key, takes) or f"; it takes {', '.join(takes) or 'none'}")


def check_folds(folds: int | None, fold: int | None) -> None:
    """Raise a RequestError unless `dataset.folds` and `dataset.fold` are both given, or neither, and go together."""
    if folds is None and fold is None:
        return
    if folds is None:
        raise RequestError(f"dataset.fold={fold}: of how many? set dataset.folds too")
    if fold is None:
        every = ",".join(map(str, range(folds))) if folds <= 10 else f"0,1,...,{folds - 1}"
        raise RequestError(
            f"dataset.folds={folds}: which of them validates? dataset.fold=0, or -m dataset.fold={every}"
        )
    if folds < 2:
        raise RequestError(f"dataset.folds={folds}: expected at least two")
    if not 0 <= fold < folds:
        raise RequestError(f"dataset.fold={fold}: expected 0 to {folds - 1}, as dataset.folds={folds}")


def _callee(settings: dict[str, Any], group: str) -> Callable[..., Any]:
    callee = locate(str(settings["_target_"]), f"{group}._target_")
    if not callable(callee):
        raise RequestError(f"{group}._target_={settings['_target_']}: expected a class or function")
    return callee


def _signature(callee: Callable[..., Any]) -> inspect.Signature | None:
    """None where Python cannot tell, as for some that are written in C."""
    try:
        return inspect.signature(callee)
    except (TypeError, ValueError):
        return None


def _fitting(
    callee: Callable[..., Any],
    settings: dict[str, Any],
    group: str,
    arguments: Sequence[Any],
    given: dict[str, Any],
    way_out: bool = False,
) -> dict[str, Any]:
    """What of `given` is taken by name; RequestError where that and the settings are not what a call takes.

    With `way_out` the line says how settings of the YAML are taken out, as a `_target_` that was typed may want it.
    """
    signature = _signature(callee)
    if signature is None:
        return given
    name, own = settings["_target_"], {key: value for key, value in settings.items() if key != "_target_"}
    given = {key: value for key, value in given.items() if key in signature.parameters or key == "num_classes"}
    if way_out and (unknown := [key for key in own if refusal(callee, group, key)]):
        out = " ".join(f"~{group}.{key}" for key in unknown)
        raise RequestError(f"{group}: {name} takes no {', '.join(unknown)}; take out what it does not take: {out}")
    try:
        signature.bind(*arguments, **given, **own)
    except TypeError as error:
        raise RequestError(f"{group}: {name} does not fit its YAML: {one_line(error)}") from None
    return given


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
    callee, name = target or _callee(settings, group), settings["_target_"]
    given = _fitting(callee, settings, group, arguments, given)
    own = {key: value for key, value in settings.items() if key != "_target_"}
    try:
        return callee(*arguments, **given, **own)
    except RunError:
        raise
    except Exception as error:
        verb = "refuses its settings" if isinstance(error, (TypeError, ValueError)) else "fails"  # a bug of its own
        raise RequestError(f"{group}: {name} {verb}: {cause(error)}") from error
