"""Checkpoints: written whole or not at all, read as data only.

A checkpoint is a dictionary: `model` is the plain state_dict; `config` the configuration as plain data; `classes` and
`input_shape` what the model was built for. Evaluation and prediction need nothing but the file.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import build, locate
from engine.errors import RequestError, RunError, one_line

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
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            spare = temporary.with_suffix(".keep")
            os.link(path, spare)  # so that there is a whole file under the name at every moment
            os.replace(spare, keep)
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({one_line(error)}); what was there before is unharmed") from None


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
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the CRCs that torch.save wrote
        if damaged:
            raise RequestError(f"{path}: damaged (a checksum of {damaged} differs); use another checkpoint")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except RequestError:
        raise
    except Exception as error:  # a damaged or foreign file can raise nearly anything
        reason = (
            "it holds more than tensors, numbers and text"
            if "weights_only" in str(error).lower()
            else one_line(error, 120)
        )
        raise RequestError(f"{path}: not a checkpoint, or a damaged one ({reason})") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path}: holds {type(found).__name__}; expected a checkpoint or a state_dict")
    if "format" not in found:
        inner = next(
            (found[key] for key in ("model", "state_dict", "model_state_dict") if isinstance(found.get(key), dict)),
            found,
        )
        found = {"model": inner}
    _check(found, path)
    found["model"] = {strip_prefixes(name): tensor for name, tensor in found["model"].items()}
    return found


def _check(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse what no training run writes: it could be crafted to break what reads it."""
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not state:
        raise RequestError(f"{path}: holds no weights; expected a checkpoint or a state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise RequestError(f"{path}: {name!r} is {type(tensor).__name__}; expected tensors by name (a state_dict)")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise RequestError(f"{path}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}; expected a dense one")


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
    settings = checkpoint["config"]["model"]
    model = build(
        settings,
        "model",
        target=_trusted(settings, path),
        input_shape=tuple(checkpoint["input_shape"]),
        num_classes=len(checkpoint["classes"]),
    )
    load_weights(model, checkpoint["model"], path)
    return model


def _trusted(settings: dict[str, Any], path: Path) -> Any:
    """The class that a checkpoint's `_target_` means, if it is one of this project's `models` or torchvision's."""
    return locate(str(settings.get("_target_")), f"{path}: model._target_")


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put weights into a model.

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
    model.load_state_dict(state)
