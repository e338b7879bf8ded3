"""Which samples are for training, validation and test: sizes and members counted by hand, the same for every seed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import datasets
from engine.data.images import ImageFiles
from engine.data.splits import Split, class_counts, divide, fingerprint, hold_out, load_splits, spread
from engine.errors import RequestError

LABELS: list[int] = []  # of `labelled`, set by a test


def images_of(count: int) -> Tensor:
    """Images whose two pixels tell which sample they are: its number divided by 256, and the rest."""
    numbers = torch.arange(count)
    return torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).view(count, 1, 1, 2)


def labelled() -> datasets.ImageData:
    labels = torch.tensor(LABELS)
    names = [f"class {label}" for label in range(int(labels.max()) + 1)]
    test = torch.arange(len(names)).repeat_interleave(5)
    return datasets.ImageData((images_of(len(labels)), labels), (images_of(len(test)), test), names)


class Unlabelled(Dataset):
    """Whose labels only reading tells."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images_of(30)[index], index % 3


def unlabelled() -> datasets.ImageData:
    return datasets.ImageData(Unlabelled(), Unlabelled(), ["a", "b", "c"])


def settings(function: str = "labelled", **changes: Any) -> dict[str, Any]:
    own = {"val_fraction": 0.1, "limit": None, "target_transform": None, "steps_per_epoch": None}
    transforms: dict[str, Any] = {"train_transforms": [], "eval_transforms": []}
    return {**own, **transforms, "_target_": f"{__name__}.{function}", **changes}


def members(given: dict[str, Any]) -> dict[str, list[int]]:
    splits, _ = load_splits(given)
    found: dict[str, list[int]] = {}
    for name, split in splits.items():
        assert split.indices is not None and split.indices.dtype == torch.int64
        found[name] = split.indices.tolist()
    return found


def use(monkeypatch: pytest.MonkeyPatch, labels: list[int]) -> None:
    monkeypatch.setattr(f"{__name__}.LABELS", labels)


# What is held out of each class: round(fraction * members), all far from a half.
#   labels                                      fraction   held out of each class
COUNTS: dict[str, tuple[list[int], float, list[int]]] = {
    "sorted": ([0] * 10 + [1] * 20, 0.1, [1, 2]),
    "in turns": ([0, 1] * 20, 0.25, [5, 5]),
    "uneven": ([0] * 11 + [1] * 19 + [2] * 42, 0.3, [3, 6, 13]),  # 3.3, 5.7, 12.6
    "half": ([0] * 12 + [1] * 30, 0.5, [6, 15]),
    "no sample of a class": ([0] * 10 + [2] * 10, 0.2, [2, 0, 2]),
    "nearly all": ([0] * 20 + [1] * 10, 0.8, [16, 8]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_same_share_of_every_class_is_held_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    labels, fraction, expected = COUNTS[name]
    use(monkeypatch, labels)
    found = members(settings(val_fraction=fraction))
    assert [sum(labels[i] == label for i in found["val"]) for label in range(len(expected))] == expected
    assert sorted(found["train"] + found["val"]) == list(range(len(labels)))  # each sample in one of them
    assert found["test"] == list(range(5 * len(expected)))


@pytest.mark.parametrize("name", COUNTS)
def test_which_samples_are_held_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first of each class in one shuffle of all, which no seed of a run changes; each split in the data's order."""
    labels, fraction, expected = COUNTS[name]
    use(monkeypatch, labels)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = []
    for label, count in enumerate(expected):
        held_out += [i for i in shuffled if labels[i] == label][:count]
    torch.manual_seed(99)
    found = members(settings(val_fraction=fraction))
    assert found["val"] == sorted(held_out) and found["train"] == sorted(found["train"])
    torch.manual_seed(100)
    assert members(settings(val_fraction=fraction)) == found


def test_nothing_is_held_out_where_nothing_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [0, 1] * 10)
    assert members(settings(val_fraction=0.0)) == {"train": list(range(20)), "test": list(range(10))}


def test_what_is_held_out_is_not_a_stretch_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [0] * 100 + [1] * 100)
    held_out = [i for i in members(settings(val_fraction=0.3))["val"] if i < 100]
    assert held_out not in (list(range(30)), list(range(70, 100)))
    assert min(held_out) < 20 and max(held_out) > 80


def test_samples_without_known_labels_are_held_out_at_random(capsys: pytest.CaptureFixture[str]) -> None:
    found = members(settings("unlabelled", val_fraction=0.2))
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    assert found["val"] == sorted(shuffled[:6]) and found["train"] == sorted(shuffled[6:])
    assert found["test"] == list(range(30))
    assert "Unlabelled has no .targets" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [10, 24, 1000])
def test_a_limit_takes_so_many_of_each_split(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    use(monkeypatch, [0] * 100 + [1] * 100)
    whole = members(settings(val_fraction=0.2))
    assert {name: len(split) for name, split in whole.items()} == {"train": 160, "val": 40, "test": 10}
    limited = members(settings(val_fraction=0.2, limit=limit))
    for name, chosen in limited.items():
        assert len(chosen) == len(set(chosen)) == min(limit, len(whole[name]))
        assert set(chosen) <= set(whole[name])  # holding out comes first: no sample changes sides
        assert sum(number < (5 if name == "test" else 100) for number in chosen) == len(chosen) // 2  # of each class
    assert limited == members(settings(val_fraction=0.2, limit=limit))


def test_a_split_that_is_asked_for_alone_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [0] * 30 + [1] * 20)
    whole = members(settings())
    for name in ("train", "val", "test"):
        (only,) = load_splits(settings(), only=name)[0].items()
        assert only[0] == name and only[1].indices is not None and only[1].indices.tolist() == whole[name]


def shares(chosen: Tensor, labels: Tensor) -> list[int]:
    return labels[chosen].bincount(minlength=int(labels.max()) + 1).tolist()


def test_a_share_is_held_out_of_small_classes_too() -> None:
    labels = torch.arange(10).repeat_interleave(4)
    held_out = hold_out(labels, 40, 0.1)  # 0.4 of every class
    assert int(held_out.sum()) == 4 and max(shares(held_out, labels)) == 1
    labels = torch.tensor([0] * 100 + [1] * 4 + [2] * 3 + [3])
    assert shares(hold_out(labels, 108, 0.1), labels) == [10, 1, 0, 0]
    assert shares(hold_out(labels, 108, 0.9), labels) == [90, 3, 2, 0], "no class gives its last sample away"
    assert int(hold_out(torch.arange(5), 5, 0.5).sum()) == 0 == int(hold_out(labels, 108, 0.0).sum())
    assert int(hold_out(None, 3, 0.01).sum()) == 1 and int(hold_out(None, 1, 0.5).sum()) == 0


def test_what_is_held_out_of_the_digits_is_what_it_was() -> None:
    labels = datasets.digits().train[1]  # type: ignore[index]
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    expected = set()
    for label in range(10):
        members = [place for place in shuffled if labels[place] == label]
        expected |= set(members[: round(0.1 * len(members))])
    assert set(hold_out(labels, len(labels), 0.1).nonzero().flatten().tolist()) == expected


def test_a_limit_takes_of_every_class_its_share_in_the_order_there_was() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 9 + [3])
    assert shares(spread(labels, 100, 10), labels) == [5, 3, 1, 1]
    assert shares(spread(labels, 100, 4), labels) == [1, 1, 1, 1]
    assert shares(spread(labels, 100, 3), labels) == [1, 1, 1, 0]
    assert shares(spread(labels, 100, 50), labels) == [30, 15, 4, 1]
    chosen = spread(labels, 100, 50)
    assert torch.equal(chosen, chosen.sort().values) and set(spread(labels, 100, 20).tolist()) <= set(chosen.tolist())
    assert spread(labels, 100, 100).tolist() == spread(labels, 100, None).tolist() == list(range(100))
    without = spread(None, 1000, 10)
    assert len(set(without.tolist())) == 10 and without.max() > 500 and torch.equal(without, spread(None, 1000, 10))


def of_classes(classes: list[Any], labels: list[int]) -> datasets.ImageData:
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    return datasets.ImageData((images, torch.tensor(labels)), (images, torch.tensor(labels)), classes)


@pytest.mark.parametrize(
    ("classes", "labels", "says"),
    [
        (["a", "b", "a"], [0, 1, 2], r"the class name 'a' occurs more than once"),
        ([1, "1"], [0, 1], r"the class name '1' occurs more than once"),
        (["a"], [0, 0], r"training samples of one class only, 'a'"),
        (["a", "b"], [1, 1], r"training samples of one class only, 'b'"),
        ([], [0, 0], r"label 0; expected 0 to -1"),
    ],
)
def test_classes_are_at_least_two_and_each_name_is_one(
    monkeypatch: pytest.MonkeyPatch, classes: list[Any], labels: list[int], says: str
) -> None:
    monkeypatch.setattr(datasets, "made", lambda: of_classes(classes, labels), raising=False)
    given: dict[str, Any] = {"limit": None, "val_fraction": 0.0, "train_transforms": [], "eval_transforms": []}
    with pytest.raises(RequestError, match=says):
        load_splits({**given, "_target_": "datasets.made"})


# ---------------------------------------------------------------------------------------------------------------------
# The digits: 1,797 of them, of each class
DIGITS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
TEST = [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]  # every fifth: the digits divided by five, rounded down
VAL = [
    14,
    15,
    14,
    15,
    14,
    15,
    14,
    14,
    14,
    14,
]  # a tenth of the rest, rounded: 143, 146, 142, 147, 145, 146, 145, 144, ...


def test_the_digits_by_class() -> None:
    splits, classes = load_splits(settings(_target_="datasets.digits"))
    assert classes == list("0123456789") and sum(DIGITS) == 1797
    counts = {}
    for name, split in splits.items():
        counts[name] = split.part[1][split.indices].bincount().tolist()
    assert counts["test"] == TEST == [count // 5 for count in DIGITS]
    assert counts["val"] == VAL
    assert counts["train"] == [a - t - v for a, t, v in zip(DIGITS, TEST, VAL, strict=True)]
    assert {name: len(split) for name, split in splits.items()} == {"train": 1299, "val": 143, "test": 355}


def test_every_fifth_digit_of_a_class_is_for_the_test() -> None:
    folder = Path(datasets.__file__).parent / "data" / "digits"
    images = datasets.read_idx(folder / "digits-images-idx3-ubyte.gz")
    labels = datasets.read_idx(folder / "digits-labels-idx1-ubyte.gz").tolist()
    seen = dict.fromkeys(range(10), 0)
    test, train = [], []
    for place, label in enumerate(labels):
        seen[label] += 1
        (test if seen[label] % 5 == 0 else train).append(place)
    data = datasets.digits()
    for part, chosen in ((data.train, train), (data.test, test)):
        pixels, targets = part  # type: ignore[misc]
        assert targets.tolist() == [labels[i] for i in chosen]
        assert torch.equal(pixels[:, 0], (images[chosen].double() * 255 / 16).round().to(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_share_of_every_folder_is_for_the_test(tmp_path: Path) -> None:
    """A quarter of 8 and of 12: 2 and 3; the first of each class in a shuffle of all by another seed than above."""
    for name, count in (("ant", 8), ("bee", 12)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (2, 2)).save(tmp_path / name / f"{number:02}.png")
    data = datasets.image_folder(str(tmp_path), test_fraction=0.25, channels=1, max_pixels=100)
    files = [f"ant/{n:02}.png" for n in range(8)] + [f"bee/{n:02}.png" for n in range(12)]
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    test = [i for i in shuffled if i < 8][:2] + [i for i in shuffled if i >= 8][:3]
    for part, chosen in ((data.test, sorted(test)), (data.train, sorted(set(range(20)) - set(test)))):
        assert isinstance(part, datasets.ImageFiles)
        assert [Path(path).relative_to(tmp_path).as_posix() for path in part.paths] == [files[i] for i in chosen]
        assert part.targets.tolist() == [int(i >= 8) for i in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# What tells data from other data


def test_the_fingerprint_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0] * 20 + [1] * 20

    def of(labels: list[int], **changes: Any) -> str:
        use(monkeypatch, labels)
        return fingerprint(load_splits(settings(**changes))[0])

    usual = of(labels)
    assert of(labels) == usual
    others = {
        "a label more": of([*labels, 0]),
        "a label changed": of([1, *labels[1:]]),
        "another order": of(labels[::-1]),
        "two exchanged": of([*labels[:19], 1, 0, *labels[21:]]),
        "more held out": of(labels, val_fraction=0.2),
        "none held out": of(labels, val_fraction=0.0),
        "fewer": of(labels, limit=30),
    }
    assert len({usual, *others.values()}) == len(others) + 1


def test_a_label_outside_the_classes_is_named_with_its_sample() -> None:
    pictures, fine = images_of(4), torch.tensor([0, 1, 0, 1])
    for labels, named in (([0, 1, -1, 1], "train sample 2 has label -1"), ([0, 1, 0, 2], "train sample 3 has label 2")):
        data = datasets.ImageData((pictures, torch.tensor(labels)), (pictures, fine), ["a", "b"])
        with pytest.raises(RequestError, match=f"{named}; expected 0 to 1, as there are 2 classes"):
            divide(data)


def test_divide_takes_the_values_by_name() -> None:
    LABELS[:] = [0, 1] * 10
    splits, classes = divide(labelled(), val_fraction=0.2, limit=10)
    assert classes == ["class 0", "class 1"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "val": 4, "test": 10}
    splits, _ = divide(labelled())
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "test": 10}


def test_the_fingerprint_is_the_numbers_of_samples_and_checksums_of_labels_and_order() -> None:
    """It stands in checkpoints: another one would be taken for other data."""
    labels = np.array([1, 0, 0, 1, 2, 1], dtype="<i8")
    data = datasets.ImageData(
        (images_of(6), torch.from_numpy(labels)), (images_of(2), torch.tensor([0, 2])), list("abc")
    )
    splits, _ = divide(data)
    splits["train"] = replace(splits["train"], indices=torch.tensor([4, 0, 3]))
    known = zlib.crc32(labels[[4, 0, 3]].tobytes()), zlib.crc32(np.array([0, 2], dtype="<i8").tobytes())
    assert fingerprint(splits) == f"train 3 {known[0]:08x}, test 2 {known[1]:08x}"
    order = zlib.crc32(np.arange(30, dtype="<i8").tobytes())
    assert fingerprint(divide(unlabelled())[0]) == f"train 30 {order:08x}, test 30 {order:08x}"
    streams = datasets.ImageData(Counted(), Stream(), ["a", "b"])
    assert fingerprint(divide(streams, steps_per_epoch=1)[0]) == "train 9 00000000, test 0 00000000"


# ---------------------------------------------------------------------------------------------------------------------
# What goes together


class Stream(IterableDataset):
    """Has no length."""

    targets = torch.tensor([0, 1, 0])  # of what, nobody can say

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Counted(Stream):
    def __len__(self) -> int:
        return 9


def test_samples_of_a_stream_are_counted_where_they_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    data = datasets.ImageData(Stream(), Counted(), ["a", "b"])
    for limit, expected in ((None, (0, 9)), (5, (0, 5)), (20, (0, 9))):
        splits, _ = divide(data, limit=limit, steps_per_epoch=2, val_fraction=0.5)
        assert (len(splits["train"]), len(splits["test"])) == expected and list(splits) == ["train", "test"]
        assert splits["test"].indices is None and splits["test"].steps is None and splits["train"].steps == 2
    assert capsys.readouterr().out == ""


def test_what_is_taken_at_random_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for given, told in (
        ({"limit": 5}, "samples of dataset.limit are taken at random"),
        ({"limit": 5, "val_fraction": 0.5}, "samples of dataset.limit are taken at random"),
        ({"val_fraction": 0.5}, "validation is held out at random"),
        ({}, ""),
    ):
        divide(unlabelled(), **given)  # type: ignore[arg-type]
        line = f"Unlabelled has no .targets: {told}, not class by class\n"
        assert capsys.readouterr().out == (line if told else "")
    LABELS[:] = [0, 1] * 10
    divide(labelled(), limit=5, val_fraction=0.5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "targets", [["ant", "bee"] * 15, [0.0, 1.0] * 15, [[0, 1]] * 30, [0, 1], [0] * 31, 5, object()]
)
def test_targets_that_are_not_a_class_for_each_sample_are_not_taken_for_labels(
    targets: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    part = Unlabelled()
    part.targets = targets  # type: ignore[attr-defined]
    splits, _ = divide(datasets.ImageData(part, part, ["a", "b", "c"]), val_fraction=0.2)
    assert len(splits["val"]) == 6 and "Unlabelled has no .targets: validation is held out at random" in (
        capsys.readouterr().out
    )
    part.targets = [0] * 20 + [1] * 10  # type: ignore[attr-defined]
    splits, _ = divide(datasets.ImageData(part, part, ["a", "b", "c"]), val_fraction=0.2)
    assert splits["val"].indices is not None and int((splits["val"].indices < 20).sum()) == 4
    assert capsys.readouterr().out == ""


def test_a_validation_part_of_the_datas_own_is_whole_and_nothing_else_is_held_out() -> None:
    LABELS[:] = [0, 1] * 10
    data = replace(labelled(), val=(images_of(6), torch.tensor([0, 1] * 3)))
    splits, _ = divide(data, val_fraction=0.5)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "val": 6, "test": 10}
    with pytest.raises(RequestError, match="val sample 5 has label 2; expected 0 to 1"):
        divide(replace(data, val=(images_of(6), torch.tensor([0, 1, 0, 1, 0, 2]))))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 1, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.int64)),
    ],
)
def test_samples_in_memory_of_another_type_or_shape_are_refused(images: Tensor, labels: Tensor) -> None:
    LABELS[:] = [0, 1]
    found = f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
    with pytest.raises(RequestError) as refused:
        divide(replace(labelled(), test=(images, labels)))
    assert str(refused.value) == (
        f"dataset: test images and labels are {found}; "
        "expected torch.uint8 [n, channels, height, width] and torch.int64 [n]"
    )


class NoLength(Dataset):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return images_of(1)[0], 0


def test_parts_that_are_none_and_empty_ones_are_refused() -> None:
    LABELS[:] = [0, 1]
    kinds = "(images, labels) or a torch.utils.data.Dataset, with __len__ unless it is an IterableDataset"
    for part, says in (
        (5, f"dataset: test is int; expected {kinds}"),
        (None, f"dataset: test is NoneType; expected {kinds}"),
        ({1, 2}, f"dataset: test is set; expected {kinds}"),
        (NoLength(), f"dataset: test is NoLength; expected {kinds}"),
        ((images_of(2)[:0], torch.tensor([], dtype=torch.int64)), "dataset: the test split is empty (0 samples)"),
    ):
        with pytest.raises(RequestError, match=re.escape(says)):
            divide(replace(labelled(), test=part))  # type: ignore[arg-type]
    splits, _ = divide(replace(labelled(), test=(images_of(1), torch.tensor([1]))))
    assert len(splits["test"]) == 1


@pytest.mark.parametrize(
    ("classes", "says"), [(["a"], "training samples of one class only, 'a'"), ([], "no class"), (["a", "b"], None)]
)
def test_a_dataset_that_does_not_tell_its_labels_has_two_classes_or_more(classes: list[str], says: str | None) -> None:
    data = replace(unlabelled(), classes=classes)
    if says is None:
        assert divide(data)[1] == ["a", "b"]
        return
    with pytest.raises(RequestError, match=f"^dataset: {says}; a classifier needs at least two$"):
        divide(data)


@pytest.mark.parametrize("labels", [[2, 2], [2]])
def test_the_one_class_that_there_is_is_named(labels: list[int]) -> None:
    with pytest.raises(RequestError, match=r"^dataset: training samples of one class only, 'c'; a classifier needs"):
        divide(of_classes(["a", "b", "c"], labels))


def test_steps_are_for_data_that_has_no_length_and_only_for_it() -> None:
    LABELS[:] = [0, 1] * 5
    streams = datasets.ImageData(Stream(), Stream(), ["a", "b"])
    with pytest.raises(RequestError, match=r"^Stream is iterable-style: set dataset.steps_per_epoch, the batches an"):
        divide(streams)
    with pytest.raises(RequestError, match=r"^dataset.steps_per_epoch=3: for iterable-style data; limit_batches= sho"):
        divide(labelled(), steps_per_epoch=3)
    assert divide(labelled())[0]["train"].steps is None and divide(streams, steps_per_epoch=3)[0]["train"].steps == 3


def test_a_sampler_is_a_function_of_the_indices_or_draws_from_all() -> None:
    LABELS[:] = [0, 1] * 5
    data = replace(labelled(), sampler=[1, 1, 2])  # type: ignore[arg-type]
    sampler = divide(data)[0]["train"].sampler
    assert sampler is not None and list(sampler(torch.arange(10))) == [1, 1, 2]
    with pytest.raises(RequestError, match="its sampler draws from all training samples, and some are held out"):
        divide(data, val_fraction=0.2)
    data = replace(data, sampler=lambda indices: indices[:2].tolist())
    splits, _ = divide(data, val_fraction=0.2)
    assert splits["train"].sampler is data.sampler and splits["val"].sampler is splits["test"].sampler is None
    assert divide(labelled(), val_fraction=0.2)[0]["train"].sampler is None


def test_rounding_that_holds_out_enough_leaves_small_classes_whole() -> None:
    """A tenth of 5 times 6 and of 2 times 4 samples: 0.6 and 0.4 a class; five are more than 3.8 already."""
    labels = torch.tensor([0] * 6 + [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6 + [5] * 4 + [6] * 4)
    assert shares(hold_out(labels, 38, 0.1), labels) == [1, 1, 1, 1, 1, 0, 0]


def test_the_largest_of_the_small_classes_give_a_sample_each() -> None:
    labels = torch.tensor([0] * 2 + [1] * 4 + [2] * 3 + [3] + [4] * 2)
    assert shares(hold_out(labels, 12, 0.1), labels) == [0, 1, 0, 0, 0]  # 1.2 samples, and 0.4 of the largest class
    assert shares(hold_out(labels, 12, 0.001), labels) == [0, 1, 0, 0, 0]
    assert shares(hold_out(labels, 12, 0.24), labels) == [1, 1, 1, 0, 0]


def test_a_limit_draws_from_a_shuffle_of_its_own() -> None:
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(2)).tolist()
    assert spread(None, 50, 7).tolist() == sorted(shuffled[:7])
    labels = torch.tensor([0, 2] * 25)
    assert spread(labels, 50, 6).tolist() == sorted(
        [i for i in shuffled if i % 2 == 0][:3] + [i for i in shuffled if i % 2][:3]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Image files


def files_of(*names: str, missing: str = "") -> ImageFiles:
    return ImageFiles(names, [number % 2 for number in range(len(names))], no_files=set(missing))


def of_files(missing: str, **parts: Any) -> datasets.ImageData:
    """Ten files for training, a to j, and four for the test, x, y, z, w."""
    return datasets.ImageData(
        **{"train": files_of(*"abcdefghij", missing=missing), "test": files_of(*"xyzw", missing=missing), **parts},
        classes=["one", "two"],
    )


TRAINING = " (dataset.skip_unreadable=true leaves {} out)"


@pytest.mark.parametrize(
    ("missing", "skip", "says"),
    [
        ("c", False, "c{}; replace or remove it" + TRAINING.format("it")),
        ("hcy", False, "c{}, nor 1 other of the train split; replace or remove them" + TRAINING.format("them")),
        ("cha", False, "a{}, nor 2 others of the train split; replace or remove them" + TRAINING.format("them")),
        ("jihcba", False, "a{}, nor 5 others of the train split; replace or remove them" + TRAINING.format("them")),
        ("cy", True, "y{}; replace or remove it"),
        ("zy", False, "y{}, nor 1 other of the test split; replace or remove them"),
        ("ca", True, None),
        ("", False, None),
        ("q", False, None),
    ],
)
def test_what_is_no_file_is_told_before_the_run(missing: str, skip: bool, says: str | None) -> None:
    if says is None:
        splits, _ = divide(of_files(missing), skip_unreadable=skip)
        assert [split.skip_unreadable for split in splits.values()] == [skip, False]
        return
    with pytest.raises(RequestError) as refused:
        divide(of_files(missing), skip_unreadable=skip)
    assert str(refused.value) == says.format(": cannot be read, as it is no regular file or a link to nothing")


def test_what_is_no_file_is_not_left_out_of_validation() -> None:
    data = of_files("v", val=files_of(*"uv", missing="v"))
    for skip in (True, False):
        with pytest.raises(RequestError, match=r"^v: cannot be read, .* link to nothing; replace or remove it$"):
            divide(data, skip_unreadable=skip)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of what decodes files: "images", and what it was "asked"; of "bad" rows they cannot be read."""
    known: dict[str, Any] = {"asked": [], "bad": {}}

    def cached_images(files: ImageFiles, *given: Any) -> tuple[Tensor, dict[int, str]]:
        known["asked"].append((str(files.paths[0]), *given))
        bad = {row: error for row, error in known["bad"].items() if files.paths[0] == "a"}
        return images_of(len(files)), bad

    monkeypatch.setattr("engine.data.cache.cached_images", cached_images)
    monkeypatch.setattr(datasets, "made", lambda: known.get("data") or of_files(""), raising=False)
    return known


def from_cache(**changes: Any) -> dict[str, Any]:
    given = {"cache": True, "cache_dir": "kept", "skip_unreadable": False, "val_fraction": 0.0}
    return settings(**{**given, "_target_": "datasets.made", **changes})


RESIZED = {"Resize": {"size": [4, 4]}}
FLIP = "RandomHorizontalFlip"


def test_files_are_decoded_once_for_all_splits(decoded: dict[str, Any]) -> None:
    splits, _ = load_splits(from_cache(val_fraction=0.2))
    assert decoded["asked"] == [("a", None, Path("kept"), False), ("x", None, Path("kept"), False)]
    assert list(splits) == ["train", "val", "test"] and splits["train"].part[0] is splits["val"].part[0]
    for name, count in (("train", 8), ("val", 2), ("test", 4)):
        images, labels = splits[name].part
        assert len(splits[name]) == count and torch.equal(images, images_of(len(images)))
        assert torch.equal(labels, torch.arange(len(images)) % 2)
    decoded["asked"].clear()
    assert list(load_splits(from_cache(), only="test")[0]) == ["test"] and len(decoded["asked"]) == 1
    decoded["asked"].clear()
    assert isinstance(load_splits(from_cache(cache=False))[0]["train"].part, ImageFiles) and not decoded["asked"]


@pytest.mark.parametrize(
    ("for_training", "for_evaluation", "size"),
    [
        ([], [], None),
        ([FLIP], [], None),
        ([FLIP, RESIZED], [FLIP, RESIZED], None),
        ([RESIZED], [RESIZED], [4, 4]),
        ([RESIZED, FLIP, FLIP], [RESIZED], [4, 4]),
        ([RESIZED], [], "refused"),
        ([], [RESIZED], "refused"),
        ([RESIZED], [FLIP, RESIZED], "refused"),
        ([RESIZED], [{"Resize": {"size": [4, 5]}}], "refused"),
        ([{"Resize": {"size": [5, 4]}}], [RESIZED], "refused"),
    ],
)
def test_the_cache_has_the_resize_that_all_images_meet_first(
    decoded: dict[str, Any], for_training: list[Any], for_evaluation: list[Any], size: Any
) -> None:
    given = from_cache(train_transforms=for_training, eval_transforms=for_evaluation)
    if size == "refused":
        with pytest.raises(RequestError, match="put the same Resize first in train_transforms and eval_transforms"):
            load_splits(given)
        return
    load_splits(given)
    for asked in decoded["asked"]:
        assert (asked[1] and list(asked[1].size)) == size


def test_what_cannot_be_decoded_is_left_out_of_training_only(
    decoded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for bad, told in (
        ({}, ""),
        ({3: "d: bad"}, "a training image is left out: d: bad\n"),
        ({3: "d: bad", 1: "b: bad"}, "2 training images cannot be read and are left out; the first: b: bad\n"),
        ({9: "j", 4: "e", 7: "h"}, "3 training images cannot be read and are left out; the first: e\n"),
    ):
        decoded["bad"] = bad
        splits, _ = load_splits(from_cache(skip_unreadable=True))
        assert splits["train"].indices is not None and splits["test"].indices is not None
        assert splits["train"].indices.tolist() == [row for row in range(10) if row not in bad]
        assert splits["test"].indices.tolist() == [0, 1, 2, 3] and capsys.readouterr().out == told
        assert decoded["asked"][-1][3] is True


@pytest.mark.parametrize("name", ["val", "test"])
def test_what_cannot_be_decoded_is_told_where_nothing_is_skipped(decoded: dict[str, Any], name: str) -> None:
    decoded["data"] = of_files("", train=files_of(*"klmnop"), **{name: files_of(*"abcd")})
    decoded["bad"] = {2: "c: bad", 1: "b: bad"}
    says = rf"^b: bad; 2 of the 4 images cannot be read \(in the {name} split, where nothing is skipped\)$"
    with pytest.raises(RequestError, match=says):
        load_splits(from_cache(skip_unreadable=True))


def test_a_cache_is_for_files(decoded: dict[str, Any]) -> None:
    LABELS[:] = [0, 1] * 5
    decoded["data"] = labelled()
    with pytest.raises(RequestError, match=r"^dataset.cache=true: for image files, and datasets.made has none; set it"):
        load_splits(from_cache())


def test_how_many_samples_a_class_has() -> None:
    labels = torch.tensor([2, 0, 2, 2, 1, 0])
    names = ["a", "b", "c", "d"]
    some = Split((images_of(6), labels), torch.tensor([0, 1, 2, 5]), 4)
    assert class_counts(some, names) == {"a": 2, "b": 0, "c": 2, "d": 0}
    assert class_counts(Split(Unlabelled(), torch.arange(30), 4), names) is None
    assert class_counts(Split((images_of(6), labels), None, 4), names) is None  # as a stream, which is not counted


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": Stream()}, "Stream is iterable-style, and gives what it gives"),
        ({"train": Unlabelled()}, "Unlabelled does not tell its labels; give it .targets"),
        ({"sampler": lambda indices: indices.tolist()}, "the data has a sampler, which says what is drawn"),
    ],
)
def test_classes_that_cannot_be_drawn_equally_often(changes: dict[str, Any], says: str) -> None:
    LABELS[:] = [0] * 9 + [1] * 3
    with pytest.raises(RequestError, match=f"^dataset.balance=true: {says}"):
        divide(replace(labelled(), **changes), balance=True, steps_per_epoch=1 if "Stream" in says else None)
    splits, _ = load_splits(settings(balance=True))
    assert splits["train"].balance and not splits["val"].balance and not splits["test"].balance
    assert not load_splits(settings())[0]["train"].balance  # a YAML of one's own may know of no such setting


# ---------------------------------------------------------------------------------------------------------------------
# Cross-validation


def folds_of(labels: list[int], folds: int, **changes: Any) -> list[dict[str, list[int]]]:
    LABELS[:] = labels
    return [members(settings(folds=folds, fold=fold, **changes)) for fold in range(folds)]


@pytest.mark.parametrize(
    ("labels", "folds"),
    [
        ([0] * 10 + [1] * 20, 5),
        ([0, 1, 2] * 7, 2),
        ([0] * 11 + [1] * 4 + [2] * 7 + [3] * 3, 4),  # 25 samples, and no class that four divides
        ([0] * 5 + [1] * 2 + [2] * 3, 10),  # every sample a fold
        ([0] * 6 + [2] * 6, 3),  # no sample of class 1
    ],
)
def test_folds_are_a_partition_even_in_size_and_in_every_class(labels: list[int], folds: int) -> None:
    found = folds_of(labels, folds)
    assert sorted(place for fold in found for place in fold["val"]) == list(range(len(labels)))
    sizes = [len(fold["val"]) for fold in found]
    assert max(sizes) - min(sizes) <= 1
    for label in set(labels):
        counts = [sum(labels[place] == label for place in fold["val"]) for fold in found]
        assert max(counts) - min(counts) <= 1
    for fold in found:
        assert sorted(fold["train"] + fold["val"]) == list(range(len(labels)))  # nothing in both
        assert {labels[place] for place in fold["train"]} == set(labels)  # every class is learned
        assert fold["test"] == found[0]["test"] == list(range(5 * (max(labels) + 1)))


def test_folds_are_of_the_data_and_of_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a shuffle of each class, one class after the other, they take the samples in turns."""
    labels = [0, 1] * 8 + [1] * 9
    torch.manual_seed(5)
    found = folds_of(labels, 4, val_fraction=0.5)
    told = capsys.readouterr().out.splitlines()
    assert told[1] == "dataset.fold=1 of 4: 6 samples of 25 validate, and dataset.val_fraction is not used"
    torch.manual_seed(6)
    assert folds_of(labels, 4, val_fraction=0.0) == found
    shuffled = torch.randperm(25, generator=torch.Generator().manual_seed(3)).tolist()
    dealt = sorted(shuffled, key=lambda place: labels[place])
    assert [fold["val"] for fold in found] == [sorted(dealt[fold::4]) for fold in range(4)]
    some = max(found[0]["val"]) - min(found[0]["val"])
    assert some > 10, "a fold is no stretch of the file"
    limited = folds_of(labels, 4, limit=3)
    assert all(set(a["val"]) < set(b["val"]) for a, b in zip(limited, found, strict=True))


def test_the_fingerprint_tells_folds_apart() -> None:
    LABELS[:] = [0] * 10 + [1] * 10
    texts = [fingerprint(load_splits(settings(folds=5, fold=fold))[0]) for fold in range(5)]
    assert len(set(texts)) == 5 and texts[3].endswith(", fold 3 of 5")
    assert texts[0].startswith("train 16 ") and ", val 4 " in texts[0]


def test_folds_of_samples_without_known_labels_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = [members(settings("unlabelled", folds=4, fold=fold))["val"] for fold in range(4)]
    assert sorted(place for fold in found for place in fold) == list(range(30)) and sorted(map(len, found)) == [
        7,
        7,
        8,
        8,
    ]
    assert "Unlabelled has no .targets: validation is held out at random" in capsys.readouterr().out


def test_a_validation_part_of_the_datas_own_is_joined_for_folds(capsys: pytest.CaptureFixture[str]) -> None:
    LABELS[:] = [0, 1] * 5
    data = replace(labelled(), val=(images_of(20)[10:], torch.tensor([0] * 5 + [1] * 5)))
    seen = []
    for fold in range(4):
        splits, _ = divide(data, folds=4, fold=fold)
        val, train = splits["val"], splits["train"]
        assert val.indices is not None and train.indices is not None and len(train) + len(val) == 20
        numbers = val.part[0][val.indices][:, 0, 0, 1].tolist()
        expected = [place % 2 if place < 10 else int(place >= 15) for place in numbers]
        assert val.part[1][val.indices].tolist() == expected
        seen += numbers
    assert sorted(seen) == list(range(20))
    assert "dataset.folds=4: its 10 training and 10 validation samples are joined" in capsys.readouterr().out
    files = [ImageFiles([f"{part}{i}.png" for i in range(4)], [0, 1, 0, 1], no_files={f"{part}0.png"}) for part in "tv"]
    with pytest.raises(RequestError, match=r"^[tv]0\.png: cannot be read"):
        divide(replace(data, train=files[0], val=files[1]), folds=2, fold=0)
    files = [ImageFiles([f"{part}{i}.png" for i in range(4)], [0, 1, 0, 1], 1, 99) for part in "tv"]
    splits, _ = divide(replace(data, train=files[0], val=files[1]), folds=2, fold=0)
    joined = splits["val"].part
    assert joined is splits["train"].part and (joined.channels, joined.max_pixels) == (1, 99)
    assert joined.paths.tolist() == [*files[0].paths, *files[1].paths] and joined.targets.tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"folds": 2}, "dataset.folds=2: which of them validates? dataset.fold=0, or -m dataset.fold=0,1"),
        ({"fold": 1}, "dataset.fold=1: of how many? set dataset.folds too"),
        ({"folds": 4, "fold": 4}, "dataset.fold=4: expected 0 to 3, as dataset.folds=4"),
        ({"folds": 4, "fold": -1}, "dataset.fold=-1: expected 0 to 3, as dataset.folds=4"),
        ({"folds": 1, "fold": 0}, "dataset.folds=1: expected at least two"),
        ({"folds": 11, "fold": 0}, "dataset.folds=11: there are only 10 samples to divide"),
    ],
)
def test_folds_that_there_are_not_are_refused(changes: dict[str, int], says: str) -> None:
    LABELS[:] = [0, 1] * 5
    with pytest.raises(RequestError) as refused:
        divide(labelled(), **changes)
    assert str(refused.value) == says


def test_data_that_cannot_be_divided_into_folds(capsys: pytest.CaptureFixture[str]) -> None:
    LABELS[:] = [0] * 9 + [1] * 2
    whole = labelled()
    divide(whole, folds=3, fold=0)
    assert "fewer samples than folds, so that some folds validate without: class 1\n" in capsys.readouterr().out
    of_other_shape = (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    cases: dict[str, datasets.ImageData] = {
        r"^dataset.folds=3: Stream is iterable-style, so its samples": replace(whole, train=Stream()),
        r"\(images \[1, 1, 2\] and images \[1, 4, 4\]\) cannot be joined": replace(whole, val=of_other_shape),
        r"\(images \[1, 1, 2\] and Unlabelled\) cannot be joined": replace(whole, val=Unlabelled()),
        r"\(images \[1, 1, 2\] and Stream\) cannot be joined": replace(whole, val=Stream()),
        "knows no validation samples": replace(whole, val=whole.test, sampler=lambda indices: indices.tolist()),
        "that are left, or leave out dataset.folds and fold": replace(whole, sampler=[0, 1]),  # type: ignore[arg-type]
    }
    LABELS[:] = [0] * 9 + [1]
    cases["a single sample of class class 1, and where it validates none is left"] = labelled()
    for says, data in cases.items():
        with pytest.raises(RequestError, match=says):
            divide(data, folds=3, fold=0, steps_per_epoch=1 if "Stream is" in says else None)
