"""Weights that others have trained: where their files are, and images prepared as they want them.

What `model._target_` names may have two things that are used here. If it takes `read_weights`, it gets the function
below when a run begins, and None where the weights are in a checkpoint. Its attribute `trained_with`, a function of
`channels` and the model's settings, returns what was done to the images that its weights were trained with: a list as
in `dataset.eval_transforms`, or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from engine.build import build, locate
from engine.data.batches import Batches
from engine.data.download import arrives_in
from engine.data.splits import load_splits
from engine.data.transforms import name_and_arguments, parse_transforms
from engine.errors import RequestError, one_line
from engine.run import checkpoint
from engine.terminal import is_terminal

CROPS = ("RandomCrop", "RandomResizedCrop")
ROUNDING = 0.005  # of mean and standard deviation, from 0 to 1: half a step of a pixel's 255


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """The state_dict in a file, or in the one that an address leads to; nothing in it is executed.

    Raises:
        RequestError: it is not there and cannot be downloaded, or it holds no weights.
    """
    path = _fetched(source) if isinstance(source, str) else source
    state: dict[str, Tensor] = checkpoint.read(path, also_old=True)["model"]
    print(f"weights  {path}", flush=True)
    return state


def _fetched(url: str) -> Path:
    """The file of an address in torch's cache; its name tells what its checksum is when it arrives."""
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    print(f"{name} is not in {path.parent}: downloading it from {url}", flush=True)
    checksum = torch.hub.HASH_REGEX.search(name)
    try:
        with arrives_in(path.parent):
            torch.hub.download_url_to_file(url, str(path), checksum and checksum[1], progress=is_terminal())
    except (OSError, RuntimeError) as error:
        raise RequestError(
            f"{name} is not in torch's cache and cannot be downloaded from {url} ({one_line(error)}); "
            f"put it there as {path}, or begin without trained weights"
        ) from None
    return path


def trained_with(model: dict[str, Any], channels: int) -> list[Any] | None:
    """What was done to the images that a model's weights were trained with; None where it does not tell.

    Args:
        model: its settings.
        channels: of an image.
    """
    tell = getattr(locate(str(model["_target_"]), "model._target_"), "trained_with", None)
    return None if tell is None else build(model, "model", target=tell, channels=channels)


def as_trained(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the images prepared as the weights want them, where `dataset.match_model` asks for that.

    A run that is resumed goes on with what it began with, unless it did not ask before.

    Raises:
        RequestError: the model does not tell how.
    """
    data = config["dataset"]
    asks_now = not config["resume"] or any(text.startswith("dataset.match_model ") for text in config["changed"])
    if not data.get("match_model") or not asks_now:
        return config
    expected = trained_with(config["model"], _channels(data))
    if expected is None:
        raise RequestError(
            f"dataset.match_model=true: model={config['choices']['model']} has here no trained weights of which it is "
            "known how their images were prepared; leave it out, or choose such weights"
        )
    if data.get("cache"):
        raise RequestError(
            "dataset.cache=true keeps images of one size, and dataset.match_model=true scales them by their shorter "
            "side; leave one of them out"
        )
    lists = (f"{phase}_transforms" for phase in ("train", "eval"))
    return {**config, "dataset": {**data, **{name: fitted(data[name], expected, name) for name in lists}}}


def _channels(data: dict[str, Any]) -> int:
    """Of the images of a data set, before any transform: as it is set, or as they have them."""
    if "channels" in data:
        return int(data["channels"])
    plain = {"cache": False, "folds": None, "fold": None, "val_fraction": 0.0, "balance": False}  # nothing is said
    splits, _ = load_splits({**data, **plain}, only="test")
    small = [{"Resize": {"size": [8, 8]}}]  # images of files may differ in size
    return Batches(splits["test"], small, torch.device("cpu"), batch_size=1).sample_shape()[0]


def fitted(listed: Sequence[Any], expected: Sequence[Any], name: str) -> list[Any]:
    """A list of transforms that scales, crops and normalises as the expected one; what else is in it stays.

    The random crops of training take the place of one in the middle, and its size.

    Raises:
        RequestError: the list is not right.
    """
    parse_transforms(listed, f"dataset.{name}")
    names = [name_and_arguments(entry)[0] for entry in listed]
    normal = [entry for entry in expected if "Normalize" in entry]
    shaping = [entry for entry in expected if "Normalize" not in entry]
    if "RandomResizedCrop" in names:
        shaping = []
    elif "RandomCrop" in names:
        shaping = [entry for entry in shaping if "CenterCrop" not in entry]
    result = shaping
    for entry in listed if "Normalize" in names else [*listed, "Normalize"]:
        name, arguments = name_and_arguments(entry)
        if name == "Normalize":
            result += normal
        elif name in CROPS:
            result.append({name: {**arguments, "size": _size(expected) or arguments.get("size")}})
        elif name not in ("Resize", "CenterCrop"):
            result.append(entry)
    return result


def disagreement(config: dict[str, Any], input_shape: tuple[int, int, int]) -> str:
    """How images are prepared otherwise than the model's weights want them, with what to set; empty where they are not.

    Args:
        config: the whole configuration.
        input_shape: (channels, height, width) of an image as the model gets it.
    """
    expected = trained_with(config["model"], input_shape[0])
    if expected is None:
        return ""
    lists = [config["dataset"][f"{phase}_transforms"] for phase in ("train", "eval")]
    size, normal = _size(expected), _normal(expected)
    if size in (None, list(input_shape[1:])) and all(_agree(_normal(listed), normal) for listed in lists):
        return ""
    here = dict.fromkeys(_as_text(list(input_shape[1:]), _normal(listed)) for listed in lists)
    return (
        f"the weights were trained with {_as_text(size, normal)}, here they get {' and '.join(here)}; "
        "dataset.match_model=true prepares images as they want them"
    )


def _size(expected: Sequence[Any]) -> list[int] | None:
    """[height, width] that a list of transforms ends in; None where it does not tell."""
    sizes = [arguments["size"] for _, arguments in map(name_and_arguments, expected) if "size" in arguments]
    return list(sizes[-1]) if sizes and isinstance(sizes[-1], (list, tuple)) and len(sizes[-1]) == 2 else None


def _normal(listed: Sequence[Any]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the last Normalize of a list, or None."""
    found = [arguments for name, arguments in map(name_and_arguments, listed) if name == "Normalize"]
    return (list(found[-1]["mean"]), list(found[-1]["std"])) if found else None


def _agree(here: tuple[list[float], list[float]] | None, there: tuple[list[float], list[float]] | None) -> bool:
    if here is None or there is None:
        return here is there
    pairs = [torch.broadcast_tensors(torch.tensor(a), torch.tensor(b)) for a, b in zip(here, there, strict=True)]
    return all(bool(((a - b).abs() <= ROUNDING).all()) for a, b in pairs)


def _as_text(size: list[int] | None, normal: tuple[list[float], list[float]] | None) -> str:
    shape = "x".join(map(str, size)) if size else "any size"
    return f"{shape} " + (f"of mean {normal[0]} and std {normal[1]}" if normal else "without Normalize")
