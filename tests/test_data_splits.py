"""Which samples are for training, validation and test: sizes and members counted by hand, the same for every seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

import datasets
from engine.data.splits import divide, fingerprint, load_splits
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
    assert limited == members(settings(val_fraction=0.2, limit=limit))


def test_a_split_that_is_asked_for_alone_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [0] * 30 + [1] * 20)
    whole = members(settings())
    for name in ("train", "val", "test"):
        (only,) = load_splits(settings(), only=name)[0].items()
        assert only[0] == name and only[1].indices is not None and only[1].indices.tolist() == whole[name]


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
