"""A YAML's list of transforms: what it may say, how much of it, and what a transform that does not fit is told as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splitmix import GOLDEN, MASK, mix, seed_of, signed
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.tv_tensors import Image

import engine.data.augment
from engine.data.augment import RandomCrop, Resize, Transform
from engine.data.draws import Draws, own_randomness
from engine.data.transforms import (
    PerImage,
    apply,
    check_arguments,
    name_and_arguments,
    parse_transforms,
    per_image,
    resized_to,
)
from engine.errors import RequestError, RunError

OPTION = "dataset.train_transforms"


def refusal(listed: Any) -> str:
    with pytest.raises(RequestError) as refused:
        parse_transforms(listed, OPTION)
    message = str(refused.value)
    assert message.startswith(f"{OPTION}: ") and "\n" not in message
    return message.removeprefix(f"{OPTION}: ")


def applied(listed: list[Any], images: Tensor) -> Tensor:
    transforms = list(enumerate(parse_transforms(listed, OPTION)))
    with own_randomness():
        return apply(transforms, images, Draws(0, 1, torch.arange(len(images))))


# ---------------------------------------------------------------------------------------------------------------------
# Names and arguments


def test_an_entry_is_a_name_or_a_name_with_arguments() -> None:
    assert name_and_arguments("Resize") == ("Resize", {})
    assert name_and_arguments({"Resize": None}) == ("Resize", {})
    assert name_and_arguments({"Resize": {"size": 3}}) == ("Resize", {"size": 3})
    for entry in (7, None, ["Resize"], {}, {"Resize": {}, "Pad": {}}, {"Resize": 3}, {"Resize": "3"}, {7: {}}):
        with pytest.raises(ValueError, match=r"expected Name or Name: \{argument: value\}"):
            name_and_arguments(entry)


def test_ours_come_before_torchvisions_which_stands_in_for_what_only_it_has() -> None:
    listed = ["RandomHorizontalFlip", {"RandomCrop": {"size": 4}}, {"RandomCrop": {"size": 4, "pad_if_needed": True}}]
    flip, crop, other = parse_transforms([*listed, "RandomInvert"], OPTION)[:3]
    assert type(flip) is engine.data.augment.RandomHorizontalFlip and flip.p == 0.5
    assert type(crop) is RandomCrop and (crop.height, crop.width) == (4, 4)
    assert type(other) is PerImage and type(other.transform) is v2.RandomCrop and other.random and not other.needs_float
    assert parse_transforms([], OPTION) == []


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (["RandomHorizontalFlop"], "there is no transform 'RandomHorizontalFlop' (did you mean RandomHorizontalFlip"),
        (["gaussian_blur"], "there is no transform 'gaussian_blur' (did you mean GaussianBlur"),
        (["Transform"], "there is no transform 'Transform'"),
        (["no_such"], "there is no transform 'no_such'"),
        (["functional"], "there is no transform 'functional'"),
        (["InterpolationMode"], "there is no transform 'InterpolationMode'"),
        (["Lambda"], "Lambda refuses its arguments: it takes a function"),
        (["MixUp"], "MixUp refuses its arguments: it mixes the samples"),
        (["CutMix"], "CutMix refuses its arguments: it mixes the samples"),
        ([{"RandomApply": {"transforms": ["Nonsense"]}}], "RandomApply refuses its arguments: torchvision has no"),
        ([{"RandomApply": {"transforms": ["Lambda"]}}], "RandomApply refuses its arguments: it takes a function"),
        ([{"RandomCrop": {"sighs": 3}}], "RandomCrop refuses its arguments: "),
        ([{"RandomAffine": {"degrees": 3, "interpolation": "wavy"}}], "RandomAffine refuses its arguments: 'wavy'"),
        ([["Resize"]], "['Resize'] refuses its arguments: ['Resize']: expected Name or Name"),
        ("Resize", "it is str; expected a list of transforms"),
        ({"Resize": 3}, "it is dict; expected a list of transforms"),
    ],
)
def test_what_is_no_transform_is_told_with_the_option(listed: Any, says: str) -> None:
    assert refusal(listed).startswith(says)


def test_texts_become_what_torchvision_takes() -> None:
    def built(name: str, **arguments: Any) -> Any:
        transform = per_image(name, arguments)
        assert transform is not None
        return transform.transform

    assert built("RandomAffine", degrees=0, interpolation="bilinear").interpolation is InterpolationMode.BILINEAR
    assert built("RandomAffine", degrees=0, interpolation=3).interpolation == 3  # Pillow's number
    assert built("ToDtype", dtype="torch.float64", scale=True).dtype is torch.float64
    assert built("Pad", padding=1, padding_mode="reflect").padding_mode == "reflect"
    chosen = built("RandomChoice", transforms=["RandomInvert", {"Pad": {"padding": [1, 2]}}], p=[1, 3])
    assert [type(one) for one in chosen.transforms] == [v2.RandomInvert, v2.Pad] and chosen.p == [0.25, 0.75]
    for name in ("no_such", "Transform", "functional", "InterpolationMode"):
        assert per_image(name, {}) is None


@pytest.mark.parametrize("text", ["torch.load", "torch.hub.load", "torch.no_such", "torch."])
def test_a_text_names_no_function(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Seen(v2.Identity):
        def __init__(self, what: Any) -> None:
            super().__init__()
            seen.append(what)

    monkeypatch.setattr(v2, "Seen", Seen, raising=False)
    per_image("Seen", {"what": text})
    assert seen == [text]


# ---------------------------------------------------------------------------------------------------------------------
# How much of it


def is_refused(listed: Any, says: str) -> bool:
    """Whether it is, and then that it says so."""
    try:
        check_arguments(listed)
    except ValueError as error:
        assert says in str(error)
        return True
    return False


def test_a_list_has_at_most_1000_values_and_16_levels() -> None:
    says = "it holds more than 1,000 values, or more than 16 levels of them"
    # The list itself is a value too, and so is what an argument is.
    assert not is_refused(["Resize"] * 999, says) and is_refused(["Resize"] * 1000, says)
    assert not is_refused([{"Pad": {"padding": [1] * 996}}], says) and is_refused(
        [{"Pad": {"padding": [1] * 997}}], says
    )

    def deep(levels: int, mapping: bool) -> Any:
        value: Any = 3
        for _ in range(levels):
            value = {"a": value} if mapping else [value]
        return [value]

    for mapping in (True, False):
        assert not is_refused(deep(15, mapping), says) and is_refused(deep(16, mapping), says)


def test_texts_and_names_have_at_most_100_characters() -> None:
    assert not is_refused([{"n" * 100: {"a" * 100: "v" * 100}}], "")
    assert is_refused(["v" * 101], " has 101 characters; expected at most 100")
    assert is_refused([{"n" * 101: {}}], "a name has 101 characters; expected at most 100")
    assert is_refused([{"N": {"a" * 1234: 3}}], "a name has 1,234 characters")
    assert is_refused([{"N": {"value": "v" * 101}}], "value has 101 characters")
    assert is_refused([{"N": {"value": ["v" * 101]}}], "value has 101 characters")


def test_values_are_numbers_texts_none_and_lists_of_them() -> None:
    assert not is_refused([{"N": {"a": None, "b": True, "c": 1.5, "d": "e", "f": [1, (2, None)], "g": {}}}], "")
    for value in (torch.zeros(2), {1, 2}, b"text", 3j):
        assert is_refused([{"N": {"a": value}}], f"a is {type(value).__name__}; expected numbers, texts and lists")
    assert is_refused([{"N": {"a": [object()]}}], "a is object; expected")
    for key in (5, None, 2.5):
        assert is_refused([{"N": {key: 1}}], f"{key!r} is no name; expected Name or Name: {{argument: value}}")


@pytest.mark.parametrize(
    ("argument", "most"),
    [
        ("num_ops", 32),
        ("mixture_width", 32),
        ("chain_depth", 32),
        ("padding", 4096),
        ("kernel_size", 64),
        ("sigma", 16),
        ("side_range", 8),
        ("scale_range", 2),
        ("degrees", 16_384),
    ],
)
def test_a_number_is_bounded_on_both_sides(argument: str, most: int) -> None:
    for value in (most, -most, float(most), [most, -most], [[most]]):
        assert not is_refused([{"N": {argument: value}}], "")
    for number in (most + 1, -most - 1, most + 0.5):
        for value in (number, [0, number], [[number]]):
            assert is_refused([{"N": {argument: value}}], f"{argument}={number}: at most {most:,}")
    for number in (10**400, float("inf"), float("nan"), -(10**99)):
        for value in (number, [0, number]):
            assert is_refused([{"N": {argument: value}}], f"{argument}=more: at most {most:,}")
    assert is_refused([{"N": {argument: 10**98}}], f"{argument}=10000000000000000000: at most")


def test_a_size_makes_at_most_64_million_pixels() -> None:
    says = "at most 64,000,000 are made"
    for name in ("size", "target_size"):
        for value in (8000, [8000, 8000], [16_000, 4000], (4000, 16_000), [16_384], [16_384, 1.5], [9000, 9000, 1]):
            assert not is_refused([{"N": {name: value}}], "")
        for value in (8001, 8001.0, [8000, 8001], [16_000, 4001], (4001, 16_000)):
            assert is_refused([{"N": {name: value}}], says)
    assert not is_refused([{"N": {"fill": [16_000, 16_000], "degrees": 9000}}], "")


# ---------------------------------------------------------------------------------------------------------------------
# On images


class Made:
    """In place of torchvision's: gives what it is told, or raises it."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, image: Tensor) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def made(result: Any, count: int = 2) -> Tensor:
    with own_randomness():
        return PerImage(Made(result))(torch.zeros(count, 3, 4, 5), Draws(0, 1, torch.arange(count)))


def test_results_of_single_images_are_a_batch_of_bytes_or_of_32_bit_floats() -> None:
    image = torch.ones(1, 2, 3)
    for given, dtype in ((torch.uint8, torch.uint8), (torch.float64, torch.float32), (torch.int64, torch.float32)):
        result = made(image.to(given), count=3)
        assert result.dtype == dtype and torch.equal(result, torch.ones(3, 1, 2, 3, dtype=dtype))
    assert type(made(Image(torch.zeros(1, 2, 3, dtype=torch.uint8)))) is Tensor


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (torch.zeros(2, 3), r"gave Tensor \[2, 3\]; expected a tensor \[channels, height, width\]"),
        (torch.zeros(1, 1, 2, 3), r"gave Tensor \[1, 1, 2, 3\]; expected"),
        ("text", r"gave str; expected a tensor"),
        ((torch.zeros(1, 2, 3), 4), "gave tuple; expected a tensor"),
    ],
)
def test_a_result_that_is_no_image_is_told(result: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(result)


def test_torchvisions_generator_is_seeded_with_the_samples_own_bits() -> None:
    class Noise(v2.Transform):
        def forward(self, image: Tensor) -> Tensor:
            return torch.rand(image.shape)

    index = torch.tensor([5, 0, 77])
    with own_randomness():
        results = PerImage(Noise())(torch.zeros(3, 1, 2, 2), Draws(6, 3, index).at(2))
    for i, result in zip(index.tolist(), results, strict=True):
        bits = mix((seed_of(6, 3, i) + ((2 << 40) + 1) * GOLDEN) & MASK)
        assert torch.equal(result, torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(signed(bits))))


def test_no_step_of_torchvisions_makes_an_image_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.data.augment, "MOST_PIXELS", 100)
    images = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    assert applied([{"Pad": {"padding": 3}}], images).shape == (1, 1, 10, 10)
    two = [{"Pad": {"padding": 3}}, {"Pad": {"padding": [1, 0]}}]
    for listed in (two, [{"RandomApply": {"transforms": [*two, {"CenterCrop": {"size": 4}}], "p": 1.0}}]):
        with pytest.raises(RunError, match="it would make an image of 10x12 pixels"):
            applied(listed, images)


class Picky(Transform):
    """Takes images and nothing else, raises what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __call__(self, images: Tensor) -> Tensor:
        if self.error:
            raise self.error
        return images + 1


def test_a_transform_that_draws_nothing_is_given_no_draws() -> None:
    images = torch.zeros(1, 1, 2, 2)
    for draws in (None, Draws(0, 1, torch.arange(1))):
        assert torch.equal(apply([(0, Picky())], images, draws), images + 1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("no\n  good"), "no good"),
        (TypeError("no good"), "no good"),
        (RuntimeError("no good"), "no good"),
        (KeyError("no good"), "KeyError: 'no good'"),
        (AssertionError(), "AssertionError: AssertionError"),
    ],
)
def test_a_transform_that_does_not_fit_is_named_with_its_place(error: Exception, says: str) -> None:
    images = torch.zeros(7, 3, 4, 5)
    for transform, name in ((Picky(error), "Picky"), (PerImage(Made(error)), "Made")):
        with pytest.raises(RunError) as raised, own_randomness():
            apply([(0, Picky()), (4, transform)], images, Draws(0, 1, torch.arange(7)))
        assert str(raised.value) == f"transform {name} (number 5) does not fit images [3, 4, 5]: {says}"
        assert raised.value.__cause__ is error and type(raised.value) is RunError


def test_memory_that_ran_out_is_no_transform_that_does_not_fit() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)) as raised:
            apply([(0, Picky(error))], torch.zeros(2, 1, 2, 2), None)
        assert raised.value is error


def test_the_first_resize_is_the_size_that_files_are_read_for() -> None:
    crop = RandomCrop(3)
    assert resized_to([Resize([10, 40]), crop]) == (10, 40) and resized_to([Resize(12)]) == (12, 12)
    assert resized_to([crop, Resize(12)]) is None and resized_to([]) is None
