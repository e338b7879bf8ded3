"""Checkpoints: written whole or not at all, read as data only.

A checkpoint is a dictionary: `model` is the plain state_dict; `config` the configuration as plain data; `classes` and
`input_shape` what the model was built for. Evaluation and prediction need nothing but the file.
"""

from __future__ import annotations

import io
import json
import math
import re
import signal
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engine import files
from engine.build import build
from engine.errors import RequestError, one_line, printable
from engine.run import archive, tensors, trust

FORMAT = 1
MOST_PIXELS = 1 << 24  # numbers of an image as the model gets it; 2300x2300 in colour
FIRST_SECONDS = 2.0  # of the processor, for building a model of no weights
DOWNLOADS = {"weights": None, "weights_backbone": None, "pretrained": False}  # settings that fetch, and what stops that


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


def read(path: Path, *, also_old: bool = False) -> dict[str, Any]:
    """Read a checkpoint, or a bare state_dict, as data: nothing in the file is executed.

    `also_old` takes files of before torch 1.6 too, which are no archives and which most of torchvision's weights are.

    A bare state_dict comes back as `{"model": state_dict}`, and so does a `.safetensors` file without the metadata that
    `as_metadata` makes. The prefixes `module.` and `_orig_mod.`, which DistributedDataParallel and torch.compile put
    before names, are taken off.

    Raises:
        RequestError: the file is missing, damaged, or no checkpoint.
    """
    if path.is_dir():
        raise RequestError(f"{path}: a folder; expected a checkpoint file such as {path / 'best.pt'}")
    if not path.is_file():
        raise RequestError(f"{path}: no such checkpoint")
    try:
        if also_old and path.suffix != ".safetensors" and not zipfile.is_zipfile(path):
            found = _load_old(path)
        else:
            found = _of_tensors(path) if path.suffix == ".safetensors" else archive.load(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}; expected a checkpoint or a state_dict")
        if "format" not in found:
            inner = (found.get(key) for key in ("model", "state_dict", "model_state_dict"))
            found = {"model": next((state for state in inner if isinstance(state, dict)), found)}
        _check_checkpoint(found)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: not a checkpoint, or a damaged one ({one_line(error, 160)}); use another"
        ) from None
    found["model"] = {strip_prefixes(name): tensor for name, tensor in found["model"].items()}
    return found


def _load_old(path: Path) -> Any:
    """What torch.save wrote before it made archives; torch itself reads that as data."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises anything, and what torch says of others is how to run their code
        raise ValueError("it is neither an archive of torch.save nor what that wrote before, tensors by name") from None


# What a checkpoint holds besides its weights, under its name in the metadata of a `.safetensors` file, where others
# have a "format" of their own.
ABOUT = {name: name for name in ("classes", "input_shape", "config", "signature")} | {"checkpoint_format": "format"}


def as_metadata(checkpoint: dict[str, Any]) -> dict[str, str]:
    """What a checkpoint holds besides its weights, in JSON: metadata are texts."""
    return {name: json.dumps(checkpoint.get(key), ensure_ascii=False) for name, key in ABOUT.items()}


def _of_tensors(path: Path) -> dict[str, Any]:
    """What a `.safetensors` file holds, as the dictionary that is in other checkpoints."""
    state, metadata = tensors.load(path)
    found: dict[str, Any] = {"model": state}
    if "checkpoint_format" in metadata:
        try:
            found |= {key: json.loads(metadata.get(name, "null")) for name, key in ABOUT.items()}
        except RecursionError:
            raise ValueError("its metadata is nested too deeply") from None
        archive.check_data(found, path.stat().st_size)
    return found


def _check_checkpoint(found: dict[str, Any]) -> None:
    state = found.get("model")
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
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"its input shape is {shape!r}; expected [channels, height, width]")
    if math.prod(shape) > MOST_PIXELS:
        raise ValueError(f"its input shape is {shape}, more than {MOST_PIXELS:,} numbers an image")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("it has no class names")
    if len(set(classes)) < len(classes):
        raise ValueError("two of its classes have the same name")
    if trust.interpolates(config):
        raise ValueError("its configuration has an interpolation, ${...}; a run stores resolved values")


def strip_prefixes(name: str) -> str:
    """A parameter's own name, without `module.` before it and `_orig_mod.` anywhere, in any nesting."""
    return re.sub(r"^(?:module\.)+", "", name.replace("_orig_mod.", ""))


def build_model(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The model that a checkpoint's own configuration describes, with its weights.

    Raises:
        RequestError: the configuration names a model that is not here or asks for an absurd one, or the weights do not
            fit it.
    """
    config, state = checkpoint["config"], checkpoint["model"]
    target, settings = trust.settings_of("model", config, path, ours=is_ours(checkpoint))
    settings |= {name: off for name, off in DOWNLOADS.items() if name in settings}  # the weights are in the file
    settings.setdefault("_target_", config["model"]["_target_"])
    sizes = {"input_shape": tuple(checkpoint["input_shape"]), "num_classes": len(checkpoint["classes"])}
    construct = partial(build, settings, f"{path}: model", target=target, **sizes)

    with torch.device("meta"), Numbers(), _patience(FIRST_SECONDS + 0.02 * len(state), path):  # sizes without memory
        draft = construct()
    check_fit(draft, state, path)
    if sum(b.numel() for b in draft.buffers()) > 2 * sum(t.numel() for t in state.values()) + MOST_PIXELS:
        raise RequestError(f"{path}: its model has far more buffers than the file has weights")
    model = construct()
    load_weights(model, state, path)
    return model


class Numbers(TorchFunctionMode):
    """On the meta device a model's constructor can still compute with numbers, as RegNet's does for its widths."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.arange, torch.linspace, torch.tensor) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Whether the configuration in a checkpoint was typed here."""
    return trust.is_ours(checkpoint["config"], checkpoint.get("signature"))


@contextmanager
def _patience(seconds: float, path: Path) -> Iterator[None]:
    """Give up on what a file wants to be built when it took so much of the processor's time; waiting does not count.

    Building the largest models of torchvision takes less than a second; a file can ask for 10^9 layers.
    """

    def give_up(*_: object) -> None:
        raise RequestError(f"{path}: its model takes too long to build; it asks for far more layers than weights")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can be interrupted
        return
    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Refuse (RequestError) weights whose names or shapes are not those of a model; at most five are listed."""
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
    """Refuse (RequestError) a bare state_dict unless model and data are named on the command line."""
    if not config.get("model") or not config.get("choices", {}).get("dataset"):
        raise RequestError(
            f"{path}: a bare state_dict, which tells neither model nor data; say which it is for: "
            "model=mlp dataset=fashion_mnist, or experiment=tutorial"
        )


def build_bare(
    state: dict[str, Tensor], config: dict[str, Any], input_shape: Sequence[int], num_classes: int, path: Path
) -> nn.Module:
    """The model that the command line names with the weights of a bare state_dict, or RequestError."""
    model = build(config["model"], "model", input_shape=tuple(input_shape), num_classes=num_classes)
    load_weights(model, state, path)
    return model


def transforms_line(config: dict[str, Any]) -> str:
    """What is done to images before a bare state_dict sees them; with other transforms than in training it is worse."""
    listed = as_text(config["dataset"]["eval_transforms"])
    experiment = config["choices"].get("experiment")
    source = f"experiment={experiment}" if experiment else f"dataset={config['choices']['dataset']}"
    return f"dataset.eval_transforms={printable(listed)}, of {source}; the file does not say what its training had"


def as_text(transforms: list[Any]) -> str:
    """A list of transforms as YAML has it, on one line; not yet safe to print."""
    return str(yaml.safe_dump(transforms, default_flow_style=True, width=1000)).strip()
