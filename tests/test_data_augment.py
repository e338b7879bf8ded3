"""Transforms: a function of (seed, epoch, index) for each sample, and torchvision's results for the same parameters."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as tv

from engine.data.augment import (
    ColorJitter,
    Normalize,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
    rotate,
    to_float,
)
from engine.data.draws import Draws, own_randomness, seed_everything
from engine.data.transforms import BATCH_TRANSFORMS, per_image

RANDOM = {
    "RandomHorizontalFlip": {},
    "RandomVerticalFlip": {},
    "RandomRotation": {"degrees": 45, "interpolation": "bilinear"},
    "RandomCrop": {"size": 12, "padding": 3},
    "RandomErasing": {"p": 0.8, "value": "random"},
    "ColorJitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.3},
}


def pictures(count=20, channels=3, height=16, width=20):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def run(name, images, seed=0, epoch=1, index=None):
    transform = BATCH_TRANSFORMS[name](**RANDOM[name])
    index = torch.arange(len(images)) if index is None else index
    return transform(to_float(images) if transform.needs_float else images, Draws(seed, epoch, index).at(0))


@pytest.mark.parametrize("name", RANDOM)
def test_a_sample_gets_the_same_in_any_batch(name):
    images = pictures()
    together = run(name, images)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 20):
        parts = [run(name, images[index], index=index) for index in order.split(size)]
        assert torch.equal(torch.cat(parts)[order.argsort()], together)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_differ_between_samples_epochs_and_seeds(name):
    same = pictures(1).expand(20, -1, -1, -1)
    results = run(name, same)
    assert len({tuple(image.flatten().tolist()) for image in results}) > 1
    assert not torch.equal(results, run(name, same, epoch=2))
    assert not torch.equal(results, run(name, same, seed=1))


def test_a_transform_draws_the_same_whatever_stands_before_it():
    draws = Draws(0, 1, torch.arange(5))
    alone = draws.at(1).uniform(3).clone()
    draws.at(0).uniform(40)
    assert torch.equal(draws.at(1).uniform(3), alone)
    assert not torch.equal(draws.at(2).uniform(3), alone)


def test_draws_are_uniform_and_independent():
    numbers = torch.cat([Draws(seed, 1, torch.arange(5000)).uniform(4) for seed in (0, 1)], 1).double()
    assert (numbers.mean(0) - 0.5).abs().max() < 0.02
    assert (numbers.std(0) - 12**-0.5).abs().max() < 0.02
    assert (torch.corrcoef(numbers.T) - torch.eye(8)).abs().max() < 0.06
    assert numbers.min() >= 0 and numbers.max() < 1


@pytest.mark.parametrize(
    ("transform", "reference"), [(RandomHorizontalFlip, tv.horizontal_flip), (RandomVerticalFlip, tv.vertical_flip)]
)
def test_flips_are_torchvisions(transform, reference):
    images = pictures()
    draws = Draws(0, 1, torch.arange(20))
    flipped = transform(p=0.4)(images, draws.at(0))
    chosen = draws.at(0).uniform(1)[:, 0] < 0.4
    assert 0 < chosen.sum() < 20
    for image, result, flip in zip(images, flipped, chosen, strict=True):
        assert torch.equal(result, reference(image) if flip else image)
    assert torch.equal(transform(p=1.0)(images, draws), reference(images))
    assert torch.equal(transform(p=0.0)(images, draws), images)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [[0.0], [0.2, 0.5, 1.0]])
def test_rotation_is_torchvisions(interpolation, fill):
    images = to_float(pictures())
    angles = torch.linspace(-171, 173, 20)
    turned = rotate(images, angles, interpolation, torch.tensor(fill))
    for image, angle, result in zip(images, angles.tolist(), turned, strict=True):
        expected = tv.rotate(image, angle, tv.InterpolationMode(interpolation), fill=fill)
        assert (result - expected).abs().max() < 1e-4


def test_rotation_draws_within_its_range(monkeypatch):
    seen = []
    monkeypatch.setattr("engine.data.augment.rotate", lambda images, degrees, *_: seen.append(degrees) or images)
    RandomRotation(degrees=[10, 50])(torch.zeros(1000, 1, 2, 2), Draws(0, 1, torch.arange(1000)))
    assert 10 <= seen[0].min() < 11 and 49 < seen[0].max() <= 50


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("fill", [0, 7])
def test_crop_is_torchvisions(mode, fill):
    images = pictures()
    draws = Draws(0, 1, torch.arange(20))
    cropped = RandomCrop(size=[12, 10], padding=[1, 2, 3, 4], fill=fill, padding_mode=mode)(images, draws.at(0))
    padded = tv.pad(images, [1, 2, 3, 4], fill=fill, padding_mode=mode)
    places = draws.at(0).uniform(2)
    tops, lefts = (places[:, 0] * (22 - 12 + 1)).long(), (places[:, 1] * (24 - 10 + 1)).long()
    assert len(set(tops.tolist())) > 3 and len(set(lefts.tolist())) > 3
    for image, result, top, left in zip(padded, cropped, tops.tolist(), lefts.tolist(), strict=True):
        assert torch.equal(result, tv.crop(image, top, left, 12, 10))


def test_crop_fills_each_channel_with_its_own_value():
    images = pictures()
    padded = RandomCrop(size=[20, 24], padding=2, fill=[1, 2, 3])(images, Draws(0, 1, torch.arange(20)))
    assert (padded[:, :, 0, :] == torch.tensor([1, 2, 3])[:, None]).all()
    assert torch.equal(padded[:, :, 2:-2, 2:-2], images)


@pytest.mark.parametrize(
    ("argument", "reference", "factor"),
    [
        ("brightness", tv.adjust_brightness, 1.4),
        ("contrast", tv.adjust_contrast, 0.6),
        ("saturation", tv.adjust_saturation, 1.7),
        ("hue", tv.adjust_hue, -0.2),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_colour_changes_are_torchvisions(argument, reference, factor, channels):
    images = to_float(pictures(channels=channels))
    images[0] = 0.5  # without colour
    changed = ColorJitter(**{argument: [factor, factor]})(images, Draws(0, 1, torch.arange(20)))
    assert (changed - reference(images, factor)).abs().max() < 1e-5


def test_erasing_covers_the_share_it_was_told():
    images = torch.ones(4000, 1, 32, 32)
    erased = RandomErasing(p=0.5, scale=[0.1, 0.2], ratio=[0.5, 2.0], value=0.0)(
        images, Draws(0, 1, torch.arange(4000))
    )
    share = (erased == 0).float().mean((1, 2, 3))
    assert 0.45 < (share > 0).float().mean() < 0.55
    assert share[share > 0].min() > 0.08 and share.max() < 0.22
    for image in erased[share > 0][:20]:  # a whole rectangle
        hole = (image[0] == 0).nonzero()
        height, width = (hole.amax(0) - hole.amin(0) + 1).tolist()
        assert height * width == len(hole) and 0.4 < height / width < 2.5


@pytest.mark.parametrize("size", [[24, 30], [9, 7], 8])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_resize_is_torchvisions(size, interpolation):
    images = pictures()
    resized = Resize(size, interpolation)(images)
    mode = {"nearest": "nearest-exact"}.get(interpolation, interpolation)
    expected = tv.resize(images, size if isinstance(size, list) else [size], tv.InterpolationMode(mode))
    assert resized.dtype == torch.uint8 and resized.shape == expected.shape
    assert (resized.int() - expected.int()).abs().max() <= 1


def test_normalize_is_torchvisions_on_bytes_and_floats():
    images, mean, std = pictures(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    expected = tv.normalize(to_float(images), mean, std)
    before = images.clone()
    for given in (images, to_float(images)):
        assert (Normalize(mean, std)(given) - expected).abs().max() < 1e-5
    assert torch.equal(images, before)


def test_bytes_become_the_floats_of_to_tensor():
    images = pictures()
    assert torch.equal(to_float(images), images.to(torch.float32) / 255)


def test_any_torchvision_transform_draws_per_sample_and_leaves_the_generators_alone():
    images = pictures(8)
    transform = per_image("RandomApply", {"transforms": [{"RandomPerspective": {"p": 1.0}}], "p": 1.0})
    before = torch.get_rng_state()
    with own_randomness():
        together = transform(images, Draws(0, 1, torch.arange(8)).at(0))
        alone = transform(images[5:6], Draws(0, 1, torch.tensor([5])).at(0))
        seed_everything(4)
    assert torch.equal(together[5:6], alone)
    assert torch.equal(torch.get_rng_state(), before)
    same = images[:1].expand(2, -1, -1, -1)
    with own_randomness():
        first, second = transform(same, Draws(0, 1, torch.arange(2)).at(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Normalize", {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}),
        ("Resize", {"size": [12, 12]}),
        *RANDOM.items(),
        ("RandomCrop", {"size": 12, "padding": 3, "fill": [1, 2, 3]}),
        ("RandomCrop", {"size": 12, "padding": 3, "padding_mode": "reflect"}),
        ("RandomRotation", {"degrees": 45, "fill": [1, 2, 3]}),
        ("RandomErasing", {"p": 0.8, "value": [1, 2, 3]}),
    ],
)
def test_nothing_is_copied_to_the_device_in_every_batch(name, arguments, monkeypatch):  # each copy waits for it
    class Copies(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type == "meta":
                self.found += [str(function) for a in args if isinstance(a, torch.Tensor) and a.device.type == "cpu"]
            return result

    # What is drawn goes there from pinned memory, which does not wait.
    def pinned(numbers, device):
        return torch.empty(numbers.shape, dtype=numbers.dtype, device=device)

    monkeypatch.setattr("engine.data.augment.send", pinned)
    transform = BATCH_TRANSFORMS[name](**arguments)
    images = torch.zeros(20, 3, 16, 20, device="meta")
    draws = Draws(0, 1, torch.arange(20))
    transform(images, draws.at(0))
    with Copies():
        assert transform(images, draws.at(0)).device.type == "meta"
    assert Copies.found == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RandomHorizontalFlip", {"p": 1.5}),
        ("Normalize", {"mean": [0.5], "std": [0.0]}),
        ("RandomRotation", {"degrees": [20, 10]}),
        ("RandomCrop", {"size": 8, "padding_mode": "wrap"}),
        ("ColorJitter", {"hue": 0.7}),
        ("ColorJitter", {"brightness": -1}),
        ("RandomErasing", {"scale": [0.5, 1.5]}),
        ("Resize", {"size": 0}),
        ("RandomCrop", {"size": [8, 0]}),
    ],
)
def test_arguments_that_make_no_sense_are_refused(name, arguments):
    with pytest.raises((ValueError, KeyError)):
        BATCH_TRANSFORMS[name](**arguments)


@pytest.mark.parametrize("ratio", [(0, 1), (-0.5, 1), (2, 1)])
def test_erasing_refuses_a_ratio_that_is_none(ratio):
    with pytest.raises(ValueError, match="ratio above 0"):
        RandomErasing(ratio=ratio)
