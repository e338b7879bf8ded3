"""torchvision's classification models, with a last layer for the data's classes and a first one for its channels."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

NAMES = models.list_models(module=models)
FILES = (".pt", ".pth", ".safetensors")  # endings of what is a file of weights and no name of some
SECOND_HEADS = re.compile(r"(AuxLogits|aux[12])\.")  # of inception_v3 and googlenet, for training alone; left out
FORMER_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # in files of before dots were refused in names

# Its own asks for the version of a file, which plain data does not have; by that it knew files of before 2019.
models.MNASNet._load_from_state_dict = nn.Module._load_from_state_dict


def classifier(
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    weights: str | None = None,
    read_weights: Callable[[str | Path], dict[str, Tensor]] | None = None,
) -> nn.Module:
    """A model of torchvision for images of `input_shape`; its parameters have torchvision's names.

    Args:
        input_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        name: one of `NAMES`.
        weights: trained weights to begin with, by torchvision's name (DEFAULT, IMAGENET1K_V1, ...), or their file. The
            last layer is new; what the first one has for red, green and blue is shared by the channels.
        read_weights: reads a file, or what an address leads to; None leaves the weights as they are made.

    Raises:
        ValueError: there is no such model, it has no such weights, the file has others, or the image does not fit.
    """
    channels, height, width = input_shape
    known = _weights(name, weights)
    model = models.get_model_builder(name)(
        weights=None, num_classes=num_classes, **_options(name, channels, height, width)
    )
    first = next(part for part, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if weights is not None and read_weights is not None:
        _load(model, name, first, read_weights(Path(weights) if _is_file(weights) or known is None else known.url))
    convolution = model.get_submodule(first)
    assert isinstance(convolution, nn.Conv2d)
    convolution.weight = nn.Parameter(_shared(convolution.weight.detach(), channels))
    convolution.in_channels = channels
    return model


def trained_with(channels: int, name: str, weights: str | None = None) -> list[Any] | None:
    """What was done to images that the weights were trained with, as in `dataset.eval_transforms`; None if unknown.

    Of images that are not red, green and blue, `Normalize` has the mean of what it has for these.

    Raises:
        ValueError: there is no such model, or it has no such weights.
    """
    known = _weights(name, weights)
    if known is None:
        return None
    preset = known.transforms()
    mean, std = preset.mean, preset.std
    if channels != 3:
        mean, std = ([round(sum(values) / len(values), 4)] for values in (mean, std))
        if name in ("googlenet", "inception_v3"):  # which do that themselves to colours
            mean = std = [0.5]
    return [
        {"Resize": {"size": preset.resize_size, "interpolation": preset.interpolation.value}},
        {"CenterCrop": {"size": [preset.crop_size[0], preset.crop_size[0]]}},
        {"Normalize": {"mean": mean, "std": std}},
    ]


classifier.trained_with = trained_with  # type: ignore[attr-defined]


def _weights(name: str, weights: str | None) -> Any:
    """The entry of torchvision's list of weights, of a file by its name; None where there is none."""
    if name not in NAMES:
        near = ", ".join(get_close_matches(name.lower(), NAMES, 3, 0.0))
        raise ValueError(f"name={name}: torchvision has no such classification model; near are {near}")
    listed = models.get_model_weights(name)
    if weights is None:
        return None
    if _is_file(weights):
        return next((entry for entry in listed if Path(entry.url).name == Path(weights).name), None)
    if weights not in listed.__members__:
        there = ", ".join(listed.__members__)
        raise ValueError(f"weights={weights}: {name} has {there}; a file is named with its {', '.join(FILES)}")
    return listed[weights]


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in FILES


def _options(name: str, channels: int, height: int, width: int) -> dict[str, Any]:
    """What the builder is told of the images, once they are known to fit."""
    least = models.get_model_weights(name).DEFAULT.meta["min_size"]
    fits, takes = True, ""
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        patch = int(name.rpartition("_")[2])
        fits, takes = height == width and height % patch == 0, f"squares whose side is a multiple of {patch} pixels"
        options = {"image_size": height}
    elif name == "maxvit_t":
        fits, takes = height % 224 == width % 224 == 0, "multiples of 224 pixels"
        options = {"input_size": (height, width)}
    elif not name.startswith("swin_"):  # whose windows are padded
        fits, takes = height >= least[0] and width >= least[1], f"at least {least[0]}x{least[1]} pixels"
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, "transform_input": channels == 3}
    if not fits:
        raise ValueError(
            f"{name} takes {takes}, these images have {height}x{width}; "
            "put Resize: {size: [224, 224]} into dataset.train_transforms and eval_transforms"
        )
    return options


def _load(model: nn.Module, name: str, first: str, state: dict[str, Tensor]) -> None:
    """Put weights into a model, all but those of the last layer."""
    last = [part for part, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    new = {f"{last[-1]}.weight", f"{last[-1]}.bias"}
    state = {FORMER_NAME.sub(r"\1\2.", key): tensor for key, tensor in state.items() if not SECOND_HEADS.match(key)}
    state = {key: tensor for key, tensor in state.items() if key not in new}
    own = model.state_dict()
    convolution, positions = f"{first}.weight", "encoder.pos_embedding"
    if convolution in state and state[convolution].shape[2:] == own[convolution].shape[2:]:
        state[convolution] = _shared(state[convolution], own[convolution].shape[1])
    if isinstance(model, VisionTransformer) and positions in state and state[positions].shape != own[positions].shape:
        state = dict(interpolate_embeddings(model.image_size, model.patch_size, dict(state)))
    wrong = [
        f"{key} is {list(tensor.shape)} there, {list(own[key].shape)} here"
        for key, tensor in state.items()
        if key in own and tensor.shape != own[key].shape
    ]
    if not wrong:
        missing, others = model.load_state_dict(state, strict=False)
        wrong = [f"it has no {key}" for key in missing if key not in new] + [f"it has {key}" for key in others]
    if wrong:
        raise ValueError(f"the weights are those of another architecture than {name}: {wrong[0]}")


def _shared(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight `[out, in, height, width]` for so many channels, each the mean's share of the sum.

    An image of equal channels gives what it gave before; grey has the sum over red, green and blue.
    """
    if weight.shape[1] == channels:
        return weight
    return (weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)
