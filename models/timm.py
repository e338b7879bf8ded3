"""timm's image models, with a last layer for the data's classes and a first one for its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from timm.data import resolve_data_config
from torch import Tensor, nn

FILES = (".pt", ".pth", ".bin", ".safetensors")


def classifier(
    input_shape: tuple[int, int, int],
    num_classes: int,
    name: str,
    pretrained: bool = False,
    weights: str | None = None,
    read_weights: Callable[[str | Path], dict[str, Tensor]] | None = None,
) -> nn.Module:
    """A model of timm for images of `input_shape`; its parameters have timm's names.

    Args:
        input_shape: (channels, height, width) of an image.
        num_classes: number of logits.
        name: as in `timm.list_models()`, with or without the tag of its weights.
        pretrained: begin with timm's trained weights. The last layer is new; what the first one has for red, green and
            blue is shared by the channels.
        weights: a file of weights to begin with instead.
        read_weights: reads a file, or what an address leads to; None leaves the weights as they are made.

    Raises:
        ValueError: there is no such model, it has no weights, the file has others, or the image does not fit.
    """
    channels, height, width = input_shape
    known = _known(name, pretrained, weights)
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    begins = read_weights is not None and (pretrained or weights is not None)
    if begins:
        assert read_weights is not None
        state = read_weights(_file(known) if weights is None else Path(weights))
        heads = [state[f"{head}.weight"] for head in _names(known.classifier) if f"{head}.weight" in state]
        classes = len(heads[0]) if heads else known.num_classes
        overlay = {"state_dict": state, "num_classes": classes}
        settings = {"pretrained": True, "num_classes": classes, "pretrained_cfg_overlay": overlay}
    if known.fixed_input_size:
        settings["img_size"] = (height, width)
    try:
        model: Any = timm.create_model(name, **settings)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or (1, 1)
        assert height % patch[0] == width % patch[1] == 0, f"its patches have {patch[0]}x{patch[1]}"
    except Exception as error:  # whatever a model's constructor, or what fits weights to it, is stopped by
        what = f"the weights do not fit {name} for" if begins else f"{name} does not take"
        raise ValueError(
            f"{what} images of {height}x{width} pixels ({' '.join(str(error).split())[:160]}); it was made for Resize: "
            f"{{size: {list(known.input_size[1:])}}} in dataset.train_transforms and eval_transforms"
        ) from None
    if begins:
        model.pretrained_cfg.pop("state_dict")  # a second copy of all weights
        model.reset_classifier(num_classes)
        _share(model, _names(known.first_conv), channels)
    model.last_layers = _names(known.classifier)
    return model


def trained_with(channels: int, name: str, pretrained: bool = False, weights: str | None = None) -> list[Any] | None:
    """What was done to images that the weights were trained with, as in `dataset.eval_transforms`; None if unknown.

    Of images that are not red, green and blue, `Normalize` has the mean of what it has for these.

    Raises:
        ValueError: there is no such model, or it has no weights.
    """
    known = _known(name, pretrained, weights)
    config = resolve_data_config(pretrained_cfg=known.to_dict())
    if not (pretrained or weights) or config["crop_mode"] == "border":  # which pads
        return None
    size = list(config["input_size"][1:])
    scaled = [int(side / config["crop_pct"]) for side in size]
    mean, std = list(config["mean"]), list(config["std"])
    if channels != 3:
        mean, std = ([round(sum(values) / len(values), 4)] for values in (mean, std))
    scaled = scaled if config["crop_mode"] == "squash" else [min(scaled)]
    return [
        {"Resize": {"size": scaled, "interpolation": config["interpolation"]}},
        {"CenterCrop": {"size": size}},
        {"Normalize": {"mean": mean, "std": std}},
    ]


classifier.trained_with = trained_with  # type: ignore[attr-defined]


def _known(name: str, pretrained: bool, weights: str | None) -> Any:
    """What timm has of a model and of the weights that its tag names."""
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        known = None
    if known is None:
        near = get_close_matches(name, timm.list_models() + timm.list_models(include_tags=True), 3, 0.0)
        raise ValueError(f"name={name}: timm has no such model; near are {', '.join(near)}")
    if pretrained and weights is not None:
        raise ValueError(f"weights={weights} and pretrained=true: each is what to begin with; choose one")
    if pretrained and not (known.hf_hub_id or known.url):
        raise ValueError(f"pretrained=true: timm has no weights of {name}; set it to false, or weights= to a file")
    if weights is not None and Path(weights).suffix not in FILES:
        raise ValueError(f"weights={weights}: expected a file ending in {', '.join(FILES)}; timm's are pretrained=true")
    return known


def _file(known: Any) -> Path | str:
    """Timm's weights: their file in the hub's cache, which is downloaded where it is not there, or their address."""
    if not known.hf_hub_id:
        return str(known.url)
    file = known.hf_hub_filename or "model.safetensors"
    there = try_to_load_from_cache(known.hf_hub_id, file)
    if isinstance(there, str):
        return Path(there)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=known.hf_hub_id, repo_type="model")
    try:
        return Path(hf_hub_download(known.hf_hub_id, file))
    except Exception as error:  # the hub has many kinds, and lets some of the libraries below it through
        raise ValueError(
            f"{file} of {known.hf_hub_id} is not in the hub's cache and cannot be downloaded ({type(error).__name__}); "
            f"put it there as {folder / 'snapshots' / 'main' / file}"
        ) from None


def _names(of_modules: str | Sequence[str] | None) -> tuple[str, ...]:
    return (of_modules,) if isinstance(of_modules, str) else tuple(of_modules or ())


def _share(model: nn.Module, names: Sequence[str], channels: int) -> None:
    """Change first convolutions for so many channels, each the mean's share of the sum over those that there were."""
    for convolution in map(model.get_submodule, names):
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight.detach()
        if weight.shape[1] != channels:
            convolution.weight = nn.Parameter((weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1))
            convolution.in_channels = channels
