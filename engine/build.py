"""From settings to objects: what a `_target_` names is found and called."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from engine.errors import RequestError, RunError, cause, did_you_mean, one_line


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
            raise RequestError(f"{option}={target}: {module_name} cannot be imported: {cause(error)}") from error
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
        verb = "refuses its settings" if isinstance(error, (TypeError, ValueError)) else "fails"  # a bug of its own
        raise RequestError(f"{group}: {name} {verb}: {cause(error)}") from error
