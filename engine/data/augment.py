"""Transforms of whole batches on the device, every sample with its own random draw.

Names and arguments are those of `torchvision.transforms.v2`, which gives a whole batch the same draw; these do not. An
argument that only torchvision's own version has raises NotImplementedError. What a sample draws is a pure function of
(seed, epoch, sample index, place of the transform in the list), whatever batch, process or device it is in.

Images come as uint8 0 to 255 or as floats, 0 to 1 before `Normalize`. A transform that needs floats gets floats. `fill`
always counts from 0 to 255, and is one number or one a channel. A range is (least, most); one number stands for one
around nothing changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from engine.data.draws import Draws, send

MOST_PIXELS = 64_000_000  # of an image that a transform makes, which a stranger's file may ask for; 8000x8000
Numbers = float | Sequence[float]


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as float32 `[1, n, 1, 1]` on a device, copied once: a copy in every batch would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def to_float(images: Tensor) -> Tensor:
    """uint8 0 to 255 as float32 0 to 1, bit by bit what torchvision's `ToTensor` does; floats as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def check_size(height: int, width: int) -> None:
    """Refuse to make an image that would fill the memory, whatever its transforms say."""
    if height * width > MOST_PIXELS:
        raise ValueError(f"it would make an image of {height}x{width} pixels; at most {MOST_PIXELS:,} are made")


def _probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}: expected a probability, 0 to 1")
    return p


def _range(given: Any, around: float = 0) -> tuple[float, float]:
    """(least, most) of a pair; one number x is (around - x, around + x)."""
    least, most = (around - given, around + given) if isinstance(given, (int, float)) else given
    if least > most:
        raise ValueError(f"{given}: expected (least, most), or a number of at least 0")
    return least, most


def _one_or_each(value: Any) -> tuple[float, ...]:
    """One number, or one a channel."""
    return tuple(float(one) for one in ([value] if isinstance(value, (int, float)) else value))


def _choice(argument: str, given: str, *known: str) -> str:
    if given not in known:
        raise ValueError(f"{argument}={given}: expected {', '.join(known[:-1])} or {known[-1]}")
    return given


class Transform:
    """Of images `[batch, channels, height, width]`.

    Attributes:
        needs_float: it has to be given floats.
        random: it has to be given draws.
    """

    needs_float = False
    random = False


class Normalize(Transform):
    """(image - mean) / std for each channel; mean and std count from 0 to 1."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean {mean} and std {std}: expected as many, and std above 0")
        self._values = tuple(mean), tuple(std)
        self.mean, self.std = (_constant(values, torch.device("cpu")) for values in self._values)

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        mean, std = (_constant(values, images.device) for values in self._values)
        if mean.shape[1] not in (1, images.shape[1]):
            raise ValueError(f"mean has {mean.shape[1]} values, but images have {images.shape[1]} channels")
        if images.is_floating_point():
            return images.sub(mean).div_(std)
        return torch.sub(images, mean * 255).div_(std * 255)  # one pass less over the batch


class RandomHorizontalFlip(Transform):
    """Mirror left to right with probability `p`."""

    random = True
    axis = 3

    def __init__(self, p: float = 0.5) -> None:
        self.p = _probability(p)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        flip = draws.uniform(1, images.device) < self.p
        return torch.where(flip[:, :, None, None], images.flip(self.axis), images)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirror top to bottom with probability `p`."""

    axis = 2


class RandomCrop(Transform):
    """A window of `size` at a random place of the image, padded first on all sides.

    The padding is for all, (left-right, top-bottom) or (left, top, right, bottom).
    """

    random = True

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: Numbers = 0,
        padding_mode: str = "constant",
    ) -> None:
        if pad_if_needed:
            raise NotImplementedError
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 1:
            raise ValueError(f"size={size}: expected height and width in pixels")
        sides = [padding or 0] if isinstance(padding, int) or padding is None else list(padding)
        if len(sides) not in (1, 2, 4):
            raise ValueError(f"padding={padding}: expected one number, two or four")
        self.left, self.top, self.right, self.bottom = sides * (4 // len(sides))
        self.is_padded = any(sides)
        self.fill = _one_or_each(fill)
        self.padding_mode = _choice("padding_mode", padding_mode, "constant", "edge", "reflect", "symmetric")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        batch, channels, height, width = images.shape
        tall, wide = self.top + height + self.bottom, self.left + width + self.right
        if self.is_padded:
            check_size(tall, wide)
        down, across = tall - self.height + 1, wide - self.width + 1
        if down < 1 or across < 1:
            raise ValueError(f"size {self.height}x{self.width} is larger than the padded image, {tall}x{wide}")
        place = draws.uniform(2, images.device)
        y = torch.arange(-self.top, self.height - self.top, device=images.device)
        x = torch.arange(-self.left, self.width - self.left, device=images.device)
        rows, columns = (place[:, :1] * down).long() + y, (place[:, 1:] * across).long() + x  # [batch, window's side]
        from_row, from_column = self._source(rows, height), self._source(columns, width)
        pixel = (from_row * width)[:, :, None] + from_column[:, None, :]
        windows = images.flatten(2).gather(2, pixel.view(batch, 1, -1).expand(-1, channels, -1))
        windows = windows.view(batch, channels, self.height, self.width)
        if not self.is_padded or self.padding_mode != "constant":
            return windows
        fill = _constant(self.fill, images.device).expand(1, channels, 1, 1)
        fill = (fill if images.dtype == torch.uint8 else fill / 255).to(images.dtype)
        inside = (from_row == rows)[:, None, :, None] & (from_column == columns)[:, None, None, :]
        return torch.where(inside, windows, fill)

    def _source(self, place: Tensor, size: int) -> Tensor:
        """Which pixel to take for a place before 0 or from `size` on: the outermost one, or one in a mirror there."""
        if self.padding_mode in ("reflect", "symmetric"):
            behind = int(self.padding_mode == "symmetric")  # the mirror lies behind the outermost pixel, else on it
            place = torch.where(place < 0, -behind - place, place)
            place = torch.where(place < size, place, 2 * (size - 1) + behind - place)
        return place.clamp(0, size - 1)


class RandomRotation(Transform):
    """Turn by a random angle, counter-clockwise about the middle; the size stays."""

    needs_float = True
    random = True

    def __init__(
        self,
        degrees: Numbers,
        interpolation: str = "nearest",
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: Numbers = 0,
    ) -> None:
        if expand or center is not None:
            raise NotImplementedError
        self.low, self.high = _range(degrees)
        self.interpolation = _choice("interpolation", interpolation, "nearest", "bilinear")
        self.fill = _one_or_each(fill)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        angles = self.low + (self.high - self.low) * draws.uniform(1)[:, 0]
        return rotate(images, angles, self.interpolation, _constant(self.fill, images.device) / 255)


def rotate(images: Tensor, degrees: Tensor, interpolation: str, fill: Tensor) -> Tensor:
    """Turn every image by its own angle, counter-clockwise about its middle, as torchvision does one.

    Args:
        images: floats `[batch, channels, height, width]`.
        degrees: `[batch]`, on the CPU.
        interpolation: nearest or bilinear.
        fill: value of what comes in from outside, `[1]` or `[channels]` or more dimensions, on the images' device.
    """
    batch, channels, height, width = images.shape
    angle = degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    # Where a pixel of the result comes from, in pixels from the middle; scaled to grid_sample's -1 to 1.
    x_from = torch.stack([cos, -sin], 1) * (2 / width)
    y_from = torch.stack([sin, cos], 1) * (2 / height)
    matrix = send(torch.stack([x_from, y_from], 2).float(), images.device)  # [batch, 2 (x, y), 2]
    x = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2).view(1, -1, 2)
    grid = (places.expand(batch, -1, -1) @ matrix).view(batch, height, width, 2)
    inside = images.new_ones(batch, 1, height, width)
    turned = torch.nn.functional.grid_sample(
        torch.cat([images, inside], 1), grid, mode=interpolation, padding_mode="zeros", align_corners=False
    )
    turned, inside = turned[:, :channels], turned[:, channels:]
    fill = fill.to(images.dtype).view(1, -1, 1, 1)
    if interpolation == "nearest":
        return torch.where(inside < 0.5, fill, turned)
    return (turned - fill) * inside + fill  # torchvision's formula, which lets the edge fade


class RandomErasing(Transform):
    """Overwrite a random rectangle with probability `p` (Zhong et al., arXiv:1708.04896).

    Args:
        scale: range of its share of the area.
        ratio: range of its height by width, drawn on a logarithmic scale.
        value: what is put there, in the units that images have at this place of the list; one number, one a channel, or
            random for normal noise in every pixel.
    """

    needs_float = True
    random = True
    attempts = 10  # rectangles drawn until one fits, as in torchvision; then the image stays whole

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: Numbers | str = 0.0,
        inplace: bool = False,
    ) -> None:
        self.p = _probability(p)
        (self.low, self.high), (narrow, wide) = scale, ratio
        if not (0 <= self.low <= self.high <= 1 and 0 < narrow <= wide):
            raise ValueError(f"scale {scale} and ratio {ratio}: expected (least, most), scale in [0, 1], ratio above 0")
        self.narrow, self.wide = math.log(narrow), math.log(wide)
        if isinstance(value, str) and value != "random":
            raise ValueError(f"value={value}: expected a number, a list or random")
        self.value = None if isinstance(value, str) else _one_or_each(value)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        channels, height, width = images.shape[1:]
        drawn = draws.uniform(3 + 2 * self.attempts)
        area = height * width * (self.low + (self.high - self.low) * drawn[:, 3 : 3 + self.attempts])
        aspect = (self.narrow + (self.wide - self.narrow) * drawn[:, 3 + self.attempts :]).exp()
        tall, broad = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # [batch, attempts]
        fits = (tall < height) & (broad < width)
        first = fits.int().argmax(1, keepdim=True)
        tall, broad = tall.gather(1, first), broad.gather(1, first)
        top = (drawn[:, 1:2] * (height - tall + 1)).floor()
        left = (drawn[:, 2:3] * (width - broad + 1)).floor()
        y, x = torch.arange(height), torch.arange(width)
        rows, columns = (y >= top) & (y < top + tall), (x >= left) & (x < left + broad)
        rows &= (drawn[:, :1] < self.p) & fits.gather(1, first)
        rectangle = (send(rows, images.device)[:, :, None] & send(columns, images.device)[:, None, :])[:, None]
        if self.value is None:
            value = send(_normal(draws, channels * height * width), images.device).view_as(images)
        else:
            value = _constant(self.value, images.device)
        return torch.where(rectangle, value, images)


def _normal(draws: Draws, count: int) -> Tensor:
    """Normal numbers, float32 `[batch, count]` (Box and Muller, 1958)."""
    radius = (-2 * (1 - draws.uniform(count)).log()).sqrt()
    return radius * (2 * math.pi * draws.uniform(count)).cos()


class ColorJitter(Transform):
    """Change brightness, contrast and saturation by factors, hue by a part of the colour circle, -0.5 to 0.5.

    The order is drawn for every sample; images are 0 to 1.
    """

    needs_float = True
    random = True
    changes = ("brightness", "contrast", "saturation", "hue")
    orders = torch.tensor(list(permutations(range(4))))

    def __init__(
        self, brightness: Numbers = 0, contrast: Numbers = 0, saturation: Numbers = 0, hue: Numbers = 0
    ) -> None:
        self.ranges = []
        for given in (brightness, contrast, saturation):
            least, most = _range(given, around=1)
            least = max(0.0, least) if isinstance(given, (int, float)) else least
            if least < 0:
                raise ValueError(f"{given}: expected factors of at least 0")
            self.ranges.append((least, most))
        self.ranges.append(_range(hue))
        if not -0.5 <= self.ranges[3][0] <= self.ranges[3][1] <= 0.5:
            raise ValueError(f"hue={hue}: expected -0.5 to 0.5")
        neutral = [(1, 1)] * 3 + [(0, 0)]
        self.unchanged = [given == none for given, none in zip(self.ranges, neutral, strict=True)]

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images have {images.shape[1]} channels; expected 1 or 3")
        drawn = draws.uniform(5)
        low, high = torch.tensor(self.ranges, dtype=torch.float32).unbind(1)
        factors = low + (high - low) * drawn[:, :4]  # [batch, 4]
        order = self.orders[(drawn[:, 4] * len(self.orders)).long()]  # [batch, 4], which change comes when
        images = images.clone()
        for turn in range(4):
            for number, change in enumerate(self.changes):
                if self.unchanged[number] or (images.shape[1] == 1 and number >= 2):
                    continue
                members = (order[:, turn] == number).nonzero()[:, 0]
                if len(members):
                    factor = send(factors[members, number], images.device).view(-1, 1, 1, 1)
                    members = send(members, images.device)
                    images[members] = _adjusted(images[members], change, factor)
        return images


def _adjusted(images: Tensor, what: str, factor: Tensor) -> Tensor:
    """Images with their brightness, contrast, saturation or hue changed, each by its factor `[batch, 1, 1, 1]`."""
    if what == "brightness":
        return (images * factor).clamp_(0, 1)
    if what == "hue":
        return _hue_turned(images, factor)
    grey = images
    if images.shape[1] == 3:  # luma of ITU-R BT.601
        grey = (images * _constant((0.2989, 0.587, 0.114), images.device)).sum(1, keepdim=True)
    if what == "contrast":
        grey = grey.mean((1, 2, 3), keepdim=True)
    return (grey + (images - grey) * factor).clamp_(0, 1)


def _hue_turned(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle of HSV by `shift` of a whole turn (A. R. Smith, SIGGRAPH 1978)."""
    red, green, blue = images.split(1, 1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixth = sixth + 6 * shift
    phase = (_constant((5.0, 3.0, 1.0), images.device) + sixth).remainder(6)  # of red, green and blue
    return (value - chroma * torch.minimum(phase, 4 - phase).clamp(0, 1)).clamp_(0, 1)


class Resize(Transform):
    """Scale to (height, width), or so that one number is the shorter side, with antialiasing, on bytes or floats."""

    def __init__(
        self,
        size: int | Sequence[int],
        interpolation: str = "bilinear",
        max_size: int | None = None,
        antialias: bool = True,
    ) -> None:
        if max_size is not None:
            raise NotImplementedError
        self.size = [size] if isinstance(size, int) else list(size)
        if len(self.size) not in (1, 2) or not all(isinstance(n, int) and n >= 1 for n in self.size):
            raise ValueError(f"size={size}: expected [height, width] in pixels, or the shorter side")
        self.interpolation = _choice("interpolation", interpolation, "bilinear", "bicubic", "nearest")
        self.antialias = antialias

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        before = images.shape[2:]
        shape = self.size if len(self.size) == 2 else [self.size[0] * side // min(before) for side in before]
        if shape == list(before):
            return images
        check_size(*shape)
        if self.interpolation == "nearest":
            return torch.nn.functional.interpolate(images, shape, mode="nearest-exact")
        if images.device.type == "mps":  # has no antialiasing
            return self(images.cpu(), draws).to(images.device)
        can_scale = images.is_floating_point() or images.device.type == "cpu"  # the only device that scales bytes
        scaled = torch.nn.functional.interpolate(
            images if can_scale else images.float(), shape, mode=self.interpolation, antialias=self.antialias
        )
        return scaled if can_scale else scaled.round_().clamp_(0, 255).to(images.dtype)


_PLAIN = (Normalize, Resize)
_RANDOM = (RandomHorizontalFlip, RandomVerticalFlip, RandomRotation, RandomCrop, RandomErasing, ColorJitter)
BATCH_TRANSFORMS: dict[str, Any] = {cls.__name__: cls for cls in (*_PLAIN, *_RANDOM)}
