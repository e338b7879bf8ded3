"""From samples to batches: the same for any number of workers, batch size and start, and one line when it cannot be."""

import gc
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler

import datasets
import engine.data.devices
import engine.data.transforms
import predict
from engine.data.augment import Resize
from engine.data.batches import Batches
from engine.data.cache import _locked, cached_images
from engine.data.draws import Draws
from engine.data.reader import Reader
from engine.data.splits import divide, load_splits
from engine.data.transforms import parse_transforms
from engine.data.workers import Workers
from engine.errors import RequestError, RunError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BASE = {"val_fraction": 0.0, "limit": None, "train_transforms": [], "eval_transforms": [], "target_transform": None}
FILES = {"skip_unreadable": False, "cache": False, "test_fraction": 0.25, "channels": 3, "max_pixels": 10**6}
RUN = {"batch_size": 8, "seed": 0, "shuffle": True, "drop_last": False, "limit_batches": None, "num_workers": 0}
RESIZE = {"Resize": {"size": [16, 16]}}
AUGMENTED = [
    RESIZE,
    "RandomHorizontalFlip",
    "TrivialAugmentWide",  # only torchvision has it: one image at a time
    {"RandomRotation": {"degrees": 30}},
    {"ColorJitter": {"brightness": 0.4, "hue": 0.1}},
    {"Normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}},
    {"RandomErasing": {"p": 0.5}},
]


def settings(function="folder", **changes):
    """Settings of a dataset whose `_target_` is a function of this module."""
    return {**BASE, "steps_per_epoch": None, "_target_": f"{__name__}.{function}", **changes}


def batches_of(data_settings, split="train", transforms=None, training=True, **run):
    splits, _ = load_splits(data_settings)
    if transforms is None:
        transforms = data_settings["train_transforms" if training else "eval_transforms"]
    return Batches(splits[split], transforms, CPU, training=training, **{**RUN, **run})


def whole_epoch(batches, epoch=1):
    """(images, labels) of an epoch, sorted by sample."""
    images, labels = (torch.cat(parts) for parts in zip(*batches.epoch(epoch), strict=True))
    place = batches.order(epoch)[: len(labels)].argsort()
    return images[place], labels[place]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images of three colours and many sizes in every format, one folder a colour."""
    top = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    kinds = ["a.jpg", "b.png", "c.webp", "d.bmp", "e.gif", "f.tif", "g.jpeg", "h.png"]
    for name, colour in (("blue", (40, 60, 200)), ("green", (50, 180, 60)), ("red", (210, 50, 40))):
        (top / name).mkdir()
        for file in kinds:
            height, width = rng.integers(20, 60, 2)
            noise = rng.normal(0, 25, (height, width, 3)) + np.array(colour)
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            modes = {"e.gif": "P", "h.png": "RGBA", "g.jpeg": "CMYK"}
            image.convert(modes.get(file, "RGB")).save(top / name / file)
    return top


def photo_settings(photos, **changes):
    return {**settings("unused"), **FILES, "_target_": "datasets.image_folder", "root": str(photos), **changes}


# ---------------------------------------------------------------------------------------------------------------------
# The same samples whatever reads them


def in_memory():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return datasets.ImageData((images, torch.arange(50) % 5), (images[:10], torch.arange(10) % 5), list("abcde"))


@pytest.mark.parametrize("source", ["files", "memory"])
def test_augmentation_is_the_same_for_any_workers_and_batch_size(photos, source):
    given = photo_settings(photos, train_transforms=AUGMENTED)
    if source == "memory":
        given = settings("in_memory", train_transforms=AUGMENTED[1:])
    images, labels = whole_epoch(batches_of(given))
    for workers, size in ((0, 1), (0, 64), (1, 7), (3, 1), (3, 64)):
        other, other_labels = whole_epoch(batches_of(given, num_workers=workers, batch_size=size))
        assert torch.equal(images, other) and torch.equal(labels, other_labels)
    assert not torch.equal(images, whole_epoch(batches_of(given), epoch=2)[0])
    assert not torch.equal(images, whole_epoch(batches_of(given, seed=1))[0])


def test_workers_are_told_of_each_epoch_and_of_one_that_was_left(photos):
    given = photo_settings(photos, train_transforms=AUGMENTED)
    batches, alone = batches_of(given, num_workers=2, batch_size=3), batches_of(given, batch_size=3)
    next(iter(batches.epoch(7)))  # and no more of it
    for epoch in (1, 2):
        for (images, labels), (expected, expected_labels) in zip(batches.epoch(epoch), alone.epoch(epoch), strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["files", "memory"])
def test_an_epoch_goes_on_in_its_middle(photos, source, workers):
    given = photo_settings(photos, train_transforms=AUGMENTED)
    if source == "memory":
        given = settings(
            "in_memory", train_transforms=["RandomVerticalFlip", {"RandomCrop": {"size": 12, "padding": 2}}]
        )
    batches = batches_of(given, num_workers=workers, batch_size=4)
    whole, rest = list(batches.epoch(3)), list(batches.epoch(3, start=2))
    assert len(rest) == len(whole) - 2 == len(batches) - 2
    for (images, labels), (expected, expected_labels) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_training_with_dropout_gives_the_same_weights_for_any_workers(photos):
    def trained(workers):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        batches = batches_of(photo_settings(photos, train_transforms=AUGMENTED), num_workers=workers)
        for epoch in (1, 2):
            for images, labels in batches.epoch(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
        return model[2].weight.detach()

    alone = trained(0)
    for workers in (1, 3):
        assert torch.equal(alone, trained(workers))


def test_reading_draws_nothing_from_the_runs_generators(photos):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for given in (photo_settings(photos, train_transforms=AUGMENTED), settings("drawing"), settings("in_memory")):
        for workers in (0, 2):
            batches = batches_of(given, num_workers=workers)
            batches.sample_shape()
            list(batches.epoch(1))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# In memory


def test_batches_in_memory_are_the_samples_in_the_order_of_the_epoch():
    images, labels = in_memory().train
    batches = batches_of(settings("in_memory"), batch_size=16, drop_last=True)
    assert len(batches) == 3 and batches.num_samples == 48
    order = batches.order(4)
    for number, (found, found_labels) in enumerate(batches.epoch(4)):
        chosen = order[number * 16 : number * 16 + 16]
        assert torch.equal(found, images[chosen].float() / 255) and torch.equal(found_labels, labels[chosen])
    assert number == 2 and not torch.equal(order, batches.order(5))


def odd_sizes():
    images = torch.arange(20 * 75, dtype=torch.int64).remainder(256).to(torch.uint8).view(20, 3, 5, 5)
    return datasets.ImageData((images, torch.arange(20) % 2), (images, torch.arange(20) % 2), ["a", "b"])


@pytest.mark.parametrize("function", ["in_memory", "odd_sizes"])
def test_every_batch_begins_at_a_multiple_of_64_bytes(function):  # else a resumed run could round in another way
    for images, _ in batches_of(settings(function), batch_size=3).epoch(1):
        assert images.data_ptr() % 64 == 0


def test_samples_of_one_part_are_placed_on_the_device_once():
    splits, _ = load_splits(settings("in_memory", val_fraction=0.2))
    placed = [Batches(splits[name], [], torch.device("meta"), **RUN).in_memory for name in ("train", "val", "test")]
    for train, val, test in zip(*placed, strict=True):
        assert train.device.type == "meta" and train is val and train is not test
    del placed, train, val, test
    gc.collect()
    assert not engine.data.devices._placed  # nothing is kept longer than it is used


def many():
    """20,000 images of two pixels, of which the right one is brighter."""
    images = torch.tensor([10, 20], dtype=torch.uint8).expand(20_000, 1, 1, 2).clone()
    labels = torch.arange(20_000) % 5
    return datasets.ImageData((images, labels), (images[:10], labels[:10]), list("abcde"))


@pytest.mark.parametrize(("size", "start"), [(100, 0), (100, 80), (5001, 1), (9001, 0), (64, 120)])
def test_each_of_many_samples_has_the_draw_of_its_own(size, start):
    batches = batches_of(settings("many", train_transforms=["RandomHorizontalFlip"]), batch_size=size, seed=3)
    flipped = torch.cat([images[:, 0, 0, 0] > images[:, 0, 0, 1] for images, _ in batches.epoch(2, start)])
    order = batches.order(2)[start * size :]
    assert len(flipped) == len(order) > 10_000
    for place in [0, 8191, 8192, 8193, *range(7000, len(order), 97)]:
        alone = Draws(3, 2, order[place : place + 1]).at(0).uniform(1)  # for this sample and no other
        assert bool(flipped[place]) == bool(alone[0, 0] < 0.5)


def test_label_transform_for_training_only():
    given = settings("in_memory", target_transform="torch.nn.functional.one_hot")
    _, labels = next(iter(batches_of(given)))
    assert labels.dtype == torch.float32 and list(labels.shape) == [8, 5] and (labels.sum(1) == 1).all()
    logits = torch.randn(8, 5)
    expected = nn.functional.cross_entropy(logits, labels.argmax(1))
    assert torch.allclose(nn.CrossEntropyLoss()(logits, labels), expected)
    _, labels = next(iter(batches_of(given, split="test", training=False)))
    assert labels.dtype == torch.int64
    with pytest.raises(RequestError, match=r"dataset\.target_transform=torch\.nn\.functional\.one_hut"):
        batches_of(settings("in_memory", target_transform="torch.nn.functional.one_hut"))


# ---------------------------------------------------------------------------------------------------------------------
# Any Dataset


class Drawing(Dataset):
    """Draws its images from every generator there is."""

    targets = tuple(i % 4 for i in range(40))

    def __len__(self):
        return 40

    def __getitem__(self, index):
        noise = torch.rand(1, 4, 4) + random.random() + float(np.random.rand())
        return noise / 3, self.targets[index]


class Plain(Drawing):
    """Says its labels only with its samples; Pillow images."""

    targets = None

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4), (index, 0, 0)), np.int64(index % 4)


class Stream(IterableDataset):
    """Counts, with some noise of torch's generator; has no length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            yield torch.full((1, 4, 4), i, dtype=torch.uint8) + torch.randint(0, 2, (1,), dtype=torch.uint8), i % 4


class Dying(Drawing):
    """Its reader gets the signal that a write to full shared memory gives."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGBUS)
        return super().__getitem__(index)


def drawing():
    return datasets.ImageData(Drawing(), Drawing(), list("abcd"))


def plain(classes=4):
    return datasets.ImageData(Plain(), Plain(), list("abcdefgh")[:classes])


def dying():
    return datasets.ImageData(Dying(), Dying(), list("abcd"))


def stream(count=30):
    return datasets.ImageData(Stream(count), Stream(10), list("abcd"))


def balanced():
    images, labels = in_memory().train
    weights = (labels == 2).double() + 1e-9  # class 2 alone

    def sampler(indices):
        return WeightedRandomSampler(weights[indices].tolist(), 20)

    return datasets.ImageData((images, labels), (images, labels), list("abcde"), sampler=sampler)


def unfit(**changes):
    return datasets.ImageData(**{**vars(in_memory()), **changes})


def empty_test():
    return unfit(test=(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)))


def float_images():
    return unfit(train=(torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64)))


def label_outside():
    return unfit(train=(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 9])))


def test_a_users_dataset_draws_the_same_in_any_worker():
    images, labels = whole_epoch(batches_of(settings("drawing")))
    for workers, size in ((1, 3), (3, 16)):
        other, other_labels = whole_epoch(batches_of(settings("drawing"), num_workers=workers, batch_size=size))
        assert torch.equal(images, other) and torch.equal(labels, other_labels)
    assert not torch.equal(images[0], images[1])


def test_batches_from_workers_stay_what_they_are():  # also when the memory that they came in is used again
    batches = batches_of(settings("drawing"), num_workers=2, batch_size=3)
    held, expected = list(batches.epoch(1)), list(batches_of(settings("drawing"), batch_size=3).epoch(1))
    assert len(held) > 2 * batches.workers.AHEAD + 1 and batches.workers.slots.memory is not None
    for (images, labels), (same, same_labels) in zip(held, expected, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, same_labels)


# --- files that a Dataset holds open


class Lazy(Dataset):
    """Opens a plain file on first use and holds it open, as those of HDF5, LMDB or tar do."""

    targets = tuple(i % 4 for i in range(150))

    def __init__(self, path):
        self.path, self.file = path, None

    def __len__(self):
        return 150

    def __getitem__(self, index):
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self.file.seek(index * 12)
        time.sleep(0.0003)  # in which another process that shares the file would move its place
        return torch.frombuffer(bytearray(self.file.read(12)), dtype=torch.uint8).view(3, 2, 2), self.targets[index]


def lazy(path):
    part = Lazy(path)
    return datasets.ImageData(part, part, list("abcd"))


def test_a_file_that_a_dataset_opens_on_first_use_is_opened_in_each_worker(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 3, 2, 2), dtype=np.uint8)
    (tmp_path / "pixels").write_bytes(pixels.tobytes())
    expected = torch.from_numpy(pixels).float() / 255
    splits, _ = load_splits(settings("lazy", path=str(tmp_path / "pixels"), val_fraction=0.2))
    run = {**RUN, "num_workers": 3}
    several = [Batches(splits[name], [], CPU, training=name == "train", **run) for name in ("train", "val", "test")]
    assert [batches.sample_shape() for batches in several] == [(3, 2, 2)] * 3
    started = [worker.pid for worker in several[0].workers.loader._iterator._workers]
    for epoch in (1, 2):
        for batches in several:
            images = torch.cat([images for images, _ in batches.epoch(epoch)])
            assert torch.equal(images, expected[batches.order(epoch)])
    assert splits["train"].part.file is None  # nothing was read here
    assert started == [worker.pid for worker in several[0].workers.loader._iterator._workers]
    alone = Batches(splits["train"], [], CPU, training=True, **RUN)
    assert torch.equal(torch.cat([images for images, _ in alone.epoch(1)]), expected[alone.order(1)])


@pytest.fixture
def forkserver():
    """Workers are started as Python 3.14 does on Linux; their server has imported torch already."""
    import processes  # noqa: F401

    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.forkserver.ensure_running()
    yield
    multiprocessing.set_start_method(before, force=True)


def test_workers_that_are_not_forked_give_the_same_batches_through_the_same_memory(forkserver, monkeypatch):
    in_slots = []
    answers = Workers._answers

    def noted(self, asked):
        for answer in answers(self, asked):
            in_slots.append(isinstance(answer[0], int))
            yield answer

    monkeypatch.setattr(Workers, "_answers", noted)
    given = settings("drawing", train_transforms=["RandomInvert", "RandomVerticalFlip"])
    alone, batches = batches_of(given), batches_of(given, num_workers=2)
    assert batches.sample_shape() == alone.sample_shape()
    in_slots.clear()
    for epoch in (1, 2):
        for one, other in zip(batches.epoch(epoch), alone.epoch(epoch), strict=True):
            assert all(map(torch.equal, one, other))
    assert in_slots and all(in_slots)


class Unsendable(Drawing):
    def __init__(self):
        self.file = open(os.devnull)  # noqa: SIM115


def unsendable():
    return datasets.ImageData(Unsendable(), Unsendable(), list("abcd"))


def test_a_dataset_that_cannot_be_sent_to_a_worker_is_told(forkserver):
    with pytest.raises(
        RunError, match=r"^Unsendable cannot be sent to worker processes \(cannot pickle .*num_workers=0"
    ):
        list(batches_of(settings("unsendable"), num_workers=1).epoch(1))


def test_no_more_workers_are_started_than_there_are_batches():
    batches = batches_of(settings("drawing"), num_workers=50, batch_size=16, limit_batches=2)
    assert len(list(batches.epoch(1))) == 2 and len(batches.workers.loader._iterator._workers) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_larger_than_any_number_of_samples_is_all_of_them(workers):
    for function in ("drawing", "in_memory"):
        given = settings(function, train_transforms=["RandomVerticalFlip"])
        [(images, _)] = batches_of(given, num_workers=workers, batch_size=2**63 - 1, limit_batches=2**63 - 1).epoch(1)
        assert len(images) in (40, 50)
    with pytest.raises(RequestError, match=r"batch_size=99999999999: of Stream, .* at most 16,777,216 samples"):
        batches_of(settings("stream", steps_per_epoch=2), batch_size=99999999999)


def test_an_epoch_is_not_mixed_with_a_later_one():
    batches = batches_of(settings("drawing"), num_workers=2)
    first = batches.epoch(1)
    next(first)
    next(batches.epoch(2))
    with pytest.raises(RuntimeError, match="cannot go on"):
        next(first)


# --- what a Dataset raises


class Faulty(Drawing):
    """Sample 7 is not as its author thought."""

    def __getitem__(self, index):
        if index == 7:
            {}["caption"]
        return super().__getitem__(index)


class FaultyStream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 2, 2), 0
        raise ZeroDivisionError("nothing left")


def faulty():
    return datasets.ImageData(Faulty(), Faulty(), list("abcd"))


def faulty_stream():
    return datasets.ImageData(FaultyStream(), FaultyStream(), list("abcd"))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_users_dataset_raises_is_one_line_with_its_place_and_the_cause(workers):
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if '{}["caption"]' in text)
    says = rf"^sample 7 of Faulty raised KeyError: 'caption' \(test_data_batches\.py:{line}\)$"
    with pytest.raises(RunError, match=says) as told:
        list(batches_of(settings("faulty"), num_workers=workers).epoch(1))
    cause = "".join(traceback.format_exception(told.value))
    assert '{}["caption"]' in cause and "KeyError: 'caption'" in cause


def test_what_a_users_stream_raises_is_one_line():
    batches = batches_of(settings("faulty_stream", steps_per_epoch=2))
    says = r"^sample 1 of FaultyStream raised ZeroDivisionError: nothing left \(test_data_batches"
    with pytest.raises(RunError, match=says):
        list(batches.epoch(1))


class Memory(Drawing):
    """The sample that it is given."""

    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, index):
        return self.sample


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("cat", r"label 'cat'; expected 0 to 3"),
        (1.5, r"label 1\.5; expected 0 to 3"),
        (float("nan"), r"label nan"),
        (None, r"label None"),
        ([1, 2], r"label \[1, 2\]"),
        (10**30, r"label 1000"),
    ],
)
def test_labels_that_are_none(label, says):
    reader = Reader(Memory((torch.zeros(1, 2, 2), label)), [], 0, 4, False)
    with pytest.raises(RunError, match=rf"^sample 3 of Memory has {says}"):
        reader.read(1, torch.tensor([3]))


def test_a_palette_is_not_taken_for_colours():
    picture = Image.new("RGB", (4, 4), "red").convert("P")
    with pytest.raises(RunError, match=r"a Pillow image with a palette; .*convert\('RGB'\)"):
        Reader(Memory((picture, 0)), [], 0, 4, False).read(1, torch.tensor([3]))


class Hungry:
    """Wants more memory than there is, for so many images."""

    needs_float = random = False

    def __init__(self, images):
        self.images = images

    def __call__(self, images):
        return torch.empty(1 << 55, dtype=torch.uint8) if len(images) >= self.images else images


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (2, r"^out of memory with batch_size=8; try batch_size=4 \(a batch for cpu: .*allocate"),
        (1, r"^out of memory .*; try .*smaller images \(one image for cpu: "),
    ],
)
def test_out_of_memory_is_told_as_such(images, says, monkeypatch):
    monkeypatch.setitem(engine.data.transforms.BATCH_TRANSFORMS, "Hungry", Hungry)
    with pytest.raises(RunError, match=says):
        list(batches_of(settings("in_memory", train_transforms=[{"Hungry": {"images": images}}])).epoch(1))


def failing(labels, num_classes):
    raise LookupError("no such class")


def test_a_label_transform_that_fails_is_one_line():
    given = settings("in_memory", target_transform=f"{__name__}.failing")
    with pytest.raises(
        RunError, match=r"target_transform of labels \[8\] raised LookupError: no such class \(test_data_batches"
    ):
        list(batches_of(given).epoch(1))


# --- what else a Dataset may have


def test_targets_make_the_validation_part_stratified(capsys):
    splits, _ = load_splits(settings("drawing", val_fraction=0.2))
    assert torch.tensor(Drawing.targets)[splits["val"].indices].bincount().tolist() == [2, 2, 2, 2]
    assert "at random" not in capsys.readouterr().out
    splits, _ = load_splits(settings("plain", val_fraction=0.2))
    assert len(splits["val"]) == 8
    assert "Plain has no .targets: validation is held out at random" in capsys.readouterr().out


def test_pillow_images_and_numpy_labels():
    images, labels = whole_epoch(batches_of(settings("plain")))
    assert list(images.shape) == [40, 3, 4, 4]
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long() % 4, labels)
    with pytest.raises(RunError, match=r"sample \d+ of Plain has label [23]; expected 0 to 1, as there are 2 classes"):
        list(batches_of(settings("plain", classes=2)).epoch(1))


def test_a_sampler_of_its_own_chooses_the_samples():
    batches = batches_of(settings("balanced", val_fraction=0.2))
    assert len(batches) == 3 and batches.num_samples == 20
    labels = torch.cat([labels for _, labels in batches.epoch(1)])
    assert labels.tolist() == [2] * 20
    held_out = set(load_splits(settings("balanced", val_fraction=0.2))[0]["val"].indices.tolist())
    assert not held_out & set(batches.order(1).tolist())
    assert torch.equal(batches.order(1), batches.order(1)) and not torch.equal(batches.order(1), batches.order(2))


def test_a_stream_goes_on_from_epoch_to_epoch_and_where_it_was_left():
    given = settings("stream", steps_per_epoch=2, train_transforms=["RandomHorizontalFlip"])
    batches = batches_of(given)
    assert len(batches) == 2 and batches.num_samples == 16 and batches.sample_shape() == (1, 4, 4)
    before = torch.get_rng_state()
    seen = [images for epoch in (1, 2, 3) for images, _ in batches.epoch(epoch)]
    assert torch.equal(before, torch.get_rng_state())
    numbers = (torch.cat(seen)[:, 0, 0, 0] * 255).round().long()
    assert ((numbers - torch.arange(48) % 30) <= 1).all() and (numbers >= torch.arange(48) % 30).all()
    resumed = batches_of(given)
    rest = [images for images, _ in resumed.epoch(2, start=1)] + [images for images, _ in resumed.epoch(3)]
    assert all(torch.equal(one, two) for one, two in zip(rest, seen[3:], strict=True))


def test_a_stream_for_the_test_is_read_once_through():
    batches = batches_of(settings("stream", steps_per_epoch=2), split="test", training=False, batch_size=4)
    for _ in range(2):
        assert [len(labels) for _, labels in batches] == [4, 4, 2]


@pytest.mark.parametrize(
    ("function", "changes", "says"),
    [
        ("stream", {}, r"Stream is iterable-style: set dataset\.steps_per_epoch"),
        ("in_memory", {"steps_per_epoch": 3}, r"dataset\.steps_per_epoch=3: for iterable-style data"),
        ("empty_test", {}, r"the test split is empty"),
        ("float_images", {}, r"torch\.float32 \[5, 1, 2, 2\].*expected torch\.uint8"),
        ("label_outside", {}, r"train sample 4 has label 9; expected 0 to 4, as there are 5 classes"),
    ],
)
def test_data_that_cannot_be_used_is_told_at_load(function, changes, says):
    with pytest.raises(RequestError, match=says):
        load_splits(settings(function, **changes))


def test_fewer_samples_than_a_batch():
    with pytest.raises(RequestError, match=r"drop_last=true leaves no batch: 50 training samples, batch_size=64"):
        batches_of(settings("in_memory"), batch_size=64, drop_last=True)


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (["RandomHorizontalFlop"], r"there is no transform 'RandomHorizontalFlop' \(did you mean RandomHorizontalFlip"),
        (["GaussianBlurr"], r"there is no transform 'GaussianBlurr' \(did you mean GaussianBlur"),
        ([{"RandomCrop": {"sighs": 3}}], r"RandomCrop refuses its arguments"),
        ([{"RandomHorizontalFlip": {"p": 2}}], r"RandomHorizontalFlip refuses its arguments: p=2"),
        (["MixUp"], r"MixUp refuses its arguments: it mixes the samples of a batch"),
        ([["Resize", 3]], r"expected Name or Name: \{argument: value\}"),
    ],
)
def test_transforms_that_do_not_exist(listed, says):
    with pytest.raises(RequestError, match=says):
        parse_transforms(listed, "dataset.train_transforms")


def nested(levels):
    entry = "RandomHorizontalFlip"
    for _ in range(levels):
        entry = {"RandomApply": {"transforms": [entry]}}
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        {"Resize": {"size": [65_000, 65_000]}},
        {"Resize": {"size": 65_000}},
        {"Resize": {"size": [16_000, 16_000]}},
        {"Resize": {"size": 10**400}},
        {"RandomCrop": {"size": 10**9, "padding": 10**9}},
        {"RandomCrop": {"size": 32, "padding": 10**6}},
        {"RandomCrop": {"size": 9000, "pad_if_needed": True}},
        {"CenterCrop": {"size": 9000}},
        {"Pad": {"padding": 10**9}},
        {"Pad": {"padding": [1, 10**9]}},
        {"RandomZoomOut": {"side_range": [1, 10_000]}},
        {"GaussianBlur": {"kernel_size": 16_001}},
        {"ElasticTransform": {"sigma": 10_000}},
        {"RandAugment": {"num_ops": 10_000}},
        {"Normalize": {"mean": [0.5] * 10**6, "std": [0.5] * 10**6}},
        {"Normalize": {"mean": [float("nan")], "std": [float("inf")]}},
        {"RandomErasing": {"value": "r" * 10**6}},
        {"Resize": {"size": {"height": {"of": 3}}}},
        {"x" * 10**6: {}},
        {"Resize": {"size": 3}, "y" * 10**6: 3},
        {"Resize": {"size": torch.zeros(3)}},
        {"Resize": {5: 3}},
        {7: {"size": 3}},
        nested(6),
        nested(10_000),
        [[[["Resize"]]]],
        {"Lambda": {"lambd": "os.system"}},
        "Transform",
        {"RandomApply": {"transforms": "Lambda"}},
        {"RandomApply": {"transforms": [{"Lambda": {"lambd": "print"}}]}},
        {"RandomChoice": {"transforms": [{"CutMix": {"num_classes": 3}}]}},
        {"functional.pad": {"padding": 3}},
        {"AutoAugment": {"interpolation": "torch.load"}},
        {"ToDtype": {"dtype": "torch.hub.load", "scale": True}},
    ],
)
def test_transforms_without_a_bound_or_that_run_code_are_refused(entry):
    with pytest.raises(RequestError) as refused:
        batches_of(settings("in_memory", train_transforms=["RandomHorizontalFlip", entry])).sample_shape()
    assert str(refused.value).startswith(("dataset.train_transforms: ", "transform "))
    assert len(str(refused.value)) < 500 and str(refused.value).isprintable()


def test_a_list_of_transforms_of_a_million_entries_is_refused():
    with pytest.raises(RequestError, match=r"more than 1,000 values"):
        parse_transforms(["RandomHorizontalFlip"] * 10**6, "dataset.train_transforms")


@pytest.mark.parametrize("listed", [None, 5, "Resize", {"Resize": {"size": 3}}])
def test_what_is_no_list_of_transforms_is_refused(listed):
    with pytest.raises(RequestError, match=r"^dataset\.eval_transforms: it is \w+; expected a list of transforms"):
        parse_transforms(listed, "dataset.eval_transforms")


def test_ordinary_transforms_are_within_the_bounds():
    listed = [
        {"Resize": {"size": [7000, 7000]}},
        {
            "RandomApply": {
                "transforms": [nested(2), {"GaussianBlur": {"kernel_size": 23, "sigma": [0.1, 2.0]}}],
                "p": 0.3,
            }
        },
        {"RandomChoice": {"transforms": ["TrivialAugmentWide", {"RandAugment": {"num_ops": 2, "magnitude": 9}}]}},
        {"ToDtype": {"dtype": "torch.float32", "scale": True}},
        {"Pad": {"padding": [4, 4], "fill": 255}},
        {"Normalize": {"mean": [0.5] * 13, "std": [0.5] * 13}},
    ]
    assert len(parse_transforms(listed, "dataset.train_transforms")) == 6


@pytest.mark.parametrize(
    "listed",
    [
        [{"Resize": {"size": 8000}}],  # the shorter side: of 12x120, 8000x80000
        [{"Pad": {"padding": 4000}}, "RandomHorizontalFlip", {"Pad": {"padding": 4000}}],
        [{"RandomApply": {"transforms": [{"Pad": {"padding": 4000}}, {"Pad": {"padding": 4000}}], "p": 1.0}}],
        [{"RandomCrop": {"size": 8, "padding": 4000, "fill": [1, 2, 3]}}],
    ],
)
def test_an_image_that_its_transforms_would_make_too_large_is_refused(listed):
    with pytest.raises(RunError, match=r"it would make an image of \d+x\d+ pixels; at most 64,000,000"):
        Reader(
            (torch.zeros(1, 1, 12, 120, dtype=torch.uint8), torch.zeros(1)), parse_transforms(listed, "x"), 0, 2, False
        ).read(1, torch.tensor([0]))


def test_transforms_that_do_not_fit_the_images():
    given = settings(
        "in_memory", train_transforms=[{"Normalize": {"mean": [0.5], "std": [0.5]}}, {"RandomCrop": {"size": 99}}]
    )
    with pytest.raises(RequestError, match=r"transform RandomCrop \(number 2\) .* size 99x99 is larger"):
        batches_of(given).sample_shape()


# ---------------------------------------------------------------------------------------------------------------------
# Image files


def test_large_jpegs_are_decoded_small_in_training_and_whole_where_something_is_measured(tmp_path):
    """Held against Pillow's decoder and torch's resize; the cache serves all, and so is whole."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8))
                picture.save(tmp_path / part / name / f"{number}.jpg")
    resized = [{"Resize": {"size": [16, 16]}}]
    given = photo_settings(tmp_path, train_transforms=resized, eval_transforms=resized, val_fraction=0.5)
    with_cache = {**given, "cache": True, "cache_dir": str(tmp_path / "cache")}
    for split, training in (("train", True), ("train", False), ("val", False), ("test", False)):
        batches = batches_of(given, split, training=training)
        paths = [batches.split.part.paths[row] for row in batches.split.indices.tolist()]
        pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths]
        whole = Resize([16, 16])(torch.stack(pixels)).float() / 255
        found = whole_epoch(batches)[0]
        assert torch.equal(found, whole) != training and (found - whole).abs().max() < 0.3
        assert torch.equal(whole_epoch(batches_of(with_cache, split, training=training))[0], whole)
        predicted = predict.Images([Path(path) for path in paths], (3, 16, 16), resized, 10**6)
        assert torch.equal(torch.stack([predicted[i][1] for i in range(len(paths))]).float() / 255, whole)


@pytest.fixture
def broken(photos, tmp_path):
    """The photos, one of green's cut in half; returns their folder and that file."""
    for path in photos.glob("*/*"):
        (tmp_path / "broken" / path.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / path.parent.name / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "broken" / "green" / "b.png"
    bad.write_bytes(bad.read_bytes()[:300])
    return tmp_path / "broken", bad


def in_test(top, bad):
    data = datasets.image_folder(str(top), 0.25, 3, 10**6)
    return str(bad) in data.test.paths.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_training_or_is_skipped_and_counted(broken, workers, caplog):
    top, bad = broken
    assert not in_test(top, bad)
    given = photo_settings(top, train_transforms=[RESIZE])
    with pytest.raises(RunError, match=r"green/b\.png: cannot be read as an image .*truncated"):
        list(batches_of(given, num_workers=workers).epoch(1))
    batches = batches_of({**given, "skip_unreadable": True}, num_workers=workers)
    sizes = [len(labels) for _, labels in batches.epoch(1)]
    assert sizes == [8, 8, 2] and "1 image could not be read and skipped" in caplog.text and str(bad) in caplog.text
    clean = whole_epoch(batches_of({**given, "skip_unreadable": True}, num_workers=2 - workers))
    assert torch.equal(whole_epoch(batches)[0], clean[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_error_says_how_many_images_are_bad_and_the_way_out(photos, broken, workers):
    top, _bad = broken
    given = photo_settings(top, train_transforms=[RESIZE], test_fraction=0.1)
    batches = batches_of(given, num_workers=workers, batch_size=64)
    says = r"^\S+: cannot be read as an image \(.*\); replace or remove it; "
    with pytest.raises(RunError, match=says + r"dataset\.skip_unreadable=true leaves it out of training$"):
        list(batches.epoch(1))
    for path in [path for path in batches.split.part.paths.tolist() if "/red/" in path][:2]:
        Path(path).write_bytes(b"none")
    count = len(batches.split)
    way_out = r"dataset\.skip_unreadable=true leaves them out of training$"
    with pytest.raises(RunError, match=says + rf"3 of the {count} images of this batch cannot be read; " + way_out):
        list(batches.epoch(1))
    with pytest.raises(RunError, match=says + rf"3 of the {count} images of this batch cannot be read$"):
        list(Batches(batches.split, [RESIZE], CPU, **{**RUN, "batch_size": 64}).epoch(1))
    with pytest.raises(RequestError, match=says + rf"3 of the {count} images cannot be read; " + way_out):
        load_splits({**given, "cache": True, "cache_dir": str(top / "cache"), "eval_transforms": [RESIZE]})
    assert list((top / "cache").iterdir()) == []


def test_nothing_is_skipped_in_evaluation(broken):
    top, bad = broken
    splits, _ = load_splits(photo_settings(top, skip_unreadable=True))
    assert str(bad) in splits["train"].part.paths
    with pytest.raises(RunError, match=r"green/b\.png"):
        list(Batches(splits["train"], [RESIZE], CPU, training=False, **RUN))


def test_images_of_different_sizes_need_a_resize(photos):
    with pytest.raises(
        RequestError, match=r"images of different sizes: .* put Resize: .* first in dataset\.train_transforms"
    ):
        batches_of(photo_settings(photos))
    batches = batches_of(photo_settings(photos, train_transforms=[{"Resize": {"size": 16}}]))  # keeps the proportions
    with pytest.raises(RunError, match=r"images of different sizes: .* put Resize: \{size: \[height, width\]\} first"):
        list(batches.epoch(1))


def test_a_worker_that_dies_is_told_in_one_line():
    with pytest.raises(RunError, match=r"lower num_workers or batch_size, or enlarge shared memory"):
        list(batches_of(settings("dying"), num_workers=1).epoch(1))


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def cached(photos, folder, **changes):
    lists = {"train_transforms": AUGMENTED, "eval_transforms": [RESIZE]}
    return photo_settings(photos, **{**lists, "cache": True, "cache_dir": str(folder), **changes})


def test_the_cache_gives_the_same_samples_and_is_used_again(photos, tmp_path, capsys):
    plain_images, plain_labels = whole_epoch(batches_of(photo_settings(photos, train_transforms=AUGMENTED)))
    for said in ("not cached yet", ""):
        images, labels = whole_epoch(batches_of(cached(photos, tmp_path)))
        assert torch.equal(images, plain_images) and torch.equal(labels, plain_labels)
        out = capsys.readouterr().out
        assert said in out and bool(out) == bool(said)
    sidecars = list(tmp_path.glob("*.json"))
    assert len(sidecars) == 2 and len(list(tmp_path.glob("*.uint8"))) == 2 and len(list(tmp_path.iterdir())) == 4
    described = json.loads(sidecars[0].read_text())
    assert described["shape"][1:] == [3, 16, 16] and described["resize"]["size"] == [16, 16]


def test_a_cache_that_no_longer_fits_is_made_again_with_a_line(broken, tmp_path, capsys):
    top, bad = broken
    bad.unlink()
    given = cached(top, tmp_path / "cache")
    load_splits(given)
    other = top / "red" / "b.png"
    Image.new("RGB", (30, 30), "white").save(other)
    capsys.readouterr()
    batches = batches_of(given, transforms=[RESIZE], split="test" if in_test(top, other) else "train", training=False)
    told = capsys.readouterr().out
    assert "their cache no longer fits them (" in told and "red/b.png differs)" in told
    assert any((images == 1).flatten(1).all(1).any() for images, _ in batches)
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 2
    data = next((tmp_path / "cache").glob("*.uint8"))
    data.write_bytes(data.read_bytes()[:-5])
    load_splits(given)
    assert "has not the size it was written with" in capsys.readouterr().out
    for sidecar in (tmp_path / "cache").glob("*.json"):
        sidecar.write_text("{")
    load_splits(given)
    assert "is damaged" in capsys.readouterr().out


def test_unreadable_images_and_the_cache(broken, tmp_path, capsys):
    top, _bad = broken
    with pytest.raises(RequestError, match=r"green/b\.png: cannot be read"):
        load_splits(cached(top, tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    splits, _ = load_splits(cached(top, tmp_path / "cache", skip_unreadable=True))
    assert len(splits["train"]) == 17 and "a training image is left out: " in capsys.readouterr().out
    with pytest.raises(RequestError, match=r"green/b\.png: cannot be read"):  # whatever was allowed before
        load_splits(cached(top, tmp_path / "cache"))


def test_the_first_images_may_be_unreadable_where_workers_make_the_cache(broken, monkeypatch, tmp_path):
    top, bad = broken
    monkeypatch.setattr("engine.data.cache.BATCH", 2)
    monkeypatch.setattr("engine.data.cache.cores", lambda: 2)
    files = datasets.image_folder(str(top), 0.1, 3, 10**6).train
    for row in (0, 5):  # in batches of two rows
        Path(str(files.paths[row])).write_bytes(b"none")
    images, unreadable = cached_images(files, Resize([16, 16]), tmp_path / "cache", True)
    assert sorted(unreadable) == sorted({0, 5, files.paths.tolist().index(str(bad))}) and not images[0].any()
    for row in set(range(len(files))) - set(unreadable):
        assert torch.equal(images[row], Resize([16, 16])(files.read(row)[None])[0])


def test_each_way_to_resize_has_a_cache_of_its_own(photos, tmp_path):
    files = datasets.image_folder(str(photos), 0.1, 3, 10**6).train
    ways = [Resize([8, 8]), Resize([8, 8], "nearest"), Resize([8, 8], "bicubic"), Resize([8, 8], antialias=False)]
    for resize in [*ways, Resize([8, 9]), *ways]:
        images, _ = cached_images(files, resize, tmp_path / "cache", False)
        for row in range(len(files)):
            assert torch.equal(images[row], resize(files.read(row)[None])[0])


def test_files_in_another_order_are_cached_anew(photos, tmp_path):
    files = datasets.image_folder(str(photos), 0.1, 3, 10**6).train
    turned = datasets.ImageFiles(files.paths.tolist()[::-1], files.targets.tolist()[::-1], 3, name=files.name)
    for one in (files, turned, files):
        images, _ = cached_images(one, Resize([8, 8]), tmp_path / "cache", False)
        for row in range(len(one)):
            assert torch.equal(images[row], Resize([8, 8])(one.read(row)[None])[0])


def test_a_changed_picture_is_cached_anew_by_its_time_alone(tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (4, 4), (50, 50, 50)).save(tmp_path / f"pictures/{name}/{number}.bmp")
    given = cached(tmp_path / "pictures", tmp_path / "cache", train_transforms=[], eval_transforms=[])
    splits, _ = load_splits(given)
    path = Path(datasets.image_folder(str(tmp_path / "pictures"), 0.25, 3, 10**6).train.paths[1])
    status = path.stat()
    Image.new("RGB", (4, 4), (200, 100, 0)).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # a nanosecond later
    assert path.stat().st_size == status.st_size
    assert (splits["train"].part[0][1] == 50).all()
    capsys.readouterr()
    splits, _ = load_splits(given)
    assert splits["train"].part[0][1, :, 0, 0].tolist() == [200, 100, 0]
    assert f"{path.parent.name}/{path.name} differs" in capsys.readouterr().out


def test_the_cache_as_it_is_typed_with_its_default_folder(photos, tmp_path, call):
    typed = ["dataset=image_folder", f"dataset.root={photos}", "dataset.cache=true", "num_workers=2"]
    typed += ["epochs=1", "batch_size=8", "model.hidden=[4]"]
    first, second = call("train", *typed, "name=one"), call("train", *typed, "name=two")
    assert first.code == second.code == 0, first.err + second.err
    assert first.out.count("caching ") == 2 and "caching" not in second.out
    assert sorted(path.suffix for path in (tmp_path / "data" / "cache").iterdir()) == [
        ".json",
        ".json",
        ".uint8",
        ".uint8",
    ]
    weights = [
        torch.load(tmp_path / f"checkpoints/{name}/best.pt", weights_only=True)["model"] for name in ("one", "two")
    ]
    assert call("train", *typed[:2], *typed[3:], "name=three").code == 0
    weights.append(torch.load(tmp_path / "checkpoints/three/best.pt", weights_only=True)["model"])
    assert all(torch.equal(one[name], weights[2][name]) for one in weights for name in one)


def _load_alone(given, out):
    """In a process of its own: `load_splits`, what it prints in the file `out`."""
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    try:
        splits, _ = load_splits(given)
        print("train", splits["train"].part[0].long().sum().item())
    except RunError as error:
        print("error:", error)


def loading(given, out):
    child = multiprocessing.get_context("fork").Process(target=_load_alone, args=(given, out))
    child.start()
    return child


def test_three_runs_that_make_one_cache_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = cached(photos, "data/cache")
    children = [loading(given, tmp_path / f"out{number}") for number in range(3)]
    for child in children:
        child.join()
    told = [(tmp_path / f"out{number}").read_text() for number in range(3)]
    assert "".join(told).count("caching ") == 2 and "error" not in "".join(told), told
    assert len({text.splitlines()[-1] for text in told}) == 1
    assert len(list((tmp_path / "data/cache").iterdir())) == 4


def test_a_run_waits_for_one_that_makes_the_cache_and_then_finds_it(photos, tmp_path):
    given = cached(photos, tmp_path / "cache")
    load_splits(given)
    sidecar = next((tmp_path / "cache").glob("*.json"))
    content = sidecar.read_text()
    sidecar.unlink()
    with _locked(sidecar.with_suffix(".lock")):
        child = loading(given, tmp_path / "out")
        while "waiting" not in ((tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""):
            assert child.is_alive()
            time.sleep(0.01)
        sidecar.write_text(content)
    child.join()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("waiting for another run that is making this cache (")
    assert lines[1].startswith("train ") and not list((tmp_path / "cache").glob("*.lock"))


def test_sidecars_that_are_not_as_they_were_written_are_made_anew(photos, tmp_path, capsys):
    folder = tmp_path / "cache"
    given = cached(photos, folder)
    images = load_splits(given)[0]["test"].part[0].clone()
    sidecar = next(path for path in folder.glob("*.json") if json.loads(path.read_text())["shape"][0] == len(images))
    good = json.loads(sidecar.read_text())
    outside = tmp_path / "outside.uint8"
    outside.write_bytes(bytes(images.numel()))
    (folder / "fifo.uint8").unlink(missing_ok=True)
    os.mkfifo(folder / "fifo.uint8")
    count = good["shape"][0]
    hostile = [
        {"shape": [-count, 3, -16, 16]},
        {"shape": [count, 3, 10**30, 16]},
        {"shape": [count, 3, 8, 32]},
        {"shape": [1, count, 3, 256]},
        {"shape": [float(count), 3.0, 16.0, 16.0]},
        {"shape": "none"},
        {"data": "../outside.uint8"},
        {"data": str(outside)},
        {"data": "fifo.uint8"},
        {"data": "."},
        {"data": 5},
        {"sources": [[]]},
        {"sources": [[[1]]]},
        {"sources": {"a": 1}},
        {"sources": None},
        {"unreadable": {"-1": "x"}},
        {"unreadable": {"99": "x"}},
        {"unreadable": ["x"]},
    ]
    written = [json.dumps({**good, **changes}) for changes in hostile]
    for content in [*written, "[" * 10**5, '{"a":' * 10**5, "", "5", "\0", "[]", "1" * 10**4, "fifo", "device", "huge"]:
        sidecar.unlink()
        if content == "fifo":
            os.mkfifo(sidecar)
        elif content == "device":
            sidecar.symlink_to("/dev/zero")
        else:
            sidecar.write_text(content)
        if content == "huge":
            os.truncate(sidecar, 1 << 33)
        capsys.readouterr()
        found = load_splits(given)[0]["test"].part[0]
        told = capsys.readouterr().out
        assert torch.equal(found, images), content[:100]
        assert told.count("\n") == 1 and re.search(r": .* (is damaged|no longer fits)", told), (content[:100], told)
    assert load_splits(given) and capsys.readouterr().out == ""
    assert outside.exists()


def _small_files(given, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # of bytes that a file may have; then writing fails
    _load_alone(given, out)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(photos, tmp_path):
    child = multiprocessing.get_context("fork").Process(
        target=_small_files, args=(cached(photos, tmp_path / "cache"), tmp_path / "out")
    )
    child.start()
    child.join()
    lines = (tmp_path / "out").read_text().splitlines()
    assert re.match(r"error: the image cache cannot be written in .* \(\[Errno 27\].*dataset\.cache=false", lines[-1])
    assert len(lines) == 2 and list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_making_a_cache_shows_a_bar_on_a_terminal_only(photos, tmp_path, monkeypatch, terminal):
    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    seen = {}
    bar = engine.terminal.tqdm
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setattr(
        "engine.terminal.tqdm", lambda n, **given: seen.update(given) or bar(n, **{**given, "delay": 0})
    )
    load_splits(cached(photos, tmp_path))
    assert ("caching" in sys.stderr.getvalue()) == terminal and seen["delay"] == 1


def test_a_cache_needs_one_resize_for_all(photos, tmp_path):
    with pytest.raises(RequestError, match=r"put the same Resize first in train_transforms and eval_transforms"):
        load_splits(cached(photos, tmp_path, eval_transforms=[]))
    with pytest.raises(RequestError, match=r"images of different sizes"):
        load_splits(cached(photos, tmp_path, train_transforms=[], eval_transforms=[]))


def test_a_cache_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"the image cache cannot be written in .*file/cache .*dataset\.cache_dir"):
        load_splits(cached(photos, tmp_path / "file" / "cache"))


# ---------------------------------------------------------------------------------------------------------------------
# The whole program


def test_a_run_gives_the_same_weights_for_any_num_workers(photos, tmp_path, call):
    listed = "[{Resize: {size: [16, 16]}},TrivialAugmentWide,RandomHorizontalFlip,{RandomRotation: {degrees: 30}}]"
    data = ["dataset=image_folder", f"dataset.root={photos}", f"dataset.train_transforms={listed}"]
    data.append("dataset.eval_transforms=[{Resize: {size: [16, 16]}}]")
    weights = []
    for workers in (0, 1, 3):
        given = ["epochs=2", "batch_size=5", f"num_workers={workers}", f"name=with{workers}"]
        assert call("train", *data, *given).code == 0
        weights.append(torch.load(tmp_path / f"checkpoints/with{workers}/last.pt", weights_only=True)["model"])
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:])


def test_folders_and_lists_in_every_format_train_to_over_90_percent(photos, tmp_path, call):
    rows = [f"{path.relative_to(photos)},{path.parent.name}" for path in sorted(photos.glob("*/*"))]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    common = [
        "model=cnn",
        "model.width=8",
        "epochs=8",
        "batch_size=4",
        "dataset.val_fraction=0",
        "device=cpu",
        "num_workers=1",
    ]
    for name, of_dataset in (
        ("folder", ["dataset=image_folder", f"dataset.root={photos}"]),
        ("list", ["dataset=csv_images", "dataset.annotations_file=labels.csv", f"dataset.img_dir={photos}"]),
    ):
        done = call("train", *common, *of_dataset, f"name={name}")
        assert done.code == 0, done.err
        summary = json.loads((tmp_path / "checkpoints" / name / "summary.json").read_text())
        assert summary["test_accuracy"] > 0.9


def test_an_unreadable_image_in_a_worker_is_one_line_and_exit_code_1(broken):
    top, bad = broken
    words = ["dataset=image_folder", f"dataset.root={top}", "epochs=1", "num_workers=1", "device=cpu"]
    done = processes.run("train", *words, cwd=top.parent)
    assert done.wait() == 1
    assert re.fullmatch(rf"error: {re.escape(str(bad))}: cannot be read as an image \(.*\).*\n", done.err)


@pytest.mark.pictures
def test_a_picture_of_samples_and_their_statistics(photos, tmp_path, call):
    done = call("datasets", "dataset=image_folder", f"dataset.root={photos}", "num_workers=0")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "samples.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert re.search(r"green +5 +1 +2\n", done.out)
    mean = [float(x) for x in re.search(r"mean: \[(.*?)\]", done.out)[1].split(", ")]
    files = datasets.image_folder(str(photos), 0.2, 3, 10**6)
    assert all(0.2 < value < 0.6 for value in mean) and len(files.classes) == 3


@pytest.mark.parametrize(
    ("places", "error", "says"),
    [
        ([], RequestError, "its sampler list gives no sample"),
        ([0, 40, 2], RunError, "its sampler gave 3 places from 0 to 40; expected 3, from 0 to 39"),
        ([-1, 0], RunError, "its sampler gave 2 places from -1 to 0; expected 2, from 0 to 39"),
    ],
)
def test_places_of_a_sampler_that_are_none(places, error, says):
    images, labels = in_memory().train
    data = datasets.ImageData((images[:40], labels[:40]), (images, labels), list("abcde"), sampler=lambda _: places)
    splits, _ = divide(data)
    with pytest.raises(error, match=says):
        Batches(splits["train"], [], CPU, training=True, batch_size=2).order(1)
