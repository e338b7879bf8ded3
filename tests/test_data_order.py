"""Batches in this process: which samples, in which order, with which draws, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from splitmix import numbers, order_of
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from engine.data.augment import BATCH_TRANSFORMS, Resize
from engine.data.batches import Batches, _count_image_transforms
from engine.data.draws import Draws
from engine.data.images import ImageFiles
from engine.data.mixing import Mixing
from engine.data.splits import Split
from engine.data.transforms import PerImage
from engine.errors import RequestError, RunError

CPU, META = torch.device("cpu"), torch.device("meta")
FLIP = "RandomHorizontalFlip"


def split_of(count: int, shape: tuple[int, ...] = (1, 1, 2), **changes: Any) -> Split:
    """Samples in memory: every pixel of number i is i but the last, which is 200; its label is i."""
    images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, *shape).clone()
    images[:, :, :, -1] = 200
    return replace(Split((images, torch.arange(count)), torch.arange(count), num_classes=count), **changes)


def training(split: Split, *transforms: Any, batch_size: int = 4, device: torch.device = CPU, **given: Any) -> Batches:
    return Batches(split, transforms, device, batch_size=batch_size, training=True, **given)


def labels_of(batches: Batches, *where: int) -> list[list[int]]:
    """Of every batch the labels, after a look at the images."""
    found = []
    for images, labels in batches.epoch(*where):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert (images * 255).round().amin((1, 2, 3)).tolist() == labels.tolist()
        found.append(labels.tolist())
    return found


def in_batches(order: list[int], size: int) -> list[list[int]]:
    return [order[first : first + size] for first in range(0, len(order), size)]


# ---------------------------------------------------------------------------------------------------------------------
# Which samples, in which order


def test_what_is_usual() -> None:
    split = split_of(10)
    usual = training(split)
    assert labels_of(usual, 3) == in_batches(order_of(0, 3, 10), 4) and len(usual) == 3
    assert labels_of(usual) == [labels.tolist() for _, labels in usual] == in_batches(order_of(0, 0, 10), 4)
    evaluation = Batches(split, [], CPU, batch_size=4)
    assert labels_of(evaluation) == in_batches(list(range(10)), 4) == labels_of(evaluation, 5)
    given = {"shuffle": True, "drop_last": True}
    assert labels_of(Batches(split, [], CPU, batch_size=4, training=False, **given)) == labels_of(evaluation)
    assert labels_of(training(split, shuffle=False)) == labels_of(evaluation)


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "limit", "batches", "samples"),
    [
        (10, 4, False, None, 3, 10),
        (10, 4, True, None, 2, 8),
        (8, 4, False, None, 2, 8),
        (8, 4, True, None, 2, 8),
        (4, 4, True, None, 1, 4),
        (9, 4, False, 3, 3, 9),
        (9, 4, False, 2, 2, 8),
        (9, 4, False, 1, 1, 4),
        (9, 4, True, 5, 2, 8),
        (3, 4, False, None, 1, 3),
    ],
)
def test_how_many_batches_an_epoch_has(
    count: int, batch_size: int, drop_last: bool, limit: int | None, batches: int, samples: int
) -> None:
    found = training(split_of(count), batch_size=batch_size, drop_last=drop_last, limit_batches=limit, seed=7)
    assert (len(found), found.num_samples) == (batches, samples)
    expected = in_batches(order_of(7, 2, count), batch_size)[:batches]
    for start in range(batches + 2):
        assert labels_of(found, 2, start) == expected[start:]


def test_fewer_samples_than_a_batch_leave_none() -> None:
    with pytest.raises(RequestError) as refused:
        training(split_of(3), batch_size=4, drop_last=True)
    assert str(refused.value) == ("drop_last=true leaves no batch: 3 training samples, batch_size=4; lower batch_size")
    assert labels_of(Batches(split_of(3), [], CPU, batch_size=4, drop_last=True)) == [[0, 1, 2]]


def test_a_part_of_the_samples_is_shuffled_among_itself() -> None:
    chosen = torch.tensor([1, 3, 4, 8, 9])
    found = training(split_of(10, indices=chosen), batch_size=5)
    assert labels_of(found, 1) == [[chosen[place].item() for place in order_of(0, 1, 5)]]


# ---------------------------------------------------------------------------------------------------------------------
# Classes drawn equally often


UNEVEN = [0] * 3 + [1] * 40 + [3] * 10  # 53 samples, none of class 2


def balanced(seed: int = 0, **given: Any) -> Batches:
    """Samples of a part of a data set: the odd ones of 106."""
    labels = torch.tensor(UNEVEN).repeat_interleave(2)
    images = torch.arange(106, dtype=torch.uint8).view(106, 1, 1, 1).expand(-1, 1, 1, 2)
    split = Split((images, labels), torch.arange(53) * 2 + 1, num_classes=4, balance=True)
    return training(split, batch_size=8, seed=seed, **given)


def test_classes_are_drawn_equally_often_and_their_samples_too() -> None:
    found = balanced()
    drawn = dict.fromkeys(range(1, 106, 2), 0)
    for epoch in range(1, 25):
        order = found.order(epoch).tolist()
        assert len(order) == 53 == found.num_samples
        counts = [sum(UNEVEN[place // 2] == label for place in order) for label in (0, 1, 3)]
        assert sorted(counts) == [17, 18, 18]
        for label in (0, 1, 3):
            once = [order.count(place) for place in drawn if UNEVEN[place // 2] == label]
            assert max(once) - min(once) <= 1, "nothing comes again before all of its class have come"
        for place in order:
            drawn[place] += 1
        for label in (0, 1, 3):
            so_far = [count for place, count in drawn.items() if UNEVEN[place // 2] == label]
            assert max(so_far) - min(so_far) <= 1, "over epochs neither"
        if epoch % 3 == 0:
            assert [sum(drawn[place] for place in drawn if UNEVEN[place // 2] == label) for label in (0, 1, 3)] == (
                [53 * epoch // 3] * 3
            )


def test_what_is_drawn_is_of_the_seed_and_the_epoch() -> None:
    orders = {(seed, epoch): balanced(seed).order(epoch).tolist() for seed in (0, 1) for epoch in (5, 1, 2)}
    torch.manual_seed(7)
    assert orders[1, 2] == balanced(1).order(2).tolist()
    assert len({tuple(order) for order in orders.values()}) == 6
    large = {seed: {place for place in orders[seed, 1] if UNEVEN[place // 2] == 1} for seed in (0, 1)}
    assert large[0] != large[1]  # not the first ones of the file
    resumed, whole = balanced(), [labels.tolist() for _, labels in balanced().epoch(3)]
    assert [labels.tolist() for _, labels in resumed.epoch(3, start=4)] == whole[4:]
    labels = [label for batch in whole for label in batch]
    assert labels != sorted(labels)  # mixed within the epoch


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_a_sample_that_comes_again_in_an_epoch_is_augmented_anew(one_at_a_time: bool) -> None:
    """Of class 0 each of three samples comes six times: the copies flip as samples of other numbers would."""
    labels = torch.tensor(UNEVEN)
    images = torch.arange(53, dtype=torch.uint8).view(53, 1, 1, 1).expand(-1, 1, 1, 2).clone()
    images[..., 1] = 200
    transforms = [FLIP, "Identity"] if one_at_a_time else [FLIP]  # the second is torchvision's, for one image
    batches = training(Split((images, labels), torch.arange(53), 4, balance=True), *transforms, batch_size=8)
    order, seen = batches.order(1).tolist(), list[bool]()
    for x, _ in batches.epoch(1):
        seen += (x[:, 0, 0, 0] > x[:, 0, 0, 1]).tolist()
        assert ((x.amin((1, 2, 3)) * 255).round().int().tolist()) == order[len(seen) - len(x) : len(seen)]
    came: dict[int, int] = {}
    for place, flipped in zip(order, seen, strict=True):
        number = place + (came.get(place, 0) << 40)
        came[place] = came.get(place, 0) + 1
        assert flipped == (numbers(0, 1, number, 0, 1)[0] < 0.5)
    assert max(came.values()) == 6
    resumed = [flip for x, _ in batches.epoch(1, 4) for flip in (x[:, 0, 0, 0] > x[:, 0, 0, 1]).tolist()]
    assert resumed == seen[4 * 8 :]


def test_what_is_mixed_in_a_process_is_of_the_step() -> None:
    """Two processes that go on with the fourth step have their halves of its images, mixed as in one process."""
    whole = [images for images, _ in training(split_of(40), batch_size=8, mixing=Mixing(0.4, None, 0)).epoch(2)]
    for rank in (0, 1):
        how = {"rank": rank, "world_size": 2, "batch_size": 8, "mixing": Mixing(0.4, None, 0)}
        own = [images for images, _ in training(split_of(40), **how).epoch(2, 3)]
        assert len(own) == 2 and all(map(torch.equal, own, (x[4 * rank : 4 * rank + 4] for x in whole[3:])))


def test_only_training_draws_classes_equally_often() -> None:
    found = balanced()
    evaluation = Batches(found.split, [], CPU, batch_size=8)
    assert evaluation.order(1).tolist() == list(range(1, 106, 2))
    in_order = balanced(shuffle=False).order(1).tolist()
    assert in_order == sorted(found.order(1).tolist())
    assert balanced(limit_batches=2).num_samples == 16 and balanced(drop_last=True).num_samples == 48


# ---------------------------------------------------------------------------------------------------------------------
# A sampler


def with_sampler(sampler: Any, count: int = 10) -> Split:
    indices = torch.arange(count) * 2 + 1
    return replace(split_of(2 * count + 1), indices=indices, sampler=sampler)


def test_a_sampler_draws_of_the_seed_and_the_epoch() -> None:
    split = with_sampler(lambda indices: torch.randperm(len(indices))[:6])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = training(split, seed=9, drop_last=True)
    for epoch in (1, 2):
        assert found.order(epoch).tolist() == [2 * place + 1 for place in order_of(9, epoch, 10)[:6]]
    assert torch.equal(before, torch.get_rng_state())
    assert (len(found), found.num_samples) == (1, 4)
    evaluation = Batches(split, [], CPU, batch_size=4)
    assert evaluation.order(1).tolist() == list(range(1, 21, 2)) and evaluation.num_samples == 10


@pytest.mark.parametrize("places", [[0], [9], [0, 9, 9]])
def test_a_sampler_may_give_any_place_and_the_same_one_twice(places: list[int]) -> None:
    assert training(with_sampler(lambda _: places)).order(1).tolist() == [2 * place + 1 for place in places]


class Lengthy(list[int]):
    """Says that it is longer than it is."""

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        ([0, 10, 4], "gave 3 places from 0 to 10; expected 3, from 0 to 9"),
        ([5, -1, 9], "gave 3 places from -1 to 9; expected 3, from 0 to 9"),
        (Lengthy([2, 4]), "gave 2 places from 2 to 4; expected 3, from 0 to 9"),
        (Lengthy([2, 4, 6, 7]), "gave 4 places from 2 to 7; expected 3, from 0 to 9"),
        (Lengthy(), "gave 0 places; expected 3, from 0 to 9"),
    ],
)
def test_places_that_there_are_not(sampler: Any, says: str) -> None:
    batches = training(with_sampler(lambda _: sampler))
    with pytest.raises(RunError) as raised:
        batches.order(1)
    assert str(raised.value) == f"dataset: its sampler {says}"


def test_a_sampler_has_a_length_and_gives_something() -> None:
    with pytest.raises(RequestError, match=r"^dataset: its sampler list_iterator has no length; give it one$"):
        training(with_sampler(lambda _: iter([1, 2])))
    with pytest.raises(RequestError, match=r"^dataset: its sampler list gives no sample$"):
        training(with_sampler(lambda _: []))
    with pytest.raises(RunError, match=r"^dataset: its sampler raised ZeroDivisionError: "):
        training(with_sampler(lambda _: 1 // 0))


# ---------------------------------------------------------------------------------------------------------------------
# What the samples draw


class Noting:
    """Notes how many images it is given at once."""

    needs_float = random = False
    seen: ClassVar[list[int]] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(len(images))
        return images


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setitem(BATCH_TRANSFORMS, "Noting", Noting)
    Noting.seen = []
    return Noting.seen


@pytest.mark.parametrize(
    ("shape", "batch_size", "together"),
    [
        ((1, 4, 4), 4, [16, 16, 8]),  # a batch has 256 bytes: four are within 1,100
        ((1, 4, 4), 10, [10] * 4),  # 640: one
        ((1, 8, 8), 5, [5] * 8),  # 1,280: more than that, and one all the same
        ((1, 4, 4), 1, [17, 17, 6]),
        ((1, 3, 5), 4, [4] * 10),  # 240, no multiple of 64
        ((1, 1, 5), 13, [13, 13, 13, 1]),  # 260
    ],
)
def test_small_batches_are_made_together_where_each_begins_as_it_would_alone(
    monkeypatch: pytest.MonkeyPatch, seen: list[int], shape: tuple[int, ...], batch_size: int, together: list[int]
) -> None:
    monkeypatch.setattr("engine.data.batches.GATHER", 1100)
    batches = training(split_of(40, shape), "Noting", batch_size=batch_size)
    seen.clear()  # it was tried on one image
    found = list(batches.epoch(1))
    assert seen == together and all(images.data_ptr() % 64 == 0 for images, _ in found)
    assert [labels.tolist() for _, labels in found] == in_batches(order_of(0, 1, 40), batch_size)


def test_two_mebibytes_of_floats_are_made_at_once(seen: list[int]) -> None:
    images = torch.zeros(100, 1, 128, 128, dtype=torch.uint8)  # 65,536 bytes each, as floats
    split = Split((images, torch.arange(100)), torch.arange(100), num_classes=100)
    batches = training(split, "Noting", batch_size=1)
    seen.clear()
    assert len(list(batches.epoch(1))) == 100 and seen == [32, 32, 32, 4]


@pytest.mark.parametrize(
    ("batch_size", "drawn"), [(1, [8] * 5), (3, [6] * 6 + [4]), (4, [8] * 5), (7, [7] * 5 + [5]), (12, [12] * 3 + [4])]
)
def test_draws_are_made_for_so_many_samples_or_one_batch(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, drawn: list[int]
) -> None:
    counts: list[int] = []

    class Counted(Draws):
        def __init__(self, seed: int, epoch: int, index: Tensor) -> None:
            counts.append(len(index))
            super().__init__(seed, epoch, index)

    monkeypatch.setattr("engine.data.batches.AHEAD", 8)
    batches = training(split_of(40, (1, 1, 3)), FLIP, batch_size=batch_size)
    batches.sample_shape()
    monkeypatch.setattr("engine.data.batches.Draws", Counted)
    assert len(list(batches.epoch(1))) == len(batches) and counts == drawn


def flipped(images: Tensor) -> list[bool]:
    return [value > 0.5 for value in images[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 8)])  # of these two batches are made together
@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("start", [0, 2])
def test_each_sample_has_the_draw_of_its_own_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], batch_size: int, start: int
) -> None:
    """Also where draws are made for so few at once that there are several rounds of it."""
    monkeypatch.setattr("engine.data.batches.AHEAD", 8)
    monkeypatch.setattr("engine.data.batches.GATHER", 600)
    batches = training(split_of(40, shape), "RandomVerticalFlip", FLIP, batch_size=batch_size, seed=3)
    found: list[tuple[int, bool]] = []
    for images, labels in batches.epoch(2, start):
        found += zip(labels.tolist(), flipped(images), strict=True)
    order = order_of(3, 2, 40)[start * batch_size :]
    assert found == [(i, numbers(3, 2, i, 1, 1)[0] < 0.5) for i in order]


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Stream(IterableDataset):
    """Images as those in memory, labelled with their place; counts what was read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for place in range(self.length):
            self.read += 1
            yield torch.tensor([[[place, 200]]], dtype=torch.uint8), place


def stream_of(length: int, steps: int = 3, limit: int | None = None) -> Split:
    return Split(Stream(length), None, num_classes=length, limit=limit, steps=steps)


def test_epochs_of_a_stream_follow_one_another() -> None:
    batches = training(stream_of(14))  # an epoch has 3 batches of 4, one after the other
    assert (len(batches), batches.num_samples) == (3, 12)
    numbered = [place % 14 for place in range(48)]
    for epoch in (1, 2, 3):
        assert labels_of(batches, epoch) == in_batches(numbered, 4)[3 * (epoch - 1) : 3 * epoch]
    assert batches.split.part.read == 36
    for epoch, start in ((1, 0), (1, 1), (2, 0), (2, 2), (3, 1)):
        expected = in_batches(numbered, 4)[3 * (epoch - 1) + start : 3 * epoch]
        assert labels_of(training(stream_of(14)), epoch, start) == expected
    assert labels_of(training(stream_of(14))) == labels_of(training(stream_of(14)), 1)  # without a number the first
    assert labels_of(training(stream_of(14), limit_batches=2), 2) == in_batches(numbered, 4)[2:4]
    assert labels_of(training(stream_of(14, limit=5)), 1) == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]
    assert len(training(stream_of(3), batch_size=8, drop_last=True)) == 3


def test_a_stream_for_evaluation_is_read_to_its_end() -> None:
    batches = Batches(stream_of(10), [], CPU, batch_size=4)
    for _ in range(2):
        assert labels_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert labels_of(Batches(stream_of(10, limit=6), [], CPU, batch_size=4)) == [[0, 1, 2, 3], [4, 5]]
    batches = Batches(stream_of(10), [], CPU, batch_size=4, limit_batches=2)
    assert labels_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7]] and batches.split.part.read == 8


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_sample_of_a_stream_draws_is_of_its_number_in_the_epoch(
    monkeypatch: pytest.MonkeyPatch, start: int, accumulate: int
) -> None:
    monkeypatch.setattr("engine.data.batches.AHEAD", 8)
    how = {"batch_size": 4 // accumulate, "accumulate": accumulate}
    batches = training(stream_of(14, steps=6), FLIP, seed=3, **how)
    found = [flip for images, _ in batches.epoch(2, start) for flip in flipped(images)]
    assert found == [numbers(3, 2, i, 0, 1)[0] < 0.5 for i in range(4 * start, 24)]


def test_transforms_of_single_images_draw_of_the_number_too(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [PerImage(lambda image: image + torch.randint(0, 50, (1,), dtype=torch.uint8))]
    monkeypatch.setattr("engine.data.batches.parse_transforms", lambda listed, option: alone)
    whole = [images for images, _ in training(stream_of(14)).epoch(1)]
    rest = [images for images, _ in training(stream_of(14)).epoch(1, 1)]
    assert len(rest) == 2 and all(map(torch.equal, rest, whole[1:]))
    assert not torch.equal(whole[0] - whole[0].min(), whole[1] - whole[1].min())


def test_a_stream_has_batches_of_sixteen_million_samples_at_most() -> None:
    with pytest.raises(RequestError, match=r"^batch_size=16777217: of Stream, .* at most 16,777,216 samples are read"):
        training(stream_of(3), batch_size=(1 << 24) + 1)
    assert labels_of(Batches(stream_of(3), [], CPU, batch_size=1 << 24)) == [[0, 1, 2]]
    assert labels_of(Batches(split_of(3), [], CPU, batch_size=1 << 40)) == [[0, 1, 2]]  # in memory there are so many


def test_a_stream_without_a_sample() -> None:
    with pytest.raises(RequestError, match=r"^Stream gives no sample$"):
        training(stream_of(0)).sample_shape()


# ---------------------------------------------------------------------------------------------------------------------
# Samples that are read one at a time


class Read(Dataset):
    """The samples in memory once more, of a Dataset that counts what was read in this process."""

    def __init__(self, count: int) -> None:
        self.images, self.labels = split_of(count).part
        self.read = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        return self.images[index], int(self.labels[index])


def read_of(count: int) -> Split:
    return split_of(count, part=Read(count))


def test_usually_this_process_reads() -> None:
    batches = training(read_of(10))
    assert labels_of(batches, 2) == in_batches(order_of(0, 2, 10), 4) and batches.split.part.read == 10


def test_without_a_number_as_many_workers_as_cores_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.batches.cores", lambda: 3)
    for number, batch_size, count in ((None, 2, 3), (None, 5, 2), (0, 2, 0), (2, 2, 2), (9, 2, 5)):
        batches = training(read_of(10), num_workers=number, batch_size=batch_size)
        assert batches.workers is not None and batches.workers.count == count


def test_the_shape_of_a_sample_is_looked_up_once() -> None:
    batches = training(read_of(10), {"Resize": {"size": [5, 7]}}, FLIP)
    assert batches.sample_shape() == batches.sample_shape() == (1, 5, 7)
    assert batches.split.part.read == 1
    assert training(split_of(3, (2, 4, 6)), {"Resize": {"size": [5, 7]}}, FLIP).sample_shape() == (2, 5, 7)
    assert training(stream_of(3)).sample_shape() == (1, 1, 2)


def test_which_transforms_see_one_image_at_a_time() -> None:
    flip, alone, resize = BATCH_TRANSFORMS[FLIP](), PerImage(None), Resize([2, 2])
    for transforms, of_files, in_memory in (
        ([], 0, 0),
        ([flip, flip], 0, 0),
        ([alone, flip], 1, 1),
        ([flip, alone, flip, alone, flip], 4, 4),
        ([resize, flip], 1, 0),
        ([flip, resize, flip, resize], 2, 0),
        ([resize, alone, flip], 2, 2),
        ([alone, flip, resize, resize], 3, 1),
    ):
        assert _count_image_transforms(transforms, in_memory=False) == of_files
        assert _count_image_transforms(transforms, in_memory=True) == in_memory


def test_samples_in_memory_go_one_by_one_through_what_only_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def alone(image: Tensor) -> Tensor:
        taken.append(tuple(image.shape))
        return image

    monkeypatch.setattr("engine.data.batches.parse_transforms", lambda listed, option: [PerImage(alone)])
    assert labels_of(training(split_of(6)), 1) == in_batches(order_of(0, 1, 6), 4) and taken == [(1, 1, 2)] * 6


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Nine grey images of one pixel, the value is 10 i; 2, 5 and 6 cannot be read."""
    for number in range(9):
        Image.new("L", (1, 1), 10 * number).save(tmp_path / f"{number}.png")
    for number in (2, 5, 6):
        (tmp_path / f"{number}.png").write_bytes(b"none")
    return ImageFiles([str(tmp_path / f"{number}.png") for number in range(9)], list(range(9)), channels=1)


def test_skipped_images_are_told_after_the_epoch(files: ImageFiles, caplog: pytest.LogCaptureFixture) -> None:
    split = Split(files, torch.arange(9), num_classes=9, skip_unreadable=True)
    batches = training(split, batch_size=3, shuffle=False)
    values = [round(value * 25.5) for images, _ in batches.epoch(4) for value in images.flatten().tolist()]
    assert values == [0, 1, 0, 3, 4, 3, 7, 7, 8]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"epoch 4: 3 images could not be read and skipped; the first: {files.paths[2]}"
    )
    caplog.clear()
    list(training(replace(split, indices=torch.tensor([0, 1, 3]))).epoch(1))
    assert not caplog.records


def test_nothing_is_skipped_unasked(files: ImageFiles) -> None:
    split = Split(files, torch.arange(9), num_classes=9)
    for batches, end in (
        (training(split, shuffle=False), "; dataset.skip_unreadable=true leaves it out of training"),
        (Batches(replace(split, skip_unreadable=True), [], CPU, batch_size=4), ""),
    ):
        with pytest.raises(RunError, match=rf"2\.png: cannot be read as an image .*; replace or remove it{end}$"):
            list(batches.epoch())


def files_of(folder: Path, *made: tuple[tuple[int, int], int | None]) -> Split:
    """Files of a size (width, height) and an EXIF orientation; the first letters name them."""
    for name, (size, orientation) in zip("abcdef", made, strict=False):
        image, exif = Image.new("RGB", size), Image.Exif()
        if orientation:
            exif[274] = orientation
        image.save(folder / f"{name}.jpg", exif=exif)
    paths = sorted(map(str, folder.iterdir()))
    return Split(ImageFiles(paths, [0] * len(paths)), torch.arange(len(paths)), num_classes=2)


def test_files_of_one_size_as_they_are_seen(tmp_path: Path) -> None:
    split = files_of(tmp_path, ((3, 2), None), ((2, 3), 5), ((3, 2), 4), ((2, 3), 8), ((3, 2), 1))
    (tmp_path / "c.jpg").write_bytes(b"none")  # the reader says so
    assert training(split).sample_shape() == (3, 2, 3)


@pytest.mark.parametrize(
    ("other", "orientation", "seen_as"),
    [((3, 3), None, "3x3"), ((2, 2), None, "2x2"), ((2, 3), None, "2x3"), ((3, 2), 6, "2x3"), ((2, 3), 4, "2x3")],
)
def test_files_of_several_sizes_need_a_resize(
    tmp_path: Path, other: tuple[int, int], orientation: int | None, seen_as: str
) -> None:
    split = files_of(tmp_path, ((3, 2), None), ((3, 2), None), (other, orientation), ((9, 9), None))
    says = (
        f"images of different sizes: {tmp_path}/a.jpg is 3x2, {tmp_path}/c.jpg is {seen_as}; "
        "put Resize: {size: [height, width]} first in dataset."
    )
    with pytest.raises(RequestError) as refused:
        training(split)
    assert str(refused.value) == f"{says}train_transforms"
    with pytest.raises(RequestError) as refused:
        Batches(split, [], CPU, batch_size=4)
    assert str(refused.value) == f"{says}eval_transforms"
    assert training(split, {"Resize": {"size": [4, 5]}}).sample_shape() == (3, 4, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Where they come out


def test_batches_come_out_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for split in (split_of(6), read_of(6), stream_of(6, steps=2)):
        batches = training(split, device=META)
        assert batches.sample_shape() == (1, 1, 2)
        assert [(x.device.type, y.device.type) for x, y in batches.epoch(1)] == [("meta", "meta")] * 2
    monkeypatch.setattr("engine.data.batches.place", lambda part, device: part)  # as where it does not fit there
    batches = training(split_of(6), device=META)
    assert [(x.device.type, y.device.type) for x, y in batches.epoch(1)] == [("meta", "meta")] * 2


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("CUDA out of memory. Tried to allocate")])
@pytest.mark.parametrize(
    ("batch_size", "says"),
    [
        (4, "out of memory with batch_size=4; try batch_size=2 (a batch for cpu: "),
        (2, "out of memory with batch_size=2; try batch_size=1 (a batch for cpu: "),
        (1, "out of memory with batch_size=1; try a smaller model or smaller images (one image for cpu: "),
    ],
)
def test_memory_that_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, error: Exception, batch_size: int, says: str
) -> None:
    batches = training(split_of(6), batch_size=batch_size)

    def gather(order: Tensor, sizes: Any = None) -> Any:
        raise error

    monkeypatch.setattr(batches, "_gather", gather)
    with pytest.raises(RunError) as raised:
        next(batches.epoch(1))
    assert str(raised.value) == f"{says}{error})"
    monkeypatch.setattr(batches, "_first", lambda: gather(torch.zeros(0)))
    batches._shape = None
    with pytest.raises(RequestError, match=r"^out of memory with batch_size=1; .* \(one image for cpu: "):
        batches.sample_shape()


def test_an_error_of_our_own_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = training(split_of(6)).epoch(1)
    next(batches)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        batches.throw(RuntimeError("a bug"))


def test_targets_are_for_training() -> None:
    split = split_of(6, target_transform=torch.nn.functional.one_hot)
    (_, made), *_ = training(split, shuffle=False).epoch(1)
    assert made.dtype == torch.float32 and torch.equal(made, torch.eye(6)[:4])
    (_, made), *_ = Batches(split, [], CPU, batch_size=4).epoch(1)
    assert made.tolist() == [0, 1, 2, 3]
    split = replace(split, target_transform=lambda labels, classes: classes - 1 - labels)
    (_, made), *_ = training(split, shuffle=False).epoch(1)
    assert made.dtype == torch.int64 and made.tolist() == [5, 4, 3, 2]
    split = replace(split, target_transform=lambda labels, classes: labels.tolist())
    with pytest.raises(RunError, match=r"^dataset.target_transform gave list; expected a tensor$"):
        next(training(split).epoch(1))


# ---------------------------------------------------------------------------------------------------------------------
# Steps of several micro-batches


def test_a_step_of_micro_batches_is_a_batch_so_many_times_as_large() -> None:
    batches = training(split_of(10), batch_size=2, accumulate=3)
    assert (batches.batch_size, batches.micro_batch_size, len(batches)) == (6, 2, 2)
    assert labels_of(batches, 1) == in_batches(order_of(0, 1, 10), 6)
    resumed = training(split_of(20), batch_size=2, accumulate=3, seed=7)
    for start in range(5):
        assert labels_of(resumed, 2, start) == in_batches(order_of(7, 2, 20), 6)[start:]


def test_more_micro_batches_in_a_step_than_in_an_epoch_are_refused() -> None:
    """10 samples are 5 batches of 2, and 4 of 3 with a last one of one: so many, and no more, go into a step."""
    for size, most in ((2, 5), (3, 4), (9, 2)):
        training(split_of(10), batch_size=size, accumulate=most)
        with pytest.raises(RequestError) as error:
            training(split_of(10), batch_size=size, accumulate=most + 1)
        said = f"accumulate={most + 1}: an epoch has 10 samples, a step would take over {size * most:,}; "
        assert str(error.value) == f"{said}at most {most} goes with batch_size={size}"
    training(split_of(3), batch_size=10)  # one batch that is larger than the data is a smaller batch
    with pytest.raises(RequestError, match=r"^drop_last=true leaves no batch: 10 training samples, batch_size=4 accum"):
        training(split_of(10), batch_size=4, accumulate=3, drop_last=True)
