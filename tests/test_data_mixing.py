"""Mixup and CutMix: what is mixed with what, in which shares, and what the labels say of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.data.batches import Batches
from engine.data.mixing import Mixing, _spans
from engine.data.splits import Split

CPU = torch.device("cpu")


def one_hot_images(count: int, height: int = 6, width: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Image i is i + 1 everywhere and of class i, so that every mixed pixel tells where it comes from."""
    labels = torch.arange(count)
    return (labels + 1.0)[:, None, None, None].expand(count, 2, height, width).clone(), labels, torch.eye(count)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, None), (1.0, None), (None, 1.0), (None, 0.3), (0.5, 1.0)])
def test_labels_say_what_an_image_is_made_of(mixup: float | None, cutmix: float | None, count: int) -> None:
    images, labels, hot = one_hot_images(count)
    mixed, targets = Mixing(mixup, cutmix, seed=3)(images, hot, epoch=2, step=5)
    assert mixed.shape == images.shape and targets.shape == (count, count) and targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(count)) and (targets >= 0).all()
    # An image's mean is that of its parts, each as often as its share: the labels' mean class, counted from 1.
    assert torch.allclose(mixed.mean((1, 2, 3)), targets @ (labels + 1.0), rtol=1e-5)
    assert ((targets > 0).sum(1) <= 2).all()
    assert torch.equal(mixed[:, 0], mixed[:, 1])  # all channels from the same places
    assert torch.equal(images, one_hot_images(count)[0])  # the data set's own are as they were


def test_mixup_is_a_weighted_mean_and_cutmix_a_rectangle() -> None:
    images, labels, hot = one_hot_images(64)
    mixed, targets = Mixing(1.0, None, 0)(images, hot, 1, 0)
    assert (mixed.amin((1, 2, 3)) == mixed.amax((1, 2, 3))).all()  # every pixel in the same shares
    shares = targets[torch.arange(64), labels]
    assert 0.3 < shares.mean() < 0.7 and shares.min() < 0.1 and shares.max() > 0.9  # Beta(1, 1) is uniform

    mixed, targets = Mixing(None, 1.0, 0)(images, hot, 1, 0)
    heights, widths = set(), set()
    for image, label, target in zip(mixed[:, 0], labels, targets, strict=True):
        foreign = image != label + 1.0
        rows, columns = foreign.any(1), foreign.any(0)
        assert torch.equal(foreign, rows[:, None] & columns[None, :])
        for line in (rows, columns):  # without a gap
            places = line.nonzero().flatten()
            assert len(places) == 0 or int(places[-1] - places[0]) + 1 == len(places)
        assert float(target[label]) == pytest.approx(1 - float(foreign.float().mean()), abs=1e-6)
        heights.add(int(rows.sum()))
        widths.add(int(columns.sum()))
    assert {1, 2, 3} <= heights and len(widths) > 4
    # Every place may lie in a rectangle, at the corners as well.
    often = torch.stack(
        [(Mixing(None, 1.0, 0)(images, hot, 1, step)[0][:, 0] != images[:, 0]).float().mean(0) for step in range(9)]
    ).mean(0)
    assert often.min() > 0.05


@pytest.mark.parametrize(
    ("centre", "length", "places"),  # of 10: as many as the length says, in the middle of them the centre
    [
        (0.5, 0.5, [3, 4, 5, 6, 7]),
        (0.59, 0.3, [4, 5, 6]),
        (0.5, 0.4, [3, 4, 5, 6]),  # of an even number the place before the centre is one more
        (0.5, 0.12, [5]),
        (0.5, 0.04, []),
        (0.0, 0.5, [0, 1, 2]),  # the rest lies outside
        (0.999, 0.5, [7, 8, 9]),
        (0.3, 1.0, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_places_of_a_side(centre: float, length: float, places: list[int]) -> None:
    (found,) = _spans(np.array([centre]), np.array([length]), 10)
    assert found.nonzero()[0].tolist() == places


def test_a_rectangle_takes_the_share_that_was_drawn() -> None:
    """Of Beta(a, a) with a large a all shares are one half: sides of sqrt(1/2) where no edge of the image cuts them."""
    images, _, hot = one_hot_images(64, 100, 200)
    mixed, _ = Mixing(None, 1e7, 0)(images, hot, 1, 0)
    foreign = mixed[:, 0] != images[:, 0]
    assert (int(foreign.any(2).sum(1).max()), int(foreign.any(1).sum(1).max())) == (71, 141)


def test_shares_follow_the_beta_distribution() -> None:
    """Of Beta(a, a) the mean is 1/2 and the variance 1 / (4 (2a + 1))."""
    images, labels, hot = one_hot_images(500, 1, 1)
    for alpha in (0.2, 1.0, 4.0):
        shares = [Mixing(alpha, None, 0)(images, hot, 1, step)[1][torch.arange(500), labels] for step in range(20)]
        share = torch.cat(shares).double()
        assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_with_both_each_image_is_mixed_in_one_of_the_ways() -> None:
    images, _, hot = one_hot_images(400)
    mixed, _ = Mixing(1.0, 1.0, 0)(images, hot, 1, 0)
    blended = (mixed.frac() != 0).any(dim=(1)).any(1).any(1)  # no pixel of a single image has a fraction
    cut = mixed.amin((1, 2, 3)) != mixed.amax((1, 2, 3))
    assert not (blended & cut).any()
    assert 150 < int(blended.sum()) < 250 and int(cut.sum()) > 100


def test_a_share_of_one_is_plain_training() -> None:
    """Of Beta(1e-9, 1e-9) nearly all shares are 0 or 1: then an image is itself or another, to the bit."""
    images = torch.rand(64, 3, 5, 5)
    labels = torch.arange(64) % 10
    mixed, targets = Mixing(1e-9, None, 0)(images, nn.functional.one_hot(labels, 10), 1, 0)
    whole = targets[torch.arange(64), labels] == 1
    assert int(whole.sum()) > 10
    own = torch.tensor([torch.equal(one, other) for one, other in zip(mixed, images, strict=True)])
    assert bool(own.any())
    logits = torch.randn(64, 10)
    plain = nn.functional.cross_entropy(logits[own], labels[own])
    assert torch.allclose(nn.functional.cross_entropy(logits[own], targets[own]), plain)


def test_soft_labels_are_mixed_as_they_are() -> None:
    soft = torch.rand(8, 3).softmax(1)
    _, targets = Mixing(1.0, None, 0)(torch.rand(8, 1, 2, 2), soft, 1, 0)
    assert torch.allclose(targets.sum(1), torch.ones(8)) and not torch.equal(targets, soft)


def batches_of(size: int, accumulate: int = 1, **how: int | bool) -> Batches:
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split((images, torch.arange(50) % 5), torch.arange(50), 5)
    mixing = Mixing(0.5, 0.5, seed=1)
    return Batches(split, [], CPU, batch_size=size, training=True, accumulate=accumulate, mixing=mixing, **how)  # type: ignore[arg-type]


def test_who_is_mixed_with_whom_depends_on_seed_epoch_and_step_alone() -> None:
    whole = list(batches_of(16).epoch(3))
    assert [len(labels) for _, labels in whole] == [16, 16, 16, 2]
    again = list(batches_of(16).epoch(3, start=2))  # resumed
    for one, other in zip(whole[2:], again, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    in_parts = list(batches_of(4, accumulate=4).epoch(3))  # the same steps, in micro-batches
    for one, other in zip(whole, in_parts, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    other_epoch = next(iter(batches_of(16, shuffle=False).epoch(1)))[1]
    assert not torch.equal(other_epoch, next(iter(batches_of(16, shuffle=False).epoch(2)))[1])


def test_evaluation_is_not_mixed() -> None:
    splits = batches_of(16)
    plain = Batches(splits.split, [], CPU, batch_size=16)
    images, labels = next(iter(plain.epoch(1)))
    assert labels.dtype == torch.int64 and torch.equal(
        (images * 255).round().to(torch.uint8), splits.split.part[0][:16]
    )  # type: ignore[index]
