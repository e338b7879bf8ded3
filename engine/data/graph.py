"""The transforms of evaluation as an exported graph has them: plain tensor operations, for images of any size.

On the CPU torch scales bytes in two passes, first along the rows and then along the columns; each has weights of 16
bits and rounds to bytes. Interpolation in other programs does neither, and its pixels differ by one here and there.
Here a pass is the product with the matrix of those weights, in float64, in which the sums of integers are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.data.augment import Normalize, Resize
from engine.data.transforms import PerImage
from engine.errors import RequestError

MOST_PRECISION = 22  # bits behind the point that a weight has at most


def in_graph(transform: Any) -> Callable[[Tensor], Tensor]:
    """A transform as a function of images `[batch, channels, height, width]`, all sizes free.

    Raises:
        RequestError: it cannot be part of a graph.
    """
    if isinstance(transform, Normalize):
        return transform
    if isinstance(transform, Resize):
        if not transform.antialias and transform.interpolation != "nearest":
            raise RequestError("dataset.eval_transforms: Resize with antialias=false cannot be put into a graph")
        return lambda images: scaled(images, transform.size, transform.interpolation)
    own: Any = transform.transform if isinstance(transform, PerImage) else transform
    if isinstance(transform, PerImage) and type(own).__name__ == "CenterCrop":
        return lambda images: cropped(images, own.size)
    raise RequestError(
        f"dataset.eval_transforms: {type(own).__name__} cannot be put into a graph; "
        "Resize, CenterCrop and Normalize can"
    )


def scaled(images: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Images `[batch, channels, height, width]` as `engine.data.augment.Resize` scales them on the CPU.

    Args:
        images: bytes, or floats.
        size: (height, width), or what the shorter side becomes.
        interpolation: bilinear or bicubic, with antialiasing, or nearest.
    """
    before, after = images.shape[2:], list[Any](size)
    if len(size) == 1:
        after = [size[0] * side // torch.sym_min(*before) for side in before]
    if interpolation == "nearest":
        rows, columns = map(_nearest, before, after)
        return images.index_select(2, rows).index_select(3, columns)
    as_bytes = images.dtype == torch.uint8
    result = images.double()
    for axis in (3, 2):
        weights = _weights(before[axis - 2], after[axis - 2], interpolation)
        unit = _unit(weights) if as_bytes else 1.0
        if as_bytes:  # each weight rounded, halves away from zero
            weights = torch.where(weights < 0, -torch.floor(0.5 - weights * unit), torch.floor(0.5 + weights * unit))
        result = result @ weights.T if axis == 3 else weights @ result
        if as_bytes:
            result = torch.floor((result + unit / 2) / unit).clamp(0, 255)
    return result.to(images.dtype)


def _weights(before: int, after: int, interpolation: str) -> Tensor:
    """What each pixel adds to each of the scaled image, float64 `[after, before]`; the rows' sums are 1."""
    places = torch.arange(before, dtype=torch.float64) + 0.5
    scale = places[-1:] + 0.5  # before, as a tensor, which is what a graph computes with
    goals = torch.arange(after, dtype=torch.float64) + 0.5
    scale = scale / (goals[-1:] + 0.5)
    x = ((places - goals[:, None] * scale) / scale.clamp(min=1)).abs()
    if interpolation == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys, IEEE Trans. ASSP 29 (1981), with a = -1/2
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(1, keepdim=True)


def _unit(weights: Tensor) -> Tensor:
    """What 1 becomes where weights are integers: the largest power of 2 with which they have 16 bits."""
    units = 2.0 ** torch.arange(MOST_PRECISION + 1, dtype=torch.float64)
    fits = torch.floor(0.5 + weights.max() * units) < 1 << 15
    return torch.where(fits, units, torch.ones_like(units)).max()


def _nearest(before: int, after: int) -> Tensor:
    """Which pixel each of the scaled image is, int64 `[after]`; torch computes it in float32."""
    last = torch.arange(before, dtype=torch.float64)[-1:]
    goals = torch.arange(after, dtype=torch.float64)
    scale = ((last + 1).float() / (goals[-1:] + 1).float()).double()
    places = ((goals + 0.5) * scale).float().floor().double()
    return torch.minimum(places, last).long()


def cropped(images: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of images, `size` (height, width), as torchvision's CenterCrop; what lies outside is 0."""
    for axis, after in zip((2, 3), size, strict=True):
        goals = torch.arange(after)
        last = torch.arange(images.shape[axis])[-1:]
        more = last + 1 - after
        first = torch.where(more < 0, -(-more // 2), (more / 2).round().long())
        places = goals + first
        inside = (places >= 0) & (places <= last)
        images = images.index_select(axis, torch.minimum(places.clamp(min=0), last))
        images = torch.where(inside.view(-1, 1) if axis == 2 else inside, images, torch.zeros_like(images))
    return images
