"""Transforms of whole batches on the device, every sample with its own random draw.

Names and arguments are those of `torchvision.transforms.v2`; those transforms give a whole batch the same draw, these do
not. What a sample draws is a pure function of (seed, epoch, sample index, place of the transform in the list), whatever
batch, process or device it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit integer
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(bits: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16) on int64, which wraps in torch."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


def sample_seed(seed: int, epoch: int, index: int | Tensor = 0) -> Tensor:
    """64 random bits (int64, the shape of `index`) for each sample of an epoch."""
    key = _mix(torch.tensor(_signed(seed * _GOLDEN + 1))) + epoch
    return _mix(_mix(key * _GOLDEN) + (torch.as_tensor(index) + 1) * _GOLDEN)


class Draws:
    """The random numbers of one batch: every call of `uniform` gives new ones, the same for a sample in any batch.

    Args:
        seed: of the run.
        epoch: counted from 1.
        index: int64 [batch], the samples' places in the data set.
    """

    def __init__(self, seed: int, epoch: int, index: Tensor) -> None:
        self.bits = sample_seed(seed, epoch, index)
        self.drawn = 0

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), float32 `[batch, count]`, on `device`."""
        slot = torch.arange(self.drawn + 1, self.drawn + count + 1, dtype=torch.int64)
        self.drawn += count
        bits = _mix(self.bits[:, None] + slot * _GOLDEN)
        numbers = ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class Normalize:
    """(image - mean) / std for each channel; images are floats from 0 to 1."""

    needs_float = True

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean {mean} and std {std}: expected as many, and std above 0")
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        if self.mean.shape[1] not in (1, images.shape[1]):
            raise ValueError(f"mean has {self.mean.shape[1]} values, but images have {images.shape[1]} channels")
        return images.sub_(self.mean).div_(self.std)


class RandomHorizontalFlip:
    """Mirror left to right with probability `p`."""

    needs_float = False
    axis = 3

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        flip = draws.uniform(1, images.device) < self.p
        return torch.where(flip[:, :, None, None], images.flip(self.axis), images)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirror top to bottom with probability `p`."""

    axis = 2


class RandomCrop:
    """A window of `size` at a random place of the image, padded first.

    Args:
        size: height and width of the window in pixels; one number is a square.
        padding: pixels added on each side: all, (left-right, top-bottom) or (left, top, right, bottom).
        fill: their value, 0 to 255.
        padding_mode: constant, edge, reflect or symmetric.
    """

    needs_float = False

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        fill: float = 0,
        padding_mode: str = "constant",
    ) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else size
        sides = [padding or 0] if isinstance(padding, int) or padding is None else list(padding)
        left, top, right, bottom = {1: sides * 4, 2: sides * 2, 4: sides}[len(sides)]
        self.padding = [left, right, top, bottom]
        self.fill = fill
        self.mode = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}[padding_mode]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if any(self.padding):
            if self.mode == "constant":
                fill = self.fill if images.dtype == torch.uint8 else self.fill / 255
                images = torch.nn.functional.pad(images, self.padding, value=fill)
            else:
                images = torch.nn.functional.pad(images, self.padding, mode=self.mode)
        down, right = images.shape[2] - self.height + 1, images.shape[3] - self.width + 1
        if down < 1 or right < 1:
            found = f"{images.shape[2]}x{images.shape[3]}"
            raise ValueError(f"size {self.height}x{self.width} is larger than the padded image, {found}")
        place = draws.uniform(2, images.device)
        top, left = (place[:, 0] * down).long(), (place[:, 1] * right).long()
        windows = images.unfold(2, self.height, 1).unfold(
            3, self.width, 1
        )  # a view [batch, channels, down, right, h, w]
        return windows[torch.arange(len(images), device=images.device), :, top, left]


BATCH_TRANSFORMS: dict[str, Any] = {
    cls.__name__: cls for cls in (Normalize, RandomHorizontalFlip, RandomVerticalFlip, RandomCrop)
}
