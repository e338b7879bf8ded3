"""Samples read one at a time: images, labels and draws known by hand, and what is said of those that are none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from splitmix import numbers, seed_of, signed
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from engine.data.draws import COPY, Draws
from engine.data.images import ImageFiles
from engine.data.reader import Reader, SampleStream, cannot_be_read, users_code
from engine.data.transforms import parse_transforms
from engine.errors import RequestError, RunError


class Samples(Dataset):
    """Samples as they are listed; an exception among them is raised."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


def reader_of(part: Any, *transforms: Any, classes: int = 3, skip: bool = False, training: bool = False) -> Reader:
    usual = {} if not training else {"training": True}
    return Reader(part, parse_transforms(transforms, "listed"), 5, classes, skip, **usual)


def read(part: Any, indices: Sequence[int], *transforms: Any, **given: Any) -> tuple[Tensor, Tensor, list[str]]:
    return reader_of(part, *transforms, **given).read(2, torch.tensor(indices))


def refusal(part: Any, indices: Sequence[int], **given: Any) -> str:
    """The line that is said of a batch that cannot be had, of a failure at work."""
    with pytest.raises(RunError) as refused:
        read(part, indices, **given)
    return str(refused.value)


def pixels(count: int) -> Tensor:
    """Images of two pixels, 2i and 2i + 1."""
    return torch.arange(2 * count, dtype=torch.uint8).view(count, 1, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


ORDER = [3, 19, 0, 7, 11, 4, 18, 2, 9, 1, 15, 6, 12, 10, 5, 17, 8, 14]  # more than are read before they are transformed


def test_samples_lie_in_the_order_that_was_asked_for() -> None:
    images, labels, skipped = read((pixels(20), torch.arange(20) * 3), ORDER)
    assert images.flatten(1).tolist() == [[2 * i, 2 * i + 1] for i in ORDER] and images.dtype == torch.uint8
    assert labels.tolist() == [3 * i for i in ORDER] and labels.dtype == torch.int64 and skipped == []


def test_each_sample_gets_the_draws_of_its_own() -> None:
    flipped = [numbers(5, 2, i, 1, 1)[0] < 0.5 for i in ORDER]  # the second of the transforms
    expected = [[2 * i + 1, 2 * i] if flip else [2 * i, 2 * i + 1] for i, flip in zip(ORDER, flipped, strict=True)]
    assert len(set(flipped)) == 2
    transforms = ["RandomVerticalFlip", "RandomHorizontalFlip"]
    images, _, _ = read((pixels(20), torch.arange(20)), ORDER, *transforms)
    assert images.flatten(1).tolist() == expected
    samples = [(image, 0) for image in pixels(20)[ORDER]]
    images, labels = reader_of((), *transforms).prepare(2, torch.tensor(ORDER), samples)  # read elsewhere
    assert images.flatten(1).tolist() == expected and labels.tolist() == [0] * len(ORDER)


class Drawing(Samples):
    """A number of each of the generators."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([torch.rand(()), random.random(), np.random.rand()]).view(1, 1, 3), 0


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]


def test_what_a_users_dataset_draws_is_of_the_seed_the_epoch_and_the_sample() -> None:
    before = states()
    indices = [*ORDER, ORDER[0] + COPY]  # the last one is the first come again in the epoch
    images, _, _ = read(Drawing(), indices)
    assert states() == before  # the run's generators go on as if nothing had been drawn
    for index, image in zip(indices, images.flatten(1), strict=True):
        bits = signed(seed_of(5, 2, index))
        drawn = [torch.rand((), generator=torch.Generator().manual_seed(bits)), random.Random(bits).random()]
        drawn.append(np.random.RandomState(bits & 0xFFFFFFFF).rand())
        assert image.tolist() == torch.tensor(drawn).tolist()


class Seeding:
    """Draws from torch's generator after seeding it, as those of torchvision do."""

    random, needs_float = True, False

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        torch.manual_seed(1)
        return images + torch.randint(0, 9, (1,), dtype=torch.uint8)


def test_a_transform_that_seeds_torchs_generator_leaves_the_runs_alone() -> None:
    before = states()
    Reader((pixels(4), torch.arange(4)), [Seeding()], 5, 4, False).read(1, torch.arange(4))
    assert states() == before


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 1), (1, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_memory_is_used_where_the_images_are_of_its_shape_and_type(shape: tuple[int, ...], kind: torch.dtype) -> None:
    into = torch.full((4, *shape), 9).to(kind)
    images, _, _ = reader_of((pixels(20), torch.arange(20))).read(1, torch.tensor([6, 2, 4]), into)
    assert images.flatten(1).tolist() == [[12, 13], [4, 5], [8, 9]]
    fits = shape == (1, 1, 2) and kind == torch.uint8
    assert (images.data_ptr() == into.data_ptr()) == fits
    assert torch.equal(into[3], torch.full(shape, 9).to(kind)) and (fits or bool((into == 9).all()))


def test_images_of_bytes_and_of_floats_become_floats() -> None:
    bright, half = (torch.full((1, 1, 1), 255, dtype=torch.uint8), 0), (torch.full((1, 1, 1), 0.5), 0)
    for samples, expected in (((bright, half), [1.0, 0.5]), ((half, bright), [0.5, 1.0])):
        images, _, _ = read(Samples(*samples), [0, 1])
        assert images.flatten().tolist() == expected and images.dtype == torch.float32


def test_images_of_different_sizes_are_named() -> None:
    small, large = (torch.zeros(1, 2, 3), 0), (torch.zeros(1, 2, 4), 0)
    assert refusal(Samples(large, small, small), [2, 1, 0]) == (
        "images of different sizes: sample 2 is 1x2x3, sample 0 is 1x2x4; "
        "put Resize: {size: [height, width]} first in dataset.train_transforms and eval_transforms"
    )
    assert "sample 0 is 3x2x3" in refusal(Samples((torch.zeros(3, 2, 3), 0), small), [1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Twelve images of one pixel, of the value 10 i, and labels i % 3; of these 1, 4 and 10 cannot be read."""
    for number in range(12):
        Image.new("L", (1, 1), 10 * number).save(tmp_path / f"{number:02}.png")
    for number in (1, 4, 10):
        (tmp_path / f"{number:02}.png").write_bytes(b"none")
    return ImageFiles(sorted(map(str, tmp_path.iterdir())), [i % 3 for i in range(12)], channels=1)


@pytest.mark.parametrize(
    ("indices", "instead"),
    [
        ([0, 1, 2, 4, 3], [0, 2, 2, 3, 3]),  # the next one that can be read
        ([2, 5, 3, 4], [2, 5, 3, 2]),  # after the last of them the first
        ([4, 1, 5, 10, 6], [5, 5, 5, 6, 6]),
        ([0, 2, 3, 5, 6, 7, 8, 1, 9, 11, 10], [0, 2, 3, 5, 6, 7, 8, 9, 9, 11, 0]),
    ],
)
def test_another_sample_of_the_batch_takes_the_place_of_what_cannot_be_read(
    files: ImageFiles, indices: list[int], instead: list[int]
) -> None:
    images, labels, skipped = read(files, indices, skip=True)
    assert images.flatten().tolist() == [10 * i for i in instead] and labels.tolist() == [i % 3 for i in instead]
    bad = [str(files.paths[i]) for i in indices if i in (1, 4, 10)]
    assert [line.partition(": cannot be read")[0] for line in skipped] == bad


def test_what_cannot_be_read_is_told_with_the_number_of_all(files: ImageFiles) -> None:
    """Also where more are read than before they are transformed."""
    first, way_out = str(files.paths[4]), "; dataset.skip_unreadable=true leaves "
    told = refusal(files, [4, 0, 2, 3, 5, 6, 7, 8, 9, 10, 1], training=True)
    assert told.startswith(f"{first}: cannot be read")
    assert told.endswith(f"; 3 of the 11 images of this batch cannot be read{way_out}them out of training")
    told = refusal(files, [3, 4], training=True)
    assert told.endswith(f"replace or remove it{way_out}it out of training")
    assert refusal(files, [3, 4]).endswith("replace or remove it")
    assert refusal(files, [10, 1, 4], skip=True) == (
        "none of the 3 images of a batch can be read; the first is sample 10"
    )


def test_a_number_of_unreadable_images_is_told() -> None:
    assert cannot_be_read(["a"], "the 9 images", training=False) == "a"
    assert cannot_be_read(["b", "a"], "the 9 images", training=False) == "b; 2 of the 9 images cannot be read"
    told = cannot_be_read(["a"] * 1234, "the 5,000 images", training=True)
    assert told == (
        "a; 1,234 of the 5,000 images cannot be read; dataset.skip_unreadable=true leaves them out of training"
    )


def test_files_of_different_sizes_are_named(files: ImageFiles) -> None:
    Image.new("L", (3, 2)).save(files.paths[1])
    told = refusal(files, [4, 0, 1], skip=True)  # the first of them is skipped
    assert told.startswith(f"images of different sizes: {files.paths[0]} is 1x1x1, {files.paths[1]} is 1x2x3; ")


# ---------------------------------------------------------------------------------------------------------------------
# What a user's Dataset gives

RAMP = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)  # height 2, width 3, three colours
EXPECTED = torch.arange(18).view(2, 3, 3).movedim(2, 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(RAMP), EXPECTED.to(torch.uint8)),
        (Image.fromarray(RAMP[:, :, 0]), EXPECTED[:1].to(torch.uint8)),
        (RAMP, EXPECTED.to(torch.uint8)),
        (RAMP[:, :, 0] / 100, EXPECTED[:1].double().div(100).float()),
        (RAMP.astype(np.float32), EXPECTED.float()),
        (EXPECTED.to(torch.uint8), EXPECTED.to(torch.uint8)),
        (EXPECTED[0].to(torch.uint8), EXPECTED[:1].to(torch.uint8)),
        (EXPECTED.double() / 100, EXPECTED.double().div(100).float()),
        (EXPECTED.half(), EXPECTED.float()),
    ],
)
def test_an_image_is_a_tensor_an_array_or_a_pillow_image(image: Any, expected: Tensor) -> None:
    images, _, _ = read(Samples((image, 0)), [0])
    assert images.dtype == expected.dtype and torch.equal(images[0], expected)
    assert torch.equal(read(Samples([image, 0]), [0])[0], images)  # a list is as good as a tuple


SHAPES = "expected uint8 or float [channels, height, width]"


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        ({"image": 1, "label": 2}, "is dict; expected (image, label)"),
        ("ab", "is str; expected (image, label)"),
        ((RAMP,), "is tuple; expected (image, label)"),
        ((RAMP, 0, 1), "is tuple; expected (image, label)"),
        (("picture.png", 0), "has an image of str; expected a tensor, an array or a Pillow image"),
        ((RAMP.astype(np.int64), 0), "has an image of ndarray; expected a tensor, an array or a Pillow image"),
        ((RAMP[None], 0), f"has an image torch.uint8 [1, 2, 3, 3]; {SHAPES}"),
        ((RAMP[0, 0], 0), f"has an image torch.uint8 [3]; {SHAPES}"),
        ((EXPECTED, 0), f"has an image torch.int64 [3, 2, 3]; {SHAPES}"),
        ((EXPECTED > 3, 0), f"has an image torch.bool [3, 2, 3]; {SHAPES}"),
        ((Image.new("P", (2, 2)), 0), "is a Pillow image with a palette; expected its colours: image.convert('RGB')"),
    ],
)
def test_samples_that_are_none(sample: Any, says: str) -> None:
    assert refusal(Samples((RAMP, 0), sample), [1]) == f"sample 1 of Samples {says}"


@pytest.mark.parametrize(
    ("label", "found"),
    [(0, 0), (2, 2), (1.0, 1), (True, 1), (np.int64(2), 2), (torch.tensor(2), 2), ([1], 1), (torch.tensor([[2]]), 2)],
)
def test_a_label_is_a_whole_number_below_the_classes(label: Any, found: int) -> None:
    _, labels, _ = read(Samples((RAMP, label), (RAMP, 0)), [0, 1])
    assert labels.tolist() == [found, 0] and labels.dtype == torch.int64


@pytest.mark.parametrize("label", [-1, 3, 0.5, -0.5, 2.5, [], [0, 1], [[0.25, 0.5, 0.25]], "cat", None, 10**30])
def test_labels_that_are_none(label: Any) -> None:
    says = f"sample 0 of Samples has label {label!r}; expected 0 to 2, as there are 3 classes"
    assert refusal(Samples((RAMP, label)), [0]) == says
    if isinstance(label, list):
        assert refusal(Samples((RAMP, torch.tensor(label))), [0]) == says


def test_a_label_may_be_a_probability_of_every_class() -> None:
    some, sure = [0.25, 0.5, 0.25], torch.tensor([0, 1, 0])
    _, labels, _ = read(Samples((RAMP, some), (RAMP, sure), (RAMP, 1)), [1, 0])
    assert labels.dtype == torch.float32 and labels.tolist() == [[0, 1, 0], some]
    _, labels, _ = read(Samples((RAMP, [0.5, 0.5])), [0], classes=2)
    assert labels.tolist() == [[0.5, 0.5]]
    _, labels, _ = read(Samples((RAMP, [0])), [0], classes=1)  # a class; one alone has no probability to tell
    assert labels.tolist() == [0] and labels.dtype == torch.int64


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 0, 1], [1, 2, 2]])
def test_labels_of_two_kinds_are_named(order: list[int]) -> None:
    part = Samples((RAMP, 0), (RAMP, 1), (RAMP, [0.25, 0.5, 0.25]))
    assert refusal(part, order) == (
        f"sample 2 has probabilities for its label, sample {next(i for i in order if i < 2)} a class; "
        "expected the same of all samples"
    )


def test_what_code_of_the_users_raises_is_one_line_and_names_the_kind() -> None:
    with pytest.raises(RunError, match=r"^sample 0 of Samples raised ValueError: no (\(test_data_reader\.py:\d+\))$"):
        read(Samples(ValueError("no")), [0])
    with pytest.raises(RunError, match=r"^ours$"), users_code("what"):
        raise RunError("ours")


def test_a_dataset_that_raises_one_of_our_errors_fails_at_work() -> None:
    """Not a wrong request, exit code 2, and not left out either, as a file that cannot be read is."""
    with pytest.raises(RunError, match=r"^ours$") as raised:
        read(Samples(RequestError("ours"), (RAMP, 0)), [0, 1], skip=True)
    assert raised.value.exit_code == 1


# ---------------------------------------------------------------------------------------------------------------------
# Iterable-style data


class Stream(IterableDataset):
    """Samples of one pixel, each a draw of torch's generator, labelled with their place; counts its passes."""

    def __init__(self, length: int) -> None:
        self.length, self.begun, self.epochs = length, 0, list[int]()

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        self.begun += 1
        for place in range(self.length):
            yield torch.rand(1, 1, 1), place

    def set_epoch(self, number: int) -> None:
        self.epochs.append(number)


def drawn(number: int, count: int) -> list[float]:
    """What torch's generator draws, one after another, in a pass of the run with seed 5."""
    generator = torch.Generator().manual_seed(signed(seed_of(5, number)))
    return [float(torch.rand((), generator=generator)) for _ in range(count)]


def stream_of(part: Any) -> SampleStream:
    return SampleStream(Reader(part, [], 5, 10, False))


def test_a_pass_draws_of_the_seed_and_its_number_and_of_nothing_else() -> None:
    part = Stream(4)
    for given, number in (((), 0), ((1,), 1), ((7,), 7)):
        samples = stream_of(part).once(None, *given)
        values = []
        for image, label in samples:
            values.append(float(image))
            assert label == len(values) - 1
            torch.rand(3)  # of the run's own
        assert values == drawn(number, 4)
    assert part.epochs == [0, 1, 7]
    assert [label for _, label in stream_of(part).once(3)] == [0, 1, 2]
    before = states()
    list(stream_of(part).once(None))
    assert states() == before


def taken(stream: SampleStream, position: int, count: int, limit: int | None = None) -> list[tuple[float, int]]:
    samples = stream.forever(position, limit)
    return [(float(image), label) for image, label in (next(samples) for _ in range(count))]


def test_passes_without_end_go_on_where_they_were_left() -> None:
    part = Stream(3)
    stream, expected = stream_of(part), [(value, i) for n in (1, 2, 3) for i, value in enumerate(drawn(n, 3))]
    assert taken(stream, 0, 2) == expected[:2] and taken(stream, 2, 3) == expected[2:5]
    assert taken(stream, 5, 3) == expected[5:8] and (part.begun, part.epochs) == (3, [1, 2, 3])
    assert taken(stream, 1, 4) == expected[1:5]  # a resumed run passes over what it had seen
    assert taken(stream_of(part), 7, 2) == expected[7:9]
    assert [label for _, label in taken(stream_of(part), 0, 5, limit=2)] == [0, 1, 0, 1, 0]


class Once(Stream):
    """Gives its samples in the first pass only."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return super().__iter__() if not self.begun else iter(())


def test_a_pass_without_a_sample_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"^Stream gives no sample in pass 1$"):
        taken(stream_of(Stream(0)), 0, 1)
    with pytest.raises(RunError, match=r"^Once gives no sample in pass 2$"):
        taken(stream_of(Once(3)), 0, 4)


class Odd(Stream):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(1, 1, 1), 0
        yield torch.zeros(1, 1, 1), 10

    def set_epoch(self, number: int) -> None:
        if number == 3:
            raise ValueError("only three")


def test_what_a_stream_gives_or_raises_is_told_with_its_place() -> None:
    with pytest.raises(RunError, match=r"^sample 1 of Odd has label 10; expected 0 to 9, as there are 10 classes$"):
        list(stream_of(Odd(2)).once(None))
    with pytest.raises(RunError, match=r"^set_epoch of Odd raised ValueError: only three \("):
        list(stream_of(Odd(2)).once(None, 3))
