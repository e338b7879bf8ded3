"""Augmentation against torchvision, sample by sample, with parameters drawn by a second implementation, splitmix.py."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from splitmix import GOLDEN, MASK, mix, numbers, seed_of, signed
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import datasets
from engine.data.augment import to_float
from engine.data.batches import Batches
from engine.data.draws import Draws, sample_seed
from engine.data.splits import load_splits
from engine.data.transforms import BATCH_TRANSFORMS, apply


def test_the_generator_is_splitmix64() -> None:
    """Its published first numbers from the seed 1234567."""
    found = [mix((1234567 + step * GOLDEN) & MASK) for step in range(1, 4)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
@pytest.mark.parametrize("epoch", [0, 1, 300])
def test_draws_are_those_of_the_second_implementation(seed: int, epoch: int) -> None:
    index = torch.tensor([0, 1, 2, 59_999, 10**9])
    assert int(sample_seed(seed, epoch)) == signed(seed_of(seed, epoch))
    assert sample_seed(seed, epoch, index).tolist() == [signed(seed_of(seed, epoch, i)) for i in index.tolist()]
    draws = Draws(seed, epoch, index)
    for place in (0, 1, 7):
        expected = [numbers(seed, epoch, i, place, 8) for i in index.tolist()]
        draws.at(place)
        assert torch.cat([draws.uniform(3), draws.uniform(5)], 1).tolist() == expected  # every call draws new ones
        assert draws.at(place).uniform(8).tolist() == expected
        many = draws.at(place).uniform(100)  # more than are kept
        assert many[:, :8].tolist() == expected and many.shape == (5, 100)
    bits = draws.at(2).integers(2)
    assert bits[3].tolist() == [
        signed(mix((seed_of(seed, epoch, 59_999) + ((2 << 40) + slot) * GOLDEN) & MASK)) for slot in (1, 2)
    ]


def test_a_window_shows_the_numbers_of_its_samples() -> None:
    index = torch.tensor([5, 3, 8, 3, 900])
    draws = Draws(4, 2, index)
    for begin, count in ((0, 2), (2, 2), (4, 1), (1, 3), (0, 5)):
        expected = [numbers(4, 2, i, 1, 2) for i in index[begin : begin + count].tolist()]
        assert draws.window(begin, count).at(1).uniform(2).tolist() == expected
        assert draws.window(begin, count).at(1).uniform(70)[:, :2].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Every transform, sample by sample

SEED, EPOCH = 3, 2
INDEX = [7, 0, 1, 2, 3, 4, 5, 6, 8, 90, 1000, 123_456]
PLACE = 1


def pictures(channels: int = 3, height: int = 14, width: int = 18) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (len(INDEX), channels, height, width), dtype=torch.uint8, generator=generator)


def flipped(axis: str) -> Any:
    def one(image: Tensor, u: list[float], p: float = 0.5) -> Tensor:
        flip = tv.horizontal_flip if axis == "horizontal" else tv.vertical_flip
        return flip(image) if u[0] < p else image

    return one


def cropped(
    image: Tensor, u: list[float], size: Any, padding: Any = 0, fill: Any = 0, padding_mode: str = "constant"
) -> Tensor:
    scale = 255 if image.is_floating_point() else 1
    fill = [f / scale for f in fill] if isinstance(fill, list) else fill / scale
    padded = tv.pad(image, padding, fill=fill, padding_mode=padding_mode)
    height, width = (size, size) if isinstance(size, int) else size
    top = math.floor(u[0] * (padded.shape[1] - height + 1))
    left = math.floor(u[1] * (padded.shape[2] - width + 1))
    return tv.crop(padded, top, left, height, width)


def turned(image: Tensor, u: list[float], degrees: Any, interpolation: str = "nearest", fill: Any = 0) -> Tensor:
    low, high = degrees if isinstance(degrees, list) else (-degrees, degrees)
    fill = [f / 255 for f in fill] if isinstance(fill, list) else fill / 255
    return tv.rotate(image, low + (high - low) * u[0], tv.InterpolationMode(interpolation), fill=fill)


def erased(
    image: Tensor, u: list[float], p: float = 0.5, scale: Any = (0.02, 0.33), ratio: Any = (0.3, 3.3), value: Any = 0.0
) -> Tensor:
    """The first of ten rectangles that is smaller than the image; place from two further numbers."""
    height, width = image.shape[1:]
    if u[0] >= p:
        return image
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[3 + attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u[13 + attempt])
        tall, broad = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if tall < height and broad < width:
            break
    else:
        return image
    top, left = math.floor(u[1] * (height - tall + 1)), math.floor(u[2] * (width - broad + 1))
    if value == "random":  # Box and Muller, from two numbers for every pixel of the whole image
        count = image.numel()
        radius, angle = u[23 : 23 + count], u[23 + count : 23 + 2 * count]
        normal = [
            math.sqrt(-2 * math.log(1 - r)) * math.cos(2 * math.pi * a) for r, a in zip(radius, angle, strict=True)
        ]
        filling = torch.tensor(normal).view_as(image)[:, top : top + tall, left : left + broad]
    else:
        filling = torch.tensor(value if isinstance(value, list) else [value]).view(-1, 1, 1)
    return tv.erase(image, top, left, tall, broad, filling)


def jittered(image: Tensor, u: list[float], **ranges: Any) -> Tensor:
    """The four changes in the order that the fifth number draws of the 24."""
    changes = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    names = list(changes)
    for number in list(permutations(range(4)))[math.floor(u[4] * 24)]:
        given = ranges.get(names[number])
        if given is None:
            continue
        if names[number] == "hue":
            low, high = given if isinstance(given, list) else (-given, given)
        else:
            low, high = given if isinstance(given, list) else (max(0, 1 - given), 1 + given)
        image = changes[names[number]](image, low + (high - low) * u[number])
    return image


def resized(
    image: Tensor, _: list[float], size: Any, interpolation: str = "bilinear", antialias: bool = True
) -> Tensor:
    mode = {"nearest": "nearest-exact"}.get(interpolation, interpolation)
    size = size if isinstance(size, list) else [size]
    return tv.resize(image, size, tv.InterpolationMode(mode), antialias=antialias)


def normalized(image: Tensor, _: list[float], mean: list[float], std: list[float]) -> Tensor:
    return tv.normalize(to_float(image), mean, std)


REFERENCE = {
    "RandomHorizontalFlip": flipped("horizontal"),
    "RandomVerticalFlip": flipped("vertical"),
    "RandomCrop": cropped,
    "RandomRotation": turned,
    "RandomErasing": erased,
    "ColorJitter": jittered,
    "Resize": resized,
    "Normalize": normalized,
}
CASES: list[tuple[str, dict[str, Any], float]] = [  # and the largest difference allowed
    ("RandomHorizontalFlip", {}, 0),
    ("RandomHorizontalFlip", {"p": 0.2}, 0),
    ("RandomVerticalFlip", {"p": 0.7}, 0),
    ("RandomCrop", {"size": 10}, 0),
    ("RandomCrop", {"size": [14, 18], "padding": 3}, 0),
    ("RandomCrop", {"size": [9, 20], "padding": [2, 1], "fill": 99}, 0),
    ("RandomCrop", {"size": [15, 16], "padding": [1, 2, 3, 4], "padding_mode": "reflect"}, 0),
    ("RandomCrop", {"size": 14, "padding": 4, "padding_mode": "symmetric"}, 0),
    ("RandomCrop", {"size": 14, "padding": 4, "padding_mode": "edge"}, 0),
    ("RandomCrop", {"size": 12, "padding": 2, "fill": [10, 20, 30]}, 0),
    ("RandomRotation", {"degrees": 40}, 1e-5),
    ("RandomRotation", {"degrees": [10, 170], "interpolation": "bilinear", "fill": 128}, 1e-4),
    ("RandomRotation", {"degrees": [-90, -80], "fill": [255, 0, 51]}, 1e-5),
    ("RandomErasing", {"p": 1.0}, 0),
    ("RandomErasing", {"p": 0.4, "value": [0.1, 0.5, 0.9]}, 0),
    ("RandomErasing", {"p": 0.9, "scale": [0.3, 0.9], "ratio": [0.5, 4.0], "value": 1.0}, 0),
    ("RandomErasing", {"p": 0.8, "value": "random"}, 1e-4),
    ("ColorJitter", {"brightness": 0.4}, 1e-6),
    ("ColorJitter", {"brightness": 0.4, "contrast": 0.6, "saturation": [0.2, 1.9], "hue": 0.3}, 1e-4),
    ("ColorJitter", {"hue": [0.1, 0.4], "contrast": [1.5, 2.0]}, 1e-4),
    ("Resize", {"size": [7, 30]}, 1),
    ("Resize", {"size": 9, "interpolation": "nearest"}, 0),
    ("Resize", {"size": [20, 8], "interpolation": "bicubic"}, 1),
    ("Normalize", {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}, 1e-5),
    ("Normalize", {"mean": [0.4], "std": [0.2]}, 1e-5),
]


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize(("name", "arguments", "tolerance"), CASES)
def test_a_transform_is_torchvisions_with_the_parameters_drawn(
    name: str, arguments: dict[str, Any], tolerance: float, kind: str
) -> None:
    transform = BATCH_TRANSFORMS[name](**arguments)
    images = pictures() if kind == "bytes" and not transform.needs_float else to_float(pictures())
    if name == "Resize" and kind == "floats":
        tolerance = 1e-5
    draws = Draws(SEED, EPOCH, torch.tensor(INDEX)).at(PLACE)
    results = transform(images, draws) if transform.random else transform(images)
    changed = 0
    for index, image, result in zip(INDEX, images, results, strict=True):
        u = numbers(SEED, EPOCH, index, PLACE, 23 + 2 * image.numel() if arguments.get("value") == "random" else 23)
        expected = REFERENCE[name](image, u, **arguments)
        assert result.shape == expected.shape and result.is_floating_point() == expected.is_floating_point()
        assert (result.double() - expected.double()).abs().max() <= tolerance, index
        changed += expected.shape != image.shape or not torch.equal(expected, image)
    assert changed >= 2


def test_grey_images_have_no_colour_to_change() -> None:
    images = to_float(pictures(channels=1))
    jitter = BATCH_TRANSFORMS["ColorJitter"](brightness=0.4, contrast=0.5, saturation=0.9, hue=0.5)
    results = jitter(images, Draws(SEED, EPOCH, torch.tensor(INDEX)).at(0))
    for index, image, result in zip(INDEX, images, results, strict=True):
        expected = jittered(image, numbers(SEED, EPOCH, index, 0, 5), brightness=0.4, contrast=0.5)
        assert (result - expected).abs().max() < 1e-5


def test_a_list_of_transforms_runs_in_its_order_each_with_draws_of_its_own() -> None:
    listed = [
        ("RandomCrop", {"size": [14, 18], "padding": 2}),
        ("Normalize", {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}),
        ("RandomHorizontalFlip", {}),
        ("RandomErasing", {"value": 3.0}),
    ]
    transforms = [(place, BATCH_TRANSFORMS[name](**arguments)) for place, (name, arguments) in enumerate(listed)]
    results = apply(transforms, pictures(), Draws(SEED, EPOCH, torch.tensor(INDEX)))
    for index, image, result in zip(INDEX, pictures(), results, strict=True):
        for place, (name, arguments) in enumerate(listed):
            image = REFERENCE[name](image, numbers(SEED, EPOCH, index, place, 23), **arguments)
        assert (result - image).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# More samples than random numbers are drawn for at once

AT_ONCE = 8192  # samples whose numbers are drawn at once
COUNT = 2 * AT_ONCE + 100
SHAPES = {
    "small": (1, 1, 2),
    "large": (1, 8, 16),
}  # whole batches of the first are gathered one, of the second many a time


def many(shape: str) -> datasets.ImageData:
    """All images alike, bright on the right, so that a flip is seen."""
    images = torch.zeros(COUNT, *SHAPES[shape], dtype=torch.uint8)
    images[..., -1] = 255
    part = (images, torch.arange(COUNT) % 2)
    return datasets.ImageData(part, (images[:2], torch.tensor([0, 1])), ["a", "b"])


def many_small() -> datasets.ImageData:
    return many("small")


def many_large() -> datasets.ImageData:
    return many("large")


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(("shape", "batch_size"), [("small", 50), ("small", 64), ("large", 64)])
def test_random_numbers_of_an_epoch_beyond_those_drawn_at_once(shape: str, batch_size: int, start: int) -> None:
    flip = ["RandomHorizontalFlip"]
    own = {"_target_": f"{__name__}.many_{shape}", "val_fraction": 0.0, "limit": None, "steps_per_epoch": None}
    splits, _ = load_splits({**own, "target_transform": None, "train_transforms": flip, "eval_transforms": []})
    run = {"batch_size": batch_size, "seed": 6, "shuffle": True, "drop_last": False, "limit_batches": None}
    batches = Batches(splits["train"], flip, torch.device("cpu"), training=True, **run)
    order = batches.order(3)[start * batch_size :].tolist()
    images = torch.cat([images for images, _ in batches.epoch(3, start=start)])
    flips = [numbers(6, 3, index, 0, 1)[0] < 0.5 for index in order]
    assert (images[:, 0, 0, 0] == 1).tolist() == flips
    assert flips[: AT_ONCE - 400] != flips[AT_ONCE : 2 * AT_ONCE - 400]
