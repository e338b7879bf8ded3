"""Checkpoints: written whole or not at all, read as data only.

A checkpoint is a dictionary: `model` is the plain state_dict; `config` the configuration as plain data; `classes` and
`input_shape` what the model was built for. Evaluation and prediction need nothing but the file.
"""

from __future__ import annotations

import inspect
import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from engine import files
from engine.config import build, locate
from engine.errors import RequestError, one_line, printable

FORMAT = 1


def write(path: Path, checkpoint: dict[str, Any], keep: Path | None = None) -> None:
    """Write a checkpoint whole or not at all: a crash or a full disk leaves the file that was there.

    Args:
        path: the file.
        checkpoint: tensors, numbers and text by name.
        keep: a second name that the file that was there gets.

    Raises:
        RunError: it cannot be written.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content)  # to memory first: writing straight to a file, torch hides why it failed
    files.write(path, content.getbuffer(), keep=keep, sync=True)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a bare state_dict, as data: nothing in the file is executed.

    A bare state_dict comes back as `{"model": state_dict}`. The prefixes `module.` and `_orig_mod.`, which
    DistributedDataParallel and torch.compile put before names, are taken off.

    Raises:
        RequestError: the file is missing, damaged, or no checkpoint.
    """
    if path.is_dir():
        raise RequestError(f"{path}: a folder; expected a checkpoint file such as {path / 'best.pt'}")
    if not path.is_file():
        raise RequestError(f"{path}: no such checkpoint")
    try:
        _check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}; expected a checkpoint or a state_dict")
        _check_data(found)
        if "format" not in found:
            inner = (found.get(key) for key in ("model", "state_dict", "model_state_dict"))
            found = {"model": next((state for state in inner if isinstance(state, dict)), found)}
        _check_checkpoint(found)
        found["model"] = {strip_prefixes(name): tensor for name, tensor in found["model"].items()}
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        reason = "it asks to run code" if isinstance(error, pickle.UnpicklingError) else one_line(error, 160)
        raise RequestError(f"{path}: not a checkpoint, or a damaged one ({reason}); use another") from None
    return found


def _check_archive(path: Path) -> None:
    """torch.load does not check the CRCs that torch.save wrote, nor how much a file unpacks to."""
    with zipfile.ZipFile(path) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} differs")


def _check_data(value: Any, depth: int = 0) -> None:
    """Refuse what no training run writes: it could be crafted to break what uses it.

    Raises:
        ValueError: something else than tensors, numbers and text, in dictionaries and lists; or a tensor that is not
            dense (sparse and quantised ones have had out-of-bounds holes) or larger than its data in the file.
    """
    if depth > 32:
        raise ValueError("it is nested too deeply")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or type(value) not in (Tensor, nn.Parameter):
            raise ValueError(f"it holds a tensor of kind {value.layout}, {value.dtype}; expected dense ones")
        if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"it holds a tensor of shape {list(value.shape)} without the data for it")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_data(key, depth + 1)
            _check_data(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_data(item, depth + 1)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"it holds {type(value).__name__}; expected tensors, numbers and text")


def _check_checkpoint(found: dict[str, Any]) -> None:
    state = found["model"]
    if not isinstance(state, dict) or not state:
        raise ValueError("it holds no weights")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} is {type(tensor).__name__}; expected tensors by name, a state_dict")
    if "format" not in found:
        return
    config, shape, classes = (found.get(key) for key in ("config", "input_shape", "classes"))
    if found["format"] != FORMAT:
        raise ValueError(f"its format is {found['format']!r}; this program reads {FORMAT}")
    if not isinstance(config, dict) or not all(
        isinstance(config.get(k), dict) for k in ("model", "dataset", "choices")
    ):
        raise ValueError("it has no configuration of a model and a data set")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 < n < 65536 for n in shape):
        raise ValueError(f"its input shape is {shape!r}; expected [channels, height, width]")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("it has no class names")
    if _interpolates(config):
        raise ValueError("its configuration has an interpolation, ${...}; a run stores resolved values")


def _interpolates(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_interpolates(key) or _interpolates(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(_interpolates(item) for item in value)
    return isinstance(value, str) and "${" in value


@contextmanager
def interpreting(path: Path) -> Iterator[None]:
    """While a checkpoint's configuration is put to use: what breaks on a strange value is told in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, MemoryError) as error:
        what = f"{type(error).__name__}: {one_line(error, 160)}"
        raise RequestError(f"{path}: its configuration cannot be used ({what})") from error


def strip_prefixes(name: str) -> str:
    """A parameter's own name, without `module.` before it and `_orig_mod.` anywhere, in any nesting."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def build_model(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The model that a checkpoint's own configuration describes, with its weights.

    Raises:
        RequestError: the configuration names something that is no model of this project or of torchvision, or the
            weights do not fit it.
    """
    settings = dict(checkpoint["config"]["model"])
    target = trusted(settings.get("_target_"), path)
    settings |= {name: None for name in ("weights", "weights_backbone") if name in settings}  # they are in the file
    shape, num_classes = tuple(checkpoint["input_shape"]), len(checkpoint["classes"])

    def construct() -> nn.Module:
        return build(settings, f"{path}: model", target=target, input_shape=shape, num_classes=num_classes)

    with torch.device("meta"):  # sizes without memory, so that absurd ones are refused and not allocated
        check_fit(construct(), checkpoint["model"], path)
    model = construct()
    load_weights(model, checkpoint["model"], path)
    return model


def trusted(target: Any, path: Path) -> Any:
    """What a name in a checkpoint means, if it is a model of `models` or torchvision, or a function of `datasets`.

    Decided on the object that is found, by the module that defines it: a name that merely begins like one of ours
    (`models.mlp.os.system`) leads elsewhere.

    Raises:
        RequestError: it is anything else.
    """
    if isinstance(target, str) and re.fullmatch(r"(models|datasets|torchvision\.models)(\.\w+)+", target):
        found = locate(target, str(path))
        home, name = getattr(found, "__module__", None) or "", getattr(found, "__name__", "_")
        if inspect.isclass(found) and issubclass(found, nn.Module):
            if home.split(".")[0] == "models" or home.startswith("torchvision.models."):
                return found
        elif inspect.isfunction(found) and (
            (home == "datasets" and not name.startswith("_"))
            or (home.startswith("torchvision") and _is_builder(found, name))
        ):
            return found
    raise RequestError(f"{path}: names {str(target)[:100]!r}, which is no model or data set of this program; refused")


def _is_builder(found: Any, name: str) -> bool:
    from torchvision.models import get_model_builder, list_models

    return name in list_models() and get_model_builder(name) is found


def check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Hold the names and shapes of weights against a model.

    Raises:
        RequestError: names or shapes differ; at most five are listed.
    """
    own = model.state_dict()
    differences = [f"{name} is missing in the file" for name in own if name not in state]
    differences += [f"{name} is not in the model" for name in state if name not in own]
    differences += [
        f"{name} is {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise RequestError(
            f"{path}: does not fit {type(model).__name__}: {'; '.join(differences[:5])}{more}; "
            "was it trained with another model or other model settings?"
        )


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put weights into a model, or raise RequestError if they do not fit it."""
    check_fit(model, state, path)
    model.load_state_dict(state)


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse weights that are not finite numbers: all that a model says with them is wrong, and looks like an answer.

    Raises:
        RequestError: naming the first parameter, or buffer, where a mask may hold minus infinity.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            bad = ~tensor.detach().isfinite()
            if not isinstance(tensor, nn.Parameter):
                bad &= ~tensor.isneginf()
            if bad.any():
                raise RequestError(
                    f"{path}: {int(bad.sum()):,} of the {bad.numel():,} numbers of {name} are not finite (nan or inf): "
                    "its training went wrong; use another checkpoint"
                )


# ---------------------------------------------------------------------------------------------------------------------
# A bare state_dict, which tells neither model nor data


def check_bare(config: dict[str, Any], path: Path) -> None:
    """Refuse a bare state_dict unless model and data are named on the command line.

    Raises:
        RequestError: they are not.
    """
    if not config.get("model") or not config.get("choices", {}).get("dataset"):
        raise RequestError(
            f"{path}: a bare state_dict, which tells neither model nor data; say which it is for: "
            "model=mlp dataset=fashion_mnist, or experiment=tutorial"
        )


def build_bare(
    state: dict[str, Tensor], config: dict[str, Any], input_shape: Sequence[int], num_classes: int, path: Path
) -> nn.Module:
    """The model that the command line names, with the weights of a bare state_dict.

    Raises:
        RequestError: they do not fit.
    """
    model = build(config["model"], "model", input_shape=tuple(input_shape), num_classes=num_classes)
    load_weights(model, state, path)
    return model


def transforms_line(config: dict[str, Any]) -> str:
    """What is done to images before a bare state_dict sees them; with other transforms than in training it is worse."""
    listed = yaml.safe_dump(config["dataset"]["eval_transforms"], default_flow_style=True, width=1000).strip()
    experiment = config["choices"].get("experiment")
    source = f"experiment={experiment}" if experiment else f"dataset={config['choices']['dataset']}"
    return f"dataset.eval_transforms={printable(listed)}, of {source}; the file does not say what its training had"
