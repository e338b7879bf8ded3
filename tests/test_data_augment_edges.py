"""Augmentation at the edges: numbers drawn just where something changes, and arguments at the ends of their range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from engine.data.augment import (
    BATCH_TRANSFORMS,
    ColorJitter,
    Normalize,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
    check_size,
)
from engine.data.draws import Draws
from engine.data.transforms import apply, parse_transforms


class Given:
    """Draws that are these numbers for every sample, and 0 beyond them."""

    def __init__(self, *numbers: float, samples: int = 1) -> None:
        self.numbers, self.samples = numbers, samples

    def uniform(self, count: int, device: Any = None) -> Tensor:
        numbers = [*self.numbers, *[0.0] * count][:count]
        return torch.tensor([numbers] * self.samples)


def applied(transform: Any, images: Tensor, *numbers: float) -> Tensor:
    """To images of floats or bytes, all with the same draws."""
    return transform(images, Given(*numbers, samples=len(images)))


def counting(*shape: int) -> Tensor:
    """An image `[1, *shape]` whose pixels, as bytes, are 1, 2, 3 and so on."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.uint8).view(1, *shape)


# ---------------------------------------------------------------------------------------------------------------------
# What all have in common


def test_the_largest_image_that_is_made_has_8000_by_8000_pixels() -> None:
    check_size(8000, 8000)
    check_size(64_000_000, 1)
    for height, width in ((8000, 8001), (64_000_001, 1)):
        with pytest.raises(ValueError, match=f"an image of {height}x{width} pixels; at most 64,000,000"):
            check_size(height, width)


@pytest.mark.parametrize("kind", [RandomHorizontalFlip, RandomVerticalFlip, RandomErasing])
def test_a_probability_is_from_0_to_1(kind: Any) -> None:
    for p in (0, 0.0, 1, 1.0):
        assert kind(p=p).p == p
    for p in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=f"p={p}: expected a probability, 0 to 1"):
            kind(p=p)


@pytest.mark.parametrize(
    ("name", "arguments", "makes_floats"),
    [
        ("RandomHorizontalFlip", {"p": 1.0}, False),
        ("RandomVerticalFlip", {"p": 1.0}, False),
        ("RandomCrop", {"size": 4, "padding": 2, "fill": 51}, False),
        ("Resize", {"size": [3, 4]}, False),
        ("RandomRotation", {"degrees": [90, 90], "fill": 51}, True),
        ("RandomErasing", {"p": 1.0, "value": 0.2}, True),
        ("ColorJitter", {"brightness": [0.5, 0.5]}, True),
        ("Normalize", {"mean": [0.5], "std": [0.25]}, True),
    ],
)
def test_bytes_stay_bytes_where_they_can_and_mean_what_their_floats_do(
    name: str, arguments: dict[str, Any], makes_floats: bool
) -> None:
    images = torch.randint(0, 256, (5, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    transform = [(0, BATCH_TRANSFORMS[name](**arguments))]
    draws = Draws(0, 1, torch.arange(5))
    of_bytes, of_floats = apply(transform, images, draws), apply(transform, images / 255, draws)
    assert of_bytes.dtype == (torch.float32 if makes_floats else torch.uint8)
    assert (of_bytes / (1 if makes_floats else 255) - of_floats).abs().max() <= 1 / 255  # Resize rounds
    assert (of_bytes != 0).any()


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("RandomCrop", {"size": 12, "pad_if_needed": True}, [12, 12]),
        ("RandomRotation", {"degrees": [90, 90], "expand": True}, [8, 6]),
        ("RandomRotation", {"degrees": 10, "center": [0, 0]}, [6, 8]),
        ("Resize", {"size": 12, "max_size": 14}, [10, 14]),  # the shorter side, until the longer one is 14
    ],
)
def test_arguments_that_only_torchvisions_own_version_has(name: str, arguments: dict[str, Any], shape: list) -> None:
    with pytest.raises(NotImplementedError):
        BATCH_TRANSFORMS[name](**arguments)
    transforms = list(enumerate(parse_transforms([{name: arguments}], "dataset.train_transforms")))
    images = torch.zeros(2, 3, 6, 8, dtype=torch.uint8)
    assert list(apply(transforms, images, Draws(0, 1, torch.arange(2))).shape) == [2, 3, *shape]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("RandomCrop", {"size": 4, "padding_mode": "wrap"}, "constant, edge, reflect or symmetric"),
        ("RandomCrop", {"size": 4, "padding": [1, 2, 3]}, r"padding=\[1, 2, 3\]: expected one number, two or four"),
        ("RandomCrop", {"size": 4, "padding": []}, "padding"),
        ("RandomCrop", {"size": [0, 4]}, "height and width in pixels"),
        ("RandomRotation", {"degrees": 9, "interpolation": "bicubic"}, "interpolation=bicubic: .* nearest or bilinear"),
        ("RandomRotation", {"degrees": -1}, r"-1: expected \(least, most\), or a number of at least 0"),
        ("Resize", {"size": 4, "interpolation": "area"}, "bilinear, bicubic or nearest"),
        ("Resize", {"size": [4, 4, 4]}, r"size=\[4, 4, 4\]: expected \[height, width\] in pixels, or the shorter side"),
        ("Resize", {"size": []}, "expected"),
        ("Resize", {"size": [4, 0]}, "expected"),
        ("Resize", {"size": [4, 4.5]}, "expected"),
        ("Normalize", {"mean": [0.5], "std": [0.5, 0.5]}, "expected as many"),
        ("Normalize", {"mean": [0.5, 0.5], "std": [0.5]}, "expected as many"),
        ("Normalize", {"mean": [0.5, 0.5], "std": [0.5, -1]}, "std above 0"),
        ("RandomErasing", {"value": "noise"}, "value=noise: expected a number, a list or random"),
        ("RandomErasing", {"value": "zzz"}, "value=zzz"),
        ("RandomErasing", {"scale": [-0.1, 0.5]}, "expected"),
        ("RandomErasing", {"scale": [0.5, 0.4]}, "expected"),
        ("RandomErasing", {"scale": [0.5, 1.1]}, "expected"),
        ("ColorJitter", {"contrast": [-0.1, 1]}, "factors of at least 0"),
        ("ColorJitter", {"saturation": -0.1}, "at least 0"),
        ("ColorJitter", {"hue": 0.6}, "hue=0.6: expected -0.5 to 0.5"),
        ("ColorJitter", {"hue": [-0.6, 0]}, "expected -0.5 to 0.5"),
        ("ColorJitter", {"hue": [0, 0.6]}, "expected -0.5 to 0.5"),
    ],
)
def test_an_argument_beyond_its_range_is_refused_and_told(name: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BATCH_TRANSFORMS[name](**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Each of them


def test_normalize_takes_one_value_or_one_a_channel() -> None:
    """(51 / 255 - 0.1) / 0.05 is 2, and (51 / 255 - 0.3) / 0.1 is -1."""
    images = torch.full((1, 2, 1, 1), 51, dtype=torch.uint8)
    for given in (images, images / 255):
        assert Normalize([0.1, 0.3], [0.05, 0.1])(given).flatten().tolist() == pytest.approx([2, -1], abs=1e-5)
        assert Normalize([0.1], [0.05])(given).flatten().tolist() == pytest.approx([2, 2], abs=1e-5)
        with pytest.raises(ValueError, match="mean has 3 values, but images have 2 channels"):
            Normalize([0.1] * 3, [0.1] * 3)(given)
        with pytest.raises(ValueError, match="mean has 2 values, but images have 1 channels"):
            Normalize([0.1] * 2, [0.1] * 2)(given[:, :1])


@pytest.mark.parametrize("kind", [RandomHorizontalFlip, RandomVerticalFlip])
def test_a_number_below_p_flips(kind: Any) -> None:
    image = counting(1, 2, 2)
    for p, drawn, flips in ((0.5, 0.5, False), (0.5, 0.49, True), (0.0, 0.0, False), (1.0, 1 - 2**-24, True)):
        assert torch.equal(applied(kind(p), image, drawn), image) != flips


def test_a_crop_may_be_one_pixel_or_all_of_the_image() -> None:
    image = counting(1, 3, 4)
    assert torch.equal(applied(RandomCrop([3, 4]), image, 0.999, 0.999), image)
    # Places 0 to 2 down and 0 to 3 across: 0.999 is the last of both, 0.34 and 0.74 the second and the third.
    assert applied(RandomCrop(1), image, 0.999, 0.999).flatten().tolist() == [12]
    assert applied(RandomCrop(1), image, 0.34, 0.74).flatten().tolist() == [4 + 3]
    for size in ([4, 4], [3, 5]):
        with pytest.raises(ValueError, match=f"size {size[0]}x{size[1]} is larger than the padded image, 3x4"):
            applied(RandomCrop(size), image)


def test_the_padding_of_a_crop_counts_left_top_right_bottom() -> None:
    """A pixel of 7, with 0, 1, 2 and 3 columns and rows of 9 around it."""
    pixel = torch.full((1, 1, 1, 1), 7, dtype=torch.uint8)
    full = applied(RandomCrop([5, 3], padding=[0, 1, 2, 3], fill=9), pixel)
    assert full[0, 0].tolist() == [[9, 9, 9], [7, 9, 9], [9, 9, 9], [9, 9, 9], [9, 9, 9]]
    full = applied(RandomCrop([1, 5], padding=[2, 0], fill=9), pixel)
    assert full[0, 0].tolist() == [[9, 9, 7, 9, 9]]
    with pytest.raises(ValueError, match="size 4x6 is larger than the padded image, 3x5"):
        applied(RandomCrop([4, 6], padding=[2, 1]), pixel)


def test_a_padded_image_may_not_fill_the_memory() -> None:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="an image of 8001x8001 pixels"):
        applied(RandomCrop(1, padding=4000), images)
    assert applied(RandomCrop(1, padding=[4000, 4000, 3999, 3999]), images).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "ratio"),
    [
        ([8, 8], 1.0),  # 8x8
        ([4, 16], 0.5),  # half of the area: 4x8, as tall as the image
        ([16, 4], 2.0),  # 8x4, as wide
    ],
)
def test_a_rectangle_as_large_as_the_image_does_not_fit(shape: list[int], ratio: float) -> None:
    images = torch.ones(1, 1, *shape)
    share = 1.0 if ratio == 1 else 0.5
    assert torch.equal(applied(RandomErasing(1.0, [share, share], [ratio, ratio]), images), images)


def test_a_rectangle_one_pixel_smaller_fits_and_reaches_every_edge() -> None:
    """7x7 of 8x8: where 0 is drawn it lies at the top left, where nearly 1 at the bottom right."""
    images = torch.ones(1, 2, 8, 8)
    erasing = RandomErasing(1.0, [49 / 64, 49 / 64], [1, 1], value=[0.25, 0.5])
    for drawn, first in ((0.0, 0), (0.999, 1)):
        expected = images.clone()
        expected[0, 0, first : first + 7, first : first + 7] = 0.25
        expected[0, 1, first : first + 7, first : first + 7] = 0.5
        assert torch.equal(applied(erasing, images, 0.999, drawn, drawn), expected)


def test_a_number_below_p_erases() -> None:
    images = torch.ones(1, 1, 8, 8)
    for p, drawn, erases in ((0.5, 0.5, False), (0.5, 0.49, True), (0.0, 0.0, False)):
        erased = applied(RandomErasing(p, [0.25, 0.25], [1, 1]), images, drawn)
        assert int((erased == 0).sum()) == (16 if erases else 0)  # 4x4


def test_erasing_may_take_any_share() -> None:
    for scale in ([0, 1], [0.2, 0.2], [0, 0], [1, 1]):
        RandomErasing(scale=scale, ratio=[0.1, 0.1])


@pytest.mark.parametrize("given", ["brightness", "contrast", "saturation"])
def test_a_factor_is_drawn_from_0_up_to_one_and_its_number(given: str) -> None:
    """1.5 means 0 to 2.5, as a factor below 0 makes no sense; half of the way is 1.25."""
    colour = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    colour[:, :, 1] *= 1.5
    reference = getattr(tv, f"adjust_{given}")
    place = ["brightness", "contrast", "saturation"].index(given)
    for drawn, factor in ((0.0, 0.0), (0.5, 1.25), (1.0, 2.5)):
        numbers = [0.0] * place + [drawn]
        for amount in (1.5, [0, 2.5]):
            changed = applied(ColorJitter(**{given: amount}), colour, *numbers)
            assert (changed - reference(colour, factor)).abs().max() < 1e-5


def test_hue_may_turn_by_half_the_circle() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    for amount, drawn, expected in (
        (0.5, 0.0, [0, 1, 1]),  # cyan
        ([-0.5, 0.5], 0.5, [1, 0, 0]),
        ([0, 1 / 3], 1.0, [0, 1, 0]),  # a third forward is green
        ([-1 / 3, 0], 0.0, [0, 0, 1]),
        (0.25, 0.5 + 1 / 6, [1, 0.5, 0]),  # a twelfth: orange
    ):
        turned = applied(ColorJitter(hue=amount), red, 0, 0, 0, drawn)
        assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_a_jitter_of_nothing_changes_no_bit() -> None:
    images = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2  # not even of odd values
    for jitter in (ColorJitter(), ColorJitter([1, 1], [1, 1], [1, 1], [0, 0])):
        assert torch.equal(applied(jitter, images, 0.3, 0.3, 0.3, 0.3, 0.5), images)


def test_a_jitter_changes_its_own_copy_and_grey_or_colour_only() -> None:
    images = torch.full((1, 3, 2, 2), 0.5)
    assert applied(ColorJitter(brightness=[0.5, 0.5]), images).max() == 0.25 and images.min() == 0.5
    for channels in (2, 4):
        with pytest.raises(ValueError, match=f"images have {channels} channels; expected 1 or 3"):
            applied(ColorJitter(brightness=0.5), torch.zeros(1, channels, 2, 2))


def test_rotation_of_a_quarter() -> None:
    """Counter-clockwise: what was on the right comes to the top."""
    image = counting(1, 2, 2).float() / 255
    for degrees, expected in ((90, [2, 4, 1, 3]), (-90, [3, 1, 4, 2]), (180, [4, 3, 2, 1])):
        turned = applied(RandomRotation([degrees, degrees]), image) * 255
        assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_an_image_of_the_size_asked_for_is_left_alone() -> None:
    images = counting(1, 4, 6)
    for size in ([4, 6], 4):
        assert Resize(size)(images) is images
    assert Resize([6, 4])(images).shape == (1, 1, 6, 4) and Resize(1)(images).shape == (1, 1, 1, 1)


def test_an_image_is_not_scaled_up_to_fill_the_memory() -> None:
    images = torch.zeros(1, 1, 2, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="an image of 16000x8000 pixels"):
        Resize(8000)(images)


@pytest.mark.parametrize("antialias", [True, False])
def test_antialiasing_is_torchvisions(antialias: bool) -> None:
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = tv.resize(image, [7, 9], antialias=antialias)
    assert (Resize([7, 9], antialias=antialias)(image).int() - expected.int()).abs().max() <= 1
    assert antialias == torch.equal(Resize([7, 9])(image), Resize([7, 9], antialias=antialias)(image))


class Elsewhere(Tensor):
    """Images that say they are on a GPU, which scales no bytes."""

    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_bytes_are_scaled_as_floats_where_the_device_cannot(interpolation: str) -> None:
    """Black beside white: bicubic overshoots both, which must not come out on the other side."""
    image = torch.tensor([0, 0, 0, 255, 255, 255], dtype=torch.uint8).view(1, 1, 1, 6).expand(1, 1, 6, 6).contiguous()
    resize = Resize([11, 13], interpolation)
    scaled = resize(image.as_subclass(Elsewhere)).as_subclass(Tensor)
    assert scaled.dtype == torch.uint8 and (int(scaled.min()), int(scaled.max())) == (0, 255)
    assert (scaled.int() - resize(image).int()).abs().max() <= 1
    floats = resize((image / 255).as_subclass(Elsewhere)).as_subclass(Tensor)
    assert torch.equal(floats, resize(image / 255))
