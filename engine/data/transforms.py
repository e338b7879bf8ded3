"""A YAML's list of transforms: read, held against what there is, applied to images.

What has no version for whole batches in `engine.data.augment` is torchvision's and runs on one image at a time, with
torch's generator seeded from the same draws: `PerImage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor

from engine.data.augment import BATCH_TRANSFORMS, Resize, Transform, check_size, to_float
from engine.data.draws import Draws
from engine.errors import RequestError, RunError, did_you_mean, one_line, out_of_memory

MOST_VALUES, MOST_NESTED, MOST_TEXT = 1_000, 16, 100  # values and names in it, levels of lists, characters of a text
MOST_NUMBER = 16_384  # in any argument, but for these, which set the work, or how many times larger an image becomes
MOST = {"padding": 4_096, "kernel_size": 64, "sigma": 16, "side_range": 8, "scale_range": 2}
MOST |= {"num_ops": 32, "mixture_width": 32, "chain_depth": 32}


class PerImage(Transform):
    """A transform of `torchvision.transforms.v2` on one image at a time, its random numbers seeded for each sample."""

    random = True

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Transform images `[batch, channels, height, width]`; call it inside `own_randomness()`."""
        results = []
        for image, bits in zip(images, draws.integers(1)[:, 0].tolist(), strict=True):
            torch.default_generator.manual_seed(bits)
            result = self.transform(image)
            if not isinstance(result, Tensor) or result.ndim != 3:
                shape = f" {list(result.shape)}" if isinstance(result, Tensor) else ""
                raise ValueError(f"gave {type(result).__name__}{shape}; expected a tensor [channels, height, width]")
            result = result.as_subclass(Tensor)
            results.append(result if result.dtype == torch.uint8 else result.float())
        return torch.stack(results)


def per_image(name: str, arguments: dict[str, Any]) -> PerImage | None:
    """The transform that torchvision has under this name, or None.

    Arguments may name a type (`torch.float32`) and list transforms (`RandomApply: {transforms: [...], p: 0.3}`).

    Raises:
        ValueError, TypeError: it refuses the arguments, or cannot run on single images.
    """
    from torchvision.transforms import InterpolationMode, v2  # takes a second to import, and is not always needed

    found = getattr(v2, name, None)
    if not (isinstance(found, type) and issubclass(found, v2.Transform)) or found is v2.Transform:
        return None
    if found is v2.Lambda:
        raise ValueError("it takes a function, which text cannot give; call it in a Dataset of your own")
    if name in ("MixUp", "CutMix"):
        raise ValueError("it mixes the samples of a batch; here a transform sees one image")

    def plain(key: str, value: Any) -> Any:
        if key == "transforms":
            return [nested(*name_and_arguments(entry)) for entry in value]
        if key == "interpolation" and isinstance(value, str):
            return InterpolationMode(value)
        if isinstance(value, str) and value.startswith("torch."):
            found = getattr(torch, value.removeprefix("torch."), None)
            return found if isinstance(found, torch.dtype) else value  # a type; a function stays text
        return value

    def nested(name: str, arguments: dict[str, Any]) -> Any:
        if (built := per_image(name, arguments)) is None:
            raise ValueError(f"torchvision has no transform {name!r}")
        return built.transform

    built = found(**{key: plain(key, value) for key, value in arguments.items()})
    built.register_forward_hook(_check_result)  # of those in a list within it too
    return PerImage(built)


def _check_result(transform: Any, given: Any, result: Any) -> None:
    if isinstance(result, Tensor):
        check_size(*result.shape[-2:])


def name_and_arguments(entry: Any) -> tuple[str, dict[str, Any]]:
    """Of an entry of a YAML list, `Name` or `Name: {argument: value}`."""
    name, arguments = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise ValueError(f"{entry!r}: expected Name or Name: {{argument: value}}")
    return name, arguments or {}


def check_arguments(listed: Any) -> None:
    """Refuse a list of transforms whose work or memory would have no bound.

    Raises:
        ValueError: a size, a number, a text or the list itself is too large, or a value is not plain.
    """
    if not isinstance(listed, (list, tuple)):
        raise ValueError(f"it is {type(listed).__name__}; expected a list of transforms")
    values = count(1)

    def check(name: str, value: Any, level: int) -> None:
        if next(values) > MOST_VALUES or level > MOST_NESTED:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, or more than {MOST_NESTED} levels of them")
        if isinstance(value, dict):
            for key, inner in value.items():
                _check_value("a name", key)
                if not isinstance(key, str):
                    raise ValueError(f"{key!r} is no name; expected Name or Name: {{argument: value}}")
                check(key, inner, level + 1)
        elif isinstance(value, (list, tuple)):
            if name in ("size", "target_size") and len(value) == 2 and all(isinstance(one, int) for one in value):
                check_size(*value)
            for inner in value:
                check(f"{name} ", inner, level + 1)  # one of several: no square, if it is a size
        else:
            _check_value(name, value)

    check("", listed, 0)


def _check_value(name: str, value: Any) -> None:
    """Refuse a number or text that is too large, and what is neither."""
    if isinstance(value, str):
        if len(value) > MOST_TEXT:
            raise ValueError(f"{name.strip()} has {len(value):,} characters; expected at most {MOST_TEXT}")
    elif isinstance(value, (int, float)):
        most = MOST.get(name.strip(), MOST_NUMBER)
        if not -most <= value <= most:  # so no NaN either
            raise ValueError(f"{name.strip()}={str(value)[:20] if abs(value) < 1e99 else 'more'}: at most {most:,}")
        if name.endswith("size"):
            check_size(int(value), int(value))
    elif value is not None:
        raise ValueError(f"{name.strip()} is {type(value).__name__}; expected numbers, texts and lists of them")


def apply(transforms: Sequence[tuple[int, Any]], images: Tensor, draws: Draws | None) -> Tensor:
    """Transform a batch; every transform comes with its place in the YAML's list.

    Raises:
        RunError: a transform does not fit the images.
    """
    for place, transform in transforms:
        if transform.needs_float:
            images = to_float(images)
        try:
            images = transform(images, draws.at(place)) if transform.random and draws else transform(images)
        except Exception as error:  # torchvision's raise what comes; the cause is kept
            if out_of_memory(error, len(images)):
                raise
            name = type(transform.transform if isinstance(transform, PerImage) else transform).__name__
            kind = "" if isinstance(error, (ValueError, TypeError, RuntimeError)) else f"{type(error).__name__}: "
            raise RunError(
                f"transform {name} (number {place + 1}) does not fit images {list(images.shape[1:])}: "
                f"{kind}{one_line(error)}"
            ) from error
    return images


def resized_to(transforms: Sequence[Any]) -> tuple[int, int] | None:
    """(height, width) of the Resize that images meet first, or None."""
    first = transforms[0] if transforms else None
    return (first.size[0], first.size[-1]) if isinstance(first, Resize) else None


def parse_transforms(listed: Sequence[Any], option: str) -> list[Any]:
    """The transforms of a YAML list: `[RandomHorizontalFlip, RandomCrop: {size: 28, padding: 2}]`.

    Raises:
        RequestError: an unknown name or argument.
    """
    try:
        check_arguments(listed)
    except ValueError as error:
        raise RequestError(f"{option}: {one_line(error)}") from error
    transforms = []
    for entry in listed:
        name = entry
        try:
            name, arguments = name_and_arguments(entry)
            transform: Any = None
            with suppress(NotImplementedError):  # an argument that only torchvision's own has
                transform = BATCH_TRANSFORMS[name](**arguments) if name in BATCH_TRANSFORMS else None
            transform = transform or per_image(name, arguments)
        except Exception as error:  # of torchvision's classes each raises its own
            raise RequestError(f"{option}: {name} refuses its arguments: {one_line(error)}") from error
        if transform is None:
            from torchvision.transforms import v2

            known = [*BATCH_TRANSFORMS, *(other for other in vars(v2) if other[0].isupper())]
            raise RequestError(f"{option}: there is no transform {name!r}{did_you_mean(name, known)}")
        transforms.append(transform)
    return transforms
